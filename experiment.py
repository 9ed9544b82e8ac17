"""Run, a run folder: its paths, checkpoints and cached stages, and the check of edited settings."""

import math
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from hparams import FIXED, from_dict, read_hparams, to_yaml, yaml_value
from infra import files
from infra.console import log
from infra.distributed import on_main_process, process_group
from infra.errors import RunError, UsageError
from infra.lock import is_locked, locked
from infra.metrics import Board, Journal, read_launches

# What a checkpoint holds; see train.save_checkpoint. "state" is that of a train.TrainState.
CHECKPOINT = {"format": int, "hparams": dict, "data": dict, "encoder": dict, "optimizer": dict, "state": dict,
              "metrics_bytes": int}  # fmt: skip
STATE = {
    "n_steps": int, "step": int, "totals": torch.Tensor, "n_totals": int, "recent": torch.Tensor, "seconds": float,
    "peak_memory": int,
}  # fmt: skip


class Run:
    """A run folder. Every path in it is an attribute. Nothing is read or written until a method is called.

    `opened` holds the lock and sets hp, journal, checkpoint (the newest one, or None) and changed.
    """

    def __init__(self, exp_dir):
        self.dir = Path(exp_dir)
        self.hparams_yaml = self.dir / "hparams.yaml"
        self.checkpoints = self.dir / "checkpoints"  # 0.pt, 1.pt, ...: the end of each epoch
        self.last = self.checkpoints / "last.pt"
        self.previous = self.checkpoints / "previous.pt"
        self.artifacts = {split: self.dir / "artifacts" / f"{split}.pt" for split in ("train", "test")}
        self.probe = self.dir / "probe.pt"
        self.result = self.dir / "linear_accuracy.json"
        self.metrics = self.dir / "metrics.jsonl"
        self.launches = self.dir / "environment.json"
        self.tensorboard = self.dir / "tensorboard"
        self.patches = self.dir / "patches.png"
        self.report = self.dir / "report.html"
        self.export = self.dir / "export"
        self.finetune = self.dir / "finetune"
        self.lock = self.dir / "lock"

    def read_hparams(self):
        """Return the Hparams of hparams.yaml. Raises UsageError if it is missing or not allowed."""
        return read_hparams(self.hparams_yaml)

    def read_launches(self):
        """Return the launches of the run, the newest last; see infra.metrics."""
        return read_launches(self.launches)

    def in_use(self):
        """Whether a process works in the folder."""
        return is_locked(self.lock)

    @contextmanager
    def opened(self, hp, launch, device, start_over=False):
        """Lock the folder, join the process group and load the newest checkpoint. launch: what the journal records.

        start_over: ignore what is in the folder; `prepare` moves it aside. Raises RunError if another process has the lock,
        and UsageError if the checkpoint does not allow what was edited. Only a damaged last.pt has been written by then.
        """
        self.hp, self.start_over = hp, start_over
        with locked(self.lock), process_group(device):
            self.checkpoint = None if start_over else self.newest_checkpoint(repair=True)
            self.changed = check_changes(hp, self.checkpoint) if self.checkpoint else {}
            board = Board(self.tensorboard, self.patches) if hp.tensorboard else None
            with Journal({**launch, "hparams": asdict(hp)}, self.launches, self.metrics, board) as self.journal:
                yield self

    @on_main_process
    def prepare(self, rewrite):
        """Make the folders, remove half-written files of a killed process, and write hparams.yaml if there is none.

        rewrite: write it also if it has other settings.
        """
        if self.start_over and any(path != self.lock for path in self.dir.iterdir()):
            log.info(f"* Moved the old run to {self.move_aside()}")
        for folder in (self.dir, self.checkpoints, self.artifacts["train"].parent):
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob("*.tmp"):
                if not leftover.name.startswith(self.report.name) and not leftover.is_dir():  # a report may be under way
                    leftover.unlink()
        if not self.hparams_yaml.exists() or (rewrite and self.read_hparams() != self.hp):
            with files.atomic_write(self.hparams_yaml) as file:
                file.write(to_yaml(self.hp).encode())
        for name, (old, new) in self.changed.items():
            log.info(f"* {name} was {old}, from here on it is {new}")

    def move_aside(self):
        """Rename the locked folder to the next free NAME.oldN and return the new path. The lock stays at the old one."""
        aside = next(path for n in range(1, 10**6) if not (path := self.dir.with_name(f"{self.dir.name}.old{n}")).exists())
        self.dir.rename(aside)
        self.dir.mkdir()
        (aside / self.lock.name).rename(self.lock)
        return aside

    def epoch_checkpoints(self):
        """Return the paths of 0.pt, 1.pt, ... in order."""
        paths = [path for path in self.checkpoints.glob("*.pt") if path.stem.isdecimal()]
        return sorted(paths, key=lambda path: int(path.stem))

    def newest_checkpoint(self, repair=False):
        """Return the content of the newest checkpoint that can be read, None if there is no checkpoint.

        Warns of each one that can't be read. repair: write the one that was found as last.pt. Raises RunError if there are
        checkpoints and none can be read.
        """
        paths = [path for path in (self.last, self.previous) if path.exists()] + self.epoch_checkpoints()[::-1]
        for path in paths:
            try:
                content = load_checkpoint(path)
            except RunError as error:
                log.warning(error)
                continue
            if repair and path != self.last:
                files.save(self.last, content)
            return content
        if paths:
            raise RunError(f"no checkpoint in {self.checkpoints} can be read; start over with train --no-resume")
        return None

    def save_checkpoint(self, content):
        """Write last.pt and, at the end of an epoch, the same as <epoch>.pt. `content` gets format and metrics_bytes.

        Another checkpoint always remains: within an epoch, the old last.pt becomes previous.pt.
        """
        content |= {"format": files.FORMAT, "metrics_bytes": self.metrics.stat().st_size if self.metrics.exists() else 0}
        self.checkpoint = content
        epoch, step = position(content)
        if step == 0 and epoch > 0:
            files.save(self.checkpoints / f"{epoch - 1}.pt", content)
            files.link(self.checkpoints / f"{epoch - 1}.pt", self.last)
            files.remove(self.previous)
        else:
            files.save(self.last, content, keep=self.previous)

    def is_trained(self):
        """Whether training is complete."""
        return self.checkpoint is not None and is_trained(self.hp, self.checkpoint)

    @property
    def fingerprints(self):
        """The fingerprints of the images that the run was trained on, None before training."""
        return self.checkpoint["data"] if self.checkpoint else None

    @property
    def splits(self):
        """The names of the splits: train, and test if the data has one."""
        return [split for split in self.artifacts if self.fingerprints[split]]

    def images_moved(self):
        """Whether data_dir or labels differ from the checkpoint's, or the content of labels from that of the last launch."""
        before, launches, labels = self.checkpoint["hparams"], self.read_launches(), labels_checksum(self.hp)
        moved = (self.hp.data_dir, self.hp.labels) != (before["data_dir"], before["labels"])
        changed = labels not in ("", launches[-1].get("labels_checksum") if launches else None)
        return self.hp.dataset == "folder" and (moved or changed)

    def key(self, stage, split=None):
        """Return the cache key of a stage, for one split or for the probe; see stage_key."""
        return stage_key(self.hp, self.checkpoint, stage, split)

    def cached(self, path, key, compute):
        """Return the content of the file if it is whole and was computed with this key; else compute() and write it."""
        content = self.load_cached(path, key)
        if content is None:
            content = {**compute(), "key": key}
            files.save(path, content)
        return content

    def load_cached(self, path, key):
        if not path.exists():
            return None
        try:
            content = files.load(path)
        except (RunError, UsageError) as error:
            log.warning(f"{error}: doing it again")
            return None
        if content.get("key") != key:
            return None
        log.info(f"* Loaded {path}")
        return content

    def write_result(self, result):
        """Write linear_accuracy.json, unless it holds the result already."""
        if files.read_json(self.result) != files.sealed(result):
            files.write_json(self.result, files.sealed(result))

    def read_result(self):
        """Return the result of the last launch, {} if it had none or the file is missing, damaged or of another run."""
        launches, result = self.read_launches(), files.read_sealed(self.result)
        return result if launches and launches[-1].get("result") == result.get("checksum") else {}


def stage_key(hp, checkpoint, stage, split=None):
    """Return what a result depends on, as a dict: weights, images, split, and all settings up to the stage."""
    weights = files.checksum(*checkpoint["encoder"].values())
    return {**hp.key(stage, weights), "data": checkpoint["data"], "split": split}


def labels_checksum(hp):
    """Return the checksum of the labels file, "" if there is none."""
    return files.file_checksum(Path(hp.labels).resolve()) if hp.labels else ""


def load_checkpoint(path):
    """Return the content of a checkpoint, on the CPU. Raises RunError if it is damaged or not what training writes: other
    types, weights or momenta that are not finite, negative counts, hyperparameters that are not allowed."""
    content = files.load(path)
    try:
        check_types(content, CHECKPOINT)
        check_types(content["state"], STATE)
        from_dict(content["hparams"], "hparams")
        state, buffers = content["state"], [value for entry in content["optimizer"].values() for value in entry.values()]
        tensors = [*content["encoder"].values(), *buffers, state["totals"], state["recent"]]
        if not all(content["optimizer"].values()) or not all(tensor.isfinite().all() for tensor in tensors):
            raise ValueError("no momenta, or a number that is not finite")
        if state["totals"].shape != (3,) or state["recent"].shape != (len(state["recent"]), 3):
            raise ValueError("tensors of other shapes")
        if set(content["data"]) != {"train", "test", "class_names"}:
            raise ValueError("other data")
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError, UsageError) as error:
        raise RunError(f"{path} can't be used ({str(error)[:200]})") from None
    return content


def check_types(values, kinds):
    """Raise ValueError unless a dict has these keys with values of these types and no negative whole numbers."""
    if set(values) != set(kinds) or not all(isinstance(values[name], kind) for name, kind in kinds.items()):
        raise ValueError("not what a checkpoint holds")
    if min(values[name] for name, kind in kinds.items() if kind is int) < 0:
        raise ValueError("a negative count")


def position(checkpoint):
    """Return (epoch, step within it) of a checkpoint."""
    return divmod(checkpoint["state"]["step"], max(1, checkpoint["state"]["n_steps"]))


def n_steps_in(n_epochs, n_steps):
    """Return the number of steps in n_epochs epochs of n_steps each; n_epochs need not be whole."""
    return math.ceil(round(n_epochs * max(1, n_steps), 6))  # n_steps is 0 if an untrained run has fewer images than bs


def is_trained(hp, checkpoint):
    """Whether a checkpoint is at the end of the training that hp asks for."""
    return checkpoint["state"]["step"] >= n_steps_in(hp.n_epochs, checkpoint["state"]["n_steps"])


def check_changes(hp, checkpoint):
    """Return {name: (old, new)} of the encoder settings that were edited since the checkpoint.

    Raises UsageError for a change that does not fit the weights, or that comes too late to have an effect.
    """
    old = from_dict(checkpoint["hparams"], "the checkpoint")
    for name, (was, now) in old.differences(hp, FIXED).items():
        raise UsageError(
            f"{name} is {yaml_value(now)}, but the weights in this folder were trained with {name} {yaml_value(was)}: "
            f"set it back, or train under a new --exp_name"
        )
    if checkpoint["state"]["step"] > n_steps_in(hp.n_epochs, checkpoint["state"]["n_steps"]):
        epoch, step = position(checkpoint)
        raise UsageError(
            f"n_epochs is {hp.n_epochs:g}, but training is at epoch {epoch} step {step} already: "
            f"raise it, or train under a new --exp_name"
        )
    changed = old.differences(hp, ("encoder",))
    for name, (was, now) in changed.items() if is_trained(hp, checkpoint) else ():
        if name != "n_epochs":
            raise UsageError(
                f"{name} is {yaml_value(now)}, but training has finished with {name} {yaml_value(was)}, so it would have "
                f"no effect: set it back, raise n_epochs to train on with it, or train under a new --exp_name"
            )
    return changed
