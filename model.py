"""The encoder: a ResNet-18 backbone, a feature layer and a projection."""

import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet18

# arch -> (3x3 stem without pooling, removed stages, output width). All from torchvision's resnet18, whose
# parameter names stay; the authors' "tinyimagenet" variant is their ImageNet variant under a second name.
ARCHS = {
    "resnet18-cifar": (True, (), 512),
    "resnet18-imagenet": (False, (), 512),
    "resnet18-tinyimagenet": (False, (), 512),
    "resnet18-mini": (True, ("layer4",), 256),
    "resnet18-tiny": (True, ("layer3", "layer4"), 128),
}
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}


def build_backbone(arch):
    """Returns (module, feature_dim); the module maps (N, 3, H, W) to (N, feature_dim).

    Raises ValueError for an unknown arch.
    """
    if arch not in ARCHS:
        raise ValueError(f"unknown arch {arch!r}; choose from {', '.join(ARCHS)}")
    small_stem, removed, feature_dim = ARCHS[arch]
    backbone = resnet18()
    backbone.fc = nn.Identity()
    if small_stem:
        backbone.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        backbone.maxpool = nn.Identity()
    for name in removed:
        setattr(backbone, name, nn.Identity())
    for block in backbone.layer4.children():
        block.conv1, block.conv2 = Conv3x3(block.conv1), Conv3x3(block.conv2)
    return backbone, feature_dim


class Conv3x3(nn.Conv2d):
    """The 3x3 convolution `conv`, with its weights; on a single pixel only the centre of the kernel meets anything
    but padding, and it is a matrix product.

    That is what layer4 of the ImageNet variant sees of a 32x32 patch, where oneDNN's weight gradient is slow: 80 ms
    against 4 ms (512 channels, 150 patches, two cores, fp32); forward and backward of the encoder are 1.7x faster.
    """

    def __init__(self, conv):
        super().__init__(conv.in_channels, conv.out_channels, 3, conv.stride, padding=1, bias=False)
        self.weight = conv.weight

    def forward(self, x):
        if x.shape[2:] == (1, 1):
            return F.linear(x.flatten(1), self.weight[:, :, 1, 1])[:, :, None, None]
        return super().forward(x)


class Encoder(nn.Module):
    """x (N, 3, H, W) in [-1, 1] -> h (N, h_dim), the representation, and z (N, z_dim), float32 unit vectors.

    `activation` and `batch_norm` apply to both heads. Raises ValueError for an unknown arch or activation.
    Source: arXiv 2304.03977, section 2 and the authors' code.
    """

    def __init__(self, arch="resnet18-cifar", h_dim=4096, z_dim=1024, activation="relu", batch_norm=True):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; choose from {', '.join(ACTIVATIONS)}")

        def layer(d_in, d_out):
            norm = [nn.BatchNorm1d(d_out)] if batch_norm else []
            return [nn.Linear(d_in, d_out), *norm, ACTIVATIONS[activation]()]

        self.backbone, feature_dim = build_backbone(arch)
        self.features = nn.Sequential(*layer(feature_dim, h_dim))
        self.projection = nn.Sequential(*layer(h_dim, h_dim), nn.Linear(h_dim, z_dim))

    def forward(self, x):
        h = self.features(self.backbone(x))
        z = F.normalize(self.projection(h).float(), dim=-1)
        return h, z
