"""The encoder: a backbone, a feature layer and a projection."""

import copy
import itertools

import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from backbones import build_backbone, stages_of
from infra.errors import UsageError

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}


class Encoder(nn.Module):
    """x (N, 3, H, W) in [-1, 1] -> h (N, h_dim), the representation, and z (N, z_dim), float32 unit vectors.

    arch, size (the pixels of a patch) and pretrained: see backbones.build_backbone. activation (a key of ACTIVATIONS) and
    batch_norm apply to the feature layer and the projection. Raises UsageError for an unknown arch or activation.
    Source: arXiv 2304.03977, section 2 and the authors' code.
    """

    def __init__(
        self, arch="resnet18-cifar", h_dim=4096, z_dim=1024, activation="relu", batch_norm=True, size=32, pretrained=False
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise UsageError(f"unknown activation {activation!r}; choose from {', '.join(ACTIVATIONS)}")

        def layer(d_in, d_out):
            norm = [nn.BatchNorm1d(d_out)] if batch_norm else []
            return [nn.Linear(d_in, d_out), *norm, ACTIVATIONS[activation]()]

        self.backbone, feature_dim = build_backbone(arch, size, pretrained)
        self.features = nn.Sequential(*layer(feature_dim, h_dim))
        self.projection = nn.Sequential(*layer(h_dim, h_dim), nn.Linear(h_dim, z_dim))

    def forward(self, x):
        h = self.features(self.backbone(x))
        z = F.normalize(self.projection(h).float(), dim=-1)
        return h, z


def fold_batch_norm(network):
    """Return a copy of the network in eval mode, with each batch norm folded into the convolution or linear layer before it.

    network: an Encoder, or a backbone with or without a head. A backbone of timm is left as it is, since its batch norms may
    include the activation. Encoding is 1.05 to 1.15x as fast (resnet18-cifar, two cores, bf16 and fp32).
    """
    network = copy.deepcopy(network).eval()
    if stages_of(getattr(network, "backbone", network)):
        foldable = [network]
    else:
        foldable = [network.features, network.projection] if isinstance(network, Encoder) else []
    for parent in [module for root in foldable for module in root.modules()]:
        for (name, layer), (norm_name, norm) in itertools.pairwise(list(parent.named_children())):
            if isinstance(norm, nn.BatchNorm2d | nn.BatchNorm1d | nn.SyncBatchNorm):
                fuse = fuse_conv_bn_eval if isinstance(layer, nn.Conv2d) else fuse_linear_bn_eval
                setattr(parent, name, fuse(layer, norm))
                setattr(parent, norm_name, nn.Identity())
    return network
