"""Random faults in random files of a finished run, then a random command.

    python -m pytest tests/stress/test_campaign.py --runs 700        # three rounds a run

After each round: the exit code is 0, 1 or 2; an error is one line that names the folder; nothing
hangs; no file is gone that no command was asked to remove; and each accuracy that is shown is that
of the undisturbed run.
"""

import errno
import os
import random
import re
import shutil
import signal

import numpy as np
import pytest
from helpers import contents, run
from PIL import Image

from experiment import Run
from infra import files
from infra.errors import UsageError

SETTINGS = (
    "--dataset folder --image_size 16 --arch resnet10-tiny --h_dim 8 --z_dim 4 --n_patches 2 "
    "--bs 8 --n_epochs 2 --n_eval_epochs 3 --emb_pool proj --eval_lr 1 --print_freq 4 "
    "--device cpu --precision fp32"
).split()
COMMANDS = "resume train report compare export embed cleanup probe finetune".split()
FINETUNE = "--n_epochs 1 --bs 12 --no-from_scratch".split()
ON_CPU = ["--device", "cpu"]
SECONDS = 30  # after which a command counts as hanging


def striped(folder, n, seed):
    """Write n images for each of two classes: stripes across or down, with more noise."""
    generator = np.random.default_rng(seed)
    stripes = (np.arange(16) // 2 % 2 * 50)[:, None, None]
    for split in ("train", "test"):
        for name, pattern in (("across", stripes), ("down", stripes.transpose(1, 0, 2))):
            (folder / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = generator.integers(0, 200, (16, 16, 3)) + pattern
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two finished runs with the same settings and other images, {"own" or "foreign": folder}."""
    made = {}
    for seed, name in enumerate(("own", "foreign")):
        root = tmp_path_factory.mktemp(name)
        images = striped(root / "images", 20, seed)
        result = run("train", *SETTINGS, "--data_dir", images, "--log_folder", root / "logs")
        assert result.code == 0, result.err
        (made[name],) = (root / "logs").iterdir()
    own, foreign = (top1(made[name]) for name in ("own", "foreign"))
    assert own != foreign
    assert 0 < own < 100
    return made


def top1(exp_dir):
    return files.read_json(exp_dir / "linear_accuracy.json")["top1"]


def flip(path, choose, foreign):
    content = bytearray(path.read_bytes())
    for _ in range(choose.choice((1, 1, 3, 100))):
        content[choose.randrange(len(content))] ^= 1 << choose.randrange(8)
    path.write_bytes(content)


def change_a_digit(path, choose, foreign):
    content = bytearray(path.read_bytes())
    digits = [i for i, byte in enumerate(content) if 48 <= byte <= 57]
    content[choose.choice(digits or [0])] = choose.choice(b"0123456789")
    path.write_bytes(content)


def truncate(path, choose, foreign):
    os.truncate(path, choose.randrange(path.stat().st_size))


def empty(path, choose, foreign):
    os.truncate(path, 0)


def lose(path, choose, foreign):
    path.unlink()


def junk(path, choose, foreign):
    texts = [b"\0" * 100, b"[" * 10**5, b'{"a": 1}\n', b"\xff\xfe", b"null", b"[1]"]
    path.write_bytes(choose.choice([*texts, choose.randbytes(5000)]))


def copy_foreign(path, choose, foreign):
    if foreign.exists():
        shutil.copyfile(foreign, path)


def copy_sibling(path, choose, foreign):
    """Replace it by another file of the same folder."""
    siblings = [file for file in path.parent.iterdir() if file.is_file() and file != path]
    if siblings:
        content = choose.choice(siblings).read_bytes()
        path.unlink()
        path.write_bytes(content)


def instead(make):
    """Return a fault that replaces the file by what `make` creates."""

    def fault(path, choose, foreign):
        path.unlink()
        make(path)

    fault.__name__ = make.__name__
    return fault


def folder(path):
    path.mkdir()
    (path / "file").write_text("kept")


def loop(path):
    path.symlink_to(path.name)


def link(path):
    """A link to a file outside, which must stay as it is."""
    outside = path.parents[2] / "outside"
    outside.write_text("kept")
    path.symlink_to(outside)


FAULTS = (
    flip,
    change_a_digit,
    truncate,
    empty,
    lose,
    junk,
    copy_foreign,
    copy_sibling,
    *map(instead, (folder, loop, link)),
)


def full_disk(n):
    """Return a replacement of os.fsync that fails from its n-th call on."""
    left = [n]

    def fsync(number):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return fsync


def command_line(name, exp_dir):
    images = exp_dir.parents[1] / "images"
    logs = exp_dir.parent
    run_folder = ["--exp_dir", exp_dir]
    return {
        "resume": ["resume", *run_folder],
        "train": ["train", *SETTINGS, "--data_dir", images, "--log_folder", logs],
        "report": ["report", *run_folder],
        "compare": ["compare", logs],
        "export": ["export", *run_folder, "--format", "torchvision"],
        "embed": ["embed", *run_folder, "--images", images, "--out", logs / "out.npz", *ON_CPU],
        "cleanup": ["cleanup", "--log_folder", logs, "--keep", 1, "-y"],
        "probe": ["probe", *run_folder, "--label_fractions", 1, *ON_CPU],
        "finetune": ["finetune", *run_folder, *FINETUNE, *ON_CPU],
    }[name]


def accuracies_in(name, result, exp_dir):
    """Return the accuracies of the linear probe that a command showed."""
    if name in ("resume", "train"):
        return re.findall(r"linear probe     top-1 ([\d.]+)%", result.out)
    if name == "report" and (exp_dir / "report.html").is_file():
        return re.findall(r'"number">([\d.]+)%', (exp_dir / "report.html").read_text())
    if name == "probe":
        return re.findall(r"labels  top-1 ([\d.]+)%", result.out)
    if name == "compare" and "  top1  " in result.out:
        header, row = result.out.splitlines()[:2]
        return [row[header.index("top1") :].split()[0]]
    return []


def same_settings(exp_dir, other):
    """Whether hparams.yaml, which a fault may have edited, has the other run's settings.

    True if it can't be read.
    """
    try:
        return not Run(exp_dir).read_hparams().differences(Run(other).read_hparams())
    except UsageError:
        return True


def timed_out(signum, frame):
    raise TimeoutError(f"more than {SECONDS} seconds")


def carry_out(seed, runs, folder, monkeypatch):
    """Do one round in the folder; return (its faults and command, what was wrong or "")."""
    choose = random.Random(seed)
    shutil.copytree(runs["own"].parents[1] / "images", folder / "images")
    exp_dir = shutil.copytree(runs["own"], folder / "logs" / runs["own"].name)
    hparams = exp_dir / "hparams.yaml"  # with the images of this folder
    hparams.write_text(hparams.read_text().replace(str(runs["own"].parents[1]), str(folder)))
    done = []
    for _ in range(choose.choice((1, 1, 2))):
        paths = sorted(path for path in exp_dir.rglob("*") if path.is_file())
        path = choose.choice([path for path in paths if not path.is_symlink()])
        fault = choose.choice(FAULTS)
        if path.stat().st_size and path.name != "file":
            fault(path, choose, runs["foreign"] / path.relative_to(exp_dir))
            done.append(f"{fault.__name__} {path.relative_to(exp_dir)}")
    before = {path for path in exp_dir.rglob("*") if os.path.lexists(path)}
    name = choose.choice(COMMANDS)
    settled = same_settings(exp_dir, runs["own"])
    if choose.random() < 0.1:
        monkeypatch.setattr(os, "fsync", full_disk(choose.randrange(4)))
        done.append("full disk")
    signal.alarm(SECONDS)
    try:
        result = run(*command_line(name, exp_dir))
    finally:
        signal.alarm(0)
        monkeypatch.undo()
    what = wrong(name, result, exp_dir, before, runs["own"], settled)
    return f"{seed}: {', '.join(done)}, then {name}", what


def removed_by_mistake(name, exp_dir, before):
    """Return the paths that are gone and that the command was not asked to remove."""
    removable = "checkpoints/previous.pt|tensorboard/.*"
    if name == "cleanup":
        removable = "checkpoints/[01].pt"
    gone = [str(path.relative_to(exp_dir)) for path in before if not os.path.lexists(path)]
    return [path for path in gone if not re.fullmatch(removable, path)]


def wrong(name, result, exp_dir, before, own, settled):
    """Return what is wrong after a round, "" if all is as it must be."""
    errors = [line for line in result.err.splitlines() if not line.startswith("warning: ")]
    gone = removed_by_mistake(name, exp_dir, before)
    outside = exp_dir.parent / "outside"
    truth = f"{top1(own):.2f}"
    if result.code not in (0, 1, 2):
        return f"exit code {result.code}"
    named = str(exp_dir.parents[1]) in result.err or "no space left" in result.err
    if len(errors) != (result.code != 0) or (result.code and not named):
        return f"exit code {result.code}, stderr: {result.err}"
    if re.search("--debug shows|Traceback|TimeoutError", result.err):
        return result.err
    if gone:
        return f"gone: {gone}"
    if outside.exists() and outside.read_text() != "kept":
        return "a file outside was written"
    shown = accuracies_in(name, result, exp_dir)
    numbers = [value for value in shown if re.fullmatch(r"[\d.]+", value)]
    if settled and any(value != truth for value in numbers):
        return f"shown: {shown}, not {truth}"
    if settled and name in ("resume", "train") and result.code == 0:
        return "" if embeddings_of(exp_dir) == embeddings_of(own) else "other embeddings"
    return ""


def embeddings_of(exp_dir):
    return [
        files.checksum(files.read_pt(exp_dir / "artifacts" / f"{split}.pt")["embeddings"])
        for split in ("train", "test")
    ]


def test_any_fault_is_repaired_or_named(runs, tmp_path, monkeypatch, request):
    monkeypatch.setattr(signal, "signal", signal.signal)
    old = signal.signal(signal.SIGALRM, timed_out)
    n = 3 * request.config.getoption("--runs")
    failures = []
    try:
        for seed in range(n):
            folder = tmp_path / str(seed)
            done, what = carry_out(seed, runs, folder, monkeypatch)
            if what:
                failures.append(f"{done} -> {what}")
            shutil.rmtree(folder)
    finally:
        signal.signal(signal.SIGALRM, old)
    assert not failures, f"{len(failures)} of {n} rounds:\n" + "\n".join(failures)
    assert contents(runs["own"])  # still whole
