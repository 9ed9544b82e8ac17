"""Data sets: folders, CIFAR, textures, the cache of decoded images."""

import hashlib
import io
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import urllib.request
from functools import partial
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from helpers import ONE_THREAD, ROOT, RUN, contents, pictures, refused, run
from PIL import Image
from torchvision import datasets

import data
import main
from evaluate import Fit, knn, linear_probe
from experiment import n_steps_in
from hparams import Hparams
from images import cache as image_cache
from images.copies import copies_text, find_copies
from images.folders import find_images
from infra import files
from infra.device import generator
from infra.errors import RunError, UsageError
from train import train_step, warn_of_few_steps

CPU = torch.device("cpu")


def write(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(image, Image.Image):
        image = Image.fromarray(np.asarray(image, dtype=np.uint8))
    image.save(path, **options)


def write_grey(path, level):
    write(path, np.full((8, 8, 3), level))


def write_many(folder, n):
    """n images, half in class a, half in b; image i is of the grey level i."""
    for i in range(n):
        write_grey(folder / ("a" if i < n // 2 else "b") / f"{i:03}.png", i)


def levels(image_set):
    """The grey levels of images of write_many: their numbers."""
    return image_set.images[:, 0, 0, 0].tolist()


def load(root, train=True, *options, **decoding):
    return data.load_images("folder", root, train, *options, **decoding)


def images_of(root, expected=None, **settings):
    """The Images of a run on a folder, read."""
    hp = Hparams(dataset="folder", data_dir=str(root), image_size=16, bs=2, **settings)
    images = data.Images(hp, expected)
    assert images["train"]
    return images


def labels_file(path, root):
    """Write a labels file in which each image below root has the name of its folder."""
    images = sorted(root.rglob("*.png"))
    lines = [f"{image.relative_to(root)},{image.parent.name}\n" for image in images]
    path.write_text("".join(lines))
    return str(path)


def quadrants(size):
    """(size, size, 3): red, green / blue, white."""
    colours = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8)
    return colours.repeat(size // 2, 0).repeat(size // 2, 1)


def test_folder_reads_every_format_and_mode_as_rgb(tmp_path):
    random = np.random.default_rng(0)
    rgb = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    grey, alpha, bits = rgb[:, :, 0], rgb[:, :, 1:2] | 1, rgb[:, :, 2] > 127
    greys = np.stack([grey] * 3, 2)
    rgba = np.concatenate([rgb, alpha], 2)
    on_white = 255 - (255 - rgb.astype(float)) * alpha / 255
    palette = Image.fromarray(grey % 7)
    palette.putpalette(rgb[0, :7].tobytes())
    smooth = pictures(1, noise=0)[0].permute(1, 2, 0).numpy()
    turned = Image.fromarray(np.rot90(grey).copy())
    files = {
        "0.png": (rgb, rgb),
        "1.png": (grey, greys),
        "2.png": (palette, rgb[0][grey % 7]),
        "3.png": (rgba, on_white),
        "4.png": (Image.fromarray(grey.astype(np.uint16) * 257), greys),
        "5.png": (Image.fromarray(bits), np.stack([bits * 255] * 3, 2)),
        "6.bmp": (rgb, rgb),
        "7.WEBP": (rgb, rgb),
        "8 ein Bild.jpg": (smooth, smooth),
        "9 größer 图.JPEG": (Image.fromarray(smooth).convert("L"), None),
        "A.tif": (rgb, rgb),
        "B.TIFF": (rgba, on_white),
        "C.tif": (Image.fromarray(grey.astype(np.uint16) * 257), greys),
        "D.tif": (Image.fromarray(grey.astype(">u2") * 257), greys),
        "E.gif": (grey, greys),
    }
    options = {
        "7": {"lossless": True},
        "8": {"quality": 95},
        "B": {"compression": "tiff_lzw"},
        "E": {"save_all": True, "append_images": [turned]},
    }
    for name, (image, _) in files.items():
        write(tmp_path / "train" / "zwei Wörter" / name, image, **options.get(name[0], {}))
    write(tmp_path / "train" / "a" / "deep" / "er" / "x.png", rgb)
    write(tmp_path / "test" / "zwei Wörter" / "x.png", rgb)
    (tmp_path / "train" / "notes.txt").write_text("not an image")
    images, labels, class_names, _ = load(tmp_path)
    assert (images.dtype, images.shape) == (torch.uint8, (16, 3, 32, 32))
    assert class_names == ["a", "zwei Wörter"]
    assert labels.tolist() == [0] + [1] * 15
    pixels = images.permute(0, 2, 3, 1).numpy()
    assert np.array_equal(pixels[0], rgb)
    for i, (name, (_, expected)) in enumerate(files.items(), 1):
        if name[0] == "8":
            assert np.abs(pixels[i].astype(int) - expected).mean() < 3, name
        elif expected is on_white:
            assert np.abs(pixels[i] - expected).max() < 1, name
        elif expected is not None:
            assert np.array_equal(pixels[i], expected), name
    assert (pixels[10] == pixels[10][:, :, :1]).all()
    test = load(tmp_path, False)
    assert (test.labels.tolist(), test.class_names) == ([1], class_names)
    assert np.array_equal(test.images[0].permute(1, 2, 0), rgb)


def test_folder_resizes_crops_and_turns(tmp_path):
    """Wide, tall, small and EXIF-turned images all show the same four quadrants, without the grey
    beside them.
    """
    square, beside = quadrants(100), np.full((100, 60, 3), 128, np.uint8)
    write(tmp_path / "wide.png", np.concatenate([beside, square, beside], 1))
    above = beside.swapaxes(0, 1)
    write(tmp_path / "tall.png", np.concatenate([above, square, above], 0))
    write(tmp_path / "small.png", quadrants(8))
    for orientation, quarter_turns in [(3, 2), (6, 1), (8, 3)]:  # as the EXIF standard numbers them
        exif = Image.Exif()
        exif[0x0112] = orientation
        turned = np.rot90(square, quarter_turns)
        write(tmp_path / f"turned{orientation}.jpg", turned, exif=exif, quality=95)
    for image_size in (32, 48):
        images = load(tmp_path, True, image_size).images
        assert images.shape == (6, 3, image_size, image_size)
        near_corners = images[:, :, 4 :: image_size - 9, 4 :: image_size - 9].float()
        expected = torch.from_numpy(quadrants(2)).permute(2, 0, 1).float().expand(6, -1, -1, -1)
        torch.testing.assert_close(near_corners, expected, rtol=0, atol=12)
        assert ((images.float() - 128).abs() < 20).all(1).float().mean() < 0.06  # none of the grey


@pytest.mark.parametrize("many", [2, 1000])
def test_an_image_that_is_not_square_is_cropped_padded_or_stretched(
    tmp_path, monkeypatch, capsys, many
):
    """Against colours that are known; how much the crop cuts away is known from the cache too."""
    monkeypatch.setattr(image_cache, "MANY", many)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "images"
    stripes = np.array([0, 100, 200, 50])
    wide = np.broadcast_to(stripes.repeat(20)[:, None], (40, 80, 3))
    for name, pixels in (("wide", wide), ("tall", wide.swapaxes(0, 1)), ("square", wide[:, :40])):
        write(folder / f"{name}.png", pixels)
    levels_of = {
        "crop": [[100, 100, 200, 200]] * 4,
        "pad": [[255] * 4, [0, 100, 200, 50], [0, 100, 200, 50], [255] * 4],
        "stretch": [[0, 100, 200, 50]] * 4,
    }
    cut = f"* 33% of the area of the images in {folder} is cut away by the square crop; --fit pad"
    for fit, expected in levels_of.items():
        for _ in range(2):  # then from the cache
            square, tall, wide = load(folder, True, 32, fit=fit).images[:, 0, 4::8, 4::8].tolist()
            assert (square, wide) == ([[0, 0, 100, 100]] * 4, expected)
            assert tall == [list(column) for column in zip(*expected, strict=True)]
            assert (cut in capsys.readouterr().out) == (fit == "crop")
    monkeypatch.setattr(image_cache, "read_image", None)  # nothing is decoded again
    if many == 2:
        load(folder)
        assert cut in capsys.readouterr().out
    for name in ("wide", "tall"):
        (folder / f"{name}.png").unlink()
        shutil.copy(folder / "square.png", folder / f"{name} 2.png")
    monkeypatch.undo()
    load(folder)
    assert "cut away" not in capsys.readouterr().out


def test_images_without_class_folders_have_no_labels(tmp_path):
    write_many(tmp_path / "heap" / "x", 6)
    write_grey(tmp_path / "heap" / "7.png", 7)
    write_many(tmp_path / "folders", 7)
    for i in range(6):
        write_grey(tmp_path / "beside" / "train" / "a" / f"{i}.png", i)
    write_grey(tmp_path / "beside" / "train" / "7.png", 7)
    for split, n in [("train", 7), ("test", 2)]:
        for i in range(n):
            write_grey(tmp_path / "one class" / split / "a" / f"{i}.png", 0)
    for root in ("heap", "folders", "beside", "one class"):
        images, labels, class_names, _ = load(tmp_path / root)
        assert (len(images), labels, class_names) == (7, None, []), root
    assert load(tmp_path / "heap", False) is None
    assert load(tmp_path / "beside", False) is None
    test = load(tmp_path / "one class", False)
    assert (len(test.images), test.labels) == (2, None)


def test_what_is_left_out_of_a_folder_is_said(tmp_path, capsys):
    """Hidden files are no classes and no images; other files are counted by their suffixes, but for
    the labels.
    """
    for split in ("train", "test"):
        write_many(tmp_path / split, 4)
    images_of(tmp_path)
    assert "left out" not in capsys.readouterr().out
    names = ".DS_Store a/Thumbs.db a/1.HEIC b/2.heic b/notes.txt b/LICENSE".split()
    for name in names:
        (tmp_path / "train" / name).write_bytes(b"")
    file = labels_file(tmp_path / "labels.csv", tmp_path)
    for labels, n, kinds in ((None, 5, {"1 .csv"}), (file, 4, set())):
        images_of(tmp_path, labels=labels)
        out = capsys.readouterr().out
        assert f"* {n} files left out: " in out and "hidden" not in out
        listed = set(re.search("left out: (.*)", out)[1].split(", "))
        assert listed == {"2 .heic", "1 .txt", "1 without a suffix"} | kinds
    (tmp_path / "train" / "a" / "._000.png").write_bytes(b"\0\5\x16\7")  # as macOS writes it
    write_grey(tmp_path / "train" / ".ipynb_checkpoints" / "000-checkpoint.png", 0)
    images = images_of(tmp_path)
    assert (levels(images["train"]), images["train"].class_names) == ([0, 1, 2, 3], ["a", "b"])
    words = "* 2 hidden names left out: images or folders whose names start with a dot\n"
    out, err = capsys.readouterr()
    assert words in out and not err


@pytest.mark.parametrize(
    ("folders", "words", "n_test"),
    [
        ("train val", "* No test/ folder: val/ is the test split\n", 6),
        ("train test val", "* 6 images left out: not in train/ or test/\n", 6),
        (".", "* No train/ folder: 6 unlabelled images; put class folders into train/ to use", 0),
        ("train/a", "* There will be no linear probe: the images have no labels", 0),
        ("heap/x", "* No train/ folder: 6 unlabelled images\n", 0),
    ],
)
def test_how_a_folder_is_understood_is_said_before_training(
    tmp_path, capsys, folders, words, n_test
):
    for folder in folders.split():
        write_many(tmp_path / folder, 6)
    images = images_of(tmp_path)
    out, err = capsys.readouterr()
    assert words in out and not err
    assert len(images["train"].images) == 6
    assert images["test"] is None if n_test == 0 else len(images["test"].images) == n_test
    assert ("* There will be no linear probe" in out) == (n_test == 0)


@pytest.mark.parametrize("by", ["folders", "file"])
def test_without_a_test_folder_a_tenth_of_each_class_is_held_out(tmp_path, capsys, by):
    """Of a class of a few images one, of a class of one image none. With a labels file too."""
    root = tmp_path / "data"
    classes = "a" * 40 + "b" * 20 + "c" * 3 + "d"
    for i, name in enumerate(classes):
        write_grey((root / "train" if by == "folders" else root) / name / f"{i:03}.png", i)
    labels = labels_file(tmp_path / "labels.csv", root) if by == "file" else None
    images = images_of(root, labels=labels)
    out = capsys.readouterr().out
    words = "a tenth of the images of each class, at least one, is held out for the linear probe"
    assert f"{words}: 7 of 64" in out and "no linear probe" not in out
    assert ("* No train/ folder: 64 training images\n" in out) == (by == "file")
    train, test = images["train"], images["test"]
    assert test.class_names == train.class_names == list("abcd")
    assert test.labels.bincount(minlength=4).tolist() == [4, 2, 1, 0]
    assert train.labels.bincount().tolist() == [36, 18, 2, 1]
    assert sorted(levels(train) + levels(test)) == list(range(64))
    again = images_of(root, images.fingerprints, labels=labels)
    other = images_of(root, labels=labels, seed=1)
    assert levels(again["test"]) == levels(test) != levels(other["test"])
    subset = images_of(root, labels=labels, n_images=20)
    assert levels(subset["test"]) == levels(test)
    assert set(levels(subset["train"])) < set(levels(train))


def test_a_run_of_an_earlier_version_that_had_no_test_images_goes_on_without(tmp_path, capsys):
    """It trained on all of train/; unless a test/ folder has come since then."""
    write_many(tmp_path / "train", 20)
    everything = load(tmp_path, True, 16)
    expected = {"train": data.fingerprint(everything), "test": None, "class_names": ["a", "b"]}
    words = "* There will be no linear probe: there are no test images"
    for folder in ("train", "val"):
        write_many(tmp_path / folder, 20)
        images = images_of(tmp_path, expected)
        assert (len(images["train"].images), images["test"]) == (20, None)
        assert words in capsys.readouterr().out
    write_many(tmp_path / "test", 20)
    with pytest.raises(UsageError, match="not those that this run was trained on"):
        images_of(tmp_path, expected)


def test_a_run_with_held_out_images_that_was_stopped_ends_with_the_same_bits(
    tiny, images, tmp_path, monkeypatch
):
    """And the images that are held out are not among those that it trained on."""
    root = tmp_path / "data"
    shutil.copytree(images / "train", root / "train")
    argv = [*tiny, "--data_dir", root]
    assert run(*argv, "--log_folder", tmp_path / "whole").code == 0
    calls = []

    def step_and_stop(*args, **options):
        calls.append(args)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*args, **options)

    monkeypatch.setattr("train.train_step", step_and_stop)
    assert run(*argv, "--log_folder", tmp_path / "stopped").code == 143
    assert run("resume", "--exp_dir", tmp_path / "stopped" / RUN).code == 0
    whole = contents(tmp_path / "whole" / RUN)
    assert contents(tmp_path / "stopped" / RUN) == whole
    assert whole["linear_accuracy.json"]["n_test"] == 2
    trained_on = set(whole["artifacts/train.pt"]["paths"])
    held_out = set(whole["artifacts/test.pt"]["paths"])
    assert trained_on | held_out == {str(path.relative_to(root)) for path in root.rglob("*.png")}
    assert not trained_on & held_out and len(held_out) == 2


def test_each_embedding_has_the_path_of_its_image(tiny, images, tmp_path):
    """As `embed` pairs them: an image that can't be read, a subset, held-out images, and a name
    that is not UTF-8 among them.
    """
    root = tmp_path / "data"
    shutil.copytree(images / "train", root / "train")
    (root / "train" / "across" / "3.png").write_bytes(b"not an image")
    down = root / "train" / "down"
    os.rename(down / "5.png", down / os.fsdecode(b"caf\xe9.png"))
    options = ["--data_dir", root, "--n_images", "19", "--n_epochs", "0", "--log_folder", tmp_path]
    assert run(*tiny, *options).code == 0
    out = tmp_path / "all.npz"
    options = ["--exp_dir", tmp_path / RUN, "--images", root, "--out", out, "--device", "cpu"]
    assert run("embed", *options).code == 0
    with np.load(out) as file:
        every = dict(zip(file["paths"].tolist(), torch.from_numpy(file["embeddings"]), strict=True))
    n = 0
    for split in ("train", "test"):
        content = torch.load(tmp_path / RUN / "artifacts" / f"{split}.pt", weights_only=True)
        expected = torch.stack([every[path] for path in content["paths"]])
        torch.testing.assert_close(content["embeddings"], expected)
        names = [["across", "down"][label] for label in content["labels"]]
        assert names == [Path(path).parent.name for path in content["paths"]]
        n += len(content["paths"])
    assert (n, len(every)) == (19 + 2, 23)
    assert len(torch.stack(list(every.values())).unique(dim=0)) == 23


def test_the_rows_of_a_subset_of_another_data_set_are_indices():
    images = data.Images(Hparams(dataset="textures", n_images=200))
    everything = data.load_images("textures", "", True)
    ((name, index),) = images["train"].source.items()
    assert (name, index.dtype, len(index)) == ("indices", torch.int64, 200)
    assert images["test"].source == {}
    assert torch.equal(everything.images[index], images["train"].images)
    assert data.Images(Hparams(dataset="textures"))["train"].source == {}


def test_few_steps_are_warned_of_once(tiny, tmp_path, capsys):
    """At the start, and not where training goes on."""
    start = "warning: 24 images, 6 steps of training in all: this teaches little; raise n_epochs"
    for n_epochs, n_warnings in (("1", 1), ("2", 0)):
        command = [*tiny, "--n_epochs", n_epochs, "--log_folder", str(tmp_path)]
        assert main.main(command) == 0
        err = capsys.readouterr().err
        assert err.count("\n") == err.count(start) == n_warnings
    for n_epochs, warned in ((0, False), (0.5, True), (0.98, True), (1, False)):
        warn_of_few_steps(101, n_steps_in(n_epochs, 50))
        assert ("teaches little" in capsys.readouterr().err) == warned, n_epochs


def test_a_link_to_the_parent_folder_is_not_followed(tmp_path):
    write_many(tmp_path / "train", 4)
    (tmp_path / "train" / "a" / "up").symlink_to(tmp_path / "train", target_is_directory=True)
    assert load(tmp_path).labels.tolist() == [0, 0, 1, 1]


def test_a_link_to_a_folder_is_followed_and_each_folder_read_once(tmp_path, capsys):
    """As a class, within one, and as the folder of a split. A real folder comes before a link."""
    root = tmp_path / "data"
    for i, path in enumerate(("data/train/b", "pool/c", "pool/deep", "pool/test/b")):
        write_grey(tmp_path / path / f"{i}.png", i)
    pool = tmp_path / "pool"
    links = {"train/c": "c", "train/b/deep": "deep", "test": "test", "train/a": "../data/train/b"}
    links |= {"train/c/loop": "../data"}  # which holds train/ too
    for link, target in links.items():
        (root / link).symlink_to(pool / target, target_is_directory=True)
    images = images_of(root)
    out = capsys.readouterr().out
    assert images["train"].source["paths"] == [
        "train/b/0.png",
        "train/b/deep/2.png",
        "train/c/1.png",
    ]
    assert (images["train"].class_names, levels(images["train"])) == (["b", "c"], [0, 2, 1])
    assert images["test"].source["paths"] == ["test/b/3.png"]
    assert (
        "* 2 links left out: " in out
        and "* 1 folder in train/ without images, so no class: a" in out
    )
    assert "not in train/" not in out
    (tmp_path / "labels.csv").write_text("train/a/0.png,x\ntrain/b/deep/2.png,y\ntrain/c/1.png,z\n")
    assert load(root, True, 16, tmp_path / "labels.csv").labels.tolist() == [0, 1, 2]


def test_what_lies_in_a_run_folder_is_no_data(finished, tmp_path, capsys):
    """Neither its pictures nor an export, however deep; also of a run that is the folder itself."""
    write_many(tmp_path, 4)
    run_folder = shutil.copytree(finished, tmp_path / "a" / "logs" / RUN)
    write_grey(run_folder / "export" / "x.png", 9)
    assert (run_folder / "patches.png").exists()
    assert levels(images_of(tmp_path)["train"]) == [0, 1, 2, 3]
    assert "* 1 run folder left out: hparams.yaml beside checkpoints/\n" in capsys.readouterr().out
    with pytest.raises(UsageError, match="no images in"):
        find_images(run_folder)


@pytest.mark.parametrize("by", ["folders", "file"])
def test_a_test_folder_without_labels_is_no_test_split(tmp_path, capsys, by):
    """As competitions have it. Then val/ is the test split, if it has labels, or else a tenth."""
    root = tmp_path / "data"
    write_many(root / "train", 20)
    labels = labels_file(tmp_path / "labels.csv", root) if by == "file" else None
    for i in range(3):
        write_grey(root / "test" / "all" / f"{i}.png", i)
    images = images_of(root, labels=labels)
    out = capsys.readouterr().out
    assert "* test/ has no labels, so it gives no accuracy: embed encodes it\n" in out
    assert "not in train/" not in out
    assert (len(images["train"].images), len(images["test"].images)) == (18, 2)
    write_many(root / "val", 4)
    labels = labels and labels_file(tmp_path / "labels.csv", root)
    if labels:
        rows = [row for row in Path(labels).read_text().splitlines(True) if "test/" not in row]
        Path(labels).write_text("".join(rows))
    images = images_of(root, labels=labels)
    assert "* val/ is the test split\n" in capsys.readouterr().out
    assert images["test"].source["paths"] == sorted(
        str(path.relative_to(root)) for path in root.glob("val/*/*")
    )


def test_an_image_beside_the_class_folders_is_refused(tmp_path):
    """Its class can't be known. All of train/ without labels is a way out."""
    write_many(tmp_path / "train", 4)
    write_grey(tmp_path / "train" / "stray.png", 9)
    with pytest.raises(UsageError, match=r"1 image beside the 2 class folders of .*/stray\.png"):
        load(tmp_path)
    assert load(tmp_path / "train").labels is None


def test_a_class_without_a_training_image_is_refused(tmp_path):
    write_many(tmp_path / "train", 202)
    write_grey(tmp_path / "train" / "owl" / "0.png", 0)
    write_grey(tmp_path / "test" / "owl" / "0.png", 0)
    with pytest.raises(UsageError, match="n_images 2 is fewer than the 3 classes"):
        images_of(tmp_path, n_images=2)
    (tmp_path / "train" / "owl" / "0.png").write_bytes(b"damaged")
    with pytest.raises(UsageError, match="the class 'owl' has no training image that can be read"):
        images_of(tmp_path)


def test_what_can_not_be_loaded_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("missing", "empty"):
        with pytest.raises(UsageError, match=re.escape(str(tmp_path / name))):
            load(tmp_path / name)
    write_many(tmp_path / "full" / "train", 4)
    for name in ("a", "unheard-of"):
        write_grey(tmp_path / "full" / "test" / name / "1.png", 0)
    with pytest.raises(UsageError, match="unheard-of"):
        load(tmp_path / "full", False)
    with pytest.raises(UsageError, match="mnist"):
        data.load_images("mnist", tmp_path, True)
    for name in ("textures", "cifar10", "cifar100"):
        with pytest.raises(UsageError, match="image_size 48"):
            data.load_images(name, tmp_path, True, 48)


def write_unreadable(folder, n, n_bad):
    """n images, the first n_bad of them unreadable: the last one is cut off. Return their paths."""
    write_many(folder, n)
    bad = sorted(folder.rglob("*.png"))[:n_bad]
    for path in bad:
        path.write_bytes(b"not an image" if path != bad[-1] else path.read_bytes()[:-30])
    return bad


@pytest.mark.parametrize(("n", "n_bad"), [(3, 1), (22, 1), (100, 1), (200, 2)])
def test_one_unreadable_image_or_one_in_a_hundred_is_left_out(tmp_path, capsys, n, n_bad):
    bad = write_unreadable(tmp_path / "train", n, n_bad)
    image_set = load(tmp_path)
    assert levels(image_set) == list(range(n_bad, n))
    assert image_set.labels.tolist() == [0] * (n // 2 - n_bad) + [1] * (n - n // 2)
    err = capsys.readouterr().err
    assert f"{n_bad} of {n}" in err and all(str(path) in err for path in bad)


@pytest.mark.parametrize(("n", "n_bad"), [(1, 1), (2, 1), (22, 2), (100, 2), (200, 3)])
def test_more_unreadable_images_are_an_error(tmp_path, n, n_bad):
    write_unreadable(tmp_path / "train", n, n_bad)
    rule = "fewer than half" if n_bad == 1 else "at most 1, or 1 in 100"
    with pytest.raises(RunError, match=rf"{n_bad} of {n} .*\({rule}\)"):
        load(tmp_path)


def test_all_unreadable_images_are_named_in_a_file_and_the_others_stay_decoded(
    tmp_path, monkeypatch
):
    """After the bad ones were removed, those that came or changed are decoded, and no other."""
    monkeypatch.setattr(image_cache, "MANY", 4)
    folder = tmp_path / "train"
    bad = write_unreadable(folder, 60, 24)
    with pytest.raises(RunError, match=r"24 of 60 .*\(at most 1, or 1 in 100\)") as caught:
        load(tmp_path)
    (file,) = re.findall(r"19 more, all named in (\S+)", str(caught.value))
    assert [line.split(" (")[0] for line in Path(file).read_text().splitlines()] == [*map(str, bad)]

    log = tmp_path / "decoded"  # of several processes
    read_image = image_cache.read_image

    def read_and_record(path, *decoding):
        with log.open("a") as lines:
            lines.write(f"{path.name}\n")
        return read_image(path, *decoding)

    monkeypatch.setattr(image_cache, "read_image", read_and_record)
    for path in bad:
        path.unlink()
    write_grey(folder / "b" / "040.png", 7)
    write_grey(folder / "b" / "999.png", 8)
    expected = [i for i in range(24, 60) if i != 40]
    assert levels(load(tmp_path)) == [*expected[:16], 7, *expected[16:], 8]
    assert sorted(log.read_text().split()) == ["040.png", "999.png"]
    # Rows that were damaged are decoded again; another range reuses nothing.
    (cache_file,) = (path for path in Path(file).parent.glob("*.u8") if path.stat().st_size)
    cache_file.write_bytes(bytes(100) + cache_file.read_bytes()[100:])
    write_grey(folder / "b" / "999.png", 9)
    assert levels(load(tmp_path)) == [*expected[:16], 7, *expected[16:], 9]
    assert sorted(log.read_text().split()[2:]) == ["024.png", "999.png"]
    load(tmp_path, value_range=(0, 9))
    assert len(log.read_text().split()) == 4 + 37


@pytest.mark.parametrize("many", [4, 1000])
def test_images_of_one_colour_and_those_that_equal_many_others_are_counted(
    tmp_path, monkeypatch, capsys, many
):
    monkeypatch.setattr(image_cache, "MANY", many)
    random = np.random.default_rng(0)
    a, b, *others = random.integers(0, 256, (22, 8, 8, 3))
    for i, pixels in enumerate([a] * 11 + [b] * 10 + others):
        write(tmp_path / f"{i:02}.png", pixels)
    words = (
        f"* Of 41 images in {tmp_path}: 11 equal to 10 or more others, such as {tmp_path}/00.png"
    )
    for _ in range(2):
        load(tmp_path)
        assert capsys.readouterr().out == f"{words}\n"
    for i in (50, 51):
        write_grey(tmp_path / f"{i}.png", i)
    load(tmp_path)
    words = f"* Of 43 images in {tmp_path}: 2 of a single colour, such as {tmp_path}/50.png; 11"
    assert words in capsys.readouterr().out


def test_images_above_the_limit_are_read_if_max_pixels_is_raised(tmp_path, monkeypatch):
    """Whatever Pillow's own limit is, which is back afterwards."""
    write_many(tmp_path, 4)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(RunError, match=r"\(64 pixels, above the 63 of the setting max_pixels"):
        images_of(tmp_path, max_pixels=63)
    assert levels(images_of(tmp_path, max_pixels=64)["train"]) == [0, 1, 2, 3]
    assert Image.MAX_IMAGE_PIXELS == 20


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_images_of_more_than_8_bits_share_one_range(tmp_path, capsys, kind):
    """They keep their contrast and their order, 8-bit images stay as they are, NaN is black."""
    random = np.random.default_rng(0)
    scale = {np.uint16: 1, np.int32: 100, np.float32: 1e-3}[kind]  # of 12 bits, of more, below 4
    for i in range(20):
        values = random.integers(100 * i, 100 * i + 2000, (16, 16))
        write(tmp_path / f"{i:02}.tif", Image.fromarray((values * scale).astype(kind)))
    write_grey(tmp_path / "8 bits.png", 77)
    odd = np.full((16, 16), [np.nan, np.inf] * 8, np.float32)
    write(tmp_path / "odd.tif", Image.fromarray(odd))
    measured = data.measured_range(Hparams(dataset="folder", data_dir=str(tmp_path)))
    low, high = measured.values()
    assert 0 <= low < 60 * scale and 3800 * scale < high <= 3900 * scale
    out = capsys.readouterr().out
    assert f"{low:g} becomes black and {high:g} white" in out and "of 21 training images" in out
    images = images_of(tmp_path, **measured)["train"].images[:, 0].float()
    means = images.mean((1, 2))[:20]
    expected = (torch.arange(20) * 100 + 1000) * scale
    torch.testing.assert_close(means, (expected - low) * 255 / (high - low), rtol=0.1, atol=5)
    assert images[20].unique().tolist() == [77]
    assert images[21].unique().tolist() == [0, 255]
    given = images_of(tmp_path, value_low=0, value_high=8000 * scale)["train"].images[:, 0]
    assert 100 < given[:20].max() < 130
    with pytest.raises(UsageError, match="value_low must be below value_high 3, not 5"):
        Hparams(value_low=5, value_high=3)


def test_near_copies_have_like_pixels_and_like_embeddings(monkeypatch):
    """Neither alone. As many as 1,001 images, whose embeddings lie far from 0."""
    rng = generator(0, "copies")
    others = torch.randint(256, (1001, 3, 16, 16), generator=rng, dtype=torch.uint8)
    images = torch.randint(256, (6, 3, 16, 16), generator=rng, dtype=torch.uint8)
    x_others = 9 + torch.randn(1001, 40, generator=rng)
    x = 9 + torch.randn(6, 40, generator=rng)
    noise = torch.randint(20, (3, 16, 16), generator=rng, dtype=torch.uint8)
    images[1] = others[700] // 2 + noise  # like pixels alone: the cosine is .89
    x[1] = x_others[700] + 0.4 * torch.randn(40, generator=rng)
    x[2] = x_others[300] + 0.1  # like embeddings alone
    images[3], x[3] = others[1000] // 2 + noise, x_others[1000] + 0.1
    images[4] = others[500]  # equal, whatever the embeddings are
    images[5], x[5] = others[600], x_others[600]
    pairs = [[4, 500], [5, 600], [3, 1000]]
    found = find_copies(images, others, x, x_others, CPU)
    assert (found["n"], found["n_equal"], found["pairs"].tolist()) == (6, 2, pairs)
    assert "3 of 6 test images" in copies_text(found)
    # Of many images some are searched; equal ones are found among all.
    monkeypatch.setattr("images.copies.MOST_SEARCHED", 1)
    found = find_copies(images, others, x, x_others, CPU)
    assert found["n"] == 1 and found["pairs"].tolist()[:2] == pairs[:2]
    none = find_copies(images[:1], others[:1], x[:1], x_others[:1], CPU)
    assert none["pairs"].shape == (0, 2)


EPS = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def write_floats(path):
    """Without a range of their own: as 0 to 255, those of 0 to 1 would be black."""
    Image.fromarray(np.random.default_rng(0).random((16, 16), np.float32)).save(path)


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        (
            "floats.tif",
            write_floats,
            "values from 0.* and the settings value_low and value_high are not set",
        ),
        ("eps.png", lambda path: path.write_text(EPS), "UnidentifiedImageError"),
        ("eps.tif", lambda path: path.write_text(EPS), "UnidentifiedImageError"),
        ("folder.png", Path.mkdir, "IsADirectoryError"),
        ("link.png", lambda path: path.symlink_to("nowhere"), "FileNotFoundError"),
        ("gone.png", lambda path: None, "FileNotFoundError"),
        (
            "bomb.png",
            partial(write, image=Image.new("1", (12_000, 12_000))),
            "144000000 pixels, above the 89478485 of the setting max_pixels",
        ),
    ],
)
def test_what_is_no_image_is_named_and_starts_no_program(tmp_path, monkeypatch, name, make, words):
    """For an EPS, Pillow would start gs."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    make(tmp_path / name)
    with pytest.raises(image_cache.UnreadableImage, match=rf"{re.escape(name)} \({words}"):
        image_cache.read_image(tmp_path / name, 16)
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("many", [4, 1000])
def test_odd_files_and_names(tmp_path, monkeypatch, capsys, many):
    """One pixel, names of any letters and bytes. As many files as are cached, and fewer."""
    monkeypatch.setattr(image_cache, "MANY", many)
    folder = tmp_path / "train"
    write_many(folder, 300)
    odd = folder / "c d é 犬"
    write(odd / "pixel of 犬.png", np.full((1, 1, 3), 77))
    write_grey(odd / "x.png", 78)
    os.rename(odd / "x.png", odd / os.fsdecode(b"caf\xe9.png"))  # not UTF-8
    (folder / "a" / "link.png").symlink_to(folder / "nowhere.png")
    for _ in range(2):
        images, labels, class_names, _ = load(tmp_path, True, 16)
        assert class_names == ["a", "b", "c d é 犬"]
        assert labels.bincount().tolist() == [150, 150, 2]
        assert sorted(images[labels == 2].float().mean((1, 2, 3)).tolist()) == [77, 78]
        err = capsys.readouterr().err
        assert "1 of 303" in err and "link.png" in err


def test_an_image_with_odd_exif_does_no_harm(tmp_path):
    """Pillow writes the EXIF again when it turns an image, and raises nearly anything on tags of
    the wrong type.
    """
    write_many(tmp_path / "train", 100)
    # The description is a fraction, at byte 38, where a text belongs.
    description = struct.pack(">HHII", 0x010E, 5, 1, 38)
    orientation = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
    header = b"Exif\0\0MM" + struct.pack(">HIH", 42, 8, 2)
    exif = header + description + orientation + struct.pack(">III", 0, 1, 2)
    write(tmp_path / "train" / "b" / "999.jpg", np.zeros((8, 8, 3)), exif=exif)
    images, labels, _, _ = load(tmp_path)
    assert len(images) == len(labels) >= 100


def test_ten_thousand_images_of_one_class_and_one_of_another(tiny, images, tmp_path):
    shutil.copytree(images / "test", tmp_path / "test")
    across = tmp_path / "train" / "across"
    for folder in (across, tmp_path / "train" / "down"):
        write_grey(folder / "0.png", 0)
    for i in range(1, 10_000):
        os.link(across / "0.png", across / f"{i}.png")
    options = ["--data_dir", tmp_path, "--n_images", "24", "--log_folder", tmp_path / "logs"]
    result = run(*tiny, *options)
    assert (result.code, result.err) == (0, "")
    assert "* Images: 24 train, 10 test, 2 classes" in result.out
    assert "top-1 50.00%" in result.out  # it can't know better


def test_images_in_a_file_are_those_in_memory(tmp_path, monkeypatch):
    write_many(tmp_path / "train", 30)
    memory = load(tmp_path, True, 16).images
    monkeypatch.setattr(image_cache, "MANY", 4)
    monkeypatch.setattr(image_cache, "LARGE", 0)
    file = load(tmp_path, True, 16).images
    assert isinstance(file, image_cache.ImageFile)
    assert (len(file), file.shape) == (30, memory.shape)
    assert torch.equal(file[:], memory)
    index = torch.tensor([7, 3, 29, 3])
    assert torch.equal(file[index], memory[index])
    assert torch.equal(image_cache.subset(file, index)[1:3], memory[index][1:3])
    rows = [index, slice(5, 9), torch.tensor([0])] * 4
    expected = [memory[index] for index in rows]
    for images in (memory, file):
        batches = list(image_cache.batches(images, rows, CPU))
        assert len(batches) == 12 and all(map(torch.equal, batches, expected))
    os.truncate(file.path, 20 * 3 * 16 * 16)
    with pytest.raises(RunError, match="damaged"):
        list(image_cache.batches(file, rows, CPU))


def test_many_images_are_decoded_once(tmp_path, monkeypatch, capsys, cache):
    """The second time they come from the cache folder, unless a file changed or the cache is
    damaged.
    """
    monkeypatch.setattr(image_cache, "MANY", 4)
    write_many(tmp_path / "train", 120)
    (tmp_path / "train" / "a" / "030.png").write_bytes(b"not an image")
    (tmp_path / "train" / "a" / "007.png").unlink()
    calls = []
    decode = image_cache.decode_with_processes
    monkeypatch.setattr(
        image_cache, "decode_with_processes", lambda *args: calls.append(args) or decode(*args)
    )
    expected = [i for i in range(120) if i not in (7, 30)]

    def n_decoded():
        """Load them twice; return how often images have been decoded since the start."""
        for _ in range(2):
            assert levels(load(tmp_path)) == expected
            assert "030.png" in capsys.readouterr().err
        return len(calls)

    assert n_decoded() == 1
    write_grey(tmp_path / "train" / "c" / "999.png", 7)
    expected.append(7)
    assert n_decoded() == 2
    before = set(cache.iterdir())
    os.utime(tmp_path / "train" / "b" / "100.png", (1, 1))
    assert n_decoded() == 3
    assert set(cache.iterdir()) == before  # the same files, written again
    for n, suffix in ((4, "pt"), (5, "u8")):
        for path in cache.glob(f"*.{suffix}"):
            path.write_bytes(path.read_bytes()[:-100])
        assert n_decoded() == n
    # No folder can be made there.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "train" / "b" / "100.png"))
    assert levels(load(tmp_path)) == expected
    assert "not kept" in capsys.readouterr().err


LOAD = """
import multiprocessing, sys, data
from images import cache
if __name__ == "__main__":
    multiprocessing.set_start_method("forkserver")
    cache.MANY = 4
    print(data.load_images("folder", sys.argv[1], True).images[:, 0, 0, 0].tolist())
"""


@pytest.mark.parametrize("rank", ["0", "1"])
def test_images_are_decoded_by_the_main_process_however_python_starts_processes(tmp_path, rank):
    """From Python 3.14 on, a server starts them: the workers' parent would be the server, with
    which they would end at once. Another process than the main one decodes into memory, unless it
    finds the cache: several would write the same file.
    """
    write_many(tmp_path / "train", 10)
    cache = tmp_path / "cache" / "emp-ssl"
    cache.mkdir(parents=True)
    env = {**ONE_THREAD, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    env |= {"TORCHELASTIC_RUN_ID": "1", "RANK": rank, "WORLD_SIZE": "1"}
    command = [sys.executable, "-c", LOAD, tmp_path]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{list(range(10))}"
    kept = {path.suffix for path in cache.iterdir()}
    assert kept == ({".pt", ".u8"} if rank == "0" else set())


def test_without_a_home_the_cache_is_a_temporary_folder(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    # As for a user that the system does not know.
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert image_cache.cache_path("name", "folder").is_absolute()


def pack_cifar(monkeypatch, dataset_class, root, batches, meta):
    """The archive that torchvision would download, of these files, and their checksums where it
    looks for them.
    """
    files = {name: pickle.dumps(content, protocol=2) for name, content in (batches | meta).items()}
    root.mkdir()
    with tarfile.open(root / dataset_class.filename, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{dataset_class.base_folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    (name,) = meta
    archive_md5 = hashlib.md5((root / dataset_class.filename).read_bytes()).hexdigest()
    for attribute, value in {
        "tgz_md5": archive_md5,
        "train_list": [[name, md5[name]] for name in batches if "test" not in name],
        "test_list": [[name, md5[name]] for name in batches if "test" in name],
        "meta": dataset_class.meta | {"md5": md5[name]},
    }.items():
        monkeypatch.setattr(dataset_class, attribute, value)


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


CIFAR = {
    "cifar10": (datasets.CIFAR10, [f"data_batch_{i}" for i in range(1, 6)], "test_batch", ""),
    "cifar100": (datasets.CIFAR100, ["train"], "test", "fine_"),
}


@pytest.mark.parametrize("name", CIFAR)
def test_cifar(name, tmp_path, monkeypatch, offline):
    dataset_class, train_files, test_file, prefix = CIFAR[name]
    with pytest.raises(UsageError) as caught:
        data.load_images(name, tmp_path / "none", True)
    for part in (dataset_class.filename, str(tmp_path / "none"), "textures", "folder"):
        assert part in str(caught.value)

    random = np.random.default_rng(0)
    n_classes = int(name.removeprefix("cifar"))
    batches = {}
    for file_name in [*train_files, test_file]:
        batches[file_name] = {
            "data": random.integers(0, 256, (20, 3072), dtype=np.uint8),
            f"{prefix}labels": random.integers(0, n_classes, 20).tolist(),
            "coarse_labels": [0] * 20,
        }
    class_names = [f"class {i}" for i in range(n_classes)]
    names = {f"{prefix}label_names": class_names, "coarse_label_names": ["x"]}
    meta = {dataset_class.meta["filename"]: names}
    pack_cifar(monkeypatch, dataset_class, tmp_path / "data", batches, meta)
    load_cifar = partial(data.load_images, name, tmp_path / "data")
    for train, parts in [(True, train_files), (False, [test_file])]:
        images, labels, names, _ = load_cifar(train)
        # Rows of red, then of green, of blue.
        expected = np.concatenate([batches[part]["data"] for part in parts])
        assert (images.dtype, images.shape) == (torch.uint8, (len(expected), 3, 32, 32))
        assert np.array_equal(images.flatten(1), expected)
        assert labels.dtype == torch.int64
        assert labels.tolist() == [n for part in parts for n in batches[part][f"{prefix}labels"]]
        assert names == class_names

    archive = tmp_path / "data" / dataset_class.filename
    folder = tmp_path / "data" / dataset_class.base_folder
    damaged = folder / train_files[0]
    damaged.write_bytes(damaged.read_bytes()[:-10])
    assert len(load_cifar(True).images) == 20 * len(train_files)  # unpacked again
    archive.write_bytes(archive.read_bytes()[:-10])
    shutil.rmtree(folder)
    with pytest.raises(UsageError, match=re.escape(dataset_class.filename)):
        load_cifar(True)


@pytest.mark.parametrize(
    ("text", "encoding", "words"),
    [
        ("a.png,x\nb.png,y\n", "utf-8-sig", ""),
        ("filename,class\na.png,x\nb.png,y\n", "utf-8", ""),
        ("path,label\na.png,x\nb.png,y\n", "utf-8-sig", ""),
        ("a.png,x\nb.png,y\na.png,x\n", "utf-8", ""),
        ("a.png,x\nb.png,y\nc.png,z\n", "utf-8", "left out 1 lines of images that are not in"),
    ],
)
def test_a_labels_file_with_a_byte_order_mark_a_header_or_too_many_lines(
    tmp_path, capsys, text, encoding, words
):
    image_set = labelled(tmp_path, text, encoding)
    assert (image_set.labels.tolist(), image_set.class_names) == ([0, 1], ["x", "y"])
    err = capsys.readouterr().err
    assert words in err and bool(err) == bool(words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a.png,x\nb.png,\n", "there are fewer than two labels"),
        ("a.png,\nb.png,\n", "there are fewer than two labels"),
        ("a.png,x\nb.png,y\na.png,\n", "row 3 gives a.png the label '', an earlier one 'x'"),
        ("a.png,x\n\n , y\n", r"row 3 \(,y\) needs a path"),
        ("a.png;x\nb.png;y\n", "row 1 has 1 columns, not path,label separated by commas"),
        ("images/a.png,x\nimages/b.png,y\n", "first is that of images/a.png, .* image is a.png; "),
        ("path,label\n", "no line is that of an image in .*: it has none"),
    ],
)
def test_a_labels_file_that_does_not_fit_names_the_line(tmp_path, text, words):
    with pytest.raises(UsageError, match=words):
        labelled(tmp_path, text, "utf-8")


def test_images_without_a_label_are_trained_on_and_left_out_of_the_accuracies(half_labelled):
    """Of both splits. The oracle has the labels of the CSV file and scikit-learn's measures."""
    metrics = pytest.importorskip("sklearn.metrics")
    rows = (half_labelled.parent / "labels.csv").read_text().split()
    names = dict(row.split(",") for row in rows)
    classes = ["", "across", "down"]
    embeddings, truth = {}, {}
    for split, n in (("train", 24), ("test", 10)):
        content = files.read_pt(half_labelled / "artifacts" / f"{split}.pt")
        labels = [classes.index(names.get(path, "")) - 1 for path in content["paths"]]
        assert content["labels"].tolist() == labels and len(labels) == n
        known = torch.tensor(labels) >= 0
        embeddings[split], truth[split] = content["embeddings"][known], content["labels"][known]
    probe = files.read_pt(half_labelled / "probe.pt")
    predicted = (embeddings["test"] @ probe["weight"].T + probe["bias"]).argmax(1)
    result = probe["result"]
    assert (result["n_train"], result["n_test"]) == (12, 4)
    assert result["top1"] == 100 * metrics.accuracy_score(truth["test"], predicted)
    expected = metrics.confusion_matrix(truth["test"], predicted).tolist()
    assert result["confusion"] == expected
    x, y, x_test, y_test = (part[split] for split in embeddings for part in (embeddings, truth))
    assert result["knn_top1"] == knn(x, y, x_test, y_test, 2)
    again, _ = linear_probe(x, y, x_test, y_test, 2, Fit(n_epochs=3, seed=42))
    assert again["per_epoch"] == result["per_epoch"]

    out = (half_labelled.parent / "out.txt").read_text()
    assert "* Images: 24 train (12 without a label), 10 test (6 without a label), 2 classes" in out
    assert "last epoch, 4 images" in out
    assert "without 18 images that have no label" in out
    (line,) = {line for line in out.splitlines() if "balanced" in line}
    assert line.split() == f"balanced {result['top1']:.2f}% always the largest class 50.00%".split()


def test_the_commands_for_few_labels_and_the_report_take_images_with_a_label(
    half_labelled, tmp_path
):
    exp_dir = shutil.copytree(half_labelled, tmp_path / "run")
    few = run("probe", "--exp_dir", exp_dir, "--label_fractions", "0.5", "1")
    assert re.findall(r"(\d+) labels", few.out) == ["6", "12"] and ", 4 test images" in few.out
    options = "--label_fraction 0.5 --n_epochs 1 --bs 4 --no-from_scratch --device cpu".split()
    tuned = run("finetune", "--exp_dir", exp_dir, *options)
    assert tuned.code == 0, tuned.err
    assert "labels           6 of 12 training images" in tuned.out
    assert "of 4 test images" in tuned.out
    assert run("report", "--exp_dir", exp_dir).code == 0
    page = (exp_dir / "report.html").read_text()
    assert "<td>50.00%</td>" in page  # always the largest class


def test_labels_that_were_added_since_are_refused_with_the_way_on(half_labelled, tmp_path):
    """Which works: another run with the same weights, that only fits the probe anew."""
    exp_dir = shutil.copytree(half_labelled, tmp_path / "old")
    labels = tmp_path / "labels.csv"
    more = "train/down/8.png,down\ntrain/across/8.png,across\n"
    labels.write_text((half_labelled.parent / "labels.csv").read_text() + more)
    options = ["--labels", labels]
    result = run("resume", "--exp_dir", exp_dir, *options)
    assert refused(result, 2, f"or their labels in {labels} are not those")
    way_on = result.err.split("are new: ")[1].rstrip(")\n").replace("RUN", str(exp_dir)).split()
    result = run("train", *way_on, *options, "--exp_name", "new", "--log_folder", tmp_path)
    assert result.code == 0, result.err
    assert run("resume", "--exp_dir", exp_dir, "--emb_pool", "backbone").code == 0  # the old labels
    (new_dir,) = tmp_path.glob("new__*")
    assert files.read_json(new_dir / "linear_accuracy.json")["n_train"] == 14
    old, new = (files.read_pt(path / "artifacts" / "train.pt") for path in (exp_dir, new_dir))
    assert torch.equal(old["embeddings"], new["embeddings"])


def test_only_images_with_a_label_are_held_out_and_n_images_keeps_both(tmp_path, capsys):
    """40 images, of which 30% have a line; of 9 of these it is that of class a."""
    for i in range(40):
        write_grey(tmp_path / "data" / f"{i:02}.png", i)
    names = {i: "a" if i < 9 else "b" for i in range(12)}
    rows = [f"{i:02}.png,{name}\n" for i, name in names.items()]
    (tmp_path / "labels.csv").write_text("".join(rows))
    labels = str(tmp_path / "labels.csv")
    images = images_of(tmp_path / "data", labels=labels)
    train, test = images["train"], images["test"]
    out = capsys.readouterr().out
    assert "is held out for the linear probe: 2 of 12\n" in out
    assert "* Images: 38 train (28 without a label), 2 test, 2 classes\n" in out
    assert "* 2 classes of 2 to 8 images; fewer than 20: b 2, a 8\n" in out
    assert sorted(levels(train) + levels(test)) == list(range(40))
    for split in (train, test):
        expected = ["ab".index(names[i]) if i in names else -1 for i in levels(split)]
        assert split.labels.tolist() == expected
    assert sorted(test.labels.tolist()) == [0, 1]
    for n, counts in ((2, [0, 1, 1]), (6, [2, 2, 2]), (9, [3, 4, 2]), (30, [20, 8, 2])):
        few = images_of(tmp_path / "data", labels=labels, n_images=n)["train"]
        assert sorted((few.labels + 1).bincount(minlength=3).tolist()) == sorted(counts)
        assert (few.labels + 1).bincount(minlength=3)[1:].min() >= 1


def test_a_test_folder_whose_only_label_is_of_an_unreadable_image_gives_no_accuracy(tmp_path):
    write_many(tmp_path / "data" / "train", 8)
    file = labels_file(tmp_path / "labels.csv", tmp_path / "data")
    with open(file, "a") as rows:
        rows.write("test/0.png,a\n")
    for i in (1, 2):
        write_grey(tmp_path / "data" / "test" / f"{i}.png", 99)
    (tmp_path / "data" / "test" / "0.png").write_bytes(b"no image")
    images = images_of(tmp_path / "data", labels=file)
    assert images["test"].labels.tolist() == [0, 1]  # held out
    assert 99 not in levels(images["test"])


def test_the_sizes_of_classes_are_told_where_they_differ(tmp_path, capsys):
    for name, n in zip("abcdefg", (50, 1, 2, 3, 4, 5, 6), strict=True):
        for i in range(n):
            write_grey(tmp_path / "train" / name / f"{i}.png", i)
    write_grey(tmp_path / "test" / "a" / "0.png", 0)
    images_of(tmp_path)
    sizes = "7 classes of 1 to 50 images; fewer than 20: b 1, c 2, d 3, e 4, f 5, ..."
    assert f"* {sizes}; without a test image: b, c, d, e, f, ...\n" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "train")
    write_many(tmp_path / "train", 4)
    images_of(tmp_path)
    assert (
        "* 2 classes of 2 to 2 images; fewer than 20: a 2, b 2; without a test"
        in capsys.readouterr().out
    )
    write_grey(tmp_path / "test" / "b" / "0.png", 0)
    images_of(tmp_path)
    assert "classes of" not in capsys.readouterr().out


def test_the_paths_of_a_labels_file_may_be_written_in_several_ways(tmp_path, capsys):
    """Absolute, also through a link; by backslashes; with accents composed or not; with spaces."""
    root = tmp_path / "data"
    names = ["ete/0.png", "ete/1.png", "e\u0301te\u0301/2.png", "a/3.png", "a/b/4.png"]
    for i, name in enumerate(names):
        write_grey(root / name, i)
    (tmp_path / "link").symlink_to(root)
    paths = [tmp_path / "link" / names[0], root / names[1], "\u00e9t\u00e9/2.png ", " ./a/3.png"]
    rows = [f"{path}, {i % 2} \n" for i, path in enumerate([*paths, r"a\b\4.png"])]
    (tmp_path / "labels.csv").write_text("".join(rows))
    image_set = load(root, True, 16, tmp_path / "labels.csv")
    assert [level % 2 for level in levels(image_set)] == image_set.labels.tolist()
    assert (sorted(levels(image_set)), image_set.class_names) == ([0, 1, 2, 3, 4], ["0", "1"])
    assert not capsys.readouterr().err


@pytest.mark.parametrize("folder", ["test/owl", "plane"])
def test_a_label_that_no_training_image_has_is_refused(tmp_path, folder):
    """That of test images alone, and one of images beside train/, which may be a class folder."""
    write_many(tmp_path / "train", 4)
    write_grey(tmp_path / folder / "9.png", 9)
    file = labels_file(tmp_path / "labels.csv", tmp_path)
    name = Path(folder).name
    with pytest.raises(UsageError, match=rf"row \d gives {folder}/9.png the label '{name}'"):
        load(tmp_path, True, 16, file)


def test_labels_that_contradict_each_other(tmp_path):
    with pytest.raises(UsageError, match=r"row 3 gives a\.png the label 'y', an earlier one 'x'"):
        labelled(tmp_path, "a.png,x\nb.png,y\na.png,y\n", "utf-8")


def labelled(tmp_path, text, encoding):
    """Write a.png, b.png and a CSV file of labels; return what load_images makes of them."""
    for name in ("a.png", "b.png"):
        write_grey(tmp_path / "images" / name, 0)
    (tmp_path / "labels.csv").write_text(text, encoding=encoding)
    return load(tmp_path / "images", True, 16, tmp_path / "labels.csv")


def test_a_class_folder_that_can_not_be_read_or_whose_name_is_not_utf8(tmp_path, monkeypatch):
    write_many(tmp_path / "train", 4)
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        with pytest.raises(UsageError, match="b can't be read: Permission denied"):
            load(tmp_path)
    os.rename(tmp_path / "train" / "b", tmp_path / "train" / os.fsdecode(b"b\xe9"))
    with pytest.raises(UsageError, match="is not UTF-8"):
        load(tmp_path)


def test_textures():
    train, test = (data.load_images("textures", "not used", train) for train in (True, False))
    for split, n in [(train, 4000), (test, 1000)]:
        assert (split.images.dtype, split.images.shape) == (torch.uint8, (n, 3, 32, 32))
        assert split.labels.bincount().tolist() == [n / 10] * 10
        means = split.images.float().mean((2, 3))
        assert (means.amax(1) - means.amin(1)).max() <= 0.12 * 255 + 1  # near-grey
    assert len(set(train.class_names)) == 10
    assert all(map(torch.equal, train[:2], data.load_images("textures", "", True)[:2]))
    assert len(torch.cat([train.images, test.images]).flatten(1).unique(dim=0)) == 5000
    # The nearest class mean tells classes apart by single pixels alone: chance is 0.1.
    x, y = train.images.flatten(1) / 255, test.images.flatten(1) / 255
    centres = torch.stack([x[train.labels == label].mean(0) for label in range(10)])
    accuracy = (torch.cdist(y, centres).argmin(1) == test.labels).float().mean()
    assert accuracy < 0.2


def test_balanced_subset():
    random = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 4)[torch.randperm(84, generator=random)]

    def subset(n, seed=0, labels=labels):
        chosen = data.balanced_subset(labels, 84, n, generator(seed, "t")).tolist()
        assert chosen == sorted(set(chosen) & set(range(84)))
        assert len(chosen) == min(n, 84)
        return chosen

    counts = {1: [1, 0, 0], 10: [4, 3, 3], 12: [4, 4, 4], 40: [18, 18, 4], 70: [36, 30, 4]}
    for n, expected in counts.items():
        of_class = labels[subset(n)].bincount(minlength=3).tolist()
        assert sorted(of_class, reverse=True) == expected, n
    assert subset(40) == subset(40) != subset(40, seed=1)
    assert subset(84) == subset(85) == list(range(84))
    assert subset(20, labels=None) != subset(20)
