"""Figures of a report, drawn by matplotlib."""

import io
import os
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F

from data import balanced_subset
from infra.components import principal_axes
from infra.device import generator
from tools.report.gallery import COLUMNS, Picture, data_uri, sprite_sheet

N_MAP = 1000  # points of the map
FEW_CLASSES = 20  # up to so many classes, a figure has room for all their names
BLUE = "#2a6ec7"
# Of text and axes. In the SVG it becomes currentColor, which follows the reader's theme.
INK = "#010203"
THEME = "<style>svg{color:#222}@media(prefers-color-scheme:dark){svg{color:#ddd}}</style>"


@contextmanager
def drawing(ink=INK):
    """Within the block, matplotlib draws text and axes in this colour."""
    # A figure in a file needs no backend, and that of a notebook stops the import outside of it.
    os.environ.pop("MPLBACKEND", None)
    import matplotlib

    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    options = {
        "text.parse_math": False,
        "font.size": 9,
        "legend.frameon": False,
        "svg.hashsalt": "report",
    }
    with matplotlib.rc_context({**dict.fromkeys(names, ink), **options}):
        yield


def axes(width, height, title=""):
    """Return (figure, its one Axes). The size is in inches."""
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    ax = figure.subplots()
    ax.set_title(title, fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    return figure, ax


def svg(figure, alt, note="", **options):
    """Return a figure as an SVG Picture in the colours of the reader's theme."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, **options)
    text = out.getvalue().replace(INK, "currentColor")
    start = text.index(">", text.index("<svg")) + 1
    text = text[:start] + THEME + text[start:]
    return Picture(data_uri(text.encode(), "svg+xml"), alt, note=note)


def map_of(collection, rows):
    """Return the map of at most N_MAP images as a dict: dots, names of classes, and sprite sheet.

    A dot has its place in percent, colour, link, text, and column and line in the sprite sheet.
    """
    from matplotlib.colors import to_hex

    rows = rows[balanced_subset(collection.labels[rows], len(rows), N_MAP, generator(0, "map"))]
    points = tsne(collection.embeddings[rows])  # (n, 2)
    low, high = points.min(0), points.max(0)
    places = 100 * (points - low) / np.maximum(high - low, 1e-9)
    C = len(collection.class_names)
    colours = [to_hex(class_colours(C)(i)) for i in range(C)]
    dots = [
        {
            "left": f"{left:.1f}",
            "top": f"{top:.1f}",
            "colour": colours[collection.labels[row]] if collection.labels[row] >= 0 else "gray",
            "text": collection.title_of(row),
            "href": collection.link(row),
            "column": i % COLUMNS,
            "line": i // COLUMNS,
        }
        for i, (row, (left, top)) in enumerate(zip(rows.tolist(), places, strict=True))
    ]
    names = []
    for label, (name, colour) in enumerate(zip(collection.class_names, colours, strict=True)):
        members = places[collection.labels[rows] == label]
        if len(members):
            left, top = np.median(members, 0)
            names.append(
                {"name": name, "colour": colour, "left": f"{left:.1f}", "top": f"{top:.1f}"}
            )
    sprite = sprite_sheet(collection, rows.tolist())
    return {"dots": dots, "names": names, "sprite": sprite, "columns": COLUMNS}


def tsne(x):
    """Return the t-SNE map, float32 (n, 2), of x (n, d) by cosine, of 50 principal components."""
    from sklearn.manifold import TSNE

    x = F.normalize(x, dim=1)
    x = x - x.mean(0)
    x = x @ principal_axes(x, 50)
    perplexity = min(30, max(1, (len(x) - 1) / 3))
    # scikit-learn crashes on equal embeddings, which have no components.
    init = "pca" if len(x) > 4 and x.std() > 0 else "random"
    return TSNE(perplexity=perplexity, init=init, random_state=0).fit_transform(x.numpy())


def class_colours(C):
    """Return a colormap that has a colour for each of C classes."""
    from matplotlib import colormaps

    if C <= 10:
        return colormaps["tab10"]
    if C <= FEW_CLASSES:
        return colormaps["tab20"]
    return colormaps["hsv"].resampled(C)


def confusion_figure(matrix, class_names):
    """Draw a confusion matrix (C, C).

    The greater the share of its row, the less transparent a cell is, on light and dark pages.
    """
    C = len(class_names)
    share = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    colour = torch.tensor([0.16, 0.43, 0.78]).expand(C, C, 3)
    figure, ax = axes(4.2, 4.2)
    ax.imshow(torch.cat([colour, share[..., None]], 2).numpy())
    ax.set_xlabel("predicted")
    ax.set_ylabel("true")
    if C <= FEW_CLASSES:
        ax.set_xticks(range(C), class_names, rotation=90)
        ax.set_yticks(range(C), class_names)
        for i, j in matrix.nonzero().tolist():
            options = {"color": "white"} if share[i, j] > 0.9 else {}
            ax.text(j, i, int(matrix[i, j]), ha="center", va="center", fontsize=6, **options)
    return figure


def classes_figure(accuracies):
    """Draw the accuracy of each class, {class name: percent}, as bars, the best first."""
    names = sorted(accuracies, key=lambda name: -accuracies[name])
    figure, ax = axes(4.2, max(1.2, 0.22 * len(names)))
    bars = ax.barh(range(len(names)), [accuracies[name] for name in names], color=BLUE)
    ax.bar_label(bars, fmt="%.1f", padding=2, fontsize=7)
    ax.set_yticks(range(len(names)), names, fontsize=8 if len(names) <= FEW_CLASSES else 6)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_xlim(0, 108)
    ax.set_xlabel("top-1 of a class, %")
    return figure


def curve_figure(x, y, title, x_label):
    """Draw a curve."""
    figure, ax = axes(3.4, 2.1, title)
    ax.plot(x, y, marker="." if len(x) < 30 else None)
    ax.set_xlabel(x_label)
    return figure


def seconds_figure(seconds):
    """Draw {stage: seconds} as bars."""
    figure, ax = axes(3.4, 1.4)
    ax.barh(list(seconds), list(seconds.values()))
    ax.invert_yaxis()
    ax.set_xlabel("seconds")
    return figure
