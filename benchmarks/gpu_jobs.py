"""The jobs of gpu.py: what each part measures."""

import functools
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import loss
from benchmarks.common import ROOT
from benchmarks.study import read_run
from encode import Output, encode
from evaluate import LRS, PROBE_LR, Fit, softmax_regressions
from hparams import Hparams
from infra.device import generator, peak_memory
from infra.errors import RunError
from patches import sample_patches
from textures import make_textures
from train import build_optimizer, build_step
from weights import build_encoder

SEED, N_CLASSES = 42, 10
RUNS = {"run": ("--n_patches 20", 150), "one-minute": ("--preset one-minute", 75)}  # options, expected seconds
# Relative to the norm. About ten times what float32 differs from float64 on a CPU; the gradient passes many ReLUs.
TOLERANCES = {"loss": 1e-5, "loss gradient": 1e-5, "patches": 1e-5, "losses": 1e-4, "gradient": 1e-2, "update": 1e-2,
              "weights": 1e-3, "embeddings": 1e-4, "LARS": 1e-5}  # fmt: skip
LOSSES = {name: getattr(loss, f"{name}_loss") for name in ("tcr", "vonmises", "invariance")}
MODES = {"compile": "default", "reduce-overhead": "reduce-overhead", "max-autotune": "max-autotune-no-cudagraphs"}
ON_CUDA = {"graph": 25, "compile": 60, "reduce-overhead": 60, "max-autotune": 180}  # variants of a step, expected seconds


class Sizes(NamedTuple):
    archs: tuple = ("resnet18-cifar", "resnet18-imagenet")
    n_patches: int = 20
    bs: int = 100
    h_dim: int = 4096
    z_dim: int = 1024
    input_size: int | None = None  # pixels of a patch
    equal: tuple = (8, 32)  # patches, images of the step that is compared with the CPU's
    n_encode: int = 1000
    n_probe: int = 50000
    matrix: int = 8192  # rows and columns, for the peak rate
    rounds: int = 9
    scale: float = 1  # of the expected seconds
    run: str = ""  # options that make the whole runs short


QUICK = Sizes(("resnet18-tiny",), 2, 8, 32, 16, 16, (2, 8), 20, 200, 256, 2, 0.1, "--arch resnet18-tiny --h_dim 32 --z_dim 16 "
              "--input_size 16 --n_images 100 --bs 10 --n_patches 2 --n_epochs 2 --n_eval_epochs 3 --test_patches 1")  # fmt: skip


class Task(NamedTuple):
    """What a job is given. emit: is called with the name of each measurement and a dict."""

    device: torch.device
    sizes: Sizes
    data: tuple  # options of main.py train
    limit: float = 0  # seconds until the job is stopped
    emit: Callable | None = None

    def hparams(self, arch, P=None, B=None):
        s = self.sizes
        return Hparams(arch=arch, n_patches=P or s.n_patches, bs=B or s.bs, h_dim=s.h_dim, z_dim=s.z_dim,
                       input_size=s.input_size)  # fmt: skip

    def images(self, n):
        return make_textures(max(n, 100), generator(SEED, "gpu"))[0][:n].to(self.device)


def trainable(hp, device):
    """Return a new encoder and its optimizer."""
    encoder = build_encoder(hp, None).to(device, memory_format=torch.channels_last).train()
    return encoder, build_optimizer(hp, encoder)


def equal(task):
    """Compare losses, patches, a training step, embeddings and LARS with the CPU's, in float32 without TF32."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    s, both, (P, B) = task.sizes, (task.device, torch.device("cpu")), task.sizes.equal

    def compare(name, kind, function, *arguments):
        here, there = (function(*(a.to(d) for a in arguments), d).cpu().double() for d in both)
        task.emit(name, difference(here, there, TOLERANCES[kind]))

    z, images = F.normalize(torch.randn(s.n_patches, s.bs, s.z_dim), dim=-1), task.images(s.bs)
    for name, function in LOSSES.items():
        compare(f"{name} loss", "loss", lambda z, d, f=function: f(z), z)
        compare(f"{name} loss gradient", "loss gradient", lambda z, d, f=function: gradient(f, z), z)
    for size in (32, 96):  # bilinear, bicubic
        draw = lambda x, d, size=size: sample_patches(x, s.n_patches, generator(SEED, "patches"), size)
        compare(f"patches of {size} pixels", "patches", draw, images)
    for arch in s.archs:
        hp = task.hparams(arch, P, B)
        (here, _), (there, encoder) = (one_step(hp, images[:B].to(d), d) for d in both)
        for kind in there:
            task.emit(f"{arch} step: {kind}", difference(here[kind], there[kind], TOLERANCES[kind]))
        rng = functools.partial(generator, SEED, "encode")
        represent = lambda x, d, hp=hp, e=encoder, rng=rng: encode(e.to(d), x, hp.test_views, rng, B)["embeddings"]
        compare(f"{arch} embeddings", "embeddings", represent, images[:B])
        compare(f"{arch} LARS step", "LARS", functools.partial(lars_update, hp))


def difference(here, there, tolerance):
    """Return how much a tensor differs, relative to the norm; the greatest difference, relative to the greatest value; and
    whether the first is within the tolerance."""
    gap = (here - there).abs()
    relative, greatest = (gap.norm() / there.norm()).item(), (gap.max() / there.abs().max()).item()
    return {"relative": relative, "greatest": greatest, "tolerance": tolerance, "within": relative <= tolerance}


def gradient(function, z):
    z = z.detach().requires_grad_()
    return torch.autograd.grad(function(z), z)[0]


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors]).cpu().double()


def one_step(hp, images, device):
    """Return {gradient, losses, weights, update} of a first training step, and the encoder after it."""
    encoder, optimizer = trainable(hp, device)
    found, before = {}, flat(encoder.parameters())
    # Before the optimizer's step, which changes the gradients.
    optimizer.register_step_pre_hook(lambda *_: found.update(gradient=flat(p.grad for p in encoder.parameters())))
    metrics = build_step(hp, encoder, optimizer, False)(images, generator(SEED, "patches"))
    after = flat(encoder.parameters())
    return {**found, "losses": flat(metrics[:2, None]), "weights": after, "update": after - before}, encoder


def lars_update(hp, device):
    """Return the change of the weights by two steps with random gradients."""
    (encoder, optimizer), random = trainable(hp, device), generator(SEED, "gradients")
    before = flat(encoder.parameters())
    for _ in range(2):
        for p in encoder.parameters():
            p.grad = torch.randn(p.shape, generator=random).to(device)
        optimizer.step()
    return flat(encoder.parameters()) - before


def timed(function, n, device):
    """Return the seconds of each of n calls: until they are queued, and until they are done."""
    start = time.perf_counter()
    for _ in range(n):
        function()
    queued = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (queued - start) / n, (time.perf_counter() - start) / n


def in_turns(functions, rounds, device):
    """Return {name: a dict}: milliseconds of a call, the median and range of blocks of a fifth of a second, the functions
    taking turns; and host_ms, until a call is queued. Each function has been called before."""
    blocks = {name: max(1, min(50, int(0.2 / timed(function, 1, device)[1]))) for name, function in functions.items()}
    samples = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            samples[name].append([1e3 * seconds for seconds in timed(function, blocks[name], device)])
    pairs = {name: list(zip(*blocks, strict=True)) for name, blocks in samples.items()}
    return {name: {"ms": statistics.median(done), "least": min(done), "greatest": max(done), "host_ms": statistics.median(host)}
            for name, (host, done) in pairs.items()}  # fmt: skip


def matrix_rate(task):
    """Return the operations a second of a large bf16 matrix product."""
    a = torch.randn(task.sizes.matrix, task.sizes.matrix, device=task.device).bfloat16()
    return 2 * len(a) ** 3 / min(timed(lambda: a @ a, 10, task.device)[1] for _ in range(7))


def step(task, arch, variants):
    """Measure variants of the training step in turns. The first is bf16; the others are compared with it."""
    s, device = task.sizes, task.device
    images, rate, built, first = task.images(s.bs), matrix_rate(task), {}, {}
    for name in variants:
        try:
            built[name], first[name] = build(name, task.hparams(arch), images, device)
        except Exception as error:  # torch.compile and the capture of a graph can raise nearly anything
            task.emit(f"{arch} {name}", {"failed": one_line(error)})
    with FlopCounterMode(display=False) as counter:
        built["bf16"]()
    flops, rows = counter.get_total_flops(), in_turns(built, s.rounds, device)
    for name, row in rows.items():
        per_second = 1e3 / row["ms"]
        pairs = zip(first[name]["losses"], first["bf16"]["losses"], strict=True)
        row |= {"patches_per_second": s.n_patches * s.bs * per_second, "flops": flops, "matrix_rate": rate,
                "share_of_peak": flops * per_second / rate, "times_as_fast_as_bf16": rows["bf16"]["ms"] / row["ms"],
                "losses_differ_from_bf16": max(abs(a / b - 1) for a, b in pairs), **first[name]}  # fmt: skip
        if name != "bf16" or "fp32" in variants:  # elsewhere bf16 is measured for comparison only
            task.emit(f"{arch} {name}", row)


def build(name, hp, images, device):
    """Return a function that takes a training step of this variant, and what the first steps told. It has warmed up."""
    before, start, numbers = 0, time.perf_counter(), itertools.count()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    encoder, optimizer = trainable(hp, device)
    if name == "graph":
        take = captured_step(hp, encoder, optimizer, images)
    else:
        network = torch.compile(encoder, mode=MODES[name]) if name in MODES else encoder
        take = functools.partial(build_step(hp, network, optimizer, name != "fp32"), images)

    def function():
        if name in MODES:
            torch.compiler.cudagraph_mark_step_begin()
        return take(generator(SEED, "patches", step=next(numbers)))

    losses = function().tolist()[:2]  # waits for the device
    seconds = time.perf_counter() - start
    timed(function, 3, device)
    return function, {"losses": losses, "first_seconds": seconds, "memory_gb": (peak_memory(device) - before) / 1e9}


def captured_step(hp, encoder, optimizer, images):
    """Return a bf16 step whose network, losses and backward pass are one CUDA graph; patches and LARS are outside of it."""
    draw = functools.partial(sample_patches, images, hp.n_patches, size=hp.input_size or images.shape[-1])
    x, stream, graph = draw(generator=generator(SEED, "graph")), torch.cuda.Stream(), torch.cuda.CUDAGraph()

    def forward_and_backward():
        optimizer.zero_grad()  # so that gradients are written, not added
        with torch.autocast("cuda", torch.bfloat16):
            z = encoder(x.flatten(0, 1))[1]
        total, *losses = loss.emp_ssl_loss(z.unflatten(0, x.shape[:2]))
        total.backward()
        return torch.stack(losses).detach()

    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # to warm up
        for _ in range(3):
            forward_and_backward()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        losses = forward_and_backward()

    def take(random):
        x.copy_(draw(generator=random))
        graph.replay()
        norm = torch.nn.utils.get_total_norm(p.grad for p in encoder.parameters())
        optimizer.step()
        return torch.cat([losses, norm[None]])

    return take


def parts(task):
    """Measure augmentation, losses, LARS, encoding and an epoch of the probe, in turns."""
    s, device, images = task.sizes, task.device, task.images(task.sizes.bs)
    z = F.normalize(torch.randn(s.n_patches, s.bs, s.z_dim, device=device), dim=-1)
    functions = {"augmentation": lambda: sample_patches(images, s.n_patches, generator(SEED, "patches"))}
    functions |= {f"{name} loss, both ways": functools.partial(gradient, function, z) for name, function in LOSSES.items()}
    for arch in s.archs:
        hp, rng = task.hparams(arch), functools.partial(generator, SEED, "encode")
        encoder, optimizer = trainable(hp, device)
        bs = max(1, hp.bs * hp.n_patches // hp.test_views.n)  # as in a run
        arguments = (encoder, task.images(s.n_encode), hp.test_views, rng, bs, Output(bf16=True))
        functions[f"encoding, {arch}"] = functools.partial(encode, *arguments)
    for p in encoder.parameters():
        p.grad = torch.randn_like(p)
    functions["LARS step"] = optimizer.step
    x, y = torch.randn(s.n_probe, s.h_dim, device=device).relu(), torch.randint(N_CLASSES, (s.n_probe,), device=device)
    for lrs in ((PROBE_LR,), LRS):
        epochs = softmax_regressions(x, y, lrs, N_CLASSES, Fit(n_epochs=1000, bf16=True), range(1000))
        functions[f"epoch of the probe, learning rates: {len(lrs)}"] = functools.partial(next, epochs)
    for function in functions.values():
        timed(function, 2, device)
    for name, row in in_turns(functions, s.rounds, device).items():
        task.emit(name, row)


def whole_run(task, part):
    """Measure main.py train in a process of its own, from its start to its report."""
    words = [*RUNS[part][0].split(), *task.sizes.run.split(), "--seed", str(SEED)]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "main.py", "train", *words, *task.data, "--device", str(task.device)]
        limit, start = max(1, task.limit - 5), time.monotonic()
        try:
            done = subprocess.run([*command, "--log_folder", folder], capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            raise RunError(f"not done after {limit:.0f} s") from None
        if done.returncode:
            raise RunError((done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1])
        wall = time.monotonic() - start
        task.emit(part, {"options": " ".join(words), "wall_seconds": wall, **read_run(next(Path(folder).iterdir()))})


def one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
