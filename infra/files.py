"""Files that are whole or absent: atomic writes, checked reads, checksums.

Each guard is against an event in a user's life. A crash or a kill while a file is written: atomic
writes. A bad disk: the checksums of zip entries, of JSON and of tensors. A wrong or an older file
in the place: the format. Nothing here guards against a forged file; torch.load runs no code of one.
"""

import csv
import hashlib
import io
import json
import os
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from infra.distributed import on_main_process
from infra.errors import RunError, UsageError

FORMAT = 6  # of checkpoints and artifacts; raise it when their content changes
LAST_COMMIT = {
    2: "e156b6c",
    3: "741bd06",
    4: "f45453e",
    5: "84e58b9",
}  # the last commit that reads an earlier format


def user_path(text):
    """Return the Path that a user means: ~ at its start is the home folder.

    The shell replaces it in `--out ~/x`, but not in `--out=~/x`.
    """
    return Path(os.path.expanduser(text))


def temporary(path):
    """Return the path of this process's temporary file for `path`."""
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def remove_temporary(folder, keep=None):
    """Remove what killed processes left in a folder: NAME.PID.tmp, but not where NAME is `keep`."""
    for path in folder.glob("*.tmp"):
        is_kept = keep is not None and path.name.startswith(keep)
        if not is_kept and not path.is_dir():
            path.unlink()


@contextmanager
def atomic_write(path, keep=None):
    """Yield a temporary binary file; flush it and rename it to `path` if the block succeeds.

    Else it is deleted. If `keep` is given, the old file is renamed to that.
    """
    new = temporary(path)
    try:
        with open(new, "wb") as file:
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
def write_pt(path, content, keep=None):
    """Write a dict of tensors and plain values atomically with torch.save.

    The old file is kept as `keep`, if given.
    """
    with atomic_write(path, keep) as file:
        torch.save({"format": FORMAT, **content}, file)


def read_pt(path):
    """Return the dict that `write_pt` wrote, with its tensors on the CPU.

    Raises RunError if the file is damaged or holds anything but tensors and plain values, and
    UsageError if an earlier version of the program wrote it.
    """
    try:
        check_zip(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        version = content.get("format") if isinstance(content, dict) else None
        if version != FORMAT and version not in LAST_COMMIT:
            raise ValueError("not a file of this program")
    except Exception as error:  # a damaged zip or pickle can raise nearly anything
        reason = str(error).strip().split("\n")[0][:100]
        raise RunError(f"{path} can't be read ({type(error).__name__}: {reason})") from None
    if version != FORMAT:
        raise UsageError(
            f"{path} was written by an earlier version of this program, which "
            f"`git checkout {LAST_COMMIT[version]}` brings back; or train under a new --exp_name"
        )
    return content


def check_zip(path):
    """Raise ValueError if a checksum of a file of torch.save is wrong; torch.load checks none."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"checksum of {damaged}")


@on_main_process
def write_json(path, content):
    """Write the content as JSON, atomically."""
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


@on_main_process
def write_csv(path, header, rows):
    """Write a header and rows as comma-separated values, atomically."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    with atomic_write(path) as file:
        # A file's name need not be UTF-8.
        file.write(text.getvalue().encode(errors="surrogateescape"))


@on_main_process
def link(source, target):
    """Give a file a second name, atomically; copy it where the file system has no hard links."""
    new = temporary(target)
    new.unlink(missing_ok=True)
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
    """Return the content of a JSON file, {} if it is missing or damaged.

    What these files hold can be computed again.
    """
    try:
        with open(path, "rb") as file:
            return json.load(file)
    except (OSError, ValueError):
        return {}


def sealed(content):
    """Return a dict of plain values, as JSON has it, with its checksum."""
    content = json.loads(json.dumps(content))  # turns keys into strings
    return {**content, "checksum": json_checksum(content)}


def is_sealed(content):
    """Whether a value read from JSON is a dict that `sealed` returned, unchanged."""
    if not isinstance(content, dict):
        return False
    rest = {name: value for name, value in content.items() if name != "checksum"}
    return content.get("checksum") == json_checksum(rest)


def json_checksum(content):
    """Return 16 hexadecimal digits that change with any value in what JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def read_sealed(path):
    """Return the dict of a JSON file that was written with its checksum.

    {} if it is missing, damaged or changed.
    """
    content = read_json(path)
    return content if is_sealed(content) else {}


def read_jsonl(path):
    """Return the objects of a file with one JSON object per line, [] if it can't be read.

    Other lines are skipped.
    """
    try:
        with open(path, "rb") as file:
            lines = file.readlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        with suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def file_checksum(path):
    """Return 16 hexadecimal digits that change with any byte of a file, "" if it can't be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()[:16]
    except OSError:
        return ""


def checksum(*tensors):
    """Return 16 hexadecimal digits that change with any bit, shape or dtype of the tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
