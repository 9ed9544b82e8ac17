"""Stage 2: encode the images. An image's representation is the mean over its views."""

import functools
import math
import shutil
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F

import collapse
from backbones import stage_dim, stage_means
from data import balanced_subset
from infra import distributed
from infra.console import log, log_stage, progress
from infra.device import generator, without_tuning
from infra.errors import RunError
from infra.image_cache import batches, on_device, subset
from model import fold_batch_norm
from patches import sample_views

# emb_pool: the tensor of a view that is its representation. features: h; projections: z.
POOLED = {"features": "features", "proj": "projections", "backbone": "backbone", "stages": "stages"}


class Output(NamedTuple):
    """Which tensors encode returns, and its precision."""

    emb_pool: str = "features"  # what is averaged over the views, a key of POOLED
    pool_grid: int = 1  # the views of a grid are averaged in so many parts along each axis, which stand side by side
    save_proj: bool = False  # return h and z of each view too
    bf16: bool = False  # weights and activations in bfloat16


@torch.inference_mode()
@without_tuning()
def encode(encoder, images, views, rng, bs=100, output=Output(), progress=iter):  # noqa: B008, a tuple does not change
    """Return the representation of each image: the mean over its views of h, or what output says (the bag of patches).

    encoder: a model.Encoder. It runs in eval mode and is not modified. images: uint8 (N, 3, H, W), a tensor on the
    encoder's device or an ImageFile. views: a patches.Views. rng: rng(step=i) returns the generator of
    the random views of batch i. bs: images in a batch. progress: wraps the sequence of batches. Several processes share
    the batches, and each returns the whole.
    Returns a dict: embeddings, float32 (N, pool_grid² dim) on the CPU, where dim is that of emb_pool; n_views, the number of
    views of an image; and with output.save_proj features, float16 (N, n_views, h_dim), and projections, float16
    (N, n_views, z_dim), on the CPU.
    Source: arXiv 2304.03977, section 2.2 (bag-of-feature representation).
    """
    device, dtype = next(encoder.parameters()).device, torch.bfloat16 if output.bf16 else torch.float32
    encoder = fold_batch_norm(encoder).to(dtype, memory_format=torch.channels_last)
    N, wanted, dims, saved = len(images), POOLED[output.emb_pool], dims_of(encoder), {}
    embeddings = torch.zeros(N, output.pool_grid**2 * dims[wanted], device=device)
    if output.save_proj:
        saved = {name: torch.zeros(N, views.count, dims[name], dtype=torch.float16) for name in ("features", "projections")}
    steps = distributed.shard(range(math.ceil(N / bs)))
    slices = [slice(step * bs, (step + 1) * bs) for step in steps]
    for step, rows, batch in zip(progress(steps), slices, batches(images, slices, device), strict=False):
        x = sample_views(batch, views, rng(step=step))  # (V, B, 3, S, S)
        found = represent(encoder, x.flatten(0, 1).to(dtype, memory_format=torch.channels_last), {wanted, *saved})
        pooled = {name: tensor.float().unflatten(0, x.shape[:2]) for name, tensor in found.items()}  # (V, B, dim)
        embeddings[rows] = mean_of_views(pooled[wanted], output.pool_grid)
        for name, tensor in saved.items():
            tensor[rows] = pooled[name].transpose(0, 1).half()  # (B, V, dim)
    saved["embeddings"] = embeddings.cpu()
    return {"n_views": views.count, **{name: distributed.all_reduce_sum(tensor) for name, tensor in saved.items()}}


def represent(encoder, x, wanted):
    """Return {name: (n, dim)} of patches x (n, 3, S, S): of the names in POOLED, those that are wanted, and what they need."""
    if "stages" in wanted:
        stages = stage_means(encoder.backbone, x)
        found = {"stages": stages, "backbone": stages[:, -encoder.features[0].in_features :]}
    else:
        found = {"backbone": encoder.backbone(x)}
    if wanted & {"features", "projections"}:
        found["features"] = encoder.features(found["backbone"])
    if "projections" in wanted:  # a third of the work of resnet18-imagenet
        found["projections"] = F.normalize(encoder.projection(found["features"]).float(), dim=-1)
    return found


def dims_of(encoder):
    """Return {name: dimensions} of what the encoder computes of a view."""
    layer, last = encoder.features[0], encoder.projection[-1]
    return {"backbone": layer.in_features, "features": layer.out_features, "projections": last.out_features,
            "stages": stage_dim(encoder.backbone)}  # fmt: skip


def mean_of_views(x, pool_grid):
    """Average x (V, B, dim) over the views. If pool_grid is above 1, the views are a k x k grid and pool_grid divides k: it is
    averaged in pool_grid x pool_grid parts, which stand side by side. Returns (B, pool_grid² dim)."""
    if pool_grid == 1:
        return x.mean(0)
    k = math.isqrt(len(x))
    parts = x.view(pool_grid, k // pool_grid, pool_grid, k // pool_grid, *x.shape[1:]).mean((1, 3))  # (grid, grid, B, dim)
    return parts.permute(2, 0, 1, 3).flatten(1)


def batch_size(hp):
    """Return how many images are encoded at once: they have as many views as a training step has patches, which fit into memory.
    Of those in the network at once in training four times as many fit, since nothing is kept for a backward pass."""
    n = hp.bs * hp.n_patches
    return max(1, min(n, 4 * (hp.max_patches or n)) // hp.test_views.n)


def encode_images(hp, encoder, images, purpose, bf16, save_proj=False):
    """Encode images by the settings of a run and show progress. purpose: part of the seed of random views."""
    views, bs = hp.test_views, batch_size(hp)
    bar = functools.partial(progress, desc=f"encode {purpose}", every=hp.print_freq, unit="patches", size=bs * views.count)
    rng = functools.partial(generator, hp.seed, f"encode-{purpose}")
    output = Output(hp.emb_pool, hp.pool_grid, save_proj, bf16)
    return encode(encoder, on_device(images, next(encoder.parameters()).device), views, rng, bs, output, bar)


def encode_split(hp, run, encoder, images, split, bf16):
    """Stage 2, of one split: return what artifacts/<split>.pt holds: embeddings, labels, and what the rows are (Images.rows).

    Raises RunError if an embedding is not finite, or if save_proj needs more disk than is free.
    """
    log_stage(f"Encoding '{split}' dataset for evaluation")
    image_set = images[split]
    run.journal.begin(f"encoding {split}")
    start = time.monotonic()
    if hp.save_proj:
        size = 2 * len(image_set.images) * hp.test_views.count * (hp.h_dim + hp.z_dim)  # float16
        log.info(f"* --save_proj: at most {size / 1e9:.2f} GB for {split}")
        if size > shutil.disk_usage(run.dir).free:
            raise RunError(f"save_proj needs {size / 1e9:.2f} GB in {run.dir}, more than is free there")
    encoded = encode_images(hp, encoder, image_set.images, split, bf16, hp.save_proj)
    if not encoded["embeddings"].isfinite().all():
        raise RunError(f"embeddings of the {split} images are not finite: train under a new --exp_name with --precision fp32")
    for name in ("features", "projections") if hp.save_proj else ():
        if not all(part.isfinite().all() for part in encoded[name].split(1000)):
            raise RunError(f"save_proj: {name} of the {split} images exceed float16, whose largest number is 65504: "
                           f"set save_proj: false in hparams.yaml, then resume")  # fmt: skip
    if split == "train":
        encoded["collapse"] = collapse_signs(hp, encoder, image_set, bf16)
    encoded["seconds"] = time.monotonic() - start
    if image_set.labels is not None:
        encoded["labels"] = image_set.labels
    encoded |= images.rows(split)
    if split == run.splits[-1] and run.journal.board:
        show_embeddings(run.journal.board, split, encoded["embeddings"], image_set, hp.seed)
    return encoded


def collapse_signs(hp, encoder, image_set, bf16):
    """Return collapse.signs of up to 1,000 images, always the same ones, by four views each."""
    n = len(image_set.images)
    some = balanced_subset(image_set.labels, n, min(1000, n), generator(hp.seed, "collapse"))
    images = on_device(subset(image_set.images, some), next(encoder.parameters()).device)
    views, rng = hp.test_views._replace(n=4), functools.partial(generator, hp.seed, "encode-collapse")
    found = encode(encoder, images, views, rng, hp.bs, Output(hp.emb_pool, save_proj=True, bf16=bf16))
    return collapse.signs(found["embeddings"], found["projections"])


@distributed.on_main_process
def show_embeddings(board, split, embeddings, image_set, seed, n=1000):
    """Send up to n embeddings to TensorBoard, with their images and the names of their classes."""
    images, labels, class_names = image_set
    some = balanced_subset(labels, len(images), min(n, len(images)), generator(seed, "projector"))
    names = ["" if labels is None else class_names[labels[i]] for i in some]
    board.add_embeddings(split, embeddings[some], subset(images, some)[:], names)
