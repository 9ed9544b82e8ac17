"""The experiments of a folder as a table."""

import csv
import io
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, RUN, edit, refused, run, trained_with, write_images

from experiment import Run
from infra import files
from infra.lock import locked
from tools import compare


@pytest.fixture
def logs(finished, tmp_path):
    """Two finished runs that differ in the probe's rate, and others that are not finished."""
    for name in ("a", "b", "edited", "broken", "half"):
        shutil.copytree(finished, tmp_path / name)
    edit(tmp_path / "b", eval_lr=1e-6, print_freq=7)  # no result depends on print_freq
    assert run("resume", "--exp_dir", tmp_path / "b").code == 0
    edit(tmp_path / "edited", n_eval_epochs=5)
    edit(tmp_path / "broken", bs="many")
    for path in ("linear_accuracy.json", "environment.json"):
        (tmp_path / "half" / path).unlink()
    (tmp_path / "notes").mkdir()
    return tmp_path


def rows(*argv):
    """Return {experiment: row} of compare --csv."""
    result = run("compare", *argv, "--csv")
    assert result.code == 0, result.err
    return {row["experiment"]: row for row in csv.DictReader(io.StringIO(result.out))}


def test_results_are_shown_of_finished_runs_alone_and_what_differs(logs):
    table = rows(logs)
    assert list(table) == ["a", "b", "broken", "edited", "half"]
    assert list(table["a"]) == ["experiment", "n_eval_epochs", "eval_lr", *compare.RESULT_COLUMNS]
    for name in ("a", "b"):
        result = files.read_json(logs / name / "linear_accuracy.json")
        assert float(table[name]["top1"]) == result["top1"]
        assert float(table[name]["balanced"]) == result["balanced_top1"]
        assert float(table[name]["knn_top1"]) == result["knn_top1"]
        assert table[name]["device"] == "cpu"
        assert table[name]["status"] == "finished"
        assert float(table[name]["seconds"]) > 0
    assert [table[name]["eval_lr"] for name in ("a", "b")] == ["", "1e-06"]
    others = {
        "edited": "edited since it finished (n_eval_epochs)",
        "broken": "broken: ",
        "half": "unfinished, epoch 1 step 6",
    }
    for name, status in others.items():
        assert table[name]["status"].startswith(status)
        assert table[name]["top1"] == ""
    assert "bs" in table["broken"]["status"]


def test_sorted_by_any_column_results_falling_and_unknown_ones_last(logs):
    assert list(rows(logs, "--sort", "top1"))[:2] == ["a", "b"]  # 100% and 50%
    assert next(iter(rows(logs, "--sort", "eval_lr"))) == "b"
    assert list(rows(logs, "--sort", "n_eval_epochs"))[-1] == "broken"
    refused(run("compare", logs, "--sort", "speed"), 2, "knn_top1")


def test_the_table_for_people_fits_80_columns_and_wraps_the_last(logs, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    header, *lines = run("compare", logs).out.splitlines()
    assert max(map(len, [header, *lines])) <= 80
    names = "experiment runs top1 balanced knn_top1 rank seconds changed settings"
    assert header.split() == names.split()
    start = header.index("changed settings")
    first_words = [line[start:].split()[0] for line in lines if line[0] != " "]
    assert first_words == [
        "n_eval_epochs=3",
        "n_eval_epochs=3",
        "(broken:",
        "n_eval_epochs=5",
        "n_eval_epochs=3",
    ]
    text = " ".join(line[start:] for line in lines)
    assert text.count("(edited since it finished (n_eval_epochs): resume it)") == 1


def test_seeds_share_a_line_also_in_a_folder_of_log_folders(tiny, tmp_path, monkeypatch):
    """The mean and range, of runs that differ in the seed alone; not of one with another rate."""
    monkeypatch.setenv("COLUMNS", "100")
    folder = tmp_path / "logs" / "one"
    for seed, options in ((1, ()), (2, ()), (3, ("--eval_lr", "1e-6"))):
        argv = [*tiny, "--n_epochs", "1", "--seed", seed, *options, "--log_folder", folder]
        assert run(*argv).code == 0
    table = rows(tmp_path / "logs")
    assert list(table) == [f"one/default__numpatch2_bs4_lr0.3_seed{seed}" for seed in (1, 2, 3)]
    first, second, third = table.values()
    low, high = sorted(float(row["top1"]) for row in (first, second))
    rank = (float(first["rank"]) + float(second["rank"])) / 2
    _, seeds, other = run("compare", tmp_path / "logs").out.splitlines()
    mean = f"{(low + high) / 2:.2f}"
    assert seeds.split()[:4] == ["one/default", "2", mean, f"({low:.1f}-{high:.1f})"]
    assert f"{rank:.1f}" in seeds.split()
    assert "seed=" not in seeds
    assert other.split()[1:3] == ["1", f"{float(third['top1']):.2f}"]
    assert other.endswith("seed=3 eval_lr=1e-06")


def imitated(finished, folder, seed=42, top1=50.0, device="cpu", n_images=None, **data):
    """Write the small files of a run like the finished one, but for these values."""
    folder.mkdir(parents=True)
    shutil.copy(finished / "hparams.yaml", folder)
    edit(folder, seed=seed, n_images=n_images or "null")
    result = files.read_sealed(finished / "linear_accuracy.json")
    del result["checksum"]
    result["top1"] = top1
    result["key"]["data"] |= data
    files.write_json(folder / "linear_accuracy.json", files.sealed(result))
    (launch,) = Run(finished).read_launches()
    del launch["checksum"]
    launch["hparams"] |= {"seed": seed, "n_images": n_images}
    launch |= {"device": device, "data": result["key"]["data"]}
    launch["result"] = files.sealed(result)["checksum"]
    files.write_json(folder / "environment.json", [files.sealed(launch)])


def test_what_is_a_further_seed(finished, tmp_path, monkeypatch):
    """Another seed on the same images; not a copy, a run that was moved aside, or other images."""
    monkeypatch.setenv("COLUMNS", "200")

    def lines(**runs):
        logs = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, values in runs.items():
            imitated(finished, logs / name.replace("_old", "__numpatch2.old"), **values)
        return [line.split()[:3] for line in run("compare", logs).out.splitlines()[1:]]

    a, b = {"seed": 1, "top1": 40.0}, {"seed": 2, "top1": 80.0}
    assert lines(a=a, b=b) == [["a", "2", "60.00"]]
    assert lines(a=a, b=b, c=a) == [["a", "2", "60.00"], ["c", "1", "40.00"]]
    assert lines(a=a, b_old1=b) == [["a", "1", "40.00"], ["b.old1", "1", "80.00"]]
    alone = [["a", "1", "40.00"], ["b", "1", "80.00"]]
    other = {"train": "0", "test": "1", "class_names": ["down", "up"]}
    assert lines(a=a, b=b | other) == alone
    assert lines(a=a, b=b | {"train": "0"}) == alone  # the folder has grown
    # The seed chooses of one folder: the training images, the held-out test images.
    drawn = {"n_images": 20}
    assert lines(a=a | drawn, b=b | drawn | {"train": "0"}) == [["a", "2", "60.00"]]
    assert lines(a=a, b=b | {"train": "0", "test": "1"}) == [["a", "2", "60.00"]]


def test_seconds_of_two_machines_have_no_mean(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    imitated(finished, tmp_path / "a", seed=1)
    imitated(finished, tmp_path / "b", seed=2)
    assert "seconds" in run("compare", tmp_path).out
    shutil.rmtree(tmp_path / "b")
    imitated(finished, tmp_path / "b", seed=2, device="NVIDIA H100")
    assert "seconds" not in run("compare", tmp_path).out


def test_a_run_without_labels_has_its_signs_of_collapse(tiny, tmp_path):
    heap = tmp_path / "heap"
    write_images(heap / "a", 12, 0)
    logs = tmp_path / "logs"
    trained_with("--data_dir", heap, "--log_folder", logs, tiny=tiny, tmp_path=tmp_path)
    (row,) = rows(logs).values()
    collapse = files.read_pt(logs / RUN / "artifacts" / "train.pt")["collapse"]
    assert {name: float(row[name]) for name in collapse} == collapse
    assert row["top1"] == ""
    assert row["status"] == "finished, no probe"


def test_a_run_that_is_in_use_is_running(logs):
    with locked(Run(logs / "half").lock):
        assert rows(logs)["half"]["status"] == "running, epoch 1 step 6"


def test_whatever_is_in_one_folder_the_others_are_shown(logs, finished):
    names = ("junk", "list", "folder", "digit", "foreign")
    for name in names:
        shutil.copytree(finished, logs / name)
    (logs / "junk" / "environment.json").write_bytes(b"[[]]\xff")
    (logs / "list" / "environment.json").write_text("[[], 1]")
    (logs / "folder" / "lock").mkdir()
    result = logs / "digit" / "linear_accuracy.json"
    top1 = files.read_json(result)["top1"]
    result.write_text(result.read_text().replace(f'"top1": {top1}', '"top1": 12.5'))
    shutil.copy(logs / "b" / "linear_accuracy.json", logs / "foreign")
    table = rows(logs)
    assert [table[name]["top1"] for name in names] == ["", "", str(top1), "", ""]
    for name, status in (
        ("a", "finished"),
        ("junk", "unfinished"),
        ("list", "unfinished"),
        ("folder", "finished"),
        ("digit", "linear_accuracy.json is missing or damaged: resume it"),
        ("foreign", "missing or damaged"),
    ):
        assert status in table[name]["status"]
    assert run("resume", "--exp_dir", logs / "digit").code == 0
    assert rows(logs)["digit"]["top1"] == str(top1)


def test_no_experiments(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        refused(run("compare", folder), 2, folder)


def test_a_reader_that_leaves_early(logs):
    """main.py compare logs | head -0"""
    command = [sys.executable, ROOT / "main.py", "compare", logs]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
