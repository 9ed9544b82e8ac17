"""SIGINT, SIGTERM and SIGUSR1: stop at once, or at the end of a step. And the death of the process that started this one."""

import os
import signal
import threading
import time
from contextlib import contextmanager, nullcontext

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # SLURM can be told to send SIGUSR1 before a job's time is over


class Interrupted(KeyboardInterrupt):
    """A signal ended the program; the exit code is 128 + signum."""

    def __init__(self, signum, message="stopped"):
        super().__init__(message)
        self.signum = signum


@contextmanager
def handling(handler):
    """Within the block, the signals STOPPING call the handler. In threads other than the main one it does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = {number: signal.signal(number, handler) for number in STOPPING}
    try:
        yield
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)


@contextmanager
def raise_signals():
    """Within the block, the first signal raises Interrupted; a second one ends the process at once.

    Python swallows what a handler raises within some calls, as in os.fork. Then Interrupted is raised at the end of the block.
    """
    noted = []

    def note_and_raise(signum, frame):
        note(noted, signum)
        raise Interrupted(signum)

    with handling(note_and_raise):
        yield
    if noted:
        raise Interrupted(noted[0])


@contextmanager
def hold_signals(acknowledge=None):
    """Yield a list. The first signal is appended to it; a second one ends the process at once.

    acknowledge: a function that a thread calls at the first signal. With it, both hold also while the main thread is in a long
    call, such as a backward pass, during which Python runs no handlers. Not for a block that forks.
    """
    noted = []
    with handling(lambda signum, frame: note(noted, signum)), answered(acknowledge) if acknowledge else nullcontext():
        yield noted


@contextmanager
def answered(acknowledge):
    """Within the block, a thread calls acknowledge() at the first of STOPPING, and ends the process at the second."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)

    def look():
        n = 0
        while numbers := os.read(read_end, 64):  # what the interpreter writes as a signal arrives; b"" at the end
            for signum in set(numbers) & set(STOPPING):
                n += numbers.count(signum)
                if n > 1:
                    os._exit(128 + signum)
                acknowledge()

    thread, old = threading.Thread(target=look, daemon=True), signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(old)
        os.close(write_end)
        thread.join()
        os.close(read_end)


def note(noted, signum):
    if noted:
        os._exit(128 + signum)
    noted.append(signum)


def watch(pid, then, seconds=1.0):
    """Call `then` in a thread when the process `pid`, the parent of this one, has ended, whatever ended it."""

    def look():
        while os.getppid() == pid:
            time.sleep(seconds)
        then()

    threading.Thread(target=look, daemon=True).start()
