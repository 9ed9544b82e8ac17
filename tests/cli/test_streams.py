"""Standard streams that are closed, names that do not fit, and signals at odd moments."""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
from helpers import ONE_THREAD, ROOT, RUN, refused, run

from images import cache as image_cache
from infra import signals


def shell(words, redirect="", **env):
    """Run the program with these words and a redirection of its streams, as a shell does."""
    command = shlex.join(map(str, (sys.executable, ROOT / "main.py", *words)))
    options = {"shell": True, "capture_output": True, "text": True}
    return subprocess.run(f"exec {command} {redirect}", env={**ONE_THREAD, **env}, **options)


@pytest.mark.parametrize("redirect", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(copy, redirect):
    """What is printed goes nowhere, and into no file."""
    done = shell(["export", "--exp_dir", copy, "--format", "torchvision"], redirect)
    assert (done.returncode, done.stderr) == (0, "")
    assert (copy / "export" / "backbone.pt").stat().st_size > 10**6


def test_cleanup_without_an_input_removes_nothing(copy):
    done = shell(["cleanup", "--log_folder", copy.parent, "--keep", "1"], "<&-")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "Remove them? [y/N] Nothing removed"
    assert (copy / "checkpoints" / "0.pt").exists()


def test_a_name_that_the_output_can_not_spell(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "größe 犬")
    done = shell(["compare", tmp_path], PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert (done.returncode, done.stderr) == (0, "")
    assert r"gr\xf6\xdfe \u72ac" in done.stdout


@pytest.mark.parametrize("name", ["../x", "a/b", "", "x" * 300, "犬" * 60, "a\nb"])
def test_exp_name_is_the_name_of_one_folder(tiny, tmp_path, name):
    assert refused(run(*tiny, "--log_folder", tmp_path / "logs", "--exp_name", name), 2, "exp_name")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_during_the_imports(tmp_path, signum):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        f"import os\nos.kill(os.getpid(), {int(signum)})\nwhile True: pass\n"
    )
    done = shell(["--help"], PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (128 + signum, "", "")


def test_a_signal_that_is_swallowed_counts_at_the_end():
    """As in os.fork, where Python ignores what a handler raises."""
    swallow = contextlib.suppress(signals.Interrupted)
    with pytest.raises(signals.Interrupted) as caught, signals.raise_signals(), swallow:
        os.kill(os.getpid(), signal.SIGUSR1)
    assert caught.value.signum == signal.SIGUSR1


# The program. The process that decodes the first images signals its group, as Ctrl-C in a terminal
# does.
DECODING = """
import os, sys, main
from images import cache
cache.MANY, cache.CHUNK = 4, 4
read_image = cache.read_image
signum, *argv = sys.argv[1:]
def signal_and_read(path, *decoding):
    if path.name == "0.png" and path.parent.name == "across":
        os.killpg(0, int(signum))
    return read_image(path, *decoding)
cache.read_image = signal_and_read
sys.exit(main.main(argv))
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_while_they_decode(tiny, tmp_path, signum):
    command = [sys.executable, "-c", DECODING, str(int(signum)), *tiny]
    command += ["--log_folder", tmp_path / "logs"]
    env = {**ONE_THREAD, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    pipes = {"capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run(command, cwd=ROOT, env=env, start_new_session=True, **pipes)
    assert (done.returncode, done.stderr) == (128 + signum, "stopped\n")
    assert "Training" not in done.stdout
    assert not list((tmp_path / "cache").rglob("*.u8*"))


def test_a_signal_while_processes_are_forked_to_decode(tiny, tmp_path, monkeypatch):
    """In a hook of os.fork, where Python ignores what a handler raises."""
    sent = []

    def signal_once():
        if not sent:
            sent.append(1)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(image_cache, "MANY", 4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    os.register_at_fork(before=signal_once)
    result = run(*tiny, "--log_folder", tmp_path / "logs")
    sent.append(1)  # the hook stays, and does nothing from here on
    assert (result.code, result.err) == (143, "stopped\n") and len(sent) == 2
    assert not (tmp_path / "logs" / RUN / "checkpoints").exists()


# One call of C code, for minutes.
BUSY = """
import hashlib
from infra.signals import hold_signals
with hold_signals(lambda: print("stopping", flush=True)):
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2 * 10**9)
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_answered_during_a_long_call(signum):
    command = [sys.executable, "-c", BUSY]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signum)
        assert process.stdout.readline() == "stopping\n"
        process.send_signal(signum)
        assert process.wait(timeout=120) == 128 + signum
