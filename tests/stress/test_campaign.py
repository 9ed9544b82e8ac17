"""Random faults in random files of a finished run, then a random command.

    python -m pytest tests/stress/test_campaign.py --runs 700        # three rounds a run

After each round: the exit code is 0, 1 or 2; an error is one line that names the folder; nothing
hangs; no file is gone that no command was asked to remove; and each accuracy that is shown is that
of the undisturbed run.
"""

import collections
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
    "--dataset folder --image_size 16 --arch resnet18-tiny --h_dim 8 --z_dim 4 --n_patches 2 --bs 8 --n_epochs 2 "
    "--n_eval_epochs 3 --emb_pool proj --eval_lr 1 --print_freq 4 --device cpu --precision fp32"
).split()
COMMANDS = (
    "resume",
    "train",
    "report",
    "compare",
    "export",
    "embed",
    "cleanup",
    "probe",
    "finetune",
)
SECONDS = 30  # a command that takes longer hangs


def striped(folder, n, seed):
    """Write n images for each of two classes: stripes across or down, and more noise than stripes."""
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
    """Two finished runs with the same settings and other images: {"own": its folder, "foreign": its
    folder}.
    """
    made = {}
    for seed, name in enumerate(("own", "foreign")):
        root = tmp_path_factory.mktemp(name)
        images = striped(root / "images", 20, seed)
        result = run("train", *SETTINGS, "--data_dir", images, "--log_folder", root / "logs")
        assert result.code == 0, result.err
        (made[name],) = (root / "logs").iterdir()
    own, foreign = (top1(made[name]) for name in ("own", "foreign"))
    assert own != foreign and 0 < own < 100
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
    contents = (
        b"\0" * 100,
        b"[" * 10**5,
        b'{"a": 1}\n',
        b"\xff\xfe",
        b"null",
        b"[1]",
        choose.randbytes(5000),
    )
    path.write_bytes(choose.choice(contents))


def take_foreign(path, choose, foreign):
    if foreign.exists():
        shutil.copyfile(foreign, path)


def take_sibling(path, choose, foreign):
    """Put another file of the same folder there."""
    siblings = [
        sibling for sibling in path.parent.iterdir() if sibling.is_file() and sibling != path
    ]
    if siblings:
        content = choose.choice(siblings).read_bytes()
        path.unlink()
        path.write_bytes(content)


def instead(make):
    """Return a fault that puts something else in the place of the file."""

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
    take_foreign,
    take_sibling,
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


def command_line(name, exp_dir, choose):
    images = exp_dir.parents[1] / "images"
    return {
        "resume": ("resume", "--exp_dir", exp_dir),
        "train": ("train", *SETTINGS, "--data_dir", images, "--log_folder", exp_dir.parent),
        "report": ("report", "--exp_dir", exp_dir),
        "compare": ("compare", exp_dir.parent),
        "export": ("export", "--exp_dir", exp_dir, "--format", "torchvision"),
        "embed": (
            "embed",
            "--exp_dir",
            exp_dir,
            "--images",
            images,
            "--out",
            exp_dir.parent / "out.npz",
            "--device",
            "cpu",
        ),
        "cleanup": ("cleanup", "--log_folder", exp_dir.parent, "--keep", 1, "-y"),
        "probe": ("probe", "--exp_dir", exp_dir, "--label_fractions", 1, "--device", "cpu"),
        "finetune": (
            "finetune",
            "--exp_dir",
            exp_dir,
            "--n_epochs",
            1,
            "--bs",
            12,
            "--no-from_scratch",
            "--device",
            "cpu",
        ),
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
    """Whether hparams.yaml has the settings of the other run, or can't be read; a fault may have
    edited it.
    """
    try:
        return not Run(exp_dir).read_hparams().differences(Run(other).read_hparams())
    except UsageError:
        return True


def timed_out(signum, frame):
    raise TimeoutError(f"more than {SECONDS} seconds")


def carry_out(seed, runs, folder, monkeypatch):
    """Do one round in the folder; return (what was done, what was wrong, "" if nothing was)."""
    choose = random.Random(seed)
    shutil.copytree(runs["own"].parents[1] / "images", folder / "images")
    exp_dir = shutil.copytree(runs["own"], folder / "logs" / runs["own"].name)
    with open(exp_dir / "hparams.yaml", "r+") as file:  # the images of this folder
        text = file.read().replace(str(runs["own"].parents[1]), str(folder))
        file.seek(0)
        file.write(text)
        file.truncate()
    done = []
    for _ in range(choose.choice((1, 1, 2))):
        path = choose.choice(
            sorted(path for path in exp_dir.rglob("*") if path.is_file() and not path.is_symlink())
        )
        fault = choose.choice(FAULTS)
        if path.stat().st_size and path.name != "file":
            fault(path, choose, runs["foreign"] / path.relative_to(exp_dir))
            done.append(f"{fault.__name__} {path.relative_to(exp_dir)}")
    before = {path for path in exp_dir.rglob("*") if os.path.lexists(path)}
    name, settled = choose.choice(COMMANDS), same_settings(exp_dir, runs["own"])
    if choose.random() < 0.1:
        monkeypatch.setattr(os, "fsync", full_disk(choose.randrange(4)))
        done.append("full disk")
    signal.alarm(SECONDS)
    try:
        result = run(*command_line(name, exp_dir, choose))
    finally:
        signal.alarm(0)
        monkeypatch.undo()
    return f"{seed}: {', '.join(done)}, then {name}", wrong(
        name, result, exp_dir, before, runs, settled
    )


def wrong(name, result, exp_dir, before, runs, settled):
    """Return what a round has found, "" if all is as it must be."""
    errors = [line for line in result.err.splitlines() if not line.startswith("warning: ")]
    gone = {path for path in before if not os.path.lexists(path)}
    removable = (
        "checkpoints/[01].pt" if name == "cleanup" else "checkpoints/previous.pt|tensorboard/.*"
    )
    gone = [path for path in gone if not re.fullmatch(removable, str(path.relative_to(exp_dir)))]
    outside = exp_dir.parent / "outside"
    truth = f"{top1(runs['own']):.2f}"
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
    if settled and any(
        value not in ("", truth) and re.fullmatch(r"[\d.]+", value) for value in shown
    ):
        return f"shown: {shown}, not {truth}"
    if settled and name in ("resume", "train") and result.code == 0:
        ours, theirs = (embeddings_of(path) for path in (exp_dir, runs["own"]))
        return "" if ours == theirs else "other embeddings"
    return ""


def embeddings_of(exp_dir):
    return [
        files.checksum(files.read_pt(exp_dir / "artifacts" / f"{split}.pt")["embeddings"])
        for split in ("train", "test")
    ]


def test_any_fault_is_repaired_or_named(runs, tmp_path, monkeypatch, request):
    monkeypatch.setattr(signal, "signal", signal.signal)
    old = signal.signal(signal.SIGALRM, timed_out)
    found, n = collections.Counter(), 3 * request.config.getoption("--runs")
    try:
        for seed in range(n):
            folder = tmp_path / str(seed)
            done, what = carry_out(seed, runs, folder, monkeypatch)
            if what:
                found[what.split("\n")[0]] += 1
                print(done, "->", what, flush=True)
            shutil.rmtree(folder)
    finally:
        signal.signal(signal.SIGALRM, old)
    assert not found, f"{sum(found.values())} of {n} rounds"
    assert contents(runs["own"])  # still whole
