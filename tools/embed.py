"""The embeddings of any folder of images, what the probe of the run predicts, and copies."""

import importlib.util
from pathlib import Path

import numpy as np
import torch

import emp_ssl
from data import Images, read_images
from experiment import load_if_key
from hparams import SETTINGS
from images.copies import copies_text, find_copies
from images.folders import find_images, locations, log_left_out
from infra import files
from infra.console import log
from infra.distributed import on_main_process, process_group
from infra.errors import RunError, UsageError
from tools.lists import to_label, write_csv
from tools.probe import probe_predictions
from tools.report.collection import names_of


def add_embed(commands):
    """Add the command embed."""
    parser = commands.add_parser(
        "embed",
        help="the embeddings of any folder of images",
        description="Encode all images below a folder, by the views of the run, and write their "
        "embeddings and paths into an .npz file. Beside it: a list with what the linear probe "
        "predicts and which are copies of images of the run, and one of images to label.",
    )
    parser.add_argument("--exp_dir", required=True, type=files.user_path, help="the run folder")
    parser.add_argument(
        "--images",
        required=True,
        type=files.user_path,
        metavar="FOLDER",
        help="folder of images, any tree",
    )
    parser.add_argument(
        "--out",
        required=True,
        type=files.user_path,
        metavar="FILE.npz",
        help="embeddings (N, d) and paths (N,)",
    )
    parser.add_argument("--device", default="auto", help=SETTINGS["device"].help)
    parser.set_defaults(command=embed_command)


def embed_command(args):
    """Write the embeddings of all images that can be read, their paths, and lists of them.

    Embeddings are float32 (N, d), paths (N,) relative to the folder. The columns `predicted`,
    `confidence` and `copy_of`, (N,) each, are left out where the run does not have them.
    """
    table = args.out.with_suffix(".csv")
    if args.out.suffix != ".npz" or not args.out.parent.is_dir():
        raise UsageError(f"out {args.out} must be a file NAME.npz in a folder that exists")
    if table.exists() and not args.out.exists():
        raise UsageError(f"out {args.out}: {table} would be overwritten: give another name")
    if not args.images.is_dir():
        raise UsageError(f"images {args.images} is not a folder")
    log_left_out(args.images)
    paths = find_images(args.images)
    embedder = emp_ssl.load(args.exp_dir, args.device)
    run = embedder.run
    with process_group(run.device):
        images, readable = read_images(paths, args.images, run.hp.decoding)
        embeddings = embedder.embed_images(images)
        columns = {**predictions(run, embeddings), **copies_of(run, images, embeddings)}
    paths = [paths[i] for i in readable]
    names = np.array([str(path.relative_to(args.images)) for path in paths])
    write_npz(args.out, embeddings=embeddings.numpy(), paths=names, **columns)
    shape = tuple(embeddings.shape)
    log.info(f"* Wrote {args.out}: embeddings {shape}, paths {names.shape}, device: {run.device}")
    if columns:
        write_csv(table, ["path", *columns], zip(names, *columns.values(), strict=True))
        log.info(f"* Wrote {table}: path, {', '.join(columns)}")
    if "confidence" in columns:
        list_to_label(table, run, paths, embeddings, {"path": names, **columns})


def predictions(run, embeddings):
    """Return {"predicted": class names, "confidence": their softmax} by the probe of the run.

    {} if it has none of its settings.
    """
    probe = load_if_key(run.probe, run.key("probe"))
    if probe is None:
        return {}
    confidence, label = probe_predictions(probe, embeddings)
    return {
        "predicted": np.array(probe["class_names"])[label.numpy()],
        "confidence": confidence.numpy(),
    }


def copies_of(run, images, embeddings):
    """Return {"copy_of": the path of the run's training image that each is a copy of, or ""}.

    {} if the images of the run are gone or others now.
    """
    try:
        train = load_if_key(run.artifacts["train"], run.key("train"))
        if train is None:
            raise RunError(f"{run.dir} is not finished, or was edited since: resume it first")
        others = Images(run.hp, run.fingerprints)["train"].images
    except (RunError, UsageError) as error:
        log.info(f"* Not searched for copies of images of the run: {error}")
        return {}
    found = find_copies(images, others, embeddings, train["embeddings"], run.device)
    log.info(f"* {copies_text(found, 'embedded')}")
    names = names_of("train", train)
    copies = [""] * len(embeddings)
    for i, j in found["pairs"].tolist():
        copies[i] = names[j]
    return {"copy_of": np.array(copies)}


def list_to_label(table, run, paths, embeddings, columns):
    """Write NAME_to_label.csv beside a table: the images without a label that need it most."""
    known = labelled_places(run)
    rows = [i for i, place in enumerate(locations(paths)) if place not in known]
    if not rows or importlib.util.find_spec("sklearn") is None:
        why = "it needs scikit-learn: pip install scikit-learn" if rows else "each has a label"
        log.info(f"* No list of images to label: {why}")
        return
    path = table.with_name(f"{table.stem}_to_label.csv")
    chosen, clusters = to_label(embeddings[rows], torch.from_numpy(columns["confidence"][rows]))
    chosen = [rows[i] for i in chosen.tolist()]
    header = ["path", "predicted", "confidence"]
    lines = zip(*(columns[name][chosen] for name in header), clusters.tolist(), strict=True)
    write_csv(path, [*header, "cluster"], lines)
    log.info(f"* Wrote {path}: {len(chosen)} images whose label would help most")


def labelled_places(run):
    """Return the locations of the images of the run that have a label."""
    paths = []
    for split in run.splits:
        content = load_if_key(run.artifacts[split], run.key(split)) or {}
        rows = zip(content.get("paths", []), content.get("labels", []), strict=False)
        paths += [Path(run.hp.data_dir, path) for path, label in rows if label >= 0]
    return set(locations(paths))


@on_main_process
def write_npz(path, **arrays):
    """Write NumPy arrays by name, atomically."""
    with files.atomic_write(path) as file:
        np.savez(file, **arrays)
