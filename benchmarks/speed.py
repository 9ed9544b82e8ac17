"""Speed of each part of the program, beside the baseline and beside the floor.

    python -m benchmarks.speed                      # every part: half an hour on two cores
    python -m benchmarks.speed --only tcr choices   # choices: what each choice of a step gives

Each measurement is a process of its own, the baseline's and ours in turns. The floor is the time of
the operations, or of the bytes, that a part can't do without, at the rates of a large matrix
product and of a large copy, the best of seven each. It writes speed-DEVICE.json and
choices-DEVICE.json. Then: python -m benchmarks.tables
"""

import argparse
import copy
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import encode as encode_module
from benchmarks import baseline
from benchmarks.common import child, machine, parser, this_commit
from encode import Output, encode
from evaluate import Fit, linear_probe
from hparams import Hparams
from infra import files
from infra.device import configure, generator, peak_memory, pick_precision
from lars import LARS
from loss import invariance_loss, tcr_loss, vonmises_loss
from model import Conv3x3, Encoder
from optimizers import build_optimizer
from patches import Views, sample_patches
from train import build_step

N_TRAIN, N_TEST, H_DIM, N_CLASSES = 50000, 10000, 4096, 10  # of the probe
PROBE_EPOCHS = 5  # measured, of 100
LOSSES = {  # ours, the baseline's
    "tcr": (tcr_loss, baseline.tcr_loss),
    "vonmises": (vonmises_loss, baseline.vonmises_loss),
    "invariance": (invariance_loss, baseline.invariance_loss),
}


class Side:
    """One side, "ours" or "baseline", of a comparison on a device: P patches of B images."""

    def __init__(self, device, side="ours", configured=True, P=20, B=100):
        self.device = torch.device(device)
        self.ours = side == "ours"
        self.P, self.B = P, B
        self.bf16 = pick_precision("auto", self.device) == "bf16"
        torch.manual_seed(0)
        if self.ours and configured:
            configure(self.device)

    def images(self, n):
        return torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8).to(self.device)

    def batches(self, n):
        """Return an iterator over n batches of patches of the baseline."""
        images = self.images(n * self.B).cpu()
        return iter(baseline.loader(images, self.P, self.B, train=True))

    def encoder(self, arch):
        if not self.ours:
            return baseline.Encoder(arch).to(self.device)
        return Encoder(arch).to(self.device, memory_format=torch.channels_last)

    def optimizer(self, params):
        lars = LARS if self.ours else baseline.LARS
        return lars(params, 0.3, weight_decay=1e-4, nesterov=True, eta=0.005, clip=True)

    def flops(self, arch, backward):
        """Return the operations of a patch: forward and backward, or the forward of encoding."""
        encoder, x = self.encoder(arch), torch.randn(8, 3, 32, 32, device=self.device)
        with FlopCounterMode(display=False) as counter:
            if backward:
                encoder(x)[1].sum().backward()
            else:
                encoder.features(encoder.backbone(x))
        return counter.get_total_flops() / len(x)


class Part(NamedTuple):
    """What is timed. needs: {rate: operations or bytes that a unit can't do without}."""

    title: str
    needs: dict
    call: Callable
    units: float = 1  # of work in a call


def sampling(s):
    title = f"patch sampling, {s.P} patches x {s.B} images"
    needs = {"copy": s.P * s.B * 3 * (16 * 16 + 4 * 32 * 32)}
    if s.ours:
        images = s.images(s.B)
        return Part(title, needs, lambda: sample_patches(images, s.P, generator(0, "speed")))
    batches = s.batches(300)
    # as many batches are ready after a call as before
    return Part(title, needs, lambda: [next(batches).to(s.device) for _ in range(8)], units=8)


def loss_of_z(s, name):
    shape = (s.P, s.B, 1024)
    size = math.prod(shape)
    needs = {"float32": 2 * 2 * size * s.B} if name == "tcr" else {"copy": 2 * 4 * size}
    z = F.normalize(torch.randn(shape, device=s.device), dim=-1).requires_grad_()
    ours, plain = LOSSES[name]
    function = ours if s.ours else plain
    title = f"{name} forward + backward, {shape}"
    return Part(title, needs, lambda: torch.autograd.grad(function(z), z))


def lars_step(s):
    params = list(s.encoder("resnet18-cifar").parameters())
    optimizer = s.optimizer(params)
    for p in params:
        p.grad = torch.randn_like(p)
    needs = {"copy": 7 * 4 * sum(p.numel() for p in params)}
    return Part("LARS step, 34 million weights", needs, optimizer.step)


def training(s, arch):
    title = f"train step, {arch}, {s.P} x {s.B} patches"
    needs = {"network": s.P * s.B * s.flops(arch, backward=True)}
    encoder = s.encoder(arch).train()
    optimizer = s.optimizer(encoder.parameters())
    if s.ours:
        images = s.images(s.B)
        step = build_step(Hparams(n_patches=s.P), encoder, optimizer, s.bf16)
        return Part(title, needs, lambda: step(images, generator(0, "speed")))
    batches = s.batches(60)

    def baseline_step():
        baseline.train_step(encoder, optimizer, next(batches).to(s.device))

    return Part(title, needs, baseline_step)


def encoding(s, arch):
    title = f"encoding, {arch}, {s.P} patches, per image"
    needs = {"network": s.P * s.flops(arch, backward=False)}
    encoder = s.encoder(arch)
    images = s.images(2 * s.B)
    if s.ours:
        rng, output = partial(generator, 0, "encode"), Output(bf16=s.bf16)
        call = partial(encode, encoder, images, Views(s.P), rng, s.B, output)
    else:
        call = partial(baseline.encode, encoder, images.cpu(), s.P, s.B)
    return Part(title, needs, call, units=len(images))


def probe_fit(s, workers):
    how = f"with the authors' {workers} workers" if workers else "without workers"
    title = f"linear probe, 100 epochs, {N_TRAIN:,} x {H_DIM}, {N_CLASSES} classes; baseline {how}"
    passes = 100 * N_TRAIN * H_DIM  # of a feature through the probe
    needs = {"network": 2 * 2 * N_CLASSES * passes, "copy": (2 if s.bf16 else 4) * passes}
    tensors = []
    for n in (N_TRAIN, N_TEST):
        tensors += [torch.randn(n, H_DIM).relu(), torch.randint(N_CLASSES, (n,))]
    if s.ours:
        tensors = [tensor.to(s.device) for tensor in tensors]
        fit = Fit(0.0075, PROBE_EPOCHS, bf16=s.bf16)
        call = partial(linear_probe, *tensors, N_CLASSES, fit)
    else:
        arguments = (*tensors, N_CLASSES, s.device, PROBE_EPOCHS)
        call = partial(baseline.linear_probe, *arguments, num_workers=workers)
    return Part(title, needs, call, units=PROBE_EPOCHS / 100)


PARTS = {  # functions Side -> Part
    "sampling": sampling,
    "tcr": partial(loss_of_z, name="tcr"),
    "vonmises": partial(loss_of_z, name="vonmises"),
    "invariance": partial(loss_of_z, name="invariance"),
    "lars": lars_step,
    "step resnet18-cifar": partial(training, arch="resnet18-cifar"),
    "step resnet18-imagenet": partial(training, arch="resnet18-imagenet"),
    "encode resnet18-cifar": partial(encoding, arch="resnet18-cifar"),
    "encode resnet18-imagenet": partial(encoding, arch="resnet18-imagenet"),
    "probe": partial(probe_fit, workers=2),
    "probe plain": partial(probe_fit, workers=0),
}
CHOICES = {  # title: what a train step and encoding do otherwise
    "as it is": (),
    "fp32": ("fp32",),
    "fp32, not channels last": ("fp32", "channels first"),
    "not channels last": ("channels first",),
    "torch's convolutions on 2x2 pixels too": ("torch's convolutions",),
    "batch norm not folded in encoding": ("not folded",),
    "freed memory returned": ("not configured",),
    "one thread": ("one thread",),
    "with --compile": ("compile",),
}


def seconds_of(function, device):
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def milliseconds(call, device):
    """Return the median and the range of five blocks of calls, a tenth of a second each."""
    seconds = [seconds_of(call, device) for _ in range(3)]  # to warm up
    n = max(1, int(0.1 / seconds[-1]))
    ms = [1e3 * seconds_of(lambda: [call() for _ in range(n)], device) / n for _ in range(5)]
    return {"ms": statistics.median(ms), "least": min(ms), "greatest": max(ms)}


def time_part(device, name, side):
    """Return the median seconds of a unit of a part, the peak memory in GB, title and needs."""
    s = Side(device, side)
    part = PARTS[name](s)
    seconds_of(part.call, s.device)  # to warm up
    times = []
    while not times or (len(times) < 20 and sum(times) < 10):
        times.append(seconds_of(part.call, s.device))
    seconds = statistics.median(times) / part.units
    memory = peak_memory(s.device) / 1e9
    return {"seconds": seconds, "memory": memory, "title": part.title, "needs": part.needs}


def time_choice(device, name):
    """Return seconds of resnet18-imagenet with a choice.

    Of the first step, the median of the next ten, and of encoding. It changes this process (its
    threads, Conv3x3, fold_batch_norm): call it in a process of its own.
    """
    otherwise = CHOICES[name]
    hp = Hparams(n_patches=8)
    s = Side(device, configured="not configured" not in otherwise)
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # else only the first process compiles
    if "one thread" in otherwise:
        torch.set_num_threads(1)
    if "torch's convolutions" in otherwise:
        Conv3x3.forward = torch.nn.Conv2d.forward
    layout = torch.contiguous_format if "channels first" in otherwise else torch.channels_last
    encoder = Encoder("resnet18-imagenet").to(s.device, memory_format=layout).train()
    compiled = torch.compile(encoder) if "compile" in otherwise else encoder
    bf16 = s.bf16 and "fp32" not in otherwise
    images = s.images(s.B)
    if "not folded" in otherwise:
        encode_module.fold_batch_norm = lambda network: copy.deepcopy(network).eval()
    step = build_step(hp, compiled, build_optimizer(hp, encoder), bf16)
    rng, output = partial(generator, 0, "speed"), Output(bf16=bf16)
    encode_batch = partial(encode, encoder, images, Views(8, "grid"), rng, s.B, output)
    steps = [seconds_of(lambda: step(images, rng()), s.device) for _ in range(11)]
    encodings = [seconds_of(encode_batch, s.device) for _ in range(11)]
    return {
        "first": steps[0],
        "seconds": statistics.median(steps[1:]),
        "encoding": statistics.median(encodings[1:]),
    }


def peak_rates(device, n=None):
    """Return the operations a second of n x n matrix products and the bytes a second of a copy."""
    s = Side(device)
    n = n or (4096 if s.device.type == "cpu" else 8192)
    a = torch.randn(n, n, device=s.device)
    dtypes = {"network": torch.bfloat16 if s.bf16 else torch.float32, "float32": torch.float32}
    rates = {}
    for name, dtype in dtypes.items():
        product = partial(torch.matmul, a.to(dtype), a.to(dtype))
        rates[name] = 2 * n**3 / min(seconds_of(product, s.device) for _ in range(7))
    source = torch.randn(2**26, device=s.device)
    copy = partial(torch.empty_like(source).copy_, source)
    rates["copy"] = 2 * source.nbytes / min(seconds_of(copy, s.device) for _ in range(7))
    return rates


CHILDREN = {"part": time_part, "choice": time_choice, "rates": peak_rates}


def in_process(device, *words):
    """Return the result of one of CHILDREN, with these arguments, in a process of its own."""
    return child("benchmarks.speed", "--device", device, "--child", *words)


@cache
def rates_of(device):
    return {**in_process(device, "rates"), "commit": this_commit()}


def in_turns(options, commands):
    """Return {name: what its words measured in each turn} of {name: words of in_process}."""
    samples = {name: [] for name in commands}
    for _ in range(options.turns):
        for name, words in commands.items():
            samples[name].append(in_process(options.device, *words))
            print(f"{' '.join(words)}: {samples[name][-1]['seconds']:.4g} s", flush=True)
    return samples


def by_key(runs, *keys):
    """Return {key: its value in each run}."""
    return {key: [run[key] for run in runs] for key in keys}


def compare_part(options, results, name):
    sides = in_turns(options, {side: ("part", name, side) for side in ("baseline", "ours")})
    part = sides["ours"][0]
    rates = rates_of(options.device)
    floor = max(amount / rates[rate] for rate, amount in part["needs"].items())
    seconds = {side: by_key(runs, "seconds", "memory") for side, runs in sides.items()}
    entry = {"title": part["title"], **seconds, "floor": floor, "commit": this_commit()}
    results["rates"] = rates
    results.setdefault("parts", {})[name] = entry


def compare_choices(options, results):
    samples = in_turns(options, {name: ("choice", name) for name in CHOICES})
    choices = {name: by_key(runs, "first", "seconds", "encoding") for name, runs in samples.items()}
    results |= {"choices": choices, "commit": this_commit()}


COMPARISONS = {  # name: (file of results, function); {} is the device
    **{name: ("speed-{}", partial(compare_part, name=name)) for name in PARTS},
    "choices": ("choices-{}", compare_choices),
}


def main(argv=None):
    made = parser(__doc__)
    made.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    names = ", ".join(COMPARISONS)
    made.add_argument("--only", nargs="+", choices=tuple(COMPARISONS), metavar="NAME", help=names)
    made.add_argument("--turns", type=int, default=3, help="processes of each side (default: 3)")
    made.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = made.parse_args(argv)
    if options.child:
        name, *words = options.child
        print(json.dumps(CHILDREN[name](options.device, *words)))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    here = machine(options.device)
    for name in options.only or PARTS:
        file, compare = COMPARISONS[name]
        path = options.out / f"{file.format(options.device)}.json"
        results = files.read_json(path)
        if results.setdefault("machine", here) != here:
            made.error(f"{path} holds results of another machine: give another --out")
        compare(options, results)
        files.write_json(path, results)


if __name__ == "__main__":
    main()
