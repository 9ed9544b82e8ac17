"""Data larger than memory: decoding once against an ImageFolder and a DataLoader, and the memory of a pass over 10 GB.

    python benchmarks/large.py      # writes benchmarks/results/large.json; about five minutes and 0.2 GB of disk on two cores

Decoding: 3,000 JPEG files of 400 x 300 that it draws itself, to 256 pixels. The pass: 51,000 images of 256 pixels in a sparse
file, 2 patches of each through resnet18-tiny at 32 pixels, a thread reading ahead. Then: python benchmarks/readme.py
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torchvision
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from accuracy import machine  # noqa: E402

import data  # noqa: E402
import main  # noqa: E402

SIZE, N, BS = 256, 51_000, 100
OPTIONS = "--arch resnet18-tiny --input_size 32 --n_patches 2 --h_dim 256 --z_dim 64"


def resident():
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def decoding(folder, n=3000):
    """Images a second, three times each in turns: the cache file built, and torchvision's ImageFolder with two workers."""
    noise = torch.nn.functional.interpolate(torch.rand(n, 3, 30, 40, generator=torch.manual_seed(0)), scale_factor=10)
    for i, pixels in enumerate(noise):
        path = folder / "train" / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((255 * pixels).byte().permute(1, 2, 0).numpy()).save(path, quality=90)
    resize = torchvision.transforms.Resize(SIZE, torchvision.transforms.InterpolationMode.BICUBIC)
    crop, to_tensor = torchvision.transforms.CenterCrop(SIZE), torchvision.transforms.PILToTensor()
    transform = torchvision.transforms.Compose([resize, crop, to_tensor])
    rates = {"ours": [], "ImageFolder": []}
    for i in range(3):
        os.environ["XDG_CACHE_HOME"] = str(folder / f"cache-{i}")
        start = time.perf_counter()
        assert len(data.load_images("folder", folder, True, SIZE).images) == n
        rates["ours"].append(n / (time.perf_counter() - start))
        loader = torch.utils.data.DataLoader(torchvision.datasets.ImageFolder(folder / "train", transform), BS, num_workers=2)
        start = time.perf_counter()
        assert sum(len(images) for images, _ in loader) == n
        rates["ImageFolder"].append(n / (time.perf_counter() - start))
    return rates


def training(folder):
    """Resident bytes at every tenth step of a pass, and the seconds that were spent waiting for images."""
    hp = main.hyperparameters(main.parse(["train", *OPTIONS.split()]))
    encoder = main.build_encoder(hp, None).to(memory_format=torch.channels_last)
    optimizer = main.build_optimizer(hp, encoder)
    path = folder / "images.u8"
    with open(path, "wb") as file:
        file.truncate(N * 3 * SIZE**2)
    images = data.ImageFile(path, SIZE, torch.arange(N), torch.zeros(N, dtype=torch.int64))
    batches = data.batches(images, torch.randperm(N).split(BS), torch.device("cpu"))
    bf16 = main.pick_precision(hp.precision, torch.device("cpu")) == "bf16"
    curve, waited, started = [], 0.0, time.perf_counter()
    for step in range(N // BS):
        start = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - start
        main.train_step(hp, encoder, optimizer, batch, data.generator(0, "patches", step=step), bf16)
        if step % 10 == 0:
            curve.append(resident())
    return {"bytes": N * 3 * SIZE**2, "resident": curve, "waited": waited, "seconds": time.perf_counter() - started}


if __name__ == "__main__":
    if len(sys.argv) > 1:  # in a process of its own, whose memory is that of the pass
        print(json.dumps(training(Path(sys.argv[1]))))
        sys.exit()
    with tempfile.TemporaryDirectory() as folder:
        decoded = decoding(Path(folder))
        done = subprocess.run([sys.executable, __file__, folder], check=True, capture_output=True, text=True)
    results = {"decoding": decoded, "training": json.loads(done.stdout), "options": OPTIONS, "machine": machine("cpu")}
    (ROOT / "benchmarks" / "results" / "large.json").write_text(json.dumps(results, indent=1) + "\n")
    print({name: sorted(rates)[1] for name, rates in decoded.items()}, "images a second")
    print(f"{max(results['training']['resident']) / 1e9:.2f} GB at most")
