"""A run that is killed or stopped, and resumed, ends with the bits of one that was not."""

import errno
import os
import shlex
import signal
import subprocess
import sys

import pytest
import torch
from helpers import (
    ROOT,
    RUN,
    contents,
    edit,
    fingerprints,
    os_error,
    refused,
    resume,
    run,
    step_of,
    unexpected,
)

import data
import encode
from experiment import Run
from infra import files
from infra.metrics import Journal

# The program itself. It is killed by SIGKILL when a file is about to be renamed to its name, and
# the file is half-written. Of a checkpoint, that is the one that has done so many steps.
KILL = """
import os, signal, sys, main
from infra import files
name, step, *argv = sys.argv[1:]
rename = os.replace
def is_meant(source, target):
    if os.path.basename(target) != name:
        return False
    return step == "-" or files.read_pt(source)["state"]["step"] == int(step)
def kill(source, target):
    if is_meant(source, target):
        os.truncate(source, os.path.getsize(source) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
os.replace = kill
sys.exit(main.main(argv))
"""
SECOND_SIGNAL = """
import os, signal, sys, main, train
render, calls = train.render, []
def render_and_signal(*args, **kwargs):
    calls.append(args)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    return render(*args, **kwargs)
train.render = render_and_signal
sys.exit(main.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("patches.png", "-"),  # before training
        ("last.pt", 4),  # in epoch 0; the line of step 4 in metrics.jsonl is written again
        ("0.pt", 6),  # the end of epoch 0
        ("last.pt", 6),  # 0.pt is written, last.pt is not
        ("train.pt", "-"),  # encoded
        ("linear_accuracy.json", "-"),  # probe.pt is written, its result is not
    ],
)
def test_sigkill_then_resume(tiny, finished, tmp_path, name, step):
    command = [sys.executable, "-c", KILL, name, str(step), *tiny, "--log_folder", tmp_path]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.rglob("*.tmp"))) == 1
    result = resume(tmp_path / RUN)
    assert result.code == 0, result.err
    assert "Going on at epoch" in result.out or step == "-"
    assert contents(tmp_path / RUN) == contents(finished)


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)]
)
def test_a_signal_ends_the_step_writes_a_checkpoint_and_the_same_command_goes_on(
    tiny, finished, tmp_path, signum, code
):
    """No other checkpoint is written within an epoch, so resume starts from the signal's."""
    options = "--checkpoint_every 1000 --print_freq 1 --log_folder".split()
    command = [*tiny, *options, str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, ROOT / "main.py", *command], **pipes)
    next(line for line in process.stdout if line.startswith("epoch 0 step 2/6"))
    process.send_signal(signum)
    err = unexpected(process.communicate()[1])
    assert process.returncode == code
    assert err.startswith("stopped at epoch")
    assert f"resume --exp_dir {tmp_path / RUN}" in err
    assert step_of(tmp_path / RUN / "checkpoints" / "last.pt") > 0
    assert run(*command).code == 0
    ours, undisturbed = contents(tmp_path / RUN), contents(finished)
    for part in ("encoder", "optimizer"):
        assert ours["checkpoints/1.pt"][part] == undisturbed["checkpoints/1.pt"][part]
    for name in ("artifacts/train.pt", "artifacts/test.pt", "probe.pt", "linear_accuracy.json"):
        assert ours[name] == undisturbed[name]


def send_sigterm(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_while_the_last_checkpoint_is_written_is_not_lost(
    tiny, finished, tmp_path, monkeypatch
):
    save = files.write_pt

    def save_and_signal(path, content, *args, **kwargs):
        save(path, content, *args, **kwargs)
        if path.name == "1.pt":
            send_sigterm()

    monkeypatch.setattr(files, "write_pt", save_and_signal)
    result = run(*tiny, "--log_folder", tmp_path)
    assert result.code == 143
    assert "Encoding" not in result.out
    monkeypatch.undo()
    assert resume(tmp_path / RUN).code == 0
    assert contents(tmp_path / RUN) == contents(finished)


def test_a_second_signal_leaves_at_once(tiny, tmp_path):
    command = [sys.executable, "-c", SECOND_SIGNAL, *tiny, "--log_folder", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, unexpected(done.stderr)) == (143, "")
    assert step_of(tmp_path / RUN / "checkpoints" / "last.pt") == 2  # of the step before


def test_a_signal_outside_training_stops_too(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "encode", send_sigterm)
    result = run(*tiny, "--log_folder", tmp_path)
    assert (result.code, result.err) == (143, "stopped\n")


def test_a_probe_that_was_killed_between_its_files_is_fitted_again(copy, finished, monkeypatch):
    edit(copy, eval_lr=0.1)
    write_json = files.write_json

    def write_or_stop(path, content):
        if path.name == "linear_accuracy.json":
            send_sigterm()
        write_json(path, content)

    monkeypatch.setattr(files, "write_json", write_or_stop)
    assert resume(copy).code == 143
    monkeypatch.undo()
    edit(copy, eval_lr="null")
    assert resume(copy).code == 0
    assert contents(copy) == contents(finished)


def test_the_checkpoint_of_an_epoch_is_written_once(finished):
    """last.pt is a second name of the file, and the one of another epoch is not."""
    names = ("0.pt", "1.pt", "last.pt")
    zero, one, last = ((finished / "checkpoints" / name).stat().st_ino for name in names)
    assert zero != one == last


def test_a_file_system_without_hard_links(tiny, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", os_error(errno.EPERM))
    assert run(*tiny, "--log_folder", tmp_path).code == 0
    assert contents(tmp_path / RUN) == contents(finished)


def test_what_a_killed_process_left_is_removed_and_not_written_through(copy, finished):
    """last.pt.tmp is a link to 0.pt, and last.pt, which is damaged, is written again."""
    for name in ("hparams.yaml.tmp", "checkpoints/7.pt.tmp", "artifacts/train.pt.tmp", "lock"):
        (copy / name).write_bytes(b"half")
    os.link(copy / "checkpoints" / "0.pt", copy / "checkpoints" / "last.pt.tmp")
    (copy / "checkpoints" / "last.pt").write_bytes(b"damaged")
    assert resume(copy).code == 0
    assert contents(copy) == contents(finished)


def test_a_truncated_checkpoint_falls_back_to_the_one_before(copy, finished):
    for name in ("last.pt", "1.pt"):
        path = copy / "checkpoints" / name
        os.truncate(path, path.stat().st_size // 2)
    result = resume(copy)
    assert result.code == 0
    assert "last.pt can't be read" in result.err
    assert "Going on at epoch 1 step 0" in result.out
    assert contents(copy) == contents(finished)


def test_no_readable_checkpoint_is_an_error_and_nothing_is_lost(copy):
    for path in (copy / "checkpoints").iterdir():
        damaged = bytearray(path.read_bytes())
        damaged[len(damaged) // 2] ^= 1  # one flipped bit in a tensor
        path.write_bytes(damaged)
    before = fingerprints(copy)
    result = resume(copy)
    assert result.code == 1
    assert "no checkpoint in" in result.err
    assert fingerprints(copy) == before


# Of 16 files: the first of 11 times last.pt, one of two epochs, an artifact, the probe.
@pytest.mark.parametrize("n", [1, 7, 14, 16])
def test_a_full_disk_loses_nothing(tiny, finished, tmp_path, monkeypatch, n):
    save, calls = torch.save, []

    def full(content, file):
        calls.append(file)
        if len(calls) == n:
            file.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(content, file)

    monkeypatch.setattr(torch, "save", full)
    result = run(*tiny, "--log_folder", tmp_path)
    assert refused(result, 1, "no space left on the disk", "resume")
    assert not list(tmp_path.rglob("*.tmp"))
    assert run(*tiny, "--log_folder", tmp_path).code == 0
    assert contents(tmp_path / RUN) == contents(finished)


def test_a_disk_that_is_really_full(tiny, tmp_path):
    mount = f"mount -t tmpfs -o size=4m none {tmp_path}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    words = [sys.executable, ROOT / "main.py", *tiny, "--log_folder", tmp_path]
    script = f"{mount} && {shlex.join(map(str, words))}"
    command = ["unshare", "-rm", "sh", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = unexpected(done.stderr).splitlines()
    errors = [line for line in lines if "no more TensorBoard events" not in line]
    assert done.returncode == 1
    assert len(errors) == 1, done.stderr
    assert errors[0].startswith("error: no space left on the disk")


@pytest.fixture
def stopped(tiny, tmp_path, monkeypatch):
    """A run that a signal stopped in its second epoch, after the line of step 10."""
    add = Journal.add

    def add_and_stop(self, **values):
        add(self, **values)
        if values.get("global_step") == 10:
            send_sigterm()

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", add_and_stop)
        assert run(*tiny, "--log_folder", tmp_path).code == 143
    return tmp_path / RUN


def numbers_of(path):
    """Return the numbers of each line of a metrics.jsonl that a second run repeats."""
    names = ("global_step", "probe_epoch", "loss_sim", "top1")
    return [tuple(line.get(name) for name in names) for line in files.read_jsonl(path)]


@pytest.mark.parametrize(
    "damage", [lambda text: text[:20] + b"\xff\xfe" + text[20:], lambda text: text[:-10]]
)
def test_damaged_metrics_do_not_stop_a_run_and_no_lines_are_joined(stopped, finished, damage):
    path = stopped / "metrics.jsonl"
    path.write_bytes(damage(path.read_bytes()))
    result = resume(stopped)
    assert result.code == 0, result.err
    ours, undisturbed = numbers_of(path), numbers_of(finished / "metrics.jsonl")
    assert set(ours) <= set(undisturbed)
    assert ours[-4:] == undisturbed[-4:]
    path.unlink()
    expected = contents(finished)
    del expected["metrics.jsonl"]
    assert contents(stopped) == expected


def test_hparams_edited_while_resume_loads_its_data_stay_edited(stopped, monkeypatch):
    load_folder = data.load_folder

    def load_and_edit(*args):
        edit(stopped, print_freq=3)
        return load_folder(*args)

    monkeypatch.setattr(data, "load_folder", load_and_edit)
    assert resume(stopped).code == 0
    assert Run(stopped).read_hparams().print_freq == 3


def test_two_processes_in_one_run_folder(tiny, finished, tmp_path):
    """The second one is refused while the first one lives, and goes on when it is dead."""
    command = [*tiny, "--log_folder", str(tmp_path)]
    first = [sys.executable, ROOT / "main.py", *command]
    process = subprocess.Popen(first, stdout=subprocess.PIPE, text=True)
    next(line for line in process.stdout if line.startswith("epoch 0 step 4"))
    process.send_signal(signal.SIGSTOP)
    before = fingerprints(tmp_path)
    for argv in (command, [*command, "--no-resume"], ["resume", "--exp_dir", tmp_path / RUN]):
        assert refused(run(*argv), 1, tmp_path / RUN, f"in use by process {process.pid}")
    assert fingerprints(tmp_path) == before
    process.kill()
    process.wait()
    assert (tmp_path / RUN / "lock").read_text() == str(process.pid)
    assert run(*command).code == 0
    assert contents(tmp_path / RUN) == contents(finished)  # without the lock
