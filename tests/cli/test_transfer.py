"""The benchmark of transfer and of few labels, on a few small images."""

import json

import pytest
from helpers import write_images

from benchmarks import tables, transfer
from experiment import Run

SETTINGS = (
    "--image_size 16 --arch resnet18-tiny --emb_pool blocks --h_dim 8 --z_dim 4 --n_patches 2 "
    "--bs 4 --n_epochs 1 --n_eval_epochs 2 --device cpu --precision fp32"
)


@pytest.fixture
def words(tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "SHARES", {0.5: 2})
    for name in transfer.DATA_SETS:
        for split in ("train", "test"):
            for seed, kind in enumerate(("across", "down")):
                write_images(tmp_path / name / split / kind, 10, seed + len(name))
    data = [f"--{name}={tmp_path / name}" for name in transfer.DATA_SETS]
    return [*data, f"--settings={SETTINGS}", f"--log_folder={tmp_path}", f"--out={tmp_path}"]


def test_each_result_is_of_the_run_that_it_names_and_is_done_once(words, tmp_path, monkeypatch):
    transfer.main(words)
    text = (tmp_path / "transfer.json").read_text()
    results = json.loads(text)
    names = [
        f"{source} to {target}" for source in transfer.SOURCES for target in ("cifar10", "cifar100")
    ]
    assert results.keys() == {
        "machine",
        *names,
        "kmeans to cifar10",
        "kmeans to cifar100",
        "labels 0.5",
    }
    for source, target, folder in (
        ("cifar10", "cifar10", "cifar10__*"),
        ("cifar10", "cifar100", "cifar10-to-cifar100__*"),
        ("untrained", "cifar100", "untrained-to-cifar100__*"),
    ):
        (exp_dir,) = tmp_path.glob(folder)
        run = Run(exp_dir)
        hp = run.read_hparams()
        assert hp.data_dir == str(tmp_path / target)
        trained_on = (
            None if source in (target, "untrained") else str(transfer.run_of(tmp_path, source).last)
        )
        assert hp.weights == trained_on and hp.n_epochs == float(source == target)
        assert results[f"{source} to {target}"]["top1"] == run.read_result()["top1"]
    labels = results["labels 0.5"]
    assert labels["n_labels"] == 10 and all(
        0 <= labels[name] <= 100 for name in ("probe", "finetuned")
    )

    monkeypatch.setattr(transfer, "run_program", lambda argv: pytest.fail("done again"))
    monkeypatch.setattr(transfer, "run_train", lambda argv: pytest.fail("done again"))
    transfer.main(words)
    assert (tmp_path / "transfer.json").read_text() == text

    monkeypatch.setattr(tables, "RESULTS_FOLDER", tmp_path)
    monkeypatch.setattr(tables, "SHARES", {0.5: 2})
    cell = f"{results['cifar10 to cifar100']['top1']:.1f}%"
    assert f" | {cell}; " in tables.transfer_table()
    top1 = [f"{labels[name]:.1f}%" for name in ("probe", "finetuned", "from_scratch")]
    assert f"| 10 (50%) | {' | '.join(top1)} | 2 |" in tables.labels_table()
