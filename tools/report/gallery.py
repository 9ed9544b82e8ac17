"""Pictures of images for a report: rows of a Collection become thumbnails with paths and links."""

import base64
import io
import math
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image

from data import balanced_subset
from images.copies import copies_text
from infra import files
from infra.device import generator

SPRITE = 64  # pixels of an image in the sprite sheet
COLUMNS = 40  # of the sprite sheet


class Picture(NamedTuple):
    """An <img> of the page, or an empty box if src is ""."""

    src: str  # a data: URI
    alt: str
    mark: str = ""  # right, wrong or nothing: the colour of its border
    note: str = ""  # a line below it
    href: str = ""  # the original


def data_uri(content, kind):
    """Return bytes as a data: URI of an image. kind: png, jpeg or svg+xml."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def image_uri(image, kind, **options):
    """Return a PIL image as a data: URI. kind: png or jpeg."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return data_uri(out.getvalue(), kind)


def to_pil(pixels):
    """Return uint8 (3, H, W) as a PIL image."""
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())  # (3, H, W) -> (H, W, 3)


def thumb(collection, row, text="", mark="", note=""):
    """Return the small Picture of an image. text: what is said of it before its path."""
    title = collection.title_of(row)
    alt = f"{text}: {title}" if text else title
    pixels = collection.pixels(row)
    if pixels is None:
        return Picture("", alt, mark, note)
    image = to_pil(pixels)
    image.thumbnail((64, 64))
    return Picture(image_uri(image, "png"), alt, mark, note, collection.link(row))


def sprite_sheet(collection, rows):
    """Return small images of these rows side by side, COLUMNS in a line: a data: URI."""
    n_lines = -(-len(rows) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * SPRITE, n_lines * SPRITE), "white")
    for i, row in enumerate(rows):
        pixels = collection.pixels(row)
        if pixels is not None:
            line, column = divmod(i, COLUMNS)
            image = to_pil(pixels).resize((SPRITE, SPRITE))
            sheet.paste(image, (column * SPRITE, line * SPRITE))
    return image_uri(sheet, "jpeg", quality=80)


def write_page(out, template, context):
    """Write a page by a jinja2 template, a path in tools/, atomically."""
    import jinja2  # comes with torch

    folder = jinja2.FileSystemLoader(Path(__file__).parents[1])
    environment = jinja2.Environment(loader=folder, autoescape=True)
    text = environment.get_template(template).render(context)
    with files.atomic_write(out) as file:
        file.write(text.encode(errors="replace"))


def confused_pairs(matrix, truth, predicted, class_names, n_pairs=8):
    """Return (text, indices of the images) for each of the pairs of classes confused most.

    matrix: the confusion matrix (C, C). truth, predicted: int64 (M,).
    """
    wrong = matrix.clone().fill_diagonal_(0)
    pairs = []
    for cell in wrong.flatten().argsort(descending=True, stable=True)[:n_pairs].tolist():
        i, j = divmod(cell, len(class_names))
        if wrong[i, j] == 0:
            break
        index = ((truth == i) & (predicted == j)).nonzero().flatten()
        counts = f"{int(wrong[i, j])} of {int(matrix[i].sum())}"
        pairs.append((f"{class_names[i]}, taken for {class_names[j]}: {counts}", index))
    return pairs


def neighbours(collection, split, seed, n_queries=10, n_neighbours=8):
    """Return a dict for each of ten images of a split: query, name and neighbours.

    query: its Picture. name: that of its class, or its path. neighbours: Pictures of the training
    images that are nearest by cosine.
    """
    rows = collection.rows_of(split)
    rng = generator(seed, "report")
    queries = rows[balanced_subset(collection.labels[rows], len(rows), n_queries, rng)]
    x = collection.embeddings
    n_train = collection.splits.count("train")
    cosine = F.normalize(x[queries], dim=1) @ F.normalize(x[:n_train], dim=1).T  # (n_queries, N)
    if split == "train":
        cosine[torch.arange(len(queries)), queries] = -2  # an image is no neighbour of itself
    top = cosine.topk(min(n_neighbours, n_train - (split == "train")))
    lines = []
    for query, cosines, nearest in zip(queries.tolist(), top.values, top.indices, strict=True):
        name = collection.label_of(query)
        pictures = [
            neighbour_thumb(collection, row, value, name)
            for row, value in zip(nearest.tolist(), cosines.tolist(), strict=True)
        ]
        name = name or collection.names[query]
        lines.append({"query": thumb(collection, query), "name": name, "neighbours": pictures})
    return lines


def neighbour_thumb(collection, row, cosine, query_name):
    """Return the Picture of a training image, marked by whether it is of the query's class."""
    name = collection.label_of(row)
    mark = ""
    note = f"{cosine:.2f}"
    if query_name and name:
        mark = "right" if name == query_name else "wrong"
        note = f"{'✓' if name == query_name else '✗'} {note}"
    return thumb(collection, row, "neighbour", mark, note)


def leaks(copies, collection, n):
    """Return what a report shows of the test images that are copies of training images.

    copies: what find_copies returned. A dict: text, and the first n pairs of Pictures.
    """
    first = int(collection.rows_of("test")[0])
    pairs = copies["pairs"][:n].tolist()
    return {
        "text": copies_text(copies),
        "pairs": [examples(collection, (first + test, train), 2) for test, train in pairs],
    }


def examples(collection, rows, n):
    """Return the names of rows as titles, and the Pictures of the first n as examples: a dict."""
    return {
        "titles": [collection.names[row] for row in rows],
        "examples": [thumb(collection, row) for row in rows[:n]],
    }


def some_of_each_kind(groups, n):
    """Return the first groups of each kind, about n in all: links would hide the similar images.

    groups: lists of (row, group, kind), the closest kind first.
    """
    by_kind = {}
    for group in groups:
        *_, kind = group[0]
        by_kind.setdefault(kind, []).append(group)
    n_of_kind = math.ceil(n / max(1, len(by_kind)))
    return [group for some in by_kind.values() for group in some[:n_of_kind]]


def overview(found, collection, n):
    """Return what a report shows of what explore found: at most n images of each thing."""
    clusters = []
    for _, members in groupby(found["clusters"], key=itemgetter(1)):
        rows = [row for row, *_ in members]
        clusters.append({"n": len(rows), **examples(collection, rows, n)})
    groups = []
    duplicates = groupby(found.get("duplicates", ()), key=itemgetter(1))
    for group in some_of_each_kind([list(members) for _, members in duplicates], n):
        rows, _, kinds = zip(*group, strict=True)
        text = " and ".join(dict.fromkeys(kinds))
        groups.append({"kinds": text, **examples(collection, rows, n)})
    lonely = [
        thumb(collection, row, note=f"{cosine:.2f}") for row, cosine in found.get("lonely", ())[:n]
    ]
    doubtful = [
        thumb(collection, row, f"taken for {predicted}", note=f"{confidence:.2f}")
        for row, _, predicted, confidence, _ in found.get("doubtful", ())[:n]
    ]
    return {"clusters": clusters, "groups": groups, "lonely": lonely, "doubtful": doubtful}
