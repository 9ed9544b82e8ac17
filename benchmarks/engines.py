"""A training step of EMP-SSL here, in the plain implementation, and from lightly's parts: patches per second and memory.

    pip install lightly
    python -m benchmarks.engines      # about five minutes on two cores

All three train resnet18-cifar on the same batch: N_PATCHES patches of 32 pixels of each of BS images, loading included. The plain
implementation is benchmarks/baseline.py. lightly's is made of what its documentation of EMPSSLLoss names: VICRegViewTransform on
PIL images in worker processes, EMPSSLLoss and LARS, around the plain implementation's network. lightly 1.6.0 adds the coding rate
(loss/emp_ssl_loss.py, line 31 returns it without a minus), so its loss draws the embeddings together; here the sign is corrected,
which does not change the time. Each turn is a process of its own. It writes engines.json.
"""

import json
import os
import resource
import statistics
import time

import torch
from torch.utils.data import DataLoader
from torchvision.transforms.functional import to_pil_image

from benchmarks import baseline
from benchmarks.common import child, commit, machine, parser
from hparams import Hparams
from infra import files
from infra.device import configure, generator
from model import Encoder
from optimizers import build_optimizer
from train import build_step

N_PATCHES, BS, N_STEPS, TURNS = 8, 50, 6, 3


def random_images(n):
    return torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator(0, "engines"))


def ours():
    """Return a function that trains a step."""
    configure(torch.device("cpu"))
    hp, encoder = Hparams(n_patches=N_PATCHES, bs=BS), Encoder().to(memory_format=torch.channels_last)
    bf16 = machine("cpu")["precision"] == "bf16"
    step, images = build_step(hp, encoder, build_optimizer(hp, encoder, bf16), bf16), random_images(BS)
    return lambda: step(images, generator(0, "patches"))


def plain():
    encoder = baseline.Encoder("resnet18-cifar")
    optimizer = baseline.LARS(encoder.parameters(), 0.3, weight_decay=1e-4, nesterov=True, eta=0.005, clip=True)
    batches = iter(baseline.loader(random_images(BS * (N_STEPS + 3)), N_PATCHES, BS, train=True))
    return lambda: baseline.train_step(encoder, optimizer, next(batches))


def lightly():
    from lightly.loss import emp_ssl_loss
    from lightly.transforms.multi_view_transform import MultiViewTransform
    from lightly.transforms.vicreg_transform import VICRegViewTransform
    from lightly.utils.lars import LARS

    coding_rate = emp_ssl_loss.tcr_loss
    emp_ssl_loss.tcr_loss = lambda z, eps: -coding_rate(z, eps)
    criterion, encoder = emp_ssl_loss.EMPSSLLoss(), baseline.Encoder("resnet18-cifar")
    optimizer = LARS(encoder.parameters(), lr=0.3, momentum=0.9, weight_decay=1e-4)
    transform = MultiViewTransform([VICRegViewTransform(input_size=32)] * N_PATCHES)
    images = [transform_later(transform, image) for image in random_images(BS * (N_STEPS + 3))]
    batches = iter(DataLoader(images, BS, num_workers=os.cpu_count(), collate_fn=patches_of))

    def step():
        z = encoder(next(batches).flatten(0, 1))[1].unflatten(0, (N_PATCHES, BS))
        optimizer.zero_grad()
        criterion(list(z)).backward()
        optimizer.step()

    return step


def transform_later(transform, image):
    """Return a function, called in a worker process, that returns the views of an image."""
    picture = to_pil_image(image)
    return lambda: transform(picture)


def patches_of(batch):
    """Return the views of a batch of transform_later: (N_PATCHES, BS, 3, 32, 32)."""
    return torch.stack([torch.stack(view()) for view in batch], 1)


ENGINES = {"ours": ours, "plain": plain, "lightly": lightly}


def one_process(name):
    """Print the seconds of steps and the memory in bytes of this process, without the workers."""
    torch.manual_seed(0)
    step, seconds = ENGINES[name](), []
    for _ in range(N_STEPS):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": seconds[2:], "memory": memory}))


def main(argv=None):
    made = parser(__doc__)
    made.add_argument("--child", choices=tuple(ENGINES), help="print one measurement of one engine, in this process")
    options = made.parse_args(argv)
    if options.child:
        return one_process(options.child)
    options.out.mkdir(parents=True, exist_ok=True)
    found = {name: [] for name in ENGINES}
    for _ in range(TURNS):
        for name in ENGINES:
            found[name].append(child("benchmarks.engines", "--child", name))
    steps = {name: {"seconds": [statistics.median(turn["seconds"]) for turn in turns],
                    "memory": max(turn["memory"] for turn in turns)} for name, turns in found.items()}  # fmt: skip
    files.write_json(options.out / "engines.json", {"engines": steps, "n_patches": N_PATCHES, "bs": BS, "commit": commit(),
                                                    "machine": machine("cpu")})  # fmt: skip
    for name, step in steps.items():
        seconds = statistics.median(step["seconds"])
        print(f"{name:8} {N_PATCHES * BS / seconds:6.0f} patches/s  {BS / seconds:5.0f} images/s  {step['memory'] / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
