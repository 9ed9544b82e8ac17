"""Hyperparameters, declared once, and the run folder: hparams.yaml, checkpoints, artifacts, metrics."""

import argparse
import fcntl
import hashlib
import json
import math
import os
import re
import sys
import zipfile
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import yaml

import parallel
from model import ACTIVATIONS, ARCHS

FORMAT = 2  # of checkpoints and artifacts


class RunError(Exception):
    """Something failed while running: one line for the user, exit code 1."""

    code = 1


class UsageError(Exception):
    """The user asked for something that can't be: one line that names it and the way out, exit code 2."""

    code = 2


# -------------------------------------------------------------------------------------- hyperparameters

# The earliest stage that a hyperparameter touches. What the weights depend on (data, model) never changes within a
# run folder; encoder settings may change while training is under way, the later ones at any time.
STAGES = {
    "data": "data",
    "model": "model",
    "encoder": "training the encoder",
    "encode": "encoding",
    "probe": "linear probe",
    "none": "running",
}
FIXED = ("data", "model")


class Param(NamedTuple):
    name: str
    type: type  # int, float, str or bool
    default: Any  # None: no value needed
    stage: str
    help: str
    choices: tuple = ()
    low: float | None = None  # smallest value, itself allowed unless `above`
    above: bool = False
    high: float = 2**31 - 1  # greatest value

    def check(self, value):
        """The value, as self.type; raises ValueError saying what it must be."""
        if value is None and self.default is None:
            return None
        if self.type is float and type(value) is int:
            value = float(value)
        if type(value) is not self.type or not self.allows(value):
            raise ValueError(f"must be {self.wanted()}, not {short(value)}")
        return value

    def allows(self, value):
        """Whether this value of self.type is one of the choices, or within the bounds, or text without control characters."""
        if self.choices:
            return value in self.choices
        if self.type in (int, float):  # NaN is in no bounds
            return (self.low < value if self.above else self.low <= value) and value <= self.high
        return self.type is bool or value.isprintable()

    def parse(self, text):
        """The value of a command-line argument, none where there may be no value; raises argparse.ArgumentTypeError."""
        if self.default is None and text.lower() == "none":
            return None
        try:
            return self.check(self.type(text))
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(f"must be {self.wanted()}, not {short(text)}") from None

    def wanted(self):
        if self.choices:
            return "one of " + ", ".join(self.choices)
        if self.type in (int, float):
            kind = "whole number" if self.type is int else "number"
            return f"a {kind} {'above' if self.above else 'from'} {self.low} to {self.high}"
        return "true or false" if self.type is bool else "text without control characters"


def short(value):
    """A value as an error names it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "..."


PARAMS = [
    Param("dataset", str, "cifar10", "data", "images to learn from", choices=(
        "cifar10", "cifar100", "folder", "textures")),
    Param("image_size", int, 32, "data", "pixels, folder only: images are resized and centre-cropped to this", low=14, high=4096),
    Param("n_images", int, None, "data", "train on a random, class-balanced subset of so many (default: all)", low=1),
    Param("seed", int, 42, "data", "random seed", low=0),
    Param("arch", str, "resnet18-cifar", "model", "network architecture", choices=tuple(ARCHS)),
    Param("h_dim", int, 4096, "model", "patch embedding dimensionality", low=1, high=2**16),
    Param("z_dim", int, 1024, "model", "projection dimensionality", low=1, high=2**16),
    Param("activation", str, "relu", "model", "activation of both heads", choices=tuple(ACTIVATIONS)),
    Param("batch_norm", bool, True, "model", "batch norm in both heads"),
    Param("pretrained_proj", str, None, "model", "checkpoint to take the projection's weights from, then kept frozen"),
    Param("n_patches", int, 100, "encoder", "patches per image", low=1, high=10_000),
    Param("bags", int, 1, "encoder", "bags that an image's patches are dealt to; in more than one it is its own negative", low=1),
    Param("input_size", int, None, "encoder", "pixels, what patches are resized to (default: as wide as the image)", low=8,
          high=4096),
    Param("n_epochs", float, 2.0, "encoder", "passes over the data, also 0.75; 0 leaves the encoder untrained", low=0,
          high=100_000),
    Param("bs", int, 100, "encoder", "batch size in images", low=1, high=1_000_000),
    Param("max_patches", int, None, "encoder", "patches at once through the network, for small GPUs: twice through it, "
          "batch norm over those (default: all)", low=3),
    Param("lr", float, 0.3, "encoder", "learning rate at the start", low=0, above=True),
    Param("schedule", str, "cosine", "encoder", "of the rate: from lr to 0 over all steps, or lr throughout", choices=(
        "cosine", "constant")),
    Param("optimizer", str, "lars", "encoder", "optimizer", choices=("lars", "sgd")),
    Param("weight_decay", float, 1e-4, "encoder", "weight decay", low=0),
    Param("uniformity_loss", str, "tcr", "encoder", "loss that spreads the embeddings", choices=("tcr", "vonmises")),
    Param("invariance_loss_weight", float, 200.0, "encoder", "coefficient of the invariance loss", low=0),
    Param("uniformity_loss_weight", float, 1.0, "encoder", "coefficient of the uniformity loss", low=0),
    Param("tcr_eps", float, 0.2, "encoder", "eps of the coding rate", low=0, above=True),
    Param("precision", str, "auto", "encoder", "of the network; auto: bf16 where the hardware has it", choices=(
        "auto", "fp32", "bf16")),
    Param("test_patches", int, None, "encode", "patches per image when encoding (default: n_patches)", low=1, high=10_000),
    Param("eval_views", str, "grid", "encode", "what an image is encoded by: patches as in training, random crops, or "
          "a grid of crops", choices=(
          "augmented", "crops", "grid")),
    Param("emb_pool", str, "features", "encode", "which tensors to pool as the representation", choices=("features", "proj")),
    Param("save_proj", bool, False, "encode", "save each patch's embedding and projection too, as float16"),
    Param("n_eval_epochs", int, 100, "probe", "epochs of the linear probe", low=1, high=100_000),
    Param("eval_lr", float, None, "probe", "learning rate of the probe (default: the best of six on a held-out tenth)",
          low=0, above=True),
    Param("data_dir", str, "./datasets", "none", "where the images are, or are downloaded to"),
    Param("labels", str, None, "none", "folder only: CSV file of path in data_dir and label, for folders that are no classes"),
    Param("device", str, "auto", "none", "auto (cuda, mps or cpu), cpu, mps, cuda or cuda:N"),
    Param("deterministic", bool, False, "none", "the same bits each time on CUDA too, slower"),
    Param("compile", bool, False, "none", "torch.compile the network; on a CPU the steps are no faster for it"),
    Param("tensorboard", bool, True, "none", "TensorBoard events too, where the package is installed"),
    Param("print_freq", int, 50, "none", "steps between two lines of progress and metrics", low=1),
    Param("eval_freq", int, 0, "none", "steps between two quick kNN accuracies while training, 0: never", low=0),
    Param("checkpoint_every", float, 60.0, "none", "seconds between two checkpoints within an epoch", low=0),
]

# Named sets of hyperparameters, for train --preset NAME.
PRESETS = {
    "one-minute": {"arch": "resnet18-mini", "input_size": 16, "n_patches": 10, "n_epochs": 10.0, "test_patches": 9},
}


def validate(values, source):
    """A namespace of all hyperparameters, from a dict that must name each of them and no others.

    Raises UsageError, naming `source` and the key, for a missing or unknown key or a value that is not allowed.
    """
    known = {param.name: param for param in PARAMS}
    for name in values:
        if name not in known:
            raise UsageError(f"{source}: unknown hyperparameter {short(name)}")
    for name, param in known.items():
        if name not in values:
            raise UsageError(f"{source}: {name} is missing (its default is {yaml_value(param.default)})")
        try:
            values[name] = param.check(values[name])
        except ValueError as error:
            raise UsageError(f"{source}: {name} {error}") from None
    if values["uniformity_loss"] == "vonmises" and values["bs"] < 2:
        raise UsageError(f"{source}: bs must be at least 2 with uniformity_loss vonmises, which compares images")
    if values["bs"] * values["n_patches"] < 2:
        raise UsageError(f"{source}: bs 1 with n_patches 1 leaves batch norm a single patch: raise one of them")
    if values["n_patches"] % values["bags"]:
        raise UsageError(f"{source}: bags must divide n_patches {values['n_patches']}, not {values['bags']}")
    if values["image_size"] % 2:
        raise UsageError(f"{source}: image_size must be even, a patch being half as wide, not {values['image_size']}")
    return SimpleNamespace(**values)


def yaml_value(value):
    """A value as hparams.yaml writes it."""
    return yaml.safe_dump(value).split("\n")[0]


class _Loader(yaml.SafeLoader):
    """The safe loader, without aliases, by which a few lines can stand for gigabytes, and without doubled keys."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        for name, n in Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)).items():
            if n > 1:
                raise yaml.YAMLError(f"{short(name)} is given {n} times")
        return super().construct_mapping(node, deep)


# YAML 1.1 takes 1e-3 for text, and a learning rate may well be written so.
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


HPARAMS_BYTES = 20_000  # of hparams.yaml, at most: read in a tenth of a second


def read_hparams(exp_dir):
    """The hyperparameters of a run folder, a namespace. Raises UsageError if they are missing or not allowed."""
    path = Path(exp_dir) / "hparams.yaml"
    try:
        with open(path, "rb") as file:
            text = file.read(HPARAMS_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path} can't be read ({error.strerror}): {exp_dir} is not a run folder") from None
    if len(text) > HPARAMS_BYTES:
        raise UsageError(f"{path} is longer than {HPARAMS_BYTES:,} bytes, so it is not of this program")
    try:
        content = yaml.load(text.decode(), _Loader)
    except Exception as error:  # a tag that its value does not fit can raise nearly anything
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(content, dict) or set(content) != {"params"} or not isinstance(content["params"], dict):
        raise UsageError(f"{path} must hold one mapping, params: with a line for each hyperparameter")
    return validate(content["params"], path)


def dump_hparams(hp):
    """The text of hparams.yaml."""
    return yaml.safe_dump({"params": vars(hp)}, sort_keys=False, allow_unicode=True)


def write_hparams(exp_dir, hp):
    with replacing(exp_dir / "hparams.yaml") as file:
        file.write(dump_hparams(hp).encode())


def differences(old, new, stages=tuple(STAGES)):
    """{name: (old value, new value)} of the hyperparameters of these stages that differ; old and new are dicts."""
    names = [param.name for param in PARAMS if param.stage in stages]
    return {name: (old[name], new[name]) for name in names if old[name] != new[name]}


def check_changes(hp, checkpoint):
    """What the run goes on with that its checkpoint was not trained with: {name: (old, new)} of encoder settings.

    Raises UsageError for a change that the trained weights do not allow, or that could no longer have an effect.
    """
    old, new = checkpoint["hparams"], vars(hp)
    for name, (was, now) in differences(old, new, FIXED).items():
        raise UsageError(
            f"{name} is {yaml_value(now)}, but the weights in this folder were trained with {name} {yaml_value(was)}: "
            f"set it back, or train under a new --exp_name"
        )
    changed = differences(old, new, ("encoder",))
    if n_steps_done(checkpoint) > n_steps_in(hp.n_epochs, checkpoint["n_steps"]):
        raise UsageError(
            f"n_epochs is {hp.n_epochs:g}, but training is at epoch {checkpoint['epoch']} step {checkpoint['step']} already: "
            f"raise it, or train under a new --exp_name"
        )
    if is_trained(hp, checkpoint):
        for name, (was, now) in changed.items():
            if name != "n_epochs":
                raise UsageError(
                    f"{name} is {yaml_value(now)}, but training has finished with {name} {yaml_value(was)}, so it would have "
                    f"no effect: set it back, raise n_epochs to train on with it, or train under a new --exp_name"
                )
    return changed


def is_trained(hp, checkpoint):
    return checkpoint is not None and n_steps_done(checkpoint) >= n_steps_in(hp.n_epochs, checkpoint["n_steps"])


def n_steps_done(checkpoint):
    return checkpoint["epoch"] * checkpoint["n_steps"] + checkpoint["step"]


def n_steps_in(n_epochs, n_steps):
    """Steps in so many epochs of n_steps each; n_epochs need not be whole."""
    return math.ceil(round(n_epochs * max(1, n_steps), 6))  # an untrained encoder may have met fewer images than bs


# ------------------------------------------------------------------------------------------- run folder


@contextmanager
def locked(exp_dir):
    """The run folder, made if need be, for this process alone. A folder that was made and stays empty is removed.

    The lock is the system's and goes with its process, however that ends: the file that it leaves then locks nothing.
    Raises RunError, with its pid, if another process has it, or if nothing can be written there.
    """
    if not parallel.FIRST:
        yield
        return
    made = [folder for folder in (exp_dir, *exp_dir.parents) if not folder.exists()]
    path = exp_dir / "lock"
    try:
        exp_dir.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115, closed below
    except OSError as error:
        raise RunError(f"{exp_dir} can't be written: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RunError(f"{exp_dir} is in use by process {file.read() or 'unknown'}: wait for it or stop it") from None
        try:
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield
        finally:
            path.unlink(missing_ok=True)
            with suppress(OSError):  # not empty
                for folder in made:
                    folder.rmdir()


def move_aside(exp_dir):
    """Rename the run folder, which is locked, to the next free NAME.oldN; its lock stays with the old name."""
    aside = next(path for n in range(1, 10**6) if not (path := exp_dir.with_name(f"{exp_dir.name}.old{n}")).exists())
    exp_dir.rename(aside)
    exp_dir.mkdir()
    (aside / "lock").rename(exp_dir / "lock")
    return aside


@contextmanager
def replacing(path, keep=None):
    """A binary file to write: beside `path`, flushed to disk, then renamed to it, the old one to `keep`; gone if the
    writing fails. Of several processes the first one alone writes."""
    if not parallel.FIRST:
        with open(os.devnull, "wb") as file:
            yield file
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def prepare(exp_dir, hp):
    """Make the run folder, remove what a killed process left half-written, and write hparams.yaml if it changed."""
    if not parallel.FIRST:
        return
    for folder in (exp_dir, exp_dir / "checkpoints", exp_dir / "artifacts"):
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob("*.tmp"):
            leftover.unlink()
    if not (exp_dir / "hparams.yaml").exists() or read_hparams(exp_dir) != hp:
        write_hparams(exp_dir, hp)


def save(path, content, keep=None):
    """Write tensors and plain values with torch.save, atomically; what was there before becomes the file `keep`."""
    with replacing(path, keep) as file:
        torch.save({"format": FORMAT, **content}, file)


def load(path):
    """What `save` wrote, on the CPU. Raises RunError if the file is damaged, or anything but tensors and plain values."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("compressed")  # a few bytes could stand for gigabytes
            damaged = archive.testzip()  # torch.load does not check the checksums
        if damaged:
            raise ValueError(f"checksum of {damaged}")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError("not a file of this program")
    except Exception as error:  # a damaged zip or pickle can raise nearly anything
        reason = str(error).strip().split("\n")[0][:100]
        raise RunError(f"{path} can't be read ({type(error).__name__}: {reason})") from None
    return content


# What a checkpoint holds; see main.save_state.
CHECKPOINT = {
    "format": int, "hparams": dict, "data": dict, "encoder": dict, "optimizer": dict, "epoch": int, "step": int, "n_steps": int,
    "totals": torch.Tensor, "n_totals": int, "recent": torch.Tensor, "seconds": float, "peak_memory": int, "metrics_bytes": int,
}  # fmt: skip


def load_checkpoint(path):
    """The content of a checkpoint, on the CPU. Raises RunError if it is damaged, or holds anything but what save_state
    writes: of other types, weights or momenta that are not finite, counts below 0, hyperparameters that are not allowed."""
    content = load(path)
    try:
        if set(content) != set(CHECKPOINT) or not all(isinstance(content[name], kind) for name, kind in CHECKPOINT.items()):
            raise ValueError("not what a checkpoint holds")
        validate(dict(content["hparams"]), "hparams")
        buffers = [entry["momentum_buffer"] for entry in content["optimizer"].values()]
        for tensor in (*content["encoder"].values(), *buffers, content["totals"], content["recent"]):
            if not tensor.isfinite().all():
                raise ValueError("a number that is not finite")
        if min(content[name] for name, kind in CHECKPOINT.items() if kind is int) < 0 or content["totals"].shape != (3,):
            raise ValueError("a count below 0")
        if content["recent"].shape != (len(content["recent"]), 3) or set(content["data"]) != {"train", "test", "class_names"}:
            raise ValueError("shapes of another kind")
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError, UsageError) as error:
        raise RunError(f"{path} can't be used ({str(error)[:200]})") from None
    return content


def epoch_checkpoints(exp_dir):
    """Paths of checkpoints/0.pt, 1.pt, ... in order."""
    paths = [path for path in (exp_dir / "checkpoints").glob("*.pt") if path.stem.isdigit()]
    return sorted(paths, key=lambda path: int(path.stem))


def newest_checkpoint(exp_dir):
    """The content of the newest checkpoint that can be read, None if there is none at all.

    Says which ones it passed over, and makes last.pt whole again from the one it found. Raises RunError if there are
    some and none can be read.
    """
    last, previous = (exp_dir / "checkpoints" / name for name in ("last.pt", "previous.pt"))
    paths = [path for path in (last, previous) if path.exists()] + epoch_checkpoints(exp_dir)[::-1]
    for path in paths:
        try:
            content = load_checkpoint(path)
        except RunError as error:
            print(f"warning: {error}", file=sys.stderr)
            continue
        if path != last:
            save(last, content)
        return content
    if paths:
        raise RunError(f"no checkpoint in {exp_dir / 'checkpoints'} can be read; start over with train --no-resume")
    return None


def save_checkpoint(exp_dir, content):
    """Write checkpoints/last.pt, and at the end of an epoch the same as checkpoints/<epoch>.pt.

    So that there is always another: within an epoch what was last.pt stays as previous.pt.
    """
    metrics, folder = exp_dir / "metrics.jsonl", exp_dir / "checkpoints"
    content |= {"format": FORMAT, "metrics_bytes": metrics.stat().st_size if metrics.exists() else 0}
    if content["step"] == 0 and content["epoch"] > 0:
        save(folder / f"{content['epoch'] - 1}.pt", content)
        save(folder / "last.pt", content)
        if parallel.FIRST:
            (folder / "previous.pt").unlink(missing_ok=True)
    else:
        save(folder / "last.pt", content, keep=folder / "previous.pt")


def write_json(path, content):
    with replacing(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def read_json(path):
    """The content, {} if the file is missing or damaged: what it holds can be computed again."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def checksum(*tensors):
    """16 hexadecimal digits that change with any bit of the tensors, or their shapes or types."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
