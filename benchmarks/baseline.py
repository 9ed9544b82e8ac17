"""EMP-SSL as papers and tutorials write it, to compare the program with.

    python -m benchmarks.baseline --n_patches 8

Patches by torchvision's transforms on PIL images in worker processes, a d x d logdet for each
patch, cosines term by term, LARS as a loop over tensors around torch.optim.SGD, fp32, and a probe
that reads its features through a DataLoader. It trains the network that main.py trains, with the
same settings, and prints accuracy and seconds as one JSON line. Its losses and its LARS pass the
tests of the program's.
"""

import argparse
import json
import os
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision import transforms
from torchvision.models import resnet18

from data import load_images, sample
from model import BACKBONES

TRANSFORM = transforms.Compose(
    [
        transforms.RandomResizedCrop(32, scale=(0.25, 0.25), ratio=(1, 1)),
        transforms.RandomHorizontalFlip(),
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.2)], p=0.8),
        transforms.RandomGrayscale(p=0.2),
        transforms.RandomApply([transforms.GaussianBlur(13, sigma=(0.1, 2.0))], p=0.1),
        transforms.RandomSolarize(128, p=0.1),
        transforms.ToTensor(),
        transforms.Normalize([0.5] * 3, [0.5] * 3),
    ]
)


class Patches(Dataset):
    """images: uint8 (N, 3, 32, 32). Item i: float32 (n_patches, 3, 32, 32), patches of image i."""

    def __init__(self, images, n_patches):
        self.images = [transforms.functional.to_pil_image(image) for image in images]
        self.n_patches = n_patches

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return torch.stack([TRANSFORM(self.images[i]) for _ in range(self.n_patches)])


def loader(images, n_patches, bs, train):
    """Return a DataLoader of patches (bs, n_patches, 3, 32, 32), in random order if train."""
    patches = Patches(images, n_patches)
    return DataLoader(patches, bs, shuffle=train, drop_last=train, num_workers=os.cpu_count())


def tcr_loss(z, eps=0.2):
    """Return minus the mean over patches of ½ logdet(I + d / (B eps) zᵀ z), of z (P, B, d)."""
    P, B, d = z.shape
    eye = torch.eye(d, device=z.device, dtype=z.dtype)
    loss = 0
    for p in range(P):
        loss = loss - torch.logdet(eye + d / (B * eps) * z[p].T @ z[p]) / 2
    return loss / P


def invariance_loss(z):
    """Return minus the mean cosine between each patch and its image's mean, of z (P, B, d)."""
    P = len(z)
    mean = z.mean(0)
    loss = 0
    for p in range(P):
        loss = loss - F.cosine_similarity(z[p], mean, dim=-1).mean()
    return loss / P


def vonmises_loss(z, t=2.0):
    """Return the log of the mean Gaussian potential between the images' means, of z (P, B, d)."""
    return torch.pdist(z.mean(0)).square().mul(-t).exp().mean().log()


class LARS(torch.optim.SGD):
    """SGD on gradients that were scaled, tensor by tensor, before its step."""

    def __init__(
        self,
        params,
        lr,
        momentum=0.9,
        weight_decay=0.0,
        nesterov=False,
        eta=1e-3,
        clip=False,
        eps=1e-8,
    ):
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
    """The network of model.Encoder, with the same names of its weights, of torchvision's layers."""

    def __init__(self, arch, h_dim=4096, z_dim=1024):
        super().__init__()
        without = {"resnet18-mini": ("layer4",), "resnet18-tiny": ("layer3", "layer4")}
        removed = without.get(arch, ())
        feature_dim = 512 // 2 ** len(removed)  # each stage has twice the channels of the last one
        self.backbone = resnet18()
        self.backbone.fc = nn.Identity()
        if arch not in ("resnet18-imagenet", "resnet18-tinyimagenet"):
            self.backbone.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
            self.backbone.maxpool = nn.Identity()
        for name in removed:
            setattr(self.backbone, name, nn.Identity())
        hidden = [nn.Linear(feature_dim, h_dim), nn.BatchNorm1d(h_dim), nn.ReLU()]
        self.features = nn.Sequential(*hidden)
        hidden = [nn.Linear(h_dim, h_dim), nn.BatchNorm1d(h_dim), nn.ReLU()]
        self.projection = nn.Sequential(*hidden, nn.Linear(h_dim, z_dim))

    def forward(self, x):
        h = self.features(self.backbone(x))
        return h, F.normalize(self.projection(h), dim=-1)


def train_step(encoder, optimizer, x):
    """Train on x (B, P, 3, 32, 32), on the encoder's device. Return (invariance, uniformity)."""
    B, P = x.shape[:2]
    _, z = encoder(x.transpose(0, 1).flatten(0, 1))
    z = z.unflatten(0, (P, B))
    invariance, uniformity = invariance_loss(z), tcr_loss(z)
    optimizer.zero_grad()
    (200 * invariance + uniformity).backward()
    optimizer.step()
    return invariance.item(), uniformity.item()


def train(encoder, images, n_patches, n_epochs, bs=100, lr=0.3):
    """Train the encoder in place, with a cosine over all steps."""
    device = next(encoder.parameters()).device
    settings = {"weight_decay": 1e-4, "nesterov": True, "eta": 0.005, "clip": True}
    optimizer = LARS(encoder.parameters(), lr, **settings)
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
    """Return float32 (N, h_dim): the mean of h over each image's patches."""
    device = next(encoder.parameters()).device
    encoder.eval()
    embeddings = []
    for x in loader(images, n_patches, bs, train=False):
        h, _ = encoder(x.to(device).flatten(0, 1))
        embeddings.append(h.unflatten(0, x.shape[:2]).mean(1).cpu())
    return torch.cat(embeddings)


def linear_probe(x, y, x_test, y_test, n_classes, device, n_epochs=100, lr=0.0075, **loading):
    """Fit a linear layer and return its top-1 in percent on the test set, after the last epoch.

    loading: options of the DataLoaders. The authors' code has num_workers=2, slower on a CPU.
    """
    layer = nn.Linear(x.shape[1], n_classes).to(device)
    optimizer = torch.optim.SGD(layer.parameters(), lr, momentum=0.9, weight_decay=5e-5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_epochs)
    train_loader = DataLoader(TensorDataset(x, y), 100, shuffle=True, **loading)
    test_loader = DataLoader(TensorDataset(x_test, y_test), 100, **loading)
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
    """Train, encode and probe; print a JSON line."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seconds = {}
    torch.manual_seed(options.seed)

    def timed(stage, function, *args):
        start = time.monotonic()
        result = function(*args)
        seconds[stage] = round(time.monotonic() - start, 1)
        return result

    train_set = load_images(options.dataset, options.data_dir, True)
    test_set = load_images(options.dataset, options.data_dir, False)
    images, labels, class_names, _ = sample(train_set, options.n_images, options.seed, "subset")
    encoder = Encoder(options.arch).to(device)
    n = len(images)
    everything = torch.cat([images, test_set.images])
    timed("training", train, encoder, images, options.n_patches, options.n_epochs)
    x = timed("encoding", encode, encoder, everything, options.n_patches, 100)
    encoded = (x[:n], labels, x[n:], test_set.labels)
    top1 = timed("probe", linear_probe, *encoded, len(class_names), device)
    print(json.dumps({"seed": options.seed, "top1": top1, "seconds": seconds}))


if __name__ == "__main__":
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--dataset", default="cifar10", choices=("cifar10", "folder"))
    text = "folder: with train/<class>/* and test/<class>/*"
    parser.add_argument("--data_dir", default="./datasets", help=text)
    parser.add_argument("--arch", default="resnet18-cifar", choices=tuple(BACKBONES))
    for name, default in {"n_patches": 20, "n_epochs": 2, "n_images": 50000, "seed": 42}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"(default: {default})")
    run(parser.parse_args())
