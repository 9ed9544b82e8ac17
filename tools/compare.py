"""The experiments of a log folder side by side."""

import csv
import io
from pathlib import Path

from evaluate import METRICS
from experiment import Run
from hparams import SETTINGS
from infra import files
from infra.console import log
from infra.errors import UsageError

ACCURACIES = ("top1", "top5", *METRICS)
RESULTS = (*ACCURACIES, "seconds", "device", "status")
FINISHED, NO_PROBE = "finished", "finished, no probe"  # states of a run whose results count
COMPARED = [name for name, setting in SETTINGS.items() if setting.stage != "none"]


def add_commands(commands):
    """Add the command compare."""
    parser = commands.add_parser("compare", help="the experiments of a folder as a table", description=(
        "The experiments of a folder as a table: the settings in which they differ, accuracies in percent, seconds, device, and "
        "whether they are finished."))  # fmt: skip
    parser.add_argument("log_folder", type=Path, metavar="LOG_FOLDER", help="folder of run folders")
    parser.add_argument("--csv", action="store_true", help="comma-separated values")
    parser.add_argument("--sort", metavar="KEY", help="sort by this column; accuracies descending (default: by name)")
    parser.set_defaults(command=compare_command)


def compare_command(args):
    """Print the table."""
    log.info((as_csv if args.csv else as_text)(*table(args.log_folder, args.sort)))


def table(log_folder, sort=None):
    """Return (columns, rows). The columns are the name, the settings that differ, and RESULTS. A row is a dict.

    sort: a column; accuracies descending, others ascending, unknown values last. Default: by name. Raises UsageError if there
    is no experiment, or no such column.
    """
    runs = [run for run in map(Run, sorted(Path(log_folder).glob("*"))) if is_run_folder(run)]
    if not runs:
        raise UsageError(f"{log_folder} has no run folders: name the folder that they are in")
    read = {run.dir.name: read_or_broken(run) for run in runs}
    known = [hp for hp, _ in read.values() if hp]
    differing = [name for name in COMPARED if len({str(getattr(hp, name)) for hp in known}) > 1]
    columns, rows = ["experiment", *differing, *RESULTS], []
    for name, (hp, results) in read.items():
        settings = {key: getattr(hp, key) for key in differing} if hp else {}
        rows.append({"experiment": name, **settings, **results})
    if sort and sort not in columns:
        raise UsageError(f"sort {sort}: no such column; choose from {', '.join(columns)}")
    return columns, sorted_by(sort, rows) if sort else rows


def sorted_by(column, rows):
    known = [row for row in rows if row.get(column) is not None]
    known.sort(key=lambda row: (isinstance(row[column], str), row[column]), reverse=column in ACCURACIES)
    return known + [row for row in rows if row.get(column) is None]


def is_run_folder(run):
    """Whether a folder holds anything that a run leaves; hparams.yaml may be gone."""
    return any(path.exists() for path in (run.hparams_yaml, run.checkpoints, run.launches))


def read_or_broken(run):
    """Return what read_run returns, or None and a status that says why the folder can't be read."""
    try:
        return read_run(run)
    except Exception as error:  # whatever lies in one folder, the others are shown
        return None, {"status": f"broken: {' '.join(str(error).split())[:200]}"}


def read_run(run):
    """Return (Hparams, a dict of the RESULTS that are known). It reads small files only."""
    hp, launches = run.read_hparams(), run.read_launches()
    trained = [launch for launch in launches if "training" in launch.get("stages", ())]
    results = {"device": trained[-1].get("device") if trained else None, "status": status(run, hp)}
    if results["status"] in (FINISHED, NO_PROBE):
        results |= {name: value for name, value in run.read_result().items() if name in ACCURACIES}
        results["seconds"] = round(sum(launches[-1]["seconds"].values()), 1)
    return hp, results


def status(run, hp):
    """Return what became of a run. Its results count only if they are those of its hparams.yaml as it is now."""
    if run.in_use():
        return f"running, {progress(run)}"
    launches = run.read_launches()
    if not launches or launches[-1].get("outcome") != "finished":
        outcome = launches[-1].get("outcome") if launches else None  # None: killed
        return f"unfinished: {outcome.split(';')[0]}" if outcome else f"unfinished, {progress(run)}"
    finished_with = launches[-1].get("hparams", {})
    edited = [name for name in COMPARED if finished_with.get(name) != getattr(hp, name)]
    if edited:
        return f"edited since it finished ({', '.join(edited)}): resume it"
    if launches[-1]["result"] is None:
        return NO_PROBE
    return FINISHED if run.read_result() else f"finished, but its {run.result.name} is missing or damaged: resume it"


def progress(run):
    lines = [line for line in files.read_jsonl(run.metrics) if "epoch" in line and "step" in line]
    return f"epoch {lines[-1]['epoch']} step {lines[-1]['step']}" if lines else "no step yet"


def text(column, value):
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.2f}" if column in ACCURACIES else f"{value:g}"
    return str(value)


def as_text(columns, rows, width=60):
    """Return the table in aligned columns. Cells are cut to `width`, except those of the last column, the status."""
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
