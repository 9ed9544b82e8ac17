"""Stage 2: encode the images. An image's representation is the mean over its views."""

import copy
import functools
import math
import shutil
from typing import NamedTuple

import torch
import torch.nn.functional as F

from data import balanced_subset
from images.cache import batches, on_device, subset
from infra import distributed
from infra.console import log, log_stage, progress
from infra.device import generator, without_tuning
from infra.errors import RunError, UsageError
from model import STAGE_POOLS, TIMM, fold_batch_norm, map_means, stage_dims, stage_maps
from patches import sample_views


class Output(NamedTuple):
    """Which tensors encode returns, and its precision."""

    emb_pool: str = "features"  # what is averaged over the views, a key of dims_of
    # Average a grid of views, or the stages of whole images, in pool_grid x pool_grid parts, which
    # stand side by side.
    pool_grid: int = 1
    save_proj: bool = False  # return h and z of each view too
    bf16: bool = False  # weights and activations in bfloat16


DEFAULT_OUTPUT = Output()


@torch.inference_mode()
@without_tuning()
def encode(encoder, images, views, rng, bs=100, output=DEFAULT_OUTPUT, progress=iter):
    """Return the representation of each image: the mean over its views of h, or what output says.

    encoder: a model.Encoder. It runs in eval mode and is not modified. images: uint8 (N, 3, H, W),
    a tensor on the encoder's device or an ImageFile. views: a patches.Views. rng: rng(step=i)
    returns the generator of the random views of batch i. bs: images in a batch. progress: wraps the
    sequence of batches. Several processes share the batches, and each returns the whole.
    Returns a dict: embeddings, float32 (N, pool_grid² dim) on the CPU, where dim is that of
    emb_pool; n_views, the number of views of an image; and with output.save_proj features, float16
    (N, n_views, h_dim), and projections, float16 (N, n_views, z_dim), on the CPU.
    Source: arXiv 2304.03977, section 2.2 (bag-of-feature representation).
    """
    device = next(encoder.parameters()).device
    dtype = torch.bfloat16 if output.bf16 else torch.float32
    encoder = fold_batch_norm(encoder).to(dtype, memory_format=torch.channels_last)
    dims = dims_of(encoder)
    # The parts are in the view itself if it is the whole image, else each is of some views.
    grid_of_map, grid_of_views = output.pool_grid, 1
    if views.kind != "whole":
        grid_of_map, grid_of_views = 1, output.pool_grid
    N = len(images)
    embeddings = torch.zeros(N, output.pool_grid**2 * dims[output.emb_pool], device=device)
    saved = {}
    if output.save_proj:
        for name in ("features", "proj"):
            saved[name] = torch.zeros(N, views.count, dims[name], dtype=torch.float16)

    steps = distributed.shard(range(math.ceil(N / bs)))
    rows = [slice(step * bs, (step + 1) * bs) for step in steps]
    stream = batches(images, rows, device)
    for step, index, batch in zip(progress(steps), rows, stream, strict=False):
        x = sample_views(batch, views, rng(step=step))  # (V, B, 3, S, S)
        V, B = x.shape[:2]
        x = x.flatten(0, 1).to(dtype, memory_format=torch.channels_last)  # (V B, 3, S, S)
        activations = represent(encoder, x, {output.emb_pool, *saved}, grid_of_map)
        activations = {name: a.float().view(V, B, -1) for name, a in activations.items()}
        h = activations[output.emb_pool]
        if views.mirror:
            h = h.unflatten(0, (2, V // 2)).mean(0)  # (V, B, dim) -> (V / 2, B, dim)
        embeddings[index] = mean_of_views(h, grid_of_views)
        for name, tensor in saved.items():
            tensor[index] = activations[name].transpose(0, 1).half()  # (B, V, dim)
    result = {"embeddings": embeddings.cpu()}
    if output.save_proj:
        result |= {"features": saved["features"], "projections": saved["proj"]}
    result = {name: distributed.all_reduce_sum(tensor) for name, tensor in result.items()}
    return {"n_views": views.count, **result}


def represent(encoder, x, wanted, parts=1):
    """Return {emb_pool: (n, dim)} of views x (n, 3, S, S), for those that are wanted.

    parts: average those of STAGE_POOLS in parts x parts regions: (n, parts² dim).
    """
    of_stages = wanted & set(STAGE_POOLS)
    if of_stages:
        (pool,) = of_stages
        maps = stage_maps(encoder.backbone, x, pool)
        activations = {pool: map_means(maps, parts), "backbone": map_means(maps[-1:])}
    else:
        activations = {"backbone": encoder.backbone(x)}
    if wanted & {"features", "proj"}:
        activations["features"] = encoder.features(activations["backbone"])
    if "proj" in wanted:  # a third of the work of resnet18-imagenet
        z = encoder.projection(activations["features"])
        activations["proj"] = F.normalize(z.float(), dim=-1)
    return activations


def dims_of(encoder):
    """Return {emb_pool: dimensions} of what the encoder computes of a view."""
    return {
        "backbone": encoder.features[0].in_features,
        "features": encoder.features[0].out_features,
        "proj": encoder.projection[-1].out_features,
        **{pool: sum(stage_dims(encoder.backbone, pool)) for pool in STAGE_POOLS},
    }


def mean_of_views(x, pool_grid):
    """Average x (V, B, dim) over the views: (B, dim).

    If pool_grid is above 1, the views are a k x k grid and pool_grid divides k: x is averaged in
    pool_grid x pool_grid parts, which stand side by side: (B, pool_grid² dim).
    """
    if pool_grid == 1:
        return x.mean(0)
    V, B, dim = x.shape
    k = math.isqrt(V)
    parts = x.view(pool_grid, k // pool_grid, pool_grid, k // pool_grid, B, dim).mean((1, 3))
    return parts.permute(2, 0, 1, 3).flatten(1)  # (grid, grid, B, dim) -> (B, grid² dim)


def batch_size(hp):
    """Return how many images are encoded at once: with as many views as a step has patches.

    Without a backward pass, four times as many patches fit into memory as in training.
    """
    n = hp.bs * hp.n_patches
    most = min(n, 4 * (hp.max_patches or n))
    views = hp.test_views
    patches_per_view = (views.side // views.size) ** 2
    return max(1, most // (views.count * patches_per_view))


@torch.no_grad()
def check_views(hp, encoder):
    """Raise UsageError if the network does not take whole images, which are wider than patches, or
    pool_grid does not divide its outputs for them.
    """
    views = hp.test_views
    if views.kind != "whole":
        return
    backbone = copy.deepcopy(encoder.backbone).float().cpu().eval()
    x = torch.zeros(1, 3, views.side, views.side)
    if hp.arch.startswith(TIMM):
        try:
            backbone(x)  # transformers refuse it
        except Exception as error:  # each of timm's models fails in its own way
            reason = " ".join(str(error).split())[:200]
            raise UsageError(
                f"eval_views whole needs a network for images of any size, not {hp.arch} ({reason})"
            ) from None
    elif hp.emb_pool in STAGE_POOLS:
        side = min(x.shape[2] for x in stage_maps(backbone, x, hp.emb_pool))
        if side % hp.pool_grid:
            raise UsageError(
                f"pool_grid must divide the smallest output of {hp.arch} for an image, {side} "
                f"pixels wide, not {hp.pool_grid}"
            )


def encode_images(run, encoder, images, purpose, save_proj=False):
    """Encode images by the settings of a run and show progress.

    images: uint8 (N, 3, H, W) or an ImageFile. purpose: part of the seed of random views. Returns
    what encode does.
    """
    hp = run.hp
    bs = batch_size(hp)
    bar = functools.partial(
        progress,
        desc=f"encode {purpose}",
        every=hp.print_freq,
        unit="patches",
        size=bs * hp.test_views.count,
    )
    rng = functools.partial(generator, hp.seed, f"encode-{purpose}")
    output = Output(hp.emb_pool, hp.pool_grid, save_proj, run.bf16)
    return encode(encoder, on_device(images, run.device), hp.test_views, rng, bs, output, bar)


def encode_split(run, encoder, images, split):
    """Stage 2 of one split: return embeddings, labels, and what the rows are (ImageSet.source).

    Raises RunError if an embedding is not finite, or if save_proj needs more disk than is free.
    """
    log_stage(f"Encoding '{split}' dataset for evaluation")
    hp = run.hp
    image_set = images[split]
    run.journal.begin(f"encoding {split}")
    if hp.save_proj:
        check_disk(run, split, len(image_set.images))
    encoded = encode_images(run, encoder, image_set.images, split, hp.save_proj)
    check_encoded(encoded, split)
    if image_set.labels is not None:
        encoded["labels"] = image_set.labels
    encoded |= image_set.source
    if split == run.splits[-1] and run.journal.board:
        show_embeddings(run, split, encoded["embeddings"], image_set)
    return encoded


def check_disk(run, split, n_images):
    """Print the size of the features and projections of all views. Raises RunError if too large."""
    hp = run.hp
    size = 2 * n_images * hp.test_views.count * (hp.h_dim + hp.z_dim)  # float16
    log.info(f"* --save_proj: at most {size / 1e9:.2f} GB for {split}")
    if size > shutil.disk_usage(run.dir).free:
        raise RunError(f"save_proj needs {size / 1e9:.2f} GB in {run.dir}, more than is free there")


def check_encoded(encoded, split):
    """Raise RunError if what encode returned is not finite."""
    if not encoded["embeddings"].isfinite().all():
        raise RunError(
            f"embeddings of the {split} images are not finite: train under a new --exp_name with "
            f"--precision fp32"
        )
    for name in encoded.keys() & {"features", "projections"}:
        if not all(part.isfinite().all() for part in encoded[name].split(1000)):
            raise RunError(
                f"save_proj: {name} of the {split} images exceed float16, whose largest number is "
                f"65504: set save_proj: false in hparams.yaml, then resume"
            )


@distributed.on_main_process
def show_embeddings(run, split, embeddings, image_set, n=1000):
    """Send up to n embeddings to TensorBoard, with their images and the names of their classes."""
    images, labels, class_names, _ = image_set
    rng = generator(run.hp.seed, "projector")
    index = balanced_subset(labels, len(images), n, rng)
    names = ["" if labels is None or labels[i] < 0 else class_names[labels[i]] for i in index]
    run.journal.board.add_embeddings(split, embeddings[index], subset(images, index)[:], names)
