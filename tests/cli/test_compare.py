import csv
import io
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, RUN, edit, run, trained_with, write_images

from experiment import Run
from infra import files
from infra.lock import locked
from tools import compare


@pytest.fixture
def logs(finished, tmp_path):
    """Two finished runs that differ in the probe's rate, and others that are not finished."""
    for name in ("a", "b", "edited", "broken", "half"):
        shutil.copytree(finished, tmp_path / name)
    edit(tmp_path / "b", eval_lr=1e-6, print_freq=7)  # the latter makes no difference
    assert run("resume", "--exp_dir", tmp_path / "b").code == 0
    edit(tmp_path / "edited", n_eval_epochs=5)
    edit(tmp_path / "broken", bs="many")
    for path in ("linear_accuracy.json", "environment.json"):
        (tmp_path / "half" / path).unlink()
    (tmp_path / "notes").mkdir()
    return tmp_path


def rows(*argv):
    result = run("compare", *argv, "--csv")
    assert result.code == 0, result.err
    return {row["experiment"]: row for row in csv.DictReader(io.StringIO(result.out))}


def test_results_are_shown_of_finished_runs_alone_and_what_differs(logs):
    table = rows(logs)
    assert list(table) == ["a", "b", "broken", "edited", "half"]
    assert list(table["a"]) == ["experiment", "n_eval_epochs", "eval_lr", *compare.RESULTS]
    for name in ("a", "b"):
        result = files.read_json(logs / name / "linear_accuracy.json")
        assert (float(table[name]["top1"]), float(table[name]["knn_top1"])) == (
            result["top1"],
            result["knn_top1"],
        )
        assert (table[name]["device"], table[name]["status"]) == ("cpu", "finished")
        assert float(table[name]["seconds"]) > 0
    assert [table[name]["eval_lr"] for name in ("a", "b")] == ["", "1e-06"]
    others = {
        "edited": "edited since it finished (n_eval_epochs)",
        "broken": "broken: ",
        "half": "unfinished, epoch 1 step 6",
    }
    for name, status in others.items():
        assert table[name]["status"].startswith(status) and table[name]["top1"] == ""
    assert "bs" in table["broken"]["status"]


def test_sorted_by_any_column_results_falling_and_unknown_ones_last(logs):
    assert list(rows(logs, "--sort", "top1"))[:2] == ["a", "b"]  # 100% and 50%
    assert next(iter(rows(logs, "--sort", "eval_lr"))) == "b"
    assert list(rows(logs, "--sort", "n_eval_epochs"))[-1] == "broken"
    result = run("compare", logs, "--sort", "speed")
    assert (result.code, result.err.count("\n")) == (2, 1) and "knn_top1" in result.err


def test_the_table_for_people_fits_80_columns_and_has_what_is_changed_and_unfinished(
    logs, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "80")
    lines = run("compare", logs).out.splitlines()
    at = lines[0].index("changed settings")
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == [
        "experiment",
        "runs",
        "top1",
        "knn_top1",
        "rank",
        "seconds",
        "changed",
        "settings",
    ]
    starts = [line[at:].split()[0] for line in lines[1:] if line[0] != " "]
    assert starts == [
        "n_eval_epochs=3",
        "n_eval_epochs=3",
        "(broken:",
        "n_eval_epochs=5",
        "n_eval_epochs=3",
    ]
    assert (
        " ".join(line[at:] for line in lines).count(
            "(edited since it finished (n_eval_epochs): resume it)"
        )
        == 1
    )


def test_seeds_share_a_line_and_a_folder_of_log_folders_is_taken(tiny, tmp_path, monkeypatch):
    """The mean and range, of runs that differ in the seed alone; not of one with another rate, or
    without labels.
    """
    monkeypatch.setenv("COLUMNS", "80")
    for seed, options in ((1, ()), (2, ()), (3, ("--eval_lr", "1e-6"))):
        assert (
            run(
                *tiny,
                "--n_epochs",
                "1",
                "--seed",
                seed,
                *options,
                "--log_folder",
                tmp_path / "logs" / "one",
            ).code
            == 0
        )
    found = rows(tmp_path / "logs")
    assert list(found) == [f"one/default__numpatch2_bs4_lr0.3_seed{seed}" for seed in (1, 2, 3)]
    first, second, third = (
        {key: float(row[key]) for key in ("top1", "rank")} for row in found.values()
    )
    _, seeds, other = run("compare", tmp_path / "logs").out.splitlines()
    low, high = sorted((first["top1"], second["top1"]))
    assert seeds.split()[:4] == [
        "one/default",
        "2",
        f"{(low + high) / 2:.2f}",
        f"({low:.1f}-{high:.1f})",
    ]
    assert f"{(first['rank'] + second['rank']) / 2:.1f}" in seeds.split() and "seed=" not in seeds
    assert other.split()[1:3] == ["1", f"{third['top1']:.2f}"] and other.endswith(
        "seed=3 eval_lr=1e-06"
    )


def test_a_run_without_labels_has_its_signs_of_collapse(tiny, tmp_path):
    write_images(tmp_path / "heap" / "a", 12, 0)
    trained_with(
        "--data_dir",
        tmp_path / "heap",
        "--log_folder",
        tmp_path / "logs",
        tiny=tiny,
        tmp_path=tmp_path,
    )
    (row,) = rows(tmp_path / "logs").values()
    signs = files.read_pt(tmp_path / "logs" / RUN / "artifacts" / "train.pt")["collapse"]
    assert (
        {name: float(row[name]) for name in signs} == signs
        and row["top1"] == ""
        and row["status"] == "finished, no probe"
    )


def test_a_run_that_is_in_use_is_running(logs):
    with locked(Run(logs / "half").lock):
        assert rows(logs)["half"]["status"] == "running, epoch 1 step 6"


def test_whatever_lies_in_one_folder_the_others_are_shown(logs, finished):
    names = ("junk", "list", "folder", "digit", "foreign")
    for name in names:
        shutil.copytree(finished, logs / name)
    (logs / "junk" / "environment.json").write_bytes(b"[[]]\xff")
    (logs / "list" / "environment.json").write_text("[[], 1]")
    (logs / "folder" / "lock").mkdir()
    result = logs / "digit" / "linear_accuracy.json"
    result.write_text(result.read_text().replace('"top1": 100.0', '"top1": 90.0'))
    shutil.copy(logs / "b" / "linear_accuracy.json", logs / "foreign")
    found = rows(logs)
    assert [found[name]["top1"] for name in names] == ["", "", "100.0", "", "", ""]
    for name, status in (
        ("a", "finished"),
        ("junk", "unfinished"),
        ("list", "unfinished"),
        ("folder", "finished"),
        ("digit", "linear_accuracy.json is missing or damaged: resume it"),
        ("foreign", "missing or damaged"),
    ):
        assert status in found[name]["status"]
    assert run("resume", "--exp_dir", logs / "digit").code == 0
    assert rows(logs)["digit"]["top1"] == "100.0"


def test_no_experiments(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        result = run("compare", folder)
        assert (result.code, result.err.count("\n")) == (2, 1) and str(folder) in result.err


def test_a_reader_that_leaves_early(logs):
    """main.py compare logs | head -0"""
    command = [sys.executable, ROOT / "main.py", "compare", logs]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
