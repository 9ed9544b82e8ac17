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
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from helpers import ROOT, RUN, contents, pictures, run
from PIL import Image
from torchvision import datasets

import data
import main
from experiment import n_steps_in
from hparams import Hparams
from images import cache as image_cache
from infra import distributed
from infra.device import generator
from infra.errors import RunError, UsageError
from train import train_step, warn_of_few_steps


def write(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(image, Image.Image):
        image = Image.fromarray(np.asarray(image, dtype=np.uint8))
    image.save(path, **options)


def write_many(folder, n):
    """n images, half in class a, half in b; image i is of the grey level i."""
    for i in range(n):
        write(folder / "ba"[i < n // 2] / f"{i:03}.png", np.full((8, 8, 3), i))


def quadrants(size):
    """(size, size, 3): red, green / blue, white."""
    colours = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8)
    return colours.repeat(size // 2, 0).repeat(size // 2, 1)


def test_folder_reads_every_format_and_mode_as_rgb(tmp_path):
    random = np.random.default_rng(0)
    rgb = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    grey, alpha, bits = rgb[:, :, 0], rgb[:, :, 1:2] | 1, rgb[:, :, 2] > 127
    palette = Image.fromarray(grey % 7)
    palette.putpalette(rgb[0, :7].tobytes())
    smooth = pictures(1, noise=0)[0].permute(1, 2, 0).numpy()
    turned = np.rot90(grey).copy()
    files = {
        "0.png": (Image.fromarray(rgb), rgb),
        "1.png": (Image.fromarray(grey), np.stack([grey] * 3, 2)),
        "2.png": (palette, rgb[0][grey % 7]),
        "3.png": (Image.fromarray(np.concatenate([rgb, alpha], 2)), rgb),
        "4.png": (Image.fromarray(grey.astype(np.uint16) * 257), np.stack([grey] * 3, 2)),
        "5.png": (Image.fromarray(bits), np.stack([bits * 255] * 3, 2)),
        "6.bmp": (Image.fromarray(rgb), rgb),
        "7.WEBP": (Image.fromarray(rgb), rgb),
        "8 ein Bild.jpg": (Image.fromarray(smooth), smooth),
        "9 größer 图.JPEG": (Image.fromarray(smooth).convert("L"), None),
        "A.tif": (Image.fromarray(rgb), rgb),
        "B.TIFF": (Image.fromarray(np.concatenate([rgb, alpha], 2)), rgb),
        "C.tif": (Image.fromarray(grey.astype(np.uint16) * 257), np.stack([grey] * 3, 2)),
        "D.tif": (Image.fromarray(grey.astype(">u2") * 257), np.stack([grey] * 3, 2)),
        "E.gif": (Image.fromarray(grey), np.stack([grey] * 3, 2)),
    }
    for name, (image, _) in files.items():
        options = {
            "7": {"lossless": True},
            "8": {"quality": 95},
            "B": {"compression": "tiff_lzw"},
            "E": {"save_all": True, "append_images": [Image.fromarray(turned)]},
        }
        write(tmp_path / "train" / "zwei Wörter" / name, image, **options.get(name[0], {}))
    write(tmp_path / "train" / "a" / "deep" / "er" / "x.png", rgb)
    write(tmp_path / "test" / "zwei Wörter" / "x.png", rgb)
    (tmp_path / "train" / "notes.txt").write_text("not an image")
    images, labels, class_names, _ = data.load_images("folder", tmp_path, True)
    assert images.dtype == torch.uint8
    assert images.shape == (16, 3, 32, 32)
    assert class_names == ["a", "zwei Wörter"]
    assert labels.tolist() == [0] + [1] * 15
    pixels = images.permute(0, 2, 3, 1).numpy()
    assert np.array_equal(pixels[0], rgb)
    for i, (name, (_, expected)) in enumerate(files.items(), 1):
        if name[0] == "8":
            assert np.abs(pixels[i].astype(int) - expected).mean() < 3, name
        elif expected is not None:
            assert np.array_equal(pixels[i], expected), name
    assert (pixels[10] == pixels[10][:, :, :1]).all()
    test = data.load_images("folder", tmp_path, False)
    assert test.labels.tolist() == [1]
    assert test.class_names == class_names
    assert np.array_equal(test.images[0].permute(1, 2, 0), rgb)


def test_folder_resizes_crops_and_turns(tmp_path):
    """Wide, tall, small and EXIF-turned images all show the same four quadrants, without the grey
    beside them.
    """
    square, beside = quadrants(100), np.full((100, 60, 3), 128, np.uint8)
    write(tmp_path / "wide.png", np.concatenate([beside, square, beside], 1))
    write(
        tmp_path / "tall.png",
        np.concatenate([beside.swapaxes(0, 1), square, beside.swapaxes(0, 1)], 0),
    )
    write(tmp_path / "small.png", quadrants(8))
    for orientation, quarter_turns in [(3, 2), (6, 1), (8, 3)]:  # as the EXIF standard numbers them
        exif = Image.Exif()
        exif[0x0112] = orientation
        write(
            tmp_path / f"turned{orientation}.jpg",
            np.rot90(square, quarter_turns),
            exif=exif,
            quality=95,
        )
    for image_size in (32, 48):
        images = data.load_images("folder", tmp_path, True, image_size).images
        assert images.shape == (6, 3, image_size, image_size)
        near_corners = images[:, :, 4 :: image_size - 9, 4 :: image_size - 9].float()
        expected = torch.from_numpy(quadrants(2)).permute(2, 0, 1).float().expand(6, -1, -1, -1)
        torch.testing.assert_close(near_corners, expected, rtol=0, atol=12)
        assert ((images.float() - 128).abs() < 20).all(1).float().mean() < 0.06  # none of the grey


def test_images_without_class_folders_have_no_labels(tmp_path):
    write_many(tmp_path / "heap" / "x", 6)
    write(tmp_path / "heap" / "7.png", np.full((8, 8, 3), 7))
    write_many(tmp_path / "folders", 7)
    write_many(tmp_path / "beside" / "train", 6)
    write(tmp_path / "beside" / "train" / "7.png", np.full((8, 8, 3), 7))
    for split, n in [("train", 7), ("test", 2)]:
        for i in range(n):
            write(tmp_path / "one class" / split / "a" / f"{i}.png", np.zeros((8, 8, 3)))
    for root in ("heap", "folders", "beside", "one class"):
        images, labels, class_names, _ = data.load_images("folder", tmp_path / root, True)
        assert (len(images), labels, class_names) == (7, None, []), root
    assert data.load_images("folder", tmp_path / "heap", False) is None
    assert data.load_images("folder", tmp_path / "beside", False) is None
    test = data.load_images("folder", tmp_path / "one class", False)
    assert (len(test.images), test.labels) == (2, None)


def images_of(root, expected=None, **settings):
    """The Images of a run on a folder, read."""
    images = data.Images(
        Hparams(dataset="folder", data_dir=str(root), image_size=16, bs=2, **settings), expected
    )
    assert images["train"]
    return images


def levels(image_set):
    """The grey levels of images of write_many: their numbers."""
    return image_set.images[:, 0, 0, 0].tolist()


def test_what_is_left_out_of_a_folder_is_said(tmp_path, capsys):
    """Hidden files are no classes and no images; other files are counted by their suffixes, but for
    the labels.
    """
    for split in ("train", "test"):
        write_many(tmp_path / split, 4)
    images_of(tmp_path)
    assert "left out" not in capsys.readouterr().out
    for name in (
        ".DS_Store",
        "a/Thumbs.db",
        "a/IMG 1.HEIC",
        "b/IMG 2.heic",
        "b/notes.txt",
        "b/LICENSE",
    ):
        (tmp_path / "train" / name).write_bytes(b"")
    (tmp_path / "labels.csv").write_text(
        "".join(
            f"{path.relative_to(tmp_path)},{path.parent.name}\n"
            for path in sorted(tmp_path.rglob("*.png"))
        )
    )
    for labels in (None, str(tmp_path / "labels.csv")):
        images_of(tmp_path, labels=labels)
        told = capsys.readouterr().out
        kinds = "2 .heic, 1 .csv, 1 .txt" if labels is None else "2 .heic, 1 .txt"
        assert f"* {5 - bool(labels)} files left out: " in told and "hidden" not in told
        assert set(kinds.split(", ")) | {"1 without a suffix"} == set(
            re.search("left out: (.*)", told)[1].split(", ")
        )
    (tmp_path / "train" / "a" / "._000.png").write_bytes(b"\0\5\x16\7")  # as macOS writes it
    write(tmp_path / "train" / ".ipynb_checkpoints" / "000-checkpoint.png", np.zeros((8, 8, 3)))
    images = images_of(tmp_path)
    assert (levels(images["train"]), images["train"].class_names) == ([0, 1, 2, 3], ["a", "b"])
    out, err = capsys.readouterr()
    assert (
        "* 2 hidden names left out: images or folders whose names start with a dot\n" in out
        and not err
    )


@pytest.mark.parametrize(
    ("place", "words", "n_train", "n_test"),
    [
        (("train", "val"), "* No test/ folder: val/ is the test split\n", 6, 6),
        (("train", "test", "val"), "* 6 images left out: not in train/ or test/\n", 6, 6),
        (
            ("",),
            "* No train/ folder: 6 unlabelled images; put class folders into train/ to use them as labels\n",
            6,
            0,
        ),
        (("train/a",), "* There will be no linear probe: the images have no labels", 6, 0),
        (("heap/x",), "* No train/ folder: 6 unlabelled images\n", 6, 0),
    ],
)
def test_how_a_folder_is_understood_is_said_before_training(
    tmp_path, capsys, place, words, n_train, n_test
):
    for folder in place:
        write_many(tmp_path / folder, 6)
    images = images_of(tmp_path)
    out, err = capsys.readouterr()
    assert words in out and not err
    assert (
        len(images["train"].images),
        len(images["test"].images) if n_test else images["test"],
    ) == (n_train, n_test or None)
    assert ("* There will be no linear probe" in out) == (n_test == 0)


def write_unequal(root):
    """64 images of four classes, of 40, 20, 3 and 1 images."""
    for i in range(64):
        write(
            root / "abcd"[(i >= 40) + (i >= 60) + (i >= 63)] / f"{i:03}.png", np.full((8, 8, 3), i)
        )


@pytest.mark.parametrize("by", ["folders", "file"])
def test_without_a_test_folder_a_tenth_of_each_class_is_held_out(tmp_path, capsys, by):
    """Of a class of a few images one, of a class of one image none. With a labels file too."""
    root, labels = tmp_path / "data", None
    write_unequal(root / "train" if by == "folders" else root)
    if by == "file":
        labels = str(tmp_path / "labels.csv")
        Path(labels).write_text(
            "".join(
                f"{path.relative_to(root)},{path.parent.name}\n" for path in root.rglob("*.png")
            )
        )
    images = images_of(root, labels=labels)
    out = capsys.readouterr().out
    assert (
        "a tenth of the images of each class, at least one, is held out for the linear probe: 7 of 64"
        in out
    )
    assert ("* No train/ folder: 64 training images\n" in out) == (
        by == "file"
    ) and "no linear probe" not in out
    train, test = images["train"], images["test"]
    assert test.labels.bincount(minlength=4).tolist() == [
        4,
        2,
        1,
        0,
    ] and test.class_names == train.class_names == list("abcd")
    assert train.labels.bincount().tolist() == [36, 18, 2, 1]
    assert sorted(levels(train) + levels(test)) == list(range(64))
    again, other = (
        images_of(root, images.fingerprints, labels=labels),
        images_of(root, labels=labels, seed=1),
    )
    assert levels(again["test"]) == levels(test) != levels(other["test"])
    subset = images_of(root, labels=labels, n_images=20)
    assert levels(subset["test"]) == levels(test) and set(levels(subset["train"])) < set(
        levels(train)
    )


def test_a_run_of_an_earlier_version_that_had_no_test_images_goes_on_without(tmp_path, capsys):
    """It trained on all of train/; unless a test/ folder has come since then."""
    write_many(tmp_path / "train", 20)
    everything = data.load_images("folder", tmp_path, True, 16)
    expected = {"train": data.fingerprint(everything), "test": None, "class_names": ["a", "b"]}
    for folder in ("train", "val"):
        write_many(tmp_path / folder, 20)
        images = images_of(tmp_path, expected)
        assert (len(images["train"].images), images["test"]) == (20, None)
        assert (
            "* There will be no linear probe: there are no test images" in capsys.readouterr().out
        )
    write_many(tmp_path / "test", 20)
    with pytest.raises(UsageError, match="not those that this run was trained on"):
        images_of(tmp_path, expected)


def test_a_run_with_held_out_images_that_was_stopped_ends_with_the_same_bits(
    tiny, images, tmp_path, monkeypatch
):
    """And the images that are held out are not among those that it trained on."""
    shutil.copytree(images / "train", tmp_path / "data" / "train")
    argv = [*tiny, "--data_dir", tmp_path / "data"]
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
    assert (
        contents(tmp_path / "stopped" / RUN) == whole
        and whole["linear_accuracy.json"]["n_test"] == 2
    )
    trained_on, held_out = (
        set(whole[f"artifacts/{split}.pt"]["paths"]) for split in ("train", "test")
    )
    names = {
        str(path.relative_to(tmp_path / "data")) for path in (tmp_path / "data").rglob("*.png")
    }
    assert trained_on | held_out == names and not trained_on & held_out and len(held_out) == 2


def test_each_embedding_has_the_path_of_its_image(tiny, images, tmp_path):
    """As `embed` pairs them: an image that can't be read, a subset, held-out images, and a name
    that is not UTF-8 among them.
    """
    root = tmp_path / "data"
    shutil.copytree(images / "train", root / "train")
    (root / "train" / "across" / "3.png").write_bytes(b"not an image")
    os.rename(
        root / "train" / "down" / "5.png", root / "train" / "down" / os.fsdecode(b"caf\xe9.png")
    )
    assert (
        run(
            *tiny,
            "--data_dir",
            root,
            "--n_images",
            "19",
            "--n_epochs",
            "0",
            "--log_folder",
            tmp_path,
        ).code
        == 0
    )
    assert (
        run(
            "embed",
            "--exp_dir",
            tmp_path / RUN,
            "--images",
            root,
            "--out",
            tmp_path / "all.npz",
            "--device",
            "cpu",
        ).code
        == 0
    )
    with np.load(tmp_path / "all.npz") as file:
        every = dict(zip(file["paths"].tolist(), torch.from_numpy(file["embeddings"]), strict=True))
    n = 0
    for split in ("train", "test"):
        content = torch.load(tmp_path / RUN / "artifacts" / f"{split}.pt", weights_only=True)
        torch.testing.assert_close(
            content["embeddings"], torch.stack([every[path] for path in content["paths"]])
        )
        classes = ["across", "down"]
        assert [classes[label] for label in content["labels"]] == [
            Path(path).parent.name for path in content["paths"]
        ]
        n += len(content["paths"])
    assert (n, len(every)) == (19 + 2, 23) and len(set(every)) == len(
        torch.stack(list(every.values())).unique(dim=0)
    )


def test_the_rows_of_a_subset_of_another_data_set_are_indices():
    images = data.Images(Hparams(dataset="textures", n_images=200))
    everything = data.load_images("textures", "", True)
    ((name, index),) = images["train"].source.items()
    assert (name, index.dtype, len(index), images["test"].source) == (
        "indices",
        torch.int64,
        200,
        {},
    )
    assert torch.equal(everything.images[index], images["train"].images)
    assert data.Images(Hparams(dataset="textures"))["train"].source == {}


def test_few_steps_are_warned_of_once(tiny, tmp_path, capsys):
    """At the start, and not where training goes on."""
    words = "warning: 24 images, 6 steps of training in all: this teaches little; raise n_epochs or lower bs (more patches"
    for n_epochs, warning in (("1", words), ("2", "")):
        assert main.main([*tiny, "--n_epochs", n_epochs, "--log_folder", str(tmp_path)]) == 0
        err = capsys.readouterr().err
        assert err.startswith(warning) and err.count("\n") == bool(warning)
    for n_epochs, warned in ((0, False), (0.5, True), (0.98, True), (1, False)):
        warn_of_few_steps(101, n_steps_in(n_epochs, 50))
        assert ("teaches little" in capsys.readouterr().err) == warned, n_epochs


def test_a_link_to_the_parent_folder_is_not_followed(tmp_path):
    write_many(tmp_path / "train", 4)
    (tmp_path / "train" / "a" / "up").symlink_to(tmp_path / "train", target_is_directory=True)
    assert data.load_images("folder", tmp_path, True).labels.tolist() == [0, 0, 1, 1]


def test_what_can_not_be_loaded_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("missing", "empty"):
        with pytest.raises(UsageError, match=re.escape(str(tmp_path / name))):
            data.load_images("folder", tmp_path / name, True)
    write_many(tmp_path / "full" / "train", 4)
    write(tmp_path / "full" / "test" / "a" / "1.png", np.zeros((8, 8, 3)))
    write(tmp_path / "full" / "test" / "unheard-of" / "1.png", np.zeros((8, 8, 3)))
    with pytest.raises(UsageError, match="unheard-of"):
        data.load_images("folder", tmp_path / "full", False)
    with pytest.raises(UsageError, match="mnist"):
        data.load_images("mnist", tmp_path, True)
    for name in ("textures", "cifar10", "cifar100"):
        with pytest.raises(UsageError, match="image_size 48"):
            data.load_images(name, tmp_path, True, 48)


def test_one_unreadable_image_in_a_hundred_is_left_out_and_two_are_an_error(tmp_path, capsys):
    write_many(tmp_path / "train", 100)
    bad, cut = tmp_path / "train" / "a" / "030.png", tmp_path / "train" / "b" / "070.png"
    bad.write_bytes(b"not an image")
    images, labels, _, _ = data.load_images("folder", tmp_path, True)
    assert images[:, 0, 0, 0].tolist() == [i for i in range(100) if i != 30]
    assert labels.tolist() == [0] * 49 + [1] * 50
    stderr = capsys.readouterr().err
    assert str(bad) in stderr
    assert "1 of 100" in stderr
    cut.write_bytes(cut.read_bytes()[:-30])
    with pytest.raises(RunError, match="2 of 100"):
        data.load_images("folder", tmp_path, True)


@pytest.mark.parametrize(
    ("n", "n_bad", "words"),
    [
        (22, 1, ""),
        (22, 2, "2 of 22"),
        (3, 1, ""),
        (2, 1, "1 of 2"),
        (1, 1, "1 of 1"),
        (200, 2, ""),
        (200, 3, "3 of 200"),
    ],
)
def test_how_many_unreadable_images_are_left_out(tmp_path, capsys, n, n_bad, words):
    write_many(tmp_path, n)
    for path in sorted(tmp_path.rglob("*.png"))[:n_bad]:
        path.write_bytes(b"not an image")
    if words:
        with pytest.raises(RunError, match=words):
            data.load_images("folder", tmp_path, True)
    else:
        assert len(data.load_images("folder", tmp_path, True).images) == n - n_bad
        assert f"{n_bad} of {n}" in capsys.readouterr().err


def test_an_image_of_floating_point_pixels_is_named(tmp_path):
    """They have no range that is agreed on: as 0 to 255, those of 0 to 1 would be black."""
    Image.fromarray(np.random.default_rng(0).random((16, 16), np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(image_cache.UnreadableImage, match=r"f\.tif \(floating-point pixels\)"):
        image_cache.read_image(tmp_path / "f.tif", 16)


def test_images_in_a_file_are_those_in_memory(tmp_path, monkeypatch):
    write_many(tmp_path / "train", 30)
    memory = data.load_images("folder", tmp_path, True, 16).images
    monkeypatch.setattr(image_cache, "MANY", 4)
    monkeypatch.setattr(image_cache, "LARGE", 0)
    file = data.load_images("folder", tmp_path, True, 16).images
    assert isinstance(file, image_cache.ImageFile)
    assert (len(file), file.shape) == (30, memory.shape)
    assert torch.equal(file[:], memory)
    index = torch.tensor([7, 3, 29, 3])
    assert torch.equal(file[index], memory[index])
    assert torch.equal(image_cache.subset(file, index)[1:3], memory[index][1:3])
    for images in (memory, file):
        rows = [index, slice(5, 9), torch.tensor([0])] * 4
        found = list(image_cache.batches(images, rows, torch.device("cpu")))
        assert all(
            torch.equal(batch, memory[index]) for batch, index in zip(found, rows, strict=True)
        )
    os.truncate(file.path, 20 * 3 * 16 * 16)
    with pytest.raises(RunError, match="damaged"):
        list(image_cache.batches(file, rows, torch.device("cpu")))


@pytest.mark.parametrize("many", [4, 1000])
def test_odd_files_and_names(tmp_path, monkeypatch, capsys, many):
    """One pixel, names of any letters and bytes; and what is left out: an image of 144 million
    pixels, a link to nowhere, a file that is gone when it is read. As many files as are cached, and
    fewer.
    """
    monkeypatch.setattr(image_cache, "MANY", many)
    folder = tmp_path / "train"
    write_many(folder, 300)
    write(folder / "c d é 犬" / "pixel of 犬.png", np.full((1, 1, 3), 77))
    name = os.fsdecode(b"caf\xe9.png")  # not UTF-8
    write(folder / "c d é 犬" / "x.png", np.full((8, 8, 3), 78))
    os.rename(folder / "c d é 犬" / "x.png", folder / "c d é 犬" / name)
    write(folder / "a" / "bomb.png", Image.new("1", (12_000, 12_000)))
    (folder / "a" / "link.png").symlink_to(folder / "nowhere.png")
    find_images = data.folders.find_images
    monkeypatch.setattr(
        data.folders, "find_images", lambda root: [*find_images(root), folder / "b" / "gone.png"]
    )
    for _ in range(2):
        images, labels, class_names, _ = data.load_images("folder", tmp_path, True, 16)
        assert class_names == ["a", "b", "c d é 犬"]
        assert labels.bincount().tolist() == [150, 150, 2]
        assert sorted(images[labels == 2].float().mean((1, 2, 3)).tolist()) == [77, 78]
        stderr = capsys.readouterr().err
        assert all(name in stderr for name in ("bomb.png", "link.png", "gone.png", "3 of 305"))


def test_ten_thousand_images_of_one_class_and_one_of_another(tiny, images, tmp_path):
    folder = tmp_path / "train"
    shutil.copytree(images / "test", tmp_path / "test")
    write(folder / "across" / "0.png", np.zeros((16, 16, 3)))
    write(folder / "down" / "0.png", np.zeros((16, 16, 3)))
    for i in range(1, 10_000):
        os.link(folder / "across" / "0.png", folder / "across" / f"{i}.png")
    result = run(
        *tiny, "--data_dir", tmp_path, "--n_images", "24", "--log_folder", tmp_path / "logs"
    )
    assert (result.code, result.err) == (0, "")
    assert "* Images: 24 train, 10 test, 2 classes" in result.out
    assert "top-1 50.00%" in result.out  # it can't know better


def test_many_images_are_decoded_once(tmp_path, monkeypatch, capsys, cache):
    """The second time they come from the cache folder, unless a file changed or the cache is
    damaged.
    """
    monkeypatch.setattr(image_cache, "MANY", 4)
    write_many(tmp_path / "train", 120)
    (tmp_path / "train" / "a" / "030.png").write_bytes(b"not an image")
    decoded, pool = [], image_cache.ProcessPoolExecutor
    monkeypatch.setattr(
        image_cache,
        "ProcessPoolExecutor",
        lambda **kwargs: decoded.append(kwargs) or pool(**kwargs),
    )

    def load():
        images, _, class_names, _ = data.load_images("folder", tmp_path, True)
        assert images[:, 0, 0, 0].tolist() == [i for i in range(120) if i not in (7, 30)] + [7] * (
            "c" in class_names
        )
        assert "030.png" in capsys.readouterr().err
        return len(decoded)

    (tmp_path / "train" / "a" / "007.png").unlink()
    assert [load(), load()] == [1, 1]
    write(tmp_path / "train" / "c" / "999.png", np.full((8, 8, 3), 7))
    assert [load(), load()] == [2, 2]
    before = set(cache.iterdir())
    os.utime(tmp_path / "train" / "b" / "100.png", (1, 1))
    assert [load(), load()] == [3, 3]
    assert set(cache.iterdir()) == before  # in the place of the old one
    for n, suffix in ((4, "pt"), (5, "u8")):
        for path in cache.glob(f"*.{suffix}"):
            path.write_bytes(path.read_bytes()[:-100])
        assert [load(), load()] == [n, n]
    monkeypatch.setenv(
        "XDG_CACHE_HOME", str(tmp_path / "train" / "b" / "100.png")
    )  # no folder can be made there
    images = data.load_images("folder", tmp_path, True).images
    assert len(images) == 119
    assert "not kept" in capsys.readouterr().err


def test_images_are_decoded_where_a_server_starts_the_processes_of_python(tmp_path):
    """The default from Python 3.14 on: the workers' parent would be the server, with which they
    would end at once.
    """
    write_many(tmp_path / "train", 10)
    code = """import multiprocessing, sys, data
from images import cache as image_cache
if __name__ == "__main__":
    multiprocessing.set_start_method("forkserver")
    image_cache.MANY = 4
    print(data.load_images("folder", sys.argv[1], True).images[:, 0, 0, 0].tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"{list(range(10))}\n"), done.stderr


def test_another_process_than_the_main_one_decodes_into_memory(tmp_path, monkeypatch, cache):
    """Unless it finds the cache: several processes would write the same file."""
    monkeypatch.setattr(image_cache, "MANY", 4)
    write_many(tmp_path / "train", 10)
    before = set(cache.iterdir())
    monkeypatch.setattr(distributed, "RANK", 1)
    assert data.load_images("folder", tmp_path, True).images[:, 0, 0, 0].tolist() == list(range(10))
    assert set(cache.iterdir()) == before
    monkeypatch.undo()


def test_an_image_with_odd_exif_does_no_harm(tmp_path):
    """Pillow writes the EXIF again when it turns an image, and raises nearly anything on tags of
    the wrong type.
    """
    write_many(tmp_path / "train", 100)
    description = struct.pack(
        ">HHII", 0x010E, 5, 1, 38
    )  # as a fraction, at byte 38, where a text belongs
    orientation = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
    exif = (
        b"Exif\0\0MM"
        + struct.pack(">HIH", 42, 8, 2)
        + description
        + orientation
        + struct.pack(">III", 0, 1, 2)
    )
    write(tmp_path / "train" / "b" / "999.jpg", np.zeros((8, 8, 3)), exif=exif)
    images, labels, _, _ = data.load_images("folder", tmp_path, True)
    assert len(images) == len(labels) >= 100


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
    monkeypatch.setattr(
        dataset_class,
        "tgz_md5",
        hashlib.md5((root / dataset_class.filename).read_bytes()).hexdigest(),
    )
    monkeypatch.setattr(
        dataset_class, "train_list", [[name, md5[name]] for name in batches if "test" not in name]
    )
    monkeypatch.setattr(
        dataset_class, "test_list", [[name, md5[name]] for name in batches if "test" in name]
    )
    (name,) = meta
    monkeypatch.setattr(dataset_class, "meta", dataset_class.meta | {"md5": md5[name]})


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(name, tmp_path, monkeypatch, offline):
    dataset_class = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    with pytest.raises(UsageError) as caught:
        data.load_images(name, tmp_path / "none", True)
    for part in (dataset_class.filename, str(tmp_path / "none"), "textures", "folder"):
        assert part in str(caught.value)

    random = np.random.default_rng(0)
    n_classes = int(name.removeprefix("cifar"))
    key, names_key = (
        ("labels", "label_names") if n_classes == 10 else ("fine_labels", "fine_label_names")
    )
    file_names = (
        [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
        if n_classes == 10
        else ["train", "test"]
    )
    batches = {
        file_name: {
            "data": random.integers(0, 256, (20, 3072), dtype=np.uint8),
            key: random.integers(0, n_classes, 20).tolist(),
            "coarse_labels": [0] * 20,
        }
        for file_name in file_names
    }
    class_names = [f"class {i}" for i in range(n_classes)]
    meta = {dataset_class.meta["filename"]: {names_key: class_names, "coarse_label_names": ["x"]}}
    pack_cifar(monkeypatch, dataset_class, tmp_path / "data", batches, meta)
    for train, parts in [(True, file_names[:-1]), (False, file_names[-1:])]:
        images, labels, names, _ = data.load_images(name, tmp_path / "data", train)
        expected = np.concatenate(
            [batches[part]["data"] for part in parts]
        )  # rows of red, then of green, of blue
        assert images.dtype == torch.uint8
        assert images.shape == (len(expected), 3, 32, 32)
        assert np.array_equal(images.flatten(1), expected)
        assert labels.tolist() == [label for part in parts for label in batches[part][key]]
        assert labels.dtype == torch.int64
        assert names == class_names

    archive, folder = (
        tmp_path / "data" / part for part in (dataset_class.filename, dataset_class.base_folder)
    )
    for path in (folder / file_names[0], archive):
        path.write_bytes(path.read_bytes()[:-10])
        if path == archive:
            shutil.rmtree(folder)
            with pytest.raises(UsageError, match=re.escape(dataset_class.filename)):
                data.load_images(name, tmp_path / "data", True)
        else:  # unpacked again
            assert len(data.load_images(name, tmp_path / "data", True).images) == 20 * len(
                file_names[:-1]
            )


def labelled(tmp_path, text, encoding="utf-8"):
    """Write a.png, b.png and a CSV file of labels; return what load_images makes of them."""
    for name, value in (("a.png", 1), ("b.png", 2)):
        write(tmp_path / "images" / name, np.full((16, 16, 3), value))
    (tmp_path / "labels.csv").write_text(text, encoding=encoding)
    return data.load_images("folder", tmp_path / "images", True, 16, tmp_path / "labels.csv")


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("a.png,x\nb.png,y\n", "utf-8-sig"),
        ("filename,class\na.png,x\nb.png,y\n", "utf-8"),
        ("path,label\na.png,x\nb.png,y\n", "utf-8-sig"),
        ("a.png,x\nb.png,y\na.png,x\n", "utf-8"),
    ],
)
def test_labels_with_a_byte_order_mark_a_header_or_the_same_line_twice(
    tmp_path, text, encoding, capsys
):
    _, labels, class_names, _ = labelled(tmp_path, text, encoding)
    assert (labels.tolist(), class_names) == ([0, 1], ["x", "y"])
    assert capsys.readouterr().err == ""


def test_labels_that_contradict_each_other_or_are_of_no_image(tmp_path, capsys):
    with pytest.raises(UsageError, match=r"row 3 gives a\.png the label 'y', an earlier one 'x'"):
        labelled(tmp_path, "a.png,x\nb.png,y\na.png,y\n")
    assert labelled(tmp_path, "a.png,x\nb.png,y\nc.png,z\n").class_names == ["x", "y"]
    assert "left out 1 lines of images that are not in" in capsys.readouterr().err


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
            data.load_images("folder", tmp_path, True, 16)
    os.rename(tmp_path / "train" / "b", tmp_path / "train" / os.fsdecode(b"b\xe9"))
    with pytest.raises(UsageError, match="is not UTF-8"):
        data.load_images("folder", tmp_path, True, 16)


def test_an_eps_is_no_image_and_starts_no_program(tmp_path, monkeypatch):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "eps.png").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    )
    shutil.copy(tmp_path / "eps.png", tmp_path / "eps.tif")
    for name in ("eps.png", "eps.tif"):
        with pytest.raises(image_cache.UnreadableImage, match=name):
            image_cache.read_image(tmp_path / name, 16)
    assert not (tmp_path / "started").exists()


def test_without_a_home_the_cache_is_a_temporary_folder(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(
        os.path, "expanduser", lambda path: path
    )  # as for a user that the system does not know
    assert image_cache.cache_path("name", "folder").is_absolute()


def test_textures():
    train, test = (data.load_images("textures", "not used", train) for train in (True, False))
    for split, n in [(train, 4000), (test, 1000)]:
        assert split.images.shape == (n, 3, 32, 32)
        assert split.images.dtype == torch.uint8
        assert split.labels.bincount().tolist() == [n / 10] * 10
        means = split.images.float().mean((2, 3))
        assert (means.amax(1) - means.amin(1)).max() <= 0.12 * 255 + 1  # near-grey
    assert len(set(train.class_names)) == 10
    assert all(map(torch.equal, train[:2], data.load_images("textures", "", True)[:2]))
    assert (
        len({image.numpy().tobytes() for split in (train, test) for image in split.images}) == 5000
    )
    # The nearest class mean tells classes apart by single pixels alone: chance is 0.1.
    x, y = train.images.flatten(1) / 255, test.images.flatten(1) / 255
    centres = torch.stack([x[train.labels == label].mean(0) for label in range(10)])
    accuracy = (torch.cdist(y, centres).argmin(1) == test.labels).float().mean()
    assert accuracy < 0.2


def test_balanced_subset():
    random = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 4)[torch.randperm(84, generator=random)]

    def subset(n, seed=0, labels=labels):
        return data.balanced_subset(labels, 84, n, generator(seed, "t"))

    for n, counts in [
        (1, [1]),
        (10, [4, 3, 3]),
        (12, [4, 4, 4]),
        (40, [18, 18, 4]),
        (70, [36, 30, 4]),
        (84, [50, 30, 4]),
    ]:
        chosen = subset(n)
        assert chosen.tolist() == sorted(set(chosen.tolist()))
        assert len(chosen) == n
        assert chosen.min() >= 0
        assert chosen.max() < 84
        found = labels[chosen].bincount(minlength=3).tolist()
        assert sorted(found, reverse=True)[: len(counts)] == counts, n
    assert torch.equal(subset(40), subset(40))
    assert not torch.equal(subset(40), subset(40, seed=1))
    unlabelled = subset(20, labels=None)
    assert unlabelled.tolist() == sorted(set(unlabelled.tolist()))
    assert len(unlabelled) == 20
    assert subset(84, labels=None).tolist() == list(range(84))
    assert subset(85).tolist() == list(range(84))
