"""Device, precision, memory and random generators."""

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
    """Return the torch.device of a name or device; auto takes cuda, then mps, then cpu.

    Raises UsageError if it is not there.
    """
    if name == "auto" and torch.cuda.is_available():
        name = "cuda"
    elif name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device {name!r} must be auto, cpu, mps, cuda or cuda:N") from None
    counts = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }
    if (device.index or 0) >= counts.get(device.type, 0):
        raise UsageError(f"device {name} is not available here: device auto takes the best that is")
    return device


def pick_precision(name, device):
    """Resolve auto: bf16 where the hardware has it natively, else fp32.

    Where it is emulated, bf16 is slower than fp32.
    """
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
    # Filling costs time, and every value is written before it is read.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = not deterministic
    if device.type == "cpu":
        keep_freed_memory()


@contextmanager
def without_tuning():
    """Disable cuDNN's autotuning, which would restart for the smaller last batch."""
    tuning = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = tuning


def arithmetic(precision, device):
    """Return the precision in words, for the log."""
    if device.type == "cuda" and precision == "fp32" and torch.backends.cudnn.allow_tf32:
        return "fp32, convolutions in TF32 where the GPU has it (PyTorch's default)"
    return precision


def keep_freed_memory():
    """Make glibc keep large blocks that were freed, instead of returning them to the system.

    The system would clear them again: encoding would take 1.4x as long
    (benchmarks/results/choices-cpu.json).
    """
    if platform.libc_ver()[0] == "glibc":
        M_TRIM_THRESHOLD = -1  # malloc.h
        M_MMAP_MAX = -4
        ctypes.CDLL(None).mallopt(M_MMAP_MAX, 0)
        ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def generator(seed, purpose, epoch=0, step=0):
    """Return a CPU torch.Generator that depends on these four alone.

    So any step can be repeated by itself.
    """
    digest = hashlib.sha256(f"{seed}/{purpose}/{epoch}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def to_device(tensor, device):
    """Copy a CPU tensor to the device.

    On CUDA the copy is pinned and asynchronous: the host does not wait.
    """
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def to_device_packed(tensors, device):
    """Return a dict of CPU tensors, int64 and float32, on the device.

    On CUDA they are one pinned, asynchronous copy.
    """
    if device.type != "cuda":
        return {name: tensor.to(device) for name, tensor in tensors.items()}
    # int64 first, so that each part is aligned.
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())
    parts = [tensors[name].contiguous().view(-1).view(torch.uint8) for name in names]
    packed = to_device(torch.cat(parts), device).split([len(part) for part in parts])
    return {
        name: part.view(tensors[name].dtype).view(tensors[name].shape)
        for name, part in zip(names, packed, strict=True)
    }


def peak_memory(device):
    """Return the peak memory so far in bytes, of the GPU or else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def total_memory(device):
    """Return the memory of the GPU, else of the computer, in bytes.

    In a container of cgroup v2, it is what the container may use.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(total, int(text)) if text.isdecimal() else total
