"""What the representation is worth: encode images, fit a linear probe, ask the nearest neighbours."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from data import generator, sample_patches


@torch.inference_mode()
def encode(
    encoder, images, n_patches, seed=0, split="train", bs=100, emb_pool="features", save_proj=False, bf16=False, progress=iter
):
    """The bag of patches: each image's representation is the mean over n_patches random patches of h, or of z.

    encoder: a model.Encoder, used in eval mode and left in the mode it was in. images: uint8 (N, 3, H, W), on the
    encoder's device. seed, split and bs: what the patches depend on. emb_pool: "features" (h) or "proj" (z).
    progress: wraps the sequence of batches. Returns a dict of CPU tensors: embeddings float32 (N, h_dim or z_dim) and,
    with save_proj, features float16 (N, n_patches, h_dim) and projections float16 (N, n_patches, z_dim).
    Source: arXiv 2304.03977, section 2.2 (bag-of-feature representation).
    """
    was_training, size = encoder.training, images.shape[-1]
    encoder.eval()
    N, embeddings, encoded = len(images), [], {}
    for step in progress(range(math.ceil(N / bs))):
        rows = slice(step * bs, (step + 1) * bs)
        x = sample_patches(images[rows], n_patches, generator(seed, f"encode-{split}", step=step), size)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            h, z = encoder(x.flatten(0, 1))
        h, z = (tensor.float().unflatten(0, x.shape[:2]) for tensor in (h, z))  # (P, B, h_dim), (P, B, z_dim)
        embeddings.append((h if emb_pool == "features" else z).mean(0).cpu())
        for name, patches in {"features": h, "projections": z}.items() if save_proj else ():
            if name not in encoded:
                encoded[name] = torch.empty(N, n_patches, patches.shape[-1], dtype=torch.float16)
            encoded[name][rows] = patches.transpose(0, 1)
    encoder.train(was_training)
    return {"embeddings": torch.cat(embeddings), **encoded}


def linear_probe(x, y, x_test, y_test, n_classes, lr=0.0075, n_epochs=100, bs=100, weight_decay=5e-5, seed=0, progress=iter):
    """Fit one linear layer to x (N, d), y (N,) and score it on every row of x_test (M, d), y_test (M,) after each epoch.

    SGD with momentum .9, cosine over n_epochs; all tensors on one device, x float32, y int64. Returns (result, layer):
    result holds percentages: top1 and top5 of the last epoch, best_top1 and its best_epoch (counted from 0; chosen on
    the test set, so no fair estimate), and per_epoch, a list of [top1, top5].
    """
    layer = nn.Linear(x.shape[1], n_classes, device=x.device)
    nn.init.zeros_(layer.weight)  # the problem is convex: no random start is needed
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(layer.parameters(), lr, momentum=0.9, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_epochs)
    per_epoch = []
    for epoch in progress(range(n_epochs)):
        order = torch.randperm(len(x), generator=generator(seed, "probe", epoch)).to(x.device)
        for batch in order.split(bs):
            optimizer.zero_grad()
            F.cross_entropy(layer(x[batch]), y[batch]).backward()
            optimizer.step()
        schedule.step()
        per_epoch.append(accuracy(layer, x_test, y_test))
    best_epoch = max(range(n_epochs), key=lambda epoch: per_epoch[epoch][0])
    top1, top5 = per_epoch[-1]
    best = {"best_top1": per_epoch[best_epoch][0], "best_epoch": best_epoch}
    return {"top1": top1, "top5": top5, **best, "per_epoch": per_epoch}, layer


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
