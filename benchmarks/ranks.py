"""One process against several: the loss and the gradient of a step, and how much faster two are than one.

    python benchmarks/ranks.py          # writes benchmarks/results/ranks.json; about two minutes on two cores

Differences of 2 and 4 gloo processes to one, on random images, batch norm in eval mode since each process has its own on a CPU.
Speed: steps of one process with one thread against two with one thread each, in turns. Then: python benchmarks/readme.py
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from accuracy import machine  # noqa: E402

import data  # noqa: E402
import experiment  # noqa: E402
import main  # noqa: E402
import parallel  # noqa: E402

SMALL = ("--arch resnet18-tiny --h_dim 64 --z_dim 16 --n_patches 4 --bs 16 --optimizer sgd --lr 1e-9 --precision fp32 "
         "--device cpu")  # fmt: skip
SPEED = "--arch resnet18-imagenet --n_patches 8 --bs 64 --h_dim 1024 --z_dim 256 --device cpu"


def step(path, arguments, n_steps=1, train=False):
    """Run steps, in as many processes as torchrun started; the first one writes metrics, gradients and seconds to path."""
    torch.set_num_threads(1)
    hp, device = main.hyperparameters(main.parse(["train", *arguments.split()])), torch.device("cpu")
    bf16 = main.pick_precision(hp.precision, device) == "bf16"
    with parallel.processes(device):
        encoder = main.build_encoder(hp, None).to(memory_format=torch.channels_last).train(train)
        network, optimizer = parallel.wrapped(encoder, device), main.build_optimizer(hp, encoder)
        images = torch.randint(0, 256, (hp.bs, 3, 32, 32), dtype=torch.uint8, generator=torch.manual_seed(0))
        seconds = []
        for i in range(n_steps):
            start = time.perf_counter()
            metrics = main.train_step(hp, network, optimizer, parallel.own(images), data.generator(0, "patches", step=i), bf16)
            seconds.append(time.perf_counter() - start)
        gradients = {name: p.grad for name, p in encoder.named_parameters()}
        experiment.save(Path(path), {"metrics": metrics, "gradients": gradients, "seconds": seconds[1:],
                                     "memory": main.peak_memory(device)})  # fmt: skip


def processes(n, *arguments):
    """What `step` writes where n processes run it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.pt"
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)] if n > 1 else []
        command = [sys.executable, *launch, __file__, str(path), *arguments]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return experiment.load(path)


def difference(one, other):
    """The greatest difference of a loss, relative, and of the gradients, relative to their norm."""
    gap = sum((one["gradients"][name] - g).square().sum() for name, g in other["gradients"].items()).sqrt()
    norm = sum(g.square().sum() for g in one["gradients"].values()).sqrt()
    return {"loss": ((one["metrics"] / other["metrics"])[:2] - 1).abs().max().item(), "gradient": (gap / norm).item()}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        path, arguments, n_steps = sys.argv[1:]
        step(path, arguments, int(n_steps), train=int(n_steps) > 1)
        sys.exit()
    one = processes(1, SMALL, "1")
    results = {"difference": {n: difference(one, processes(n, SMALL, "1")) for n in (2, 4)}}
    times = {1: [], 2: []}
    for _ in range(3):
        for n in times:
            times[n].append(statistics.median(processes(n, SPEED, "5")["seconds"]))
    chunks = {"all": processes(1, SPEED, "5"), "64": processes(1, f"{SPEED} --max_patches 64", "5")}
    results["chunks"] = {n: {"seconds": statistics.median(run["seconds"]), "memory": run["memory"]} for n, run in chunks.items()}
    results |= {"seconds": times, "options": SPEED, "machine": machine("cpu")}
    (ROOT / "benchmarks" / "results" / "ranks.json").write_text(json.dumps(results, indent=1) + "\n")
    print(results["difference"], times)
