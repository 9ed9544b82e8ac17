"""Files that are whole or absent: atomic writes, checked reads, checksums."""

import hashlib
import json
import os
import zipfile
from contextlib import contextmanager, suppress

import torch

from infra.distributed import on_main_process
from infra.errors import RunError, UsageError

FORMAT = 3  # of checkpoints and artifacts; raise it when their content changes
LAST_COMMIT = {2: "e156b6c"}  # the last commit that reads an earlier format


@contextmanager
def atomic_write(path, keep=None):
    """Yield a temporary binary file; flush it and rename it to `path` if the block succeeds, else delete it.

    If `keep` is given, the old file is renamed to that.
    """
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # a killed process may have left a second name of a checkpoint, see `link`
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
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
        check_zip(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
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


def check_zip(path):
    """Raise ValueError if a file of torch.save is compressed or one of its checksums is wrong; torch.load checks neither."""
    with zipfile.ZipFile(path) as archive:
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
    temporary = target.with_name(target.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        with atomic_write(target) as file:
            file.write(source.read_bytes())
    else:
        os.replace(temporary, target)


@on_main_process
def remove(path):
    """Remove a file, if it exists."""
    path.unlink(missing_ok=True)


def read_json(path):
    """Return the content of a JSON file, {} if it is missing or damaged: what these files hold can be computed again."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def read_jsonl(path):
    """Return the objects of a file with one JSON object per line, [] if there is none. Incomplete lines are skipped."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def checksum(*tensors):
    """Return 16 hexadecimal digits that change with any bit of the tensors, or with their shapes or dtypes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
