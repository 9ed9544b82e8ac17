"""The weights that an encoder starts from: a checkpoint, random ones, those of a file, a pretrained
projection.
"""

from pathlib import Path

import torch

from infra import files
from infra.console import log
from infra.device import generator
from infra.errors import UsageError
from model import Encoder


def build_encoder(run):
    """Return the encoder of a run with the weights of its checkpoint, on the CPU.

    Without a checkpoint it is a new_encoder. Raises UsageError if weights do not fit.
    """
    return new_encoder(run.hp) if run.checkpoint is None else trained_encoder(run)


def new_encoder(hp):
    """Return an encoder with seeded random weights, on the CPU.

    If asked for, it has the weights of hp.weights, and a pretrained projection, which is frozen.
    Raises UsageError if they are missing or do not fit.
    """
    encoder = random_encoder(hp, pretrained=hp.weights == "timm")
    if hp.weights not in (None, "timm"):
        load_backbone(encoder, hp.weights)
    if hp.pretrained_proj:
        projection = read_projection(hp.pretrained_proj)
        load_strictly(encoder.projection, projection, f"pretrained_proj {hp.pretrained_proj}")
    return freeze(hp, encoder)


def trained_encoder(run):
    """Return an encoder with the weights of the run's checkpoint, on the CPU."""
    encoder = random_encoder(run.hp)
    load_strictly(encoder, run.checkpoint["encoder"], "the checkpoint")
    return freeze(run.hp, encoder)


def random_encoder(hp, pretrained=False):
    """Return an encoder with seeded random weights. pretrained: the backbone has timm's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(hp.seed, "init").initial_seed())
        return Encoder(
            hp.arch,
            hp.h_dim,
            hp.z_dim,
            hp.activation,
            hp.batch_norm,
            hp.patch_size,
            pretrained,
            stage_heads=hp.stage_loss_weight > 0,
        )


def freeze(hp, encoder):
    """Freeze the projection if it is a pretrained one, and return the encoder.

    Its batch norm goes on following the statistics of the new features.
    """
    encoder.projection.requires_grad_(hp.pretrained_proj is None)
    return encoder


def read_projection(path):
    """Return the weights of the projection in a checkpoint. Raises UsageError if there are none."""
    if not Path(path).is_file():
        raise UsageError(f"pretrained_proj {path} is not a file")
    projection = part_of(files.read_pt(path).get("encoder", {}), "projection.")
    if not projection:
        raise UsageError(f"pretrained_proj {path} holds no projection")
    return projection


def part_of(weights, prefix):
    """Return the tensors of a state dict whose names have this prefix, without it."""
    names = [name for name in weights if name.startswith(prefix)]
    return {name.removeprefix(prefix): weights[name] for name in names}


def load_strictly(module, weights, source):
    """Load weights that fit exactly and are finite.

    Raises UsageError, naming the source, for any others.
    """
    try:
        module.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"the weights of {source} do not fit arch, h_dim, z_dim or batch_norm of this run: "
            f"{reason}"
        ) from None
    if not all(value.isfinite().all() for value in weights.values()):
        raise UsageError(f"the weights of {source} are not finite")


def load_backbone(encoder, path):
    """Load the weights of a file into the backbone, and print which of its tensors do not fit.

    path: a state dict with the names of the backbone (of torchvision's, timm's, or an export of
    this program), or a checkpoint of this program; .safetensors too. Raises UsageError if it can't
    be read, or nothing fits.
    """
    weights = read_weights(path)
    own = encoder.backbone.state_dict()
    fitting = {}
    unused = []
    for name, value in weights.items():
        if name in own and own[name].shape == value.shape:
            fitting[name] = value
        else:
            unused.append(f"{name} {tuple(value.shape)}")
    if not fitting:
        examples = ", ".join(list(own)[:3])
        raise UsageError(
            f"weights {path}: no tensor of it fits the backbone, which has {examples} and so on"
        )
    if not all(value.isfinite().all() for value in fitting.values()):
        raise UsageError(f"weights {path} are not finite")
    encoder.backbone.load_state_dict(fitting, strict=False)
    log.info(f"* Weights: {len(fitting)} of the {len(own)} tensors of the backbone are from {path}")
    missing = [name for name in own if name not in fitting]
    if missing:
        log.info(f"* Weights random, since it has none that fit: {', '.join(missing)}")
    if unused:
        log.info(f"* Weights in it, but not used: {', '.join(unused)}")


def read_weights(path):
    """Return {name: tensor} of a file of weights. Raises UsageError if it holds none."""
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file  # an optional package

            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of pickle, zip, safetensors and the system
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"weights {path} can't be read ({reason})") from None
    if isinstance(content, dict) and isinstance(content.get("encoder"), dict):
        content = part_of(content["encoder"], "backbone.")  # a checkpoint of this program
    is_dict = isinstance(content, dict)
    if not is_dict or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise UsageError(f"weights {path} is not a state dict")
    return content
