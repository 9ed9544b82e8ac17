"""The search behind `--preset one-minute`: writes benchmarks/results/one-minute.json, the losers too.

    python benchmarks/one_minute.py                      # about 20 minutes a seed on two cores
    python benchmarks/one_minute.py --only base average

Each try changes one thing of BASE. Most keep its number of trained patches, and so its cost on a given device; the seconds
tell those that do not. What is not an option of the program, since it did not pay, is a change to it that stands below.
CIFAR-10 is downloaded; --dataset folder --data_dir DIR takes images in train/<class> and test/<class> instead. Finished
runs in logs/one-minute are read and not run again. Then: python benchmarks/readme.py
"""

import argparse
import json
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from accuracy import machine  # noqa: E402
from reproduce import DATA, measure  # noqa: E402

import experiment  # noqa: E402
import main  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "one-minute.json"
LOGS = Path("logs/one-minute")


@contextmanager
def replaced(name, function):
    """main.NAME is function within."""
    old = getattr(main, name)
    setattr(main, name, function)
    try:
        yield
    finally:
        setattr(main, name, old)


def linear():
    return replaced("learning_rate", lambda hp, progress: hp.lr * (1 - progress))


def warm_up():
    """A tenth of the steps up, then the cosine."""
    cosine = main.learning_rate
    return replaced("learning_rate", lambda hp, t: hp.lr * t / 0.1 if t < 0.1 else cosine(hp, (t - 0.1) / 0.9))


def after_each_step(change):
    """change(hp, encoder, progress) runs after each step, when `progress`, in (0, 1], of all steps are done."""
    train_step, done = main.train_step, []

    def step(hp, encoder, *args):
        metrics = train_step(hp, encoder, *args)
        done.append(1)
        change(hp, encoder, len(done) / experiment.n_steps_in(hp.n_epochs, hp.n_images // hp.bs))
        return metrics

    return replaced("train_step", step)


def averaged(decay):
    """Encode with an exponential moving average of the weights."""
    average = {}

    def change(hp, encoder, progress):
        for name, value in encoder.state_dict().items():
            if value.is_floating_point():
                average.setdefault(name, value.clone()).lerp_(value, 1 - decay)
        if progress == 1:
            encoder.load_state_dict(average, strict=False)  # but for batch norm's counter

    return after_each_step(change)


def growing(small):
    """input_size is `small` until 0.6 of the steps are done."""
    full = []

    def change(hp, encoder, progress):
        full.append(hp.input_size)
        hp.input_size = small if progress < 0.6 else full[0]

    return after_each_step(change)


BASE = (
    "--n_images 5000 --arch resnet18-tiny --input_size 16 --h_dim 1024 --z_dim 256 --n_patches 8 --bs 50 --n_epochs 1 "
    "--test_patches 4 --n_eval_epochs 50"
)
TRIES = {  # name: (what it changes of BASE, the change to the program where it is no option)
    "base": ("", None),
    # the network
    "whole network": ("--arch resnet18-cifar", None),
    "mini": ("--arch resnet18-mini", None),
    "imagenet stem, twice the width": ("--arch resnet18-imagenet --input_size 32", None),
    "large heads": ("--h_dim 4096 --z_dim 1024", None),
    "small heads": ("--h_dim 512 --z_dim 128", None),
    # the patches
    "8 pixels": ("--input_size 8", None),
    "12 pixels": ("--input_size 12", None),
    "8 pixels, then 16": ("", lambda: growing(8)),
    # the same number of patches in other steps
    "half the patches, twice the batch, twice the images": ("--n_patches 4 --bs 100 --n_images 10000", None),
    "half the patches, twice the images": ("--n_patches 4 --n_images 10000", None),
    "half the patches, two epochs": ("--n_patches 4 --n_epochs 2", None),
    "a quarter of the patches, four times the images": ("--n_patches 2 --n_images 20000", None),
    "half the batch": ("--bs 25", None),
    "twice the batch": ("--bs 100", None),
    "75% of the epoch": ("--n_epochs 0.75", None),
    # the rate
    "half the rate": ("--lr 0.15", None),
    "twice the rate": ("--lr 0.6", None),
    "linear": ("", linear),
    "warm-up": ("", warm_up),
    "constant": ("--schedule constant", None),
    "average": ("", lambda: averaged(0.95)),
    "constant, average": ("--schedule constant", lambda: averaged(0.95)),
    # the loss
    "a quarter of the invariance": ("--invariance_loss_weight 50", None),
    "von Mises": ("--uniformity_loss vonmises --invariance_loss_weight 1.5", None),
    # what won, together
    "fewer patches, large heads, half the rate": ("--n_patches 4 --n_images 10000 --h_dim 4096 --z_dim 1024 --lr 0.15", None),
    "the same, 8 pixels, then 16": ("--n_patches 4 --n_images 10000 --h_dim 4096 --z_dim 1024 --lr 0.15", lambda: growing(8)),
    "the same, mini": ("--n_patches 4 --n_images 10000 --h_dim 4096 --z_dim 1024 --lr 0.15 --arch resnet18-mini",
                       lambda: growing(8)),
}


def run(name, options):
    text, change = TRIES[name]
    runs = []
    for seed in range(42, 42 + options.seeds):
        exp_name = f"{name.replace(' ', '_').replace(',', '')}-{seed}"
        begun = any(LOGS.glob(f"{exp_name}__*")) and not any(LOGS.glob(f"{exp_name}__*/linear_accuracy.json"))
        over = ["--no-resume"] if change and begun else []  # a change counts its steps from the start
        with change() if change else nullcontext():
            runs.append(measure([
                "train", "--exp_name", exp_name, "--log_folder", str(LOGS), *over, *BASE.split(), *text.split(), "--dataset",
                options.dataset, "--data_dir", options.data_dir, "--seed", str(seed)]))  # fmt: skip
    results = experiment.read_json(RESULTS) or {"tries": {}}
    results["tries"][name] = {"options": text, "changed": change is not None, "runs": runs}
    results |= {"base": BASE, "data": DATA[options.dataset], "machine": machine()}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(TRIES), metavar="NAME", help=", ".join(TRIES).replace("%", "%%"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--dataset", choices=tuple(DATA), default="cifar10")
    parser.add_argument("--data_dir", default="./datasets")
    options = parser.parse_args()
    for name in options.only or TRIES:
        run(name, options)
