"""Search: the images of a collection that are nearest to given ones."""

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image

import emp_ssl
from data import Images
from evaluate import nearest
from hparams import SETTINGS, Setting
from images.folders import find_images
from images.pixels import UnreadableImage, read_image
from infra import distributed, files
from infra.console import log
from infra.errors import UsageError
from tools.probe import stored_embeddings
from tools.report.gallery import data_uri

THUMB = 128  # pixels


class Collection(NamedTuple):
    """The images that are searched."""

    embeddings: torch.Tensor  # (N, d)
    names: list  # of each image: its path, or its split and index
    class_names: list  # "" for an image without a label
    files: list  # the path of each, [] if they are not files
    pixels: Callable | None = None  # row -> uint8 (3, H, W), if they are not files


def add_search(commands):
    """Add the command search."""
    parser = commands.add_parser(
        "search",
        help="the images that are nearest to a given one",
        description="Print the images of a run, or of a folder, that are nearest to each query: by "
        "the cosine of their embeddings, less the mean of the collection.",
    )
    add = parser.add_argument
    add("--exp_dir", required=True, type=files.user_path, help="the run folder")
    add("--query", required=True, nargs="+", type=files.user_path, metavar="IMAGE", help="images")
    add(
        "--images",
        type=files.user_path,
        metavar="FOLDER",
        help="folder of images to search, any tree (default: the images of the run)",
    )
    add(
        "--k",
        type=Setting("k", int, low=1).parse,
        default=10,
        metavar="INT",
        help="images for each query (default: 10)",
    )
    add("--out", type=files.user_path, metavar="FILE.html", help="a page that shows them")
    add("--device", default="auto", help=SETTINGS["device"].help)
    parser.set_defaults(command=search_command)


def search_command(args):
    """Print for each query the cosine, name and class of its nearest images; write the page."""
    if distributed.WORLD_SIZE > 1:
        raise UsageError("search runs in one process: start it without torchrun")
    if args.out and (args.out.suffix != ".html" or not args.out.parent.is_dir()):
        raise UsageError(f"out {args.out} must be a file NAME.html in a folder that exists")
    embedder = emp_ssl.load(args.exp_dir, args.device)
    queries, paths = embedder.embed(args.query)
    if args.images:
        collection = collection_of_folder(embedder, args.images)
    else:
        collection = collection_of_run(embedder.run)
    found = list(zip(paths, *nearest_centred(collection.embeddings, queries, args.k), strict=True))
    for path, cosines, rows in found:
        log.info(path)
        for cosine, row in zip(cosines, rows, strict=True):
            line = f"{cosine:6.2f} {collection.names[row]}  {collection.class_names[row]}"
            log.info(line.rstrip())
    if args.out:
        write_sheet(args.out, found, collection, embedder.run.hp.decoding)
        log.info(f"* Wrote {args.out}")


def nearest_centred(x, queries, k):
    """Return (cosines, rows) of the k rows of x (N, d) nearest to each query (n, d), as lists.

    The mean of x is taken from both first: else all cosines are near 1.
    """
    mean = x.mean(0)
    x, queries = (F.normalize(part - mean, dim=1) for part in (x, queries))
    cosines, rows = nearest(x, queries, k)
    return cosines.tolist(), rows.tolist()


def collection_of_run(run):
    """Return the Collection of all images of a run. Raises UsageError if it is not finished."""
    embeddings, names, class_names, places = [], [], [], []
    for split, content in stored_embeddings(run).items():
        n = len(content["embeddings"])
        embeddings.append(content["embeddings"])
        index = content.get("indices", torch.arange(n)).tolist()
        names += content.get("paths") or [f"{split} {i}" for i in index]
        labels = content["labels"].tolist() if "labels" in content else [-1] * n
        class_names += [run.fingerprints["class_names"][i] if i >= 0 else "" for i in labels]
        places += [(split, row) for row in range(n)]
    is_folder = run.hp.dataset == "folder"
    paths = [Path(run.hp.data_dir, name) for name in names] if is_folder else []
    images = Images(run.hp, run.fingerprints)  # read when first used
    pixels = None if is_folder else partial(pixels_at, images, places)
    return Collection(torch.cat(embeddings), names, class_names, paths, pixels)


def pixels_at(images, places, row):
    """Return the image of a row, uint8 (3, H, W). places: (split, index) of each row."""
    split, i = places[row]
    return images[split].images[i : i + 1][0]


def collection_of_folder(embedder, folder):
    """Return the Collection of all images below a folder."""
    if not folder.is_dir():
        raise UsageError(f"images {folder} is not a folder")
    embeddings, paths = embedder.embed(find_images(folder))
    names = [str(Path(path).relative_to(folder)) for path in paths]
    return Collection(embeddings, names, [""] * len(names), paths)


def write_sheet(out, found, collection, decoding):
    """Write the page: each query with its nearest images, which link to the files.

    found: (path, cosines, rows) of each query. decoding: how files become images.
    """
    import jinja2  # comes with torch

    decoding = decoding._replace(image_size=THUMB, fit="pad")
    queries = []
    for path, cosines, rows in found:
        hits = []
        for cosine, row in zip(cosines, rows, strict=True):
            file = collection.files[row] if collection.files else None
            src = thumb_of_file(file, decoding) if file else thumb_of(collection.pixels(row))
            text = {"name": collection.names[row], "class_name": collection.class_names[row]}
            hits.append({"cosine": f"{cosine:.2f}", "src": src, "link": link_to(file), **text})
        src = thumb_of_file(path, decoding)
        queries.append({"name": path, "src": src, "link": link_to(path), "hits": hits})
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    template = jinja2.Environment(loader=folder, autoescape=True).get_template("search.html")
    with files.atomic_write(out) as file:
        file.write(template.render(queries=queries).encode(errors="replace"))


def link_to(path):
    """Return the address of a file, "" if there is none."""
    return Path(path).resolve().as_uri() if path else ""


def thumb_of_file(path, decoding):
    """Return a small image of a file as a data: URI, "" if it can't be read any more."""
    try:
        return thumb_of(torch.from_numpy(read_image(path, *decoding)))
    except UnreadableImage:
        return ""


def thumb_of(pixels):
    """Return the data: URI of an image uint8 (3, H, W)."""
    out = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(out, "JPEG", quality=90)
    return data_uri(out.getvalue(), "jpeg")
