"""Draw pictures/laptop.png and pictures/peers.png from benchmarks/results.

python -m benchmarks.figures
"""

import argparse
import statistics

from benchmarks.common import ROOT
from benchmarks.peers_methods import ARCH
from benchmarks.tables import (
    kmeans_of_all_images,
    kmeans_runs,
    method_title,
    peers_by_budget,
    preset_runs,
    results_of,
    seconds_of_runs,
)

STYLES = {
    "preset": {"linewidth": 2.5},
    "supervised": {"linestyle": "--", "color": "black"},
}


def empty_figure(height, machine, title, **axes):
    """Return (figure, axes) of matplotlib with a logarithmic time and the machine in the title."""
    from matplotlib.figure import Figure  # an optional package

    made = Figure(figsize=(7, height), layout="constrained")
    axes = made.add_subplot(xscale="log", ylabel="linear probe, top-1 (%)", **axes)
    about = f"{machine['cores']} cores, {machine['processor']}, {machine['precision']}"
    axes.set_title(f"{title}; {about}", fontsize=10)
    axes.grid(alpha=0.3)
    return made, axes


def set_ticks(axes, ticks):
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def laptop_curves():
    """Return {title: points by time} of laptop.json and kmeans.json.

    A point is (seconds, least, mean, greatest top-1) of the seeds.
    """
    kmeans = kmeans_runs().values()
    curves = {
        "--preset laptop": [point(runs, seconds_of_runs(runs)) for runs in preset_runs()],
        "k-means of patches": [point(runs, seconds_of_runs(runs)) for runs in kmeans],
    }
    return {title: sorted(points) for title, points in curves.items()}


def point(runs, seconds):
    top1 = [run["top1"] for run in runs]
    return statistics.median(seconds), min(top1), statistics.mean(top1), max(top1)


def laptop_figure():
    results = results_of("laptop")
    machine = results["preset-50000"]["machine"]
    xlabel = "seconds of training, encoding and probe"
    made, axes = empty_figure(4, machine, "CIFAR-10", xlabel=xlabel, xlim=(14, 800))
    for (title, points), marker in zip(laptop_curves().items(), "os", strict=True):
        seconds, least, mean, most = zip(*points, strict=True)
        below = [m - low for m, low in zip(mean, least, strict=True)]
        above = [high - m for m, high in zip(mean, most, strict=True)]
        axes.errorbar(seconds, mean, [below, above], marker=marker, capsize=3, label=title)
    set_ticks(axes, (15, 30, 60, 120, 300, 600))
    axes.legend()
    return made


def peers_figure():
    results = results_of("peers")
    made, axes = empty_figure(
        4.2, results["machine"], f"CIFAR-10, {ARCH}", xlabel="minutes of training"
    )
    for (name, by_budget), marker in zip(peers_by_budget(results).items(), "osD^vP*", strict=False):
        points = sorted(
            (budget / 60, statistics.mean(row["top1"] for row in rows))
            for budget, rows in by_budget.items()
        )
        title, style = method_title(name).replace("`", ""), STYLES.get(name, {})
        axes.plot(*zip(*points, strict=True), marker=marker, label=title, **style)
    kmeans = [point(runs, seconds_of_runs(runs)) for runs in kmeans_of_all_images().values()]
    seconds, _, top1, _ = zip(*kmeans, strict=True)
    label = "k-means (encoding and probe included)"
    axes.plot([s / 60 for s in seconds], top1, "x", color="grey", label=label)
    axes.axhline(results["untrained"]["top1"], color="grey", linestyle=":", label="untrained")
    set_ticks(axes, sorted({row["budget"] / 60 for row in results["rows"]}))
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))  # beside the curves
    return made


FIGURES = {"laptop": laptop_figure, "peers": peers_figure}

if __name__ == "__main__":
    formatter = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=formatter).parse_args()
    for name, draw in FIGURES.items():
        path = ROOT / "pictures" / f"{name}.png"
        draw().savefig(path, dpi=100, facecolor="white")
        print(path)
