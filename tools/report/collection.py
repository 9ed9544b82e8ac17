"""All images of a run by the rows of its artifacts, and their pixels if they are still there."""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import torch

from data import Images
from images import cache
from images.copies import digests_of
from infra.errors import RunError, UsageError


@dataclass
class Collection:
    """The images of a run: first the training images, then the test images.

    collection[rows], int64 (n,), are the pixels of images that are there: uint8 (n, 3, H, W).
    `find_pictures` sets images and places.
    """

    embeddings: torch.Tensor  # float32 (N, d)
    labels: torch.Tensor  # int64 (N,), -1 without a label
    class_names: list
    names: list  # paths in the data folder, or numbers in the data set
    splits: list  # of each image: train or test
    folder: Path | None  # the data folder, if the names are paths
    page: str = ""  # the folder of the page that shows them
    images: dict = field(default_factory=dict)  # of each split: uint8 (n, 3, H, W) or an ImageFile
    # int64 (N,): where an image is among those of its split; -1 if it is gone
    places: torch.Tensor | None = None

    def __getitem__(self, rows):
        return torch.stack([self.pixels(row) for row in rows.tolist()])

    def pixels(self, row):
        """Return an image, uint8 (3, H, W), None if it is gone."""
        place = self.places[row, None]
        return None if place < 0 else self.images[self.splits[row]][place][0]

    def rows_of(self, split):
        """Return the rows of a split, int64."""
        rows = [row for row, name in enumerate(self.splits) if name == split]
        return torch.tensor(rows, dtype=torch.int64)

    def digests(self):
        """Return {row: checksum of the pixels} of the images that are there."""
        digests = {split: digests_of(images) for split, images in self.images.items()}
        rows = (self.places >= 0).nonzero().flatten().tolist()
        return {row: digests[self.splits[row]][self.places[row]] for row in rows}

    def label_of(self, row):
        """Return the name of the class, "" without a label."""
        label = int(self.labels[row])
        return self.class_names[label] if label >= 0 else ""

    def title_of(self, row):
        """Return the name of an image, and that of its class if there is one."""
        return ", ".join(filter(None, (self.names[row], self.label_of(row))))

    def path_of(self, row):
        """Return the path of the file, None if there is none."""
        return self.folder and self.folder / self.names[row]

    def link(self, row):
        """Return the URL of the original, relative to the page; "" without a file."""
        if self.folder is None or self.places[row] < 0:
            return ""
        return quote(os.fsencode(os.path.relpath(self.path_of(row), self.page)))


def collection_of(run, encoded, page=""):
    """Return the Collection of {split: content of its artifact}, without pictures.

    The embeddings are taken out of the contents, so that they are not kept twice.
    """
    embeddings, labels, names, splits = [], [], [], []
    for split, content in encoded.items():
        embeddings.append(content.pop("embeddings"))
        n = len(embeddings[-1])
        labels.append(content.get("labels", torch.full((n,), -1)))
        numbers = content.get("indices", torch.arange(n)).tolist()
        names += content.get("paths", [f"{split} image {number}" for number in numbers])
        splits += n * [split]
    folder = Path(run.hp.data_dir) if "paths" in encoded["train"] else None
    class_names = run.fingerprints["class_names"]
    return Collection(
        torch.cat(embeddings), torch.cat(labels), class_names, names, splits, folder, page
    )


def find_pictures(collection, run):
    """Set images and places of a Collection; return why some are missing, or "".

    If the images have changed since the run, they are found by their paths.
    """
    n = len(collection.names)
    sizes = Counter(collection.splits)
    try:
        sets = Images(run.hp, run.fingerprints)
        collection.images = {split: sets[split].images for split in sizes}
        collection.places = torch.cat([torch.arange(size) for size in sizes.values()])
        return ""
    except (RunError, UsageError) as error:
        missing = f"no pictures of images: {error}"
    folder = collection.folder
    paths = [folder / name for name in collection.names] if folder else []
    found = cache.decode(paths, folder, run.hp.decoding)
    readable = found["readable"]
    collection.images = dict.fromkeys(sizes, found["images"])
    collection.places = torch.full((n,), -1)
    collection.places[readable] = torch.arange(len(readable))
    if len(readable):
        missing = (
            f"the images in {folder} have changed since the run: {n - len(readable):,} of its "
            f"{n:,} are gone; the others are found by their paths, as they are today"
        )
    return missing
