"""What the published texts claim, and whether the rows of `study findings-cpu` show it."""

import statistics

from benchmarks.common import RESULTS
from benchmarks.tables import succeeded
from infra import files

ABOVE, CLOSE = "above", "close"  # what a claim says of its first row: better than the second, or as good
POINTS = 2.0  # two rows are as good if their means differ by less
NOISE = 1.0  # points between the seeds of a row, at most
CLAIMS = (  # each compares the top-1 of two rows
    ("LARS is far above SGD at the same rate", "base", ABOVE, "sgd"),
    ("many patches are better than two", "base", ABOVE, "two-patches"),
    ("patches of one image as negatives hurt", "no-duplicates", ABOVE, "duplicates"),
    ("the network without its last stage is better than without its last two", "mini", ABOVE, "base"),
    ("training is better than no training", "base", ABOVE, "untrained"),
    ("without batch norms as good", "no-batch-norm", CLOSE, "base"),
    ("Tanh as good as ReLU", "tanh", CLOSE, "base"),
    ("a frozen projection of another run nearly as good", "frozen", CLOSE, "base"),
    ("75% of an epoch as good as the whole", "three-quarters", CLOSE, "base"),
    ("the mean projection as good an embedding as the features", "mean-projection", CLOSE, "base"),
    ("the mean projection from a narrow layer as good with 2 patches", "bottleneck-2", CLOSE, "bottleneck"),
)


def verdicts(folder=RESULTS):
    """Return a line for each of CLAIMS: whether the rows on a CPU show it."""
    results = files.read_json(folder / "reproduction.json").get("cpu", {})
    return "\n".join(f"- {claim}: {verdict(results, *names)}" for claim, *names in CLAIMS)


def verdict(results, first, relation, second):
    """Return whether the row `first` is ABOVE the other, with the ranges of their seeds apart, or CLOSE to it.

    From one seed, a gap below POINTS does not decide what is ABOVE, nor one within NOISE of POINTS what is CLOSE.
    """
    if first not in results or second not in results:
        return "not yet measured"
    a, b = ([run["top1"] for run in succeeded(results[name]["runs"])] for name in (first, second))
    if not a or not b:
        return f"does not show, `{second if a else first}` diverged"
    gap = statistics.mean(a) - statistics.mean(b)
    holds = abs(gap) < POINTS if relation == CLOSE else min(a) > max(b)
    single = [f"`{name}`" for name, runs in ((first, a), (second, b)) if len(runs) == 1]
    answer = "**yes**" if holds else "**no**"
    within = abs(abs(gap) - POINTS) < NOISE if relation == CLOSE else abs(gap) < POINTS
    if single and within:
        answer = "undecided"
    seeds = f"; one seed of {' and '.join(single)}" if single else ""
    return f"{answer}, {gap:+.1f} points (`{first}` - `{second}`{seeds})"
