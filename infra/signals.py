"""SIGINT and SIGTERM: stop at once, or at the end of a step."""

import os
import signal
import threading
from contextlib import contextmanager


class Interrupted(KeyboardInterrupt):
    """A signal ended the program; the exit code is 128 + signum."""

    def __init__(self, signum, message="stopped"):
        super().__init__(message)
        self.signum = signum


def raise_interrupted(signum, frame):
    raise Interrupted(signum)


@contextmanager
def handling(handler):
    """Within the block, SIGINT and SIGTERM call the handler. In threads other than the main one it does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)


@contextmanager
def hold_signals():
    """Yield a list. The first SIGINT or SIGTERM is appended to it; a second one ends the process at once."""
    noted = []

    def note(signum, frame):
        if noted:
            os._exit(128 + signum)
        noted.append(signum)

    with handling(note):
        yield noted
