"""A folder of images as people have it: its splits, images, classes and labels."""

import collections
import csv
import os
from pathlib import Path

from infra.console import log
from infra.errors import UsageError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}


def split_folders(root):
    """Return the folders of the training and the test images.

    They are train/ and test/, or val/ if there is no test/, or None if there is neither. Without
    train/ they are root and None. Raises UsageError if root is not a folder.
    """
    if not root.is_dir():
        raise UsageError(f"data_dir {root} is not a folder")
    if not (root / "train").is_dir():
        return root, None
    for name in ("test", "val"):
        if (root / name).is_dir():
            return root / "train", root / name
    return root / "train", None


def find_files(folder):
    """Return (images, others, n_hidden) of a folder and all folders below it.

    images, others: the sorted paths of the images and of the other files. n_hidden: the number of
    hidden images and folders, whose names start with a dot. Hidden files, folders and Thumbs.db
    belong to a system or a program, not to the data: they are in neither list. Links to folders are
    not followed. Raises UsageError if one of the folders can't be read.
    """

    def fail(error):
        raise UsageError(f"{error.filename} can't be read: {error.strerror}")

    images = []
    others = []
    n_hidden = 0
    for directory, folders, names in os.walk(folder, onerror=fail):
        shown = [name for name in folders if not name.startswith(".")]
        n_hidden += len(folders) - len(shown)
        folders[:] = shown  # os.walk enters these alone
        for name in names:
            path = Path(directory, name)
            is_image = path.suffix.lower() in SUFFIXES
            if name.startswith("."):
                n_hidden += is_image
            elif is_image:
                images.append(path)
            elif name.lower() != "thumbs.db":
                others.append(path)
    return sorted(images), sorted(others), n_hidden


def find_images(folder):
    """Return the sorted paths of the images below the folder, at least one.

    Raises UsageError if there are none.
    """
    images, _, _ = find_files(folder)
    if not images:
        suffixes = " ".join(sorted(SUFFIXES))
        raise UsageError(f"no images in {folder} (looked for {suffixes} in all its folders)")
    return images


def log_folder(root, labels=None):
    """Print how the folder of a run is understood and what of it is left out.

    labels: the CSV file, if one is given.
    """
    train_root, test_root = split_folders(root)
    images = log_left_out(root, labels)
    if images and train_root == root:
        log_tree(root, images, labels)
        return
    used = [folder for folder in (train_root, test_root) if folder]
    n_beside = sum(not any(path.is_relative_to(folder) for folder in used) for path in images)
    if n_beside:
        names = " or ".join(f"{folder.name}/" for folder in used)
        log.info(f"* {count(n_beside, 'image')} left out: not in {names}")


def log_tree(root, images, labels):
    """Print how many images there are in a folder without train/."""
    kind = "training image" if labels else "unlabelled image"
    remedy = ""
    if not labels and find_classes(images, root):
        remedy = "; put class folders into train/ to use them as labels"
    log.info(f"* No train/ folder: {count(len(images), kind)}{remedy}")


def log_left_out(folder, labels=None):
    """Print how many files below the folder are not read as images, and return the paths of images.

    labels: a CSV file, which is not counted.
    """
    images, others, n_hidden = find_files(folder)
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
    if n_hidden:
        log.info(
            f"* {count(n_hidden, 'hidden name')} left out: images or folders whose names start "
            f"with a dot"
        )
    return images


def count(n, noun):
    """Return "1 file", "2 files"."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


def printable(name):
    """Return a part of a file's name without characters that can't be printed."""
    return name if name.isprintable() else ascii(name)


def find_classes(images, folder):
    """Return the sorted names of the folders that hold the images.

    [] if they are fewer than two or images lie beside them. images: paths below the folder.
    """
    names = {path.relative_to(folder).parts[0] for path in images}
    are_folders = all((folder / name).is_dir() for name in names)
    return sorted(names) if len(names) > 1 and are_folders else []


def class_folders(images, folder):
    """Return find_classes(images, folder). Raises UsageError if a name is not UTF-8."""
    class_names = find_classes(images, folder)
    for name in class_names:
        if not is_utf8(name):
            raise UsageError(
                f"the name of the class folder {folder / name} is not UTF-8: rename it"
            )
    return class_names


def is_utf8(name):
    """Whether a name of a file is UTF-8; Python keeps the bytes of others as surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def read_labels(file):
    """Return {path: label} of a CSV file with a line path,label for each image.

    The paths are relative to data_dir. A first line whose path is not that of an image is a header
    and skipped. Raises UsageError if the file can't be read, a line does not have two columns, or
    two lines contradict each other.
    """
    try:
        # -sig: spreadsheets put a byte-order mark at the start.
        with open(file, newline="", encoding="utf-8-sig") as lines:
            rows = [row for row in csv.reader(lines) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"labels {file} can't be read: {error}") from None
    labels = {}
    for number, row in enumerate(rows, 1):
        if len(row) != 2:
            raise UsageError(f"labels {file}: row {number} has {len(row)} columns, not path,label")
        path = os.path.normpath(row[0])
        label = row[1]
        if number == 1 and Path(path).suffix.lower() not in SUFFIXES:
            continue
        if labels.setdefault(path, label) != label:
            raise UsageError(
                f"labels {file}: row {number} gives {path} the label {label!r}, an earlier one "
                f"{labels[path]!r}"
            )
    return labels


def labels_from_file(file, paths, root):
    """Return {path: class name} and the sorted class names.

    Lines of images that do not exist are left out, with a warning. Raises UsageError if a path has
    no label or there is one class.
    """
    labels = read_labels(file)
    names = {path: labels.get(str(path.relative_to(root))) for path in paths}
    missing = [path for path in paths if names[path] is None]
    if missing:
        raise UsageError(f"labels {file}: {missing[0]} and {len(missing) - 1} more have no label")
    surplus = [path for path in labels if not (root / path).is_file()]
    if surplus:
        log.warning(
            f"labels {file}: left out {len(surplus)} lines of images that are not in {root}, such "
            f"as {surplus[0]}"
        )
    class_names = sorted({labels[path] for path in labels.keys() - surplus})
    if len(class_names) < 2:
        raise UsageError(f"labels {file}: there are fewer than two labels")
    return names, class_names
