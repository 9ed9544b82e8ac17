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


def quadrant_features(images, mean, W, centroids, dtype=torch.float32, bs=10):
    """Return the sums of the triangle activation over the quadrants: float32 (N, 4 n_centroids).

    images: uint8 (N, 3, H, H). The patches are not normalised and whitened one by one: a product
    with a matrix of the raw patches does both, and a small batch stays in the processor's cache.
    """
    # Of a patch x, mean pixel m and deviation s: the whitened one is w = (x - m) W / s - mean W.
    n_pixels = len(W)
    both = torch.cat([W, W @ centroids.T], 1)  # w, and its products with the centroids
    shift = mean @ both
    both = (both - both.mean(0)).to(dtype)  # subtracts m
    side = images.shape[3] - SIZE + 1
    quadrants = quadrant_masks(side).to(dtype)  # (4, side²)
    out = []
    for batch in images.split(bs):
        x = batch.to(dtype) - 128
        moments = torch.stack([x.float().mean(1), x.float().square().mean(1)], 1)
        m, square = F.avg_pool2d(moments, SIZE, stride=1).flatten(2).unbind(1)  # (B, side²) each
        s = ((square - m.square()) * n_pixels / (n_pixels - 1) + 10).sqrt()
        y = F.unfold(x, SIZE).mT @ both / s[:, :, None].to(dtype) - shift.to(dtype)
        w, product = y.split([n_pixels, len(centroids)], 2)
        squares = w.float().square().sum(2, keepdim=True) + 1  # ‖w‖² + ‖centroid‖²
        distance = torch.sub(squares.to(dtype), product, alpha=2).clamp_(min=0).sqrt_()
        active = distance.neg().add_(distance.mean(2, keepdim=True)).clamp_(min=0)  # triangle
        out.append((quadrants @ active).flatten(1).float())  # (B, 4, n_centroids) -> (B, ...)
    return torch.cat(out)


def quadrant_masks(side):
    """Return the quadrants of a grid of side x side pixels: float32 (4, side²) of 0 and 1."""
    halves = torch.zeros(2, side)
    halves[0, : (side + 1) // 2] = 1
    halves[1, (side + 1) // 2 :] = 1
    return torch.einsum("ir,jc->ijrc", halves, halves).reshape(4, side**2)


@torch.no_grad()
def learn(train, test, n_centroids, rng, dtype=torch.float32):
    """Return standardised features of uint8 training and test images, learned from the first.

    dtype: of the products and activations.
    """
    some = train[torch.randint(len(train), (N_PATCHES // 50,), generator=rng)]
    pool = patches_of(some)
    x = pool[:, torch.randperm(pool.shape[1], generator=rng)[:50]].flatten(0, 1)  # (N_PATCHES, 108)
    mean, W = whitening(x)
    centroids = spherical_kmeans((x - mean) @ W, n_centroids, rng)
    x = quadrant_features(train, mean, W, centroids, dtype)
    x_test = quadrant_features(test, mean, W, centroids, dtype)
    shift = x.mean(0)
    scale = x.std(0) + 0.01
    return x.sub_(shift).div_(scale), x_test.sub_(shift).div_(scale)


def kmeans_row(train, test, n_centroids, n_eval_epochs, seed):
    """Learn from the training images and fit the probe.

    Return the row of results, and the features of the training and test images.
    """
    wall, cpu = time.monotonic(), time.process_time()
    bf16 = machine("cpu")["precision"] == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    x, x_test = learn(train.images, test.images, n_centroids, generator(seed, "kmeans"), dtype)
    fit = Fit(n_epochs=n_eval_epochs, seed=seed, bf16=bf16)
    result, _ = linear_probe(x, train.labels, x_test, test.labels, len(train.class_names), fit)
    row = {
        "n_images": len(train.images),
        "n_centroids": n_centroids,
        "seed": seed,
        **{name: result[name] for name in ("top1", "train_top1", "lr")},
        "seconds": time.monotonic() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "commit": this_commit(),
        "machine": machine("cpu"),
    }
    return row, (x, x_test)


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
    row, _ = kmeans_row(train, test, options.n_centroids, options.n_eval_epochs, options.seed)
    path = options.out / "kmeans.json"
    files.write_json(path, {"rows": [*files.read_json(path).get("rows", []), row]})
    print({name: value for name, value in row.items() if name != "machine"})


if __name__ == "__main__":
    main()
