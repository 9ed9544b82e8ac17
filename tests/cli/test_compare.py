import csv
import io
import os
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, edit, run

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
        assert (float(table[name]["top1"]), float(table[name]["knn_top1"])) == (result["top1"], result["knn_top1"])
        assert (table[name]["device"], table[name]["status"]) == ("cpu", "finished")
        assert float(table[name]["seconds"]) > 0
    assert [table[name]["eval_lr"] for name in ("a", "b")] == ["", "1e-06"]
    others = {"edited": "edited since it finished (n_eval_epochs)", "broken": "broken: ", "half": "unfinished, epoch 1 step 6"}
    for name, status in others.items():
        assert table[name]["status"].startswith(status) and table[name]["top1"] == ""
    assert "bs" in table["broken"]["status"]


def test_sorted_by_any_column_results_falling_and_unknown_ones_last(logs):
    assert list(rows(logs, "--sort", "top1"))[:2] == ["a", "b"]  # 100% and 50%
    assert next(iter(rows(logs, "--sort", "eval_lr"))) == "b"
    assert list(rows(logs, "--sort", "n_eval_epochs"))[-1] == "broken"
    result = run("compare", logs, "--sort", "speed")
    assert (result.code, result.err.count("\n")) == (2, 1) and "knn_top1" in result.err


def test_the_table_for_people_lines_up(logs):
    lines = run("compare", logs).out.splitlines()
    at = lines[0].index("status")
    assert [line[at:].split()[0].rstrip(",:") for line in lines[1:]] == ["finished", "finished", "broken", "edited", "unfinished"]


def test_a_run_that_is_in_use_is_running(logs):
    with locked(Run(logs / "half").lock):
        assert rows(logs)["half"]["status"] == "running, epoch 1 step 6"


def test_whatever_lies_in_one_folder_the_others_are_shown(logs, finished):
    names = ("junk", "list", "folder", "digit", "fifo", "foreign")
    for name in names:
        shutil.copytree(finished, logs / name)
    (logs / "junk" / "environment.json").write_bytes(b"[[]]\xff")
    (logs / "list" / "environment.json").write_text("[[], 1]")
    (logs / "folder" / "lock").mkdir()
    result = logs / "digit" / "linear_accuracy.json"
    result.write_text(result.read_text().replace('"top1": 100.0', '"top1": 90.0'))
    (logs / "fifo" / "hparams.yaml").unlink()
    os.mkfifo(logs / "fifo" / "hparams.yaml")
    shutil.copy(logs / "b" / "linear_accuracy.json", logs / "foreign")
    found = rows(logs)
    assert [found[name]["top1"] for name in names] == ["", "", "100.0", "", "", ""]
    for name, status in (("a", "finished"), ("junk", "unfinished"), ("list", "unfinished"), ("folder", "finished"),
                         ("fifo", "broken: "), ("digit", "linear_accuracy.json is missing or damaged: resume it"),
                         ("foreign", "missing or damaged")):  # fmt: skip
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
    assert b"Traceback" not in process.stderr.read()
