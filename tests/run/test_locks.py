"""Locks, the cache of decoded images, and processes that are left alone."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import LAUNCH, ONE_THREAD, ROOT, RUN, refused, run
from PIL import Image

from images import cache as image_cache
from infra import lock
from infra.errors import RunError

ENTER = """
import os, sys
from pathlib import Path
from infra import lock
from infra.errors import RunError
folder, n = Path(sys.argv[1]), int(sys.argv[2])
done = refused = 0
while done < n:
    try:
        with lock.locked(folder / "lock"):
            os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))  # fails if another process is inside
            os.unlink(folder / "inside")
            done += 1
    except RunError:
        refused += 1
print(refused)
"""
LOOK = """
import sys
from pathlib import Path
from infra import lock
print("looking", flush=True)
while True:
    lock.is_locked(Path(sys.argv[1], "lock"))
"""
DECODE = """
import sys
from pathlib import Path
from images import cache as image_cache
from infra import files
decode = image_cache.decode_with_processes
def announce(*arguments):
    print("decodes")
    return decode(*arguments)
image_cache.decode_with_processes = announce
paths = sorted(Path(sys.argv[1]).iterdir())
print("ready", flush=True)
sys.stdin.readline()
content = image_cache.decode_once(paths, sys.argv[1], 16)
print(files.checksum(content["images"]), flush=True)
"""
# The program; the workers that decode wait for ever.
SLOW_DECODE = """
import os, sys, time, main
from images import cache as image_cache
image_cache.MANY = 4
def wait(path, size):
    print("decoding", flush=True)
    if os.environ.get("KILL"):
        os.kill(os.getpid(), 9)
    time.sleep(1000)
image_cache.read_image = wait
sys.exit(main.main(sys.argv[1:]))
"""


def start(code, *arguments, **options):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipes = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }
    return subprocess.Popen(command, cwd=ROOT, env={**ONE_THREAD, **options}, **pipes)


def wait_for(condition, seconds=60):
    """Wait until condition() holds. The limit is for a test that fails."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def is_running(pid):
    """Whether a process exists and is not a zombie."""
    try:
        return Path("/proc", str(pid), "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_one_process_at_a_time_is_inside(tmp_path):
    looker = start(LOOK, tmp_path)
    looker.stdout.readline()
    takers = [start(ENTER, tmp_path, 300) for _ in range(3)]
    outputs = [taker.communicate() for taker in takers]
    looker.kill()
    looker.communicate()
    assert [err for _, err in outputs] == ["", "", ""]
    assert not (tmp_path / "lock").exists()


def test_a_look_at_the_lock_does_not_hold_it(tmp_path):
    lookers = [start(LOOK, tmp_path) for _ in range(2)]
    for looker in lookers:
        looker.stdout.readline()
    refusals, err = start(ENTER, tmp_path, 500).communicate()
    for looker in lookers:
        looker.kill()
        looker.communicate()
    assert (refusals, err) == ("0\n", "")


def test_a_look_at_the_moment_of_the_taking_does_not_refuse_it(tmp_path, monkeypatch):
    path, flock, refused, tried = tmp_path / "lock", lock.flock, [], threading.Event()
    path.touch()

    def take():
        try:
            with lock.locked(path):
                pass
        except RunError as error:
            refused.append(error)
        tried.set()

    def flock_while_another_tries(file, operation):
        free = flock(file, operation)
        if file.mode == "r":  # the look has its lock, and keeps it until the taker has tried
            taker.start()
            assert tried.wait(60)
        elif operation == fcntl.LOCK_SH | fcntl.LOCK_NB:
            tried.set()
        return free

    taker = threading.Thread(target=take)
    monkeypatch.setattr(lock, "flock", flock_while_another_tries)
    assert not lock.is_locked(path)
    taker.join()
    assert refused == [] and not path.exists()


@pytest.mark.parametrize(
    "make",
    [
        lambda path, other: path.symlink_to(other),
        lambda path, other: path.mkdir(),
        lambda path, other: os.mkfifo(path),
    ],
)
def test_something_else_in_the_place_of_the_lock_is_refused(copy, tmp_path, make):
    (tmp_path / "other").write_text("kept")
    make(copy / "lock", tmp_path / "other")
    assert refused(run("resume", "--exp_dir", copy), 1, copy / "lock")
    assert (tmp_path / "other").read_text() == "kept"


def test_a_lock_that_its_owner_removed_meanwhile_is_not_taken(tmp_path, monkeypatch):
    """Another process locks the file, and removes it, between its opening here and the flock."""
    opened, n = lock.opened, []

    def opened_late(path):
        file = opened(path)
        n.append(path)
        if len(n) == 1:
            path.unlink()
        return file

    monkeypatch.setattr(lock, "opened", opened_late)
    with lock.locked(tmp_path / "lock"):
        assert len(n) == 2 and (tmp_path / "lock").exists()


def many_images(folder, n):
    folder.mkdir()
    for i in range(n):
        Image.fromarray(
            np.random.default_rng(i).integers(0, 256, (16, 16, 3)).astype(np.uint8)
        ).save(folder / f"{i}.png")
    return sorted(folder.iterdir())


def test_two_processes_that_decode_the_same_folder_get_the_right_images(tmp_path):
    paths = many_images(tmp_path / "images", 400)
    truth = image_cache.files.checksum(image_cache.decode_in_memory(paths, 16)["images"])
    both = [
        start(DECODE, tmp_path / "images", XDG_CACHE_HOME=str(tmp_path / "cache")) for _ in range(2)
    ]
    for process in both:
        process.stdout.readline()
    for process in both:  # at once
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate() for process in both]
    assert [out.splitlines()[-1] for out, _ in outputs] == [truth, truth], outputs
    assert (
        sum(out.count("decodes") for out, _ in outputs) == 1
    )  # the other one waits and takes what was written
    third = start(DECODE, tmp_path / "images", XDG_CACHE_HOME=str(tmp_path / "cache")).communicate(
        "\n"
    )
    assert third[0].splitlines() == ["ready", truth]
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_a_changed_byte_in_the_cache_is_noticed(tmp_path, monkeypatch, capsys):
    paths = many_images(tmp_path / "images", 20)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images = image_cache.decode_once(paths, tmp_path / "images", 16)["images"]
    (cache,) = tmp_path.rglob("*.u8")
    content = bytearray(cache.read_bytes())
    content[5000] ^= 1
    cache.write_bytes(content)
    assert torch.equal(image_cache.decode_once(paths, tmp_path / "images", 16)["images"], images)
    assert "was damaged" in capsys.readouterr().err and not cache.exists()
    monkeypatch.setattr(image_cache, "LARGE", 0)
    in_file = image_cache.decode_once(paths, tmp_path / "images", 16)["images"]
    assert torch.equal(in_file[:], images)
    cache.write_bytes(content)
    assert torch.equal(in_file[10:], images[10:])
    with pytest.raises(RunError, match=str(cache)):
        in_file[6:7]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_workers_end_with_a_process_that_is_killed_and_the_lock_is_free(tiny, tmp_path):
    process = start(
        SLOW_DECODE,
        *tiny,
        "--log_folder",
        tmp_path / "logs",
        XDG_CACHE_HOME=str(tmp_path / "cache"),
    )
    next(line for line in process.stdout if line == "decoding\n")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    assert children
    wait_for(lambda: not any(map(is_running, children)))
    assert not lock.is_locked(tmp_path / "logs" / RUN / "lock")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_workers_that_outlive_their_killed_parent_hold_no_lock(tiny, tmp_path):
    """They are stopped, so that they can't notice its end."""
    process = start(
        SLOW_DECODE,
        *tiny,
        "--log_folder",
        tmp_path / "logs",
        XDG_CACHE_HOME=str(tmp_path / "cache"),
    )
    next(line for line in process.stdout if line == "decoding\n")
    children = [
        int(pid)
        for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]
    wait_for(
        lambda: all(len(os.listdir(f"/proc/{pid}/task")) > 1 for pid in children)
    )  # the thread that watches is the last
    for pid in children:
        os.kill(pid, signal.SIGSTOP)
    process.kill()
    process.wait()
    locks = [tmp_path / "logs" / RUN / "lock", *(tmp_path / "cache").rglob("*.lock")]
    held = [path for path in locks if lock.is_locked(path)]
    alive = [pid for pid in children if is_running(pid)]
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    assert children and alive == children and len(locks) == 2
    assert held == []


def test_a_killed_worker_ends_the_run_with_one_line(tiny, tmp_path):
    process = start(
        SLOW_DECODE,
        *tiny,
        "--log_folder",
        tmp_path / "logs",
        XDG_CACHE_HOME=str(tmp_path / "cache"),
        KILL="1",
    )
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (
        1,
        "error: a process that decodes images was killed: give the command again\n",
    )


@pytest.mark.slow
def test_processes_end_with_a_torchrun_that_is_killed(tiny, tmp_path):
    """They print into a file: a pipe that nobody reads any more would end them too."""
    command = [
        sys.executable,
        *LAUNCH,
        "2",
        ROOT / "main.py",
        *tiny,
        "--n_epochs",
        "9999",
        "--print_freq",
        "1",
    ]
    with open(tmp_path / "out", "w") as out:
        command = [*command, "--log_folder", tmp_path / "logs"]
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL, env=ONE_THREAD)
    try:
        wait_for(
            lambda: (
                "epoch 0 step 2/" in (tmp_path / "out").read_text() or process.poll() is not None
            )
        )
        ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    finally:
        process.kill()
        process.wait()
    try:
        wait_for(lambda: not any(map(is_running, ranks)))
    finally:
        for pid in filter(is_running, ranks):
            os.kill(int(pid), signal.SIGKILL)
    assert len(ranks) == 2
    assert not lock.is_locked(tmp_path / "logs" / RUN / "lock")
