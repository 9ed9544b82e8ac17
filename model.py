"""The network: backbones of torchvision and timm, and the encoder with its two heads."""

import copy
import itertools
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torchvision import models

from infra.errors import UsageError

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}
TIMM = "timm/"  # the prefix of the names of timm's models
STAGE_POOLS = ("stages", "blocks")  # of stage_maps
STAGE_HEAD_DIM = 256


class Encoder(nn.Module):
    """x (N, 3, H, W) in [-1, 1] -> h (N, h_dim), the representation, and z (N, z_dim), unit
    vectors.

    z is float32. arch, size and pretrained: see build_backbone. activation (a key of ACTIVATIONS)
    and batch_norm apply to all heads. stage_heads: each stage of a resnet but the last one has a
    projection of its own, too. Raises UsageError for an unknown arch or activation.
    Source: arXiv 2304.03977, section 2 and the authors' code; the heads of the stages are as in
    arXiv 1409.5185 (deeply-supervised nets).
    """

    def __init__(
        self,
        arch="resnet18-cifar",
        h_dim=4096,
        z_dim=1024,
        activation="relu",
        batch_norm=True,
        size=32,
        pretrained=False,
        stage_heads=False,
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            names = ", ".join(ACTIVATIONS)
            raise UsageError(f"unknown activation {activation!r}; choose from {names}")

        def layer(d_in, d_out):
            norm = [nn.BatchNorm1d(d_out)] if batch_norm else []
            return [nn.Linear(d_in, d_out), *norm, ACTIVATIONS[activation]()]

        self.backbone, feature_dim = build_backbone(arch, size, pretrained)
        self.features = nn.Sequential(*layer(feature_dim, h_dim))
        self.projection = nn.Sequential(*layer(h_dim, h_dim), nn.Linear(h_dim, z_dim))
        dims = stage_dims(self.backbone)[:-1] if stage_heads else []
        self.stage_heads = nn.ModuleList(
            nn.Sequential(*layer(dim, STAGE_HEAD_DIM), nn.Linear(STAGE_HEAD_DIM, z_dim))
            for dim in dims
        )

    def forward(self, x, all_heads=False):
        """Return (h, z). all_heads: z (N, K, d) of the heads of all K stages, in order."""
        if not (all_heads and self.stage_heads):
            h = self.features(self.backbone(x))
            z = F.normalize(self.projection(h).float(), dim=-1)
            return h, z[:, None] if all_heads else z
        *earlier, last = [stage.mean((2, 3)) for stage in stage_maps(self.backbone, x)]
        h = self.features(last)
        z = [head(stage) for head, stage in zip(self.stage_heads, earlier, strict=True)]
        z = torch.stack([*z, self.projection(h)], 1)  # (N, K, z_dim)
        return h, F.normalize(z.float(), dim=-1)


def resnet(build, small_stem, removed=()):
    """Return a resnet of torchvision without its classifier: (N, 3, H, W) -> (N, features).

    build: models.resnet18 or another. small_stem: a 3x3 convolution without pooling, for small
    images. removed: names of stages that are left out. The parameters have torchvision's names.
    """
    backbone = build()
    backbone.fc = nn.Identity()
    if small_stem:
        backbone.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        backbone.maxpool = nn.Identity()
    else:  # pool before ReLU: the same outputs and gradients, and ReLU has a quarter of the pixels
        backbone.relu = nn.Sequential(backbone.maxpool, backbone.relu)
        backbone.maxpool = nn.Identity()
    for name in removed:
        setattr(backbone, name, nn.Identity())
    for stage in (backbone.layer3, backbone.layer4):
        for block in stage.children():
            for name, conv in list(block.named_children()):
                if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3):
                    setattr(block, name, Conv3x3(conv))
    return backbone


def resnet10():
    """Return a resnet of torchvision with one block in each stage, where resnet18 has two."""
    return models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1])


# name: (function that builds the module (N, 3, H, W) -> (N, feature_dim), feature_dim)
BACKBONES = {
    "resnet10-mini": (partial(resnet, resnet10, small_stem=True, removed=("layer4",)), 256),
    "resnet10-tiny": (
        partial(resnet, resnet10, small_stem=True, removed=("layer3", "layer4")),
        128,
    ),
    "resnet18-cifar": (partial(resnet, models.resnet18, small_stem=True), 512),
    "resnet18-imagenet": (partial(resnet, models.resnet18, small_stem=False), 512),
    # The same as resnet18-imagenet, as in the authors' code.
    "resnet18-tinyimagenet": (partial(resnet, models.resnet18, small_stem=False), 512),
    "resnet18-mini": (partial(resnet, models.resnet18, small_stem=True, removed=("layer4",)), 256),
    "resnet18-tiny": (
        partial(resnet, models.resnet18, small_stem=True, removed=("layer3", "layer4")),
        128,
    ),
    "resnet34-cifar": (partial(resnet, models.resnet34, small_stem=True), 512),
    "resnet34-imagenet": (partial(resnet, models.resnet34, small_stem=False), 512),
    "resnet50-cifar": (partial(resnet, models.resnet50, small_stem=True), 2048),
    "resnet50-imagenet": (partial(resnet, models.resnet50, small_stem=False), 2048),
}


def build_backbone(arch, size=32, pretrained=False):
    """Return (module, feature_dim) of a name in BACKBONES, or of timm/NAME.

    size: pixels of a patch, for models of timm that must know it. pretrained: with timm's weights.
    Raises UsageError for a name that is unknown or does not fit.
    """
    if arch.startswith(TIMM):
        return timm_backbone(arch, size, pretrained)
    if arch not in BACKBONES:
        names = ", ".join(BACKBONES)
        raise UsageError(f"unknown arch {arch!r}; choose from {names}, or {TIMM}NAME")
    build, feature_dim = BACKBONES[arch]
    return build(), feature_dim


def timm_backbone(arch, size, pretrained):
    """Return (module, feature_dim) of a model of timm with pooled features (N, feature_dim)."""
    try:
        import timm
    except ImportError:
        raise UsageError(f"arch {arch} needs timm: pip install timm") from None
    name = arch.removeprefix(TIMM)
    if not timm.is_model(name):
        raise UsageError(
            f"arch {arch}: timm {timm.__version__} has no model {name!r}; timm.list_models() has "
            f"their names"
        )
    try:
        backbone, _ = create_timm_model(name, size, pretrained)
        with torch.no_grad():
            features = backbone.eval()(torch.zeros(2, 3, size, size))
    except Exception as error:  # each of its 1,000 models fails in its own way
        weights = " with its pretrained weights" if pretrained else ""
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"arch {arch}{weights} can't be used for {size} pixels ({reason})"
        ) from None
    if features.ndim != 2:
        shape = tuple(features.shape[1:])
        raise UsageError(f"arch {arch} gives features of shape {shape}, not pooled ones")
    return backbone.train(), features.shape[1]


def create_timm_model(name, size, pretrained=False):
    """Return (model, options) of a model of timm without its classifier.

    options: {"img_size": size} for models that must know it, else {}. Raises what timm raises.
    """
    import timm

    create = partial(timm.create_model, name, pretrained=pretrained, num_classes=0)
    try:
        return create(img_size=size), {"img_size": size}
    except TypeError:  # convolutional models take any size
        return create(), {}


def stages_of(backbone):
    """Return the stages of a resnet of torchvision as {name: module}, {} for other backbones."""
    if not isinstance(backbone, models.ResNet):
        return {}
    stages = {name: getattr(backbone, name) for name in ("layer1", "layer2", "layer3", "layer4")}
    return {name: stage for name, stage in stages.items() if not isinstance(stage, nn.Identity)}


def stage_maps(backbone, x, pool="stages"):
    """Return the outputs (N, C, H, W) of each stage of a resnet, for x (N, 3, H, W).

    pool: "blocks" for those of the stem and of each block. The mean of the last one is the output
    of the backbone.
    """
    x = backbone.maxpool(backbone.relu(backbone.bn1(backbone.conv1(x))))
    maps = [x] if pool == "blocks" else []
    for stage in stages_of(backbone).values():
        for block in stage:
            x = block(x)
            if pool == "blocks" or block is stage[-1]:
                maps.append(x)
    return maps


def map_means(maps, parts=1):
    """Return the means of maps (N, C, H, W) in parts x parts regions, side by side.

    (N, parts² D), where D is the sum of the numbers of channels.
    """
    return torch.cat([F.adaptive_avg_pool2d(x, parts).flatten(1) for x in maps], 1)


def stage_dims(backbone, pool="stages"):
    """Return the numbers of channels of stage_maps, an empty list if the backbone is no resnet."""
    if not stages_of(backbone):
        return []
    p = next(backbone.parameters())
    with torch.no_grad():
        maps = stage_maps(copy.deepcopy(backbone).eval(), p.new_zeros(1, 3, 32, 32), pool)
    return [x.shape[1] for x in maps]


class Conv3x3(nn.Conv2d):
    """The 3x3 convolution `conv`, sharing its weight. Up to 2x2 pixels it is one matrix product.

    Every output pixel then depends on all input pixels; the other kernel entries see padding only.
    The last two stages of the ImageNet variants see so few pixels of a 32x32 patch, and oneDNN's
    gradients are slow for them: with torch's own convolution a training step takes 1.2x as long
    (benchmarks/results/choices-cpu.json).
    """

    def __init__(self, conv):
        super().__init__(conv.in_channels, conv.out_channels, 3, conv.stride, 1, bias=False)
        self.weight = conv.weight

    def forward(self, x):
        H, W = x.shape[2:]
        if H > 2 or W > 2:
            return super().forward(x)
        stride, _ = self.stride
        H_out = (H - 1) // stride + 1
        W_out = (W - 1) // stride + 1
        # weight[:, :, 1 - i, 1 - j] connects input pixel (0, 0) to output pixel (i, j).
        kernels = [
            self.weight[:, :, 1 - i : 1 - i + H, 1 - j : 1 - j + W]  # (c_out, c_in, H, W)
            for i in range(H_out)
            for j in range(W_out)
        ]
        # (H_out W_out, c_out, c_in, H, W) -> (H_out W_out c_out, H W c_in)
        matrix = torch.stack(kernels).permute(0, 1, 3, 4, 2).flatten(2).flatten(0, 1)
        y = F.linear(x.permute(0, 2, 3, 1).flatten(1), matrix)  # (N, H_out W_out c_out)
        y = y.view(-1, H_out, W_out, self.out_channels).permute(0, 3, 1, 2)  # (N, c_out, ...)
        return y if self.bias is None else y + self.bias[:, None, None]


def fold_batch_norm(network):
    """Return a copy in eval mode, with each batch norm folded into the layer before it.

    network: an Encoder, or a backbone with or without a head. A backbone of timm is left as it is,
    since its batch norms may include the activation. Folding saves the passes of the batch norms
    over the activations; on a CPU that is no gain (benchmarks/results/choices-cpu.json).
    """
    network = copy.deepcopy(network).eval()
    if stages_of(getattr(network, "backbone", network)):
        foldable = [network]
    elif isinstance(network, Encoder):
        foldable = [network.features, network.projection]
    else:
        foldable = []
    for parent in [module for root in foldable for module in root.modules()]:
        for (name, layer), (norm_name, norm) in itertools.pairwise(list(parent.named_children())):
            if isinstance(norm, nn.BatchNorm2d | nn.BatchNorm1d | nn.SyncBatchNorm):
                fuse = fuse_conv_bn_eval if isinstance(layer, nn.Conv2d) else fuse_linear_bn_eval
                setattr(parent, name, fuse(layer, norm))
                setattr(parent, norm_name, nn.Identity())
    return network
