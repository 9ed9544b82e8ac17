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
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import reproduce  # noqa: E402

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
    seeds = count([n]) + (", mean (least to greatest)" if n > 1 else "")
    rows += [
        "",
        f"{seeds}. Last epoch of the probe. Time: {stages}; {seconds(results['trained'], 'all')} s in all, after the imports. "
        f"Measured by `python benchmarks/accuracy.py {name}` on: {machine(results)}.",
    ]
    return "\n".join(rows)


def speed(device):
    """Ratios on a CPU, whose speed varies with what else the machine does; on a GPU the times too."""
    results, on_gpu = read(f"speed-{device}"), device == "cuda"
    times = " baseline | ours |" if on_gpu else ""
    rows = [f"| part |{times} times as fast | ours over the floor |", "| --- |" + " --- |" * (4 if on_gpu else 2)]
    for part in results["parts"].values():
        plain, ours = part["baseline"]["seconds"], part["ours"]["seconds"]
        middle, (least, most) = statistics.median(plain) / statistics.median(ours), ratios(plain, ours)
        times = f" {1e3 * statistics.median(plain):.4g} ms | {1e3 * statistics.median(ours):.4g} ms |" if on_gpu else ""
        over = statistics.median(ours) / part["floor"]
        rows.append(f"| {part['title']} |{times} {middle:.3g} ({least:.3g} to {most:.3g}) | {over:.2g} |")
    rows += ["", f"{whole_run(results)} Measured by `python benchmarks/bench.py --device {device}` on: {machine(results)}. "
             f"Rates behind the floor: {results['rates']['network'] / 1e12:.3g} TFLOP/s in the network's precision, "
             f"{results['rates']['float32'] / 1e12:.3g} in float32, {results['rates']['copy'] / 1e9:.3g} GB/s."]  # fmt: skip
    return "\n".join(rows)


def choices():
    """What the train step takes otherwise, as a multiple of what it takes, and the first step's seconds."""
    results = read("speed-cpu")
    times = {name: c for name, c in results["choices"].items() if name != "commit"}
    ours = statistics.median(times["as it is"]["seconds"])
    rows = ["| a train step of resnet18-imagenet, 8 x 100 patches | time | the first step |", "| --- | --- | --- |"]
    for name, c in times.items():
        first = statistics.median(c["first"]) / ours
        rows.append(f"| {name} | {statistics.median(c['seconds']) / ours:.2f} | {first:.1f} |")
    return "\n".join(rows)


def precision():
    results = read("precision")
    auto, fp32, plain = results["auto"], results["fp32"], results["baseline"]
    return (
        f"{results['machine']['precision']}: {spread(auto, 'top1')} top-1 on CIFAR-10 (JPEG), training "
        f"{seconds(auto, 'training')} s; fp32: {spread(fp32, 'top1')}, {seconds(fp32, 'training')} s; the plain "
        f"implementation: {spread(plain, 'top1')}, {seconds(plain, 'training')} s ({len(auto)}, {len(fp32)} and {len(plain)} "
        f"seeds, mean, least to greatest; 3,000 images, resnet18-imagenet, 8 patches, 1 epoch). Measured by "
        f"`python benchmarks/accuracy.py precision` on: {machine(results)}."
    )


def reproduction(scale, table):
    """A row for each experiment: what it is, what is published, what came out; "not yet measured" where nothing did."""
    results = experiment.read_json(reproduce.RESULTS).get(scale, {})
    lines = ["| setting | options | published, full size | top-1 here | 20-NN | seconds |", "| ---" * 6 + " |"]
    rows = [row for row in reproduce.ROWS if row.table == table and getattr(row, scale) is not None]
    entries = {row.name: results[row.name] for row in rows
               if results.get(row.name, {}).get("options") == reproduce.all_options(row, scale)}  # else it was another row
    for row in rows:
        options = f"`{getattr(row, scale)}`".replace("{base}", "LAST.pt") if getattr(row, scale) else ""
        cells = outcome(entries[row.name]["runs"]) if row.name in entries else ["not yet measured", "", ""]
        lines.append("| " + " | ".join([row.title, options, row.published, *cells]) + " |")
    lines += ["", f"Every row starts from `{reproduce.BASE[scale]}`; `--only` takes the names that `--list` prints."]
    if entries:
        entry = next(iter(entries.values()))
        size = f"{entry['n_images']:,} training images of " if entry["n_images"] else ""
        seeds = [len(entry["runs"]) for entry in entries.values()]
        lines[-1] += (f" {size}{entry['data']}, all test images. Mean (least to greatest) of {count(seeds)}; "
                      f"seconds of training, encoding and probe. Measured by `python benchmarks/reproduce.py --scale {scale}` "
                      f"on: {machine(entry)}.")  # fmt: skip
    if "losses" in entries.get("two-epochs-20", {"runs": [{}]})["runs"][0]:
        losses = entries["two-epochs-20"]["runs"][0]["losses"]
        told = "; ".join(f"{invariance:.3f}, {uniformity:.1f}" for invariance, uniformity in (epoch["last"] for epoch in losses))
        lines[-1] += f" Losses at the end of the epochs of 20 patches, 2 epochs: {told}."
    return "\n".join(lines)


def count(seeds):
    """1, 2, 3 as "1 to 3 seeds"."""
    few, many = min(seeds), max(seeds)
    return f"{few} to {many} seeds" if few < many else f"{many} seed{'s' if many > 1 else ''}"


def outcome(runs):
    """Top-1, 20-NN and seconds of a row, or why it failed."""
    done = [run for run in runs if "failed" not in run]
    if not done:
        return [runs[0]["failed"].split(";")[0], "", ""]
    if "knn_top1" not in done[0]:
        return [spread(done, "top1"), "", ""]
    seconds = statistics.median(sum(run["seconds"].values()) for run in done)
    return [spread(done, "top1"), spread(done, "knn_top1"), f"{seconds:.0f}"]


# What the findings say: the first of the two rows is the better one.
FINDINGS = (
    ("LARS is far above SGD", "base", "sgd"),
    ("without batch norms a little is lost", "base", "no-batch-norm"),
    ("patches of one image as negatives hurt", "no-duplicates", "duplicates"),
    ("the network without its last stage is at least as good", "mini", "cifar-stem"),
    ("the whole epoch is better than 75% of it", "base", "three-quarters"),
    ("the mean projection is as good an embedding as the features", "mean-projection", "base"),
    ("training is worth it", "base", "untrained"),
)


def verdicts():
    """Whether the small rows are in the order of the findings, and whether the seeds' ranges are apart."""
    results, lines = experiment.read_json(reproduce.RESULTS).get("small", {}), []
    for claim, better, worse in FINDINGS:
        if better not in results or worse not in results:
            lines.append(f"- {claim}: not yet measured")
            continue
        a, b = ([run["top1"] for run in results[name]["runs"] if "failed" not in run] for name in (better, worse))
        if not a or not b:
            lines.append(f"- {claim}: {'does **not** hold' if b else 'holds'} here, `{worse if a else better}` diverged")
            continue
        gap = statistics.mean(a) - statistics.mean(b)
        apart = min(a) > max(b) or min(b) > max(a)
        verdict = "does **not** show here" if not apart else "holds here" if gap > 0 else "does **not** hold here"
        lines.append(f"- {claim}: {verdict}, {gap:+.1f} points{'' if apart else ', less than the seeds differ by'} "
                     f"(`{better}` less `{worse}`)")  # fmt: skip
    return "\n".join(lines)


def presets():
    """A line for each preset: the options that it stands for."""
    lines = []
    for name, preset in experiment.PRESETS.items():
        lines.append(f"    --preset {name}: " + " ".join(f"--{option} {value}" for option, value in preset.items()))
    return "\n".join(lines)


def one_minute():
    """A row for each try, the best first: accuracy, and training time as a multiple of the base's."""
    results = read("one-minute")
    tries, base = results["tries"], results["tries"]["base"]["runs"]

    def middle(runs, seconds=False):
        return statistics.mean(run["seconds"]["training"] if seconds else run["top1"] for run in runs)

    rows = ["| what is changed | options | top-1 | less the base | training time |", "| ---" * 5 + " |"]
    done = {name: [run for run in entry["runs"] if "failed" not in run] for name, entry in tries.items()}
    for name, runs in sorted(done.items(), key=lambda item: -middle(item[1]) if item[1] else 0):
        entry = tries[name]
        if not runs:
            rows.append(f"| {name} | `{entry['options']}` | {entry['runs'][0]['failed'].split(';')[0]} | | |")
            continue
        options = " and ".join(([f"`{entry['options']}`"] if entry["options"] else [])
                               + (["a change to the program"] if entry["changed"] else []))  # fmt: skip
        rows.append(f"| {name} | {options} | {spread(runs, 'top1')} | {middle(runs) - middle(base):+.1f} | "
                    f"{middle(runs, True) / middle(base, True):.2f} |")  # fmt: skip
    seeds = [len(runs) for runs in done.values()]
    rows += ["", f"{results['data']}; each starts from `{results['base']}` ({count(seeds)}). "
             f"Measured by `python benchmarks/one_minute.py` on: {machine(results)}."]  # fmt: skip
    return "\n".join(rows)


def cost():
    """What checkpoints and the check of the numbers take of the training time."""
    results = read("cost")
    step, check, checkpoint = (statistics.median(results[name]) for name in ("step", "check", "checkpoint"))
    return (
        f"What it costs: a checkpoint of the default network, {results['bytes'] / 1e6:.0f} MB, flushed to disk, takes "
        f"{100 * checkpoint / results['checkpoint_every']:.1f}% of the {results['checkpoint_every']:.0f} seconds between two of "
        f"them (`--checkpoint_every`); the losses, gradients and weights are looked at before each, and the losses after every "
        f"{results['print_freq']} steps, which takes {1e3 * check:.1f} ms where a step takes {step:.1f} s. Measured by "
        f"`python benchmarks/cost.py` on: {machine(results)}."
    )


def ranks():
    """Several processes against one, and chunks against the whole batch."""
    results = read("ranks")
    two, four = results["difference"]["2"], results["difference"]["4"]
    share = statistics.median(results["seconds"]["2"]) / statistics.median(results["seconds"]["1"])
    whole, chunked = results["chunks"]["all"], results["chunks"]["64"]
    slower = chunked["seconds"] / whole["seconds"]
    return (
        f"2 and 4 gloo processes against one: the gradients differ by {two['gradient']:.0e} and {four['gradient']:.0e} of their "
        f"norm, the losses by {two['loss']:.0e} and {four['loss']:.0e}. Two processes with one thread each take {share:.2f} of "
        f"the time of one with one thread, so each does {1 / share / 2:.0%} of what it would alone (`{results['options']}`). "
        f"With `--max_patches 64` a step takes {slower:.2f} times as long there, and the process {chunked['memory'] / 1e9:.2f} "
        f"GB at most instead of {whole['memory'] / 1e9:.2f}. Measured by `python benchmarks/ranks.py` on: {machine(results)}."
    )


def large():
    """A pass over more images than memory should hold, and decoding them."""
    results = read("large")
    run, rates = results["training"], results["decoding"]
    memory, waited = max(run["resident"]) / 1e9, run["waited"] / run["seconds"]
    return (
        f"A pass over {run['bytes'] / 1e9:.0f} GB of images of 256 pixels took at most {memory:.1f} GB of memory, all in all, "
        f"and spent {waited:.1%} of its time waiting for images. Decoding into the cache file runs at "
        f"{ratio(rates['ours'], rates['ImageFolder'])} times the rate of one pass of torchvision's ImageFolder with a DataLoader "
        f"of two workers, checksums and writing included, and is done once. Measured by `python benchmarks/large.py` on: "
        f"{machine(results)}."
    )


def measured(part, command):
    try:
        return part()
    except FileNotFoundError:
        return f"Not yet measured. The command is `python benchmarks/{command}`."


def ratios(plain, ours):
    """Least and greatest of the ratios of runs that were neighbours."""
    values = [a / b for a, b in zip(plain, ours, strict=True)]
    return min(values), max(values)


def whole_run(results):
    if "run" not in results:
        return "The whole run: not yet measured (`--only run`)."
    run = results["run"]
    settings = ", ".join(f"{name} {value}" for name, value in run["options"].items())
    plain, cold, warm = (run[side] for side in ("baseline", "ours", "ours, images cached"))
    times = {name: [r["seconds"] for r in runs] for name, runs in (("plain", plain), ("cold", cold), ("warm", warm))}
    return (
        f"The whole run on CIFAR-10 (JPEG), from process start to report ({settings}): {ratio(times['plain'], times['warm'])} "
        f"times as fast, {ratio(times['plain'], times['cold'])} times when the images are decoded for the first time; top-1 "
        f"{spread(warm, 'top1')} against {spread(plain, 'top1')} ({count([len(plain)])})."
    )


def ratio(plain, ours):
    return f"{statistics.median(plain) / statistics.median(ours):.2g}"


def render(text):
    """README.md with each generated part made anew."""
    parts = {
        "options": options,
        "demo": lambda: accuracy("demo"),
        "speed-cpu": lambda: measured(lambda: speed("cpu"), "bench.py"),
        "speed-cuda": lambda: measured(lambda: speed("cuda"), "bench.py --device cuda"),
        "choices": lambda: measured(choices, "bench.py --only choices"),
        "findings-small": lambda: measured(lambda: reproduction("small", "findings"), "reproduce.py --scale small"),
        "verdicts": lambda: measured(verdicts, "reproduce.py --scale small"),
        "views": lambda: measured(lambda: reproduction("small", "views"), "reproduce.py --scale small"),
        "findings-full": lambda: reproduction("full", "findings"),
        "presets": presets,
        "one-minute": lambda: measured(one_minute, "one_minute.py"),
        "compare": lambda: "```\n" + (ROOT / "benchmarks" / "results" / "compare.txt").read_text() + "```",
        "precision": lambda: measured(precision, "accuracy.py precision"),
        "ranks": lambda: measured(ranks, "ranks.py"),
        "large": lambda: measured(large, "large.py"),
        "cost": lambda: measured(cost, "cost.py"),
    }
    for name, part in parts.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
        assert pattern.search(text), f"README.md has no part {name}"
        text = pattern.sub(lambda match, part=part: match[1] + part() + "\n" + match[2], text)
    return text


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(render(path.read_text()))
