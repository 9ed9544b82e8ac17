"""A folder of images as people have it: its splits, images, classes and labels, and what of it is left out."""

import collections
import csv
import os
from pathlib import Path

from infra.console import log
from infra.errors import UsageError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}


def split_folders(root):
    """Return the folders of the training and the test images: train/ and test/, or val/ if there is no test/.

    Without train/ they are root and None. The second is None too if there is neither test/ nor val/. Raises UsageError if root
    is not a folder.
    """
    if not root.is_dir():
        raise UsageError(f"data_dir {root} is not a folder")
    if not (root / "train").is_dir():
        return root, None
    return root / "train", next((root / name for name in ("test", "val") if (root / name).is_dir()), None)


def find_files(folder):
    """Return (images, others, n_hidden): the sorted paths of the images and of the other files below the folder, and the number
    of hidden images and folders, whose names start with a dot.

    Hidden files, folders and Thumbs.db belong to a system or a program, not to the data: they are in neither list. Links to
    folders are not followed. Raises UsageError if one of the folders can't be read.
    """

    def fail(error):
        raise UsageError(f"{error.filename} can't be read: {error.strerror}")

    images, others, n_hidden = [], [], 0
    for directory, folders, names in os.walk(folder, onerror=fail):
        shown = [name for name in folders if not name.startswith(".")]
        n_hidden += len(folders) - len(shown)
        folders[:] = shown  # os.walk enters these alone
        for path in map(Path(directory).joinpath, names):
            is_image = path.suffix.lower() in SUFFIXES
            if path.name.startswith("."):
                n_hidden += is_image
            elif is_image:
                images.append(path)
            elif path.name.lower() != "thumbs.db":
                others.append(path)
    return sorted(images), sorted(others), n_hidden


def find_images(folder):
    """Return the sorted paths of the images below the folder, at least one. Raises UsageError if there are none."""
    images, _, _ = find_files(folder)
    if not images:
        raise UsageError(f"no images in {folder} (looked for {' '.join(sorted(SUFFIXES))} in all its folders)")
    return images


def log_folder(root, labels=None):
    """Print how the folder of a run is understood and what of it is left out. labels: the CSV file, if one is given."""
    train_root, test_root = split_folders(root)
    images = log_left_out(root, labels)
    if images and train_root == root:
        kind = "training image" if labels else "unlabelled image"
        remedy = "; put class folders into train/ to use them as labels" if not labels and find_classes(images, root) else ""
        log.info(f"* No train/ folder: {count(len(images), kind)}{remedy}")
        return
    used = [folder for folder in (train_root, test_root) if folder]
    n_beside = sum(not str(path).startswith(tuple(f"{folder}{os.sep}" for folder in used)) for path in images)
    if n_beside:
        log.info(f"* {count(n_beside, 'image')} left out: not in {' or '.join(f'{folder.name}/' for folder in used)}")


def log_left_out(folder, labels=None):
    """Print how many files below the folder are not read as images, if any, and return the paths of those that are.

    labels: a CSV file, which is not counted.
    """
    images, others, n_hidden = find_files(folder)
    if labels:
        others = [path for path in others if path.name != Path(labels).name or path.resolve() != Path(labels).resolve()]
    suffixes = collections.Counter(path.suffix.lower() for path in others)
    kinds = [f"{n} {printable(suffix) or 'without a suffix'}" for suffix, n in suffixes.most_common(8)]
    if len(suffixes) > len(kinds):
        kinds.append(f"and {len(suffixes) - len(kinds)} other suffixes")
    if others:
        log.info(f"* {count(len(others), 'file')} left out: {', '.join(kinds)}")
    if n_hidden:
        log.info(f"* {count(n_hidden, 'hidden name')} left out: images or folders whose names start with a dot")
    return images


def count(n, noun):
    """Return "1 file", "2 files"."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


def printable(name):
    """Return a part of a file's name without line breaks and other characters that can't be printed."""
    return name if name.isprintable() else ascii(name)


def find_classes(images, folder):
    """Return the names of the folders that hold the images, sorted; [] if they are fewer than two or images lie beside them.

    images: paths below the folder.
    """
    names = {path.relative_to(folder).parts[0] for path in images}
    return sorted(names) if len(names) > 1 and all((folder / name).is_dir() for name in names) else []


def class_folders(images, folder):
    """Return find_classes(images, folder). Raises UsageError if a name is not UTF-8."""
    class_names = find_classes(images, folder)
    for name in class_names:
        if not is_utf8(name):
            raise UsageError(f"the name of the class folder {folder / name} is not UTF-8: rename it")
    return class_names


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
