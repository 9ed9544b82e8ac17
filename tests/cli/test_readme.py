import io
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, run, write_images

import cli
import data
from benchmarks import common, tables
from hparams import PRESETS
from infra.device import generator
from patches import sample_patches

PAGES = {
    path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
README, GUIDE = PAGES[ROOT / "README.md"], PAGES[ROOT / "docs" / "guide.md"]
TEXT = "\n".join(PAGES.values())
LINES = [
    line for block in re.findall(r"```shell\n(.*?)```", TEXT, re.S) for line in block.splitlines()
]
SHELL = [line.split("   #")[0].strip() for line in LINES]
SHELL += re.findall(r"`((?:python|make|torchrun|tensorboard) [^`]+)`", TEXT)
EXP_DIR = "logs/EMP-SSL-Training/default__numpatch4_bs100_lr0.05"
# Each takes some seconds on a small run.
QUICK = [line for line in SHELL if re.match(r"python main\.py (?!train)", line)]


def test_the_printed_presets_are_options_that_parse_to_them():
    for name, options in re.findall(r"^    --preset ([\w-]+): (.*)$", GUIDE, re.M):
        args = cli.parse(["train", *options.split()])
        assert {option: getattr(args, option) for option in PRESETS[name]} == PRESETS[name]


def without_marks(page):
    return re.sub(r"\n\n[†‡] .*|[†‡]", "", page)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_tables_are_those_of_the_settings_and_the_results(path):
    page, made = PAGES[path], tables.with_tables(PAGES[path])
    if common.UNKNOWN in made:  # git does not have the whole history here
        page, made = without_marks(page), without_marks(made)
    assert made == page


def accuracies_without_source(page):
    """The paragraphs of a page that have percents or points by hand, and no source.

    A source is a commit, or who published it.
    """
    page = re.sub(r"<!-- ([\w-]+) -->\n.*?<!-- /\1 -->", "", page, flags=re.S)
    paragraphs = re.split(r"\n\n|\n(?=- )", page)
    figure = re.compile(r"\d%|\d points?\b")
    source = re.compile(r"\bcommits? [0-9a-f]{7}\b|\bthe document\b|\bauthors\b")
    return [text for text in paragraphs if figure.search(text) and not source.search(text)]


def test_figures_without_a_source_are_found():
    without = ["It reaches 84% here.", "- It is 1.5 points ahead,\n  documented."]
    page = f"{without[0]}\n\n84.2% (commit 0123abc)\n{without[1]}\n- 84% (the document)\n\n"
    assert accuracies_without_source(f"{page}<!-- peers -->\n84%\n<!-- /peers -->\n") == without


@pytest.mark.parametrize(
    "name", ["README.md", "docs/results.md", "docs/findings.md", "docs/speed.md"]
)
def test_a_figure_that_is_written_by_hand_names_its_source(name):
    """The report of the demo has a test of its own."""
    found = accuracies_without_source(PAGES[ROOT / name])
    assert [text for text in found if not text.startswith("    linear probe  ")] == []


def test_the_code_of_the_method_has_not_changed_since_the_figures_of_the_readme():
    made = "".join(tables.TABLES[name]() for name in ("headline", "minutes"))
    assert common.EARLIER not in made


def test_the_demo_of_the_readme_is_that_of_the_results():
    result = json.loads((common.RESULTS_FOLDER / "demo.json").read_text())["trained"]["runs"][0]
    assert result["seed"] == 42
    for line in (
        f"linear probe     top-1 {result['top1']:.2f}%  top-5 {result['top5']:.2f}%  last epoch",
        f"learning rate {result['lr']:g} chosen on a tenth",
        f"20-NN            top-1 {result['knn_top1']:.2f}%",
    ):
        assert line in README


def options_of(program):
    """The options of a program of the README; of main.py with its command."""
    words = program.split()
    if words[0] == "main.py":
        return set(re.findall(r"--[\w-]+", run(words[1], "--help").out))
    paths = (ROOT / f"{words[1].replace('.', '/')}.py", ROOT / "benchmarks" / "common.py")
    source = "".join(path.read_text() for path in paths)
    return set(re.findall(r"--[\w-]+", source))


@pytest.mark.parametrize("line", sorted(set(SHELL)))
def test_every_command_and_option_exists(line):
    """Those of the tools that it calls, and the files that it names."""
    if line.startswith("make "):
        assert re.search(rf"^{line.split()[1]}:", (ROOT / "Makefile").read_text(), re.M)
    elif line.startswith(("git clone", "python -m venv", "tensorboard --logdir", "pip install ")):
        assert all((ROOT / name).exists() for name in re.findall(r"-r (\S+)", line))
    elif line.startswith("python -m pytest"):
        assert (ROOT / line.split()[3]).exists()
        assert set(line.split()[4::2]) in ({"--runs"}, {"--gpu"})
    else:
        program = re.match(
            r"(?:python|torchrun .*?) ((?:main\.py \w+)|(?:-m benchmarks\.\w+))", line
        )
        assert program, line
        assert set(re.findall(r"--[\w-]+", line[program.start(1) :])) <= options_of(program[1]) | {
            "--debug"
        }


def test_the_commands_that_take_seconds_run_as_they_stand(finished, tmp_path, monkeypatch):
    """In a folder with the run that they name, and images in DIR; cleanup gets no answer."""
    for module in ("matplotlib", "sklearn", "onnxscript", "safetensors"):
        pytest.importorskip(module)
    exp_dir = tmp_path / EXP_DIR
    shutil.copytree(finished, exp_dir)
    write_images(tmp_path / "DIR", 3, 0)
    shutil.copy(tmp_path / "DIR" / "0.png", tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    commands = {"resume", "cleanup", "report", "compare", "export", "embed", "search"}
    commands |= {"probe", "finetune"}
    assert {line.split()[2] for line in QUICK} == commands
    for line in QUICK:
        result = run(*line.split()[2:])
        assert result.code == 0, (line, result.err)
    made = {path.name for path in exp_dir.rglob("*")} | {path.name for path in tmp_path.iterdir()}
    assert made >= {
        "report.html",
        "backbone.pt",
        "encoder.safetensors",
        "encoder.onnx",
        "embeddings.npz",
        "sheet.html",
    }


def test_the_shortest_run_from_the_shell(tmp_path):
    """A line of the README's, as a new user types it, on a data set that needs no download."""
    line = "main.py train --n_patches 20"
    assert f"python {line}" in SHELL
    small = "--dataset textures --n_images 50 --bs 25 --n_epochs 1 --arch resnet18-tiny --h_dim 8"
    small += " --input_size 8 --test_patches 1"
    command = [sys.executable, ROOT / line.split()[0], *line.split()[1:], *small.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    exp_dir = tmp_path / "logs" / "EMP-SSL-Training" / "default__numpatch20_bs25_lr0.3"
    assert (exp_dir / "linear_accuracy.json").exists()


def test_the_encoder_in_python_as_the_readme_has_it(finished, tmp_path, monkeypatch):
    """Run as it stands; the embedding is that of the command embed."""
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.S))
    shutil.copytree(finished, tmp_path / EXP_DIR)
    write_images(tmp_path / "down", 1, 0)
    shutil.copy(tmp_path / "down" / "0.png", tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(code, scope)
    assert run("embed", "--exp_dir", EXP_DIR, "--images", "down", "--out", "x.npz").code == 0
    with np.load("x.npz") as content:
        np.testing.assert_allclose(scope["embeddings"], content["embeddings"], rtol=1e-5, atol=1e-6)
    assert [str(path) for path in scope["paths"]] == ["photo.png"]


def titles_of(text):
    """The anchors of a page as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_and_pictures_are_there(path):
    text = re.sub(r"```.*?```", "", PAGES[path], flags=re.S)
    for link in re.findall(r"\]\(([^)]*)\)", text):
        if not link.startswith("https://"):
            name, _, title = link.partition("#")
            target = (path.parent / name).resolve() if name else path
            assert target.exists(), link
            assert not title or title in titles_of(target.read_text()), link
    for picture in re.findall(r"!\[[^\]]{20,}\]\(([^)]*)\)", text):
        assert (path.parent / picture).stat().st_size < 100_000
    assert "![](" not in text


def test_the_readmes_own_data_set_loads(tmp_path, monkeypatch):
    """The function in the README, as it stands there, in data.py."""
    code = re.search(r"```python\n(import numpy as np\n\ndef load_npz.*?)```", TEXT, re.S)[1]
    scope = dict(vars(data))
    exec(code, scope)
    images = np.random.default_rng(0).integers(0, 256, (5, 12, 10, 3), dtype=np.uint8)
    np.savez(
        tmp_path / "test.npz",
        images=images,
        labels=np.array([0, 1, 1, 0, 1]),
        class_names=["cat", "dog"],
    )
    monkeypatch.setitem(data.DATASETS, "npz", scope["load_npz"])  # the line that registers it
    loaded = data.load_images("npz", tmp_path, False)
    assert loaded.images.shape == (5, 3, 12, 10)
    assert torch.equal(loaded.images.permute(0, 2, 3, 1), torch.from_numpy(images))
    assert (loaded.labels.tolist(), loaded.class_names) == ([0, 1, 1, 0, 1], ["cat", "dog"])
    x = sample_patches(loaded.images, 3, generator(0, "t"), 16)
    assert x.shape == (3, 5, 3, 16, 16)
