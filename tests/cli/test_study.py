"""The studies: rows that are run once, and the tables that are made of them."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT

import main
import train
from benchmarks import claims, laptop, method, rows, study, tables
from infra.device import generator
from patches import sample_patches
from textures import make_textures


@pytest.fixture
def options(images, tmp_path, monkeypatch):
    tiny = "--image_size 16 --arch resnet18-tiny --h_dim 8 --z_dim 4 --n_patches 2 --bs 4 --n_epochs 1 --n_eval_epochs 3"
    monkeypatch.setitem(rows.GROUPS, "findings-cpu", rows.Group(tiny, "reproduction", "cpu"))
    data = {"dataset": "folder", "data_dir": str(images)}
    return SimpleNamespace(
        seeds=2, disturbed=False, out=tmp_path / "out", log_folder=str(tmp_path / "logs"), **data
    )


def hparams(argv):
    return main.hyperparameters(main.parse(argv))


@pytest.mark.parametrize("group", rows.GROUPS)
def test_each_row_is_a_command_that_the_program_takes(group):
    options = SimpleNamespace(log_folder=None, dataset="cifar10", data_dir="./datasets")
    base = hparams(["train", *rows.GROUPS[group].base.split()])
    for row in rows.rows_of(group):
        hp = hparams(study.command(row, 42, options))
        changed = set(base.differences(hp)) - {"seed"}
        text = row.options.replace("--no-", "--") + " "
        names = {name for name in vars(hp) if f"--{name} " in text}
        assert changed == names or group == "views", (
            row.name
        )  # a row says nothing that the base says already
        if "half the patches" in row.name:  # said to cost as much as the base
            assert (
                hp.n_images * hp.n_patches * hp.n_epochs
                == base.n_images * base.n_patches * base.n_epochs
            ), row.name


def test_rows_are_run_once_and_a_failed_one_is_told(options, monkeypatch):
    base = rows.Row("base", "the base", "89.25 (document)", "", 2, "findings-cpu")
    untrained = rows.Row("untrained", "untrained", "", "--n_epochs 0", 2, "findings-cpu")
    chosen = [
        base,
        untrained,
        rows.Row("broken", "diverges", "", "--optimizer sgd --lr 1e6", 2, "findings-cpu"),
    ]
    options.out.mkdir()
    for row in chosen:
        study.run(row, options)
    path = options.out / "reproduction.json"
    text = path.read_text()
    results = json.loads(text)["cpu"]
    for name in ("base", "untrained"):
        folders = [next(Path(options.log_folder).glob(f"{name}-{seed}__*")) for seed in (42, 43)]
        accuracies = [
            json.loads((folder / "linear_accuracy.json").read_text()) for folder in folders
        ]
        assert [entry["top1"] for entry in results[name]["runs"]] == [
            accuracy["top1"] for accuracy in accuracies
        ]
    assert [list(entry["losses"][0]) for entry in results["base"]["runs"]] == [["mean", "last"]] * 2
    assert results["untrained"]["runs"][0]["losses"] == []
    assert (
        "not finite" in results["broken"]["runs"][0]["failed"]
        or "is nan" in results["broken"]["runs"][0]["failed"]
    )

    monkeypatch.setattr(train, "train_epoch", lambda *args: pytest.fail("trained again"))
    for row in (base, untrained):
        study.run(row, options)
    assert path.read_text() == text

    monkeypatch.setattr(rows, "ROWS", [*chosen, base._replace(name="later", title="not run")])
    table = tables.findings("findings-cpu", options.out)
    top1 = [entry["top1"] for entry in results["base"]["runs"]]
    assert (
        f"| the base (`base`) |  | 89.25 (document) | {sum(top1) / 2:.1f}% ({min(top1):.1f} to {max(top1):.1f})"
        in table
    )
    diverged = r"^\| diverges \(`broken`\) \| `--optimizer sgd --lr 1e6` \|  \| epoch 0 step \d+: .* \|  \|  \|$"
    assert re.search(diverged, table, re.M)
    assert "| not run (`later`) |  | 89.25 (document) | not yet measured |  |  |" in table


def test_the_mean_of_an_epoch_is_over_its_steps(finished):
    """Lines of metrics.jsonl stand for 4 and 2 of the 6 steps of an epoch."""
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    losses = study.read_run(finished)["losses"]
    assert len(losses) == 2
    for epoch, values in enumerate(losses):
        first, last = (lines[2 * epoch + i] for i in (0, 1))
        for i, name in enumerate(("loss_sim", "loss_uniformity")):
            assert values["mean"][i] == pytest.approx((4 * first[name] + 2 * last[name]) / 6)
            assert values["last"][i] == last[name]


def test_a_run_that_is_not_finished_has_its_losses_so_far(options, monkeypatch):
    row = rows.Row("half", "half done", "", "", 1, "findings-cpu")
    options.out.mkdir()
    study.run(row, options)
    (exp_dir,) = Path(options.log_folder).glob("half-42__*")
    (exp_dir / "linear_accuracy.json").unlink()
    (options.out / "reproduction.json").unlink()
    study.run_so_far(row, options)
    (entry,) = json.loads((options.out / "reproduction.json").read_text())["cpu"].values()
    line = [
        json.loads(line)
        for line in (exp_dir / "metrics.jsonl").read_text().splitlines()
        if "loss_sim" in line
    ][-1]
    assert entry["so_far"]["step"] == 6 and entry["so_far"]["last"] == [
        line["loss_sim"],
        line["loss_uniformity"],
    ]
    monkeypatch.setattr(rows, "ROWS", [row])
    shown = f"| not yet measured; losses at step 6: {line['loss_sim']:.3f}, {line['loss_uniformity']:.1f}, on "
    assert shown in tables.findings("findings-cpu", options.out)


def test_a_stopped_study_leaves_with_the_code(options, monkeypatch):
    monkeypatch.setattr(main, "main", lambda argv: 143)
    with pytest.raises(SystemExit, match="143"):
        study.run(rows.Row("base", "the base", "", "", 1, "findings-cpu"), options)
    assert not options.out.exists()


def test_no_figure_lies_in_a_row_that_is_not_measured():
    """What the recorded results hold is a row of a study, or, if it changed the program, says so."""
    recorded = json.loads((ROOT / "benchmarks" / "results" / "one-minute.json").read_text())[
        "tries"
    ]
    for name, entry in recorded.items():
        assert entry["changed"] or rows.TRIES[name] == entry["options"], name


def test_what_decides_a_claim():
    """The ranges of the seeds for what is above; two points for what is as good; from one seed some gaps are undecided."""

    def row(*top1):
        return {"runs": [{"top1": x} for x in top1]}

    results = {
        "a": row(60, 61),
        "b": row(59),
        "c": row(50),
        "d": row(59, 59.5),
        "e": row(59, 60.5),
        "g": row(60),
    }

    def answer(*names):
        return claims.verdict(results, *names).split(",")[0]

    assert [answer("a", claims.ABOVE, name) for name in "bcde"] == [
        "undecided",
        "**yes**",
        "**yes**",
        "**no**",
    ]
    assert [answer(name, claims.ABOVE, "a") for name in "bcd"] == ["undecided", "**no**", "**no**"]
    assert [answer(name, claims.CLOSE, "a") for name in "bcdg"] == [
        "undecided",
        "**no**",
        "**yes**",
        "**yes**",
    ]
    assert answer("a", claims.ABOVE, "f") == "not yet measured"


def test_a_table_that_needs_the_seconds_refuses_disturbed_runs(capsys):
    assert study.parse(["laptop", "--disturbed"]).disturbed
    with pytest.raises(SystemExit):
        study.parse(["demo", "--disturbed"])
    assert "--disturbed: the table of demo needs the seconds" in capsys.readouterr().err


def test_the_curve_and_its_table_show_the_results(tmp_path, monkeypatch):
    def runs(*top1, seconds=10):
        stages = {"training": seconds, "encoding": 2, "probe": 1}
        return [
            {"top1": x, "train_top1": x + 5, "knn_top1": x - 5, "seconds": stages} for x in top1
        ]

    machine = dict.fromkeys(
        ("processor", "cores", "device", "precision", "python", "torch", "torchvision"), "m"
    )
    measured = {
        "preset-50000": runs(80, 82),
        "preset-5000": runs(64),
        "lars-5000": runs(52),
        "untrained-50000": runs(40),
    }
    about = {"data": "CIFAR-10", "machine": machine}
    text = json.dumps(
        {"runs": {name: {"runs": found, **about} for name, found in measured.items()}}
    )
    (tmp_path / "laptop.json").write_text(text)
    size = {"n_images": 5000, "n_centroids": 400, "train_top1": 70}
    clusters = [{**size, "top1": 59, "seconds": 30}, {**size, "top1": 61, "seconds": 40}]
    (tmp_path / "kmeans.json").write_text(json.dumps({"rows": clusters}))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert laptop.curves() == {
        "--preset laptop": [(13, 64, 64, 64), (13, 80, 81, 82)],
        "LARS, mean of the features": [(13, 52, 52, 52)],
        "k-means of patches": [(35, 59, 60, 61)],
    }
    table = laptop.results_table()
    assert (
        "| the preset | 50,000 | 81.0% (80.0 to 82.0) | 86.0% (85.0 to 87.0) | 76.0% (75.0 to 77.0) | 13 |"
        in table
    )
    assert (
        "| k-means, 400 centroids | 5,000 | 60.0% (59.0 to 61.0) | 70.0% (70.0 to 70.0) |  | 35 |"
        in table
    )
    assert "81.0% (80.0 to 82.0) linear top-1 on CIFAR-10 in 0 minutes" in laptop.headline()
    figure = laptop.figure()
    drawn = [
        line.get_xydata().tolist()
        for line in figure.axes[0].lines
        if line.get_marker() in ("o", "s", "D")
    ]
    assert [[13, 64], [13, 81]] in drawn and [[35, 60]] in drawn


def test_the_figure_of_the_method_has_the_patches_that_training_would_see():
    pytest.importorskip("matplotlib")
    (axes,) = method.figure().axes
    shown = [torch.as_tensor(image.get_array()) for image in axes.get_images()]
    assert len(shown) == method.B * (1 + method.P)
    images = make_textures(20, generator(method.SEED, "method"))[0][list(method.CHOSEN)]
    x = sample_patches(images, method.P, generator(method.SEED, "patches"), 32)
    torch.testing.assert_close(shown[0], images[0].permute(1, 2, 0) / 255)
    torch.testing.assert_close(shown[1], (x[0, 0].permute(1, 2, 0) + 1) / 2)
