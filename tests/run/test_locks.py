"""Locks, the cache of decoded images, and processes that are left alone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import LAUNCH, ONE_THREAD, ROOT, RUN
from PIL import Image

from images import cache as image_cache
from infra import files
from infra.errors import RunError
from infra.lock import is_locked, locked

# Enter n times; making the file fails if another process is inside.
ENTER = """
import os, sys
from pathlib import Path
from infra.errors import RunError
from infra.lock import locked
folder, n = Path(sys.argv[1]), int(sys.argv[2])
while n:
    try:
        with locked(folder / "lock"):
            os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
            os.unlink(folder / "inside")
            n -= 1
    except RunError:
        pass
"""
ASK = """
import sys
from pathlib import Path
from infra.lock import is_locked
print("asking", flush=True)
while True:
    is_locked(Path(sys.argv[1], "lock"))
"""
DECODE = """
import sys
from pathlib import Path
from images import cache
from infra import files
decode = cache.decode_with_processes
def announce(*arguments):
    print("decodes")
    return decode(*arguments)
cache.decode_with_processes = announce
paths = sorted(Path(sys.argv[1]).iterdir())
print("ready", flush=True)
sys.stdin.readline()
content = cache.decode_once(paths, sys.argv[1], cache.Decoding(16))
print(files.checksum(content["images"]), flush=True)
"""
# The program. The workers that decode wait for ever, or kill themselves.
SLOW_DECODE = """
import os, sys, time, main
from images import cache
cache.MANY = 4
def wait(path, *decoding):
    os.write(1, b"decoding\\n")  # at once: with PYTHONUNBUFFERED, print() makes two writes of it
    if os.environ.get("KILL"):
        os.kill(os.getpid(), 9)
    time.sleep(100)
cache.read_image = wait
sys.exit(main.main(sys.argv[1:]))
"""


def start(code, *arguments, **options):
    """Start Python with this code; options are variables of its environment."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipe = subprocess.PIPE
    environment = {**ONE_THREAD, **options}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True
    )


def children_of(pid):
    """Return the pids of the processes that a process has started."""
    return [int(pid) for pid in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid):
    """Whether a process exists and is not a zombie."""
    try:
        return Path("/proc", str(pid), "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition, seconds=60):
    """Wait until condition() holds. The limit is for a test that fails."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def assert_they_end(pids):
    """Assert that the processes end by themselves; end those that do not."""
    try:
        wait_for(lambda: not any(map(is_running, pids)))
    finally:
        for pid in filter(is_running, pids):
            os.kill(pid, signal.SIGKILL)


def test_one_process_at_a_time_is_inside(tmp_path):
    entering = [start(ENTER, tmp_path, 1000) for _ in range(2)]
    assert [process.communicate()[1] for process in entering] == ["", ""]
    assert not (tmp_path / "lock").exists()


def test_asking_whether_it_is_locked_refuses_no_process(tmp_path):
    asking = start(ASK, tmp_path)
    asking.stdout.readline()
    try:
        for _ in range(500):
            with locked(tmp_path / "lock"):
                pass
    finally:
        asking.kill()
        asking.communicate()


def test_the_owner_is_named_and_a_folder_that_was_made_is_removed(tmp_path):
    path = tmp_path / "a" / "b" / "lock"
    words = f"{path.parent} is in use by process {os.getpid()}:"
    with locked(path), pytest.raises(RunError, match=words), locked(path):
        pass
    assert not list(tmp_path.iterdir())


def many_images(folder, n):
    folder.mkdir()
    for i in range(n):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return sorted(folder.iterdir())


def test_two_processes_that_decode_the_same_folder_get_the_right_images(tmp_path):
    paths = many_images(tmp_path / "images", 400)
    truth = files.checksum(image_cache.decode_in_memory(paths, image_cache.Decoding(16))["images"])

    def start_decoding():
        return start(DECODE, tmp_path / "images", XDG_CACHE_HOME=str(tmp_path / "cache"))

    both = [start_decoding(), start_decoding()]
    for process in both:
        process.stdout.readline()
    for process in both:  # at once
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate() for process in both]
    assert [out.splitlines()[-1] for out, _ in outputs] == [truth, truth], outputs
    # The other one waits and reads what was written.
    assert sum(out.count("decodes") for out, _ in outputs) == 1
    assert start_decoding().communicate("\n")[0].splitlines() == ["ready", truth]
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_a_changed_byte_in_the_cache_is_noticed(tmp_path, monkeypatch, capsys):
    paths = many_images(tmp_path / "images", 20)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def decoded():
        return image_cache.decode_once(paths, tmp_path / "images", image_cache.Decoding(16))[
            "images"
        ]

    images = decoded()
    (cache,) = tmp_path.rglob("*.u8")
    content = bytearray(cache.read_bytes())
    content[5000] ^= 1
    cache.write_bytes(content)
    assert torch.equal(decoded(), images)
    assert "was damaged" in capsys.readouterr().err and not cache.exists()
    monkeypatch.setattr(image_cache, "LARGE", 0)
    in_file = decoded()
    assert torch.equal(in_file[:], images)
    cache.write_bytes(content)
    assert torch.equal(in_file[10:], images[10:])
    with pytest.raises(RunError, match=str(cache)):
        in_file[6:7]


@pytest.fixture
def start_slow_decode(tiny, tmp_path):
    options = [*tiny, "--log_folder", tmp_path / "logs"]
    cache = str(tmp_path / "cache")
    return lambda **env: start(SLOW_DECODE, *options, XDG_CACHE_HOME=cache, **env)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_workers_of_a_killed_process_hold_no_lock_and_end(start_slow_decode, tmp_path):
    """They are stopped at first, so that they can't notice its end."""
    process = start_slow_decode()
    next(line for line in process.stdout if line == "decoding\n")
    workers = children_of(process.pid)
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    process.kill()
    process.wait()
    locks = [tmp_path / "logs" / RUN / "lock", *(tmp_path / "cache").rglob("*.lock")]
    held = [path for path in locks if is_locked(path)]
    n_running = sum(map(is_running, workers))
    for pid in workers:
        os.kill(pid, signal.SIGCONT)
    assert_they_end(workers)
    assert n_running == len(workers) > 0
    assert len(locks) == 2 and all(path.exists() for path in locks) and held == []


def test_a_killed_worker_ends_the_run_with_one_line(start_slow_decode):
    process = start_slow_decode(KILL="1")
    _, err = process.communicate(timeout=120)
    line = "error: a process that decodes images was killed: give the command again\n"
    assert (process.returncode, err) == (1, line)


@pytest.mark.slow
def test_processes_end_with_a_torchrun_that_is_killed(tiny, tmp_path):
    """They print into a file: a pipe that nobody reads any more would end them too."""
    options = [*tiny, "--n_epochs", "9999", "--print_freq", "1", "--log_folder", tmp_path / "logs"]
    command = [sys.executable, *LAUNCH, "2", ROOT / "main.py", *options]
    out = tmp_path / "out"
    with open(out, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.DEVNULL, env=ONE_THREAD)
    try:
        wait_for(lambda: "epoch 0 step 2/" in out.read_text() or process.poll() is not None)
        ranks = children_of(process.pid)
    finally:
        process.kill()
        process.wait()
    assert_they_end(ranks)
    assert len(ranks) == 2
    assert not is_locked(tmp_path / "logs" / RUN / "lock")
