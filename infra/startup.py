"""What main.py does before its imports, which take seconds."""

import os
import signal
import sys


def prepare():
    """Prepare for three events in a user's life.

    A standard stream is closed, as by `>&-` or by a daemon: it becomes the null device. Else the
    next file that is opened would get its number, and with it what is printed. A name has letters
    that the terminal can't print: they are printed as escapes. Ctrl-C or a scheduler stops the
    program during the imports: it exits with 128 + the signal, without a traceback.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed; the lowest free number is the one of this stream
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda signum, frame: os._exit(128 + signum))
