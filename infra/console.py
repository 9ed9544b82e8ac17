"""What the user sees: one logger, which speaks for the main process alone, and progress bars."""

import logging
import os
import sys
import threading
import time
import traceback
import warnings
from contextlib import contextmanager

from tqdm import tqdm

from infra.distributed import RANK, WORLD_SIZE

log = logging.getLogger("emp_ssl")
PLAIN = {"prefix": ""}  # extra= of a warning that is shown without "warning: "
EVERY_PROCESS = {"every_process": True}  # extra= of an error that any process may report
PREFIX = {logging.WARNING: "warning: ", logging.ERROR: "error: "}


def paint(text, code, stream):
    """Return the text in a colour or weight, if the stream is a terminal.

    Where NO_COLOR is set, it stays as it is (no-color.org).
    """
    if os.environ.get("NO_COLOR") or not stream.isatty():
        return text
    return f"\033[{code}m{text}\033[0m"


class ConsoleHandler(logging.Handler):
    """Print information to stdout, and warnings and errors to stderr.

    Each line is flushed, so that a pipe sees it at once.
    """

    def emit(self, record):
        stream = sys.stdout if record.levelno < logging.WARNING else sys.stderr
        if record.exc_info:
            traceback.print_exception(*record.exc_info, file=stream)
        prefix = getattr(record, "prefix", PREFIX.get(record.levelno, ""))
        if record.levelno == logging.ERROR:
            prefix = paint("error:", "31", stream) + " "
        with tqdm.external_write_mode(file=stream):  # a bar that is shown moves below the line
            print(prefix + record.getMessage(), file=stream, flush=True)


def rank_filter(record):
    """Pass the records of the main process, and errors marked every_process.

    The latter begin with the number of their process.
    """
    if getattr(record, "every_process", False):
        record.msg = f"process {RANK}: {record.msg}" if WORLD_SIZE > 1 else record.msg
        return True
    return RANK == 0


@contextmanager
def quiet_libraries():
    """Within the block, warnings of libraries and errors of their threads are not shown."""
    hook = threading.excepthook
    threading.excepthook = lambda args: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        threading.excepthook = hook


log.setLevel(logging.INFO)
log.propagate = False
log.handlers = [ConsoleHandler()]
log.filters = [rank_filter]


def log_stage(title):
    """Print the title of a stage, in bold on a terminal."""
    log.info(paint(f"===> {title}", "1", sys.stdout))


def progress_bar(items, desc, **options):
    """Return the items with a tqdm bar.

    It is shown on a terminal only, and by the main process only.
    """
    return tqdm(items, desc, disable=None if RANK == 0 else True, **options)


def progress(items, desc, every, unit, size=1):
    """Yield the items, and show a bar on a terminal, else a line after every `every` items.

    Each item stands for `size` units.
    """
    start = time.monotonic()
    bar = progress_bar(items, desc, unit=f" {unit}", unit_scale=size)
    for done, item in enumerate(bar, 1):
        yield item
        if bar.disable and done % every == 0:
            rate = done / (time.monotonic() - start)
            left = time_left(len(items) - done, rate)
            log.info(f"{desc} {done}/{len(items)} | {size * rate:,.0f} {unit}/s, {left} left")


def time_left(n, rate):
    """Return the time that n items take at so many a second, as MM:SS or H:MM:SS."""
    return tqdm.format_interval(n / rate)
