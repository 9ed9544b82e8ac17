"""Few labels: the linear probe on a fraction of the labels, from a run's stored embeddings."""

from statistics import mean

from data import balanced_subset, why_no_probe
from evaluate import Fit, linear_probe, tensors_of
from experiment import Run, load_if_key
from hparams import SETTINGS, Setting
from infra import files
from infra.console import log
from infra.device import generator
from infra.errors import RunError, UsageError

FRACTION = Setting("label_fraction", float, low=0, above=True, high=1)
FRACTIONS = (0.01, 0.1, 1.0)
N_CHOICES = 3  # of images, for a fraction below 1
N_EPOCHS = 100  # at least, for a fraction below 1: an epoch of few images is few steps


def add_probe(commands):
    """Add the command probe."""
    parser = commands.add_parser(
        "probe",
        help="the linear probe with few labels",
        description="Fit the linear probe of a finished run to fractions of the labels, from the "
        "stored embeddings, and print its accuracies on all test images. Nothing is trained or "
        "written.",
    )
    parser.add_argument("--exp_dir", required=True, type=files.user_path, help="the run folder")
    parser.add_argument(
        "--label_fractions",
        type=FRACTION.parse,
        nargs="+",
        metavar="FLOAT",
        help="fractions of the training images, equally many of each class (default: 0.01, 0.1 "
        "and 1, as far as each class has one)",
    )
    parser.add_argument("--device", default="auto", help=SETTINGS["device"].help)
    parser.set_defaults(command=probe_command)


def probe_command(args):
    """Print a line for each fraction: the mean of top-1 over the choices of images, its range."""
    run = Run(args.exp_dir).load(args.device)
    encoded = load_embeddings(run)
    _, labels, _, y_test = tensors_of(encoded, "cpu")
    n_classes = len(run.fingerprints["class_names"])
    fractions = args.label_fractions
    if not fractions:
        fractions = [part for part in FRACTIONS if round(part * len(labels)) >= n_classes] or [1.0]
    choices = {}
    for fraction in fractions:
        seeds = [run.hp.seed + i for i in range(N_CHOICES if fraction < 1 else 1)]
        choices[fraction] = [few_labels(labels, fraction, n_classes, seed) for seed in seeds]
    n_eval_epochs = run.hp.n_eval_epochs
    for fraction, indices in choices.items():
        n_epochs = n_eval_epochs if fraction == 1 else max(n_eval_epochs, N_EPOCHS)
        results = [fit_few(run, encoded, index, n_epochs) for index in indices]
        top1, balanced = ([r[name] for r in results] for name in ("top1", "balanced_top1"))
        text = f"{len(indices[0]):7,} labels  top-1 {mean(top1):.2f}%"
        if len(top1) > 1:
            text += f"  {min(top1):.2f} to {max(top1):.2f}, by the choice of images"
        log.info(f"{text}  balanced {mean(balanced):.2f}%")
    log.info(f"linear probe, last epoch, {len(y_test):,} test images")


def load_embeddings(run):
    """Return {split: what artifacts/<split>.pt holds}.

    Raises UsageError unless the run is finished and has labels.
    """
    missing = why_no_probe(run.fingerprints["class_names"], run.fingerprints["test"])
    if missing:
        raise UsageError(f"{run.dir} can't be used with few labels: {missing}")
    return stored_embeddings(run)


def stored_embeddings(run):
    """Return {split: what artifacts/<split>.pt holds}. Raises UsageError if one is not there."""
    encoded = {split: load_if_key(run.artifacts[split], run.key(split)) for split in run.splits}
    if not run.is_trained() or not all(encoded.values()):
        raise UsageError(f"{run.dir} is not finished, or was edited since: resume it first")
    return encoded


def probe_predictions(probe, embeddings):
    """Return (softmax, class), (N,) each, of what the linear probe predicts of embeddings (N, d).

    probe: what probe.pt holds.
    """
    logits = embeddings @ probe["weight"].T + probe["bias"]  # (N, C)
    return logits.softmax(1).max(1)


def few_labels(labels, fraction, n_classes, seed):
    """Return the indices, int64 (n,), of a random, class-balanced fraction of labels (N,).

    Raises UsageError if they are fewer than the classes.
    """
    n = round(fraction * len(labels))
    if n < n_classes:
        way_out = "raise it" if len(labels) >= n_classes else "use a run with more training images"
        raise UsageError(
            f"label_fraction {fraction:g} of {len(labels)} images is {n}, fewer than the "
            f"{n_classes} classes: {way_out}"
        )
    return balanced_subset(labels, len(labels), n, generator(seed, "labels"))


def fit_few(run, encoded, index, n_epochs):
    """Fit the linear probe of a run to an index, int64 (n,), of its labelled training images.

    Return the result of evaluate.linear_probe. Raises RunError if a weight is not finite.
    """
    hp = run.hp
    x, y, x_test, y_test = tensors_of(encoded, run.device)
    index = index.to(run.device)
    n_classes = len(run.fingerprints["class_names"])
    fit = Fit(hp.eval_lr, n_epochs, seed=hp.seed, bf16=run.bf16, standardize=hp.standardize)
    result, layer = linear_probe(x[index], y[index], x_test, y_test, n_classes, fit)
    if not layer.weight.isfinite().all():
        raise RunError(
            f"the weights of the linear probe are not finite with eval_lr {result['lr']:g}: lower "
            f"eval_lr"
        )
    return result
