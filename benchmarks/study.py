"""Accuracy and time of whole runs: the rows of a group, some seeds of each, into benchmarks/results.

    python -m benchmarks.study findings-cpu                 # the published findings with a small network, all images: an hour
    python -m benchmarks.study findings-full                # the same in the published settings, for a GPU
    python -m benchmarks.study findings-cpu --only base sgd
    python -m benchmarks.study search --list                # the command of each row

The other groups: views, what an image is encoded by; search, the search behind --preset laptop, and laptop, its result; document,
the document's own setting for as long as it may take; one-minute, the search behind --preset one-minute, 20 minutes a seed on two
cores; demo, what `make demo` runs; precision, bf16, fp32 and the baseline. A run is a run folder in logs/GROUP: what is finished
there is read and not run again, what was stopped goes on. CIFAR-10 is downloaded; --dataset folder --data_dir DIR takes images
in train/<class> and test/<class> instead. Then: python -m benchmarks.readme
"""

import contextlib
import io
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

import main
from benchmarks.common import BASELINE_LIKE, ROOT, child, machine, parser
from data import Images
from evaluate import Fit, linear_probe
from experiment import Run
from infra import files
from infra.device import pick_device

DATA = {"cifar10": "CIFAR-10", "folder": "CIFAR-10", "textures": "textures"}  # what the results name as the data


def demo_options():
    """Return what `make demo` passes to the program."""
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    return " ".join(["--dataset textures", *re.search(r"^DEMO = (.*)$", makefile, re.M)[1].split()])


class Group(NamedTuple):
    base: str  # options that every row starts from; the program's defaults say the rest
    file: str  # of benchmarks/results, without .json
    section: str | None = None  # of the file, where the rows are; None: at its top level


CPU = ("--arch resnet18-tiny --input_size 16 --h_dim 1024 --z_dim 256 --n_patches 4 --bs 50 --n_epochs 1 --test_patches 4 "
       "--n_eval_epochs 50")  # fmt: skip
TINY = ("--n_images 5000 --arch resnet18-tiny --input_size 16 --h_dim 1024 --z_dim 256 --n_patches 8 --bs 50 --n_epochs 1 "
        "--test_patches 4 --n_eval_epochs 50")  # fmt: skip
PLAIN = "--n_images 3000 --arch resnet18-imagenet --n_patches 8 --n_epochs 1"  # benchmarks/baseline.py has these options too
GROUPS = {
    "findings-full": Group("--n_patches 50 --n_epochs 2 --test_patches 25", "reproduction", "full"),
    "findings-cpu": Group(CPU, "reproduction", "cpu"),
    "views": Group(TINY, "reproduction", "views"),
    "one-minute": Group(TINY, "one-minute", "tries"),
    "demo": Group(demo_options(), "demo"),
    "precision": Group(f"{PLAIN} {BASELINE_LIKE}", "precision"),
}


class Row(NamedTuple):
    name: str
    title: str
    published: str  # top-1 at full size and who says so; "" if nobody does
    options: str  # beside those of the group's base
    seeds: int  # how many, from 42, the program's default
    group: str


VONMISES = "--uniformity_loss vonmises --invariance_loss_weight 1.5 --emb_pool proj"
FINDINGS = [  # name, title, published, options at full size and on a CPU (None: no such row), seeds on a CPU
    ("base", "the base of the rows below", "89.25 (document)", "", "", 2),
    ("untrained", "its encoder, untrained", "", "--n_epochs 0", "--n_epochs 0", 2),
    ("raw-pixels", "raw pixels", "", "", "", 1),
    ("one-epoch-20", "20 patches, 1 epoch", "80.6 (authors)", "--n_patches 20 --n_epochs 1", None, 0),
    ("two-epochs-20", "20 patches, 2 epochs", "84.2 (authors); losses -.803, -168.5; -.811, -173.5 (document)", "--n_patches 20",
     None, 0),
    ("ten-epochs-20", "20 patches, 10 epochs", "90.7 (authors, of 30)", "--n_patches 20 --n_epochs 10", None, 0),
    ("thirty-epochs-20", "20 patches, 30 epochs", "93.1 (authors)", "--n_patches 20 --n_epochs 30", None, 0),
    ("two-patches", "2 patches", "", None, "--n_patches 2", 1),
    ("more-patches", "more patches", "", "--n_patches 100", "--n_patches 8", 1),
    ("more-epochs", "more epochs", "", "--n_epochs 4", "--n_epochs 2", 1),
    ("no-batch-norm", "without both batch norms", "88.81 (document)", "--no-batch_norm", "--no-batch_norm", 1),
    ("tanh", "Tanh for ReLU", "comparable (document)", "--activation tanh", "--activation tanh", 1),
    ("sgd", "without LARS", "57.97 (document)", "--optimizer sgd", "--optimizer sgd", 1),
    ("muon", "Muon for LARS", "", "--optimizer muon --lr 0.05", "--optimizer muon --lr 0.05", 2),
    ("constant", "the rate hardly lowered, as in the document's code", "", "--schedule constant", "--schedule constant", 1),
    ("frozen", "projection of another run, frozen", "86.85 to 87.35 (document)", "--pretrained_proj {base}",
     "--pretrained_proj {base}", 1),
    ("three-quarters", "75% of an epoch", "as good as 1 (document)", "--n_epochs 0.75", "--n_epochs 0.75", 2),
    ("one-epoch", "the whole epoch", "", "--n_epochs 1", None, 0),
    ("duplicates", "patches of one image as negatives", "a considerable dip (document)", "--bags 2", "--bags 2", 1),
    ("no-duplicates", "the same steps and sizes, other images", "", "--n_patches 25 --bs 200 --n_epochs 4",
     "--n_patches 2 --bs 100 --n_epochs 2", 1),
    ("mean-projection", "mean projection as embedding", "similar (document)",
     f"{VONMISES} --n_patches 20 --n_epochs 10 --z_dim 4096 --h_dim 2048", f"{VONMISES} --z_dim 1024 --h_dim 512", 1),
    ("bottleneck", "the same from a narrow layer", "84 (document)",
     f"{VONMISES} --n_patches 20 --n_epochs 10 --z_dim 4096 --h_dim 256", f"{VONMISES} --z_dim 1024 --h_dim 64", 1),
    ("bottleneck-2", "the same, 2 patches", "fine too (document)",
     f"{VONMISES} --n_patches 2 --n_epochs 10 --z_dim 4096 --h_dim 256", f"{VONMISES} --n_patches 2 --z_dim 1024 --h_dim 64", 1),
    ("mini", "without its last stage", "below 81 (document, later)", "--arch resnet18-mini --n_patches 20 --n_epochs 1",
     "--arch resnet18-mini", 1),
    ("tiny", "without its last two", "78 to 79 (document, later)", "--arch resnet18-tiny --n_patches 20 --n_epochs 1", None, 0),
]  # fmt: skip
VIEWS = {"augmented": "patches as in training", "crops": "random crops", "grid": "crops on a grid"}
BEST = "--n_patches 4 --n_images 10000 --h_dim 4096 --z_dim 1024 --lr 0.15"
TRIES = {  # each changes one thing of the base; most keep its number of trained patches, and so its cost on a given device
    "base": "",
    "whole network": "--arch resnet18-cifar",
    "mini": "--arch resnet18-mini",
    "imagenet stem, twice the width": "--arch resnet18-imagenet --input_size 32",
    "large heads": "--h_dim 4096 --z_dim 1024",
    "small heads": "--h_dim 512 --z_dim 128",
    "8 pixels": "--input_size 8",
    "12 pixels": "--input_size 12",
    "half the patches, twice the batch, twice the images": "--n_patches 4 --bs 100 --n_images 10000",
    "half the patches, twice the images": "--n_patches 4 --n_images 10000",
    "half the patches, two epochs": "--n_patches 4 --n_epochs 2",
    "a quarter of the patches, four times the images": "--n_patches 2 --n_images 20000",
    "half the batch": "--bs 25",
    "twice the batch": "--bs 100",
    "75% of the epoch": "--n_epochs 0.75",
    "half the rate": "--lr 0.15",
    "twice the rate": "--lr 0.6",
    "constant": "--schedule constant",
    "a quarter of the invariance": "--invariance_loss_weight 50",
    "von Mises": "--uniformity_loss vonmises --invariance_loss_weight 1.5",
    "fewer patches, large heads, half the rate": BEST,
}
ROWS = [
    *(Row(name, title, published, full, 1, "findings-full")
      for name, title, published, full, _, _ in FINDINGS if full is not None),
    *(Row(name, title, published, cpu, seeds, "findings-cpu")
      for name, title, published, _, cpu, seeds in FINDINGS if cpu is not None),
    *(Row(f"views-{kind}-{n}", f"{n} {title}", "", f"--eval_views {kind} --test_patches {n}", 1, "views")
      for n in (4, 9) for kind, title in VIEWS.items()),
    *(Row(name, name, "", options, 1, "one-minute") for name, options in TRIES.items()),
    Row("trained", "trained", "", "", 3, "demo"),
    Row("untrained", "the same encoder, untrained", "", "--n_epochs 0", 3, "demo"),
    Row("raw-pixels", "raw pixels", "", "", 1, "demo"),
    Row("auto", "the precision of the hardware", "", "", 3, "precision"),
    Row("fp32", "fp32", "", "--precision fp32", 3, "precision"),
    Row("baseline", "the plain implementation", "", "", 2, "precision"),  # four minutes each
]  # fmt: skip


def rows_of(group):
    return [row for row in ROWS if row.group == group]


def all_options(row):
    """Return the options of a row, those of its group included."""
    return f"{GROUPS[row.group].base} {row.options}".strip()


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
    accuracies = {name: result[name] for name in ("top1", "top5", "best_top1", "knn_top1", "lr")}
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
    record(row, runs, options)


def record(row, runs, options):
    """Write the runs of a row into the file of its group."""
    group = GROUPS[row.group]
    path = options.out / f"{group.file}.json"
    hp = main.hyperparameters(main.parse(command(row, 42, options)))
    about = {"data": DATA[hp.dataset], "machine": machine(hp.device)}
    results = files.read_json(path)
    if group.section:
        entry = {"options": all_options(row), "n_images": hp.n_images, "runs": runs, **about}
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
    made.add_argument("--seeds", type=int, help="runs of each row (default: 1 to 3)")
    made.add_argument("--dataset", choices=("cifar10", "folder"), default="cifar10")
    made.add_argument("--data_dir", default="./datasets")
    made.add_argument("--log_folder", help="(default: logs/GROUP)")
    options = made.parse_args(argv)
    names = [row.name for row in rows_of(options.group)]
    unknown = sorted(set(options.only or ()) - set(names))
    if unknown:
        made.error(f"--only {unknown[0]}: choose from {', '.join(names)}")
    return options


if __name__ == "__main__":
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    for row in rows_of(options.group):
        if options.only and row.name not in options.only:
            continue
        if options.list:
            print(f"{row.name:18} {shown(row, options)}")
        else:
            run(row, options)
