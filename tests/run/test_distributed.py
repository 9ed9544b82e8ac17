"""Two processes, started by torchrun as on a machine with two GPUs, here with gloo on the CPU."""

import re
import signal
import subprocess
import sys

import pytest
import torch
from helpers import LAUNCH, ONE_THREAD, ROOT, RUN, contents, run, training_lines

from experiment import load_checkpoint, position
from infra import distributed, files
from infra.device import generator
from infra.errors import UsageError
from patches import sample_patches

DIES = """
import os, signal, sys, main, train
train_step, calls = train.train_step, []
def step(*args, **settings):
    calls.append(args)
    if os.environ["RANK"] == "1" and len(calls) == 9:
        os.kill(os.getpid(), getattr(signal, os.environ["SIGNAL"]))
    return train_step(*args, **settings)
train.train_step = step
sys.exit(main.main(sys.argv[1:]))
"""


def launched(n, *argv):
    command = [sys.executable, *LAUNCH, str(n), ROOT / "main.py", *argv]
    return subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD)


def one_step(options, tmp_path, n=1):
    """Return what tests.one_step writes, of n processes: metrics (3,) and gradients {name: tensor}."""
    launch, path = [*LAUNCH, str(n)] if n > 1 else [], tmp_path / f"{n}.pt"
    command = [sys.executable, *launch, "-m", "tests.one_step", path, *options.split()]
    subprocess.run(command, check=True, cwd=ROOT, env=ONE_THREAD)
    return files.load(path)


def assert_equal_to_rounding(one, other):
    """Losses by their relative difference, gradients by that of the norm."""
    assert ((one["metrics"] / other["metrics"])[:2] - 1).abs().max() < 1e-5
    a, b = (torch.cat([g.flatten() for g in step["gradients"].values()]) for step in (one, other))
    assert (a - b).norm() / a.norm() < 1e-5


@pytest.mark.parametrize("options", ["--uniformity_loss vonmises", "--bags 2"])
def test_loss_and_gradient_of_two_processes_are_those_of_one(options, tmp_path):
    one, two = one_step(options, tmp_path), one_step(options, tmp_path, 2)
    assert one["metrics"].abs().min() > 0.005
    assert_equal_to_rounding(one, two)


def test_patches_of_a_part_of_a_batch_are_those_of_the_whole():
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=torch.manual_seed(0))
    whole = sample_patches(images, 5, generator(0, "t"), 16)
    part = sample_patches(images[2:5], 5, generator(0, "t"), 16, first=2, batch=6)
    assert torch.equal(part, whole[:, 2:5])


def test_two_processes_train_encode_and_report_once_and_one_goes_on(tiny, finished, tmp_path):
    command = [*tiny, "--log_folder", tmp_path]
    done = launched(2, *command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("===> Report") == 1
    assert len(re.findall("^Epoch: 0", done.stdout, re.M)) == 1
    ours, undisturbed = contents(tmp_path / RUN), contents(finished)
    assert set(ours) == set(undisturbed)
    assert [(line["epoch"], line["step"]) for line in training_lines(tmp_path / RUN)] == [(0, 4), (0, 6), (1, 4), (1, 6)]
    assert run("resume", "--exp_dir", tmp_path / RUN).code == 0
    assert contents(tmp_path / RUN) == ours  # nothing was left to do
    by_two = {split: files.load(tmp_path / RUN / "artifacts" / f"{split}.pt") for split in ("train", "test")}
    for path in (tmp_path / RUN / "artifacts").iterdir():
        path.unlink()
    assert run("resume", "--exp_dir", tmp_path / RUN).code == 0
    for split, two in by_two.items():
        one = files.load(tmp_path / RUN / "artifacts" / f"{split}.pt")
        torch.testing.assert_close(two["embeddings"], one["embeddings"])
        assert two["labels"].tolist() == one["labels"].tolist()


def test_two_processes_warn_once(copy):
    """Both find that the newest checkpoint is damaged, and the main one says so."""
    (copy / "checkpoints" / "last.pt").write_bytes(b"damaged")
    done = launched(2, "resume", "--exp_dir", copy)
    assert done.returncode == 0, done.stderr
    (warning,) = re.findall("^warning: .*", done.stderr, re.M)
    assert warning.startswith(f"warning: {copy}/checkpoints/last.pt can't be read")


def test_sigterm_to_the_group_writes_one_checkpoint_and_one_process_resumes(tiny, tmp_path):
    command = [*tiny, "--checkpoint_every", "1000", "--print_freq", "1", "--log_folder", str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": ONE_THREAD}
    process = subprocess.Popen([sys.executable, *LAUNCH, "2", ROOT / "main.py", *command], **pipes)
    next(line for line in process.stdout if line.startswith("epoch 0 step 2/6"))
    process.send_signal(signal.SIGTERM)
    err = process.communicate()[1]
    assert process.returncode != 0
    assert err.count("stopped at epoch") == 1
    stopped = load_checkpoint(tmp_path / RUN / "checkpoints" / "last.pt")
    epoch, step = position(stopped)
    assert stopped["state"]["step"] > 0
    assert not list(tmp_path.rglob("lock"))
    result = run("resume", "--exp_dir", tmp_path / RUN)
    assert result.code == 0
    assert f"Going on at epoch {epoch} step {step}" in result.out


def test_all_processes_on_one_gpu_are_refused(monkeypatch):
    monkeypatch.setattr(distributed, "WORLD_SIZE", 2)
    assert distributed.local_device("cpu") == "cpu"
    with pytest.raises(UsageError, match="cuda:1"):
        distributed.local_device("cuda:1")


def test_bs_must_be_shared_evenly(tiny, tmp_path):
    done = launched(3, *tiny, "--log_folder", tmp_path / "logs")
    assert done.returncode != 0
    assert done.stderr.count("error: bs 4 must be a multiple of the 3 processes") == 1
    assert not (tmp_path / "logs").exists()


def test_one_process_that_dies_or_is_told_to_stop_ends_the_others_and_the_run_resumes(tiny, tmp_path):
    (tmp_path / "dies.py").write_text(DIES)
    for name, words, step in (("SIGKILL", "Signal 9", 2), ("SIGTERM", "stopped at epoch 1 step 3", 3)):
        env = {**ONE_THREAD, "PYTHONPATH": str(ROOT), "SIGNAL": name}
        command = [sys.executable, *LAUNCH, "2", tmp_path / "dies.py", *tiny, "--log_folder", tmp_path / name]
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
        assert done.returncode != 0
        assert words in done.stderr
        stopped = load_checkpoint(tmp_path / name / RUN / "checkpoints" / "last.pt")
        assert (1, 1) <= position(stopped) <= (1, step)
        assert run("resume", "--exp_dir", tmp_path / name / RUN).code == 0


KILLED = """
import os, signal, sys, main
import encode, train
from infra import image_cache
place, ranks, *argv = sys.argv[1:]
image_cache.MANY = 4
def kill(owner, name):
    function = getattr(owner, name)
    def killed(*args, **kwargs):
        result = function(*args, **kwargs)
        if os.environ["RANK"] in ranks:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, killed)
if place != "nowhere":
    kill(*{"decoding": (image_cache, "size_and_time"), "encoding": (encode, "encode"),
           "checkpoint": (train, "check_finite")}[place])
sys.exit(main.main(argv))
"""


@pytest.mark.slow
def test_two_processes_killed_anywhere_and_resumed_end_with_the_same_bits(tiny, tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)

    def start(place, victims, name):
        env = {**ONE_THREAD, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, *LAUNCH, "2", tmp_path / "killed.py", place, victims, *tiny, "--log_folder", tmp_path / name]
        return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)

    assert start("nowhere", "", "undisturbed").returncode == 0
    for place in ("decoding", "checkpoint", "encoding"):
        for victims in ("0", "1", "01"):
            name = f"{place}-{victims}"
            assert start(place, victims, name).returncode != 0
            resumed = start("nowhere", "", name)
            assert resumed.returncode == 0, resumed.stderr
            assert contents(tmp_path / name / RUN) == contents(tmp_path / "undisturbed" / RUN), name


@pytest.mark.parametrize("max_patches", [3, 63])
def test_in_chunks_loss_and_gradient_are_those_of_the_whole_batch(max_patches, tmp_path):
    assert_equal_to_rounding(one_step("", tmp_path), one_step(f"--max_patches {max_patches}", tmp_path))


def test_in_chunks_of_two_processes_too(tmp_path):
    assert_equal_to_rounding(one_step("", tmp_path), one_step("--max_patches 20", tmp_path, 2))
