"""The pixels of an image file. This file stands alone, because `export` writes it into its code."""

from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps

# Pillow would start an outside program for other formats, such as EPS.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
MAX_PIXELS = 89_478_485  # Pillow's own limit
FITS = ("crop", "pad", "stretch")  # how an image becomes square
RANGE_OF_16_BITS = (0, 65535)


class UnreadableImage(Exception):
    """The file is not an image that can be used. The message names the file and the reason."""


def read_image(path, image_size, value_range=None, max_pixels=MAX_PIXELS, fit="crop"):
    """Return the image as RGB uint8 (3, image_size, image_size).

    It is turned by its EXIF, and resized. fit: what becomes of an image that is not square, see
    squared. Of a file of several images it is the first. value_range: see to_8_bits. Raises
    UnreadableImage, also for an image of more than max_pixels.
    """
    with opened(path, max_pixels) as image:
        image = to_rgb(ImageOps.exif_transpose(image), value_range)
        image = squared(image, image_size, fit)
        pixels = np.asarray(image).transpose(2, 0, 1)  # (H, W, 3) -> (3, H, W)
    return np.ascontiguousarray(pixels)


def squared(image, size, fit):
    """Return a PIL image resized to size x size.

    fit: crop leaves out what is beside the largest square in the centre, pad keeps all between
    white borders, stretch changes the ratio of the sides.
    """
    if fit == "crop":
        return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    if fit == "pad":
        return ImageOps.pad(image, (size, size), Image.Resampling.BICUBIC, "white")
    return image.resize((size, size), Image.Resampling.BICUBIC)


@contextmanager
def opened(path, max_pixels=MAX_PIXELS):
    """Open a file as a PIL image. Raises UnreadableImage for any error, those in the block too."""
    pillow_limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None  # it has no way out for the user
    try:
        with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise UnreadableImage(
                    f"{image.width * image.height} pixels, above the {max_pixels} of the setting "
                    f"max_pixels, which can be raised"
                )
            yield image
    except UnreadableImage as error:
        raise UnreadableImage(f"{path} ({error})") from None
    except Exception as error:  # Pillow raises nearly anything on a damaged file
        raise UnreadableImage(f"{path} ({type(error).__name__})") from None
    finally:
        Image.MAX_IMAGE_PIXELS = pillow_limit


def to_rgb(image, value_range):
    """Convert a PIL image of any mode to RGB. Transparency is put onto white."""
    if is_deep(image):
        image = Image.fromarray(to_8_bits(np.asarray(image), value_range))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def is_deep(image):
    """Whether a PIL image has integers of more than 8 bits, or floating-point numbers."""
    return image.mode == "F" or image.mode.startswith("I")


def to_8_bits(values, value_range):
    """Return uint8 of numbers: the low of value_range becomes 0, the high 255; NaN becomes 0.

    Without a range, integers have that of 16 bits. Raises UnreadableImage if they are outside of
    it, or the numbers are floating-point.
    """
    if value_range is None:
        low, high = values.min(), values.max()
        if values.dtype.kind == "f" or low < 0 or high > RANGE_OF_16_BITS[1]:
            raise UnreadableImage(
                f"values from {low:g} to {high:g}, and the settings value_low and value_high are "
                f"not set"
            )
    low, high = value_range or RANGE_OF_16_BITS
    values = np.nan_to_num(values.astype(np.float32), nan=low).clip(low, high)
    return ((values - low) * (255 / (high - low))).round().astype(np.uint8)
