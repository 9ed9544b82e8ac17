"""The linear probe with few labels, from stored embeddings."""

import re

import torch
from helpers import edit, fingerprints, refused, run
from torch import nn

from experiment import Run
from infra import files
from tools.probe import fit_few


def lines(exp_dir, *fractions):
    """Return {number of labels: (mean top-1, the rest of its line)} of the command."""
    result = run("probe", "--exp_dir", exp_dir, "--device", "cpu", "--label_fractions", *fractions)
    assert result.code == 0, result.err
    matches = re.findall(r"^ *([\d,]+) labels  top-1 ([\d.]+)%(.*)$", result.out, re.M)
    return {int(n): (float(top1), rest) for n, top1, rest in matches}


def test_all_labels_give_the_accuracy_of_the_run_and_nothing_is_written(finished):
    before = fingerprints(finished)
    result = files.read_json(finished / "linear_accuracy.json")
    balanced = f"  balanced {result['balanced_top1']:.2f}%"
    assert lines(finished, 1.0) == {24: (result["top1"], balanced)}
    assert lines(finished, 0.25, 0.5).keys() == {6, 12}
    default = run("probe", "--exp_dir", finished).out
    assert re.findall(r"(\d+) labels", default) == ["2", "24"]  # 1% are none
    assert fingerprints(finished) == before


def test_few_labels_are_those_of_each_class_and_the_layer_sees_no_others(copy):
    """Classes that one dimension tells apart.

    With the labels of training exchanged the predictions are wrong.
    """
    for split, n in (("train", 24), ("test", 10)):
        path = copy / "artifacts" / f"{split}.pt"
        content = files.read_pt(path)
        noise = torch.randn(n, 8, generator=torch.manual_seed(n))
        content["embeddings"] = noise + 4 * nn.functional.one_hot(content["labels"], 8)
        files.write_pt(path, content)
    ((top1, rest),) = lines(copy, 0.25).values()
    words = r"  ([\d.]+) to ([\d.]+), by the choice of images  balanced [\d.]+%"
    low, high = re.fullmatch(words, rest).groups()
    assert float(low) <= top1 <= float(high)
    assert top1 > 60
    content = files.read_pt(copy / "artifacts" / "train.pt")
    files.write_pt(copy / "artifacts" / "train.pt", {**content, "labels": 1 - content["labels"]})
    ((top1, _),) = lines(copy, 0.25).values()
    assert top1 < 40


def test_the_classes_are_those_with_names(finished):
    """Class 2 has no training image, class 3 has none at all."""
    train = {"embeddings": torch.eye(4)[[0, 0, 1, 1]], "labels": torch.tensor([0, 0, 1, 1])}
    test = {"embeddings": torch.eye(4)[[0, 1, 2]], "labels": torch.tensor([0, 1, 2])}
    exp = Run(finished).load("cpu")
    exp.checkpoint["data"] = {"class_names": list("abcd")}
    result = fit_few(exp, {"train": train, "test": test}, torch.arange(4), n_epochs=10)
    assert torch.tensor(result["confusion"]).shape == (4, 4)
    assert result["top1"] < 67


def test_fewer_images_than_classes(copy):
    path = copy / "artifacts" / "train.pt"
    content = files.read_pt(path)
    files.write_pt(
        path, {**content, **{name: content[name][:1] for name in ("embeddings", "labels")}}
    )
    for fractions in ([], ["--label_fractions", "1"]):
        result = run("probe", "--exp_dir", copy, *fractions)
        refused(result, 2, "of 1 images is 1, fewer than the 2 classes: use a run with more")


def test_wrong_use(copy, tmp_path):
    refused(run("probe", "--exp_dir", tmp_path), 2, "not a run folder")
    few = run("probe", "--exp_dir", copy, "--label_fractions", "1", "0.01")
    refused(few, 2, "label_fraction 0.01 of 24 images is 0, fewer than the 2 classes: raise it")
    assert few.out == ""  # refused before the first is fitted
    many = run("probe", "--exp_dir", copy, "--label_fractions", "2")
    refused(many, 2, "label_fractions: must be a number above 0 to 1")
    edit(copy, emb_pool="proj")
    edited = run("probe", "--exp_dir", copy)
    refused(edited, 2, "not finished, or was edited since: resume it first")
