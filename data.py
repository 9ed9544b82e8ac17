"""Data sets as uint8 tensors: CIFAR-10 and CIFAR-100, folders of images, textures."""

import csv
import os
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision

import textures
from infra import image_cache
from infra.console import log
from infra.device import generator
from infra.distributed import main_process_first
from infra.errors import RunError, UsageError
from infra.files import checksum
from infra.image_cache import ImageFile, subset

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


class ImageSet(NamedTuple):
    """One split of a data set."""

    images: torch.Tensor  # uint8 (N, 3, H, W), or an ImageFile
    labels: torch.Tensor | None  # int64 (N,); None if the images have no classes
    class_names: list


def load_images(name, root, train, image_size=32, labels=None):
    """Return one split of a data set as an ImageSet, or None for the test split of a `folder` without one.

    name: a key of DATASETS. root: the folder with the files; cifar10 and cifar100 are downloaded into it once. image_size,
    the height and width in pixels, and labels, a CSV file (see read_labels), are for `folder` only.
    Raises UsageError if the data is not there or image_size does not fit, RunError if more than 1 image in 100 is unreadable.
    """
    if name not in DATASETS:
        raise UsageError(f"unknown dataset {name!r}: choose from {', '.join(DATASETS)}")
    if name == "folder":
        return load_folder(Path(root), train, image_size, labels)
    if image_size != 32:
        raise UsageError(f"image_size {image_size}: the images of {name} are 32 pixels wide; only folder is resized")
    if labels:
        raise UsageError(f"labels {labels}: {name} has its own; only the images of folder can be given others")
    return DATASETS[name](Path(root), train)


def load_textures(root, train):
    """Return 4,000 training or 1,000 test images of textures, always the same; root is not used."""
    return ImageSet(*textures.make_textures(4000 if train else 1000, generator(0, "textures", epoch=int(train))))


def load_cifar(root, train, name):
    """Return a split of CIFAR-10 or CIFAR-100. torchvision downloads it into `root` unless it is there."""
    dataset_class = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]

    def read():
        try:
            dataset = dataset_class(root, train=train, download=True)
        except (OSError, RuntimeError) as error:
            raise UsageError(
                f"{name} is not in {root} and can't be downloaded ({error}). Put {dataset_class.filename} "
                f"(md5 {dataset_class.tgz_md5}) into {root}, or work offline with --dataset textures or with images of "
                f"your own: --dataset folder --data_dir DIR"
            ) from error
        images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()  # (N, 32, 32, 3) -> (N, 3, 32, 32)
        return {"images": images, "labels": torch.tensor(dataset.targets), "class_names": list(dataset.classes)}

    folder = root / dataset_class.base_folder
    with main_process_first():
        first = None if folder.is_dir() else read()
        split = f"{name}-{'train' if train else 'test'}"
        try:
            content = image_cache.cached(split, folder, sorted(folder.iterdir()), lambda: first or read())
        except OSError as error:
            log.warning(f"the decoded images are not kept for the next time: {error}")
            content = first or read()
    return ImageSet(content["images"], content["labels"], content["class_names"])


def load_folder(root, train, image_size=32, labels=None):
    """Return the images below `root`: train/<class>/* and test/<class>/*, or any tree of images without labels.

    Without train/, all images below root are the training split. The class folders are the classes, unless `labels` is given
    (see read_labels). There are no labels if there are fewer than two class folders, or images beside them. Files that can't
    be read are left out, with a warning.
    """
    if not root.is_dir():
        raise UsageError(f"data_dir {root} is not a folder")
    has_splits = (root / "train").is_dir()
    train_root = root / "train" if has_splits else root
    folder = train_root if train else root / "test"
    if not train and not (has_splits and folder.is_dir()):
        return None

    paths = find_images(folder)
    if not paths:
        raise UsageError(f"no images in {folder} (looked for {' '.join(sorted(SUFFIXES))} in all its folders)")
    names = {path: path.relative_to(folder).parts[0] for path in paths}
    class_names = find_classes(train_root) if has_splits else []
    if labels:
        names, class_names = labels_from_file(labels, paths, root)
    unknown = sorted(set(names.values()) - set(class_names))
    if class_names and unknown:
        raise UsageError(f"{folder / unknown[0]} is not one of the {len(class_names)} class folders of {train_root}")

    images, readable = read_images(paths, folder, image_size)
    if not class_names:
        return ImageSet(images, None, [])
    return ImageSet(images, torch.tensor([class_names.index(names[path]) for path in paths])[readable], class_names)


# name: function of (root, train) that returns an ImageSet
DATASETS = {
    "cifar10": partial(load_cifar, name="cifar10"),
    "cifar100": partial(load_cifar, name="cifar100"),
    "folder": load_folder,
    "textures": load_textures,
}


def find_images(folder):
    """Return the paths of all images below the folder, sorted. Links to folders are not followed.

    Raises UsageError if one of its folders can't be read.
    """

    def fail(error):
        raise UsageError(f"{error.filename} can't be read: {error.strerror}")

    walk = ((Path(directory), names) for directory, _, names in os.walk(folder, onerror=fail))
    return sorted(directory / name for directory, names in walk for name in names if Path(name).suffix.lower() in SUFFIXES)


def find_classes(folder):
    """Return the names of the folders that hold images, sorted; [] if they are fewer than two or images lie beside them.

    Raises UsageError if a name is not UTF-8.
    """
    names = {path.relative_to(folder).parts[0] for path in find_images(folder)}
    for name in names:
        if not is_utf8(name):
            raise UsageError(f"the name of the class folder {folder / name} is not UTF-8: rename it")
    return sorted(names) if len(names) > 1 and all((folder / name).is_dir() for name in names) else []


def is_utf8(name):
    """Whether a name of a file is UTF-8; Python keeps the bytes of others as surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def read_labels(file):
    """Return {path: label} of a CSV file with a line path,label for each image, where paths are relative to data_dir.

    A first line whose path is not that of an image is a header and skipped. Raises UsageError if the file can't be read, a line
    does not have two columns, or two lines contradict each other.
    """
    try:
        with open(file, newline="", encoding="utf-8-sig") as lines:  # -sig: spreadsheets put a byte-order mark at the start
            rows = [row for row in csv.reader(lines) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"labels {file} can't be read: {error}") from None
    labels = {}
    for number, row in enumerate(rows, 1):
        if len(row) != 2:
            raise UsageError(f"labels {file}: row {number} has {len(row)} columns, not path,label")
        path, label = os.path.normpath(row[0]), row[1]
        if number == 1 and Path(path).suffix.lower() not in SUFFIXES:
            continue
        if labels.setdefault(path, label) != label:
            raise UsageError(f"labels {file}: row {number} gives {path} the label {label!r}, an earlier one {labels[path]!r}")
    return labels


def labels_from_file(file, paths, root):
    """Return {path: class name} and the sorted class names. Raises UsageError if a path has no label or there is one class.

    Lines of images that do not exist are left out, with a warning.
    """
    labels = read_labels(file)
    missing = [path for path in paths if str(path.relative_to(root)) not in labels]
    if missing:
        raise UsageError(f"labels {file}: {missing[0]} and {len(missing) - 1} more have no label")
    surplus = [path for path in labels if not (root / path).is_file()]
    if surplus:
        log.warning(f"labels {file}: left out {len(surplus)} lines of images that are not in {root}, such as {surplus[0]}")
    class_names = sorted({labels[path] for path in labels.keys() - surplus})
    if len(class_names) < 2:
        raise UsageError(f"labels {file}: there are fewer than two labels")
    return {path: labels[str(path.relative_to(root))] for path in paths}, class_names


def read_images(paths, folder, image_size):
    """Return (images, readable): uint8 (M, 3, image_size, image_size), and the M indices into paths of the readable files.

    The others are named in a warning. Raises RunError if they are more than 1 in 100.
    """
    decode = partial(image_cache.decode_once, folder=folder) if len(paths) >= image_cache.MANY else image_cache.decode_in_memory
    content = decode(paths, image_size=image_size)
    bad = content["failures"]
    if len(bad) > len(paths) / 100:
        raise RunError(f"{len(bad)} of {len(paths)} images in {folder} can't be read, more than 1 in 100: {', '.join(bad[:5])}")
    if bad:
        log.warning(f"left out {len(bad)} of {len(paths)} images that can't be read: {', '.join(bad)}")
    return content["images"], content["readable"]


def balanced_subset(labels, n_images, n, generator):
    """Return the sorted indices of n random images out of n_images, as equally many of each class as possible.

    labels: int64 (n_images,) or None. Raises UsageError if n is greater than n_images.
    """
    if n > n_images:
        raise UsageError(f"n_images {n} is more than the {n_images} training images")
    order = torch.randperm(n_images, generator=generator)
    if labels is not None:
        shuffled = labels[order]
        rank = torch.empty_like(order)  # of each image among those of its class
        for label in shuffled.unique():
            members = shuffled == label
            rank[members] = torch.arange(int(members.sum()))
        order = order[rank.argsort(stable=True)]
    return order[:n].sort().values


class Images:
    """The images of a run: images["train"] and images["test"], an ImageSet or None. They are read when first used.

    hp: the Hparams of the run. expected: the fingerprints of the images that the run was trained on, or None. Reading raises
    UsageError if the images have other fingerprints, and the errors of load_images.
    """

    def __init__(self, hp, expected=None):
        self.hp, self.expected = hp, expected

    def __getitem__(self, split):
        return self.loaded[0][split]

    @property
    def fingerprints(self):
        """What a checkpoint keeps of the data: a checksum of each split (None if there is none) and the class names."""
        return self.loaded[1]

    @cached_property
    def loaded(self):
        hp = self.hp
        log.info(f"* Loading {hp.dataset}")
        train_set, test_set = load_splits(hp)
        class_names, n_test = train_set.class_names, len(test_set.images) if test_set else 0
        found = {"train": fingerprint(train_set), "test": test_set and fingerprint(test_set), "class_names": class_names}
        if self.expected not in (None, found):
            raise UsageError(f"the images of {hp.dataset} in {hp.data_dir} are not those that this run was trained on (or "
                             f"another version of Pillow decodes them otherwise, or its checkpoints are another run's): bring "
                             f"them back, or train under a new --exp_name")  # fmt: skip
        log.info(f"* Images: {len(train_set.images)} train, {n_test} test, {len(class_names)} classes")
        return {"train": train_set, "test": test_set}, found


def load_splits(hp):
    """Return the training and test ImageSet of a run. Raises UsageError if they do not fit its settings."""
    train_set, test_set = (load_images(hp.dataset, hp.data_dir, train, hp.image_size, hp.labels) for train in (True, False))
    if hp.n_images:
        train_set = subset_of(train_set, hp.n_images, generator(hp.seed, "subset"))
    if hp.n_epochs > 0 and len(train_set.images) < hp.bs:
        raise UsageError(f"bs {hp.bs} is more than the {len(train_set.images)} training images: lower bs")
    return train_set, test_set


def subset_of(image_set, n, generator):
    """Return a class-balanced random subset of n images of an ImageSet."""
    index = balanced_subset(image_set.labels, len(image_set.images), n, generator)
    labels = None if image_set.labels is None else image_set.labels[index]
    return image_set._replace(images=subset(image_set.images, index), labels=labels)


def fingerprint(image_set):
    """Return a checksum of the images and their labels."""
    images, labels, _ = image_set
    digests = images.digests if isinstance(images, ImageFile) else images  # reading a large file would take minutes
    return checksum(*(tensor for tensor in (digests, labels) if tensor is not None))


def why_no_probe(class_names, has_test):
    """Return why no accuracy can be measured, "" if it can."""
    if not class_names:
        return "the images have no labels (fewer than two train/<class> folders)"
    return "" if has_test else "there are no test images (no test/<class> folders)"
