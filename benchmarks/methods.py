"""The methods that peers.py compares: this program's, those of lightly's losses and heads, and supervised training."""

import copy
import math
from argparse import Namespace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import roi_align

import lars
import main as program
from backbones import build_backbone
from model import Encoder
from optimizers import build_optimizer
from patches import HUE, Augment, augment, augmentation_plan, by_turn, sample_params, to_signed
from train import build_step

ARCH, DIM, SIZE = "resnet18-tiny", 128, 16
SGD = (("sgd", 0.02), ("sgd", 0.06), ("sgd", 0.2))  # lightly's CIFAR-10 benchmark has .06 for batches of 128
LARS = (("lars", 0.03), ("lars", 0.1), ("lars", 0.3), ("lars", 0.9))
MUON = (("muon", 0.02), ("muon", 0.05), ("muon", 0.1))
OURS = (("muon", 0.05),)  # of --preset laptop
WEIGHT_DECAY = {"sgd": 5e-4, "muon": 0}


class Method(NamedTuple):
    title: str
    build: object  # (optimizer, rate, bf16) -> (backbone, optimizer, step); step(images, labels, rng) trains on a batch
    tries: tuple  # of (optimizer, learning rate)
    bs: int = 128


@torch.autocast("cpu", enabled=False)
def random_views(images, rng, n=2, scale=(0.08, 1.0), augmentation=Augment(blur=0, solarise=0)):  # noqa: B008, does not change
    """Return n random views of each image: uint8 (B, 3, H, W) -> float32 (n, B, 3, SIZE, SIZE) in [-1, 1].

    A view is a crop with an area of a uniform fraction `scale` and a ratio of 3/4 to 4/3, resized and flipped, with the jitter of
    hue at half of this program's range. Source: lightly's SimCLRTransform with its CIFAR-10 benchmark's cj_strength of .5 and
    no blur.
    """
    B, _, H, W = images.shape
    params = sample_params(n * B, H, W, rng, augmentation)
    area, ratio, down, right = torch.rand(4, n * B, generator=rng)
    area, ratio = H * W * (scale[0] + (scale[1] - scale[0]) * area), ((2 * ratio - 1) * math.log(4 / 3)).exp()
    h, w = (area / ratio).sqrt().clamp(max=H), (area * ratio).sqrt().clamp(max=W)
    top, left = down * (H - h), right * (W - w)
    which = torch.arange(B).repeat(n).float()
    params |= {"box": torch.stack([which, left, top, left + w, top + h], 1), "hue": params["hue"] / 2}
    params, order, ends = by_turn(params)
    x = roi_align(images.float() / 255, params["box"], SIZE, sampling_ratio=2, aligned=True)
    x = torch.where(params["flip"][:, None, None, None], x.flip(-1), x)
    x = augment(x, augmentation_plan(params, ends[HUE]), ends)
    return to_signed(x[order.argsort()]).unflatten(0, (n, B))  # (n B, 3, SIZE, SIZE) -> (n, B, 3, SIZE, SIZE)


def simclr(backbone):
    from lightly.loss import NTXentLoss
    from lightly.models.modules.heads import SimCLRProjectionHead

    return two_views(backbone, SimCLRProjectionHead(DIM, 512, 128), NTXentLoss())


def vicreg(backbone):
    from lightly.loss import vicreg_loss
    from lightly.models.modules.heads import VICRegProjectionHead

    vicreg_loss.covariance_loss = covariance_loss
    return two_views(backbone, VICRegProjectionHead(DIM, 2048, 2048, num_layers=2), vicreg_loss.VICRegLoss())


def covariance_loss(x):
    """Return lightly's covariance_loss of x (B, d) from the (B, B) products instead of the (d, d) ones: the sums of the squares
    of XᵀX and XXᵀ are the same. A step of VICReg takes less time so."""
    B, d = x.shape
    x = x - x.mean(0)
    return ((x @ x.T).square().sum() - x.square().sum(0).square().sum()) / ((B - 1) ** 2 * d)


def barlow(backbone):
    from lightly.loss import BarlowTwinsLoss
    from lightly.models.modules.heads import ProjectionHead

    head = ProjectionHead([(DIM, 2048, nn.BatchNorm1d(2048), nn.ReLU()), (2048, 2048, None, None)])
    return two_views(backbone, head, BarlowTwinsLoss())


def two_views(backbone, head, criterion):
    """Return (head, forward, criterion): forward(images, labels, rng) computes z of two views, criterion the loss of them."""

    def forward(images, labels, rng):
        return [head(backbone(view)) for view in random_views(images, rng)]

    return head, forward, criterion


def byol(backbone):
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules.heads import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import update_momentum

    cosine = NegativeCosineSimilarity()
    online, predict = nn.Sequential(backbone, BYOLProjectionHead(DIM, 1024, 256)), BYOLPredictionHead(256, 1024, 256)
    target = copy.deepcopy(online).requires_grad_(False)

    def forward(images, labels, rng):
        update_momentum(online, target, m=0.99)  # that of lightly's CIFAR-10 benchmark
        views = random_views(images, rng)
        return [*(predict(online(view)) for view in views), *(target(view) for view in views)]

    return nn.Sequential(online[1], predict), forward, lambda p0, p1, z0, z1: (cosine(p0, z1) + cosine(p1, z0)) / 2


def supervised(backbone):
    """The labels themselves: cross-entropy of one view, a crop and a flip."""
    head = nn.Linear(DIM, 10)

    def forward(images, labels, rng):
        (view,) = random_views(images, rng, 1, (0.25, 1.0), Augment(jitter=0, grey=0, blur=0, solarise=0))
        return head(backbone(view)), labels

    return head, forward, F.cross_entropy


def around(parts_of, optimizer, rate, bf16):
    """Return (backbone, optimizer, step) of a method whose parts_of(backbone) returns (head, forward, criterion)."""
    backbone = build_backbone(ARCH)[0].to(memory_format=torch.channels_last)
    head, forward, criterion = parts_of(backbone)
    optimizer = build_peer_optimizer(optimizer, rate, nn.ModuleList([backbone, head]), bf16)

    def step(images, labels, rng):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            outputs = forward(images, labels, rng)
        loss = criterion(*(x.float() if x.is_floating_point() else x for x in outputs))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return backbone, optimizer, step


def build_peer_optimizer(name, rate, network, bf16):
    """Return an optimizer of a peer. This program's LARS clips the step at a length that no rate here changes; theirs does not.

    With the trust coefficient of .02, the rates tried move a matrix by .0006 to .018 of its norm a step. The papers have .001,
    for training that is hundreds of times as long.
    """
    if name == "lars":
        return lars.LARS(list(network.parameters()), rate, momentum=0.9, weight_decay=1e-6, nesterov=True, eta=0.02)
    hp = Namespace(optimizer=name, lr=rate, weight_decay=WEIGHT_DECAY[name])
    return build_optimizer(hp, network, bf16)


def ours(optimizer, rate, bf16):
    """Return (backbone, optimizer, step) of this program, by --preset laptop."""
    argv = ["train", "--preset", "laptop", "--optimizer", optimizer, "--lr", str(rate)]
    hp = program.hyperparameters(program.parse(argv))
    encoder = Encoder(hp.arch, hp.h_dim, hp.z_dim).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(hp, encoder, bf16)
    step = build_step(hp, encoder, optimizer, bf16)
    return encoder.backbone, optimizer, lambda images, labels, rng: step(images, rng)


METHODS = {
    "preset": Method("EMP-SSL, --preset laptop", ours, OURS, 50),
    "lars": Method("EMP-SSL, LARS", ours, (("lars", 0.3),), 50),
    "simclr": Method("SimCLR", partial(around, simclr), SGD + LARS + MUON),  # its paper has LARS, lightly's benchmark SGD
    "vicreg": Method("VICReg", partial(around, vicreg), LARS),  # as in lightly's benchmark with ImageNet
    "barlow": Method("Barlow Twins", partial(around, barlow), SGD + LARS),  # the same
    "byol": Method("BYOL", partial(around, byol), SGD + LARS + MUON),  # the same
    "supervised": Method("supervised", partial(around, supervised), SGD + OURS),
}
