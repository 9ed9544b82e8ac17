"""Accuracy against seconds of training: this program, SimCLR, VICReg, Barlow Twins, BYOL, labels.

    pip install lightly                                         # the peers' losses and heads
    python -m benchmarks.peers --dataset folder --data_dir DIR  # 1, 3, 10 and 30 minutes; resumes
    python -m benchmarks.peers --dataset folder --data_dir DIR --budgets 60 --methods preset simclr

All methods train the network of --preset laptop, with the pixels of its patches, on the same
images. The first start measures the time of a step of each method, k-means features, and the
untrained network. A budget is then a number of steps, so that the accuracy does not depend on what
else the machine does, and rows can be added on another machine of the same precision. A method
tries several learning rates and settings of its own at budgets up to TRIED seconds, and keeps what
has the best linear probe on N_SCORED training images that neither the method nor the probe is
trained with. The method search, which is run only when named, tries what the preset was chosen
from. Longer budgets and further seeds use the choice at TRIED; the first of LARGER seconds or more
also tries twice as many images in a batch. All methods are encoded as by the preset, in that of the
method's sizes which has the best score. with_kmeans_top1 is the probe of these features beside
those of k-means. Each training run is kept in --log_folder and each result is a row of
benchmarks/results/peers.json. What is there is not run again: after a change of peers_methods.py,
remove the method's runs and rows.
"""

import statistics
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch

from benchmarks.common import machine, parser, this_commit
from benchmarks.kmeans import kmeans_row
from benchmarks.peers_methods import (
    ARCH,
    METHODS,
    PIXELS,
    PRESET_TRY,
    Try,
    arch_of,
    bs_of,
    label,
    settings_of,
    with_larger_batch,
)
from data import load_images, select
from encode import Output, encode
from evaluate import Fit, knn, linear_probe
from infra import files
from infra.console import progress_bar
from infra.device import configure, generator
from model import Encoder, build_backbone
from optimizers import learning_rate, set_learning_rate

COMPARED_METHODS = tuple(name for name in METHODS if name != "search")
BUDGETS = (60, 180, 600, 1800)  # seconds
TRIED = 60  # seconds; up to this budget a method tries everything
LARGER = 180  # seconds; the first budget of so many also tries twice as many images in a batch
N_CENTROIDS = 400  # of k-means
N_FIT, N_SCORED = 10_000, 5000  # training images that choose among the tries
FIT = Fit(n_epochs=10, standardize=True)


def train_method(method, how, seed, images, n_steps, bf16):
    """Return the backbone after n_steps by a Try, with a cosine from its rate to 0."""
    torch.manual_seed(seed)
    backbone, optimizer, step = method.build(how, bf16)
    hp = Namespace(lr=how.rate, schedule="cosine")
    bs = bs_of(method, how)
    per_epoch = len(images.images) // bs
    title = f"{method.title}, {label(how)}"
    for i in progress_bar(range(n_steps), title):
        epoch, batch = divmod(i, per_epoch)
        if batch == 0:
            order = torch.randperm(len(images.images), generator=generator(seed, "order", epoch))
        set_learning_rate(optimizer, learning_rate(hp, i / n_steps))
        rows = order[batch * bs : (batch + 1) * bs]
        rng = generator(seed, "patches", epoch, batch)
        step(images.images[rows], images.labels[rows], rng)
    return backbone


def embed(backbone, images, bf16, size=PIXELS, mirror=True):
    """Return the representations of images as the preset encodes them, float32 (N, D).

    size: pixels of a patch, and half of those of an image. mirror: with the mirror image.
    """
    encoder = Encoder(ARCH, h_dim=1, z_dim=1)  # whose heads are not used
    encoder.backbone = backbone
    hp = settings_of(PRESET_TRY)
    views = hp.test_views._replace(size=size, mirror=mirror)
    output = Output(hp.emb_pool, hp.pool_grid, bf16=bf16)
    rng = partial(generator, 0, "peers")
    return encode(encoder, images, views, rng, output=output)["embeddings"]


def score(backbone, fitted, scored, seed, bf16, size):
    """Return the top-1 of a linear probe on the scored images, without their mirror images."""
    tensors = []
    for images in (fitted, scored):
        tensors += [embed(backbone, images.images, bf16, size, mirror=False), images.labels]
    return linear_probe(*tensors, 10, FIT._replace(seed=seed, bf16=bf16))[0]["top1"]


def accuracies_of(backbone, images, test_images, seed, bf16, size=PIXELS, kmeans=None):
    """Return the accuracies of a linear probe and of 20-NN on labelled images, by `embed`.

    kmeans: features of the training and of the test images, for a second probe with them beside.
    """
    x, x_test = (embed(backbone, part.images, bf16, size) for part in (images, test_images))
    y, y_test = images.labels, test_images.labels
    fit = FIT._replace(seed=seed, bf16=bf16)
    result, _ = linear_probe(x, y, x_test, y_test, 10, fit)
    accuracies = {name: result[name] for name in ("top1", "train_top1")}
    accuracies["knn_top1"] = knn(x, y, x_test, y_test, 10, bf16=bf16)
    if kmeans:
        x = torch.cat([x, kmeans[0].float()], 1)
        x_test = torch.cat([x_test, kmeans[1].float()], 1)
        accuracies["with_kmeans_top1"] = linear_probe(x, y, x_test, y_test, 10, fit)[0]["top1"]
    return accuracies


def scored_split(images, seed):
    """Return (N_SCORED images, N_FIT others, all but the scored ones)."""
    order = torch.randperm(len(images.images), generator=generator(seed, "scored"))
    rows = order[:N_SCORED], order[N_SCORED : N_SCORED + N_FIT], order[N_SCORED:]
    return tuple(select(images, part) for part in rows)


def run_try(options, name, how, images, n_steps, bf16):
    """Train, or read the run if it is in the log folder.

    Returns score (top-1 on the scored images), size, backbone, commit.
    """
    run_name = f"{name}, {label(how)}, {n_steps} steps, seed {options.seed}.pt"
    path = options.log_folder / run_name
    if not path.exists():
        method = METHODS[name]
        scored, fitted, rest = scored_split(images, options.seed)
        backbone = train_method(method, how, options.seed, rest, n_steps, bf16)
        scores = {
            size: score(backbone, fitted, scored, options.seed, bf16, size) for size in method.sizes
        }
        size = max(scores, key=scores.get)
        run = {"score": scores[size], "size": size, "backbone": backbone.state_dict()}
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_pt(path, {**run, "commit": this_commit()})
    return files.read_pt(path)


def tries_of(name, budget, rows):
    """Return what a method tries at a budget, given the rows that are there.

    Up to TRIED all its tries, then what was chosen; with another seed the choice of the first.
    """
    chosen = {
        row["budget"]: Try(row["optimizer"], row["lr"], row["settings"])
        for row in rows
        if row["method"] == name
    }
    if budget in chosen:
        return (chosen[budget],)
    if budget <= TRIED:
        return METHODS[name].tries
    longest = max(seconds for seconds in chosen if seconds < budget)
    how = chosen[longest]
    return (how, with_larger_batch(name, how)) if longest < LARGER <= budget else (how,)


def untrained_entry(options, images, bf16):
    """Return the accuracies of the network with random weights, and its score, as of run_try."""
    torch.manual_seed(options.seed)
    backbone = build_backbone(ARCH)[0]
    scored, fitted, _ = scored_split(images[0], options.seed)
    accuracies = accuracies_of(backbone, *images, options.seed, bf16)
    best = score(backbone, fitted, scored, options.seed, bf16, PIXELS)
    return {**accuracies, "score": best, "commit": this_commit()}


def kmeans_features(options, images, results):
    """Return float16 features of the training and test images, and add their row to results.

    They are kept in the log folder.
    """
    path = options.log_folder / f"kmeans, {len(images[0].images)} images, seed {options.seed}.pt"
    if "kmeans" not in results or not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        row, features = kmeans_row(*images, N_CENTROIDS, FIT.n_epochs, options.seed)
        results.setdefault("kmeans", row)
        files.write_pt(path, {"features": [x.half() for x in features]})
    return files.read_pt(path)["features"]


def budget_row(options, name, budget, results, images, kmeans, bf16):
    """Return the row of a method at a budget: what was chosen, accuracies, steps."""
    runs = {}
    for how in tries_of(name, budget, results["rows"]):
        n_steps = round(budget / results["step_seconds"][timed_as(name, how)]["seconds"])
        run = run_try(options, name, how, images[0], n_steps, bf16)
        runs[how] = {"n_steps": n_steps, **run}
    how = max(runs, key=lambda how: runs[how]["score"])
    run = runs[how]
    backbone = build_backbone(arch_of(METHODS[name], how))[0]
    backbone.load_state_dict(run["backbone"])
    return {
        "method": name,
        "budget": budget,
        "seed": options.seed,
        "n_probe": len(images[0].images),
        "n_steps": run["n_steps"],
        "bs": bs_of(METHODS[name], how),
        "optimizer": how.optimizer,
        "lr": how.rate,
        "settings": how.settings,
        "size": run["size"],
        **accuracies_of(backbone, *images, options.seed, bf16, run["size"], kmeans),
        "scores": {label(how): run["score"] for how, run in runs.items()},
        "commit": run["commit"],
    }


def time_steps(tries, images, bf16, n_rounds=9):
    """Return {timed_as: entry with the median seconds of a step} of (method, Try) pairs.

    The steps take turns.
    """
    steps = {pair: METHODS[pair[0]].build(pair[1], bf16)[2] for pair in tries}
    seconds = {pair: [] for pair in steps}
    for i in range(n_rounds):
        for (name, how), step in steps.items():
            bs = bs_of(METHODS[name], how)
            start = time.monotonic()
            step(images.images[:bs], images.labels[:bs], generator(0, "patches", i))
            seconds[name, how].append(time.monotonic() - start)
    return {
        timed_as(*pair): {"seconds": statistics.median(times[2:]), "commit": this_commit()}
        for pair, times in seconds.items()
    }


def timed_as(name, how):
    """Return what the time of a step depends on: the method, the optimizer, its settings."""
    return " ".join([name, how.optimizer, how.settings]).strip()


def not_timed(names, timed):
    """Return a (method, Try) for each step of these methods that is not in `timed`."""
    missing = {}
    for name in names:
        tries = METHODS[name].tries
        for how in (*tries, *(with_larger_batch(name, how) for how in tries)):
            if timed_as(name, how) not in timed:
                missing[timed_as(name, how)] = (name, how)
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
        return f"has times of another machine, and none of {timed_as(*new[0])}"
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
    made.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=COMPARED_METHODS)
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
    kmeans = kmeans_features(options, images, results)
    if "untrained" not in results:
        results["untrained"] = untrained_entry(options, images, bf16)
    files.write_json(path, results)
    done = {(row["method"], row["budget"], row["seed"]) for row in results["rows"]}
    for budget in sorted(options.budgets):
        for name in options.methods:
            if (name, budget, options.seed) not in done:
                row = budget_row(options, name, budget, results, images, kmeans, bf16)
                results["rows"].append(row)
                files.write_json(path, results)
                print(results["rows"][-1], flush=True)


if __name__ == "__main__":
    main()
