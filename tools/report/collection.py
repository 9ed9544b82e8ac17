"""All images of a run by the rows of its artifacts, and their pixels if they are still there."""

import os
from dataclasses import dataclass
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
    """

    embeddings: torch.Tensor  # float32 (N, d)
    labels: torch.Tensor  # int64 (N,), -1 without a label
    class_names: list
    names: list  # paths in the data folder, or numbers in the data set
    splits: list  # of each image: train or test
    images: dict  # of each split: uint8 (n, 3, H, W) or an ImageFile
    places: torch.Tensor  # int64 (N,): where an image is among those of its split; -1 if it is gone
    folder: Path | None  # the data folder, if the names are paths
    page: str  # the folder of the page

    def __getitem__(self, rows):
        return torch.stack([self.pixels(row) for row in rows.tolist()])

    def pixels(self, row):
        """Return an image, uint8 (3, H, W), None if it is gone."""
        place = self.places[row, None]
        return None if place < 0 else self.images[self.splits[row]][place][0]

    def rows_of(self, split):
        """Return the rows of a split, int64: they follow each other."""
        first = self.splits.index(split) if split in self.splits else 0
        return torch.arange(first, first + self.splits.count(split))

    def digests(self):
        """Return {row: checksum} of the images that are there."""
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

    def link(self, row):
        """Return the URL of the original, relative to the page if it can be; "" without a file."""
        if self.folder is None or self.places[row] < 0:
            return ""
        path = os.path.abspath(self.folder / self.names[row])
        try:
            relative = os.path.relpath(path, self.page)
        except ValueError:  # Windows: on another drive
            return Path(path).as_uri()
        return quote(os.fsencode(relative.replace(os.sep, "/")))


def collection_of(run, encoded, page):
    """Return (the Collection of what the artifacts hold, why pictures are missing or "").

    encoded: {split: content of its artifact}. page: the folder of the page.
    """
    sizes = {split: len(content["embeddings"]) for split, content in encoded.items()}
    unlabelled = {split: torch.full((n,), -1) for split, n in sizes.items()}
    names = [name for split in encoded for name in names_of(split, encoded[split])]
    folder = Path(run.hp.data_dir) if "paths" in encoded["train"] else None
    images, places, missing = find_images_of(run, sizes, folder, names)
    collection = Collection(
        torch.cat([content["embeddings"] for content in encoded.values()]),
        torch.cat([encoded[split].get("labels", unlabelled[split]) for split in encoded]),
        run.fingerprints["class_names"],
        names,
        [split for split, n in sizes.items() for _ in range(n)],
        images,
        places,
        folder,
        page,
    )
    return collection, missing


def names_of(split, content):
    """Return what the rows of an artifact are: paths, or numbers in the data set."""
    if "paths" in content:
        return content["paths"]
    numbers = content.get("indices", torch.arange(len(content["embeddings"])))
    return [f"{split} image {number}" for number in numbers.tolist()]


def find_images_of(run, sizes, folder, names):
    """Return (images, places, why some are missing or ""); for the first two see Collection.

    If the images have changed since the run, they are found by their paths. sizes: {split: images}.
    """
    try:
        sets = Images(run.hp, run.fingerprints)
        images = {split: sets[split].images for split in sizes}
        return images, torch.cat([torch.arange(n) for n in sizes.values()]), ""
    except (RunError, UsageError) as error:
        missing = f"no pictures of images: {error}"
    paths = [folder / name for name in names] if folder else []
    found = cache.decode(paths, folder, run.hp.decoding)
    readable = found["readable"]
    places = torch.full((len(names),), -1)
    places[readable] = torch.arange(len(readable))
    if len(readable):
        missing = (
            f"the images in {folder} have changed since the run: {len(names) - len(readable):,} of "
            f"its {len(names):,} are gone; the others are shown by their paths, as they are today"
        )
    return dict.fromkeys(sizes, found["images"]), places, missing
