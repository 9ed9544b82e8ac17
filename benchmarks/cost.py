"""What safety costs: a checkpoint and the check for numbers that are not finite, in seconds, beside a step of training.

    python benchmarks/cost.py      # writes benchmarks/results/cost.json; about two minutes on two cores

The default network, 20 patches of 100 random images. Then: python benchmarks/readme.py
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from accuracy import machine  # noqa: E402

import data  # noqa: E402
import experiment  # noqa: E402
import journal  # noqa: E402
import main  # noqa: E402


def seconds(function, n=5):
    """Times of n calls, after one that does not count."""
    times = []
    for _ in range(n + 1):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return times[1:]


def measure(folder):
    hp = main.hyperparameters(main.parse(["train", "--n_patches", "20"]))
    device = main.pick_device(hp.device)
    bf16 = main.pick_precision(hp.precision, device) == "bf16"
    encoder = main.build_encoder(hp, None).to(device, memory_format=torch.channels_last)
    optimizer = main.build_optimizer(hp, encoder)
    images = torch.randint(0, 256, (hp.bs, 3, 32, 32), dtype=torch.uint8, device=device)
    log = journal.Journal(folder, hp, [], device, hp.precision)
    state = main.restore(hp, log, optimizer, None, {}, 500, device)
    metrics = []

    def step():
        metrics.append(main.train_step(hp, encoder, optimizer, images, data.generator(0, "step"), bf16))

    def check():
        state.recent, state.timed, state.step = hp.print_freq * metrics[-1:], 1, 50
        main.summarise(state, log, hp.lr, 1, SimpleNamespace(disable=False, set_postfix_str=print))

    steps = seconds(step, 3)
    checks = seconds(check)
    experiment.prepare(folder, hp)
    info = {"train": "", "test": "", "class_names": []}
    saves = seconds(lambda: main.save_state(hp, folder, info, encoder, optimizer, state))
    size = (folder / "checkpoints" / "last.pt").stat().st_size
    return {"step": steps, "check": checks, "checkpoint": saves, "bytes": size, "print_freq": hp.print_freq,
            "checkpoint_every": hp.checkpoint_every, "machine": machine()}  # fmt: skip


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:  # on the disk that holds the runs
        results = measure(Path(folder))
    (ROOT / "benchmarks" / "results" / "cost.json").write_text(json.dumps(results, indent=1) + "\n")
    for name in ("step", "check", "checkpoint"):
        print(f"{name:12} {statistics.median(results[name]):.4f} s")
