"""What peers.py measured: a table, a verdict in two sentences and a picture, of benchmarks/results/peers.json and kmeans.json.

    python -m benchmarks.peers_results      # draws pictures/peers.png
"""

import argparse
import statistics

from benchmarks.common import ROOT
from benchmarks.laptop import kmeans_runs
from benchmarks.peers import METHODS
from benchmarks.tables import count, measured_by, read, spread, table

OURS, CEILING = ("preset", "lars"), "supervised"
PEERS = tuple(name for name in METHODS if name not in (*OURS, CEILING))


def rows_by_budget():
    """Return {method: {budget in seconds: its rows, one for each seed}}."""
    found = {}
    for row in read("peers")["rows"]:
        found.setdefault(row["method"], {}).setdefault(row["budget"], []).append(row)
    return found


def budgets():
    return sorted({row["budget"] for row in read("peers")["rows"]})


def minutes(budget):
    return f"{budget / 60:g} minute{'' if budget == 60 else 's'}"


def results_table():
    """Return the table of top-1 and 20-NN by method and budget, and how it was measured."""
    results, found, rows = read("peers"), rows_by_budget(), []
    for name, method in METHODS.items():
        cells = [method.title, f"{1000 * results['step_seconds'][name]:.0f} ms", str(method.bs)]
        for budget in budgets():
            runs = found.get(name, {}).get(budget)
            cells.append(f"{spread(runs, 'top1')}; {statistics.mean(run['knn_top1'] for run in runs):.1f}%" if runs else "")
        rows.append(cells)
    columns = ["", "a step", "images in it", *(minutes(budget) for budget in budgets())]
    seeds = count([len(runs) for by_budget in found.values() for runs in by_budget.values()])
    kmeans = ", ".join(f"{spread(runs, 'top1')} in {statistics.median(run['seconds'] for run in runs):.0f} s ({title})"
                       for title, n_images, runs in kmeans_runs() if n_images == 50_000)  # fmt: skip
    return (f"{table(columns, rows)}\n\nTop-1 of the linear probe; 20-NN. CIFAR-10, {seeds}. Beside them, with all that it "
            f"takes: {kmeans}. {measured_by('peers', results)}")  # fmt: skip


def choices_table():
    """Return the table of the chosen learning rates and views, and of the scores that decided."""
    rows = []
    for row in read("peers")["rows"]:
        scores = "; ".join(f"{rate}: {max(score.values()):.1f}" for rate, score in row["scores"].items())
        about = [METHODS[row["method"]].title, minutes(row["budget"]), f"{row['n_steps']:,}", f"{row['lr']:g}", row["views"]]
        rows.append([*about, scores])
    return table(["", "budget", "steps", "rate", "views", "score of each rate"], rows)


def best_peer(found, budget):
    """Return (title, mean top-1) of the best of PEERS at a budget."""
    means = {METHODS[name].title: statistics.mean(run["top1"] for run in found[name][budget])
             for name in PEERS if budget in found.get(name, {})}  # fmt: skip
    return max(means.items(), key=lambda item: item[1])


def verdict():
    """Return two sentences: this program beside the best peer and supervised training, at the budgets that all have."""
    results, found = read("peers"), rows_by_budget()
    whole = [budget for budget in budgets() if all(budget in found.get(name, {}) for name in METHODS)]
    if not whole:
        raise FileNotFoundError("no budget of peers.json has all methods")

    def mean(name, budget):
        return f"{statistics.mean(run['top1'] for run in found[name][budget]):.1f}%"

    told = []
    for budget in whole:
        title, top1 = best_peer(found, budget)
        told.append(f"after {minutes(budget)} {mean('preset', budget)} ({title}, the best peer: {top1:.1f}%; supervised: "
                    f"{mean(CEILING, budget)})")  # fmt: skip
    m = results["machine"]
    return (f"With the same network, images and seconds of training on {m['cores']} CPU cores, `--preset laptop` has "
            f"{', '.join(told)}. The peers are {', '.join(METHODS[name].title for name in PEERS)} from lightly's losses and "
            f"heads, each with the best of three learning rates and the better of two ways to encode.")  # fmt: skip


def engines_table():
    """Return the table of engines.json: patches per second and memory of a training step."""
    results = read("engines")
    per_step = results["n_patches"] * results["bs"]
    titles = {"ours": "this program", "plain": "`benchmarks/baseline.py`", "lightly": "lightly's parts, sign corrected"}
    ours = statistics.median(results["engines"]["ours"]["seconds"])
    rows = []
    for name, step in results["engines"].items():
        seconds = statistics.median(step["seconds"])
        rows.append([titles[name], f"{seconds / ours:.1f}", f"{per_step / seconds:.0f}", f"{results['bs'] / seconds:.0f}",
                     f"{step['memory'] / 1e9:.2f} GB"])  # fmt: skip
    columns = ["", "time of a step, ours = 1", "patches per second", "images per second", "peak memory, without workers"]
    return (f"{table(columns, rows)}\n\n`resnet18-cifar`, {results['n_patches']} patches of 32 pixels of each of {results['bs']} "
            f"images. {measured_by('engines', results)}")  # fmt: skip


def figure():
    """Return the picture as a figure of matplotlib."""
    from matplotlib.figure import Figure  # an optional package

    made = Figure(figsize=(7, 4.2), layout="constrained")
    axes = made.add_subplot(xscale="log", xlabel="minutes of training", ylabel="linear probe, top-1 (%)")
    for (name, by_budget), marker in zip(rows_by_budget().items(), "osD^vP*", strict=False):
        points = sorted((budget / 60, statistics.mean(run["top1"] for run in runs)) for budget, runs in by_budget.items())
        style = {"linestyle": "--", "color": "black"} if name == CEILING else {"linewidth": 2.5} if name == "preset" else {}
        axes.plot(*zip(*points, strict=True), marker=marker, label=METHODS[name].title, **style)
    points = [(statistics.median(run["seconds"] for run in runs) / 60, runs[0]["top1"])
              for _, n_images, runs in kmeans_runs() if n_images == 50_000]  # fmt: skip
    axes.plot(*zip(*points, strict=True), marker="x", color="grey", linestyle=":", label="k-means (all its seconds)")
    ticks = [budget / 60 for budget in budgets()]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    m = read("peers")["machine"]
    axes.set_title(f"CIFAR-10, resnet18-tiny; {m['cores']} cores, {m['processor']}, {m['precision']}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return made


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    path = ROOT / "pictures" / "peers.png"
    figure().savefig(path, dpi=100, facecolor="white")
    print(path)
