"""The benchmark of transfer and of few labels, on a few small images, and its tables."""

import json

import pytest
from helpers import write_images

from benchmarks import common, kmeans, tables, transfer
from benchmarks.common import run_of
from infra import files

SETTINGS = (
    "--image_size 16 --arch resnet10-tiny --emb_pool blocks --h_dim 8 --z_dim 4 --n_patches 2 "
    "--bs 4 --n_epochs 1 --n_eval_epochs 2 --device cpu --precision fp32"
)


@pytest.fixture
def words(tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "SHARES", {0.5: 2})
    monkeypatch.setattr(
        transfer, "SEEDS", {"cifar10": (42, 43), "cifar100": (42,), "untrained": (42,)}
    )
    monkeypatch.setattr(transfer, "N_CENTROIDS", 5)
    monkeypatch.setattr(kmeans, "N_PATCHES", 5000)
    seed = 0
    for name in transfer.DATA_SETS:
        for split, n in (("train", 10), ("test", 6)):
            for kind in ("across", "down"):
                write_images(tmp_path / name / split / kind, n, seed)
                seed += 1
    data = [f"--{name}={tmp_path / name}" for name in transfer.DATA_SETS]
    return [*data, f"--settings={SETTINGS}", f"--log_folder={tmp_path}", f"--out={tmp_path}"]


def test_each_result_is_of_the_run_that_it_names_and_is_done_once(words, tmp_path, monkeypatch):
    transfer.main(words)
    text = (tmp_path / "transfer.json").read_text()
    results = json.loads(text)
    names = [f"{source} to {name}" for source in transfer.SEEDS for name in transfer.DATA_SETS]
    names += [f"kmeans to {name}" for name in transfer.DATA_SETS]
    names += [f"cifar10 to {name}, seed 43" for name in transfer.DATA_SETS]
    assert results.keys() == {*names, "labels 0.5"}
    for source, target, seed, exp_name in (
        ("cifar10", "cifar10", 42, "cifar10"),
        ("cifar10", "cifar100", 43, "cifar10-to-cifar100-43"),
        ("cifar100", "cifar10", 42, "cifar100-to-cifar10"),
        ("untrained", "cifar100", 42, "untrained-to-cifar100"),
    ):
        run = run_of(tmp_path, exp_name)
        hp = run.read_hparams()
        assert hp.data_dir == str(tmp_path / target)
        is_other = source not in (target, "untrained")
        trained = source if seed == 42 else f"{source}-{seed}"
        assert hp.weights == (str(run_of(tmp_path, trained).last) if is_other else None)
        assert hp.seed == seed
        assert hp.n_epochs == float(source == target)
        name = transfer.entry_name(source, target, seed)
        assert results[name]["top1"] == run.read_result()["top1"]
    assert results["kmeans to cifar100"]["n_images"] == 20
    assert results["kmeans to cifar100"]["n_centroids"] == 5
    (path,) = run_of(tmp_path, "cifar10").finetune.glob("*/result.json")
    result = files.read_sealed(path)
    labels = results["labels 0.5"]
    assert (labels["n_labels"], labels["n_epochs"]) == (10, 2)
    for name in ("probe", "finetuned", "from_scratch"):
        assert labels[name] == result[name]["top1"]

    for name in ("run_program", "run_train", "kmeans_row"):
        monkeypatch.setattr(transfer, name, lambda *_: pytest.fail("done again"))
    transfer.main(words)
    assert (tmp_path / "transfer.json").read_text() == text


def test_a_training_that_diverges_is_no_result(words, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "run_train", lambda argv: {"failed": "the loss is nan"})
    with pytest.raises(SystemExit, match="cifar10: the loss is nan"):
        transfer.main(words)
    assert not (tmp_path / "transfer.json").exists()


def test_the_tables_of_transfer_and_labels(tmp_path, monkeypatch):
    """Entries of other settings, and those that are missing, are left out."""
    monkeypatch.setattr(tables, "RESULTS_FOLDER", tmp_path)
    assert "Not measured yet" in tables.transfer_table() + tables.labels_table()
    about = {
        "settings": transfer.PRESET_OPTIONS,
        "machine": common.machine("cpu"),
        "commit": "0" * 7,
    }
    entries = {
        "cifar10 to cifar10": {"top1": 81.04, "knn_top1": 72.0},
        "cifar10 to cifar100": {"top1": 50.0, "knn_top1": 41.0},
        "cifar10 to cifar100, seed 43": {"top1": 52.0, "knn_top1": 43.0},
        "cifar100 to cifar10": {"top1": 78.0, "knn_top1": 69.0, "settings": "--lr 1"},
        "kmeans to cifar100": {"top1": 45.0},
        "labels 0.01": {
            "n_labels": 5000,
            "n_epochs": 7,
            "probe": 60.0,
            "finetuned": 59.0,
            "from_scratch": 30.0,
        },
    }
    entries = {name: {**about, **entry} for name, entry in entries.items()}
    files.write_json(tmp_path / "transfer.json", entries)
    head, _, *rows = tables.transfer_table().split("\n\n")[0].splitlines()
    assert head == "|  | on CIFAR-10 | on CIFAR-100 | commit |"
    kmeans_title = "k-means features (400 centroids), learned on the same images"
    two_seeds = "51.0% (50.0 to 52.0); 42.0% (41.0 to 43.0)"
    assert rows == [
        f"| --preset laptop, trained on CIFAR-10 | 81.0%; 72.0% | {two_seeds} | 0000000\u2021 |",
        f"| {kmeans_title} |  | 45.0% | 0000000\u2021 |",
    ]
    assert "| 5,000 | 60.0% | 59.0% | 30.0% | 7 | 0000000\u2021 |" in tables.labels_table()
