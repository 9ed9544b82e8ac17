"""The picture of a run: some images and their patches as the network sees them."""

import functools

import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw

from data import balanced_subset
from infra import distributed, files
from infra.device import generator
from infra.image_cache import subset
from infra.metrics import read_png
from patches import sample_patches

HEADER = 16  # pixels above the rows


@distributed.on_main_process
def draw_patches(hp, image_set, path):
    """Write a picture unless it exists: a row for each of eight images of all classes, and beside it up to 20 of its patches."""
    if read_png(path):
        return
    N, rng = len(image_set.images), functools.partial(generator, hp.seed, "picture")
    images = subset(image_set.images, balanced_subset(image_set.labels, N, min(8, N), rng()))[:]  # (B, 3, H, W)
    size, n = hp.input_size or images.shape[-1], min(hp.n_patches, 20)
    x = sample_patches(images, n, rng(step=1), size, augment=hp.augment)  # (P, B, 3, size, size)
    whole = F.interpolate(images.float() / 255, size=(size, size), mode="bilinear", antialias=True)
    left, right = as_picture(whole, 1), as_picture((x.transpose(0, 1).flatten(0, 1) + 1) / 2, n)
    gap = left.width // 3
    picture = Image.new("RGB", (left.width + gap + right.width, left.height + HEADER), "white")
    for part, place, title in ((left, 0, "image"), (right, left.width + gap, "patches")):
        picture.paste(part, (place, HEADER))
        ImageDraw.Draw(picture).text((place + 2, 2), title, "black")
    with files.atomic_write(path) as file:
        picture.save(file, "PNG")


def as_picture(x, n_columns):
    """Return x (n, 3, H, W) in [0, 1] as a grid of twice the size, a PIL image."""
    grid = torchvision.utils.make_grid(x, nrow=n_columns, pad_value=1.0)  # (3, height, width)
    picture = Image.fromarray(grid.mul(255).round().byte().permute(1, 2, 0).numpy())
    return picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST)
