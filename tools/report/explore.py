"""What is in a collection: clusters, duplicates, lonely images, doubtful labels.

Cosines are of embeddings less their mean: those of the embeddings themselves are all near 1.
"""

from collections import Counter

import torch
import torch.nn.functional as F

from data import balanced_subset
from images.copies import LIKE_PIXELS, alike, nearest_rows, outlines
from infra import files
from infra.device import generator
from tools.lists import write_csv
from tools.probe import probe_predictions

MOST = 10_000  # images that k-means is fitted to, and up to which all pairs are compared in full
N_COMPONENTS = 128  # of more images: principal components, by which candidates are chosen
N_NEAREST = 5  # candidates of each image
N_BOUND = 1000  # images whose pairs give the bound for duplicates
FEW_PAIRS = 1e-5  # the share of them that may be above the bound
KINDS = ("same file", "same pixels", "similar")
LISTS = {  # of each file: its columns
    "clusters": ("path", "cluster", "cosine"),
    "duplicates": ("group", "kind", "path"),
    "lonely": ("path", "cosine"),
    "doubtful": ("path", "label", "predicted", "confidence", "split"),
}


def explore(collection, probe, n_clusters):
    """Return ({name of a list: what is found}, the bound of similar images).

    Without pictures there are no duplicates, and without a probe no doubtful labels. probe: the
    content of probe.pt, or {}. Rows are those of the Collection.
    clusters: (rows, cosines to the centre) of each, the largest first, in it the nearest.
    duplicates: groups of (kind, row). lonely: (cosine to the nearest other image, row), the
    loneliest first. doubtful: (confidence, row, predicted class), the most confident first.
    """
    x = centred(collection.embeddings)
    cosine, nearest = nearest_others(x)
    found = {"clusters": clusters_of(x, n_clusters)}
    bound = 1.0
    if (collection.places >= 0).any():
        bound = bound_of(x, collection)
        pairs = similar_pairs(cosine, nearest, bound, collection)
        found["duplicates"] = duplicate_groups(collection, pairs)
    if len(x) > 1:
        found["lonely"] = sorted(zip(cosine[:, 0].tolist(), range(len(x)), strict=True))
    if probe:
        found["doubtful"] = doubtful_labels(collection, probe)
    return found, bound


def centred(embeddings):
    """Return the embeddings (N, d) less their mean, as unit vectors."""
    return F.normalize(embeddings - embeddings.mean(0), dim=1)


def clusters_of(x, k):
    """Return at most k clusters of x (N, d), unit vectors, by k-means: see explore."""
    from sklearn.cluster import KMeans

    index = balanced_subset(None, len(x), MOST, generator(0, "clusters"))
    kmeans = KMeans(min(k, len(index)), n_init=3, random_state=0).fit(x[index].numpy())
    labels = torch.from_numpy(kmeans.predict(x.numpy()))
    centres = F.normalize(torch.from_numpy(kmeans.cluster_centers_), dim=1)
    clusters = []
    for label in labels.unique():  # of equal rows some clusters are empty
        rows = (labels == label).nonzero().flatten()
        cosine, order = (x[rows] @ centres[label]).sort(descending=True, stable=True)
        clusters.append((rows[order].tolist(), cosine.tolist()))
    return sorted(clusters, key=lambda cluster: -len(cluster[0]))


def nearest_others(x):
    """Return (cosines, rows) of the N_NEAREST other rows that are nearest to each of x (N, d).

    All are unit vectors. Both results are (N, at most N_NEAREST), the nearest first. Of more than
    MOST rows the candidates are found by principal components.
    """
    keys = x
    if len(x) > MOST:
        index = balanced_subset(None, len(x), 1000, generator(0, "components"))
        components = torch.linalg.svd(x[index], full_matrices=False).Vh[:N_COMPONENTS]
        keys = F.normalize(x @ components.T, dim=1)
    _, rows = nearest_rows(keys, keys, N_NEAREST + 1)  # an image may be among its own
    parts = zip(x.split(500), rows.split(500), strict=True)
    cosine = torch.cat([torch.einsum("nd,nkd->nk", part, x[near]) for part, near in parts])
    cosine[rows == torch.arange(len(x))[:, None]] = -2
    cosine, order = cosine.sort(descending=True, stable=True)
    return cosine[:, :-1], rows.gather(1, order)[:, :-1]


def bound_of(x, collection):
    """Return the cosine that a share of FEW_PAIRS of random pairs with unlike pixels exceeds.

    1 if there are no such pairs. Images of one colour do not count.
    """
    there = (collection.places >= 0).nonzero().flatten()
    rows = there[balanced_subset(None, len(there), N_BOUND, generator(0, "bound"))]
    shapes = F.normalize(outlines(collection[rows]), dim=1)
    is_plain = ~shapes.any(1)
    is_unlike = (shapes @ shapes.T <= LIKE_PIXELS) & ~is_plain & ~is_plain[:, None]
    cosine = (x[rows] @ x[rows].T)[is_unlike.triu(1)]
    return float(cosine.quantile(1 - FEW_PAIRS)) if len(cosine) else 1.0


def similar_pairs(cosine, nearest, bound, collection):
    """Return [(row, row)] of images with a cosine above the bound and like pixels.

    cosine, nearest: what nearest_others returns.
    """
    is_there = collection.places >= 0
    i, k = ((cosine > bound) & is_there[:, None] & is_there[nearest]).nonzero(as_tuple=True)
    pairs = torch.stack([i, nearest[i, k]], 1)
    parts = pairs.split(500) if len(pairs) else ()
    return [pair for part in parts for pair in alike(part, collection, collection)]


def duplicate_groups(collection, similar):
    """Return the groups of duplicates: [[(kind, row)]].

    They are the connected components of images with equal pixels and of similar ones, [(row, row)].
    The kind of an image, one of KINDS, is its closest relation to another one of its group.
    """
    from scipy.sparse import coo_array  # comes with scikit-learn
    from scipy.sparse.csgraph import connected_components

    digests = collection.digests()
    first = {}  # row with these pixels
    pairs = [(first.setdefault(digest, row), row) for row, digest in digests.items()] + similar
    N = len(collection.names)
    graph = coo_array(([1] * len(pairs), tuple(zip(*pairs, strict=True))), shape=(N, N))
    _, component = connected_components(graph, directed=False)
    groups = {}
    for kind, row in kinds_of(digests, collection):
        groups.setdefault(component[row], []).append((kind, row))
    groups = [group for group in groups.values() if len(group) > 1]
    return sorted(groups, key=lambda group: (KINDS.index(group[0][0]), -len(group)))


def kinds_of(digests, collection):
    """Return [(kind, row)] of the rows of {row: checksum of the pixels}, the closest kind first.

    An image whose pixels no other has is called similar.
    """
    n_pixels = Counter(digests.values())
    contents = {}
    for row, digest in digests.items():
        if collection.folder and n_pixels[digest] > 1:
            contents[row] = files.file_checksum(collection.folder / collection.names[row]) or row
    n_files = Counter(contents.values())
    kinds = []
    for row, digest in digests.items():
        kind = "same pixels" if n_pixels[digest] > 1 else "similar"
        kinds.append(("same file" if n_files[contents.get(row)] > 1 else kind, row))
    return sorted(kinds, key=lambda member: KINDS.index(member[0]))


def doubtful_labels(collection, probe):
    """Return the images whose label is not what the probe predicts: see explore."""
    rows = (collection.labels >= 0).nonzero().flatten()
    confidence, predicted = probe_predictions(probe, collection.embeddings[rows])
    is_wrong = predicted != collection.labels[rows]
    found = (confidence[is_wrong], rows[is_wrong], predicted[is_wrong])
    return sorted(zip(*(tensor.tolist() for tensor in found), strict=True), reverse=True)


def write_lists(lists, folder):
    """Write the CSV files of LISTS into the folder. lists: {name: rows}.

    A file of an earlier report that is not among them is removed.
    """
    for name, header in LISTS.items():
        path = folder / f"{name}.csv"
        if name in lists:
            write_csv(path, header, lists[name])
        elif path.is_file() and path.read_bytes().startswith(",".join(header).encode()):
            path.unlink()


def lists_of(found, collection):
    """Return {name: rows} of the lists of what explore found."""
    names = collection.names
    lists = {name: [] for name in found}
    for number, cluster in enumerate(found["clusters"], 1):
        for row, cosine in zip(*cluster, strict=True):
            lists["clusters"].append((names[row], number, f"{cosine:.4f}"))
    for number, group in enumerate(found.get("duplicates", ()), 1):
        lists["duplicates"] += [(number, kind, names[row]) for kind, row in group]
    for cosine, row in found.get("lonely", ()):
        lists["lonely"].append((names[row], f"{cosine:.4f}"))
    for confidence, row, predicted in found.get("doubtful", ()):
        label = collection.label_of(row)
        answer = (collection.class_names[predicted], f"{confidence:.4f}")
        lists["doubtful"].append((names[row], label, *answer, collection.splits[row]))
    return lists
