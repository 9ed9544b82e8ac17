"""Run, a run folder: its paths, lock, checkpoints and cached stages, and what an edit allows."""

import csv
import io
import math
import os
import shlex
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch

from hparams import FIXED, from_dict, read_hparams, to_yaml, yaml_value
from images import folders
from infra import files
from infra.console import log
from infra.device import arithmetic, configure, pick_device, pick_precision
from infra.distributed import local_device, on_main_process, process_group
from infra.errors import RunError, UsageError
from infra.lock import is_locked, locked
from infra.metrics import Board, Journal, read_launches

# What a checkpoint holds. "state" is that of a train.TrainState.
CHECKPOINT = {
    "format",
    "hparams",
    "data",
    "encoder",
    "optimizer",
    "state",
    "metrics_bytes",
}


class Machine(NamedTuple):
    """Where a run computes, and in which precision."""

    device: torch.device
    bf16: bool

    @classmethod
    def of(cls, hp):
        """Resolve hp.device and hp.precision, and set torch's switches.

        Raises UsageError if the device is not there.
        """
        device = pick_device(local_device(hp.device))
        configure(device, hp.deterministic)
        return cls(device, pick_precision(hp.precision, device) == "bf16")

    @property
    def precision(self):
        return "bf16" if self.bf16 else "fp32"

    @property
    def arithmetic(self):
        """The precision in words, for the log."""
        return arithmetic(self.precision, self.device)


class Run:
    """A run folder. Every path in it is an attribute. Nothing is read or written until a call.

    `opened` and `load` set hp, machine and checkpoint (the newest one, or None).
    """

    def __init__(self, exp_dir):
        self.dir = Path(exp_dir)
        self.hparams_yaml = self.dir / "hparams.yaml"
        self.checkpoints = self.dir / "checkpoints"  # 0.pt, 1.pt, ...: the end of each epoch
        self.last = self.checkpoints / "last.pt"
        self.previous = self.checkpoints / "previous.pt"
        self.artifacts = {name: self.dir / "artifacts" / f"{name}.pt" for name in ("train", "test")}
        self.probe = self.dir / "probe.pt"
        self.result = self.dir / "linear_accuracy.json"
        self.metrics = self.dir / "metrics.jsonl"
        self.launches = self.dir / "environment.json"
        self.tensorboard = self.dir / "tensorboard"
        self.patches = self.dir / "patches.png"
        self.report = self.dir / "report.html"
        self.export = self.dir / "export"
        self.finetune = self.dir / "finetune"
        self.images_csv = self.dir / "images.csv"  # split, path and size of each image
        self.lock = self.dir / "lock"

    @property
    def device(self):
        """The torch.device of the run."""
        return self.machine.device

    @property
    def bf16(self):
        """Whether the network runs in bfloat16."""
        return self.machine.bf16

    def read_hparams(self):
        """Return the Hparams of hparams.yaml. Raises UsageError if it is missing or refused."""
        return read_hparams(self.hparams_yaml)

    def read_launches(self):
        """Return the launches of the run, the newest last; see infra.metrics."""
        return read_launches(self.launches)

    def in_use(self):
        """Whether a process works in the folder."""
        return is_locked(self.lock)

    @contextmanager
    def opened(self, hp, machine, launch, start_over=False):
        """Lock the folder, join the process group and load the newest checkpoint.

        launch: what the journal records. start_over: ignore what is in the folder; `prepare` moves
        it aside. Sets journal and changed, too. Raises RunError if another process has the lock, or
        training can't be written, and UsageError if the checkpoint does not allow what was edited.
        Only a damaged last.pt has been written by then.
        """
        self.hp = hp
        self.machine = machine
        self.start_over = start_over
        writable = os.access(self.dir, os.W_OK) or not self.dir.exists()
        with locked(self.lock) if writable else nullcontext(), process_group(self.device):
            self.checkpoint = None if start_over else self.newest_checkpoint(repair=writable)
            if not writable and not self.is_trained():
                raise RunError(
                    f"{self.dir} can't be written, and its training is not complete: make it "
                    f"writable, or copy it to another place"
                )
            self.changed = check_changes(hp, self.checkpoint, self.dir) if self.checkpoint else {}
            board = Board(self.tensorboard, self.patches) if hp.tensorboard else None
            launch = {**launch, "hparams": asdict(hp)}
            with Journal(launch, self.launches, self.metrics, board) as self.journal:
                yield self

    def load(self, device="auto"):
        """Read hparams.yaml and the newest checkpoint, and return the run. Nothing is written.

        device: takes the place of hp.device. Raises UsageError if there is no checkpoint, or
        hparams.yaml does not fit it, and RunError if none can be read.
        """
        self.hp = replace(self.read_hparams(), device=str(device))
        self.machine = Machine.of(self.hp)
        self.checkpoint = self.newest_checkpoint()
        if self.checkpoint is None:
            raise UsageError(f"{self.dir} has no checkpoint: there is no encoder yet")
        check_changes(self.hp, self.checkpoint, self.dir)
        if not self.is_trained():
            epoch, step = position(self.checkpoint)
            log.info(f"* Training is at epoch {epoch} step {step}, not at its end")
        return self

    @on_main_process
    def prepare(self, rewrite):
        """Make the folders, remove temporary files of a killed process, and write hparams.yaml.

        rewrite: write it even if there is one with other settings.
        """
        if self.start_over and any(path != self.lock for path in self.dir.iterdir()):
            log.info(f"* Moved the old run to {self.move_aside()}")
        for folder in (self.dir, self.checkpoints, self.artifacts["train"].parent):
            folder.mkdir(parents=True, exist_ok=True)
            files.remove_temporary(folder, keep=self.report.name)  # a report may be under way
        if not self.hparams_yaml.exists() or (rewrite and self.read_hparams() != self.hp):
            with files.atomic_write(self.hparams_yaml) as file:
                file.write(to_yaml(self.hp).encode())
        for name, (old, new) in self.changed.items():
            log.info(f"* {name} was {old}, from here on it is {new}")

    def move_aside(self):
        """Rename the locked folder to the next free NAME.oldN and return the new path.

        The lock stays at the old one.
        """
        n = 1
        while self.dir.with_name(f"{self.dir.name}.old{n}").exists():
            n += 1
        aside = self.dir.with_name(f"{self.dir.name}.old{n}")
        self.dir.rename(aside)
        self.dir.mkdir()
        (aside / self.lock.name).rename(self.lock)
        return aside

    def epoch_checkpoints(self):
        """Return the paths of 0.pt, 1.pt, ... in order."""
        paths = [path for path in self.checkpoints.glob("*.pt") if path.stem.isdecimal()]
        return sorted(paths, key=lambda path: int(path.stem))

    def newest_checkpoint(self, repair=False):
        """Return the newest checkpoint that can be read, None if there is no checkpoint.

        Warns of each one that can't be read. repair: write it as last.pt if it is another one.
        Raises RunError if there are checkpoints and none can be read.
        """
        paths = [path for path in (self.last, self.previous) if path.exists()]
        paths += reversed(self.epoch_checkpoints())
        for path in paths:
            try:
                content = load_checkpoint(path)
            except RunError as error:
                log.warning(error)
                continue
            if repair and path != self.last:
                files.write_pt(self.last, content)
            return content
        if paths:
            raise RunError(
                f"no checkpoint in {self.checkpoints} can be read; start over with train "
                f"--no-resume"
            )
        return None

    def save_checkpoint(self, content):
        """Write last.pt and, at the end of an epoch, the same as <epoch>.pt.

        `content` gets format and metrics_bytes. Another checkpoint always remains: within an
        epoch, the old last.pt becomes previous.pt.
        """
        metrics_bytes = self.metrics.stat().st_size if self.metrics.exists() else 0
        content |= {"format": files.FORMAT, "metrics_bytes": metrics_bytes}
        self.checkpoint = content
        epoch, step = position(content)
        if step == 0 and epoch > 0:
            path = self.checkpoints / f"{epoch - 1}.pt"
            files.write_pt(path, content)
            files.link(path, self.last)
            files.remove(self.previous)
        else:
            files.write_pt(self.last, content, keep=self.previous)

    def is_trained(self):
        """Whether training is complete."""
        if self.checkpoint is None:
            return False
        state = self.checkpoint["state"]
        return state["step"] >= n_steps_in(self.hp.n_epochs, state["n_steps"])

    @property
    def fingerprints(self):
        """The fingerprints of the images that the run was trained on, None before training."""
        return self.checkpoint["data"] if self.checkpoint else None

    @property
    def splits(self):
        """The names of the splits: train, and test if the data has one."""
        return [split for split in self.artifacts if self.fingerprints[split]]

    def images_moved(self):
        """Whether data_dir or labels, or the content of the labels file, changed since training."""
        if self.hp.dataset != "folder":
            return False
        before = self.checkpoint["hparams"]
        if (self.hp.data_dir, self.hp.labels) != (before["data_dir"], before["labels"]):
            return True
        launches = self.read_launches()
        recorded = launches[-1].get("labels_checksum") if launches else None
        return labels_checksum(self.hp) not in ("", recorded)

    def image_rows(self):
        """Return the folders.image_rows of today, [] if there is no folder. Raises UsageError."""
        root, labels = Path(self.hp.data_dir), self.hp.labels
        is_there = root.is_dir() and (not labels or os.path.isfile(labels))
        return folders.image_rows(root, labels) if self.hp.dataset == "folder" and is_there else []

    def write_images_csv(self):
        """List the images that were read, unless the file lists them already."""
        rows = self.image_rows()
        if rows and rows != self.read_images_csv():
            files.write_csv(self.images_csv, ("split", "path", "size"), rows)

    def read_images_csv(self):
        """Return the rows of images.csv, [] if it is missing or damaged."""
        try:
            text = self.images_csv.read_bytes().decode(errors="surrogateescape")
            return [(split, path, size) for split, path, size in csv.reader(io.StringIO(text))][1:]
        except (OSError, ValueError, csv.Error):
            return []

    def images_changed(self):
        """Return how the images differ from those that were read, and two ways on.

        By names and sizes. "" if they do not differ, or it is not known.
        """
        before = {path: size for _, path, size in self.read_images_csv()}
        if not before:
            return ""
        try:
            now = {path: size for _, path, size in self.image_rows()}
        except UsageError as error:
            text = str(error)
        else:
            n_changed = sum(before[path] != now[path] for path in before.keys() & now.keys())
            n_new, n_gone = len(now.keys() - before.keys()), len(before.keys() - now.keys())
            text = f"{n_new} new, {n_changed} changed, {n_gone} gone"
            if not now or now == before:
                return ""
        return f"{text}. {self.ways_on()}"

    def ways_on(self):
        """Return the commands for the images of today, as a sentence."""
        exp_dir, folder, weights = map(quote, (self.dir, self.hp.data_dir, self.last))
        return (
            f"Embed them with this run: `python main.py embed --exp_dir {exp_dir} --images "
            f"{folder} --out new.npz`; or train on from its weights: `python main.py train "
            f"--exp_name NEW --config_from {exp_dir} --weights {weights} --data_dir {folder}`"
        )

    def key(self, name):
        """Return what the result of a stage depends on: weights, images, settings, the split.

        name: that of a split, or probe.
        """
        if name in self.artifacts:
            return stage_key(self.hp, self.checkpoint, "encode", split=name)
        return stage_key(self.hp, self.checkpoint, name)

    def path_of(self, name):
        """Return the file of the result of a stage. name: that of a split, or probe."""
        return self.artifacts.get(name, self.probe)

    def cached(self, name, compute):
        """Return the stored result of a stage if its key fits, else compute() and store it."""
        return load_or_compute(self.path_of(name), self.key(name), compute)

    def write_result(self, result):
        """Write linear_accuracy.json, unless it holds the result already."""
        if files.read_json(self.result) != files.sealed(result):
            files.write_json(self.result, files.sealed(result))

    def read_result(self):
        """Return the result of the last launch.

        {} if it had none, or the file is missing, damaged or of another run.
        """
        launches = self.read_launches()
        result = files.read_sealed(self.result)
        matches = launches and launches[-1].get("result") == result.get("checksum")
        return result if matches else {}


def stage_key(hp, checkpoint, stage, split=None):
    """Return what a result depends on: weights, images, split, and all settings up to the stage."""
    weights = files.checksum(*checkpoint["encoder"].values())
    return {**hp.key(stage, weights), "data": checkpoint["data"], "split": split}


def load_or_compute(path, key, compute):
    """Return the content of a file that was stored with this key, else compute() and store it."""
    content = load_if_key(path, key, warn=True)
    if content is not None:
        log.info(f"* Loaded {path}")
        return content
    content = {**compute(), "key": key}
    files.write_pt(path, content)
    return content


def load_if_key(path, key, warn=False):
    """Return the content of a file that was stored with this key, else None.

    warn: print a warning if the file is damaged.
    """
    if not path.exists():
        return None
    try:
        content = files.read_pt(path)
    except (RunError, UsageError) as error:
        if warn:
            log.warning(f"{error}: doing it again")
        return None
    return content if content.get("key") == key else None


def labels_checksum(hp):
    """Return the checksum of the labels file, "" if there is none."""
    return files.file_checksum(hp.labels) if hp.labels else ""


def quote(path):
    """Return a path as a shell takes it."""
    return shlex.quote(str(path))


def load_checkpoint(path):
    """Return the content of a checkpoint, on the CPU.

    Raises RunError if it is damaged or another kind of file of this program.
    """
    content = files.read_pt(path)
    if set(content) != CHECKPOINT:
        raise RunError(f"{path} can't be used (it is not a checkpoint)")
    return content


def position(checkpoint):
    """Return (epoch, step within it) of a checkpoint."""
    state = checkpoint["state"]
    return divmod(state["step"], max(1, state["n_steps"]))


def n_steps_in(n_epochs, n_steps):
    """Return the number of steps in n_epochs epochs of n_steps each; n_epochs may be fractional."""
    n_steps = max(1, n_steps)  # an untrained run may have fewer images than bs
    return math.ceil(round(n_epochs * n_steps, 6))


def check_changes(hp, checkpoint, exp_dir):
    """Return {name: (old, new)} of the encoder settings that were edited since the checkpoint.

    Raises UsageError for a change that does not fit the weights, or comes too late for an effect.
    """
    old = from_dict(checkpoint["hparams"], "the checkpoint")
    for name, (was, now) in old.differences(hp, FIXED).items():
        raise UsageError(
            f"{name} is {yaml_value(now)}, but the weights in {exp_dir} were trained with {name} "
            f"{yaml_value(was)}: set it back, or train under a new --exp_name"
        )
    state = checkpoint["state"]
    n_total = n_steps_in(hp.n_epochs, state["n_steps"])
    if state["step"] > n_total:
        epoch, step = position(checkpoint)
        raise UsageError(
            f"n_epochs is {hp.n_epochs:g}, but training in {exp_dir} is at epoch {epoch} step "
            f"{step} already: raise it, or train under a new --exp_name"
        )
    changed = old.differences(hp, ("encoder",))
    is_finished = state["step"] == n_total
    for name, (was, now) in changed.items():
        if is_finished and name != "n_epochs":
            raise UsageError(
                f"{name} is {yaml_value(now)}, but training in {exp_dir} has finished with {name} "
                f"{yaml_value(was)}, so it would have no effect: set it back, raise n_epochs to "
                f"train on with it, or train under a new --exp_name"
            )
    return changed
