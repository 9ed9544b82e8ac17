"""What the benchmarks share: where results are, the machine that measured them, and measurements in a process of their own."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from infra.device import pick_device, pick_precision
from infra.metrics import environment, git_commit

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BASELINE_LIKE = "--eval_lr 0.0075 --eval_views augmented"  # how the baseline evaluates, as options of main.py train


def parser(description):
    """Return an ArgumentParser that prints a module's docstring as it stands. Its option --out is the folder of results."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default: benchmarks/results)")
    return made


def machine(device="auto"):
    """Return what the figures depend on: processor, device, precision, versions."""
    device = pick_device(device)
    return environment(device, pick_precision("auto", device))


def commit():
    """Return the commit of the program, shortened, with "-dirty" if its files differ from it."""
    found = git_commit()
    return f"{found['commit'][:7]}{'-dirty' if found['dirty'] else ''}" if found["commit"] else None


def child(*arguments):
    """Run `python -m` with these arguments and return its last line of output, a JSON object. Exit if it fails."""
    command = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measured(device, *words):
    """Return the result of a measurement of speed.py, made in a process of its own: a name in its CHILDREN, and arguments."""
    return child("benchmarks.speed", "--device", device, "--child", *words)
