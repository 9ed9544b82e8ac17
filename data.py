"""Data sets as uint8 tensors, and patches cut and augmented from them in whole batches."""

import collections
import csv
import functools
import hashlib
import math
import os
import signal
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from tqdm import tqdm

import experiment
import parallel
from experiment import RunError, UsageError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
MANY = 1000  # image files that are worth several processes, and a place in the cache
LARGE = 2 * 10**9  # bytes of images that are not kept in memory


class ImageSet(NamedTuple):
    images: torch.Tensor  # uint8 (N, 3, H, W)
    labels: torch.Tensor | None  # int64 (N,), None where the images have no classes
    class_names: list


def generator(seed, purpose, epoch=0, step=0):
    """A CPU torch.Generator that depends on these four alone: any step can be replayed by itself."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{epoch}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


# ---------------------------------------------------------------------------------------------- data sets


def load_images(name, root, train, image_size=32, labels=None):
    """One split of a data set, whole, in memory.

    name: cifar10, cifar100, folder or textures. root: the folder with the files (cifar10, cifar100: downloaded into
    it once; folder: see load_folder; textures: not used). image_size: height and width in pixels, and labels, a CSV file,
    see read_labels: `folder` only.
    Returns an ImageSet, None for the test split of a `folder` that has none. Raises UsageError where the data is
    not there or image_size does not fit, RunError where more than 1 image in 100 can't be read.
    """
    if name != "folder" and image_size != 32:
        raise UsageError(f"image_size {image_size}: the images of {name} are 32 pixels wide; only folder is resized")
    if name != "folder" and labels:
        raise UsageError(f"labels {labels}: {name} has its own; only the images of folder can be given others")
    if name == "textures":
        return make_textures(4000 if train else 1000, generator(0, "textures", epoch=int(train)))
    if name == "folder":
        return load_folder(Path(root), train, image_size, labels)
    if name in ("cifar10", "cifar100"):
        return load_cifar(name, root, train)
    raise UsageError(f"unknown dataset {name!r}: choose from cifar10, cifar100, folder and textures")


class ImageFile:
    """Images that are too many for the memory: uint8 (N, 3, size, size) in a file, read where they are asked for.

    images[index], a slice or a tensor of indices, is a tensor on the CPU. digests: int64 (N,), a checksum of each image.
    """

    def __init__(self, path, size, rows, digests):
        self.path, self.rows, self.digests, self.shape = path, rows, digests, (len(rows), 3, size, size)
        self.file = open(path, "rb")  # noqa: SIM115, as long as the images are used

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        rows = self.rows[index]
        images = torch.empty(len(rows), *self.shape[1:], dtype=torch.uint8)
        for image, row in zip(images.numpy(), rows.tolist(), strict=True):
            if os.preadv(self.file.fileno(), [image], row * image.nbytes) < image.nbytes:
                raise RunError(f"{self.path} is cut off: remove it, it will be made again")
        return images


def subset_of(images, index):
    """These images, which stay in their file if they are in one."""
    if isinstance(images, ImageFile):
        return ImageFile(images.path, images.shape[-1], images.rows[index], images.digests[index])
    return images[index]


def on_device(images, device):
    """A tensor of images goes to the device whole; an ImageFile stays where it is."""
    return images if isinstance(images, ImageFile) else images.to(device)


def batches(images, rows, device, ahead=4):
    """images[rows[0]], images[rows[1]], ... on the device; those of an ImageFile are read by a thread, `ahead` of their use."""
    if not isinstance(images, ImageFile):
        yield from (images[index] for index in rows)
        return
    with ThreadPoolExecutor(1) as pool:
        read = collections.deque(pool.submit(images.__getitem__, to_cpu(index)) for index in rows[:ahead])
        for i in range(len(rows)):
            batch = read.popleft().result()
            if i + ahead < len(rows):
                read.append(pool.submit(images.__getitem__, to_cpu(rows[i + ahead])))
            yield to_device(batch, device)


def to_cpu(index):
    return index.cpu() if isinstance(index, torch.Tensor) else index


def load_cifar(name, root, train):
    """CIFAR-10 or CIFAR-100 through torchvision, downloaded into `root` unless it is there."""
    dataset_class = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]

    def read():
        try:
            dataset = dataset_class(root, train=train, download=True)
        except (OSError, RuntimeError) as error:
            raise UsageError(
                f"{name} is not in {root} and can't be downloaded ({error}). Put {dataset_class.filename} "
                f"(md5 {dataset_class.tgz_md5}) into {root}, or work offline with --dataset textures or with images of "
                f"your own: --dataset folder --data_dir DIR"
            ) from error
        images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()  # (N, 32, 32, 3) -> (N, 3, 32, 32)
        return {"images": images, "labels": torch.tensor(dataset.targets), "class_names": list(dataset.classes)}

    folder = Path(root, dataset_class.base_folder)
    first = None if folder.is_dir() else read()
    content = cached(f"{name}-{'train' if train else 'test'}", folder, sorted(folder.iterdir()), lambda: first or read())
    return ImageSet(content["images"], content["labels"], content["class_names"])


def cache_path(name, folder):
    """The file of the cache folder, which is emp-ssl in $XDG_CACHE_HOME, ~/.cache by default; it can be removed at any time."""
    place = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:16]
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "emp-ssl" / f"{name}-{place}.pt"


def cached(name, folder, paths, read, whole=lambda: True):
    """What read() returns, a dict of tensors and plain values; kept in the cache folder for the next time.

    It is read anew where a size or time of the files `paths` in `folder` has changed, or the version of Pillow, or where what
    else read() has written is not whole().
    """
    listing = [(str(path), *size_and_time(path)) for path in paths]
    key = hashlib.sha256(repr([PIL.__version__, listing]).encode()).hexdigest()
    path = cache_path(name, folder)
    try:
        content = experiment.load(path)
        if content.get("key") == key and whole():
            return content
    except RunError:  # missing or damaged
        pass
    content = read()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        experiment.save(path, {**content, "key": key})
    except OSError as error:
        print(f"warning: the decoded images are not kept for the next time: {error}", file=sys.stderr)
    return content


def size_and_time(path):
    """Bytes and modification time in ns; zeros for what is a broken link or has just been removed."""
    try:
        stat = path.stat()
    except OSError:
        return 0, 0
    return stat.st_size, stat.st_mtime_ns


def read_labels(file):
    """{path: label} of a CSV file with a line path,label for each image, paths as they are below data_dir; a first line that
    says "path,label" is skipped. Raises UsageError if it can't be read or a line is not of two columns."""
    try:
        with open(file, newline="", encoding="utf-8") as lines:
            rows = [row for row in csv.reader(lines) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"labels {file} can't be read: {error}") from None
    for number, row in enumerate(rows, 1):
        if len(row) != 2:
            raise UsageError(f"labels {file}: row {number} has {len(row)} columns, not path,label")
    return {os.path.normpath(path): label for path, label in rows if (path, label) != ("path", "label")}


def load_folder(root, train, image_size, labels=None):
    """Images below `root`: train/<class>/* and test/<class>/*, or any tree of unlabelled images.

    Without train/ all images below root are the training split. labels: see read_labels; else the folders are the classes.
    Fewer than two class folders, or images beside them, are no labels. Files that can't be read are left out and named on
    stderr.
    """
    if not root.is_dir():
        raise UsageError(f"data_dir {root} is not a folder")
    has_splits = (root / "train").is_dir()
    train_root = root / "train" if has_splits else root
    folder = train_root if train else root / "test"
    if not train and not (has_splits and folder.is_dir()):
        return None

    class_names = find_classes(train_root) if has_splits else []
    paths = find_images(folder)
    if not paths:
        raise UsageError(f"no images in {folder} (looked for {' '.join(sorted(SUFFIXES))} in all its folders)")
    if labels:
        named = read_labels(labels)
        class_names = sorted(set(named.values()))
        missing = [path for path in paths if str(path.relative_to(root)) not in named]
        if missing or len(class_names) < 2:
            what = f"{missing[0]} and {len(missing) - 1} more have no label" if missing else "there are fewer than two labels"
            raise UsageError(f"labels {labels}: {what}")
        targets = torch.tensor([class_names.index(named[str(path.relative_to(root))]) for path in paths])
    elif class_names:
        parts = [path.relative_to(folder).parts for path in paths]
        unknown = sorted({part[0] for part in parts} - set(class_names))
        if unknown:
            raise UsageError(f"{folder / unknown[0]} is not one of the {len(class_names)} class folders of {train_root}")
        targets = torch.tensor([class_names.index(part[0]) for part in parts])

    images, readable = read_images(paths, folder, image_size)
    return ImageSet(images, targets[readable] if class_names else None, class_names)


def find_images(folder):
    """Paths of all images below the folder, sorted; links to folders are not followed."""
    walk = ((Path(directory), names) for directory, _, names in os.walk(folder))
    return sorted(directory / name for directory, names in walk for name in names if Path(name).suffix.lower() in SUFFIXES)


def find_classes(folder):
    """Names of the folders that hold images, sorted; [] if they are fewer than two or images lie beside them."""
    names = {path.relative_to(folder).parts[0] for path in find_images(folder)}
    return sorted(names) if len(names) > 1 and all((folder / name).is_dir() for name in names) else []


def read_images(paths, folder, image_size):
    """uint8 (M, 3, image_size, image_size) of the M readable files, and their indices into paths, int64 (M,)."""
    content = decode_once(paths, folder, image_size) if len(paths) >= MANY else decode(paths, image_size)
    bad = content["failures"]
    if len(bad) > len(paths) / 100:
        raise RunError(f"{len(bad)} of {len(paths)} images in {folder} can't be read, more than 1 in 100: {', '.join(bad[:5])}")
    if bad:
        print(f"warning: left out {len(bad)} of {len(paths)} images that can't be read: {', '.join(bad)}", file=sys.stderr)
    return content["images"], content["readable"]


def decode_once(paths, folder, image_size):
    """As decode, of many files: by several processes, into one file of the cache folder, from which it comes the next time.

    More than LARGE bytes of images stay in that file, as an ImageFile.
    """
    file = cache_path(f"folder-{image_size}", folder).with_suffix(".u8")
    size = len(paths) * 3 * image_size**2

    def read():
        file.parent.mkdir(parents=True, exist_ok=True)
        with experiment.replacing(file) as out:
            out.truncate(size)
            jobs = functools.partial(write_image, out.name, image_size)
            # Threads would wait for each other: they are half as fast as no threads at all.
            with ProcessPoolExecutor(initializer=leave_signals_to_the_parent) as pool:
                results = pool.map(jobs, range(len(paths)), paths, chunksize=64)
                results = list(tqdm(results, "decode", len(paths), disable=None if parallel.FIRST else True))
        readable = [i for i, result in enumerate(results) if isinstance(result, int)]
        return {"readable": torch.tensor(readable, dtype=torch.int64), "digests": torch.tensor([results[i] for i in readable]),
                "failures": [result for result in results if isinstance(result, str)]}  # fmt: skip

    try:
        with parallel.first_alone():
            content = cached(f"folder-{image_size}", folder, paths, read, lambda: file.exists() and file.stat().st_size == size)
    except OSError as error:
        print(f"warning: the decoded images are not kept for the next time: {error}", file=sys.stderr)
        return decode(paths, image_size)
    images = ImageFile(file, image_size, content["readable"], content["digests"])
    return {**content, "images": images if size > LARGE else images[:]}


def write_image(file, image_size, i, path):
    """Write image i to its place in the file; returns its checksum, or the path and what is wrong with it, as a text."""
    pixels = read_image(path, image_size)
    if isinstance(pixels, str):
        return pixels
    content = np.ascontiguousarray(pixels.transpose(2, 0, 1)).tobytes()  # (3, image_size, image_size)
    descriptor = os.open(file, os.O_WRONLY)
    try:
        os.pwrite(descriptor, content, i * len(content))
    finally:
        os.close(descriptor)
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little", signed=True)


def decode(paths, image_size):
    """{"images": as read_images, "readable": indices, "failures": of the other files, a text each}."""
    results = [read_image(path, image_size) for path in paths]
    readable = [i for i, result in enumerate(results) if isinstance(result, np.ndarray)]
    pixels = np.empty((len(readable), image_size, image_size, 3), np.uint8)
    for row, i in enumerate(readable):
        pixels[row] = results[i]
    return {
        "images": torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
        "readable": torch.tensor(readable, dtype=torch.int64),
        "failures": [result for result in results if isinstance(result, str)],
    }


def leave_signals_to_the_parent():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def read_image(path, image_size):
    """uint8 (image_size, image_size, 3), or the path and what is wrong with the file, as a text."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # above 89 million pixels
            with Image.open(path) as image:
                return np.asarray(to_rgb(image, image_size))
    except Exception as error:  # Pillow raises nearly anything on a damaged file
        return f"{path} ({type(error).__name__})"


def to_rgb(image, image_size):
    """A PIL image of any mode as RGB, turned as its EXIF says, its shorter side resized to image_size, centre-cropped."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit greyscale, which convert("RGB") would clip at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    return ImageOps.fit(image.convert("RGB"), (image_size, image_size), Image.Resampling.BICUBIC)


def balanced_subset(labels, n_images, n, generator):
    """Indices, sorted, of n of n_images random images, as many of each class as the classes allow.

    labels: int64 (n_images,) or None. Raises UsageError if n is greater than n_images.
    """
    if n > n_images:
        raise UsageError(f"n_images {n} is more than the {n_images} training images")
    order = torch.randperm(n_images, generator=generator)
    if labels is not None:
        shuffled = labels[order]
        rank = torch.empty_like(order)  # of each image among those of its class
        for label in shuffled.unique():
            members = shuffled == label
            rank[members] = torch.arange(int(members.sum()))
        order = order[rank.argsort(stable=True)]
    return order[:n].sort().values


# ----------------------------------------------------------------------------------------------- textures


def _step(x):
    return torch.sigmoid(6 * x)


def _wave(u):
    return _step(torch.cos(2 * math.pi * u))


def _line(u, width):
    return (u - u.round()).abs().lt(width).float()


def _cell(u, v):
    return torch.cos(2 * math.pi * u) + torch.cos(2 * math.pi * v)


def _blob(noise, sigma):
    smooth = gaussian_blur(noise[:, None], torch.full((len(noise),), sigma))[:, 0]
    return _step(smooth / smooth.std(dim=(1, 2), keepdim=True) / 3)


# Each family maps u, v (rotated and shifted coordinates, in periods), r (distance from a random centre, in
# periods) and white noise, all (N, 32, 32), to brightness in [0, 1].
TEXTURES = {
    "stripes": lambda u, v, r, noise: _wave(u),
    "checks": lambda u, v, r, noise: _step(2 * torch.cos(math.pi * u) * torch.cos(math.pi * v)),
    "dots": lambda u, v, r, noise: _step(2 * (_cell(u, v) - 0.8)),
    "rings": lambda u, v, r, noise: _wave(r),
    "waves": lambda u, v, r, noise: _wave(u + 0.4 * torch.sin(math.pi * v)),
    "bricks": lambda u, v, r, noise: torch.maximum(_line(v, 0.15), _line(u / 2 + v.floor() / 2, 0.08)),
    "grid": lambda u, v, r, noise: torch.maximum(_line(u, 0.12), _line(v, 0.12)),
    "dashes": lambda u, v, r, noise: _wave(u) * _step(torch.cos(math.pi * v) + 0.2),
    "fine noise": lambda u, v, r, noise: _blob(noise, 0.6),
    "coarse noise": lambda u, v, r, noise: _blob(noise, 1.8),
}


def make_textures(n, generator):
    """n images, 32x32, of the ten texture families in equal shares and random order: an ImageSet.

    Phase, orientation, scale (a period of 5 to 7 pixels) and the two near-grey colours are random in each image,
    and which of the two is the brighter: so single pixels say nearly nothing of the class, neighbouring ones all.
    """

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    labels = torch.randperm(n, generator=generator) % len(TEXTURES)
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    angle, period = uniform(0, 2 * math.pi, 1, 1), uniform(5, 7, 1, 1)
    u = (x * angle.cos() + y * angle.sin()) / period + uniform(0, 6, 1, 1)  # (n, 32, 32)
    v = (y * angle.cos() - x * angle.sin()) / period + uniform(0, 6, 1, 1)
    r = torch.hypot(x - uniform(0, 31, 1, 1), y - uniform(0, 31, 1, 1)) / period + uniform(0, 1, 1, 1)
    noise = torch.randn(n, 32, 32, generator=generator)

    pattern = torch.empty(n, 32, 32)
    for label, draw in enumerate(TEXTURES.values()):
        i = labels == label
        pattern[i] = draw(u[i], v[i], r[i], noise[i])
    contrast = uniform(0.5, 0.8, 1) * uniform(-1, 1, 1).sign()
    colours = torch.cat([0.5 - contrast / 2, 0.5 + contrast / 2], 1)[:, :, None] + uniform(-0.06, 0.06, 2, 3)  # (n, 2, 3)
    weights = torch.stack([1 - pattern, pattern], 1)  # (n, 2, 32, 32)
    images = torch.einsum("nkc,nkhw->nchw", colours, weights)
    return ImageSet(images.mul(255).round().clamp(0, 255).to(torch.uint8), labels, list(TEXTURES))


# ------------------------------------------------------------------------------------------------ patches


def sample_patches(images, n_patches, generator, size=32, first=0, batch=None):
    """Random augmented patches: n_patches of each image, each a quarter of its area, as the network sees them.

    images: uint8 (B, 3, H, W) on any device, H and W even. generator: a CPU torch.Generator, so that the same
    patches are drawn for every device. Returns float32 (n_patches, B, 3, size, size) in [-1, 1] on that device, for
    which the host never waits. batch: the images are those from `first` on of so many, and get the patches that they would
    get among these.
    Source: arXiv 2304.03977, appendix, and the authors' code.
    """
    B, _, H, W = images.shape
    batch = batch or B
    params = sample_params(n_patches * batch, H, W, generator)
    if batch > B:
        params = {k: v.unflatten(0, (n_patches, batch))[:, first : first + B].flatten(0, 1) for k, v in params.items()}
    params["image"] = torch.arange(B).repeat(n_patches)  # (P B,)
    # Patches whose hue comes at the same turn lie side by side, so that the jitter works on slices and not on copies.
    turn = torch.where(params["jitter"], (params["order"] == HUE).int().argmax(1), NO_JITTER)
    by_turn = turn.argsort(stable=True)
    params = {name: values[by_turn] for name, values in params.items()}
    x = augment(cut(images, params, size), params, turn.bincount(minlength=NO_JITTER + 1).tolist())
    x = x.index_select(0, to_device(by_turn.argsort(), x.device)).mul_(2).sub_(1)
    return x.unflatten(0, (n_patches, B))  # (P, B, 3, size, size)


def count_views(n_views, kind):
    """How many views sample_views makes where it is asked for n_views."""
    return math.isqrt(n_views) ** 2 if kind == "grid" else n_views


def sample_views(images, n_views, kind, generator, size=32):
    """What an image is encoded by: as sample_patches, but (V, B, 3, size, size), V at most n_views.

    kind: augmented, patches as in training; crops, of the same size at random places and nothing else; grid, k x k crops at
    even distances, from corner to corner, where k is the root of n_views, rounded down: no randomness is left.
    """
    if kind == "augmented":
        return sample_patches(images, n_views, generator, size)
    B, _, H, W = images.shape
    if kind == "crops":
        top, left = (torch.randint(n - n // 2 + 1, (n_views * B,), generator=generator) for n in (H, W))
    else:
        k = math.isqrt(n_views)
        rows, columns = (torch.linspace(0, n - n // 2, k).round().long() if k > 1 else torch.tensor([n // 4]) for n in (H, W))
        top, left = (places.flatten().repeat_interleave(B) for places in torch.meshgrid(rows, columns, indexing="ij"))
    flip = torch.zeros(len(top), dtype=torch.bool)
    params = {"top": top, "left": left, "flip": flip, "image": torch.arange(B).repeat(len(top) // B)}
    return cut(images, params, size).mul_(2).sub_(1).unflatten(0, (-1, B))


def to_device(tensor, device):
    """A CPU tensor on the device, by a copy that neither waits for it nor for what it is doing."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def sample_params(n, H, W, generator):
    """What happens to each of n patches of images (H, W), as a dict of CPU tensors (n, ...).

    top, left int64; flip, jitter, grey, blur, solarise bool; order int64 (n, 4), a permutation of JITTER per patch;
    brightness, contrast, saturation and hue factors and the blur's sigma in pixels, float32. The probabilities and
    ranges are those of the authors' code.
    """

    def uniform(low, high):
        return low + (high - low) * torch.rand(n, generator=generator)

    def chance(p):
        return torch.rand(n, generator=generator) < p

    return {
        "top": torch.randint(H - H // 2 + 1, (n,), generator=generator),
        "left": torch.randint(W - W // 2 + 1, (n,), generator=generator),
        "flip": chance(0.5),
        "jitter": chance(0.8),
        "order": torch.rand(n, 4, generator=generator).argsort(1),
        "brightness": uniform(0.6, 1.4),
        "contrast": uniform(0.6, 1.4),
        "saturation": uniform(0.6, 1.4),
        "hue": uniform(-0.2, 0.2),
        "grey": chance(0.2),
        "blur": chance(0.1),
        "sigma": uniform(0.1, 2.0),
        "solarise": chance(0.1),
    }


def cut(images, params, size):
    """Crop, flip and resize: images uint8 (B, 3, H, W), params of n patches -> float32 (n, 3, size, size) in [0, 1]."""
    B, _, H, W = images.shape
    h, w = H // 2, W // 2
    left = torch.where(params["flip"], W - w - params["left"], params["left"])  # the mirrored crop of the mirrored image
    image = params["image"] + B * params["flip"]
    image, top, left = (to_device(index, images.device) for index in (image, params["top"], left))
    windows = torch.cat([images, images.flip(-1)]).unfold(2, h, 1).unfold(3, w, 1)  # a view, (2 B, 3, H-h+1, W-w+1, h, w)
    x = windows[image, :, top, left].float()  # (n, 3, h, w)
    # Resizing is linear along each axis: two small matrix products, on a CPU 2.6x as fast as F.interpolate.
    x = resize_matrix(h, size, x.device).div(255) @ x @ resize_matrix(w, size, x.device).T
    return x.clamp_(0, 1) if size >= BICUBIC_FROM else x  # bicubic interpolation overshoots


BICUBIC_FROM = 96  # pixels: bilinear for CIFAR and bicubic for ImageNet, as in the authors' code


def resize_matrix(length, size, device):
    """(size, length): bilinear or, to BICUBIC_FROM pixels or more, bicubic interpolation; antialiased where it shrinks."""
    eye, mode = torch.eye(length, device=device)[None, None], "bicubic" if size >= BICUBIC_FROM else "bilinear"
    # Antialiasing has another bicubic kernel, that of Pillow, which is the one that is meant.
    antialias = size < length or mode == "bicubic"
    return F.interpolate(eye, size=(size, length), mode=mode, align_corners=False, antialias=antialias)[0, 0]


JITTER = ("brightness", "contrast", "saturation", "hue")
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
NO_JITTER = 4  # in the place of hue's turn


def augment(x, params, n_by_turn):
    """Colour jitter, greyscale, blur and solarise x (n, 3, h, w) in [0, 1] by sample_params; returns the result.

    The first n_by_turn[0] patches must be those whose hue comes at turn 0, and so on; the last n_by_turn[4] get no jitter.
    Each operation runs on the patches that it applies to and on no others; since the parameters are drawn on the CPU,
    which ones these are is known without asking the device.
    """
    n_hues = sum(n_by_turn[:NO_JITTER])
    order = params["order"][:n_hues]
    others = order[order != HUE].view(-1, 3)  # (n, 3), what comes before and after hue
    factors = torch.stack([params[name] for name in JITTER[:HUE]], 1)[:n_hues].gather(1, others)
    M, mean_weight = (to_device(values, x.device).split(n_by_turn[:NO_JITTER]) for values in colour_map(others, factors))
    shift = to_device(params["hue"][:n_hues], x.device).split(n_by_turn[:NO_JITTER])
    groups = list(x.split(n_by_turn))
    for hue_turn in range(NO_JITTER):
        y = groups[hue_turn]
        for turn in range(4):
            if turn == hue_turn:
                y = adjust_hue(y, shift[hue_turn])
            else:
                i = turn - (turn > hue_turn)  # among the three others
                y = map_colours(y, M[hue_turn][:, i], mean_weight[hue_turn][:, i])
        groups[hue_turn] = y
    x = torch.cat(groups)

    def apply(mask, operation, *values):
        i = to_device(mask.nonzero().squeeze(1), x.device)
        x[i] = operation(x[i], *(to_device(value[mask], x.device) for value in values))

    apply(params["grey"], greyscale)
    apply(params["blur"], gaussian_blur, params["sigma"])
    apply(params["solarise"], solarise)
    return x


def luma(r, g, b):
    return 0.299 * r + 0.587 * g + 0.114 * b  # ITU-R 601


def greyscale(x):
    """x (n, 3, h, w) -> its luma in all three channels."""
    return luma(*x.unbind(1))[:, None].expand_as(x)


def colour_map(operation, factor):
    """Brightness, contrast and saturation as one map of the colours, x -> M x + mean_weight * mean grey of the patch.

    operation int64 (...): BRIGHTNESS, CONTRAST or SATURATION; factor (...): 0 black, the mean grey, or grey; 1 unchanged.
    Returns M (..., 3, 3) and mean_weight (...).
    """
    grey_weight = (1 - factor) * (operation == SATURATION)
    M = factor[..., None, None] * torch.eye(3) + grey_weight[..., None, None] * luma(*torch.eye(3))
    return M, (1 - factor) * (operation == CONTRAST)


def map_colours(x, M, mean_weight):
    """x (n, 3, h, w) in [0, 1] through the maps M (n, 3, 3), mean_weight (n,) of colour_map, clamped to [0, 1]."""
    offset = mean_weight * luma(*x.mean((2, 3)).unbind(1))  # (n,)
    return torch.baddbmm(offset[:, None, None], M, x.flatten(2)).clamp_(0, 1).view_as(x)


def adjust_hue(x, shift):
    """x (n, 3, h, w) in [0, 1], shift (n,) in turns of the colour circle: RGB to HSV, rotate, and back."""
    r, g, b = x.unbind(1)
    value, low = x.amax(1), x.amin(1)
    chroma = value - low
    hue = torch.where(value == r, g - b, torch.where(value == g, b - r + 2 * chroma, r - g + 4 * chroma))  # 6 chroma a turn
    hue = hue / (6 * chroma.clamp(min=1e-12)) + shift[:, None, None]  # a grey pixel has no hue, and needs none
    peak = torch.arange(3, device=x.device)[:, None, None] / 3  # where on the circle each channel is greatest
    away = hue[:, None] - peak  # (n, 3, h, w)
    away = away.sub_(away.round()).abs_()  # in turns, up to a half
    return away.mul_(-6).add_(2).clamp_(0, 1).mul_(chroma[:, None]).add_(low[:, None])


def gaussian_blur(x, sigma, radius=6):
    """Blur x (n, c, h, w) by sigma (n,) pixels, reflecting at the border; radius 6 is 3 sigma at the largest, 2.

    A blur along one axis is a matrix, so this is two small matrix products per channel. Needs h and w above radius.
    """
    offset = torch.arange(-radius, radius + 1, device=x.device)
    weight = torch.exp(-0.5 * (offset / sigma[:, None]) ** 2)
    weight = weight / weight.sum(1, keepdim=True)  # (n, 2 radius + 1)

    def blur_matrix(length):
        source = (torch.arange(length, device=x.device)[:, None] + offset).abs()
        source = torch.where(source >= length, 2 * (length - 1) - source, source)  # (length, 2 radius + 1)
        return torch.einsum("nk,ikj->nij", weight, F.one_hot(source, length).to(x.dtype))[:, None]  # (n, 1, length, length)

    return blur_matrix(x.shape[2]) @ x @ blur_matrix(x.shape[3]).mT


def solarise(x):
    """Invert what is at least 128 of 255, x (n, 3, h, w) in [0, 1]."""
    return torch.where(x >= 128 / 255, 1 - x, x)
