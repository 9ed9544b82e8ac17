"""The methods that peers.py compares: this program's, lightly's losses and heads, supervised."""

import copy
import math
from argparse import Namespace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import roi_align

from cli import hparams_of, parse
from hparams import PRESETS
from model import BACKBONES, STAGE_HEAD_DIM, Encoder, build_backbone, stage_dims, stage_maps
from optimizers import build_optimizer
from patches import Augment, augment_, augmentation_plan, sample_params, to_signed
from train import build_step

PRESET = PRESETS["laptop"]
ARCH, PIXELS = PRESET["arch"], PRESET["input_size"]
DIM = BACKBONES[ARCH][1]
BIASES = 0.024  # the learning rate of biases over that of weights in Barlow Twins' code, .0048 / .2


class Try(NamedTuple):
    optimizer: str
    rate: float
    settings: str = ""  # those of the method that are not its defaults: "temperature 0.2 area 0.2"


def by_muon(settings=""):
    """Return tries of Muon at three rates, two of them with views of a quarter or more, too."""
    at_rates = [Try("muon", rate, settings) for rate in (0.02, 0.05, 0.1)]
    return (*at_rates, *(Try("muon", rate, f"{settings} area 0.25") for rate in (0.05, 0.1)))


class Method(NamedTuple):
    title: str
    # build(Try, bf16) -> (backbone, optimizer, step); step(images, labels, rng) trains on a batch
    build: object
    tries: tuple
    bs: int = 128
    # Pixels of a patch that are tried in the evaluation; the image is twice as wide. A random view
    # shows 23 pixels on average in 16, a patch 16 in 16.
    sizes: tuple = (3 * PIXELS // 4, PIXELS)


NO_BLUR = Augment(blur=0, solarise=0)


@torch.autocast("cpu", enabled=False)
def random_views(images, rng, n=2, area=0.08, augmentation=NO_BLUR):
    """Return n random views of images uint8 (B, 3, H, W): float32 (n, B, 3, S, S) in [-1, 1].

    A view is a crop with a fraction of the area that is uniform in [area, 1] and a ratio of 3/4 to
    4/3, resized to S = PIXELS and flipped, with the jitter of hue at half of this program's range.
    Source: lightly's SimCLRTransform with its CIFAR-10 benchmark's cj_strength of .5 and no blur.
    """
    B, _, H, W = images.shape
    params = sample_params(n * B, H, W, rng, augmentation)
    share, ratio, down, right = torch.rand(4, n * B, generator=rng)
    area = H * W * (area + (1 - area) * share)
    ratio = ((2 * ratio - 1) * math.log(4 / 3)).exp()
    h = (area / ratio).sqrt().clamp(max=H)
    w = (area * ratio).sqrt().clamp(max=W)
    top = down * (H - h)
    left = right * (W - w)
    image = torch.arange(B).repeat(n).float()
    params["box"] = torch.stack([image, left, top, left + w, top + h], 1)
    params["hue"] = params["hue"] / 2
    x = roi_align(images.float() / 255, params["box"], PIXELS, sampling_ratio=2, aligned=True)
    x = torch.where(params["flip"][:, None, None, None], x.flip(-1), x)
    augment_(x, augmentation_plan(params))
    return to_signed(x).unflatten(0, (n, B))  # (n B, 3, S, S) -> (n, B, 3, S, S)


def simclr(backbone, temperature=0.5, area=0.08, stages=0.0):
    """SimCLR. stages: the coefficient of its loss of the stages before the last one."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules.heads import SimCLRProjectionHead

    if not stages:
        head = SimCLRProjectionHead(DIM, 512, 128)
        return two_views(backbone, head, NTXentLoss(temperature), area)
    dims = stage_dims(backbone)
    heads = [SimCLRProjectionHead(dim, STAGE_HEAD_DIM, 128) for dim in dims[:-1]]
    heads = nn.ModuleList([*heads, SimCLRProjectionHead(DIM, 512, 128)])
    K = len(heads)
    loss = NTXentLoss(temperature)

    def forward(images, labels, rng):
        z = []
        for view in random_views(images, rng, area=area):
            maps = stage_maps(backbone, view)
            z += [head(x.mean((2, 3))) for head, x in zip(heads, maps, strict=True)]
        return z  # K of the first view, K of the second

    def criterion(*z):
        *earlier, last = [loss(z[k], z[K + k]) for k in range(K)]
        return last + stages * sum(earlier)

    return heads, forward, criterion


def vicreg(backbone, width, area=0.08):
    from lightly.loss import vicreg_loss
    from lightly.models.modules.heads import VICRegProjectionHead

    vicreg_loss.covariance_loss = covariance_loss
    width = int(width)
    head = VICRegProjectionHead(DIM, width, width, num_layers=2)
    return two_views(backbone, head, vicreg_loss.VICRegLoss(), area)


def covariance_loss(x):
    """Return lightly's covariance_loss of x (B, d) from the (B, B) products, not the (d, d) ones.

    The sums of the squares of XᵀX and XXᵀ are the same. A step of VICReg takes less time so.
    """
    B, d = x.shape
    x = x - x.mean(0)
    squares = (x @ x.T).square().sum() - x.square().sum(0).square().sum()
    return squares / ((B - 1) ** 2 * d)


def barlow(backbone, width, area=0.08):
    """Barlow Twins. With Muon the scale of its large loss matters to 1-D weights alone."""
    from lightly.loss import BarlowTwinsLoss
    from lightly.models.modules.heads import ProjectionHead

    width = int(width)
    layers = [(DIM, width, nn.BatchNorm1d(width), nn.ReLU()), (width, width, None, None)]
    loss = BarlowTwinsLoss()
    return two_views(backbone, ProjectionHead(layers), lambda z0, z1: BIASES * loss(z0, z1), area)


def two_views(backbone, head, criterion, area):
    """Return (head, forward, criterion).

    forward(images, labels, rng) computes z of two views, criterion the loss of them.
    """

    def forward(images, labels, rng):
        return [head(backbone(view)) for view in random_views(images, rng, area=area)]

    return head, forward, criterion


def byol(backbone, momentum, area=0.08):
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules.heads import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import update_momentum

    cosine = NegativeCosineSimilarity()
    online = nn.Sequential(backbone, BYOLProjectionHead(DIM, 1024, 256))
    predict = BYOLPredictionHead(256, 1024, 256)
    target = copy.deepcopy(online).requires_grad_(False)

    def forward(images, labels, rng):
        # lightly's CIFAR-10 benchmark has .99, for many more steps
        update_momentum(online, target, m=momentum)
        views = random_views(images, rng, area=area)
        return [*(predict(online(view)) for view in views), *(target(view) for view in views)]

    def criterion(p0, p1, z0, z1):
        return (cosine(p0, z1) + cosine(p1, z0)) / 2

    return nn.Sequential(online[1], predict), forward, criterion


def supervised(backbone):
    """The labels themselves: cross-entropy of one view, a crop and a flip."""
    head = nn.Linear(DIM, 10)
    plain = Augment(jitter=0, grey=0, blur=0, solarise=0)

    def forward(images, labels, rng):
        (view,) = random_views(images, rng, 1, 0.25, plain)
        return head(backbone(view)), labels

    return head, forward, F.cross_entropy


def build_peer(parts_of, how, bf16):
    """Return (backbone, optimizer, step) of a peer.

    parts_of(backbone, **settings) returns (head, forward, criterion).
    """
    backbone = build_backbone(ARCH)[0].to(memory_format=torch.channels_last)
    words = how.settings.split()
    settings = dict(zip(words[::2], map(float, words[1::2]), strict=True))
    settings.pop("bs", None)
    head, forward, criterion = parts_of(backbone, **settings)
    network = nn.ModuleList([backbone, head])
    hp = Namespace(optimizer=how.optimizer, lr=how.rate, weight_decay=0)
    optimizer = build_optimizer(hp, network, bf16)

    def step(images, labels, rng):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            outputs = forward(images, labels, rng)
        loss = criterion(*(x.float() if x.is_floating_point() else x for x in outputs))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return backbone, optimizer, step


def build_emp_ssl(how, bf16):
    """Return (backbone, optimizer, step) of this program, by --preset laptop and how.settings."""
    hp = settings_of(how)
    encoder = Encoder(hp.arch, hp.h_dim, hp.z_dim, stage_heads=hp.stage_loss_weight > 0)
    encoder = encoder.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(hp, encoder, bf16)
    step = build_step(hp, encoder, optimizer, bf16)
    return encoder.backbone, optimizer, lambda images, labels, rng: step(images, rng)


def settings_of(how):
    """Return the Hparams of a Try of this program: those of the preset but for its own."""
    args = ["train", "--preset", "laptop", "--optimizer", how.optimizer, "--lr", str(how.rate)]
    return hparams_of(parse([*args, *how.settings.split()]))


PRESET_TRY = Try(PRESET["optimizer"], PRESET["lr"])
# What the preset was chosen from: each changes one thing of it.
SEARCH = (
    PRESET_TRY,
    Try("muon", 0.02),
    Try("muon", 0.1),
    *(
        Try("muon", 0.05, settings)
        for settings in (
            "--uniformity_loss tcr --invariance_loss_weight 200",
            "--temperature 0.1 --invariance_loss_weight 20",
            "--temperature 0.4 --invariance_loss_weight 5",
            "--n_patches 8 --bs 50",
            "--n_patches 2 --bs 200",
            "--bs 25",
            "--bs 50",
            "--bs 200",
            "--h_dim 1024 --z_dim 256",
            "--h_dim 256 --stage_loss_weight 1",
            "--h_dim 256 --stage_loss_weight 10",
            "--jitter 0.5 --blur 0 --solarise 0",
            "--arch resnet10-tiny",
            "--arch resnet18-tiny",
        )
    ),
)
EMP_SSL = partial(Method, build=build_emp_ssl, sizes=(PIXELS,))
METHODS = {
    # Small batches may be better for a minute.
    "preset": EMP_SSL(
        "EMP-SSL, --preset laptop", tries=(PRESET_TRY, PRESET_TRY._replace(settings="--bs 50"))
    ),
    "preset-stages": EMP_SSL(
        "EMP-SSL, the preset with losses of each stage",
        tries=(Try("muon", 0.05, "--h_dim 256 --stage_loss_weight 3"),),
    ),
    "search": EMP_SSL("the search behind --preset laptop", tries=SEARCH),
    "simclr": Method(
        "SimCLR", partial(build_peer, simclr), (*by_muon("temperature 0.2"), Try("muon", 0.05))
    ),
    # What the losses of the stages, which are of no peer as published, do for one.
    "simclr-stages": Method(
        "SimCLR with stage losses",
        partial(build_peer, simclr),
        tuple(
            Try("muon", rate, f"temperature 0.2 area 0.25 stages {weight}")
            for rate, weight in ((0.05, 1), (0.05, 3), (0.1, 3))
        ),
    ),
    # Muon is slow for layers of 2048 x 2048.
    "vicreg": Method("VICReg", partial(build_peer, vicreg), by_muon("width 1024")),
    "barlow": Method("Barlow Twins", partial(build_peer, barlow), by_muon("width 1024")),
    "byol": Method("BYOL", partial(build_peer, byol), by_muon("momentum 0.9")),
    "supervised": Method(
        "supervised", partial(build_peer, supervised), (Try("muon", 0.02), Try("muon", 0.05))
    ),
}


def bs_of(method, how):
    """Return the images in a batch of a Try of a Method."""
    if method.build is build_emp_ssl:
        return settings_of(how).bs
    _, _, bs = how.settings.rpartition("bs ")
    return int(bs) if "bs " in how.settings else method.bs


def with_larger_batch(name, how):
    """Return the Try with twice as many images in a batch."""
    method = METHODS[name]
    option = "--bs" if method.build is build_emp_ssl else "bs"
    return how._replace(settings=f"{how.settings} {option} {2 * bs_of(method, how)}".strip())


def arch_of(method, how):
    """Return the architecture that a Try of a Method trains."""
    return settings_of(how).arch if method.build is build_emp_ssl else ARCH


def label(how):
    """Return a Try in words: muon 0.05, temperature 0.2 area 0.08."""
    return f"{how.optimizer} {how.rate:g}" + (f", {how.settings}" if how.settings else "")
