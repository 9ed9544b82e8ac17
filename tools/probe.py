"""Few labels: the linear probe on a fraction of the labels, from the embeddings that a run has stored."""

from pathlib import Path

from data import balanced_subset, why_no_probe
from evaluate import Fit, linear_probe
from experiment import Run, is_trained, stage_key
from hparams import Setting
from infra.console import log
from infra.device import configure, generator, pick_device, pick_precision
from infra.errors import RunError, UsageError
from tools.report import load

FRACTION = Setting("label_fraction", float, False, 1.0, "data", "fraction of the training images whose labels are used, equally "
                   "many of each class", low=0, above=True, high=1)  # fmt: skip
FRACTIONS = (0.01, 0.1, 1.0)
N_CHOICES = 3  # of the images, where the fraction is below 1
N_EPOCHS = 100  # at least; of few images they are few steps


def add_commands(commands):
    """Add the command probe."""
    parser = commands.add_parser("probe", help="the linear probe with few labels", description=(
        "Fit the linear probe of a finished run to fractions of the labels, from the stored embeddings, and print its accuracies "
        "on all test images. Nothing is trained or written."))  # fmt: skip
    parser.add_argument("--exp_dir", required=True, type=Path, help="the run folder")
    parser.add_argument("--label_fractions", type=FRACTION.parse, nargs="+", metavar="FLOAT", help="fractions of the training "
                        "images, equally many of each class (default: 0.01, 0.1 and 1, as far as each class has one)")
    parser.add_argument("--device", default="auto", help="auto (cuda, mps or cpu), cpu, mps, cuda or cuda:N")
    parser.set_defaults(command=probe_command)


def probe_command(args):
    """Print a line for each fraction: the mean of top-1 over the choices of images, and the range."""
    device, run = pick_device(args.device), Run(args.exp_dir)
    hp, checkpoint = run.read_hparams(), run.newest_checkpoint()
    if not checkpoint:
        raise UsageError(f"{run.dir} has no checkpoint: train it first")
    encoded, n_classes = load_embeddings(run, hp, checkpoint), len(checkpoint["data"]["class_names"])
    labels = encoded["train"]["labels"]
    configure(device, hp.deterministic)
    bf16 = pick_precision(hp.precision, device) == "bf16"
    fractions = args.label_fractions or [fraction for fraction in FRACTIONS if round(fraction * len(labels)) >= n_classes]
    for fraction in fractions:
        n_epochs = hp.n_eval_epochs if fraction == 1 else max(hp.n_eval_epochs, N_EPOCHS)
        choices = [few_labels(labels, fraction, n_classes, hp.seed + i) for i in range(N_CHOICES if fraction < 1 else 1)]
        top1 = [fit_few(hp, encoded, index, n_epochs, device, bf16)["top1"] for index in choices]
        spread = f"  {min(top1):.2f} to {max(top1):.2f}, by the choice of images" if len(top1) > 1 else ""
        log.info(f"{len(choices[0]):7,} labels  top-1 {sum(top1) / len(top1):.2f}%{spread}")
    log.info(f"linear probe, last epoch, {len(encoded['test']['labels']):,} test images")


def load_embeddings(run, hp, checkpoint):
    """Return {split: what artifacts/<split>.pt holds}. Raises UsageError unless the run is finished and has labels."""
    missing = why_no_probe(checkpoint["data"]["class_names"], checkpoint["data"]["test"])
    if missing:
        raise UsageError(f"{run.dir} can't be used with few labels: {missing}")
    encoded = {split: load(path, stage_key(hp, checkpoint, "encode", split)) for split, path in run.artifacts.items()}
    if not is_trained(hp, checkpoint) or not all(encoded.values()):
        raise UsageError(f"{run.dir} is not finished, or was edited since: resume it first")
    return encoded


def few_labels(labels, fraction, n_classes, seed):
    """Return the indices, int64 (n,), of a random, class-balanced fraction of images with these labels (N,)."""
    n = round(fraction * len(labels))
    if n < n_classes:
        raise UsageError(f"label_fraction {fraction:g} of {len(labels)} images is {n}, fewer than the {n_classes} classes: "
                         f"raise it")  # fmt: skip
    return balanced_subset(labels, len(labels), n, generator(seed, "labels"))


def fit_few(hp, encoded, index, n_epochs, device, bf16):
    """Fit the linear probe of a run to the training images of an index; return what evaluate.linear_probe says of it."""
    x, y, x_test, y_test = (encoded[split][name].to(device) for split in ("train", "test") for name in ("embeddings", "labels"))
    n_classes, index = int(y.max()) + 1, index.to(device)
    fit = Fit(hp.eval_lr, n_epochs, seed=hp.seed, bf16=bf16, standardize=hp.standardize)
    result, layer = linear_probe(x[index], y[index], x_test, y_test, n_classes, fit)
    if not layer.weight.isfinite().all():
        raise RunError(f"the weights of the linear probe are not finite with eval_lr {result['lr']:g}: lower eval_lr")
    return result
