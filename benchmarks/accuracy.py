"""Accuracy and time of whole runs, beside the untrained encoder and raw pixels: writes benchmarks/results/NAME.json.

    python benchmarks/accuracy.py demo --seeds 3
    python benchmarks/accuracy.py precision --seeds 3 --data_dir .data/cifar10

demo: what `make demo` runs. precision: 3,000 CIFAR-10 images as JPEG files in train/<class> and test/<class>, trained in
fp32 and, where the hardware has it, in bf16; and by benchmarks/baseline.py.
Each experiment goes through main.main, in a temporary folder. Then: python benchmarks/readme.py
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import evaluate  # noqa: E402
import experiment  # noqa: E402
import journal  # noqa: E402
import main  # noqa: E402

PRECISION = "--n_images 3000 --arch resnet18-imagenet --n_patches 8 --n_epochs 1"  # baseline.py has these options too
LIKE_BASELINE = "--dataset folder --eval_lr 0.0075 --eval_views augmented"


def arguments(name):
    """The options that the named experiment changes; the demo's stand in the Makefile."""
    if name == "precision":
        return [*PRECISION.split(), *LIKE_BASELINE.split()]
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    return ["--dataset", "textures", *re.search(r"^DEMO = (.*)$", makefile, re.M)[1].split()]


def one_run(argv, seed, **more):
    """Run the program and return what it reports: accuracies in percent, seconds per stage and in all."""
    options = [text for name, value in {"seed": seed, **more}.items() for text in (f"--{name}", str(value))]
    with tempfile.TemporaryDirectory() as logs:
        start = time.monotonic()
        if main.main(["train", *argv, *options, "--log_folder", logs]) != 0:
            sys.exit("the run failed")
        total = time.monotonic() - start
        (exp_dir,) = Path(logs).iterdir()
        result = read_run(exp_dir)
    result["seconds"]["all"] = round(total, 1)
    return {"seed": seed, **result}


def read_run(exp_dir):
    """What a finished run folder tells: accuracies in percent, the probe's rate, the losses of each epoch (mean over its steps,
    and over the last print_freq ones), seconds per stage."""
    result = experiment.read_json(exp_dir / "linear_accuracy.json")
    encoding = sum(experiment.load(path)["seconds"] for path in (exp_dir / "artifacts").iterdir())
    training = experiment.load(exp_dir / "checkpoints" / "last.pt")["seconds"]
    epochs = {}
    for line in (exp_dir / "metrics.jsonl").read_text().splitlines() if (exp_dir / "metrics.jsonl").exists() else ():
        values = json.loads(line)
        if "loss_sim" in values:
            epochs.setdefault(values["epoch"], []).append(values)
    losses = []
    for lines in epochs.values():
        steps = numpy.diff([0] + [line["step"] for line in lines])
        values = numpy.array([(line["loss_sim"], line["loss_uniformity"]) for line in lines])
        losses.append({"mean": (steps @ values / steps.sum()).tolist(), "last": values[-1].tolist()})
    accuracies = {name: result[name] for name in ("top1", "top5", "best_top1", "knn_top1", "lr")}
    seconds = {"training": training, "encoding": encoding, "probe": result["seconds"]}
    return {**accuracies, "losses": losses, "seconds": {name: round(value, 1) for name, value in seconds.items()}}


def baseline_run(seed, data_dir):
    """What benchmarks/baseline.py reports of the experiment `precision`."""
    return child(ROOT / "benchmarks" / "baseline.py", *PRECISION.split(), "--data_dir", data_dir, "--seed", seed)


def child(*arguments):
    """The last line that a script with these arguments prints: a JSON object."""
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, arguments))} failed:\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def raw_pixels(argv):
    """Top-1 of the linear probe on the pixels themselves, in [-1, 1], for a train command's images."""
    hp = main.hyperparameters(main.parse(argv))
    images, device = main.load_data(hp, None), main.pick_device(hp.device)
    tensors = []
    for split in ("train", "test"):
        tensors += [(images[split].images.flatten(1) / 127.5 - 1).to(device), images[split].labels.to(device)]
    n_classes = len(images["train"].class_names)
    return evaluate.linear_probe(*tensors, n_classes, hp.eval_lr, hp.n_eval_epochs, seed=hp.seed)[0]["top1"]


def machine(device="auto"):
    device = main.pick_device(device)
    return journal.machine(device, main.pick_precision("auto", device))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("demo", "precision"))
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 42, the program's default (default: 3)")
    parser.add_argument("--data_dir", default="./datasets", help="where the JPEG files are")
    options = parser.parse_args()
    argv, seeds = arguments(options.name), range(42, 42 + options.seeds)

    def runs(**more):
        return [one_run(argv, seed, data_dir=options.data_dir, **more) for seed in seeds]

    results = {"options": " ".join(argv), "machine": machine()}
    if options.name == "precision":
        plain = [baseline_run(seed, options.data_dir) for seed in seeds[:2]]  # four minutes each
        results |= {"auto": runs(), "fp32": runs(precision="fp32"), "baseline": plain}
    else:
        pixels = raw_pixels(["train", *argv, "--data_dir", options.data_dir])
        results |= {"trained": runs(), "untrained": runs(n_epochs=0), "raw_pixels_top1": pixels}
    path = ROOT / "benchmarks" / "results" / f"{options.name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))
