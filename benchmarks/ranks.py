"""Several processes against one: the losses and the gradient of a step, and how much faster two are than one.

    python -m benchmarks.speed --only ranks      # about two minutes on two cores

The differences of 2 and 4 gloo processes to one are of random images, with batch norm in eval mode, since on a CPU each process
has its own. The speed is that of one process with one thread against two with one thread each, in turns. Run as a module, this
file is what each process runs: steps of training, whose metrics, gradients and seconds the first process writes to PATH.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import main
from benchmarks.common import ROOT, machine
from infra import distributed, files
from infra.device import generator, peak_memory, pick_precision
from train import build_optimizer, build_step
from weights import build_encoder

SMALL = ("--arch resnet18-tiny --h_dim 64 --z_dim 16 --n_patches 4 --bs 16 --optimizer sgd --lr 1e-9 --precision fp32 "
         "--device cpu")  # fmt: skip
SPEED = "--arch resnet18-imagenet --n_patches 8 --bs 64 --h_dim 1024 --z_dim 256 --device cpu"


def steps(path, options, n_steps):
    """Train n_steps steps, in as many processes as torchrun started, and write what `processes` returns.

    If n_steps is 1, batch norm is in eval mode.
    """
    torch.set_num_threads(1)
    hp, device = main.hyperparameters(main.parse(["train", *options.split()])), torch.device("cpu")
    bf16 = pick_precision(hp.precision, device) == "bf16"
    with distributed.process_group(device):
        encoder = build_encoder(hp, None).to(memory_format=torch.channels_last).train(n_steps > 1)
        step = build_step(hp, distributed.data_parallel(encoder, device), build_optimizer(hp, encoder), bf16)
        images = torch.randint(0, 256, (hp.bs, 3, 32, 32), dtype=torch.uint8, generator=torch.manual_seed(0))
        seconds = []
        for i in range(n_steps):
            start = time.perf_counter()
            metrics = step(distributed.shard(images), generator(0, "patches", step=i))
            seconds.append(time.perf_counter() - start)
        gradients = {name: p.grad for name, p in encoder.named_parameters()}
        files.save(path, {"metrics": metrics, "gradients": gradients, "seconds": seconds[1:], "memory": peak_memory(device)})


def processes(n, options, n_steps):
    """Run `steps` in n processes with the options of a train command. Return a dict: metrics (3,) of the last step, gradients
    {name: tensor}, seconds of each step but the first, memory in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "steps.pt"
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)] if n > 1 else []
        command = [sys.executable, *launch, "-m", "benchmarks.ranks", str(path), options, str(n_steps)]
        subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return files.load(path)


def difference(a, b):
    """Return the greatest difference of a loss, relative, and of the gradients, relative to their norm."""
    gap = sum((a["gradients"][name] - g).square().sum() for name, g in b["gradients"].items()).sqrt()
    norm = sum(g.square().sum() for g in a["gradients"].values()).sqrt()
    return {"loss": ((a["metrics"] / b["metrics"])[:2] - 1).abs().max().item(), "gradient": (gap / norm).item()}


def compare(options, results):
    """Measure the differences of 2 and 4 processes to one, the seconds of 1 and 2, and what --max_patches costs and saves."""
    one = processes(1, SMALL, 1)
    differences = {n: difference(one, processes(n, SMALL, 1)) for n in (2, 4)}
    seconds = {1: [], 2: []}
    for _ in range(options.turns):
        for n in seconds:
            seconds[n].append(statistics.median(processes(n, SPEED, 5)["seconds"]))
    chunks = {"all": processes(1, SPEED, 5), "64": processes(1, f"{SPEED} --max_patches 64", 5)}
    chunks = {n: {"seconds": statistics.median(run["seconds"]), "memory": run["memory"]} for n, run in chunks.items()}
    results |= {"difference": differences, "chunks": chunks, "seconds": seconds, "options": SPEED, "machine": machine("cpu")}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, metavar="PATH", help="file to write")
    parser.add_argument("options", help="of a train command, as one argument")
    parser.add_argument("n_steps", type=int)
    arguments = parser.parse_args()
    steps(arguments.path, arguments.options, arguments.n_steps)
