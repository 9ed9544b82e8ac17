"""The page of a run: what it shows, and what it leaves out."""

import csv
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ROOT,
    RUN,
    changed_files,
    edit,
    fingerprints,
    pictures,
    refused,
    run,
    write_images,
)
from PIL import Image

import main
from evaluate import confusion_matrix
from images import copies
from infra import files
from infra.components import principal_axes
from tools.report import explore, gallery, page
from tools.report.collection import Collection
from tools.report.figures import map_of, tsne
from tools.report.page import accuracy_rows


class Page(HTMLParser):
    """The text, pictures, links, ids and unclosed elements of a page."""

    def __init__(self, text):
        super().__init__()
        self.text = ""
        self.images = []
        self.links = []
        self.ids = []
        self.boxes = set()  # what images are that are gone
        self.labels = []  # of what a screen reader is told
        self.open = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "a" and "href" in attributes:
            self.links.append(attributes["href"])
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if "gone" in attributes.get("class", ""):
            self.boxes.add(attributes["title"].removeprefix("neighbour: "))
        self.labels.append(attributes.get("aria-label", ""))
        if tag == "img":
            self.images.append(attributes)
        elif tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if text.strip():
            self.text += " ".join(text.split()) + "\n"  # as a browser shows it


def page_of(exp_dir, *options):
    """Write the report of a run; return its Page, and the result of the command."""
    result = run("report", "--exp_dir", exp_dir, *options)
    assert result.code == 0, result.err
    text = (exp_dir / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert len(text) < 3e6
    assert all(image["alt"] and image["src"].startswith("data:image/") for image in page.images)
    assert len(page.ids) == len(set(page.ids))
    for link in page.links:
        parts = urlsplit(link)
        if parts.path:
            assert not parts.scheme and (exp_dir / unquote(parts.path)).is_file(), link
        if parts.fragment:
            assert parts.fragment in page.ids, link
    # It needs nothing of the network: these names are of namespaces in the SVG.
    namespaces = r"www\.w3\.org|purl\.org|creativecommons\.org|matplotlib\.org"
    assert not re.search(rf"https?://(?!{namespaces})", text)
    return page, result


def alts(page):
    """Return the alternative texts of all pictures as one text."""
    return " ".join([*(image["alt"] for image in page.images), *page.labels])


def rows_of(path):
    """Return the rows of a CSV file as dicts."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_finished_run(copy):
    content = files.read_pt(copy / "artifacts" / "test.pt")
    assert content["copies"]["pairs"].shape == (0, 2)
    content["copies"]["pairs"] = torch.tensor([[3, 20]])
    files.write_pt(copy / "artifacts" / "test.pt", content)
    before = fingerprints(copy)
    page, result = page_of(copy)
    lists = {"clusters.csv", "duplicates.csv", "lonely.csv", "doubtful.csv"}
    assert changed_files(copy, before) == {"report.html", *lists}
    accuracy = files.read_json(copy / "linear_accuracy.json")
    assert f"{accuracy['top1']:.2f}%" in page.text
    assert "top-5" not in page.text  # of two classes
    assert f"{accuracy['knn_top1']:.2f}%" in page.text
    # The interval of Wilson, the roots q of (p - q)^2 = z^2 q (1 - q) / n.
    p = accuracy["top1"] / 100
    n = accuracy["n_test"]
    z2 = 1.959964**2
    low, high = np.sort(np.roots([1 + z2 / n, -2 * p - z2 / n, p * p]).real)
    assert f"{100 * low:.2f}% to {100 * high:.2f}%" in page.text
    titles = [
        "Curves",
        "Patches",
        "Classes",
        "Map of the embeddings",
        "Confusions",
        "Nearest neighbours",
        "Leaks",
        "Overview of the images",
        "Seconds per stage",
        "Settings",
        "Environment",
    ]
    assert [line for line in page.text.splitlines() if line in titles] == titles
    for words in (
        "invariance loss",
        "linear probe, %",
        "t-SNE",
        "confusion matrix",
        "seconds per stage: training",
        "a row each",
        "accuracy of each class, in percent: across",
    ):
        assert words in alts(page)
    collapse = files.read_pt(copy / "artifacts" / "train.pt")["collapse"]
    text = f"Effective rank {collapse['rank']:.1f}, alignment {collapse['alignment']:.3f}"
    assert text in page.text and "of 24 training images. A rank below 5" in page.text
    assert "rises at first" in page.text
    assert "always the largest class\n50.00%" in page.text
    assert "a linear layer on the pixels (16 x 16) of 24 training images" in page.text
    for text in (page.text, result.out):
        assert "main.py train --dataset folder" in text
        assert torch.__version__ in text
    assert "1 of 10 test images are copies of training images" in page.text
    assert "\ntest/across/3.png, train/down/6.png\n" in page.text
    assert "test/across/3.png, across train/down/6.png, down" in alts(page)
    assert sum("neighbour: " in image["alt"] for image in page.images) == 10 * 8


def test_neighbours_are_the_nearest_training_images(copy):
    """Against a search by hand: the classes of the eight greatest cosines."""
    content = files.read_pt(copy / "artifacts" / "train.pt")
    rng = torch.Generator().manual_seed(0)
    content["embeddings"] = torch.rand(24, 8, generator=rng)  # of whatever class
    files.write_pt(copy / "artifacts" / "train.pt", content)
    page, _ = page_of(copy)
    train, test = (files.read_pt(copy / "artifacts" / f"{split}.pt") for split in ("train", "test"))
    thumbs = [image for image in page.images if "thumb" in image.get("class", "")]
    first = [image["alt"].startswith("neighbour: ") for image in thumbs].index(True) - 1
    thumbs = thumbs[first:]
    names = ["across", "down"]
    for i, (x, y) in enumerate(zip(test["embeddings"], test["labels"].tolist(), strict=True)):
        query, *neighbours = thumbs[9 * i : 9 * i + 9]
        cosine = torch.stack([F.cosine_similarity(x, other, 0) for other in train["embeddings"]])
        nearest = cosine.argsort(descending=True)[:8]
        labels = train["labels"][nearest].tolist()
        assert query["alt"] == f"{test['paths'][i]}, {names[y]}"
        expected = [
            f"neighbour: {train['paths'][row]}, {names[train['labels'][row]]}" for row in nearest
        ]
        assert [image["alt"] for image in neighbours] == expected
        marks = ["right" if j == y else "wrong" for j in labels]
        assert [image["class"].split()[1] for image in neighbours] == marks


def test_a_map_of_equal_embeddings():
    """Those of a collapsed encoder."""
    assert tsne(torch.ones(10, 16)).shape == (10, 2)


def test_images_without_a_label_are_grey_on_the_map_and_neither_right_nor_wrong():
    x = torch.randn(10, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(10) % 3 - 1
    collection = collection_of(pictures(10), x, labels=labels, class_names=["a", "b"])
    dots = map_of(collection, torch.arange(10))["dots"]
    assert Counter(dot["colour"] == "gray" for dot in dots) == {True: 4, False: 6}
    thumbs = [gallery.neighbour_thumb(collection, row, 0.5, "b") for row in range(3)]
    assert [thumb.mark for thumb in thumbs] == ["", "wrong", "right"]
    assert thumbs[0].alt == "neighbour: 0.png"


def test_confusions():
    truth = torch.tensor([0, 0, 1, 1, 2, 2, 2])
    predicted = torch.tensor([0, 1, 1, 1, 0, 0, 2])
    matrix = confusion_matrix(truth, predicted, 3)
    assert matrix.tolist() == [[1, 1, 0], [0, 2, 0], [2, 0, 1]]
    pairs = gallery.confused_pairs(matrix, truth, predicted, ["a", "b", "c"])
    assert [text for text, _ in pairs] == ["c, taken for a: 2 of 3", "a, taken for b: 1 of 2"]


def test_results_of_other_settings_are_not_shown(copy):
    edit(copy, n_eval_epochs=5)
    page, _ = page_of(copy)
    assert "edited since it finished (n_eval_epochs)" in page.text
    assert "top-1" not in page.text
    assert "confusion" not in alts(page)
    assert "Curves" in page.text
    assert "Settings" in page.text


def test_a_run_without_its_images(copy, tmp_path):
    edit(copy, data_dir=tmp_path / "gone")
    page, result = page_of(copy)
    assert str(tmp_path / "gone") in page.text
    assert "no pictures of images" in result.err
    assert "Confusions" in page.text
    assert "neighbour" not in alts(page)


def pairs_of(encoded):
    """Return the rows of the test images that are copies, and of what they copy."""
    return encoded["test"]["copies"]["pairs"].tolist()


def test_copies_of_training_images_among_the_test_images_are_counted(tiny, tmp_path, monkeypatch):
    """Equal ones, and one of other light. A finished run prints them again."""
    root = tmp_path / "data"
    for split, n, seed in (("train", 10, 1), ("test", 4, 2)):
        for k, name in enumerate(("a", "b")):
            (root / split / name).mkdir(parents=True)
            for i, pixels in enumerate(pictures(n, 16, 16, seed=2 * seed + k)):
                Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(
                    root / split / name / f"{i:02}.png"
                )
    shutil.copy(root / "train" / "b" / "05.png", root / "test" / "a" / "00.png")
    with Image.open(root / "train" / "a" / "07.png") as original:
        darker = original.point(lambda value: int(0.97 * value))
    darker.save(root / "test" / "b" / "03.bmp")
    # To an untrained resnet10-tiny the darker image is not like its original.
    options = "--arch resnet18-tiny --n_epochs 0 --emb_pool backbone --test_patches 16".split()
    options += ["--data_dir", root, "--log_folder", tmp_path]
    for _ in range(2):
        result = run(*tiny, *options)
        line = "leaks            2 of 9 test images are copies of training images, or nearly so; 1 "
        assert result.code == 0 and line + "with equal pixels\n" in result.out
        monkeypatch.setattr(main, "find_copies", None)  # found once
    encoded = {
        split: files.read_pt(tmp_path / RUN / "artifacts" / f"{split}.pt")
        for split in ("train", "test")
    }
    paths = [
        (encoded["test"]["paths"][i], encoded["train"]["paths"][j]) for i, j in pairs_of(encoded)
    ]
    assert paths == [("test/a/00.png", "train/b/05.png"), ("test/b/03.bmp", "train/a/07.png")]
    page, _ = page_of(tmp_path / RUN)
    for pair in paths:
        assert f"\n{', '.join(pair)}\n" in page.text


def test_images_that_are_still_there_are_shown_by_their_paths(copy, images, tmp_path):
    """After one was removed, one added and one changed. The lists are of all images of the run."""
    other = shutil.copytree(images, tmp_path / "other")
    (other / "test" / "down" / "0.png").unlink()
    (other / "train" / "across" / "3.png").unlink()
    (other / "train" / "across" / "3.png").symlink_to("4.png")
    Image.new("RGB", (16, 16)).save(other / "train" / "across" / "00 new.png")
    before, _ = page_of(copy)
    rows = rows_of(copy / "clusters.csv")
    edit(copy, data_dir=other)
    page, result = page_of(copy, "--n_shown", "40")
    assert "changed since the run: 1 of its 34 are gone" in result.err
    assert "changed since the run: 1 of its 34 are gone" in page.text
    assert rows_of(copy / "clusters.csv") == rows
    assert len(rows) == len(rows_of(copy / "lonely.csv")) == 34
    assert {
        row["path"] for row in rows_of(copy / "duplicates.csv") if row["kind"] == "same file"
    } == {
        "train/across/3.png",
        "train/across/4.png",
    }
    # All others have the pictures that they had, and this one is an empty box with its path.
    assert page.boxes == {"test/down/0.png, down"}
    sources = {image["alt"]: image["src"] for image in before.images}
    changed = "train/across/3.png, across"
    common = {image["alt"] for image in page.images} & set(sources) - {changed}
    common = {alt for alt in common if re.match("(train|test)/", alt)}
    assert len(common) > 20
    assert all(
        sources[image["alt"]] == image["src"] for image in page.images if image["alt"] in common
    )


def test_without_a_checkpoint_nobody_knows_which_images_are_those_of_the_run(copy):
    shutil.rmtree(copy / "checkpoints")
    page, _ = page_of(copy)
    assert "no checkpoint that can be read" in page.text
    assert "neighbour" not in alts(page)


@pytest.mark.parametrize(
    "name", ["artifacts/test.pt", "probe.pt", "linear_accuracy.json", "metrics.jsonl"]
)
@pytest.mark.parametrize("fault", ["damaged", "of another run"])
def test_what_is_damaged_or_of_another_run_is_named_and_not_shown(
    copy, of_other_images, name, fault
):
    if fault == "damaged":
        (copy / name).write_bytes((copy / name).read_bytes()[:-50])
    else:
        shutil.copy(of_other_images / name, copy / name)
    page, result = page_of(copy)
    assert name in page.text + result.out + result.err
    assert "confusion" not in alts(page)
    assert "t-SNE" not in alts(page)
    assert ("linear probe, %" in alts(page)) == (name != "metrics.jsonl")
    assert ("95% interval" in page.text) == (name != "linear_accuracy.json")


@pytest.fixture(scope="module")
def of_other_images(tiny, tmp_path_factory):
    """A run with the settings of the others, of other images."""
    root = tmp_path_factory.mktemp("other")
    for seed, (split, n) in enumerate((("train", 12), ("test", 5))):
        for name in ("across", "down"):
            write_images(root / "images" / split / name, n, 20 + 2 * seed + len(name))
    assert run(*tiny, "--data_dir", root / "images", "--log_folder", root / "logs").code == 0
    (exp_dir,) = (root / "logs").iterdir()
    return exp_dir


def test_one_test_image_and_a_class_with_dollar_signs(tiny, images, tmp_path):
    folder = shutil.copytree(images, tmp_path / "images")
    for split in ("train", "test"):
        os.rename(folder / split / "down", folder / split / "$_$")
    for path in list((folder / "test").rglob("*.png"))[1:]:
        path.unlink()
    assert run(*tiny, "--data_dir", folder, "--log_folder", tmp_path / "logs").code == 0
    page, _ = page_of(next((tmp_path / "logs").iterdir()))
    assert "confusion" in alts(page)


def test_two_reports_at_once(copy):
    """The second begins and ends while the first writes. It is given the backend of a notebook."""
    environment = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    atomic_write = files.atomic_write(copy / "report.html")
    with atomic_write as file:
        file.write(b"first")
        command = [sys.executable, "main.py", "report", "--exp_dir", copy]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
    assert (copy / "report.html").read_text() == "first"


def test_images_without_labels_and_a_name_that_is_html(tiny, tmp_path):
    heap = tmp_path / "heap"
    write_images(heap, 6, 1)
    name = "<b>&me"
    options = ["--data_dir", heap, "--exp_name", name, "--log_folder", tmp_path / "logs"]
    assert run(*tiny, *options).code == 0
    (exp_dir,) = (tmp_path / "logs").iterdir()
    page, _ = page_of(exp_dir)
    assert exp_dir.name.startswith(name)
    assert name in page.text
    assert "no labels" in page.text
    assert "Confusions" not in page.text
    thumbs = [image["src"] for image in page.images if "thumb" in image.get("class", "")]
    lines = [thumbs[6 * i : 6 * i + 6] for i in range(6)]
    assert all(len(set(line)) == 6 for line in lines)  # itself and the five others
    assert "Effective rank" in page.text
    assert "Images that resemble no other" in page.text
    # Each image is in its cluster, and among the six of the last list.
    first = sorted(path.name for path in heap.iterdir())[0]
    assert sum(image["alt"] == first for image in page.images) >= 2


def test_principal_axes_hold_as_much_as_the_exact_ones():
    """The global generator is left alone."""
    random = torch.manual_seed(0)
    x = torch.randn(300, 900, generator=random) * torch.arange(1, 901) ** -0.5
    x -= x.mean(0)
    before = torch.get_rng_state()
    axes = principal_axes(x, 20)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(axes.T @ axes, torch.eye(20))
    exact = torch.linalg.svd(x, full_matrices=False).Vh[:20].T
    assert (x @ axes).norm() > 0.99 * (x @ exact).norm()
    assert principal_axes(x[:5], 20).shape == (900, 5)


@pytest.mark.parametrize("many", [10**8, 1000])
def test_the_nearest_others_are_those_of_all_pairs(monkeypatch, many):
    """With equal rows; compared in full, and by fewer components than there are dimensions."""
    monkeypatch.setattr(copies, "MANY_PAIRS", many)
    random = torch.manual_seed(0)
    x = 9 + torch.randn(1203, 10, generator=random) @ torch.randn(10, 200, generator=random)
    x[1100] = x[3]
    x = copies.centred(x, x.mean(0))
    cosine, rows = explore.nearest_others(x)
    expected = (x @ x.T).fill_diagonal_(-2).topk(5)
    torch.testing.assert_close(cosine, expected.values)
    assert rows[:, 0].tolist() == expected.indices[:, 0].tolist()
    assert cosine[3, 0] > 0.9999 and rows[3, 0] == 1100
    assert explore.nearest_others(x[:1])[0].shape == (1, 0)


def collection_of(pixels, x, folder=None, n_test=0, **changes):
    """Return a Collection of these images uint8 (N, 3, H, W) and embeddings (N, d)."""
    n = len(x) - n_test
    fields = {
        "embeddings": x,
        "labels": torch.full((len(x),), -1),
        "class_names": [],
        "names": [f"{i}.png" for i in range(len(x))],
        "splits": ["train"] * n + ["test"] * n_test,
        "images": {"train": pixels[:n], "test": pixels[n:]},
        "places": torch.cat([torch.arange(n), torch.arange(n_test)]),
        "folder": folder,
        "page": "/",
    }
    return Collection(**{**fields, **changes})


def test_duplicates_are_put_into_groups_by_their_kind(tmp_path):
    """Equal files, equal pixels, chains of similar images; not what is like by one of two only."""
    pixels = pictures(60, 16, 16, seed=3)
    x = torch.randn(60, 8, generator=torch.manual_seed(4))
    for i, j in ((5, 50), (6, 51), (51, 52), (7, 53)):
        pixels[j] = pixels[i]  # the same pixels
        x[j] = x[i]
    for i, j in ((8, 54), (54, 55), (52, 56)):  # similar
        pixels[j] = (0.97 * pixels[i].float()).byte()
        x[j] = x[i] + 1e-4
    pixels[57] = (0.97 * pixels[9].float()).byte()  # by its pixels alone
    x[58] = x[10]  # by its embedding alone
    for i in range(60):
        Image.fromarray(pixels[i].permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    (tmp_path / "53.png").write_bytes((tmp_path / "53.png").read_bytes() + b"and more")
    places = torch.cat([torch.arange(40), torch.arange(20)])
    places[59] = -1
    collection = collection_of(pixels, x, tmp_path, n_test=20, places=places)
    found, _ = explore.explore(collection, {}, 3)
    assert found["duplicates"] == [
        *[(row, 1, "same file") for row in (6, 51, 52)],
        (56, 1, "similar"),
        *[(row, 2, "same file") for row in (5, 50)],
        *[(row, 3, "same pixels") for row in (7, 53)],
        *[(row, 4, "similar") for row in (8, 54, 55)],
    ]
    cosine = F.cosine_similarity(x[:, None] - x.mean(0), x[None] - x.mean(0), dim=2)
    nearest = cosine.fill_diagonal_(-2).amax(1)
    assert [row for row, _ in found["lonely"]][:9] == nearest.argsort()[:9].tolist()
    assert found["lonely"][0][1] == pytest.approx(nearest.min().item(), abs=1e-5)
    explore.write_lists(found, collection, tmp_path)
    first = rows_of(tmp_path / "duplicates.csv")[0]
    assert first == {"path": "6.png", "group": "1", "kind": "same file"}
    shown = gallery.overview(found, collection, 3)["groups"]  # one of each kind
    assert [group["kinds"] for group in shown] == [
        "same file and similar",
        "same pixels",
        "similar",
    ]


def test_the_bound_is_exceeded_by_few_random_pairs_with_unlike_pixels():
    pixels = torch.cat([pictures(150, 16, 16), torch.zeros(50, 3, 16, 16, dtype=torch.uint8)])
    x = torch.randn(200, 4, generator=torch.manual_seed(0))
    x[100:] = x[0]  # of one colour, or with like pixels
    pixels[100:150] = pixels[0]
    x = F.normalize(x - x.mean(0), dim=1)
    bound = explore.bound_of(x, collection_of(pixels, x))
    unlike = [float(x[i] @ x[j]) for i in range(100) for j in range(i)]
    assert 0.999 * max(unlike) < bound <= max(unlike) + 1e-6


@pytest.mark.parametrize(
    ("d", "noise"), [(3, 0.1), (3 * copies.N_COMPONENTS, 0.02)], ids=["as-given", "by-components"]
)
def test_clusters_are_those_that_the_data_have(d, noise):
    centres = torch.eye(3, d).repeat_interleave(torch.tensor([300, 200, 100]), 0)
    x = F.normalize(centres + noise * torch.randn(600, d, generator=torch.manual_seed(0)), dim=1)
    clusters = explore.clusters_of(x, 3)
    for number, expected in enumerate((range(300), range(300, 500), range(500, 600)), 1):
        rows, cosines = zip(*[(row, c) for row, n, c in clusters if n == number], strict=True)
        assert sorted(rows) == list(expected)
        cosine = F.cosine_similarity(x[list(rows)], x[list(rows)].mean(0, keepdim=True))
        torch.testing.assert_close(torch.tensor(cosines), cosine)
        assert list(cosines) == sorted(cosines, reverse=True)
    equal = [(row, number) for row, number, _ in explore.clusters_of(torch.ones(5, 3), 10)]
    assert equal == [(row, 1) for row in range(5)]


def test_doubtful_labels_are_those_that_the_probe_contradicts():
    """An image without a label is not doubtful."""
    x = torch.tensor([[3.0, 0], [0, 1], [1, 0], [0, 2], [5, 0]])
    labels = torch.tensor([1, 0, 0, 1, -1])
    probe = {"weight": torch.eye(2), "bias": torch.zeros(2)}
    collection = collection_of(pictures(5), x, n_test=1, labels=labels, class_names=["a", "b"])
    first, second = (1 / (1 + np.exp(-margin)) for margin in (3, 1))
    assert explore.doubtful_labels(collection, probe) == [
        (0, "b", "a", pytest.approx(first), "train"),
        (1, "a", "b", pytest.approx(second), "train"),
    ]
    assert page.class_counts(collection) == [("a", 2, 0), ("b", 2, 0), ("without a label", 0, 1)]


def test_colour_histograms_are_those_of_numpy():
    images = pictures(3, 8, 8)
    for pixels, histogram in zip(images, page.colour_histograms(images), strict=True):
        counts, _ = np.histogramdd(pixels.flatten(1).T.numpy(), bins=4, range=[(0, 256)] * 3)
        np.testing.assert_allclose(histogram.numpy() ** 2, counts.flatten(), rtol=1e-5)


def test_the_untrained_encoder_is_as_good_as_a_run_that_is_not_trained(tiny, tmp_path):
    """By 20-NN of the same images: the baselines beside such a run."""
    result = run(*tiny, *"--n_epochs 0 --log_folder".split(), tmp_path)
    assert result.code == 0
    page, _ = page_of(tmp_path / RUN)
    lines = page.text.splitlines()
    assert lines[lines.index("20-NN of the same images by:") + 2] == "24 train, 10 test"
    of_run = lines[lines.index("this run") + 1]
    assert of_run == lines[lines.index("20-NN, top-1") + 1]
    assert of_run == lines[lines.index("the untrained encoder") + 1]
    assert "pixels" in lines and "colours: square roots of a histogram" in page.text


def test_options_names_and_links(tiny, tmp_path):
    """Odd names are links that work; as many clusters and images are shown as asked for."""
    heap = tmp_path / "a heap #1"
    write_images(heap, 9, 1)
    os.rename(heap / "0.png", heap / "a%20 #1 ?&\"'<b>.png")
    os.rename(heap / "1.png", heap / "a:b.png")
    options = ["--data_dir", heap, "--log_folder", tmp_path / "logs", "--emb_pool", "backbone"]
    assert run(*tiny, *options).code == 0
    exp_dir = tmp_path / "logs" / RUN
    page, _ = page_of(exp_dir, "--n_clusters", "3", "--n_shown", "2")
    assert {row["cluster"] for row in rows_of(exp_dir / "clusters.csv")} == {"1", "2", "3"}
    sizes = Counter(row["cluster"] for row in rows_of(exp_dir / "clusters.csv")).values()
    n_thumbs = sum("thumb" in image.get("class", "") for image in page.images)
    # Of neighbours, of each cluster, and lonely ones; there are no duplicates.
    assert n_thumbs == 9 * (1 + 8) + sum(min(2, n) for n in sizes) + 2
    loneliest = rows_of(exp_dir / "lonely.csv")[0]
    assert f"\n{float(loneliest['cosine']):.2f}\n{loneliest['path']}\n" in page.text
    linked = {unquote(link).rsplit("/")[-1] for link in page.links}
    assert {path.name for path in heap.iterdir()} <= linked
    assert "no label" not in alts(page)
    assert not (exp_dir / "doubtful.csv").exists()
    for option in ("--n_clusters", "--n_shown"):
        result = run("report", "--exp_dir", exp_dir, option, "0")
        refused(result, 2, option, "from 1")


def test_a_hundred_classes_and_an_older_result_without_accuracies_of_classes(tiny, tmp_path):
    images = tmp_path / "images"
    for i in range(100):
        write_images(images / "train" / f"class {i}", 2, i)
        write_images(images / "test" / f"class {i}", 1, i)
    options = ["--data_dir", images, "--n_epochs", "0", "--log_folder", tmp_path / "logs"]
    assert run(*tiny, *options).code == 0
    (exp_dir,) = (tmp_path / "logs").iterdir()
    result = files.read_sealed(exp_dir / "linear_accuracy.json")
    assert sum(result["confusion"][i][i] for i in range(100)) == pytest.approx(result["top1"])
    assert statistics.mean(result["per_class"].values()) == pytest.approx(result["top1"])
    page, _ = page_of(exp_dir)
    assert "Accuracy of each class" in page.text
    assert "class 99" in alts(page)
    assert "99: class 99" in page.text.splitlines()  # the key of the confusion matrix
    assert "top-5" in page.text  # of more than five classes
    assert "balanced, the mean over the classes" in page.text
    main.log_accuracies(result)
    for name in ("per_class", "confusion", "balanced_top1", "largest_class"):
        del result[name]
    main.log_accuracies(result)
    assert "balanced" not in str(accuracy_rows(result))


@pytest.mark.parametrize("module", ["matplotlib", "sklearn"])
def test_without_the_packages_it_names_them(finished, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    result = run("report", "--exp_dir", finished)
    refused(result, 2, "pip install matplotlib scikit-learn")
