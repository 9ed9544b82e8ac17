"""What a training will take: steps, memory and time, told before it is spent."""

import math

from experiment import n_steps_in
from infra import distributed
from infra.console import log, time_left
from infra.device import pick_device, pick_precision, step_memory, total_memory
from infra.errors import UsageError
from model import Encoder

FEW_STEPS = 50
FILL = 0.7  # of the memory, for a step with an automatic max_patches; images, other programs and errors of the estimate need some


def warn_of_few_steps(hp, n_images):
    """Warn if training will have fewer than FEW_STEPS steps."""
    n_steps = n_steps_in(hp.n_epochs, n_images // hp.bs)
    if 0 < n_steps < FEW_STEPS:
        log.warning(f"{n_images} images, {n_steps} steps of training in all: this teaches little; raise n_epochs or lower bs "
                    f"(more patches add no steps)")  # fmt: skip


def check_memory(hp, encoder, pixels, device, bf16):
    """Print how much memory a training step takes and how much there is. Raises UsageError if that is less.

    pixels: the training images, an ImageFile or uint8 (N, 3, H, W), which are on the device too.
    """
    n = hp.n_patches * distributed.shard_size(hp.bs)
    n = min(n, hp.max_patches or n)
    per_patch, weights, kernels = step_memory(encoder, hp.patch_size, bf16, device)
    need, there = n * per_patch + weights + kernels + getattr(pixels, "nbytes", 0), total_memory(device)
    text = f", of which {kernels / 1e9:.1f} GB are for kernels" if kernels else ""
    log.info(f"* Memory: about {need / 1e9:.1f} GB for a step of {n} patches{text}; {there / 1e9:.1f} GB are there")
    if need > there:
        most = most_patches(hp, encoder, device, bf16)
        remedy = f"set max_patches {most}, or lower bs or n_patches" if most else "take a smaller network or input_size"
        raise UsageError(f"a step of {n} patches takes about {need / 1e9:.1f} GB, and {there / 1e9:.1f} GB are there: {remedy}")


def automatic_max_patches(hp):
    """Return the max_patches of a new run that names none: None if a step of all patches fits into memory, else what fits."""
    n, device = hp.n_patches * distributed.shard_size(hp.bs), pick_device(distributed.local_device(hp.device))
    bf16 = pick_precision(hp.precision, device) == "bf16"
    encoder = Encoder(hp.arch, hp.h_dim, hp.z_dim, hp.activation, hp.batch_norm, hp.patch_size)
    most = most_patches(hp, encoder, device, bf16)
    if most in (0, n):  # none: the check before training says so
        return None
    log.info(f"* max_patches: {most} of the {n} patches of a step are in the network at once, since all of them do not fit into "
             f"memory. Each passes twice. hparams.yaml keeps the number")  # fmt: skip
    return most


def most_patches(hp, encoder, device, bf16):
    """Return how many patches fit into memory at once: of a step or of chunks of equal size; 0 if it is less than 3."""
    per_patch, weights, kernels = step_memory(encoder, hp.patch_size, bf16, device)
    n = hp.n_patches * distributed.shard_size(hp.bs)
    fit = int((FILL * total_memory(device) - weights - kernels) / per_patch)
    return math.ceil(n / math.ceil(n / fit)) if fit >= 3 else 0


def tell_end(seconds, device):
    """Print how long training will take, and on a CPU, if that is over an hour, what would be quicker."""
    log.info(f"* Training will take about {time_left(seconds, 1)} from here on")
    if device.type == "cpu" and seconds > 3600:
        log.info("* Quicker on a CPU: --preset laptop, or fewer images by --n_images")
