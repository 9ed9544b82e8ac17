"""The weights that an encoder starts from: a checkpoint, random ones, those of a file, a pretrained
projection.
"""

import re
from collections import Counter
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
    encoder = timm_encoder(hp) if hp.weights == "timm" else random_encoder(hp)
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


def timm_encoder(hp):
    """Return an encoder whose backbone has timm's pretrained weights.

    Raises UsageError if they can't be had, or if arch does not fit anyway.
    """
    try:
        return random_encoder(hp, pretrained=True)
    except UsageError as error:
        random_encoder(hp)  # raises the error of an arch that does not fit
        reason = " ".join(str(error.__context__ or error).split())[:200]
        raise UsageError(
            f"weights timm: those of {hp.arch} can't be had ({reason}): they are downloaded once, "
            f"so connect to the network, or give a file of weights"
        ) from None


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
    this program), or a checkpoint of this program or another that holds one; .safetensors too.
    Raises UsageError if it can't be read, or nothing fits.
    """
    weights = read_weights(path)
    own = encoder.backbone.state_dict()
    prefix = backbone_prefix(weights, own)
    if prefix is None:
        raise UsageError(
            f"weights {path}: no tensor of it fits the backbone, or too few: the backbone has "
            f"{some(own)}, the file {some(weights)}"
        )
    weights = part_of(weights, prefix)
    fitting = {name: value for name, value in weights.items() if fits(name, value, own)}
    if not all(value.isfinite().all() for value in fitting.values()):
        raise UsageError(f"weights {path} are not finite")
    encoder.backbone.load_state_dict(fitting, strict=False)
    log.info(f"* Weights: {len(fitting)} of the {len(own)} tensors of the backbone are from {path}")
    if prefix:
        log.info(f"* Weights taken: those whose names in it begin with {prefix}")
    missing = [name for name in own if name not in fitting]
    if missing:
        log.info(f"* Weights random, since it has none that fit: {', '.join(missing)}")
    unused = [f"{name} {tuple(weights[name].shape)}" for name in weights if name not in fitting]
    if unused:
        log.info(f"* Weights in it, but not used: {', '.join(unused)}")


def backbone_prefix(weights, own):
    """Return the prefix of the names in `weights` under which most tensors fit those of `own`.

    Other programs save the backbone as part of something larger: the prefix is
    state_dict.module.encoder_q. in a file of MoCo, and teacher.backbone. in one of DINO. Return
    None if nothing fits, or under a prefix less than a quarter: then it is of another network.
    """
    counts = Counter()
    for name, value in weights.items():
        parts = name.split(".")
        for i in range(len(parts)):
            if fits(".".join(parts[i:]), value, own):
                counts["".join(f"{part}." for part in parts[:i])] += 1
    likely = [prefix for prefix, n in counts.items() if not prefix or n >= len(own) / 4]
    # Of equals, the teacher, as DINO itself does, or else the first: MoCo's encoder_q.
    return max(likely, key=lambda prefix: (counts[prefix], "teacher" in prefix), default=None)


def fits(name, value, own):
    """Whether a state dict has a tensor of this name with the shape of the value."""
    return name in own and own[name].shape == value.shape


def some(weights):
    """Return the first names of a dict as a text."""
    names = [str(name) for name in weights]
    return ", ".join(names[:3]) + (" and so on" if len(names) > 3 else "")


def read_weights(path):
    """Return {name: tensor} of a file of weights. Raises UsageError if it holds none.

    The name of a tensor in nested dicts has the keys of all of them: state_dict.conv1.weight.
    """
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file  # an optional package

            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of pickle, zip, safetensors and the system
        raise UsageError(f"weights {path} can't be read ({why_not_read(error)})") from None
    weights = flattened(content)
    if not weights:
        holds = f"its keys are {some(content)}" if isinstance(content, dict) else "it is no dict"
        raise UsageError(f"weights {path} is not a state dict: {holds}")
    return weights


def why_not_read(error):
    """Return the reason for an error of torch.load as a text of one line."""
    text = " ".join(str(error).split())
    foreign = re.search(r"GLOBAL ([\w.]+)", text)
    if foreign:
        return (
            f"beside tensors it holds {foreign[1]}, and to read that could run code of the file. "
            f"If you trust it, save its weights alone, those under the key state_dict, model, "
            f"student or teacher, in a file of their own: docs/guide.md, Options, says how"
        )
    if "Weights only load failed" in text:
        return "it is not a file of torch.save"
    return text[:200]


def flattened(content, prefix=""):
    """Return {name: tensor} of the tensors in nested dicts; a name has all keys, with points."""
    if isinstance(content, torch.Tensor):
        return {prefix.removesuffix("."): content}
    tensors = {}
    for key, value in content.items() if isinstance(content, dict) else ():
        tensors |= flattened(value, f"{prefix}{key}.")
    return tensors
