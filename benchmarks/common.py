"""What the benchmarks share: the folder of results, and the version and machine of a figure."""

import argparse
import ast
import functools
import json
import subprocess
import sys
from pathlib import Path

from experiment import Run
from infra.device import pick_device, pick_precision
from infra.metrics import environment, git_commit, git_output

ROOT = Path(__file__).resolve().parent.parent
RESULTS_FOLDER = ROOT / "benchmarks" / "results"
BASELINE_LIKE = "--eval_lr 0.0075 --eval_views augmented"  # how the baseline evaluates
# The files of the method. When the code of one changes, the figures are of an earlier version.
METHOD = (
    "main.py hparams.py data.py images/cache.py images/textures.py patches.py model.py weights.py "
    "loss.py lars.py optimizers.py train.py encode.py evaluate.py infra/device.py"
).split()
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
EARLIER, UNKNOWN = "\u2020", "\u2021"  # marks of a version


def parser(description):
    """Return an ArgumentParser that prints a docstring as it stands, with the option --out."""
    formatter = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(description=description, formatter_class=formatter)
    text = "folder of the results (default: benchmarks/results)"
    made.add_argument("--out", type=Path, default=RESULTS_FOLDER, help=text)
    return made


def machine(device="auto"):
    """Return what the figures depend on: processor, device, precision, versions."""
    device = pick_device(device)
    return environment(device, pick_precision("auto", device))


def run_of(log_folder, exp_name):
    """Return the Run of this name in a folder. Raises ValueError unless there is exactly one."""
    (exp_dir,) = Path(log_folder).glob(f"{exp_name}__*")
    return Run(exp_dir)


def child(*arguments):
    """Run `python -m` with these arguments and return the JSON object in its last line of output.

    Exits if it fails.
    """
    command = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


@functools.cache  # the same files are compared with many commits
def syntax_of(text):
    """Return the syntax tree of a Python file as a text, without comments and docstrings.

    Raises SyntaxError.
    """
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.dump(tree)


@functools.cache
def syntax_at(commit, name):
    """Return syntax_of a file at a commit, None if it was not there."""
    try:
        return syntax_of(git_output("show", f"{commit}:{name}"))
    except subprocess.CalledProcessError:
        return None


def differs(commit, name):
    """Return whether the code of a file differs from that at a commit."""
    try:
        return syntax_at(commit, name) != syntax_of((ROOT / name).read_text())
    except (FileNotFoundError, SyntaxError):  # removed, or half edited
        return True


def has_changed(commit, files=METHOD):
    """Return whether the code of files has changed since a commit, comments and docstrings aside.

    None if git does not know the commit.
    """
    try:
        changed = git_output("diff", "--name-only", commit, "--", *files).splitlines()
    except (OSError, subprocess.CalledProcessError):  # OSError: git is not installed
        return None
    return any(differs(commit, name) for name in changed)


def commit_of(version):
    """Return the commit of a version, a dict as git_commit returns it, with 7 digits.

    "-dirty" follows if the code of the method has changes that are not in the commit.
    """
    commit = version["commit"]
    if commit is None:
        return None
    dirty = version["dirty"] and has_changed(commit)
    return f"{commit[:7]}-dirty" if dirty else commit[:7]


@functools.cache  # a commit may be made while a program runs
def this_commit():
    """Return the commit of the program, as the results keep it."""
    return commit_of(git_commit())


def is_earlier(commit, files=METHOD):
    """Return whether a commit of the results has earlier code of files; None if unknown."""
    if commit is None:
        return None
    return commit.endswith("-dirty") or has_changed(commit, files)


def version_text(entries, *others):
    """Return the commits of entries of the results, with the mark EARLIER or UNKNOWN.

    EARLIER: the code of the method, or of `others`, has changed since one of them.
    """
    commits = sorted({entry["commit"] for entry in entries}, key=str)
    earlier = [is_earlier(commit, [*METHOD, *others]) for commit in commits]
    text = ", ".join(map(str, commits))
    if True in earlier:
        return text + EARLIER
    return text + UNKNOWN if None in earlier else text
