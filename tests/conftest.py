import contextlib
import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import experiment
import main

ROOT = Path(main.__file__).parent
sys.path.insert(0, str(ROOT / "benchmarks"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are about the CPU; subprocesses inherit it


def write_images(folder, n, seed):
    """n PNG files of 16x16 in folder: stripes whose direction depends on the folder's name, and noise."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for i in range(n):
        pixels = random.integers(0, 120, (16, 16, 3))
        stripes = (np.arange(16) // 2 % 2 * 120)[:, None, None]
        pixels += stripes if folder.name == "across" else stripes.transpose(1, 0, 2)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """The cache folder: not the user's own."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    return Path(os.environ["XDG_CACHE_HOME"], "emp-ssl")


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A data set in train/<class> and test/<class>: 24 training and 10 test images of two classes."""
    root = tmp_path_factory.mktemp("images")
    for seed, (split, n) in enumerate((("train", 12), ("test", 5))):
        for name in ("across", "down"):
            write_images(root / split / name, n, 2 * seed + len(name))
    return root


@pytest.fixture(scope="session")
def tiny(images):
    """The arguments of a run of twelve steps that takes about a second; a checkpoint at each step."""
    return (
        "train --dataset folder --image_size 16 --arch resnet18-tiny --h_dim 8 --z_dim 4 --n_patches 2 --bs 4 --n_epochs 2 "
        "--n_eval_epochs 3 --print_freq 4 --checkpoint_every 0 --device cpu --precision fp32"
    ).split() + ["--data_dir", str(images)]


RUN = "default__numpatch2_bs4_lr0.3"  # the name of its folder


def run(*argv):
    """main.main in this process: its exit code, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main.main([str(arg) for arg in argv])
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory):
    """The folder of such a run, undisturbed. Tests look at it and copy it, and change nothing in it."""
    logs = tmp_path_factory.mktemp("finished")
    result = run(*tiny, "--log_folder", logs)
    assert result.code == 0, result.err
    return logs / RUN


@pytest.fixture(scope="session")
def small_checkpoints(finished, tmp_path_factory):
    """A folder with last.pt and previous.pt of steps 3 and 2, a few kB each."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "checkpoints").mkdir()
    content = experiment.load(finished / "checkpoints" / "0.pt")
    content["encoder"] = {"weight": torch.randn(20, 20)}
    content["optimizer"] = {0: {"momentum_buffer": torch.randn(20, 20)}}
    for step in (2, 3):
        experiment.save_checkpoint(folder, {**content, "step": step})
    return folder


MEASURED = ("seconds", "patches_per_second", "peak_memory", "metrics_bytes")


def contents(exp_dir):
    """Everything in a run folder but times and memory, comparable with ==: tensors as their bytes. environment.json and
    tensorboard/ tell of launches and times: their own tests read them."""

    def plain(value):
        if isinstance(value, torch.Tensor):
            return value.dtype, value.shape, experiment.checksum(value)
        if isinstance(value, dict):
            return {key: plain(v) for key, v in value.items() if key not in MEASURED}
        return [plain(v) for v in value] if isinstance(value, list) else value

    read = {
        ".pt": experiment.load,
        ".json": experiment.read_json,
        ".jsonl": lambda path: [json.loads(line) for line in path.read_text().splitlines()],
    }
    files = sorted(path for path in exp_dir.rglob("*") if path.is_file())
    files = [path for path in files if path.name != "environment.json" and "tensorboard" not in path.parts]
    return {str(path.relative_to(exp_dir)): plain(read.get(path.suffix, Path.read_bytes)(path)) for path in files}


def training_lines(exp_dir):
    """The lines of metrics.jsonl that are of the training, not of the probe."""
    return [line for line in contents(exp_dir)["metrics.jsonl"] if "epoch" in line]


def fingerprints(exp_dir):
    """Bytes and times of all files: equal only if nothing was written."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(exp_dir.rglob("*")) if path.is_file()}


def changed_files(exp_dir, before):
    """Names of the files that differ from those fingerprints, in bytes or times; the journal's, in each launch, left out."""
    ours = {path: value for path, value in fingerprints(exp_dir).items() if "tensorboard" not in path.parts}
    return {path.name for path, value in ours.items() if before.get(path) != value} - {"environment.json", "metrics.jsonl"}


def edit(exp_dir, **values):
    """Change lines of hparams.yaml as a user does in an editor."""
    path = exp_dir / "hparams.yaml"
    lines = path.read_text().splitlines()
    for name, value in values.items():
        index = next(i for i, line in enumerate(lines) if line.startswith(f"  {name}: "))
        lines[index] = f"  {name}: {value}"
    path.write_text("\n".join(lines) + "\n")


def pytest_addoption(parser):
    parser.addoption("--runs", type=int, default=20, help="kills of test_chaos.py")
