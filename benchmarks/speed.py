"""Speed of each part of the program, beside the baseline and beside the floor.

    python -m benchmarks.speed                              # every part: about half an hour on two cores
    python -m benchmarks.speed --only tcr choices           # choices: what each choice of the train step gives
    python -m benchmarks.speed --only run --data_dir DIR    # the whole run, on files in train/<class> and test/<class>

Each measurement is a process of its own, the baseline's and ours in turns. The floor is the time of the operations, or of the
bytes, that a part can't do without, at the rates of a large matrix product and of a large copy, the best of seven each. It
writes speed-DEVICE.json, choices-DEVICE.json, cost.json, large.json, ranks.json. Then: python -m benchmarks.readme
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import loss
from benchmarks import baseline, ranks, storage
from benchmarks.common import BASELINE_LIKE, ROOT, child, commit, machine, measured, parser
from encode import Output, encode
from evaluate import Fit, linear_probe
from experiment import Run
from hparams import Hparams
from infra import files
from infra.device import configure, generator, peak_memory, pick_precision
from lars import LARS
from model import Encoder
from patches import Views, sample_patches
from train import build_optimizer, build_step

P, B, D = 20, 100, 1024  # patches, images, z_dim
N_TRAIN, H_DIM, N_CLASSES = 50000, 4096, 10  # of the probe
ARCHS = ("resnet18-cifar", "resnet18-imagenet")
RUNS = {  # the whole run on each kind of device
    "cpu": {"arch": "resnet18-imagenet", "n_patches": 8, "n_epochs": 2, "n_images": 10000},
    "cuda": {"arch": "resnet18-cifar", "n_patches": 20, "n_epochs": 2, "n_images": 50000},
}


class Side:
    """One side of a comparison, "ours" or "baseline", on a device."""

    def __init__(self, device, side="ours", configured=True):
        self.device, self.ours = torch.device(device), side == "ours"
        self.bf16 = pick_precision("auto", self.device) == "bf16"
        torch.manual_seed(0)
        if self.ours and configured:
            configure(self.device)

    def images(self, n):
        return torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8).to(self.device)

    def encoder(self, arch):
        if not self.ours:
            return baseline.Encoder(arch).to(self.device)
        return Encoder(arch).to(self.device, memory_format=torch.channels_last)

    def optimizer(self, params):
        return (LARS if self.ours else baseline.LARS)(params, 0.3, weight_decay=1e-4, nesterov=True, eta=0.005, clip=True)


def sampling(s):
    if s.ours:
        images = s.images(B)
        return lambda: sample_patches(images, P, generator(0, "speed")), 1
    batches = iter(baseline.loader(s.images(300 * B).cpu(), P, B, train=True))
    return lambda: [next(batches).to(s.device) for _ in range(8)], 8  # as many are ready before as after


def loss_of_z(s, name):
    z = F.normalize(torch.randn(P, B, D, device=s.device), dim=-1).requires_grad_()
    function = getattr(loss if s.ours else baseline, f"{name}_loss")
    return lambda: torch.autograd.grad(function(z), z), 1


def lars(s):
    params = list(s.encoder("resnet18-cifar").parameters())
    optimizer = s.optimizer(params)
    for p in params:
        p.grad = torch.randn_like(p)
    return optimizer.step, 1


def training(s, arch):
    encoder = s.encoder(arch).train()
    optimizer = s.optimizer(encoder.parameters())
    if s.ours:
        images, step = s.images(B), build_step(Hparams(n_patches=P), encoder, optimizer, s.bf16)
        return lambda: step(images, generator(0, "speed")), 1
    batches = iter(baseline.loader(s.images(60 * B).cpu(), P, B, train=True))
    return lambda: baseline.train_step(encoder, optimizer, next(batches).to(s.device)), 1


def encoding(s, arch):
    encoder, images = s.encoder(arch), s.images(2 * B)
    if s.ours:
        rng, output = partial(generator, 0, "encode"), Output(bf16=s.bf16)
        return lambda: encode(encoder, images, Views(P), rng, B, output), 2 * B
    return lambda: baseline.encode(encoder, images.cpu(), P, B), 2 * B


def probe(s, workers):
    n_epochs = 5
    x, x_test = (torch.randn(n, H_DIM).relu() for n in (N_TRAIN, 10000))
    y, y_test = (torch.randint(N_CLASSES, (len(rows),)) for rows in (x, x_test))
    if s.ours:
        tensors, fit = [tensor.to(s.device) for tensor in (x, y, x_test, y_test)], Fit(0.0075, n_epochs, bf16=s.bf16)
        return lambda: linear_probe(*tensors, N_CLASSES, fit), n_epochs / 100
    fit = partial(baseline.linear_probe, x, y, x_test, y_test, N_CLASSES, s.device, n_epochs, num_workers=workers)
    return fit, n_epochs / 100


def flops(s, arch, backward):
    """Return the floating-point operations of one patch: forward and backward, or the part of forward that encoding needs."""
    encoder, x = s.encoder(arch), torch.randn(8, 3, 32, 32, device=s.device)
    with FlopCounterMode(display=False) as counter:
        if backward:
            encoder(x)[1].sum().backward()
        else:
            encoder.features(encoder.backbone(x))
    return counter.get_total_flops() / len(x)


class Part(NamedTuple):
    title: str
    prepare: Callable
    needs: Callable  # Side -> {rate: how many operations or bytes a unit can't do without}


Z = f"forward + backward, {(P, B, D)}"
PROBE = "linear probe, 100 epochs, 50,000 x 4096, 10 classes; baseline"
PASSES = 100 * N_TRAIN * H_DIM  # of a feature through the probe
read_and_write_z = lambda s: {"copy": 2 * 4 * P * B * D}
probe_needs = lambda s: {"network": 2 * 2 * N_CLASSES * PASSES, "copy": (2 if s.bf16 else 4) * PASSES}
PARTS = {
    "sampling": Part(f"patch sampling, {P} patches x {B} images", sampling,
                     lambda s: {"copy": P * B * 3 * (16 * 16 + 4 * 32 * 32)}),
    "tcr": Part(f"tcr {Z}", partial(loss_of_z, name="tcr"), lambda s: {"float32": 2 * 2 * P * B * B * D}),
    "vonmises": Part(f"vonmises {Z}", partial(loss_of_z, name="vonmises"), read_and_write_z),
    "invariance": Part(f"invariance {Z}", partial(loss_of_z, name="invariance"), read_and_write_z),
    "lars": Part("LARS step, 34 million weights", lars,
                 lambda s: {"copy": 7 * 4 * sum(p.numel() for p in s.encoder("resnet18-cifar").parameters())}),
    **{f"step {arch}": Part(f"train step, {arch}, {P} x {B} patches", partial(training, arch=arch),
                            lambda s, arch=arch: {"network": P * B * flops(s, arch, backward=True)}) for arch in ARCHS},
    **{f"encode {arch}": Part(f"encoding, {arch}, {P} patches, per image", partial(encoding, arch=arch),
                              lambda s, arch=arch: {"network": P * flops(s, arch, backward=False)}) for arch in ARCHS},
    "probe": Part(f"{PROBE} with the authors' two workers", partial(probe, workers=2), probe_needs),
    "probe plain": Part(f"{PROBE} without workers", partial(probe, workers=0), probe_needs),
}  # fmt: skip
CHOICES = {  # title: what a train step and encoding do otherwise
    "as it is": (),
    "fp32": ("fp32",),
    "fp32, not channels last": ("fp32", "channels first"),
    "not channels last": ("channels first",),
    "torch's convolutions on 2x2 pixels too": ("torch's convolutions",),
    "freed memory returned": ("not configured",),
    "one thread": ("one thread",),
    "with --compile": ("compile",),
}


def seconds(function, device):
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def time_part(device, name, side):
    """Return the median seconds of a unit of a part, and the peak memory in GB."""
    s = Side(device, side)
    function, units = PARTS[name].prepare(s)
    seconds(function, s.device)  # to warm up
    times = []
    while not times or (len(times) < 20 and sum(times) < 10):
        times.append(seconds(function, s.device))
    return {"seconds": statistics.median(times) / units, "memory": peak_memory(s.device) / 1e9}


def time_choice(device, name):
    """Return seconds of resnet18-imagenet with a choice: of the first step, the median of the next ten, of encoding."""
    otherwise, hp = CHOICES[name], Hparams(n_patches=8)
    s = Side(device, configured="not configured" not in otherwise)
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # else only the first process compiles
    if "one thread" in otherwise:
        torch.set_num_threads(1)
    network = (baseline.Encoder if "torch's convolutions" in otherwise else Encoder)("resnet18-imagenet")
    layout = torch.contiguous_format if "channels first" in otherwise else torch.channels_last
    encoder, images = network.to(s.device, memory_format=layout).train(), s.images(B)
    compiled = torch.compile(encoder) if "compile" in otherwise else encoder
    bf16 = s.bf16 and "fp32" not in otherwise
    step = build_step(hp, compiled, build_optimizer(hp, encoder), bf16)
    times = [seconds(lambda: step(images, generator(0, "speed")), s.device) for _ in range(11)]
    rng, output = partial(generator, 0, "speed"), Output(bf16=bf16)
    encoding = [seconds(lambda: encode(encoder, images, Views(8, "grid"), rng, B, output), s.device) for _ in range(11)]
    return {"first": times[0], "seconds": statistics.median(times[1:]), "encoding": statistics.median(encoding[1:])}


def rates(device):
    """Return the operations a second of a matrix product, in the network's precision and in float32, and bytes of a copy."""
    s = Side(device)
    n = 4096 if s.device.type == "cpu" else 8192
    a, big = torch.randn(n, n, device=s.device), torch.randn(2**26, device=s.device)
    found = {}
    for name, dtype in (("network", torch.bfloat16 if s.bf16 else torch.float32), ("float32", torch.float32)):
        b = a.to(dtype)
        found[name] = 2 * n**3 / min(seconds(lambda b=b: b @ b, s.device) for _ in range(7))
    out = torch.empty_like(big)
    return {**found, "copy": 2 * big.nbytes / min(seconds(lambda: out.copy_(big), s.device) for _ in range(7))}


CHILDREN = {"part": time_part, "choice": time_choice, "rates": rates, "cost": storage.cost, "decoding": storage.decoding,
            "reading": storage.reading}  # fmt: skip


def in_turns(options, commands):
    """Return {name: {key: list of what its command measured in each turn}}."""
    samples = {name: [] for name in commands}
    for _ in range(options.turns):
        for name, words in commands.items():
            samples[name].append(measured(options.device, *words))
            print(f"{' '.join(words)}: {samples[name][-1]['seconds']:.4g} s", flush=True)
    return {name: {key: [run[key] for run in runs] for key in runs[0]} for name, runs in samples.items()}


@cache
def rates_of(device):
    return measured(device, "rates")


def compare_part(options, results, name):
    part, sides = PARTS[name], in_turns(options, {side: ("part", name, side) for side in ("baseline", "ours")})
    results["rates"] = rates_of(options.device)
    floor = max(amount / results["rates"][rate] for rate, amount in part.needs(Side(options.device)).items())
    results.setdefault("parts", {})[name] = {"title": part.title, **sides, "floor": floor, "commit": commit()}


def compare_choices(options, results):
    results |= {"choices": in_turns(options, {name: ("choice", name) for name in CHOICES}), "commit": commit()}


def compare_runs(options, results):
    """Whole runs, from process start to the report. Ours runs twice: before and after the decoded images were kept."""
    settings = RUNS[options.device]
    runs = {"baseline": [], "ours": [], "ours, images cached": []}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(42, 42 + options.seeds):
            os.environ["XDG_CACHE_HOME"] = str(Path(scratch, f"cache-{seed}"))
            words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
            words += ["--dataset", "folder", "--data_dir", options.data_dir, "--seed", str(seed)]
            for side in runs:
                start = time.monotonic()
                if side == "baseline":
                    top1 = child("benchmarks.baseline", *words)["top1"]
                else:
                    top1 = our_run([*words, "--device", options.device], Path(scratch, f"{side} {seed}"))
                runs[side].append({"seed": seed, "top1": top1, "seconds": round(time.monotonic() - start, 1)})
                print(f"{side}: {runs[side][-1]}", flush=True)
    results["run"] = {"options": settings, "data": "CIFAR-10", **runs, "commit": commit()}


def our_run(words, log_folder):
    """Run the program in a process of its own, evaluated as the baseline is; return its top-1."""
    command = [sys.executable, "main.py", "train", *BASELINE_LIKE.split(), *words, "--log_folder", str(log_folder)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    (exp_dir,) = log_folder.iterdir()
    return files.read_json(Run(exp_dir).result)["top1"]


# name: (file of results, function); {} is the device
COMPARISONS = {
    **{name: ("speed-{}", partial(compare_part, name=name)) for name in PARTS},
    "choices": ("choices-{}", compare_choices),
    "run": ("speed-{}", compare_runs),
    "cost": ("cost", storage.compare_cost),
    "large": ("large", storage.compare_large),
    "ranks": ("ranks", ranks.compare),
}


def main():
    made = parser(__doc__)
    made.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    made.add_argument("--only", nargs="+", choices=tuple(COMPARISONS), default=tuple(PARTS), metavar="NAME",
                      help=", ".join(COMPARISONS))  # fmt: skip
    made.add_argument("--turns", type=int, default=3, help="processes of each side (default: 3)")
    made.add_argument("--seeds", type=int, default=1, help="whole runs of each side (default: 1)")
    made.add_argument("--data_dir", default="./datasets", help="folder of images, for run")
    made.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = made.parse_args()
    if options.child:
        name, *words = options.child
        print(json.dumps(CHILDREN[name](options.device, *words)))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        file, function = COMPARISONS[name]
        path = options.out / f"{file.format(options.device)}.json"
        results, here = files.read_json(path), machine(options.device)
        if results.setdefault("machine", here) != here:
            made.error(f"{path} holds results of another machine: remove it, or write elsewhere with --out FOLDER")
        function(options, results)
        files.write_json(path, results)


if __name__ == "__main__":
    main()
