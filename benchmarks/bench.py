"""Speed of each part beside benchmarks/baseline.py and beside the floor: writes benchmarks/results/speed-DEVICE.json.

    python benchmarks/bench.py                              # every part but the whole run: about half an hour on two cores
    python benchmarks/bench.py --only tcr lars
    python benchmarks/bench.py --only run --data_dir .data/cifar10      # CIFAR-10 as JPEG files in train/<class>, test/<class>
    python benchmarks/bench.py --only choices               # what each choice of the train step gives

Each measurement is a process of its own, baseline and ours in turns. The floor is the larger of two times: the operations
at the measured rate of a large matrix product in the precision of the network (of float32 for the losses), and
the bytes at the measured rate of a large copy, the best of seven each. Then: python benchmarks/readme.py
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import baseline  # noqa: E402
from accuracy import LIKE_BASELINE, child, machine  # noqa: E402

import data  # noqa: E402
import evaluate  # noqa: E402
import experiment  # noqa: E402
import loss  # noqa: E402
import main  # noqa: E402
from lars import LARS  # noqa: E402
from model import Encoder  # noqa: E402

P, B, D = 20, 100, 1024  # patches, images, z_dim
BYTES = 4  # of a float32
RUNS = {  # the whole run on each kind of device
    "cpu": {"arch": "resnet18-imagenet", "n_patches": 8, "n_epochs": 2, "n_images": 10000},
    "cuda": {"arch": "resnet18-cifar", "n_patches": 20, "n_epochs": 2, "n_images": 50000},
}


class Setting:
    """What a measurement is made with: the device, and which side it is of."""

    def __init__(self, device, side):
        self.device, self.ours = torch.device(device), side == "ours"
        self.bf16 = main.pick_precision("auto", self.device) == "bf16"
        torch.manual_seed(0)
        torch.backends.cudnn.benchmark = self.ours
        if self.ours and device == "cpu":
            main.keep_freed_memory()

    def images(self, n):
        return torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8).to(self.device)

    def encoder(self, arch):
        if not self.ours:
            return baseline.Encoder(arch).to(self.device)
        return Encoder(arch).to(self.device, memory_format=torch.channels_last)

    def optimizer(self, params):
        return (LARS if self.ours else baseline.LARS)(params, 0.3, weight_decay=1e-4, nesterov=True, eta=0.005, clip=True)


# Each part: Setting -> (function to time, how many units one call of it does).


def sampling(s):
    if s.ours:
        images = s.images(B)
        return lambda: data.sample_patches(images, P, data.generator(0, "bench")), 1
    batches = iter(baseline.loader(s.images(300 * B).cpu(), P, B, train=True))
    return lambda: [next(batches).to(s.device) for _ in range(8)], 8  # as many are ready before as after


def loss_part(name):
    def part(s):
        z = F.normalize(torch.randn(P, B, D, device=s.device), dim=-1).requires_grad_()
        function = getattr(loss if s.ours else baseline, f"{name}_loss")
        return lambda: torch.autograd.grad(function(z), z), 1

    return part


def lars(s):
    params = list(s.encoder("resnet18-cifar").parameters())
    optimizer = s.optimizer(params)
    for p in params:
        p.grad = torch.randn_like(p)
    return optimizer.step, 1


def train_step(arch):
    def part(s):
        encoder = s.encoder(arch).train()
        optimizer = s.optimizer(encoder.parameters())
        if not s.ours:
            batches = iter(baseline.loader(s.images(60 * B).cpu(), P, B, train=True))
            return lambda: baseline.train_step(encoder, optimizer, next(batches).to(s.device)), 1
        hp = main.hyperparameters(main.parse(["train", "--n_patches", str(P)]))
        images = s.images(B)
        return lambda: main.train_step(hp, encoder, optimizer, images, data.generator(0, "bench"), s.bf16), 1

    return part


def encoding(arch):
    def part(s):
        encoder, images = s.encoder(arch), s.images(2 * B)
        if s.ours:
            return lambda: evaluate.encode(encoder, images, P, bs=B, bf16=s.bf16), 2 * B
        return lambda: baseline.encode(encoder, images.cpu(), P, B), 2 * B

    return part


def probe(workers):
    def part(s):
        n_epochs, n_classes = 5, 10
        x, x_test = (torch.randn(n, 4096).relu() for n in (50000, 10000))
        y, y_test = (torch.randint(n_classes, (len(rows),)) for rows in (x, x_test))
        if s.ours:
            tensors = [tensor.to(s.device) for tensor in (x, y, x_test, y_test)]
            return lambda: evaluate.linear_probe(*tensors, n_classes, 0.0075, n_epochs, bf16=s.bf16), n_epochs / 100
        return lambda: baseline.linear_probe(x, y, x_test, y_test, n_classes, s.device, n_epochs, workers=workers), n_epochs / 100

    return part


# What a train step is without one of our choices, or with one that we did not make.
CHOICES = {
    "as it is": {},
    "fp32": {"bf16": False},
    "fp32, not channels last": {"bf16": False, "channels_last": False},
    "not channels last": {"channels_last": False},
    "torch's convolutions on 2x2 pixels too": {"few_pixels": False},
    "freed memory returned": {"keep_memory": False},
    "one thread": {"threads": 1},
    "with --compile": {"compile": True},
}


def choice(name, device):
    """In a process of its own: prints the seconds of the first step and the median of the next ten, resnet18-imagenet."""
    wanted = {"bf16": True, "channels_last": True, "few_pixels": True, "keep_memory": True, "threads": None, "compile": False}
    wanted |= CHOICES[name]
    s = Setting(device, "ours" if wanted["keep_memory"] else "baseline")
    torch.backends.cudnn.benchmark = True
    if wanted["threads"]:
        torch.set_num_threads(wanted["threads"])
    network = (Encoder if wanted["few_pixels"] else baseline.Encoder)("resnet18-imagenet")
    layout = torch.channels_last if wanted["channels_last"] else torch.contiguous_format
    encoder = network.to(s.device, memory_format=layout).train()
    hp = main.hyperparameters(main.parse(["train", "--n_patches", "8"]))
    optimizer, images = main.build_optimizer(hp, encoder), s.images(B)
    compiled = torch.compile(encoder) if wanted["compile"] else encoder

    def step():
        main.train_step(hp, compiled, optimizer, images, data.generator(0, "bench"), s.bf16 and wanted["bf16"])

    times = [seconds(step, s.device) for _ in range(11)]
    print(json.dumps({"first": times[0], "seconds": statistics.median(times[1:])}))


def flops(s, arch, training):
    """Floating-point operations of one patch: forward and backward, or the part of forward that encoding needs."""
    encoder, x = s.encoder(arch), torch.randn(8, 3, 32, 32, device=s.device)
    with FlopCounterMode(display=False) as counter:
        if training:
            encoder(x)[1].sum().backward()
        else:
            encoder.features(encoder.backbone(x))
    return counter.get_total_flops() / len(x)


# name -> (title, part, floor: (Setting, network rate, float32 rate, bytes a second) -> seconds)
PARTS = {
    "sampling": (f"patch sampling, {P} patches x {B} images", sampling,
                 lambda s, net, fp32, bw: P * B * 3 * (16 * 16 + 32 * 32 * BYTES) / bw),
    "tcr": (f"tcr forward + backward, ({P}, {B}, {D})", loss_part("tcr"),
            lambda s, net, fp32, bw: 2 * 2 * P * B * B * D / fp32),
    "vonmises": (f"vonmises forward + backward, ({P}, {B}, {D})", loss_part("vonmises"),
                 lambda s, net, fp32, bw: 2 * P * B * D * BYTES / bw),
    "invariance": (f"invariance forward + backward, ({P}, {B}, {D})", loss_part("invariance"),
                   lambda s, net, fp32, bw: 2 * P * B * D * BYTES / bw),
    "lars": ("LARS step, 34 million weights", lars,
             lambda s, net, fp32, bw: 7 * BYTES * sum(p.numel() for p in s.encoder("resnet18-cifar").parameters()) / bw),
    **{f"step {arch}": (f"train step, {arch}, {P} x {B} patches", train_step(arch),
                        lambda s, net, fp32, bw, arch=arch: P * B * flops(s, arch, True) / net)
       for arch in ("resnet18-cifar", "resnet18-imagenet")},
    **{f"encode {arch}": (f"encoding, {arch}, {P} patches, per image", encoding(arch),
                          lambda s, net, fp32, bw, arch=arch: P * flops(s, arch, False) / net)
       for arch in ("resnet18-cifar", "resnet18-imagenet")},
    **{name: (f"linear probe, 100 epochs, 50,000 x 4096, 10 classes; {title}", probe(workers),
              lambda s, net, fp32, bw: 100 * 50000 * 4096 * max(2 * 2 * 10 / net, BYTES / (1 + s.bf16) / bw))
       for name, workers, title in (("probe", 2, "baseline with the authors' two workers"),
                                    ("probe plain", 0, "baseline without workers"))},
}  # fmt: skip


MORE = ("choices", "run")  # only when asked for


def seconds(function, device):
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(name, device, side):
    """In a process of its own: prints the median seconds per unit, and the peak memory in GB."""
    s = Setting(device, side)
    function, units = PARTS[name][1](s)
    seconds(function, s.device)  # to warm up
    times = []
    while not times or (len(times) < 20 and sum(times) < 10):
        times.append(seconds(function, s.device))
    print(json.dumps({"seconds": statistics.median(times) / units, "memory": main.peak_memory(s.device) / 1e9}))


def rates(device):
    """Prints operations a second of a large matrix product (network's precision, float32), bytes a second of a copy."""
    s = Setting(device, "ours")
    n = 4096 if s.device.type == "cpu" else 8192
    a, big = torch.randn(n, n, device=s.device), torch.randn(2**26, device=s.device)
    products = []
    for dtype in (torch.bfloat16 if s.bf16 else torch.float32, torch.float32):
        b = a.to(dtype)
        products.append(2 * n**3 / min(seconds(lambda b=b: b @ b, s.device) for _ in range(7)))
    out = torch.empty_like(big)
    copied = 2 * big.nbytes / min(seconds(lambda: out.copy_(big), s.device) for _ in range(7))
    print(json.dumps({"network": products[0], "float32": products[1], "copy": copied}))


def one_part(name, device, turns):
    samples = {"baseline": [], "ours": []}
    for _ in range(turns):
        for side, results in samples.items():
            results.append(child(__file__, "--child", name, side, "--device", device))
            print(f"{name}: {side} {results[-1]['seconds']:.4g} s, {results[-1]['memory']:.1f} GB", flush=True)
    return {side: {key: [run[key] for run in runs] for key in ("seconds", "memory")} for side, runs in samples.items()}


def whole_run(device, data_dir, seeds):
    """From process start to the report, twice for ours: before and after the decoded images were kept."""
    options = [text for name, value in {"data_dir": data_dir, **RUNS[device]}.items() for text in (f"--{name}", str(value))]
    result = {"options": RUNS[device], "baseline": [], "ours": [], "ours, images cached": []}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in seeds:
            os.environ["XDG_CACHE_HOME"] = str(Path(scratch, f"cache{seed}"))
            for side in ("baseline", "ours", "ours, images cached"):
                start = time.monotonic()
                if side == "baseline":
                    top1 = child(ROOT / "benchmarks" / "baseline.py", *options, "--seed", seed)["top1"]
                else:
                    logs = Path(scratch, f"{side} {seed}")
                    command = [sys.executable, "main.py", "train", *LIKE_BASELINE.split(), *options, "--seed", seed, "--device",
                               device, "--log_folder", logs]  # fmt: skip
                    subprocess.run(map(str, command), check=True, capture_output=True, cwd=ROOT)
                    (exp_dir,) = logs.iterdir()
                    top1 = experiment.read_json(exp_dir / "linear_accuracy.json")["top1"]
                result[side].append({"seed": seed, "top1": top1, "seconds": round(time.monotonic() - start, 1)})
                print(f"{side}: {result[side][-1]}", flush=True)
    return result


def run(options):
    path = ROOT / "benchmarks" / "results" / f"speed-{options.device}.json"
    results = experiment.read_json(path) or {"parts": {}}
    results["machine"] = machine(options.device)
    results["rates"] = child(__file__, "--child", "rates", "ours", "--device", options.device)
    s = Setting(options.device, "ours")
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    for name in options.only or PARTS:
        if name == "choices":
            turns = [{c: child(__file__, "--child", "choice", c, "--device", options.device) for c in CHOICES}
                     for _ in range(options.turns)]  # fmt: skip
            results["choices"] = {c: {key: [turn[c][key] for turn in turns] for key in ("first", "seconds")} for c in CHOICES}
            results["choices"]["commit"] = commit
        elif name == "run":
            results["run"] = {**whole_run(options.device, options.data_dir, range(42, 42 + options.seeds)), "commit": commit}
        else:
            title = PARTS[name][0]
            part = one_part(name, options.device, options.turns)
            results["parts"][name] = {"title": title, **part, "commit": commit}
        for part, content in results["parts"].items():
            content["floor"] = PARTS[part][2](s, *results["rates"].values())
        path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", nargs="+", choices=(*PARTS, *MORE), metavar="PART", help=", ".join((*PARTS, *MORE)))
    parser.add_argument("--turns", type=int, default=3, help="processes of each side (default: 3)")
    parser.add_argument("--seeds", type=int, default=1, help="whole runs of each side (default: 1)")
    parser.add_argument("--data_dir", default="./datasets", help="JPEG files for the whole run")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is none here")
    if options.child:
        name, side = options.child
        if name == "rates":
            rates(options.device)
        elif name == "choice":
            choice(side, options.device)
        else:
            measure(name, options.device, side)
    else:
        run(options)
