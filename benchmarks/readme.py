"""Write the parts of README.md that come from elsewhere: the options from their declaration, the figures from
benchmarks/results/. Each stands between <!-- NAME --> and <!-- /NAME -->. A test runs this and expects no change.

    python benchmarks/readme.py
"""

import json
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import experiment  # noqa: E402


def options():
    rows = ["| option | default | touches | |", "| --- | --- | --- | --- |"]
    for param in experiment.PARAMS:
        name = f"`--{param.name}`" + (f", `--no-{param.name}`" if param.type is bool else "")
        default = "" if param.default is None else f"`{experiment.yaml_value(param.default)}`"
        choices = f": {', '.join(f'`{choice}`' for choice in param.choices)}" if param.choices else ""
        rows.append(f"| {name} | {default} | {experiment.STAGES[param.stage]} | {param.help}{choices} |")
    return "\n".join(rows)


def read(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def spread(runs, name):
    """Mean over the seeds, and the smallest and greatest of them."""
    values = [run[name] for run in runs]
    mean = f"{statistics.mean(values):.1f}%"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f} to {max(values):.1f})"


def seconds(runs, name):
    return f"{statistics.median(run['seconds'][name] for run in runs):.0f}"


def machine(results):
    m = results["machine"]
    return (
        f"{m['processor']}, {m['cores']} cores, {m['device']}, {m['precision']}, Python {m['python']}, "
        f"torch {m['torch']}, torchvision {m['torchvision']}"
    )


def accuracy(name):
    results = read(name)
    n = len(results["trained"])
    rows = ["| | linear probe, top-1 | top-5 | 20-NN |", "| --- | --- | --- | --- |"]
    for title, key in (("trained", "trained"), ("the same encoder, untrained", "untrained")):
        runs = results[key]
        rows.append(f"| {title} | {spread(runs, 'top1')} | {spread(runs, 'top5')} | {spread(runs, 'knn_top1')} |")
    rows.append(f"| raw pixels | {results['raw_pixels_top1']:.1f}% | | |")
    stages = ", ".join(f"{stage} {seconds(results['trained'], stage)} s" for stage in ("training", "encoding", "probe"))
    seeds = "1 seed" if n == 1 else f"{n} seeds, mean (least to greatest)"
    rows += [
        "",
        f"{seeds}. Last epoch of the probe. Time: {stages}; {seconds(results['trained'], 'all')} s in all, after the imports. "
        f"Measured by `python benchmarks/accuracy.py {name}` on: {machine(results)}.",
    ]
    return "\n".join(rows)


def render(text):
    """README.md with each generated part made anew."""
    parts = {"options": options, "demo": lambda: accuracy("demo"), "cifar10-jpeg": lambda: accuracy("cifar10-jpeg")}
    for name, part in parts.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
        assert pattern.search(text), f"README.md has no part {name}"
        text = pattern.sub(lambda match, part=part: match[1] + part() + "\n" + match[2], text)
    return text


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(render(path.read_text()))
