"""What a run records beside its results: launches, metrics, TensorBoard events."""

import functools
import json
import os
import platform
import re
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import numpy
import PIL
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

from infra import files
from infra.components import principal_axes
from infra.console import PLAIN, log
from infra.distributed import WORLD_SIZE, on_main_process

# Keys of a line of metrics.jsonl that are not metrics.
POSITION = {"epoch", "step", "global_step", "probe_epoch"}


def environment(device, precision):
    """Return the hardware and software of a run, as a dict of plain values."""
    processor = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        match = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        processor = match[1] if match else platform.machine()  # some ARM processors have no name
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    versions = {
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
        "Pillow": PIL.__version__,
    }
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "device": name,
        "precision": precision,
        "python": platform.python_version(),
        **versions,
    }


def git_commit():
    """Return {"commit": of this program, "dirty": whether its files differ from it}.

    Both are None where the program is not the top level of a git repository.
    """
    try:
        commit = git_output("rev-parse", "HEAD")
        changes = git_output("status", "--porcelain")
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": bool(changes)}


def git_output(*arguments):
    """Return what a git command prints of the repository of this program, and of no outer one."""
    folder = Path(__file__).resolve().parents[1]
    command = ["git", "-C", folder, "--git-dir=.git", "--work-tree=.", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def now():
    """Return the time as a text, in UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())


def read_launches(path):
    """Return the launches of a run, the newest last, from its environment.json.

    Damaged ones are left out.
    """
    launches = files.read_json(path)
    if not isinstance(launches, list):
        return []
    return [launch for launch in launches if files.is_sealed(launch)]


def cut_lines(path, n_bytes):
    """Cut a file to n_bytes (None: leave its length) and to its last whole line.

    Return whether anything was cut.
    """
    try:
        with open(path, "rb") as file:
            lines = file.read(-1 if n_bytes is None else n_bytes)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return False
    keep = lines.rfind(b"\n") + 1
    if keep < len(lines):
        log.warning(f"{path} ends within a line, which is left out")
    if keep < size:
        os.truncate(path, keep)
    return keep < size


class Journal:
    """The record of one launch, in environment.json, metrics.jsonl and TensorBoard events.

    launch: a dict with what is known at the start. launches_path, metrics_path: the two files.
    board: a Board, or None. Nothing is written before `begin`, so a launch that finds everything
    done leaves no trace. As a context manager it records how the launch ended.
    """

    def __init__(self, launch, launches_path, metrics_path, board=None):
        self.launches_path = launches_path
        self.metrics_path = metrics_path
        self.board = board
        self.launches = None  # until begin
        self.launch = {
            **launch,
            "processes": WORLD_SIZE,
            "start": now(),
            "end": None,
            "outcome": None,
            "stages": [],
            "seconds": {},
        }

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if self.launches is not None and error:
            # A full disk, for example: the error that ended the launch is the one to report.
            with suppress(OSError):
                self.write(outcome=" ".join(str(error).split())[:300] or kind.__name__, end=now())
        if self.board:
            self.board.close()

    def write(self, **values):
        self.launch |= values
        files.write_json(self.launches_path, [*self.launches, files.sealed(self.launch)])

    @on_main_process
    def begin(self, stage=None, metrics_bytes=None):
        """Record that the launch works on a stage.

        Cut metrics.jsonl to metrics_bytes first: later lines are written again.
        """
        if self.launches is None:
            self.launches = read_launches(self.launches_path)
        self.write(stages=self.launch["stages"] + [stage] * bool(stage))
        cut = cut_lines(self.metrics_path, metrics_bytes)
        if self.board and (cut or not self.board.is_open):
            self.board.open(files.read_jsonl(self.metrics_path))

    @on_main_process
    def finish(self, metrics_bytes, result, seconds, collapse, data):
        """Record how the launch ended, unless an earlier one ended with the same result.

        result: that of the probe, {} if there is none. seconds: per stage. collapse: the collapse
        metrics. data: the fingerprints of the images.
        """
        checksum = files.sealed(result)["checksum"] if result else None
        launches = read_launches(self.launches_path)
        last = launches[-1] if launches else {}
        if last.get("outcome") == "finished" and last.get("result") == checksum:
            return
        self.begin(metrics_bytes=metrics_bytes)
        for epoch, (top1, top5) in enumerate(result.get("per_epoch", [])):
            self.add(probe_epoch=epoch, top1=top1, top5=top5)
        if result and self.board:
            self.board.add_result(self.launch["hparams"], result)
        self.write(
            outcome="finished",
            end=now(),
            seconds=seconds,
            collapse=collapse,
            data=data,
            result=checksum,
            metrics=files.file_checksum(self.metrics_path),
        )

    @on_main_process
    def add(self, **values):
        """Append a line to metrics.jsonl, a JSON object. TensorBoard shows its numbers."""
        with open(self.metrics_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        if self.board:
            self.board.add_line(values)


def read_png(path):
    """Return the PIL image of a PNG file, None if there is none or it is damaged."""
    try:
        with open(path, "rb") as file:
            image = Image.open(file, formats=("PNG",))
            image.load()
            return image
    except Exception:  # Pillow raises nearly anything on a damaged file
        return None


def decoration(method):
    """Decorate a method of Board: an error in it is a warning, and no events follow.

    A run does not stop for its TensorBoard.
    """

    @functools.wraps(method)
    def guarded(self, *args):
        try:
            return method(self, *args)
        except Exception as error:
            log.warning(f"no more TensorBoard events: {' '.join(str(error).split())[:200]}")
            self.writer = None

    return guarded


class Board:
    """TensorBoard events in a folder, drawn from the lines of metrics.jsonl.

    picture: a PNG file, which is shown too if it exists. Without the package tensorboard, and after
    an error, each method does nothing.
    """

    def __init__(self, folder, picture):
        self.folder = folder
        self.picture = picture
        self.writer = None
        self.is_open = False

    @decoration
    def open(self, lines):
        """Write the events anew from the lines, so that they show no step twice."""
        self.is_open = True
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            log.warning(
                "* No TensorBoard events: pip install tensorboard; metrics.jsonl has the same "
                "numbers",
                extra=PLAIN,
            )
            return
        self.close()
        for path in self.folder.glob("events.*"):
            path.unlink()
        self.writer = SummaryWriter(self.folder, purge_step=0, flush_secs=10)
        for line in lines:
            self.add_line(line)
        picture = read_png(self.picture)
        if picture:
            pixels = torchvision.transforms.functional.pil_to_tensor(picture)
            self.writer.add_image(self.picture.stem, pixels)

    @decoration
    def close(self):
        if self.writer:
            self.writer.close()

    @decoration
    def add_line(self, line):
        """Show the numbers of a line of metrics.jsonl as scalars, or a changed setting as text."""
        stage = "train" if "global_step" in line else "probe"
        step = line.get("global_step", line.get("probe_epoch"))
        if not self.writer or not isinstance(step, int):
            return
        if "event" in line:
            text = f"{line.get('name')}: {line.get('old')} -> {line.get('new')}"
            self.writer.add_text("changed", text, step)
            return
        for name in set(line) - POSITION:
            if isinstance(line[name], (int, float)):
                self.writer.add_scalar(f"{stage}/{name}", line[name], step)

    @decoration
    def add_result(self, hparams, result):
        """Show the accuracies, also beside the hyperparameters in the tab HPARAMS."""
        if not self.writer:
            return
        from torch.utils.tensorboard.summary import hparams as summaries

        metrics = {f"result/{name}": result[name] for name in ("top1", "top5", "knn_top1")}
        values = {name: "" if value is None else value for name, value in hparams.items()}
        for summary in summaries(values, metrics):
            self.writer.file_writer.add_summary(summary)
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, 0)
        self.writer.flush()

    @decoration
    def add_embeddings(self, split, embeddings, images, names, n_dims=50):
        """Show embeddings (n, d) of a split in the tab PROJECTOR.

        images: uint8 (n, 3, H, W). names: one for each. Only the first n_dims principal components
        are shown: TensorBoard stores text, and 1,000 x 4,096 numbers would be 50 MB.
        """
        if not self.writer:
            return
        x = embeddings - embeddings.mean(0)
        sprites = F.interpolate(
            images.float() / 255, size=(32, 32), mode="bilinear", antialias=True
        )
        (self.folder / "projector_config.pbtxt").unlink(
            missing_ok=True
        )  # add_embedding appends to it
        self.writer.add_embedding(x @ principal_axes(x, n_dims), names, sprites, tag=split)
