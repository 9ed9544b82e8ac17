"""A folder of images as people have it: its splits, images, classes and labels."""

import collections
import csv
import functools
import os
import unicodedata
from pathlib import Path
from typing import NamedTuple

from images.cache import size_and_time
from infra.console import log
from infra.errors import UsageError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
RUN_FOLDER = {"hparams.yaml", "checkpoints"}  # the folder of an experiment.Run holds both


class Files(NamedTuple):
    """What a folder and all folders below it hold."""

    images: list  # sorted paths
    others: list  # sorted paths of files that are not read as images
    # How much is in neither list. hidden: images and folders whose names start with a dot. runs:
    # run folders. links: links to a folder that is read elsewhere, or that holds the link.
    left_out: collections.Counter


class Split(NamedTuple):
    """The training or the test images of a folder."""

    folder: Path
    files: Files
    names: list  # of the classes of the images, "" for one without; [] without labels

    @property
    def images(self):
        return self.files.images


class Splits(NamedTuple):
    """How a folder of images is understood."""

    train: Split
    test: Split | None
    class_names: list  # sorted; [] without labels
    unlabelled: list  # test/ and val/ that are no test split, because only train/ has labels
    unused_rows: list  # the LabelRows of a labels file that name no image of the two splits


class LabelRow(NamedTuple):
    """A line of a labels file."""

    number: int
    path: str
    label: str


def find_splits(root, labels=None):
    """Return the Splits of a folder.

    The training images are in train/. The test images are in test/ or else in val/; if train/ has
    labels, in the first of these that has some. Without train/, all images below root are training
    images. labels: a CSV file, see read_labels. Without it the labels are the names of the folders
    in train/, if there are two or more. Raises UsageError if images are missing, or the labels do
    not fit them.
    """
    check_folder(root)
    if not (root / "train").is_dir():
        train, test_folders = read_split(root), []
    else:
        train = read_split(root / "train")
        test_folders = [root / name for name in ("test", "val") if (root / name).is_dir()]
    if labels:
        return splits_by_file(labels, root, train, test_folders)
    class_names = find_classes(train) if train.folder != root else []
    if class_names:
        return splits_by_folder(class_names, train, test_folders)
    test = read_split(test_folders[0]) if test_folders else None
    return Splits(train, test, [], [], [])


def check_folder(root):
    """Raise UsageError if root is not a folder."""
    if not root.is_dir():
        raise UsageError(f"data_dir {root} is not a folder")


def read_split(folder):
    """Return the Split of a folder, without labels. Raises UsageError if it has no images."""
    files = find_files(folder)
    if not files.images:
        suffixes = " ".join(sorted(SUFFIXES))
        raise UsageError(f"no images in {folder} (looked for {suffixes} in all its folders)")
    return Split(folder, files, [])


def splits_by_folder(class_names, train, test_folders):
    """Return the Splits whose labels are the names of the folders in train/.

    Raises UsageError if a test image is in a folder of another name.
    """

    def named(split):
        names = [path.relative_to(split.folder).parts[0] for path in split.images]
        return split._replace(names=names)

    def has_labels(split):
        folders, _ = class_folders(split)
        return len(folders) > 1 or not set(folders).isdisjoint(class_names)

    test, unlabelled = first_labelled(test_folders, named, has_labels)
    unknown = sorted(set(test.names) - set(class_names)) if test else []
    if unknown:
        raise UsageError(
            f"{test.folder / unknown[0]} is not one of the {len(class_names)} class folders of "
            f"{train.folder}: rename it, or move it away"
        )
    return Splits(named(train), test, class_names, unlabelled, [])


def first_labelled(folders, named, has_labels):
    """Return (the first Split of these folders that has labels or None, the folders before it).

    named: returns a Split with its names. has_labels: whether they are labels.
    """
    unlabelled = []
    for folder in folders:
        split = named(read_split(folder))
        if has_labels(split):
            return split, unlabelled
        unlabelled.append(folder)
    return None, unlabelled


def splits_by_file(file, root, train, test_folders):
    """Return the Splits whose labels are those of a CSV file.

    An image may have none. Raises UsageError if no line is that of a training image, a file has a
    label that no training image has, or there is one label.
    """
    rows = read_labels(file, root)
    labels = {place: row.label for place, row in rows.items()}

    def named(split):
        return split._replace(names=[labels.get(place, "") for place in locations(split.images)])

    def has_labels(split):
        return any(split.names)

    train = named(train)
    if rows.keys().isdisjoint(locations(train.images)):
        first = f"the first is that of {next(iter(rows.values())).path}" if rows else "it has none"
        raise UsageError(
            f"labels {file}: no line is that of an image in {train.folder}: {first}, the first "
            f"image is {train.images[0].relative_to(root)}; paths are relative to {root}"
        )
    test, unlabelled = first_labelled(test_folders, named, has_labels)
    known = set(train.names) - {""}
    used = set(locations(train.images + (test.images if test else [])))
    for place, row in rows.items():
        is_unknown = row.label and row.label not in known
        if is_unknown and (place in used or (root / row.path).is_file()):
            raise UsageError(
                f"labels {file}: row {row.number} gives {row.path} the label {row.label!r}, which "
                f"no training image has (those are in {train.folder}): add some, or remove the row "
                f"and its image"
            )
    if len(known) < 2:
        raise UsageError(f"labels {file}: there are fewer than two labels")
    unused = [row for place, row in rows.items() if place not in used]
    return Splits(train, test, sorted(known), unlabelled, unused)


def read_labels(file, root):
    """Return {location: LabelRow} of a CSV file with lines path,label.

    The paths are relative to root, or absolute. Backslashes separate folders where no file has them
    in its name. A label may be empty. A first line whose path is not that of an image is a header
    and skipped. Raises UsageError if the file can't be read, a line does not have a path and a
    label, or two lines contradict each other.
    """
    rows = {}
    parsed = parse_labels(file, root)
    for place, row in zip(locations(root / row.path for row in parsed), parsed, strict=True):
        earlier = rows.setdefault(place, row)
        if earlier.label != row.label:
            raise UsageError(
                f"labels {file}: row {row.number} gives {row.path} the label {row.label!r}, an "
                f"earlier one {earlier.label!r}"
            )
    return rows


def parse_labels(file, root):
    """Return the LabelRows of a CSV file, see read_labels."""
    try:
        # -sig: spreadsheets put a byte-order mark at the start.
        with open(file, newline="", encoding="utf-8-sig") as lines:
            rows = [(number, row) for number, row in enumerate(csv.reader(lines), 1) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"labels {file} can't be read: {error}") from None
    parsed = []
    for number, row in rows:
        if len(row) != 2:
            raise UsageError(
                f"labels {file}: row {number} has {len(row)} columns, not path,label separated by "
                f"commas"
            )
        path, label = (text.strip() for text in row)
        if number == 1 and Path(path).suffix.lower() not in SUFFIXES:
            continue
        if not path:
            raise UsageError(
                f"labels {file}: row {number} (,{label}) needs a path: complete or remove it"
            )
        if "\\" in path and not os.path.lexists(root / path):
            path = path.replace("\\", "/")
        parsed.append(LabelRow(number, path, label))
    return parsed


def locations(paths):
    """Return where the files are, in a form that is the same for each way to write a path.

    Links to folders are resolved, and letters with accents are composed (Unicode NFC).
    """
    resolve = functools.cache(os.path.realpath)  # the folders are few
    places = []
    for path in paths:
        folder, name = os.path.split(path)
        places.append(unicodedata.normalize("NFC", os.path.join(resolve(folder), name)))
    return places


def image_rows(root, labels=None):
    """Return [(split, path relative to root, bytes)] of the images that a run on this folder reads.

    Not their times: those of a copy are new. Raises the errors of find_splits.
    """
    splits = find_splits(root, labels)
    return [
        (name, str(path.relative_to(root)), str(size_and_time(path)[0]))
        for name, split in (("train", splits.train), ("test", splits.test))
        for path in (split.images if split else ())
    ]


def find_files(folder):
    """Return the Files of a folder.

    Hidden files, folders and Thumbs.db belong to a system or a program, not to the data, and so do
    run folders: they are in neither list. Each real folder is read once, by its own path before
    that of a link. Raises UsageError if one of the folders can't be read.
    """
    images = []
    others = []
    left_out = collections.Counter()
    for directory, names in walk(folder, left_out):
        for name in names:
            path = Path(directory, name)
            is_image = path.suffix.lower() in SUFFIXES
            if name.startswith("."):
                left_out["hidden"] += is_image
            elif is_image:
                images.append(path)
            elif name.lower() != "thumbs.db":
                others.append(path)
    return Files(sorted(images), sorted(others), left_out)


def walk(folder, left_out):
    """Yield (path, names of its files) of the folder and all folders below it, each once.

    left_out: a Counter, to which is added what is not entered, see Files.
    """

    def fail(error):
        raise UsageError(f"{error.filename} can't be read: {error.strerror}")

    entered = {str(path) for path in Path(os.path.realpath(folder)).parents}
    links = [folder]
    for link in links:  # which grows: links wait until the real folders around them are read
        left_out["links"] += os.path.realpath(link) in entered
        for directory, folders, names in os.walk(link, onerror=fail):
            real = os.path.realpath(directory)
            is_new = real not in entered
            entered.add(real)
            is_run = RUN_FOLDER <= {*folders, *names}
            left_out["runs"] += is_new and is_run
            if is_run or not is_new:
                folders.clear()
                continue
            shown = sorted(name for name in folders if not name.startswith("."))
            left_out["hidden"] += len(folders) - len(shown)
            folders[:] = shown  # os.walk enters these alone, but for links
            paths = (os.path.join(directory, name) for name in shown)
            links += [path for path in paths if os.path.islink(path)]
            yield directory, names


def find_images(folder):
    """Return the sorted paths of the images below the folder, at least one.

    Raises UsageError if there are none.
    """
    return read_split(folder).images


def log_folder(root, labels=None):
    """Print how the folder of a run is understood and what of it is left out.

    labels: the CSV file, if one is given. Raises the errors of find_splits.
    """
    check_folder(root)
    files = find_files(root)
    log_others(files, labels)
    splits = find_splits(root, labels)
    used = [split for split in (splits.train, splits.test) if split]
    log_links(sum(split.files.left_out["links"] for split in used))
    if splits.train.folder == root:
        log_tree(splits.train, labels)
        return
    if splits.class_names and not labels:
        log_empty_folders(splits.train.folder, splits.class_names)
    for folder in splits.unlabelled:
        log.info(f"* {folder.name}/ has no labels, so it gives no accuracy: embed encodes it")
    read = set(locations(path for split in used for path in split.images))
    unlabelled = tuple(f"{path}{os.sep}" for path in splits.unlabelled)
    beside = [path for path in files.images if not str(path).startswith(unlabelled)]
    n_beside = sum(place not in read for place in locations(beside))
    if n_beside:
        names = " or ".join(f"{split.folder.name}/" for split in used)
        log.info(f"* {count(n_beside, 'image')} left out: not in {names}")


def log_tree(split, labels):
    """Print how many images there are in a folder without train/."""
    kind = "training image" if labels else "unlabelled image"
    remedy = ""
    class_names, beside = class_folders(split)
    if not labels and len(class_names) > 1 and not beside:
        remedy = "; put class folders into train/ to use them as labels"
    log.info(f"* No train/ folder: {count(len(split.images), kind)}{remedy}")


def log_empty_folders(folder, class_names):
    """Print the names of the folders in train/ that are no classes, because no image is read."""
    names = {path.name for path in folder.iterdir() if path.is_dir()}
    empty = sorted(name for name in names - set(class_names) if not name.startswith("."))
    if empty:
        names = ", ".join(map(printable, empty[:5]))
        log.info(f"* {count(len(empty), 'folder')} in train/ without images, so no class: {names}")


def log_left_out(folder):
    """Print how much below the folder is not read as images."""
    files = find_files(folder)
    log_others(files)
    log_links(files.left_out["links"])


def log_others(files, labels=None):
    """Print how many of the Files of a folder are no images, hidden, or of runs.

    labels: a CSV file, which is not counted.
    """
    others = files.others
    if labels:
        labels = Path(labels)
        others = [p for p in others if p.name != labels.name or p.resolve() != labels.resolve()]
    suffixes = collections.Counter(path.suffix.lower() for path in others)
    kinds = []
    for suffix, n in suffixes.most_common(8):
        kinds.append(f"{n} {printable(suffix) or 'without a suffix'}")
    if len(suffixes) > len(kinds):
        kinds.append(f"and {len(suffixes) - len(kinds)} other suffixes")
    if others:
        log.info(f"* {count(len(others), 'file')} left out: {', '.join(kinds)}")
    n_hidden = files.left_out["hidden"]
    if n_hidden:
        log.info(
            f"* {count(n_hidden, 'hidden name')} left out: images or folders whose names start "
            f"with a dot"
        )
    n_runs = files.left_out["runs"]
    if n_runs:
        log.info(f"* {count(n_runs, 'run folder')} left out: hparams.yaml beside checkpoints/")


def log_links(n):
    """Print how many links to folders are left out."""
    if n:
        log.info(f"* {count(n, 'link')} left out: to a folder that is read already, or around it")


def warn_of_unused_rows(file, root, rows):
    """Warn of the LabelRows of a labels file that name no image of the splits."""
    for is_there, where in ((False, f"not in {root}"), (True, "in neither split")):
        some = [row for row in rows if (root / row.path).is_file() == is_there]
        if some:
            log.warning(
                f"labels {file}: left out {len(some)} lines of images that are {where}, such as "
                f"{some[0].path}"
            )


def count(n, noun):
    """Return "1 file", "2 files"."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


def printable(name):
    """Return a part of a file's name without characters that can't be printed."""
    return name if name.isprintable() else ascii(name)


def class_folders(split):
    """Return the sorted names of the folders that hold images, and the images beside them."""
    names = set()
    beside = []
    for path in split.images:
        name, *rest = path.relative_to(split.folder).parts
        if rest:
            names.add(name)
        else:
            beside.append(path)
    return sorted(names), beside


def find_classes(train):
    """Return the names of the class folders in train/, [] if they are fewer than two.

    Raises UsageError if images lie beside them, or a name is not UTF-8.
    """
    class_names, beside = class_folders(train)
    if len(class_names) < 2:
        return []
    if beside:
        raise UsageError(
            f"{count(len(beside), 'image')} beside the {len(class_names)} class folders of "
            f"{train.folder}, such as {beside[0]}: move each into a class folder, or train without "
            f"labels by --data_dir {train.folder}"
        )
    for name in class_names:
        if not is_utf8(name):
            raise UsageError(
                f"the name of the class folder {train.folder / name} is not UTF-8: rename it"
            )
    return class_names


def is_utf8(name):
    """Whether a name of a file is UTF-8; Python keeps the bytes of others as surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in name)
