"""Copies of training images among the test images: they make an accuracy a test of memory."""

import torch
import torch.nn.functional as F

from images.cache import ImageFile, digest_of
from infra.components import principal_axes
from infra.device import generator

MOST_SEARCHED = 10_000  # test images whose near copies are searched: among 50,000 it takes seconds
MANY_PAIRS = 10**8  # of rows, above which the nearest are chosen by principal components
N_COMPONENTS = 128
N_CANDIDATES = 2  # near copies of each test image that are looked at
# Cosines of a near copy and its original. Either alone is too little: images of one kind have such
# embeddings, and images with the same light and dark parts such pixels.
LIKE_EMBEDDINGS = 0.9
LIKE_PIXELS = 0.9


def find_copies(images, others, x, x_others, device):
    """Return which images have a copy among the others, with equal pixels or nearly so.

    images, others: uint8 (N, 3, H, W) and (M, 3, H, W), or ImageFiles. x, x_others: their
    embeddings, float32 (N, d) and (M, d). Near copies are searched for at most MOST_SEARCHED of the
    images. Returns a dict: n, the number of images that were searched; pairs, int64 (K, 2), the
    rows of an image and of its copy; n_equal, how many have equal pixels: they come first.
    """
    pairs = equal_pairs(images, others)
    n_equal = len(pairs)
    rows = (
        torch.randperm(len(images), generator=generator(0, "copies"))[:MOST_SEARCHED].sort().values
    )
    for i, j in near_pairs(rows, images, others, x, x_others, device):
        pairs.setdefault(i, j)
    return {
        "n": len(rows),
        "n_equal": n_equal,
        "pairs": torch.tensor(list(pairs.items()), dtype=torch.int64).view(-1, 2),
    }


def copies_text(copies, kind="test"):
    """Return what find_copies found of test or other images among training images, in a line."""
    text = (
        f"{len(copies['pairs'])} of {copies['n']:,} {kind} images are copies of training images, "
        f"or nearly so"
    )
    return f"{text}; {copies['n_equal']} with equal pixels" if copies["n_equal"] else text


def equal_pairs(images, others):
    """Return {row of an image: row of another one with the same pixels}."""
    rows = {digest: j for j, digest in enumerate(digests_of(others))}
    return {i: rows[digest] for i, digest in enumerate(digests_of(images)) if digest in rows}


def digests_of(images):
    """Return the checksum of each image."""
    if isinstance(images, ImageFile):
        return images.digests.tolist()
    return [digest_of(image) for image in images.contiguous().numpy()]


def near_pairs(rows, images, others, x, x_others, device):
    """Return [(row of an image, row of its near copy)] of these rows, the nearest copy first."""
    mean = x_others.mean(0)
    queries, keys = centred(x[rows], mean), centred(x_others, mean)
    cosine, nearest = nearest_rows(queries, keys, N_CANDIDATES, device)
    i, k = (cosine > LIKE_EMBEDDINGS).nonzero(as_tuple=True)
    return alike(torch.stack([rows[i], nearest[i, k]], 1), images, others)


def centred(embeddings, mean):
    """Return embeddings (N, d) less a mean (d,), as unit vectors."""
    x = embeddings - mean
    return F.normalize(x, dim=1, out=x)


def nearest_rows(x, others, k, device="cpu"):
    """Return (cosines, rows) of the k others (M, d) that are nearest to each x (n, d).

    All are unit vectors. Both results are (n, k), on the CPU, the nearest first. The rows of more
    than MANY_PAIRS are chosen by principal components of the others, which find nearly all.
    """
    queries, keys = x, others
    if len(x) * len(others) > MANY_PAIRS:
        axes = axes_of_sample(others)
        queries, keys = (F.normalize(e @ axes, dim=1) for e in (x, others))
    keys = keys.to(device)
    cosines, rows = [], []
    for part, query in zip(x.split(500), queries.split(500), strict=True):
        near = (query.to(device) @ keys.T).topk(min(k, len(others))).indices.cpu()
        cosine = torch.einsum("nd,nkd->nk", part, others[near])
        cosine, order = cosine.sort(descending=True, stable=True)
        cosines.append(cosine)
        rows.append(near.gather(1, order))
    return torch.cat(cosines), torch.cat(rows)


def axes_of_sample(x):
    """Return N_COMPONENTS principal axes of 1,000 random rows of x (N, d): (d, at most as many)."""
    sample = x[torch.randperm(len(x), generator=generator(0, "components"))[:1000]]
    return principal_axes(sample, N_COMPONENTS)


def alike(pairs, images, others):
    """Return those of the pairs, int64 (n, 2), whose pixels are alike: [(row, row)]."""
    found = []
    for part in pairs.split(500) if len(pairs) else ():
        i, j = part.unbind(1)
        is_like = F.cosine_similarity(outlines(images[i]), outlines(others[j])) > LIKE_PIXELS
        found += map(tuple, part[is_like].tolist())
    return found


def outlines(images, side=16):
    """Return images (n, 3, H, W) shrunk to `side`, less the mean of each colour: (n, 3 side²)."""
    x = F.adaptive_avg_pool2d(images.float(), side)
    return (x - x.mean((2, 3), keepdim=True)).flatten(1)
