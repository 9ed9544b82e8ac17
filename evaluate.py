"""Stage 3: how good is the representation? Linear probe, nearest neighbours, signs of collapse."""

import functools
import math
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from data import labelled, sample
from encode import Output, encode
from images.cache import on_device
from infra import distributed
from infra.console import log, log_stage, progress
from infra.device import generator, to_device
from infra.errors import RunError

PROBE_LR = 0.0075  # where there are too few images to choose one of LRS
LRS = (0.00075, 0.0025, PROBE_LR, 0.025, 0.075, 0.25)
MOST_CLASSES = 200  # for a confusion matrix in the result; of 1,000 it has a million numbers
N_COLLAPSE = 1000  # training images, at most, in which signs of collapse are looked for
TOP = 5  # classes of which one must be right for top-5
FEW_DIMENSIONS = 5  # effective rank; trained encoders have 50 to 300 of 256 to 1,024 dimensions
NO_SPREAD = -0.005  # uniformity; of a collapsed projection it is -0.00, trained ones have -0.7


class Fit(NamedTuple):
    """How a linear layer is fitted: SGD with momentum .9 and a cosine over n_epochs."""

    lr: float | None = None  # None: chosen from LRS
    n_epochs: int = 100
    bs: int = 100
    weight_decay: float = 5e-5
    seed: int = 0
    bf16: bool = False  # the matrix products of a step; weights and scores stay in float32
    standardize: bool = False  # each dimension by its mean and deviation over the training rows


DEFAULT_FIT = Fit()


def no_progress(epochs, title):
    """Return the epochs as they are."""
    return epochs


def linear_probe(x, y, x_test, y_test, n_classes, fit=DEFAULT_FIT, progress=no_progress):
    """Fit a linear layer to x (N, d), y (N,) and score it on x_test (M, d), y_test (M,).

    x float32, y int64, all on one device. fit: a Fit. If fit.lr is None, all of LRS are tried at
    once on nine tenths of x, the best on the last tenth is taken, and the layer is fitted to all of
    x. progress(epochs, title) wraps the sequence of epochs.
    Returns (result, layer). result: top1 and top5 of the last epoch, in percent, and train_top1, of
    x itself; best_top1 and best_epoch (from 0), chosen on the test set and therefore no fair
    estimate; per_epoch, a list of [top1, top5]; confusion, confusion_matrix of the last epoch as a
    list of lists, and what `balance` returns of it; lr; and held_out, {lr: top-1 on the tenth},
    empty if there was no choice.
    """
    mean, scale = standardisation(x) if fit.standardize else (torch.zeros_like(x[0]), 1)
    fold = functools.partial(folded, mean=mean, scale=scale)
    inputs = inputs_of(x, mean, scale, fit.bf16)
    lr = fit.lr
    held_out = {}
    if lr is None and len(x) < 10:
        lr = PROBE_LR
    if lr is None:
        lr, held_out = choose_lr(x, y, inputs, fold, n_classes, fit, progress)

    per_epoch = []
    epochs = progress(range(fit.n_epochs), "linear probe")
    for (layer,) in softmax_regressions(inputs, y, [lr], n_classes, fit, epochs):
        layer = fold(layer)
        per_epoch.append(accuracy(layer, x_test, y_test))
    top1, top5 = per_epoch[-1]
    best_epoch = max(range(fit.n_epochs), key=lambda epoch: per_epoch[epoch][0])
    confusion = confusion_matrix(y_test, ranked(layer, x_test)[:, 0], n_classes)
    result = {
        "top1": top1,
        "top5": top5,
        "train_top1": accuracy(layer, x, y)[0],
        "best_top1": per_epoch[best_epoch][0],
        "best_epoch": best_epoch,
        "per_epoch": per_epoch,
        "confusion": confusion.tolist(),
        **balance(confusion),
        "lr": lr,
        "held_out": held_out,
    }
    return result, layer


def standardisation(x):
    """Return (mean, scale) of the dimensions of x (N, d): (x - mean) * scale has deviation 1."""
    return x.mean(0), x.std(0, correction=0).clamp(min=1e-6).reciprocal()


def inputs_of(x, mean, scale, bf16):
    """Return (x - mean) * scale, and 1 for the bias as the last column: (N, d + 1).

    It is written by parts, so that no other copy of x is held.
    """
    inputs = x.new_ones(len(x), x.shape[1] + 1, dtype=torch.bfloat16 if bf16 else None)
    for out, part in zip(inputs.split(1000), x.split(1000), strict=True):
        out[:, :-1] = (part - mean) * scale
    return inputs


def folded(layer, mean, scale):
    """Return the layer that does to x what `layer` does to (x - mean) * scale."""
    weight = layer.weight * scale
    return linear(weight, layer.bias - weight @ mean)


def choose_lr(x, y, inputs, fold, n_classes, fit, progress):
    """Return the best of LRS on a tenth of x that the fit does not see, and {lr: its top-1}.

    inputs: inputs_of x. fold: makes a layer of `inputs` one of x.
    """
    order = torch.randperm(len(x), generator=generator(fit.seed, "held-out"))
    n = len(x) // 10
    tenth, rest = to_device(order, x.device).split([n, len(x) - n])
    epochs = progress(range(fit.n_epochs), "linear probe, choice of its rate")
    regressions = softmax_regressions(inputs, y, LRS, n_classes, fit, epochs, rest)
    for layers in regressions:  # noqa: B007, those of the last epoch count
        pass
    scores = {
        lr: accuracy(fold(layer), x[tenth], y[tenth])[0]
        for lr, layer in zip(LRS, layers, strict=True)
    }
    ties = [lr for lr in LRS if scores[lr] == max(scores.values())]
    return min(ties, key=lambda lr: abs(math.log(lr / PROBE_LR))), scores


@torch.no_grad()
def softmax_regressions(x, y, lrs, n_classes, fit, epochs, rows=None):
    """Fit a linear layer for each of the L learning rates, all at once, as rows of one matrix.

    x: (N, d + 1), inputs_of what linear_probe takes; its dtype is that of the matrix products.
    rows: the indices of those to fit, int64 (M,); None for all. epochs: range(fit.n_epochs). After
    each one, yields the layers (nn.Linear) in the order of lrs.
    """
    L = len(lrs)
    C = n_classes
    M = len(x) if rows is None else len(rows)
    W = torch.zeros(L * C, x.shape[1], device=x.device)  # convex, so zeros are a good start
    momentum = torch.zeros_like(W)
    rates = torch.tensor(lrs).repeat_interleave(C)[:, None]  # (L C, 1)
    one_hot = F.one_hot(y, C).float()  # (N, C)
    batch_buffer = torch.empty_like(x[: fit.bs])
    error_buffer = x.new_empty(fit.bs, L, C)
    for epoch in epochs:
        cosine = (1 + math.cos(math.pi * epoch / fit.n_epochs)) / 2
        minus_lr = to_device(-rates * cosine, x.device)  # (L C, 1)
        order = torch.randperm(M, generator=generator(fit.seed, "probe", epoch))
        order = to_device(order, x.device)
        order = order if rows is None else rows[order]
        targets = one_hot[order, None].split(fit.bs)  # (bs, 1, C) each
        for index, target in zip(order.split(fit.bs), targets, strict=True):
            # The gradient of softmax regression, written out: autograd and torch.optim take 2x as
            # long for so little work.
            n = len(index)
            weight = W.to(x.dtype)
            batch = torch.index_select(x, 0, index, out=batch_buffer[:n])  # (n, d + 1)
            p = (batch @ weight.T).unflatten(1, (L, C)).softmax(2, dtype=torch.float32)
            error = torch.sub(p, target, out=error_buffer[:n]).flatten(1)  # (n, L C)
            # n times the gradient of the mean
            gradient = torch.addmm(weight, error.T, batch, beta=n * fit.weight_decay)
            momentum.mul_(0.9).add_(gradient, alpha=1 / n)
            W.addcmul_(momentum, minus_lr)
        yield [linear(weight[:, :-1], weight[:, -1]) for weight in W.split(C)]


def linear(weight, bias):
    """Return an nn.Linear with this weight (C, d) and bias (C,)."""
    C, d = weight.shape
    layer = nn.utils.skip_init(nn.Linear, d, C, device=weight.device).requires_grad_(False)
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


@torch.no_grad()
def ranked(layer, x):
    """Return the five classes with the greatest logits, or all if they are fewer: int64 (M, 5)."""
    logits = layer(x)
    return logits.topk(min(TOP, logits.shape[1])).indices


def accuracy(layer, x, y):
    """Return [top-1, top-5] in percent. With fewer than five classes top-5 counts all of them."""
    hits = ranked(layer, x) == y[:, None]  # (M, 5)
    return [100 * hits[:, 0].sum().item() / len(y), 100 * hits.sum().item() / len(y)]


def has_top5(key):
    """Whether top-5 says anything: of five classes or fewer it is always 100%.

    key: that of the result of a run, with the names of the classes.
    """
    return len(key["data"]["class_names"]) > TOP


def accuracy_text(result, key):
    """Return top1, and top5 where it says anything, as the log shows them."""
    top5 = f"  top-5 {result['top5']:.2f}%" if has_top5(key) else ""
    return f"top-1 {result['top1']:.2f}%{top5}"


def confusion_matrix(truth, predicted, n_classes):
    """Return int64 (C, C): how many images of a class, the row, were taken for another, the column.

    truth, predicted: int64 (M,).
    """
    pairs = (truth * n_classes + predicted).cpu()
    return torch.bincount(pairs, minlength=n_classes**2).view(n_classes, n_classes)


def balance(confusion):
    """Return {"balanced_top1", "largest_class"}, in percent, of a confusion_matrix (C, C).

    The mean accuracy of the classes with test images, and the share of the test images that are of
    the most frequent class: the top-1 of always predicting it.
    """
    n = confusion.sum(1).double()
    accuracies = confusion.diagonal()[n > 0] / n[n > 0]
    return {
        "balanced_top1": 100 * accuracies.mean().item(),
        "largest_class": 100 * (n.max() / n.sum()).item(),
    }


def per_class(confusion, class_names):
    """Return {class name: top-1 in percent}; None for a class without test images.

    confusion: a confusion_matrix as a list of lists.
    """
    accuracies = {}
    for i, name in enumerate(class_names):
        n = sum(confusion[i])
        accuracies[name] = 100 * confusion[i][i] / n if n else None
    return accuracies


@torch.no_grad()
def knn(x, y, x_test, y_test, n_classes, k=20, temperature=0.07, bf16=False):
    """Return the top-1 accuracy, in percent, of the k nearest neighbours by cosine.

    Each votes with exp(cosine / temperature). x float32 (N, d), y int64 (N,), x_test (M, d), y_test
    (M,), all on one device. If N is less than k, all of x vote. bf16: see `nearest`.
    Source: the weighted kNN of arXiv 1805.01978, section 3.4.
    """
    x = F.normalize(x, dim=1)
    # Without the mean, which changes no order, they are near 0, where bfloat16 is finest.
    rounded = (x - x.mean(0)).bfloat16() if bf16 else None
    votes = F.one_hot(y, n_classes).to(x.dtype)  # (N, C)
    chunk = 100 if bf16 else 1000
    queries = F.normalize(x_test, dim=1).split(chunk)
    hits = 0
    for query, truth in zip(queries, y_test.split(chunk), strict=True):
        cosine, neighbour = nearest(x, query, k, rounded)  # (chunk, k)
        score = torch.einsum("qk,qkc->qc", (cosine / temperature).exp(), votes[neighbour])
        hits += (score.argmax(1) == truth).sum()
    return 100 * hits.item() / len(x_test)


def nearest(x, query, k, rounded=None):
    """Return (cosines, indices) of the k rows of x (N, d) that are nearest to each query (n, d).

    All are unit vectors. rounded: x in bfloat16, less a vector that is the same for all rows. The
    products with it only choose the candidates, three times as many as k: with 8,192 dimensions,
    two cores take two thirds of the time.
    """
    k = min(k, len(x))
    if rounded is None:
        return (query @ x.T).topk(k)
    candidates = (query.bfloat16() @ rounded.T).topk(min(3 * k, len(x))).indices  # (n, 3 k)
    cosines = torch.einsum("nd,ncd->nc", query, x[candidates])
    cosine, order = cosines.topk(k)
    return cosine, candidates.gather(1, order)


# Accuracies in addition to the probe's.
# name: (title, function of (x, y, x_test, y_test, n_classes, bf16=) -> top-1 in percent)
METRICS = {"knn_top1": ("20-NN", knn)}


def fit_probe(run, encoded):
    """Stage 3: return what probe.pt holds: weight (C, d), bias (C,), class_names and result.

    encoded: {split: what encode_split returned}.
    """
    log_stage("Fitting a linear classifier")
    hp = run.hp
    class_names = run.fingerprints["class_names"]
    n_classes = len(class_names)
    run.journal.begin("probe")
    start = time.monotonic()
    x, y, x_test, y_test = tensors_of(encoded, run.device)
    fit = Fit(hp.eval_lr, hp.n_eval_epochs, seed=hp.seed, bf16=run.bf16, standardize=hp.standardize)
    bar = functools.partial(progress, every=hp.print_freq, unit="epochs")
    result, layer = linear_probe(x, y, x_test, y_test, n_classes, fit, bar)
    if not layer.weight.isfinite().all():
        raise RunError(
            f"the weights of the linear probe are not finite with eval_lr {result['lr']:g}: lower "
            f"eval_lr in hparams.yaml, then resume"
        )
    result["per_class"] = per_class(result["confusion"], class_names)
    if n_classes > MOST_CLASSES:
        del result["confusion"]
    for name, (_, metric) in METRICS.items():
        result[name] = metric(x, y, x_test, y_test, n_classes, bf16=run.bf16)
    result |= {"n_train": len(x), "n_test": len(x_test), "seconds": time.monotonic() - start}
    return {**layer.state_dict(), "class_names": class_names, "result": result}


def tensors_of(encoded, device):
    """Return [x, y, x_test, y_test] on the device: embeddings and labels of the two splits.

    Images without a label are left out.
    """
    tensors = []
    for split in ("train", "test"):
        x, y = (encoded[split][name].to(device) for name in ("embeddings", "labels"))
        known = y >= 0
        tensors += [x, y] if known.all() else [x[known], y[known]]
    return tensors


def effective_rank(x):
    """Return the effective rank of x (N, d): exp of the entropy of its normalised singular values.

    1 if all rows are multiples of one, at most min(N, d). In float64.
    Source: RankMe, arXiv 2210.02885, equations 1 and 2.
    """
    x = x.double()
    N, d = x.shape
    gram = x @ x.T if N <= d else x.T @ x  # its eigenvalues are the squares of the singular values
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    p = values / values.sum().clamp(min=1e-300)
    return float(torch.special.entr(p).sum().exp())


def alignment(z):
    """Return the mean squared distance between two views of an image, of unit vectors z (N, V, d).

    V >= 2. 0 if all views of an image are the same, at most 4.
    Source: arXiv 2005.10242, equation 4 with alpha 2.
    """
    N, V, _ = z.shape
    similarity = torch.einsum("nvd,nwd->nvw", z, z)  # (N, V, V)
    same = similarity.diagonal(dim1=1, dim2=2).sum()
    return float(2 - 2 * (similarity.sum() - same) / (N * V * (V - 1)))


def uniformity(z):
    """Return the log of the mean of exp(-2 squared distance) between rows of unit vectors z (N, d).

    0 if all rows are the same, or there is one; about -4 if they are spread evenly over the sphere.
    Source: arXiv 2005.10242, equation 5 with t 2.
    """
    return float(F.pdist(z).square().mul(-2).exp().mean().log()) if len(z) > 1 else 0.0


def collapse_metrics(embeddings, z):
    """Return {"rank", "alignment", "uniformity"}.

    embeddings: (N, d). z: (N, V, d), the projections of their views.
    """
    z = F.normalize(z.float(), dim=2)
    return {
        "rank": effective_rank(embeddings),
        "alignment": alignment(z),
        "uniformity": uniformity(z[:, 0]),
    }


def collapse_text(metrics):
    """Return collapse_metrics as the log shows them."""
    return (
        f"rank {metrics['rank']:.1f} alignment {metrics['alignment']:.3f} "
        f"uniformity {metrics['uniformity']:.2f}"
    )


def collapse_warning(metrics):
    """Return what to do if the representations or projections have collapsed, "" if not."""
    if metrics["rank"] >= FEW_DIMENSIONS and metrics["uniformity"] <= NO_SPREAD:
        return ""
    return (
        f"collapsed (rank below {FEW_DIMENSIONS}, or uniformity above {NO_SPREAD}): if it stays "
        f"so, train longer or lower invariance_loss_weight"
    )


def measure_collapse(run, encoder, image_set):
    """Return collapse_metrics of up to N_COLLAPSE images, always the same, by four views each."""
    hp = run.hp
    images = sample(image_set, N_COLLAPSE, hp.seed, "collapse").images
    output = Output(hp.emb_pool, save_proj=True, bf16=run.bf16)
    encoded = encode_few(run, encoder, images, 4, "collapse", output)
    return collapse_metrics(encoded["embeddings"], encoded["projections"])


def encode_few(run, encoder, images, n_views, purpose, output):
    """Encode images by n_views views each, without a bar. Return what encode does.

    In place of a whole image, which is one view, and of mirror images it takes a grid of views.
    """
    views = run.hp.test_views._replace(n=n_views, mirror=False)
    if views.kind == "whole":
        views = views._replace(kind="grid")
    rng = functools.partial(generator, run.hp.seed, f"encode-{purpose}")
    return encode(encoder, on_device(images, run.device), views, rng, run.hp.bs, output)


def quick_evaluation(run, encoder, images, index):
    """Print and record, while training, signs of collapse and the accuracy of knn.

    The latter only of images with labels. index: the keys of the line in metrics.jsonl. Returns the
    seconds that it took.
    """
    start = time.monotonic()
    distributed.broadcast_buffers(encoder)  # all encode with the same batch-norm statistics
    metrics = measure_collapse(run, encoder, images["train"])
    text = collapse_text(metrics)
    warning = collapse_warning(metrics)
    if images["test"] and images["train"].class_names:
        metrics["knn_top1"] = quick_knn(run, encoder, images)
        text = f"kNN {metrics['knn_top1']:.2f}% {text}"
    run.journal.add(**index, **metrics)
    log.info(f"epoch {index['epoch']} step {index['step']} | {text}")
    if warning:
        log.warning(f"the representations have {warning}")
    return time.monotonic() - start


def quick_knn(run, encoder, images):
    """Return the accuracy of knn, in percent, on up to 1,000 test and 5,000 training images.

    They are always the same, by up to 4 views each.
    """
    hp = run.hp
    n_views = min(4, hp.test_views.n)
    encoded = {}
    for split, n in (("train", 5000), ("test", 1000)):
        image_set = sample(labelled(images[split]), n, hp.seed, f"knn-{split}")
        output = Output(hp.emb_pool, bf16=run.bf16)
        few = encode_few(run, encoder, image_set.images, n_views, f"knn-{split}", output)
        encoded[split] = {**few, "labels": image_set.labels}
    return knn(*tensors_of(encoded, run.device), len(images["train"].class_names))
