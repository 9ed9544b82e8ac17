"""One step of training, in as many processes as torchrun starts: python -m tests.one_step PATH OPTION...

The first process writes the metrics and the gradients to PATH. Batch norm is in eval mode, since on a
CPU each process has its own.
"""

import sys
from pathlib import Path

import torch

from infra import distributed, files
from infra.device import generator
from main import hyperparameters, parse
from optimizers import build_optimizer
from train import build_step
from weights import build_encoder

SMALL = ("--arch resnet18-tiny --h_dim 64 --z_dim 16 --n_patches 4 --bs 16 --optimizer sgd --lr 1e-9 --precision fp32 "
         "--device cpu")  # fmt: skip


def main(path, options):
    hp, device = hyperparameters(parse(["train", *SMALL.split(), *options])), torch.device("cpu")
    with distributed.process_group(device):
        encoder = build_encoder(hp, None).to(memory_format=torch.channels_last).eval()
        step = build_step(hp, distributed.data_parallel(encoder, device), build_optimizer(hp, encoder), bf16=False)
        images = torch.randint(0, 256, (hp.bs, 3, 32, 32), dtype=torch.uint8, generator=torch.manual_seed(0))
        metrics = step(distributed.shard(images), generator(0, "patches"))
        gradients = {name: p.grad for name, p in encoder.named_parameters()}
        files.save(path, {"metrics": metrics, "gradients": gradients})


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
