"""What only a GPU can tell, in the few minutes for which there is one.

    python -m benchmarks.gpu                                        # or with --dataset folder
    python -m benchmarks.gpu --quick --device cpu --out logs/gpu    # a trial in tiny sizes

The parts run one after the other, in order of worth. A figure is in gpu-PART.json as soon as it is
measured. A part that fails says so there, and the next one runs.
"""

import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks.common import machine, parser, this_commit
from benchmarks.speed import PARTS, Side, milliseconds, peak_rates, training
from benchmarks.study import result_of
from encode import encode
from experiment import Run
from hparams import Hparams
from infra import files
from infra.device import generator, peak_memory, pick_device
from infra.errors import UsageError
from loss import UNIFORMITY
from main import main as run_program
from train import build_step

WHOLE = {"archs": ("resnet18-cifar", "resnet18-imagenet"), "bs": 32, "matrix": 8192, "sizes": {}}
QUICK = {"archs": ("resnet10-tiny",), "bs": 8, "matrix": 256, "sizes": {"P": 2, "B": 8}}
QUICK_RUN = (
    "--arch resnet10-tiny --h_dim 32 --z_dim 16 --input_size 16 --bs 10 --n_images 20 "
    "--n_patches 2 --n_epochs 1 --n_eval_epochs 2 --test_patches 1 --pool_grid 1"
)
# About ten times what float32 differs from float64 on a CPU, relative to the norm.
TOLERANCES = {"losses": 1e-4, "gradient": 1e-2, "embeddings": 1e-4}
MINI = "--arch resnet18-mini --input_size 16 --n_patches 10 --n_epochs 10 --test_patches 9"


def equal(options):
    """Yield how much losses, gradients and embeddings in float32 differ from those of the CPU."""
    for arch in options.archs:
        for loss in UNIFORMITY:
            hp = Hparams(arch=arch, uniformity_loss=loss, n_patches=8, bs=options.bs)
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                here = first_step(hp, options.device)
                there = first_step(hp, "cpu")
            for name, tolerance in TOLERANCES.items():
                expected = there[name].double()
                gap = ((here[name].cpu().double() - expected).norm() / expected.norm()).item()
                figures = {"difference": gap, "tolerance": tolerance, "within": gap <= tolerance}
                yield f"{arch}, {loss}, {name}", figures


def first_step(hp, device):
    """Return the embeddings of a new encoder, and losses and gradient of a step: {name: tensor}."""
    s = Side(device)  # seeded
    encoder = s.encoder(hp.arch).train()
    images = s.images(hp.bs)
    embeddings = encode(encoder, images, hp.test_views, partial(generator, 0, "t"))["embeddings"]
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.0)  # leaves the gradients as they are
    step = build_step(hp, encoder, optimizer, bf16=False)
    losses = step(images, generator(0, "patches"))[:2]
    gradient = torch.cat([p.grad.flatten() for p in encoder.parameters()])
    return {"losses": losses, "gradient": gradient, "embeddings": embeddings}


def steps(options):
    """Yield time, speed, share of the peak and memory of a training step."""
    peak = peak_rates(options.device, options.matrix)["network"]
    for arch in options.archs:
        for precision in ("bf16", "fp32"):
            s = Side(options.device, **options.sizes)
            s.bf16 = precision == "bf16"
            yield f"{arch}, {precision}", step_figures(s, arch, peak)


def step_figures(s, arch, peak):
    if s.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(s.device)
    part = training(s, arch)
    figures = milliseconds(part.call, s.device)
    figures["patches_per_second"] = 1e3 * s.P * s.B / figures["ms"]
    figures["share_of_peak"] = 1e3 * part.needs["network"] / figures["ms"] / peak
    return {**figures, "memory_gb": peak_memory(s.device) / 1e9}


def parts_of_step(options):
    """Yield the time of what a step does beside the network."""
    for name in ("sampling", "tcr", "vonmises", "invariance", "lars"):
        part = PARTS[name](Side(options.device, **options.sizes))
        yield part.title, milliseconds(part.call, options.device)


def whole_run(options, text):
    """Yield the results of main.py train, and the seconds from its start to its report."""
    with tempfile.TemporaryDirectory() as folder:
        words = f"{text} {options.run} --device {options.device} --log_folder {folder}".split()
        start = time.monotonic()
        code = run_program(["train", *words])
        seconds = time.monotonic() - start
        if code:
            raise RuntimeError(f"main.py train ended with exit code {code}")
        (exp_dir,) = Path(folder).iterdir()
        yield text, {"wall_seconds": seconds, **result_of(Run(exp_dir))}


GPU_PARTS = {
    "equal": equal,
    "step": steps,
    "parts": parts_of_step,
    "run-laptop": partial(whole_run, text="--preset laptop"),
    "run-document": partial(whole_run, text="--n_patches 20"),
    "run-mini": partial(whole_run, text=MINI),
}


def run_part(name, options):
    """Run a part and write what it measures, or how it failed."""
    content = {"machine": machine(options.device), "commit": this_commit(), "measured": {}}
    path = options.out / f"gpu-{name}.json"
    try:
        for title, figures in GPU_PARTS[name](options):
            print(f"{name}: {title}: {figures}", flush=True)
            content["measured"][title] = figures
            files.write_json(path, content)
    except Exception as error:  # of torch, CUDA or the program: the next part may still run
        print(f"{name}: failed: {error}", flush=True)
        files.write_json(path, {**content, "failed": f"{type(error).__name__}: {error}"})


def main():
    made = parser(__doc__)
    made.add_argument("--device", default="cuda", type=pick_device, help="(default: cuda)")
    made.add_argument("--quick", action="store_true", help="tiny sizes; give another --out")
    made.add_argument("--dataset", help="of whole runs (default: cifar10; textures if --quick)")
    made.add_argument("--data_dir", default="./datasets")
    made.add_argument("--only", nargs="+", choices=GPU_PARTS, default=GPU_PARTS, metavar="PART")
    try:
        options = made.parse_args()
    except UsageError as error:  # there is no such device
        made.error(str(error))
    vars(options).update(QUICK if options.quick else WHOLE)
    dataset = options.dataset or ("textures" if options.quick else "cifar10")
    options.run = f"--dataset {dataset} --data_dir {options.data_dir}"
    options.run += f" {QUICK_RUN}" if options.quick else ""
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        run_part(name, options)


if __name__ == "__main__":
    main()
