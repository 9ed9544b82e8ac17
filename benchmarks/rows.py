"""The rows of study.py: what each changes of the options of its group, and what is published of it."""

import re
from typing import NamedTuple

from benchmarks.common import BASELINE_LIKE, ROOT


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
SEARCH = ("--n_images 20000 --optimizer muon --lr 0.05 --arch resnet18-tiny --input_size 16 --h_dim 1024 --z_dim 256 "
          "--n_patches 8 --bs 50 --n_epochs 1 --test_patches 16 --emb_pool stages --pool_grid 4 --standardize "
          "--n_eval_epochs 30")  # fmt: skip
PLAIN = "--n_images 3000 --arch resnet18-imagenet --n_patches 8 --n_epochs 1"  # benchmarks/baseline.py has these options too
GROUPS = {
    "findings-full": Group("--n_patches 50 --n_epochs 2 --test_patches 25", "reproduction", "full"),
    "findings-cpu": Group(CPU, "reproduction", "cpu"),
    "views": Group(TINY, "reproduction", "views"),
    "one-minute": Group(TINY, "one-minute", "tries"),
    "search": Group(SEARCH, "search", "tries"),
    "laptop": Group("--preset laptop", "laptop", "runs"),
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
    ("sgd", "SGD for LARS, at its rate of 0.3", "57.97 (document)", "--optimizer sgd", "--optimizer sgd", 1),
    ("muon", "Muon for LARS", "", "--optimizer muon --lr 0.05", "--optimizer muon --lr 0.05", 2),
    ("constant", "the rate hardly lowered, as in the document's code", "", "--schedule constant", "--schedule constant", 1),
    ("frozen", "projection of another run, frozen", "86.85 to 87.35 (document)", "--pretrained_proj {base}",
     "--pretrained_proj {base}", 1),
    ("three-quarters", "75% of an epoch", "as good as 1 (document)", "--n_epochs 0.75", "--n_epochs 0.75", 2),
    ("one-epoch", "the whole epoch", "", "--n_epochs 1", None, 0),
    ("duplicates", "patches of one image as negatives", "a considerable dip (document)", "--bags 2", "--bags 2", 1),
    ("no-duplicates", "as many negatives, all of other images", "", "--n_patches 25 --bs 200 --n_epochs 4",
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
LEVERS = {  # each changes one thing of the base of the search behind --preset laptop
    "base": "",
    "LARS": "--optimizer lars --lr 0.3",
    "LARS, half the rate": "--optimizer lars --lr 0.15",
    "LARS, twice the rate": "--optimizer lars --lr 0.6",
    "AdamW": "--optimizer adamw --lr 0.001",
    "SGD": "--optimizer sgd --lr 0.03",
    "0.4 of the rate": "--lr 0.02",
    "twice the rate": "--lr 0.1",
    "constant": "--schedule constant",
    "half the batch": "--bs 25",
    "twice the batch": "--bs 100",
    "half the patches, two epochs": "--n_patches 4 --n_epochs 2",
    "twice the patches": "--n_patches 16",
    "two epochs": "--n_epochs 2",
    "large heads": "--h_dim 2048 --z_dim 512",
    "small heads": "--h_dim 512 --z_dim 128",
    "half the jitter": "--jitter 0.5",
    "neither blur nor solarisation": "--blur 0 --solarise 0",
    "mini": "--arch resnet18-mini",
    "the mean of the views' features": "--emb_pool features --pool_grid 1 --no-standardize",
    "stages in quadrants": "--pool_grid 2",
    "not standardised": "--no-standardize",
}
PAPERS = "--optimizer lars --lr 0.3 --emb_pool features --pool_grid 1 --no-standardize"
SIZES = {50000: "", 20000: "--n_images 20000", 5000: "--n_images 5000"}
ROWS = [
    *(Row(name, title, published, full, 1, "findings-full")
      for name, title, published, full, _, _ in FINDINGS if full is not None),
    *(Row(name, title, published, cpu, seeds, "findings-cpu")
      for name, title, published, _, cpu, seeds in FINDINGS if cpu is not None),
    *(Row(f"views-{kind}-{n}", f"{n} {title}", "", f"--eval_views {kind} --test_patches {n}", 1, "views")
      for n in (4, 9) for kind, title in VIEWS.items()),
    *(Row(name, name, "", options, 1, "one-minute") for name, options in TRIES.items()),
    *(Row(name, name, "", options, 1, "search") for name, options in LEVERS.items()),
    *(Row(f"preset-{n}", "the preset", "", options, 3 if n == 50000 else 2, "laptop") for n, options in SIZES.items()),
    *(Row(f"lars-{n}", "the preset with LARS and averaged features", "", f"{PAPERS} {options}".strip(), 1, "laptop")
      for n, options in SIZES.items()),
    Row("untrained-50000", "the preset, untrained", "", "--n_epochs 0", 1, "laptop"),
    Row("trained", "trained", "", "", 6, "demo"),
    Row("untrained", "the same encoder, untrained", "", "--n_epochs 0", 6, "demo"),
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
