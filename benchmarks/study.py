"""Accuracy and time of whole runs: rows of a group, some seeds each, into results/GROUP.json.

    python -m benchmarks.study findings-cpu          # the published findings, small: hours
    python -m benchmarks.study findings-full         # in the published settings, for a GPU
    python -m benchmarks.study findings-cpu --only base sgd
    python -m benchmarks.study laptop --list         # the command of each row

The other groups: laptop, the preset beside LARS; demo, what `make demo` runs; precision, bf16, fp32
and the baseline. A run is a run folder in logs/GROUP: what is finished there is read and not run
again, what was stopped goes on. CIFAR-10 is downloaded; --dataset folder --data_dir DIR takes
images in train/<class> and test/<class> instead. Then: python -m benchmarks.tables
"""

import contextlib
import io
import re
import shlex
import sys
from pathlib import Path

from benchmarks.common import child, commit_of, machine, parser, this_commit
from benchmarks.rows import GROUPS, PLAIN_RUN, all_options, rows_of
from cli import exp_dir_of, hparams_of, parse
from data import Images
from evaluate import Fit, linear_probe
from experiment import Run
from infra import files
from infra.device import pick_device
from main import main as run_program

DATA = {"cifar10": "CIFAR-10", "folder": "CIFAR-10", "textures": "textures"}  # what results name


def arguments(row, seed, options):
    """Return the arguments of main.py for a row. Raw pixels and the baseline take the images of it.

    A pretrained projection is that of the base's first run, whose seed no such row has.
    """
    log_folder = options.log_folder or f"logs/{row.group}"
    text = all_options(row)
    if "--dataset" not in text:
        text += f" --dataset {options.dataset} --data_dir {shlex.quote(options.data_dir)}"
    if "{base}" in text:
        bases = sorted(Path(log_folder).glob("base-42__*"))
        text = text.format(base=Run(bases[0]).last if bases else "BASE")
        seed += 100
    exp_name = f"{row.name.replace(' ', '_').replace(',', '')}-{seed}"
    about = ["--exp_name", exp_name, "--log_folder", log_folder, "--seed", str(seed)]
    return ["train", *about, *shlex.split(text)]


def shell_command(row, options):
    """Return the command of the first run of a row as a shell takes it."""
    if row.name in ("raw-pixels", "baseline"):
        return f"python -m benchmarks.study {row.group} --only {row.name}"
    return shlex.join(["python", "main.py", *arguments(row, 42, options)])


def run_row(row, seed, options):
    """Run a row with a seed, or what is left of it. Return its result as the results keep it."""
    argv = arguments(row, seed, options)
    if row.name == "raw-pixels":
        return {"top1": top1_of_pixels(argv), "commit": this_commit()}
    if row.name == "baseline":
        return run_baseline(parse(argv))
    return run_train(argv)


def run_baseline(args):
    """Return the result of the baseline with the seed and the data of a train command.

    It is kept in the log folder and is not run again.
    """
    path = Path(args.log_folder, f"{args.exp_name}.json")
    if not path.exists():
        data = ["--dataset", args.dataset, "--data_dir", args.data_dir]
        words = [*PLAIN_RUN.split(), *data, "--seed", args.seed]
        result = {**child("benchmarks.baseline", *words), "commit": this_commit()}
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(path, result)
    return files.read_json(path)


def run_train(argv):
    """Run a train command. Return its result, or {"seed", "failed", "commit"} if it diverged.

    Exits with the program's exit code if that is not 0 for another reason. Removes the epoch
    checkpoints: each has hundreds of MB, and last.pt holds the same as the last one.
    """
    args = parse(argv)
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = run_program(argv)
    print(errors.getvalue(), end="", file=sys.stderr)
    last = (errors.getvalue().strip().splitlines() or [""])[-1].removeprefix("error: ")
    if code == 1 and re.search(r"not finite|is -?(nan|inf)", last):
        return {"seed": args.seed, "failed": last, "commit": this_commit()}
    if code != 0:
        sys.exit(code)
    run = Run(exp_dir_of(args, hparams_of(args)))
    for path in run.epoch_checkpoints():
        path.unlink()
    return {"seed": args.seed, **result_of(run)}


def result_of(run):
    """Return the results of a finished run.

    Accuracies in percent, the probe's rate, losses by epoch, seconds by stage, the commit.
    """
    result, launch = files.read_json(run.result), run.read_launches()[-1]
    names = ("top1", "top5", "best_top1", "train_top1", "knn_top1", "lr")
    seconds = {stage: round(value, 1) for stage, value in launch["seconds"].items()}
    about = {"losses": losses_of(run), "seconds": seconds, "commit": commit_of(launch)}
    return {**{name: result[name] for name in names}, **about}


def losses_of(run):
    """Return [invariance, uniformity] of the last print_freq steps of each epoch."""
    rows = [row for row in files.read_jsonl(run.metrics) if "loss_sim" in row]
    last = {row["epoch"]: [row["loss_sim"], row["loss_uniformity"]] for row in rows}
    return list(last.values())


def top1_of_pixels(argv):
    """Return the top-1 of the linear probe on the pixels of a train command's images."""
    hp = hparams_of(parse(argv))
    images = Images(hp)
    device = pick_device(hp.device)
    tensors = []
    for split in ("train", "test"):
        pixels, labels, class_names, _ = images[split]
        tensors += [(pixels[:].flatten(1) / 127.5 - 1).to(device), labels.to(device)]
    fit = Fit(hp.eval_lr, hp.n_eval_epochs, seed=hp.seed)
    return linear_probe(*tensors, len(class_names), fit)[0]["top1"]


def study(row, options):
    """Run a row with all its seeds and write its entry into the file of its group."""
    seeds = range(42, 42 + (options.seeds or row.seeds))
    runs = [run_row(row, seed, options) for seed in seeds]
    if options.disturbed:
        runs = [{name: run[name] for name in run if name != "seconds"} for run in runs]
    hp = hparams_of(parse(arguments(row, 42, options)))
    about = {"options": all_options(row), "data": DATA[hp.dataset], "n_images": hp.n_images}
    path = options.out / f"{row.group}.json"
    entry = {**about, "runs": runs, "machine": machine(hp.device)}
    files.write_json(path, {**files.read_json(path), row.name: entry})


def main(argv=None):
    made = parser(__doc__)
    made.add_argument("group", choices=tuple(GROUPS))
    made.add_argument("--only", nargs="+", metavar="NAME", help="rows, by the names of --list")
    made.add_argument("--list", action="store_true", help="print the command of each row")
    text = "leave out the seconds: other programs slowed these runs"
    made.add_argument("--disturbed", action="store_true", help=text)
    made.add_argument("--seeds", type=int, help="runs of each row (default: 1 to 6)")
    made.add_argument("--dataset", choices=("cifar10", "folder"), default="cifar10")
    made.add_argument("--data_dir", default="./datasets")
    made.add_argument("--log_folder", help="(default: logs/GROUP)")
    options = made.parse_args(argv)
    rows = {row.name: row for row in rows_of(options.group)}
    for name in options.only or rows:
        if name not in rows:
            made.error(f"--only {name}: choose from {', '.join(rows)}")
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only or rows:
        if options.list:
            print(f"{name:18} {shell_command(rows[name], options)}")
        else:
            study(rows[name], options)


if __name__ == "__main__":
    main()
