"""A run as one page: result, curves, patches, a map of the embeddings, confusions, neighbours, seconds, settings, environment.

This file gathers what the page shows; report.html is its jinja2 template.
"""

import base64
import importlib.util
import io
from pathlib import Path
from typing import NamedTuple

import jinja2
import torch
import torch.nn.functional as F
from PIL import Image

from data import Images, balanced_subset
from evaluate import METRICS
from experiment import Run, stage_key
from hparams import SETTINGS, yaml_value
from infra import files
from infra.console import log
from infra.device import generator
from infra.errors import RunError, UsageError
from infra.metrics import read_png
from tools.compare import FINISHED, NO_PROBE, status
from tools.figures import INK, axes, confusion_figure, confusion_matrix, drawing, map_figure

THEME = "<style>svg{color:#222}@media(prefers-color-scheme:dark){svg{color:#ddd}}</style>"
CURVES = {"loss_sim": "invariance loss", "loss_uniformity": "uniformity loss", "grad_norm": "norm of the gradient",
          "lr": "learning rate", "patches_per_second": "patches per second", "knn_top1": "20-NN while training, %",
          "top1": "linear probe, %"}  # fmt: skip

UNSHOWN = ("hparams", "result", "metrics", "checksum")  # entries of a launch that are of no interest to a reader


class Picture(NamedTuple):
    """An <img> of the page."""

    src: str  # a data: URI
    alt: str
    mark: str = ""  # right, wrong or nothing: the colour of its border


def add_commands(commands):
    """Add the command report."""
    parser = commands.add_parser("report", help="a run as one page, report.html", description=(
        "Print the environment of each launch, and write report.html: one page with settings, result, curves and pictures."))
    parser.add_argument("--exp_dir", required=True, type=Path, help="the run folder")
    parser.set_defaults(command=report_command)


def report_command(args):
    """Write report.html. If the run is not finished or its images are gone, the page says what is missing."""
    for module, package in (("matplotlib", "matplotlib"), ("sklearn", "scikit-learn")):
        if importlib.util.find_spec(module) is None:
            raise UsageError(f"report needs {package}: pip install matplotlib scikit-learn")
    run = Run(args.exp_dir)
    hp, checkpoint = run.read_hparams(), newest_checkpoint(run)
    image_sets, missing = read_images(hp, checkpoint)
    if missing:
        log.warning(f"no pictures of images: {missing}")
    for launch in run.read_launches():
        for name, value in launch.items():
            if name not in UNSHOWN:
                log.info(f"{name:16} {value}")
    with drawing():
        text = page(run, hp, checkpoint, image_sets, missing)
    with files.atomic_write(run.report) as file:
        file.write(text.encode())
    log.info(f"* Report: {run.report}, {run.report.stat().st_size / 1e6:.1f} MB")


def read_images(hp, checkpoint):
    """Return ({split: ImageSet or None}, why there are none). The images must be those of the checkpoint."""
    none = {"train": None, "test": None}
    if not checkpoint:
        return none, "there is no checkpoint that can be read"
    try:
        images = Images(hp, checkpoint["data"])
        return {split: images[split] for split in none}, ""
    except (RunError, UsageError) as error:
        return none, str(error)


def newest_checkpoint(run):
    """Return the newest checkpoint, None if there is none that can be read. Raises UsageError for one of an earlier version."""
    try:
        return run.newest_checkpoint()
    except RunError as error:
        log.warning(error)
        return None


def load(path, key):
    """Return the content of a file of torch.save, {} if it is missing, damaged, or of other weights, images or settings."""
    try:
        content = files.load(path)
    except (RunError, UsageError):
        return {}
    return content if content.get("key") == key else {}


def read_results(run, hp, checkpoint):
    """Return (result, encoded, probe, lost) of a finished run: the result, {split: what artifacts/<split>.pt holds}, what
    probe.pt holds, and the names of files that are missing, damaged, or of other weights, images or settings."""
    result, lost = run.read_result(), []
    if checkpoint is None:
        return result, {}, {}, [str(run.last)]
    splits = [split for split in run.artifacts if checkpoint["data"][split]]
    encoded = {split: load(run.artifacts[split], stage_key(hp, checkpoint, "encode", split)) for split in splits}
    lost += [str(run.artifacts[split]) for split in splits if not encoded[split]]
    probe = load(run.probe, stage_key(hp, checkpoint, "probe")) if result else {}
    lost += [str(run.probe)] if result and not probe else []
    if run.read_launches()[-1]["metrics"] != files.file_checksum(run.metrics):
        lost.append(str(run.metrics))
    return result, {} if lost else encoded, probe, lost


def page(run, hp, checkpoint, image_sets, missing):
    """Return the page as a text. image_sets: {split: ImageSet or None}. missing: why there are no images, or "".

    What the run has not reached yet is left out.
    """
    launches, state = run.read_launches(), status(run, hp)
    done = state in (FINISHED, NO_PROBE)
    result, encoded, probe, lost = read_results(run, hp, checkpoint) if done else ({}, {}, {}, [])
    for path in lost:
        log.warning(f"{path} is missing, damaged, or of another run: what it holds is left out; resume the run")
    seconds = launches[-1].get("seconds", {}) if launches else {}
    context = {
        "name": run.dir.resolve().name, "hp": hp, "status": state, "result": result, "missing": missing, "lost": lost,
        "no_probe": state == NO_PROBE,
        "accuracies": accuracies(result) if result else [],
        "curves": [svg(figure, alt) for figure, alt in curves(run)] if str(run.metrics) not in lost else [],
        "patches": patches(run),
        "seconds": [(stage, f"{taken:.1f}") for stage, taken in seconds.items()],
        "seconds_figure": bars(seconds),
        "settings": [{"name": name, "value": yaml_value(getattr(hp, name)), "help": setting.help,
                      "changed": getattr(hp, name) != setting.default} for name, setting in SETTINGS.items()],
        "launches": [launch_rows(launch) for launch in launches],
        **(of_embeddings(hp, encoded, image_sets, probe) if encoded else {}),
    }  # fmt: skip
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    return environment.get_template("report.html").render(context)


def of_embeddings(hp, encoded, image_sets, probe):
    """Return what the page shows of the embeddings: map, confusions and neighbours, of the test images if there are any."""
    split = "test" if "test" in encoded else "train"
    embeddings, labels = encoded[split]["embeddings"], encoded[split].get("labels")
    class_names = probe.get("class_names") or (image_sets[split].class_names if image_sets[split] else [])
    context = {"class_names": class_names}
    if len(embeddings) > 2:
        figure = map_figure(embeddings, labels if class_names else None, class_names)
        context["map"] = svg(figure, f"t-SNE map of the embeddings of {split} images")
    if probe:
        predicted = (embeddings @ probe["weight"].T + probe["bias"]).argmax(1)
        matrix = confusion_matrix(labels, predicted, len(class_names))
        figure = confusion_figure(matrix, class_names)
        context["confusion"] = svg(figure, "confusion matrix of the linear probe on the test images")
        context["pairs"] = confused_pairs(matrix, labels, predicted, class_names, image_sets["test"])
    if image_sets[split]:
        context["neighbours"] = neighbours(encoded, image_sets, split, hp.seed)
    return context


def accuracies(result):
    best = f"linear probe, best epoch ({result['best_epoch']}), chosen on the test images"
    own = "linear probe, top-1, of the training images themselves"
    return [("linear probe, top-5", f"{result['top5']:.2f}%"), (own, f"{result['train_top1']:.2f}%"),
            (best, f"{result['best_top1']:.2f}%"),
            *((f"{title}, top-1", f"{result[name]:.2f}%") for name, (title, _) in METRICS.items()),
            ("images", f"{result['n_train']} train, {result['n_test']} test")]  # fmt: skip


def launch_rows(launch):
    shown = {name: value for name, value in launch.items() if name not in (*UNSHOWN, "seconds")}
    return [(name, ", ".join(value) if isinstance(value, list) else value) for name, value in shown.items()]


def data_uri(content, kind):
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def svg(figure, alt):
    """Return a figure as an SVG Picture in the colours of the reader's theme."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, bbox_inches="tight")
    text = out.getvalue().replace(INK, "currentColor")
    start = text.index(">", text.index("<svg")) + 1
    return Picture(data_uri((text[:start] + THEME + text[start:]).encode(), "svg+xml"), alt)


def thumb(pixels, alt, mark=""):
    """Return a small Picture of an image uint8 (3, H, W)."""
    picture, out = Image.fromarray(pixels.permute(1, 2, 0).numpy()), io.BytesIO()
    picture.thumbnail((64, 64))
    picture.save(out, "PNG")
    return Picture(data_uri(out.getvalue(), "png"), alt, mark)


def patches(run):
    if not read_png(run.patches):
        return None
    alt = "eight training images, a row each: the whole image, then patches of it as the network sees them"
    return Picture(data_uri(run.patches.read_bytes(), "png"), alt)


def curves(run):
    """Return (figure, its alternative text) of each curve in metrics.jsonl."""
    rows, drawn = files.read_jsonl(run.metrics), []
    for name, title in CURVES.items():
        x, x_label = ("probe_epoch", "epoch of the probe") if name == "top1" else ("global_step", "step")
        points = [(row[x], row[name]) for row in rows if isinstance(row.get(name), (int, float)) and isinstance(row.get(x), int)]
        if points:
            figure, ax = axes(3.4, 2.1, title)
            ax.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else None)
            ax.set_xlabel(x_label)
            drawn.append((figure, f"{title}: {points[0][1]:.4g} at first, {points[-1][1]:.4g} at last"))
    return drawn


def bars(seconds):
    """Return a bar chart of the seconds per stage, None if there are none."""
    if not seconds:
        return None
    figure, ax = axes(3.4, 1.4)
    ax.barh(list(seconds), list(seconds.values()))
    ax.invert_yaxis()
    ax.set_xlabel("seconds")
    return svg(figure, "seconds per stage: " + ", ".join(f"{stage} {taken:.1f}" for stage, taken in seconds.items()))


def confused_pairs(matrix, truth, predicted, class_names, test_set, n_pairs=8, n_examples=6):
    """Return a dict for each of the pairs of classes that are confused most: its text, and examples, a list of Pictures."""
    wrong, pairs = matrix.clone().fill_diagonal_(0), []
    for place in wrong.flatten().argsort(descending=True, stable=True)[:n_pairs].tolist():
        i, j = divmod(place, len(class_names))
        if wrong[i, j] == 0:
            break
        taken = f"{class_names[i]}, taken for {class_names[j]}"
        rows = ((truth == i) & (predicted == j)).nonzero().flatten()[:n_examples]
        examples = [thumb(pixels, taken) for pixels in test_set.images[rows]] if test_set else []
        pairs.append({"text": f"{taken}: {int(wrong[i, j])} of {int(matrix[i].sum())}", "examples": examples})
    return pairs


def neighbours(encoded, image_sets, split, seed, n_queries=10, n_neighbours=8):
    """Return a dict for each of ten images: query, its class name, and near, the training images that are nearest by cosine."""
    queries, others = encoded[split]["embeddings"], encoded["train"]["embeddings"]
    query_set, train_set = image_sets[split], image_sets["train"]
    chosen = balanced_subset(query_set.labels, len(queries), min(n_queries, len(queries)), generator(seed, "report"))
    cosine = F.normalize(queries[chosen], dim=1) @ F.normalize(others, dim=1).T  # (n_queries, N)
    if split == "train":
        cosine[torch.arange(len(chosen)), chosen] = -2  # an image is no neighbour of itself
    lines = []
    for query, nearest in zip(chosen, cosine.topk(min(n_neighbours, len(others) - (split == "train"))).indices, strict=True):
        truth, near = name_of(query_set, query), []
        for pixels, name in zip(train_set.images[nearest], [name_of(train_set, i) for i in nearest], strict=True):
            mark = "" if truth is None else "right" if name == truth else "wrong"
            near.append(thumb(pixels, f"neighbour: {name or 'no label'}", mark))
        (pixels,) = query_set.images[query[None]]
        lines.append({"query": thumb(pixels, truth or "no label"), "name": truth or "", "near": near})
    return lines


def name_of(image_set, i):
    """Return the class name of image i, None if the images have no labels."""
    return None if image_set.labels is None else image_set.class_names[image_set.labels[i]]
