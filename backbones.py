"""Backbones: resnets of torchvision with a small stem or their own, models of timm."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models

from infra.errors import UsageError

TIMM = "timm/"  # what the name of a model of timm begins with


def resnet(build, small_stem, removed=()):
    """Return a resnet of torchvision without its classifier, with torchvision's parameter names: (N, 3, H, W) -> (N, features).

    build: models.resnet18 or another. small_stem: a 3x3 convolution without pooling, for small images. removed: names of stages
    that are left out.
    """
    backbone = build()
    backbone.fc = nn.Identity()
    if small_stem:
        backbone.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        backbone.maxpool = nn.Identity()
    else:  # pooling before ReLU: the same outputs and gradients, and ReLU has a quarter of the pixels
        backbone.relu, backbone.maxpool = backbone.maxpool, backbone.relu
    for name in removed:
        setattr(backbone, name, nn.Identity())
    for name in ("layer3", "layer4"):
        for block in getattr(backbone, name).children():
            for conv_name, conv in list(block.named_children()):
                if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3):
                    setattr(block, conv_name, Conv3x3(conv))
    return backbone


# name: (function that builds the module (N, 3, H, W) -> (N, feature_dim), feature_dim)
BACKBONES = {
    "resnet18-cifar": (partial(resnet, models.resnet18, small_stem=True), 512),
    "resnet18-imagenet": (partial(resnet, models.resnet18, small_stem=False), 512),
    "resnet18-tinyimagenet": (partial(resnet, models.resnet18, small_stem=False), 512),  # the same, as in the authors' code
    "resnet18-mini": (partial(resnet, models.resnet18, small_stem=True, removed=("layer4",)), 256),
    "resnet18-tiny": (partial(resnet, models.resnet18, small_stem=True, removed=("layer3", "layer4")), 128),
    "resnet34-cifar": (partial(resnet, models.resnet34, small_stem=True), 512),
    "resnet34-imagenet": (partial(resnet, models.resnet34, small_stem=False), 512),
    "resnet50-cifar": (partial(resnet, models.resnet50, small_stem=True), 2048),
    "resnet50-imagenet": (partial(resnet, models.resnet50, small_stem=False), 2048),
}


def build_backbone(arch, size=32, pretrained=False):
    """Return (module, feature_dim) of a name in BACKBONES, or of timm/NAME for patches of size pixels.

    pretrained: with timm's weights, of timm's models. Raises UsageError for a name that is not known or does not fit.
    """
    if arch.startswith(TIMM):
        return timm_backbone(arch, size, pretrained)
    if arch not in BACKBONES:
        raise UsageError(f"unknown arch {arch!r}; choose from {', '.join(BACKBONES)}, or {TIMM}NAME")
    build, feature_dim = BACKBONES[arch]
    return build(), feature_dim


def timm_backbone(arch, size, pretrained):
    """Return (module, feature_dim) of a model of timm that gives pooled features (N, feature_dim) of patches of size pixels."""
    try:
        import timm
    except ImportError:
        raise UsageError(f"arch {arch} needs timm: pip install timm") from None
    name = arch.removeprefix(TIMM)
    if not timm.is_model(name):
        raise UsageError(f"arch {arch}: timm {timm.__version__} has no model {name!r}; timm.list_models() has their names")
    try:
        backbone, _ = create(name, size, pretrained)
        with torch.no_grad():
            features = backbone.eval()(torch.zeros(2, 3, size, size))
    except Exception as error:  # each of its 1,000 models fails in its own way
        weights = " with its pretrained weights" if pretrained else ""
        raise UsageError(f"arch {arch}{weights} can't be used for {size} pixels ({' '.join(str(error).split())[:200]})") from None
    if features.ndim != 2:
        raise UsageError(f"arch {arch} gives features of shape {tuple(features.shape[1:])}, not pooled ones")
    return backbone.train(), features.shape[1]


def create(name, size, pretrained=False):
    """Return (model, options) of a model of timm without its classifier. options: {"img_size": size} for models that must know
    it, else {}. Raises what timm raises."""
    import timm

    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, img_size=size), {"img_size": size}
    except TypeError:  # convolutional models take any size
        return timm.create_model(name, pretrained=pretrained, num_classes=0), {}


def stages_of(backbone):
    """Return the stages of a backbone, in their order, as {name: module}; {} unless it is a resnet of torchvision."""
    if not isinstance(backbone, models.ResNet):
        return {}
    children = dict(backbone.named_children())
    return {name: layer for name, layer in children.items() if name.startswith("layer") and not isinstance(layer, nn.Identity)}


def stage_dim(backbone):
    """Return the number of dimensions of stage_means."""
    last = [list(stage.children())[-1] for stage in stages_of(backbone).values()]
    return sum(getattr(block, "conv3", block.conv2).out_channels for block in last)  # conv3: bottleneck blocks


def stage_means(backbone, x, parts=1):
    """Return what each stage of a resnet computes, averaged in parts x parts regions, side by side: (N, parts² stage_dim).

    With one part, the last of them is the output of the backbone.
    """
    x = backbone.maxpool(backbone.relu(backbone.bn1(backbone.conv1(x))))
    means = []
    for stage in stages_of(backbone).values():
        x = stage(x)
        means.append(F.adaptive_avg_pool2d(x, parts).flatten(1))
    return torch.cat(means, 1)


class Conv3x3(nn.Conv2d):
    """The 3x3 convolution `conv`, sharing its weight. On 2x2 pixels or fewer it is computed as one matrix product.

    Every output pixel then depends on all input pixels; the other kernel entries see padding only. The last two stages of the
    ImageNet variant see so few pixels of a 32x32 patch, and oneDNN's gradients are slow for them: without this, and with
    ReLU before pooling, a training step takes 1.2x as long (800 patches, two cores, bf16).
    """

    def __init__(self, conv):
        super().__init__(conv.in_channels, conv.out_channels, 3, conv.stride, padding=1, bias=False)
        self.weight = conv.weight

    def forward(self, x):
        (H, W), (stride, _) = x.shape[2:], self.stride
        if H > 2 or W > 2:
            return super().forward(x)
        H_out, W_out = (H - 1) // stride + 1, (W - 1) // stride + 1
        # weight[:, :, 1 - i, 1 - j] connects input pixel (0, 0) to output pixel (i, j).
        kernels = [self.weight[:, :, 1 - i : 1 - i + H, 1 - j : 1 - j + W] for i in range(H_out) for j in range(W_out)]
        matrix = torch.stack(kernels).permute(0, 1, 3, 4, 2).flatten(2).flatten(0, 1)  # (H_out W_out c_out, H W c_in)
        y = F.linear(x.permute(0, 2, 3, 1).flatten(1), matrix)  # (N, H_out W_out c_out)
        y = y.view(-1, H_out, W_out, self.out_channels).permute(0, 3, 1, 2)  # (N, c_out, H_out, W_out), channels last
        return y if self.bias is None else y + self.bias[:, None, None]
