"""A step of training in one process or several: what test_distributed.py compares.

torchrun runs this file, with arguments PATH OPTIONS OPTIONS ...: it writes {OPTIONS: what
train_one_step returns} to PATH.
"""

import sys
from pathlib import Path

import torch

import cli
from infra import distributed, files
from infra.device import generator
from optimizers import build_optimizer
from train import build_step
from weights import new_encoder

CPU = torch.device("cpu")
SMALL = (
    "--arch resnet18-tiny --h_dim 64 --z_dim 16 --n_patches 4 --bs 16 --optimizer sgd --lr 1e-9 "
    "--precision fp32 --device cpu"
)


def train_one_step(options):
    """Return the metrics and the gradients of a step, in as many processes as torchrun started.

    options: of a train command. Batch norm is in eval mode, since on a CPU each process has its
    own.
    """
    hp = cli.hparams_of(cli.parse(["train", *options.split()]))
    encoder = new_encoder(hp).to(memory_format=torch.channels_last).eval()
    network = distributed.data_parallel(encoder, CPU)
    step = build_step(hp, network, build_optimizer(hp, encoder), bf16=False)
    rng = torch.manual_seed(0)
    images = torch.randint(0, 256, (hp.bs, 3, 32, 32), dtype=torch.uint8, generator=rng)
    metrics = step(distributed.shard(images), generator(0, "patches"))
    gradients = {name: p.grad for name, p in encoder.named_parameters()}
    return {"metrics": metrics, "gradients": gradients}


def difference(a, b):
    """Return the greatest difference of a loss, and of the gradients relative to their norm."""
    gap = sum((a["gradients"][name] - g).square().sum() for name, g in b["gradients"].items())
    norm = sum(g.square().sum() for g in a["gradients"].values())
    losses = a["metrics"] / b["metrics"]
    return (losses[:2] - 1).abs().max().item(), (gap / norm).sqrt().item()


if __name__ == "__main__":
    with distributed.process_group(CPU):
        path, *steps = sys.argv[1:]
        files.write_pt(Path(path), {options: train_one_step(options) for options in steps})
