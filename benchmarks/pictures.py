"""The README's pictures, of a finished run (the README's are of `make demo`), and the table of the runs beside it:

    python benchmarks/pictures.py --exp_dir logs/EMP-SSL-Training/demo__numpatch8_bs25_lr0.3
"""

import argparse
import io
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import compare  # noqa: E402
import experiment  # noqa: E402
import report  # noqa: E402

DARK = "#222222"


def as_picture(figure):
    out = io.BytesIO()
    with report.drawing(DARK):
        figure.savefig(out, format="png", dpi=80, facecolor="white", bbox_inches="tight")
    return Image.open(out).convert("RGB")


def beside(pictures):
    """The pictures in a row."""
    row = Image.new("RGB", (sum(picture.width for picture in pictures), max(picture.height for picture in pictures)), "white")
    x = 0
    for picture in pictures:
        row.paste(picture, (x, 0))
        x += picture.width
    return row


def write(exp_dir, folder):
    folder.mkdir(exist_ok=True)
    shown = ("invariance loss", "uniformity loss", "linear probe")
    curves = [as_picture(figure) for figure, text in report.curves(exp_dir, DARK) if text.startswith(shown)]
    test, class_names = experiment.load(exp_dir / "artifacts" / "test.pt"), experiment.load(exp_dir / "probe.pt")["class_names"]
    pictures = {
        "patches": Image.open(exp_dir / "patches.png").convert("RGB").reduce(2),  # it is enlarged twice
        "curves": beside(curves),
        "map": as_picture(report.map_figure(test["embeddings"], test["labels"], class_names, DARK)),
    }
    for name, picture in pictures.items():
        picture.quantize(128).save(folder / f"{name}.png", optimize=True)
        print(f"{folder / name}.png {picture.width} x {picture.height}, {(folder / f'{name}.png').stat().st_size / 1e3:.0f} kB")
    (ROOT / "benchmarks" / "results" / "compare.txt").write_text(compare.as_text(*compare.table(exp_dir.parent)) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exp_dir", required=True, type=Path, help="the run folder")
    write(parser.parse_args().exp_dir, ROOT / "pictures")
