"""A run as one page: result, curves, pictures, seconds, settings, environment.

This file collects what the page shows; report.html is its jinja2 template.
"""

import importlib.util
import math
import os
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from data import balanced_subset, warn_of_changed_images
from encode import encode_images
from evaluate import (
    METRICS,
    N_COLLAPSE,
    PROBE_LR,
    Fit,
    confusion_matrix,
    has_top5,
    knn,
    linear_probe,
    per_class,
)
from experiment import Machine, Run, load_if_key
from hparams import SETTINGS, Setting, yaml_value
from infra import files
from infra.console import log
from infra.device import generator
from infra.errors import RunError, UsageError
from infra.metrics import read_png
from tools.compare import FINISHED, NO_PROBE, status
from tools.probe import probe_predictions
from tools.report.collection import collection_of, find_pictures
from tools.report.explore import explore, write_lists
from tools.report.figures import (
    FEW_CLASSES,
    classes_figure,
    confusion_figure,
    curve_figure,
    drawing,
    map_of,
    seconds_figure,
    svg,
)
from tools.report.gallery import (
    Picture,
    confused_pairs,
    data_uri,
    leaks,
    neighbours,
    overview,
    thumb,
    write_page,
)
from weights import random_encoder

# Of metrics.jsonl. name: (title, what is good)
METRIC_CURVES = {
    "loss_sim": (
        "invariance loss",
        "lower is better, -1 at best; it rises at first, because spreading the projections costs "
        "similarity: that is no fault",
    ),
    "loss_uniformity": ("uniformity loss", "lower is better"),
    "grad_norm": ("norm of the gradient", ""),
    "lr": ("learning rate", ""),
    "patches_per_second": ("patches per second", ""),
    "knn_top1": ("20-NN while training, %", "higher is better"),
    "rank": ("effective rank", "below 5: collapsed"),
    "alignment": ("alignment", "lower is better"),
    "uniformity": ("uniformity", "lower is better; near 0: collapsed"),
    "top1": ("linear probe, %", "higher is better"),
}
# Entries of a launch that are of no interest to a reader.
HIDDEN = ("hparams", "result", "metrics", "collapse", "data", "checksum")


class RunResults(NamedTuple):
    """What a run has stored. All but the status is empty unless it has finished."""

    status: str
    result: dict
    # {split: what artifacts/<split>.pt holds}, without embeddings once a Collection is made of it
    encoded: dict
    probe: dict  # what probe.pt holds
    lost: list  # names of files that are missing, damaged, or of other weights, images or settings


def add_report(commands):
    """Add the command report."""
    parser = commands.add_parser(
        "report",
        help="a run as one page, report.html",
        description="Print the environment of each launch, and write one page with "
        "settings, result, curves and pictures.",
    )
    parser.add_argument("--exp_dir", required=True, type=files.user_path, help="the run folder")
    parser.add_argument(
        "--out",
        type=files.user_path,
        metavar="FILE.html",
        help="the page (default: report.html in the run folder)",
    )
    add, number = parser.add_argument, Setting("number", int, low=1).parse
    add("--n_clusters", type=number, default=10, metavar="N", help="clusters (default: 10)")
    shown = "images shown of each cluster, pairs of the leaks, and so on (default: 12)"
    add("--n_shown", type=number, default=12, metavar="N", help=shown)
    parser.set_defaults(command=report_command)


def report_command(args):
    """Write the page, by default report.html in the run folder.

    If the run is not finished or its images are gone, the page says what is missing.
    """
    for module, package in (("matplotlib", "matplotlib"), ("sklearn", "scikit-learn")):
        if importlib.util.find_spec(module) is None:
            raise UsageError(f"report needs {package}: pip install matplotlib scikit-learn")
    run = Run(args.exp_dir)
    run.hp = run.read_hparams()
    out = args.out or run.report
    if out.suffix != ".html" or not os.access(out.parent, os.W_OK):
        raise UsageError(f"--out {out} must be a file NAME.html in a folder that can be written")
    run.checkpoint = newest_checkpoint(run)
    warn_of_changed_images(run.hp, run.images_changed())
    run.machine = Machine.of(replace(run.hp, device="auto"))
    for launch in run.read_launches():
        for name, value in launch.items():
            if name not in HIDDEN:
                log.info(f"{name:16} {value}")
    results = read_results(run)
    for path in results.lost:
        log.warning(
            f"{path} is missing, damaged, or of another run: what it holds is left out; resume the "
            f"run"
        )
    with drawing():
        context = page_context(run, results) | images_context(run, results, args, out.parent)
    if context["missing"]:
        log.warning(context["missing"])
    write_page(out, "report/report.html", context)
    log.info(f"* Report: {out}, {out.stat().st_size / 1e6:.1f} MB")


def newest_checkpoint(run):
    """Return the newest checkpoint, None if there is none that can be read.

    Raises UsageError for one of an earlier version.
    """
    try:
        return run.newest_checkpoint()
    except RunError as error:
        log.warning(error)
        return None


def read_results(run):
    """Return the RunResults of a run."""
    state = status(run, run.hp)
    if state not in (FINISHED, NO_PROBE):
        return RunResults(state, {}, {}, {}, [])
    result = run.read_result()
    if run.checkpoint is None:
        return RunResults(state, result, {}, {}, [str(run.last)])
    encoded = {split: load_if_key(run.artifacts[split], run.key(split)) for split in run.splits}
    lost = [str(run.artifacts[split]) for split in run.splits if not encoded[split]]
    probe = load_if_key(run.probe, run.key("probe")) if result else None
    if result and not probe:
        lost.append(str(run.probe))
    if run.read_launches()[-1]["metrics"] != files.file_checksum(run.metrics):
        lost.append(str(run.metrics))
    return RunResults(state, result, {} if lost else encoded, probe or {}, lost)


def page_context(run, results):
    """Return what the page shows beside the images. What the run has not reached is left out."""
    launches = run.read_launches()
    return {
        "name": run.dir.resolve().name,
        "hp": run.hp,
        "status": results.status,
        "no_probe": results.status == NO_PROBE,
        "lost": results.lost,
        "result": results.result,
        "accuracies": accuracy_rows(results.result) if results.result else [],
        "few": FEW_CLASSES,
        "curves": [] if str(run.metrics) in results.lost else metric_curves(run.metrics),
        "patches": patches_picture(run.patches),
        "settings": setting_rows(run.hp),
        "launches": [launch_rows(launch) for launch in launches],
        **seconds_context(launches),
    }


def metric_curves(path):
    """Return a Picture of each curve in metrics.jsonl; all have the same size."""
    rows = files.read_jsonl(path)
    pictures = []
    for name, (title, note) in METRIC_CURVES.items():
        x_name = "probe_epoch" if name == "top1" else "global_step"
        x_label = "epoch of the probe" if name == "top1" else "step"
        points = [
            (row[x_name], row[name])
            for row in rows
            if isinstance(row.get(x_name), int) and isinstance(row.get(name), int | float)
        ]
        if points:
            x, y = zip(*points, strict=True)
            alt = f"{title}: {y[0]:.4g} at first, {y[-1]:.4g} at last"
            pictures.append(svg(curve_figure(x, y, title, x_label), alt, note))
    return pictures


def patches_picture(path):
    """Return patches.png as a Picture, None if it can't be read."""
    if not read_png(path):
        return None
    alt = (
        "eight training images, a row each: the whole image, then patches of it as the network "
        "sees them"
    )
    return Picture(data_uri(path.read_bytes(), "png"), alt)


def setting_rows(hp):
    """Return name, value, help and changed of each setting, as dicts."""
    return [
        {
            "name": name,
            "value": yaml_value(getattr(hp, name)),
            "help": setting.help,
            "changed": getattr(hp, name) != setting.default,
        }
        for name, setting in SETTINGS.items()
    ]


def launch_rows(launch):
    """Return the rows (name, value) of the table of a launch."""
    rows = []
    for name, value in launch.items():
        if name not in (*HIDDEN, "seconds"):
            rows.append((name, ", ".join(value) if isinstance(value, list) else value))
    return rows


def accuracy_rows(result):
    """Return the rows (title, text) of the accuracies beside top-1."""
    from scipy.stats import binomtest  # comes with scikit-learn

    n_test = result["n_test"]
    n_right = round(result["top1"] * n_test / 100)
    interval = binomtest(n_right, n_test).proportion_ci(method="wilson")
    low_to_high = f"{100 * interval.low:.2f}% to {100 * interval.high:.2f}%"
    best_epoch = f"best epoch ({result['best_epoch']}), chosen on the test images"
    rows = [("95% interval, by the number of test images", low_to_high)]
    if has_top5(result["key"]):
        rows.append(("top-5", f"{result['top5']:.2f}%"))
    if "balanced_top1" in result:  # not in that of an earlier version
        rows.append(("balanced, the mean over the classes", f"{result['balanced_top1']:.2f}%"))
        rows.append(("always the largest class", f"{result['largest_class']:.2f}%"))
    rows.append(("of the training images themselves", f"{result['train_top1']:.2f}%"))
    rows.append((best_epoch, f"{result['best_top1']:.2f}%"))
    for name, (title, _) in METRICS.items():
        rows.append((f"{title}, top-1", f"{result[name]:.2f}%"))
    return [*rows, ("images", f"{result['n_train']:,} train, {n_test:,} test")]


def baseline_context(run, collection):
    """Return what the accuracies compare with, nothing without pictures."""
    train, test = (some_rows(collection, *of) for of in (("train", 5000), ("test", 10_000)))
    if not len(train) or not len(test):
        return {}
    x, x_test = pixels_of(collection[train]), pixels_of(collection[test])
    y, y_test = collection.labels[train], collection.labels[test]
    fit = Fit(PROBE_LR, n_epochs=20, seed=run.hp.seed)
    result, _ = linear_probe(x, y, x_test, y_test, len(collection.class_names), fit)
    size = math.isqrt(x.shape[1] // 3)
    title = f"a linear layer on the pixels ({size} x {size}) of {len(x):,} training images"
    baselines = [(title, f"{result['top1']:.2f}%")]
    return {"baselines": baselines, "by_neighbours": knn_rows(run, collection)}


def some_rows(collection, split, n):
    """Return n random rows of a split, or all, of images that have a label and are there."""
    rows = collection.rows_of(split)
    rows = rows[(collection.labels[rows] >= 0) & (collection.places[rows] >= 0)]
    return rows[balanced_subset(collection.labels[rows], len(rows), n, generator(0, "baselines"))]


def knn_rows(run, collection):
    """Return rows (title, top-1) of 20-NN of the same images by other encodings and by the run.

    [] if the encoder can't be built here, because timm is missing.
    """
    try:
        encoder = random_encoder(run.hp).to(run.device)
    except UsageError as error:
        log.warning(f"no 20-NN of an untrained encoder: {error}")
        return []

    def untrained(images):
        return encode_images(run, encoder, images, "baseline")["embeddings"]

    train, test = (some_rows(collection, *of) for of in (("train", 1000), ("test", 500)))
    pixels = [collection[rows] for rows in (train, test)]
    representations = {
        "pixels": map(pixels_of, pixels),
        "colours: square roots of a histogram of 4 x 4 x 4 bins": map(colour_histograms, pixels),
        "the untrained encoder": map(untrained, pixels),
        "this run": [collection.embeddings[rows] for rows in (train, test)],
    }
    y, y_test = collection.labels[train], collection.labels[test]
    rows = [("images", f"{len(y):,} train, {len(y_test):,} test")]
    for title, (x, x_test) in representations.items():
        top1 = knn(x, y, x_test, y_test, len(collection.class_names))
        rows.append((title, f"{top1:.2f}%"))
    return rows


def pixels_of(images):
    """Return images uint8 (n, 3, H, W) shrunk to s = 32 pixels: float32 (n, 3 s s) in [-1, 1]."""
    size = min(32, images.shape[-1])
    x = torch.cat([F.adaptive_avg_pool2d(part.float(), size) for part in images.split(100)])
    return x.flatten(1) / 127.5 - 1


def colour_histograms(images):
    """Return the square roots of the counts of 4 x 4 x 4 colours, (n, 64), of images as above."""
    red, green, blue = (images // 64).long().flatten(2).unbind(1)  # (n, H W) each, 0 to 3
    colours = 16 * red + 4 * green + blue
    counts = torch.zeros(len(images), 64)
    return counts.scatter_add_(1, colours, torch.ones(colours.shape)).sqrt()


def seconds_context(launches):
    """Return what the page shows of the seconds per stage, nothing if the run has not finished."""
    seconds = launches[-1].get("seconds") if launches else None
    if not seconds:
        return {}
    rows = [(stage, f"{value:.1f}") for stage, value in seconds.items()]
    alt = "seconds per stage: " + ", ".join(" ".join(row) for row in rows)
    return {"seconds": rows, "seconds_figure": svg(seconds_figure(seconds), alt)}


def images_context(run, results, args, folder):
    """Return what the page shows of the images and their embeddings; write the lists of them.

    The map and the neighbours are of the test images, or of the training images if there are no
    others. args: n_clusters and n_shown. folder: that of the page and the lists.
    """
    encoded = results.encoded
    if not encoded:
        missing = "no pictures of images: there is no checkpoint that can be read"
        return {"missing": "" if run.checkpoint else missing}
    collection = collection_of(run, encoded, folder)
    missing = find_pictures(collection, run)
    split = "test" if "test" in encoded else "train"
    found, bound = explore(collection, results.probe, args.n_clusters)
    write_lists(found, collection, folder)
    numbers = {name: len(rows) for name, rows in found.items()}
    if found.get("duplicates"):
        numbers["duplicates"] = found["duplicates"][-1][1]  # the groups
    context = {
        "missing": missing,
        "split": split,
        "class_names": collection.class_names,
        "counts": class_counts(collection),
        "collapse": encoded["train"].get("collapse"),
        "n_collapse": f"{min(N_COLLAPSE, collection.splits.count('train')):,}",
        "overview": overview(found, collection, args.n_shown),
        "bound": f"{bound:.3f}",
        "found": numbers,
        "n": len(collection.names),
    }
    rows = collection.rows_of(split)
    if len(rows) > 2:
        context["map"] = map_of(collection, rows)
    if (collection.places >= 0).any():
        context["neighbours"] = neighbours(collection, split, run.hp.seed)
    copies = encoded.get("test", {}).get("copies")
    if copies:
        context["leaks"] = leaks(copies, collection, args.n_shown)
    if results.probe:
        context |= confusion_context(collection, results.probe)
        context |= baseline_context(run, collection)
    return context


def class_counts(collection):
    """Return rows (class, training images, test images), [] without classes."""
    if not collection.class_names:
        return []
    n_rows = len(collection.class_names) + 1
    labels = [collection.labels[collection.rows_of(split)] for split in ("train", "test")]
    counts = [(of_split + 1).bincount(minlength=n_rows).tolist() for of_split in labels]
    names = ["without a label", *collection.class_names]
    rows = list(zip(names, *counts, strict=True))
    return rows[1:] + (rows[:1] if any(rows[0][1:]) else [])


def confusion_context(collection, probe):
    """Return what the page shows of the predictions of the linear probe for the test images."""
    class_names = probe["class_names"]
    rows = collection.rows_of("test")
    rows = rows[collection.labels[rows] >= 0]
    labels = collection.labels[rows]
    _, predicted = probe_predictions(probe, collection.embeddings[rows])
    matrix = confusion_matrix(labels, predicted, len(class_names))
    accuracies = per_class(matrix.tolist(), class_names)
    accuracies = {name: top1 for name, top1 in accuracies.items() if top1 is not None}
    text = ", ".join(f"{name} {top1:.1f}" for name, top1 in accuracies.items())
    figure = confusion_figure(matrix, class_names)
    pairs = confused_pairs(matrix, labels, predicted, class_names)
    return {
        "confusion": svg(figure, "confusion matrix of the linear probe on the test images"),
        "classes": svg(classes_figure(accuracies), f"accuracy of each class, in percent: {text}"),
        "pairs": [
            (text, [thumb(collection, row) for row in rows[index][:6].tolist()])
            for text, index in pairs
        ],
    }
