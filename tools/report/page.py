"""A run as one page: result, curves, pictures, seconds, settings, environment.

This file collects what the page shows; report.html is its jinja2 template.
"""

import importlib.util
import math
import os
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from data import Images, labelled, sample, warn_of_changed_images
from evaluate import (
    METRICS,
    N_COLLAPSE,
    PROBE_LR,
    Fit,
    confusion_matrix,
    has_top5,
    linear_probe,
    per_class,
)
from experiment import Run, load_if_key
from hparams import SETTINGS, yaml_value
from infra import files
from infra.console import log
from infra.errors import RunError, UsageError
from infra.metrics import read_png
from tools.compare import FINISHED, NO_PROBE, status
from tools.report.figures import (
    N_MAP,
    classes_figure,
    confusion_figure,
    curve_figure,
    drawing,
    map_figure,
    seconds_figure,
    svg,
)
from tools.report.gallery import Picture, confused_pairs, data_uri, leaks, neighbours, overview

# Of metrics.jsonl. name: (title, what is good)
METRIC_CURVES = {
    "loss_sim": ("invariance loss", "lower is better, -1 at best"),
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
    encoded: dict  # {split: what artifacts/<split>.pt holds}
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
    image_sets, missing = image_sets_of(run)
    if missing:
        log.warning(f"no pictures of images: {missing}")
    for launch in run.read_launches():
        for name, value in launch.items():
            if name not in HIDDEN:
                log.info(f"{name:16} {value}")
    with drawing():
        text = page(run, image_sets, missing)
    with files.atomic_write(out) as file:
        file.write(text.encode())
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


def image_sets_of(run):
    """Return ({split: ImageSet or None}, why there are none).

    The images must be those of the checkpoint.
    """
    none = {"train": None, "test": None}
    if not run.checkpoint:
        return none, "there is no checkpoint that can be read"
    try:
        images = Images(run.hp, run.fingerprints)
        return {split: images[split] for split in none}, ""
    except (RunError, UsageError) as error:
        return none, str(error)


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


def page(run, image_sets, missing):
    """Return the page as a text. What the run has not reached yet is left out.

    image_sets: {split: ImageSet or None}. missing: why there are no images, or "".
    """
    import jinja2  # comes with torch

    results = read_results(run)
    for path in results.lost:
        log.warning(
            f"{path} is missing, damaged, or of another run: what it holds is left out; resume the "
            f"run"
        )
    launches = run.read_launches()
    context = {
        "name": run.dir.resolve().name,
        "hp": run.hp,
        "missing": missing,
        "curves": [] if str(run.metrics) in results.lost else metric_curves(run.metrics),
        "patches": patches_picture(run.patches),
        "settings": setting_rows(run.hp),
        "launches": [launch_rows(launch) for launch in launches],
        **result_context(run.hp, results, image_sets),
        **seconds_context(launches),
        **embeddings_context(run.hp, results, image_sets),
    }
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=folder, autoescape=True)
    return environment.get_template("report.html").render(context)


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


def result_context(hp, results, image_sets):
    """Return what the top of the page shows."""
    rows = []
    if results.result:
        rows = [
            *accuracy_rows(results.result),
            *baseline_rows(hp, image_sets),
            ("images", f"{results.result['n_train']:,} train, {results.result['n_test']:,} test"),
        ]
    return {
        "status": results.status,
        "no_probe": results.status == NO_PROBE,
        "lost": results.lost,
        "result": results.result,
        "accuracies": rows,
    }


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
    if "balanced_top1" in result:
        rows.append(("balanced, the mean over the classes", f"{result['balanced_top1']:.2f}%"))
    rows.append(("of the training images themselves", f"{result['train_top1']:.2f}%"))
    rows.append((best_epoch, f"{result['best_top1']:.2f}%"))
    for name, (title, _) in METRICS.items():
        rows.append((f"{title}, top-1", f"{result[name]:.2f}%"))
    return rows


def baseline_rows(hp, image_sets):
    """Return the rows (title, text) of what the accuracy compares with."""
    rows = []
    if all(image_sets.values()):
        image_sets = {split: labelled(image_set) for split, image_set in image_sets.items()}
        labels = image_sets["test"].labels
        chance = 100 * labels.bincount().max().item() / len(labels)
        top1, n, size = pixel_probe(image_sets, hp.seed)
        title = f"a linear layer on the pixels ({size} x {size}) of {n:,} training images"
        rows = [("always the largest class", f"{chance:.2f}%"), (title, f"{top1:.2f}%")]
    command = "the command below with --n_epochs 0 and another --exp_name"
    return [*rows, ("an untrained encoder", command)]


def pixel_probe(image_sets, seed, n=5000):
    """Return (top-1 in percent, number of training images, side in pixels) of a linear probe.

    It is fitted to the pixels of at most n training images.
    """
    x, y = pixels_of(image_sets["train"], n, seed)
    x_test, y_test = pixels_of(image_sets["test"], 2 * n, seed)
    n_classes = len(image_sets["train"].class_names)
    fit = Fit(PROBE_LR, n_epochs=20, seed=seed)
    result, _ = linear_probe(x, y, x_test, y_test, n_classes, fit)
    return result["top1"], len(x), math.isqrt(x.shape[1] // 3)


def pixels_of(image_set, n, seed):
    """Return (x float32 (n, 3 s s) in [-1, 1], labels) of n images, shrunk to s = 32 pixels."""
    images, labels, _, _ = sample(image_set, n, seed, "raw pixels")
    size = min(32, images.shape[-1])
    chunks = [images[i : i + 100].float() for i in range(0, len(images), 100)]
    x = torch.cat([F.adaptive_avg_pool2d(chunk, size) for chunk in chunks])  # (n, 3, s, s)
    return x.flatten(1) / 127.5 - 1, labels


def seconds_context(launches):
    """Return what the page shows of the seconds per stage, nothing if the run has not finished."""
    seconds = launches[-1].get("seconds") if launches else None
    if not seconds:
        return {}
    rows = [(stage, f"{value:.1f}") for stage, value in seconds.items()]
    alt = "seconds per stage: " + ", ".join(" ".join(row) for row in rows)
    return {"seconds": rows, "seconds_figure": svg(seconds_figure(seconds), alt)}


def embeddings_context(hp, results, image_sets):
    """Return what the page shows of the embeddings, nothing if there are none.

    They are those of the test images, or of the training images if there are no others.
    """
    encoded = results.encoded
    if not encoded:
        return {}
    split = "test" if "test" in encoded else "train"
    class_names = []
    if results.probe:
        class_names = results.probe["class_names"]
    elif image_sets[split]:
        class_names = image_sets[split].class_names
    context = {
        "split": split,
        "class_names": class_names,
        "collapse": encoded["train"].get("collapse"),
        "n_collapse": f"{min(N_COLLAPSE, len(encoded['train']['embeddings'])):,}",
        "leaks": leaks(encoded, image_sets),
        **map_context(encoded[split], class_names, split),
    }
    if results.probe:
        context |= confusion_context(encoded[split], results.probe, image_sets[split])
    if image_sets[split]:
        context["neighbours"] = neighbours(encoded, image_sets, split, hp.seed)
        context["overview"] = overview(encoded["train"], image_sets["train"], hp.seed)
    return context


def map_context(content, class_names, split):
    """Return the map of the embeddings of a split, nothing if there are fewer than three."""
    embeddings = content["embeddings"]
    if len(embeddings) < 3:
        return {}
    labels = content["labels"] if class_names else None
    figure = map_figure(embeddings, labels, class_names)
    alt = f"t-SNE map of the embeddings of {split} images"
    return {"map": svg(figure, alt, bbox_inches="tight"), "n_map": min(N_MAP, len(embeddings))}


def confusion_context(content, probe, test_set):
    """Return what the page shows of the predictions of the linear probe.

    content: that of artifacts/test.pt. test_set: an ImageSet, or None.
    """
    labels = content["labels"]
    class_names = probe["class_names"]
    predicted = (content["embeddings"] @ probe["weight"].T + probe["bias"]).argmax(1)  # (M,)
    known = labels >= 0
    matrix = confusion_matrix(labels[known], predicted[known], len(class_names))
    accuracies = per_class(matrix.tolist(), class_names)
    accuracies = {name: top1 for name, top1 in accuracies.items() if top1 is not None}
    text = ", ".join(f"{name} {top1:.1f}" for name, top1 in accuracies.items())
    figure = confusion_figure(matrix, class_names)
    return {
        "confusion": svg(figure, "confusion matrix of the linear probe on the test images"),
        "classes": svg(classes_figure(accuracies), f"accuracy of each class, in percent: {text}"),
        "pairs": confused_pairs(matrix, labels, predicted, class_names, test_set),
    }
