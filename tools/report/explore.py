"""What is in a collection: clusters, duplicates, lonely images, doubtful labels.

Cosines are of embeddings less their mean: those of the embeddings themselves are all near 1.
"""

from itertools import chain
from operator import itemgetter

import torch
import torch.nn.functional as F

from data import balanced_subset
from images.copies import (
    LIKE_PIXELS,
    N_COMPONENTS,
    alike,
    axes_of_sample,
    centred,
    nearest_rows,
    outlines,
)
from infra import files
from infra.console import log
from infra.device import generator
from tools.probe import probe_predictions

N_NEAREST = 5  # images that each is compared with
N_BOUND = 1000  # images whose pairs give the bound for duplicates
FEW_PAIRS = 1e-5  # the share of them that may be above the bound
LISTS = {  # of each file: its columns
    "clusters": ("path", "cluster", "cosine"),
    "duplicates": ("path", "group", "kind"),
    "lonely": ("path", "cosine"),
    "doubtful": ("path", "label", "predicted", "confidence", "split"),
}


def explore(collection, probe, n_clusters):
    """Return ({name: list}, the bound of similar images).

    The columns are those of LISTS, with the row of the Collection in the place of the path. Without
    pictures there are no duplicates, and without a probe no doubtful labels. probe: the content of
    probe.pt, or {}.
    """
    x = centred(collection.embeddings, collection.embeddings.mean(0))
    found = {"clusters": clusters_of(x, n_clusters)}
    bound = 1.0
    cosine, nearest = nearest_others(x)
    if (collection.places >= 0).any():
        bound = bound_of(x, collection)
        found["duplicates"] = duplicates(collection, cosine, nearest, bound)
    if cosine.shape[1]:
        lonely = zip(range(len(cosine)), cosine[:, 0].tolist(), strict=True)
        found["lonely"] = sorted(lonely, key=itemgetter(1))
    if probe:
        found["doubtful"] = doubtful_labels(collection, probe)
    return found, bound


def clusters_of(x, k):
    """Return [(row, cluster, cosine to its centre)] of x (N, d), unit vectors, by k-means.

    The largest cluster, 1, comes first, and in it the nearest row. Of more than N_COMPONENTS
    dimensions, k-means takes as many principal components: it copies what it is given.
    """
    from sklearn.cluster import KMeans

    k = min(k, len(x))
    few = x @ axes_of_sample(x) if x.shape[1] > N_COMPONENTS else x
    labels = KMeans(k, n_init=1, random_state=0).fit_predict(few.numpy())
    labels = torch.from_numpy(labels).long()
    centres = F.normalize(torch.zeros(k, x.shape[1]).index_add_(0, labels, x), dim=1)
    cosine = (x @ centres.T).gather(1, labels[:, None]).flatten()
    by_size = labels.bincount(minlength=k).argsort(descending=True, stable=True)
    numbers = by_size.argsort()[labels] + 1
    members = zip(range(len(x)), numbers.tolist(), cosine.tolist(), strict=True)
    return sorted(members, key=lambda member: (member[1], -member[2]))


def nearest_others(x):
    """Return (cosines, rows) of at most N_NEAREST other rows nearest to each of x (N, d)."""
    cosine, rows = nearest_rows(x, x, N_NEAREST + 1)
    cosine[rows == torch.arange(len(rows))[:, None]] = -2  # an image may be among its own
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


def duplicates(collection, cosine, nearest, bound):
    """Return [(row, group, kind)]: a group is a connected component of pairs of duplicates.

    Similar images have a cosine above the bound and like pixels. The kind of an image is its
    closest relation to another one. cosine, nearest: what nearest_others returns.
    """
    from scipy.sparse import coo_array  # comes with scikit-learn
    from scipy.sparse.csgraph import connected_components

    is_there = collection.places >= 0
    i, k = ((cosine > bound) & is_there[:, None] & is_there[nearest]).nonzero(as_tuple=True)
    same_pixels = equal_rows(collection.digests())
    paths = {row: collection.path_of(row) for row in set(chain(*same_pixels))}
    contents = {row: path and files.file_checksum(path) for row, path in paths.items()}
    pairs = {
        "same file": equal_rows(contents),
        "same pixels": same_pixels,
        "similar": alike(torch.stack([i, nearest[i, k]], 1), collection, collection),
    }
    kinds = {}  # the closest first
    for kind in pairs:
        for row in chain(*pairs[kind]):
            kinds.setdefault(row, kind)
    N = len(cosine)
    edges = torch.tensor(list(chain(*pairs.values())), dtype=torch.int64).view(-1, 2)
    graph = coo_array(([1] * len(edges), tuple(edges.T.numpy())), shape=(N, N))
    _, component = connected_components(graph, directed=False)
    groups = {}
    for row, kind in kinds.items():
        groups.setdefault(component[row], []).append((row, kind))
    order = list(pairs)
    ranked = sorted(groups.values(), key=lambda group: (order.index(group[0][1]), -len(group)))
    return [(row, number, kind) for number, group in enumerate(ranked, 1) for row, kind in group]


def equal_rows(values):
    """Return [(row, row)] of {row: value}: the first row of a value, and each other one of it."""
    first = {}
    pairs = [(first.setdefault(value, row), row) for row, value in values.items() if value]
    return [(i, j) for i, j in pairs if i != j]


def doubtful_labels(collection, probe):
    """Return [(row, label, predicted, confidence, split)] where the probe contradicts the label.

    The most confident come first.
    """
    rows = (collection.labels >= 0).nonzero().flatten()
    confidence, predicted = probe_predictions(probe, collection.embeddings)
    predictions = zip(
        rows.tolist(), predicted[rows].tolist(), confidence[rows].tolist(), strict=True
    )
    doubtful = [
        (row, collection.label_of(row), collection.class_names[label], p, collection.splits[row])
        for row, label, p in predictions
        if label != collection.labels[row]
    ]
    return sorted(doubtful, key=itemgetter(3), reverse=True)


def write_lists(found, collection, folder):
    """Write each list of what explore found as NAME.csv into the folder, with paths for rows."""
    for name, rows in found.items():
        lines = []
        for row, *cells in rows:
            cells = [f"{cell:.4f}" if isinstance(cell, float) else cell for cell in cells]
            lines.append((collection.names[row], *cells))
        files.write_csv(folder / f"{name}.csv", LISTS[name], lines)
        log.info(f"* List: {folder / name}.csv, {len(lines):,} rows")
