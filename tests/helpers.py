"""What the tests share: running the program, writing images, comparing run folders."""

import contextlib
import io
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import main
from infra import files

ROOT = Path(main.__file__).parent
RUN = "default__numpatch2_bs4_lr0.3"  # the name of the folder of a run with the arguments `tiny`
MEASURED = ("seconds", "patches_per_second", "peak_memory", "metrics_bytes", "checksum")
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]  # the module torchrun
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(*argv):
    """Call main.main in this process; return its exit code, stdout and unexpected stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main.main([str(arg) for arg in argv])
    return SimpleNamespace(code=code, out=out.getvalue(), err=unexpected(err.getvalue()))


def unexpected(err):
    """Return stderr without the warning of few steps, which the tests have."""
    few_steps = "^warning: .* steps of training in all: this teaches little.*\n"
    return re.sub(few_steps, "", err, flags=re.M)


def resume(exp_dir, options=""):
    """Call resume with these options, which are separated by spaces."""
    return run("resume", "--exp_dir", exp_dir, *options.split())


def trained_with(*changes, tiny, tmp_path):
    """Run the tiny experiment with these changes into tmp_path; assert that it finished."""
    result = run(*tiny, "--log_folder", tmp_path, *changes)
    assert result.code == 0, result.err
    return result


def refused(result, code, *words):
    """Assert that there is one line on stderr with these words, and this exit code."""
    assert result.code == code, result.err
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert "Traceback" not in result.err
    for word in words:
        assert str(word) in result.err, result.err
    return True


def write_images(folder, n, seed):
    """Write n PNG files of 16x16: stripes, in a direction by the folder's name, and noise."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for i in range(n):
        pixels = random.integers(0, 120, (16, 16, 3))
        stripes = (np.arange(16) // 2 % 2 * 120)[:, None, None]
        pixels += stripes if folder.name == "across" else stripes.transpose(1, 0, 2)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")


def pictures(n, height=32, width=32, seed=0, noise=0.1):
    """Return n images of smooth random colours and noise, uint8."""
    random = torch.Generator().manual_seed(seed)
    smooth = F.interpolate(
        torch.randn(n, 3, 4, 4, generator=random), size=(height, width), mode="bicubic"
    )
    x = 0.5 + 0.3 * smooth + noise * torch.randn(n, 3, height, width, generator=random)
    return x.clamp(0, 1).mul(255).round().to(torch.uint8)


def contents(exp_dir):
    """Return everything in a run folder but times and memory, comparable with ==: tensors as their
    bytes. environment.json and tensorboard/ record launches and times; their own tests read them.
    """

    def plain(value):
        if isinstance(value, torch.Tensor):
            return value.dtype, value.shape, files.checksum(value)
        if isinstance(value, dict):
            return {key: plain(v) for key, v in value.items() if key not in MEASURED}
        return [plain(v) for v in value] if isinstance(value, list) else value

    read = {
        ".pt": files.read_pt,
        ".json": files.read_json,
        ".jsonl": lambda path: [json.loads(line) for line in path.read_text().splitlines()],
    }
    values = {}
    for path in sorted(exp_dir.rglob("*")):
        journal = path.name == "environment.json" or "tensorboard" in path.parts
        if path.is_file() and not journal:
            value = read.get(path.suffix, Path.read_bytes)(path)
            values[str(path.relative_to(exp_dir))] = plain(value)
    return values


def training_lines(exp_dir):
    """Return the lines of metrics.jsonl that are of the training, not of the probe."""
    return [line for line in contents(exp_dir)["metrics.jsonl"] if "epoch" in line]


def fingerprints(exp_dir):
    """Return bytes and times of all files: equal only if nothing was written."""
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(exp_dir.rglob("*"))
        if path.is_file()
    }


def changed_files(exp_dir, before):
    """Return the names of the files that differ from those fingerprints.

    Those of the journal, which each launch writes, are left out.
    """
    after = fingerprints(exp_dir)
    changed = [path for path in after if before.get(path) != after[path]]
    names = {path.name for path in changed if "tensorboard" not in path.parts}
    return names - {"environment.json", "metrics.jsonl"}


def edit(exp_dir, **values):
    """Change lines of hparams.yaml as a user does in an editor."""
    path = exp_dir / "hparams.yaml"
    lines = path.read_text().splitlines()
    for name, value in values.items():
        index = next(i for i, line in enumerate(lines) if line.startswith(f"  {name}: "))
        lines[index] = f"  {name}: {value}"
    path.write_text("\n".join(lines) + "\n")


def os_error(code):
    """Return a function that raises OSError with this code, about its first argument."""

    def fail(path=None, *args, **options):
        raise OSError(code, os.strerror(code), path)

    return fail


def step_of(path):
    """Return the steps that a checkpoint has done, over all epochs."""
    return files.read_pt(path)["state"]["step"]
