"""The figure of the method: images, their patches, the encoder and the two terms of the loss, on three images of textures.

    python -m benchmarks.method      # draws pictures/method.png
"""

import argparse

import torch
import torch.nn.functional as F

from benchmarks.common import ROOT
from infra.device import generator
from patches import batch_params, render
from textures import make_textures

P, B = 4, 3  # patches of an image, images
COLOURS = ("tab:blue", "tab:orange", "tab:green")
CHOSEN = (4, 1, 11)  # of the textures of SEED
SEED = 3


def figure():
    """Return the figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    images = make_textures(20, generator(SEED, "method"))[0][list(CHOSEN)]  # uint8 (B, 3, 32, 32)
    params = batch_params(images.shape, P, generator(SEED, "patches"))
    x = render(images, params, 32).unflatten(0, (P, B))  # (P B, 3, S, S) -> (P, B, 3, S, S)
    made, axes = pyplot.subplots(figsize=(10, 3.7))
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 37)
    axes.set_aspect("equal")
    axes.axis("off")
    for i, colour in enumerate(COLOURS):
        bottom = 23 - 11 * i
        show(axes, images[i] / 255, 0, bottom, 10, colour)
        for p in range(P):
            row = p * B + i
            box(axes, params["left"][row].item(), params["top"][row].item(), bottom, colour)
            show(axes, (x[p, i] + 1) / 2, 15 + 7 * p, bottom + 1.75, 6.5, colour)
    draw_encoder(axes)
    draw_sphere(axes, pyplot)
    for place, text in ((5, "$B$ images"), (29, "$P$ patches of each: cropped, resized,\nflipped, other colours"),
                        (58, "the encoder maps\neach patch to $h$ and $z$"), (87, "$z$ on the unit sphere")):  # fmt: skip
        axes.text(place, 34.3, text, ha="center", va="bottom", fontsize=10)
    return made


def show(axes, pixels, left, bottom, size, colour):
    """Show pixels (3, H, W) in [0, 1] with a frame."""
    extent = (left, left + size, bottom, bottom + size)
    axes.imshow(pixels.permute(1, 2, 0).numpy(), extent=extent, interpolation="nearest", zorder=1)
    frame(axes, left, bottom, size, size, edgecolor=colour, linewidth=1.5)


def box(axes, left, top, bottom, colour):
    """Draw where a patch was cut, in an image of 32 pixels that is shown 10 wide."""
    frame(axes, left * 10 / 32, bottom + 10 - (top + 16) * 10 / 32, 5, 5, edgecolor="white", linewidth=2.2)
    frame(axes, left * 10 / 32, bottom + 10 - (top + 16) * 10 / 32, 5, 5, edgecolor=colour, linewidth=1)


def frame(axes, left, bottom, width, height, **options):
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((left, bottom), width, height, **{"facecolor": "none", "zorder": 2, **options}))


def draw_encoder(axes):
    """Draw backbone, features and projection, with what they compute."""
    parts = [("backbone", "ResNet-18", 24), ("features", "linear, batch norm, ReLU", 14.5)]
    parts.append(("projection", "two linear layers", 5))
    for name, text, bottom in parts:
        frame(axes, 48, bottom, 20, 6.5, facecolor="0.93", edgecolor="0.3")
        axes.text(58, bottom + 4.3, name, ha="center", va="center", fontsize=10, fontweight="bold")
        axes.text(58, bottom + 1.9, text, ha="center", va="center", fontsize=8)
    for start, end, text in ((24, 21, ""), (14.5, 11.5, "$h$, the representation"), (5, 1.2, "$z$, for the loss")):
        axes.annotate("", (58, end), (58, start), arrowprops={"arrowstyle": "->", "color": "0.3"})
        axes.text(59, (start + end) / 2, text, va="center", fontsize=8)
    axes.annotate("", (47.5, 17.5), (43.5, 17.5), arrowprops={"arrowstyle": "->", "color": "0.3"})


def draw_sphere(axes, pyplot):
    """Draw z of the patches of each image, and the two terms of the loss."""
    centre, radius = torch.tensor([87.0, 18.5]), 11.5
    axes.add_patch(pyplot.Circle(centre.tolist(), radius, facecolor="none", edgecolor="0.6"))
    angles = torch.tensor([1.9, 4.0, 6.1])
    for angle, colour in zip(angles, COLOURS, strict=True):
        z = angle + torch.tensor([-0.22, -0.08, 0.07, 0.2])
        points = centre + radius * torch.stack([z.cos(), z.sin()], 1)
        axes.scatter(*points.T, color=colour, s=22, zorder=3)
        inner = centre + 0.78 * radius * F.normalize(torch.stack([angle.cos(), angle.sin()]), dim=0)
        for point in points:
            axes.annotate("", inner.tolist(), point.tolist(), arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.8})
    middles = centre + 0.62 * radius * torch.stack([angles.cos(), angles.sin()], 1)
    for i in range(B):
        axes.annotate("", middles[i].tolist(), middles[i - 1].tolist(), arrowprops={"arrowstyle": "<->", "color": "0.3"})
    axes.text(87, 2.6, "invariance: $z$ of one image agree\nuniformity: $z$ of different images spread", ha="center", va="center",
              fontsize=9)  # fmt: skip


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    path = ROOT / "pictures" / "method.png"
    figure().savefig(path, dpi=100, facecolor="white", bbox_inches="tight")
    print(path)
