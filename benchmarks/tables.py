"""The generated parts of README.md and docs/results.md: tables and sentences of hparams.SETTINGS and benchmarks/results.

Each function returns Markdown. Those of results raise FileNotFoundError if the file is missing, but for findings, which
name what is not yet measured.
"""

import json
import math
import statistics

from benchmarks.common import RESULTS
from benchmarks.rows import GROUPS, all_options, rows_of
from benchmarks.speed import CHOICES
from hparams import PRESETS, SETTINGS, STAGES, yaml_value
from infra import files

EARLIER_DATA = "CIFAR-10 (JPEG)"  # of the results that do not name their data
STAGE_NAMES = ("training", "encoding", "probe")


def table(columns, rows):
    """Return a Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [columns, ["---"] * len(columns), *rows])


def read(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def spread(runs, name):
    """Return the mean over the seeds, and the least and the greatest of them."""
    values = [run[name] for run in runs]
    mean = f"{statistics.mean(values):.1f}%"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f} to {max(values):.1f})"


def seconds(runs, name):
    return f"{statistics.median(run['seconds'][name] for run in runs):.0f}"


def timed(runs):
    """Return the seconds of all stages of each run that recorded them (study.py --disturbed does not)."""
    return [sum(run["seconds"][stage] for stage in STAGE_NAMES) for run in runs if "seconds" in run]


def total_seconds(runs):
    """Return the median of timed; "" if there is none."""
    return f"{statistics.median(timed(runs)):.0f}" if timed(runs) else ""


def count(numbers):
    """Return 1, 2, 3 as "1 to 3 seeds"."""
    few, many = min(numbers), max(numbers)
    return f"{few} to {many} seeds" if few < many else f"{many} seed{'s' if many > 1 else ''}"


def measured_by(command, results):
    """Return the sentence that names the command and the machine."""
    m = results["machine"]
    return (f"Measured by `python -m benchmarks.{command}` on: {m['processor']}, {m['cores']} cores, {m['device']}, "
            f"{m['precision']}, Python {m['python']}, torch {m['torch']}, torchvision {m['torchvision']}.")  # fmt: skip


def succeeded(runs):
    """Return the runs that did not diverge."""
    return [run for run in runs if "failed" not in run]


def why_failed(runs):
    return runs[0]["failed"].split(";")[0]


def ratio(a, b):
    return statistics.median(a) / statistics.median(b)


def options():
    rows = []
    for name, setting in SETTINGS.items():
        names = f"`--{name}`" + (f", `--no-{name}`" if setting.type is bool else "")
        default = "" if setting.default is None else f"`{yaml_value(setting.default)}`"
        choices = f": {', '.join(f'`{choice}`' for choice in setting.choices)}" if setting.choices else ""
        rows.append([names, default, STAGES[setting.stage], setting.help + choices])
    return table(["option", "default", "touches", ""], rows)


def presets():
    """Return a line for each preset: the options that it stands for."""

    def words(option, value):
        if isinstance(value, bool):
            return f"--{option}" if value else f"--no-{option}"
        return f"--{option} {value}"

    lines = [" ".join(words(*pair) for pair in preset.items()) for preset in PRESETS.values()]
    return "\n".join(f"    --preset {name}: {line}" for name, line in zip(PRESETS, lines, strict=True))


def findings(group, folder=RESULTS):
    """Return the table of a group of study.py whose results are in reproduction.json of a folder. A row that was not measured
    with its present options says so; a row whose runs all diverged says why."""
    base, _, section = GROUPS[group]
    results = files.read_json(folder / "reproduction.json").get(section, {})
    entries, rows = {}, []
    for row in rows_of(group):
        cells = ["not yet measured", "", "", ""]
        entry = results.get(row.name, {})
        if entry.get("options") == all_options(row) and entry["runs"]:
            entries[row.name] = entry
            cells = outcome(entry["runs"])
        elif entry.get("options") == all_options(row):
            step, (invariance, uniformity) = entry["so_far"]["step"], entry["so_far"]["last"]
            cells[0] = f"not yet measured; losses at step {step:,}: {invariance:.3f}, {uniformity:.1f}, on {cores(entry)}"
        options = f"`{row.options}`".replace("{base}", "LAST.pt") if row.options else ""
        rows.append([f"{row.title} (`{row.name}`)", options, row.published, *cells])
    columns = ["setting", "options", "published, full size", "top-1 here", "on its training images", "20-NN", "seconds"]
    if not any(cells[-1] for cells in rows):
        columns, rows = columns[:-1], [cells[:-1] for cells in rows]
    text = table(columns, rows)
    text += f"\n\nEvery row starts from `{base}`. In brackets is the name that `--only` takes."
    if entries:
        entry = next(iter(entries.values()))
        size = f"{entry['n_images']:,} training images of " if entry["n_images"] else ""
        seeds = count([len(entry["runs"]) for entry in entries.values()])
        text += (f" {size}{entry['data']}, all test images. Mean (least to greatest) of {seeds}. "
                 f"{measured_by(f'study {group}', entry)}")  # fmt: skip
    return text + losses(entries)


def cores(entry):
    return f"{entry['machine']['cores']} cores, {entry['machine']['processor']}, {entry['machine']['precision']}"


def outcome(runs):
    """Return the top-1 on the test and on the training images, 20-NN and seconds of a row, or why it failed."""
    done = succeeded(runs)
    if not done:
        return [why_failed(runs), "", "", ""]
    if "knn_top1" not in done[0]:
        return [spread(done, "top1"), "", "", ""]
    return [*(spread(done, name) for name in ("top1", "train_top1", "knn_top1")), total_seconds(done)]


def losses(entries):
    """Return the sentence with the losses of the row that the document publishes losses of."""
    runs = succeeded(entries.get("two-epochs-20", {"runs": []})["runs"])
    if not runs:
        return ""
    told = "; ".join("{:.3f}, {:.1f}".format(*epoch["last"]) for epoch in runs[0]["losses"])
    return f" Losses at the end of the epochs of 20 patches, 2 epochs: {told}."


def tries(group, with_seconds=True):
    """Return a row for each try of a search, the best first; with_seconds: with the training time as a multiple of the base's."""
    file, base = GROUPS[group].file, GROUPS[group].base
    results = read(file)
    about = {name: results[name] for name in ("data", "machine") if name in results}  # of the tries that do not say it
    entries = {name: {**about, **entry} for name, entry in results["tries"].items()}

    def means(runs):
        top1 = statistics.mean(run["top1"] for run in runs)
        return top1, statistics.mean(run["seconds"]["training"] for run in runs) if with_seconds else math.nan

    base_top1, base_seconds = means(entries["base"]["runs"])
    rows = []
    for name, entry in entries.items():
        runs, changes = succeeded(entry["runs"]), entry["options"].removeprefix(base).strip()
        options = [f"`{changes}`"] if changes else []
        options += ["a change to the program"] if entry.get("changed") else []
        title = [name, " and ".join(options)]
        if not runs:
            rows.append((0, [*title, why_failed(entry["runs"]), "", ""]))
            continue
        top1, training = means(runs)
        cells = [spread(runs, "top1"), f"{top1 - base_top1:+.1f}", f"{training / base_seconds:.2f}"]
        rows.append((top1, title + cells))
    rows.sort(key=lambda row: -row[0])
    columns = ["what is changed", "options", "top-1", "less the base", "training time, base = 1"][: 5 if with_seconds else 4]
    text = table(columns, [cells[: len(columns)] for _, cells in rows])
    seeds = count([len(succeeded(entry["runs"])) for entry in entries.values()])
    data = " and ".join(sorted({entry["data"] for entry in entries.values()}))
    missing = [row.name for row in rows_of(group) if row.name not in entries]
    missing = f" Not yet measured: {'; '.join(missing)}." if missing else ""
    return f"{text}\n\n{data}; each starts from `{base}` ({seeds}).{missing} {measured_by(f'study {group}', entries['base'])}"


def demo():
    results = read("demo")
    trained = results["trained"]
    rows = []
    for title, runs in (("trained", trained), ("the same encoder, untrained", results["untrained"])):
        rows.append([title, *(spread(runs, name) for name in ("top1", "top5", "knn_top1"))])
    rows.append(["raw pixels", f"{results['raw_pixels_top1']:.1f}%", "", ""])
    stages = ", ".join(f"{stage} {seconds(trained, stage)} s" for stage in STAGE_NAMES)
    seeds = count([len(trained)]) + (", mean (least to greatest)" if len(trained) > 1 else "")
    return (f"{table(['', 'linear probe, top-1', 'top-5', '20-NN'], rows)}\n\n{seeds}. Last epoch of the probe. Time: {stages}; "
            f"{total_seconds(trained)} s in all. {measured_by('study demo', results)}")  # fmt: skip


def precision():
    results = read("precision")
    auto, fp32, plain = results["auto"], results["fp32"], results["baseline"]
    return (
        f"{results['machine']['precision']}: {spread(auto, 'top1')} top-1 on {results.get('data', EARLIER_DATA)}, training "
        f"{seconds(auto, 'training')} s; fp32: {spread(fp32, 'top1')}, {seconds(fp32, 'training')} s; the plain "
        f"implementation: {spread(plain, 'top1')}, {seconds(plain, 'training')} s ({len(auto)}, {len(fp32)} and {len(plain)} "
        f"seeds, mean, least to greatest; 3,000 images, resnet18-imagenet, 8 patches, 1 epoch). "
        f"{measured_by('study precision', results)}"
    )


def speed(device):
    """Return the ratios of each part; on a GPU the times too, since a CPU's vary with what else the machine does."""
    results, on_gpu = read(f"speed-{device}"), device == "cuda"
    rows = []
    for part in results["parts"].values():
        plain, ours = part["baseline"]["seconds"], part["ours"]["seconds"]
        of_neighbours = [a / b for a, b in zip(plain, ours, strict=True)]
        times = [f"{1e3 * statistics.median(side):.4g} ms" for side in (plain, ours)] if on_gpu else []
        faster = f"{ratio(plain, ours):.3g} ({min(of_neighbours):.3g} to {max(of_neighbours):.3g})"
        rows.append([part["title"], *times, faster, f"{statistics.median(ours) / part['floor']:.2g}"])
    columns = ["part", *(("baseline", "ours") if on_gpu else ()), "times as fast", "ours over the floor"]
    network, float32, copy = results["rates"].values()
    return (f"{table(columns, rows)}\n\n{whole_run(results)} {measured_by(f'speed --device {device}', results)} Rates behind the "
            f"floor: {network / 1e12:.3g} TFLOP/s in the network's precision, {float32 / 1e12:.3g} in float32, "
            f"{copy / 1e9:.3g} GB/s.")  # fmt: skip


def whole_run(results):
    if "run" not in results:
        return "The whole run: not yet measured (`--only run`)."
    run = results["run"]
    settings = ", ".join(f"{name} {value}" for name, value in run["options"].items())
    plain, cold, warm = (run[side] for side in ("baseline", "ours", "ours, images cached"))
    plain_times, cold_times, warm_times = ([r["seconds"] for r in runs] for runs in (plain, cold, warm))
    return (
        f"The whole run on {run.get('data', EARLIER_DATA)}, from process start to report ({settings}): "
        f"{ratio(plain_times, warm_times):.2g} times as fast, {ratio(plain_times, cold_times):.2g} times when the images are "
        f"decoded for the first time; top-1 {spread(warm, 'top1')} against {spread(plain, 'top1')} ({count([len(plain)])})."
    )


def choices():
    """Return what a train step and encoding take otherwise, as multiples of what they take."""
    results = read("choices-cpu")
    recorded, rows = results["choices"], []
    for name in CHOICES:
        step, encoding = (statistics.median(recorded[name][key]) for key in ("seconds", "encoding"))
        step_as_is, encoding_as_is = (statistics.median(recorded["as it is"][key]) for key in ("seconds", "encoding"))
        first = max(recorded[name]["first"])  # the others may have found what an earlier process compiled
        rows.append([name, f"{step / step_as_is:.2f}", f"{first / step_as_is:.1f}", f"{encoding / encoding_as_is:.2f}"])
    text = table(["resnet18-imagenet, 8 x 100 patches", "a train step", "the first step", "encoding"], rows)
    return f"{text}\n\n{measured_by('speed --only choices', results)}"


def cost():
    results = read("cost")
    step, check, checkpoint = (statistics.median(results[name]) for name in ("step", "check", "checkpoint"))
    return (
        f"What it costs: a checkpoint of the default network, {results['bytes'] / 1e6:.0f} MB, flushed to disk, takes "
        f"{100 * checkpoint / results['checkpoint_every']:.1f}% of the {results['checkpoint_every']:.0f} seconds between two of "
        f"them (`--checkpoint_every`); the losses, gradients and weights are checked before each, and the losses after every "
        f"{results['print_freq']} steps, which takes {1e3 * check:.1f} ms where a step takes {step:.1f} s. "
        f"{measured_by('speed --only cost', results)}"
    )


def ranks():
    results = read("ranks")
    two, four = results["difference"]["2"], results["difference"]["4"]
    share = ratio(results["seconds"]["2"], results["seconds"]["1"])
    whole, chunked = results["chunks"]["all"], results["chunks"]["64"]
    slower = chunked["seconds"] / whole["seconds"]
    return (
        f"2 and 4 gloo processes against one: the gradients differ by {two['gradient']:.0e} and {four['gradient']:.0e} of their "
        f"norm, the losses by {two['loss']:.0e} and {four['loss']:.0e}. A step of two processes, one thread each, takes "
        f"{share:.2f} times as long as that of one process with one thread; .5 would be ideal (`{results['options']}`). "
        f"With `--max_patches 64` a step takes {slower:.2f} times as long there, and the process {chunked['memory'] / 1e9:.2f} "
        f"GB at most instead of {whole['memory'] / 1e9:.2f}. {measured_by('speed --only ranks', results)}"
    )


def large():
    results = read("large")
    run, rates = results["training"], results["decoding"]
    memory, waited = max(run["resident"]) / 1e9, run["waited"] / run["seconds"]
    return (
        f"A pass over {run['bytes'] / 1e9:.0f} GB of images of 256 pixels took at most {memory:.1f} GB of memory, all in all, "
        f"and spent {waited:.1%} of its time waiting for images. Decoding into the cache file runs at "
        f"{ratio(rates['ours'], rates['ImageFolder']):.2g} times the rate of one pass of torchvision's ImageFolder with a "
        f"DataLoader of two workers, checksums and writing included, and is done once. "
        f"{measured_by('speed --only large', results)}"
    )


def engines():
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
