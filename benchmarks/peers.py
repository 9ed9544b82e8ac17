"""Accuracy against seconds of training: this program beside SimCLR, VICReg, Barlow Twins, BYOL and supervised training.

    pip install lightly                                                    # the peers' losses and heads
    python -m benchmarks.peers --dataset folder --data_dir DIR             # budgets of 1, 3, 10 and 30 minutes; resumes
    python -m benchmarks.peers --dataset folder --data_dir DIR --budgets 60 --methods preset simclr
    python -m benchmarks.peers_results                                     # draws pictures/peers.png

All methods train the same network, resnet18-tiny, with 16 pixels on the same images. The first start measures the time of a
step of each method, k-means features, and the untrained network. A budget is then a number of steps, so that the accuracy does
not depend on what else the machine does, and rows can be added on another machine of the same precision. A method tries several
optimizers, learning rates and settings of its own at budgets up to TRIED seconds, and takes what has the best linear probe on
N_SCORED training images that neither the method nor the probe is trained with. Longer budgets and further seeds take its choice
at TRIED. All methods are encoded alike: all stages of the whole image in 4 x 4 places, in that of the method's sizes which has
the best score. Each training run is kept in --log_folder and each result is a row of benchmarks/results/peers.json. What is
there is not run again: after a change of methods.py, remove the method's runs and rows.
"""

import statistics
import time
from argparse import Namespace
from pathlib import Path

import torch
import torch.nn.functional as F

from model import build_backbone, stage_means
from benchmarks import kmeans
from benchmarks.common import commit, machine, parser
from benchmarks.methods import ARCH, METHODS, Try, label
from data import load_images, subset_at
from evaluate import Fit, knn, linear_probe
from infra import files
from infra.console import progress_bar
from infra.device import configure, generator
from model import fold_batch_norm
from optimizers import learning_rate
from patches import to_signed

PARTS = 4
BUDGETS = (60, 180, 600, 1800)  # seconds
TRIED = 60  # seconds; up to this budget everything in a method's `tries` is tried
KMEANS = 400  # centroids
N_FIT, N_SCORED = 3000, 2000  # training images that choose what to take of the tries
FIT = Fit(n_epochs=10, standardize=True)


def train(method, how, seed, images, n_steps, bf16):
    """Return the backbone after n_steps by a Try, with a cosine from its rate to 0."""
    torch.manual_seed(seed)
    backbone, optimizer, step = method.build(how, bf16)
    hp = Namespace(lr=how.rate, schedule="cosine")
    per_epoch = len(images.images) // method.bs
    for i in progress_bar(range(n_steps), f"{method.title}, {how.optimizer} {how.rate:g}"):
        epoch, place = divmod(i, per_epoch)
        if place == 0:
            order = torch.randperm(len(images.images), generator=generator(seed, "order", epoch))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(hp, i / n_steps)
        rows = order[place * method.bs : (place + 1) * method.bs]
        step(images.images[rows], images.labels[rows], generator(seed, "patches", epoch, place))
    return backbone


@torch.inference_mode()
def embed(backbone, images, bf16, size=None, bs=200):
    """Return all stages of the images in size x size pixels, or their own, in PARTS x PARTS places: (N, PARTS² stage_dim)."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    backbone = fold_batch_norm(backbone).to(dtype, memory_format=torch.channels_last)
    stages = []
    for batch in images.split(bs):
        x = batch.float() / 255
        if size not in (None, x.shape[-1]):
            x = F.interpolate(x, size=size, mode="bilinear", antialias=True)
        stages.append(stage_means(backbone, to_signed(x).to(dtype, memory_format=torch.channels_last), PARTS).float())
    return torch.cat(stages)


def evaluate(backbone, images, test_images, seed, bf16, size=None):
    """Return the accuracies of a linear probe and of 20-NN that know these labelled images, encoded as by `embed`."""
    x, x_test = (embed(backbone, part.images, bf16, size) for part in (images, test_images))
    y, y_test = images.labels, test_images.labels
    result = linear_probe(x, y, x_test, y_test, 10, FIT._replace(seed=seed, bf16=bf16))[0]
    return {"top1": result["top1"], "train_top1": result["train_top1"], "knn_top1": knn(x, y, x_test, y_test, 10)}


def tried(options, name, how, images, n_steps, bf16):
    """Train, or read the run if it is in the log folder. Return score (top-1 on the scored images), size, backbone, commit."""
    path = options.log_folder / f"{name}, {label(name, how)}, {n_steps} steps, seed {options.seed}.pt"
    if not path.exists():
        scored, fitted, rest = split(images, options.seed)
        backbone = train(METHODS[name], how, options.seed, rest, n_steps, bf16)
        scores = {size: evaluate(backbone, fitted, scored, options.seed, bf16, size)["top1"] for size in METHODS[name].sizes}
        size = max(scores, key=scores.get)
        path.parent.mkdir(parents=True, exist_ok=True)
        files.save(path, {"score": scores[size], "size": size, "backbone": backbone.state_dict(), "commit": commit()})
    return files.load(path)


def split(images, seed):
    """Return (N_SCORED images, N_FIT others, all but the scored ones)."""
    order = torch.randperm(len(images.images), generator=generator(seed, "scored"))
    rows = order[:N_SCORED], order[N_SCORED : N_SCORED + N_FIT], order[N_SCORED:]
    return tuple(subset_at(images, part) for part in rows)


def tries(name, budget, rows):
    """Return what a method tries at a budget: up to TRIED all its tries; above, or with another seed, what these have chosen."""
    for row in rows:
        if (row["method"], row["budget"]) == (name, min(budget, TRIED)):
            return (Try(row["optimizer"], row["lr"], row["setting"]),)
    return METHODS[name].tries


def known_to_probe(images, options):
    """Return the training images whose labels the probe knows."""
    return subset_at(images, torch.randperm(len(images.images), generator=generator(options.seed, "known"))[: options.n_probe])


def untrained(options, images, bf16):
    """Return the accuracies of the network with random weights, and its score, as of `tried`."""
    torch.manual_seed(options.seed)
    backbone = build_backbone(ARCH)[0]
    scored, fitted, _ = split(images[0], options.seed)
    return {**evaluate(backbone, known_to_probe(images[0], options), images[1], options.seed, bf16),
            "score": evaluate(backbone, fitted, scored, options.seed, bf16)["top1"]}  # fmt: skip


def measure(options, name, budget, results, images, bf16):
    """Return the row of a method at a budget: what was chosen, accuracies, steps."""
    train_images, test_images = images
    runs = {}
    for how in tries(name, budget, results["rows"]):
        n_steps = round(budget / results["step_seconds"][f"{name} {how.optimizer}"])
        runs[how] = {"n_steps": n_steps, **tried(options, name, how, train_images, n_steps, bf16)}
    how = max(runs, key=lambda how: runs[how]["score"])
    backbone = build_backbone(ARCH)[0]
    backbone.load_state_dict(runs[how]["backbone"])
    known = known_to_probe(train_images, options)
    return {"method": name, "budget": budget, "seed": options.seed, "n_probe": len(known.images), "n_steps": runs[how]["n_steps"],
            "bs": METHODS[name].bs, "optimizer": how.optimizer, "lr": how.rate, "setting": how.setting, "size": runs[how]["size"],
            **evaluate(backbone, known, test_images, options.seed, bf16, runs[how]["size"]),
            "scores": {label(name, how): run["score"] for how, run in runs.items()},
            "commit": runs[how]["commit"]}  # fmt: skip


def step_seconds(new, images, bf16, n_rounds=9):
    """Return {"method optimizer": median seconds of a training step} of some (method, Try), measured in turns."""
    steps = {(name, how.optimizer): METHODS[name].build(how, bf16)[2] for name, how in new}
    seconds = {key: [] for key in steps}
    for i in range(n_rounds):
        for (name, optimizer), step in steps.items():
            bs = METHODS[name].bs
            start = time.monotonic()
            step(images.images[:bs], images.labels[:bs], generator(0, "patches", i))
            seconds[name, optimizer].append(time.monotonic() - start)
    return {f"{name} {optimizer}": statistics.median(times[2:]) for (name, optimizer), times in seconds.items()}


def not_timed(names, known):
    """Return a (method, Try) for each optimizer that these methods try and whose step `known` does not have."""
    tries = [(name, how) for name in names for how in {how.optimizer: how for how in METHODS[name].tries}.values()]
    return [(name, how) for name, how in tries if f"{name} {how.optimizer}" not in known]


def kmeans_row(options, images):
    """Return the row of k-means features, which know the labels of as many images and have the same epochs of the probe."""
    given = Namespace(seed=options.seed, n_images=options.n_probe, n_centroids=KMEANS, n_eval_epochs=FIT.n_epochs)
    return kmeans.run(given, *images)


def refusal(options, results, here, new):
    """Return why these results cannot take the rows that options ask for, or None. `new` is what `not_timed` returns."""
    rows, was = results["rows"], results["machine"]
    not_chosen = sorted({*options.methods} - {row["method"] for row in rows if row["budget"] == TRIED})
    if was["precision"] != here["precision"]:
        return f"is in {was['precision']}, not in {here['precision']}: give another --out"
    if new and was != here:
        return f"has times of another machine, and none of {new[0][0]} with {new[0][1].optimizer}: give another --out"
    if any(row["n_probe"] != options.n_probe for row in rows):
        return f"has rows with --n_probe {rows[0]['n_probe']}: give that, or another --out"
    if max(options.budgets) > TRIED and TRIED not in options.budgets and not_chosen:
        return f"has no choice of {not_chosen[0]}: give --budgets {TRIED}, too"
    return None


def main(argv=None):
    made = parser(__doc__)
    made.add_argument("--dataset", default="folder")
    made.add_argument("--data_dir", required=True)
    made.add_argument("--budgets", nargs="+", type=int, default=BUDGETS, help="seconds of training")
    made.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=tuple(METHODS))
    made.add_argument("--seed", type=int, default=42)
    made.add_argument("--n_probe", type=int, help="training images whose labels the probe knows; all of them by default")
    made.add_argument("--log_folder", type=Path, default=Path("logs/peers"))
    options = made.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    configure(torch.device("cpu"))
    here = machine("cpu")
    bf16 = here["precision"] == "bf16"
    images = [load_images(options.dataset, options.data_dir, train) for train in (True, False)]
    options.n_probe = min(options.n_probe or len(images[0].images), len(images[0].images))
    path = options.out / "peers.json"
    results = files.read_json(path) or {"rows": [], "step_seconds": {}, "machine": here}
    new = not_timed(options.methods, results["step_seconds"])
    refused = refusal(options, results, here, new)
    if refused:
        made.error(f"{path} {refused}")
    results["step_seconds"] |= step_seconds(new, images[0], bf16)
    if "kmeans" not in results:
        results["kmeans"] = kmeans_row(options, images)
    if "untrained" not in results:
        results["untrained"] = untrained(options, images, bf16)
    files.write_json(path, results)
    done = {(row["method"], row["budget"], row["seed"]) for row in results["rows"]}
    for budget in sorted(options.budgets):
        for name in options.methods:
            if (name, budget, options.seed) not in done:
                results["rows"].append(measure(options, name, budget, results, images, bf16))
                files.write_json(path, results)
                print(results["rows"][-1], flush=True)


if __name__ == "__main__":
    main()
