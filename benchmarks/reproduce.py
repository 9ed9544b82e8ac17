"""The published findings again, at full size or small: writes benchmarks/results/reproduction.json.

    python benchmarks/reproduce.py --scale small                     # about half an hour on two cores
    python benchmarks/reproduce.py --scale full --seeds 1            # for a GPU
    python benchmarks/reproduce.py --scale small --only base sgd
    python benchmarks/reproduce.py --scale small --list              # the command of each row

CIFAR-10 is downloaded; --dataset folder --data_dir DIR takes images in train/<class> and test/<class> instead. Each run goes
through main.main, into logs/reproduction-SCALE: what is finished there is read and not run again, what was stopped goes on.
Then: python benchmarks/readme.py
"""

import argparse
import contextlib
import io
import json
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from accuracy import machine, raw_pixels, read_run  # noqa: E402

import experiment  # noqa: E402
import main  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "reproduction.json"
DATA = {"cifar10": "CIFAR-10", "folder": "CIFAR-10 (JPEG)"}

# What every row of a scale starts from; the program's defaults say the rest.
BASE = {
    "full": "--n_patches 50 --n_epochs 2 --test_patches 25",
    "small": "--n_images 5000 --arch resnet18-imagenet --input_size 16 --h_dim 1024 --z_dim 256 --n_patches 8 --bs 50 "
             "--n_epochs 1 --test_patches 9 --n_eval_epochs 50",
}  # fmt: skip
VONMISES = "--uniformity_loss vonmises --invariance_loss_weight 1.5 --emb_pool proj"


class Row(NamedTuple):
    name: str
    title: str
    published: str  # top-1 at full size and who says so; "" if nobody does
    full: str | None  # options beside those of BASE; None: no row of this scale
    small: str | None
    seeds: int = 2  # at small scale; at full scale one
    table: str = "findings"


ROWS = [
    Row("base", "the base of the rows below", "89.25 (document)", "", "", 3),
    Row("untrained", "its encoder, untrained", "", "--n_epochs 0", "--n_epochs 0"),
    Row("raw-pixels", "raw pixels", "", "", "", 1),
    Row("one-epoch-20", "20 patches, 1 epoch", "84.2 (authors)", "--n_patches 20 --n_epochs 1", None),
    Row("two-epochs-20", "20 patches, 2 epochs", "losses -0.803, -168.5; -0.811, -173.5 (document)", "--n_patches 20", None),
    Row("ten-epochs-20", "20 patches, 10 epochs", "90.7 (authors, of 30)", "--n_patches 20 --n_epochs 10", None),
    Row("thirty-epochs-20", "20 patches, 30 epochs", "93.1 (authors)", "--n_patches 20 --n_epochs 30", None),
    Row("more-patches", "more patches", "", "--n_patches 100", "--n_patches 20"),
    Row("more-epochs", "more epochs", "", "--n_epochs 4", "--n_epochs 3"),
    Row("no-batch-norm", "without both batch norms", "88.81 (document)", "--no-batch_norm", "--no-batch_norm"),
    Row("tanh", "Tanh for ReLU", "comparable (document)", "--activation tanh", "--activation tanh"),
    Row("sgd", "without LARS", "57.97 (document)", "--optimizer sgd", "--optimizer sgd"),
    Row("constant", "the rate hardly lowered, as in the document's code", "", "--schedule constant", "--schedule constant"),
    Row("frozen", "projection of another run, frozen", "86.85 to 87.35 (document)", "--pretrained_proj {base}",
        "--pretrained_proj {base}"),
    Row("three-quarters", "75% of an epoch", "as good as 1 (reported)", "--n_epochs 0.75", "--n_epochs 0.75"),
    Row("one-epoch", "the whole epoch", "", "--n_epochs 1", None),
    Row("duplicates", "patches of one image as negatives", "a considerable dip (document)", "--bags 2", "--bags 2"),
    Row("no-duplicates", "the same steps and sizes, other images", "", "--n_patches 25 --bs 200 --n_epochs 4",
        "--n_patches 4 --bs 100 --n_epochs 2"),
    Row("mean-projection", "mean projection as embedding", "similar (document)",
        f"{VONMISES} --n_patches 20 --n_epochs 10 --z_dim 4096 --h_dim 2048",
        f"{VONMISES} --n_epochs 3 --z_dim 1024 --h_dim 512"),
    Row("bottleneck", "the same from a narrow layer", "84 (document)",
        f"{VONMISES} --n_patches 20 --n_epochs 10 --z_dim 4096 --h_dim 256",
        f"{VONMISES} --n_epochs 3 --z_dim 1024 --h_dim 64", 1),
    Row("bottleneck-2", "the same, 2 patches", "fine too (document)",
        f"{VONMISES} --n_patches 2 --n_epochs 10 --z_dim 4096 --h_dim 256",
        f"{VONMISES} --n_patches 2 --n_epochs 3 --z_dim 1024 --h_dim 64", 1),
    Row("cifar-stem", "the whole CIFAR network", "", None,
        "--arch resnet18-cifar --n_patches 4 --test_patches 4"),
    Row("mini", "without its last stage", "about 81 (reported)", "--arch resnet18-mini --n_patches 20 --n_epochs 1",
        "--arch resnet18-mini --n_patches 4 --test_patches 4"),
    Row("tiny", "without its last two", "78 to 79 (reported)", "--arch resnet18-tiny --n_patches 20 --n_epochs 1",
        "--arch resnet18-tiny --n_patches 4 --test_patches 4"),
    *(Row(f"views-{kind}-{n}", f"{n} {title}", "", f"--eval_views {kind} --test_patches {n}",
          f"--eval_views {kind} --test_patches {n}", 1, "views")
      for n in (4, 9) for kind, title in (("augmented", "patches as in training"), ("crops", "random crops"),
                                          ("grid", "crops on a grid"))),
]  # fmt: skip


def command(row, scale, seed, options):
    """The arguments of main.main for a row; its projection is that of the base's first run, whose seed no such row has."""
    log_folder = options.log_folder or f"logs/reproduction-{scale}"
    text = f"{BASE[scale]} {getattr(row, scale)} --dataset {options.dataset} --data_dir {shlex.quote(options.data_dir)}"
    if "{base}" in text:
        bases = sorted(Path(log_folder).glob("base-42__*"))
        text, seed = text.format(base=bases[0] / "checkpoints" / "last.pt" if bases else "BASE"), seed + 100
    name = f"{row.name}-{seed}"
    return ["train", "--exp_name", name, "--log_folder", log_folder, "--seed", str(seed), *shlex.split(text)]


def all_options(row, scale):
    return f"{BASE[scale]} {getattr(row, scale)}".strip()


def measure(argv):
    """Run it, or what is left of it; returns its result, or why it failed."""
    args = main.parse(argv)
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = main.main(argv)
    print(errors.getvalue(), end="", file=sys.stderr)
    last = (errors.getvalue().strip().splitlines() or [""])[-1].removeprefix("error: ")
    if code == 1 and re.search(r"not finite|is -?(nan|inf)", last):  # it diverged, which is an outcome
        return {"seed": args.seed, "failed": last}
    if code != 0:
        sys.exit(code)
    (exp_dir,) = Path(args.log_folder).glob(f"{args.exp_name}__*")
    for old in experiment.epoch_checkpoints(exp_dir):
        old.unlink()  # hundreds of MB each, and last.pt holds the same
    return {"seed": args.seed, **read_run(exp_dir)}


def run(row, options):
    scale, seeds = options.scale, options.seeds or (row.seeds if options.scale == "small" else 1)
    argvs = [command(row, scale, 42 + i, options) for i in range(seeds)]
    hp = main.hyperparameters(main.parse(argvs[0]))
    runs = [{"top1": raw_pixels(argvs[0])}] if row.name == "raw-pixels" else [measure(argv) for argv in argvs]
    entry = {"options": all_options(row, scale), "data": DATA[options.dataset], "n_images": hp.n_images, "runs": runs,
             "machine": machine(hp.device)}  # fmt: skip
    results = experiment.read_json(RESULTS)
    results.setdefault(scale, {})[row.name] = entry
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=tuple(BASE), required=True)
    parser.add_argument("--only", nargs="+", choices=[row.name for row in ROWS], metavar="NAME", help="these rows alone")
    parser.add_argument("--list", action="store_true", help="print the command of each row and stop")
    parser.add_argument("--seeds", type=int, help="runs of each row (default: 1; small: 1 to 3)")
    parser.add_argument("--dataset", choices=tuple(DATA), default="cifar10")
    parser.add_argument("--data_dir", default="./datasets")
    parser.add_argument("--log_folder", help="(default: logs/reproduction-SCALE)")
    options = parser.parse_args()
    rows = [row for row in ROWS if getattr(row, options.scale) is not None and row.name in (options.only or [row.name])]
    for row in rows:
        if options.list:
            print(f"{row.name:18} python main.py {shlex.join(command(row, options.scale, 42, options))}")
        else:
            run(row, options)
