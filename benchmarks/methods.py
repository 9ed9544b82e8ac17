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
from model import build_backbone
from model import Encoder
from optimizers import build_optimizer
from patches import HUE, Augment, augment, augmentation_plan, by_turn, sample_params, to_signed
from train import build_step

ARCH, DIM, SIZE = "resnet18-tiny", 128, 16
WEIGHT_DECAY = {"sgd": 5e-4, "muon": 0}
BIASES = 0.024  # the learning rate of biases over that of weights in Barlow Twins' code, .0048 / .2


class Try(NamedTuple):
    optimizer: str
    rate: float
    setting: float | None = None  # that of the method which Method.setting names; None for its default


SGD = (Try("sgd", 0.06),)  # of lightly's CIFAR-10 benchmark, for batches of 128
LARS = (Try("lars", 0.03), Try("lars", 0.1), Try("lars", 0.3))
MUON = (Try("muon", 0.02), Try("muon", 0.05), Try("muon", 0.1))
NARROW = tuple(how._replace(setting=1024) for how in MUON)  # Muon is slow for layers of 2048 x 2048


class Method(NamedTuple):
    title: str
    build: object  # (Try, bf16) -> (backbone, optimizer, step); step(images, labels, rng) trains on a batch
    tries: tuple
    setting: str = ""
    bs: int = 128
    sizes: tuple = (24, 32)  # of the whole image in the evaluation; a random view of half the width is a crop of 23 on average


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


def simclr(backbone, temperature=0.5):
    from lightly.loss import NTXentLoss
    from lightly.models.modules.heads import SimCLRProjectionHead

    return two_views(backbone, SimCLRProjectionHead(DIM, 512, 128), NTXentLoss(temperature))


def vicreg(backbone, width=2048):
    from lightly.loss import vicreg_loss
    from lightly.models.modules.heads import VICRegProjectionHead

    vicreg_loss.covariance_loss = covariance_loss
    return two_views(backbone, VICRegProjectionHead(DIM, width, width, num_layers=2), vicreg_loss.VICRegLoss())


def covariance_loss(x):
    """Return lightly's covariance_loss of x (B, d) from the (B, B) products instead of the (d, d) ones: the sums of the squares
    of XᵀX and XXᵀ are the same. A step of VICReg takes less time so."""
    B, d = x.shape
    x = x - x.mean(0)
    return ((x @ x.T).square().sum() - x.square().sum(0).square().sum()) / ((B - 1) ** 2 * d)


def barlow(backbone, width=2048):
    """Barlow Twins. With LARS and Muon, the scale of its large loss matters to biases and batch norm's weights alone."""
    from lightly.loss import BarlowTwinsLoss
    from lightly.models.modules.heads import ProjectionHead

    head, loss = ProjectionHead([(DIM, width, nn.BatchNorm1d(width), nn.ReLU()), (width, width, None, None)]), BarlowTwinsLoss()
    return two_views(backbone, head, lambda z0, z1: BIASES * loss(z0, z1))


def two_views(backbone, head, criterion):
    """Return (head, forward, criterion): forward(images, labels, rng) computes z of two views, criterion the loss of them."""

    def forward(images, labels, rng):
        return [head(backbone(view)) for view in random_views(images, rng)]

    return head, forward, criterion


def byol(backbone, momentum=0.99):
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules.heads import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import update_momentum

    cosine = NegativeCosineSimilarity()
    online, predict = nn.Sequential(backbone, BYOLProjectionHead(DIM, 1024, 256)), BYOLPredictionHead(256, 1024, 256)
    target = copy.deepcopy(online).requires_grad_(False)

    def forward(images, labels, rng):
        update_momentum(online, target, m=momentum)  # lightly's CIFAR-10 benchmark has .99, for many more steps
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


def around(parts_of, how, bf16):
    """Return (backbone, optimizer, step) of a method whose parts_of(backbone, setting) returns (head, forward, criterion)."""
    backbone = build_backbone(ARCH)[0].to(memory_format=torch.channels_last)
    head, forward, criterion = parts_of(backbone) if how.setting is None else parts_of(backbone, how.setting)
    optimizer = build_peer_optimizer(how.optimizer, how.rate, nn.ModuleList([backbone, head]), bf16)

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


def ours(how, bf16):
    """Return (backbone, optimizer, step) of this program, by --preset laptop."""
    argv = ["train", "--preset", "laptop", "--optimizer", how.optimizer, "--lr", str(how.rate)]
    hp = program.hyperparameters(program.parse(argv))
    encoder = Encoder(hp.arch, hp.h_dim, hp.z_dim).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(hp, encoder, bf16)
    step = build_step(hp, encoder, optimizer, bf16)
    return encoder.backbone, optimizer, lambda images, labels, rng: step(images, rng)


METHODS = {
    "preset": Method("EMP-SSL, --preset laptop", ours, (Try("muon", 0.05),), bs=50, sizes=(32,)),
    "lars": Method("EMP-SSL, LARS", ours, (Try("lars", 0.3),), bs=50, sizes=(32,)),
    "simclr": Method("SimCLR", partial(around, simclr),
                     SGD + LARS + MUON + (Try("muon", 0.05, 0.2), Try("muon", 0.1, 0.2)), "temperature"),
    "vicreg": Method("VICReg", partial(around, vicreg), LARS + NARROW, "width"),  # lightly's CIFAR-10 benchmark does not have it
    "barlow": Method("Barlow Twins", partial(around, barlow), SGD + LARS + NARROW, "width"),
    "byol": Method("BYOL", partial(around, byol),
                   SGD + LARS + MUON + (Try("muon", 0.05, 0.9), Try("muon", 0.05, 0.97)), "momentum"),
    "supervised": Method("supervised", partial(around, supervised), SGD + MUON),
}  # fmt: skip


def label(name, how):
    """Return a Try of a method in words: muon 0.05, temperature 0.2."""
    return f"{how.optimizer} {how.rate:g}" + ("" if how.setting is None else f", {METHODS[name].setting} {how.setting:g}")
