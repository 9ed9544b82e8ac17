"""The experiments of a log folder side by side."""

import csv
import fcntl
import io
from pathlib import Path

import experiment
import journal
from experiment import PARAMS, UsageError

RESULTS = ("top1", "top5", "knn_top1", "seconds", "device", "status")


def table(log_folder, sort=None):
    """(columns, rows): a dict of texts and numbers for each experiment, sorted by its name or by a column, the best or greatest
    result first; the columns are the name, the hyperparameters that differ, and RESULTS.

    Raises UsageError where there is no experiment, or no such column.
    """
    folders = [path for path in sorted(Path(log_folder).glob("*")) if is_run_folder(path)]
    if not folders:
        raise UsageError(f"{log_folder} has no run folders: name the folder that they are in")
    runs = {path.name: read_run(path) for path in folders}
    settings = [run["hparams"] for run in runs.values() if run["hparams"]]
    names = [p.name for p in PARAMS if p.stage != "none" and len({str(hp[p.name]) for hp in settings}) > 1]
    columns = ["experiment", *names, *RESULTS]
    rows = []
    for name, run in runs.items():
        differ = {key: run["hparams"][key] for key in names} if run["hparams"] else {}
        rows.append({"experiment": name, **differ, **run["row"]})
    if sort and sort not in columns:
        raise UsageError(f"sort {sort}: no such column; choose from {', '.join(columns)}")
    if sort:
        known = [row for row in rows if row.get(sort) is not None]
        falling = sort in ("top1", "top5", "knn_top1")
        known.sort(key=lambda row: (isinstance(row[sort], str), row[sort]), reverse=falling)
        rows = known + [row for row in rows if row.get(sort) is None]
    return columns, rows


def is_run_folder(path):
    """Anything that a run leaves, also one whose hparams.yaml is gone."""
    return any((path / name).exists() for name in ("hparams.yaml", "checkpoints", "environment.json"))


def read_run(exp_dir):
    """{"hparams": a dict, None if they can't be read, "row": the RESULTS that are known}, from small files alone."""
    try:
        hp = vars(experiment.read_hparams(exp_dir))
    except UsageError as error:
        return {"hparams": None, "row": {"status": f"broken: {error}"}}
    launches = journal.read_launches(exp_dir)
    trained = [launch for launch in launches if "training" in launch.get("stages", ())]
    row = {"device": trained[-1].get("device") if trained else None, "status": status(exp_dir, hp, launches)}
    if row["status"] == "finished":
        result = experiment.read_json(exp_dir / "linear_accuracy.json")
        row |= {key: result[key] for key in ("top1", "top5", "knn_top1") if key in result}
        row["seconds"] = round(sum(launches[-1]["seconds"].values()), 1)
        row["status"] += "" if result else ", no probe"
    return {"hparams": hp, "row": row}


def status(exp_dir, hp, launches):
    """What became of a run. Its results count only if they are those of its hparams.yaml as that is now."""
    if in_use(exp_dir):
        return f"running, {progress(exp_dir)}"
    if not launches or launches[-1].get("outcome") != "finished":
        outcome = launches[-1].get("outcome") if launches else None  # None: killed
        return f"unfinished: {outcome.split(';')[0]}" if outcome else f"unfinished, {progress(exp_dir)}"
    finished_with = launches[-1].get("hparams", {})
    edited = [p.name for p in PARAMS if p.stage != "none" and finished_with.get(p.name) != hp[p.name]]
    if edited:
        return f"edited since it finished ({', '.join(edited)}): resume it"
    return "finished"


def progress(exp_dir):
    lines = [line for line in journal.read_metrics(exp_dir) if "epoch" in line]
    return f"epoch {lines[-1]['epoch']} step {lines[-1]['step']}" if lines else "no step yet"


def in_use(exp_dir):
    """Whether a process works in the run folder; see experiment.locked."""
    try:
        with open(exp_dir / "lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def text(column, value):
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.2f}" if column in ("top1", "top5", "knn_top1") else f"{value:g}"
    return str(value)


def as_text(columns, rows, width=60):
    """The table in columns of one width, what is longer cut off; but for the last one, the status."""
    cells = [columns] + [[text(column, row.get(column)) for column in columns] for row in rows]
    cells = [[cell if len(cell) <= width else cell[: width - 3] + "..." for cell in line[:-1]] + line[-1:] for line in cells]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns) - 1)]
    return "\n".join("  ".join([cell.ljust(n) for cell, n in zip(line, widths, strict=False)] + line[-1:]) for line in cells)


def as_csv(columns, rows):
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().rstrip("\n")
