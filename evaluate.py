"""Stage 3: measure the representation, by a linear probe and by nearest neighbours."""

import collections
import functools
import math
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from infra.console import log_stage, progress
from infra.device import generator, to_device
from infra.errors import RunError

PROBE_LR = 0.0075  # where too few images are there to choose one of LRS
MOST_CLASSES = 200  # for a confusion matrix in the result; of 1,000 it has a million numbers
LRS = (0.00075, 0.0025, PROBE_LR, 0.025, 0.075, 0.25)


class Fit(NamedTuple):
    """How a linear layer is fitted: SGD with momentum .9 and a cosine over n_epochs."""

    lr: float | None = None  # None: chosen from LRS
    n_epochs: int = 100
    bs: int = 100
    weight_decay: float = 5e-5
    seed: int = 0
    bf16: bool = False  # the two matrix products of a step in bfloat16; weights and scores stay in float32
    standardize: bool = False  # shift and scale each dimension by its mean and deviation over the training rows


def no_bar(epochs, title):
    return epochs


def linear_probe(x, y, x_test, y_test, n_classes, fit=Fit(), progress=no_bar):  # noqa: B008, a tuple does not change
    """Fit a linear layer to x (N, d), y (N,) and score it on all rows of x_test (M, d), y_test (M,) after each epoch.

    x float32, y int64, all on one device. fit: a Fit. If fit.lr is None, all of LRS are tried at once on nine tenths of x, the
    best on the last tenth is taken, and the layer is fitted to all of x. progress(epochs, title) wraps
    the sequence of epochs.
    Returns (result, layer). result: top1 and top5 of the last epoch, in percent, and train_top1, of x itself; best_top1 and
    best_epoch (from 0), chosen on the test set and therefore no fair estimate; per_epoch, a list of [top1, top5];
    confusion, confusion_matrix of the last epoch as a list of lists; lr; and held_out, {lr: top-1 on the tenth}, empty if there
    was no choice.
    """
    if fit.standardize:
        mean, scale = x.mean(0), x.std(0, correction=0).clamp(min=1e-6).reciprocal()
        x, x_test = (x - mean) * scale, (x_test - mean) * scale
    lr, held_out = fit.lr, {}
    if lr is None and len(x) < 10:
        lr = PROBE_LR
    if lr is None:
        lr, held_out = choose_lr(x, y, n_classes, fit, progress)
    per_epoch = []
    for (layer,) in softmax_regressions(x, y, [lr], n_classes, fit, progress(range(fit.n_epochs), "linear probe")):
        per_epoch.append(accuracy(layer, x_test, y_test))
    best_epoch = max(range(fit.n_epochs), key=lambda epoch: per_epoch[epoch][0])
    top1, top5 = per_epoch[-1]
    confusion = confusion_matrix(y_test, ranked(layer, x_test)[:, 0], n_classes).tolist()
    best = {"train_top1": accuracy(layer, x, y)[0], "best_top1": per_epoch[best_epoch][0], "best_epoch": best_epoch}
    if fit.standardize:  # the layer takes x as it was given
        weight = layer.weight * scale
        layer = linear(weight, layer.bias - weight @ mean)
    result = {"top1": top1, "top5": top5, **best, "per_epoch": per_epoch, "confusion": confusion, "lr": lr, "held_out": held_out}
    return result, layer


def choose_lr(x, y, n_classes, fit, progress):
    """Return the best of LRS on a tenth of x that the fit does not see, and {lr: top-1 on the tenth}."""
    order = to_device(torch.randperm(len(x), generator=generator(fit.seed, "held-out")), x.device)
    tenth, rest = order.split([len(x) // 10, len(x) - len(x) // 10])
    epochs = progress(range(fit.n_epochs), "linear probe, choice of its rate")
    (layers,) = collections.deque(softmax_regressions(x[rest], y[rest], LRS, n_classes, fit, epochs), maxlen=1)  # the last
    held_out = {rate: accuracy(layer, x[tenth], y[tenth])[0] for rate, layer in zip(LRS, layers, strict=True)}
    return max(LRS, key=lambda rate: (held_out[rate], -abs(math.log(rate / PROBE_LR)))), held_out  # ties: nearest to PROBE_LR


@torch.no_grad()
def softmax_regressions(x, y, lrs, n_classes, fit, epochs):
    """Fit a linear layer for each of the L learning rates, all at once, as rows of one matrix.

    The arguments are those of linear_probe. epochs: range(fit.n_epochs). After each one, yields the layers (nn.Linear) in the
    order of lrs.
    """
    L, C, d = len(lrs), n_classes, x.shape[1]
    x = F.pad(x.bfloat16() if fit.bf16 else x, (0, 1), value=1.0)  # (N, d + 1): the last column multiplies the bias
    W = torch.zeros(L * C, d + 1, device=x.device)  # convex, so zeros are a good start
    momentum = torch.zeros_like(W)
    rates, target = torch.tensor(lrs).repeat_interleave(C)[:, None], F.one_hot(y, C).float()
    rows, errors = torch.empty_like(x[: fit.bs]), x.new_empty(fit.bs, L, C)
    for epoch in epochs:
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
def ranked(layer, x):
    """Return the five classes with the greatest logits, or all if they are fewer: int64 (M, 5)."""
    logits = layer(x)
    return logits.topk(min(5, logits.shape[1])).indices


def accuracy(layer, x, y):
    """Return [top-1, top-5] in percent. With fewer than five classes top-5 counts all of them."""
    hits = ranked(layer, x) == y[:, None]  # (M, 5)
    return [100 * hits[:, 0].sum().item() / len(y), 100 * hits.sum().item() / len(y)]


def confusion_matrix(truth, predicted, n_classes):
    """Return int64 (n_classes, n_classes): how many images of a class, the row, were taken for a class, the column."""
    pairs = (truth * n_classes + predicted).cpu()
    return torch.bincount(pairs, minlength=n_classes**2).view(n_classes, n_classes)


def per_class(confusion, class_names):
    """Return {class name: top-1 in percent} of a confusion matrix, a list of lists; None for a class without test images."""
    totals = [sum(row) for row in confusion]
    return {name: 100 * row[i] / n if n else None
            for i, (name, row, n) in enumerate(zip(class_names, confusion, totals, strict=True))}  # fmt: skip


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
    bar = functools.partial(progress, every=hp.print_freq, unit="epochs")
    result, layer = linear_probe(*tensors, len(class_names), fit, bar)
    if not layer.weight.isfinite().all():
        raise RunError(f"the weights of the linear probe are not finite with eval_lr {result['lr']:g}: lower eval_lr in "
                       f"hparams.yaml, then resume")  # fmt: skip
    result["per_class"] = per_class(result["confusion"], class_names)
    if len(class_names) > MOST_CLASSES:
        del result["confusion"]
    result |= {name: metric(*tensors, len(class_names)) for name, (_, metric) in METRICS.items()}
    result |= {"n_train": len(tensors[0]), "n_test": len(tensors[2]), "seconds": time.monotonic() - start}
    return {**layer.state_dict(), "class_names": class_names, "result": result}
