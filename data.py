"""Data sets as uint8 tensors: CIFAR-10 and CIFAR-100, folders of images, textures."""

from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision

from images import cache, folders
from images.cache import Decoding, ImageFile
from images.pixels import UnreadableImage, is_deep, opened
from images.textures import make_textures
from infra.console import log
from infra.device import generator
from infra.distributed import main_process_first
from infra.errors import RunError, UsageError
from infra.files import checksum

MANY_COPIES = 10  # of an image, above which they are counted and told
FEW_OF_CLASS = 20  # training images, below which a class is named
MUCH_CUT = 0.05  # of the area of the images, from which on it is told


class ImageSet(NamedTuple):
    """One split of a data set."""

    images: torch.Tensor  # uint8 (N, 3, H, W), or an ImageFile
    # int64 (N,), -1 for an image without a label; None if there are no classes.
    labels: torch.Tensor | None
    class_names: list
    # What the rows are: of a folder {"paths": list of str, relative to data_dir}; of a part of
    # another data set {"indices": int64 (N,)}; of the whole {}.
    source: dict = {}  # noqa: RUF012, it is never changed


def load_images(name, root, train, image_size=32, labels=None, **decoding):
    """Return one split of a data set as an ImageSet; None if a `folder` has no test split.

    name: a key of DATASETS. root: the folder with the files; cifar10 and cifar100 are downloaded
    into it once. image_size, the height and width in pixels, and labels, a CSV file (see
    folders.read_labels), are for `folder` only. Raises UsageError if the data is not there or
    image_size does not fit, RunError if too many images are unreadable (see read_images).
    """
    if name not in DATASETS:
        raise UsageError(f"unknown dataset {name!r}: choose from {', '.join(DATASETS)}")
    if name == "folder":
        return load_folder(Path(root), train, Decoding(image_size, **decoding), labels)
    if image_size != 32:
        raise UsageError(
            f"image_size {image_size}: the images of {name} are 32 pixels wide; only folder is "
            f"resized"
        )
    if labels:
        raise UsageError(
            f"labels {labels}: {name} has its own; only the images of folder can be given others"
        )
    return DATASETS[name](Path(root), train)


def load_textures(root, train):
    """Return 4,000 training or 1,000 test images, always the same; root is not used."""
    n = 4000 if train else 1000
    return ImageSet(*make_textures(n, generator(0, "textures", epoch=int(train))))


def load_cifar(root, train, name):
    """Return a split of CIFAR-10 or CIFAR-100, which torchvision downloads unless it is there."""
    classes = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}
    dataset_class = classes[name]

    def read():
        try:
            dataset = dataset_class(root, train=train, download=True)
        except (OSError, RuntimeError) as error:
            raise UsageError(
                f"{name} is not in {root} and can't be downloaded ({error}). Put "
                f"{dataset_class.filename} (md5 {dataset_class.tgz_md5}) into {root}, or work "
                f"offline with --dataset textures or with images of your own: --dataset folder "
                f"--data_dir DIR"
            ) from error
        images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2)  # (N, H, W, 3) -> (N, 3, H, W)
        return {
            "images": images.contiguous(),
            "labels": torch.tensor(dataset.targets),
            "class_names": list(dataset.classes),
        }

    folder = root / dataset_class.base_folder
    with main_process_first():
        first = None if folder.is_dir() else read()
        split = f"{name}-{'train' if train else 'test'}"
        try:
            content = cache.cached(split, folder, sorted(folder.iterdir()), lambda: first or read())
        except OSError as error:
            log.warning(f"the decoded images are not kept for the next time: {error}")
            content = first or read()
    return ImageSet(content["images"], content["labels"], content["class_names"])


def load_folder(root, train, decoding, labels=None):
    """Return the images below `root` as an ImageSet, None for a test split that is not there.

    They are train/<class>/* and test/<class>/*, or any tree of images without labels; see
    folders.find_splits. `labels`: a CSV file that has the labels. Files that can't be read are left
    out, with a warning.
    """
    splits = folders.find_splits(root, labels)
    if train and labels:
        folders.warn_of_unused_rows(labels, root, splits.unused_rows)
    split = splits.train if train else splits.test
    if split is None:
        return None
    images, readable = read_images(split.images, split.folder, decoding)
    source = {"paths": [str(split.images[i].relative_to(root)) for i in readable.tolist()]}
    if not splits.class_names:
        return ImageSet(images, None, [], source)
    index = {"": -1, **{name: i for i, name in enumerate(splits.class_names)}}
    labels = torch.tensor([index[name] for name in split.names])
    return ImageSet(images, labels[readable], splits.class_names, source)


# name: function of (root, train) that returns an ImageSet
DATASETS = {
    "cifar10": partial(load_cifar, name="cifar10"),
    "cifar100": partial(load_cifar, name="cifar100"),
    "folder": load_folder,
    "textures": load_textures,
}


def read_images(paths, folder, decoding):
    """Return the images of the readable files, and the indices of these files in paths.

    They are uint8 (M, 3, image_size, image_size) and int64 (M,). The other files are named in a
    warning. Raises RunError if they are more than one and more than 1 in 100, or half of all.
    """
    content = cache.decode(paths, folder, decoding)
    bad = content["failures"]
    if bad:
        named = failures_text(bad, folder)
    too_many = len(bad) > max(1, len(paths) / 100)
    if too_many or 2 * len(bad) >= len(paths):
        rule = "at most 1, or 1 in 100" if too_many else "fewer than half"
        raise RunError(
            f"{len(bad)} of {len(paths)} images in {folder} can't be read, too many to leave out "
            f"({rule}): {named}"
        )
    if bad:
        log.warning(f"left out {len(bad)} of {len(paths)} images that can't be read: {named}")
    log_repeated(content, paths, folder)
    cut = float(content["beside"].mean())
    if decoding.fit == "crop" and cut >= MUCH_CUT:
        log.info(
            f"* {cut:.0%} of the area of the images in {folder} is cut away by the square crop; "
            f"--fit pad keeps all"
        )
    return content["images"], content["readable"]


def failures_text(failures, folder, n=5):
    """Return the first n failures, and if there are more the path of a file that names them all."""
    if len(failures) <= n:
        return ", ".join(failures)
    file = cache.cache_path("unreadable", folder).with_suffix(".txt")
    try:
        cache.write_lines(file, failures)
    except OSError:
        return ", ".join(failures)
    return f"{', '.join(failures[:n])} and {len(failures) - n} more, all named in {file}"


def log_repeated(content, paths, folder):
    """Print how many images are of one colour, and how many are equal to many others.

    content: what cache.decode returned of paths.
    """
    plain = content["plain"]
    _, group, sizes = content["digests"].unique(return_inverse=True, return_counts=True)
    repeated = (sizes[group] > MANY_COPIES) & ~plain
    found = []
    for which, text in (
        (plain, "of a single colour"),
        (repeated, f"equal to {MANY_COPIES} or more others"),
    ):
        if which.any():
            path = paths[content["readable"][which.nonzero()[0]]]
            found.append(f"{int(which.sum())} {text}, such as {path}")
    if found:
        log.info(f"* Of {len(plain)} images in {folder}: {'; '.join(found)}")


def measured_range(hp):
    """Return {"value_low": float, "value_high": float} for a folder of images above 8 bits.

    They are percentiles .1 and 99.9 of the values of 100 training images at most. Both are None if
    none of 1,000 training images has more than 8 bits.
    """
    unknown = {"value_low": None, "value_high": None}
    if hp.dataset != "folder":
        return unknown
    paths = folders.find_splits(Path(hp.data_dir), hp.labels).train.images
    rng = np.random.default_rng(0)
    samples = []
    for i in rng.permutation(len(paths))[:1000]:
        with suppress(UnreadableImage), opened(paths[i], hp.max_pixels) as image:
            if is_deep(image):
                samples.append(some_values(np.asarray(image), rng))
        if len(samples) == 100:
            break
    if not samples:
        return unknown
    values = np.concatenate(samples)
    low, high = np.percentile(values, [0.1, 99.9]) if len(values) else (0, 1)
    if low == high:
        low, high = values.min(), max(values.max(), values.min() + 1)
    low, high = (float(f"{value:.6g}") for value in (low, high))
    log.info(
        f"* Images of more than 8 bits: {low:g} becomes black and {high:g} white, percentiles .1 "
        f"and 99.9 of {len(samples)} training images; --value_range LOW HIGH sets them"
    )
    return {"value_low": low, "value_high": high}


def some_values(values, rng, n=10_000):
    """Return at most n of the finite values of an array."""
    values = values[np.isfinite(values)]
    return values if len(values) <= n else rng.choice(values, n)


def balanced_subset(labels, n_images, n, generator):
    """Return the sorted indices of n random images, or of all if they are fewer: int64 (n,).

    They are as equally many of each class as possible. labels: int64 (n_images,) or None. Images
    without a label, -1, count as one more class, but every other class gets its first image before.
    """
    order = torch.randperm(n_images, generator=generator)
    if labels is not None:
        shuffled = labels[order]
        rank = rank_in_class(shuffled) + (shuffled < 0)
        order = order[rank.argsort(stable=True)]
    return order[:n].sort().values


def rank_in_class(labels):
    """Return of each of labels (N,) how many of the same stand before it: int64 (N,)."""
    rank = torch.empty_like(labels)
    for label in labels.unique():
        members = labels == label
        rank[members] = torch.arange(int(members.sum()))
    return rank


def sample(image_set, n, seed, purpose):
    """Return n random images of an ImageSet, or all: always the same, balanced by class."""
    rng = generator(seed, purpose)
    return select(image_set, balanced_subset(image_set.labels, len(image_set.images), n, rng))


def labelled(image_set):
    """Return the images of an ImageSet that have a label."""
    index = (image_set.labels >= 0).nonzero().flatten()
    return image_set if len(index) == len(image_set.labels) else select(image_set, index)


def select(image_set, index):
    """Return the images of an ImageSet with these indices, int64 (n,)."""
    images, labels, class_names, source = image_set
    labels = None if labels is None else labels[index]
    if "paths" in source:
        source = {"paths": [source["paths"][i] for i in index.tolist()]}
    else:
        source = {"indices": source["indices"][index] if source else index}
    return ImageSet(cache.subset(images, index), labels, class_names, source)


class Images:
    """The images of a run: images["train"] and images["test"], an ImageSet or None.

    They are read when first used. hp: the Hparams of the run. expected: the fingerprints of the
    images that the run was trained on, or None. changed: how the folder has changed since, what
    Run.images_changed returns. Reading raises UsageError if the images have other fingerprints, and
    the errors of load_images.
    """

    def __init__(self, hp, expected=None, changed=""):
        self.hp = hp
        self.expected = expected
        self.changed = changed

    def __getitem__(self, split):
        return self._splits[split]

    @property
    def fingerprints(self):
        """What a checkpoint keeps of the data: a checksum of each split, and the class names."""
        return self.expected or fingerprints_of(**self._splits)

    @property
    def are_read(self):
        """Whether the images have been read."""
        return "_splits" in vars(self)

    @cached_property
    def _splits(self):
        log.info(f"* Loading {self.hp.dataset}")
        # Runs from before val/ and held-out splits were supported have no test split: keep it so.
        stand_in = not self.expected or self.expected["test"] is not None
        train, test = load_splits(self.hp, stand_in)
        if self.expected and fingerprints_of(train, test) != self.expected:
            labels = f" or their labels in {self.hp.labels}" if self.hp.labels else ""
            reason = self.changed or (
                "pixels or labels are others, another version of Pillow decodes them otherwise, or "
                "its checkpoints are another run's: bring them back, or train under a new "
                f"--exp_name{new_probe_text(self.hp) if labels else ''}"
            )
            raise UsageError(
                f"the images of {self.hp.dataset} in {self.hp.data_dir}{labels} are not those that "
                f"this run was trained on: {reason}"
            )
        n_classes = len(train.class_names)
        counts = f"{count_text('train', train)}, {count_text('test', test)}"
        log.info(f"* Images: {counts}, {n_classes} classes")
        if n_classes:
            log_class_sizes(train, test)
        missing = why_no_probe(train.class_names, test)
        if missing:
            log.info(f"* There will be no linear probe: {missing}")
        return {"train": train, "test": test}


def new_probe_text(hp):
    """Return with which options a new run fits a probe to other labels, with the old weights."""
    # --weights has the backbone alone.
    pool = " --emb_pool backbone" if hp.emb_pool in ("features", "proj") else ""
    options = f"--config_from RUN --weights RUN/checkpoints/last.pt --n_epochs 0{pool}"
    return f" (if the labels alone are new: {options})"


def warn_of_changed_images(hp, changed):
    """Warn if Run.images_changed says that the images have changed."""
    if changed:
        log.warning(f"the images in {hp.data_dir} have changed since this run read them: {changed}")


def load_splits(hp, stand_in=True):
    """Return the training and the test ImageSet of a run; the second may be None.

    stand_in: val/, or else a part of the labelled training images, stands in for a missing test
    split. Raises UsageError if they do not fit the settings.
    """
    is_folder = hp.dataset == "folder"
    if is_folder:
        folders.log_folder(Path(hp.data_dir), hp.labels)
    decoding = hp.decoding._asdict()
    load = partial(load_images, hp.dataset, hp.data_dir, labels=hp.labels, **decoding)
    train, test = load(True), load(False)
    check_classes(train)
    if test and test.labels is not None and test.labels.max() < 0:
        test = None  # no image of it that has a label can be read
    is_val = is_folder and test is not None and Path(test.source["paths"][0]).parts[0] == "val"
    if is_val and not stand_in:
        test = None
    elif is_val:
        missing = "" if Path(hp.data_dir, "test").is_dir() else "No test/ folder: "
        log.info(f"* {missing}val/ is the test split")
    elif stand_in and test is None and train.labels is not None:
        train, test = hold_out(train, generator(hp.seed, "held-out test"))
    n = len(train.images)
    if hp.n_images and hp.n_images > n:
        raise UsageError(f"n_images {hp.n_images} is more than the {n} training images")
    if hp.n_images and hp.n_images < len(train.class_names):
        raise UsageError(
            f"n_images {hp.n_images} is fewer than the {len(train.class_names)} classes, so some "
            f"would have no training image: raise it"
        )
    if hp.n_images:
        train = sample(train, hp.n_images, hp.seed, "subset")
        n = hp.n_images
    if hp.n_epochs > 0 and n < hp.bs:
        raise UsageError(f"bs {hp.bs} is more than the {n} training images: lower bs")
    return train, test


def check_classes(train):
    """Raise UsageError if a class has no training image: none of its files can be read."""
    if train.labels is None:
        return
    for name, n in class_sizes(train).items():
        if n == 0:
            raise UsageError(
                f"the class {name!r} has no training image that can be read: repair one, or remove "
                f"the class from the training and test images"
            )


def class_sizes(image_set):
    """Return {class name: number of images} of an ImageSet with classes."""
    labels = image_set.labels[image_set.labels >= 0]
    n_images = labels.bincount(minlength=len(image_set.class_names)).tolist()
    return dict(zip(image_set.class_names, n_images, strict=True))


def count_text(split, image_set):
    """Return the number of images of a split, and how many have no label if others have one."""
    text = f"{len(image_set.images) if image_set else 0:,} {split}"
    if image_set is None or image_set.labels is None or image_set.labels.min() >= 0:
        return text
    return f"{text} ({int((image_set.labels < 0).sum()):,} without a label)"


def log_class_sizes(train, test):
    """Print the sizes of the classes if they differ much, or one has no test image."""
    sizes = class_sizes(train)
    fewest, most = min(sizes.values()), max(sizes.values())
    untested = [name for name, n in class_sizes(test).items() if n == 0] if test else []
    if most <= 2 * fewest and not untested:
        return
    small = sorted((n, name) for name, n in sizes.items() if n < FEW_OF_CLASS)
    text = f"* {len(sizes)} classes of {fewest:,} to {most:,} images"
    for title, names in (
        (f"fewer than {FEW_OF_CLASS}", [f"{name} {n}" for n, name in small]),
        ("without a test image", untested),
    ):
        if names:
            text += f"; {title}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
    log.info(text)


def hold_out(image_set, generator):
    """Return (rest, held out), two parts of a labelled ImageSet.

    Of each class a random tenth of the images is held out, at least one, and none of a class of
    one image. Images without a label stay. The second is None if there are no others.
    """
    labels = image_set.labels
    is_held = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(len(image_set.class_names)):
        members = (labels == label).nonzero().flatten()
        n = min(max(1, len(members) // 10), len(members) - 1)
        is_held[members[torch.randperm(len(members), generator=generator)[:n]]] = True
    if not is_held.any():
        return image_set, None
    log.info(
        f"* No test images with labels: a tenth of the images of each class, at least one, is held "
        f"out for the linear probe: {int(is_held.sum())} of {int((labels >= 0).sum())}"
    )
    rest = select(image_set, (~is_held).nonzero().flatten())
    return rest, select(image_set, is_held.nonzero().flatten())


def fingerprints_of(train, test):
    """Return the checksums of two ImageSets, None for one that is None, and the class names."""
    return {
        "train": fingerprint(train),
        "test": fingerprint(test) if test else None,
        "class_names": train.class_names,
    }


def fingerprint(image_set):
    """Return a checksum of the images and their labels."""
    images = image_set.images
    if isinstance(images, ImageFile):
        images = images.digests  # reading a large file would take minutes
    tensors = [images] if image_set.labels is None else [images, image_set.labels]
    return checksum(*tensors)


def why_no_probe(class_names, has_test):
    """Return why no accuracy can be measured, "" if it can."""
    if not class_names:
        return "the images have no labels (fewer than two train/<class> folders)"
    return "" if has_test else "there are no test images (no test/<class> folders)"
