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
    """Write the picture, unless it exists: eight images of all classes, a row each.

    A row is the image and up to 20 of its patches.
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
    left = grid_image(whole, 1)
    right = grid_image(x, n)
    start = left.width + left.width // 3  # of the patches
    picture = Image.new("RGB", (start + right.width, left.height + HEADER), "white")
    draw = ImageDraw.Draw(picture)
    picture.paste(left, (0, HEADER))
    draw.text((2, 2), "image", "black")
    picture.paste(right, (start, HEADER))
    draw.text((start + 2, 2), "patches", "black")
    with files.atomic_write(path) as file:
        picture.save(file, "PNG")


def grid_image(x, n_columns):
    """Return x (n, 3, H, W) in [0, 1] as a grid of twice the size, a PIL image."""
    grid = torchvision.utils.make_grid(x, nrow=n_columns, pad_value=1.0)  # (3, height, width)
    pixels = grid.mul(255).round().byte().permute(1, 2, 0)  # (height, width, 3)
    image = Image.fromarray(pixels.numpy())
    return image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST)
