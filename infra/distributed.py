"""Several processes, started by torchrun, each with its shard of every batch.

With one process nothing here has an effect.
"""

import functools
import os
import signal
import time
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist

from infra.errors import UsageError
from infra.signals import watch

LAUNCHED = dist.is_torchelastic_launched()
RANK = int(os.environ["RANK"]) if LAUNCHED else 0
WORLD_SIZE = int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1


def on_main_process(function):
    """Decorate a function that writes: the other processes do nothing and return None."""
    return function if RANK == 0 else functools.wraps(function)(lambda *args, **kwargs: None)


def local_device(name):
    """Return the name of this process's device: the GPU of its local rank.

    Raises UsageError if all would share one.
    """
    if WORLD_SIZE > 1 and name.startswith("cuda:"):
        raise UsageError(
            f"device {name} would put all {WORLD_SIZE} processes on one GPU: device cuda gives "
            f"each its own"
        )
    if LAUNCHED and name in ("cuda", "auto") and torch.cuda.is_available():
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return name


@contextmanager
def process_group(device):
    """Join the process group: NCCL between CUDA devices, gloo between CPUs."""
    if LAUNCHED:
        watch(os.getppid(), stop)
    if WORLD_SIZE > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        if WORLD_SIZE > 1:
            dist.destroy_process_group()


def stop(seconds=60):
    """Stop this process as SIGTERM does, and at once if it does not stop in so many seconds.

    torchrun has ended and left it alone.
    """
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(seconds)
    os._exit(128 + signal.SIGTERM)


def data_parallel(encoder, device):
    """Return the encoder with gradients averaged over the processes.

    On CUDA, batch norm is over the whole batch.
    """
    if WORLD_SIZE == 1:
        return encoder
    if device.type == "cuda":
        encoder = torch.nn.SyncBatchNorm.convert_sync_batchnorm(encoder)
    return torch.nn.parallel.DistributedDataParallel(
        encoder, [device] if device.type == "cuda" else None
    )


def no_sync(network, enabled):
    """If enabled, backward passes in the block accumulate gradients without averaging them."""
    return network.no_sync() if WORLD_SIZE > 1 and enabled else nullcontext()


def shard_size(bs, n_patches=2):
    """Return how many of bs images each process takes.

    Raises UsageError unless bs is a multiple of the processes, and if a process would get a single
    patch.
    """
    if bs % WORLD_SIZE:
        raise UsageError(
            f"bs {bs} must be a multiple of the {WORLD_SIZE} processes, which share a batch"
        )
    if bs // WORLD_SIZE * n_patches < 2:
        raise UsageError(
            f"bs {bs} with n_patches {n_patches} leaves batch norm a single patch in each of "
            f"{WORLD_SIZE} processes"
        )
    return bs // WORLD_SIZE


def shard(items):
    """Return this process's part of a tensor or sequence.

    They are consecutive items, as many as the others have, or one more.
    """
    n = len(items)
    return items[RANK * n // WORLD_SIZE : (RANK + 1) * n // WORLD_SIZE]


def shard_offset(n):
    """Return (index in the batch of the first image of this process's shard of n, batch size)."""
    return RANK * n, WORLD_SIZE * n


class _AllGather(torch.autograd.Function):
    """Concatenate the shards of all processes along dimension 1.

    Each process computes the same loss of all z, so the gradient of its own shard is a slice of the
    whole gradient. It is multiplied by the number of processes, because DistributedDataParallel
    averages gradients that must be summed.
    """

    @staticmethod
    def forward(ctx, z):
        parts = [torch.empty_like(z) for _ in range(WORLD_SIZE)]
        dist.all_gather(parts, z.contiguous())
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx, grad):
        return WORLD_SIZE * grad.chunk(WORLD_SIZE, 1)[RANK]


def all_gather(z):
    """Return z of the whole batch, with gradient; the same in all processes.

    (P, B / processes, d) -> (P, B, d).
    """
    return z if WORLD_SIZE == 1 else _AllGather.apply(z)


def broadcast_buffers(encoder):
    """Copy the main process's batch-norm statistics to all.

    On CPUs each process has followed its own shard.
    """
    if WORLD_SIZE > 1:
        for buffer in encoder.buffers():
            dist.broadcast(buffer, 0)


def all_reduce_sum(tensor):
    """Sum the tensor over the processes, in place, and return it."""
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(*numbers):
    """Return the maximum of each integer over the processes.

    It runs on the CPUs and does not wait for a GPU.
    """
    if WORLD_SIZE > 1:
        numbers = torch.tensor(numbers)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return [int(number) for number in numbers]


def barrier():
    """Wait until all processes are here."""
    all_reduce_max(0)


@contextmanager
def main_process_first():
    """Run the block in the main process first.

    Then the others run it, and find what it wrote. They wait up to a day.
    """
    group = dist.new_group(backend="gloo", timeout=timedelta(days=1)) if WORLD_SIZE > 1 else None
    if WORLD_SIZE > 1 and RANK != 0:
        dist.barrier(group)
    try:
        yield
    finally:
        if WORLD_SIZE > 1 and RANK == 0:
            dist.barrier(group)
