"""EMP-SSL: train an encoder without labels in about one pass over the data, encode the images, fit a linear probe."""

import argparse
import copy
import ctypes
import errno
import functools
import math
import os
import platform
import re
import resource
import shlex
import shutil
import signal
import sys
import threading
import time
import traceback
import warnings
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import compare
import data
import evaluate
import experiment
import export
import journal
import loss
import parallel
import report
from experiment import PARAMS, STAGES, RunError, UsageError
from lars import LARS
from model import Encoder


def say(*words, **kwargs):
    if parallel.FIRST:
        print(*words, **kwargs, flush=True)  # a pipe sees each line when it is written


def paint(text, code, stream):
    """The text in a colour or weight, on a terminal alone and where NO_COLOR is not set (no-color.org)."""
    return f"\033[{code}m{text}\033[0m" if stream.isatty() and not os.environ.get("NO_COLOR") else text


def say_stage(title):
    say(paint(f"===> {title}", "1", sys.stdout))


def main(argv=None):
    """Run one command, e.g. main(["train", "--dataset", "textures"]), and return the exit code:
    0 done, 1 failed while running, 2 wrong usage, 130 and 143 stopped by SIGINT and SIGTERM."""
    debug = "--debug" in (sys.argv[1:] if argv is None else argv)
    try:
        args = parse(argv)
        with handling(raise_interrupted), warnings.catch_warnings():
            if not debug:
                warnings.simplefilter("ignore")  # those of libraries; this program prints its own
            args.command(args)
        return 0
    except SystemExit as stop:  # argparse, after --help
        return stop.code or 0
    except Interrupted as stop:
        if parallel.FIRST:
            print(stop, file=sys.stderr)
        return 128 + stop.signum
    except Exception as error:
        if debug:
            traceback.print_exc()
        known = isinstance(error, (RunError, UsageError))
        message = str(error) if known else explain(error)
        if parallel.FIRST or not known:  # what is known they all find, and one tells
            print(paint("error:", "31", sys.stderr), f"{'' if known else parallel.name()}{message}", file=sys.stderr)
        return error.code if known else 1


def explain(error):
    """One line on an error that was not foreseen, or on too little memory or room on the disk."""
    text = " ".join(str(error).split())
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:  # a CUDA device, a CPU
        return (f"out of memory ({text[:100]}): in hparams.yaml lower bs, n_patches or max_patches, or set precision: bf16, "
                f"then resume; all that was written is kept")  # fmt: skip
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space left on the disk ({text[:200]}): make room, then resume; all that was written before is kept"
    return f"{type(error).__name__}: {text[:1000]} (--debug shows where)"


# ------------------------------------------------------------------------------------------ command line


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(f"{message} (see {self.prog} --help)")


def parse(argv=None):
    formatter = functools.partial(argparse.HelpFormatter, max_help_position=38, width=110)
    make = functools.partial(Parser, formatter_class=formatter, allow_abbrev=False)
    parser = make(prog="main.py", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command", parser_class=make)

    train = commands.add_parser("train", help="train, encode and probe; picks up where it stopped", description=(
        "Train the encoder, encode the images, fit a linear probe. Given again, it goes on where it stopped."))
    groups = {stage: train.add_argument_group(title) for stage, title in {"run": "experiment", **STAGES}.items()}
    run = groups["run"]
    run.add_argument("--exp_name", default="default", help="experiment name (default: default)")
    run.add_argument("--log_folder", default="logs/EMP-SSL-Training", help="directory name (default: logs/EMP-SSL-Training)")
    run.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True,
                     help="go on where the same experiment stopped (the default), or move it aside and start over")
    run.add_argument("--config_from", metavar="DIR", help="take what is not given here from another run folder's hparams.yaml")
    run.add_argument("--preset", choices=tuple(experiment.PRESETS), metavar="{" + ",".join(experiment.PRESETS) + "}",
                     help="take what is not given here from a named set of hyperparameters (see README)")
    run.add_argument("--dry_run", action="store_true", help="tell settings, size, memory and time of the run, and stop")
    for param in PARAMS:
        default = "" if param.default is None else f" (default: {param.default})"
        kind = {"action": argparse.BooleanOptionalAction} if param.type is bool else {
            "type": param.parse, "metavar": "{" + ",".join(param.choices) + "}" if param.choices else param.type.__name__.upper()}
        names = [f"--{param.name}"] + ["--patch_size"] * (param.name == "input_size")  # two names that the field has for it
        groups[param.stage].add_argument(*names, default=argparse.SUPPRESS, help=param.help + default, **kind)
    train.set_defaults(command=train_command)

    resume = commands.add_parser("resume", help="go on with a run folder, also after hparams.yaml was edited",
                                 description="Go on with a run folder, also after its hparams.yaml was edited.")
    resume.add_argument("--exp_dir", required=True, type=Path, help="the run folder")
    resume.set_defaults(command=resume_command)

    cleanup = commands.add_parser("cleanup", help="remove old checkpoints", description=(
        "Remove the older epoch checkpoints of every experiment in a folder; the newest always stays."))
    cleanup.add_argument("--log_folder", required=True, type=Path, help="folder of run folders")
    cleanup.add_argument("--keep", required=True, type=experiment.Param("keep", int, 1, "none", "", low=1).parse, metavar="N",
                         help="epoch checkpoints to keep in each experiment, at least 1")
    cleanup.add_argument("-y", dest="yes", action="store_true", help="do not ask")
    cleanup.set_defaults(command=cleanup_command)

    comparison = commands.add_parser("compare", help="the experiments of a folder as a table", description=(
        "The experiments of a folder as a table: what differs between them, accuracies in percent, seconds, device, and whether "
        "they are finished."))
    comparison.add_argument("log_folder", type=Path, metavar="LOG_FOLDER", help="folder of run folders")
    comparison.add_argument("--csv", action="store_true", help="comma-separated values")
    comparison.add_argument("--sort", metavar="KEY", help="a column: accuracies fall, others rise (default: by name)")
    comparison.set_defaults(command=compare_command)

    page = commands.add_parser("report", help="a run as one page, report.html", description=(
        "Print what a run ran in, and write report.html into its folder: one page with settings, result, curves and pictures."))
    page.add_argument("--exp_dir", required=True, type=Path, help="the run folder")
    page.set_defaults(command=report_command)

    exporter = commands.add_parser("export", help="write the encoder for torchvision, safetensors or ONNX", description=(
        "Write the encoder into the run folder's export/, and beside it what one must know to use it."))
    exporter.add_argument("--exp_dir", required=True, type=Path, help="the run folder")
    exporter.add_argument("--format", required=True, choices=tuple(export.SUFFIXES), help="torchvision: a state dict")
    exporter.add_argument("--head", action="store_true", help="with the feature layer, whose output the probe sees")
    exporter.set_defaults(command=export_command)

    embed = commands.add_parser("embed", help="the embeddings of any folder of images", description=(
        "Encode all images below a folder, by the views of the run, and write their embeddings and paths into an .npz file."))
    embed.add_argument("--exp_dir", required=True, type=Path, help="the run folder")
    embed.add_argument("--images", required=True, type=Path, metavar="FOLDER", help="folder of images, any tree")
    embed.add_argument("--out", required=True, type=Path, metavar="FILE.npz", help="embeddings (N, d) and paths (N,)")
    embed.add_argument("--device", default="auto", help="auto (cuda, mps or cpu), cpu, mps, cuda or cuda:N")
    embed.set_defaults(command=embed_command)

    for command in (train, resume, comparison, page, exporter, embed, cleanup):
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    argv = [canonical(arg) for arg in (sys.argv[1:] if argv is None else argv)]
    return parser.parse_args(argv, argparse.Namespace(argv=argv))


def canonical(arg):
    """--n-patches=3 as --n_patches=3, --no-batch-norm as --no-batch_norm, anything but an option as it is."""
    name, equals, value = arg.partition("=")
    return "--" + re.sub("^no_", "no-", name[2:].replace("-", "_")) + equals + value if name.startswith("--") else arg


def hyperparameters(args):
    """The hyperparameters of a train command: what it gives, else those of --config_from or --preset, else the defaults."""
    if args.config_from and args.preset:
        raise UsageError("--config_from and --preset exclude each other: each names what is not given")
    base = vars(experiment.read_hparams(args.config_from)) if args.config_from else experiment.PRESETS.get(args.preset, {})
    values = {param.name: getattr(args, param.name, base.get(param.name, param.default)) for param in PARAMS}
    return experiment.validate(values, "command line")


def train_command(args):
    hp = hyperparameters(args)
    if args.dry_run:
        dry_run(hp)
        return
    exp_dir = Path(args.log_folder) / f"{args.exp_name}__numpatch{hp.n_patches}_bs{hp.bs}_lr{hp.lr:g}"
    if args.config_from and exp_dir.resolve() == Path(args.config_from).resolve():
        raise UsageError(f"{exp_dir} is the run folder that --config_from names: give the new experiment an --exp_name")
    if args.resume and (exp_dir / "hparams.yaml").exists():
        edited = experiment.differences(vars(experiment.read_hparams(exp_dir)), vars(hp))
        for name, (there, here) in edited.items():
            say(f"* {name} is {there} in {exp_dir}/hparams.yaml and {here} in this command, which decides")
    run(hp, exp_dir, args.argv, start_over=not args.resume)


def dry_run(hp, n_timed=3):
    """Tell what a run would be and how long its training would take, after a few steps of it; write nothing."""
    say(experiment.dump_hparams(hp), end="")
    device = pick_device(parallel.own_device(hp.device))
    bf16 = pick_precision(hp.precision, device) == "bf16"
    with parallel.processes(device):
        pixels = data.on_device(load_data(hp, None)["train"].images, device)
        encoder = build_encoder(hp, None).to(device, memory_format=torch.channels_last)
        size, n_patches = hp.input_size or pixels.shape[-1], hp.n_patches * hp.bs
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            copy.deepcopy(encoder)(torch.zeros(2, 3, size, size, device=device))
        operations = 3 * counter.get_total_flops() / 2 * n_patches  # backward takes twice what forward takes
        n_steps = experiment.n_steps_in(hp.n_epochs, len(pixels) // hp.bs)
        say(f"* Device: {device}, precision: {'bf16' if bf16 else 'fp32'}, processes: {parallel.WORLD}")
        say(f"* Parameters: {sum(p.numel() for p in encoder.parameters()) / 1e6:.2f} million")
        say(f"* Operations: {operations / 1e12:.3g} TFLOP a step in the network, {n_steps} steps of {n_patches} patches")
        say_memory(hp, encoder, pixels, bf16)
        network, optimizer = parallel.wrapped(encoder, device), build_optimizer(hp, encoder)
        for step in range(n_timed + 1):
            if step == 1:  # the first one takes longer
                start = time.monotonic()
            batch = parallel.own(pixels[: hp.bs]).to(device)
            train_step(hp, network, optimizer, batch, data.generator(0, "dry", step=step), bf16).cpu()
        seconds = (time.monotonic() - start) / n_timed
    say(f"* Time: {seconds:.3g} s a step, about {seconds * n_steps / 60:.3g} minutes of training; encoding takes a third of that "
        f"per patch")  # fmt: skip


def resume_command(args):
    hp = experiment.read_hparams(args.exp_dir)
    say(f"* Loaded configuration settings from: {args.exp_dir / 'hparams.yaml'}")
    run(hp, args.exp_dir, args.argv)


def report_command(args):
    """Write report.html of a run, also of one that is not finished or whose images are gone: the page says what is missing."""
    report.require_packages()
    exp_dir, hp = args.exp_dir, experiment.read_hparams(args.exp_dir)
    checkpoint = exp_dir / "checkpoints" / "last.pt"
    try:
        images, missing = load_data(hp, experiment.load_checkpoint(checkpoint)), ""
    except (UsageError, RunError) as error:
        images, missing = {"train": None, "test": None}, str(error)
        print(f"warning: no pictures of images: {error}", file=sys.stderr)
    for launch in journal.read_launches(exp_dir):
        for name, value in launch.items():
            if name != "hparams":
                say(f"{name:16} {value}")
    path = exp_dir / "report.html"
    with experiment.replacing(path) as file:
        file.write(report.page(exp_dir, hp, images["train"], images["test"], missing).encode())
    say(f"* Report: {path}, {path.stat().st_size / 1e6:.1f} MB")


def load_encoder(exp_dir):
    """(hyperparameters, checkpoint, encoder) of a run folder; raises UsageError if it has no checkpoint."""
    hp, checkpoint = experiment.read_hparams(exp_dir), experiment.newest_checkpoint(exp_dir)
    if not checkpoint:
        raise UsageError(f"{exp_dir} has no checkpoint: there is no encoder yet")
    experiment.check_changes(hp, checkpoint)
    if not experiment.is_trained(hp, checkpoint):
        say(f"* Training is at epoch {checkpoint['epoch']} step {checkpoint['step']}, not at its end")
    return hp, checkpoint, build_encoder(hp, checkpoint)


def export_command(args):
    export.require_packages(args.format)
    hp, checkpoint, encoder = load_encoder(args.exp_dir)
    description = export.describe(hp, checkpoint, args.head)
    for path in export.write(args.format, encoder, args.head, description, args.exp_dir / "export"):
        say(f"* Wrote {path}")


def embed_command(args):
    """Write embeddings float32 (N, d) and paths (N,), below the folder, of all images that could be read."""
    if args.out.suffix != ".npz" or not args.out.parent.is_dir():
        raise UsageError(f"out {args.out} must be a file NAME.npz in a folder that exists")
    if not args.images.is_dir():
        raise UsageError(f"images {args.images} is not a folder")
    paths = data.find_images(args.images)
    if not paths:
        raise UsageError(f"no images in {args.images} (looked for {' '.join(sorted(data.SUFFIXES))} in all its folders)")
    device = pick_device(args.device)
    hp, _, encoder = load_encoder(args.exp_dir)
    images, readable = data.read_images(paths, args.images, hp.image_size)
    say(f"* Images: {len(images)} of {len(paths)}, device: {device}")
    encoder = encoder.to(device, memory_format=torch.channels_last)
    embeddings = encode_views(hp, encoder, images, "embed", pick_precision(hp.precision, device) == "bf16")["embeddings"]
    if not embeddings.isfinite().all():
        raise RunError("embeddings are not finite: set precision: fp32 in hparams.yaml of a new run")
    names = [str(paths[i].relative_to(args.images)) for i in readable]
    with experiment.replacing(args.out) as file:
        np.savez(file, embeddings=embeddings.numpy(), paths=np.array(names))
    say(f"* Wrote {args.out}: embeddings {tuple(embeddings.shape)}, paths ({len(names)},)")


def compare_command(args):
    columns, rows = compare.table(args.log_folder, args.sort)
    say((compare.as_csv if args.csv else compare.as_text)(columns, rows))


def cleanup_command(args):
    if not args.log_folder.is_dir():
        raise UsageError(f"log_folder {args.log_folder} is not a folder")
    folders = sorted(path.parent for path in args.log_folder.glob("*/hparams.yaml"))
    old = [path for folder in folders for path in experiment.epoch_checkpoints(folder)[: -args.keep]]
    size = sum(path.stat().st_size for path in old)
    for path in old:
        say(path)
    say(f"{len(old)} old checkpoints in {len(folders)} experiments, {size / 1e6:,.1f} MB")
    if old and (args.yes or confirmed("Remove them? [y/N] ")):
        for path in old:
            path.unlink()
        say(f"Freed {size / 1e6:,.1f} MB")
    else:
        say("Nothing removed")


def confirmed(question):
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        return False


# -------------------------------------------------------------------------------------------- pipeline


def run(hp, exp_dir, argv, start_over=False):
    """The three stages, each skipped where its result is in the run folder, and the summary, in no other process meanwhile.

    argv: the command line, for the journal. start_over: move a run folder that exists aside first.
    Raises UsageError or RunError, before anything is written where the settings or the data are at fault.
    """
    device = pick_device(parallel.own_device(hp.device))
    if hp.bs % parallel.WORLD:
        raise UsageError(f"bs {hp.bs} must be a multiple of the {parallel.WORLD} processes, which share a batch")
    precision = pick_precision(hp.precision, device)
    with experiment.locked(exp_dir), parallel.processes(device), journal.Journal(exp_dir, hp, argv, device, precision) as log:
        run_stages(hp, exp_dir, log, device, precision == "bf16", start_over)


def run_stages(hp, exp_dir, log, device, bf16, start_over):
    say(f"* Device: {device}, precision: {'bf16' if bf16 else 'fp32'}")
    if hp.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    torch.use_deterministic_algorithms(hp.deterministic)
    torch.backends.cudnn.benchmark = not hp.deterministic
    if device.type == "cpu":
        keep_freed_memory()

    checkpoint = None if start_over else experiment.newest_checkpoint(exp_dir)
    changed = experiment.check_changes(hp, checkpoint) if checkpoint else {}
    encoder = build_encoder(hp, checkpoint)
    images = functools.cache(lambda: load_data(hp, checkpoint))
    before = checkpoint["hparams"] if checkpoint else {}
    if checkpoint and hp.dataset == "folder" and (hp.data_dir, hp.labels) != (before["data_dir"], before["labels"]):
        images()  # elsewhere now: are they the same?
    if not experiment.is_trained(hp, checkpoint):
        images()  # before the run folder is made or moved: an error here changes nothing
    parallel.wait()  # all have read, the first may write
    if start_over and parallel.FIRST and any(path.name != "lock" for path in exp_dir.iterdir()):
        say(f"* Moved the old run to {experiment.move_aside(exp_dir)}")
    experiment.prepare(exp_dir, hp)
    for name, (old, new) in changed.items():
        say(f"* {name} was {old}, from here on it is {new}")

    encoder = encoder.to(device, memory_format=torch.channels_last)  # on a CPU 1.3x in training, 1.8x in encoding
    if not experiment.is_trained(hp, checkpoint):
        say_stage("Training SSL encoder")
        checkpoint = train(hp, exp_dir, log, encoder, images(), checkpoint, changed, bf16)
    say(f"* Encoder: {exp_dir / 'checkpoints' / 'last.pt'}")

    weights = experiment.checksum(*checkpoint["encoder"].values())
    test_patches, bs = views_and_batch(hp)
    encode_key = {"encoder": weights, "bs": bs, "test_patches": test_patches, "eval_views": hp.eval_views,
                  "input_size": hp.input_size, "emb_pool": hp.emb_pool, "save_proj": hp.save_proj}  # fmt: skip
    class_names = checkpoint["data"]["class_names"]
    splits = [split for split in ("train", "test") if checkpoint["data"][split]]
    encoded = {split: load_cached(exp_dir / "artifacts" / f"{split}.pt", encode_key) for split in splits}
    for split in splits:
        if encoded[split] is None:
            say_stage(f"Encoding '{split}' dataset for evaluation")
            image_set = images()[split]
            log.begin(f"encoding {split}")
            encoded[split] = encode(hp, exp_dir, log, encoder, image_set, split, encode_key, bf16)
    if not parallel.FIRST:
        return

    probe_key = {**encode_key, "n_eval_epochs": hp.n_eval_epochs, "eval_lr": hp.eval_lr}
    result = experiment.read_json(exp_dir / "linear_accuracy.json")
    missing = why_no_probe(class_names, "test" in splits)
    if not missing and (result.get("key") != probe_key or not load_cached(exp_dir / "probe.pt", probe_key)):
        say_stage("Fitting a linear classifier")
        log.begin("probe")
        result = probe(hp, exp_dir, encoded, class_names, probe_key, device, bf16)
    encoding = sum(split["seconds"] for split in encoded.values())
    seconds = {"training": checkpoint["seconds"], "encoding": encoding, **({} if missing else {"probe": result["seconds"]})}
    log.finish(checkpoint["metrics_bytes"], {} if missing else result, seconds=seconds)
    summary(exp_dir, checkpoint, encoded["train"], seconds, result, missing)


def pick_device(name):
    """The torch.device of this name; raises UsageError if there is none."""
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
    """bf16 where matrix products in it are an instruction of the processor: elsewhere it is slower than fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    if device.type == "cpu" and os.path.exists("/proc/cpuinfo"):
        flags = set(Path("/proc/cpuinfo").read_text().split())
        return "bf16" if flags & {"avx512_bf16", "amx_bf16", "bf16"} else "fp32"
    return "fp32"


def keep_freed_memory():
    """Keep large blocks that were freed for the next step, where glibc would return them to the system and get them back
    page by page, filled with zeros: a training step takes 4% less time (median of five pairs of runs, -2 to 10%;
    two cores) and, by fragmentation, a tenth more memory."""
    if platform.libc_ver()[0] == "glibc":
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
        ctypes.CDLL(None).mallopt(M_MMAP_MAX, 0)
        ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def load_data(hp, checkpoint):
    """{"train": ImageSet, "test": ImageSet or None, "info": what of them a checkpoint keeps}.

    Raises UsageError if they are not the images that the checkpoint was trained on.
    """
    say(f"* Loading {hp.dataset}")
    train_set, test_set = (data.load_images(hp.dataset, hp.data_dir, train, hp.image_size, hp.labels) for train in (True, False))
    if hp.n_images:
        subset = data.balanced_subset(train_set.labels, len(train_set.images), hp.n_images, data.generator(hp.seed, "subset"))
        labels = None if train_set.labels is None else train_set.labels[subset]
        train_set = train_set._replace(images=data.subset_of(train_set.images, subset), labels=labels)
    if hp.n_epochs > 0 and len(train_set.images) < hp.bs:
        raise UsageError(f"bs {hp.bs} is more than the {len(train_set.images)} training images: lower bs")
    missing = why_no_probe(train_set.class_names, test_set)
    if hp.eval_freq and missing:
        raise UsageError(f"eval_freq {hp.eval_freq}: no accuracy can be measured, {missing}")
    info = {"train": fingerprint(train_set), "test": test_set and fingerprint(test_set), "class_names": train_set.class_names}
    if checkpoint and checkpoint["data"] != info:
        raise UsageError(f"the images of {hp.dataset} in {hp.data_dir} are not those that this run was trained on (or another "
                         f"version of Pillow decodes them otherwise): bring them back, or train under a new --exp_name")
    n_test = len(test_set.images) if test_set else 0
    say(f"* Images: {len(train_set.images)} train, {n_test} test, {len(train_set.class_names)} classes")
    return {"train": train_set, "test": test_set, "info": info}


def fingerprint(image_set):
    """A checksum of the images and their labels."""
    images, labels, _ = image_set
    digests = images.digests if isinstance(images, data.ImageFile) else images  # reading a large file would take minutes
    return experiment.checksum(*(tensor for tensor in (digests, labels) if tensor is not None))


def build_encoder(hp, checkpoint):
    """The encoder with the checkpoint's weights, or else with seeded random ones and the pretrained projection.

    Raises UsageError if weights are missing or do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(data.generator(hp.seed, "init").initial_seed())
        encoder = Encoder(hp.arch, hp.h_dim, hp.z_dim, hp.activation, hp.batch_norm)
    if checkpoint:
        load_strictly(encoder, checkpoint["encoder"], "the checkpoint")
    elif hp.pretrained_proj:
        if not Path(hp.pretrained_proj).is_file():
            raise UsageError(f"pretrained_proj {hp.pretrained_proj} is not a file")
        weights = experiment.load(hp.pretrained_proj).get("encoder", {})
        prefix = "projection."
        projection = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        if not projection:
            raise UsageError(f"pretrained_proj {hp.pretrained_proj} holds no projection")
        load_strictly(encoder.projection, projection, f"pretrained_proj {hp.pretrained_proj}")
    # Frozen are the weights; its batch norm goes on following the statistics of the new features.
    encoder.projection.requires_grad_(hp.pretrained_proj is None)
    return encoder


def load_strictly(module, weights, source):
    try:
        module.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"the weights of {source} do not fit arch, h_dim, z_dim or batch_norm of this run: {reason}") from None
    if not all(value.isfinite().all() for value in weights.values()):
        raise UsageError(f"the weights of {source} are not finite")


# -------------------------------------------------------------------------------------------- training


def train(hp, exp_dir, log, encoder, images, checkpoint, changed, bf16):
    """Train from the checkpoint (None: from the start) to hp.n_epochs; returns the last checkpoint. Raises RunError where
    a loss, gradient or weight is not finite, and Interrupted after a signal, its checkpoint written.

    What a step does depends on (seed, epoch, step) and on the state alone, so that a run that was stopped and resumed
    ends with the same bits as one that was not.
    """
    device = next(encoder.parameters()).device
    pixels = data.on_device(images["train"].images, device)  # uint8 (N, 3, size, size)
    bs, n_steps = hp.bs, len(pixels) // hp.bs
    optimizer = build_optimizer(hp, encoder)
    n_total = experiment.n_steps_in(hp.n_epochs, n_steps)
    if not (exp_dir / "patches.png").exists():
        draw_patches(pixels[:8].to(device), hp, exp_dir / "patches.png")
    state = restore(hp, log, optimizer, checkpoint, changed, n_steps, device)
    save = functools.partial(save_state, hp, exp_dir, images["info"], encoder, optimizer, state)
    content = checkpoint or save()  # a folder that can't be written is found now

    say_memory(hp, encoder, pixels, bf16)
    encoder.train()
    network = parallel.wrapped(encoder, device)  # shares the weights
    network = torch.compile(network) if hp.compile else network
    with hold_signals() as signals:
        for epoch in range(state.epoch, math.ceil(n_total / max(1, n_steps))):
            stop = min(n_steps, n_total - epoch * n_steps)  # the last epoch need not be whole
            order = torch.randperm(len(pixels), generator=data.generator(hp.seed, "order", epoch)).to(device)
            bar = tqdm(range(state.step, stop), f"epoch {epoch}", stop, initial=state.step, disable=quiet())
            rows = [parallel.own(order[step * bs : (step + 1) * bs]) for step in range(state.step, stop)]
            for step, batch in zip(bar, data.batches(pixels, rows, device), strict=False):
                lr = learning_rate(hp, (epoch * n_steps + step) / n_total)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                metrics = train_step(hp, network, optimizer, batch, data.generator(hp.seed, "patches", epoch, step), bf16)

                state.step, state.timed = step + 1, state.timed + 1
                state.recent.append(metrics)
                if state.step % hp.print_freq == 0 or state.step == stop:
                    summarise(state, log, lr, hp.n_patches * bs, bar)
                if hp.eval_freq and (epoch * n_steps + state.step) % hp.eval_freq == 0:
                    quick_knn(hp, log, encoder, images, state, bf16)
                due = time.monotonic() - state.saved_at > hp.checkpoint_every
                signum, due = parallel.greatest(signals[0] if signals else 0, due)
                if state.step < stop and (signum or due):
                    save()
                    raise_if(signum, exp_dir, state)
            invariance, uniformity, _ = (state.totals / state.n_totals).tolist()
            say(f"Epoch: {epoch} | Loss sim: {invariance:.5f} | Loss {hp.uniformity_loss.upper()}: {uniformity:.5f}")
            if stop == n_steps:
                state.epoch, state.step, state.totals, state.n_totals = epoch + 1, 0, torch.zeros(3), 0
            content = save()
            (signum,) = parallel.greatest(signals[0] if signals else 0)
            raise_if(signum, exp_dir, state)
    parallel.share_buffers(encoder)
    return content


def learning_rate(hp, progress):
    """The rate of a step before which `progress`, in [0, 1), of all steps lie."""
    return hp.lr if hp.schedule == "constant" else hp.lr * (1 + math.cos(math.pi * progress)) / 2


def train_step(hp, encoder, optimizer, images, generator, bf16):
    """One step on images uint8 (B, 3, H, W) on the encoder's device, for which the host never waits. Of several processes
    each has its B images and the losses are of all of them, n B.

    Returns (3,), on the device: invariance, uniformity and the norm of the gradient.
    """
    P, B, n = hp.n_patches, len(images), parallel.WORLD
    x = data.sample_patches(images, P, generator, hp.input_size or images.shape[-1], parallel.RANK * B, n * B)  # (P, B, 3, S, S)
    chunks = x.flatten(0, 1).tensor_split(math.ceil(P * B / (hp.max_patches or P * B)))  # (P B, 3, S, S), or parts of it
    with torch.set_grad_enabled(len(chunks) == 1):
        z_own = torch.cat([project(encoder, chunk, bf16) for chunk in chunks])  # (P B, z_dim)
    if len(chunks) > 1:
        z_own.requires_grad_()
    z = parallel.gather(z_own.unflatten(0, (P, B)))  # (P B, z_dim) -> (P, n B, z_dim)
    z = z.flatten(0, 1).unflatten(0, (P // hp.bags, hp.bags * n * B))  # an image in each of its bags
    invariance = loss.invariance_loss(z)
    uniformity = loss.tcr_loss(z, hp.tcr_eps) if hp.uniformity_loss == "tcr" else loss.vonmises_loss(z)
    total = hp.invariance_loss_weight * invariance + hp.uniformity_loss_weight * uniformity
    optimizer.zero_grad()
    total.backward()
    if len(chunks) > 1:
        backward_in_chunks(encoder, chunks, z_own.grad, bf16)
    grad_norm = torch.nn.utils.get_total_norm(p.grad for p in encoder.parameters() if p.grad is not None)
    optimizer.step()
    return torch.stack([invariance, uniformity, grad_norm]).detach()


def project(encoder, x, bf16):
    """x (n, 3, S, S) -> z (n, z_dim)."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        return encoder(x)[1]


def backward_in_chunks(encoder, chunks, grad, bf16):
    """The gradient of the weights from that of z (n, z_dim), the chunks going through the network again, one by one, so that
    the activations of one alone are kept. The running statistics of batch norm see each chunk twice.
    Source: arXiv 2101.06983, section 3.2 (gradient cache)."""
    for i, (chunk, part) in enumerate(zip(chunks, grad.tensor_split(len(chunks)), strict=True)):
        with parallel.averaging(encoder, now=i == len(chunks) - 1):
            project(encoder, chunk, bf16).backward(part)


def say_memory(hp, encoder, pixels, bf16):
    """Print what a training step will take and what there is, with a warning where it is more."""
    n, size, device = hp.n_patches * hp.bs // parallel.WORLD, hp.input_size or pixels.shape[-1], next(encoder.parameters()).device
    n = min(n, hp.max_patches or n)
    patch = saved_bytes(encoder, 3, size, bf16) - saved_bytes(encoder, 2, size, bf16)
    weights = 4 * 4 * sum(p.numel() for p in encoder.parameters())  # float32: weights, gradients, momentum; copies in bf16
    need = (1.6 * n * patch + weights + getattr(pixels, "nbytes", 0)) / 1e9  # backward adds its own: 1.4 to 1.8 measured on a CPU
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory / 1e9
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    say(f"* Memory: about {need:.1f} GB for a step of {n} patches; {there:.1f} GB are there")
    if need > there:
        print("warning: that is more than there is: lower bs, n_patches or max_patches, or take precision bf16", file=sys.stderr)


def saved_bytes(encoder, n_patches, size, bf16):
    """Bytes of what autograd keeps of n_patches patches of this size between forward and backward; tried on the CPU."""
    kept = []

    def keep(tensor):
        kept.append(tensor.untyped_storage())
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        copy.deepcopy(encoder).cpu().train()(torch.zeros(n_patches, 3, size, size))  # a copy: batch norm counts what it sees
    return sum({storage.data_ptr(): storage.nbytes() for storage in kept}.values())


def peak_memory(device):
    """Bytes: the most that was taken so far, of the GPU's memory, else of the computer's by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def build_optimizer(hp, encoder):
    """LARS with the authors' trust coefficient, .005, or plain SGD, over the weights that are not frozen."""
    params = [p for p in encoder.parameters() if p.requires_grad]
    if hp.optimizer == "sgd":
        return torch.optim.SGD(params, hp.lr, momentum=0.9, weight_decay=hp.weight_decay, nesterov=True)
    return LARS(params, hp.lr, momentum=0.9, weight_decay=hp.weight_decay, nesterov=True, eta=0.005, clip=True)


def restore(hp, log, optimizer, checkpoint, changed, n_steps, device):
    """The state of the training loop, and the optimizer's and metrics.jsonl's, as they were at the checkpoint.

    totals (3,): sums of invariance, uniformity and gradient norm over n_totals steps of this epoch; recent: the same
    three, on the device, of each step after those; timed: steps since the clock of the speed was last read.
    """
    state = SimpleNamespace(epoch=0, step=0, totals=torch.zeros(3), n_totals=0, recent=torch.zeros(0, 3), seconds=0.0,
                            peak_memory=0)
    if checkpoint:
        shapes = {i: p.shape for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
        if {i: entry["momentum_buffer"].shape for i, entry in checkpoint["optimizer"].items()} not in ({}, shapes):
            raise UsageError("the momenta of the checkpoint do not fit its weights")
        optimizer.load_state_dict({**optimizer.state_dict(), "state": checkpoint["optimizer"]})
        state = SimpleNamespace(**{key: checkpoint[key] for key in vars(state)})
        if "bs" in changed:  # the same images lie behind us; their losses were of other batches
            left = experiment.n_steps_in(hp.n_epochs, n_steps) - state.epoch * n_steps
            state.step = min(state.step * changed["bs"][0] // hp.bs, n_steps - 1, left - 1)
            state.totals, state.n_totals, state.recent = torch.zeros(3), 0, torch.zeros(0, 3)
        say(f"* Going on at epoch {state.epoch} step {state.step}")
    state.n_steps = n_steps
    log.begin("training", checkpoint["metrics_bytes"] if checkpoint else 0)
    for name, (old, new) in changed.items():
        log.add(event="changed", **place(state), name=name, old=old, new=new)
    state.recent, state.timed = list(state.recent.to(device)), 0
    state.resumed_at = state.saved_at = state.summarised_at = time.monotonic()
    return state


def place(state):
    """Where in the training a line of metrics.jsonl belongs."""
    return {"epoch": state.epoch, "step": state.step, "global_step": state.epoch * state.n_steps + state.step}


def save_state(hp, exp_dir, info, encoder, optimizer, state):
    """Write a checkpoint, unless the weights or a loss since the last one are not finite; returns its content."""
    check_finite(state)
    if not all(value.isfinite().all() for value in encoder.state_dict().values()):
        raise RunError(f"epoch {state.epoch} step {state.step}: weights are not finite; {REMEDY}")
    now = time.monotonic()
    state.seconds, state.resumed_at = state.seconds + now - state.resumed_at, now
    state.peak_memory = max(state.peak_memory, peak_memory(next(encoder.parameters()).device))
    content = {
        "hparams": vars(hp),
        "data": info,
        "encoder": encoder.state_dict(),
        "optimizer": optimizer.state_dict()["state"],
        "epoch": state.epoch,
        "step": state.step,
        "n_steps": state.n_steps,
        "totals": state.totals,
        "n_totals": state.n_totals,
        "recent": torch.stack(state.recent).cpu() if state.recent else torch.zeros(0, 3),
        "seconds": state.seconds,
        "peak_memory": state.peak_memory,
    }
    experiment.save_checkpoint(exp_dir, content)
    state.saved_at = time.monotonic()
    return content


REMEDY = "the last checkpoint is kept: lower lr (or set precision: fp32) in hparams.yaml, then resume"


def check_finite(state):
    for i, values in enumerate(torch.stack(state.recent).tolist() if state.recent else []):
        for name, value in zip(("invariance loss", "uniformity loss", "gradient norm"), values, strict=True):
            if not math.isfinite(value):
                step = state.step - len(state.recent) + i
                raise RunError(f"epoch {state.epoch} step {step}: the {name} is {value}; {REMEDY}")


def summarise(state, log, lr, patches_per_step, bar):
    """Add the steps since the last summary to the totals, and to metrics.jsonl and the screen as their mean."""
    check_finite(state)  # reads the losses of many steps at once: the device is waited for here and not in each
    rows = torch.stack(state.recent).cpu()  # (steps, 3)
    state.totals, state.n_totals, state.recent = state.totals + rows.sum(0), state.n_totals + len(rows), []
    invariance, uniformity, grad_norm = rows.mean(0).tolist()
    now = time.monotonic()
    speed = state.timed * patches_per_step / (now - state.summarised_at)
    state.timed, state.summarised_at = 0, now
    log.add(**place(state), loss_sim=invariance, loss_uniformity=uniformity, grad_norm=grad_norm, lr=lr,
                patches_per_second=round(speed, 1))  # fmt: skip
    text = f"sim {invariance:.4f} uniformity {uniformity:.3f} lr {lr:.4f} {speed:,.0f} patches/s"
    if bar.disable:
        left = tqdm.format_interval((bar.total - state.step) * patches_per_step / speed)
        say(f"epoch {state.epoch} step {state.step}/{bar.total} | {text}, {left} left")
    else:
        bar.set_postfix_str(text)


def quick_knn(hp, log, encoder, images, state, bf16):
    """kNN accuracy now, of up to 1,000 test images among up to 5,000 training images, by 4 views of each."""
    start, train_set, test_set = time.monotonic(), images["train"], images["test"]
    device, n_patches = next(encoder.parameters()).device, min(4, hp.test_patches or hp.n_patches)
    tensors = []
    for split, image_set, limit in (("train", train_set, 5000), ("test", test_set, 1000)):
        n = min(limit, len(image_set.images))
        subset = data.balanced_subset(image_set.labels, len(image_set.images), n, data.generator(hp.seed, f"knn-{split}"))
        pixels = data.on_device(data.subset_of(image_set.images, subset), device)
        encoded = evaluate.encode(encoder, pixels, n_patches, hp.seed, f"knn-{split}", hp.bs, views=hp.eval_views,
                                  size=hp.input_size, emb_pool=hp.emb_pool, bf16=bf16)  # fmt: skip
        tensors += [encoded["embeddings"], image_set.labels[subset]]
    top1 = evaluate.knn(*tensors, len(train_set.class_names))
    log.add(**place(state), knn_top1=top1)
    say(f"epoch {state.epoch} step {state.step} | kNN {top1:.2f}%")
    state.summarised_at += time.monotonic() - start  # the clock of the training's speed stood still


def draw_patches(pixels, hp, path):
    """A picture: a row for each of the images (n, 3, h, w), itself and then up to 20 patches as the network sees them."""
    size, n = hp.input_size or pixels.shape[-1], min(hp.n_patches, 20)
    x = data.sample_patches(pixels, n, data.generator(hp.seed, "picture"), size)  # (P, n, 3, size, size)
    whole = F.interpolate(pixels.cpu().float() / 255, size=(size, size), mode="bilinear", antialias=True)  # not on mps
    rows = torch.cat([whole[None], (x.cpu() + 1) / 2]).transpose(0, 1).flatten(0, 1)
    grid = torchvision.utils.make_grid(rows, nrow=n + 1, pad_value=1.0)
    picture = Image.fromarray(grid.mul(255).round().byte().permute(1, 2, 0).numpy())
    with experiment.replacing(path) as file:
        picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST).save(file, "PNG")


# ----------------------------------------------------------------------------- encoding, probe and report


def quiet():
    """tqdm's `disable`: no bar but on a terminal, and but one."""
    return None if parallel.FIRST else True


def progress(items, desc, every, unit, size=1):
    """The items, each of so many units, with a progress bar on a terminal, else a line after each `every` of them."""
    start = time.monotonic()
    bar = tqdm(items, desc, disable=quiet(), unit=f" {unit}", unit_scale=size)
    for done, item in enumerate(bar, 1):
        yield item
        if bar.disable and done % every == 0:
            rate = done / (time.monotonic() - start)
            left = tqdm.format_interval((len(items) - done) / rate)
            say(f"{desc} {done}/{len(items)} | {size * rate:,.0f} {unit}/s, {left} left")


def load_cached(path, key):
    """The content of the file, None unless it is there, whole, and the result of these very settings and weights."""
    if not path.exists():
        return None
    try:
        content = experiment.load(path)
    except RunError as error:
        print(f"warning: {error}: doing it again", file=sys.stderr)
        return None
    if content.get("key") != key:
        return None
    say(f"* Loaded {path}")
    return content


def views_and_batch(hp):
    """(views of an image, images at once) in encoding: as many patches at once as in training, that much fits."""
    test_patches = hp.test_patches or hp.n_patches
    return test_patches, max(1, hp.bs * hp.n_patches // test_patches)


def encode_views(hp, encoder, images, split, bf16, **more):
    """evaluate.encode by the settings of a run, with its progress."""
    n_patches, bs = views_and_batch(hp)
    bar = functools.partial(progress, desc=f"encode {split}", every=hp.print_freq, unit="patches",
                            size=bs * data.count_views(n_patches, hp.eval_views))  # fmt: skip
    pixels = data.on_device(images, next(encoder.parameters()).device)
    return evaluate.encode(encoder, pixels, n_patches, hp.seed, split, bs, views=hp.eval_views, size=hp.input_size,
                           emb_pool=hp.emb_pool, bf16=bf16, progress=bar, **more)  # fmt: skip


def encode(hp, exp_dir, log, encoder, image_set, split, key, bf16):
    """Encode a split and write it to artifacts; returns what is in the file. Raises RunError if an embedding is not finite."""
    start, n, n_patches = time.monotonic(), len(image_set.images), key["test_patches"]
    path = exp_dir / "artifacts" / f"{split}.pt"
    if hp.save_proj:
        size = 2 * n * n_patches * (hp.h_dim + hp.z_dim)  # float16
        say(f"* --save_proj: at most {size / 1e9:.2f} GB for {split}")
        if size > shutil.disk_usage(exp_dir).free:
            raise RunError(f"save_proj needs {size / 1e9:.2f} GB in {exp_dir}, more than is free there")
    encoded = encode_views(hp, encoder, image_set.images, split, bf16, save_proj=hp.save_proj,
                           part=(parallel.RANK, parallel.WORLD))  # fmt: skip
    encoded |= {name: parallel.total(value) for name, value in encoded.items() if isinstance(value, torch.Tensor)}
    if not encoded["embeddings"].isfinite().all():
        raise RunError(f"embeddings of the {split} images are not finite: train under a new --exp_name with --precision fp32")
    encoded |= {"key": key, "seconds": time.monotonic() - start}
    if image_set.labels is not None:
        encoded["labels"] = image_set.labels
    if split == "test":
        add_embeddings(log, encoded["embeddings"], image_set, hp.seed)
    experiment.save(path, encoded)
    return encoded


def add_embeddings(log, embeddings, image_set, seed, n=1000):
    """Up to n test embeddings to TensorBoard, with their images and the names of their classes."""
    images, labels, class_names = image_set
    some = data.balanced_subset(labels, len(images), min(n, len(images)), data.generator(seed, "projector"))
    names = ["" if labels is None else class_names[labels[i]] for i in some]
    log.add_embeddings(embeddings[some], data.subset_of(images, some)[:], names)


def why_no_probe(class_names, has_test):
    """Why there can be no accuracy, '' if there can."""
    if not class_names:
        return "the images have no labels (fewer than two train/<class> folders)"
    return "" if has_test else "there are no test images (no test/<class> folders)"


def probe(hp, exp_dir, encoded, class_names, key, device, bf16):
    """Linear probe and kNN on the encoded images: writes probe.pt and linear_accuracy.json, returns the latter."""
    start = time.monotonic()
    x, y, x_test, y_test = (encoded[split][name].to(device) for split in ("train", "test") for name in ("embeddings", "labels"))
    result, layer = evaluate.linear_probe(
        x, y, x_test, y_test, len(class_names), hp.eval_lr, hp.n_eval_epochs, seed=hp.seed, bf16=bf16,
        progress=functools.partial(progress, desc="linear probe", every=hp.print_freq, unit="epochs"),
    )
    result["knn_top1"] = evaluate.knn(x, y, x_test, y_test, len(class_names))
    experiment.save(exp_dir / "probe.pt", {**layer.state_dict(), "class_names": class_names, "key": key})
    result |= {"n_train": len(x), "n_test": len(x_test), "seconds": time.monotonic() - start, "key": key}
    experiment.write_json(exp_dir / "linear_accuracy.json", result)
    return result


def summary(exp_dir, checkpoint, train_split, seconds, result, missing):
    say_stage("Report")
    say(f"images           by {train_split['n_views']} views each: {train_split['key']['eval_views']}")
    if missing:
        say(f"linear probe     skipped: {missing}")
    else:
        say(f"linear probe     top-1 {result['top1']:.2f}%  top-5 {result['top5']:.2f}%  last epoch, {result['n_test']} images")
        chosen = " chosen on a tenth of the training images" if result["held_out"] else ""
        say(f"                 learning rate {result['lr']:g}{chosen}")
        say(f"                 top-1 {result['best_top1']:.2f}%  best epoch ({result['best_epoch']}), chosen on the test images")
        say(f"20-NN            top-1 {result['knn_top1']:.2f}%")
    say("seconds          " + "  ".join(f"{stage} {taken:.1f}" for stage, taken in seconds.items()))
    say(f"memory           {checkpoint['peak_memory'] / 1e9:.2f} GB at most while training")
    say(f"files            {exp_dir}")


# --------------------------------------------------------------------------------------------- signals


class Interrupted(KeyboardInterrupt):
    def __init__(self, signum, message="stopped"):
        super().__init__(message)
        self.signum = signum


def raise_interrupted(signum, frame):
    raise Interrupted(signum)


@contextmanager
def handling(handler):
    """SIGINT and SIGTERM go to handler within; nothing changes in threads, which can't have handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)


@contextmanager
def hold_signals():
    """The first SIGINT or SIGTERM is noted in the list that this yields; a second one leaves at once."""
    noted = []

    def note(signum, frame):
        if noted:
            os._exit(128 + signum)
        noted.append(signum)

    with handling(note):
        yield noted


def raise_if(signum, exp_dir, state):
    """Raise Interrupted if a signal was noted, in any process; when the checkpoint is written."""
    if signum:
        parallel.wait()
        command = f"python main.py resume --exp_dir {shlex.quote(str(exp_dir))}"
        raise Interrupted(signum, f"stopped at epoch {state.epoch} step {state.step}; go on with: {command}")


if __name__ == "__main__":
    sys.exit(main())
