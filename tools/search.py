"""Search: the images of a run or a folder that are nearest to given ones."""

from pathlib import Path
from typing import NamedTuple

from PIL import Image

import emp_ssl
from hparams import SETTINGS, Setting
from images.copies import centred, nearest_rows
from images.folders import find_images
from images.pixels import UnreadableImage, read_image
from infra import distributed, files
from infra.console import log
from infra.errors import UsageError
from tools.probe import stored_embeddings
from tools.report.collection import collection_of
from tools.report.gallery import image_uri, write_page


class Item(NamedTuple):
    """An image, as it is shown."""

    name: str  # its path, or its split and index
    class_name: str = ""
    file: str | Path | None = None  # None if it is no file


def add_search(commands):
    """Add the command search."""
    parser = commands.add_parser(
        "search",
        help="the images that are nearest to a given one",
        description="Print the images of a run, or of a folder, that are nearest to each query: by "
        "the cosine of their embeddings, less the mean of all that are searched.",
    )
    add, path = parser.add_argument, files.user_path
    k = Setting("k", int, low=1).parse
    add("--exp_dir", required=True, type=path, help="the run folder")
    add("--query", required=True, nargs="+", type=path, metavar="IMAGE", help="images")
    add("--images", type=path, metavar="FOLDER", help="what is searched (default: all of the run)")
    add("--k", type=k, default=10, metavar="INT", help="images for each query (default: 10)")
    add("--out", type=path, metavar="FILE.html", help="a page that shows them")
    add("--device", default="auto", help=SETTINGS["device"].help)
    parser.set_defaults(command=search_command)


def search_command(args):
    """Print for each query the cosine, name and class of its nearest images; write the page."""
    if distributed.WORLD_SIZE > 1:
        raise UsageError("search runs in one process: start it without torchrun")
    if args.out and (args.out.suffix != ".html" or not args.out.parent.is_dir()):
        raise UsageError(f"out {args.out} must be a file NAME.html in a folder that exists")
    if args.images and not args.images.is_dir():
        raise UsageError(f"images {args.images} is not a folder")
    embedder = emp_ssl.load(args.exp_dir, args.device)
    queries, paths = embedder.embed(args.query)
    if args.images:
        x, searched = embedder.embed(find_images(args.images))
        items = [Item(str(Path(path).relative_to(args.images)), file=path) for path in searched]
    else:
        x, items = images_of_run(embedder.run)
    mean = x.mean(0)
    cosines, rows = nearest_rows(centred(queries, mean), centred(x, mean), args.k)
    found = []
    for path, *nearest in zip(paths, cosines.tolist(), rows.tolist(), strict=True):
        log.info(path)
        hits = [(f"{cosine:.2f}", items[row]) for cosine, row in zip(*nearest, strict=True)]
        for cosine, item in hits:
            log.info(f"{cosine:>6} {item.name}  {item.class_name}".rstrip())
        found.append((Item(path, file=path), hits))
    if args.out:
        write_sheet(args.out, found, embedder.run.hp.decoding)
        log.info(f"* Wrote {args.out}")


def images_of_run(run):
    """Return (embeddings (N, d), N Items) of all images of a run.

    Raises UsageError if the run is not finished.
    """
    collection = collection_of(run, stored_embeddings(run))
    items = [
        Item(name, collection.label_of(row), collection.path_of(row))
        for row, name in enumerate(collection.names)
    ]
    return collection.embeddings, items


def write_sheet(out, found, decoding):
    """Write the page of all (query, hits), whose pictures link to the files."""
    decoding = decoding._replace(image_size=128, fit="pad")

    def thumb(item):
        """Return a small image of a file as a data: URI, "" if it can't be read any more."""
        try:
            pixels = read_image(item.file, *decoding)
        except UnreadableImage:
            return ""
        return image_uri(Image.fromarray(pixels.transpose(1, 2, 0)), "jpeg", quality=90)

    def link(item):
        return Path(item.file).resolve().as_uri()

    write_page(out, "search.html", {"found": found, "thumb": thumb, "link": link})
