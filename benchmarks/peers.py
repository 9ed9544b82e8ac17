"""Accuracy against seconds of training: this program beside SimCLR, VICReg, Barlow Twins, BYOL and supervised training.

    pip install lightly                                                    # the peers' losses and heads
    python -m benchmarks.peers --dataset folder --data_dir DIR             # budgets of 1, 3, 10 and 30 minutes; resumes
    python -m benchmarks.peers --dataset folder --data_dir DIR --budgets 60 --methods preset simclr
    python -m benchmarks.peers_results                                     # draws pictures/peers.png

All methods train the same network, resnet18-tiny, with 16 pixels on the same images. The first start measures the time of a
step of each method; a budget is then a number of steps, so that the accuracy does not depend on what else the machine does.
A method that has several learning rates tries each of them at budgets up to TRIED seconds and takes the one with the best
linear probe on training images that the probe does not see; longer budgets take the rate of the longest tried one. Images are
encoded in the two ways of VIEWS, and the better one is taken in the same manner. Each training run is kept in --log_folder and
each result is a row of benchmarks/results/peers.json; what is there is not run again.
"""

import copy
import math
import statistics
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import roi_align

import main as program
from backbones import build_backbone, stages_of
from benchmarks.common import machine, parser
from data import load_images
from encode import Output, encode
from evaluate import Fit, knn, linear_probe
from infra import files
from infra.console import progress_bar
from infra.device import configure, generator
from model import Encoder, fold_batch_norm
from optimizers import build_optimizer
from patches import HUE, Augment, Views, augment, augmentation_plan, by_turn, sample_params, to_signed
from train import build_step

ARCH, DIM, SIZE, PARTS = "resnet18-tiny", 128, 16, 4
BUDGETS = (60, 180, 600, 1800)  # seconds
TRIED = 180  # seconds; up to this budget all rates of a method are tried
RATES = (0.02, 0.06, 0.2)  # of SGD; lightly's CIFAR-10 benchmark has .06 for batches of 128
N_FIT, N_SCORED = 4000, 2000  # training images that choose the rate and the views
FIT = Fit(n_epochs=10, standardize=True)


class Method(NamedTuple):
    title: str
    build: object  # (rate, bf16) -> (backbone, optimizer, step); step(images, labels, rng) trains on a batch
    rates: tuple = RATES
    bs: int = 128


@torch.autocast("cpu", enabled=False)
def random_views(images, rng, n=2, scale=(0.08, 1.0), augmentation=Augment(blur=0, solarise=0)):  # noqa: B008, does not change
    """Return n random views of each image: uint8 (B, 3, H, W) -> float32 (n, B, 3, SIZE, SIZE) in [-1, 1].

    A view is a crop with an area of a uniform fraction `scale` and a ratio of 3/4 to 4/3, resized and flipped, with the jitter of
    hue at half of this program's range. Source: lightly's SimCLRTransform with its CIFAR-10 benchmark's cj_strength of .5 and
    no blur.
    """
    B, _, H, W = images.shape
    params = sample_params(n * B, H, W, rng, augmentation)
    area, ratio, down, right = torch.rand(4, n * B, generator=rng)
    area, ratio = H * W * (scale[0] + (scale[1] - scale[0]) * area), ((2 * ratio - 1) * math.log(4 / 3)).exp()
    h, w = (area / ratio).sqrt().clamp(max=H), (area * ratio).sqrt().clamp(max=W)
    top, left = down * (H - h), right * (W - w)
    which = torch.arange(B).repeat(n).float()
    params |= {"box": torch.stack([which, left, top, left + w, top + h], 1), "hue": params["hue"] / 2}
    params, order, ends = by_turn(params)
    x = roi_align(images.float() / 255, params["box"], SIZE, sampling_ratio=2, aligned=True)
    x = torch.where(params["flip"][:, None, None, None], x.flip(-1), x)
    x = augment(x, augmentation_plan(params, ends[HUE]), ends)
    return to_signed(x[order.argsort()]).unflatten(0, (n, B))  # (n B, 3, SIZE, SIZE) -> (n, B, 3, SIZE, SIZE)


def simclr(backbone):
    from lightly.loss import NTXentLoss
    from lightly.models.modules.heads import SimCLRProjectionHead

    return two_views(backbone, SimCLRProjectionHead(DIM, 512, 128), NTXentLoss())


def vicreg(backbone):
    from lightly.loss import VICRegLoss
    from lightly.models.modules.heads import VICRegProjectionHead

    return two_views(backbone, VICRegProjectionHead(DIM, 2048, 2048), VICRegLoss())


def barlow(backbone):
    from lightly.loss import BarlowTwinsLoss
    from lightly.models.modules.heads import BarlowTwinsProjectionHead

    return two_views(backbone, BarlowTwinsProjectionHead(DIM, 2048, 2048), BarlowTwinsLoss())


def two_views(backbone, head, criterion):
    """Return (head, forward, criterion): forward(images, labels, rng) computes z of two views, criterion the loss of them."""

    def forward(images, labels, rng):
        return [head(backbone(view)) for view in random_views(images, rng)]

    return head, forward, criterion


def byol(backbone):
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules.heads import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import update_momentum

    cosine = NegativeCosineSimilarity()
    online, predict = nn.Sequential(backbone, BYOLProjectionHead(DIM, 1024, 256)), BYOLPredictionHead(256, 1024, 256)
    target = copy.deepcopy(online).requires_grad_(False)

    def forward(images, labels, rng):
        update_momentum(online, target, m=0.99)  # that of lightly's CIFAR-10 benchmark
        views = random_views(images, rng)
        return [*(predict(online(view)) for view in views), *(target(view) for view in views)]

    return nn.Sequential(online[1], predict), forward, lambda p0, p1, z0, z1: (cosine(p0, z1) + cosine(p1, z0)) / 2


def supervised(backbone):
    """The labels themselves: cross-entropy of one view, a crop and a flip."""
    head = nn.Linear(DIM, 10)

    def forward(images, labels, rng):
        (view,) = random_views(images, rng, 1, (0.25, 1.0), Augment(jitter=0, grey=0, blur=0, solarise=0))
        return head(backbone(view)), labels

    return head, forward, lambda logits, labels: F.cross_entropy(logits.float(), labels)


def by_sgd(parts_of, rate, bf16):
    """Return (backbone, optimizer, step) of a method whose parts_of(backbone) returns (head, forward, criterion).

    Momentum and weight decay are those of lightly's CIFAR-10 benchmark.
    """
    backbone = build_backbone(ARCH)[0]
    head, forward, criterion = parts_of(backbone)
    network = nn.ModuleList([backbone, head]).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), rate, momentum=0.9, weight_decay=5e-4)

    def step(images, labels, rng):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            outputs = forward(images, labels, rng)
        loss = criterion(*(x.float() if x.is_floating_point() else x for x in outputs))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return backbone, optimizer, step


def ours(options, rate, bf16):
    """Return (backbone, optimizer, step) of this program, by --preset laptop and the options."""
    hp = program.hyperparameters(program.parse(["train", "--preset", "laptop", "--lr", str(rate), *options.split()]))
    encoder = Encoder(hp.arch, hp.h_dim, hp.z_dim).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(hp, encoder, bf16)
    step = build_step(hp, encoder, optimizer, bf16)
    return encoder.backbone, optimizer, lambda images, labels, rng: step(images, rng)


METHODS = {
    "preset": Method("EMP-SSL, --preset laptop", partial(ours, ""), (0.05,), 50),
    "lars": Method("EMP-SSL, LARS", partial(ours, "--optimizer lars"), (0.3,), 50),
    "simclr": Method("SimCLR", partial(by_sgd, simclr)),
    "vicreg": Method("VICReg", partial(by_sgd, vicreg)),
    "barlow": Method("Barlow Twins", partial(by_sgd, barlow)),
    "byol": Method("BYOL", partial(by_sgd, byol)),
    "supervised": Method("supervised", partial(by_sgd, supervised)),
}


def train(method, rate, seed, images, n_steps, bf16):
    """Return the backbone after n_steps, with a cosine from the rate to 0, and the median seconds of a step."""
    torch.manual_seed(seed)
    backbone, optimizer, step = method.build(rate, bf16)
    per_epoch, seconds = len(images.images) // method.bs, []
    for i in progress_bar(range(n_steps), f"{method.title}, rate {rate:g}"):
        epoch, place = divmod(i, per_epoch)
        if place == 0:
            order = torch.randperm(len(images.images), generator=generator(seed, "order", epoch))
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 + math.cos(math.pi * i / n_steps)) / 2
        start = time.monotonic()
        rows = order[place * method.bs : (place + 1) * method.bs]
        step(images.images[rows], images.labels[rows], generator(seed, "patches", epoch, place))
        seconds.append(time.monotonic() - start)
    return backbone, statistics.median(seconds)


def by_grid(backbone, images, bf16):
    """Return what --preset laptop computes: all stages of 16 crops on a grid, side by side. (N, 16 stage_dim)."""
    encoder = Encoder(ARCH, 8, 8)  # its head is not used
    encoder.backbone = backbone
    output = Output("stages", PARTS, bf16=bf16)
    return encode(encoder, images, Views(PARTS**2, "grid", SIZE), partial(generator, 0, "grid"), 50, output)["embeddings"]


@torch.inference_mode()
def by_whole_image(backbone, images, bf16, bs=200):
    """Return all stages of the whole image in its own size, averaged in 4 x 4 parts, side by side. (N, 16 stage_dim)."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    backbone, rows = fold_batch_norm(backbone).to(dtype, memory_format=torch.channels_last), []
    for batch in images.split(bs):
        x = to_signed(batch.float() / 255).to(dtype, memory_format=torch.channels_last)
        x, parts = backbone.maxpool(backbone.relu(backbone.bn1(backbone.conv1(x)))), []
        for stage in stages_of(backbone).values():
            x = stage(x)
            parts.append(F.adaptive_avg_pool2d(x.float(), PARTS).flatten(1))
        rows.append(torch.cat(parts, 1))
    return torch.cat(rows)


VIEWS = {"grid": by_grid, "whole": by_whole_image}


def score(backbone, images, order, seed, bf16):
    """Return {name in VIEWS: top-1 of a linear probe} on training images: fitted to N_FIT of the order, scored on N_SCORED."""
    chosen, found = order[: N_FIT + N_SCORED], {}
    y, y_test = images.labels[chosen].split([N_FIT, N_SCORED])
    for name, encode_by in VIEWS.items():
        x, x_test = encode_by(backbone, images.images[chosen], bf16).split([N_FIT, N_SCORED])
        found[name] = linear_probe(x, y, x_test, y_test, 10, FIT._replace(seed=seed, bf16=bf16))[0]["top1"]
    return found


def tried(options, name, budget, rate, data, n_steps, bf16):
    """Train, or read the run if it is in the log folder. Return {"scores", "backbone": its state dict}."""
    path = options.log_folder / f"{name}-{budget}-{rate:g}-{options.seed}.pt"
    if not path.exists():
        train_images, order = data
        backbone, _ = train(METHODS[name], rate, options.seed, train_images, n_steps, bf16)
        scores = score(backbone, train_images, order, options.seed, bf16)
        path.parent.mkdir(parents=True, exist_ok=True)
        files.save(path, {"scores": scores, "backbone": backbone.state_dict()})
    return files.load(path)


def measure(options, name, budget, results, images, bf16):
    """Return the row of a method at a budget: the rate and the views chosen, accuracies, steps."""
    method, (train_images, test_images) = METHODS[name], images
    n_steps = round(budget / results["step_seconds"][name])
    order = torch.randperm(len(train_images.images), generator=generator(options.seed, "scored"))
    rates = method.rates
    if budget > TRIED:
        known = [row for row in results["rows"] if row["method"] == name and row["budget"] <= TRIED]
        rates = (max(known, key=lambda row: row["budget"])["lr"],) if known else rates
    runs = {rate: tried(options, name, budget, rate, (train_images, order), n_steps, bf16) for rate in rates}
    rate = max(runs, key=lambda rate: max(runs[rate]["scores"].values()))
    scores = runs[rate]["scores"]
    views = max(scores, key=scores.get)
    backbone = build_backbone(ARCH)[0]
    backbone.load_state_dict(runs[rate]["backbone"])
    x, x_test = (VIEWS[views](backbone, part.images, bf16) for part in images)
    fit = FIT._replace(seed=options.seed, bf16=bf16)
    result = linear_probe(x, train_images.labels, x_test, test_images.labels, 10, fit)[0]
    nearest = knn(x, train_images.labels, x_test, test_images.labels, 10)
    return {"method": name, "budget": budget, "seed": options.seed, "n_steps": n_steps, "bs": method.bs, "lr": rate,
            "views": views, "top1": result["top1"], "train_top1": result["train_top1"], "knn_top1": nearest,
            "scores": {f"{rate:g}": run["scores"] for rate, run in runs.items()}, "machine": machine("cpu")}  # fmt: skip


def step_seconds(names, images, bf16, n_steps=15):
    """Return {name: median seconds of a training step} of some of METHODS."""
    return {name: train(METHODS[name], METHODS[name].rates[0], 0, images, n_steps, bf16)[1] for name in names}


def main(argv=None):
    made = parser(__doc__)
    made.add_argument("--dataset", default="folder")
    made.add_argument("--data_dir", required=True)
    made.add_argument("--budgets", nargs="+", type=int, default=BUDGETS, help="seconds of training")
    made.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=tuple(METHODS))
    made.add_argument("--seed", type=int, default=42)
    made.add_argument("--log_folder", type=Path, default=Path("logs/peers"))
    options = made.parse_args(argv)
    configure(torch.device("cpu"))
    bf16 = machine("cpu")["precision"] == "bf16"
    images = [load_images(options.dataset, options.data_dir, split) for split in (True, False)]
    path = options.out / "peers.json"
    results = files.read_json(path) or {"rows": [], "step_seconds": {}, "machine": machine("cpu")}
    new = [name for name in options.methods if name not in results["step_seconds"]]
    results["step_seconds"] |= step_seconds(new, images[0], bf16)
    files.write_json(path, results)
    for budget in sorted(options.budgets):
        for name in options.methods:
            done = {(row["method"], row["budget"], row["seed"]) for row in results["rows"]}
            if (name, budget, options.seed) not in done:
                results["rows"].append(measure(options, name, budget, results, images, bf16))
                files.write_json(path, results)
                print({key: value for key, value in results["rows"][-1].items() if key != "machine"}, flush=True)


if __name__ == "__main__":
    main()
