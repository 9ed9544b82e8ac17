"""Augmented patches for training, and views for encoding, in whole batches.

images and patches are (N, 3, H, W); P patches of each of B images are (P, B, 3, size, size).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from infra.device import to_device

VIEW_KINDS = ("augmented", "crops", "grid")


class Views(NamedTuple):
    """How views are cut from an image: n of them, each half as wide as the image and resized to `size` pixels.

    kind: augmented, patches as in training; crops, at random places and not augmented; grid, k x k crops at even distances
    from corner to corner, where k is the root of n, rounded down: nothing is random. size: None for the image's width.
    """

    n: int
    kind: str = "augmented"
    size: int | None = None

    @property
    def count(self):
        """How many views of an image sample_views returns."""
        return math.isqrt(self.n) ** 2 if self.kind == "grid" else self.n


def sample_patches(images, n_patches, generator, size=32, first=0, batch=None):
    """Return random augmented patches: n_patches of each image, each a quarter of its area.

    images: uint8 (B, 3, H, W) on any device, H and W even. generator: a CPU torch.Generator, so the same patches are drawn on
    every device. first, batch: the images are rows first to first + B of a larger batch, and get the patches that they
    would get there. Returns float32 (n_patches, B, 3, size, size) in [-1, 1] on the
    device of the images; the host never waits for it.
    Source: arXiv 2304.03977, appendix, and the authors' code.
    """
    B, _, H, W = images.shape
    batch = batch or B
    params = sample_params(n_patches * batch, H, W, generator)
    if batch > B:
        params = {k: v.unflatten(0, (n_patches, batch))[:, first : first + B].flatten(0, 1) for k, v in params.items()}
    params["image"] = torch.arange(B).repeat(n_patches)  # (P B,)
    # Sort patches by the turn at which their hue is adjusted: those of a turn are then a slice, without a copy.
    turn = torch.where(params["jitter"], (params["order"] == HUE).int().argmax(1), NO_JITTER)
    by_turn = turn.argsort(stable=True)
    params = {name: values[by_turn] for name, values in params.items()}
    x = augment(cut(images, params, size), params, turn.bincount(minlength=NO_JITTER + 1).tolist())
    x = x.index_select(0, to_device(by_turn.argsort(), x.device)).mul_(2).sub_(1)
    return x.unflatten(0, (n_patches, B))  # (P B, 3, size, size) -> (P, B, 3, size, size)


def sample_views(images, views, generator):
    """Return the views that encode the images: float32 (views.count, B, 3, size, size) in [-1, 1].

    images: uint8 (B, 3, H, W), H and W even. views: a Views. generator: a CPU torch.Generator; a grid needs none.
    """
    B, _, H, W = images.shape
    size = views.size or W
    if views.kind == "augmented":
        return sample_patches(images, views.n, generator, size)
    if views.kind == "crops":
        top, left = (torch.randint(n - n // 2 + 1, (views.n * B,), generator=generator) for n in (H, W))
    else:
        k = math.isqrt(views.n)
        rows, columns = (torch.linspace(0, n - n // 2, k).round().long() if k > 1 else torch.tensor([n // 4]) for n in (H, W))
        top, left = (places.flatten().repeat_interleave(B) for places in torch.meshgrid(rows, columns, indexing="ij"))
    flip = torch.zeros(len(top), dtype=torch.bool)
    params = {"top": top, "left": left, "flip": flip, "image": torch.arange(B).repeat(len(top) // B)}
    return cut(images, params, size).mul_(2).sub_(1).unflatten(0, (-1, B))  # (V B, 3, S, S) -> (V, B, 3, S, S)


def sample_params(n, H, W, generator):
    """Draw the augmentation parameters of n patches of images (H, W). Returns a dict of CPU tensors (n, ...).

    top, left: int64, the corner of the crop in pixels. flip, jitter, grey, blur, solarise: bool. order: int64 (n, 4), a
    permutation of JITTER for each patch. brightness, contrast, saturation: float32 factors. hue: float32, in turns of the
    colour circle. sigma: float32, of the blur, in pixels.
    Source: the probabilities and ranges of the authors' code.
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
    """Crop, flip and resize by the params of n patches: uint8 (B, 3, H, W) -> float32 (n, 3, size, size) in [0, 1]."""
    B, _, H, W = images.shape
    h, w = H // 2, W // 2
    left = torch.where(params["flip"], W - w - params["left"], params["left"])  # in the mirrored image
    image = params["image"] + B * params["flip"]
    image, top, left = (to_device(index, images.device) for index in (image, params["top"], left))
    windows = torch.cat([images, images.flip(-1)]).unfold(2, h, 1).unfold(3, w, 1)  # a view, (2 B, 3, H-h+1, W-w+1, h, w)
    x = windows[image, :, top, left].float()  # (n, 3, h, w)
    # Resizing is linear along each axis. Two small matrix products are 2.6x as fast as F.interpolate on a CPU.
    x = resize_matrix(h, size, x.device).div(255) @ x @ resize_matrix(w, size, x.device).T
    return x.clamp_(0, 1) if size >= BICUBIC_FROM else x  # bicubic interpolation overshoots


BICUBIC_FROM = 96  # pixels; the authors' code is bilinear for CIFAR and bicubic for ImageNet


def resize_matrix(length, size, device):
    """Return the matrix (size, length) that resizes one axis: bilinear, or bicubic to BICUBIC_FROM pixels or more.

    It is antialiased where it shrinks.
    """
    eye, mode = torch.eye(length, device=device)[None, None], "bicubic" if size >= BICUBIC_FROM else "bilinear"
    # With antialias, torch takes Pillow's bicubic kernel, as the authors' code does; without, it takes another one.
    antialias = size < length or mode == "bicubic"
    return F.interpolate(eye, size=(size, length), mode=mode, align_corners=False, antialias=antialias)[0, 0]


JITTER = ("brightness", "contrast", "saturation", "hue")
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
NO_JITTER = 4  # the turn of patches without jitter


def augment(x, params, n_by_turn):
    """Apply colour jitter, greyscale, blur and solarise to x (n, 3, h, w) in [0, 1], as sample_params drew them.

    The patches are sorted: the hue of the first n_by_turn[0] is adjusted at turn 0, that of the next n_by_turn[1] at turn 1,
    and so on; the last n_by_turn[4] get no jitter. Each operation runs only on the patches that it applies to. Their indices
    are known on the CPU, so the host does not wait for the device.
    """
    n_hues = sum(n_by_turn[:NO_JITTER])
    order = params["order"][:n_hues]
    others = order[order != HUE].view(-1, 3)  # (n, 3), the operations other than hue, in their order
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
                i = turn - (turn > hue_turn)  # position among the three others
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
    """Return the brightness of a colour."""
    return 0.299 * r + 0.587 * g + 0.114 * b  # ITU-R 601


def greyscale(x):
    """Put the luma of x (n, 3, h, w) into all three channels."""
    return luma(*x.unbind(1))[:, None].expand_as(x)


def colour_map(operation, factor):
    """Return brightness, contrast or saturation as an affine map of colours: x -> M x + mean_weight * mean grey of the patch.

    operation: int64 (...), BRIGHTNESS, CONTRAST or SATURATION. factor: (...), 1 changes nothing; 0 gives black, the mean grey
    of the patch, or greyscale. Returns M (..., 3, 3) and mean_weight (...).
    """
    grey_weight = (1 - factor) * (operation == SATURATION)
    M = factor[..., None, None] * torch.eye(3) + grey_weight[..., None, None] * luma(*torch.eye(3))
    return M, (1 - factor) * (operation == CONTRAST)


def map_colours(x, M, mean_weight):
    """Apply the maps M (n, 3, 3), mean_weight (n,) of colour_map to x (n, 3, h, w) in [0, 1], and clamp to [0, 1]."""
    offset = mean_weight * luma(*x.mean((2, 3)).unbind(1))  # (n,)
    return torch.baddbmm(offset[:, None, None], M, x.flatten(2)).clamp_(0, 1).view_as(x)


def adjust_hue(x, shift):
    """Rotate the hue of x (n, 3, h, w) in [0, 1] by shift (n,), in turns of the colour circle: to HSV and back to RGB."""
    r, g, b = x.unbind(1)
    value, low = x.amax(1), x.amin(1)
    chroma = value - low
    hue = torch.where(value == r, g - b, torch.where(value == g, b - r + 2 * chroma, r - g + 4 * chroma))  # a turn is 6 chroma
    hue = hue / (6 * chroma.clamp(min=1e-12)) + shift[:, None, None]  # grey pixels: chroma 0
    peak = torch.arange(3, device=x.device)[:, None, None] / 3  # the hue at which each channel is greatest
    away = hue[:, None] - peak  # (n, 3, h, w)
    away = away.sub_(away.round()).abs_()  # distance in turns, at most 0.5
    return away.mul_(-6).add_(2).clamp_(0, 1).mul_(chroma[:, None]).add_(low[:, None])


def gaussian_blur(x, sigma, radius=6):
    """Blur x (n, c, h, w) by sigma (n,) pixels; the border is reflected. The radius of 6 is three times the largest sigma, 2.

    A blur along one axis is a matrix, so this is two small matrix products per channel. h and w must be above radius.
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
    """Invert the values of x (n, 3, h, w) in [0, 1] that are at least 128 of 255."""
    return torch.where(x >= 128 / 255, 1 - x, x)
