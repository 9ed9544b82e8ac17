"""A run as one page: result, curves, patches, a map of the embeddings, confusions, neighbours, seconds, settings, environment."""

import base64
import html
import importlib.util
import io
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

import compare
import experiment
import journal
from data import balanced_subset, generator
from experiment import PARAMS, RunError, UsageError

INK = "#010203"  # of text and axes: the browser puts the theme's colour in its place
TITLES = {"loss_sim": "invariance loss", "loss_uniformity": "uniformity loss", "grad_norm": "norm of the gradient",
          "lr": "learning rate", "patches_per_second": "patches per second", "knn_top1": "20-NN while training, %",
          "top1": "linear probe, %"}  # fmt: skip

STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 0 1rem 3rem }
html { background: Canvas; color: CanvasText }
h1 { font-size: 1.4rem; overflow-wrap: anywhere } h2 { font-size: 1.15rem; margin-top: 2.5rem } h3 { font-size: 1rem }
.figures { display: flex; flex-wrap: wrap; gap: 1rem } .figures img { max-width: 100%; height: auto }
.wide { overflow-x: auto } .wide img { image-rendering: pixelated; max-width: none }
.thumb { width: 48px; height: 48px; image-rendering: pixelated; margin: 1px }
.thumb { border: 3px solid transparent; vertical-align: middle }
.right { border-color: #2a9d4e } .wrong { border-color: #d1495b }
table { border-collapse: collapse; font-size: .9rem }
td, th { text-align: left; padding: .15rem 1rem .15rem 0; vertical-align: top }
td { overflow-wrap: anywhere } td:first-child { overflow-wrap: normal }
@media (max-width: 30rem) { td:nth-child(3) { display: none } }
.changed { font-weight: bold } .number { font-size: 1.8rem; font-weight: bold }
"""


def require_packages():
    """Raises UsageError if what draws the page is not installed."""
    for module, package in (("matplotlib", "matplotlib"), ("sklearn", "scikit-learn")):
        if importlib.util.find_spec(module) is None:
            raise UsageError(f"report needs {package}: pip install matplotlib scikit-learn")


def page(exp_dir, hp, train_set, test_set, missing):
    """The page, a text. train_set, test_set: data.ImageSet, None where there are none, and `missing` says why there are no
    images at all. What a run has not reached yet is left out."""
    launches, state = journal.read_launches(exp_dir), compare.status(exp_dir, vars(hp), journal.read_launches(exp_dir))
    done = state == "finished"
    splits = {split: load(exp_dir / "artifacts" / f"{split}.pt") if done else None for split in ("train", "test")}
    result = experiment.read_json(exp_dir / "linear_accuracy.json") if done else {}
    probe = load(exp_dir / "probe.pt") if result else None
    image_sets = {"train": train_set, "test": test_set}
    split = "test" if splits["test"] else "train"
    parts = [heading(exp_dir, hp, state, result), section("Curves", curves_html(exp_dir)), section("Patches", patches(exp_dir))]
    if splits[split]:
        class_names = probe["class_names"] if probe else (image_sets[split].class_names if image_sets[split] else [])
        labels = splits[split].get("labels")
        figure = map_figure(splits[split]["embeddings"], labels if class_names else None, class_names)
        parts.append(section("Map of the embeddings", figures((figure, f"t-SNE map of the embeddings of {split} images"))))
        if probe:
            truth, predicted = labels, (splits[split]["embeddings"] @ probe["weight"].T + probe["bias"]).argmax(1)
            matrix = confusion_matrix(truth, predicted, len(class_names))
            figure = confusion_figure(matrix, class_names)
            parts.append(section("Confusions", figures((figure, "confusion matrix of the linear probe on the test images"))
                                 + confused_pairs(matrix, truth, predicted, class_names, test_set)))  # fmt: skip
        parts.append(section("Nearest neighbours", neighbours(splits, image_sets, split, hp.seed) if not missing else
                             f"<p>No images: {html.escape(missing)}</p>"))  # fmt: skip
    parts += [section("Seconds per stage", seconds(launches)), section("Settings", settings(hp)),
              section("Environment", environment(launches))]  # fmt: skip
    title = html.escape(exp_dir.resolve().name)
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
            f"<style>{STYLE}</style></head>\n<body>{''.join(parts)}</body></html>\n")  # fmt: skip


def load(path):
    """What is in the file, None if it is missing or damaged."""
    try:
        return experiment.load(path)
    except RunError:
        return None


# ------------------------------------------------------------------------------------------------- html


def section(title, content):
    return f"<section><h2>{title}</h2>{content}</section>\n" if content else ""


def table(rows, header=()):
    """rows: of texts; a row that starts with None is set in bold, without it."""
    lines = ["".join(f"<th>{html.escape(str(cell))}</th>" for cell in header)] if header else []
    lines += ["".join(f"<td>{html.escape(str(cell))}</td>" for cell in row if cell is not None) for row in rows]
    bold = [False] * bool(header) + [row[0] is None for row in rows]
    lines = [f'<tr class="changed">{line}</tr>' if b else f"<tr>{line}</tr>" for line, b in zip(lines, bold, strict=True)]
    return f"<table>{''.join(lines)}</table>"


def image(content, kind, alt, attributes=""):
    return f'<img src="data:image/{kind};base64,{base64.b64encode(content).decode()}" alt="{html.escape(alt)}" {attributes}>'


def thumb(pixels, alt, mark=""):
    """A small picture of an image uint8 (3, H, W). mark: right, wrong or nothing."""
    picture, out = Image.fromarray(pixels.permute(1, 2, 0).numpy()), io.BytesIO()
    picture.thumbnail((64, 64))
    picture.save(out, "PNG")
    return image(out.getvalue(), "png", alt, f'class="thumb {mark}" title="{html.escape(alt)}"')


def figures(*drawn):
    """(figure, alternative text) pairs side by side, as SVG in the colours of the reader's theme."""
    theme = "<style>svg{color:#222}@media(prefers-color-scheme:dark){svg{color:#ddd}}</style>"
    parts = []
    for figure, alt in drawn:
        out = io.StringIO()
        with drawing():
            figure.savefig(out, format="svg", transparent=True, bbox_inches="tight")
        svg = out.getvalue().replace(INK, "currentColor")
        start = svg.index(">", svg.index("<svg")) + 1
        parts.append(image((svg[:start] + theme + svg[start:]).encode(), "svg+xml", alt))
    return f'<div class="figures">{"".join(parts)}</div>'


# ---------------------------------------------------------------------------------------------- figures


@contextmanager
def drawing(ink=INK):
    import matplotlib

    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    with matplotlib.rc_context({**dict.fromkeys(names, ink), "font.size": 9, "legend.frameon": False, "svg.hashsalt": "report"}):
        yield


def axes(width, height, title="", ink=INK):
    """(figure, its one Axes), in inches."""
    from matplotlib.figure import Figure

    with drawing(ink):
        figure = Figure((width, height))
        ax = figure.subplots()
        ax.set_title(title, fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, ax


def curve(title, x_label, x, y, ink=INK):
    figure, ax = axes(3.4, 2.1, title, ink)
    with drawing(ink):
        ax.plot(x, y, marker="." if len(x) < 30 else None)
        ax.set_xlabel(x_label)
    return figure


def curves(exp_dir, ink=INK):
    """(figure, its text) of each curve in metrics.jsonl."""
    rows, drawn = journal.read_metrics(exp_dir), []
    for name, title in TITLES.items():
        x = "probe_epoch" if name == "top1" else "global_step"
        points = [(row[x], row[name]) for row in rows if name in row and x in row]
        if points:
            x_label = "epoch of the probe" if name == "top1" else "step"
            drawn.append((curve(title, x_label, *zip(*points, strict=True), ink), f"{title}: {points[0][1]:.4g} at first, "
                          f"{points[-1][1]:.4g} at last"))  # fmt: skip
    return drawn


def curves_html(exp_dir):
    drawn = curves(exp_dir)
    return figures(*drawn) if drawn else ""


def map_figure(embeddings, labels, class_names, ink=INK, n=1000):
    """Up to n embeddings (N, d) in two dimensions, coloured by class: t-SNE by cosine distance, of 50 principal components."""
    from matplotlib import colormaps
    from sklearn.manifold import TSNE

    some = balanced_subset(labels, len(embeddings), min(n, len(embeddings)), generator(0, "map"))
    x = F.normalize(embeddings[some], dim=1)
    x = x - x.mean(0)
    x = x @ torch.linalg.svd(x, full_matrices=False).Vh[:50].T
    perplexity = min(30, max(1, (len(x) - 1) / 3))
    points = TSNE(perplexity=perplexity, init="random" if len(x) < 5 else "pca", random_state=0).fit_transform(x.numpy())
    figure, ax = axes(4.2, 4.2, "", ink)
    with drawing(ink):
        ax.set_axis_off()
        groups = [(name, labels[some] == i) for i, name in enumerate(class_names)] if labels is not None else [("", slice(None))]
        C = len(groups)
        palette = colormaps["tab10"] if C <= 10 else colormaps["tab20"] if C <= 20 else colormaps["hsv"].resampled(C)
        for i, (name, rows) in enumerate(groups):
            ax.scatter(*points[rows].T, s=5, color=palette(i), label=name, linewidths=0)
        if 1 < C <= 20:
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=4, markerscale=3, columnspacing=1, handletextpad=0.2)
    return figure


def confusion_matrix(truth, predicted, n_classes):
    """int64 (n_classes, n_classes): how many of a true class, the row, were taken for another, the column."""
    return torch.bincount(truth * n_classes + predicted, minlength=n_classes**2).view(n_classes, n_classes)


def confusion_figure(matrix, class_names):
    C = len(class_names)
    figure, ax = axes(4.2, 4.2)
    with drawing():
        share = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
        ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
        ax.set_xlabel("predicted")
        ax.set_ylabel("true")
        if C <= 20:
            ax.set_xticks(range(C), class_names, rotation=90)
            ax.set_yticks(range(C), class_names)
            for i, j in [(i, j) for i in range(C) for j in range(C) if matrix[i, j]]:
                colour = "white" if share[i, j] > 0.5 else "black"
                ax.text(j, i, int(matrix[i, j]), ha="center", va="center", fontsize=6, color=colour)
    return figure


# --------------------------------------------------------------------------------------------- sections


def heading(exp_dir, hp, state, result):
    title = f"<h1>{html.escape(exp_dir.resolve().name)}</h1><p>{hp.dataset}, {hp.arch}: {html.escape(state)}</p>"
    if not result:
        return title + ("<p>No linear probe: the images have no labels.</p>" if state == "finished" else "")
    rows = [("linear probe, top-5", f"{result['top5']:.2f}%"),
            (f"linear probe, best epoch ({result['best_epoch']}), chosen on the test images", f"{result['best_top1']:.2f}%"),
            ("20 nearest neighbours, top-1", f"{result['knn_top1']:.2f}%"),
            ("images", f"{result['n_train']} train, {result['n_test']} test")]  # fmt: skip
    return title + f'<p><span class="number">{result["top1"]:.2f}%</span> linear probe, top-1, last epoch</p>' + table(rows)


def patches(exp_dir):
    path = Path(exp_dir) / "patches.png"
    alt = "eight training images, a row each: the whole image, then patches of it as the network sees them"
    return f'<div class="wide">{image(path.read_bytes(), "png", alt)}</div>' if path.exists() else ""


def confused_pairs(matrix, truth, predicted, class_names, test_set, n_pairs=8, n_examples=6):
    """The pairs of classes that are most often taken for each other, with test images as examples."""
    wrong = matrix.clone().fill_diagonal_(0)
    lines = []
    for place in wrong.flatten().argsort(descending=True, stable=True)[:n_pairs].tolist():
        i, j = divmod(place, len(class_names))
        if wrong[i, j] == 0:
            break
        rows = ((truth == i) & (predicted == j)).nonzero().flatten()[:n_examples]
        examples = [thumb(pixels, f"{class_names[i]}, taken for {class_names[j]}") for pixels in pixels_of(test_set, rows)]
        text = html.escape(f"{class_names[i]}, taken for {class_names[j]}: {int(wrong[i, j])} of {int(matrix[i].sum())}")
        lines.append(f"<p>{text}<br>{''.join(examples)}</p>")
    return "".join(lines) or "<p>No test image was taken for one of another class.</p>"


def pixels_of(image_set, rows):
    return image_set.images[rows] if image_set else []


def neighbours(splits, image_sets, split, seed, n_queries=10, n_neighbours=8):
    """A line for each of ten images: itself, then the training images that are nearest by cosine."""
    queries, others = splits[split]["embeddings"], splits["train"]["embeddings"]
    chosen = balanced_subset(image_sets[split].labels, len(queries), min(n_queries, len(queries)), generator(seed, "report"))
    cosine = F.normalize(queries[chosen], dim=1) @ F.normalize(others, dim=1).T
    if split == "train":
        cosine[torch.arange(len(chosen)), chosen] = -2  # not itself
    lines = []
    for query, nearest in zip(chosen, cosine.topk(min(n_neighbours, len(others) - (split == "train"))).indices, strict=True):
        truth = name_of(image_sets[split], query)
        marks = [(name, "" if truth is None else "right" if name == truth else "wrong")
                 for name in (name_of(image_sets["train"], i) for i in nearest)]  # fmt: skip
        near = [thumb(pixels, f"neighbour: {name or 'no label'}", mark)
                for pixels, (name, mark) in zip(pixels_of(image_sets["train"], nearest), marks, strict=True)]  # fmt: skip
        (pixels,) = pixels_of(image_sets[split], query[None])
        lines.append(f"<p>{thumb(pixels, truth or 'no label')} {html.escape(truth or '')}<br>{''.join(near)}</p>")
    return "<p>Green: of the same class.</p>" * (image_sets[split].labels is not None) + "".join(lines)


def name_of(image_set, i):
    return None if image_set.labels is None else image_set.class_names[image_set.labels[i]]


def seconds(launches):
    taken = launches[-1].get("seconds", {}) if launches else {}
    if not taken:
        return ""
    figure, ax = axes(3.4, 1.4)
    with drawing():
        ax.barh(list(taken), list(taken.values()))
        ax.invert_yaxis()
        ax.set_xlabel("seconds")
    text = ", ".join(f"{stage} {value:.1f}" for stage, value in taken.items())
    return figures((figure, f"seconds per stage: {text}")) + table([(stage, f"{value:.1f}") for stage, value in taken.items()])


def settings(hp):
    """Each hyperparameter, in bold where it is not the default."""
    rows = []
    for param in PARAMS:
        value = getattr(hp, param.name)
        rows.append(([] if value == param.default else [None]) + [param.name, experiment.yaml_value(value), param.help])
    return "<p>In bold: not the default.</p>" + table(rows)


def environment(launches):
    parts = []
    for i, launch in enumerate(launches, 1):
        rows = [(name, value if not isinstance(value, list) else ", ".join(value)) for name, value in launch.items()
                if name not in ("hparams", "seconds")]  # fmt: skip
        parts.append(f"<h3>Launch {i} of {len(launches)}</h3>{table(rows)}")
    return "".join(parts)
