"""The weights that an encoder starts from: a checkpoint, random ones, those of a file, a pretrained projection."""

from pathlib import Path

import torch

from infra import files
from infra.console import log
from infra.device import generator
from infra.errors import UsageError
from model import Encoder


def build_encoder(hp, checkpoint):
    """Return the encoder with the checkpoint's weights; without a checkpoint, with seeded random weights and, if asked for,
    those of hp.weights and the pretrained projection, which is frozen. Raises UsageError if weights are missing or do not fit."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(hp.seed, "init").initial_seed())
        pretrained = hp.weights == "timm" and not checkpoint
        encoder = Encoder(hp.arch, hp.h_dim, hp.z_dim, hp.activation, hp.batch_norm, hp.patch_size, pretrained)
    if checkpoint:
        load_strictly(encoder, checkpoint["encoder"], "the checkpoint")
        return freeze(hp, encoder)
    if hp.weights and not pretrained:
        load_backbone(encoder, hp.weights)
    if hp.pretrained_proj:
        load_strictly(encoder.projection, read_projection(hp.pretrained_proj), f"pretrained_proj {hp.pretrained_proj}")
    return freeze(hp, encoder)


def freeze(hp, encoder):
    """Freeze the projection if it is a pretrained one. Batch norm goes on following the statistics of the new features."""
    encoder.projection.requires_grad_(hp.pretrained_proj is None)
    return encoder


def read_projection(path):
    """Return the weights of the projection in a checkpoint. Raises UsageError if there are none."""
    if not Path(path).is_file():
        raise UsageError(f"pretrained_proj {path} is not a file")
    weights, prefix = files.load(Path(path).resolve()).get("encoder", {}), "projection."
    projection = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    if not projection:
        raise UsageError(f"pretrained_proj {path} holds no projection")
    return projection


def load_strictly(module, weights, source):
    """Load weights that fit exactly and are finite. Raises UsageError, naming the source, for any others."""
    try:
        module.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"the weights of {source} do not fit arch, h_dim, z_dim or batch_norm of this run: {reason}") from None
    if not all(value.isfinite().all() for value in weights.values()):
        raise UsageError(f"the weights of {source} are not finite")


def load_backbone(encoder, path):
    """Load the weights of a file into the backbone, and say which of its tensors were not found or do not fit.

    path: a state dict with the names of the backbone (of torchvision's, timm's, or an export of this program), or a checkpoint
    of this program; .safetensors too. Raises UsageError if it can't be read, or nothing fits.
    """
    weights, own = read_weights(path), encoder.backbone.state_dict()
    fitting = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
    if not fitting:
        raise UsageError(f"weights {path}: no tensor of it fits the backbone, which has {', '.join(list(own)[:3])} and so on")
    if not all(value.isfinite().all() for value in fitting.values()):
        raise UsageError(f"weights {path} are not finite")
    encoder.backbone.load_state_dict(fitting, strict=False)
    log.info(f"* Weights: {len(fitting)} of the {len(own)} tensors of the backbone are from {path}")
    missing = [name for name in own if name not in fitting]
    unused = [f"{name} {tuple(value.shape)}" for name, value in weights.items() if name not in fitting]
    for title, names in (("random, since it has none that fit", missing), ("in it, but not used", unused)):
        if names:
            log.info(f"* Weights {title}: {', '.join(names)}")


def read_weights(path):
    """Return {name: tensor} of a file of weights. Raises UsageError if it holds none."""
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load

            with files.open_regular(path) as file:
                content = load(file.read())
        else:
            with files.open_regular(path) as file:
                content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of pickle, zip, safetensors and the system
        raise UsageError(f"weights {path} can't be read ({' '.join(str(error).split())[:200]})") from None
    if isinstance(content, dict) and isinstance(content.get("encoder"), dict):  # a checkpoint of this program
        encoder = content["encoder"]
        content = {name.removeprefix("backbone."): value for name, value in encoder.items() if name.startswith("backbone.")}
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise UsageError(f"weights {path} is not a state dict")
    return content
