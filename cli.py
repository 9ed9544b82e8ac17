"""The command line: every command and option, and the settings that it gives a run."""

import argparse
import difflib
import functools
import math
import re

from experiment import Run
from hparams import LIGHTER, PRESETS, SETTINGS, STAGES, abbreviated, from_dict
from infra import files
from infra.console import log
from infra.errors import UsageError
from infra.metrics import git_commit
from tools.cleanup import add_cleanup
from tools.compare import add_compare
from tools.embed import add_embed
from tools.export import add_export
from tools.finetune import add_finetune
from tools.probe import add_probe
from tools.report.page import add_report
from tools.search import add_search

LOGS = "logs/EMP-SSL-Training"
# Pairs of what other programs call an option, and its name here.
OTHER_NAMES = """
batch_size bs, epochs n_epochs, num_epochs n_epochs, learning_rate lr, base_lr lr, model arch,
backbone arch, patches n_patches, num_patches n_patches, output_dir log_folder, log_dir log_folder,
name exp_name, data data_dir, data_path data_dir, img_size image_size, patch_size input_size,
wd weight_decay, optim optimizer, num_images n_images, pretrained weights, checkpoint weights
"""


class Parser(argparse.ArgumentParser):
    """A parser that raises UsageError, and does not exit."""

    def error(self, message):
        raise UsageError(f"{message} (see {self.prog} --help)")


def parse(argv, description=None, train_command=None, resume_command=None):
    """Return the arguments of a command line.

    args.command is the function to call, args.argv the command line. Without arguments the help is
    printed. train_command, resume_command: the functions of these two commands. Raises UsageError.
    """
    formatter = functools.partial(argparse.HelpFormatter, max_help_position=38, width=110)
    make = functools.partial(Parser, formatter_class=formatter, allow_abbrev=False)
    parser = make(prog="main.py", description=description)
    parser.add_argument("--version", action="version", version=version())
    commands = parser.add_subparsers(
        required=True, metavar="command", dest="command_name", parser_class=make
    )
    add_train(commands).set_defaults(command=train_command)
    add_resume(commands).set_defaults(command=resume_command)
    add_compare(commands)
    add_report(commands)
    add_export(commands)
    add_embed(commands)
    add_search(commands)
    add_probe(commands)
    add_finetune(commands)
    add_cleanup(commands)
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
    state = git_commit()
    changed = ", changed since" if state["dirty"] else ""
    return f"EMP-SSL, commit {state['commit'] or 'unknown'}{changed}"


def canonical(arg):
    """Return --n-patches=3 as --n_patches=3, and --no-batch-norm as --no-batch_norm.

    Other arguments are returned unchanged.
    """
    if not arg.startswith("--"):
        return arg
    name, equals, value = arg[2:].partition("=")
    name = re.sub("^no_", "no-", name.replace("-", "_"))
    return f"--{name}{equals}{value}"


def suggestions(unknown, command):
    """Return "; did you mean --NAME?" for unknown options that are near one of the command's.

    Return "" if there are none.
    """
    options = [option for action in command._actions for option in action.option_strings]
    options = [option for option in options if option.startswith("--")]
    other_names = dict(pair.split() for pair in OTHER_NAMES.split(","))
    similar = []
    for arg in unknown:
        name = arg.partition("=")[0]
        other = f"--{other_names.get(name[2:].lower())}"
        if not name.startswith("--"):
            continue
        if other in options:
            similar.append(other)
        else:
            similar += difflib.get_close_matches(name, options, n=1, cutoff=0.7)
    return f"; did you mean {' '.join(similar)}?" if similar else ""


def add_train(commands):
    """Add the command train: its options are the settings, and some that control the run."""
    train = commands.add_parser(
        "train",
        help="train, encode and probe; picks up where it stopped",
        description="Train the encoder, encode the images, fit a linear probe. Given again, it "
        "goes on where it stopped.",
    )
    run = train.add_argument_group("experiment")
    run.add_argument("--exp_name", default="default", help="experiment name (default: default)")
    run.add_argument(
        "--log_folder",
        default=LOGS,
        type=files.user_path,
        help=f"directory name (default: {LOGS})",
    )
    run.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="continue the existing run (default), or move it aside and start over",
    )
    run.add_argument(
        "--config_from",
        type=files.user_path,
        metavar="DIR",
        help="run folder whose hparams.yaml has the settings that are not given",
    )
    run.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        metavar=choices(PRESETS),
        help="named set of settings, for those that are not given (see docs/guide.md)",
    )
    run.add_argument(
        "--budget",
        type=minutes,
        metavar="MINUTES",
        help="minutes that the run may take in all: its parts are timed, and n_epochs is set; if "
        "they are few, a preset takes a smaller network too",
    )
    run.add_argument(
        "--dry_run",
        action="store_true",
        help="show settings, size, memory and time of the run, and stop",
    )
    add_settings(train)
    return train


def add_resume(commands):
    """Add the command resume: its options are the settings, which change those of the run."""
    resume = commands.add_parser(
        "resume",
        help="go on with a run folder, also after settings were changed",
        description="Go on with a run folder, also after its hparams.yaml was edited. Settings "
        "that are given are written into it first.",
    )
    resume.add_argument("--exp_dir", required=True, type=files.user_path, help="the run folder")
    add_settings(resume)
    return resume


def add_settings(command):
    """Add an option for each setting to a command, in a group for each stage."""
    groups = {stage: command.add_argument_group(title) for stage, title in STAGES.items()}
    for name, setting in SETTINGS.items():
        if setting.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif setting.choices:
            kind = {"type": setting.parse, "metavar": choices(setting.choices)}
        else:
            kind = {"type": setting.parse, "metavar": setting.type.__name__.upper()}
        default = "" if setting.default is None else f" (default: {setting.default})"
        text = setting.help + default
        group = groups[setting.stage]
        group.add_argument(f"--{name}", default=argparse.SUPPRESS, help=text, **kind)
    groups["data"].add_argument(
        "--value_range",
        nargs=2,
        type=SETTINGS["value_low"].parse,
        metavar=("LOW", "HIGH"),
        default=argparse.SUPPRESS,
        help="value_low and value_high",
    )


def minutes(text):
    """Return a positive number of minutes. Raises argparse.ArgumentTypeError."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of minutes above 0, not {text!r}")
    return value


def choices(names):
    """Return {NAME,NAME} as the help shows it."""
    return "{" + ",".join(names) + "}"


def given_settings(args):
    """Return {name: value} of the settings that were given on the command line."""
    given = {name: getattr(args, name) for name in SETTINGS if hasattr(args, name)}
    if hasattr(args, "value_range"):
        given["value_low"], given["value_high"] = args.value_range
    return given


def hparams_of(args):
    """Return the Hparams of a train command.

    They are the given options, then those of --config_from or --preset, then the defaults.
    """
    base = PRESETS.get(args.preset, {})
    if args.config_from and args.preset:
        raise UsageError(
            "--config_from and --preset exclude each other: each names what is not given"
        )
    if args.config_from:
        base = vars(Run(args.config_from).read_hparams())
    given = given_settings(args)
    if args.budget and "n_epochs" in given:
        raise UsageError("--budget sets n_epochs: give one of them")
    defaults = {name: setting.default for name, setting in SETTINGS.items()}
    return from_dict({**defaults, **base, **given}, "command line")


def warn_of_preset(args, hp):
    """Warn if patches are shrunk to the input_size of a preset, which nobody asked for."""
    patch = hp.image_size // 2
    of_preset = "input_size" in PRESETS.get(args.preset, {}).keys() - given_settings(args).keys()
    if of_preset and hp.dataset == "folder" and patch > hp.input_size:
        log.warning(
            f"patches of {patch} pixels are shrunk to {hp.input_size} (input_size of the preset), "
            f"so --image_size {hp.image_size} adds little: add --input_size {patch}, about "
            f"{(patch / hp.input_size) ** 2:.2g} times slower"
        )


def lighter_settings(args):
    """Return the entries of LIGHTER for the preset that change no given setting."""
    given = given_settings(args)
    return [change for change in LIGHTER.get(args.preset, ()) if not change.keys() & given.keys()]


def exp_dir_of(args, hp):
    """Return the path of the run folder of a train command."""
    name = args.exp_name
    size = len(name.encode(errors="surrogateescape"))
    if not name.isprintable() or "/" in name or not 0 < size <= 150:
        raise UsageError(
            f"exp_name {abbreviated(name)} must be the name of one folder, of at most 150 bytes"
        )
    seed = "" if hp.seed == SETTINGS["seed"].default else f"_seed{hp.seed}"
    folder = f"{name}__numpatch{hp.n_patches}_bs{hp.bs}_lr{hp.lr:g}{seed}"
    exp_dir = args.log_folder / folder
    if args.config_from and exp_dir.resolve() == args.config_from.resolve():
        raise UsageError(
            f"{exp_dir} is the run folder that --config_from names: give the new experiment an "
            f"--exp_name"
        )
    return exp_dir
