"""One process at a time works in a folder."""

import fcntl
import os
from contextlib import contextmanager, suppress

from infra.distributed import on_main_process
from infra.errors import RunError


@contextmanager
def locked(path):
    """Hold the lock file `path` in its folder, which is made if need be. A folder that was made and stays empty is removed.

    The lock is a flock: the system releases it when the process ends, however that ends. A leftover file has no effect. The
    file holds the pid of its owner. Raises RunError, with that pid, if another process holds the lock, or if nothing can be
    written there. With several processes, the main one holds it for all.
    """
    made = [folder for folder in path.parents if not folder.exists()]
    file = take(path)
    try:
        if file:
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        yield
    finally:
        if file:
            path.unlink(missing_ok=True)
            file.close()
            with suppress(OSError):  # not empty
                for folder in made:
                    folder.rmdir()


@on_main_process
def take(path):
    """Return the lock file, open and locked."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115, closed by `locked`
    except OSError as error:
        raise RunError(f"{path.parent} can't be written: {error.strerror}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with file:
            file.seek(0)
            raise RunError(f"{path.parent} is in use by process {file.read() or 'unknown'}: wait for it or stop it") from None
    return file


def is_locked(path):
    """Whether a process holds the lock."""
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
