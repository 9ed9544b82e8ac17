"""The picture of a run: some images and their patches as the network sees them."""

import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw

from data import sample
from infra import distributed, files
from infra.device import generator
from infra.metrics import read_png
from patches import sample_patches

HEADER = 16  # pixels above the rows


@distributed.on_main_process
def draw_patches(hp, image_set, path):
    """Write a picture unless it exists: rows of an image and up to 20 of its patches.

    The rows are eight images of all classes.
    """
    if read_png(path):
        return
    images = sample(image_set, 8, hp.seed, "picture").images[:]  # (B, 3, H, W)
    size = hp.patch_size
    n = min(hp.n_patches, 20)
    rng = generator(hp.seed, "picture", step=1)
    x = sample_patches(images, n, rng, size, augment=hp.augment)  # (P, B, 3, size, size)
    x = (x.transpose(0, 1).flatten(0, 1) + 1) / 2  # (B P, 3, size, size) in [0, 1]
    whole = F.interpolate(images.float() / 255, (size, size), mode="bilinear", antialias=True)
    left = as_picture(whole, 1)
    right = as_picture(x, n)
    start = left.width + left.width // 3  # of the patches
    picture = Image.new("RGB", (start + right.width, left.height + HEADER), "white")
    draw = ImageDraw.Draw(picture)
    picture.paste(left, (0, HEADER))
    draw.text((2, 2), "image", "black")
    picture.paste(right, (start, HEADER))
    draw.text((start + 2, 2), "patches", "black")
    with files.atomic_write(path) as file:
        picture.save(file, "PNG")


def as_picture(x, n_columns):
    """Return x (n, 3, H, W) in [0, 1] as a grid of twice the size, a PIL image."""
    grid = torchvision.utils.make_grid(x, nrow=n_columns, pad_value=1.0)  # (3, height, width)
    picture = Image.fromarray(grid.mul(255).round().byte().permute(1, 2, 0).numpy())
    return picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST)
