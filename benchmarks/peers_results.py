"""What peers.py measured: a table, a verdict in two sentences and a picture, of benchmarks/results/peers.json.

    python -m benchmarks.peers_results      # draws pictures/peers.png
"""

import argparse
import statistics
from functools import partial
from itertools import groupby

from benchmarks.claims import NOISE, POINTS
from benchmarks.common import ROOT
from benchmarks.methods import METHODS, Try, label
from benchmarks.peers import TRIED
from benchmarks.tables import count, measured_by, read, spread, table

OURS, REFERENCE = ("preset", "lars"), "supervised"
OPTIMIZERS = {"sgd": "SGD", "lars": "LARS", "muon": "Muon"}
PEERS = tuple(name for name in METHODS if name not in (*OURS, REFERENCE))


def measured(name="peers"):
    """Return (the content of the file of this name, {method: {budget in seconds: its rows, one for each seed}}).

    Raises FileNotFoundError if nothing is measured.
    """
    results, found = read(name), {}
    for row in results["rows"]:
        found.setdefault(row["method"], {}).setdefault(row["budget"], []).append(row)
    if not found:
        raise FileNotFoundError(f"no row in {name}.json")
    return results, found


def mean(rows, key="top1"):
    return statistics.mean(row[key] for row in rows)


def listed(words):
    """Return words as "a", "a and b", "a, b and c"."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def minutes(*budgets):
    return f"{listed(f'{budget / 60:g}' for budget in budgets)} minute{'' if budgets == (60,) else 's'}"


def results_table(name="peers"):
    """Return the table of top-1 and 20-NN by method and budget, and how it was measured."""
    results, found = measured(name)
    budgets = sorted({budget for by_budget in found.values() for budget in by_budget})
    lines = []
    for method, by_budget in found.items():
        cells = [f"{spread(by_budget[budget], 'top1')}; {mean(by_budget[budget], 'knn_top1'):.1f}%" if budget in by_budget else ""
                 for budget in budgets]  # fmt: skip
        lines.append([METHODS[method].title, *cells])
    seeds = count([len(rows) for by_budget in found.values() for rows in by_budget.values()])
    known = results["rows"][0]["n_probe"]  # that of all rows
    command = f"peers --data_dir DIR --n_probe {known}"
    k = results["kmeans"]
    return (f"{table(['', *map(minutes, budgets)], lines)}\n\nTop-1 of the linear probe; 20-NN. Both use the labels of {known:,} "
            f"training images. CIFAR-10, all test images, {seeds}. k-means features with {k['n_centroids']} centroids, learned "
            f"from {k['n_images']:,} images and with their labels: {k['top1']:.1f}% in {k['seconds']:.0f} s, probe included. "
            f"The network untrained: {results['untrained']['top1']:.1f}%. {measured_by(command, results)}")  # fmt: skip


def choices_table():
    """Return the table of the optimizers and learning rates tried, and of the scores that decided."""
    results, found = measured()
    lines = []
    for row in sorted(results["rows"], key=lambda row: list(found).index(row["method"])):
        seconds = results["step_seconds"][f"{row['method']} {row['optimizer']}"]
        scores = "; ".join(f"{how}: {score:.1f}" for how, score in row["scores"].items())
        lines.append([METHODS[row["method"]].title, minutes(row["budget"]),
                      label(row["method"], Try(row["optimizer"], row["lr"], row["setting"])), str(row["size"]),
                      f"{row['n_steps']:,}", f"{seconds:.2f} s", str(row["bs"]), scores])  # fmt: skip
    text = table(["", "budget", "chosen", "size", "steps", "a step", "images in it", "scores"], lines)
    return f"{text}\n\nThe score of the network untrained: {results['untrained']['score']:.1f}."


def place(ours, theirs):
    """Return how the top-1 of our rows compares with theirs.

    They are level if the ranges of the seeds overlap, or the means differ by less than NOISE, or POINTS if one has one seed.
    """
    a, b = ([row["top1"] for row in rows] for rows in (ours, theirs))
    ahead, behind = min(a) > max(b), max(a) < min(b)
    limit = NOISE if min(len(a), len(b)) > 1 else POINTS
    if abs(mean(ours) - mean(theirs)) < limit or not (ahead or behind):
        return "level with"
    return "ahead of" if ahead else "behind"


def at(found, budget):
    """Return the peers that are measured at a budget, or none if the preset or supervised training is not."""
    peers = [name for name in PEERS if budget in found.get(name, {})]
    return peers if all(budget in found.get(name, {}) for name in ("preset", REFERENCE)) else []


def beside_best(found, budget):
    """Return (the preset's `place` beside the best peer that is measured at a budget, the peer)."""
    best = max(at(found, budget), key=lambda name: mean(found[name][budget]))
    return place(found["preset"][budget], found[best][budget]), best


def outcome(found, budgets):
    """Return a clause on the preset beside the best peer at some budgets with the same `beside_best`."""
    how, best = beside_best(found, budgets[0])
    ours, theirs, reference = (listed(f"{mean(found[name][budget]):.1f}" for budget in budgets)
                               for name in ("preset", best, REFERENCE))  # fmt: skip
    peer = f"{METHODS[best].title} with {OPTIMIZERS[found[best][budgets[0]][0]['optimizer']]}"
    return f"{how} {peer} after {minutes(*budgets)} ({ours}% against {theirs}%; supervised: {reference}%)"


def verdict():
    """Return a few sentences: this program beside the best peer and supervised training, at each budget that has these."""
    results, found = measured()
    budgets = sorted(budget for budget in found.get("preset", {}) if at(found, budget))
    if not budgets:
        raise FileNotFoundError("no budget of peers.json has the preset, a peer and supervised training")
    told = [outcome(found, list(same)) for _, same in groupby(budgets, partial(beside_best, found))]
    m = results["machine"]
    named = {"preset"} | {beside_best(found, budget)[1] for budget in budgets}
    seeds = count([len(found[name][budget]) for name in named for budget in budgets if budget in found[name]])
    return (f"With the same network, images and seconds of training on {m['cores']} cores, {m['processor']}, {m['precision']}, "
            f"the training of `--preset laptop` is {'; '.join(told)}; {seeds} of the named. Only the best of the peers is named: "
            f"{listed(METHODS[name].title for name in PEERS)} have lightly's losses and heads, and the optimizer, learning rate "
            f"and settings that were the best for them at {minutes(TRIED)}.{left_out(found, budgets)} *Level* means that the "
            f"ranges of the seeds overlap, or that the means differ by less than {NOISE:g} point, or {POINTS:g} points if one of "
            f"the two has one seed.")  # fmt: skip


def left_out(found, budgets):
    """Return a sentence for each of some budgets at which a peer is not measured."""
    missing = {budget: [METHODS[name].title for name in PEERS if name not in at(found, budget)] for budget in budgets}
    return "".join(f" Not measured at {minutes(budget)}: {listed(names)}." for budget, names in missing.items() if names)


STYLES = {"preset": {"linewidth": 2.5}, REFERENCE: {"linestyle": "--", "color": "black"}}


def figure():
    """Return the picture as a figure of matplotlib."""
    from matplotlib.figure import Figure  # an optional package

    results, found = measured()
    made = Figure(figsize=(7, 4.2), layout="constrained")
    axes = made.add_subplot(xscale="log", xlabel="minutes of training", ylabel="linear probe, top-1 (%)")
    for (name, by_budget), marker in zip(found.items(), "osD^vP*", strict=False):
        points = sorted((budget / 60, mean(rows)) for budget, rows in by_budget.items())
        axes.plot(*zip(*points, strict=True), marker=marker, label=METHODS[name].title, **STYLES.get(name, {}))
    k = results["kmeans"]
    axes.plot(k["seconds"] / 60, k["top1"], "x", color="grey", label="k-means (all its seconds)")
    axes.axhline(results["untrained"]["top1"], color="grey", linestyle=":", label="untrained")
    ticks = sorted({budget / 60 for by_budget in found.values() for budget in by_budget})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    m = results["machine"]
    axes.set_title(f"CIFAR-10, resnet18-tiny; {m['cores']} cores, {m['processor']}, {m['precision']}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))  # beside the curves
    return made


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    path = ROOT / "pictures" / "peers.png"
    figure().savefig(path, dpi=100, facecolor="white")
    print(path)
