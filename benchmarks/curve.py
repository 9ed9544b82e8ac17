"""Draw accuracy against seconds, of benchmarks/results/laptop.json and kmeans.json, into pictures/laptop.png.

    python -m benchmarks.curve
"""

import statistics

from matplotlib.figure import Figure

from benchmarks import tables
from benchmarks.common import ROOT

TICKS = (15, 30, 60, 120, 300, 600, 1200, 1800, 3600)  # seconds


def curves():
    """Return {name: [(seconds, least, mean, greatest top-1), ...]} of each method, by its seconds."""
    results, found = tables.read("laptop")["runs"], {}
    for name, title in (("preset", "--preset laptop"), ("lars", "LARS, mean of the features")):
        rows = [entry["runs"] for row, entry in results.items() if row.startswith(f"{name}-")]
        found[title] = [point(runs, [sum(run["seconds"].values()) for run in runs]) for runs in rows]
    found["k-means of patches"] = [point(runs, [run["seconds"] for run in runs]) for _, _, runs in tables.kmeans_runs()]
    return {title: sorted(points) for title, points in found.items() if points}


def point(runs, seconds):
    """Return the median of the seconds, and the least, the mean and the greatest top-1."""
    top1 = [run["top1"] for run in runs]
    return statistics.median(seconds), min(top1), statistics.mean(top1), max(top1)


def figure():
    """Return the picture as a figure of matplotlib."""
    results = tables.read("laptop")
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
    axes.set_xlim(20, 4000)
    axes.grid(alpha=0.3)
    axes.legend()
    return made


if __name__ == "__main__":
    path = ROOT / "pictures" / "laptop.png"
    figure().savefig(path, dpi=100, facecolor="white")
    print(path)
