"""Fine-tune the encoder with few labels, beside the linear probe and training from scratch."""

import argparse
from collections import OrderedDict
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from data import Images, labelled, select
from encode import batch_size
from evaluate import accuracy, accuracy_text, linear, tensors_of
from experiment import Run, load_or_compute, quote, stage_key
from hparams import SETTINGS, Hparams
from images.cache import batches, index_for, on_device
from infra import distributed, files
from infra.console import log, log_stage, progress
from infra.device import generator, without_tuning
from infra.errors import RunError, UsageError
from infra.lock import locked
from model import STAGE_POOLS, fold_batch_norm, stages_of
from optimizers import build_optimizer, learning_rate, set_learning_rate
from patches import sample_patches, sample_views
from tools.probe import FRACTION, few_labels, fit_few, load_embeddings
from weights import build_encoder, new_encoder

# Of the parts of a result, in the order of the report.
TITLES = {"finetuned": "fine-tuned", "probe": "linear probe", "from_scratch": "from scratch"}
OPTIONS = ("label_fraction", "n_epochs", "lr", "bs", "weight_decay", "seed")


class Trial(NamedTuple):
    """One fine-tuning of a run."""

    run: Run
    hp: Hparams  # those of the run, but the options of training are those of the fine-tuning
    label_fraction: float
    folder: Path
    key: dict  # what the trained weights and their accuracies depend on


def add_finetune(commands):
    """Add the command finetune."""
    parser = commands.add_parser(
        "finetune",
        help="train a finished encoder on with few labels",
        description="Train the backbone of a finished run and a linear head on a fraction of the "
        "labels. Compare with the linear probe, and with the same network from scratch, on the "
        "same labels.",
    )
    add = parser.add_argument
    add("--exp_dir", required=True, type=files.user_path, help="the run folder")
    add(
        "--label_fraction",
        type=FRACTION.parse,
        default=1.0,
        metavar="FLOAT",
        help="fraction of the training images whose labels are used, equally many of each class "
        "(default: 1.0)",
    )
    add(
        "--n_epochs",
        type=SETTINGS["n_eval_epochs"].parse,
        default=100,
        metavar="INT",
        help="passes over these images (default: 100)",
    )
    add(
        "--lr",
        type=SETTINGS["lr"].parse,
        default=0.03,
        metavar="FLOAT",
        help="learning rate at the start; a cosine over all steps lowers it to 0 (default: 0.03)",
    )
    add(
        "--bs",
        type=SETTINGS["bs"]._replace(low=2).parse,
        default=25,
        metavar="INT",
        help="batch size; fewer images are one batch (default: 25)",
    )
    add(
        "--weight_decay",
        type=SETTINGS["weight_decay"].parse,
        default=1e-4,
        metavar="FLOAT",
        help="weight decay (default: 0.0001)",
    )
    add(
        "--seed",
        type=SETTINGS["seed"].parse,
        metavar="INT",
        help="seed of the subset, the batches and the patches (default: that of the run)",
    )
    add(
        "--from_scratch",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="train the same network from random weights too (default), or not",
    )
    add("--device", default="auto", help=SETTINGS["device"].help)
    parser.set_defaults(command=finetune_command)


def finetune_command(args):
    """Print the result, and write it into a folder of the run's finetune/ unless it is there."""
    if distributed.WORLD_SIZE > 1:
        raise UsageError("finetune runs in one process: start it without torchrun")
    run = Run(args.exp_dir)
    run.read_hparams()  # before the lock is made: exp_dir must be a run folder
    with locked(run.lock):
        run.load(args.device)
        encoded = load_embeddings(run)
        trial = trial_of(run, args)
        starts = {"finetuned": partial(build_encoder, run)}
        if args.from_scratch:
            starts["from_scratch"] = partial(new_encoder, trial.hp)
        path = trial.folder / "result.json"
        result = files.read_sealed(path)
        key = {**trial.key, **trial.hp.key("probe", trial.key["encoder"])}
        if result.get("key") != key or not result.keys() >= starts.keys():
            result = {"key": key, **compare_starts(trial, starts, encoded)}
            files.write_json(path, files.sealed(result))
        log_result(result, trial.folder)
        log_use(result, trial)


def trial_of(run, args):
    """Return the Trial of a command line."""
    options = {name: getattr(args, name) for name in OPTIONS}
    if options["seed"] is None:
        options["seed"] = run.hp.seed
    folder = run.finetune / "_".join(f"{name}{value}" for name, value in options.items())
    fraction = options.pop("label_fraction")
    hp = replace(
        run.hp, optimizer="sgd", schedule="cosine", weights=None, pretrained_proj=None, **options
    )
    key = {**stage_key(hp, run.checkpoint, "encode"), "label_fraction": fraction}
    return Trial(run, hp, fraction, folder, key)


def compare_starts(trial, starts, encoded):
    """Return the accuracies of the encoders, fine-tuned, and of the linear probe, as a dict.

    starts: {name: function that returns the encoder to begin with}.
    """
    run = trial.run
    _, labels, _, y_test = tensors_of(encoded, "cpu")
    n_classes = len(run.fingerprints["class_names"])
    index = few_labels(labels, trial.label_fraction, n_classes, trial.hp.seed)
    result = {
        "n_labels": len(index),
        "n_train": len(labels),
        "n_test": len(y_test),
        "probe": probe_few(trial, encoded, index),  # before training, which takes longer
    }
    images = Images(run.hp, run.fingerprints, run.images_changed())
    trial.folder.mkdir(parents=True, exist_ok=True)
    files.remove_temporary(trial.folder)
    for name, start in starts.items():
        key = {**trial.key, "start": name}
        compute = partial(train_and_score, trial, name, start, images, index)
        result[name] = load_or_compute(trial.folder / f"{name}.pt", key, compute)["result"]
    return result


def probe_few(trial, encoded, index):
    """Return the accuracies of the linear probe on the embeddings of the labelled images."""
    log_stage(f"Fitting a linear classifier to {len(index)} labels")
    # An epoch of few labels is few steps: use at least as many epochs as fine-tuning.
    n_epochs = max(trial.hp.n_eval_epochs, int(trial.hp.n_epochs))
    result = fit_few(trial.run, encoded, index, n_epochs)
    return {name: result[name] for name in ("top1", "top5", "train_top1", "lr", "held_out")}


def train_and_score(trial, name, start, images, index):
    """Train a backbone and a linear head on an index, int64 (n,), of the labelled images.

    Return what <name>.pt holds: weights, with torchvision's names, class_names, and result, the
    accuracies in percent.
    """
    log_stage(f"Training on {len(index)} labels, {TITLES[name]}")
    device = trial.run.device
    train_set = select(labelled(images["train"]), index)
    test_set = labelled(images["test"])
    class_names = train_set.class_names
    network = classifier(start(), len(class_names))
    network = network.to(device, memory_format=torch.channels_last)
    finetune(trial, network, on_device(train_set.images, device), train_set.labels.to(device))
    scores = predict(trial.hp, trial.run.machine, network, on_device(test_set.images, device))
    top1, top5 = accuracy(nn.Identity(), scores, test_set.labels.to(device))
    result = {"top1": top1, "top5": top5}
    return {"weights": network.state_dict(), "class_names": class_names, "result": result}


def classifier(encoder, n_classes):
    """Return the encoder's backbone with a linear layer, fc, of zeros.

    (N, 3, S, S) -> logits (N, n_classes).
    """
    dim = encoder.features[0].in_features
    head = linear(torch.zeros(n_classes, dim), torch.zeros(n_classes)).requires_grad_()
    if not stages_of(encoder.backbone):  # of timm
        return nn.Sequential(OrderedDict(backbone=encoder.backbone, fc=head))
    encoder.backbone.fc = head
    return encoder.backbone


def finetune(trial, network, images, labels):
    """Train the network in place on uint8 images (n, 3, H, W) and labels (n,).

    Each step depends only on the weights, the seed and the step. Raises RunError if a weight is not
    finite.
    """
    hp = trial.hp
    bs = min(hp.bs, len(labels))
    n_total = int(hp.n_epochs) * (len(labels) // bs)
    optimizer = build_optimizer(hp, network)
    network.train()
    steps = progress(range(n_total), "fine-tuning", hp.print_freq, "images", bs)
    for step, (x, y) in zip(steps, labelled_patches(hp, images, labels, bs), strict=False):
        set_learning_rate(optimizer, learning_rate(hp, step / n_total))
        with torch.autocast(x.device.type, torch.bfloat16, enabled=trial.run.bf16):
            logits = network(x)  # (bs, C)
        optimizer.zero_grad()
        F.cross_entropy(logits.float(), y).backward()
        optimizer.step()
    if not all(value.isfinite().all() for value in network.state_dict().values()):
        raise RunError("weights are not finite after fine-tuning: give a lower --lr")


def labelled_patches(hp, images, labels, bs):
    """Yield (x, y) of each step: an augmented patch of each image, (bs, 3, S, S), and labels."""
    device = labels.device
    n = len(labels)
    for epoch in range(int(hp.n_epochs)):
        order = torch.randperm(n, generator=generator(hp.seed, "finetune-order", epoch))
        rows = [order[i * bs : (i + 1) * bs] for i in range(n // bs)]
        index = [index_for(images, row, device) for row in rows]
        for i, batch in enumerate(batches(images, index, device)):
            rng = generator(hp.seed, "finetune-patches", epoch, i)
            x = sample_patches(batch, 1, rng, hp.patch_size, augment=hp.augment)[0]
            yield x, labels[index_for(labels, rows[i], device)]


@torch.inference_mode()
@without_tuning()
def predict(hp, machine, network, images):
    """Return the mean over the views of each image of the softmax of the logits, float32 (N, C).

    The views are those that encode an image, at the scale of the patches that train the network.
    """
    dtype = torch.bfloat16 if machine.bf16 else torch.float32
    network = fold_batch_norm(network).to(dtype, memory_format=torch.channels_last)
    bs = batch_size(hp)
    slices = [slice(i, i + bs) for i in range(0, len(images), bs)]
    scores = []
    for step, batch in enumerate(batches(images, slices, machine.device)):
        rng = generator(hp.seed, "finetune-views", step=step)
        x = sample_views(batch, hp.test_views, rng)  # (V, B, 3, S, S)
        V, B = x.shape[:2]
        x = x.flatten(0, 1).to(dtype, memory_format=torch.channels_last)  # (V B, 3, S, S)
        p = network(x).float().softmax(1)  # (V B, C)
        scores.append(p.view(V, B, -1).mean(0))
    return torch.cat(scores)


def log_result(result, folder):
    """Print the accuracies side by side."""
    log_stage("Report")
    n_labels, n_train = result["n_labels"], result["n_train"]
    log.info(f"labels           {n_labels} of {n_train} training images that have one")
    for name, title in TITLES.items():
        if name in result:
            log.info(f"{title:16} {accuracy_text(result[name], result['key'])}")
    log.info(f"                 of {result['n_test']} test images, last epoch")
    log.info(f"files            {folder}")


def log_use(result, trial):
    """Print whether the linear probe is better, and how to use the fine-tuned backbone."""
    if result["probe"]["top1"] > result["finetuned"]["top1"]:
        log.info("better           the linear probe: with these labels, use the run as it is")
    hp = trial.run.hp
    # Its feature layer has not been trained with it.
    pool = "" if hp.emb_pool in ("backbone", *STAGE_POOLS) else " --emb_pool backbone"
    exp_dir, weights = quote(trial.run.dir), quote(trial.folder / "finetuned.pt")
    log.info(
        f"encode by it     python main.py train --exp_name NEW --config_from {exp_dir} --weights "
        f"{weights} --n_epochs 0{pool}"
    )
