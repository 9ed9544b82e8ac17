"""A run that is killed or stopped, and resumed, ends with the bits of one that was not."""

import errno
import os
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, RUN, contents, edit, fingerprints, refused, run, step_of, unexpected

import data
import encode
from experiment import Run, load_checkpoint
from infra import files

# The program itself. It is killed by SIGKILL when a file is about to be renamed to its name, and
# the file is half-written. Of a checkpoint, that is the one that has done so many steps.
KILL = """
import os, signal, sys, main
from infra import files
name, step, *argv = sys.argv[1:]
rename = os.replace
def kill(source, target):
    if os.path.basename(target) == name and (step == "-" or files.read_pt(source)["state"]["step"] == int(step)):
        os.truncate(source, os.path.getsize(source) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
os.replace = kill
sys.exit(main.main(argv))
"""


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("patches.png", "-"),  # before training
        (
            "last.pt",
            4,
        ),  # the middle of epoch 0; the line of step 4 in metrics.jsonl is written again
        ("0.pt", 6),  # the end of epoch 0
        ("last.pt", 6),  # 0.pt is written, last.pt is not
        ("last.pt", 12),  # the end of training
        ("train.pt", "-"),  # encoded
        ("test.pt", "-"),
        ("probe.pt", "-"),
        ("linear_accuracy.json", "-"),  # probe.pt is written, its result is not
    ],
)
def test_sigkill_then_resume(tiny, finished, tmp_path, name, step):
    command = [sys.executable, "-c", KILL, name, str(step), *tiny, "--log_folder", tmp_path]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.rglob("*.tmp"))) == 1
    result = run("resume", "--exp_dir", tmp_path / RUN)
    assert result.code == 0, result.err
    assert "Going on at epoch" in result.out or step == "-"
    assert contents(tmp_path / RUN) == contents(finished)


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)]
)
def test_a_signal_ends_the_step_writes_a_checkpoint_and_the_same_command_goes_on(
    tiny, finished, tmp_path, signum, code
):
    """Checkpoints within an epoch are off here, so the one at the signal is what resume goes on
    from.
    """
    command = [
        *tiny,
        "--checkpoint_every",
        "1000",
        "--print_freq",
        "1",
        "--log_folder",
        str(tmp_path),
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, ROOT / "main.py", *command], **pipes)
    for line in process.stdout:
        if line.startswith("epoch 0 step 2/6"):
            process.send_signal(signum)
            break
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


def test_a_signal_while_the_last_checkpoint_is_written_is_not_lost(
    tiny, finished, tmp_path, monkeypatch
):
    save = files.write_pt

    def save_and_signal(path, content, *args, **kwargs):
        save(path, content, *args, **kwargs)
        if path.name == "1.pt":
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(files, "write_pt", save_and_signal)
    result = run(*tiny, "--log_folder", tmp_path)
    assert result.code == 143
    assert "Encoding" not in result.out
    monkeypatch.undo()
    assert run("resume", "--exp_dir", tmp_path / RUN).code == 0
    assert contents(tmp_path / RUN) == contents(finished)


def test_a_second_signal_leaves_at_once(tiny, tmp_path):
    code = (
        "import main, os, signal, sys, train; f = train.render; n = []\n"
        "def g(*a, **k):\n n.append(1)\n if len(n) == 3:\n"
        "  [os.kill(os.getpid(), signal.SIGTERM) for _ in 'ab']\n return f(*a, **k)\n"
        "train.render = g; sys.exit(main.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *tiny, "--log_folder", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, unexpected(done.stderr)) == (143, "")
    assert step_of(tmp_path / RUN / "checkpoints" / "last.pt") == 2  # of the step before


def test_a_probe_that_was_killed_between_its_files_is_fitted_again(finished, tmp_path, monkeypatch):
    exp_dir = shutil.copytree(finished, tmp_path / "run")
    edit(exp_dir, eval_lr=0.1)
    write_json = files.write_json

    def write_or_stop(path, content):
        if path.name == "linear_accuracy.json":
            os.kill(os.getpid(), signal.SIGTERM)
        write_json(path, content)

    monkeypatch.setattr(files, "write_json", write_or_stop)
    assert run("resume", "--exp_dir", exp_dir).code == 143
    monkeypatch.undo()
    edit(exp_dir, eval_lr="null")
    assert run("resume", "--exp_dir", exp_dir).code == 0
    assert contents(exp_dir) == contents(finished)


def test_a_signal_outside_training_stops_too(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(
        encode, "encode", lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGTERM)
    )
    result = run(*tiny, "--log_folder", tmp_path)
    assert (result.code, result.err) == (143, "stopped\n")


def test_the_checkpoint_of_an_epoch_is_written_once(finished):
    """last.pt is a second name of the file, and the one of another epoch is not."""
    zero, one, last = (
        (finished / "checkpoints" / name).stat().st_ino for name in ("0.pt", "1.pt", "last.pt")
    )
    assert zero != one == last


def test_a_second_name_that_a_killed_process_left_is_not_written_through(finished, tmp_path):
    """last.pt.tmp is a link to 0.pt, and last.pt, which is damaged, is written again."""
    exp_dir = shutil.copytree(finished, tmp_path / "run")
    folder = exp_dir / "checkpoints"
    os.link(folder / "0.pt", folder / "last.pt.tmp")
    (folder / "last.pt").write_bytes(b"damaged")
    assert run("resume", "--exp_dir", exp_dir).code == 0
    assert contents(exp_dir) == contents(finished)


def test_a_file_system_without_hard_links(tiny, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", not_permitted)
    assert run(*tiny, "--log_folder", tmp_path).code == 0
    assert contents(tmp_path / RUN) == contents(finished)


def not_permitted(*args):
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def test_a_truncated_checkpoint_falls_back_to_the_one_before(finished, tmp_path):
    exp_dir = shutil.copytree(finished, tmp_path / "run")
    for name in ("last.pt", "1.pt"):
        path = exp_dir / "checkpoints" / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    result = run("resume", "--exp_dir", exp_dir)
    assert result.code == 0
    assert "last.pt can't be read" in result.err
    assert "Going on at epoch 1 step 0" in result.out
    assert contents(exp_dir) == contents(finished)


@pytest.mark.parametrize("tenth", range(10))
def test_a_checkpoint_cut_off_anywhere_falls_back_to_the_one_before(
    small_checkpoints, tmp_path, tenth, capsys
):
    exp_dir = shutil.copytree(small_checkpoints, tmp_path / "run")
    last = exp_dir / "checkpoints" / "last.pt"
    whole = last.read_bytes()
    last.write_bytes(whole[: tenth * len(whole) // 10])
    assert Run(exp_dir).newest_checkpoint(repair=True)["state"]["step"] == 8
    assert f"{last} can't be read" in capsys.readouterr().err
    assert load_checkpoint(last)["state"]["step"] == 8  # made whole again


@pytest.mark.parametrize(
    "n", [1, 4, 7, 10, 13, 16, 17]
)  # of 16 files: last.pt 11 times, two of epochs, artifacts, the probe
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
    if n == 17:
        assert (result.code, len(calls)) == (0, 16)
    else:
        assert refused(result, 1, "no space left on the disk", "resume")
    assert not list(tmp_path.rglob("*.tmp"))
    monkeypatch.undo()
    assert run(*tiny, "--log_folder", tmp_path).code == 0
    assert contents(tmp_path / RUN) == contents(finished)


def test_what_a_killed_process_left_half_written_is_removed(finished, tmp_path):
    exp_dir = shutil.copytree(finished, tmp_path / "run")
    for name in ("hparams.yaml.tmp", "checkpoints/7.pt.tmp", "artifacts/train.pt.tmp", "lock"):
        (exp_dir / name).write_bytes(b"half")
    assert run("resume", "--exp_dir", exp_dir).code == 0
    assert contents(exp_dir) == contents(finished)


@pytest.fixture
def stopped(tiny, tmp_path, monkeypatch):
    """A run that a signal stopped in its second epoch, after the line of step 8."""
    from infra.metrics import Journal

    add = Journal.add

    def add_and_stop(self, **values):
        add(self, **values)
        if values.get("global_step") == 10:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", add_and_stop)
        assert run(*tiny, "--log_folder", tmp_path).code == 143
    return tmp_path / RUN


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:20] + b"\xff\xfe" + text[20:],
        lambda text: text[:-10],
        lambda text: text.replace(b'"epoch"', b'"epo\xe9h"', 1),
        lambda text: b"",
    ],
)
def test_damaged_metrics_do_not_stop_a_run_and_no_lines_are_joined(stopped, finished, damage):
    path = stopped / "metrics.jsonl"
    path.write_bytes(damage(path.read_bytes()))
    result = run("resume", "--exp_dir", stopped)
    assert result.code == 0, result.err
    ours, undisturbed = files.read_jsonl(path), files.read_jsonl(finished / "metrics.jsonl")
    names = ("global_step", "probe_epoch", "loss_sim", "top1")
    ours, undisturbed = (
        [tuple(line.get(name) for name in names) for line in lines] for lines in (ours, undisturbed)
    )
    assert set(ours) <= set(undisturbed) and ours[-4:] == undisturbed[-4:]
    path.unlink()
    assert contents(stopped) == {
        name: content for name, content in contents(finished).items() if name != "metrics.jsonl"
    }


def test_a_damaged_picture_is_drawn_again(stopped, finished):
    picture = stopped / "patches.png"
    picture.write_bytes(picture.read_bytes()[:300])
    assert run("resume", "--exp_dir", stopped).code == 0
    assert contents(stopped) == contents(finished)


def test_hparams_edited_while_resume_loads_its_data_stay_edited(stopped, monkeypatch):
    load_folder = data.load_folder

    def load_and_edit(*args):
        edit(stopped, print_freq=3)
        return load_folder(*args)

    monkeypatch.setattr(data, "load_folder", load_and_edit)
    assert run("resume", "--exp_dir", stopped).code == 0
    assert Run(stopped).read_hparams().print_freq == 3


@pytest.mark.parametrize("megabytes", [1, 4, 9])
def test_a_disk_that_is_really_full(tiny, tmp_path, megabytes):
    mount = f"mount -t tmpfs -o size={megabytes}m none {tmp_path}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    command = " ".join(
        shlex.quote(str(word))
        for word in (sys.executable, ROOT / "main.py", *tiny, "--log_folder", tmp_path)
    )
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f"{mount} && {command}"], capture_output=True, text=True
    )
    errors = [
        line
        for line in unexpected(done.stderr).splitlines()
        if not line.startswith("warning: no more TensorBoard events")
    ]
    assert done.returncode == 1
    assert len(errors) == 1 and errors[0].startswith("error: no space left on the disk"), (
        done.stderr
    )


def test_two_processes_in_one_run_folder(tiny, finished, tmp_path):
    """The second one is refused while the first one lives, and takes over when it is dead."""
    command = [*tiny, "--log_folder", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, ROOT / "main.py", *command], stdout=subprocess.PIPE, text=True
    )
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


def test_no_readable_checkpoint_is_an_error_and_nothing_is_lost(finished, tmp_path):
    exp_dir = shutil.copytree(finished, tmp_path / "run")
    for path in (exp_dir / "checkpoints").iterdir():
        damaged = bytearray(path.read_bytes())
        damaged[len(damaged) // 2] ^= 1  # one flipped bit in a tensor
        path.write_bytes(damaged)
    before = {path: path.read_bytes() for path in exp_dir.rglob("*.*")}
    result = run("resume", "--exp_dir", exp_dir)
    assert result.code == 1
    assert "no checkpoint in" in result.err
    assert {path: path.read_bytes() for path in exp_dir.rglob("*.*")} == before


@pytest.mark.parametrize(
    "name", ["artifacts/train.pt", "artifacts/test.pt", "probe.pt", "linear_accuracy.json"]
)
def test_damaged_results_are_computed_again(finished, tmp_path, name):
    exp_dir = shutil.copytree(finished, tmp_path / "run")
    path = exp_dir / name
    path.write_bytes(path.read_bytes()[:-100])
    assert run("resume", "--exp_dir", exp_dir).code == 0
    assert contents(exp_dir) == contents(finished)
