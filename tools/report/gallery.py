"""Pictures of images for a report.

Neighbours, confusions, clusters, near duplicates, and images that resemble no other.
"""

import base64
import io
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image

from data import balanced_subset
from images.copies import copies_text
from infra.device import generator

# Embeddings that an overview searches for clusters and pairs: all pairs of so many take seconds.
MOST = 10_000
DUPLICATE = 0.98  # cosine


class Picture(NamedTuple):
    """An <img> of the page."""

    src: str  # a data: URI
    alt: str
    mark: str = ""  # right, wrong or nothing: the colour of its border
    note: str = ""  # a line below it


def data_uri(content, kind):
    """Return bytes as a data: URI of an image. kind: png or svg+xml."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def thumb(pixels, alt, mark="", note=""):
    """Return a small Picture of an image uint8 (3, H, W)."""
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())  # (3, H, W) -> (H, W, 3)
    image.thumbnail((64, 64))
    out = io.BytesIO()
    image.save(out, "PNG")
    return Picture(data_uri(out.getvalue(), "png"), alt, mark, note)


def image_at(image_set, i):
    """Return the pixels of image i, an int64 scalar tensor: uint8 (3, H, W)."""
    return image_set.images[i[None]][0]


def name_of(image_set, i):
    """Return the class name of image i, None if it has no label."""
    label = -1 if image_set.labels is None else image_set.labels[i]
    return None if label < 0 else image_set.class_names[label]


def confused_pairs(matrix, truth, predicted, class_names, test_set, n_pairs=8, n_examples=6):
    """Return a dict for each of the pairs of classes that are confused most: text and examples.

    matrix: the confusion matrix (C, C). truth, predicted: int64 (M,). examples: a list of Pictures,
    empty if test_set is None.
    """
    wrong = matrix.clone().fill_diagonal_(0)
    pairs = []
    for cell in wrong.flatten().argsort(descending=True, stable=True)[:n_pairs].tolist():
        i, j = divmod(cell, len(class_names))
        if wrong[i, j] == 0:
            break
        text = f"{class_names[i]}, taken for {class_names[j]}"
        examples = []
        if test_set:
            index = ((truth == i) & (predicted == j)).nonzero().flatten()[:n_examples]
            examples = [thumb(pixels, text) for pixels in test_set.images[index]]
        counts = f"{int(wrong[i, j])} of {int(matrix[i].sum())}"
        pairs.append({"text": f"{text}: {counts}", "examples": examples})
    return pairs


def neighbours(encoded, image_sets, split, seed, n_queries=10, n_neighbours=8):
    """Return a dict for each of ten images: query, name and neighbours.

    query: its Picture. name: its class name. neighbours: Pictures of the training images that are
    nearest by cosine. encoded: {split: embeddings and labels}. image_sets: {split: ImageSet}.
    """
    queries = encoded[split]["embeddings"]
    others = encoded["train"]["embeddings"]
    query_set = image_sets[split]
    index = balanced_subset(query_set.labels, len(queries), n_queries, generator(seed, "report"))
    cosine = F.normalize(queries[index], dim=1) @ F.normalize(others, dim=1).T  # (n_queries, N)
    n_others = len(others)
    if split == "train":
        cosine[torch.arange(len(index)), index] = -2  # an image is no neighbour of itself
        n_others -= 1
    top = cosine.topk(min(n_neighbours, n_others))
    rows = []
    for i, cosines, nearest in zip(index, top.values, top.indices, strict=True):
        name = name_of(query_set, i)
        pictures = [
            neighbour_thumb(image_sets["train"], j, value, name)
            for j, value in zip(nearest, cosines.tolist(), strict=True)
        ]
        query = thumb(image_at(query_set, i), name or "no label")
        rows.append({"query": query, "name": name or "", "neighbours": pictures})
    return rows


def neighbour_thumb(train_set, i, cosine, query_name):
    """Return the Picture of training image i, marked by whether it is of the query's class."""
    name = name_of(train_set, i)
    mark = ""
    note = f"{cosine:.2f}"
    if query_name and name:
        mark = "right" if name == query_name else "wrong"
        note = f"{'✓' if name == query_name else '✗'} {note}"
    return thumb(image_at(train_set, i), f"neighbour: {name or 'no label'}", mark, note)


def overview(content, image_set, seed):
    """Return what a report shows of the training images.

    A dict: n of n_images were searched, a random part if there are more than MOST; clusters,
    duplicates, n_duplicates and outliers. content: that of artifacts/train.pt.
    """
    n_images = len(content["embeddings"])
    rng = generator(seed, "overview")
    index = balanced_subset(content.get("labels"), n_images, MOST, rng)  # int64 (n,)
    x = F.normalize(content["embeddings"][index], dim=1)
    titles = [title_of(content, i) for i in index.tolist()]

    def thumbs(rows, notes=None):
        notes = notes or [""] * len(rows)
        return [
            thumb(image_at(image_set, index[row]), titles[row], note=note)
            for row, note in zip(rows, notes, strict=True)
        ]

    clusters = [{"n": len(rows), "examples": thumbs(rows[:12])} for rows in clusters_of(x)]
    pairs, n_duplicates = near_duplicates(x)
    duplicates = [
        {"cosine": f"{cosine:.3f}", "titles": (titles[i], titles[j]), "examples": thumbs((i, j))}
        for cosine, i, j in pairs
    ]
    outliers = []
    if len(x) > 1:
        cosine = nearest_cosine(x)
        rows = cosine.argsort(stable=True)[:12]
        outliers = thumbs(rows.tolist(), [f"{value:.2f}" for value in cosine[rows].tolist()])
    return {
        "n": len(index),
        "n_images": n_images,
        "clusters": clusters,
        "duplicates": duplicates,
        "n_duplicates": n_duplicates,
        "outliers": outliers,
    }


def leaks(encoded, image_sets, n=12):
    """Return what a report shows of the test images that are copies of training images.

    None if they were not searched, else a dict: text and pairs, the first n, each with titles and
    examples, two Pictures. encoded, image_sets: {split: ...}; without images there are no Pictures.
    """
    copies = encoded.get("test", {}).get("copies")
    if not copies:
        return None
    pairs = []
    for rows in copies["pairs"][:n]:
        places = list(zip(("test", "train"), rows, strict=True))
        titles = [title_of(encoded[split], int(i)) for split, i in places]
        pairs.append({"titles": titles, "examples": []})
        if all(image_sets.values()):
            pixels = [image_at(image_sets[split], i) for split, i in places]
            pairs[-1]["examples"] = list(map(thumb, pixels, titles))
    return {"text": copies_text(copies), "pairs": pairs}


def title_of(content, i):
    """Return what row i of an artifact is: its path, or its index in the data set."""
    if "paths" in content:
        return content["paths"][i]
    return f"image {int(content['indices'][i]) if 'indices' in content else i}"


def clusters_of(x, k=10):
    """Return at most k clusters of x (n, d), unit vectors, by k-means: lists of rows.

    The largest cluster comes first; in each, the rows nearest to its centre.
    """
    from sklearn.cluster import KMeans

    k = min(k, len(x))
    kmeans = KMeans(k, n_init=3, random_state=0).fit(x.numpy())
    labels = torch.from_numpy(kmeans.labels_)
    distance = torch.from_numpy(kmeans.transform(x.numpy()).min(1))
    clusters = []
    for i in range(k):
        rows = (labels == i).nonzero().flatten()
        if len(rows):  # of equal rows some clusters are empty
            clusters.append(rows[distance[rows].argsort(stable=True)].tolist())
    return sorted(clusters, key=len, reverse=True)


def cosine_blocks(x, size=1000):
    """Yield (first, cosine (m, n)) of blocks of rows of x (n, d), unit vectors.

    The cosine of a row with itself is -2.
    """
    for first in range(0, len(x), size):
        cosine = x[first : first + size] @ x.T
        cosine[torch.arange(len(cosine)), torch.arange(first, first + len(cosine))] = -2
        yield first, cosine


def nearest_cosine(x):
    """Return the cosine of each row of x (n, d), unit vectors, with the row nearest to it: (n,)."""
    return torch.cat([cosine.amax(1) for _, cosine in cosine_blocks(x)])


def near_duplicates(x, n=12):
    """Return (pairs, n_pairs) of the rows of x (m, d), unit vectors.

    pairs: the n pairs with the greatest cosine above DUPLICATE, as (cosine, i, j) with i < j, the
    greatest first. n_pairs: the number of all pairs above it.
    """
    pairs = []
    n_pairs = 0
    for first, block in cosine_blocks(x):
        cosine = block.triu(first + 1)  # each pair once: the columns after the row's own
        n_pairs += int((cosine > DUPLICATE).sum())
        values, cells = cosine.flatten().topk(min(n, cosine.numel()))
        for value, cell in zip(values.tolist(), cells.tolist(), strict=True):
            row, column = divmod(cell, len(x))
            if value > DUPLICATE:
                pairs.append((value, first + row, column))
    return sorted(pairs, reverse=True)[:n], n_pairs
