"""One process at a time works in a folder."""

import errno
import fcntl
import os
import stat
from contextlib import contextmanager, suppress

from infra.console import log
from infra.distributed import on_main_process
from infra.errors import RunError

held = []  # the open lock files of this process


@contextmanager
def locked(path, wait=False):
    """Hold the lock file `path` in its folder, which is made if need be. A folder that was made and
    stays empty is removed.

    The lock is a flock: the system releases it when the process ends, however that ends. A leftover
    file has no effect. The file holds the pid of its owner. wait: for as long as another process
    holds the lock. Raises RunError, with that pid, if another process holds it, and OSError if the
    file can't be made. With several processes, the main one holds it for all.
    """
    made = [folder for folder in path.parents if not folder.exists()]
    file = take(path, wait)
    try:
        write_pid(file)
        yield
    finally:
        if file:
            path.unlink(missing_ok=True)
            held.remove(file)
            file.close()
            with suppress(OSError):  # not empty
                for folder in made:
                    folder.rmdir()


@on_main_process
def take(path, wait):
    """Return the lock file, open and locked. The arguments and errors are those of `locked`."""
    while True:
        file = opened(path)
        free = flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not free and flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB):
            file.close()  # whoever only looked, see is_locked, has finished
            continue
        pid = file.read(20).strip() or "unknown"
        if not free and not wait:
            file.close()
            raise RunError(f"{path.parent} is in use by process {pid}: wait for it or stop it")
        if not free:
            log.info(f"* Waiting for process {pid}, which holds {path}")
            flock(file, fcntl.LOCK_EX)
        if is_at(file, path):
            break
        file.close()  # its owner has removed it since: lock the file that is there now
    held.append(file)
    return file


@on_main_process
def write_pid(file):
    """Replace the content of the lock file by the pid of this process."""
    file.seek(0)
    file.truncate()
    file.write(str(os.getpid()))
    file.flush()


def opened(path):
    """Return the lock file, open for reading and writing, and made if need be.

    A link is not followed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(number, "r+", errors="replace")


def flock(file, operation):
    """Lock the file. Return whether that succeeded."""
    try:
        fcntl.flock(file, operation)
    except BlockingIOError:
        return False
    return True


def is_at(file, path):
    """Whether the open file is the one at this path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def is_locked(path):
    """Whether a process holds the lock."""
    if not path.is_file() or path.is_symlink():
        return False
    try:
        with open(path) as file:
            return not flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False


def close_inherited():
    """Close the lock files that a forked process inherited: while they are open, the locks outlive
    their owner.
    """
    while held:
        held.pop().close()
