"""All settings, each declared once. Command-line options, checks of hparams.yaml and cache keys are derived from them."""

import argparse
import math
import re
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, get_args

import yaml

from backbones import BACKBONES, TIMM
from data import DATASETS
from infra.errors import UsageError
from infra.files import open_regular
from loss import UNIFORMITY
from model import ACTIVATIONS
from patches import VIEW_KINDS, Augment, Views

# The earliest stage that a setting influences. Those of data and model never change within a run folder, because the weights
# depend on them. Those of the encoder may change while training is under way, the later ones at any time.
STAGES = {
    "data": "data",
    "model": "model",
    "encoder": "training the encoder",
    "encode": "encoding",
    "probe": "linear probe",
    "none": "running",  # no result depends on it
}
FIXED = ("data", "model")
SCHEDULES, PRECISIONS = ("cosine", "constant"), ("auto", "fp32", "bf16")


def setting(default, stage, help, **bounds):
    """Declare a setting. bounds: choices, low, high, or above=True if `low` itself is not allowed."""
    return field(default=default, metadata={"stage": stage, "help": help, **bounds})


@dataclass(frozen=True)
class Hparams:
    """All settings of a run. Raises UsageError, naming the setting, for a value that is not allowed."""

    dataset: str = setting("cifar10", "data", "images to learn from", choices=tuple(DATASETS))
    image_size: int = setting(32, "data", "pixels, folder only: images are resized and centre-cropped to this", low=14, high=4096)
    n_images: int | None = setting(None, "data", "train on a random, class-balanced subset of so many (default: all)", low=1)
    seed: int = setting(42, "data", "random seed", low=0)
    arch: str = setting("resnet18-cifar", "model", "network architecture", choices=tuple(BACKBONES), prefix=TIMM)
    weights: str | None = setting(None, "model", "file that the backbone's weights start from; timm: timm's pretrained ones")
    h_dim: int = setting(4096, "model", "patch embedding dimensionality", low=1, high=2**16)
    z_dim: int = setting(1024, "model", "projection dimensionality", low=1, high=2**16)
    activation: str = setting("relu", "model", "activation of both heads", choices=tuple(ACTIVATIONS))
    batch_norm: bool = setting(True, "model", "batch norm in both heads")
    pretrained_proj: str | None = setting(None, "model", "checkpoint to take the projection's weights from, then kept frozen")
    n_patches: int = setting(100, "encoder", "patches per image", low=1, high=10_000)
    bags: int = setting(1, "encoder", "bags that an image's patches are split into; its bags are each other's negatives", low=1)
    input_size: int | None = setting(None, "encoder", "pixels of a patch in the network (default: as wide as the image)",
                                     low=8, high=4096)  # fmt: skip
    jitter: float = setting(1.0, "encoder", "strength of the colour jitter of a patch, as a factor", low=0, high=2.5)
    grey: float = setting(0.2, "encoder", "probability that a patch becomes grey", low=0, high=1)
    blur: float = setting(0.1, "encoder", "probability that a patch is blurred", low=0, high=1)
    solarise: float = setting(0.1, "encoder", "probability that a patch is solarised", low=0, high=1)
    n_epochs: float = setting(2.0, "encoder", "passes over the data, may be fractional; 0: no training", low=0, high=100_000)
    bs: int = setting(100, "encoder", "batch size in images", low=1, high=1_000_000)
    max_patches: int | None = setting(None, "encoder", "most patches in one forward pass, to save memory: each passes twice, "
                                      "batch norm is over one pass (default: as many as fit)", low=3)  # fmt: skip
    lr: float = setting(0.3, "encoder", "learning rate at the start", low=0, above=True)
    schedule: str = setting("cosine", "encoder", "learning-rate schedule: cosine to 0, or constant", choices=SCHEDULES)
    optimizer: str = setting("lars", "encoder", "optimizer", choices=("lars", "muon", "sgd", "adamw"))
    weight_decay: float = setting(1e-4, "encoder", "weight decay; muon has none", low=0)
    uniformity_loss: str = setting("tcr", "encoder", "loss that spreads the embeddings", choices=tuple(UNIFORMITY))
    invariance_loss_weight: float = setting(200.0, "encoder", "coefficient of the invariance loss", low=0)
    uniformity_loss_weight: float = setting(1.0, "encoder", "coefficient of the uniformity loss", low=0)
    tcr_eps: float = setting(0.2, "encoder", "eps of the coding rate", low=1e-6, high=1e6)
    precision: str = setting("auto", "encoder", "precision of the network; auto: bf16 if the hardware has it", choices=PRECISIONS)
    test_patches: int | None = setting(None, "encode", "patches per image when encoding (default: n_patches)", low=1, high=10_000)
    eval_views: str = setting("grid", "encode", "views that encode an image: augmented as in training, random crops, or "
                              "a grid of crops", choices=VIEW_KINDS)  # fmt: skip
    emb_pool: str = setting("features", "encode", "what of a view to average as the representation; backbone: before the head; "
                            "stages: means of all stages", choices=("features", "proj", "backbone", "stages"))  # fmt: skip
    pool_grid: int = setting(1, "encode", "split a grid of views into so many parts along each axis, average each, concatenate",
                             low=1)  # fmt: skip
    save_proj: bool = setting(False, "encode", "save each patch's embedding and projection too, as float16")
    n_eval_epochs: int = setting(100, "probe", "epochs of the linear probe", low=1, high=100_000)
    eval_lr: float | None = setting(None, "probe", "learning rate of the probe (default: the best of six on a held-out tenth)",
                                    low=0, above=True)  # fmt: skip
    standardize: bool = setting(False, "probe", "give each dimension of the embeddings the same mean and deviation for the probe")
    data_dir: str = setting("./datasets", "none", "where the images are, or are downloaded to")
    labels: str | None = setting(None, "none", "folder only: CSV file with lines path,label, instead of class folders")
    device: str = setting("auto", "none", "auto (cuda, mps or cpu), cpu, mps, cuda or cuda:N")
    deterministic: bool = setting(False, "none", "bitwise reproducible on CUDA too, slower")
    compile: bool = setting(False, "none", "torch.compile the network; on a CPU the steps are no faster for it")
    tensorboard: bool = setting(True, "none", "TensorBoard events too, where the package is installed")
    print_freq: int = setting(50, "none", "steps between two lines of progress and metrics", low=1)
    eval_freq: int = setting(0, "none", "steps between quick evaluations (kNN, signs of collapse) while training; 0: none", low=0)
    checkpoint_every: float = setting(60.0, "none", "seconds between two checkpoints within an epoch", low=0)

    def __post_init__(self):
        for name, declaration in SETTINGS.items():
            try:
                object.__setattr__(self, name, declaration.check(getattr(self, name)))  # the dataclass is frozen
            except (ValueError, OverflowError) as error:  # Python can't convert a whole number of 400 digits
                raise UsageError(f"{name} {error}") from None
        if self.uniformity_loss == "vonmises" and self.bs < 2:
            raise UsageError("bs must be at least 2 with uniformity_loss vonmises, which compares images")
        if self.bs * self.n_patches < 2:
            raise UsageError("bs 1 with n_patches 1 leaves batch norm a single patch: raise one of them")
        if self.n_patches % self.bags:
            raise UsageError(f"bags must divide n_patches {self.n_patches}, not {self.bags}")
        k = math.isqrt(self.test_views.n)
        if self.pool_grid > 1 and (self.eval_views != "grid" or k % self.pool_grid):
            raise UsageError(f"pool_grid must divide the side of a grid of views, {k} of {self.eval_views}, not {self.pool_grid}")
        is_timm = self.arch.startswith(TIMM)
        if self.weights == "timm" and not is_timm:
            raise UsageError(f"weights timm are for arch {TIMM}NAME, not {self.arch}")
        if self.emb_pool == "stages" and is_timm:
            raise UsageError(f"emb_pool stages is for resnets of torchvision, not {self.arch}")
        if self.image_size % 2:
            raise UsageError(f"image_size must be even, a patch being half as wide, not {self.image_size}")

    @property
    def patch_size(self):
        """Pixels of a patch in the network."""
        return self.input_size or (self.image_size if self.dataset == "folder" else 32)

    @property
    def augment(self):
        return Augment(self.jitter, self.grey, self.blur, self.solarise)

    @property
    def train_views(self):
        return Views(self.n_patches, "augmented", self.input_size, self.augment)

    @property
    def test_views(self):
        return Views(self.test_patches or self.n_patches, self.eval_views, self.input_size, self.augment)

    def key(self, stage, weights):
        """Return the cache key of a stage: the checksum of the weights and all settings up to that stage, as a dict."""
        stages = list(STAGES)[: list(STAGES).index(stage) + 1]
        return {"encoder": weights, **{name: getattr(self, name) for name, s in SETTINGS.items() if s.stage in stages}}

    def differences(self, other, stages=tuple(STAGES)):
        """Return {name: (value here, value there)} for the settings of these stages that differ from those of other."""
        names = [name for name, declaration in SETTINGS.items() if declaration.stage in stages]
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in names}
        return {name: (here, there) for name, (here, there) in pairs.items() if here != there}


class Setting(NamedTuple):
    """The declaration of a setting: what its values may be."""

    name: str
    type: type  # int, float, str or bool
    optional: bool  # whether None is allowed
    default: Any
    stage: str
    help: str
    choices: tuple = ()
    prefix: str | None = None  # text that begins with it is allowed beside the choices
    low: float | None = None
    above: bool = False  # whether low itself is not allowed
    high: float = 2**31 - 1

    def check(self, value):
        """Return the value as self.type. Raises ValueError that says what it must be."""
        if value is None and self.optional:
            return None
        if self.type is float and type(value) is int:
            value = float(value)
        if type(value) is not self.type or not self.allows(value):
            raise ValueError(f"must be {self.wanted()}, not {short(value)}")
        return value

    def allows(self, value):
        """Whether a value of self.type is a choice, or within the bounds, or text without control characters."""
        if self.choices:
            return value in self.choices or (bool(self.prefix) and value.startswith(self.prefix) and value.isprintable())
        if self.type in (int, float):  # NaN is within no bounds
            return (self.low < value if self.above else self.low <= value) and value <= self.high
        return self.type is bool or value.isprintable()

    def parse(self, text):
        """Return the value of a command-line argument; "none" stands for None. Raises argparse.ArgumentTypeError."""
        if self.optional and text.lower() == "none":
            return None
        try:
            return self.check(self.type(text))
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(f"must be {self.wanted()}, not {short(text)}") from None

    def wanted(self):
        """Describe the values that are allowed."""
        if self.choices:
            return "one of " + ", ".join(self.choices) + (f", or {self.prefix}NAME" if self.prefix else "")
        if self.type in (int, float):
            kind = "whole number" if self.type is int else "number"
            return f"a {kind} {'above' if self.above else 'from'} {self.low} to {self.high}"
        return "true or false" if self.type is bool else "text without control characters"


def declared(field):
    """Return the Setting of a field of Hparams, whose annotation is TYPE or TYPE | None."""
    types = get_args(field.type) or (field.type,)
    return Setting(field.name, types[0], NoneType in types, field.default, **field.metadata)


SETTINGS = {field.name: declared(field) for field in fields(Hparams)}

# Named sets of settings, for train --preset NAME.
PRESETS = {
    "laptop": {
        "arch": "resnet18-tiny", "input_size": 16, "h_dim": 1024, "z_dim": 256, "n_patches": 8, "bs": 50, "n_epochs": 1.0,
        "optimizer": "muon", "lr": 0.05, "test_patches": 16, "emb_pool": "stages", "pool_grid": 4, "standardize": True,
        "n_eval_epochs": 30,
    },
}


def short(value):
    """Return repr(value), cut to 80 characters, for an error message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "..."


class _Loader(yaml.SafeLoader):
    """yaml.SafeLoader that rejects aliases (a few lines can expand to gigabytes) and repeated keys."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        for name, n in Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)).items():
            if n > 1:
                raise yaml.YAMLError(f"{short(name)} is given {n} times")
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 1e-3 as text, but people write learning rates that way.
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))
YAML_BYTES = 20_000  # a longer hparams.yaml is refused; this much is read in a tenth of a second


def read_hparams(path):
    """Return the Hparams of an hparams.yaml. Raises UsageError if it is missing, or a value is missing or not allowed."""
    path = Path(path)
    try:
        with open_regular(path, YAML_BYTES) as file:
            text = file.read()
    except OSError as error:
        raise UsageError(f"{path} can't be read ({error.strerror}): {path.parent} is not a run folder") from None
    try:
        content = yaml.load(text.decode(), _Loader)
    except Exception as error:  # a tag that does not fit its value can raise nearly anything
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(content, dict) or set(content) != {"params"} or not isinstance(content["params"], dict):
        raise UsageError(f"{path} must hold one mapping, params: with a line for each hyperparameter")
    return from_dict(content["params"], path)


def from_dict(values, source):
    """Return the Hparams of a dict that names every setting and no other. Raises UsageError that names the source."""
    for name in values:
        if name not in SETTINGS:
            raise UsageError(f"{source}: unknown hyperparameter {short(name)}")
    for name, declaration in SETTINGS.items():
        if name not in values:
            raise UsageError(f"{source}: {name} is missing (its default is {yaml_value(declaration.default)})")
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
