"""Run commands of the program on simulated CUDA: python -m tests.simulated_cuda FOLDER <
scenarios.json

Tensors on the device have shapes, types and strides but no content (torch's FakeTensor), so no GPU
is needed; CPU tensors are real. What is read from the device is made up: ones, and numbers from 1
to 1.5 where they are floating-point. Only the main thread sees the device. The standard input is a
JSON list of scenarios: name; argv, the command line; and image_file, whether folders of images stay
in a file of the cache. FOLDER: an empty one, for a library that is compiled here. For each scenario
a line of JSON is printed:

- name, code (the exit code), out and err (the ends of stdout and stderr). An operation on tensors
of different devices raises. - phases: those in which something was launched. - reads: where the
host waits for the device. copies: copies to the device that are not both pinned and non-blocking.
Each is
  {"phase", "what", "file", "function", "line"} and stands there once. Phases: step, from the first to the last batch of training,
  without reports and checkpoints; encode, the same of encode; probe, in the inner loop of softmax_regressions; other.
- launches: [in all, in patches.py] of each training step. probe: [launches, steps] of that inner
loop. An operation that
  writes memory of the device is one launch; a foreach operation may be several.
- peak: bytes of the tensors that were alive on the device at once.
"""

import ast
import contextlib
import functools
import io
import json
import os
import subprocess
import sys
import types
import weakref
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.optim import optimizer
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

import encode
import evaluate
import main
import patches
import train
from images import cache as image_cache
from infra import files

ROOT = Path(main.__file__).parent
LIBRARY = """
// Says that torch was built without a GPU, so that autograd runs the nodes of CUDA tensors in the thread that calls it.
#include <optional>
namespace c10 { enum class DeviceType : signed char; }
namespace at::accelerator {
std::optional<c10::DeviceType> getAccelerator(bool) { return {}; }
bool isAccelerator(c10::DeviceType) { return false; }
}
"""
CUDA = torch.device("cuda", 0)
OURS = {
    str(path): path.relative_to(ROOT)
    for folder in ("", "images", "infra", "tools")
    for path in (ROOT / folder).glob("*.py")
}
WAITS = {
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "equal",
    "is_nonzero",
    "bincount",
    "_linalg_check_errors",
}  # operations in which the host waits
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
PER_LAUNCH = 48  # tensors that a launch of a foreach operation takes


def is_cuda(tensor):
    return tensor.device.type == "cuda"


def read(shape, dtype):
    """Return a CPU tensor in place of one that is read from the device."""
    with unset_fake_temporarily():
        ones = torch.ones(shape, dtype=dtype)
        return (
            torch.linspace(1, 1.5, ones.numel()).to(dtype).view(shape)
            if ones.is_floating_point()
            else ones
        )


def tensors_in(values):
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


@functools.cache
def inner_loop():
    """Return (first, last) line of each statement in the innermost loop of softmax_regressions."""
    tree = ast.parse(Path(evaluate.__file__).read_text())
    (function,) = [node for node in tree.body if getattr(node, "name", "") == "softmax_regressions"]
    loops = [node for node in ast.walk(function) if isinstance(node, ast.For)]  # outer ones first
    return [(statement.lineno, statement.end_lineno) for statement in loops[-1].body]


def frame_in(file, function=None):
    """Return the innermost frame of this file, and of this function if one is given; None if there
    is none.
    """
    frame = sys._getframe(1)
    while frame and (
        frame.f_code.co_filename != file or function not in (None, frame.f_code.co_name)
    ):
        frame = frame.f_back
    return frame


def statement_of_probe():
    """Return the index of the statement of inner_loop() that is running, None if none is."""
    frame = frame_in(evaluate.__file__, "softmax_regressions")
    lines = inner_loop() if frame else []
    return next(
        (i for i, (first, last) in enumerate(lines) if first <= frame.f_lineno <= last), None
    )


def place():
    """Return the file, function and line of the program that is running."""
    frame = sys._getframe(1)
    while frame and frame.f_code.co_filename not in OURS:
        frame = frame.f_back
    if not frame:
        return {"file": "?", "function": "?", "line": 0}
    file = OURS[frame.f_code.co_filename].as_posix()
    return {"file": file, "function": frame.f_code.co_name, "line": frame.f_lineno}


class Device(TorchDispatchMode):
    """The simulated device: it passes operations on CUDA tensors to FakeTensorMode, all others to
    the CPU, and counts.
    """

    def __init__(self):
        super().__init__()
        self.live = {}  # bytes of each storage that is alive
        self.clear()

    def clear(self):
        self.phase, self.phases = "other", set()
        self.reads, self.copies, self.steps = {}, {}, []
        self.launches = self.augmentation = self.probe_launches = self.probe_steps = 0
        self.statement = len(inner_loop())  # of the inner loop, that of the launch before
        self.peak = sum(self.live.values())

    def phase_now(self):
        if self.phase == "other" and statement_of_probe() is not None:
            return "probe"
        return self.phase

    def note(self, book, what):
        """Put an event into self.reads or self.copies."""
        event = {"phase": self.phase_now(), "what": what, **place()}
        book[tuple(event.values())] = event

    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors, name = tensors_in((args, kwargs)), func._schema.name.split("::")[1]
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled() or any(
            t.is_inference() for t in tensors
        ):  # composite operations come here whole
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        target = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
        if target != "cuda" and not any(is_cuda(t) for t in tensors):
            return self.on_cpu(func, args, kwargs)
        special = {
            "_to_copy": self.to_copy,
            "copy_": self.copy,
            "_local_scalar_dense": self.read_scalar,
        }.get(name)
        if name in WAITS:
            self.note(self.reads, name)
        elif name in INDEXING:
            self.check_indices(*args[:2])
        result = special(func, args, kwargs) if special else NotImplemented
        if result is NotImplemented:
            result = func(*args, **kwargs)
        self.count(func, name, args, tensors, result)
        return result

    def on_cpu(self, func, args, kwargs):
        pinned = kwargs.pop("pin_memory", False)
        with unset_fake_temporarily():
            result = func(*args, **kwargs)
        return mark_pinned(result) if pinned else result

    def read_scalar(self, func, args, kwargs):
        self.note(self.reads, "value of a tensor")
        with unset_fake_temporarily():
            return read((), args[0].dtype).item()

    def to_copy(self, func, args, kwargs):
        """Copy between the devices, as tensor.to(...) does."""
        (source,), target = args, kwargs.get("device")
        if target is None or torch.device(target).type == source.device.type:
            return NotImplemented
        free = kwargs.get("non_blocking", False)
        if not is_cuda(source):
            self.check_pinned(source, free)
            layout = kwargs.get("memory_format") or torch.preserve_format
            return torch.empty_like(
                source, dtype=kwargs.get("dtype"), device=CUDA, memory_format=layout
            )
        if not free:
            self.note(self.reads, "copy to the CPU")
        result = read(source.shape, kwargs.get("dtype") or source.dtype)
        return mark_pinned(result) if free else result

    def copy(self, func, args, kwargs):
        """Copy between the devices, as target.copy_(source) does."""
        target, source = args[:2]
        free = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        if is_cuda(target) and not is_cuda(source):
            self.check_pinned(source, free)
        if is_cuda(target):
            return NotImplemented
        if not (free and is_pinned(target)):
            self.note(self.reads, "copy to the CPU")
        with unset_fake_temporarily():
            return target.copy_(read(target.shape, target.dtype))

    def check_pinned(self, source, free):
        if not (free and is_pinned(source)):
            self.note(
                self.copies,
                "blocking copy to the device"
                if is_pinned(source)
                else "copy of what is not pinned",
            )

    def check_indices(self, tensor, indices):
        for index in [index for index in indices if index is not None]:
            if is_cuda(index) and not is_cuda(tensor):
                raise RuntimeError("a CPU tensor is indexed by a CUDA tensor")
            if not is_cuda(index):
                self.note(self.copies, "index on the CPU")
            if index.dtype in (torch.bool, torch.uint8):
                self.note(self.reads, "index by a mask")

    def count(self, func, name, args, tensors, result):
        """Count the launches of an operation and the memory of its result."""
        before = {t.untyped_storage()._cdata for t in tensors}
        made = [
            t
            for t in tensors_in(result)
            if isinstance(t, FakeTensor) and t.untyped_storage()._cdata not in before
        ]
        for tensor in made:
            self.remember(tensor.untyped_storage())
        if not (made or func._schema.is_mutable) or name.startswith(("empty", "new_empty")):
            return  # a view
        n, phase = launches_of_foreach(args) if name.startswith("_foreach") else 1, self.phase_now()
        self.phases.add(phase)
        self.launches += n
        self.augmentation += n if frame_in(patches.__file__) else 0
        if phase == "probe":
            index = statement_of_probe()
            self.probe_launches += n
            self.probe_steps += index < self.statement  # the loop has begun again
            self.statement = index

    def remember(self, storage):
        key = storage._cdata
        if key not in self.live:
            self.live[key] = storage.nbytes()
            weakref.finalize(storage, self.live.pop, key, None).atexit = False
            self.peak = max(self.peak, sum(self.live.values()))

    @contextlib.contextmanager
    def within(self, phase):
        """Set the phase within the block."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before


def launches_of_foreach(args):
    """Return the launches of a foreach operation: one for each tensor where shapes differ between
    its lists, as torch does.
    """
    lists = [
        arg
        for arg in args
        if isinstance(arg, list | tuple) and arg and isinstance(arg[0], torch.Tensor)
    ]
    alike = all(len({t.shape for t in row}) == 1 for row in zip(*lists, strict=True))
    return -(-len(lists[0]) // PER_LAUNCH) if alike else len(lists[0])


# ------------------------------------------------------------------------------- what torch refuses
# to do without a GPU


def mark_pinned(tensor):
    tensor.untyped_storage().simulated_pinned = True
    return tensor


def is_pinned(tensor, device=None):
    return getattr(tensor.untyped_storage(), "simulated_pinned", False)


def pin_memory(tensor, device=None):
    if is_cuda(tensor):
        raise RuntimeError("only CPU tensors can be pinned")
    return mark_pinned(tensor.clone())


def replace_tensors(module, function, recurse=True):
    """Do what nn.Module._apply does, with new parameters: torch would exchange the content of fake
    ones, which they refuse.
    """
    for child in module.children() if recurse else ():
        replace_tensors(child, function)
    with torch.no_grad():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = torch.nn.Parameter(
                    function(weight), weight.requires_grad
                )
        module._buffers.update(
            {name: function(value) for name, value in module._buffers.items() if value is not None}
        )
    return module


def stand_in(device):
    """Replace the functions of torch that ask for a GPU."""
    torch.Tensor.pin_memory, torch.Tensor.is_pinned, torch.nn.Module._apply = (
        pin_memory,
        is_pinned,
        replace_tensors,
    )
    cuda = {
        "device_count": lambda: 1,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: "simulated",
        "get_device_properties": lambda device=None: types.SimpleNamespace(total_memory=80 * 2**30),
        "is_bf16_supported": lambda *args, **options: True,
        "max_memory_allocated": lambda which=None: device.peak,
        "synchronize": lambda which=None: device.note(device.reads, "torch.cuda.synchronize"),
    }
    for name, function in cuda.items():
        setattr(torch.cuda, name, function)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: (
        False
    )  # or autocast would turn itself off
    for module in (optimizer, _foreach_utils):
        module._foreach_supported_types.append(FakeTensor)  # foreach kernels are taken as on a GPU
    select = torch._C._select_conv_backend

    def select_backend(
        x, *args, **options
    ):  # without a GPU torch would take a kernel that is not channels-last
        return torch._C._ConvBackend.Cudnn if is_cuda(x) else select(x, *args, **options)

    torch._C._select_conv_backend = select_backend


def instrument(device):
    """Wrap the functions of the program at which a phase begins or ends, and those that read and
    write files.
    """

    def wrap(owner, name, wrapper):
        function = getattr(owner, name)
        setattr(owner, name, functools.wraps(function)(functools.partial(wrapper, function)))

    def other(function, *args, **options):
        with device.within("other"):
            return function(*args, **options)

    def aside(function, *args, **options):  # of 1,000 images, once
        with device.within("aside"):
            return function(*args, **options)

    def batches(phase, function, *args, **options):
        with device.within(
            "aside" if device.phase == "aside" else phase
        ):  # also while the caller works with a batch
            yield from function(*args, **options)

    def step(function, *args, **options):
        before = device.launches, device.augmentation
        with device.within("step"):
            result = function(*args, **options)
        device.steps.append([device.launches - before[0], device.augmentation - before[1]])
        return result

    def save(function, path, content, keep=None):
        content = tree_map(
            lambda value: value.cpu() if isinstance(value, torch.Tensor) else value, content
        )
        with _disable_current_modes():
            function(path, content, keep)

    def load(function, path):
        with _disable_current_modes():
            return function(path)

    for name in ("report", "save_checkpoint", "quick_evaluation"):
        wrap(train, name, other)
    for module in (main, evaluate):
        wrap(module, "measure_collapse", aside)
    wrap(train, "batches", functools.partial(batches, "step"))
    wrap(encode, "batches", functools.partial(batches, "encode"))
    wrap(train, "train_step", step)
    wrap(files, "write_pt", save)
    wrap(files, "read_pt", load)


def play(device, fake, scenario):
    """Run a scenario and return what is printed of it."""
    device.clear()
    image_cache.MANY, image_cache.LARGE = (1, 1) if scenario.get("image_file") else (10**9, 10**12)
    out, err = io.StringIO(), io.StringIO()
    redirected = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with (
        redirected[0],
        redirected[1],
        fake,
        device,
        torch.autograd.set_multithreading_enabled(False),
    ):
        code = main.main([*scenario["argv"], "--debug"])
    return {
        "name": scenario["name"],
        "code": code,
        "out": out.getvalue()[-4000:],
        "err": err.getvalue()[-4000:],
        "phases": sorted(device.phases),
        "reads": list(device.reads.values()),
        "copies": list(device.copies.values()),
        "launches": device.steps,
        "probe": [device.probe_launches, device.probe_steps],
        "peak": device.peak,
    }


def with_library(folder):
    """Compile LIBRARY into the folder and start this script again with it, unless that was done."""
    library = Path(folder, "no_accelerator.so")
    if str(library) in os.environ.get("LD_PRELOAD", ""):
        return
    command = [
        os.environ.get("CXX", "c++"),
        "-std=c++17",
        "-shared",
        "-fPIC",
        "-x",
        "c++",
        "-",
        "-o",
        str(library),
    ]
    subprocess.run(command, input=LIBRARY.encode(), check=True)
    os.environ |= {
        "LD_PRELOAD": f"{library} {os.environ.get('LD_PRELOAD', '')}".strip(),
        "CUDA_VISIBLE_DEVICES": "",
    }
    os.execv(sys.executable, [sys.executable, "-m", "tests.simulated_cuda", *sys.argv[1:]])


if __name__ == "__main__":
    with_library(sys.argv[1])
    torch.set_num_threads(1)
    device, fake = (
        Device(),
        FakeTensorMode(allow_non_fake_inputs=True),
    )  # one for all: the program may keep tensors
    stand_in(device)
    instrument(device)
    for scenario in json.load(sys.stdin):
        print(json.dumps(play(device, fake, scenario)), flush=True)
