"""Images of files: decoded once, kept in memory or in the cache folder, and read in batches.

The file has two parts: many images are decoded by several processes into a file of the cache
folder; such a file is read in batches.
"""

import collections
import functools
import hashlib
import math
import multiprocessing
import os
import signal
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch

from images.pixels import FORMATS, MAX_PIXELS, UnreadableImage, opened, read_image
from infra import files
from infra.console import log, progress_bar
from infra.device import to_device
from infra.distributed import main_process_first, on_main_process
from infra.errors import RunError, UsageError
from infra.lock import locked
from infra.signals import STOPPING, Interrupted, hold_signals, watch

MANY = 1000  # files: from here on, several processes decode them and the result is cached
LARGE = 2 * 10**9  # bytes: above this, images stay in their file
CHUNK = 16  # images that a process decodes at a time
# Not "forkserver", the default from Python 3.14: a worker ends with its parent, which would be the
# server. Not threads: for small images Python's lock makes two as slow as one.
PROCESSES = multiprocessing.get_context("spawn" if sys.platform == "darwin" else "fork")


class Decoding(NamedTuple):
    """How files become images: the arguments of read_image, beside the path."""

    image_size: int
    value_range: tuple | None = None
    max_pixels: int = MAX_PIXELS
    fit: str = "crop"


def decode(paths, folder, decoding):
    """Decode the files: few in memory, MANY by decode_once. Return what decode_in_memory does."""
    if len(paths) < MANY:
        return decode_in_memory(paths, decoding)
    return decode_once(paths, folder, decoding)


def decode_in_memory(paths, decoding):
    """Return a dict with the images of the M readable files.

    images: uint8 (M, 3, image_size, image_size). readable: int64 (M,), the indices of their files
    in paths. digests: int64 (M,), their checksums. plain: bool (M,), whether an image is of one
    colour. beside: float32 (M,), the share of the area of the file beside the largest square in it.
    failures: a line for each of the other files.
    """
    images = torch.empty(len(paths), 3, decoding.image_size, decoding.image_size, dtype=torch.uint8)
    results = []
    for row, path in enumerate(paths):
        try:
            pixels = read_image(path, *decoding)
            results.append(described(pixels, path))
            images[row] = torch.from_numpy(pixels)
        except UnreadableImage as error:
            results.append(error)
    content = collected(results)
    return {**content, "images": images[content["readable"]] if content["failures"] else images}


def collected(results):
    """Return what decode_in_memory does, without the images.

    results: of each file what `described` returns of its image, or UnreadableImage.
    """
    failures = [str(result) for result in results if isinstance(result, UnreadableImage)]
    readable = [i for i, result in enumerate(results) if not isinstance(result, UnreadableImage)]
    return {
        "readable": torch.tensor(readable, dtype=torch.int64),
        "digests": torch.tensor([results[i][0] for i in readable], dtype=torch.int64),
        "plain": torch.tensor([results[i][1] for i in readable], dtype=torch.bool),
        "beside": torch.tensor([results[i][2] for i in readable]),
        "failures": failures,
    }


def described(pixels, path):
    """Return what `collected` keeps of an image (3, H, W) and of the shape of its file."""
    with opened(path, math.inf) as image:  # reads the header only
        beside = 1 - min(image.size) / max(image.size)
    return digest_of(pixels), bool((pixels == pixels[:, :1, :1]).all()), beside


def decode_once(paths, folder, decoding):
    """Like decode_in_memory, with several processes and a file of the cache folder.

    More than LARGE bytes of images stay in that file: images is an ImageFile.
    """
    size = decoding.image_size
    value_range = [f"{value:g}" for value in decoding.value_range or ()]
    name = "-".join(["folder", str(size), decoding.fit, *value_range])
    file = cache_path(name, folder).with_suffix(".u8")
    n_bytes = len(paths) * 3 * size**2
    try:
        with main_process_first():
            content = cached(
                name,
                folder,
                paths,
                read=lambda: decode_to_file(file, paths, decoding),
                is_whole=lambda: file.is_file() and file.stat().st_size == n_bytes,
                decoding=decoding,
            )
        images = ImageFile(file, size, content["readable"], content["digests"])
    except OSError as error:
        log.warning(f"the decoded images are not kept for the next time: {error}")
        return decode_in_memory(paths, decoding)
    if n_bytes > LARGE:
        return {**content, "images": images}
    try:
        return {**content, "images": images[:]}
    except RunError:
        log.warning(f"{file} was damaged and is removed")
        files.remove(file)
        return decode_in_memory(paths, decoding)


@on_main_process  # several would write the same file
def decode_to_file(file, paths, decoding):
    """Write the images to the rows of a file, uint8 (N, 3, image_size, image_size).

    Return what decode_in_memory does without the images, and entries, versions: what reusable_rows
    compares.
    """
    entries = [digest_of(repr(entry).encode()) for entry in listing(paths)]
    before = reusable_rows(file, entries, decoding)
    with files.atomic_write(file) as out:
        out.truncate(len(paths) * 3 * decoding.image_size**2)
        results = decode_with_processes(out.name, paths, decoding, file, before)
    return {
        **collected(results),
        "entries": torch.tensor(entries, dtype=torch.int64),
        "versions": versions(decoding),
    }


def reusable_rows(file, entries, decoding):
    """Return (row, digest) of each image that the file has from an earlier time, None for others.

    entries: a digest of the path, size and time of each image.
    """
    try:
        content = files.read_pt(file.with_suffix(".pt"))
    except (RunError, UsageError):
        content = {}
    if content.get("versions") != versions(decoding):
        return [None] * len(entries)
    readable = content["readable"]
    rows = zip(readable.tolist(), content["digests"].tolist(), strict=True)
    rows = dict(zip(content["entries"][readable].tolist(), rows, strict=True))
    return [rows.get(entry) for entry in entries]


def decode_with_processes(file, paths, decoding, old_file, before):
    """Write image i to row i of the file.

    before: what reusable_rows returns of old_file. Return what `collected` takes.
    """
    decode_row = functools.partial(decode_to_row, file, decoding, old_file)
    title = f"decode {Path(os.path.commonpath(paths)).name}"
    workers = ProcessPoolExecutor(
        mp_context=PROCESSES, initializer=start_worker, initargs=(os.getpid(),)
    )
    results = []
    with hold_signals() as signals, workers:
        stream = workers.map(decode_row, range(len(paths)), paths, before, chunksize=CHUNK)
        try:
            for result in progress_bar(stream, title, total=len(paths)):
                results.append(result)
                if signals:
                    break
        except BrokenProcessPool:
            if not signals:
                raise RunError(
                    "a process that decodes images was killed: give the command again"
                ) from None
        workers.shutdown(cancel_futures=True)
    if signals:
        raise Interrupted(signals[0])
    return results


def start_worker(parent):
    """Prepare a process that decodes: it ends when its parent, the process with this pid, ends."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which the parent ends it
    watch(parent, lambda: os._exit(1))


def decode_to_row(file, decoding, old_file, row, path, before):
    """Decode an image to a row of the file, or take it from old_file.

    before: (row, digest) there, or None. Return what `described` does, or UnreadableImage if it is
    not readable.
    """
    pixels = stored_image(old_file, decoding.image_size, *before) if before else None
    try:
        pixels = read_image(path, *decoding) if pixels is None else pixels
        result = described(pixels, path)
    except UnreadableImage as error:
        return error
    with open(file, "r+b", buffering=0) as out:
        os.pwrite(out.fileno(), pixels, row * pixels.nbytes)
    return result


def stored_image(file, image_size, row, digest):
    """Return the image (3, image_size, image_size) in this row, None if it is damaged or gone."""
    pixels = np.zeros((3, image_size, image_size), np.uint8)
    try:
        with open(file, "rb", buffering=0) as stored:
            os.preadv(stored.fileno(), [pixels], row * pixels.nbytes)
    except OSError:
        return None
    return pixels if digest_of(pixels) == digest else None


def digest_of(content):
    """Return the checksum of bytes or an array, an int64."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little", signed=True)


def cache_path(name, folder):
    """Return the path of a file in the cache folder: emp-ssl in $XDG_CACHE_HOME or ~/.cache.

    It can be removed at any time.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if home.startswith("~"):  # the user has no home, as in some containers
        home = os.path.join(tempfile.gettempdir(), f"cache-{os.getuid()}")
    digest = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:16]
    return Path(home) / "emp-ssl" / f"{name}-{digest}.pt"


@on_main_process
def write_lines(path, lines):
    """Write a text file into the cache folder. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_write(path) as file:
        # A file's name need not be UTF-8.
        file.write("".join(f"{line}\n" for line in lines).encode(errors="surrogateescape"))


def cached(name, folder, paths, read, is_whole=lambda: True, decoding=None):
    """Return the result of read(), and keep it in the cache folder for the next time.

    It is a dict of tensors and plain values. It is read again if the size or time of a file in
    `paths` or versions(decoding) has changed, or if is_whole() is false: whether another file that
    read() writes is complete. Raises OSError if the cache folder can't be written.
    """
    path = cache_path(name, folder)
    key = hashlib.sha256(repr([versions(decoding), listing(paths)]).encode()).hexdigest()
    content = load_cached(path, key, is_whole)
    if content is None:
        with locked(path.with_suffix(".lock"), wait=True):
            # Another process may have written it meanwhile.
            content = load_cached(path, key, is_whole) or read()
            if content is None:
                raise OSError("the main process has not written them")
            files.write_pt(path, {**content, "key": key})
    return content


def versions(decoding):
    """Return what decoded images depend on, beside their files, as a text."""
    return repr([PIL.__version__, FORMATS, decoding])


def listing(paths):
    """Return [(path, bytes, modification time)] of files."""
    return [(str(path), *size_and_time(path)) for path in paths]


def load_cached(path, key, is_whole):
    """Return the content of a file of the cache, None if it is not there, damaged or outdated."""
    try:
        content = files.read_pt(path)
    except (RunError, UsageError):
        return None
    return content if content.get("key") == key and is_whole() else None


def size_and_time(path):
    """Return (bytes, modification time in ns), zeros for a broken link or a file that is gone."""
    try:
        stat = path.stat()
    except OSError:
        return 0, 0
    return stat.st_size, stat.st_mtime_ns


class ImageFile:
    """Images that do not fit into memory: uint8 (N, 3, size, size) in a file.

    rows: int64 (N,), their indices in the file. digests: int64 (N,), their checksums.
    images[index], where index is a slice or a tensor of indices, reads a CPU tensor. Raises
    RunError if the file is damaged.
    """

    def __init__(self, path, size, rows, digests):
        self.path = path
        self.rows = rows
        self.digests = digests
        self.shape = (len(rows), 3, size, size)
        # It stays open as long as the images are used.
        self.file = open(path, "rb")  # noqa: SIM115

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        rows = self.rows[index].tolist()
        digests = self.digests[index].tolist()
        images = torch.empty(len(rows), *self.shape[1:], dtype=torch.uint8)
        for image, row, digest in zip(images.numpy(), rows, digests, strict=True):
            n_bytes = os.preadv(self.file.fileno(), [image], row * image.nbytes)
            if n_bytes < image.nbytes or digest_of(image) != digest:
                raise RunError(f"{self.path} is damaged: remove it, it will be made again")
        return images


def subset(images, index):
    """Return these images: a tensor of a tensor, an ImageFile of an ImageFile."""
    if isinstance(images, ImageFile):
        return ImageFile(images.path, images.shape[-1], images.rows[index], images.digests[index])
    return images[index]


def on_device(images, device):
    """Move a tensor of images to the device. Of an ImageFile, the batches are moved."""
    return images if isinstance(images, ImageFile) else images.to(device)


def index_for(images, index, device):
    """Return a CPU tensor of indices on the device, or as it is for an ImageFile."""
    return index if isinstance(images, ImageFile) else to_device(index, device)


def batches(images, rows, device, ahead=4):
    """Yield images[rows[0]], images[rows[1]], ... on the device.

    rows: slices, or tensors of indices from index_for. A thread reads and pins `ahead` batches of
    an ImageFile in advance.
    """
    if not isinstance(images, ImageFile):
        yield from (images[index] for index in rows)
        return

    def read(index):
        return images[index].pin_memory() if device.type == "cuda" else images[index]

    with ThreadPoolExecutor(1) as pool:
        reads = collections.deque(pool.submit(read, index) for index in rows[:ahead])
        for i in range(len(rows)):
            batch = reads.popleft().result()
            if i + ahead < len(rows):
                reads.append(pool.submit(read, rows[i + ahead]))
            yield batch.to(device, non_blocking=True)
