"""Two processes, started by torchrun as on a machine with two GPUs, here with gloo on the CPU."""

import os
import re
import signal
import subprocess
import sys

import pytest
import ranks
import torch
from conftest import ROOT, RUN, contents, run, training_lines

import data
import experiment

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


DIES = """
import os, signal, sys, main, parallel
train_step, calls = main.train_step, []
def step(*args):
    calls.append(args)
    if parallel.RANK == 1 and len(calls) == 9:
        os.kill(os.getpid(), getattr(signal, os.environ["SIGNAL"]))
    return train_step(*args)
main.train_step = step
sys.exit(main.main(sys.argv[1:]))
"""


def launched(n, *argv):
    return subprocess.run([*LAUNCH, str(n), ROOT / "main.py", *argv], capture_output=True, text=True, env=ENV)


@pytest.mark.parametrize("options", ["--uniformity_loss vonmises", "--bags 2"])
def test_loss_and_gradient_of_two_processes_are_those_of_one(options):
    one, two = (ranks.processes(n, f"{ranks.SMALL} {options}", "1") for n in (1, 2))
    assert one["metrics"].abs().min() > 0.005
    gap = ranks.difference(one, two)
    assert gap["loss"] < 1e-5
    assert gap["gradient"] < 1e-5


def test_patches_of_a_part_of_a_batch_are_those_of_the_whole():
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=torch.manual_seed(0))
    whole = data.sample_patches(images, 5, data.generator(0, "t"), 16)
    part = data.sample_patches(images[2:5], 5, data.generator(0, "t"), 16, first=2, batch=6)
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
    by_two = {split: experiment.load(tmp_path / RUN / "artifacts" / f"{split}.pt") for split in ("train", "test")}
    for path in (tmp_path / RUN / "artifacts").iterdir():
        path.unlink()
    assert run("resume", "--exp_dir", tmp_path / RUN).code == 0
    for split, two in by_two.items():
        one = experiment.load(tmp_path / RUN / "artifacts" / f"{split}.pt")
        torch.testing.assert_close(two["embeddings"], one["embeddings"])
        assert two["labels"].tolist() == one["labels"].tolist()


def test_sigterm_to_the_group_writes_one_checkpoint_and_one_process_resumes(tiny, tmp_path):
    command = [*tiny, "--checkpoint_every", "1000", "--print_freq", "1", "--log_folder", str(tmp_path)]
    process = subprocess.Popen([*LAUNCH, "2", ROOT / "main.py", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, env=ENV)  # fmt: skip
    next(line for line in process.stdout if line.startswith("epoch 0 step 2/6"))
    process.send_signal(signal.SIGTERM)
    err = process.communicate()[1]
    assert process.returncode != 0
    assert err.count("stopped at epoch") == 1
    stopped = experiment.load_checkpoint(tmp_path / RUN / "checkpoints" / "last.pt")
    assert (stopped["epoch"], stopped["step"]) > (0, 0)
    assert not list(tmp_path.rglob("lock"))
    result = run("resume", "--exp_dir", tmp_path / RUN)
    assert result.code == 0
    assert f"Going on at epoch {stopped['epoch']} step {stopped['step']}" in result.out


def test_bs_must_be_shared_evenly(tiny, tmp_path):
    done = launched(3, *tiny, "--log_folder", tmp_path / "logs")
    assert done.returncode != 0
    assert done.stderr.count("error: bs 4 must be a multiple of the 3 processes") == 1
    assert not (tmp_path / "logs").exists()


def test_one_process_that_dies_or_is_told_to_stop_ends_the_others_and_the_run_resumes(tiny, tmp_path):
    (tmp_path / "dies.py").write_text(DIES)
    for name, words, step in (("SIGKILL", "Signal 9", 2), ("SIGTERM", "stopped at epoch 1 step 3", 3)):
        env = {**ENV, "PYTHONPATH": str(ROOT), "SIGNAL": name}
        command = [*LAUNCH, "2", tmp_path / "dies.py", *tiny, "--log_folder", tmp_path / name]
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
        assert done.returncode != 0
        assert words in done.stderr
        stopped = experiment.load_checkpoint(tmp_path / name / RUN / "checkpoints" / "last.pt")
        assert (1, 1) <= (stopped["epoch"], stopped["step"]) <= (1, step)
        assert run("resume", "--exp_dir", tmp_path / name / RUN).code == 0


@pytest.mark.parametrize(("n", "max_patches"), [(1, 3), (1, 63), (2, 20)])
def test_in_chunks_loss_and_gradient_are_those_of_the_whole_batch(n, max_patches):
    whole, chunked = ranks.processes(1, ranks.SMALL, "1"), ranks.processes(n, f"{ranks.SMALL} --max_patches {max_patches}", "1")
    gap = ranks.difference(whole, chunked)
    assert gap["loss"] < 1e-5
    assert gap["gradient"] < 1e-5
