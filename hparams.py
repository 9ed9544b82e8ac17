"""All settings, each declared once: options, YAML checks and cache keys follow from it."""

import argparse
import difflib
import math
import os
import re
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, get_args

import yaml

from data import DATASETS
from images.cache import Decoding
from images.pixels import FITS, MAX_PIXELS
from infra.errors import UsageError
from loss import UNIFORMITY
from model import ACTIVATIONS, BACKBONES, STAGE_POOLS, TIMM
from patches import VIEW_KINDS, Augment, Views

# The earliest stage that a setting influences. Those of data and model never change within a run
# folder, because the weights depend on them. Those of the encoder may change while training is
# under way, the later ones at any time.
STAGES = {
    "data": "data",
    "model": "model",
    "encoder": "training the encoder",
    "encode": "encoding",
    "probe": "linear probe",
    "none": "running",  # no result depends on it
}
FIXED = ("data", "model")
SCHEDULES = ("cosine", "constant")
OPTIMIZERS = ("lars", "muon", "sgd", "adamw")
PRECISIONS = ("auto", "fp32", "bf16")
POOLS = ("features", "proj", "backbone", *STAGE_POOLS)
MOST_VALUE = 10.0**15  # of a pixel


def setting(stage, default, help, **bounds):
    """Declare a setting. bounds: choices, low, high, path, or above=True if `low` is refused."""
    return field(default=default, metadata={"stage": stage, "help": help, **bounds})


_data = partial(setting, "data")
_model = partial(setting, "model")
_encoder = partial(setting, "encoder")
_encode = partial(setting, "encode")
_probe = partial(setting, "probe")
_none = partial(setting, "none")


@dataclass(frozen=True)
class Hparams:
    """All settings of a run. Raises UsageError, naming the setting, for a value that is refused."""

    dataset: str = _data("cifar10", "images to learn from", choices=tuple(DATASETS))
    image_size: int = _data(
        32,
        "side in pixels to which images of --dataset folder are resized",
        low=14,
        high=4096,
    )
    fit: str = _data(
        "crop",
        "how images of --dataset folder become square: the centre, or all between white borders or "
        "stretched",
        choices=FITS,
    )
    value_low: float | None = _data(
        None,
        "value that becomes black in images of more than 8 bits (default: percentile .1 of a "
        "sample)",
        low=-MOST_VALUE,
        high=MOST_VALUE,
    )
    value_high: float | None = _data(
        None,
        "value that becomes white in them (default: percentile 99.9)",
        low=-MOST_VALUE,
        high=MOST_VALUE,
    )
    n_images: int | None = _data(
        None, "train on a random, class-balanced subset of so many (default: all)", low=1
    )
    seed: int = _data(42, "random seed", low=0)
    arch: str = _model(
        "resnet18-cifar", "network architecture", choices=tuple(BACKBONES), prefix=TIMM
    )
    weights: str | None = _model(
        None, "file that the backbone's weights start from; timm: timm's pretrained ones", path=True
    )
    h_dim: int = _model(4096, "patch embedding dimensionality", low=1, high=2**16)
    z_dim: int = _model(1024, "projection dimensionality", low=1, high=2**16)
    activation: str = _model("relu", "activation of both heads", choices=tuple(ACTIVATIONS))
    batch_norm: bool = _model(True, "batch norm in both heads")
    pretrained_proj: str | None = _model(
        None, "checkpoint to take the projection's weights from, then kept frozen", path=True
    )
    stage_loss_weight: float = _model(
        0.0,
        "coefficient of the same losses of each stage of a resnet before the last one, which then "
        "have projections of their own",
        low=0,
    )
    n_patches: int = _encoder(100, "patches per image", low=1, high=10_000)
    bags: int = _encoder(
        1,
        "bags that an image's patches are split into; its bags are each other's negatives",
        low=1,
    )
    input_size: int | None = _encoder(
        None, "pixels of a patch in the network (default: as wide as the image)", low=8, high=4096
    )
    jitter: float = _encoder(
        1.0, "strength of the colour jitter of a patch, as a factor", low=0, high=2.5
    )
    grey: float = _encoder(0.2, "probability that a patch becomes grey", low=0, high=1)
    blur: float = _encoder(0.1, "probability that a patch is blurred", low=0, high=1)
    solarise: float = _encoder(0.1, "probability that a patch is solarised", low=0, high=1)
    n_epochs: float = _encoder(
        2.0, "passes over the data, may be fractional; 0: no training", low=0, high=100_000
    )
    bs: int = _encoder(100, "batch size in images", low=1, high=1_000_000)
    max_patches: int | None = _encoder(
        None,
        "most patches in one forward pass, to save memory: each passes twice, batch norm is over "
        "one pass (default: as many as fit)",
        low=3,
    )
    lr: float = _encoder(0.3, "learning rate at the start", low=0, above=True)
    schedule: str = _encoder(
        "cosine", "learning-rate schedule: cosine to 0, or constant", choices=SCHEDULES
    )
    optimizer: str = _encoder("lars", "optimizer", choices=OPTIMIZERS)
    weight_decay: float = _encoder(1e-4, "weight decay; muon has none", low=0)
    uniformity_loss: str = _encoder(
        "tcr", "loss that spreads the embeddings", choices=tuple(UNIFORMITY)
    )
    invariance_loss_weight: float = _encoder(200.0, "coefficient of the invariance loss", low=0)
    uniformity_loss_weight: float = _encoder(1.0, "coefficient of the uniformity loss", low=0)
    tcr_eps: float = _encoder(0.2, "eps of the coding rate", low=1e-6, high=1e6)
    temperature: float = _encoder(0.2, "temperature of the contrastive loss", low=0.001, high=1000)
    precision: str = _encoder(
        "auto", "precision of the network; auto: bf16 if the hardware has it", choices=PRECISIONS
    )
    test_patches: int | None = _encode(
        None, "patches per image when encoding (default: n_patches)", low=1, high=10_000
    )
    eval_views: str = _encode(
        "grid",
        "views that encode an image: augmented as in training, random crops, a grid of crops, or "
        "the whole image in one pass",
        choices=VIEW_KINDS,
    )
    mirror: bool = _encode(False, "encode the mirror image too, and take the mean of both")
    emb_pool: str = _encode(
        "features",
        "which activations represent an image: the feature layer, the projection, the backbone, "
        "every stage of the backbone, or its stem and every block",
        choices=POOLS,
    )
    pool_grid: int = _encode(
        1,
        "split a grid of views, or the stages of a whole image, into so many parts along each "
        "axis, average each, concatenate",
        low=1,
    )
    save_proj: bool = _encode(False, "save each patch's embedding and projection too, as float16")
    n_eval_epochs: int = _probe(100, "epochs of the linear probe", low=1, high=100_000)
    eval_lr: float | None = _probe(
        None,
        "learning rate of the probe (default: the best of six on a held-out tenth)",
        low=0,
        above=True,
    )
    standardize: bool = _probe(
        False, "give each dimension of the embeddings the same mean and deviation for the probe"
    )
    data_dir: str = _none("./datasets", "where the images are, or are downloaded to", path=True)
    labels: str | None = _none(
        None, "folder only: CSV file with lines path,label, instead of class folders", path=True
    )
    max_pixels: int = _none(
        MAX_PIXELS, "folder only: an image with more pixels is not read, to save memory", low=1
    )
    device: str = _none("auto", "auto (cuda, mps or cpu), cpu, mps, cuda or cuda:N")
    deterministic: bool = _none(False, "bitwise reproducible on CUDA too, slower")
    compile: bool = _none(
        False, "torch.compile the network; on a CPU the steps are no faster for it"
    )
    tensorboard: bool = _none(True, "TensorBoard events too, where the package is installed")
    print_freq: int = _none(50, "steps between two lines of progress and metrics", low=1)
    eval_freq: int = _none(
        0, "steps between quick evaluations (kNN, collapse) while training; 0: none", low=0
    )
    checkpoint_every: float = _none(60.0, "seconds between two checkpoints within an epoch", low=0)

    def __post_init__(self):
        for name, declaration in SETTINGS.items():
            try:
                value = declaration.check(getattr(self, name))
            except (ValueError, OverflowError) as error:  # Python can't convert 400 digits
                raise UsageError(f"{name} {error}") from None
            object.__setattr__(self, name, value)  # the dataclass is frozen
        self._check_together()

    def _check_together(self):
        """Raise UsageError for settings that do not fit each other."""
        if self.uniformity_loss != "tcr" and self.bs < 2:
            raise UsageError(
                f"bs must be at least 2 with uniformity_loss {self.uniformity_loss}, which "
                f"compares images"
            )
        if self.bs * self.n_patches < 2:
            raise UsageError(
                "bs 1 with n_patches 1 leaves batch norm a single patch: raise one of them"
            )
        if self.n_patches % self.bags:
            raise UsageError(f"bags must divide n_patches {self.n_patches}, not {self.bags}")
        if self.pool_grid > 1:
            self._check_pool_grid()
        is_timm = self.arch.startswith(TIMM)
        if self.weights == "timm" and not is_timm:
            raise UsageError(f"weights timm are for arch {TIMM}NAME, not {self.arch}")
        if self.emb_pool in STAGE_POOLS and is_timm:
            raise UsageError(
                f"emb_pool {self.emb_pool} is for resnets of torchvision, not {self.arch}"
            )
        if self.stage_loss_weight and is_timm:
            raise UsageError(f"stage_loss_weight is for resnets of torchvision, not {self.arch}")
        if self.value_range and self.value_low >= self.value_high:
            raise UsageError(
                f"value_low must be below value_high {self.value_high:g}, not {self.value_low:g}"
            )
        if self.image_size % 2:
            raise UsageError(
                f"image_size must be even, a patch being half as wide, not {self.image_size}"
            )

    def _check_pool_grid(self):
        """Raise UsageError if there are no parts for pool_grid to average."""
        side = math.isqrt(self.test_views.n)
        if self.eval_views == "whole" and self.emb_pool not in STAGE_POOLS:
            raise UsageError(
                f"pool_grid with eval_views whole needs emb_pool {' or '.join(STAGE_POOLS)}, not "
                f"{self.emb_pool}"
            )
        if self.eval_views != "whole" and (self.eval_views != "grid" or side % self.pool_grid):
            raise UsageError(
                f"pool_grid must divide the side of a grid of views, {side} of {self.eval_views}, "
                f"not {self.pool_grid}"
            )

    @property
    def value_range(self):
        """What becomes black and white in images of more than 8 bits: (low, high), or None."""
        both = (self.value_low, self.value_high)
        return None if None in both else both

    @property
    def decoding(self):
        """How files become images, a cache.Decoding."""
        return Decoding(self.image_size, self.value_range, self.max_pixels, self.fit)

    @property
    def patch_size(self):
        """Pixels of a patch in the network."""
        return self.input_size or (self.image_size if self.dataset == "folder" else 32)

    @property
    def augment(self):
        """How patches are augmented, a patches.Augment."""
        return Augment(self.jitter, self.grey, self.blur, self.solarise)

    @property
    def train_views(self):
        """The patches of a training step, a patches.Views."""
        return Views(self.n_patches, "augmented", self.patch_size, self.augment)

    @property
    def test_views(self):
        """The views that encode an image, a patches.Views."""
        n = self.test_patches or self.n_patches
        return Views(n, self.eval_views, self.patch_size, self.augment, self.mirror)

    def key(self, stage, weights):
        """Return the cache key of a stage: the weights' checksum and all settings up to it."""
        stages = list(STAGES)
        reached = stages[: stages.index(stage) + 1]
        names = [name for name, declaration in SETTINGS.items() if declaration.stage in reached]
        return {"encoder": weights, **{name: getattr(self, name) for name in names}}

    def differences(self, other, stages=tuple(STAGES)):
        """Return {name: (value here, value there)} of the settings of these stages that differ."""
        names = [name for name, declaration in SETTINGS.items() if declaration.stage in stages]
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in names}
        return {name: (here, there) for name, (here, there) in pairs.items() if here != there}


class Setting(NamedTuple):
    """The declaration of a setting: what its values may be."""

    name: str
    type: type  # int, float, str or bool
    optional: bool = False  # whether None is allowed
    default: Any = None
    stage: str = "none"
    help: str = ""
    choices: tuple = ()
    prefix: str | None = None  # text that begins with it is allowed beside the choices
    low: float | None = None
    above: bool = False  # whether low itself is refused
    high: float = 2**31 - 1
    path: bool = False  # whether ~ at its start is the home folder

    def check(self, value):
        """Return the value as self.type. Raises ValueError that says what it must be."""
        if value is None and self.optional:
            return None
        if self.type is float and type(value) is int:
            value = float(value)
        if type(value) is not self.type or not self.allows(value):
            raise ValueError(f"must be {self.allowed()}, not {abbreviated(value)}")
        return os.path.expanduser(value) if self.path else value

    def allows(self, value):
        """Whether a value of self.type is a choice, within the bounds, or printable text."""
        if self.choices:
            has_prefix = bool(self.prefix) and value.startswith(self.prefix)
            return value in self.choices or (has_prefix and value.isprintable())
        if self.type in (int, float):  # NaN is within no bounds
            above_low = self.low < value if self.above else self.low <= value
            return above_low and value <= self.high
        return self.type is bool or value.isprintable()

    def parse(self, text):
        """Return the value of a command-line argument; "none" stands for None.

        Raises argparse.ArgumentTypeError.
        """
        if self.optional and text.lower() == "none":
            return None
        try:
            return self.check(self.type(text))
        except (ValueError, OverflowError):
            message = f"must be {self.allowed()}, not {abbreviated(text)}"
            raise argparse.ArgumentTypeError(message) from None

    def allowed(self):
        """Describe the values that are allowed."""
        if self.choices:
            others = f", or {self.prefix}NAME" if self.prefix else ""
            return "one of " + ", ".join(self.choices) + others
        if self.type in (int, float):
            kind = "whole number" if self.type is int else "number"
            start = "above" if self.above else "from"
            return f"a {kind} {start} {self.low} to {self.high}"
        return "true or false" if self.type is bool else "text without control characters"


def declared(field):
    """Return the Setting of a field of Hparams, whose annotation is TYPE or TYPE | None."""
    types = get_args(field.type) or (field.type,)
    return Setting(field.name, types[0], NoneType in types, field.default, **field.metadata)


SETTINGS = {field.name: declared(field) for field in fields(Hparams)}

# Named sets of settings, for train --preset NAME.
PRESETS = {
    "laptop": {
        "arch": "resnet10-mini",
        "input_size": 16,
        "h_dim": 512,
        "z_dim": 128,
        "n_patches": 4,
        "bs": 100,
        "n_epochs": 1.2,
        "optimizer": "muon",
        "lr": 0.05,
        "uniformity_loss": "contrastive",
        "invariance_loss_weight": 10.0,
        "eval_views": "whole",
        "mirror": True,
        "emb_pool": "blocks",
        "pool_grid": 4,
        "standardize": True,
        "n_eval_epochs": 10,
    },
}
# What --budget changes of a preset, one after the other, while encoding and the probe would take
# more than two thirds of the time. In few steps, small batches teach more.
LIGHTER = {"laptop": ({"arch": "resnet10-tiny"}, {"mirror": False, "bs": 50})}


def abbreviated(value):
    """Return repr(value), cut to 80 characters, for an error message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "..."


class _Loader(yaml.SafeLoader):
    """yaml.SafeLoader that refuses repeated keys: an edit may add a line that is there already."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for name, n in Counter(keys).items():
            if n > 1:
                raise yaml.YAMLError(f"{abbreviated(name)} is given {n} times")
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 1e-3 as text, but people write learning rates that way.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789")
)


def read_hparams(path):
    """Return the Hparams of an hparams.yaml.

    Raises UsageError if it can't be read, or a value is missing or refused.
    """
    path = Path(path)
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"{path} can't be read ({error.strerror}): {path.parent} is not a run folder"
            f"{similar_runs(path)}"
        ) from None
    try:
        content = yaml.load(text.decode(), _Loader)
    except Exception as error:  # a tag that does not fit its value can raise nearly anything
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{path} is not YAML: {reason}") from None
    is_mapping = isinstance(content, dict) and set(content) == {"params"}
    if not is_mapping or not isinstance(content["params"], dict):
        raise UsageError(
            f"{path} must hold one mapping, params: with a line for each hyperparameter"
        )
    return from_dict(content["params"], path)


def similar_runs(path):
    """Return "; did you mean DIR?" of the run folders beside that of a path that is not there."""
    exp_dir = path.parent
    names = sorted(other.parent.name for other in exp_dir.parent.glob(f"*/{path.name}"))
    similar = [name for name in names if name.startswith(exp_dir.name)]
    similar = similar or difflib.get_close_matches(exp_dir.name, names)
    folders = " or ".join(str(exp_dir.with_name(name)) for name in similar[:3])
    return f"; did you mean {folders}?" if folders else ""


def from_dict(values, source):
    """Return the Hparams of a dict that names every setting and no other.

    Raises UsageError that names the source.
    """
    for name in values:
        if name not in SETTINGS:
            raise UsageError(f"{source}: unknown hyperparameter {abbreviated(name)}")
    for name, declaration in SETTINGS.items():
        if name not in values:
            default = yaml_value(declaration.default)
            raise UsageError(
                f"{source}: {name} is missing (its default is {default}), or an earlier version of "
                f"this program wrote the file"
            )
    try:
        return Hparams(**values)
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from None


def to_yaml(hp):
    """Return the text of hparams.yaml."""
    return yaml.safe_dump({"params": asdict(hp)}, sort_keys=False, allow_unicode=True)


def yaml_value(value):
    """Return a value as hparams.yaml writes it."""
    return yaml.safe_dump(value).split("\n")[0]
