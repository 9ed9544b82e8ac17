"""What only a GPU can tell, in the few minutes for which one is there.

    python -m benchmarks.gpu --data_dir DIR                # all parts, the most important first: at most 9 minutes
    python -m benchmarks.gpu --only step --minutes 20      # one part; this leaves time for all modes of --compile
    python -m benchmarks.gpu --quick --device cpu          # tiny sizes, without what only CUDA has: a trial of this command

Each job is a process of its own, so that a failed one spoils no other, and is stopped when its time is over. Each figure is in
gpu-PART.json as soon as it is measured. A job is skipped if less time is left than it is expected to take; an optional one also
leaves later parts theirs, and has a second chance at the end. Exit code 1: something failed, or differs from the CPU by more
than its tolerance. 2: there is no such device.
"""

import functools
import multiprocessing
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks.common import RESULTS, ROOT, commit, machine, parser
from benchmarks.gpu_jobs import ON_CUDA, QUICK, RUNS, SEED, Sizes, Task, equal, one_line, parts, step, whole_run
from infra import files
from infra.device import configure, pick_device
from infra.errors import UsageError

PARTS = ("equal", "step", "parts", *RUNS)
TRIAL = ROOT / "logs" / "gpu-trial"  # what is not of a GPU, or of tiny sizes, replaces no result
LEFT_OUT = {"fp16": "the training step has no GradScaler",
            "step in fp32 without TF32": "its fp32 is the program's, with TF32 where torch has it on"}  # fmt: skip


class Job(NamedTuple):
    part: str
    name: str
    function: Callable  # of a Task
    expected: float  # seconds
    optional: bool = False


def jobs_of(only, s, cuda):
    """Return the jobs of the parts `only`, in order of worth; the optional ones once more at the end."""
    variants = [(("bf16", "fp32"), 30, False), *((("bf16", name), wait, True) for name, wait in ON_CUDA.items() if cuda)]
    jobs = [Job("equal", "equal", equal, 40)]
    jobs += [Job("step", f"{arch} {names[-1]}", functools.partial(step, arch=arch, variants=names), wait, optional)
             for names, wait, optional in variants for arch in s.archs]  # fmt: skip
    jobs += [Job("parts", "parts", parts, 60)]
    jobs += [Job(part, part, functools.partial(whole_run, part=part), wait) for part, (_, wait) in RUNS.items()]
    jobs = [job._replace(expected=s.scale * job.expected) for job in jobs if job.part in only]
    return jobs + [job for job in jobs if job.optional]


def work(job, task, connection):
    """Run a job, in its own process, and send what it measures."""
    configure(task.device)
    torch.manual_seed(SEED)
    try:
        if task.sizes == QUICK:
            torch.set_num_threads(1)  # for so little work more threads are slower
        job.function(task._replace(emit=lambda *measured: connection.send(measured)))
    except Exception as error:
        connection.send((job.name, {"failed": one_line(error)}))


def carry_out(job, task, emit):
    """Run a job in a process of its own and pass on what it measures, until it ends or its time is over."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision"])  # imported once; CUDA is not yet initialised there
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(job, task, sender))
    process.start()
    sender.close()
    end = time.monotonic() + task.limit
    try:
        while receiver.poll(max(0, end - time.monotonic())):
            emit(*receiver.recv())
        emit(job.name, {"failed": f"not done after {task.limit:.0f} s"})
    except EOFError:  # the process has ended
        process.join(10)
        if process.exitcode:
            emit(job.name, {"failed": f"its process ended with code {process.exitcode}"})
    finally:
        process.kill()


class Results:
    """The content of each gpu-PART.json. A part whose jobs are all skipped keeps the file that it has."""

    def __init__(self, folder, **about):
        self.folder, self.about, self.parts, self.skipped = folder, about, {}, {}

    def emit(self, part, name, value):
        self.of(part)["measured"][name] = value
        self.write(part)

    def of(self, part):
        return self.parts.setdefault(part, {"part": part, **self.about, "skipped": {}, "seconds": {}, "measured": {}})

    def write(self, part):
        self.of(part)["skipped"] = {name: why for (of, name), why in self.skipped.items() if of == part}
        files.write_json(self.folder / f"gpu-{part}.json", self.of(part))

    def succeeded(self):
        values = [value for content in self.parts.values() for value in content["measured"].values()]
        return not any("failed" in value or not value.get("within", True) for value in values)

    def table(self):
        """Return a line for each measurement and each job that was skipped."""
        rows = [(part, name, text(value)) for part, content in self.parts.items() for name, value in content["measured"].items()]
        rows += [(part, name, f"skipped: {why}") for (part, name), why in self.skipped.items()]
        return "\n".join(f"{part:10} {name:38} {told}" for part, name, told in sorted(rows, key=lambda row: PARTS.index(row[0])))


def text(value):
    """Return a measurement in short."""
    if "failed" in value:
        return f"failed: {value['failed']}"
    if "within" in value:
        return f"differs by {value['relative']:.1e}, {'within' if value['within'] else 'MORE THAN'} {value['tolerance']:.0e}"
    if "wall_seconds" in value:
        return f"{value['wall_seconds']:.1f} s, top-1 {value['top1']:.2f}%, 20-NN {value['knn_top1']:.2f}%"
    told = f"{value['ms']:9.3f} ms"
    if "share_of_peak" in value:
        told += (f", {value['share_of_peak']:.1%} of the peak, {value['patches_per_second']:,.0f} patches/s, "
                 f"{value['memory_gb']:.1f} GB")  # fmt: skip
    return told


def arguments(argv):
    made = parser(__doc__)
    made.set_defaults(out=None)
    made.add_argument("--minutes", type=float, default=9, help="time for all parts (default: 9)")
    made.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu (default: cuda)")
    made.add_argument("--quick", action="store_true", help="tiny sizes; then, and without a GPU, --out is logs/gpu-trial")
    made.add_argument("--dataset", choices=("cifar10", "folder", "textures"),
                      help="of the whole runs, with labels and test images (default: cifar10; textures if --quick)")  # fmt: skip
    made.add_argument("--data_dir", default="./datasets", help="where its images are (default: ./datasets)")
    made.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    return made.parse_args(argv)


def main(argv=None):
    """Run the jobs for which there is time, and return the exit code."""
    begun, options = time.monotonic(), arguments(argv)
    try:
        device, here = pick_device(options.device), machine(options.device)
    except UsageError as error:
        print(f"error: {error}; `--quick --device cpu` tries this command", file=sys.stderr)
        return 2
    cuda, sizes = device.type == "cuda", QUICK if options.quick else Sizes()
    folder = options.out or (RESULTS if cuda and not options.quick else TRIAL)
    folder.mkdir(parents=True, exist_ok=True)
    dataset = options.dataset or ("textures" if options.quick else "cifar10")
    task = Task(device, sizes, ("--dataset", dataset, "--data_dir", options.data_dir))
    left_out = LEFT_OUT | ({} if cuda else dict.fromkeys(ON_CUDA, "only on CUDA"))
    results = Results(folder, machine=here, commit=commit(), seed=SEED, dataset=dataset, sizes=sizes._asdict(), left_out=left_out)
    jobs, done = jobs_of(options.only, sizes, cuda), set()
    for i, job in enumerate(jobs):
        limit = 60 * options.minutes - (time.monotonic() - begun)
        limit -= sum(later.expected for later in jobs[i:] if job.optional and not later.optional)
        if job in done:
            continue
        if limit < job.expected:
            results.skipped[job.part, job.name] = f"{max(0, limit):.0f} s left for it, {job.expected:.0f} s expected"
            continue
        print(f"{job.part}: {job.name}", flush=True)
        results.skipped.pop((job.part, job.name), None)
        start = time.monotonic()
        carry_out(job, task._replace(limit=limit), functools.partial(results.emit, job.part))
        results.of(job.part)["seconds"][job.name] = time.monotonic() - start
        results.write(job.part)
        done.add(job)
    for part in results.parts:
        results.write(part)  # with what was skipped since
    print(results.table())
    return 0 if results.succeeded() else 1


if __name__ == "__main__":
    sys.exit(main())
