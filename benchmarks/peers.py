"""Accuracy against seconds of training: this program, SimCLR, VICReg, Barlow Twins, BYOL, labels.

    pip install lightly                                         # the peers' losses and heads
    python -m benchmarks.peers --dataset folder --data_dir DIR  # 1, 3, 10 and 30 minutes; resumes
    python -m benchmarks.peers --dataset folder --data_dir DIR --budgets 60 --methods preset simclr

All methods train the same network, resnet18-tiny, with 16 pixels on the same images. The first
start measures the time of a step of each method, k-means features, and the untrained network. A
budget is then a number of steps, so that the accuracy does not depend on what else the machine
does, and rows can be added on another machine of the same precision. A method tries several
optimizers, learning rates and settings of its own at budgets up to TRIED seconds, and keeps what
has the best linear probe on N_SCORED training images that neither the method nor the probe is
trained with. Longer budgets and further seeds use its choice at TRIED. All methods are encoded
alike: all stages of the whole image in 4 x 4 parts, in that of the method's sizes which has the
best score. Each training run is kept in --log_folder and each result is a row of
benchmarks/results/peers.json. What is there is not run again: after a change of peers_methods.py,
remove the method's runs and rows.
"""

import statistics
import time
from argparse import Namespace
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.common import machine, parser, this_commit
from benchmarks.kmeans import kmeans_row
from benchmarks.peers_methods import ARCH, METHODS, Try, label
from data import load_images, select
from evaluate import Fit, knn, linear_probe
from infra import files
from infra.console import progress_bar
from infra.device import configure, generator
from model import build_backbone, fold_batch_norm, stage_means
from optimizers import learning_rate, set_learning_rate
from patches import to_signed

GRID = 4  # of the image along each axis
BUDGETS = (60, 180, 600, 1800)  # seconds
TRIED = 60  # seconds; up to this budget a method tries everything
N_CENTROIDS = 400  # of k-means
N_FIT, N_SCORED = 3000, 2000  # training images that choose among the tries
FIT = Fit(n_epochs=10, standardize=True)


def train_method(method, how, seed, images, n_steps, bf16):
    """Return the backbone after n_steps by a Try, with a cosine from its rate to 0."""
    torch.manual_seed(seed)
    backbone, optimizer, step = method.build(how, bf16)
    hp = Namespace(lr=how.rate, schedule="cosine")
    per_epoch = len(images.images) // method.bs
    title = f"{method.title}, {how.optimizer} {how.rate:g}"
    for i in progress_bar(range(n_steps), title):
        epoch, batch = divmod(i, per_epoch)
        if batch == 0:
            order = torch.randperm(len(images.images), generator=generator(seed, "order", epoch))
        set_learning_rate(optimizer, learning_rate(hp, i / n_steps))
        rows = order[batch * method.bs : (batch + 1) * method.bs]
        rng = generator(seed, "patches", epoch, batch)
        step(images.images[rows], images.labels[rows], rng)
    return backbone


@torch.inference_mode()
def embed_whole(backbone, images, bf16, size=None, bs=200):
    """Return all stages of images in size x size pixels, or their own, in GRID x GRID parts.

    float32 (N, PARTS² stage_dim).
    """
    dtype = torch.bfloat16 if bf16 else torch.float32
    backbone = fold_batch_norm(backbone).to(dtype, memory_format=torch.channels_last)
    stages = []
    for batch in images.split(bs):
        x = batch.float() / 255
        if size not in (None, x.shape[-1]):
            x = F.interpolate(x, size=size, mode="bilinear", antialias=True)
        x = to_signed(x).to(dtype, memory_format=torch.channels_last)
        stages.append(stage_means(backbone, x, GRID).float())
    return torch.cat(stages)


def accuracies_of(backbone, images, test_images, seed, bf16, size=None):
    """Return the accuracies of a linear probe and of 20-NN on labelled images, by embed_whole."""
    x = embed_whole(backbone, images.images, bf16, size)
    x_test = embed_whole(backbone, test_images.images, bf16, size)
    tensors = (x, images.labels, x_test, test_images.labels)
    result, _ = linear_probe(*tensors, 10, FIT._replace(seed=seed, bf16=bf16))
    accuracies = {name: result[name] for name in ("top1", "train_top1")}
    return {**accuracies, "knn_top1": knn(*tensors, 10)}


def scored_split(images, seed):
    """Return (N_SCORED images, N_FIT others, all but the scored ones)."""
    order = torch.randperm(len(images.images), generator=generator(seed, "scored"))
    rows = order[:N_SCORED], order[N_SCORED : N_SCORED + N_FIT], order[N_SCORED:]
    return tuple(select(images, part) for part in rows)


def run_try(options, name, how, images, n_steps, bf16):
    """Train, or read the run if it is in the log folder.

    Returns score (top-1 on the scored images), size, backbone, commit.
    """
    run_name = f"{name}, {label(name, how)}, {n_steps} steps, seed {options.seed}.pt"
    path = options.log_folder / run_name
    if not path.exists():
        method = METHODS[name]
        scored, fitted, rest = scored_split(images, options.seed)
        backbone = train_method(method, how, options.seed, rest, n_steps, bf16)
        scores = {}
        for size in method.sizes:
            accuracies = accuracies_of(backbone, fitted, scored, options.seed, bf16, size)
            scores[size] = accuracies["top1"]
        size = max(scores, key=scores.get)
        run = {"score": scores[size], "size": size, "backbone": backbone.state_dict()}
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_pt(path, {**run, "commit": this_commit()})
    return files.read_pt(path)


def tries_of(name, budget, rows):
    """Return what a method tries: all its tries; above TRIED or with another seed, the choice."""
    for row in rows:
        if (row["method"], row["budget"]) == (name, min(budget, TRIED)):
            return (Try(row["optimizer"], row["lr"], row["setting"]),)
    return METHODS[name].tries


def untrained_entry(options, images, bf16):
    """Return the accuracies of the network with random weights, and its score, as of run_try."""
    torch.manual_seed(options.seed)
    backbone = build_backbone(ARCH)[0]
    scored, fitted, _ = scored_split(images[0], options.seed)
    score = accuracies_of(backbone, fitted, scored, options.seed, bf16)["top1"]
    accuracies = accuracies_of(backbone, *images, options.seed, bf16)
    return {**accuracies, "score": score, "commit": this_commit()}


def budget_row(options, name, budget, results, images, bf16):
    """Return the row of a method at a budget: what was chosen, accuracies, steps."""
    runs = {}
    for how in tries_of(name, budget, results["rows"]):
        n_steps = round(budget / results["step_seconds"][f"{name} {how.optimizer}"]["seconds"])
        run = run_try(options, name, how, images[0], n_steps, bf16)
        runs[how] = {"n_steps": n_steps, **run}
    how = max(runs, key=lambda how: runs[how]["score"])
    run = runs[how]
    backbone = build_backbone(ARCH)[0]
    backbone.load_state_dict(run["backbone"])
    return {
        "method": name,
        "budget": budget,
        "seed": options.seed,
        "n_probe": len(images[0].images),
        "n_steps": run["n_steps"],
        "bs": METHODS[name].bs,
        "optimizer": how.optimizer,
        "lr": how.rate,
        "setting": how.setting,
        "size": run["size"],
        **accuracies_of(backbone, *images, options.seed, bf16, run["size"]),
        "scores": {label(name, how): run["score"] for how, run in runs.items()},
        "commit": run["commit"],
    }


def time_steps(tries, images, bf16, n_rounds=9):
    """Return {"method optimizer": entry with the median seconds of a step} of (method, Try) pairs.

    The steps take turns.
    """
    steps = {(name, how.optimizer): METHODS[name].build(how, bf16)[2] for name, how in tries}
    seconds = {key: [] for key in steps}
    for i in range(n_rounds):
        for (name, optimizer), step in steps.items():
            bs = METHODS[name].bs
            start = time.monotonic()
            step(images.images[:bs], images.labels[:bs], generator(0, "patches", i))
            seconds[name, optimizer].append(time.monotonic() - start)
    return {
        f"{name} {optimizer}": {"seconds": statistics.median(times[2:]), "commit": this_commit()}
        for (name, optimizer), times in seconds.items()
    }


def not_timed(names, timed):
    """Return a (method, Try) for each optimizer of these methods whose step is not in `timed`."""
    missing = {}
    for name in names:
        for how in METHODS[name].tries:
            if f"{name} {how.optimizer}" not in timed:
                missing[name, how.optimizer] = (name, how)
    return list(missing.values())


def refusal(options, results, here, new):
    """Return why these results can't have the rows that options ask for, or None.

    new: what not_timed returns.
    """
    rows, there = results["rows"], results["machine"]
    chosen = {row["method"] for row in rows if row["budget"] == TRIED}
    if there["precision"] != here["precision"]:
        return f"is in {there['precision']}, not in {here['precision']}: give another --out"
    if new and there != here:
        name, how = new[0]
        return f"has times of another machine, and none of {name} with {how.optimizer}"
    if max(options.budgets) > TRIED and TRIED not in options.budgets:
        for name in options.methods:
            if name not in chosen:
                return f"has no choice of {name}: give --budgets {TRIED}, too"
    return None


def main(argv=None):
    made = parser(__doc__)
    made.add_argument("--dataset", default="folder")
    made.add_argument("--data_dir", required=True)
    made.add_argument("--budgets", nargs="+", type=int, default=BUDGETS, help="seconds of training")
    made.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=tuple(METHODS))
    made.add_argument("--seed", type=int, default=42)
    made.add_argument("--log_folder", type=Path, default=Path("logs/peers"))
    options = made.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    configure(torch.device("cpu"))
    here = machine("cpu")
    bf16 = here["precision"] == "bf16"
    images = [load_images(options.dataset, options.data_dir, train) for train in (True, False)]
    path = options.out / "peers.json"
    results = files.read_json(path) or {"rows": [], "step_seconds": {}, "machine": here}
    new = not_timed(options.methods, results["step_seconds"])
    refused = refusal(options, results, here, new)
    if refused:
        made.error(f"{path} {refused}")
    results["step_seconds"] |= time_steps(new, images[0], bf16)
    if "kmeans" not in results:
        results["kmeans"] = kmeans_row(*images, N_CENTROIDS, FIT.n_epochs, options.seed)
    if "untrained" not in results:
        results["untrained"] = untrained_entry(options, images, bf16)
    files.write_json(path, results)
    done = {(row["method"], row["budget"], row["seed"]) for row in results["rows"]}
    for budget in sorted(options.budgets):
        for name in options.methods:
            if (name, budget, options.seed) not in done:
                results["rows"].append(budget_row(options, name, budget, results, images, bf16))
                files.write_json(path, results)
                print(results["rows"][-1], flush=True)


if __name__ == "__main__":
    main()
