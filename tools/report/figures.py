"""Figures of a report, drawn by matplotlib."""

from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F

from data import balanced_subset
from infra.device import generator

N_MAP = 1000  # points of the map
INK = "#010203"  # of text and axes: in the SVG it becomes currentColor, which follows the reader's theme


@contextmanager
def drawing(ink=INK):
    """Within the block, matplotlib draws text and axes in this colour."""
    import matplotlib

    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    others = {
        "text.parse_math": False,
        "font.size": 9,
        "legend.frameon": False,
        "svg.hashsalt": "report",
    }
    with matplotlib.rc_context({**dict.fromkeys(names, ink), **others}):
        yield


def axes(width, height, title=""):
    """Return (figure, its one Axes). The size is in inches."""
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    ax = figure.subplots()
    ax.set_title(title, fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    return figure, ax


def map_figure(embeddings, labels, class_names, n=N_MAP):
    """Draw up to n embeddings (N, d) in two dimensions, coloured by class: t-SNE by cosine, of 50
    principal components.
    """
    from matplotlib import colormaps
    from sklearn.manifold import TSNE

    some = balanced_subset(labels, len(embeddings), n, generator(0, "map"))
    x = F.normalize(embeddings[some], dim=1)
    x = x - x.mean(0)
    x = x @ torch.linalg.svd(x, full_matrices=False).Vh[:50].T
    perplexity = min(30, max(1, (len(x) - 1) / 3))
    init = (
        "pca" if len(x) > 4 and x.std() > 0 else "random"
    )  # scikit-learn crashes on equal embeddings, which have no components
    points = TSNE(perplexity=perplexity, init=init, random_state=0).fit_transform(x.numpy())
    figure, ax = axes(4.2, 4.2)
    ax.set_axis_off()
    groups = (
        [(name, labels[some] == i) for i, name in enumerate(class_names)]
        if labels is not None
        else [("", slice(None))]
    )
    C = len(groups)
    palette = (
        colormaps["tab10"]
        if C <= 10
        else colormaps["tab20"]
        if C <= 20
        else colormaps["hsv"].resampled(C)
    )
    for i, (name, rows) in enumerate(groups):
        ax.scatter(*points[rows].T, s=5, color=palette(i), label=name, linewidths=0)
        if C > 20 and len(points[rows]):  # a legend of so many has no room
            ax.text(*np.median(points[rows], 0), name, fontsize=4, ha="center", va="center")
    if 1 < C <= 20:
        ax.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, 0),
            ncols=4,
            markerscale=3,
            columnspacing=1,
            handletextpad=0.2,
        )
    return figure


def confusion_figure(matrix, class_names):
    """Draw a confusion matrix (C, C): the more of a row are in a place, the less transparent it is,
    on light and dark pages.
    """
    C = len(class_names)
    figure, ax = axes(4.2, 4.2)
    share = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    colour = torch.tensor([0.16, 0.43, 0.78]).expand(C, C, 3)
    ax.imshow(torch.cat([colour, share[..., None]], 2).numpy())
    ax.set_xlabel("predicted")
    ax.set_ylabel("true")
    if C <= 20:
        ax.set_xticks(range(C), class_names, rotation=90)
        ax.set_yticks(range(C), class_names)
        for i, j in matrix.nonzero().tolist():
            ink = {"color": "white"} if share[i, j] > 0.5 else {}
            ax.text(j, i, int(matrix[i, j]), ha="center", va="center", fontsize=6, **ink)
    return figure


def classes_figure(accuracies):
    """Draw the accuracy of each class, {class name: percent}, as bars, the best first."""
    names = sorted(accuracies, key=lambda name: -accuracies[name])
    figure, ax = axes(4.2, max(1.2, 0.22 * len(names)))
    bars = ax.barh(range(len(names)), [accuracies[name] for name in names], color="#2a6ec7")
    ax.bar_label(bars, fmt="%.1f", padding=2, fontsize=7)
    ax.set_yticks(range(len(names)), names, fontsize=8 if len(names) <= 20 else 6)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_xlim(0, 108)
    ax.set_xlabel("top-1 of a class, %")
    return figure
