"""The rows of study.py: what each changes of the options of its group, and what is published."""

import re
from typing import NamedTuple

from benchmarks.common import BASELINE_LIKE, ROOT


def demo_options():
    """Return what `make demo` passes to the program."""
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    options = re.search(r"^DEMO = (.*)$", makefile, re.M)[1].split()
    return " ".join(["--dataset textures", *options])


PLAIN_RUN = "--n_images 3000 --arch resnet18-imagenet --n_patches 8 --n_epochs 1"  # baseline.py too
GROUPS = {  # options that every row of a group starts from; the program's defaults say the rest
    "findings-full": "--n_patches 50 --n_epochs 2 --test_patches 25",
    "findings-cpu": (
        "--arch resnet18-tiny --input_size 16 --h_dim 1024 --z_dim 256 --n_patches 4 --bs 50 "
        "--n_epochs 1 --test_patches 4 --n_eval_epochs 50"
    ),
    "laptop": "--preset laptop",
    "demo": demo_options(),
    "precision": f"{PLAIN_RUN} {BASELINE_LIKE}",
}


class Row(NamedTuple):
    group: str
    name: str
    title: str
    options: str  # beside those of the group
    seeds: int = 1  # how many, from 42, the program's default
    published: str = ""  # top-1 at full size and who published it
    verdict: str = ""  # whether it is so here, with the small network


VONMISES = "--uniformity_loss vonmises --invariance_loss_weight 1.5 --emb_pool proj"
FINDINGS = {  # name: title, published
    "base": ("the base of the rows below", "89.25 (document)"),
    "untrained": ("its encoder, untrained", ""),
    "raw-pixels": ("raw pixels", ""),
    "one-epoch-20": ("20 patches, 1 epoch", "80.6 (authors)"),
    "two-epochs-20": (
        "20 patches, 2 epochs",
        "84.2 (authors); losses -.803, -168.5; -.811, -173.5 (document)",
    ),
    "ten-epochs-20": ("20 patches, 10 epochs", "90.7 (authors, of 30)"),
    "thirty-epochs-20": ("20 patches, 30 epochs", "93.1 (authors)"),
    "two-patches": ("2 patches", ""),
    "more-patches": ("more patches", ""),
    "more-epochs": ("more epochs", ""),
    "no-batch-norm": ("without both batch norms", "88.81 (document)"),
    "tanh": ("Tanh for ReLU", "comparable (document)"),
    "sgd": ("SGD for LARS, at its rate of 0.3", "57.97 (document)"),
    "sgd-0.03": ("SGD at a rate of 0.03", ""),
    "sgd-0.003": ("SGD at a rate of 0.003", ""),
    "sgd-0.001": ("SGD at a rate of 0.001", ""),
    "muon": ("Muon for LARS", ""),
    "constant": ("the rate hardly lowered, as in the document's code", ""),
    "frozen": ("projection of another run of the base, frozen", "86.85 to 87.35 (document)"),
    "three-quarters": ("75% of an epoch", "as good as 1 (document)"),
    "one-epoch": ("the whole epoch", ""),
    "duplicates": ("patches of one image as negatives", "a considerable dip (document)"),
    "no-duplicates": ("as many negatives, all of other images", ""),
    "mean-projection": ("mean projection as embedding", "similar (document)"),
    "mean-projection-longer": ("the same, four epochs", ""),
    "bottleneck": ("mean projection from a narrow layer", "84 (document)"),
    "bottleneck-2": ("the same, 2 patches", "fine too (document)"),
    "mini": (
        "a network of three stages, ResNet-18 without its last",
        "below 81; with two stages 78 to 79 (document, later)",
    ),
    "tiny": ("a network of two stages", "78 to 79 (document, later)"),
}
FULL = {  # options in the published settings
    "base": "",
    "untrained": "--n_epochs 0",
    "raw-pixels": "",
    "one-epoch-20": "--n_patches 20 --n_epochs 1",
    "two-epochs-20": "--n_patches 20",
    "ten-epochs-20": "--n_patches 20 --n_epochs 10",
    "thirty-epochs-20": "--n_patches 20 --n_epochs 30",
    "more-patches": "--n_patches 100",
    "more-epochs": "--n_epochs 4",
    "no-batch-norm": "--no-batch_norm",
    "tanh": "--activation tanh",
    "sgd": "--optimizer sgd",
    "muon": "--optimizer muon --lr 0.05",
    "constant": "--schedule constant",
    "frozen": "--pretrained_proj {base}",
    "three-quarters": "--n_epochs 0.75",
    "one-epoch": "--n_epochs 1",
    "duplicates": "--bags 2",
    "no-duplicates": "--n_patches 25 --bs 200 --n_epochs 4",
    "mean-projection": f"{VONMISES} --n_patches 20 --n_epochs 10 --z_dim 4096 --h_dim 2048",
    "bottleneck": f"{VONMISES} --n_patches 20 --n_epochs 10 --z_dim 4096 --h_dim 256",
    "bottleneck-2": f"{VONMISES} --n_patches 2 --n_epochs 10 --z_dim 4096 --h_dim 256",
    "mini": "--arch resnet18-mini --n_patches 20 --n_epochs 1",
    "tiny": "--arch resnet18-tiny --n_patches 20 --n_epochs 1",
}
CPU = {  # options with a small network, on two cores
    "base": "",
    "untrained": "--n_epochs 0",
    "raw-pixels": "",
    "two-patches": "--n_patches 2",
    "more-patches": "--n_patches 8",
    "more-epochs": "--n_epochs 2",
    "no-batch-norm": "--no-batch_norm",
    "tanh": "--activation tanh",
    "sgd": "--optimizer sgd",
    "sgd-0.03": "--optimizer sgd --lr 0.03",
    "sgd-0.003": "--optimizer sgd --lr 0.003",
    "sgd-0.001": "--optimizer sgd --lr 0.001",
    "muon": "--optimizer muon --lr 0.05",
    "constant": "--schedule constant",
    "frozen": "--pretrained_proj {base}",
    "three-quarters": "--n_epochs 0.75",
    "duplicates": "--bags 2",
    "no-duplicates": "--n_patches 2 --bs 100 --n_epochs 2",
    "mean-projection": f"{VONMISES} --z_dim 1024 --h_dim 512",
    "mean-projection-longer": f"{VONMISES} --z_dim 1024 --h_dim 512 --n_epochs 4",
    "bottleneck": f"{VONMISES} --z_dim 1024 --h_dim 64",
    "bottleneck-2": f"{VONMISES} --n_patches 2 --z_dim 1024 --h_dim 64",
    "mini": "--arch resnet18-mini",
}
VERDICTS = {  # of CPU; as good: means within two points of top-1
    "two-patches": "many patches are better: yes",
    "no-batch-norm": "as good: no",
    "tanh": "as good: yes",
    "sgd": "LARS is far above it: yes",
    "sgd-0.003": "LARS is above SGD at the best rate that was tried: yes",
    "frozen": "as good: yes",
    "three-quarters": "as good as the whole: yes",
    "duplicates": "they hurt, compared with the next row: yes",
    "mean-projection": "as good: no",
    "mean-projection-longer": "as good as the base of one epoch: no",
    "bottleneck-2": "as good as the row above: yes",
    "mini": "better than the base, which has two stages: no",
}
TWO_SEEDS = ("base", "untrained", "tanh", "muon", "frozen", "three-quarters", "mini")  # in CPU
PAPERS = (  # with the same network
    "--optimizer lars --lr 0.3 --uniformity_loss tcr --invariance_loss_weight 200 "
    "--emb_pool features --pool_grid 1 --no-standardize"
)
RUN_BUDGETS = (1, 2, 4)  # minutes
SIZES = {50000: "", 20000: "--n_images 20000", 5000: "--n_images 5000"}


def findings(group, options, two_seeds=()):
    """Return the rows of a group of FINDINGS, with these options: {name: text}."""
    rows = []
    for name, text in options.items():
        title, published = FINDINGS[name]
        seeds = 2 if name in two_seeds else 1
        verdict = VERDICTS.get(name, "") if group == "findings-cpu" else ""
        rows.append(Row(group, name, title, text, seeds, published, verdict))
    return rows


def laptop_rows():
    """Return the rows of --preset laptop: by number of images, by budget, and beside LARS."""
    rows = []
    for n, options in SIZES.items():
        title = f"the preset, {n:,} images"
        rows.append(Row("laptop", f"preset-{n}", title, options, seeds=3 if n == 50000 else 2))
    for minutes in RUN_BUDGETS:
        title = f"the preset with `--budget {minutes}`"
        rows.append(Row("laptop", f"budget-{minutes}", title, f"--budget {minutes}"))
    stages = Row(
        "laptop",
        "stages-50000",
        "the preset with a loss after each stage of the network",
        "--h_dim 256 --stage_loss_weight 3",
    )
    lars = Row(
        "laptop", "lars-50000", "the preset with the losses and the encoding of the paper", PAPERS
    )
    return [
        *rows,
        stages,
        lars,
        Row("laptop", "untrained-50000", "the preset, untrained", "--n_epochs 0"),
    ]


ROWS = [
    *findings("findings-full", FULL),
    *findings("findings-cpu", CPU, TWO_SEEDS),
    *laptop_rows(),
    Row("demo", "trained", "trained", "", seeds=6),
    Row("demo", "untrained", "the same encoder, untrained", "--n_epochs 0", seeds=6),
    Row("demo", "raw-pixels", "raw pixels", ""),
    Row("precision", "auto", "`--precision auto`: bf16 where the hardware has it", "", seeds=3),
    Row("precision", "fp32", "fp32", "--precision fp32", seeds=3),
    # Four minutes each.
    Row("precision", "baseline", "`benchmarks/baseline.py`, fp32", "", seeds=2),
]


def rows_of(group):
    return [row for row in ROWS if row.group == group]


def all_options(row):
    """Return the options of a row, those of its group included."""
    return f"{GROUPS[row.group]} {row.options}".strip()
