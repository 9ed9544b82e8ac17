"""Data sets as uint8 tensors, and patches cut and augmented from them in whole batches."""

import hashlib
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps

from experiment import RunError, UsageError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


class ImageSet(NamedTuple):
    images: torch.Tensor  # uint8 (N, 3, H, W)
    labels: torch.Tensor | None  # int64 (N,), None where the images have no classes
    class_names: list


def generator(seed, purpose, epoch=0, step=0):
    """A CPU torch.Generator that depends on these four alone: any step can be replayed by itself."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{epoch}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


# ---------------------------------------------------------------------------------------------- data sets


def load_images(name, root, train, image_size=32):
    """One split of a data set, whole, in memory.

    name: cifar10, cifar100, folder or textures. root: the folder with the files (cifar10, cifar100: downloaded into
    it once; folder: see load_folder; textures: not used). image_size: height and width in pixels, `folder` only.
    Returns an ImageSet, None for the test split of a `folder` that has none. Raises UsageError where the data is
    not there or image_size does not fit, RunError where more than 1 image in 100 can't be read.
    """
    if name != "folder" and image_size != 32:
        raise UsageError(f"image_size {image_size}: the images of {name} are 32 pixels wide; only folder is resized")
    if name == "textures":
        return make_textures(4000 if train else 1000, generator(0, "textures", epoch=int(train)))
    if name == "folder":
        return load_folder(Path(root), train, image_size)
    if name in ("cifar10", "cifar100"):
        return load_cifar(name, root, train)
    raise UsageError(f"unknown dataset {name!r}: choose from cifar10, cifar100, folder and textures")


def load_cifar(name, root, train):
    """CIFAR-10 or CIFAR-100 through torchvision, downloaded into `root` unless it is there."""
    dataset_class = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    try:
        dataset = dataset_class(root, train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise UsageError(
            f"{name} is not in {root} and can't be downloaded ({error}). Put {dataset_class.filename} "
            f"(md5 {dataset_class.tgz_md5}) into {root}, or work offline with --dataset textures or with images of "
            f"your own: --dataset folder --data_dir DIR"
        ) from error
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()  # (N, 32, 32, 3) -> (N, 3, 32, 32)
    return ImageSet(images, torch.tensor(dataset.targets), list(dataset.classes))


def load_folder(root, train, image_size):
    """Images below `root`: train/<class>/* and test/<class>/*, or any tree of unlabelled images.

    Without train/ all images below root are the training split. Fewer than two class folders, or images beside
    them, are no labels. Files that can't be read are left out and named on stderr.
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
    if class_names:
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
    pixels = np.empty((len(paths), image_size, image_size, 3), np.uint8)

    def read(i):
        try:
            with Image.open(paths[i]) as image:
                pixels[i] = to_rgb(image, image_size)
        except Exception as error:  # Pillow raises nearly anything on a damaged file
            return f"{paths[i]} ({type(error).__name__})"

    with ThreadPoolExecutor() as pool:
        failures = list(pool.map(read, range(len(paths))))
    readable = torch.tensor([i for i, failure in enumerate(failures) if failure is None], dtype=torch.int64)
    bad = [failure for failure in failures if failure is not None]
    if len(bad) > len(paths) / 100:
        raise RunError(f"{len(bad)} of {len(paths)} images in {folder} can't be read, more than 1 in 100: {', '.join(bad[:5])}")
    if bad:
        print(f"warning: left out {len(bad)} of {len(paths)} images that can't be read: {', '.join(bad)}", file=sys.stderr)
    return torch.from_numpy(pixels)[readable].permute(0, 3, 1, 2).contiguous(), readable


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


def sample_patches(images, n_patches, generator, size=32):
    """Random augmented patches: n_patches of each image, each a quarter of its area, as the network sees them.

    images: uint8 (B, 3, H, W) on any device, H and W even. generator: a CPU torch.Generator, so that the same
    patches are drawn for every device. Returns float32 (n_patches, B, 3, size, size) in [-1, 1] on that device.
    Source: arXiv 2304.03977, appendix, and the authors' code.
    """
    B, _, H, W = images.shape
    params = sample_params(n_patches * B, H, W, generator)
    windows = images.unfold(2, H // 2, 1).unfold(3, W // 2, 1)  # a view, (B, 3, H/2 + 1, W/2 + 1, H/2, W/2)
    which = torch.arange(B).repeat(n_patches)  # (P B,)
    which, top, left = (index.to(images.device) for index in (which, params["top"], params["left"]))
    x = windows[which, :, top, left].float().div_(255)  # (P B, 3, H/2, W/2)
    x = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False, antialias=max(H, W) // 2 > size)
    x = augment(x, params).mul_(2).sub_(1)
    return x.unflatten(0, (n_patches, B))  # (P, B, 3, size, size)


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


def augment(x, params):
    """Flip, colour jitter, greyscale, blur and solarise x (n, 3, h, w) in [0, 1], in place, by sample_params.

    Each operation runs on the patches that it applies to and on no others; since the parameters are drawn on
    the CPU, which ones these are is known without asking the device.
    """

    def apply(mask, operation, *names):
        i = mask.nonzero().squeeze(1).to(x.device)
        x[i] = operation(x[i], *(params[name][mask].to(x.device) for name in names))

    apply(params["flip"], lambda x: x.flip(-1))
    for turn in range(4):
        for k, (name, operation) in enumerate(JITTER.items()):
            apply(params["jitter"] & (params["order"][:, turn] == k), operation, name)
    apply(params["grey"], greyscale)
    apply(params["blur"], gaussian_blur, "sigma")
    apply(params["solarise"], solarise)
    return x


def greyscale(x):
    """x (n, 3, h, w) -> its luma (ITU-R 601) in all three channels."""
    r, g, b = x.unbind(1)
    return (0.299 * r + 0.587 * g + 0.114 * b)[:, None].expand_as(x)


def adjust_brightness(x, factor):
    """x (n, 3, h, w) in [0, 1], factor (n,): 0 black, 1 unchanged."""
    return (x * factor[:, None, None, None]).clamp(0, 1)


def adjust_contrast(x, factor):
    """x (n, 3, h, w) in [0, 1], factor (n,): 0 the mean grey of the patch, 1 unchanged."""
    mean = greyscale(x).mean(dim=(1, 2, 3), keepdim=True)
    return torch.lerp(mean, x, factor[:, None, None, None]).clamp(0, 1)


def adjust_saturation(x, factor):
    """x (n, 3, h, w) in [0, 1], factor (n,): 0 grey, 1 unchanged."""
    return torch.lerp(greyscale(x), x, factor[:, None, None, None]).clamp(0, 1)


def adjust_hue(x, shift):
    """x (n, 3, h, w) in [0, 1], shift (n,) in turns of the colour circle: RGB to HSV, rotate, and back."""
    r, g, b = x.unbind(1)
    value, low = x.amax(1), x.amin(1)
    chroma = value - low
    safe = chroma.clamp(min=1e-12)  # a grey pixel has no hue, and needs none
    hue = torch.where(value == r, (g - b) / safe, torch.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4))
    hue = hue + 6 * shift[:, None, None]  # in sixths of a turn
    k = (torch.tensor([5.0, 3.0, 1.0], device=x.device)[:, None, None] + hue[:, None]) % 6  # (n, 3, h, w)
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


JITTER = {"brightness": adjust_brightness, "contrast": adjust_contrast, "saturation": adjust_saturation, "hue": adjust_hue}


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
