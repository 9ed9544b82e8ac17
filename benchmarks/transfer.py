"""What an encoder is worth on other images than its own, and with few labels.

    python -m benchmarks.transfer --cifar10 DIR --cifar100 DIR --log_folder logs/transfer

Each DIR has images in train/<class>/ and test/<class>/. Trains --preset laptop on both data sets
and probes each encoder on both, beside an untrained encoder and k-means features. Then fine-tunes
the encoder of CIFAR-10 with a part of the labels, beside its linear probe and the same network
trained from scratch for as many steps. Each result is an entry of benchmarks/results/transfer.json.
What is there is not done again; a training that was stopped goes on.
"""

import shlex
import sys
import time
from pathlib import Path

import torch

from benchmarks.common import machine, parser, this_commit
from benchmarks.kmeans import kmeans_row
from benchmarks.study import run_train
from data import load_images
from experiment import Run
from infra import files
from infra.device import configure
from main import main as run_program

DATA_SETS = ("cifar10", "cifar100")
SOURCES = (*DATA_SETS, "untrained")
N_CENTROIDS = 400  # of k-means
SHARES = {0.01: 100, 0.1: 20, 1.0: 5}  # of the labels: epochs of fine-tuning


def run_of(log_folder, source):
    """Return the Run that is trained on a data set."""
    (exp_dir,) = log_folder.glob(f"{source}__*")
    return Run(exp_dir)


def probe_entry(options, source, target):
    """Return the accuracies on `target` of the encoder that is trained on `source`."""
    name = source if source == target else f"{source}-to-{target}"
    folder = getattr(options, target)
    argv = ["train", "--exp_name", name, "--log_folder", str(options.log_folder), "--seed", "42"]
    argv += ["--dataset", "folder", "--data_dir", str(folder), *shlex.split(options.settings)]
    if source != target:
        argv += ["--n_epochs", "0"]
    if source not in (target, "untrained"):
        argv += ["--weights", str(run_of(options.log_folder, source).last)]
    return run_train(argv)


def kmeans_entry(options, target):
    """Return the accuracy of k-means features that are learned on `target`."""
    images = [load_images("folder", getattr(options, target), train) for train in (True, False)]
    n = min(N_CENTROIDS, len(images[0].images))
    return kmeans_row(*images, n, n_eval_epochs=10, seed=42)[0]


def labels_entry(options, share):
    """Return the accuracies with a share of CIFAR-10's labels: fine-tuned, probe, from scratch."""
    run = run_of(options.log_folder, "cifar10")
    words = ["--label_fraction", share, "--n_epochs", SHARES[share]]
    start = time.monotonic()
    code = run_program([*map(str, ["finetune", "--exp_dir", run.dir, *words])])
    if code != 0:
        sys.exit(code)
    seconds = time.monotonic() - start
    (path,) = run.finetune.glob(f"label_fraction{share}_n_epochs{SHARES[share]}_*/result.json")
    result = files.read_sealed(path)
    top1 = {name: result[name]["top1"] for name in ("probe", "finetuned", "from_scratch")}
    return {"n_labels": result["n_labels"], **top1, "seconds": seconds, "commit": this_commit()}


def jobs(options):
    """Yield (name, function that returns its entry) of each entry of the results."""
    for source in SOURCES:
        for target in sorted(DATA_SETS, key=lambda name: name != source):  # its own images first
            yield f"{source} to {target}", lambda s=source, t=target: probe_entry(options, s, t)
    for target in DATA_SETS:
        yield f"kmeans to {target}", lambda t=target: kmeans_entry(options, t)
    for share in SHARES:
        yield f"labels {share}", lambda s=share: labels_entry(options, s)


def main(argv=None):
    made = parser(__doc__)
    for name in DATA_SETS:
        made.add_argument(f"--{name}", type=Path, required=True, metavar="DIR")
    made.add_argument("--log_folder", type=Path, default=Path("logs/transfer"))
    text = "of the runs (default: --preset laptop)"
    made.add_argument("--settings", default="--preset laptop", help=text)
    options = made.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    configure(torch.device("cpu"))
    path = options.out / "transfer.json"
    results = {"machine": machine(), **files.read_json(path)}
    for name, compute in jobs(options):
        if name not in results:
            results[name] = compute()
            files.write_json(path, results)
            print(name, results[name], flush=True)


if __name__ == "__main__":
    main()
