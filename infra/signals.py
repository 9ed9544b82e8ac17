"""SIGINT, SIGTERM and SIGUSR1, and the death of the parent process."""

import os
import signal
import threading
import time
from contextlib import contextmanager, nullcontext

# SLURM can be told to send SIGUSR1 before a job's time is over.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interrupted(KeyboardInterrupt):
    """A signal ended the program; the exit code is 128 + signum."""

    def __init__(self, signum, message="stopped"):
        super().__init__(message)
        self.signum = signum


@contextmanager
def handling(handler):
    """Within the block, the signals STOPPING call the handler.

    In threads other than the main one it does nothing.
    """
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

    Python swallows what a handler raises within some calls, as in os.fork. Then Interrupted is
    raised at the end of the block.
    """
    signals = []

    def record_and_raise(signum, frame):
        record(signals, signum)
        raise Interrupted(signum)

    with handling(record_and_raise):
        yield
    if signals:
        raise Interrupted(signals[0])


@contextmanager
def hold_signals(acknowledge=None):
    """Yield a list. The first signal is appended to it; a second one ends the process at once.

    acknowledge: a function that a thread calls at the first signal. With it, both hold also while
    the main thread is in a long call, such as a backward pass, during which Python runs no
    handlers. Not for a block that forks.
    """
    signals = []
    acknowledging = acknowledged(acknowledge) if acknowledge else nullcontext()
    with handling(lambda signum, frame: record(signals, signum)), acknowledging:
        yield signals


@contextmanager
def acknowledged(acknowledge):
    """Within the block, a thread calls acknowledge() at the first signal.

    At the second, it ends the process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)

    def read_signals():
        n = 0
        # The interpreter writes the number of a signal as it arrives. Closing the pipe ends it.
        for signum in iter(lambda: os.read(read_end, 1), b""):
            if signum[0] not in STOPPING:
                continue
            n += 1
            if n > 1:
                os._exit(128 + signum[0])
            acknowledge()

    old = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    thread = threading.Thread(target=read_signals, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(old)
        os.close(write_end)
        thread.join()
        os.close(read_end)


def first_signal(signals):
    """Return the first signal of a list that hold_signals yielded, 0 if there is none."""
    return signals[0] if signals else 0


def record(signals, signum):
    """Append the first signal to the list. At the second, end the process."""
    if signals:
        os._exit(128 + signum)
    signals.append(signum)


def watch(pid, then, seconds=1.0):
    """Call `then` in a thread when the process `pid`, the parent of this one, has ended."""

    def wait():
        while os.getppid() == pid:
            time.sleep(seconds)
        then()

    threading.Thread(target=wait, daemon=True).start()
