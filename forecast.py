"""What a run will cost: memory, operations and time, before they are spent."""

import copy
import math
import time
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from data import Images
from encode import Output, batch_size, check_views, encode
from evaluate import LRS, PROBE_LR, Fit, inputs_of, knn, softmax_regressions
from experiment import Machine, n_steps_in
from hparams import to_yaml, yaml_value
from images.cache import on_device
from infra import distributed
from infra.console import log
from infra.device import generator, total_memory
from infra.errors import UsageError
from optimizers import build_optimizer
from train import build_step
from weights import new_encoder, random_encoder

# The share of memory that a step with an automatic max_patches may take. The rest is for images,
# other programs and errors of the estimate.
FILL = 0.7
# The most that is alive in the backward pass, relative to what autograd keeps of the forward pass.
# CPU and mps: measured 1.4 to 1.8 of the memory of the process. CUDA: 0.97 to 1.05 of the tensors
# in a simulation (commit fca9469).
BACKWARD = {"cpu": 1.6, "mps": 1.6, "cuda": 1.05}
# The CUDA context, and the workspaces of cuDNN and cuBLAS: an estimate; not measured on a GPU yet.
KERNELS = {"cuda": 1e9}
PAIR_BYTES = 5 * 4  # five float32 matrices are alive at once in contrastive_loss
SAMPLING = 3.2  # times its result are alive at once in patches.render


class StepMemory(NamedTuple):
    """The bytes that a training step takes."""

    per_patch: float
    weights: int
    kernels: float
    pairs: int  # of patches of the whole batch, in the contrastive losses of all stages

    def of(self, n_patches):
        """Return the bytes of a step with so many patches in the network at once."""
        return n_patches * self.per_patch + self.weights + self.kernels + self.pairs


def step_memory(encoder, hp, machine):
    """Return the StepMemory of a run."""
    size, bf16 = hp.patch_size, machine.bf16
    saved = saved_bytes(encoder, 3, size, bf16) - saved_bytes(encoder, 2, size, bf16)
    sampling = SAMPLING * 4 * 3 * size**2  # float32
    n_weights = sum(p.numel() for p in encoder.parameters())
    device = machine.device.type
    pairs = (len(encoder.stage_heads) + 1) * (hp.n_patches * hp.bs) ** 2
    return StepMemory(
        per_patch=max(BACKWARD[device] * saved, sampling),
        weights=4 * 4 * n_weights,  # float32: weights, gradients, momenta; copies in bf16
        kernels=KERNELS.get(device, 0),
        pairs=PAIR_BYTES * pairs * (hp.uniformity_loss == "contrastive"),
    )


def saved_bytes(network, n_images, size, bf16):
    """Return the bytes that autograd keeps between forward and backward, tried on the CPU.

    The batch is n_images images (3, size, size).
    """
    kept = []

    def keep(tensor):
        kept.append(tensor.untyped_storage())
        return tensor

    network = copy.deepcopy(network).cpu().train()  # a copy: batch norm counts what it sees
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        network(torch.zeros(n_images, 3, size, size))
    return sum({storage.data_ptr(): storage.nbytes() for storage in kept}.values())


def check_memory(hp, machine, encoder, pixels):
    """Print how much memory a training step takes. Raises UsageError if there is less.

    pixels: the training images, an ImageFile or uint8 (N, 3, H, W), which are on the device too.
    """
    n = hp.n_patches * distributed.shard_size(hp.bs)
    n = min(n, hp.max_patches or n)
    memory = step_memory(encoder, hp, machine)
    need = memory.of(n) + getattr(pixels, "nbytes", 0)
    there = total_memory(machine.device)
    kernels = f", of which {memory.kernels / 1e9:.1f} GB are for kernels" if memory.kernels else ""
    log.info(
        f"* Memory: about {need / 1e9:.1f} GB for a step of {n} patches{kernels}; "
        f"{there / 1e9:.1f} GB are there"
    )
    if need > there:
        most = most_patches(hp, memory, machine.device)
        if most:
            remedy = f"set max_patches {most}, or lower bs or n_patches"
        else:
            remedy = "take a smaller network or input_size"
        raise UsageError(
            f"a step of {n} patches takes about {need / 1e9:.1f} GB, and {there / 1e9:.1f} GB are "
            f"there: {remedy}"
        )


def automatic_max_patches(hp):
    """Return the max_patches of a new run that names none.

    None if a step of all patches fits into memory, else what fits.
    """
    machine = Machine.of(hp)
    memory = step_memory(random_encoder(hp), hp, machine)
    most = most_patches(hp, memory, machine.device)
    n = hp.n_patches * distributed.shard_size(hp.bs)
    if most in (0, n):  # 0: the check before training says so
        return None
    log.info(
        f"* max_patches: {most} of the {n} patches of a step are in the network at once, since all "
        f"of them do not fit into memory. Each passes twice. hparams.yaml keeps the number"
    )
    return most


def most_patches(hp, memory, device):
    """Return how many patches fit into memory at once; 0 if it is less than 3.

    They are all of a step, or one of chunks of equal size.
    """
    n = hp.n_patches * distributed.shard_size(hp.bs)
    room = FILL * total_memory(device) - memory.of(0)
    fit = int(room / memory.per_patch)
    return math.ceil(n / math.ceil(n / fit)) if fit >= 3 else 0


class Costs(NamedTuple):
    """The seconds that the parts of a run take."""

    step: float  # of training
    encoding: float
    probe: float

    @property
    def after_training(self):
        return self.encoding + self.probe


def dry_run(hp):
    """Print settings, parameters, operations, memory and time of a run; write nothing."""
    distributed.shard_size(hp.bs, hp.n_patches)  # raises UsageError if processes can't share it
    log.info(to_yaml(hp).rstrip())
    machine = Machine.of(hp)
    device = machine.device
    with distributed.process_group(device):
        images = Images(hp)
        n_images = len(images["train"].images)
        encoder = new_encoder(hp).to(device, memory_format=torch.channels_last)
        n_patches = hp.n_patches * hp.bs
        n_steps = n_steps_in(hp.n_epochs, n_images // hp.bs)
        n_weights = sum(p.numel() for p in encoder.parameters())
        operations = flops_per_patch(encoder, hp.patch_size, device) * n_patches
        n_processes = distributed.WORLD_SIZE
        log.info(f"* Device: {device}, processes: {n_processes}, precision: {machine.arithmetic}")
        log.info(f"* Parameters: {n_weights / 1e6:.2f} million")
        log.info(
            f"* Operations: {operations / 1e12:.3g} TFLOP a step in the network, {n_steps} steps "
            f"of {n_patches} patches"
        )
        costs = measure_costs(hp, machine, encoder, images)
    training = costs.step * n_steps
    minutes = (training + costs.after_training) / 60
    log.info(
        f"* Time: {costs.step:.3g} s a step; about {training:.3g} s of training, "
        f"{costs.encoding:.3g} of encoding and {costs.probe:.3g} of the probe; {minutes:.2g} "
        f"minutes in all"
    )


def within_budget(hp, minutes, lighter=()):
    """Return hp with the n_epochs with which a run takes so many minutes in all, and print them.

    A few steps, batches to encode and epochs of the probe are timed. lighter: changes of settings
    that are made in turn, until encoding and the probe take at most two thirds of the time: with
    --preset laptop, mirror images are worth more than as many seconds of training. If they do not
    suffice, n_images is set, too. Raises UsageError if there is no time for training, or with
    several processes.
    """
    if distributed.WORLD_SIZE > 1:
        raise UsageError("--budget measures one process: with torchrun, give --n_epochs")
    start = time.monotonic()
    machine = Machine.of(hp)
    images = Images(hp)
    n_images = len(images["train"].images)
    changed = {}
    most = 2 / 3 * 60 * minutes  # seconds
    for change in ({}, *lighter):
        changed |= change
        hp = replace(hp, **change)
        encoder = new_encoder(hp).to(machine.device, memory_format=torch.channels_last)
        costs = measure_costs(hp, machine, encoder, images)
        if costs.after_training <= most:
            break
    else:
        if lighter and hp.n_images is None:
            n_images, costs = with_fewer_images(most, costs, images)
            changed["n_images"] = n_images
    per_epoch = n_images // hp.bs
    if per_epoch < 1:
        raise UsageError(f"bs {hp.bs} is more than the {n_images} training images: lower it")
    seconds = 60 * minutes - costs.after_training - (time.monotonic() - start)
    n_steps = int(seconds / costs.step)
    times = f"encoding takes about {costs.encoding:.0f} s, the probe {costs.probe:.0f} s"
    if n_steps < 1:
        raise UsageError(
            f"a budget of {minutes:g} minutes is too short: {times}; set a lower --n_images or "
            f"--n_eval_epochs"
        )
    changed["n_epochs"] = round(n_steps / per_epoch, 6)
    settings = ", ".join(f"{name} {yaml_value(value)}" for name, value in changed.items())
    log.info(f"* --budget {minutes:g}: {settings}; {n_steps} steps of {costs.step:.3g} s, {times}")
    return replace(hp, **changed)


def with_fewer_images(seconds, costs, images):
    """Return (number of training images, Costs), so that encoding and the probe take so long.

    The test images are all encoded; at least a tenth of the training images remains.
    """
    n_train = len(images["train"].images)
    n_test = len(images["test"].images) if images["test"] else 0
    per_image = costs.encoding / (n_train + n_test)
    n = int((seconds - n_test * per_image) / (per_image + costs.probe / n_train))
    n = max(n, n_train // 10)
    return n, costs._replace(encoding=(n + n_test) * per_image, probe=costs.probe * n / n_train)


def measure_costs(hp, machine, encoder, images):
    """Return the Costs of a run on this machine. The encoder is trained for some steps.

    images: a data.Images. Raises UsageError if the views do not fit the network, or a step does not
    fit into memory.
    """
    # Before CUDA is used: processes that decode are forked without a context.
    n_images = sum(len(split.images) for split in (images["train"], images["test"]) if split)
    pixels = images["train"].images
    check_views(hp, encoder)
    check_memory(hp, machine, encoder, pixels)
    step = seconds_per_step(hp, machine, encoder, pixels)
    encoding, dim = seconds_per_image(hp, machine, encoder, pixels)
    probe = 0.0
    if images["train"].labels is not None and images["test"]:
        probe = seconds_of_probe(hp, machine, images, dim)
    return Costs(step, n_images * encoding, probe)


def seconds_per_step(hp, machine, encoder, pixels, n_timed=4):
    """Return the seconds of a training step, the mean of n_timed of them."""
    network = distributed.data_parallel(encoder, machine.device)
    if hp.compile:
        network = torch.compile(network)
    optimizer = build_optimizer(hp, encoder, machine.bf16)
    step = build_step(hp, network, optimizer, machine.bf16)
    for i in range(n_timed + 1):
        if i == 1:  # the first step takes longer
            start = time.monotonic()
        batch = distributed.shard(pixels[: hp.bs]).to(machine.device)
        step(batch, generator(0, "dry", step=i)).cpu()
    return (time.monotonic() - start) / n_timed


def seconds_per_image(hp, machine, encoder, pixels):
    """Return (seconds to encode an image, dimensions of its representation)."""
    output = Output(hp.emb_pool, hp.pool_grid, bf16=machine.bf16)
    n = batch_size(hp) * distributed.WORLD_SIZE
    rng = partial(generator, 0, "dry")

    def seconds(n_batches):
        images = on_device(pixels[: n_batches * n], machine.device)
        start = time.monotonic()
        encoded = encode(encoder, images, hp.test_views, rng, batch_size(hp), output)
        return len(images), time.monotonic() - start, encoded["embeddings"].shape[1]

    seconds(1)  # the first batch takes longer
    few, short, dim = seconds(2)
    many, long, _ = seconds(6)
    if many == few:  # there are no more images
        return short / few, dim
    return max(0.0, long - short) / (many - few), dim


def seconds_of_probe(hp, machine, images, dim):
    """Return the seconds of stage 3, from epochs of the probe and neighbours of random vectors.

    Two numbers of them are timed: what both take does not grow with the number of images.
    """
    n_classes = len(images["train"].class_names)
    n_test = len(images["test"].images)
    n_epochs = 2
    fit = Fit(n_epochs=n_epochs, bf16=machine.bf16)
    # The rates are tried, unless one is given, and then one is taken.
    tries = [[PROBE_LR], *([] if hp.eval_lr else [LRS])]

    def seconds_of_neighbours(x, y, n_queries):
        start = time.monotonic()
        knn(x, y, x[:n_queries], y[:n_queries], n_classes, bf16=machine.bf16)
        return time.monotonic() - start

    def seconds(n):
        x = torch.randn(n, dim, device=machine.device)
        y = torch.arange(n, device=machine.device) % n_classes
        start = time.monotonic()
        inputs = inputs_of(x, 0, 1, machine.bf16)
        for lrs in tries:
            for _ in softmax_regressions(inputs, y, lrs, n_classes, fit, range(n_epochs)):
                x.sum().item()  # waits for a GPU
        probe = (time.monotonic() - start) * hp.n_eval_epochs / n_epochs
        few, many = seconds_of_neighbours(x, y, 200), seconds_of_neighbours(x, y, 1000)
        return probe + few + max(0.0, many - few) / 800 * max(0, n_test - 200)

    seconds(1000)  # the first one takes longer
    short, long = seconds(1000), seconds(5000)
    per_image = max(0.0, long - short) / 4000
    return max(0.0, short + per_image * (len(images["train"].images) - 1000))


def flops_per_patch(encoder, size, device):
    """Return the floating-point operations of a patch (3, size, size) in training.

    The backward pass takes twice the forward.
    """
    x = torch.zeros(2, 3, size, size, device=device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy.deepcopy(encoder)(x)  # a copy: batch norm counts what it sees
    return 3 * counter.get_total_flops() / len(x)
