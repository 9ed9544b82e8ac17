"""Augmented patches for training, and views for encoding, in whole batches.

What a patch is, of images (N, 3, H, W) as uint8; the probabilities and ranges are the authors':

    crop        H/2 x W/2 pixels, the corner uniform over all that fit
    resize      to size x size: bilinear, from 96 pixels on bicubic
    flip        horizontally, p = .5
    jitter      p = .8: brightness x [.6, 1.4], contrast x [.6, 1.4], saturation x [.6, 1.4] and
                hue + [-.2, .2] turns, in a random order for each patch
    grey        p = .2
    blur        p = .1: Gaussian, sigma [.1, 2] pixels
    solarise    p = .1: invert values of 128 and more of 255
    scale       to [-1, 1]

P patches of each of B images are (P, B, 3, size, size).
"""

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from infra.device import to_device, to_device_packed

VIEW_KINDS = ("augmented", "crops", "grid", "whole")
JITTER = ("brightness", "contrast", "saturation", "hue")
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601: the brightness of red, green and blue
BICUBIC_FROM = 96  # pixels; the authors' code is bilinear for CIFAR and bicubic for ImageNet
# Patches whose hue a CPU adjusts at once: 1.2x as fast as 1,600 at once, which exceed its cache.
CPU_BLOCK = 400


class Augment(NamedTuple):
    """How strongly patches are augmented; the defaults are the authors'."""

    jitter: float = 1.0  # factor of the ranges of brightness, contrast, saturation and hue
    grey: float = 0.2  # this and the following ones are probabilities
    blur: float = 0.1
    solarise: float = 0.1


AUTHORS = Augment()


class Views(NamedTuple):
    """The views of an image. All but the whole one are half as wide, resized to `size` pixels."""

    n: int
    # augmented: patches as in training.
    # crops: at random places, not augmented.
    # grid: k x k crops at even distances from corner to corner, k = the root of n, rounded down.
    # whole: the image in one piece, 2 `size` pixels wide, so that its scale is that of its patches.
    kind: str = "augmented"
    size: int = 32
    augment: Augment = AUTHORS  # of augmented views
    mirror: bool = False  # as many views of the mirror image, after those of the image

    @property
    def count(self):
        """How many views of an image sample_views returns."""
        n = {"grid": math.isqrt(self.n) ** 2, "whole": 1}.get(self.kind, self.n)
        return 2 * n if self.mirror else n

    @property
    def side(self):
        """Pixels of a view."""
        return 2 * self.size if self.kind == "whole" else self.size


def sample_patches(images, n_patches, generator, size=32, first=0, batch=None, augment=AUTHORS):
    """Return random augmented patches: n_patches of each image, each a quarter of its area.

    images: uint8 (B, 3, H, W) on any device, H and W even. generator: a CPU torch.Generator, so the
    same patches are drawn on every device. first, batch: the images are rows first to first + B of
    a larger batch, and get the patches that they would get there. augment: an Augment. Returns
    float32 (n_patches, B, 3, size, size) in [-1, 1] on the device of the images; the host never
    waits for it.
    Source: arXiv 2304.03977, appendix, and the authors' code.
    """
    params = batch_params(images.shape, n_patches, generator, first, batch, augment)
    x = render(images, params, size)  # (P B, 3, size, size)
    return x.unflatten(0, (n_patches, -1))  # (P, B, 3, size, size)


def batch_params(shape, n_patches, generator, first=0, batch=None, augment=AUTHORS):
    """Draw the parameters of n_patches patches of each image of a shape (B, 3, H, W).

    The arguments are those of sample_patches. Returns a dict of CPU tensors (P B, ...).
    """
    B, _, H, W = shape
    batch = batch or B
    params = sample_params(n_patches * batch, H, W, generator, augment)
    if batch > B:
        for name, values in params.items():
            shard = values.unflatten(0, (n_patches, batch))[:, first : first + B]  # (P, B, ...)
            params[name] = shard.flatten(0, 1)  # (P B, ...)
    return {**params, "image": torch.arange(B).repeat(n_patches)}


def render(images, params, size):
    """Return the patches that batch_params, or any rows of them, describe.

    They are float32 (n, 3, size, size) in [-1, 1].
    """
    plan = {**crop_plan(params, images.shape[3]), **augmentation_plan(params)}
    plan = to_device_packed(plan, images.device)
    x = cut(images, plan, size)
    augment_(x, plan)
    return to_signed(x)


def to_signed(x):
    """Map x from [0, 1] to [-1, 1], in one pass."""
    return torch.rsub(x, -1, alpha=-2)


def sample_views(images, views, generator):
    """Return the views that encode the images, V = views.count and S = views.side.

    images: uint8 (B, 3, H, W), H and W even. views: a Views. generator: a CPU torch.Generator; a
    grid and whole images need none. Returns float32 (V, B, 3, S, S) in [-1, 1].
    """
    if views.mirror:
        plain = views._replace(mirror=False)
        return torch.cat([sample_views(x, plain, generator) for x in (images, images.flip(-1))])
    if views.kind == "whole":
        return to_signed(resized(images.float(), views.side))[None]  # (1, B, 3, S, S)
    if views.kind == "augmented":
        return sample_patches(images, views.n, generator, views.size, augment=views.augment)
    B, _, H, W = images.shape
    if views.kind == "crops":
        n = views.n * B
        top = torch.randint(H - H // 2 + 1, (n,), generator=generator)
        left = torch.randint(W - W // 2 + 1, (n,), generator=generator)
    else:
        k = math.isqrt(views.n)
        top, left = torch.meshgrid(grid_corners(H, k), grid_corners(W, k), indexing="ij")  # (k, k)
        top = top.flatten().repeat_interleave(B)  # (k² B,)
        left = left.flatten().repeat_interleave(B)
    params = {
        "top": top,
        "left": left,
        "flip": torch.zeros(len(top), dtype=torch.bool),
        "image": torch.arange(B).repeat(views.count),
    }
    plan = to_device_packed(crop_plan(params, W), images.device)
    x = to_signed(cut(images, plan, views.size))  # (V B, 3, S, S)
    return x.unflatten(0, (-1, B))  # (V, B, 3, S, S)


def grid_corners(length, k):
    """Return where k crops of half the length begin, at even distances; one is in the middle."""
    if k == 1:
        return torch.tensor([length // 4])
    return torch.linspace(0, length - length // 2, k).round().long()


def sample_params(n, H, W, generator, augment=AUTHORS):
    """Draw the augmentation parameters of n patches of images (H, W): a dict of CPU tensors.

    Each is (n, ...). top, left: int64, the corner of the crop in pixels. flip, jitter, grey, blur,
    solarise: bool. order: int64 (n, 4), a permutation of JITTER for each patch. brightness,
    contrast, saturation: float32 factors. hue: float32, in turns of the colour circle. sigma:
    float32, of the blur, in pixels.
    Source: the probabilities and ranges of the authors' code.
    """

    def uniform(low, high):
        return low + (high - low) * torch.rand(n, generator=generator)

    def factor(deviation):
        return uniform(max(0.0, 1 - deviation * augment.jitter), 1 + deviation * augment.jitter)

    def chance(p):
        return torch.rand(n, generator=generator) < p

    return {
        "top": torch.randint(H - H // 2 + 1, (n,), generator=generator),
        "left": torch.randint(W - W // 2 + 1, (n,), generator=generator),
        "flip": chance(0.5),
        "jitter": chance(0.8),
        "order": torch.rand(n, 4, generator=generator).argsort(1),
        "brightness": factor(0.4),
        "contrast": factor(0.4),
        "saturation": factor(0.4),
        "hue": uniform(-0.2 * augment.jitter, 0.2 * augment.jitter),
        "grey": chance(augment.grey),
        "blur": chance(augment.blur),
        "sigma": uniform(0.1, 2.0),
        "solarise": chance(augment.solarise),
    }


def crop_plan(params, W):
    """Return what `cut` needs of the params: image, top and left, as CPU tensors (n,).

    A flipped patch is a crop of the mirrored image.
    """
    left = torch.where(params["flip"], W - W // 2 - params["left"], params["left"])
    return {"image": 2 * params["image"] + params["flip"], "top": params["top"], "left": left}


def cut(images, plan, size):
    """Crop, flip and resize by a crop_plan on the device.

    uint8 (B, 3, H, W) -> float32 (n, 3, size, size) in [0, 1].
    """
    h = images.shape[2] // 2
    w = images.shape[3] // 2
    # (2 B, 3, H, W): each image, then its mirror image
    mirrored = torch.stack([images, images.flip(-1)], 1).flatten(0, 1)
    windows = mirrored.unfold(2, h, 1).unfold(3, w, 1)  # a view, (2 B, 3, H-h+1, W-w+1, h, w)
    x = windows[plan["image"], :, plan["top"], plan["left"]].float()  # (n, 3, h, w)
    return resized(x, size)


def resized(x, size):
    """Return x (n, 3, h, w) in [0, 255] as (n, 3, size, size) in [0, 1].

    Resizing is linear along each axis. Two small matrix products are 2.6x as fast as F.interpolate
    on a CPU.
    """
    h, w = x.shape[2:]
    x = resize_matrix(h, size, x.device, divisor=255) @ x @ resize_matrix(w, size, x.device).T
    return x.clamp_(0, 1) if size >= BICUBIC_FROM else x  # bicubic interpolation overshoots


@functools.lru_cache(maxsize=16)
def resize_matrix(length, size, device, divisor=1):
    """Return the matrix (size, length) that resizes one axis and divides by divisor.

    It is bilinear, or bicubic to BICUBIC_FROM pixels or more, and antialiased where it shrinks. It
    is computed on the CPU once and kept.
    """
    mode = "bicubic" if size >= BICUBIC_FROM else "bilinear"
    # With antialias, torch uses Pillow's bicubic kernel, as the authors' code does.
    antialias = size < length or mode == "bicubic"
    eye = torch.eye(length)[None, None]  # (1, 1, length, length)
    matrix = F.interpolate(
        eye, size=(size, length), mode=mode, align_corners=False, antialias=antialias
    )
    return to_device(matrix[0, 0] / divisor, device)


def augmentation_plan(params):
    """Return what `augment_` needs of the params of n patches, as a dict of CPU tensors.

    jitter, grey, blur, solarise: int64, the patches that they apply to; m get jitter. hue: (m,).
    sigma: of the blurred patches. M (m, 6, 3, 3), mean_weight (m, 6): the maps of the operations
    other than hue in their order, 0 to 2 to apply before hue, and 3 to 5 after it. An operation
    that comes after hue is the identity among the first three, and vice versa:

        order             before hue        after hue
        C  H  B  S        C  -  -           -  B  S
        H  S  B  C        -  -  -           S  B  C
        S  B  C  H        S  B  C           -  -  -
    """
    names = ("jitter", "grey", "blur", "solarise")
    plan = {name: params[name].nonzero().squeeze(1) for name in names}
    jitter = plan["jitter"]
    order = params["order"][jitter]  # (m, 4)
    hue_turn = (order == HUE).int().argmax(1, keepdim=True)  # (m, 1)
    others = order[order != HUE].view(-1, 3)  # (m, 3)
    factors = torch.stack([params[name][jitter] for name in JITTER[:HUE]], 1)  # (m, 3)
    factors = factors.gather(1, others)
    is_before = torch.arange(3) < hue_turn  # (m, 3)
    before = torch.where(is_before, factors, 1)
    after = torch.where(is_before, 1, factors)
    M, mean_weight = colour_map(torch.cat([others, others], 1), torch.cat([before, after], 1))
    return {
        **plan,
        "M": M,
        "mean_weight": mean_weight,
        "hue": params["hue"][jitter],
        "sigma": params["sigma"][plan["blur"]],
    }


def augment_(x, plan):
    """Apply jitter, greyscale, blur and solarise to x (n, 3, h, w) in [0, 1], in place.

    plan: an augmentation_plan on the device of x.
    """
    x[plan["jitter"]] = jittered(x[plan["jitter"]], plan)
    x[plan["grey"]] = greyscale(x[plan["grey"]])
    x[plan["blur"]] = gaussian_blur(x[plan["blur"]], plan["sigma"])
    x[plan["solarise"]] = solarise(x[plan["solarise"]])


def jittered(x, plan):
    """Apply the colour jitter of an augmentation_plan to x (m, 3, h, w), in place; return x."""
    block = CPU_BLOCK if x.device.type == "cpu" else max(1, len(x))
    parts = [tensor.split(block) for tensor in (x, plan["M"], plan["mean_weight"], plan["hue"])]
    for part, M, mean_weight, hue in zip(*parts, strict=True):
        for i in range(3):
            map_colours(part, M[:, i], mean_weight[:, i])
        adjust_hue(part, hue)
        for i in range(3, 6):
            map_colours(part, M[:, i], mean_weight[:, i])
    return x


@functools.lru_cache(maxsize=16)
def luma_weights(device):
    """Return LUMA as a tensor (3,) on the device."""
    return to_device(torch.tensor(LUMA), device)


def greyscale(x):
    """Put the luma of x (n, 3, h, w) into all three channels."""
    luma = luma_weights(x.device)[None] @ x.flatten(2)  # (n, 1, h w)
    return luma.view_as(x[:, :1]).expand_as(x)


def colour_map(operation, factor):
    """Return brightness, contrast or saturation as an affine map of colours.

    x -> M x + mean_weight * mean grey of the patch. operation: int64 (...), BRIGHTNESS, CONTRAST or
    SATURATION. factor: (...), 1 changes nothing; 0 gives black, the mean grey of the patch, or
    greyscale. Returns M (..., 3, 3) and mean_weight (...).
    """
    grey_weight = (1 - factor) * (operation == SATURATION)
    M = factor[..., None, None] * torch.eye(3) + grey_weight[..., None, None] * torch.tensor(LUMA)
    return M, (1 - factor) * (operation == CONTRAST)


def map_colours(x, M, mean_weight):
    """Apply the maps of colour_map to x (n, 3, h, w), in place, and clamp to [0, 1].

    M: (n, 3, 3). mean_weight: (n,).
    """
    offset = mean_weight * (x.mean((2, 3)) @ luma_weights(x.device))  # (n,)
    mapped = torch.baddbmm(offset[:, None, None], M, x.flatten(2))  # (n, 3, h w)
    return torch.clamp(mapped.view_as(x), 0, 1, out=x)


def adjust_hue(x, shift):
    """Rotate the hue of x (n, 3, h, w) in [0, 1], in place: to HSV and back to RGB.

    shift: (n,), in turns of the colour circle.
    """
    r, g, b = x.unbind(1)  # (n, h, w) each
    value = x.amax(1)
    low = x.amin(1)
    chroma = value - low
    # Floating-point masks and lerp choose as torch.where does, which takes 3x as long on a CPU.
    r_is_max = torch.eq(r, value, out=torch.empty_like(value))
    g_is_max = torch.eq(g, value, out=torch.empty_like(value))
    hue = (r - g + 4 * chroma).lerp_(b - r + 2 * chroma, g_is_max)  # a turn is 6 chroma
    hue = hue.lerp_(g - b, r_is_max)
    hue = hue.div_(6 * chroma.clamp(min=1e-12)).add_(shift[:, None, None])  # grey pixels: chroma 0
    away = hue[:, None] - channel_hues(x.device)  # (n, 3, h, w)
    away = away.sub_(away.round()).abs_()  # distance in turns, at most 0.5
    near = torch.rsub(away, 2, alpha=6).clamp_(0, 1)  # 2 - 6 away
    return torch.addcmul(low[:, None], near, chroma[:, None], out=x)


@functools.lru_cache(maxsize=16)
def channel_hues(device):
    """Return the hue at which each channel is greatest, in turns: (3, 1, 1)."""
    return to_device(torch.arange(3)[:, None, None] / 3, device)


def gaussian_blur(x, sigma, radius=6):
    """Blur x (n, c, h, w) by sigma (n,) pixels; the border is reflected.

    A blur along one axis is a matrix, so this is two small matrix products per channel. The radius
    of 6 is three times the largest sigma, 2. h and w must be above it.
    """
    weight = torch.exp(-0.5 * (blur_offsets(radius, x.device) / sigma[:, None]) ** 2)
    weight = weight / weight.sum(1, keepdim=True)  # (n, 2 radius + 1)
    h, w = x.shape[2:]
    rows = (weight @ shifts(h, radius, x.device)).view(-1, 1, h, h)
    columns = (weight @ shifts(w, radius, x.device)).view(-1, 1, w, w)
    return rows @ x @ columns.mT


@functools.lru_cache(maxsize=16)
def blur_offsets(radius, device):
    """Return -radius, ..., radius as float32."""
    return to_device(torch.arange(-radius, radius + 1.0), device)


@functools.lru_cache(maxsize=16)
def shifts(length, radius, device):
    """Return the matrices that move pixels by -radius, ..., radius along an axis.

    They reflect at its ends. Each is a row: (2 radius + 1, length * length).
    """
    offsets = torch.arange(-radius, radius + 1)
    source = (torch.arange(length)[:, None] + offsets).abs()  # (length, 2 radius + 1)
    source = torch.where(source >= length, 2 * (length - 1) - source, source)
    matrices = F.one_hot(source, length).float().transpose(0, 1)  # (2 radius + 1, length, length)
    return to_device(matrices.flatten(1), device)


def solarise(x):
    """Invert the values of x (n, 3, h, w) in [0, 1] that are at least 128 of 255."""
    return torch.where(x >= 128 / 255, 1 - x, x)
