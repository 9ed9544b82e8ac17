"""A simulated GPU: the program runs with --device cuda on a CPU, and is watched.

A tensor is on the GPU if its storage is marked so. Its content is that of an ordinary CPU tensor,
and CPU kernels compute with it, so all results are real. Not simulated: the kernels of CUDA, and
operations in other threads than the main one.
"""

import pkgutil
import traceback
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import patches

FOLDERS = [ROOT, ROOT / "images", ROOT / "infra", ROOT / "tools"]
TENSOR = {name: getattr(torch.Tensor, name) for name in ("device", "to", "tolist")}
TORCH = {name: getattr(torch, name) for name in ("autocast", "tensor")}

# Generators of the program. From their start to their end, also while their items are used, the
# host must not wait for the GPU.
HOT = {
    "step": "train.batches_from",
    "encode": "encode.progress",
    "probe": "evaluate.softmax_regressions",
}
# Functions that are called in between and may wait.
MAY_WAIT = ("train.report", "train.save_checkpoint", "train.quick_evaluation", "evaluate.accuracy")
# Operations in which the host reads from the GPU. The first is that of item, bool, int and float.
READS = (
    "_local_scalar_dense nonzero masked_select _unique2 unique_dim unique_consecutive "
    "repeat_interleave equal bincount _linalg_check_errors"
).split()
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")


def is_on_gpu(tensor):
    return getattr(tensor.untyped_storage(), "on_gpu", False)


def is_pinned(tensor):
    return getattr(tensor.untyped_storage(), "pinned", False)


def pin_memory(tensor):
    pinned = tensor.clone()
    pinned.untyped_storage().pinned = True
    return pinned


def tensors_in(values):
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


class SimulatedGPU(TorchDispatchMode):
    """Run every operation on the CPU, and mark the results that would be on the GPU.

    Raises RuntimeError if an operation mixes devices. phases: the keys of HOT that were entered.
    events: a set of texts, each a read or copy in a hot phase for which the host waits, and the
    function of the program that does it.
    """

    def __init__(self):
        super().__init__()
        self.phase = None  # or a key of HOT
        self.phases = set()
        self.events = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if torch.is_inference_mode_enabled():  # composite operations come here whole
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        name = func._schema.name.removeprefix("aten::")
        tensors = tensors_in((args, kwargs))
        creates = torch.device(kwargs.get("device") or "cpu").type == "cuda"
        if name == "copy_":
            self.check_copy(*args, **kwargs)
            return func(*args, **kwargs)
        if creates:
            kwargs["device"] = torch.device("cpu")
        elif any(is_on_gpu(tensor) for tensor in tensors):
            self.check(name, args, tensors)
        else:
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        for tensor in tensors_in(result):
            tensor.untyped_storage().on_gpu = True
        return result

    def check(self, name, args, tensors):
        """Record an operation for which the host waits. Raise if it mixes devices."""
        if name in READS:
            self.record(name)
        if name in INDEXING:
            tensor, indices = args[:2]
            tensors = [tensor]
            for index in tensors_in(indices):
                if not is_on_gpu(index):
                    self.record("index on the CPU")
                if index.dtype in (torch.bool, torch.uint8):
                    self.record("index by a mask")
        if not all(is_on_gpu(tensor) or tensor.ndim == 0 for tensor in tensors):
            raise RuntimeError(f"{name} of tensors on the CPU and on the GPU")

    def check_copy(self, target, source, non_blocking=False):
        """Record a copy between the devices for which the host waits."""
        if is_on_gpu(target) != is_on_gpu(source):
            on_cpu = source if is_on_gpu(target) else target
            if not (non_blocking and is_pinned(on_cpu)):
                self.record("blocking copy")

    def record(self, event):
        """Keep an event of a hot phase."""
        if self.phase:
            frames = [f for f in traceback.extract_stack() if Path(f.filename).parent in FOLDERS]
            file = Path(frames[-1].filename).name
            self.events.add(f"{self.phase}: {event} in {file}, {frames[-1].name}")

    def to(self, tensor, *args, **kwargs):
        """Do what tensor.to does; a copy between the devices is one on the CPU."""
        device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
        layout = layout or torch.preserve_format
        convert = partial(TENSOR["to"], tensor, dtype or tensor.dtype, memory_format=layout)
        if device is None or (device.type == "cuda") == is_on_gpu(tensor):
            return convert()
        with _disable_current_modes():
            moved = convert(copy=True)
        if device.type == "cuda":
            moved.untyped_storage().on_gpu = True
        elif non_blocking:
            moved = pin_memory(moved)  # as torch does
        self.check_copy(moved, tensor, non_blocking)
        return moved

    def hot(self, phase, generator, *args, **kwargs):
        self.phase = phase
        self.phases.add(phase)
        yield from generator(*args, **kwargs)
        self.phase = None

    def may_wait(self, function, *args, **kwargs):
        phase = self.phase
        self.phase = None
        result = function(*args, **kwargs)
        self.phase = phase
        return result


def replacements(gpu):
    """Return {owner: {name: stand-in}} for the functions of torch that would need a GPU."""
    cuda = torch.device("cuda", 0)
    return {
        torch: {
            "autocast": lambda _, *args, **kwargs: TORCH["autocast"]("cpu", *args, **kwargs),
            "tensor": lambda x, device=None, **kwargs: TORCH["tensor"](x, **kwargs).to(device),
        },
        torch.nn.functional: {  # in C++ it would create its result on the CPU
            "one_hot": lambda y, n: (y[..., None] == torch.arange(n, device=y.device)).long()
        },
        torch.Tensor: {
            "device": property(lambda t: cuda if is_on_gpu(t) else TENSOR["device"].__get__(t)),
            "to": lambda tensor, *args, **kwargs: gpu.to(tensor, *args, **kwargs),
            "cpu": lambda tensor: gpu.to(tensor, "cpu"),
            "tolist": lambda tensor: TENSOR["tolist"](gpu.to(tensor, "cpu")),
            "pin_memory": pin_memory,
            "__deepcopy__": lambda tensor, memo: tensor.detach().clone(),
        },
        torch.cuda: {
            "_lazy_init": lambda: None,
            "device_count": lambda: 1,
            "get_device_capability": lambda device: (9, 0),
            "get_device_name": lambda device: "simulated",
            "get_device_properties": lambda device: SimpleNamespace(total_memory=80 * 2**30),
            "max_memory_allocated": lambda device: 0,
            "synchronize": lambda device=None: gpu.record("synchronize"),
        },
    }


@contextmanager
def simulated_gpu():
    """Yield a SimulatedGPU, which is cuda:0 for torch and the program within the block."""
    gpu = SimulatedGPU()
    with pytest.MonkeyPatch.context() as patch:
        for owner, functions in replacements(gpu).items():
            for name, function in functions.items():
                patch.setattr(owner, name, function)
        for phase, name in HOT.items():
            patch.setattr(name, partial(gpu.hot, phase, pkgutil.resolve_name(name)))
        for name in MAY_WAIT:
            patch.setattr(name, partial(gpu.may_wait, pkgutil.resolve_name(name)))
        with gpu:
            yield gpu
    for function in vars(patches).values():
        if hasattr(function, "cache_clear"):  # it keeps tensors
            function.cache_clear()
