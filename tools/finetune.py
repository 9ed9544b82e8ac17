"""Fine-tune the encoder with few labels, beside the linear probe and the same network from scratch on the same labels."""

import argparse
import functools
import shlex
import time
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from backbones import stages_of
from data import Images
from emp_ssl import load_encoder
from encode import batch_size
from evaluate import accuracy, linear
from experiment import Run, stage_key
from hparams import Hparams, Setting
from infra import distributed, files
from infra.console import log, log_stage, progress
from infra.device import configure, generator, pick_device, pick_precision, without_tuning
from infra.errors import RunError, UsageError
from infra.image_cache import batches, index_for, on_device, subset
from infra.lock import locked
from infra.signals import Interrupted, hold_signals
from model import fold_batch_norm
from optimizers import build_optimizer, learning_rate, load_momenta
from patches import sample_patches, sample_views
from tools.probe import FRACTION, few_labels, fit_few, load_embeddings
from weights import build_encoder, load_strictly

OPTIONS = (
    FRACTION,
    Setting("n_epochs", int, False, 100, "encoder", "passes over these images", low=1, high=100_000),
    Setting("lr", float, False, 0.03, "encoder", "learning rate at the start; a cosine over all steps lowers it to 0", low=0,
            above=True),
    Setting("bs", int, False, 25, "encoder", "batch size; fewer images are one batch", low=2, high=1_000_000),
    Setting("weight_decay", float, False, 1e-4, "encoder", "weight decay", low=0),
    Setting("seed", int, True, None, "data", "seed of the subset, the batches and the patches (default: that of the run)", low=0),
)  # fmt: skip
TITLES = {"finetuned": "fine-tuned", "probe": "linear probe", "from_scratch": "from scratch"}  # of the parts of a result


class Trial(NamedTuple):
    """One fine-tuning of a run."""

    run: Run
    hp: Hparams  # those of the run, with the options of the fine-tuning in place of the training's
    label_fraction: float
    folder: Path
    key: dict  # what the trained weights and their accuracies depend on
    device: torch.device
    bf16: bool
    command: str  # that goes on with it


def add_commands(commands):
    """Add the command finetune."""
    parser = commands.add_parser("finetune", help="train a finished encoder on with few labels", description=(
        "Train the backbone of a finished run and a linear head on a fraction of the labels. Compare with the linear probe, and "
        "with the same network from scratch, on the same labels. Given again, it goes on where it stopped."))  # fmt: skip
    parser.add_argument("--exp_dir", required=True, type=Path, help="the run folder")
    for option in OPTIONS:
        default = "" if option.default is None else f" (default: {option.default})"
        parser.add_argument(f"--{option.name}", type=option.parse, default=option.default, metavar=option.type.__name__.upper(),
                            help=option.help + default)  # fmt: skip
    parser.add_argument("--from_scratch", action=argparse.BooleanOptionalAction, default=True,
                        help="train the same network from random weights too (default), or not")  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto (cuda, mps or cpu), cpu, mps, cuda or cuda:N")
    parser.set_defaults(command=finetune_command)


def finetune_command(args):
    """Write the result into a folder of the run's finetune/, unless it is there already, and print it."""
    if distributed.WORLD_SIZE > 1:
        raise UsageError("finetune runs in one process: start it without torchrun")
    device, run = pick_device(args.device), Run(args.exp_dir)
    run.read_hparams()  # before the lock is made: exp_dir must be a run folder
    with locked(run.lock):
        hp, checkpoint, encoder = load_encoder(run.dir)
        encoded = load_embeddings(run, hp, checkpoint)
        configure(device, hp.deterministic)
        trial = plan(run, hp, checkpoint, device, args)
        encoders = {"finetuned": encoder}
        if args.from_scratch:
            encoders["from_scratch"] = build_encoder(trial.hp, None)
        path = trial.folder / "result.json"
        result, key = files.read_sealed(path), {**trial.key, **trial.hp.key("probe", trial.key["encoder"])}
        if result.get("key") != key or not result.keys() >= encoders.keys():
            result = {"key": key, **measure(trial, encoders, encoded, Images(hp, checkpoint["data"]))}
            files.remove(trial.folder / "checkpoint.pt")
            files.write_json(path, files.sealed(result))
        log_result(result, trial.folder)


def plan(run, hp, checkpoint, device, args):
    """Return the Trial of a command line."""
    options = {option.name: getattr(args, option.name) for option in OPTIONS}
    options["seed"] = hp.seed if args.seed is None else args.seed
    folder = run.finetune / "_".join(f"{name}{value}" for name, value in options.items())
    fraction = options.pop("label_fraction")
    hp = replace(hp, optimizer="sgd", schedule="cosine", weights=None, pretrained_proj=None, **options)
    key = {**stage_key(hp, checkpoint, "encode"), "label_fraction": fraction}
    bf16 = pick_precision(hp.precision, device) == "bf16"
    return Trial(run, hp, fraction, folder, key, device, bf16, shlex.join(["python", "main.py", *args.argv]))


def measure(trial, encoders, encoded, images):
    """Return the result: a dict with the accuracies of the encoders, {name: encoder}, fine-tuned, and of the linear probe."""
    labels, class_names = encoded["train"]["labels"], images.expected["class_names"]
    index = few_labels(labels, trial.label_fraction, len(class_names), trial.hp.seed)
    trial.folder.mkdir(parents=True, exist_ok=True)
    for leftover in trial.folder.glob("*.tmp"):  # of a process that was killed
        leftover.unlink()
    result = {"n_labels": len(index), "n_train": len(labels), "n_test": len(encoded["test"]["labels"])}
    for name, encoder in encoders.items():
        key = {**trial.key, "start": name}
        compute = functools.partial(train_and_score, trial, key, encoder, images, index)
        result[name] = trial.run.cached(trial.folder / f"{name}.pt", key, compute)["result"]
    result["probe"] = probe(trial, encoded, index)
    return result


def probe(trial, encoded, index):
    """Return the accuracies of the linear probe on the embeddings of the labelled images."""
    log_stage(f"Fitting a linear classifier to {len(index)} labels")
    hp = trial.hp
    n_epochs = max(hp.n_eval_epochs, int(hp.n_epochs))  # a pass over few labels is few steps: as many passes as fine-tuning has
    result = fit_few(hp, encoded, index, n_epochs, trial.device, trial.bf16)
    return {name: result[name] for name in ("top1", "top5", "train_top1", "lr", "held_out")}


def train_and_score(trial, key, encoder, images, index):
    """Train the encoder's backbone and a linear head on the images of an index. Return what <name>.pt holds: weights, with
    torchvision's names, class_names, and result, the accuracies in percent."""
    log_stage(f"Training on {len(index)} labels, {TITLES[key['start']]}")
    (pixels, labels, class_names), test_set, device = images["train"], images["test"], trial.device
    network = classifier(encoder, len(class_names)).to(device, memory_format=torch.channels_last)
    fit(trial, key, network, on_device(subset(pixels, index), device), labels[index].to(device))
    scores = predict(network, on_device(test_set.images, device), trial.hp, trial.bf16)
    top1, top5 = accuracy(nn.Identity(), scores, test_set.labels.to(device))
    return {"weights": network.state_dict(), "class_names": class_names, "result": {"top1": top1, "top5": top5}}


def classifier(encoder, n_classes):
    """Return the encoder's backbone with a linear layer, fc, of zeros: (N, 3, S, S) -> logits (N, n_classes)."""
    dim = encoder.features[0].in_features
    head = linear(torch.zeros(n_classes, dim), torch.zeros(n_classes)).requires_grad_()
    if not stages_of(encoder.backbone):  # of timm
        return nn.Sequential(OrderedDict(backbone=encoder.backbone, fc=head))
    encoder.backbone.fc = head
    return encoder.backbone


def fit(trial, key, network, images, labels):
    """Train the network in place on uint8 images (n, 3, H, W) and labels (n,), from checkpoint.pt if that has the key.

    Each step depends only on the state, the seed and the step, so a fine-tuning that was stopped ends with the same bits as one
    that was not. Raises RunError if a weight is not finite, and Interrupted after a signal, when the checkpoint is written.
    """
    hp, path = trial.hp, trial.folder / "checkpoint.pt"
    bs = min(hp.bs, len(labels))
    n_steps = len(labels) // bs  # in an epoch
    total = int(hp.n_epochs) * n_steps
    optimizer = build_optimizer(hp, network)
    done = restore(trial.run, path, key, network, optimizer)
    network.train()
    saved_at = time.monotonic()
    with hold_signals() as signals:
        steps = progress(range(done, total), TITLES[key["start"]], hp.print_freq, "images", bs)
        for step, (x, y) in zip(steps, labelled_patches(hp, images, labels, bs, done), strict=False):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(hp, step / total)
            train_step(network, optimizer, x, y, trial.bf16)
            done, stop = step + 1, bool(signals)
            if stop or done % n_steps == 0 or time.monotonic() - saved_at > hp.checkpoint_every:
                save(path, key, network, optimizer, done)
                saved_at = time.monotonic()
            if stop:
                break
    if signals:  # also one that came after the last look
        raise Interrupted(signals[0], f"stopped at step {done} of {total}; go on with: {trial.command}")


def save(path, key, network, optimizer, done):
    """Write weights and momenta after so many steps. Raises RunError, and writes nothing, if a weight is not finite."""
    if not all(value.isfinite().all() for value in network.state_dict().values()):
        raise RunError(f"step {done}: weights are not finite: give a lower --lr")
    files.save(path, {"network": network.state_dict(), "momenta": optimizer.state_dict()["state"], "step": done, "key": key})


def restore(run, path, key, network, optimizer):
    """Load the weights and momenta of a checkpoint that has this key. Return its steps, 0 if there is none."""
    content = run.load_cached(path, key)
    if content is None:
        return 0
    load_strictly(network, content["network"], path)
    load_momenta(optimizer, content["momenta"])
    return content["step"]


def labelled_patches(hp, images, labels, bs, first):
    """Yield (x, y) of each step from step `first` on: an augmented patch of each image, (bs, 3, S, S), and the labels (bs,)."""
    device, n = labels.device, len(labels)
    n_steps = n // bs
    size = hp.input_size or images.shape[-1]
    for epoch in range(first // n_steps, int(hp.n_epochs)):
        order = torch.randperm(n, generator=generator(hp.seed, "finetune-order", epoch))
        start = max(0, first - epoch * n_steps)
        rows = [order[i * bs : (i + 1) * bs] for i in range(start, n_steps)]
        pixels = batches(images, [index_for(images, row, device) for row in rows], device)
        for i, (batch, row) in enumerate(zip(pixels, rows, strict=True), start):
            rng = generator(hp.seed, "finetune-patches", epoch, i)
            yield sample_patches(batch, 1, rng, size, augment=hp.augment)[0], labels[index_for(labels, row, device)]


def train_step(network, optimizer, x, y, bf16):
    """Lower the cross entropy of a batch: x (B, 3, S, S), y (B,)."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        logits = network(x)  # (B, C)
    optimizer.zero_grad()
    F.cross_entropy(logits.float(), y).backward()
    optimizer.step()


@torch.inference_mode()
@without_tuning()
def predict(network, images, hp, bf16):
    """Return the mean over the views of each image of the softmax of the logits, float32 (N, C).

    The views are those that encode an image: a patch in training is cut as they are, a quarter of the area.
    """
    device, dtype = next(network.parameters()).device, torch.bfloat16 if bf16 else torch.float32
    network = fold_batch_norm(network).to(dtype, memory_format=torch.channels_last)
    views = hp.test_views
    bs = batch_size(hp)
    slices = [slice(i, i + bs) for i in range(0, len(images), bs)]
    scores = []
    for step, batch in enumerate(batches(images, slices, device)):
        x = sample_views(batch, views, generator(hp.seed, "finetune-views", step=step))  # (V, B, 3, S, S)
        logits = network(x.flatten(0, 1).to(dtype, memory_format=torch.channels_last))  # (V B, C)
        scores.append(logits.float().softmax(1).unflatten(0, x.shape[:2]).mean(0))  # (B, C)
    return torch.cat(scores)


def log_result(result, folder):
    """Print the accuracies side by side."""
    log_stage("Report")
    log.info(f"labels           {result['n_labels']} of {result['n_train']} training images")
    for name, title in TITLES.items():
        if name in result:
            log.info(f"{title:16} top-1 {result[name]['top1']:.2f}%  top-5 {result[name]['top5']:.2f}%")
    log.info(f"                 of {result['n_test']} test images, last epoch")
    log.info(f"files            {folder}")
