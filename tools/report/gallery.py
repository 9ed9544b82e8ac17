"""Pictures of images for a report: rows of a Collection become thumbnails with paths and links."""

import base64
import io
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image

from data import balanced_subset
from images.copies import copies_text
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
    out = io.BytesIO()
    image.save(out, "PNG")
    return Picture(data_uri(out.getvalue(), "png"), alt, mark, note, collection.link(row))


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
    out = io.BytesIO()
    sheet.save(out, "JPEG", quality=80)
    return data_uri(out.getvalue(), "jpeg")


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
    first = collection.rows_of("test")[0]
    pairs = []
    for test, train in copies["pairs"][:n].tolist():
        rows = (int(first) + test, train)
        titles = [collection.names[row] for row in rows]
        pairs.append({"titles": titles, "examples": [thumb(collection, row) for row in rows]})
    return {"text": copies_text(copies), "pairs": pairs}


def overview(found, collection, n):
    """Return what a report shows of what explore found: at most n images of each thing."""

    def thumbs(rows):
        return [thumb(collection, row) for row in rows[:n]]

    groups = []
    for group in found.get("duplicates", ())[:n]:
        kinds, rows = zip(*group, strict=True)
        titles = [collection.names[row] for row in rows]
        text = " and ".join(dict.fromkeys(kinds))
        groups.append({"kinds": text, "titles": titles, "examples": thumbs(rows)})
    return {
        "clusters": [{"n": len(rows), "examples": thumbs(rows)} for rows, _ in found["clusters"]],
        "groups": groups,
        "lonely": [
            thumb(collection, row, note=f"{cosine:.2f}")
            for cosine, row in found.get("lonely", ())[:n]
        ],
        "doubtful": [
            thumb(
                collection, row, f"taken for {collection.class_names[predicted]}", note=f"{p:.2f}"
            )
            for p, row, predicted in found.get("doubtful", ())[:n]
        ],
    }
