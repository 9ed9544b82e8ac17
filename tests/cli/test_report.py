"""The page of a run: what it shows, and what it leaves out."""

import os
import re
import shutil
import statistics
import subprocess
import sys
from html.parser import HTMLParser

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
from data import ImageSet
from evaluate import confusion_matrix
from infra import files
from tools.report import gallery
from tools.report.figures import map_figure
from tools.report.page import accuracy_rows


class Page(HTMLParser):
    """The text, pictures and unclosed elements of a page."""

    def __init__(self, text):
        super().__init__()
        self.text = ""
        self.images = []
        self.open = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.images.append(dict(attributes))
        elif tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if text.strip():
            self.text += " ".join(text.split()) + "\n"  # as a browser shows it


def page_of(exp_dir):
    """Write the report of a run; return its Page, and the result of the command."""
    result = run("report", "--exp_dir", exp_dir)
    assert result.code == 0, result.err
    text = (exp_dir / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert len(text) < 3e6
    assert all(image["alt"] and image["src"].startswith("data:image/") for image in page.images)
    # It needs nothing of the network: these names are of namespaces in the SVG.
    namespaces = r"www\.w3\.org|purl\.org|creativecommons\.org|matplotlib\.org"
    assert not re.search(rf"https?://(?!{namespaces})", text)
    return page, result


def alts(page):
    """Return the alternative texts of all pictures as one text."""
    return " ".join(image["alt"] for image in page.images)


def test_a_finished_run(copy):
    content = files.read_pt(copy / "artifacts" / "test.pt")
    assert content["copies"]["pairs"].shape == (0, 2)
    content["copies"]["pairs"] = torch.tensor([[3, 20]])
    files.write_pt(copy / "artifacts" / "test.pt", content)
    before = fingerprints(copy)
    page, result = page_of(copy)
    assert changed_files(copy, before) == {"report.html"}
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
        "Map of the embeddings",
        "Confusions",
        "Nearest neighbours",
        "Leaks",
        "Overview of the training images",
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
    assert "always the largest class\n50.00%" in page.text
    assert "a linear layer on the pixels (16 x 16) of 24 training images" in page.text
    for text in (page.text, result.out):
        assert "main.py train --dataset folder" in text
        assert torch.__version__ in text
    assert "1 of 10 test images are copies of training images" in page.text
    assert "\ntest/across/3.png, train/down/6.png\n" in page.text
    assert "test/across/3.png train/down/6.png" in alts(page)
    assert sum("neighbour: " in image["alt"] for image in page.images) == 10 * 8


def test_neighbours_are_the_nearest_training_images(copy):
    """Against a search by hand: the classes of the eight greatest cosines."""
    content = files.read_pt(copy / "artifacts" / "train.pt")
    rng = torch.Generator().manual_seed(0)
    content["embeddings"] = torch.rand(24, 8, generator=rng)  # of whatever class
    files.write_pt(copy / "artifacts" / "train.pt", content)
    page, _ = page_of(copy)
    train, test = (files.read_pt(copy / "artifacts" / f"{split}.pt") for split in ("train", "test"))
    thumbs = [
        image
        for image in page.images
        if "thumb" in image.get("class", "") and "taken for" not in image["alt"]
    ]
    names = ["across", "down"]
    for i, (x, y) in enumerate(zip(test["embeddings"], test["labels"].tolist(), strict=True)):
        query, *neighbours = thumbs[9 * i : 9 * i + 9]
        cosine = torch.stack([F.cosine_similarity(x, other, 0) for other in train["embeddings"]])
        nearest = cosine.argsort(descending=True)[:8]
        labels = train["labels"][nearest].tolist()
        assert query["alt"] == names[y]
        assert [image["alt"] for image in neighbours] == [f"neighbour: {names[j]}" for j in labels]
        marks = ["right" if j == y else "wrong" for j in labels]
        assert [image["class"].split()[1] for image in neighbours] == marks


def test_a_map_of_equal_embeddings():
    """Those of a collapsed encoder."""
    assert map_figure(torch.ones(10, 16), torch.arange(10) % 2, ["a", "b"])


def test_images_without_a_label_are_grey_on_the_map_and_neither_right_nor_wrong():
    x = torch.randn(10, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(10) % 3 - 1
    (ax,) = map_figure(x, labels, ["a", "b"]).axes
    points = {dots.get_label(): len(dots.get_offsets()) for dots in ax.collections}
    assert points == {"no label": 4, "a": 3, "b": 3}
    image_set = ImageSet(pictures(3), torch.tensor([-1, 0, 1]), ["a", "b"])
    thumbs = [gallery.neighbour_thumb(image_set, i, 0.5, "b") for i in torch.arange(3)]
    assert [thumb.mark for thumb in thumbs] == ["", "wrong", "right"]
    assert thumbs[0].alt == "neighbour: no label"


def test_confusions():
    truth = torch.tensor([0, 0, 1, 1, 2, 2, 2])
    predicted = torch.tensor([0, 1, 1, 1, 0, 0, 2])
    matrix = confusion_matrix(truth, predicted, 3)
    assert matrix.tolist() == [[1, 1, 0], [0, 2, 0], [2, 0, 1]]
    pairs = gallery.confused_pairs(matrix, truth, predicted, ["a", "b", "c"], None)
    assert [pair["text"] for pair in pairs] == ["c, taken for a: 2 of 3", "a, taken for b: 1 of 2"]


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
    options = ["--data_dir", root, *"--n_epochs 0 --emb_pool backbone --test_patches 16".split()]
    options += ["--log_folder", tmp_path]
    for _ in range(2):
        result = run(*tiny, *options)
        line = "leaks            2 of 9 test images are copies of training images, or nearly so; 1 "
        assert result.code == 0 and line + "with equal pixels\n" in result.out
        monkeypatch.setattr(main, "find_copies", None)  # found once
    encoded = {
        split: files.read_pt(tmp_path / RUN / "artifacts" / f"{split}.pt")
        for split in ("train", "test")
    }
    shown = gallery.leaks(encoded, {"train": None, "test": None})["pairs"]
    assert [pair["titles"] for pair in shown] == [
        ["test/a/00.png", "train/b/05.png"],
        ["test/b/03.bmp", "train/a/07.png"],
    ]


def test_images_are_shown_only_if_they_are_those_of_the_run(copy, images, tmp_path):
    """Without a checkpoint nobody knows, and with it others are refused."""
    other = shutil.copytree(images, tmp_path / "other")
    (other / "test" / "down" / "0.png").unlink()
    edit(copy, data_dir=other)
    page, _ = page_of(copy)
    assert "are not those that this run was trained on" in page.text
    edit(copy, data_dir=images)
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


def test_duplicates_and_outliers_are_those_of_all_pairs():
    """In blocks of two sizes, against a loop over all pairs; a copy and a near copy come first."""
    x = F.normalize(torch.randn(1203, 6, generator=torch.manual_seed(0)), dim=1)
    x[1100] = x[3]
    x[7] = F.normalize(x[1050] + 0.01, dim=0)
    cosine = (x @ x.T).fill_diagonal_(-2)
    torch.testing.assert_close(gallery.nearest_cosine(x), cosine.max(1).values)
    i, j = (cosine.triu(1) > 0.98).nonzero().T.tolist()
    expected = sorted(zip(cosine[i, j].tolist(), i, j, strict=True), reverse=True)
    pairs, n_pairs = gallery.near_duplicates(x)
    assert n_pairs == len(expected) > 12
    assert [pair[1:] for pair in pairs] == [pair[1:] for pair in expected[:12]]
    assert pairs[0][1:] == (3, 1100)
    assert gallery.near_duplicates(torch.eye(3)) == ([], 0)


def test_clusters_are_those_that_the_data_have():
    centres = torch.eye(3).repeat_interleave(torch.tensor([30, 20, 10]), 0)
    x = F.normalize(centres + 0.1 * torch.randn(60, 3, generator=torch.manual_seed(0)), dim=1)
    clusters = gallery.clusters_of(x, 3)
    rows = list(range(60))
    assert [sorted(cluster) for cluster in clusters] == [rows[:30], rows[30:50], rows[50:]]
    first = x[clusters[0]] - x[:30].mean(0)
    assert torch.equal(first.norm(dim=1).argsort(), torch.arange(30))
    assert [len(rows) for rows in gallery.clusters_of(torch.ones(5, 3), 10)] == [5]


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
