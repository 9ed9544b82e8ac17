"""The experiments of a log folder side by side."""

import csv
import io
import shutil
import textwrap
from pathlib import Path

from evaluate import METRICS
from experiment import Run
from hparams import SETTINGS
from infra import files
from infra.console import log
from infra.errors import UsageError

ACCURACIES, SIGNS = ("top1", "top5", *METRICS), ("rank", "alignment", "uniformity")
RESULTS = (*ACCURACIES, *SIGNS, "seconds", "device", "status")
FINISHED, NO_PROBE = "finished", "finished, no probe"  # states of a run whose results count
COMPARED = [name for name, setting in SETTINGS.items() if setting.stage != "none"]
SHOWN = {
    "top1": 2,
    "knn_top1": 2,
    "rank": 1,
    "seconds": 0,
}  # columns for people, and their digits after the point


def add_compare(commands):
    """Add the command compare."""
    parser = commands.add_parser(
        "compare",
        help="the experiments of a folder as a table",
        description=(
            "The experiments of a folder as a table: accuracies in percent, effective rank, seconds, changed settings, and what is "
            "not finished. Runs that differ in their seed alone are one line: their mean, and the range of top-1."
        ),
    )
    parser.add_argument(
        "log_folder",
        type=Path,
        metavar="LOG_FOLDER",
        help="folder of run folders, or of such folders",
    )
    parser.add_argument(
        "--csv",
        action="store_true",
        help="comma-separated values: a line and all results for each run",
    )
    parser.add_argument(
        "--sort",
        metavar="KEY",
        help="sort by this column; accuracies descending (default: by name)",
    )
    parser.set_defaults(command=compare_command)


def compare_command(args):
    """Print the table."""
    columns, rows = table(args.log_folder, args.sort)
    log.info(
        as_csv(columns, rows)
        if args.csv
        else as_text(columns, rows, shutil.get_terminal_size().columns)
    )


def table(log_folder, sort=None):
    """Return (columns, rows). The columns are the name, the settings that differ, and RESULTS. A
    row is a dict.

    sort: a column; accuracies descending, others ascending, unknown values last. Default: by name.
    Raises UsageError if there is no experiment, or no such column.
    """
    folder = Path(log_folder)
    runs = run_folders(folder.glob("*")) or run_folders(folder.glob("*/*"))
    if not runs:
        raise UsageError(f"{log_folder} has no run folders: name the folder that they are in")
    read = {str(run.dir.relative_to(folder)): read_or_broken(run) for run in runs}
    known = [hp for hp, _ in read.values() if hp]
    differing = [name for name in COMPARED if len({str(getattr(hp, name)) for hp in known}) > 1]
    columns, rows = ["experiment", *differing, *RESULTS], []
    for name, (hp, results) in read.items():
        settings = {key: getattr(hp, key) for key in differing} if hp else {}
        rows.append({"experiment": name, **settings, **results})
    if sort and sort not in columns:
        raise UsageError(f"sort {sort}: no such column; choose from {', '.join(columns)}")
    return columns, sorted_by(sort, rows) if sort else rows


def run_folders(paths):
    return [run for run in map(Run, sorted(paths)) if is_run_folder(run)]


def sorted_by(column, rows):
    known = [row for row in rows if row.get(column) is not None]
    known.sort(
        key=lambda row: (isinstance(row[column], str), row[column]), reverse=column in ACCURACIES
    )
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
        found = {**launches[-1].get("collapse", {}), **run.read_result()}
        results |= {name: value for name, value in found.items() if name in (*ACCURACIES, *SIGNS)}
        results["seconds"] = round(sum(launches[-1]["seconds"].values()), 1)
    return hp, results


def status(run, hp):
    """Return what became of a run.

    Its results count only if they are those of its hparams.yaml as it is now.
    """
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
    return (
        FINISHED
        if run.read_result()
        else f"finished, but its {run.result.name} is missing or damaged: resume it"
    )


def progress(run):
    lines = [line for line in files.read_jsonl(run.metrics) if "epoch" in line and "step" in line]
    return f"epoch {lines[-1]['epoch']} step {lines[-1]['step']}" if lines else "no step yet"


def as_text(columns, rows, width=80):
    """Return the table for people, as wide as a terminal.

    Finished runs that differ in their seed alone share a line.
    """
    settings = [name for name in columns if name not in ("experiment", *RESULTS)]
    lines = [["experiment", "runs", *SHOWN, "changed settings"]]
    for group in grouped(rows, settings):
        lines.append([short(group[0]["experiment"]), *cells(group), told(group, settings)])
    shown = [i for i in range(len(lines[0])) if any(line[i] for line in lines[1:])]
    lines = [[line[i] for i in shown] for line in lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(shown) - 1)]
    text = []
    for line in lines:
        start = "".join(cell.ljust(n + 2) for cell, n in zip(line, widths, strict=False))
        text += textwrap.wrap(
            line[-1],
            max(width, len(start) + 20),
            initial_indent=start,
            subsequent_indent=" " * len(start),
            break_on_hyphens=False,
        ) or [start.rstrip()]
    return "\n".join(text)


def grouped(rows, settings):
    """Return lists of rows: finished ones with the same settings but for the seed, and each other
    one alone.
    """
    groups = {}
    for i, row in enumerate(rows):
        same = [str(row.get(name)) for name in settings if name != "seed"]
        groups.setdefault(tuple(same) if row["status"] in (FINISHED, NO_PROBE) else i, []).append(
            row
        )
    return list(groups.values())


def cells(group):
    """Return the text of each column of SHOWN for runs that share a line: the means, and the range
    of top-1.
    """
    texts = [str(len(group))]
    for name, digits in SHOWN.items():
        values = [row[name] for row in group if row.get(name) is not None]
        text = f"{sum(values) / len(values):.{digits}f}" if values else ""
        if name == "top1" and len(values) > 1:
            text += f" ({min(values):.1f}-{max(values):.1f})"
        texts.append(text)
    return texts


def told(group, settings):
    """Return, as a text, the settings in which runs differ and that are not the default, and the
    status if it is not finished.
    """
    row = group[0]
    parts = [
        f"{name}={row[name]}"
        for name in settings
        if name in row
        and row[name] != SETTINGS[name].default
        and (name != "seed" or len(group) == 1)
    ]
    return " ".join(parts + ([] if row["status"] == FINISHED else [f"({row['status']})"]))


def short(name, width=30):
    """Return the name of a run folder without the settings in it."""
    name = name.partition("__numpatch")[0]
    return name if len(name) <= width else name[: width - 3] + "..."


def as_csv(columns, rows):
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().rstrip("\n")
