"""Predict size, memory and time of a run after a few steps of it. `train --dry_run` calls it; nothing is written."""

import copy
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from data import Images
from experiment import n_steps_in
from forecast import check_memory
from hparams import to_yaml
from infra import distributed
from infra.console import log
from infra.device import arithmetic, configure, generator, pick_device, pick_precision
from infra.image_cache import on_device
from train import build_optimizer, build_step
from weights import build_encoder


def dry_run(hp, n_timed=3):
    """Print the settings, and parameters, operations, memory and time of a training step, of which n_timed are timed."""
    distributed.shard_size(hp.bs, hp.n_patches)  # raises UsageError if the processes can't share it
    log.info(to_yaml(hp).rstrip())
    device = pick_device(distributed.local_device(hp.device))
    precision = pick_precision(hp.precision, device)
    configure(device, hp.deterministic)
    with distributed.process_group(device):
        pixels = on_device(Images(hp)["train"].images, device)
        encoder = build_encoder(hp, None).to(device, memory_format=torch.channels_last)
        n_patches, n_steps = hp.n_patches * hp.bs, n_steps_in(hp.n_epochs, len(pixels) // hp.bs)
        operations = flops_per_patch(encoder, hp.input_size or pixels.shape[-1]) * n_patches
        log.info(f"* Device: {device}, processes: {distributed.WORLD_SIZE}, precision: {arithmetic(precision, device)}")
        log.info(f"* Parameters: {sum(p.numel() for p in encoder.parameters()) / 1e6:.2f} million")
        log.info(f"* Operations: {operations / 1e12:.3g} TFLOP a step in the network, {n_steps} steps of {n_patches} patches")
        check_memory(hp, encoder, pixels, device, precision == "bf16")
        network, optimizer = distributed.data_parallel(encoder, device), build_optimizer(hp, encoder, precision == "bf16")
        step = build_step(hp, torch.compile(network) if hp.compile else network, optimizer, precision == "bf16")
        for i in range(n_timed + 1):
            if i == 1:  # the first step takes longer
                start = time.monotonic()
            step(distributed.shard(pixels[: hp.bs]).to(device), generator(0, "dry", step=i)).cpu()
        seconds = (time.monotonic() - start) / n_timed
    log.info(f"* Time: {seconds:.3g} s a step, about {seconds * n_steps / 60:.3g} minutes of training; encoding takes a third of "
             f"that per patch")  # fmt: skip


def flops_per_patch(encoder, size):
    """Return the floating-point operations of a patch of this size in training: the backward pass takes twice the forward."""
    x = torch.zeros(2, 3, size, size, device=next(encoder.parameters()).device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy.deepcopy(encoder)(x)  # a copy: batch norm counts what it sees
    return 3 * counter.get_total_flops() / len(x)
