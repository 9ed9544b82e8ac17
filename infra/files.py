"""Files that are whole or absent: atomic writes, checked reads, checksums."""

import errno
import hashlib
import json
import os
import stat
import zipfile
from contextlib import contextmanager, suppress

import torch

from infra.distributed import on_main_process
from infra.errors import RunError, UsageError

FORMAT = 3  # of checkpoints and artifacts; raise it when their content changes
LAST_COMMIT = {2: "e156b6c"}  # the last commit that reads an earlier format


JSON_BYTES, JSONL_BYTES = 20_000_000, 1_000_000_000  # a longer file is not of this program


def open_regular(path, most=None):
    """Open a file to read its bytes. Raises OSError if it is not a regular file or has more than `most` bytes."""
    number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # without O_NONBLOCK, a FIFO waits for a writer
    status = os.fstat(number)
    reason = "" if stat.S_ISREG(status.st_mode) else "not a regular file"
    if most is not None and status.st_size > most:
        reason = f"more than {most:,} bytes"
    if reason:
        os.close(number)
        raise OSError(errno.EINVAL, reason, str(path))
    return open(number, "rb")


def temporary(path):
    """Return the path of this process's temporary file for `path`. What a killed process left there is removed."""
    path = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    path.unlink(missing_ok=True)
    return path


@contextmanager
def atomic_write(path, keep=None):
    """Yield a temporary binary file; flush it and rename it to `path` if the block succeeds, else delete it.

    If `keep` is given, the old file is renamed to that.
    """
    new = temporary(path)
    try:
        with open(new, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


@on_main_process
def save(path, content, keep=None):
    """Write a dict of tensors and plain values atomically with torch.save. The old file is kept as `keep`, if given."""
    with atomic_write(path, keep) as file:
        torch.save({"format": FORMAT, **content}, file)


def load(path):
    """Return the dict that `save` wrote, with its tensors on the CPU.

    Raises RunError if the file is damaged or holds anything but tensors and plain values, and UsageError if an earlier
    version of the program wrote it.
    """
    try:
        with open_regular(path) as file:
            check_zip(file)
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
        found = content.get("format") if isinstance(content, dict) else None
        if found != FORMAT and found not in LAST_COMMIT:
            raise ValueError("not a file of this program")
    except Exception as error:  # a damaged zip or pickle can raise nearly anything
        reason = str(error).strip().split("\n")[0][:100]
        raise RunError(f"{path} can't be read ({type(error).__name__}: {reason})") from None
    if found != FORMAT:
        raise UsageError(f"{path} was written by an earlier version of this program, which `git checkout {LAST_COMMIT[found]}` "
                         f"brings back; or train under a new --exp_name")  # fmt: skip
    return content


def check_zip(file):
    """Raise ValueError if a file of torch.save is compressed or one of its checksums is wrong; torch.load checks neither."""
    with zipfile.ZipFile(file) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("compressed")  # a few bytes could expand to gigabytes
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"checksum of {damaged}")


@on_main_process
def write_json(path, content):
    """Write the content as JSON, atomically."""
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


@on_main_process
def link(source, target):
    """Give a file a second name, atomically; copy it where the file system has no hard links."""
    new = temporary(target)
    try:
        os.link(source, new)
    except OSError:
        with atomic_write(target) as file:
            file.write(source.read_bytes())
    else:
        os.replace(new, target)


@on_main_process
def remove(path):
    """Remove a file, if it exists."""
    path.unlink(missing_ok=True)


def read_json(path):
    """Return the content of a JSON file, {} if it is missing or damaged: what these files hold can be computed again."""
    try:
        with open_regular(path, JSON_BYTES) as file:
            return json.loads(file.read())
    except (OSError, ValueError, RecursionError):
        return {}


def sealed(content):
    """Return a dict of plain values, as JSON has it, with its checksum."""
    content = json.loads(json.dumps(content))  # turns keys into strings
    return {**content, "checksum": json_checksum(content)}


def is_sealed(content):
    """Whether a value read from JSON is a dict that `sealed` returned, unchanged."""
    if not isinstance(content, dict):
        return False
    return content.get("checksum") == json_checksum({name: value for name, value in content.items() if name != "checksum"})


def json_checksum(content):
    """Return 16 hexadecimal digits that change with any value in what JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def read_sealed(path):
    """Return the dict of a JSON file that was written with its checksum, {} if it is missing, damaged or changed."""
    content = read_json(path)
    return content if is_sealed(content) else {}


def read_jsonl(path):
    """Return the objects of a file with one JSON object per line, [] if it can't be read. Other lines are skipped."""
    try:
        with open_regular(path, JSONL_BYTES) as file:
            lines = file.read().split(b"\n")
    except OSError:
        return []
    rows = []
    for line in lines:
        with suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def file_checksum(path):
    """Return 16 hexadecimal digits that change with any byte of a file, "" if it can't be read."""
    try:
        with open_regular(path) as file:
            return hashlib.sha256(file.read()).hexdigest()[:16]
    except OSError:
        return ""


def checksum(*tensors):
    """Return 16 hexadecimal digits that change with any bit of the tensors, or with their shapes or dtypes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
