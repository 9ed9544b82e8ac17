"""The command line: its parser, and options that are derived from the declared settings."""

import argparse
import difflib
import functools
import re
from pathlib import Path

from hparams import PRESETS, SETTINGS, STAGES
from infra.errors import UsageError
from infra.metrics import git_commit

OTHER_NAMES = {  # what other programs call an option: its name here
    "batch_size": "bs", "epochs": "n_epochs", "num_epochs": "n_epochs", "learning_rate": "lr", "base_lr": "lr", "model": "arch",
    "backbone": "arch", "patches": "n_patches", "num_patches": "n_patches", "output_dir": "log_folder", "log_dir": "log_folder",
    "name": "exp_name", "data": "data_dir", "data_path": "data_dir", "img_size": "image_size", "wd": "weight_decay",
    "optim": "optimizer", "num_images": "n_images", "pretrained": "weights", "checkpoint": "weights",
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """A parser that raises UsageError, and does not exit."""

    def error(self, message):
        raise UsageError(f"{message} (see {self.prog} --help)")


def parse(argv, description, adders):
    """Return the arguments of a command line. args.command is the function to call, args.argv the command line.

    adders: functions that add commands to the subparsers of argparse. Without arguments the help is printed.
    """
    formatter = functools.partial(argparse.HelpFormatter, max_help_position=38, width=110)
    make = functools.partial(Parser, formatter_class=formatter, allow_abbrev=False)
    parser = make(prog="main.py", description=description)
    parser.add_argument("--version", action="version", version=version())
    commands = parser.add_subparsers(required=True, metavar="command", dest="command_name", parser_class=make)
    for add in adders:
        add(commands)
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    argv = [canonical(arg) for arg in argv]
    args, unknown = parser.parse_known_args(argv or ["--help"], argparse.Namespace(argv=argv))
    if unknown:
        command = commands.choices[args.command_name]
        command.error(f"unrecognized arguments: {' '.join(unknown)}{suggestions(unknown, command)}")
    return args


def version():
    """Return the commit of the program."""
    found = git_commit()
    return f"EMP-SSL, commit {found['commit'] or 'unknown'}{', changed since' if found['dirty'] else ''}"


def canonical(arg):
    """Return --n-patches=3 as --n_patches=3, --no-batch-norm as --no-batch_norm, and other arguments unchanged."""
    name, equals, value = arg.partition("=")
    return "--" + re.sub("^no_", "no-", name[2:].replace("-", "_")) + equals + value if name.startswith("--") else arg


def suggestions(unknown, command):
    """Return "; did you mean --NAME?" for the unknown options that are near one of the command's, else ""."""
    options, found = re.findall(r"--[\w-]+", command.format_help()), []
    for arg in unknown:
        name = arg.partition("=")[0]
        other = f"--{OTHER_NAMES.get(name[2:].lower())}"
        near = [other] if other in options else difflib.get_close_matches(name, options, n=1, cutoff=0.7)
        found += near if name.startswith("--") else []
    return f"; did you mean {' '.join(found)}?" if found else ""


def add_settings(command, groups):
    """Add an option for each setting to a command. groups: {stage: argument group}."""
    for name, setting in SETTINGS.items():
        default = "" if setting.default is None else f" (default: {setting.default})"
        kind = {"action": argparse.BooleanOptionalAction} if setting.type is bool else {
            "type": setting.parse,
            "metavar": "{" + ",".join(setting.choices) + "}" if setting.choices else setting.type.__name__.upper(),
        }  # fmt: skip
        names = [f"--{name}", "--patch_size"] if name == "input_size" else [f"--{name}"]  # both names are common
        groups[setting.stage].add_argument(*names, default=argparse.SUPPRESS, help=setting.help + default, **kind)


def given_settings(args):
    """Return {name: value} of the settings that were given on the command line."""
    return {name: getattr(args, name) for name in SETTINGS if hasattr(args, name)}


def add_train(commands):
    """Add the command train. Its options are the settings, and options that control the run. Return its parser."""
    train = commands.add_parser("train", help="train, encode and probe; picks up where it stopped", description=(
        "Train the encoder, encode the images, fit a linear probe. Given again, it goes on where it stopped."))  # fmt: skip
    groups = {stage: train.add_argument_group(title) for stage, title in {"run": "experiment", **STAGES}.items()}
    run = groups["run"]
    run.add_argument("--exp_name", default="default", help="experiment name (default: default)")
    run.add_argument("--log_folder", default="logs/EMP-SSL-Training", help="directory name (default: logs/EMP-SSL-Training)")
    run.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True,
                     help="continue the existing run (default), or move it aside and start over")  # fmt: skip
    run.add_argument("--config_from", metavar="DIR", help="run folder whose hparams.yaml has the settings that are not given")
    run.add_argument("--preset", choices=tuple(PRESETS), metavar="{" + ",".join(PRESETS) + "}",
                     help="named set of settings, for those that are not given (see docs/guide.md)")  # fmt: skip
    run.add_argument("--dry_run", action="store_true", help="show settings, size, memory and time of the run, and stop")
    add_settings(train, groups)
    return train


def add_resume(commands):
    """Add the command resume. Its options are the settings, which change those of the run. Return its parser."""
    text = "Go on with a run folder, also after its hparams.yaml was edited. Settings that are given are written into it first."
    resume = commands.add_parser("resume", help="go on with a run folder, also after settings were changed", description=text)
    resume.add_argument("--exp_dir", required=True, type=Path, help="the run folder")
    add_settings(resume, {stage: resume.add_argument_group(title) for stage, title in STAGES.items()})
    return resume
