"""Stages 2 and 3: encode the images, then measure the representation by a linear probe and by nearest neighbours."""

import collections
import functools
import math
import shutil
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from data import balanced_subset
from infra import distributed
from infra.console import log, log_stage, progress
from infra.device import generator, to_device, without_tuning
from infra.errors import RunError
from infra.image_cache import batches, on_device, subset
from model import fold_batch_norm, stage_dim, stage_means
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


def encode_images(hp, encoder, images, purpose, bf16, save_proj=False):
    """Encode images by the settings of a run and show progress. purpose: part of the seed of random views."""
    views = hp.test_views
    bs = max(1, hp.bs * hp.n_patches // views.n)  # as many patches per batch as in training, which fit into memory
    bar = functools.partial(progress, desc=f"encode {purpose}", every=hp.print_freq, unit="patches", size=bs * views.count)
    rng = functools.partial(generator, hp.seed, f"encode-{purpose}")
    output = Output(hp.emb_pool, hp.pool_grid, save_proj, bf16)
    return encode(encoder, on_device(images, next(encoder.parameters()).device), views, rng, bs, output, bar)


def encode_split(hp, run, encoder, images, split, bf16):
    """Stage 2, of one split: return what artifacts/<split>.pt holds, embeddings and labels.

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
    encoded["seconds"] = time.monotonic() - start
    if image_set.labels is not None:
        encoded["labels"] = image_set.labels
    if split == "test" and run.journal.board:
        show_embeddings(run.journal.board, encoded["embeddings"], image_set, hp.seed)
    return encoded


@distributed.on_main_process
def show_embeddings(board, embeddings, image_set, seed, n=1000):
    """Send up to n embeddings to TensorBoard, with their images and the names of their classes."""
    images, labels, class_names = image_set
    some = balanced_subset(labels, len(images), min(n, len(images)), generator(seed, "projector"))
    names = ["" if labels is None else class_names[labels[i]] for i in some]
    board.add_embeddings(embeddings[some], subset(images, some)[:], names)


def quick_knn(hp, run, encoder, images, place, bf16):
    """Print and record the accuracy of knn now; return the seconds that it took.

    Up to 1,000 test images, up to 5,000 training images, always the same ones, by up to 4 views each.
    """
    start, tensors = time.monotonic(), []
    distributed.broadcast_buffers(encoder)  # all processes encode with the same batch-norm statistics
    views, device = hp.test_views._replace(n=min(4, hp.test_views.n)), next(encoder.parameters()).device
    for split, limit in (("train", 5000), ("test", 1000)):
        pixels, labels, class_names = images[split]
        some = balanced_subset(labels, len(pixels), min(limit, len(pixels)), generator(hp.seed, f"knn-{split}"))
        rng = functools.partial(generator, hp.seed, f"encode-knn-{split}")
        pixels = on_device(subset(pixels, some), device)
        encoded = encode(encoder, pixels, views, rng, hp.bs, Output(hp.emb_pool, bf16=bf16))
        tensors += [encoded["embeddings"].to(device), labels[some].to(device)]
    top1 = knn(*tensors, len(class_names))
    run.journal.add(**place, knn_top1=top1)
    log.info(f"epoch {place['epoch']} step {place['step']} | kNN {top1:.2f}%")
    return time.monotonic() - start


AUTHORS_LR = 0.0075
LRS = (0.00075, 0.0025, AUTHORS_LR, 0.025, 0.075, 0.25)


class Fit(NamedTuple):
    """How a linear layer is fitted: SGD with momentum .9 and a cosine over n_epochs."""

    lr: float | None = None  # None: chosen from LRS
    n_epochs: int = 100
    bs: int = 100
    weight_decay: float = 5e-5
    seed: int = 0
    bf16: bool = False  # the two matrix products of a step in bfloat16; weights and scores stay in float32
    standardize: bool = False  # shift and scale each dimension by its mean and deviation over the training rows


def linear_probe(x, y, x_test, y_test, n_classes, fit=Fit(), progress=iter):  # noqa: B008, a tuple does not change
    """Fit a linear layer to x (N, d), y (N,) and score it on all rows of x_test (M, d), y_test (M,) after each epoch.

    x float32, y int64, all on one device. fit: a Fit. If fit.lr is None, all of LRS are tried at once on nine tenths of x, the
    best on the last tenth is taken, and the layer is fitted to all of x. progress: wraps the sequence of epochs.
    Returns (result, layer). result: top1 and top5 of the last epoch, in percent, and train_top1, of x itself; best_top1 and
    best_epoch (from 0), chosen on the test set and therefore no fair estimate; per_epoch, a list of [top1, top5]; lr; and
    held_out, {lr: top-1 on the tenth}, empty if there was no choice.
    """
    if fit.standardize:
        mean, scale = x.mean(0), x.std(0, correction=0).clamp(min=1e-6).reciprocal()
        x, x_test = (x - mean) * scale, (x_test - mean) * scale
    lr, held_out = fit.lr, {}
    if lr is None and len(x) < 10:
        lr = AUTHORS_LR
    if lr is None:
        lr, held_out = choose_lr(x, y, n_classes, fit, progress)
    per_epoch = []
    for (layer,) in softmax_regressions(x, y, [lr], n_classes, fit, progress):
        per_epoch.append(accuracy(layer, x_test, y_test))
    best_epoch = max(range(fit.n_epochs), key=lambda epoch: per_epoch[epoch][0])
    top1, top5 = per_epoch[-1]
    best = {"train_top1": accuracy(layer, x, y)[0], "best_top1": per_epoch[best_epoch][0], "best_epoch": best_epoch}
    if fit.standardize:  # the layer takes x as it was given
        weight = layer.weight * scale
        layer = linear(weight, layer.bias - weight @ mean)
    return {"top1": top1, "top5": top5, **best, "per_epoch": per_epoch, "lr": lr, "held_out": held_out}, layer


def choose_lr(x, y, n_classes, fit, progress):
    """Return the best of LRS on a tenth of x that the fit does not see, and {lr: top-1 on the tenth}."""
    order = to_device(torch.randperm(len(x), generator=generator(fit.seed, "held-out")), x.device)
    tenth, rest = order.split([len(x) // 10, len(x) - len(x) // 10])
    (layers,) = collections.deque(softmax_regressions(x[rest], y[rest], LRS, n_classes, fit, progress), maxlen=1)  # the last
    held_out = {rate: accuracy(layer, x[tenth], y[tenth])[0] for rate, layer in zip(LRS, layers, strict=True)}
    return max(LRS, key=lambda rate: (held_out[rate], -abs(math.log(rate / AUTHORS_LR)))), held_out  # ties: nearest to AUTHORS_LR


@torch.no_grad()
def softmax_regressions(x, y, lrs, n_classes, fit, progress):
    """Fit a linear layer for each of the L learning rates, all at once, as rows of one matrix.

    The arguments are those of linear_probe. After each epoch, yields the layers (nn.Linear) in the order of lrs.
    """
    L, C, d = len(lrs), n_classes, x.shape[1]
    x = F.pad(x.bfloat16() if fit.bf16 else x, (0, 1), value=1.0)  # (N, d + 1): the last column multiplies the bias
    W = torch.zeros(L * C, d + 1, device=x.device)  # convex, so zeros are a good start
    momentum = torch.zeros_like(W)
    rates, target = torch.tensor(lrs).repeat_interleave(C)[:, None], F.one_hot(y, C).float()
    rows, errors = torch.empty_like(x[: fit.bs]), x.new_empty(fit.bs, L, C)
    for epoch in progress(range(fit.n_epochs)):
        step = to_device(-rates / 2 * (1 + math.cos(math.pi * epoch / fit.n_epochs)), x.device)  # (L C, 1)
        order = to_device(torch.randperm(len(x), generator=generator(fit.seed, "probe", epoch)), x.device)
        targets = target[order, None].split(fit.bs)  # (bs, 1, C) each
        for batch, batch_target in zip(order.split(fit.bs), targets, strict=True):
            # The gradient of softmax regression, written out: autograd and torch.optim take 2x as long for so little work.
            n, weight = len(batch), W.to(x.dtype)
            batch_x = torch.index_select(x, 0, batch, out=rows[:n])  # (n, d + 1)
            p = (batch_x @ weight.T).unflatten(1, (L, C)).softmax(2, dtype=torch.float32)
            error = torch.sub(p, batch_target, out=errors[:n]).flatten(1)  # (n, L C)
            gradient = torch.addmm(weight, error.T, batch_x, beta=n * fit.weight_decay)  # n times that of the mean
            momentum.mul_(0.9).add_(gradient, alpha=1 / n)
            W.addcmul_(momentum, step)
        yield [linear(weight[:, :-1], weight[:, -1]) for weight in W.split(C)]


def linear(weight, bias):
    """Return an nn.Linear with this weight (C, d) and bias (C,)."""
    layer = nn.utils.skip_init(nn.Linear, *weight.T.shape, device=weight.device).requires_grad_(False)
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


@torch.no_grad()
def accuracy(layer, x, y):
    """Return [top-1, top-5] in percent. With fewer than five classes top-5 counts all of them."""
    logits = layer(x)
    ranked = logits.topk(min(5, logits.shape[1])).indices  # (M, 5)
    hits = ranked == y[:, None]
    return [100 * hits[:, 0].sum().item() / len(y), 100 * hits.sum().item() / len(y)]


@torch.no_grad()
def knn(x, y, x_test, y_test, n_classes, k=20, temperature=0.07, chunk=1000):
    """Return the top-1 accuracy, in percent, of the k nearest neighbours by cosine; each votes with exp(cosine / temperature).

    x float32 (N, d), y int64 (N,), x_test (M, d), y_test (M,), all on one device. If N is less than k, all of x vote.
    Source: the weighted kNN of arXiv 1805.01978, section 3.4.
    """
    x, votes = F.normalize(x, dim=1), F.one_hot(y, n_classes).to(x.dtype)
    hits = 0
    for queries, truth in zip(F.normalize(x_test, dim=1).split(chunk), y_test.split(chunk), strict=True):
        cosine, neighbour = (queries @ x.T).topk(min(k, len(x)))  # (chunk, k)
        score = torch.einsum("qk,qkc->qc", (cosine / temperature).exp(), votes[neighbour])
        hits += (score.argmax(1) == truth).sum()
    return 100 * hits.item() / len(x_test)


# Accuracies in addition to the probe's. name: (title, function of (x, y, x_test, y_test, n_classes) -> top-1 in percent)
METRICS = {"knn_top1": ("20-NN", knn)}


def fit_probe(hp, run, encoded, class_names, device, bf16):
    """Stage 3: return what probe.pt holds: weight (C, d) and bias (C,) of the linear classifier, class_names, and result."""
    log_stage("Fitting a linear classifier")
    run.journal.begin("probe")
    start = time.monotonic()
    tensors = [encoded[split][name].to(device) for split in ("train", "test") for name in ("embeddings", "labels")]
    fit = Fit(hp.eval_lr, hp.n_eval_epochs, seed=hp.seed, bf16=bf16, standardize=hp.standardize)
    bar = functools.partial(progress, desc="linear probe", every=hp.print_freq, unit="epochs")
    result, layer = linear_probe(*tensors, len(class_names), fit, bar)
    if not layer.weight.isfinite().all():
        raise RunError(f"the weights of the linear probe are not finite with eval_lr {result['lr']:g}: lower eval_lr in "
                       f"hparams.yaml, then resume")  # fmt: skip
    result |= {name: metric(*tensors, len(class_names)) for name, (_, metric) in METRICS.items()}
    result |= {"n_train": len(tensors[0]), "n_test": len(tensors[2]), "seconds": time.monotonic() - start}
    return {**layer.state_dict(), "class_names": class_names, "result": result}
