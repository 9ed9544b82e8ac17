"""Two processes, started by torchrun as on a machine with two GPUs, here with gloo on the CPU."""

import itertools
import re
import signal
import subprocess
import sys

import pytest
import torch
from helpers import LAUNCH, ONE_THREAD, ROOT, RUN, contents, resume, training_lines
from train_steps import SMALL, difference, train_one_step

from experiment import load_checkpoint, position
from infra import distributed, files
from infra.device import generator
from infra.errors import UsageError
from patches import sample_patches

STEPS = (
    f"{SMALL} --uniformity_loss vonmises",
    f"{SMALL} --uniformity_loss contrastive --temperature 0.1 --stage_loss_weight 2",
    f"{SMALL} --bags 2",
)
IN_STAGES = f"{SMALL} --stage_loss_weight 2"
CHUNKS = f"{IN_STAGES} --max_patches 20"
# The program, in which some ranks send themselves a signal at the n-th call of a function.
KILLED = """
import importlib, os, signal, sys, main
from images import cache as image_cache
module, name, n, ranks, signal_name, *argv = sys.argv[1:]
image_cache.MANY = 4
owner = importlib.import_module(module)
function, calls = getattr(owner, name), []
def killed(*args, **kwargs):
    calls.append(args)
    if os.environ["RANK"] in ranks and len(calls) == int(n):
        os.kill(os.getpid(), getattr(signal, signal_name))
    return function(*args, **kwargs)
setattr(owner, name, killed)
sys.exit(main.main(argv))
"""


def launched(n, *argv, script=ROOT / "main.py"):
    """Run a script, main.py by default, in n processes until it ends."""
    command = [sys.executable, *LAUNCH, str(n), script, *argv]
    env = {**ONE_THREAD, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)


def assert_equal_to_rounding(one, other):
    loss, gradient = difference(one, other)
    assert loss < 1e-5
    assert gradient < 1e-5


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    """What two processes return for each of STEPS and for CHUNKS, in one launch."""
    path = tmp_path_factory.mktemp("steps") / "steps.pt"
    done = launched(2, path, *STEPS, CHUNKS, script=ROOT / "tests" / "train_steps.py")
    assert done.returncode == 0, done.stderr
    return files.read_pt(path)


@pytest.mark.parametrize("options", STEPS)
def test_loss_and_gradient_of_two_processes_are_those_of_one(options, by_two):
    one = train_one_step(options)
    assert one["metrics"].abs().min() > 0.005
    assert_equal_to_rounding(one, by_two[options])


def test_patches_of_a_part_of_a_batch_are_those_of_the_whole():
    rng = torch.manual_seed(0)
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=rng)
    whole = sample_patches(images, 5, generator(0, "t"), 16)
    part = sample_patches(images[2:5], 5, generator(0, "t"), 16, first=2, batch=6)
    assert torch.equal(part, whole[:, 2:5])


def test_two_processes_train_encode_and_report_once_and_one_goes_on(tiny, finished, tmp_path):
    done = launched(2, *tiny, "--log_folder", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("===> Report") == 1
    assert len(re.findall("^Epoch: 0", done.stdout, re.M)) == 1
    ours = contents(tmp_path / RUN)
    assert set(ours) == set(contents(finished))
    steps = [(line["epoch"], line["step"]) for line in training_lines(tmp_path / RUN)]
    assert steps == [(0, 4), (0, 6), (1, 4), (1, 6)]
    assert resume(tmp_path / RUN).code == 0
    assert contents(tmp_path / RUN) == ours  # nothing was left to do
    paths = [tmp_path / RUN / "artifacts" / f"{split}.pt" for split in ("train", "test")]
    of_two = [files.read_pt(path) for path in paths]
    for path in paths:
        path.unlink()
    assert resume(tmp_path / RUN).code == 0
    for path, two in zip(paths, of_two, strict=True):
        one = files.read_pt(path)
        torch.testing.assert_close(two["embeddings"], one["embeddings"])
        assert two["labels"].tolist() == one["labels"].tolist()


def test_two_processes_warn_once(copy):
    """Both read the newest checkpoint, which is damaged, and the main one says so."""
    (copy / "checkpoints" / "last.pt").write_bytes(b"damaged")
    done = launched(2, "resume", "--exp_dir", copy)
    assert done.returncode == 0, done.stderr
    (warning,) = re.findall("^warning: .*", done.stderr, re.M)
    assert warning.startswith(f"warning: {copy}/checkpoints/last.pt can't be read")


def test_sigterm_to_the_group_writes_one_checkpoint_and_one_process_resumes(tiny, tmp_path):
    options = "--checkpoint_every 1000 --print_freq 1 --log_folder".split()
    command = [sys.executable, *LAUNCH, "2", ROOT / "main.py", *tiny, *options, tmp_path]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=ONE_THREAD, **pipes)
    next(line for line in process.stdout if line.startswith("epoch 0 step 2/6"))
    process.send_signal(signal.SIGTERM)
    err = process.communicate()[1]
    assert process.returncode != 0
    assert err.count("stopped at epoch") == 1
    stopped = load_checkpoint(tmp_path / RUN / "checkpoints" / "last.pt")
    epoch, step = position(stopped)
    assert stopped["state"]["step"] > 0
    assert not list(tmp_path.rglob("lock"))
    result = resume(tmp_path / RUN)
    assert result.code == 0
    assert f"Going on at epoch {epoch} step {step}" in result.out


def test_all_processes_on_one_gpu_are_refused(monkeypatch):
    monkeypatch.setattr(distributed, "WORLD_SIZE", 2)
    assert distributed.local_device("cpu") == "cpu"
    with pytest.raises(UsageError, match="cuda:1"):
        distributed.local_device("cuda:1")


def test_bs_must_be_shared_evenly(tiny, tmp_path):
    done = launched(2, *tiny, "--bs", "5", "--log_folder", tmp_path / "logs")
    assert done.returncode != 0
    assert done.stderr.count("error: bs 5 must be a multiple of the 2 processes") == 1
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("name", "words", "step"),
    [("SIGKILL", "Signal 9", 2), ("SIGTERM", "stopped at epoch 1 step 3", 3)],
)
def test_a_signal_to_one_process_ends_the_others_and_the_run_resumes(
    tiny, tmp_path, name, words, step
):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    at = ["train", "train_step", "9", "1", name]
    done = launched(2, *at, *tiny, "--log_folder", tmp_path, script=script)
    assert done.returncode != 0
    assert words in done.stderr
    stopped = load_checkpoint(tmp_path / RUN / "checkpoints" / "last.pt")
    assert (1, 1) <= position(stopped) <= (1, step)
    assert resume(tmp_path / RUN).code == 0


@pytest.mark.slow
def test_two_processes_killed_anywhere_and_resumed_end_with_the_same_bits(tiny, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)

    def start(stage, ranks, name):
        command = [*stage.split(), ranks, "SIGKILL", *tiny, "--log_folder", tmp_path / name]
        return launched(2, *command, script=script)

    stages = ("images.cache size_and_time 2", "train check_finite 2", "encode encode 2")
    assert start(stages[0], "", "undisturbed").returncode == 0
    for i, (stage, ranks) in enumerate(itertools.product(stages, ("0", "1", "01"))):
        name = f"killed{i}"
        assert start(stage, ranks, name).returncode != 0
        resumed = start(stage, "", name)
        assert resumed.returncode == 0, resumed.stderr
        assert contents(tmp_path / name / RUN) == contents(tmp_path / "undisturbed" / RUN), stage


def test_in_chunks_loss_and_gradient_are_those_of_the_whole_batch(by_two):
    whole = train_one_step(IN_STAGES)
    for max_patches in (3, 63):
        chunks = train_one_step(f"{IN_STAGES} --max_patches {max_patches}")
        assert_equal_to_rounding(whole, chunks)
    assert_equal_to_rounding(whole, by_two[CHUNKS])
