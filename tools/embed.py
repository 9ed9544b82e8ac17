"""The embeddings of any folder of images, what the probe of the run predicts, and copies."""

import importlib.util

import numpy as np
import torch
import torch.nn.functional as F

import emp_ssl
from data import rank_in_class, read_images
from experiment import load_if_key
from hparams import SETTINGS
from images.cache import subset
from images.copies import copies_text, find_copies
from images.folders import find_images, locations, log_left_out
from infra import files
from infra.console import log
from infra.distributed import on_main_process, process_group
from infra.errors import UsageError
from tools.probe import probe_predictions, stored_embeddings
from tools.report.collection import collection_of, find_pictures


def add_embed(commands):
    """Add the command embed."""
    parser = commands.add_parser(
        "embed",
        help="the embeddings of any folder of images",
        description="Encode all images below a folder, by the views of the run, and write their "
        "embeddings and paths into an .npz file. Beside it: a list with what the linear probe "
        "predicts and which are copies of images of the run, and one of images to label.",
    )
    add, path = parser.add_argument, files.user_path
    add("--exp_dir", required=True, type=path, help="the run folder")
    images = "folder of images, any tree"
    add("--images", required=True, type=path, metavar="FOLDER", help=images)
    out = "embeddings (N, d) and paths (N,)"
    add("--out", required=True, type=path, metavar="FILE.npz", help=out)
    add("--device", default="auto", help=SETTINGS["device"].help)
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
        known = collection_with_pictures(run)
        columns = predictions(run, embeddings)
        if known:
            columns |= copies_of(known, images, embeddings, run.device)
    paths = [paths[i] for i in readable]
    names = np.array([str(path.relative_to(args.images)) for path in paths])
    write_npz(args.out, embeddings=embeddings.numpy(), paths=names, **columns)
    shape = tuple(embeddings.shape)
    log.info(f"* Wrote {args.out}: embeddings {shape}, paths {names.shape}, device: {run.device}")
    if columns:
        files.write_csv(table, ["path", *columns], zip(names, *columns.values(), strict=True))
        log.info(f"* Wrote {table}: path, {', '.join(columns)}")
    if known and "confidence" in columns:
        list_to_label(table, known, paths, embeddings, {"path": names, **columns})


def collection_with_pictures(run):
    """Return the Collection of a run, None if it is not finished; print what is missing."""
    try:
        collection = collection_of(run, stored_embeddings(run))
    except UsageError as error:
        log.info(f"* Not compared with the images of the run: {error}")
        return None
    missing = find_pictures(collection, run)
    if missing:
        log.info(f"* Search for copies of images of the run: {missing}")
    return collection


def predictions(run, embeddings):
    """Return {"predicted": class names, "confidence": their softmax} by the probe of the run.

    {} if it has none of its settings.
    """
    probe = load_if_key(run.probe, run.key("probe"))
    if probe is None:
        return {}
    confidence, label = probe_predictions(probe, embeddings)
    predicted = np.array(probe["class_names"])[label.numpy()]
    return {"predicted": predicted, "confidence": confidence.numpy()}


def copies_of(known, images, embeddings, device):
    """Return {"copy_of": the path of the run's training image that each is a copy of, or ""}.

    {} if none of the training images is there. known: the Collection of the run.
    """
    rows = known.rows_of("train")
    rows = rows[known.places[rows] >= 0]
    if not len(rows):
        return {}
    others = subset(known.images["train"], known.places[rows])
    found = find_copies(images, others, embeddings, known.embeddings[rows], device)
    log.info(f"* {copies_text(found, 'embedded')}")
    copies = [""] * len(embeddings)
    for i, j in found["pairs"].tolist():
        copies[i] = known.names[rows[j]]
    return {"copy_of": np.array(copies)}


def list_to_label(table, known, paths, embeddings, columns):
    """Write NAME_to_label.csv beside a table: the images without a label that need it most.

    known: the Collection of the run.
    """
    labelled = (known.labels >= 0).nonzero().flatten().tolist() if known.folder else []
    labelled = set(locations(map(known.path_of, labelled)))
    rows = [i for i, place in enumerate(locations(paths)) if place not in labelled]
    if not rows or importlib.util.find_spec("sklearn") is None:
        why = "it needs scikit-learn: pip install scikit-learn" if rows else "each has a label"
        log.info(f"* No list of images to label: {why}")
        return
    path = table.with_name(f"{table.stem}_to_label.csv")
    chosen, clusters = to_label(embeddings[rows], torch.from_numpy(columns["confidence"][rows]))
    chosen = [rows[i] for i in chosen.tolist()]
    header = ["path", "predicted", "confidence"]
    lines = zip(*(columns[name][chosen] for name in header), clusters.tolist(), strict=True)
    files.write_csv(path, [*header, "cluster"], lines)
    log.info(f"* Wrote {path}: {len(chosen)} images whose label would help most")


def to_label(embeddings, confidence, n=100, n_clusters=20):
    """Return (rows, clusters) of the n images whose label would help most: int64 (n,) each.

    embeddings: (N, d). confidence: (N,), that of their predicted labels. The images are clustered
    by k-means; the least confident of each cluster is taken, then the second of each, and so on.
    """
    from sklearn.cluster import MiniBatchKMeans

    rows = confidence.argsort(stable=True)
    x = F.normalize(embeddings[rows] - embeddings.mean(0), dim=1)
    kmeans = MiniBatchKMeans(min(n_clusters, len(x)), n_init=3, random_state=0)
    clusters = torch.from_numpy(kmeans.fit_predict(x.numpy())).long()
    chosen = rank_in_class(clusters).argsort(stable=True)[:n]
    return rows[chosen], clusters[chosen]


@on_main_process
def write_npz(path, **arrays):
    """Write NumPy arrays by name, atomically."""
    with files.atomic_write(path) as file:
        np.savez(file, **arrays)
