"""What an encoder is worth on other images than its own, and with few labels.

    python -m benchmarks.transfer --cifar10 DIR --cifar100 DIR --log_folder logs/transfer

Each DIR has images in train/<class>/ and test/<class>/. Trains --preset laptop on both data sets,
with three seeds, and probes each encoder on both, beside an untrained encoder and k-means features.
Then fine-tunes the encoder of CIFAR-10 with a part of the labels, beside its linear probe and the
same network trained from scratch for as many steps. Each result is an entry of
benchmarks/results/transfer.json. What is there is not done again; a training that was stopped goes
on. The commit of an entry is that of the program that wrote it.
"""

import shlex
import sys
from functools import partial
from pathlib import Path

import torch

from benchmarks.common import machine, parser, run_of, this_commit
from benchmarks.kmeans import kmeans_row
from benchmarks.peers import N_CENTROIDS
from benchmarks.study import run_train
from data import load_images
from hparams import PRESETS
from infra import files
from infra.device import configure
from main import main as run_program

DATA_SETS = ("cifar10", "cifar100")
FIRST_SEED = 42
SEEDS = {  # of each source of an encoder
    "cifar10": (FIRST_SEED, 43, 44),
    "cifar100": (FIRST_SEED, 43, 44),
    "untrained": (FIRST_SEED,),
}
PRESET_OPTIONS = "--preset laptop"
SHARES = {0.01: 100, 0.1: 20, 1.0: 5}  # of the labels: epochs of fine-tuning


def exp_name_of(name, seed):
    """Return the exp_name of a run. That of the first seed has no suffix."""
    return name if seed == FIRST_SEED else f"{name}-{seed}"


def probe_entry(options, source, target, seed):
    """Return the accuracies on `target` of the encoder that is trained on `source` with a seed.

    Exits if the training diverges.
    """
    name = exp_name_of(source if source == target else f"{source}-to-{target}", seed)
    data_dir = str(getattr(options, target))
    argv = ["train", "--exp_name", name, "--log_folder", str(options.log_folder)]
    argv += ["--seed", str(seed), "--dataset", "folder", "--data_dir", data_dir]
    argv += shlex.split(options.settings)
    if source != target:
        argv += ["--n_epochs", "0"]
    if source not in (target, "untrained"):
        trained = run_of(options.log_folder, exp_name_of(source, seed))
        argv += ["--weights", str(trained.last)]
    result = run_train(argv)
    if "failed" in result:
        sys.exit(f"{name}: {result['failed']}")
    return result


def kmeans_entry(options, target):
    """Return the accuracy of k-means features that are learned on `target`."""
    images = [load_images("folder", getattr(options, target), train) for train in (True, False)]
    n_epochs = PRESETS["laptop"]["n_eval_epochs"]
    return kmeans_row(*images, N_CENTROIDS, n_epochs, FIRST_SEED)[0]


def labels_entry(options, share):
    """Return the accuracies with a share of CIFAR-10's labels: probe, fine-tuned, from scratch."""
    run = run_of(options.log_folder, "cifar10")
    n_epochs = SHARES[share]
    argv = ["finetune", "--exp_dir", run.dir, "--label_fraction", share, "--n_epochs", n_epochs]
    code = run_program([str(word) for word in argv])
    if code != 0:
        sys.exit(code)
    (path,) = run.finetune.glob(f"label_fraction{share}_n_epochs{n_epochs}_*/result.json")
    result = files.read_sealed(path)
    top1 = {name: result[name]["top1"] for name in ("probe", "finetuned", "from_scratch")}
    about = {"n_labels": result["n_labels"], "n_epochs": n_epochs, "commit": this_commit()}
    return {**about, **top1}


def entry_name(source, target, seed=FIRST_SEED):
    """Return the name of a result. That of the first seed has no suffix."""
    return f"{source} to {target}" + ("" if seed == FIRST_SEED else f", seed {seed}")


def entries_of(options):
    """Yield the name of each entry of the results, and the function that returns it."""
    for source, seeds in SEEDS.items():
        for target in sorted(DATA_SETS, key=lambda name: name != source):  # its own images first
            for seed in seeds:
                name = entry_name(source, target, seed)
                yield name, partial(probe_entry, options, source, target, seed)
    for target in DATA_SETS:
        yield f"kmeans to {target}", partial(kmeans_entry, options, target)
    for share in SHARES:
        yield f"labels {share}", partial(labels_entry, options, share)


def main(argv=None):
    made = parser(__doc__)
    for name in DATA_SETS:
        made.add_argument(f"--{name}", type=Path, required=True, metavar="DIR")
    made.add_argument("--log_folder", type=Path, default=Path("logs/transfer"))
    made.add_argument(
        "--settings", default=PRESET_OPTIONS, help=f"of the runs (default: {PRESET_OPTIONS})"
    )
    options = made.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    configure(torch.device("cpu"))
    path = options.out / "transfer.json"
    results = files.read_json(path)
    for name, compute in entries_of(options):
        if name not in results:
            about = {"settings": options.settings, "machine": machine()}
            results[name] = {**about, **compute()}
            files.write_json(path, results)
            print(name, results[name], flush=True)


if __name__ == "__main__":
    main()
