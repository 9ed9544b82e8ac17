"""EMP-SSL: train an encoder without labels in about one pass over the data, encode the images, fit a linear probe."""

import functools
import os
import shlex
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from infra import startup

if __name__ == "__main__":
    startup.prepare()

import torch

import cli
import collapse
import forecast
from cli import given_settings
from data import Images, why_no_probe
from encode import encode_split
from evaluate import METRICS, fit_probe
from experiment import Run, labels_checksum
from hparams import PRESETS, SETTINGS, from_dict, short
from infra import distributed
from infra.console import EVERY_PROCESS, PLAIN, log, log_stage, quiet_libraries
from infra.device import arithmetic, configure, pick_device, pick_precision
from infra.errors import RunError, UsageError, explain
from infra.metrics import environment, git_commit
from infra.signals import Interrupted, raise_signals
from tools import cleanup, compare, dry_run, export, finetune, probe, report
from train import train
from weights import build_encoder


def main(argv=None):
    """Run one command, for example main(["train", "--dataset", "textures"]), and return its exit code.

    0: done. 1: failed while running. 2: wrong usage. 130, 143 and 138: stopped by SIGINT, SIGTERM and SIGUSR1.
    """
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    try:
        args = parse(argv)
        with raise_signals(), nullcontext() if debug else quiet_libraries():
            args.command(args)
        return 0
    except SystemExit as stop:  # argparse, after --help
        return stop.code or 0
    except Interrupted as stop:
        log.warning(stop, extra=PLAIN)
        return 128 + stop.signum
    except (RunError, UsageError) as error:  # all processes raise it; only the main one reports it
        log.error(error, exc_info=debug)
        return error.code
    except BrokenPipeError:  # whoever read the output has left, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it at the exit
        return 1
    except Exception as error:
        log.error(explain(error), exc_info=debug, extra=EVERY_PROCESS)
        return 1


def run_experiment(hp, exp_dir, argv, start_over=False, rewrite=True):
    """Run the three stages and print the report. A stage whose result exists is skipped.

    argv: the command line, which is recorded. start_over: move an existing folder aside first. rewrite: hparams.yaml may be
    replaced. Raises UsageError or RunError.
    Errors in the settings or the data are raised before a result is written.
    """
    device = pick_device(distributed.local_device(hp.device))
    distributed.shard_size(hp.bs, hp.n_patches)  # raises UsageError if the processes can't share it
    precision = pick_precision(hp.precision, device)
    configure(device, hp.deterministic)
    launch = {"command": shlex.join(["main.py", *argv]), **git_commit(), **environment(device, precision),
              "labels_checksum": labels_checksum(hp)}  # fmt: skip
    log.info(f"* Device: {device}, precision: {arithmetic(precision, device)}")
    with Run(exp_dir).opened(hp, launch, device, start_over) as run:
        run_stages(hp, run, device, precision == "bf16", rewrite)


def run_stages(hp, run, device, bf16, rewrite):
    """Train, encode and probe."""
    images = Images(hp, run.fingerprints)  # read when first used
    encoder = build_encoder(hp, run.checkpoint)
    if not run.is_trained() or run.images_moved():
        pixels = images["train"].images  # read now: an error here changes nothing in the run folder
        if not run.is_trained() and hp.n_epochs > 0:
            forecast.check_memory(hp, encoder, pixels, device, bf16)
    distributed.barrier()  # all processes have read; now the main process may write
    run.prepare(rewrite)

    encoder = encoder.to(device, memory_format=torch.channels_last)  # on a CPU 1.3x as fast in training, 1.8x in encoding
    train(hp, run, encoder, images, bf16)
    log.info(f"* Encoder: {run.last}")

    encoded = {}
    for split in run.splits:
        compute = functools.partial(encode_split, hp, run, encoder, images, split, bf16)
        encoded[split] = run.cached(run.artifacts[split], run.key("encode", split), compute)
    probe_and_report(hp, run, encoded, device, bf16)


@distributed.on_main_process
def probe_and_report(hp, run, encoded, device, bf16):
    """Fit the linear probe, if the images have labels, and print the results of all stages."""
    class_names, signs, result = run.fingerprints["class_names"], encoded["train"].get("collapse", {}), {}
    seconds = {"training": run.checkpoint["state"]["seconds"], "encoding": sum(split["seconds"] for split in encoded.values())}
    missing = why_no_probe(class_names, "test" in encoded)
    if not missing:
        compute = functools.partial(fit_probe, hp, run, encoded, class_names, device, bf16)
        probe = run.cached(run.probe, run.key("probe"), compute)
        result = {**probe["result"], **signs, "key": probe["key"]}
        run.write_result(result)
        seconds["probe"] = result["seconds"]
    run.journal.finish(run.checkpoint["metrics_bytes"], result, seconds, signs)

    log_stage("Report")
    log.info(f"images           by {encoded['train']['n_views']} views each: {hp.eval_views}")
    log_result(result, missing)
    if signs:
        log_collapse(signs)
    log.info("seconds          " + "  ".join(f"{stage} {taken:.1f}" for stage, taken in seconds.items()))
    log.info(f"memory           {run.checkpoint['state']['peak_memory'] / 1e9:.2f} GB at most while training")
    log.info(f"files            {run.dir}")


def log_result(result, missing):
    """Print the accuracies, or why they are missing."""
    if missing:
        log.info(f"linear probe     skipped: {missing}")
        return
    log.info(f"linear probe     top-1 {result['top1']:.2f}%  top-5 {result['top5']:.2f}%  last epoch, {result['n_test']} images")
    chosen = " chosen on a tenth of the training images" if result["held_out"] else ""
    log.info(f"                 learning rate {result['lr']:g}{chosen}")
    log.info(f"                 top-1 {result['train_top1']:.2f}%  of the training images themselves")
    classes = sorted((top1, name) for name, top1 in result.get("per_class", {}).items() if top1 is not None)
    if len(classes) > 1:
        (low, worst), (high, best) = classes[0], classes[-1]
        log.info(f"                 top-1 {low:.2f}% ({worst}) to {high:.2f}% ({best}), by class")
    log.info(f"                 top-1 {result['best_top1']:.2f}%  best epoch ({result['best_epoch']}), chosen on the test images")
    for name, (title, _) in METRICS.items():
        log.info(f"{title:16} top-1 {result[name]:.2f}%")


def log_collapse(signs):
    """Print the signs of collapse, and what to do if there is one."""
    log.info(f"collapse         {collapse.told(signs)}  of 1,000 training images")
    if collapse.advice(signs):
        log.info(f"                 {collapse.advice(signs)}")


def parse(argv):
    """Return the arguments of a command line. args.command is the function to call."""
    tools = (compare, report, export, probe, finetune, cleanup)
    return cli.parse(argv, __doc__, [add_commands, *(tool.add_commands for tool in tools)])


def add_commands(commands):
    """Add the commands train and resume."""
    cli.add_train(commands).set_defaults(command=train_command)
    cli.add_resume(commands).set_defaults(command=resume_command)


def hyperparameters(args):
    """Return the Hparams of a train command: given options first, then --config_from or --preset, then the defaults."""
    if args.config_from and args.preset:
        raise UsageError("--config_from and --preset exclude each other: each names what is not given")
    base = vars(Run(args.config_from).read_hparams()) if args.config_from else PRESETS.get(args.preset, {})
    defaults = {name: setting.default for name, setting in SETTINGS.items()}
    return from_dict({**defaults, **base, **given_settings(args)}, "command line")


def is_name(text):
    """Whether a text can be the first part of a folder's name."""
    return text.isprintable() and "/" not in text and 0 < len(text.encode(errors="surrogateescape")) <= 150


def train_command(args):
    """Start or resume the experiment that the command line describes, or only predict its cost."""
    if not is_name(args.exp_name):
        raise UsageError(f"exp_name {short(args.exp_name)} must be the name of one folder, of at most 150 bytes")
    hp = hyperparameters(args)
    seed = "" if hp.seed == SETTINGS["seed"].default else f"_seed{hp.seed}"
    exp_dir = Path(args.log_folder) / f"{args.exp_name}__numpatch{hp.n_patches}_bs{hp.bs}_lr{hp.lr:g}{seed}"
    if args.config_from and exp_dir.resolve() == Path(args.config_from).resolve():
        raise UsageError(f"{exp_dir} is the run folder that --config_from names: give the new experiment an --exp_name")
    run = Run(exp_dir)
    exists = args.resume and run.hparams_yaml.exists()
    if hp.max_patches is None and "max_patches" not in given_settings(args):
        hp = replace(hp, max_patches=run.read_hparams().max_patches if exists else forecast.automatic_max_patches(hp))
    if args.dry_run:
        dry_run.dry_run(hp)
        return
    if exists:
        for name, (there, here) in run.read_hparams().differences(hp).items():
            log.info(f"* {name} is {there} in {run.hparams_yaml} and {here} in this command, which decides")
    run_experiment(hp, exp_dir, args.argv, start_over=not args.resume)


def resume_command(args):
    """Go on with a run folder by its hparams.yaml, into which settings of the command line are written first."""
    run, given = Run(args.exp_dir), given_settings(args)
    hp = run.read_hparams()
    log.info(f"* Loaded configuration settings from: {run.hparams_yaml}")
    if given:
        hp = from_dict({**vars(hp), **given}, "command line")
    run_experiment(hp, args.exp_dir, args.argv, rewrite=bool(given))  # else the user may be editing hparams.yaml


if __name__ == "__main__":
    sys.exit(main())
