"""Images of files: decoded once, kept in memory or in the cache folder, and read in batches.

The file has three parts: an image is read; many are decoded by several processes into a file of the
cache folder; such a file is read in batches.
"""

import collections
import functools
import hashlib
import multiprocessing
import os
import signal
import sys
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps

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
# Pillow would start an outside program for other formats, such as EPS.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
# Not "forkserver", the default from Python 3.14: a worker ends with its parent, which would be the
# server. Not threads: for small images Python's lock makes two as slow as one.
PROCESSES = multiprocessing.get_context("spawn" if sys.platform == "darwin" else "fork")


class UnreadableImage(Exception):
    """The file is not an image that can be used. The message names the file and the reason."""


def read_image(path, image_size):
    """Return the image as RGB uint8 (3, image_size, image_size).

    Of a file of several images it is the first. Raises UnreadableImage.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns above 89 million pixels.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
                pixels = np.asarray(to_rgb(image, image_size))
    except UnreadableImage as error:
        raise UnreadableImage(f"{path} ({error})") from None
    except Exception as error:  # Pillow raises nearly anything on a damaged file
        raise UnreadableImage(f"{path} ({type(error).__name__})") from None
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))  # (H, W, 3) -> (3, H, W)


def to_rgb(image, image_size):
    """Convert a PIL image to RGB, image_size x image_size.

    It is turned by its EXIF, its shorter side is resized to image_size, and it is centre-cropped.
    Raises UnreadableImage for floating-point pixels, which have no range that is agreed on.
    """
    if image.mode == "F":
        raise UnreadableImage("floating-point pixels")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit greyscale, which convert("RGB") would clip at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    return ImageOps.fit(image.convert("RGB"), (image_size, image_size), Image.Resampling.BICUBIC)


def decode(paths, folder, image_size):
    """Decode the files: few in memory, MANY by decode_once. Return what decode_in_memory does."""
    if len(paths) < MANY:
        return decode_in_memory(paths, image_size)
    return decode_once(paths, folder, image_size)


def decode_in_memory(paths, image_size):
    """Return a dict with the images of the M readable files.

    images: uint8 (M, 3, image_size, image_size). readable: int64 (M,), the indices of their files
    in paths. failures: a line for each of the other files.
    """
    images = torch.empty(len(paths), 3, image_size, image_size, dtype=torch.uint8)
    readable = []
    failures = []
    for row, path in enumerate(paths):
        try:
            images[row] = torch.from_numpy(read_image(path, image_size))
            readable.append(row)
        except UnreadableImage as error:
            failures.append(str(error))
    readable = torch.tensor(readable, dtype=torch.int64)
    return {
        "images": images[readable] if failures else images,
        "readable": readable,
        "failures": failures,
    }


def decode_once(paths, folder, image_size):
    """Like decode_in_memory, with several processes and a file of the cache folder.

    More than LARGE bytes of images stay in that file: images is an ImageFile.
    """
    name = f"folder-{image_size}"
    file = cache_path(name, folder).with_suffix(".u8")
    size = len(paths) * 3 * image_size**2
    try:
        with main_process_first():
            content = cached(
                name,
                folder,
                paths,
                read=lambda: decode_to_file(file, paths, image_size),
                is_whole=lambda: file.is_file() and file.stat().st_size == size,
            )
        images = ImageFile(file, image_size, content["readable"], content["digests"])
    except OSError as error:
        log.warning(f"the decoded images are not kept for the next time: {error}")
        return decode_in_memory(paths, image_size)
    if size > LARGE:
        return {**content, "images": images}
    try:
        return {**content, "images": images[:]}
    except RunError:
        log.warning(f"{file} was damaged and is removed")
        files.remove(file)
        return decode_in_memory(paths, image_size)


@on_main_process  # several would write the same file
def decode_to_file(file, paths, image_size):
    """Write the images to the rows of a file, uint8 (N, 3, image_size, image_size).

    Return what decode_in_memory does, with the digests of the images, int64 (M,), in their place.
    """
    with files.atomic_write(file) as out:
        out.truncate(len(paths) * 3 * image_size**2)
        digests, failures = decode_with_processes(out.name, paths, image_size)
    return {
        "readable": torch.tensor(list(digests), dtype=torch.int64),
        "digests": torch.tensor(list(digests.values()), dtype=torch.int64),
        "failures": failures,
    }


def decode_with_processes(file, paths, image_size):
    """Write image i to row i of the file.

    Return {row: digest} of the readable images, and a line for each of the others.
    """
    decode_row = functools.partial(decode_to_row, file, image_size)
    title = f"decode {Path(os.path.commonpath(paths)).name}"
    workers = ProcessPoolExecutor(
        mp_context=PROCESSES, initializer=start_worker, initargs=(os.getpid(),)
    )
    digests = {}
    failures = []
    with hold_signals() as signals, workers:
        results = workers.map(decode_row, range(len(paths)), paths, chunksize=CHUNK)
        try:
            for row, result in enumerate(progress_bar(results, title, total=len(paths))):
                if isinstance(result, UnreadableImage):
                    failures.append(str(result))
                else:
                    digests[row] = result
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
    return digests, failures


def start_worker(parent):
    """Prepare a process that decodes: it ends when its parent, the process with this pid, ends."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which the parent ends it
    watch(parent, lambda: os._exit(1))


def decode_to_row(file, image_size, row, path):
    """Decode an image to a row of the file.

    Return its digest, or UnreadableImage if it is not readable.
    """
    try:
        pixels = read_image(path, image_size)
    except UnreadableImage as error:
        return error
    with open(file, "r+b", buffering=0) as out:
        os.pwrite(out.fileno(), pixels, row * pixels.nbytes)
    return digest_of(pixels)


def digest_of(pixels):
    """Return the checksum of an image, an int64."""
    return int.from_bytes(hashlib.sha256(pixels).digest()[:8], "little", signed=True)


def cache_path(name, folder):
    """Return the path of a file in the cache folder: emp-ssl in $XDG_CACHE_HOME or ~/.cache.

    It can be removed at any time.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if home.startswith("~"):  # the user has no home, as in some containers
        home = os.path.join(tempfile.gettempdir(), f"cache-{os.getuid()}")
    digest = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:16]
    return Path(home) / "emp-ssl" / f"{name}-{digest}.pt"


def cached(name, folder, paths, read, is_whole=lambda: True):
    """Return the result of read(), and keep it in the cache folder for the next time.

    It is a dict of tensors and plain values. It is read again if the size or time of a file in
    `paths`, FORMATS or the version of Pillow has changed, or if is_whole() is false: whether
    another file that read() writes is complete. Raises OSError if the cache folder can't be
    written.
    """
    path = cache_path(name, folder)
    listing = [(str(path), *size_and_time(path)) for path in paths]
    key = hashlib.sha256(repr([PIL.__version__, FORMATS, listing]).encode()).hexdigest()
    content = load_cached(path, key, is_whole)
    if content is None:
        with locked(path.with_suffix(".lock"), wait=True):
            # Another process may have written it meanwhile.
            content = load_cached(path, key, is_whole) or read()
            if content is None:
                raise OSError("the main process has not written them")
            files.write_pt(path, {**content, "key": key})
    return content


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
