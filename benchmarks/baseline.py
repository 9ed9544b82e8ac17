"""EMP-SSL as papers and tutorials write it, the opponent in every comparison of benchmarks/bench.py: patches by
torchvision's transforms on PIL images in worker processes, a d x d logdet for each patch, cosines term by term, LARS as a
loop over tensors around torch.optim.SGD, fp32, a probe that reads its features through a DataLoader.

    python benchmarks/baseline.py --data_dir .data/cifar10 --arch resnet18-imagenet --n_patches 8 --n_images 10000

It trains the network that main.py trains, with the same settings, and prints accuracy and seconds as one JSON line. Its
losses and its LARS pass the tests of ours.
"""

import argparse
import itertools
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision import transforms
from torchvision.models import resnet18

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
from model import ARCHS

TRANSFORM = transforms.Compose([
    transforms.RandomResizedCrop(32, scale=(0.25, 0.25), ratio=(1, 1)),
    transforms.RandomHorizontalFlip(),
    transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.2)], p=0.8),
    transforms.RandomGrayscale(p=0.2),
    transforms.RandomApply([transforms.GaussianBlur(13, sigma=(0.1, 2.0))], p=0.1),
    transforms.RandomSolarize(128, p=0.1),
    transforms.ToTensor(),
    transforms.Normalize([0.5] * 3, [0.5] * 3),
])  # fmt: skip


class Patches(Dataset):
    """images: uint8 (N, 3, 32, 32). Item i: float32 (n_patches, 3, 32, 32), random patches of image i."""

    def __init__(self, images, n_patches):
        self.images, self.n_patches = [transforms.functional.to_pil_image(image) for image in images], n_patches

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return torch.stack([TRANSFORM(self.images[i]) for _ in range(self.n_patches)])


def loader(images, n_patches, bs, train):
    return DataLoader(Patches(images, n_patches), bs, shuffle=train, drop_last=train, num_workers=os.cpu_count())


def tcr_loss(z, eps=0.2):
    """z (P, B, d) -> minus the mean over patches of ½ logdet(I + d / (B eps) zᵀ z)."""
    P, B, d = z.shape
    loss = 0
    for p in range(P):
        loss = loss - torch.logdet(torch.eye(d, device=z.device, dtype=z.dtype) + d / (B * eps) * z[p].T @ z[p]) / 2
    return loss / P


def invariance_loss(z):
    """z (P, B, d) -> minus the mean cosine between each patch and its image's mean."""
    P, mean, loss = len(z), z.mean(0), 0
    for p in range(P):
        loss = loss - F.cosine_similarity(z[p], mean, dim=-1).mean()
    return loss / P


def vonmises_loss(z, t=2.0):
    """z (P, B, d) -> log of the mean Gaussian potential between the images' means."""
    return torch.pdist(z.mean(0)).square().mul(-t).exp().mean().log()


class LARS(torch.optim.SGD):
    """SGD on gradients that were scaled, tensor by tensor, before its step."""

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, nesterov=False, eta=1e-3, clip=False, eps=1e-8):
        super().__init__(params, lr, momentum=momentum, nesterov=nesterov)
        self.wd, self.eta, self.clip, self.lars_eps = weight_decay, eta, clip, eps

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None or p.ndim == 1:
                    continue
                p_norm, g_norm = torch.norm(p), torch.norm(p.grad)
                if p_norm != 0 and g_norm != 0:
                    trust = self.eta * p_norm / (g_norm + self.wd * p_norm + self.lars_eps)
                    if self.clip:
                        trust = min(trust / group["lr"], 1)
                    p.grad += self.wd * p
                    p.grad *= trust
        super().step()


class Encoder(nn.Module):
    """The network of model.Encoder, and the names of its weights, of torchvision's layers alone."""

    def __init__(self, arch, h_dim=4096, z_dim=1024):
        super().__init__()
        small_stem, removed, feature_dim = ARCHS[arch]
        self.backbone = resnet18()
        self.backbone.fc = nn.Identity()
        if small_stem:
            self.backbone.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
            self.backbone.maxpool = nn.Identity()
        for name in removed:
            setattr(self.backbone, name, nn.Identity())
        self.features = nn.Sequential(nn.Linear(feature_dim, h_dim), nn.BatchNorm1d(h_dim), nn.ReLU())
        self.projection = nn.Sequential(
            nn.Linear(h_dim, h_dim), nn.BatchNorm1d(h_dim), nn.ReLU(), nn.Linear(h_dim, z_dim))  # fmt: skip

    def forward(self, x):
        h = self.features(self.backbone(x))
        return h, F.normalize(self.projection(h), dim=-1)


def train_step(encoder, optimizer, x):
    """x (B, P, 3, 32, 32) on the encoder's device -> (invariance, uniformity), numbers."""
    B, P = x.shape[:2]
    _, z = encoder(x.transpose(0, 1).flatten(0, 1))
    z = z.unflatten(0, (P, B))
    invariance, uniformity = invariance_loss(z), tcr_loss(z)
    optimizer.zero_grad()
    (200 * invariance + uniformity).backward()
    optimizer.step()
    return invariance.item(), uniformity.item()


def train(encoder, images, n_patches, n_epochs, bs=100, lr=0.3):
    device = next(encoder.parameters()).device
    optimizer = LARS(encoder.parameters(), lr, weight_decay=1e-4, nesterov=True, eta=0.005, clip=True)
    n_steps = n_epochs * (len(images) // bs)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    encoder.train()
    for epoch in range(n_epochs):
        for x in loader(images, n_patches, bs, train=True):
            losses = train_step(encoder, optimizer, x.to(device))
            schedule.step()
        print(f"epoch {epoch}: invariance {losses[0]:.4f}, uniformity {losses[1]:.2f}", flush=True)


@torch.no_grad()
def encode(encoder, images, n_patches, bs):
    """float32 (N, h_dim): the mean of h over each image's patches."""
    device = next(encoder.parameters()).device
    encoder.eval()
    embeddings = []
    for x in loader(images, n_patches, bs, train=False):
        h, _ = encoder(x.to(device).flatten(0, 1))
        embeddings.append(h.unflatten(0, x.shape[:2]).mean(1).cpu())
    return torch.cat(embeddings)


def linear_probe(x, y, x_test, y_test, n_classes, device, n_epochs=100, lr=0.0075, bs=100, workers=0):
    """Top-1 in percent on the test set, after the last epoch. The authors' code has 2 workers, which is slower on a CPU."""
    layer = nn.Linear(x.shape[1], n_classes).to(device)
    optimizer = torch.optim.SGD(layer.parameters(), lr, momentum=0.9, weight_decay=5e-5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_epochs)
    train_loader = DataLoader(TensorDataset(x, y), bs, shuffle=True, num_workers=workers)
    test_loader = DataLoader(TensorDataset(x_test, y_test), bs, num_workers=workers)
    for _ in range(n_epochs):
        for batch, label in train_loader:
            optimizer.zero_grad()
            F.cross_entropy(layer(batch.to(device)), label.to(device)).backward()
            optimizer.step()
        schedule.step()
        hits = 0
        with torch.no_grad():
            for batch, label in test_loader:
                hits += (layer(batch.to(device)).argmax(1).cpu() == label).sum().item()
    return 100 * hits / len(x_test)


def run(options):
    start = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(options.seed)
    train_set, test_set = (data.load_images("folder", options.data_dir, train) for train in (True, False))
    random = data.generator(options.seed, "subset")
    subset = data.balanced_subset(train_set.labels, len(train_set.images), options.n_images, random)
    images, labels = train_set.images[subset], train_set.labels[subset]
    encoder = Encoder(options.arch).to(device)
    clock = [time.monotonic()]
    train(encoder, images, options.n_patches, options.n_epochs)
    clock.append(time.monotonic())
    x, x_test = (encode(encoder, part, options.n_patches, 100) for part in (images, test_set.images))
    clock.append(time.monotonic())
    top1 = linear_probe(x, labels, x_test, test_set.labels, len(train_set.class_names), device)
    clock.append(time.monotonic())
    stages = dict(zip(("training", "encoding", "probe"), (b - a for a, b in itertools.pairwise(clock)), strict=True))
    seconds = {name: round(value, 1) for name, value in {**stages, "all": clock[-1] - start}.items()}
    print(json.dumps({"seed": options.seed, "top1": top1, "seconds": seconds}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="folder of images: train/<class>/*, test/<class>/*")
    parser.add_argument("--arch", default="resnet18-cifar", choices=tuple(ARCHS))
    parser.add_argument("--n_patches", type=int, default=20)
    parser.add_argument("--n_epochs", type=int, default=2)
    parser.add_argument("--n_images", type=int, default=50000)
    parser.add_argument("--seed", type=int, default=42)
    run(parser.parse_args())
