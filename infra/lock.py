"""One process at a time works in a folder: the one that holds a flock on a file in it.

Two events in a user's life make it necessary. A command is given in a folder where a process works
already: it is refused, or waits, and names the pid of that process. A process is killed and leaves
the file behind: the system has released its flock, so the file has no effect.
"""

import fcntl
import os
from contextlib import contextmanager, suppress

from infra.console import log
from infra.distributed import on_main_process
from infra.errors import RunError

held = []  # the open lock files of this process


@contextmanager
def locked(path, wait=False):
    """Within the block, hold the lock file `path`, which has the pid of this process.

    The folder is made if need be; if it was made and stays empty, it is removed. wait: for as long
    as another process holds the lock. With several processes of torchrun, the main one holds it for
    all. Raises RunError with the pid of the other process if that holds the lock, and OSError if
    the file can't be made.
    """
    made = [folder for folder in path.parents if not folder.exists()]
    file = acquire(path, wait)
    if file is None:  # the main process holds it for this one
        yield
        return
    try:
        file.truncate(0)
        print(os.getpid(), end="", file=file, flush=True)
        yield
    finally:
        path.unlink(missing_ok=True)
        held.remove(file)
        file.close()
        with suppress(OSError):  # not empty
            for folder in made:
                folder.rmdir()


@on_main_process
def acquire(path, wait):
    """Return the lock file, open and locked. The arguments and errors are those of `locked`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+", errors="replace")  # noqa: SIM115
    while not try_flock(file, fcntl.LOCK_EX):
        if try_flock(file, fcntl.LOCK_SH):
            continue  # is_locked held it for a moment
        file.seek(0)
        pid = file.read() or "unknown"
        if not wait:
            file.close()
            raise RunError(f"{path.parent} is in use by process {pid}: wait for it or stop it")
        log.info(f"* Waiting for process {pid}, which holds {path}")
        fcntl.flock(file, fcntl.LOCK_EX)
    if not is_at(file, path):  # its owner has removed it since it was opened
        file.close()
        return acquire(path, wait)
    held.append(file)
    return file


def try_flock(file, operation):
    """Lock the file, unless another process holds it. Return whether that succeeded."""
    try:
        fcntl.flock(file, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_at(file, path):
    """Whether the open file is the one at this path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def is_locked(path):
    """Whether a process holds the lock. A process that starts meanwhile is not refused."""
    try:
        with open(path) as file:
            return not try_flock(file, fcntl.LOCK_SH)
    except OSError:  # there is no such file, or it can't be read
        return False


def close_inherited():
    """Close the lock files in a forked process: else they stay locked after a kill of the owner."""
    while held:
        held.pop().close()


os.register_at_fork(after_in_child=close_inherited)
