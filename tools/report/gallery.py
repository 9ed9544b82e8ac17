"""Pictures of images for a report: neighbours, confusions, clusters, near duplicates, images that
resemble no other.
"""

import base64
import io
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image

from data import balanced_subset
from infra.device import generator

MOST = 10_000  # embeddings in which clusters and pairs are looked for; all pairs of so many take seconds
DUPLICATE = 0.98  # cosine


class Picture(NamedTuple):
    """An <img> of the page."""

    src: str  # a data: URI
    alt: str
    mark: str = ""  # right, wrong or nothing: the colour of its border
    note: str = ""  # a line below it


def data_uri(content, kind):
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def thumb(pixels, alt, mark="", note=""):
    """Return a small Picture of an image uint8 (3, H, W)."""
    picture, out = Image.fromarray(pixels.permute(1, 2, 0).numpy()), io.BytesIO()
    picture.thumbnail((64, 64))
    picture.save(out, "PNG")
    return Picture(data_uri(out.getvalue(), "png"), alt, mark, note)


def name_of(image_set, i):
    """Return the class name of image i, None if the images have no labels."""
    return None if image_set.labels is None else image_set.class_names[image_set.labels[i]]


def confused_pairs(matrix, truth, predicted, class_names, test_set, n_pairs=8, n_examples=6):
    """Return a dict for each of the pairs of classes that are confused most: its text, and
    examples, a list of Pictures.
    """
    wrong, pairs = matrix.clone().fill_diagonal_(0), []
    for place in wrong.flatten().argsort(descending=True, stable=True)[:n_pairs].tolist():
        i, j = divmod(place, len(class_names))
        if wrong[i, j] == 0:
            break
        taken = f"{class_names[i]}, taken for {class_names[j]}"
        rows = ((truth == i) & (predicted == j)).nonzero().flatten()[:n_examples]
        examples = [thumb(pixels, taken) for pixels in test_set.images[rows]] if test_set else []
        pairs.append(
            {"text": f"{taken}: {int(wrong[i, j])} of {int(matrix[i].sum())}", "examples": examples}
        )
    return pairs


def neighbours(encoded, image_sets, split, seed, n_queries=10, n_neighbours=8):
    """Return a dict for each of ten images: query, its class name, and near, the training images
    that are nearest by cosine.
    """
    queries, others = encoded[split]["embeddings"], encoded["train"]["embeddings"]
    query_set, train_set = image_sets[split], image_sets["train"]
    rng = generator(seed, "report")
    chosen = balanced_subset(query_set.labels, len(queries), n_queries, rng)
    cosine = F.normalize(queries[chosen], dim=1) @ F.normalize(others, dim=1).T  # (n_queries, N)
    if split == "train":
        cosine[torch.arange(len(chosen)), chosen] = -2  # an image is no neighbour of itself
    lines = []
    for query, row in zip(chosen, cosine, strict=True):
        nearest = row.topk(min(n_neighbours, len(others) - (split == "train"))).indices
        truth, near = name_of(query_set, query), []
        for pixels, i in zip(train_set.images[nearest], nearest, strict=True):
            name = name_of(train_set, i)
            mark = "" if truth is None else "right" if name == truth else "wrong"
            sign = {"right": "✓ ", "wrong": "✗ "}.get(mark, "")
            near.append(
                thumb(pixels, f"neighbour: {name or 'no label'}", mark, f"{sign}{row[i]:.2f}")
            )
        (pixels,) = query_set.images[query[None]]
        lines.append(
            {"query": thumb(pixels, truth or "no label"), "name": truth or "", "near": near}
        )
    return lines


def overview(content, image_set, seed):
    """Return what a report shows of the training images: a dict of n, of_all, clusters, duplicates,
    n_duplicates and lonely.

    content: that of artifacts/train.pt. At most MOST images are looked at, a random part of more.
    """
    N = len(content["embeddings"])
    rng = generator(seed, "overview")
    rows = balanced_subset(content.get("labels"), N, MOST, rng)  # int64 (n,)
    x = F.normalize(content["embeddings"][rows], dim=1)
    titles = [title_of(content, i) for i in rows.tolist()]

    def picture(i, note):
        (pixels,) = image_set.images[rows[i][None]]
        return thumb(pixels, titles[i], "", note)

    clusters = [
        {"n": len(members), "examples": [picture(i, "") for i in members[:12]]}
        for members in clusters_of(x)
    ]
    pairs, n_pairs = near_duplicates(x)
    duplicates = [
        {
            "cosine": f"{cosine:.3f}",
            "titles": (titles[i], titles[j]),
            "examples": [picture(i, ""), picture(j, "")],
        }
        for cosine, i, j in pairs
    ]
    cosines = nearest(x)
    order = cosines.argsort(stable=True)[:12].tolist() if len(x) > 1 else []
    lonely = [picture(i, f"{cosines[i]:.2f}") for i in order]
    return {
        "n": len(rows),
        "of_all": N,
        "clusters": clusters,
        "duplicates": duplicates,
        "n_duplicates": n_pairs,
        "lonely": lonely,
    }


def title_of(content, i):
    """Return what row i of artifacts/train.pt is: its path, or its index in the data set."""
    if "paths" in content:
        return content["paths"][i]
    return f"image {int(content['indices'][i]) if 'indices' in content else i}"


def clusters_of(x, k=10):
    """Return lists of the rows of x (n, d), unit vectors: at most k clusters by k-means, the
    largest first; in each, the rows nearest to its centre first.
    """
    from sklearn.cluster import KMeans

    k = min(k, len(x))
    means = KMeans(k, n_init=3, random_state=0).fit(x.numpy())
    label, distance = (
        torch.from_numpy(means.labels_),
        torch.from_numpy(means.transform(x.numpy()).min(1)),
    )
    members = [(label == i).nonzero().flatten() for i in range(k)]
    members = [rows[distance[rows].argsort(stable=True)].tolist() for rows in members]
    return sorted(
        filter(None, members), key=len, reverse=True
    )  # of equal rows some clusters are empty


def cosine_blocks(x, size=1000):
    """Yield (first, cosine (m, n)) of blocks of rows of x (n, d), unit vectors; -2 where a row
    meets itself.
    """
    for first in range(0, len(x), size):
        cosine = x[first : first + size] @ x.T
        cosine[torch.arange(len(cosine)), torch.arange(first, first + len(cosine))] = -2
        yield first, cosine


def nearest(x):
    """Return the cosine of each row of x (n, d), unit vectors, to the row that is nearest to it:
    (n,).
    """
    return torch.cat([cosine.amax(1) for _, cosine in cosine_blocks(x)])


def near_duplicates(x, n=12):
    """Return (pairs, n_pairs) of the rows of x (m, d), unit vectors: the n pairs with the greatest
    cosine above DUPLICATE, as (cosine, i, j) with i < j, the greatest first, and the number of all
    of them.
    """
    pairs, n_pairs = [], 0
    for first, block in cosine_blocks(x):
        cosine = block.triu(first + 1)  # each pair once: the columns after the row's own
        n_pairs += int((cosine > DUPLICATE).sum())
        values, places = cosine.flatten().topk(min(n, cosine.numel()))
        found = zip(values.tolist(), places.tolist(), strict=True)
        pairs += [
            (value, first + place // len(x), place % len(x))
            for value, place in found
            if value > DUPLICATE
        ]
    return sorted(pairs, reverse=True)[:n], n_pairs
