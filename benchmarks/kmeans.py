"""The classical features of images without labels, on a CPU: k-means on patches of 6x6 pixels.

    python -m benchmarks.kmeans --data_dir DIR --n_images 5000 --n_centroids 400

DIR is CIFAR-10 as image files, see study.py. Patches are normalised in contrast and whitened,
centroids are found by spherical k-means, a pixel's features are the triangle activation of its
patch, and an image's are their sums over its four quadrants, standardised; then this program's
linear probe. Each run is a row of benchmarks/results/kmeans.json. Source: Coates, Ng, Lee, "An
analysis of single-layer networks in unsupervised feature learning", 2011.
"""

import time

import torch
import torch.nn.functional as F

from benchmarks.common import machine, parser, this_commit
from data import load_images, sample
from evaluate import Fit, linear_probe
from infra import files
from infra.device import configure, generator

SIZE = 6  # pixels of a patch
N_PATCHES = 100_000  # that the whitening and the centroids are computed from
N_ITERATIONS = 20


def patches_of(images):
    """Return all patches of uint8 images (N, 3, H, W), normalised in contrast.

    float32 (N, (H - 5) (W - 5), 108).
    """
    x = F.unfold(images.float(), SIZE).mT
    return (x - x.mean(2, keepdim=True)) / (x.var(2, keepdim=True) + 10).sqrt()


def whitening(x):
    """Return (mean, W) such that (x - mean) W has about the unit covariance (ZCA). x: (n, d)."""
    mean = x.mean(0)
    values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    return mean, vectors @ torch.diag((values + 0.1).rsqrt()) @ vectors.T


def spherical_kmeans(x, n_centroids, rng):
    """Return unit vectors (n_centroids, d), the centroids of x (n, d) by the greatest product."""
    centroids = F.normalize(x[torch.randperm(len(x), generator=rng)[:n_centroids]], dim=1)
    for _ in range(N_ITERATIONS):
        parts = [(part @ centroids.T).max(1) for part in x.split(5000)]
        product = torch.cat([values for values, _ in parts])
        nearest = torch.cat([indices for _, indices in parts])
        sums = torch.zeros_like(centroids).index_add_(0, nearest, product[:, None] * x)
        empty = sums.norm(dim=1) == 0
        sums[empty] = x[torch.randint(len(x), (int(empty.sum()),), generator=rng)]
        centroids = F.normalize(sums, dim=1)
    return centroids


def quadrant_features(images, mean, W, centroids, bs=50):
    """Return the sums of the triangle activation over the quadrants: (N, 4 n_centroids)."""
    side = images.shape[3] - SIZE + 1
    half = (side + 1) // 2
    halves = (slice(half), slice(half, None))
    out = []
    for batch in images.split(bs):
        x = torch.addmm(-mean @ W, patches_of(batch).flatten(0, 1), W)  # whitened (B side², 108)
        square = x.square().sum(1, keepdim=True) + centroids.square().sum(1)
        distance = torch.addmm(square, x, centroids.T, alpha=-2).clamp_(min=0).sqrt_()
        active = (distance.mean(1, keepdim=True) - distance).clamp_(min=0)  # triangle
        grid = active.view(len(batch), side, side, -1)  # (B, side, side, n_centroids)
        quadrants = [grid[:, rows, cols].sum((1, 2)) for rows in halves for cols in halves]
        out.append(torch.cat(quadrants, 1))
    return torch.cat(out)


@torch.no_grad()
def learn(train, test, n_centroids, rng):
    """Return standardised features of uint8 training and test images, learned from the first."""
    some = train[torch.randint(len(train), (N_PATCHES // 50,), generator=rng)]
    pool = patches_of(some)
    x = pool[:, torch.randperm(pool.shape[1], generator=rng)[:50]].flatten(0, 1)  # (N_PATCHES, 108)
    mean, W = whitening(x)
    centroids = spherical_kmeans((x - mean) @ W, n_centroids, rng)
    x = quadrant_features(train, mean, W, centroids)
    x_test = quadrant_features(test, mean, W, centroids)
    shift = x.mean(0)
    scale = x.std(0) + 0.01
    return x.sub_(shift).div_(scale), x_test.sub_(shift).div_(scale)


def kmeans_row(train, test, n_centroids, n_eval_epochs, seed):
    """Learn from the training images, fit the probe, and return the row of results."""
    wall, cpu = time.monotonic(), time.process_time()
    x, x_test = learn(train.images, test.images, n_centroids, generator(seed, "kmeans"))
    fit = Fit(n_epochs=n_eval_epochs, seed=seed, bf16=machine("cpu")["precision"] == "bf16")
    result, _ = linear_probe(x, train.labels, x_test, test.labels, len(train.class_names), fit)
    return {
        "n_images": len(train.images),
        "n_centroids": n_centroids,
        "seed": seed,
        **{name: result[name] for name in ("top1", "train_top1", "lr")},
        "seconds": time.monotonic() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "commit": this_commit(),
        "machine": machine("cpu"),
    }


def main(argv=None):
    made = parser(__doc__)
    made.add_argument("--dataset", default="folder")
    made.add_argument("--data_dir", required=True)
    made.add_argument("--n_images", type=int, help="training images, balanced (default: all)")
    made.add_argument("--n_centroids", type=int, default=400)
    made.add_argument("--n_eval_epochs", type=int, default=50)
    made.add_argument("--seed", type=int, default=42)
    options = made.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    configure(torch.device("cpu"))
    train = load_images(options.dataset, options.data_dir, True)
    test = load_images(options.dataset, options.data_dir, False)
    if options.n_images:
        train = sample(train, options.n_images, options.seed, "subset")
    row = kmeans_row(train, test, options.n_centroids, options.n_eval_epochs, options.seed)
    path = options.out / "kmeans.json"
    files.write_json(path, {"rows": [*files.read_json(path).get("rows", []), row]})
    print({name: value for name, value in row.items() if name != "machine"})


if __name__ == "__main__":
    main()
