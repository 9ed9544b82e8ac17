"""A run as one page: result, curves, patches, a map of the embeddings, confusions, neighbours,
seconds, settings, environment.

This file gathers what the page shows; report.html is its jinja2 template.
"""

import importlib.util
import io
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from data import Images, sample
from evaluate import METRICS, PROBE_LR, Fit, confusion_matrix, linear_probe, per_class
from experiment import Run, load_if_key
from hparams import SETTINGS, yaml_value
from infra import files
from infra.console import log
from infra.errors import RunError, UsageError
from infra.metrics import read_png
from tools.compare import FINISHED, NO_PROBE, status
from tools.report.figures import (
    INK,
    N_MAP,
    axes,
    classes_figure,
    confusion_figure,
    drawing,
    map_figure,
)
from tools.report.gallery import Picture, confused_pairs, data_uri, neighbours, overview

THEME = "<style>svg{color:#222}@media(prefers-color-scheme:dark){svg{color:#ddd}}</style>"
CURVES = {  # of metrics.jsonl: title, and what is good
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

UNSHOWN = (
    "hparams",
    "result",
    "metrics",
    "collapse",
    "checksum",
)  # entries of a launch that are of no interest to a reader


def add_report(commands):
    """Add the command report."""
    parser = commands.add_parser(
        "report",
        help="a run as one page, report.html",
        description=(
            "Print the environment of each launch, and write report.html: one page with settings, result, curves and pictures."
        ),
    )
    parser.add_argument("--exp_dir", required=True, type=Path, help="the run folder")
    parser.set_defaults(command=report_command)


def report_command(args):
    """Write report.html.

    If the run is not finished or its images are gone, the page says what is missing.
    """
    for module, package in (("matplotlib", "matplotlib"), ("sklearn", "scikit-learn")):
        if importlib.util.find_spec(module) is None:
            raise UsageError(f"report needs {package}: pip install matplotlib scikit-learn")
    run = Run(args.exp_dir)
    run.hp = run.read_hparams()
    run.checkpoint = newest_checkpoint(run)
    image_sets, missing = image_sets_of(run)
    if missing:
        log.warning(f"no pictures of images: {missing}")
    for launch in run.read_launches():
        for name, value in launch.items():
            if name not in UNSHOWN:
                log.info(f"{name:16} {value}")
    with drawing():
        text = page(run, image_sets, missing)
    with files.atomic_write(run.report) as file:
        file.write(text.encode())
    log.info(f"* Report: {run.report}, {run.report.stat().st_size / 1e6:.1f} MB")


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
    """Return (result, encoded, probe, lost) of a finished run.

    result: that of the last launch. encoded: {split: what artifacts/<split>.pt holds}. probe: what
    probe.pt holds. lost: the names of files that are missing, damaged, or of other weights, images
    or settings.
    """
    result = run.read_result()
    if run.checkpoint is None:
        return result, {}, {}, [str(run.last)]
    encoded = {split: load_if_key(run.artifacts[split], run.key(split)) for split in run.splits}
    lost = [str(run.artifacts[split]) for split in run.splits if not encoded[split]]
    probe = load_if_key(run.probe, run.key("probe")) if result else None
    if result and not probe:
        lost.append(str(run.probe))
    if run.read_launches()[-1]["metrics"] != files.file_checksum(run.metrics):
        lost.append(str(run.metrics))
    return result, {} if lost else encoded, probe or {}, lost


def page(run, image_sets, missing):
    """Return the page as a text. What the run has not reached yet is left out.

    image_sets: {split: ImageSet or None}. missing: why there are no images, or "".
    """
    hp = run.hp
    launches = run.read_launches()
    state = status(run, hp)
    result, encoded, probe, lost = {}, {}, {}, []
    if state in (FINISHED, NO_PROBE):
        result, encoded, probe, lost = read_results(run)
    for path in lost:
        log.warning(
            f"{path} is missing, damaged, or of another run: what it holds is left out; resume the run"
        )
    seconds = launches[-1].get("seconds", {}) if launches else {}
    context = {
        "name": run.dir.resolve().name,
        "hp": hp,
        "status": state,
        "result": result,
        "missing": missing,
        "lost": lost,
        "no_probe": state == NO_PROBE,
        "accuracies": accuracies(hp, result, image_sets) if result else [],
        "curves": [svg(*drawn) for drawn in curves(run)] if str(run.metrics) not in lost else [],
        "patches": patches(run),
        "seconds": [(stage, f"{taken:.1f}") for stage, taken in seconds.items()],
        "seconds_figure": bars(seconds),
        "settings": [
            {
                "name": name,
                "value": yaml_value(getattr(hp, name)),
                "help": setting.help,
                "changed": getattr(hp, name) != setting.default,
            }
            for name, setting in SETTINGS.items()
        ],
        "launches": [launch_rows(launch) for launch in launches],
        **(of_embeddings(hp, encoded, image_sets, probe) if encoded else {}),
    }
    import jinja2  # comes with torch

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True
    )
    return environment.get_template("report.html").render(context)


def of_embeddings(hp, encoded, image_sets, probe):
    """Return what the page shows of the embeddings: signs of collapse and an overview of the
    training images; map, confusions and neighbours of the test images, if there are any.
    """
    split = "test" if "test" in encoded else "train"
    embeddings, labels = encoded[split]["embeddings"], encoded[split].get("labels")
    class_names = probe.get("class_names") or (
        image_sets[split].class_names if image_sets[split] else []
    )
    context = {
        "class_names": class_names,
        "collapse": encoded["train"].get("collapse"),
        "split": split,
    }
    if len(embeddings) > 2:
        figure = map_figure(embeddings, labels if class_names else None, class_names)
        context["map"] = svg(
            figure, f"t-SNE map of the embeddings of {split} images", bbox_inches="tight"
        )
        context["n_map"] = min(N_MAP, len(embeddings))
    if probe:
        predicted = (embeddings @ probe["weight"].T + probe["bias"]).argmax(1)
        matrix = confusion_matrix(labels, predicted, len(class_names))
        figure = confusion_figure(matrix, class_names)
        context["confusion"] = svg(
            figure, "confusion matrix of the linear probe on the test images"
        )
        found = {
            name: top1
            for name, top1 in per_class(matrix.tolist(), class_names).items()
            if top1 is not None
        }
        context["classes"] = svg(
            classes_figure(found),
            "accuracy of each class, in percent: "
            + ", ".join(f"{name} {top1:.1f}" for name, top1 in found.items()),
        )
        context["pairs"] = confused_pairs(
            matrix, labels, predicted, class_names, image_sets["test"]
        )
    if image_sets[split]:
        context["neighbours"] = neighbours(encoded, image_sets, split, hp.seed)
        context["overview"] = overview(encoded["train"], image_sets["train"], hp.seed)
    return context


def accuracies(hp, result, image_sets):
    """Return the rows of the table below the accuracy."""
    from scipy.stats import binomtest  # comes with scikit-learn

    n_test = result["n_test"]
    hits = round(result["top1"] * n_test / 100)
    interval = binomtest(hits, n_test).proportion_ci(method="wilson")
    rows = [
        (
            "95% interval, by the number of test images",
            f"{100 * interval.low:.2f}% to {100 * interval.high:.2f}%",
        ),
        ("top-5", f"{result['top5']:.2f}%"),
        ("of the training images themselves", f"{result['train_top1']:.2f}%"),
        (
            f"best epoch ({result['best_epoch']}), chosen on the test images",
            f"{result['best_top1']:.2f}%",
        ),
    ]
    rows += [(f"{title}, top-1", f"{result[name]:.2f}%") for name, (title, _) in METRICS.items()]
    if all(image_sets.values()):
        test = image_sets["test"]
        chance = 100 * test.labels.bincount().max().item() / len(test.labels)
        top1, n, size = raw_pixels(image_sets, hp.seed)
        rows += [
            ("always the largest class", f"{chance:.2f}%"),
            (
                f"a linear layer on the pixels ({size} x {size}) of {n:,} training images",
                f"{top1:.2f}%",
            ),
        ]
    rows.append(
        ("an untrained encoder", "the command below with --n_epochs 0 and another --exp_name")
    )
    return [*rows, ("images", f"{result['n_train']:,} train, {result['n_test']:,} test")]


def raw_pixels(image_sets, seed, n=5000):
    """Return the top-1, in percent, of a linear layer on the pixels of n training images.

    Return (top-1, number of training images, at most n, pixels of a side).
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


def launch_rows(launch):
    shown = {name: value for name, value in launch.items() if name not in (*UNSHOWN, "seconds")}
    return [
        (name, ", ".join(value) if isinstance(value, list) else value)
        for name, value in shown.items()
    ]


def svg(figure, alt, note="", **options):
    """Return a figure as an SVG Picture in the colours of the reader's theme."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, **options)
    text = out.getvalue().replace(INK, "currentColor")
    start = text.index(">", text.index("<svg")) + 1
    return Picture(
        data_uri((text[:start] + THEME + text[start:]).encode(), "svg+xml"), alt, note=note
    )


def patches(run):
    if not read_png(run.patches):
        return None
    alt = "eight training images, a row each: the whole image, then patches of it as the network sees them"
    return Picture(data_uri(run.patches.read_bytes(), "png"), alt)


def curves(run):
    """Return (figure, its alternative text, what is good) of each curve in metrics.jsonl; all have
    the same size.
    """
    rows, drawn = files.read_jsonl(run.metrics), []
    for name, (title, good) in CURVES.items():
        x, x_label = (
            ("probe_epoch", "epoch of the probe") if name == "top1" else ("global_step", "step")
        )
        points = [
            (row[x], row[name])
            for row in rows
            if isinstance(row.get(name), (int, float)) and isinstance(row.get(x), int)
        ]
        if points:
            figure, ax = axes(3.4, 2.1, title)
            ax.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else None)
            ax.set_xlabel(x_label)
            drawn.append(
                (figure, f"{title}: {points[0][1]:.4g} at first, {points[-1][1]:.4g} at last", good)
            )
    return drawn


def bars(seconds):
    """Return a bar chart of the seconds per stage, None if there are none."""
    if not seconds:
        return None
    figure, ax = axes(3.4, 1.4)
    ax.barh(list(seconds), list(seconds.values()))
    ax.invert_yaxis()
    ax.set_xlabel("seconds")
    return svg(
        figure,
        "seconds per stage: "
        + ", ".join(f"{stage} {taken:.1f}" for stage, taken in seconds.items()),
    )
