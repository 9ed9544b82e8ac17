"""Write the tables of README.md and docs, from benchmarks/results and the declaration of settings.

    python -m benchmarks.tables

A table stands between <!-- NAME --> and <!-- /NAME -->. A test runs this and expects no change.
"""

import argparse
import itertools
import math
import re
import statistics
from functools import partial

from benchmarks.common import RESULTS_FOLDER, ROOT, version_text
from benchmarks.lab import LEFT_OUT, N_QUERIES
from benchmarks.peers import BUDGETS, COMPARED_METHODS, N_FIT, N_SCORED
from benchmarks.peers_methods import METHODS, PRESET_TRY, label
from benchmarks.rows import GROUPS, RUN_BUDGETS, all_options, rows_of
from benchmarks.speed import CHOICES
from benchmarks.transfer import DATA_SETS, N_CENTROIDS, SHARES
from hparams import PRESETS, SETTINGS, STAGES, yaml_value
from infra import files

PAGES = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("guide", "results", "speed")),
)
PEERS_FILES = ("benchmarks/peers.py", "benchmarks/peers_methods.py")
TRANSFER = "python -m benchmarks.transfer --cifar10 DIR --cifar100 DIR"
TRANSFER_FILES = ("benchmarks/transfer.py", "tools/finetune.py")
OTHER_SCORES = ("knn_top1", "with_kmeans_top1")  # beside top1 in the table of peers.py
KMEANS_FILE = "benchmarks/kmeans.py"
EMP_SSL_METHODS = ("preset", "preset-stages")  # of this program
SUMMARY_METHODS = ("preset", "simclr", "supervised")  # in the table of the README
SPEED_FILES = ("benchmarks/speed.py", "benchmarks/baseline.py")
HEADERS = {  # of the columns of study_table
    "options": "options",
    "published": "published, full size",
    "top1": "top-1",
    "train_top1": "top-1 on training images",
    "top5": "top-5",
    "knn_top1": "20-NN",
    "seconds": "seconds",
    "commit": "commit",
    "verdict": "verdict",
}


def markdown(columns, rows):
    """Return a Markdown table. Columns that are empty in all rows are left out."""
    kept = [i for i, name in enumerate(columns) if not name or any(row[i] for row in rows)]
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line[i] for i in kept) + " |" for line in lines)


def results_of(name):
    """Return the content of a file of results, {} if there is none."""
    return files.read_json(RESULTS_FOLDER / f"{name}.json")


def spread(runs, name):
    """Return the mean over the seeds, and the least and the greatest; "" if one lacks the value."""
    values = [run[name] for run in runs if name in run]
    if len(values) < len(runs):
        return ""
    mean = f"{statistics.mean(values):.1f}%"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f} to {max(values):.1f})"


def seconds_of_runs(runs):
    """Return the seconds of each run of study.py or kmeans.py that has them, all stages together.

    A run of study.py --disturbed has none.
    """
    recorded = [run["seconds"] for run in runs if "seconds" in run]
    return [sum(s.values()) if isinstance(s, dict) else s for s in recorded]


def median_seconds(runs):
    """Return the median of seconds_of_runs as a text, "" if there are none."""
    seconds = seconds_of_runs(runs)
    return f"{statistics.median(seconds):.0f}" if seconds else ""


def seeds_text(numbers):
    """Return 1, 2, 3 as "1 to 3 seeds"."""
    few, many = min(numbers), max(numbers)
    if few < many:
        return f"{few} to {many} seeds"
    return "1 seed" if many == 1 else f"{many} seeds"


def measured_by(command, machines):
    """Return the sentence that names the command and the machines."""
    texts = [
        f"{m['processor']}, {m['cores']} cores, {m['device']}, {m['precision']}, Python "
        f"{m['python']}, torch {m['torch']}, torchvision {m['torchvision']}"
        for m in machines
    ]
    return f"Measured by `python -m benchmarks.{command}` on: {'; '.join(dict.fromkeys(texts))}."


def options_table():
    rows = []
    for name, setting in SETTINGS.items():
        names = f"`--{name}`" + (f", `--no-{name}`" if setting.type is bool else "")
        default = "" if setting.default is None else f"`{yaml_value(setting.default)}`"
        choices = ", ".join(f"`{choice}`" for choice in setting.choices or ())
        text = f"{setting.help}: {choices}" if choices else setting.help
        rows.append([names, default, STAGES[setting.stage], text])
    return markdown(["option", "default", "touches", ""], rows)


def presets_list():
    """Return a line for each preset: the options that it stands for."""
    lines = []
    for preset, settings in PRESETS.items():
        words = [
            f"--{name}" if value is True else f"--{name} {value}"
            for name, value in settings.items()
        ]
        lines.append(f"    --preset {preset}: {' '.join(words)}")
    return "\n".join(lines)


def study_table(group, columns, others=()):
    """Return the table of a group of study.py with these columns of HEADERS.

    A row without a result of its present options is left out. others: rows to add.
    """
    results = results_of(group)
    entries = []
    rows = []
    for row in rows_of(group):
        entry = results.get(row.name)
        if not entry or entry["options"] != all_options(row):
            continue
        entries.append(entry)
        title = f"{row.title} (`{row.name}`)" if "options" in columns else row.title
        rows.append([title, *(study_cell(name, row, entry["runs"]) for name in columns)])
    text = markdown(["", *(HEADERS[name] for name in columns)], [*rows, *others]) + "\n\n"
    if "options" in columns:
        text += f"Every row starts from `{GROUPS[group]}`. In brackets is the name for `--only`. "
    if not entries:
        return text.rstrip()
    n_images = entries[0]["n_images"]
    data = entries[0]["data"]
    size = f"{n_images:,} training images of " if n_images else ""
    seeds = seeds_text([len(entry["runs"]) for entry in entries])
    text += f"{size}{data}, all test images; mean (least to greatest) of {seeds}. "
    return text + measured_by(f"study {group}", [entry["machine"] for entry in entries])


def study_cell(name, row, runs):
    """Return the cell of a column of HEADERS."""
    if name == "options":
        return f"`{row.options}`".replace("{base}", "LAST.pt") if row.options else ""
    if name in ("published", "verdict"):
        return getattr(row, name)
    if name == "commit":
        return version_text(runs)
    done = [run for run in runs if "failed" not in run]
    if not done:
        return runs[0]["failed"].split(";")[0] if name == "top1" else ""
    if name == "seconds":
        return median_seconds(done)
    return spread(done, name)


def kmeans_runs():
    """Return {(centroids, images): runs} of kmeans.json."""
    groups = {}
    for row in results_of("kmeans")["rows"]:
        groups.setdefault((row["n_centroids"], row["n_images"]), []).append(row)
    return dict(sorted(groups.items()))


def laptop_table():
    """Return the table of --preset laptop, and k-means."""
    rows = []
    for (n_centroids, n_images), runs in kmeans_runs().items():
        title = f"k-means, {n_centroids} centroids, {n_images:,} images (`benchmarks/kmeans.py`)"
        accuracies = [spread(runs, "top1"), spread(runs, "train_top1"), ""]
        commit = version_text(runs, KMEANS_FILE)
        rows.append([title, *accuracies, median_seconds(runs), commit])
    return study_table("laptop", ("top1", "train_top1", "knn_top1", "seconds", "commit"), rows)


def headline():
    """Return the sentence of the README on the whole run of --preset laptop."""
    entry = results_of("laptop")["preset-50000"]
    runs, m = entry["runs"], entry["machine"]
    return (
        f"A linear probe of `--preset laptop` classifies **{spread(runs, 'top1')}** of the test "
        f"images of CIFAR-10 correctly, 20-NN {spread(runs, 'knn_top1')}. Training, encoding and "
        f"probe take {median_seconds(runs)} seconds ({seeds_text([len(runs)])}, {m['cores']} cores "
        f"of {article(m['processor'])}, {m['precision']}; commit {version_text(runs)})."
    )


def article(noun):
    return f"{'an' if noun[0] in 'AEIOU' else 'a'} {noun}"


def minutes_table():
    """Return the table of the README: accuracies by minutes of training, and what leads by what."""
    results = results_of("peers")
    methods = peers_by_budget(results)
    kmeans = kmeans_by_budget()
    budgets = sorted({budget for by_budget in methods.values() for budget in by_budget})
    lines = []
    for name in SUMMARY_METHODS:
        by_budget = methods.get(name, {})
        cells = [spread(by_budget[b], "top1") if b in by_budget else "" for b in budgets]
        rows = [row for rows in by_budget.values() for row in rows]
        lines.append([METHODS[name].title, *cells, version_text(rows, *PEERS_FILES)])
    cells = [kmeans_cell(*kmeans[b]) if b in kmeans else "" for b in budgets]
    commit = version_text([run for _, runs in kmeans.values() for run in runs], KMEANS_FILE)
    lines.append(["k-means features, by all of their seconds", *cells, commit])
    lines.append(lead_row(methods, budgets))
    columns = [
        "top-1 of the linear probe, by minutes of training",
        *map(minutes_text, budgets),
        "commit",
    ]
    return markdown(columns, lines)


def kmeans_by_budget():
    """Return {budget in seconds: (centroids, runs)} of the k-means runs with all images.

    The budget is the nearest one to their seconds.
    """
    found = {}
    for (n_centroids, n_images), runs in kmeans_runs().items():
        seconds = statistics.median(seconds_of_runs(runs))
        if n_images == max(n for _, n in kmeans_runs()):
            found[min(BUDGETS, key=lambda b: abs(math.log(b / seconds)))] = n_centroids, runs
    return found


def kmeans_cell(n_centroids, runs):
    return f"{spread(runs, 'top1')}: {n_centroids:,} centroids, {median_seconds(runs)} s"


def lead_row(methods, budgets):
    """Return the row with how many points the preset is ahead of the best other method."""
    cells = []
    for budget in budgets:
        others = {
            name: by_budget[budget]
            for name, by_budget in methods.items()
            if budget in by_budget and name not in (*EMP_SSL_METHODS, "supervised")
        }
        best = max(others, key=lambda name: mean_of(others[name], "top1"), default=None)
        if best is None or budget not in methods["preset"]:
            cells.append("")
            continue
        rows = methods["preset"][budget]
        lead = [mean_of(rows, name) - mean_of(others[best], name) for name in ("top1", "knn_top1")]
        cells.append(f"{lead[0]:+.1f}; {lead[1]:+.1f} ({METHODS[best].title})")
    return [
        "lead of the preset over the best other method without labels, points; by 20-NN",
        *cells,
        "",
    ]


def mean_of(rows, name):
    return statistics.mean(row[name] for row in rows)


def kmeans_text():
    """Return what k-means and the preset reach in the same seconds, all stages."""
    laptop = results_of("laptop")
    names = [*(f"budget-{minutes}" for minutes in RUN_BUDGETS), "preset-50000"]
    runs = [laptop[name]["runs"] for name in names if name in laptop]
    points = sorted((statistics.median(seconds_of_runs(r)), mean_of(r, "top1")) for r in runs)
    texts = []
    for (n_centroids, _), rows in kmeans_runs().items():
        seconds = statistics.median(seconds_of_runs(rows))
        if points[0][0] <= seconds <= points[-1][0]:
            texts.append(
                f"in {seconds:.0f} s k-means with {n_centroids:,} centroids reaches "
                f"{mean_of(rows, 'top1'):.1f}%, the preset {interpolated(points, seconds):.1f}%"
            )
    return (
        f"At equal time for training, encoding and probe: {'; '.join(texts)}. The preset's values "
        f"lie on straight lines between its rows."
    )


def interpolated(points, x):
    """Return the value at x of the straight lines between points, sorted pairs (x, value)."""
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    raise ValueError(f"{x} is not between {points[0][0]} and {points[-1][0]}")


def peers_by_budget(results):
    """Return {method: {budget in seconds: its rows, one for each seed}} of a file of peers.py."""
    methods = {}
    for row in results["rows"]:
        if row["method"] in COMPARED_METHODS:
            methods.setdefault(row["method"], {}).setdefault(row["budget"], []).append(row)
    return methods


def minutes_text(budget):
    return f"{budget / 60:g} minute{'' if budget == 60 else 's'}"


def peers_table():
    """Return the table of top-1, 20-NN and top-1 beside k-means features, by method and budget."""
    results = results_of("peers")
    methods = peers_by_budget(results)
    budgets = sorted({budget for by_budget in methods.values() for budget in by_budget})
    lines = []
    for method, by_budget in methods.items():
        cells = [peers_cell(by_budget.get(budget, [])) for budget in budgets]
        rows = [row for rows in by_budget.values() for row in rows]
        lines.append([METHODS[method].title, *cells, version_text(rows, *PEERS_FILES)])
    lines.append(lead_row(methods, budgets))
    n_seeds = [len(rows) for by_budget in methods.values() for rows in by_budget.values()]
    k, untrained = results["kmeans"], results["untrained"]
    return (
        f"{markdown(['', *map(minutes_text, budgets), 'commit'], lines)}\n\n"
        f"A cell: top-1 of the linear probe; of 20-NN; of a linear probe of the representation and "
        f"k-means features together. "
        f"CIFAR-10, all test images, {seeds_text(n_seeds)}. The probes use the labels of "
        f"{results['rows'][0]['n_probe']:,} training images. The k-means features, with "
        f"{k['n_centroids']} centroids, by themselves: {k['top1']:.1f}%; the network untrained: "
        f"{untrained['top1']:.1f}% (commits {version_text([k, untrained], *PEERS_FILES)}). "
        f"{measured_by('peers --data_dir DIR', [results['machine']])}"
    )


def search_table():
    """Return the table of the search behind the preset: what each row changes, and its score."""
    results = results_of("peers")
    rows = [row for row in results["rows"] if row["method"] == "search"]
    if not rows:
        command = "python -m benchmarks.peers --methods search --budgets 60 --data_dir DIR"
        return f"Not measured yet: `{command}`."
    row = rows[0]
    base = row["scores"][label(PRESET_TRY)]
    lines = [
        [
            "the preset" if name == label(PRESET_TRY) else f"`{name}`",
            f"{score:.1f}%",
            f"{score - base:+.1f}",
        ]
        for name, score in row["scores"].items()
    ]
    lines.sort(key=lambda line: -float(line[1][:-1]))
    columns = ["Muon's rate, and what differs from the preset", "top-1", "less the preset"]
    commit = version_text([row], *PEERS_FILES)
    command = "peers --methods search --budgets 60 --data_dir DIR"
    return (
        f"{markdown(columns, lines)}\n\n"
        f"One minute of training, one seed; the linear probe with {N_FIT:,} labels, scored on "
        f"{N_SCORED:,} other training images, without mirror images. Commit {commit}. "
        f"{measured_by(command, [results['machine']])}"
    )


def peers_cell(rows):
    if not rows:
        return ""
    others = [statistics.mean(row[name] for row in rows) for name in OTHER_SCORES]
    return "; ".join([spread(rows, "top1"), *(f"{value:.1f}%" for value in others)])


def transfer_table():
    """Return the accuracies of the encoder of each data set on each of them, and of k-means."""
    results = results_of("transfer")
    if not results:
        return f"Not measured yet: `{TRANSFER}`."
    sources = {
        "cifar10": "--preset laptop, trained on CIFAR-10",
        "cifar100": "--preset laptop, trained on CIFAR-100",
        "untrained": "the encoder untrained",
        "kmeans": f"k-means, {N_CENTROIDS} centroids, learned on the same images",
    }
    rows = []
    for source, title in sources.items():
        entries = [results.get(f"{source} to {target}") for target in DATA_SETS]
        cells = [transfer_cell(entry) for entry in entries]
        there = [entry for entry in entries if entry]
        rows.append([title, *cells, version_text(there, *TRANSFER_FILES)])
    text = markdown(["", "on CIFAR-10", "on CIFAR-100", "commit"], rows)
    return (
        f"{text}\n\nTop-1 of a linear probe with all labels; of 20-NN. All test images, one seed. "
        f"{measured_by('transfer', [results['machine']])}"
    )


def transfer_cell(entry):
    if not entry:
        return ""
    values = [entry[name] for name in ("top1", "knn_top1") if name in entry]
    return "; ".join(f"{value:.1f}%" for value in values)


def labels_table():
    """Return the accuracies of the encoder of CIFAR-10 with a share of the labels."""
    results = results_of("transfer")
    rows = []
    for share, n_epochs in SHARES.items():
        entry = results.get(f"labels {share}")
        if not entry:
            continue
        top1 = [f"{entry[name]:.1f}%" for name in ("probe", "finetuned", "from_scratch")]
        commit = version_text([entry], *TRANSFER_FILES)
        rows.append([f"{entry['n_labels']:,} ({share:.0%})", *top1, str(n_epochs), commit])
    if not rows:
        return f"Not measured yet: `{TRANSFER}`."
    columns = ["labels", "linear probe", "fine-tuned", "from scratch", "epochs of both", "commit"]
    return (
        f"{markdown(columns, rows)}\n\nTop-1 on all test images of CIFAR-10, one seed. "
        f"{measured_by('transfer', [results['machine']])}"
    )


def speed_table():
    """Return the ratios of each part: on a CPU, times vary with its load."""
    results = results_of("speed-cpu")
    rows = []
    for part in results["parts"].values():
        plain = part["baseline"]["seconds"]
        ours = part["ours"]["seconds"]
        ratios = [a / b for a, b in zip(plain, ours, strict=True)]
        faster = statistics.median(plain) / statistics.median(ours)
        faster = f"{faster:.3g} ({min(ratios):.3g} to {max(ratios):.3g})"
        over_floor = f"{statistics.median(ours) / part['floor']:.2g}"
        commit = version_text([part], *SPEED_FILES)
        rows.append([part["title"], faster, over_floor, commit])
    columns = ["part", "times as fast", "ours over the floor", "commit"]
    rates = results["rates"]
    measured = measured_by("speed", [results["machine"]])
    return (
        f"{markdown(columns, rows)}\n\n{measured} Rates behind the floor: "
        f"{rates['network'] / 1e12:.3g} TFLOP/s in the network's precision, "
        f"{rates['float32'] / 1e12:.3g} in float32, {rates['copy'] / 1e9:.3g} GB/s."
    )


def choices_table():
    """Return what a train step and encoding take otherwise, as multiples of what they take."""
    results = results_of("choices-cpu")
    medians = {
        name: {key: statistics.median(seconds) for key, seconds in recorded.items()}
        for name, recorded in results["choices"].items()
    }
    base = medians["as it is"]
    rows = []
    for name in [name for name in CHOICES if name in medians]:
        # The slowest: later processes may find what the first one compiled.
        first = max(results["choices"][name]["first"]) / base["seconds"]
        step = medians[name]["seconds"] / base["seconds"]
        encoding = medians[name]["encoding"] / base["encoding"]
        rows.append([name, f"{step:.2f}", f"{first:.1f}", f"{encoding:.2f}"])
    columns = ["resnet18-imagenet, 8 x 100 patches", "a train step", "the first step", "encoding"]
    measured = measured_by("speed --only choices", [results["machine"]])
    commit = version_text([results], *SPEED_FILES)
    return f"{markdown(columns, rows)}\n\nCommit {commit}. {measured}"


def lab_table():
    """Return how often neighbours lie in the same sub-folder, and what a lab's jobs take."""
    results = results_of("lab")
    n, probe, jobs, shares = (results[name] for name in ("n", "probe", "jobs", "leaves"))
    rows = [
        [kind, *(f"{share[kind]:.1f}%" for share in shares.values())]
        for kind in ("as given", "centred")
    ]
    seconds = "; ".join(f"{name} {job['seconds']:.0f}" for name, job in jobs.items())
    disturbed = ", while other programs used the cores too" if results["disturbed"] else ""
    commit = version_text([results, *jobs.values()])
    return (
        f"{markdown(['cosine', *shares], rows)}\n\n"
        f"How many of the five nearest images lie in the sub-folder of an image: {N_QUERIES:,} "
        f"random ones outside of `{LEFT_OUT}`, links left out. {n['images']:,} images, one seed. "
        f"The linear probe with {n['labelled']:,} labels, on the {probe['n_test']:,} of them that "
        f"are held out: {probe['top1']:.1f}%, balanced "
        f"{probe['balanced_top1']:.1f}%, always the largest class {probe['largest_class']:.1f}%. "
        f"Seconds{disturbed}: {seconds}. Commit {commit}. "
        f"{measured_by('lab', [results['machine']])}"
    )


FINDINGS_COLUMNS = ("options", "published", "top1", "train_top1", "knn_top1", "commit", "verdict")
TABLES = {
    "options": options_table,
    "presets": presets_list,
    "demo": partial(study_table, "demo", ("top1", "top5", "knn_top1", "seconds", "commit")),
    "findings-cpu": partial(study_table, "findings-cpu", FINDINGS_COLUMNS),
    "laptop": laptop_table,
    "headline": headline,
    "minutes": minutes_table,
    "kmeans": kmeans_text,
    "precision": partial(study_table, "precision", ("top1", "commit")),
    "peers": peers_table,
    "search": search_table,
    "speed-cpu": speed_table,
    "choices": choices_table,
    "lab": lab_table,
    "transfer": transfer_table,
    "labels": labels_table,
}


def with_tables(page):
    """Return a page with its tables made anew. Raises KeyError for a name that is not in TABLES."""
    pattern = re.compile(r"(<!-- ([\w-]+) -->\n).*?(<!-- /\2 -->)", re.S)
    return pattern.sub(lambda m: f"{m[1]}{TABLES[m[2]]()}\n{m[3]}", page)


if __name__ == "__main__":
    formatter = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=formatter).parse_args()
    for path in PAGES:
        path.write_text(with_tables(path.read_text()))
