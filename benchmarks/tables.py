"""Write the tables of README.md and docs, from benchmarks/results and the declaration of settings.

    python -m benchmarks.tables

A table stands between <!-- NAME --> and <!-- /NAME -->. A test runs this and expects no change.
"""

import argparse
import math
import re
import statistics
from functools import partial

import numpy as np

from benchmarks.common import RESULTS_FOLDER, ROOT, version_text
from benchmarks.lab import LEFT_OUT, N_QUERIES
from benchmarks.peers import COMPARED_METHODS, N_CENTROIDS, N_FIT, N_SCORED
from benchmarks.peers_methods import METHODS, PRESET_TRY, SEARCH, label
from benchmarks.rows import GROUPS, RUN_BUDGETS, all_options, rows_of
from benchmarks.speed import CHOICES
from benchmarks.transfer import DATA_SETS, FIRST_SEED, PRESET_OPTIONS, SEEDS, entry_name
from hparams import PRESETS, SETTINGS, STAGES, yaml_value
from infra import files

PAGES = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("guide", "results", "findings", "speed")),
)
PEERS_FILES = ("benchmarks/peers.py", "benchmarks/peers_methods.py")
TRANSFER_COMMAND = "transfer --cifar10 DIR --cifar100 DIR100"
KMEANS_FILE = "benchmarks/kmeans.py"
OWN_METHODS = {  # of this program
    "preset": "`--preset laptop`",
    "preset-stages": "`--preset laptop`, a loss after each stage",
}
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
    """Return the mean over the seeds, and the least and the greatest.

    "" if there are none, or if one lacks the value.
    """
    if not runs or any(name not in run for run in runs):
        return ""
    mean = f"{mean_of(runs, name):.1f}%"
    return mean if len(runs) == 1 else f"{mean} ({least_and_greatest(runs, name)})"


def least_and_greatest(runs, name):
    """Return "70.1 to 70.3"."""
    values = [run[name] for run in runs]
    return f"{min(values):.1f} to {max(values):.1f}"


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


def kmeans_of_all_images():
    """Return {centroids: runs} of kmeans.json, those with all images."""
    groups = kmeans_runs()
    most = max(n_images for _, n_images in groups)
    return {n: runs for (n, n_images), runs in groups.items() if n_images == most}


def preset_runs():
    """Return the runs of --preset laptop that have seconds, as lists: by budget, and whole."""
    laptop = results_of("laptop")
    names = [*(f"budget-{minutes}" for minutes in RUN_BUDGETS), "preset-50000"]
    groups = [laptop[name]["runs"] for name in names if name in laptop]
    return [runs for runs in groups if seconds_of_runs(runs)]


def laptop_table():
    """Return the table of --preset laptop, and k-means."""
    rows = []
    for (n_centroids, n_images), runs in kmeans_runs().items():
        title = f"k-means, {n_centroids:,} centroids, {n_images:,} images (`benchmarks/kmeans.py`)"
        accuracies = [spread(runs, "top1"), spread(runs, "train_top1"), ""]
        commit = version_text(runs, KMEANS_FILE)
        rows.append([title, *accuracies, median_seconds(runs), commit])
    return study_table("laptop", ("top1", "train_top1", "knn_top1", "seconds", "commit"), rows)


def headline():
    """Return the sentences of the README on the whole run of --preset laptop."""
    entry = results_of("laptop")["preset-50000"]
    runs, m = entry["runs"], entry["machine"]
    return (
        f"A linear probe of `--preset laptop` classifies **{mean_of(runs, 'top1'):.1f}%** of the "
        f"test images of CIFAR-10 correctly, 20-NN {mean_of(runs, 'knn_top1'):.1f}%: means of "
        f"{seeds_text([len(runs)])}, {least_and_greatest(runs, 'top1')} and "
        f"{least_and_greatest(runs, 'knn_top1')}. Training, encoding and probe take a "
        f"median of {median_seconds(runs)} seconds ({m['processor']}, {m['cores']} cores, "
        f"{m['device']}, {m['precision']}; commit {version_text(runs)})."
    )


def minutes_table():
    """Return the table of the README: top-1 by minutes of training, and the lead of the preset."""
    results = results_of("peers")
    methods = peers_by_budget(results)
    shown = {name: methods[name] for name in SUMMARY_METHODS if name in methods}
    budgets = budgets_of(methods)
    lines = [*method_rows(shown, budgets, partial(spread, name="top1")), kmeans_line(budgets)]
    lines.append(lead_row(methods, budgets))
    columns = ["top-1 of the linear probe, by minutes of training", *map(minutes_text, budgets)]
    return markdown([*columns, "commit"], lines)


def kmeans_line(budgets):
    """Return the row of the k-means runs with all images, each at the nearest budget."""
    cells = {budget: [] for budget in budgets}
    groups = kmeans_of_all_images()
    for n_centroids, runs in groups.items():
        seconds = statistics.median(seconds_of_runs(runs))
        nearest = min(budgets, key=lambda budget: abs(math.log(budget / seconds)))
        text = f"{spread(runs, 'top1')}: {n_centroids:,} centroids, {seconds:.0f} s"
        cells[nearest].append(text)
    commit = version_text([run for runs in groups.values() for run in runs], KMEANS_FILE)
    title = "k-means features: training, encoding and probe together"
    return [title, *map("; ".join, cells.values()), commit]


def kmeans_text():
    """Return what k-means and the preset reach in the same seconds, all stages."""
    points = [(statistics.median(seconds_of_runs(r)), mean_of(r, "top1")) for r in preset_runs()]
    seconds, top1 = zip(*sorted(points), strict=True)
    texts = []
    for n_centroids, runs in kmeans_of_all_images().items():
        taken = statistics.median(seconds_of_runs(runs))
        if seconds[0] <= taken <= seconds[-1]:
            preset = np.interp(math.log(taken), np.log(seconds), top1)
            texts.append(
                f"in {taken:.0f} s k-means with {n_centroids:,} centroids reaches "
                f"{mean_of(runs, 'top1'):.1f}%, the preset about {preset:.1f}%"
            )
    return (
        f"At equal time for training, encoding and probe: {'; '.join(texts)}. The preset's values "
        f"are interpolated between its rows, along the logarithm of the seconds."
    )


def mean_of(rows, name):
    return statistics.mean(row[name] for row in rows)


def peers_by_budget(results):
    """Return {method: {budget in seconds: its rows, one for each seed}} of a file of peers.py."""
    methods = {}
    for row in results["rows"]:
        if row["method"] in COMPARED_METHODS:
            methods.setdefault(row["method"], {}).setdefault(row["budget"], []).append(row)
    return methods


def minutes_text(budget):
    return f"{budget / 60:g} minute{'' if budget == 60 else 's'}"


def budgets_of(methods):
    """Return the budgets of what peers_by_budget returns, sorted."""
    return sorted({budget for by_budget in methods.values() for budget in by_budget})


def method_title(name):
    return OWN_METHODS.get(name, METHODS[name].title)


def method_rows(methods, budgets, cell):
    """Return a row for each method: its title, cell(rows) for each budget, its commits."""
    lines = []
    for name, by_budget in methods.items():
        cells = [cell(by_budget.get(budget, [])) for budget in budgets]
        rows = [row for rows in by_budget.values() for row in rows]
        lines.append([method_title(name), *cells, version_text(rows, *PEERS_FILES)])
    return lines


def lead_row(methods, budgets):
    """Return the row with how many points the preset is ahead of another method, by budget.

    Of those without labels, that with the best linear probe.
    """
    preset = methods.get("preset", {})
    others = {n: rows for n, rows in methods.items() if n not in (*OWN_METHODS, "supervised")}
    cells = []
    for budget in budgets:
        there = {
            name: by_budget[budget] for name, by_budget in others.items() if budget in by_budget
        }
        if budget not in preset or not there:
            cells.append("")
            continue
        best = max(there, key=lambda name: mean_of(there[name], "top1"))
        lead = [
            mean_of(preset[budget], name) - mean_of(there[best], name)
            for name in ("top1", "knn_top1")
        ]
        cells.append(f"{lead[0]:+.1f}; {lead[1]:+.1f} ({METHODS[best].title})")
    return [
        "points by which the preset leads the best other network trained without labels, before "
        "rounding: top-1; 20-NN",
        *cells,
        "",
    ]


def peers_table():
    """Return the tables of peers.py by method and budget: by themselves, and beside k-means."""
    results = results_of("peers")
    methods = peers_by_budget(results)
    budgets = budgets_of(methods)
    lines = [*method_rows(methods, budgets, probe_and_neighbours), lead_row(methods, budgets)]
    columns = ["top-1 of the linear probe; of 20-NN", *map(minutes_text, budgets), "commit"]
    with_kmeans = partial(spread, name="with_kmeans_top1")
    beside = [row[:-1] for row in method_rows(methods, budgets, with_kmeans)]
    n_seeds = [len(rows) for by_budget in methods.values() for rows in by_budget.values()]
    k, untrained = results["kmeans"], results["untrained"]
    return (
        f"{markdown(columns, lines)}\n\n"
        f"CIFAR-10, all test images, {seeds_text(n_seeds)}. The probes use the labels of "
        f"{results['rows'][0]['n_probe']:,} training images. The network untrained: "
        f"{untrained['top1']:.1f}% (commit {version_text([untrained], *PEERS_FILES)}). "
        f"{measured_by('peers --data_dir DIR', [results['machine']])}\n\n"
        f"A linear probe of each representation with k-means features beside it. Those alone, with "
        f"{k['n_centroids']} centroids and ten epochs of the probe: {k['top1']:.1f}% (commit "
        f"{version_text([k], KMEANS_FILE)}).\n\n"
        f"{markdown(['top-1', *map(minutes_text, budgets)], beside)}"
    )


def search_table():
    """Return the table of the search behind the preset: what each row changes, and its score."""
    command = "peers --methods search --budgets 60 --data_dir DIR"
    results = results_of("peers")
    rows = [row for row in results["rows"] if row["method"] == "search"]
    if not rows:
        return f"Not measured yet: `python -m benchmarks.{command}`."
    row = rows[0]
    options = {label(how): how.settings or f"--lr {how.rate:g}" for how in SEARCH}
    titles = {name: f"`{text}`" for name, text in options.items()}
    titles[label(PRESET_TRY)] = "the preset"
    scores = sorted(row["scores"].items(), key=lambda item: -item[1])
    lines = [[titles[name], f"{score:.1f}%"] for name, score in scores]
    columns = ["what differs from the preset", "top-1"]
    commit = version_text([row], *PEERS_FILES)
    return (
        f"{markdown(columns, lines)}\n\n"
        f"One minute of training, one seed; the linear probe with {N_FIT:,} labels, scored on "
        f"{N_SCORED:,} other training images, without mirror images. Commit {commit}. "
        f"{measured_by(command, [results['machine']])}"
    )


def probe_and_neighbours(rows):
    return f"{spread(rows, 'top1')}; {mean_of(rows, 'knn_top1'):.1f}%" if rows else ""


def transfer_entries():
    """Return {name: entry} of transfer.json, those of the preset."""
    results = results_of("transfer").items()
    return {name: entry for name, entry in results if entry["settings"] == PRESET_OPTIONS}


def transfer_table():
    """Return the accuracies on each data set of the encoders of both, of none, and of k-means."""
    results = transfer_entries()
    sources = {
        "cifar10": "--preset laptop, trained on CIFAR-10",
        "cifar100": "--preset laptop, trained on CIFAR-100",
        "untrained": "the encoder untrained",
        "kmeans": f"k-means features ({N_CENTROIDS} centroids), learned on the same images",
    }
    rows, there, n_seeds = [], [], []
    for source, title in sources.items():
        cells = [entries_of_pair(results, source, target) for target in DATA_SETS]
        n_seeds += [len(entries) for entries in cells if entries]
        measured = [entry for entries in cells for entry in entries]
        if measured:
            others = [KMEANS_FILE] if source == "kmeans" else []
            commit = version_text(measured, *others)
            rows.append([title, *map(transfer_cell, cells), commit])
            there += measured
    if not rows:
        return f"Not measured yet: `python -m benchmarks.{TRANSFER_COMMAND}`."
    return (
        f"{markdown(['', 'on CIFAR-10', 'on CIFAR-100', 'commit'], rows)}\n\n"
        f"Top-1 of a linear probe with all labels; of 20-NN. All test images, "
        f"{seeds_text(n_seeds)}. "
        f"{measured_by(TRANSFER_COMMAND, [entry['machine'] for entry in there])}"
    )


def entries_of_pair(results, source, target):
    """Return the results of a source on a target, one for each seed."""
    names = [entry_name(source, target, seed) for seed in SEEDS.get(source, (FIRST_SEED,))]
    return [results[name] for name in names if name in results]


def transfer_cell(entries):
    """Return the accuracy of the linear probe and, except for k-means features, of 20-NN."""
    values = [spread(entries, name) for name in ("top1", "knn_top1")]
    return "; ".join(value for value in values if value)


def labels_table():
    """Return the accuracies of the encoder of CIFAR-10 with a share of the labels."""
    entries = [entry for name, entry in transfer_entries().items() if name.startswith("labels ")]
    if not entries:
        return f"Not measured yet: `python -m benchmarks.{TRANSFER_COMMAND}`."
    rows = []
    for entry in entries:
        top1 = [f"{entry[name]:.1f}%" for name in ("probe", "finetuned", "from_scratch")]
        commit = version_text([entry], "tools/finetune.py", "tools/probe.py")
        rows.append([f"{entry['n_labels']:,}", *top1, str(entry["n_epochs"]), commit])
    columns = ["labels", "linear probe", "fine-tuned", "from scratch", "epochs of both", "commit"]
    return (
        f"{markdown(columns, rows)}\n\nTop-1 on all test images of CIFAR-10, one seed. "
        f"{measured_by(TRANSFER_COMMAND, [entry['machine'] for entry in entries])}"
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
    n = len(results["choices"]["as it is"]["seconds"])
    commit = version_text([results], *SPEED_FILES)
    return f"{markdown(columns, rows)}\n\nMedians of {n} processes. Commit {commit}. {measured}"


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
