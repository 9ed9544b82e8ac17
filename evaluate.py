"""What the representation is worth: encode images, fit a linear probe, ask the nearest neighbours."""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from data import batches, count_views, generator, sample_views, to_device
from model import fold_batch_norm


@torch.inference_mode()
def encode(
    encoder, images, n_patches, seed=0, split="train", bs=100, views="augmented", size=None, emb_pool="features",
    save_proj=False, bf16=False, progress=iter, part=(0, 1),
):  # fmt: skip
    """The bag of patches: each image's representation is the mean over its n_patches views of h, or of z.

    encoder: a model.Encoder, used as in eval mode and left as it was. images: uint8 (N, 3, H, W), a tensor on the encoder's
    device or a data.ImageFile. seed, split and bs: what random views depend on. views: a kind of data.sample_views; a grid
    may be of fewer than n_patches. size: pixels that they are resized to, as wide as the images by default. emb_pool:
    "features" (h) or "proj" (z). bf16: weights and activations in bfloat16. progress: wraps the sequence of batches.
    part: (i, n), of n processes the i-th encodes every n-th batch and leaves zeros for the others. Returns a dict of CPU
    tensors: embeddings float32 (N, h_dim or z_dim) and, with save_proj, features float16 (N, n_views, h_dim) and projections
    float16 (N, n_views, z_dim); and n_views, a number.
    Source: arXiv 2304.03977, section 2.2 (bag-of-feature representation).
    """
    dtype = torch.bfloat16 if bf16 else torch.float32
    encoder = fold_batch_norm(encoder).to(dtype, memory_format=torch.channels_last)
    N, size, encoded = len(images), size or images.shape[-1], {}
    n_views = count_views(n_patches, views)
    h_dim, z_dim = encoder.features[0].out_features, encoder.projection[-1].out_features
    device = next(encoder.parameters()).device
    embeddings = torch.zeros(N, h_dim if emb_pool == "features" else z_dim, device=device)
    if save_proj:
        encoded = {"features": torch.zeros(N, n_views, h_dim, dtype=torch.float16),
                   "projections": torch.zeros(N, n_views, z_dim, dtype=torch.float16)}  # fmt: skip
    steps = range(part[0], math.ceil(N / bs), part[1])
    slices = [slice(step * bs, (step + 1) * bs) for step in steps]
    for step, rows, batch in zip(progress(steps), slices, batches(images, slices, device), strict=False):
        x = sample_views(batch, n_patches, views, generator(seed, f"encode-{split}", step=step), size)
        h = encoder.features(encoder.backbone(x.flatten(0, 1).to(dtype, memory_format=torch.channels_last)))
        patches = {"features": h}
        if save_proj or emb_pool == "proj":  # a third of the work of resnet18-imagenet
            patches["projections"] = F.normalize(encoder.projection(h).float(), dim=-1)
        patches = {name: tensor.float().unflatten(0, x.shape[:2]) for name, tensor in patches.items()}  # (P, B, dim)
        embeddings[rows] = patches["features" if emb_pool == "features" else "projections"].mean(0)
        for name, tensor in encoded.items():
            tensor[rows] = patches[name].transpose(0, 1)
    return {"embeddings": embeddings.cpu(), "n_views": n_views, **encoded}


AUTHORS_LR = 0.0075
LRS = (0.00075, 0.0025, AUTHORS_LR, 0.025, 0.075, 0.25)


def linear_probe(
    x, y, x_test, y_test, n_classes, lr=None, n_epochs=100, bs=100, weight_decay=5e-5, seed=0, bf16=False, progress=iter
):
    """Fit one linear layer to x (N, d), y (N,) and score it on every row of x_test (M, d), y_test (M,) after each epoch.

    lr: a number, or None for the one of LRS that is best on a tenth of x, held out from a first fit; the second is on all
    of x. SGD with momentum .9, cosine over n_epochs; all tensors on one device, x float32, y int64. bf16: the two matrix
    products of a step in bfloat16, weights and scores in float32 all the same. Returns (result, layer): result holds
    percentages: top1 and top5 of the last epoch, best_top1 and its best_epoch (counted from 0; chosen on the test set, so no
    fair estimate), per_epoch, a list of [top1, top5], and lr, and held_out, {lr: top-1 on the tenth} where there was a choice.
    """
    fit = functools.partial(softmax_regressions, n_classes=n_classes, n_epochs=n_epochs, bs=bs, weight_decay=weight_decay,
                            seed=seed, bf16=bf16, progress=progress)  # fmt: skip
    held_out = {}
    if lr is None and len(x) < 10:
        lr = AUTHORS_LR
    if lr is None:
        order = to_device(torch.randperm(len(x), generator=generator(seed, "held-out")), x.device)
        tenth, rest = order.split([len(x) // 10, len(x) - len(x) // 10])
        for layers in fit(x[rest], y[rest], lrs=LRS):
            held_out = {rate: accuracy(layer, x[tenth], y[tenth])[0] for rate, layer in zip(LRS, layers, strict=True)}
        lr = max(LRS, key=lambda rate: (held_out[rate], -abs(math.log(rate / AUTHORS_LR))))  # of equals the nearest to it
    per_epoch = []
    for (layer,) in fit(x, y, lrs=[lr]):
        per_epoch.append(accuracy(layer, x_test, y_test))
    best_epoch = max(range(n_epochs), key=lambda epoch: per_epoch[epoch][0])
    top1, top5 = per_epoch[-1]
    best = {"best_top1": per_epoch[best_epoch][0], "best_epoch": best_epoch}
    return {"top1": top1, "top5": top5, **best, "per_epoch": per_epoch, "lr": lr, "held_out": held_out}, layer


@torch.no_grad()
def softmax_regressions(x, y, lrs, n_classes, n_epochs, bs, weight_decay, seed, bf16, progress):
    """Fit a linear layer with each of the learning rates, all at once: their weights are rows of one matrix.

    x, y and the rest as in linear_probe. After each epoch yields the layers, nn.Linear, in the order of lrs.
    """
    L, C, d = len(lrs), n_classes, x.shape[1]
    W, b = torch.zeros(L * C, d, device=x.device), torch.zeros(L * C, device=x.device)  # convex: no random start is needed
    W_buffer, b_buffer = torch.zeros_like(W), torch.zeros_like(b)
    rates = torch.tensor(lrs, device=x.device).repeat_interleave(C)  # (L C,)
    target, x = F.one_hot(y, C).float(), x.bfloat16() if bf16 else x
    rows = torch.empty_like(x[:bs])
    for epoch in progress(range(n_epochs)):
        step = -rates / 2 * (1 + math.cos(math.pi * epoch / n_epochs))
        order = to_device(torch.randperm(len(x), generator=generator(seed, "probe", epoch)), x.device)
        for batch in order.split(bs):
            # The gradient of softmax regression, written out: autograd and torch.optim take 2x as long for so little work.
            batch_x = torch.index_select(x, 0, batch, out=rows[: len(batch)])
            logits = (batch_x @ W.to(x.dtype).T).float().add_(b).unflatten(1, (L, C))
            error = logits.softmax(2).sub_(target[batch, None]).flatten(1)  # (bs, L C)
            W_buffer.mul_(0.9).add_(error.to(x.dtype).T @ batch_x, alpha=1 / len(batch)).add_(W, alpha=weight_decay)
            b_buffer.mul_(0.9).add_(error.mean(0)).add_(b, alpha=weight_decay)
            W.addcmul_(W_buffer, step[:, None])
            b.addcmul_(b_buffer, step)
        yield [linear(weight, bias) for weight, bias in zip(W.split(C), b.split(C), strict=True)]


def linear(weight, bias):
    layer = nn.utils.skip_init(nn.Linear, *weight.T.shape, device=weight.device).requires_grad_(False)
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


@torch.no_grad()
def accuracy(layer, x, y):
    """[top-1, top-5] in percent; with fewer than five classes top-5 is top-all."""
    logits = layer(x)
    ranked = logits.topk(min(5, logits.shape[1])).indices  # (M, 5)
    hits = ranked == y[:, None]
    return [100 * hits[:, 0].sum().item() / len(y), 100 * hits.sum().item() / len(y)]


@torch.no_grad()
def knn(x, y, x_test, y_test, n_classes, k=20, temperature=0.07, chunk=1000):
    """Top-1 in percent of the k nearest neighbours by cosine, each voting with weight exp(cosine / temperature).

    x float32 (N, d), y int64 (N,), x_test (M, d), y_test (M,), on one device; k is cut to N.
    Source: the weighted kNN of arXiv 1805.01978, section 3.4.
    """
    x, votes = F.normalize(x, dim=1), F.one_hot(y, n_classes).to(x.dtype)
    hits = 0
    for queries, truth in zip(F.normalize(x_test, dim=1).split(chunk), y_test.split(chunk), strict=True):
        cosine, neighbour = (queries @ x.T).topk(min(k, len(x)))  # (chunk, k)
        score = torch.einsum("qk,qkc->qc", (cosine / temperature).exp(), votes[neighbour])
        hits += (score.argmax(1) == truth).sum()
    return 100 * hits.item() / len(x_test)
