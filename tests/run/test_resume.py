"""The stages of a run, and what resume does after hparams.yaml was edited."""

import csv
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import (
    ROOT,
    RUN,
    changed_files,
    contents,
    edit,
    fingerprints,
    refused,
    resume,
    run,
    step_of,
    trained_with,
    training_lines,
    unexpected,
    write_images,
)
from PIL import Image

from experiment import Run
from infra import files
from tools.report.patches_png import HEADER


def test_three_stages_from_the_shell(tiny, finished, tmp_path):
    command = [sys.executable, ROOT / "main.py", *tiny, "--log_folder", "logs"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, unexpected(done.stderr)) == (0, "")
    line = r"^Epoch: 0 \| Loss sim: -0\.\d{5} \| Loss TCR: -\d+\.\d{5}$"
    assert re.search(line, done.stdout, re.M)
    stages = ["Training SSL", "Encoding 'train'", "Encoding 'test'", "Fitting a linear", "Report"]
    assert re.findall(r"^===> (\w+(?: '?\w+'?)?(?: linear)?)", done.stdout, re.M) == stages
    assert "epoch 1 step 4/6 | sim" in done.stdout
    assert contents(tmp_path / "logs" / RUN) == contents(finished)  # another process, the same bits
    names = (
        "hparams.yaml metrics.jsonl patches.png linear_accuracy.json probe.pt checkpoints/0.pt "
        "checkpoints/1.pt checkpoints/last.pt artifacts/train.pt artifacts/test.pt images.csv"
    )
    assert set(contents(finished)) == set(names.split())


def test_the_report_shows_what_the_files_hold(finished):
    result = json.loads((finished / "linear_accuracy.json").read_text())
    test = files.read_pt(finished / "artifacts" / "test.pt")
    probe = files.read_pt(finished / "probe.pt")
    logits = test["embeddings"] @ probe["weight"].T + probe["bias"]
    correct = logits.argmax(1) == test["labels"]
    assert result["top1"] == pytest.approx(100 * correct.double().mean().item())
    assert (result["n_train"], result["n_test"]) == (24, 10)
    out = resume(finished).out
    assert re.search(rf"top-1 {result['top1']:.2f}%  last epoch", out)  # of two classes, no top-5
    assert re.search(rf"top-1 {result['best_top1']:.2f}%  best epoch", out)
    assert re.search(rf"20-NN +top-1 {result['knn_top1']:.2f}%", out)
    assert str(finished) in out
    # 8 rows of pictures at twice their size: image, gap, 2 patches
    image = 2 * (18 + 2)
    width = image + image // 3 + 2 * (2 * 18 + 2)
    height = 2 * (8 * 18 + 2) + HEADER
    assert Image.open(finished / "patches.png").size == (width, height)


def test_metrics_and_rate(finished):
    lines = training_lines(finished)
    assert [(line["epoch"], line["step"]) for line in lines] == [(0, 4), (0, 6), (1, 4), (1, 6)]
    # A cosine over all 12 steps, from lr towards 0; each line gives the rate of its last step.
    expected = [0.15 * (1 + math.cos(math.pi * step / 12)) for step in (3, 5, 9, 11)]
    assert [line["lr"] for line in lines] == pytest.approx(expected)


def test_training_lowers_the_loss_and_leaves_the_labels_alone(tiny, images, tmp_path, finished):
    """The same images in one folder, without labels, train the same encoder."""
    heap = tmp_path / "heap"
    (heap / "train").mkdir(parents=True)
    for i, path in enumerate(sorted((images / "train").rglob("*.png"))):
        shutil.copy(path, heap / "train" / f"{i:02}.png")
    trained_with("--data_dir", heap, tiny=tiny, tmp_path=tmp_path)
    ours, labelled = contents(tmp_path / RUN), contents(finished)
    assert ours["checkpoints/last.pt"]["encoder"] == labelled["checkpoints/last.pt"]["encoder"]
    lines = training_lines(tmp_path / RUN)
    totals = [200 * line["loss_sim"] + line["loss_uniformity"] for line in lines]
    assert totals[-1] < totals[0]


def test_images_without_labels_skip_the_probe_and_say_why(tiny, tmp_path):
    for name in ("a", "b/c"):
        write_images(tmp_path / "heap" / name, 6, len(name))
    result = trained_with("--data_dir", tmp_path / "heap", tiny=tiny, tmp_path=tmp_path)
    assert "linear probe     skipped: the images have no labels" in result.out
    name = f"python main.py report --exp_dir {tmp_path / RUN}"
    assert result.out.endswith(f"look at it       {name}\nfiles            {tmp_path / RUN}\n")
    assert (tmp_path / RUN / "artifacts" / "train.pt").exists()
    before = fingerprints(tmp_path / RUN)
    assert resume(tmp_path / RUN).code == 0
    assert fingerprints(tmp_path / RUN) == before


def test_a_finished_run_reports_and_writes_nothing(copy):
    """Neither its images are needed nor the folder where it was trained."""
    before = fingerprints(copy)
    result = resume(copy)
    assert result.code == 0
    assert "===> Report" in result.out
    assert "Loading" not in result.out
    assert fingerprints(copy) == before


def test_a_probe_setting_runs_only_the_probe_again(copy):
    before = fingerprints(copy)
    edit(copy, eval_lr="1e-1")
    result = resume(copy)
    assert result.code == 0, result.err
    changed = changed_files(copy, before)
    assert changed == {"hparams.yaml", "linear_accuracy.json", "probe.pt"}  # the first by our edit
    params = yaml.safe_load((copy / "hparams.yaml").read_text())["params"]
    assert params["eval_lr"] == "1e-1"  # as it was typed
    assert json.loads((copy / "linear_accuracy.json").read_text())["key"]["eval_lr"] == 0.1


@pytest.mark.parametrize(
    "change",
    [{"test_patches": 3}, {"emb_pool": "proj"}, {"save_proj": "true"}, {"eval_views": "crops"}],
)
def test_an_encode_setting_encodes_and_probes_again(copy, change):
    before = fingerprints(copy)
    edit(copy, **change)
    assert resume(copy).code == 0
    changed = changed_files(copy, before)
    assert changed == {"hparams.yaml", "train.pt", "test.pt", "linear_accuracy.json", "probe.pt"}
    encoded = files.read_pt(copy / "artifacts" / "test.pt")
    assert encoded["embeddings"].shape == (10, 4 if change == {"emb_pool": "proj"} else 8)
    assert ("features" in encoded) == ("save_proj" in change)


def test_more_epochs_train_on_from_the_last_checkpoint(copy):
    old = contents(copy)
    edit(copy, n_epochs=3)
    result = resume(copy)
    assert result.code == 0, result.err
    assert "Going on at epoch 2 step 0" in result.out
    assert "Epoch: 2 |" in result.out
    assert "Epoch: 1 |" not in result.out
    new = contents(copy)
    for name in ("checkpoints/0.pt", "checkpoints/1.pt"):
        assert new[name] == old[name]
    assert step_of(copy / "checkpoints" / "last.pt") == 3 * 6
    key, old_key = (result["linear_accuracy.json"]["key"] for result in (new, old))
    assert key["encoder"] != old_key["encoder"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"h_dim": 16}, ("h_dim is 16", "h_dim 8", "--exp_name")),
        ({"z_dim": 5}, ("z_dim is 5", "z_dim 4")),
        ({"arch": "resnet18-mini"}, ("resnet18-mini", "resnet10-tiny")),
        ({"dataset": "textures", "image_size": 32}, ("dataset is textures", "dataset folder")),
        ({"seed": 1}, ("seed is 1", "seed 42")),
        ({"lr": 0.2}, ("lr is 0.2", "lr 0.3", "no effect")),
        ({"n_patches": 5}, ("n_patches is 5", "n_patches 2", "no effect")),
        ({"n_epochs": 1}, ("n_epochs is 1", "epoch 2", "raise it")),
    ],
)
def test_what_the_weights_rule_out_is_refused(copy, change, words):
    edit(copy, **change)
    before = fingerprints(copy)
    assert refused(resume(copy), 2, *words)
    assert fingerprints(copy) == before


def test_a_part_of_an_epoch_and_the_rest_of_it(tiny, tmp_path):
    """1.5 epochs of 6 steps are 9 steps and a cosine over them; then training goes on to 2."""
    trained_with("--n_epochs", "1.5", "--print_freq", "1", tiny=tiny, tmp_path=tmp_path)
    exp_dir = tmp_path / RUN
    lines = training_lines(exp_dir)
    steps = [(line["epoch"], line["step"]) for line in lines]
    assert steps == [(0, n) for n in range(1, 7)] + [(1, n) for n in range(1, 4)]
    expected = [0.15 * (1 + math.cos(math.pi * t / 9)) for t in range(9)]
    assert [line["lr"] for line in lines] == pytest.approx(expected)
    checkpoints = {path.name for path in (exp_dir / "checkpoints").iterdir()}
    assert checkpoints == {"0.pt", "previous.pt", "last.pt"}
    before = fingerprints(exp_dir)
    assert resume(exp_dir).code == 0
    assert fingerprints(exp_dir) == before
    edit(exp_dir, n_epochs=1.25)
    assert resume(exp_dir).code == 2
    edit(exp_dir, n_epochs=2)
    result = resume(exp_dir)
    assert "Going on at epoch 1 step 3" in result.out
    assert (exp_dir / "checkpoints" / "1.pt").exists()
    assert len(training_lines(exp_dir)) == 9 + 1 + 3  # a line says that n_epochs changed


def test_more_epochs_after_none_at_all(tiny, finished, tmp_path):
    trained_with("--n_epochs", "0", tiny=tiny, tmp_path=tmp_path)
    edit(tmp_path / RUN, n_epochs=2)
    assert resume(tmp_path / RUN).code == 0
    ours, undisturbed = contents(tmp_path / RUN), contents(finished)
    assert ours["metrics.jsonl"][0]["event"] == "changed"
    assert ours["checkpoints/last.pt"] == undisturbed["checkpoints/last.pt"]
    assert ours["linear_accuracy.json"] == undisturbed["linear_accuracy.json"]


def test_bs_edited_within_an_epoch(copy):
    """After 4 of 6 steps of 4 images, bs 5 goes on at step 3 of 4, after 15 of the 16 images."""
    last = copy / "checkpoints" / "last.pt"
    content = files.read_pt(copy / "checkpoints" / "0.pt")
    files.write_pt(last, {**content, "state": {**content["state"], "step": 6 + 4}})
    (copy / "checkpoints" / "1.pt").unlink()
    edit(copy, bs=5)
    result = resume(copy)
    assert result.code == 0, result.err
    assert "Going on at epoch 1 step 3" in result.out
    assert "nan" not in result.out


def test_a_training_setting_edited_on_the_way_is_used_and_recorded(copy):
    (copy / "checkpoints" / "last.pt").unlink()
    (copy / "checkpoints" / "1.pt").unlink()  # as if it had been stopped after epoch 0
    old = contents(copy)["metrics.jsonl"]
    edit(copy, lr=0.1, weight_decay=0.5)
    result = resume(copy)
    assert result.code == 0, result.err
    assert "lr was 0.3, from here on it is 0.1" in result.out
    new = contents(copy)["metrics.jsonl"]
    assert new[:2] == old[:2]
    at = {"event": "changed", "epoch": 1, "step": 0, "global_step": 6}
    assert new[2] == {**at, "name": "lr", "old": 0.3, "new": 0.1}
    assert new[3] == {**at, "name": "weight_decay", "old": 1e-4, "new": 0.5}
    assert new[4]["lr"] == pytest.approx(old[2]["lr"] / 3)
    assert new[4]["loss_sim"] != old[2]["loss_sim"]
    assert resume(copy).code == 0  # and the run is whole


def test_other_images_under_the_same_name_are_refused(copy, images, tmp_path):
    other = shutil.copytree(images, tmp_path / "other")
    edit(copy, data_dir=other)
    assert resume(copy).code == 0  # moved, but the same
    Image.new("RGB", (16, 16)).save(other / "train" / "down" / "0.png")
    assert refused(resume(copy), 2, "are not those that this run was trained on")


def test_a_finished_run_says_that_its_images_have_changed(tiny, images, tmp_path):
    """By their names and sizes, without reading them. Those of a copy are the same."""
    data = shutil.copytree(images, tmp_path / "data", copy_function=shutil.copyfile)
    command = [*tiny, "--data_dir", data, "--log_folder", tmp_path / "logs"]
    first = run(*command)
    assert (first.code, "of 24 training images" in first.out) == (0, True)
    before = fingerprints(tmp_path / "logs")
    image = data / "test" / "down" / "0.png"
    os.utime(image, (0, 0))
    (data / "notes.png").write_bytes(b"in neither split")
    assert run(*command).err == ""
    pixels = image.read_bytes()
    for change in (
        lambda: image.write_bytes(pixels + b"longer"),
        lambda: image.rename(data / "test" / "across" / "renamed.png"),
        lambda: shutil.copyfile(images / "test/down/1.png", data / "train/new.png"),
    ):
        change()
        result = run(*command)
        assert (result.code, result.err.count("\n"), "Loading" in result.out) == (0, 1, False)
        assert f"the images in {data} have changed since this run read them" in result.err
        assert "--exp_name" in result.err
    assert "1 image beside the 2 class folders" in result.err
    assert fingerprints(tmp_path / "logs") == before
    shutil.rmtree(data)
    assert run(*command).err == ""


def pasted(message):
    """Run the commands that a message names as the shell splits them; return their results."""
    commands = [shlex.split(command) for command in re.findall("`python main.py ([^`]+)`", message)]
    assert [command[0] for command in commands] == ["embed", "train"]
    return [run(*command) for command in commands]


def test_a_folder_that_has_grown_is_told_with_two_ways_on_that_work(
    tiny, images, tmp_path, monkeypatch
):
    """By a finished run, its report, and a run whose training goes on, which is refused."""
    monkeypatch.chdir(tmp_path)
    # It takes seconds.
    monkeypatch.setattr("tools.report.page.images_context", lambda *args: {"missing": ""})
    data = shutil.copytree(images, tmp_path / "my images")
    command = [*tiny, "--data_dir", data, "--exp_name", "it's mine", "--log_folder", "the logs"]
    assert run(*command).code == 0
    (exp_dir,) = Path("the logs").iterdir()
    with (exp_dir / "images.csv").open() as lines:
        listed = {row["path"]: (row["split"], int(row["size"])) for row in csv.DictReader(lines)}
    paths = [path.relative_to(data) for path in data.rglob("*.png")]
    assert listed == {str(p): (p.parts[0], (data / p).stat().st_size) for p in paths}

    write_images(data / "train" / "down" / "new", 3, 9)
    (data / "train" / "down" / "0.png").unlink()
    for path in (data / "test" / "across").iterdir():
        Image.new("RGB", (16, 16)).save(path)
    words = f"the images in {data} have changed since this run read them: 3 new, 5 changed, 1 gone."
    for again in (command, ["resume", "--exp_dir", exp_dir]):
        result = run(*again)
        assert (result.code, words in result.err, result.err.count("\n")) == (0, True, 1)
    assert words in run("report", "--exp_dir", exp_dir).err
    embedded, trained = pasted(result.err)
    assert (embedded.code, trained.code, embedded.err, trained.err) == (0, 0, "", "")
    with np.load("new.npz") as content:
        assert len(content["paths"]) == 24 + 10 + 3 - 1
    assert f"tensors of the backbone are from {exp_dir}/checkpoints/last.pt" in trained.out
    assert "Images: 26 train, 10 test" in trained.out
    assert run(*resume_of(trained)).err == ""  # which read the images of today

    shutil.rmtree("logs")
    before = fingerprints(exp_dir)
    result = resume(exp_dir, "--n_epochs 3")
    assert refused(result, 2, "not those that this run was trained on: 3 new, 5 changed, 1 gone.")
    assert fingerprints(exp_dir) == before
    assert [way.code for way in pasted(result.err)] == [0, 0]

    (exp_dir / "images.csv").unlink()  # as of an earlier version
    assert resume(exp_dir).err == ""


def resume_of(result):
    """Return the command that resumes the run that a result names at its end."""
    return ["resume", "--exp_dir", re.search(r"^files +(.*)$", result.out, re.M)[1]]


def test_labels_that_were_edited_after_the_run_are_refused(tiny, images, tmp_path):
    paths = sorted(path.relative_to(images) for path in images.rglob("*.png"))
    labels = tmp_path / "labels.csv"
    labels.write_text("".join(f"{path},{path.parts[1]}\n" for path in paths))
    command = (*tiny, "--labels", labels, "--log_folder", tmp_path / "logs")
    assert run(*command).code == 0
    assert "Loading" not in run(*command).out
    labels.write_text(labels.read_text().replace(",across", ",down", 1))
    assert refused(run(*command), 2, "are not those that this run was trained on")


def test_train_again_goes_on_says_what_differs_and_starts_over_only_with_no_resume(
    tiny, finished, tmp_path
):
    exp_dir = shutil.copytree(finished, tmp_path / RUN)
    before = fingerprints(exp_dir)
    again = [*tiny, "--log_folder", tmp_path]
    assert run(*again).code == 0
    assert fingerprints(exp_dir) == before

    result = run(*again, "--eval-lr=0.5")
    assert result.code == 0
    assert "eval_lr is None in" in result.out
    assert Run(exp_dir).read_hparams().eval_lr == 0.5

    before = fingerprints(exp_dir)
    none = tmp_path / "none"
    for options in (
        ["--eval_lr", "0.5", "--h_dim", "16"],
        ["--no-resume", "--data_dir", none],  # an error moves nothing aside
    ):
        assert run(*again, *options).code == 2
        assert fingerprints(exp_dir) == before

    assert run(*again, "--no-resume", "--h-dim", "16").code == 0
    aside = tmp_path / f"{RUN}.old1"
    moved = {aside / path.relative_to(exp_dir): value for path, value in before.items()}
    assert fingerprints(aside) == moved
    assert Run(exp_dir).read_hparams().h_dim == 16
