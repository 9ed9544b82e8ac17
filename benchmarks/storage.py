"""What the disk costs.

    python -m benchmarks.speed --only cost      # a checkpoint and the check of the numbers, beside a step of training
    python -m benchmarks.speed --only large     # decoding images once, and a pass over 10 GB: five minutes, 0.2 GB of disk
"""

import os
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image
from torchvision import datasets, transforms

import data
from benchmarks.common import ROOT, machine, measured
from experiment import Run
from hparams import Hparams
from infra.device import generator, pick_device, pick_precision
from infra.image_cache import ImageFile, batches
from train import build_optimizer, build_step, report, restore, save_checkpoint
from weights import build_encoder

SIZE, N, BS = 256, 51_000, 100  # of the pass: pixels, images, images in a batch
READING = {"arch": "resnet18-tiny", "input_size": 32, "n_patches": 2, "h_dim": 256, "z_dim": 64}  # the settings of the pass


def times(function, n=5):
    """Return the seconds of n calls, after one that does not count."""
    measured = []
    for _ in range(n + 1):
        start = time.perf_counter()
        function()
        measured.append(time.perf_counter() - start)
    return measured[1:]


def cost(device):
    """Return the seconds of a step of the default network, 20 patches of 100 images, of the check of its numbers, and of a
    checkpoint, in a folder on the disk that holds the program."""
    hp, device = Hparams(n_patches=20, device=device), pick_device(device)
    encoder = build_encoder(hp, None).to(device, memory_format=torch.channels_last)
    optimizer = build_optimizer(hp, encoder)
    step = build_step(hp, encoder, optimizer, pick_precision(hp.precision, device) == "bf16")
    images = torch.randint(0, 256, (hp.bs, 3, 32, 32), dtype=torch.uint8, device=device)
    metrics, bar = [], SimpleNamespace(disable=False, set_postfix_str=lambda text: None)
    with tempfile.TemporaryDirectory(dir=ROOT) as folder, Run(folder).opened(hp, {}, device) as run:
        run.prepare(rewrite=True)
        state = restore(hp, run, optimizer, n_steps=500, device=device)

        def check():
            state.recent, state.n_timed, state.step = hp.print_freq * metrics[-1:], 1, 50
            report(hp, run, state, 0, hp.lr, bar)

        steps = times(lambda: metrics.append(step(images, generator(0, "step"))), 3)
        checks = times(check)
        fingerprints = {"train": "", "test": "", "class_names": []}
        saves = times(lambda: save_checkpoint(hp, run, fingerprints, encoder, optimizer, state))
        size = run.last.stat().st_size
    return {"step": steps, "check": checks, "checkpoint": saves, "bytes": size, "print_freq": hp.print_freq,
            "checkpoint_every": hp.checkpoint_every}  # fmt: skip


def decoding(device, n=3000):
    """Return the images a second, three times each in turns, of building the cache file ("ours") and of torchvision's
    ImageFolder with two workers. The images are n JPEG files of 400 x 300, drawn here; they are decoded to 256 pixels."""
    resize = transforms.Resize(SIZE, transforms.InterpolationMode.BICUBIC)
    transform = transforms.Compose([resize, transforms.CenterCrop(SIZE), transforms.PILToTensor()])
    rates = {"ours": [], "ImageFolder": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw_images(folder, n)
        for i in range(3):
            os.environ["XDG_CACHE_HOME"] = str(folder / f"cache-{i}")
            start = time.perf_counter()
            assert len(data.load_images("folder", folder, True, SIZE).images) == n
            rates["ours"].append(n / (time.perf_counter() - start))
            dataset = datasets.ImageFolder(folder / "train", transform)
            start = time.perf_counter()
            assert sum(len(images) for images, _ in torch.utils.data.DataLoader(dataset, BS, num_workers=2)) == n
            rates["ImageFolder"].append(n / (time.perf_counter() - start))
    return rates


def draw_images(folder, n):
    """Write n JPEG files of smooth noise, 400 x 300, into two class folders."""
    noise = torch.nn.functional.interpolate(torch.rand(n, 3, 30, 40, generator=torch.manual_seed(0)), scale_factor=10)
    for i, pixels in enumerate(noise):
        path = folder / "train" / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((255 * pixels).byte().permute(1, 2, 0).numpy()).save(path, quality=90)


def reading(device, n=N):
    """Return the bytes of this process in memory at every tenth step of a pass over n images, and the seconds that were spent
    waiting for images. The images are 256 pixels wide and in a sparse file; a thread reads ahead."""
    hp, device = Hparams(**READING), torch.device("cpu")
    encoder = build_encoder(hp, None).to(memory_format=torch.channels_last)
    step = build_step(hp, encoder, build_optimizer(hp, encoder), pick_precision(hp.precision, device) == "bf16")
    resident, waited = [], 0.0
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(n * 3 * SIZE**2)
        images = ImageFile(file.name, SIZE, torch.arange(n), torch.zeros(n, dtype=torch.int64))
        read, started = batches(images, torch.randperm(n).split(BS), device), time.perf_counter()
        for i in range(n // BS):
            start = time.perf_counter()
            batch = next(read)
            waited += time.perf_counter() - start
            step(batch, generator(0, "patches", step=i))
            if i % 10 == 0:
                resident.append(memory())
    return {"bytes": n * 3 * SIZE**2, "resident": resident, "waited": waited, "seconds": time.perf_counter() - started}


def memory():
    """Return the bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def compare_cost(options, results):
    results |= measured(options.device, "cost")


def compare_large(options, results):
    settings = " ".join(f"--{name} {value}" for name, value in READING.items())
    decoded, read = measured("cpu", "decoding"), measured("cpu", "reading")
    results |= {"decoding": decoded, "training": read, "options": settings, "machine": machine("cpu")}
