"""The studies: rows that are run once, the tables that are made of them, and their versions."""

import json
import re
import statistics
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import ROOT

import cli
import train
from benchmarks import common, rows, study, tables
from infra import metrics

RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


@pytest.fixture
def options(images, tmp_path, monkeypatch):
    tiny = "--image_size 16 --arch resnet10-tiny --h_dim 8 --z_dim 4 --n_patches 2 --bs 4"
    monkeypatch.setitem(rows.GROUPS, "findings-cpu", f"{tiny} --n_epochs 1 --n_eval_epochs 3")
    data = {"dataset": "folder", "data_dir": str(images), "log_folder": str(tmp_path / "logs")}
    return SimpleNamespace(seeds=2, disturbed=False, out=tmp_path, **data)


def hparams(argv):
    return cli.hparams_of(cli.parse(argv))


@pytest.mark.parametrize("group", rows.GROUPS)
def test_each_row_is_a_command_that_the_program_takes(group):
    options = SimpleNamespace(log_folder=None, dataset="cifar10", data_dir="./datasets")
    base = hparams(["train", *rows.GROUPS[group].split()])
    for row in rows.rows_of(group):
        hp = hparams(study.arguments(row, 42, options))
        text = row.options.replace("--no-", "--") + " "
        names = {name for name in vars(hp) if f"--{name} " in text}
        assert set(base.differences(hp)) - {"seed"} == names, row.name  # says nothing twice


def test_rows_are_run_once_and_a_failed_one_says_so(options, monkeypatch):
    base = rows.Row("findings-cpu", "base", "the base", "", 2, "89.25 (document)")
    broken = base._replace(name="broken", title="diverges", options="--optimizer sgd --lr 1e6")
    for row in (base, broken):
        study.study(row, options)
    path = options.out / "findings-cpu.json"
    text = path.read_text()
    results = json.loads(text)
    folders = [next(Path(options.log_folder).glob(f"base-{seed}__*")) for seed in (42, 43)]
    accuracies = [json.loads((folder / "linear_accuracy.json").read_text()) for folder in folders]
    top1 = [run["top1"] for run in results["base"]["runs"]]
    assert top1 == [accuracy["top1"] for accuracy in accuracies]
    for run, folder in zip(results["base"]["runs"], folders, strict=True):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        last = [line for line in lines if "loss_sim" in line][-1]
        assert run["losses"] == [[last["loss_sim"], last["loss_uniformity"]]]
        assert run["commit"] == common.this_commit()
    assert re.search("not finite|is nan", results["broken"]["runs"][0]["failed"])

    monkeypatch.setattr(train, "train_step", lambda *args: pytest.fail("trained again"))
    study.study(base, options)
    assert path.read_text() == text

    monkeypatch.setattr(rows, "ROWS", [base, broken, base._replace(name="later", title="not run")])
    monkeypatch.setattr(tables, "RESULTS_FOLDER", options.out)
    table = tables.study_table("findings-cpu", tables.FINDINGS_COLUMNS)
    spread = f"{sum(top1) / 2:.1f}% ({min(top1):.1f} to {max(top1):.1f})"
    assert f"| the base (`base`) |  | 89.25 (document) | {spread} | " in table
    failed = results["broken"]["runs"][0]["failed"].split(";")[0]
    assert f"| `--optimizer sgd --lr 1e6` | 89.25 (document) | {failed} |" in table
    assert "not run" not in table
    # A result of other options than the row's is not shown.
    monkeypatch.setitem(rows.GROUPS, "findings-cpu", f"{rows.GROUPS['findings-cpu']} --lr 0.2")
    assert spread not in tables.study_table("findings-cpu", tables.FINDINGS_COLUMNS)


def test_a_stopped_study_leaves_with_the_code(options, monkeypatch):
    monkeypatch.setattr(study, "run_program", lambda argv: 143)
    with pytest.raises(SystemExit, match="143"):
        study.study(rows.Row("findings-cpu", "base", "the base", ""), options)
    assert not (options.out / "findings-cpu.json").exists()


def without_commit(content):
    """Yield the names of the numbers that lie in no dict with a commit."""
    if isinstance(content, dict) and content.get("commit"):
        return
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for name, value in items:
        if isinstance(value, (int, float)) and name != "n_images":
            yield name
        elif isinstance(value, (dict, list)) and name != "machine":
            yield from without_commit(value)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_figure_has_the_commit_that_measured_it(path):
    assert list(without_commit(json.loads(path.read_text()))) == []


def test_figures_of_another_version_are_marked(tmp_path, monkeypatch):
    """In a repository with a file of the method, an old commit of it and the present one."""

    def git(*words):
        identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
        command = ["git", "-C", tmp_path, *identity, *words]
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()

    def committed(text):
        (tmp_path / "loss.py").write_text(text)
        git("add", ".")
        git("commit", "-m", text)
        return git("rev-parse", "HEAD")

    def cell(*commits):
        runs = [{"commit": commit, "top1": 1.0} for commit in commits]
        return tables.study_cell("commit", rows.ROWS[0], runs)

    def code(docs, value):
        function = f'    def f(self):\n        """{docs}"""\n        return {value}'
        return f'"""{docs}"""\nclass A:\n    """{docs}"""\n{function}'

    git("init")
    old, new = committed(code("old", 1)), committed(code("old", 2))
    (tmp_path / "docs.md").write_text("not of the method")
    git("add", ".")
    git("commit", "-m", "docs")
    without_lars = git("rev-parse", "HEAD")
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setattr(metrics, "__file__", str(tmp_path / "infra" / "metrics.py"))
    assert cell(new) == new
    assert cell(new, old) == f"{', '.join(sorted((new, old)))}†"
    assert cell(f"{new}-dirty") == f"{new}-dirty†"
    assert cell("0" * 40) == f"{'0' * 40}‡"
    (tmp_path / "loss.py").write_text(code("new", "2  # a comment"))
    assert cell(new) == new
    assert common.commit_of({"commit": new, "dirty": True}) == new[:7]
    for text in (code("old", '"2"'), "half edited ("):
        (tmp_path / "loss.py").write_text(text)
        assert cell(new) == f"{new}†"
    (tmp_path / "loss.py").unlink()
    assert cell(new) == f"{new}†"
    (tmp_path / "loss.py").write_text(code("old", 2))
    assert cell(new) == new
    (tmp_path / "lars.py").write_text("x = 1")
    git("add", ".")
    assert cell(without_lars) == f"{without_lars}†"
    assert common.commit_of({"commit": new, "dirty": True}) == f"{new[:7]}-dirty"


def test_the_tables_show_the_figures_of_the_files():
    """Some of each kind, computed here from the files."""

    def read(name):
        return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())

    def spread(values):
        mean = f"{statistics.mean(values):.1f}%"
        return mean if len(values) == 1 else f"{mean} ({min(values):.1f} to {max(values):.1f})"

    top1 = [run["top1"] for run in read("laptop")["preset-50000"]["runs"]]
    assert f"| the preset, 50,000 images | {spread(top1)} |" in tables.laptop_table()
    row = read("kmeans")["rows"][0]
    cells = f"{row['n_images']:,} images (`benchmarks/kmeans.py`) | {row['top1']:.1f}% |"
    assert cells in tables.laptop_table()
    peers = read("peers")
    simclr = [row for row in peers["rows"] if (row["method"], row["budget"]) == ("simclr", 60)]
    top1, beside, nearest = (
        [row[name] for row in simclr] for name in ("top1", "with_kmeans_top1", "knn_top1")
    )
    assert f"| SimCLR | {spread(top1)}; {statistics.mean(nearest):.1f}% |" in tables.peers_table()
    assert f"| SimCLR | {spread(beside)} |" in tables.peers_table()
    assert f"untrained: {peers['untrained']['top1']:.1f}%" in tables.peers_table()
    part = read("speed-cpu")["parts"]["tcr"]
    plain, ours = (statistics.median(part[side]["seconds"]) for side in ("baseline", "ours"))
    cells = rf"^\| tcr .* \| {plain / ours:.3g} \(.* \| {ours / part['floor']:.2g} \|"
    assert re.search(cells, tables.speed_table(), re.M)
    choices = read("choices-cpu")["choices"]
    step, as_is = (statistics.median(choices[name]["seconds"]) for name in ("fp32", "as it is"))
    assert f"| fp32 | {step / as_is:.2f} |" in tables.choices_table()
    (search,) = (row for row in peers["rows"] if row["method"] == "search")
    for name, text in (("muon 0.1", "--lr 0.1"), ("muon 0.05, --bs 25", "--bs 25")):
        assert f"| `{text}` | {search['scores'][name]:.1f}% |" in tables.search_table()


def test_the_lead_of_the_preset_and_k_means_at_equal_time(tmp_path, monkeypatch):
    """Of made-up results, in which methods, budgets and seconds are missing."""

    def entry(method, budget, top1, knn_top1):
        about = {"seed": 42, "commit": "0" * 7}
        return {"method": method, "budget": budget, "top1": top1, "knn_top1": knn_top1, **about}

    peers = [
        entry("preset", 60, 70, 60),
        entry("preset", 60, 72, 61),
        entry("simclr", 60, 69, 62),
        entry("vicreg", 60, 69.5, 50),
        entry("supervised", 60, 99, 99),
        entry("preset", 180, 75, 65),
    ]
    kmeans = [(400, 50000, 70, 66.0), (800, 50000, 71, 80.0), (400, 5000, 50, 30.0)]
    names = ("n_centroids", "n_images", "top1", "seconds")
    kmeans = [{**dict(zip(names, row, strict=True)), "commit": "0" * 7} for row in kmeans]
    laptop = {
        "budget-1": {"runs": [{"top1": 60.0, "seconds": {"training": 30, "probe": 10}}]},
        "budget-2": {"runs": [{"top1": 99.0}]},  # of --disturbed
        "preset-50000": {"runs": [{"top1": 80.0, "seconds": {"training": 160}}]},
    }
    for name, content in (("peers", {"rows": peers}), ("kmeans", {"rows": kmeans})):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "laptop.json").write_text(json.dumps(laptop))
    monkeypatch.setattr(tables, "RESULTS_FOLDER", tmp_path)
    _, _, preset, simclr, supervised, kmeans_row, lead = tables.minutes_table().splitlines()
    assert "| 71.0% (70.0 to 72.0) | 75.0% |" in preset
    assert "| 69.0% |  |" in simclr and "| 99.0% |  |" in supervised
    cells = "| 70.0%: 400 centroids, 66 s; 71.0%: 800 centroids, 80 s |  |"
    assert cells in kmeans_row
    assert "| +1.5; +10.5 (VICReg) |  |" in lead
    # 80 s are half way from 40 to 160 s in the logarithm.
    assert "in 80 s k-means with 800 centroids reaches 71.0%, the preset about 70.0%" in (
        tables.kmeans_text()
    )
