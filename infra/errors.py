"""The two errors that a user is meant to see, and one line for every other."""

import errno

import torch


class RunError(Exception):
    """Something failed while running. The message is one line for the user; the exit code is 1."""

    code = 1


class UsageError(Exception):
    """The user asked for something impossible.

    The message is one line that names it and the way out; the exit code is 2.
    """

    code = 2


# What torch's other errors say: the allocator of the CPU, CUDA's own, cuBLAS, mps.
OUT_OF_MEMORY = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
)


NOT_ALLOWED = (errno.EROFS, errno.EACCES, errno.EPERM)


def explain(error):
    """Return a one-line message for an unexpected error.

    Out of memory and errors of the file system have their own.
    """
    for cause in causes(error):
        text = " ".join(str(cause).split())
        is_memory = isinstance(cause, (torch.OutOfMemoryError, MemoryError))
        if is_memory or any(words in text for words in OUT_OF_MEMORY):
            return (
                f"out of memory ({text[:100]}): in hparams.yaml lower bs, n_patches or "
                f"max_patches, or set precision: bf16, then resume; all that was written is kept"
            )
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return (
                f"no space left on the disk ({text[:200]}): make room, then resume; all that was "
                f"written before is kept"
            )
        if isinstance(cause, OSError) and cause.filename is not None:
            way_out = "repair or remove it"
            if cause.errno in NOT_ALLOWED:
                way_out = "make it accessible, or name another place (--out, --log_folder)"
            return (
                f"{cause.filename} can't be used ({cause.strerror}): {way_out}, then give the "
                f"command again"
            )
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:1000]} (--debug shows where)"


def causes(error):
    """Yield the error, the one that caused it, and so on.

    torch raises its own error where a file could not be written.
    """
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
