"""Fill the generated parts of README.md and docs, from the declaration of the settings and benchmarks/results.

    python -m benchmarks.readme
    python -m benchmarks.readme --pictures logs/EMP-SSL-Training/demo__numpatch8_bs25_lr0.3

A part stands between <!-- NAME --> and <!-- /NAME -->. A test runs this and expects no change. --pictures draws the pictures of
the README, of a finished run of `make demo`, and writes the table of the runs beside it to compare.txt.
"""

import argparse
import io
import re
from functools import partial
from pathlib import Path

from PIL import Image

from benchmarks import claims, laptop, peers_results, tables
from benchmarks.common import RESULTS, ROOT
from experiment import Run
from infra import files
from tools import compare, report

TEXTS = (ROOT / "README.md", ROOT / "docs" / "guide.md", ROOT / "docs" / "results.md")
DARK = "#222222"  # ink of the pictures
CURVES = ("invariance loss", "uniformity loss", "linear probe")  # in the picture of the curves

# name: (function that returns its text, arguments of `python -m` that measure it; "" if nothing is measured)
PARTS = {
    "headline": (laptop.headline, "study laptop"),
    "options": (tables.options, ""),
    "presets": (tables.presets, ""),
    "demo": (tables.demo, "study demo"),
    "findings-full": (partial(tables.findings, "findings-full"), "study findings-full"),
    "findings-cpu": (partial(tables.findings, "findings-cpu"), "study findings-cpu"),
    "verdicts": (claims.verdicts, "study findings-cpu"),
    "views": (partial(tables.findings, "views"), "study views"),
    "one-minute": (partial(tables.tries, "one-minute"), "study one-minute"),
    "search": (partial(tables.tries, "search", with_seconds=False), "study search"),
    "laptop": (laptop.results_table, "study laptop"),
    "peers": (peers_results.results_table, "peers --data_dir DIR"),
    "peers-fp32": (partial(peers_results.results_table, "peers-fp32"), "peers --data_dir DIR"),
    "peers-verdict": (peers_results.verdict, "peers --data_dir DIR"),
    "peers-choices": (peers_results.choices_table, "peers --data_dir DIR"),
    "engines": (tables.engines, "engines"),
    "precision": (tables.precision, "study precision"),
    "speed-cpu": (partial(tables.speed, "cpu"), "speed"),
    "speed-cuda": (partial(tables.speed, "cuda"), "speed --device cuda"),
    "choices": (tables.choices, "speed --only choices"),
    "cost": (tables.cost, "speed --only cost"),
    "ranks": (tables.ranks, "speed --only ranks"),
    "large": (tables.large, "speed --only large"),
    "compare": (lambda: f"```\n{(RESULTS / 'compare.txt').read_text()}```", "readme --pictures EXP_DIR"),
}


def render(text):
    """Return a text with its generated parts made anew. Raises KeyError for a part that has no function."""
    pattern = re.compile(r"(<!-- ([\w-]+) -->\n).*?(<!-- /\2 -->)", re.S)
    return pattern.sub(lambda part: f"{part[1]}{content(part[2])}\n{part[3]}", text)


def content(name):
    """Return the text of a part, or the command that measures it."""
    function, command = PARTS[name]
    try:
        return function()
    except FileNotFoundError:
        return f"Not yet measured. The command is `python -m benchmarks.{command}`."


def as_picture(figure):
    """Return a figure of matplotlib as a PIL image."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=80, facecolor="white", bbox_inches="tight")
    return Image.open(out).convert("RGB")


def beside(pictures):
    """Return the pictures in a row."""
    row = Image.new("RGB", (sum(picture.width for picture in pictures), max(picture.height for picture in pictures)), "white")
    x = 0
    for picture in pictures:
        row.paste(picture, (x, 0))
        x += picture.width
    return row


def draw(exp_dir, folder=ROOT / "pictures", results=RESULTS):
    """Write patches.png, curves.png and map.png of a finished run into a folder, and compare.txt into that of the results."""
    run = Run(exp_dir)
    test, class_names = files.load(run.artifacts["test"]), files.load(run.probe)["class_names"]
    pictures = {
        "patches": Image.open(run.patches).convert("RGB").reduce(2),  # it is enlarged twice
        "curves": beside([as_picture(figure) for figure, text, _ in report.curves(run) if text.startswith(CURVES)]),
        "map": as_picture(report.map_figure(test["embeddings"], test["labels"], class_names)),
    }
    folder.mkdir(exist_ok=True)
    for name, picture in pictures.items():
        path = folder / f"{name}.png"
        picture.quantize(128).save(path, optimize=True)
        print(f"{path} {picture.width} x {picture.height}, {path.stat().st_size / 1e3:.0f} kB")
    (results / "compare.txt").write_text(compare.as_text(*compare.table(run.dir.parent)) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, metavar="EXP_DIR", help="draw the pictures of this run folder first")
    options = parser.parse_args()
    if options.pictures:
        with report.drawing(DARK):
            draw(options.pictures)
    for path in TEXTS:
        path.write_text(render(path.read_text()))
