"""Device, precision, memory and random generators."""

import copy
import ctypes
import hashlib
import os
import platform
import resource
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

from infra.errors import UsageError


def pick_device(name):
    """Return the torch.device of this name or device; auto takes cuda, then mps, then cpu. Raises UsageError if there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device {name!r} must be auto, cpu, mps, cuda or cuda:N") from None
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}.get(device.type, 0)
    if (device.index or 0) >= count:
        raise UsageError(f"device {name} is not available here: device auto takes the best that is")
    return device


def pick_precision(name, device):
    """Resolve auto: bf16 where the hardware has it natively, because elsewhere it is slower than fp32; else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    if device.type == "cpu" and os.path.exists("/proc/cpuinfo"):
        flags = set(Path("/proc/cpuinfo").read_text().split())
        return "bf16" if flags & {"avx512_bf16", "amx_bf16", "bf16"} else "fp32"
    return "fp32"


def configure(device, deterministic=False):
    """Configure torch in this process: deterministic algorithms, or else the fastest kernels."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS requires it
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # every value is written before it is read
    torch.backends.cudnn.benchmark = not deterministic
    if device.type == "cpu":
        keep_freed_memory()


@contextmanager
def without_tuning():
    """Take cuDNN's kernels by its heuristics. Tuning would begin again for each size of a batch, also of the last, odd one."""
    tuning, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = tuning


def arithmetic(precision, device):
    """Return the precision in words, for the log."""
    tf32 = device.type == "cuda" and precision == "fp32" and torch.backends.cudnn.allow_tf32
    return f"{precision}, convolutions in TF32 where the GPU has it (PyTorch's default)" if tf32 else precision


def keep_freed_memory():
    """Make glibc keep large blocks that were freed. By default it returns them to the system, which clears them again.

    Its effect is in the README's table of choices, "freed memory returned".
    """
    if platform.libc_ver()[0] == "glibc":
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
        ctypes.CDLL(None).mallopt(M_MMAP_MAX, 0)
        ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def generator(seed, purpose, epoch=0, step=0):
    """Return a CPU torch.Generator that depends on these four alone, so that any step can be repeated by itself."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{epoch}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def to_device(tensor, device):
    """Copy a CPU tensor to the device. On CUDA the copy is pinned and asynchronous: the host does not wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def to_device_packed(tensors, device):
    """Return a dict of CPU tensors, int64 and float32, on the device. On CUDA they are one pinned, asynchronous copy."""
    if device.type != "cuda":
        return {name: tensor.to(device) for name, tensor in tensors.items()}
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())  # int64 first: each part is aligned
    parts = [tensors[name].contiguous().view(-1).view(torch.uint8) for name in names]
    packed = to_device(torch.cat(parts), device).split([len(part) for part in parts])
    return {name: part.view(tensors[name].dtype).view(tensors[name].shape) for name, part in zip(names, packed, strict=True)}


def peak_memory(device):
    """Return the peak memory so far in bytes, of the GPU or else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def total_memory(device):
    """Return the memory of the GPU, else of the computer, in bytes; in a container of cgroup v2, what that may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total, limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(total, int(text)) if text.isdecimal() else total


# The most that is alive in the backward pass, relative to what autograd keeps of the forward pass. CPU and mps: measured 1.4 to
# 1.8 of the memory of the process. CUDA: 0.97 to 1.05 of the tensors in the simulation of tests/run/test_cuda.py.
BACKWARD = {"cpu": 1.6, "mps": 1.6, "cuda": 1.05}
# The CUDA context, and the workspaces of cuDNN and cuBLAS: an estimate; not measured on a GPU yet.
BESIDE = {"cuda": 1e9}


def saved_bytes(network, n_images, size, bf16):
    """Return the bytes that autograd keeps of n_images images (3, size, size) between forward and backward, tried on the CPU."""
    kept = []

    def keep(tensor):
        kept.append(tensor.untyped_storage())
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        copy.deepcopy(network).cpu().train()(torch.zeros(n_images, 3, size, size))  # a copy: batch norm counts what it sees
    return sum({storage.data_ptr(): storage.nbytes() for storage in kept}.values())


def step_memory(network, size, bf16, device):
    """Return the bytes that a training step takes for each patch (3, size, size), for the weights, and for its kernels."""
    saved = saved_bytes(network, 3, size, bf16) - saved_bytes(network, 2, size, bf16)
    sampling = 3.2 * 4 * 3 * size**2  # float32; alive at once in `patches.render`: 3.2 times its result
    weights = 4 * 4 * sum(p.numel() for p in network.parameters())  # float32: weights, gradients, momenta; copies in bf16
    return max(BACKWARD[device.type] * saved, sampling), weights, BESIDE.get(device.type, 0)
