"""Images decoded once: into memory, or into a file of the cache folder, from which batches are read
ahead.
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
from infra.lock import close_inherited, locked
from infra.signals import STOPPING, Interrupted, hold_signals, watch

MANY = 1000  # files: from here on, several processes decode them and the result is cached
LARGE = 2 * 10**9  # bytes: above this, images stay in their file
FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "BMP",
    "TIFF",
    "GIF",
)  # Pillow would start an outside program for others, such as EPS
CHUNK = 64  # images that a worker process decodes at a time
# Not "forkserver", the default from Python 3.14: workers end with their parent, which would be the
# server.
PROCESSES = multiprocessing.get_context("spawn" if sys.platform == "darwin" else "fork")


class UnreadableImage(Exception):
    """The file is not an image that can be used. The message names the file and the reason."""


class ImageFile:
    """Images that do not fit into memory: uint8 (N, 3, size, size) in a file. digests: int64 (N,),
    a checksum of each image.

    images[index], where index is a slice or a tensor of indices, reads a CPU tensor. Raises
    RunError if the file is damaged.
    """

    def __init__(self, path, size, rows, digests):
        self.path, self.rows, self.digests, self.shape = (
            path,
            rows,
            digests,
            (len(rows), 3, size, size),
        )
        self.file = open(path, "rb")  # it stays open as long as the images are used

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        rows, digests = self.rows[index].tolist(), self.digests[index].tolist()
        images = torch.empty(len(rows), *self.shape[1:], dtype=torch.uint8)
        for image, row, digest in zip(images.numpy(), rows, digests, strict=True):
            if (
                os.preadv(self.file.fileno(), [image], row * image.nbytes) < image.nbytes
                or digest_of(image) != digest
            ):
                raise RunError(f"{self.path} is damaged: remove it, it will be made again")
        return images


def subset(images, index):
    """Return these images: a tensor of a tensor, an ImageFile of an ImageFile."""
    if isinstance(images, ImageFile):
        return ImageFile(images.path, images.shape[-1], images.rows[index], images.digests[index])
    return images[index]


def on_device(images, device):
    """Move a tensor of images to the device.

    An ImageFile stays where it is; its batches are moved.
    """
    return images if isinstance(images, ImageFile) else images.to(device)


def index_for(images, index, device):
    """Return a CPU tensor of indices where the images are: on the device, or on the CPU for an
    ImageFile.
    """
    return index if isinstance(images, ImageFile) else to_device(index, device)


def batches(images, rows, device, ahead=4):
    """Yield images[rows[0]], images[rows[1]], ... on the device.

    A thread reads and pins `ahead` batches of an ImageFile in advance. rows: slices, or tensors of
    indices from index_for.
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


def read_image(path, image_size):
    """Return the image as RGB uint8 (3, image_size, image_size); of a file of several images the
    first. Raises UnreadableImage.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "error", Image.DecompressionBombWarning
            )  # above 89 million pixels
            with (
                open(path, "rb") as file,
                Image.open(file, formats=FORMATS) as image,
            ):
                return np.asarray(to_rgb(image, image_size)).transpose(
                    2, 0, 1
                )  # (H, W, 3) -> (3, H, W)
    except UnreadableImage as error:
        raise UnreadableImage(f"{path} ({error})") from None
    except Exception as error:  # Pillow raises nearly anything on a damaged file
        raise UnreadableImage(f"{path} ({type(error).__name__})") from None


def to_rgb(image, image_size):
    """Convert a PIL image to RGB: turned by its EXIF, its shorter side resized to image_size,
    centre-cropped.

    Raises UnreadableImage for floating-point pixels, which have no range that is agreed on.
    """
    if image.mode == "F":
        raise UnreadableImage("floating-point pixels")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit greyscale, which convert("RGB") would clip at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    return ImageOps.fit(image.convert("RGB"), (image_size, image_size), Image.Resampling.BICUBIC)


def decode_each(rows, paths, image_size, store):
    """Decode images and call store(row, pixels) with each.

    Return {row: what store returned} and {row: why it is unreadable}.
    """
    stored, failures = {}, {}
    for row, path in zip(rows, paths, strict=True):
        try:
            stored[row] = store(row, read_image(path, image_size))
        except UnreadableImage as error:
            failures[row] = str(error)
    return stored, failures


def decode(paths, folder, image_size):
    """Decode the files: few in memory, MANY by decode_once. Return what decode_in_memory does."""
    if len(paths) < MANY:
        return decode_in_memory(paths, image_size)
    return decode_once(paths, folder, image_size)


def decode_in_memory(paths, image_size):
    """Return a dict: images, uint8 (M, 3, image_size, image_size), of the M readable files;
    readable, int64 (M,), their indices into paths; failures, a line for each of the other files.
    """
    images = torch.empty(len(paths), 3, image_size, image_size, dtype=torch.uint8)
    stored, failures = decode_each(range(len(paths)), paths, image_size, images.numpy().__setitem__)
    readable = torch.tensor(list(stored), dtype=torch.int64)
    return {
        "images": images[readable] if failures else images,
        "readable": readable,
        "failures": list(failures.values()),
    }


def decode_once(paths, folder, image_size):
    """Like decode_in_memory, with several processes and a file of the cache folder.

    More than LARGE bytes of images stay in that file: images is an ImageFile.
    """
    name, size = f"folder-{image_size}", len(paths) * 3 * image_size**2
    file = cache_path(name, folder).with_suffix(".u8")

    @on_main_process  # several would write the same file
    def decode_all():
        with files.atomic_write(file) as out:
            out.truncate(size)
            digests, failures = decode_with_processes(out.name, paths, image_size)
        return {
            "readable": torch.tensor(list(digests), dtype=torch.int64),
            "digests": torch.tensor(list(digests.values())),
            "failures": list(failures.values()),
        }

    try:
        with main_process_first():
            content = cached(
                name,
                folder,
                paths,
                decode_all,
                lambda: file.is_file() and file.stat().st_size == size,
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


def decode_with_processes(file, paths, image_size):
    """Decode image i to row i of the file. Return {row: digest} and {row: why it is unreadable}."""
    chunks = [range(i, min(i + CHUNK, len(paths))) for i in range(0, len(paths), CHUNK)]
    decode = functools.partial(
        decode_each, image_size=image_size, store=functools.partial(write_image, file)
    )
    digests, failures = {}, {}
    # Processes, not threads: Python's lock makes two threads half as fast as one.
    bar = progress_bar(None, f"decode {Path(os.path.commonpath(paths)).name}", total=len(paths))
    workers = ProcessPoolExecutor(
        mp_context=PROCESSES, initializer=start_worker, initargs=(os.getpid(),)
    )
    with hold_signals() as signals, bar, workers as pool:
        try:
            for stored, unreadable in pool.map(
                decode, chunks, [paths[rows.start : rows.stop] for rows in chunks]
            ):
                digests |= stored
                failures |= unreadable
                bar.update(len(stored) + len(unreadable))
                if signals:
                    break
        except BrokenProcessPool:
            if not signals:
                raise RunError(
                    "a process that decodes images was killed: give the command again"
                ) from None
    if signals:
        raise Interrupted(signals[0])
    return digests, failures


def start_worker(parent):
    """Prepare a process that decodes: it ends when its parent, the process with this pid, ends."""
    close_inherited()
    for number in STOPPING:
        signal.signal(
            number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN
        )  # the parent decides
    watch(parent, lambda: os._exit(1))


def write_image(file, row, pixels):
    """Write uint8 pixels (3, H, W) to a row of the file; return their digest, an int64."""
    content = np.ascontiguousarray(pixels).tobytes()
    with open(file, "r+b", buffering=0) as out:
        os.pwrite(out.fileno(), content, row * len(content))
    return digest_of(content)


def digest_of(pixels):
    """Return the checksum of an image, an int64."""
    return int.from_bytes(hashlib.sha256(pixels).digest()[:8], "little", signed=True)


def cache_path(name, folder):
    """Return the path of a file in the cache folder: emp-ssl in $XDG_CACHE_HOME or ~/.cache.

    It can be removed at any time.
    """
    place = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:16]
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser(
        "~/.cache"
    )  # "~" stays if the user is unknown
    if home.startswith("~"):
        home = os.path.join(tempfile.gettempdir(), f"cache-{os.getuid()}")
    return Path(home) / "emp-ssl" / f"{name}-{place}.pt"


def cached(name, folder, paths, read, is_whole=lambda: True):
    """Return the result of read(), a dict of tensors and plain values, and keep it in the cache
    folder for the next time.

    It is read again if the size or time of a file in `paths`, FORMATS or the version of Pillow has
    changed, or if is_whole() is false: whether another file that read() writes is complete. Raises
    OSError if the cache folder can't be written.
    """
    listing = [(str(path), *size_and_time(path)) for path in paths]
    key = hashlib.sha256(repr([PIL.__version__, FORMATS, listing]).encode()).hexdigest()
    path = cache_path(name, folder)

    def kept():
        try:
            content = files.read_pt(path)
        except (RunError, UsageError):  # missing, damaged, or of an earlier version
            return None
        return content if content.get("key") == key and is_whole() else None

    content = kept()
    if content is None:
        with locked(
            path.with_suffix(".lock"), wait=True
        ):  # one process at a time writes these files
            content = kept() or read()
            if content is None:
                raise OSError("the main process has not written them")
            files.write_pt(path, {**content, "key": key})
    return content


def size_and_time(path):
    """Return (bytes, modification time in ns), zeros for a broken link or a file that has just been
    removed.
    """
    try:
        stat = path.stat()
    except OSError:
        return 0, 0
    return stat.st_size, stat.st_mtime_ns
