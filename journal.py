"""What a run tells of itself beside its results: its launches and their environment, its metrics, its TensorBoard events."""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy
import PIL
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

import experiment
import parallel


def machine(device, precision):
    """What the figures of a run depend on beside its settings, a dict of plain values."""
    model = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())  # some ARM processors give none
        model = found[1] if found else platform.machine()
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "precision": precision,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
        "Pillow": PIL.__version__,
    }


def commit():
    """{"commit": of this program, "dirty": whether its files differ from that}, both None where git can't tell."""
    def git(*command):
        return subprocess.run(["git", "-C", Path(__file__).parent, *command], capture_output=True, text=True, check=True).stdout

    try:
        return {"commit": git("rev-parse", "HEAD").strip(), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def now():
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())


def read_launches(exp_dir):
    """The launches of a run, the last one last, as environment.json has them; [] if it is missing or damaged."""
    launches = experiment.read_json(exp_dir / "environment.json")
    return launches if isinstance(launches, list) and all(isinstance(launch, dict) for launch in launches) else []


def read_metrics(exp_dir):
    """The objects of metrics.jsonl, [] if there is none; a line that is not whole is left out."""
    path, rows = exp_dir / "metrics.jsonl", []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with suppress(ValueError):
            rows.append(json.loads(line))
    return rows


class Journal:
    """The journal of one launch of a run: environment.json, metrics.jsonl and the folder tensorboard.

    Nothing is written before `begin`, so that a launch that finds everything done leaves no trace. As a context manager it
    notes at the end how the launch ended. Of several processes the first one alone writes.
    """

    def __init__(self, exp_dir, hp, argv, device, precision):
        self.exp_dir, self.hp = exp_dir, hp
        self.board = None  # a SummaryWriter, False where there can be none
        self.launches = None  # until begin
        self.launch = {"command": shlex.join(["main.py", *argv]), **commit(), **machine(device, precision),
                       "processes": parallel.WORLD, "start": now(), "end": None, "outcome": None, "stages": [], "seconds": {},
                       "hparams": vars(hp)}  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if self.launches and error:
            self.launch |= {"end": now(), "outcome": " ".join(str(error).split())[:300] or kind.__name__}
            with suppress(OSError):  # of a full disk, say: the error that ended the launch is the one to tell
                self.write()
        if self.board:
            self.board.close()

    def begin(self, stage=None, metrics_bytes=None):
        """Note that the launch works on a stage, and cut metrics.jsonl off after so many bytes: what follows comes again."""
        if not parallel.FIRST:
            return
        if not self.launches:
            self.launches = [*read_launches(self.exp_dir), self.launch]
        self.launch["stages"] += [stage] if stage else []
        self.write()
        metrics = self.exp_dir / "metrics.jsonl"
        cut = metrics_bytes is not None and metrics.exists() and metrics.stat().st_size > metrics_bytes
        if cut:
            os.truncate(metrics, metrics_bytes)
        if self.hp.tensorboard and (cut or self.board is None):
            self.open_board()

    def finish(self, metrics_bytes, result, **values):
        """Note the result of the probe, {} for none, and how the launch went, unless all was done and noted before it."""
        launches = read_launches(self.exp_dir)
        if launches and launches[-1].get("outcome") == "finished":
            return
        self.begin(metrics_bytes=metrics_bytes)
        for epoch, (top1, top5) in enumerate(result.get("per_epoch", [])):
            self.add(probe_epoch=epoch, top1=top1, top5=top5)
        if result:
            self.add_result(result)
        self.launch |= {"end": now(), "outcome": "finished", **values}
        self.write()

    def write(self):
        experiment.write_json(self.exp_dir / "environment.json", self.launches)

    def add(self, **values):
        """A line of metrics.jsonl, a JSON object, and its numbers as TensorBoard scalars."""
        if not parallel.FIRST:
            return
        with open(self.exp_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        self.add_scalars(values)

    # ------------------------------------------------------------------------------------------ TensorBoard

    def open_board(self):
        """New event files, as metrics.jsonl and patches.png have it: so they show no step twice, whatever happened before."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            print("* No TensorBoard events: pip install tensorboard; metrics.jsonl has the same numbers", file=sys.stderr)
            self.board = False
            return
        if self.board:
            self.board.close()
        folder = self.exp_dir / "tensorboard"
        for path in folder.glob("events.*"):
            path.unlink()
        self.board = SummaryWriter(folder, purge_step=0, flush_secs=10)
        for row in read_metrics(self.exp_dir):
            self.add_scalars(row)
        if (self.exp_dir / "patches.png").exists():
            with Image.open(self.exp_dir / "patches.png") as picture:
                self.board.add_image("patches", torchvision.transforms.functional.pil_to_tensor(picture))

    def add_scalars(self, row):
        if not self.board:
            return
        stage, step = ("train", row["global_step"]) if "global_step" in row else ("probe", row["probe_epoch"])
        if "event" in row:
            self.board.add_text("changed", f"{row['name']}: {row['old']} -> {row['new']}", step)
            return
        for name in set(row) - {"epoch", "step", "global_step", "probe_epoch"}:
            self.board.add_scalar(f"{stage}/{name}", row[name], step)

    def add_result(self, result):
        """The hyperparameters beside the result, for the tab HPARAMS."""
        if not self.board:
            return
        from torch.utils.tensorboard.summary import hparams

        metrics = {f"result/{name}": result[name] for name in ("top1", "top5", "knn_top1")}
        plain = {name: "" if value is None else value for name, value in vars(self.hp).items()}
        for summary in hparams(plain, metrics):
            self.board.file_writer.add_summary(summary)
        for name, value in metrics.items():
            self.board.add_scalar(name, value, 0)
        self.board.flush()

    def add_embeddings(self, embeddings, images, names, n_dims=50):
        """Embeddings (n, d) and what they are of, uint8 images (n, 3, H, W) and a text each, for the tab PROJECTOR.

        Of the d dimensions the first n_dims principal components: as text all of them would be 50 MB for 1,000 images.
        """
        if not self.board:
            return
        x = embeddings - embeddings.mean(0)
        components = torch.linalg.svd(x, full_matrices=False).Vh[:n_dims]
        sprites = F.interpolate(images.float() / 255, size=(32, 32), mode="bilinear", antialias=True)
        (self.exp_dir / "tensorboard" / "projector_config.pbtxt").unlink(missing_ok=True)  # it would get a second entry
        self.board.add_embedding(x @ components.T, names, sprites, tag="test")
