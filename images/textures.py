"""Ten families of textures, drawn from a seed: the data set of the demo and of the tests."""

import math

import torch

from patches import gaussian_blur


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


# Each family maps four tensors (N, 32, 32) to brightness in [0, 1]: u and v, rotated and shifted
# coordinates in periods; r, the distance from a random centre in periods; and white noise.
TEXTURES = {
    "stripes": lambda u, v, r, noise: _wave(u),
    "checks": lambda u, v, r, noise: _step(2 * torch.cos(math.pi * u) * torch.cos(math.pi * v)),
    "dots": lambda u, v, r, noise: _step(2 * (_cell(u, v) - 0.8)),
    "rings": lambda u, v, r, noise: _wave(r),
    "waves": lambda u, v, r, noise: _wave(u + 0.4 * torch.sin(math.pi * v)),
    "bricks": lambda u, v, r, noise: torch.maximum(
        _line(v, 0.15), _line(u / 2 + v.floor() / 2, 0.08)
    ),
    "grid": lambda u, v, r, noise: torch.maximum(_line(u, 0.12), _line(v, 0.12)),
    "dashes": lambda u, v, r, noise: _wave(u) * _step(torch.cos(math.pi * v) + 0.2),
    "fine noise": lambda u, v, r, noise: _blob(noise, 0.6),
    "coarse noise": lambda u, v, r, noise: _blob(noise, 1.8),
}


def make_textures(n, generator):
    """Return images, uint8 (n, 3, 32, 32), labels, int64 (n,), and the class names.

    There are equally many of each family, in random order. Phase, orientation, scale (a period of 5
    to 7 pixels) and the two near-grey colours are random in each image, and so is which colour is
    the brighter one. So the class shows in neighbouring pixels, not in single ones.
    """

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    labels = torch.randperm(n, generator=generator) % len(TEXTURES)
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    angle = uniform(0, 2 * math.pi, 1, 1)
    period = uniform(5, 7, 1, 1)
    u = (x * angle.cos() + y * angle.sin()) / period + uniform(0, 6, 1, 1)  # (n, 32, 32)
    v = (y * angle.cos() - x * angle.sin()) / period + uniform(0, 6, 1, 1)
    r = torch.hypot(x - uniform(0, 31, 1, 1), y - uniform(0, 31, 1, 1)) / period
    r = r + uniform(0, 1, 1, 1)
    noise = torch.randn(n, 32, 32, generator=generator)

    pattern = torch.empty(n, 32, 32)
    for label, draw in enumerate(TEXTURES.values()):
        i = labels == label
        pattern[i] = draw(u[i], v[i], r[i], noise[i])
    contrast = uniform(0.5, 0.8, 1) * uniform(-1, 1, 1).sign()
    greys = torch.cat([0.5 - contrast / 2, 0.5 + contrast / 2], 1)  # (n, 2)
    colours = greys[:, :, None] + uniform(-0.06, 0.06, 2, 3)  # (n, 2, 3)
    weights = torch.stack([1 - pattern, pattern], 1)  # (n, 2, 32, 32)
    images = torch.einsum("nkc,nkhw->nchw", colours, weights)
    return images.mul(255).round().clamp(0, 255).to(torch.uint8), labels, list(TEXTURES)
