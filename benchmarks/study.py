"""Accuracy and time of whole runs: the rows of a group, some seeds of each, into benchmarks/results.

    python -m benchmarks.study findings-cpu                 # the published findings with a small network, all images: an hour
    python -m benchmarks.study findings-full                # the same in the published settings, for a GPU
    python -m benchmarks.study findings-cpu --only base sgd
    python -m benchmarks.study search --list                # the command of each row

The other groups: views, what an image is encoded by; search, the search behind --preset laptop; laptop, that preset beside LARS;
one-minute, the search behind --preset one-minute; demo, what `make demo` runs; precision, bf16, fp32 and the baseline. A run is
a run folder in logs/GROUP: what is finished there is read and not run again, what was stopped goes on. CIFAR-10 is downloaded;
--dataset folder --data_dir DIR takes images in train/<class> and test/<class> instead. Then: python -m benchmarks.readme
"""

import contextlib
import io
import re
import shlex
import sys
from pathlib import Path

import numpy as np

import main
from benchmarks.common import child, machine, parser
from benchmarks.rows import GROUPS, PLAIN, all_options, rows_of
from data import Images
from evaluate import Fit, linear_probe
from experiment import Run
from infra import files
from infra.device import pick_device

DATA = {"cifar10": "CIFAR-10", "folder": "CIFAR-10", "textures": "textures"}  # what the results name as the data


def command(row, seed, options):
    """Return the arguments of main.py for a row. Raw pixels and the baseline take the images from them.

    A pretrained projection is that of the base's first run, whose seed no such row has.
    """
    log_folder = options.log_folder or f"logs/{row.group}"
    text = all_options(row)
    if "--dataset" not in text:
        text += f" --dataset {options.dataset} --data_dir {shlex.quote(options.data_dir)}"
    if "{base}" in text:
        bases = sorted(Path(log_folder).glob("base-42__*"))
        text, seed = text.format(base=Run(bases[0]).last if bases else "BASE"), seed + 100
    exp_name = f"{row.name.replace(' ', '_').replace(',', '')}-{seed}"
    return ["train", "--exp_name", exp_name, "--log_folder", log_folder, "--seed", str(seed), *shlex.split(text)]


def shown(row, options):
    """Return the command of the first run of a row as a shell takes it."""
    if row.name in ("raw-pixels", "baseline"):
        return f"python -m benchmarks.study {row.group} --only {row.name}"
    return shlex.join(["python", "main.py", *command(row, 42, options)])


def measure(row, seed, options):
    """Run a row with a seed, or what is left of it. Return its result as the results keep it."""
    argv = command(row, seed, options)
    if row.name == "raw-pixels":
        return {"top1": raw_pixels(argv)}
    if row.name == "baseline":
        return baseline_run(main.parse(argv))
    return one_run(argv)


def baseline_run(args):
    """Return the result of the baseline with the seed and data of a train command. It is kept as the train command's run is."""
    path = Path(args.log_folder, f"{args.exp_name}.json")
    if not path.exists():
        words = [*PLAIN.split(), "--dataset", args.dataset, "--data_dir", args.data_dir, "--seed", str(args.seed)]
        result = child("benchmarks.baseline", *words)
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(path, result)
    return files.read_json(path)


def one_run(argv):
    """Run a train command. Return {"seed", "failed"} if it diverged, else what read_run returns and the seed.

    Exits with the program's exit code if that is not 0 for any other reason. Epoch checkpoints are removed: each has hundreds of
    MB, and last.pt holds the same as the last one.
    """
    args, errors = main.parse(argv), io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = main.main(argv)
    print(errors.getvalue(), end="", file=sys.stderr)
    last = (errors.getvalue().strip().splitlines() or [""])[-1].removeprefix("error: ")
    if code == 1 and re.search(r"not finite|is -?(nan|inf)", last):
        return {"seed": args.seed, "failed": last}
    if code != 0:
        sys.exit(code)
    (exp_dir,) = Path(args.log_folder).glob(f"{args.exp_name}__*")
    for path in Run(exp_dir).epoch_checkpoints():
        path.unlink()
    return {"seed": args.seed, **read_run(exp_dir)}


def read_run(exp_dir):
    """Return the results of a finished run: accuracies in percent, the probe's rate, losses by epoch, seconds per stage."""
    run = Run(exp_dir)
    result, seconds = files.read_json(run.result), run.read_launches()[-1]["seconds"]
    accuracies = {name: result[name] for name in ("top1", "top5", "best_top1", "train_top1", "knn_top1", "lr")}
    seconds = {stage: round(value, 1) for stage, value in seconds.items()}
    return {**accuracies, "losses": losses_by_epoch(run), "seconds": seconds}


def losses_by_epoch(run):
    """Return a dict for each epoch: "mean", over its steps, and "last", over the last print_freq: [invariance, uniformity]."""
    epochs = {}
    for row in files.read_jsonl(run.metrics):
        if "loss_sim" in row:
            epochs.setdefault(row["epoch"], []).append(row)
    losses = []
    for rows in epochs.values():
        n_steps = np.diff([0] + [row["step"] for row in rows])
        values = np.array([(row["loss_sim"], row["loss_uniformity"]) for row in rows])
        losses.append({"mean": np.average(values, axis=0, weights=n_steps).tolist(), "last": values[-1].tolist()})
    return losses


def raw_pixels(argv):
    """Return the top-1 of the linear probe on the pixels themselves, in [-1, 1], of the images of a train command."""
    hp = main.hyperparameters(main.parse(argv))
    images, device, tensors = Images(hp), pick_device(hp.device), []
    for split in ("train", "test"):
        pixels, labels, class_names = images[split]
        tensors += [(pixels[:].flatten(1) / 127.5 - 1).to(device), labels.to(device)]
    fit = Fit(hp.eval_lr, hp.n_eval_epochs, seed=hp.seed)
    return linear_probe(*tensors, len(class_names), fit)[0]["top1"]


def run(row, options):
    """Run a row with all its seeds and write its results."""
    runs = [measure(row, 42 + i, options) for i in range(options.seeds or row.seeds)]
    if options.disturbed:
        runs = [{name: value for name, value in run.items() if name != "seconds"} for run in runs]
    record(row, runs, options)


def run_so_far(row, options):
    """Write where the first run of a row is and its losses since the last epoch began, if it is not finished. Run nothing."""
    argv = command(row, 42, options)
    args = main.parse(argv)
    for exp_dir in Path(args.log_folder).glob(f"{args.exp_name}__*"):
        lines = [line for line in files.read_jsonl(Run(exp_dir).metrics) if "loss_sim" in line]
        if lines and not Run(exp_dir).read_result():
            losses = {"step": lines[-1]["global_step"], "mean": losses_by_epoch(Run(exp_dir))[-1]["mean"],
                      "last": losses_by_epoch(Run(exp_dir))[-1]["last"]}  # fmt: skip
            record(row, [], options, losses)


def record(row, runs, options, so_far=None):
    """Write the runs of a row into the file of its group. so_far: the losses of a run that is not finished."""
    group = GROUPS[row.group]
    path = options.out / f"{group.file}.json"
    hp = main.hyperparameters(main.parse(command(row, 42, options)))
    about = {"data": DATA[hp.dataset], "machine": machine(hp.device)}
    results = files.read_json(path)
    if group.section:
        entry = {"options": all_options(row), "n_images": hp.n_images, "runs": runs, **about}
        if so_far:
            entry["so_far"] = so_far
        results.setdefault(group.section, {})[row.name] = entry
    else:
        found = {"raw_pixels_top1": runs[0]["top1"]} if row.name == "raw-pixels" else {row.name: runs}
        results |= {"options": group.base, **about, **found}
    files.write_json(path, results)


def parse(argv=None):
    """Return the arguments of the command line."""
    made = parser(__doc__)
    made.add_argument("group", choices=tuple(GROUPS))
    made.add_argument("--only", nargs="+", metavar="NAME", help="these rows alone, by the names that --list prints")
    made.add_argument("--list", action="store_true", help="print the command of each row and stop")
    made.add_argument("--so_far", action="store_true", help="write the losses of runs that are not finished, and run nothing")
    made.add_argument("--disturbed", action="store_true", help="do not write the seconds: other programs slowed these runs")
    made.add_argument("--seeds", type=int, help="runs of each row (default: 1 to 3)")
    made.add_argument("--dataset", choices=("cifar10", "folder"), default="cifar10")
    made.add_argument("--data_dir", default="./datasets")
    made.add_argument("--log_folder", help="(default: logs/GROUP)")
    options = made.parse_args(argv)
    names = [row.name for row in rows_of(options.group)]
    unknown = sorted(set(options.only or ()) - set(names))
    if unknown:
        made.error(f"--only {unknown[0]}: choose from {', '.join(names)}")
    if options.disturbed and options.group in ("demo", "precision", "one-minute"):
        made.error(f"--disturbed: the table of {options.group} needs the seconds")
    return options


if __name__ == "__main__":
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    for row in rows_of(options.group):
        if options.only and row.name not in options.only:
            continue
        if options.list:
            print(f"{row.name:18} {shown(row, options)}")
        elif options.so_far:
            run_so_far(row, options)
        else:
            run(row, options)
