"""EMP-SSL: learn an encoder without labels in about one pass over the data, and measure it."""

import os
import shlex
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

if __name__ == "__main__":
    # With PYTHONSAFEPATH, Python does not look for modules in the folder of this file.
    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
    from infra import startup

    startup.prepare()

import torch

import cli
from data import Images, measured_range, warn_of_changed_images, why_no_probe
from encode import check_views, encode_split
from evaluate import (
    METRICS,
    N_COLLAPSE,
    accuracy_text,
    collapse_text,
    collapse_warning,
    fit_probe,
    measure_collapse,
)
from experiment import Machine, Run, labels_checksum, quote
from forecast import automatic_max_patches, check_memory, dry_run, within_budget
from hparams import from_dict
from images.copies import copies_text, find_copies
from infra import distributed
from infra.console import EVERY_PROCESS, PLAIN, log, log_stage, quiet_libraries
from infra.errors import RunError, UsageError, explain
from infra.metrics import environment, git_commit
from infra.signals import Interrupted, raise_signals
from tools.report.patches_png import draw_patches
from train import train
from weights import build_encoder


def main(argv=None):
    """Run one command, for example main(["train", "--dataset", "textures"]); return its exit code.

    0: done. 1: failed while running. 2: wrong usage. 130, 143 and 138: stopped by SIGINT, SIGTERM
    and SIGUSR1.
    """
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    try:
        args = cli.parse(argv, __doc__, train_command, resume_command)
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
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())  # Python flushes it at the exit
        return 1
    except Exception as error:
        log.error(explain(error), exc_info=debug, extra=EVERY_PROCESS)
        return 1


def train_command(args):
    """Start or resume the experiment that the command line describes, or only predict its cost."""
    hp = cli.hparams_of(args)
    run = Run(cli.exp_dir_of(args, hp))
    exists = args.resume and run.hparams_yaml.exists()
    if not exists:
        cli.warn_of_preset(args, hp)
    if hp.max_patches is None and "max_patches" not in cli.given_settings(args):
        most = run.read_hparams().max_patches if exists else automatic_max_patches(hp)
        hp = replace(hp, max_patches=most)
    hp = with_value_range(hp, run, args, exists)
    if args.budget:
        hp = budgeted(hp, run, args, exists)
    if args.dry_run:
        dry_run(hp)
        return
    if exists:
        for name, (there, here) in run.read_hparams().differences(hp).items():
            log.info(
                f"* {name} is {there} in {run.hparams_yaml} and {here} in this command, which "
                f"decides"
            )
    run_experiment(hp, run.dir, args.argv, start_over=not args.resume)


def with_value_range(hp, run, args, exists):
    """Return hp with the value_low and value_high that are not given.

    They are measured for a new run, else as hparams.yaml has them.
    """
    given = cli.given_settings(args)
    names = [name for name in ("value_low", "value_high") if getattr(hp, name) is None]
    names = [name for name in names if name not in given]
    if not names:
        return hp
    values = vars(run.read_hparams()) if exists else measured_range(hp)
    return replace(hp, **{name: values[name] for name in names})


def budgeted(hp, run, args, exists):
    """Return hp with what --budget sets: measured for a new run, else as hparams.yaml has it."""
    lighter = cli.lighter_settings(args)
    if not exists:
        return within_budget(hp, args.budget, lighter)
    there = run.read_hparams()
    log.info(
        f"* --budget has no effect on a run that exists: n_epochs is {there.n_epochs:g} in "
        f"{run.hparams_yaml}; to train on, resume it with more --n_epochs"
    )
    names = ["n_epochs", *(name for change in lighter for name in change)]
    if lighter and "n_images" not in cli.given_settings(args):
        names.append("n_images")
    return replace(hp, **{name: getattr(there, name) for name in names})


def resume_command(args):
    """Go on with a run folder by its hparams.yaml, into which given settings are written first."""
    run = Run(args.exp_dir)
    hp = run.read_hparams()
    log.info(f"* Loaded configuration settings from: {run.hparams_yaml}")
    given = cli.given_settings(args)
    if given:
        hp = from_dict({**vars(hp), **given}, "command line")
    rewrite = bool(given)  # else the user may be editing hparams.yaml
    run_experiment(hp, run.dir, args.argv, rewrite=rewrite)


def run_experiment(hp, exp_dir, argv, start_over=False, rewrite=True):
    """Train, encode and probe, and print the report. A stage whose result exists is skipped.

    argv: the command line, which is recorded. start_over: move an existing folder aside first.
    rewrite: hparams.yaml may be replaced. Raises UsageError or RunError. Errors in the settings or
    the data are raised before a result is written.
    """
    distributed.shard_size(hp.bs, hp.n_patches)  # raises UsageError if processes can't share it
    machine = Machine.of(hp)
    log.info(f"* Device: {machine.device}, precision: {machine.arithmetic}")
    launch = {
        "command": shlex.join(["main.py", *argv]),
        **git_commit(),
        **environment(machine.device, machine.precision),
        "labels_checksum": labels_checksum(hp),
    }
    with Run(exp_dir).opened(hp, machine, launch, start_over) as run:
        images = Images(hp, run.fingerprints, run.images_changed())  # read when first used
        encoder = build_encoder(run)
        check_before_writing(run, encoder, images)
        distributed.barrier()  # all processes have read; now the main process may write
        run.prepare(rewrite)
        if images.are_read:
            run.write_images_csv()
        # Not before: processes that decode are forked without a CUDA context.
        encoder = encoder.to(run.device, memory_format=torch.channels_last)
        if not run.is_trained():
            draw_patches(hp, images["train"], run.patches)
        train(run, encoder, images)
        log.info(f"* Encoder: {run.last}")
        encoded = {}
        for split in run.splits:
            compute = partial(encode_stage, run, encoder, images, split, encoded.get("train"))
            encoded[split] = run.cached(split, compute)
        probe_and_report(run, encoded)


def check_before_writing(run, encoder, images):
    """Check the views; where training needs them, read the images and check the memory.

    Of a trained run, whose images have not moved, only say if they have changed. An error here
    changes nothing in the run folder.
    """
    check_views(run.hp, encoder)
    if run.is_trained() and not run.images_moved():
        warn_of_changed_images(run.hp, images.changed)
        return
    pixels = images["train"].images
    if not run.is_trained() and run.hp.n_epochs > 0:
        check_memory(run.hp, run.machine, encoder, pixels)


def encode_stage(run, encoder, images, split, encoded_train):
    """Stage 2 of one split.

    With the collapse metrics of the training images, and the copies of them among the test images.
    """
    start = time.monotonic()
    encoded = encode_split(run, encoder, images, split)
    if split == "train":
        run.write_images_csv()
        encoded["collapse"] = measure_collapse(run, encoder, images["train"])
    else:
        sets = [images[name].images for name in ("test", "train")]
        embeddings = [content["embeddings"] for content in (encoded, encoded_train)]
        encoded["copies"] = find_copies(*sets, *embeddings, run.device)
    return {**encoded, "seconds": time.monotonic() - start}


@distributed.on_main_process
def probe_and_report(run, encoded):
    """Fit the linear probe, if the images have labels, and print the results of all stages."""
    state = run.checkpoint["state"]
    collapse = encoded["train"].get("collapse", {})
    result = {}
    seconds = {
        "training": state["seconds"],
        "encoding": sum(split["seconds"] for split in encoded.values()),
    }
    missing = why_no_probe(run.fingerprints["class_names"], "test" in encoded)
    if not missing:
        probe = run.cached("probe", partial(fit_probe, run, encoded))
        result = {**probe["result"], **collapse, "key": probe["key"]}
        run.write_result(result)
        seconds["probe"] = result["seconds"]
    run.journal.finish(run.checkpoint["metrics_bytes"], result, seconds, collapse, run.fingerprints)

    log_stage("Report")
    n_views = encoded["train"]["n_views"]
    mirrored = ", with mirror images" if run.hp.mirror else ""
    log.info(f"images           views of each: {n_views}, {run.hp.eval_views}{mirrored}")
    if missing:
        log.info(f"linear probe     skipped: {missing}")
    else:
        log_accuracies(result)
        n_unlabelled = sum(int((split["labels"] < 0).sum()) for split in encoded.values())
        if n_unlabelled:
            log.info(f"                 without {n_unlabelled:,} images that have no label")
    if collapse:
        log_collapse(collapse, len(encoded["train"]["embeddings"]))
    copies = encoded.get("test", {}).get("copies")
    if copies:
        log.info(f"leaks            {copies_text(copies)}")
    stages = "  ".join(f"{stage} {taken:.1f}" for stage, taken in seconds.items())
    log.info(f"seconds          {stages}")
    log.info(f"memory           {state['peak_memory'] / 1e9:.2f} GB at most while training")
    log.info(f"look at it       python main.py report --exp_dir {quote(run.dir)}")
    log.info(f"files            {run.dir}")


def log_accuracies(result):
    """Print the accuracies of the probe and of the other metrics."""
    text = accuracy_text(result, result["key"])
    log.info(f"linear probe     {text}  last epoch, {result['n_test']} images")
    if "balanced_top1" in result:  # not in that of an earlier version
        log.info(
            f"                 balanced {result['balanced_top1']:.2f}%  always the largest class "
            f"{result['largest_class']:.2f}%"
        )
    chosen = " chosen on a tenth of the training images" if result["held_out"] else ""
    log.info(f"                 learning rate {result['lr']:g}{chosen}")
    log.info(
        f"                 top-1 {result['train_top1']:.2f}%  of the training images themselves"
    )
    per_class = result.get("per_class", {}).items()
    classes = sorted((top1, name) for name, top1 in per_class if top1 is not None)
    if len(classes) > 1:
        low, worst = classes[0]
        high, best = classes[-1]
        log.info(f"                 top-1 {low:.2f}% ({worst}) to {high:.2f}% ({best}), by class")
    log.info(
        f"                 top-1 {result['best_top1']:.2f}%  best epoch ({result['best_epoch']}), "
        f"chosen on the test images"
    )
    for name, (title, _) in METRICS.items():
        log.info(f"{title:16} top-1 {result[name]:.2f}%")


def log_collapse(metrics, n_train):
    """Print the signs of collapse of n_train images, and what to do if there is one."""
    n = min(n_train, N_COLLAPSE)
    log.info(f"collapse         {collapse_text(metrics)}  of {n:,} training images")
    warning = collapse_warning(metrics)
    if warning:
        log.info(f"                 {warning}")


if __name__ == "__main__":
    sys.exit(main())
