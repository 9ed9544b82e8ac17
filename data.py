"""Data sets as uint8 tensors: CIFAR-10 and CIFAR-100, folders of images, textures."""

from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision

import textures
from folders import class_folders, find_images, labels_from_file, log_folder, split_folders
from infra import image_cache
from infra.console import log
from infra.device import generator
from infra.distributed import main_process_first
from infra.errors import RunError, UsageError
from infra.files import checksum
from infra.image_cache import ImageFile, subset


class ImageSet(NamedTuple):
    """One split of a data set."""

    images: torch.Tensor  # uint8 (N, 3, H, W), or an ImageFile
    labels: torch.Tensor | None  # int64 (N,); None if the images have no classes
    class_names: list


class Split(NamedTuple):
    """A split of a run, and what its rows are."""

    image_set: ImageSet
    rows: list | torch.Tensor | None  # folder: paths relative to data_dir; else indices in the data set, None if it is whole


def load_images(name, root, train, image_size=32, labels=None):
    """Return one split of a data set as an ImageSet, or None for the test split of a `folder` without one.

    name: a key of DATASETS. root: the folder with the files; cifar10 and cifar100 are downloaded into it once. image_size,
    the height and width in pixels, and labels, a CSV file (see read_labels), are for `folder` only.
    Raises UsageError if the data is not there or image_size does not fit, RunError if too many images are unreadable (see
    read_images).
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
    """Return the images below `root` as read_folder does, without their paths."""
    split = read_folder(root, train, image_size, labels)
    return split and split.image_set


def read_folder(root, train, image_size=32, labels=None):
    """Return the images below `root` as a Split: train/<class>/* and test/<class>/*, or any tree of images without labels.

    Without train/, all images below root are the training split. Without test/, val/ is the test split; without both it is
    None. The class folders are the classes, unless `labels` is given (see read_labels). There are no labels if there are fewer
    than two class folders, or images beside them. Files that can't be read are left out, with a warning.
    """
    train_root, test_root = split_folders(root)
    folder = train_root if train else test_root
    if folder is None:
        return None
    paths = find_images(folder)
    names = {path: path.relative_to(folder).parts[0] for path in paths}
    class_names = [] if train_root == root else class_folders(paths if train else find_images(train_root), train_root)
    if labels:
        names, class_names = labels_from_file(labels, paths, root)
    unknown = sorted(set(names.values()) - set(class_names))
    if class_names and unknown:
        raise UsageError(f"{folder / unknown[0]} is not one of the {len(class_names)} class folders of {train_root}")

    images, readable = read_images(paths, folder, image_size)
    rows = [str(paths[i].relative_to(root)) for i in readable.tolist()]
    if not class_names:
        return Split(ImageSet(images, None, []), rows)
    labels = torch.tensor([class_names.index(names[path]) for path in paths])[readable]
    return Split(ImageSet(images, labels, class_names), rows)


# name: function of (root, train) that returns an ImageSet
DATASETS = {
    "cifar10": partial(load_cifar, name="cifar10"),
    "cifar100": partial(load_cifar, name="cifar100"),
    "folder": load_folder,
    "textures": load_textures,
}


def read_images(paths, folder, image_size):
    """Return (images, readable): uint8 (M, 3, image_size, image_size), and the M indices into paths of the readable files.

    The others are named in a warning. Raises RunError if they are more than one and more than 1 in 100, or half of all.
    """
    decode = partial(image_cache.decode_once, folder=folder) if len(paths) >= image_cache.MANY else image_cache.decode_in_memory
    content = decode(paths, image_size=image_size)
    bad = content["failures"]
    if len(bad) > max(1, len(paths) / 100) or 2 * len(bad) >= len(paths):
        raise RunError(f"{len(bad)} of {len(paths)} images in {folder} can't be read, too many to leave out (1, or 1 in 100): "
                       f"{', '.join(bad[:5])}")  # fmt: skip
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
        found = self.loaded[0][split]
        return found and found.image_set

    def rows(self, split):
        """Return what the rows of a split are: {"paths": a list of str, relative to data_dir} of a folder, else {"indices":
        int64 (N,), in the data set} of a part of it, {} of all."""
        rows = self.loaded[0][split].rows
        return {} if rows is None else {"paths" if isinstance(rows, list) else "indices": rows}

    @property
    def fingerprints(self):
        """What a checkpoint keeps of the data: a checksum of each split (None if there is none) and the class names."""
        return self.loaded[1]

    @cached_property
    def loaded(self):
        hp = self.hp
        log.info(f"* Loading {hp.dataset}")
        # Earlier versions took no other images in the place of test/: a run that they trained goes on without test images.
        stand_in = not self.expected or self.expected["test"] is not None
        splits = load_splits(hp, stand_in)
        train_set, test_set = (split and split.image_set for split in splits)
        class_names, n_test = train_set.class_names, len(test_set.images) if test_set else 0
        found = {"train": fingerprint(train_set), "test": test_set and fingerprint(test_set), "class_names": class_names}
        if self.expected not in (None, found):
            raise UsageError(f"the images of {hp.dataset} in {hp.data_dir} are not those that this run was trained on (or "
                             f"another version of Pillow decodes them otherwise, or its checkpoints are another run's): bring "
                             f"them back, or train under a new --exp_name")  # fmt: skip
        log.info(f"* Images: {len(train_set.images)} train, {n_test} test, {len(class_names)} classes")
        missing = why_no_probe(class_names, test_set)
        if missing:
            log.info(f"* There will be no linear probe: {missing}")
        return dict(zip(("train", "test"), splits, strict=True)), found


def load_splits(hp, stand_in=True):
    """Return the training and the test Split of a run. Raises UsageError if they do not fit its settings.

    stand_in: val/, or else a part of the labelled training images, stands in for a missing test split.
    """
    if hp.dataset == "folder":
        log_folder(Path(hp.data_dir), hp.labels)
    train, test = load_split(hp, True), load_split(hp, False)
    is_val = test is not None and hp.dataset == "folder" and not Path(hp.data_dir, "test").is_dir()
    if is_val and not stand_in:
        test = None
    elif is_val:
        log.info("* No test/ folder: val/ is the test split")
    elif stand_in and test is None and train.image_set.labels is not None:
        train, test = hold_out(train, generator(hp.seed, "held-out test"))
    if hp.n_images:
        labels, n = train.image_set.labels, len(train.image_set.images)
        train = select(train, balanced_subset(labels, n, hp.n_images, generator(hp.seed, "subset")))
    n = len(train.image_set.images)
    if hp.n_epochs > 0 and n < hp.bs:
        raise UsageError(f"bs {hp.bs} is more than the {n} training images: lower bs")
    return train, test


def load_split(hp, train):
    """Return the training or the test Split of a run, None for a test split that is not there."""
    if hp.dataset == "folder":
        return read_folder(Path(hp.data_dir), train, hp.image_size, hp.labels)
    image_set = load_images(hp.dataset, hp.data_dir, train, hp.image_size, hp.labels)
    return image_set and Split(image_set, None)


def hold_out(split, generator):
    """Return (rest, held out), two parts of a labelled Split: of each class a random tenth of the images is held out, at least
    one, and none of a class of one image. The second is None if there are no others."""
    labels = split.image_set.labels
    is_held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        n = min(max(1, len(members) // 10), len(members) - 1)
        is_held[members[torch.randperm(len(members), generator=generator)[:n]]] = True
    if not is_held.any():
        return split, None
    log.info(f"* No test/ folder: a tenth of the images of each class, at least one, is held out for the linear probe: "
             f"{int(is_held.sum())} of {len(labels)}")  # fmt: skip
    return select(split, (~is_held).nonzero().flatten()), select(split, is_held.nonzero().flatten())


def select(split, index):
    """Return the part of a Split with these indices, int64 (n,)."""
    image_set, rows = split
    chosen = [rows[i] for i in index.tolist()] if isinstance(rows, list) else index if rows is None else rows[index]
    return Split(subset_at(image_set, index), chosen)


def subset_at(image_set, index):
    """Return the images of an ImageSet with these indices, int64 (n,)."""
    labels = None if image_set.labels is None else image_set.labels[index]
    return image_set._replace(images=subset(image_set.images, index), labels=labels)


def subset_of(image_set, n, generator):
    """Return a class-balanced random subset of n images of an ImageSet."""
    return subset_at(image_set, balanced_subset(image_set.labels, len(image_set.images), n, generator))


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
