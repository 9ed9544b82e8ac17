"""What a training will take: steps, memory and time, told before it is spent."""

from experiment import n_steps_in
from infra import distributed
from infra.console import log, time_left
from infra.device import step_memory, total_memory

FEW_STEPS = 100


def warn_of_few_steps(hp, n_images):
    """Warn if training will have fewer than FEW_STEPS steps."""
    n_steps = n_steps_in(hp.n_epochs, n_images // hp.bs)
    if 0 < n_steps < FEW_STEPS:
        log.warning(f"{n_images} images, {n_steps} steps of training in all: this teaches little; raise n_epochs or lower bs "
                    f"(more patches add no steps)")  # fmt: skip


def log_memory(hp, encoder, pixels, bf16):
    """Print how much memory a training step will take and how much there is, with a warning if that is less."""
    n, device = hp.n_patches * distributed.shard_size(hp.bs), next(encoder.parameters()).device
    n = min(n, hp.max_patches or n)
    step, beside = step_memory(encoder, n, hp.input_size or pixels.shape[-1], bf16)
    need, there = step + beside + getattr(pixels, "nbytes", 0), total_memory(device)
    text = f", of which {beside / 1e9:.1f} GB are for kernels" if beside else ""
    log.info(f"* Memory: about {need / 1e9:.1f} GB for a step of {n} patches{text}; {there / 1e9:.1f} GB are there")
    if need > there:
        log.warning("that is more than there is: lower bs, n_patches or max_patches, or take precision bf16")


def tell_end(seconds, device):
    """Print how long training will take, and on a CPU, if that is over an hour, what would be quicker."""
    log.info(f"* Training will take about {time_left(seconds, 1)} from here on")
    if device.type == "cpu" and seconds > 3600:
        log.info("* Quicker on a CPU: --preset laptop, or fewer images by --n_images")
