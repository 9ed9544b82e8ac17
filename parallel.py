"""Several processes, on one machine or more, that torchrun started: each trains on its part of every batch.

    torchrun --nproc_per_node=2 main.py train ...

With one process nothing of this does anything.
"""

import os
from contextlib import contextmanager

import torch
import torch.distributed as dist

LAUNCHED = dist.is_torchelastic_launched()
RANK = int(os.environ["RANK"]) if LAUNCHED else 0
WORLD = int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1
FIRST = RANK == 0  # the one that writes and prints


def own_device(name):
    """The GPU of this process: of those of its machine the one of its number."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if LAUNCHED and name in ("cuda", "auto") and torch.cuda.is_available() else name


def name():
    """Which process this is, where there are several."""
    return f"process {RANK}: " if WORLD > 1 else ""


@contextmanager
def processes(device):
    """Meet the other processes; NCCL between CUDA devices, gloo between CPUs."""
    if WORLD == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def wrapped(encoder, device):
    """The encoder with gradients averaged over the processes and, on CUDA, batch norm over the whole batch."""
    if WORLD == 1:
        return encoder
    if device.type == "cuda":
        encoder = torch.nn.SyncBatchNorm.convert_sync_batchnorm(encoder)
    return torch.nn.parallel.DistributedDataParallel(encoder, [device] if device.type == "cuda" else None)


def own(batch):
    """The part of a batch that is this process's: the same number of rows for each."""
    return batch if WORLD == 1 else batch.chunk(WORLD)[RANK]


@contextmanager
def averaging(network, now):
    """Backward passes within leave their gradients to be averaged with those of a later one, unless `now`."""
    if WORLD == 1 or now:
        yield
        return
    with network.no_sync():
        yield


class _Gather(torch.autograd.Function):
    """Each process computes the same loss of all z: the gradient of its own part is a slice of that of the whole. Times the
    number of processes, since the gradients of the weights are averaged where they should be summed."""

    @staticmethod
    def forward(ctx, z):
        parts = [torch.empty_like(z) for _ in range(WORLD)]
        dist.all_gather(parts, z.contiguous())
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx, grad):
        return WORLD * grad.chunk(WORLD, 1)[RANK]


def gather(z):
    """(P, B / WORLD, d) of each process -> (P, B, d), the same in all of them."""
    return z if WORLD == 1 else _Gather.apply(z)


def share_buffers(encoder):
    """Give all processes the first one's statistics of batch norm: on CPUs each has followed its own part of the batches."""
    for buffer in encoder.buffers() if WORLD > 1 else ():
        dist.broadcast(buffer, 0)


def total(tensor):
    """The sum over the processes, in all of them."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


def greatest(*numbers):
    """The greatest of each of the whole numbers. Between the CPUs, also with CUDA: no device is waited for."""
    if WORLD > 1:
        numbers = torch.tensor(numbers)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return [int(number) for number in numbers]


def wait():
    """For the others to be here too."""
    greatest(0)


@contextmanager
def first_alone():
    """The first process goes through, then the others, who find what it wrote."""
    if not FIRST:
        wait()
    try:
        yield
    finally:
        if FIRST:
            wait()
