"""The experiments of a log folder side by side."""

import csv
import io
import re
import shutil
import textwrap
from pathlib import Path

from evaluate import METRICS
from experiment import Run
from hparams import SETTINGS
from infra import files
from infra.console import log
from infra.errors import UsageError

ACCURACIES = ("top1", "balanced", "top5", *METRICS)
COLLAPSE = ("rank", "alignment", "uniformity")  # as in evaluate.collapse_metrics
RESULT_COLUMNS = (*ACCURACIES, *COLLAPSE, "seconds", "device", "status")
# The status of a run whose results count.
FINISHED = "finished"
NO_PROBE = "finished, no probe"
# The settings that change a result.
COMPARED = [name for name, setting in SETTINGS.items() if setting.stage != "none"]
# Settings that each row has, though they may be no column: what `is_further_seed` needs.
HIDDEN_SETTINGS = ("seed", "n_images", "data_dir", "labels")
# Where the seconds of a run were measured.
MACHINE = ("device", "processor", "cores", "processes", "precision")
# Columns of the table for people, and their digits after the point.
DIGITS = {"top1": 2, "balanced": 2, "knn_top1": 2, "rank": 1, "seconds": 0}


def add_compare(commands):
    """Add the command compare."""
    parser = commands.add_parser(
        "compare",
        help="the experiments of a folder as a table",
        description="The experiments of a folder as a table: accuracies in percent, effective "
        "rank, seconds, changed settings, and what is not finished. Runs on the same images that "
        "differ in their seed alone are one line: their mean, and the range of top-1.",
    )
    parser.add_argument(
        "log_folder",
        type=files.user_path,
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
    columns, rows = run_table(args.log_folder, args.sort)
    if args.csv:
        log.info(as_csv(columns, rows))
    else:
        log.info(as_text(columns, rows, shutil.get_terminal_size().columns))


def run_table(log_folder, sort=None):
    """Return (columns, rows), a row being a dict.

    The columns are the name, the settings that differ, and RESULT_COLUMNS. sort: a column;
    accuracies descending, others ascending, unknown values last. Default: by name. Raises
    UsageError if there is no experiment, or no such column.
    """
    folder = Path(log_folder)
    runs = run_folders(folder.glob("*")) or run_folders(folder.glob("*/*"))
    if not runs:
        raise UsageError(f"{log_folder} has no run folders: name the folder that they are in")
    contents = {str(run.dir.relative_to(folder)): read_or_broken(run) for run in runs}
    hparams = [hp for hp, _ in contents.values() if hp]
    differing = [name for name in COMPARED if len({str(getattr(hp, name)) for hp in hparams}) > 1]
    columns = ["experiment", *differing, *RESULT_COLUMNS]
    if sort and sort not in columns:
        raise UsageError(f"sort {sort}: no such column; choose from {', '.join(columns)}")
    rows = []
    for name, (hp, results) in contents.items():
        settings = {key: getattr(hp, key) for key in (*differing, *HIDDEN_SETTINGS)} if hp else {}
        rows.append({"experiment": name, **settings, **results})
    return columns, sorted_by(sort, rows) if sort else rows


def run_folders(paths):
    """Return the Runs of those paths that are run folders, sorted."""
    return [run for run in map(Run, sorted(paths)) if is_run_folder(run)]


def is_run_folder(run):
    """Whether a folder holds anything that a run leaves; hparams.yaml may be gone."""
    return any(path.exists() for path in (run.hparams_yaml, run.checkpoints, run.launches))


def sorted_by(column, rows):
    """Return the rows sorted by a column: numbers before text, rows without a value last."""
    known = [row for row in rows if row.get(column) is not None]
    unknown = [row for row in rows if row.get(column) is None]
    known.sort(
        key=lambda row: (isinstance(row[column], str), row[column]), reverse=column in ACCURACIES
    )
    return known + unknown


def read_or_broken(run):
    """Return what read_results_of returns, or None and a status that says why it can't."""
    try:
        return read_results_of(run)
    except Exception as error:  # whatever is in one folder, the others are shown
        return None, {"status": f"broken: {' '.join(str(error).split())[:200]}"}


def read_results_of(run):
    """Return (Hparams, a dict of the RESULT_COLUMNS that are known). It reads small files only.

    Of a finished run, the dict also has data, the fingerprints of the images; n, their number in
    each split; and machine, where it was trained.
    """
    hp = run.read_hparams()
    launches = run.read_launches()
    trained = [launch for launch in launches if "training" in launch.get("stages", ())]
    results = {"device": trained[-1].get("device") if trained else None, "status": status(run, hp)}
    if results["status"] in (FINISHED, NO_PROBE):
        result = run.read_result()
        measured = {**launches[-1].get("collapse", {}), **result}
        results["balanced"] = result.get("balanced_top1")
        results["data"] = launches[-1].get("data") or result.get("key", {}).get("data", {})
        results["n"] = [result.get("n_train"), result.get("n_test")]
        results["machine"] = [trained[-1].get(name) for name in MACHINE] if trained else []
        for name in (*ACCURACIES, *COLLAPSE):
            if name in measured:
                results[name] = measured[name]
        results["seconds"] = round(sum(launches[-1]["seconds"].values()), 1)
    return hp, results


def status(run, hp):
    """Return what became of a run.

    Its results count only if they are those of its hparams.yaml as it is now.
    """
    if run.in_use():
        return f"running, {last_step(run)}"
    launches = run.read_launches()
    outcome = launches[-1].get("outcome") if launches else None
    if not outcome:  # killed
        return f"unfinished, {last_step(run)}"
    if outcome != "finished":
        return f"unfinished: {outcome.split(';')[0]}"
    finished_with = launches[-1].get("hparams", {})
    edited = [name for name in COMPARED if finished_with.get(name) != getattr(hp, name)]
    if edited:
        return f"edited since it finished ({', '.join(edited)}): resume it"
    if launches[-1]["result"] is None:
        return NO_PROBE
    if not run.read_result():
        return f"finished, but its {run.result.name} is missing or damaged: resume it"
    return FINISHED


def last_step(run):
    """Return the last step in metrics.jsonl as a text."""
    lines = [line for line in files.read_jsonl(run.metrics) if "epoch" in line and "step" in line]
    return f"epoch {lines[-1]['epoch']} step {lines[-1]['step']}" if lines else "no step yet"


def as_csv(columns, rows):
    """Return the table as comma-separated values."""
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().rstrip("\n")


def as_text(columns, rows, width=80):
    """Return the table for people, as wide as a terminal.

    Finished runs on the same images that differ in their seed alone share a line. The last column
    is wrapped, and columns without any value are left out.
    """
    settings = [name for name in columns if name not in ("experiment", *RESULT_COLUMNS)]
    lines = [["experiment", "runs", *DIGITS, "changed settings"]]
    for group in grouped(rows, settings):
        name = display_name(group[0]["experiment"])
        lines.append([name, str(len(group)), *means(group), changes(group, settings)])
    *columns, last = [column for column in zip(*lines, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    text = []
    for *cells, end in zip(*columns, last, strict=True):
        start = "".join(cell.ljust(n + 2) for cell, n in zip(cells, widths, strict=True))
        wrapped = textwrap.wrap(
            end,
            max(width, len(start) + 16),
            initial_indent=start,
            subsequent_indent=" " * len(start),
            break_on_hyphens=False,
        )
        text += wrapped or [start.rstrip()]
    return "\n".join(text)


def grouped(rows, settings):
    """Return lists of rows: those that share a line of the table for people."""
    groups = []
    for row in rows:
        group = next((group for group in groups if is_further_seed(row, group, settings)), None)
        if group:
            group.append(row)
        else:
            groups.append([row])
    return groups


def is_further_seed(row, group, settings):
    """Whether the run of a row and those of a group differ in their seeds alone.

    A copy of one of them has its seed, and a run that --no-resume moved aside was replaced.
    """
    first = group[0]
    if any(one["status"] not in (FINISHED, NO_PROBE) for one in (row, first)):
        return False
    if any(is_moved_aside(one["experiment"]) for one in (row, first)):
        return False
    if row["seed"] in [other["seed"] for other in group]:
        return False
    is_same = all(str(row[name]) == str(first[name]) for name in settings if name != "seed")
    return is_same and have_same_data(row, first)


def have_same_data(one, other):
    """Whether two rows are of runs on the same images, but for what their seeds chose of them.

    A seed chooses the training images with n_images, and the held-out test images where there is no
    test/. Then the folder and the numbers of images must be the same.
    """
    same_folder = all(one[name] == other[name] for name in ("data_dir", "labels", "n"))
    if not (one["data"] and other["data"]):  # a run without labels of an earlier version
        return same_folder
    if one["data"] == other["data"]:
        return True
    if one["data"]["class_names"] != other["data"]["class_names"]:
        return False
    if one["data"]["test"] != other["data"]["test"]:
        return same_folder
    return one["n_images"] is not None and (one["data"]["test"] is not None or same_folder)


def means(group):
    """Return the text of each column of DIGITS: the means of some rows, and the range of top-1.

    The seconds of different machines have no mean.
    """
    texts = []
    for name, digits in DIGITS.items():
        values = [row[name] for row in group if row.get(name) is not None]
        if name == "seconds" and any(row["machine"] != group[0]["machine"] for row in group[1:]):
            values = []
        text = f"{sum(values) / len(values):.{digits}f}" if values else ""
        if name == "top1" and len(values) > 1:
            text += f" ({min(values):.1f}-{max(values):.1f})"
        texts.append(text)
    return texts


def changes(group, settings):
    """Return a text with the settings of a group that are not the default, and its status.

    A status of finished is left out, and so is the seed if it is not that of all rows.
    """
    row = group[0]
    texts = []
    for name in settings:
        is_shared = name != "seed" or len(group) == 1
        if name in row and row[name] != SETTINGS[name].default and is_shared:
            texts.append(f"{name}={row[name]}")
    if row["status"] != FINISHED:
        texts.append(f"({row['status']})")
    return " ".join(texts)


def is_moved_aside(name):
    """Whether a run folder has the name that Run.move_aside gives it."""
    return re.search(r"\.old\d+$", name) is not None


def display_name(name, width=30):
    """Return the name of a run folder without the settings in it."""
    aside = f".{name.rpartition('.')[2]}" if is_moved_aside(name) else ""
    name = name.partition("__numpatch")[0].removesuffix(aside) + aside
    return name if len(name) <= width else name[: width - 3] + "..."
