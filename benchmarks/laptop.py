"""What --preset laptop reaches: a table, a sentence and a picture, of benchmarks/results/laptop.json and kmeans.json.

    python -m benchmarks.laptop      # draws pictures/laptop.png
"""

import argparse
import statistics

from benchmarks.common import ROOT
from benchmarks.rows import rows_of
from benchmarks.tables import count, measured_by, outcome, read, spread, table, timed

TICKS = (15, 30, 60, 120, 300, 600)  # seconds


def results_table():
    """Return the table of accuracies against seconds: the preset, LARS, k-means and the untrained encoder."""
    results, rows = read("laptop")["runs"], []
    for row in rows_of("laptop"):
        if row.name in results:
            images = f"{int(row.name.split('-')[-1]):,}"
            rows.append([row.title, images, *outcome(results[row.name]["runs"])])
    for title, n_images, runs in kmeans_runs():
        accuracies = [spread(runs, "top1"), spread(runs, "train_top1"), ""]
        rows.append([title, f"{n_images:,}", *accuracies, f"{statistics.median(run['seconds'] for run in runs):.0f}"])
    columns = ["", "training images", "top-1", "top-1 on training images", "20-NN", "seconds"]
    entry = results["preset-50000"]
    return (f"{table(columns, rows)}\n\n{entry['data']}, all test images; mean (least to greatest) of 1 to 3 seeds; seconds of "
            f"training, encoding and probe, of the runs that had the machine to themselves. "
            f"{measured_by('study laptop` and `python -m benchmarks.kmeans', entry)}")  # fmt: skip


def headline():
    """Return the sentence with the best result."""
    entry = read("laptop")["runs"]["preset-50000"]
    runs, m = entry["runs"], entry["machine"]
    minutes = statistics.median(timed(runs)) / 60
    return (f"**{spread(runs, 'top1')} linear top-1 on CIFAR-10 in {minutes:.0f} minutes on {m['cores']} CPU cores**, by "
            f"`python main.py train --preset laptop`: {count([len(runs)])}; {m['processor']}, {m['precision']}.")  # fmt: skip


def kmeans_runs():
    """Return (title, number of training images, runs) of each size in kmeans.json, as kmeans.py measured them."""
    groups = {}
    for row in read("kmeans")["rows"]:
        groups.setdefault((row["n_centroids"], row["n_images"]), []).append(row)
    return [(f"k-means, {n_centroids} centroids", n_images, runs) for (n_centroids, n_images), runs in sorted(groups.items())]


def curves():
    """Return {name: [(seconds, least, mean, greatest top-1), ...]} of each method, by its seconds."""
    results, found = read("laptop")["runs"], {}
    for name, title in (("preset", "--preset laptop"), ("lars", "LARS, mean of the features")):
        rows = [entry["runs"] for row, entry in results.items() if row.startswith(f"{name}-")]
        found[title] = [point(runs, timed(runs)) for runs in rows]
    found["k-means of patches"] = [point(runs, [run["seconds"] for run in runs]) for _, _, runs in kmeans_runs()]
    return {title: sorted(points) for title, points in found.items() if points}


def point(runs, seconds):
    """Return the median of the seconds, and the least, the mean and the greatest top-1."""
    top1 = [run["top1"] for run in runs]
    return statistics.median(seconds), min(top1), statistics.mean(top1), max(top1)


def figure():
    """Return the picture as a figure of matplotlib."""
    from matplotlib.figure import Figure  # an optional package

    results = read("laptop")
    made = Figure(figsize=(7, 4), layout="constrained")
    axes = made.add_subplot(xscale="log", xlabel="seconds of training, encoding and probe", ylabel="linear probe, top-1 (%)")
    for (title, points), marker in zip(curves().items(), "osD", strict=False):
        seconds, least, mean, most = zip(*points, strict=True)
        below, above = ([abs(m - end) for m, end in zip(mean, ends, strict=True)] for ends in (least, most))
        axes.errorbar(seconds, mean, [below, above], marker=marker, capsize=3, label=title)
    untrained = results["runs"].get("untrained-50000")
    if untrained:
        axes.axhline(untrained["runs"][0]["top1"], color="grey", linestyle="--", label="untrained, the preset's views")
    machine = results["runs"]["preset-50000"]["machine"]
    axes.set_title(f"CIFAR-10 on {machine['cores']} cores, {machine['processor']}, {machine['precision']}", fontsize=10)
    axes.set_xticks(TICKS, TICKS)
    axes.minorticks_off()
    axes.set_xlim(14, 800)
    axes.grid(alpha=0.3)
    axes.legend()
    return made


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    path = ROOT / "pictures" / "laptop.png"
    figure().savefig(path, dpi=100, facecolor="white")
    print(path)
