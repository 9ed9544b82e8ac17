"""The record of a run: its environment, its TensorBoard events, and what is on the screen."""

import fcntl
import json
import os
import platform
import pty
import re
import struct
import subprocess
import sys
import termios
import warnings

import pytest
import torch
from helpers import ROOT, RUN, contents, edit, resume, run, trained_with, write_images
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main
from experiment import Run
from infra import files, metrics


def events(exp_dir):
    """Return ({tag: [(step, value), ...]}, tags of pictures) of the only event file of a run."""
    assert len(list((exp_dir / "tensorboard").glob("events.*"))) == 1
    board = EventAccumulator(str(exp_dir / "tensorboard"), {"scalars": 0}).Reload()
    tags = board.Tags()
    scalars = {}
    for tag in tags["scalars"]:
        scalars[tag] = [(event.step, event.value) for event in board.Scalars(tag)]
    return scalars, tags["images"]


def expected(exp_dir):
    """Return the scalars that events must show, from metrics.jsonl and linear_accuracy.json."""
    scalars = {}
    not_shown = set("epoch step global_step probe_epoch event name old new".split())
    for line in files.read_jsonl(Run(exp_dir).metrics):
        stage = "train" if "global_step" in line else "probe"
        step = line.get("global_step", line.get("probe_epoch"))
        for name in set(line) - not_shown:
            value = pytest.approx(line[name], rel=1e-6)
            scalars.setdefault(f"{stage}/{name}", []).append((step, value))
    result = files.read_json(exp_dir / "linear_accuracy.json")
    for name in ("top1", "top5", "knn_top1"):
        scalars[f"result/{name}"] = [(0, pytest.approx(result[name]))]
    return scalars


def test_environment(finished):
    (launch,) = Run(finished).read_launches()
    assert launch["command"].startswith("main.py train --dataset folder --image_size 16")
    assert launch["outcome"] == "finished"
    assert launch["stages"] == ["training", "encoding train", "encoding test", "probe"]
    assert launch["python"] == platform.python_version()
    assert launch["torch"] == torch.__version__
    assert launch["device"] == "cpu"
    assert launch["start"] <= launch["end"] <= metrics.now()
    assert set(launch["seconds"]) == {"training", "encoding", "probe"}
    assert launch["hparams"] == vars(Run(finished).read_hparams())
    if (ROOT / ".git").exists():
        head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True)
        assert launch["commit"] == head.strip()
        assert launch["dirty"] in (True, False)


def test_the_commit_of_an_outer_repository_is_not_that_of_the_program(tmp_path, monkeypatch):
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "outer"], check=True)
    (tmp_path / "program" / "infra").mkdir(parents=True)
    monkeypatch.setattr(metrics, "__file__", str(tmp_path / "program" / "infra" / "metrics.py"))
    assert metrics.git_commit() == {"commit": None, "dirty": None}
    monkeypatch.setattr(metrics, "__file__", str(tmp_path / "infra" / "metrics.py"))
    assert re.fullmatch("[0-9a-f]{40}", metrics.git_commit()["commit"])


def test_each_launch_that_did_something_is_recorded(copy):
    edit(copy, eval_lr=0.5)
    assert resume(copy).code == 0
    assert resume(copy).code == 0  # nothing to do
    edit(copy, n_epochs=3, optimizer="sgd", lr="1.0e+9", print_freq=1)
    assert resume(copy).code == 1  # diverges
    launches = Run(copy).read_launches()
    assert [launch["stages"] for launch in launches[1:]] == [["probe"], ["training"]]
    assert re.match(r"epoch 2 step \d+: the .* is (nan|inf)", launches[-1]["outcome"])


@pytest.mark.parametrize("outcome", [None, "no space left"])
def test_a_launch_that_ended_before_its_end_was_recorded(copy, finished, outcome):
    (launch,) = Run(copy).read_launches()
    del launch["checksum"]
    launch |= {"end": None, "outcome": outcome}
    (copy / "environment.json").write_text(json.dumps([files.sealed(launch)]))
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[:-1]))
    assert resume(copy).code == 0
    assert contents(copy) == contents(finished)
    assert [launch["outcome"] for launch in Run(copy).read_launches()] == [outcome, "finished"]
    assert events(copy)[0] == expected(copy)


def test_events_show_what_metrics_jsonl_holds(finished):
    scalars, pictures = events(finished)
    assert scalars == expected(finished)
    names = "train/loss_sim train/lr train/grad_norm train/patches_per_second probe/top1"
    assert set(names.split()) < set(scalars)
    assert pictures == ["patches"]
    (path,) = (finished / "tensorboard").glob("events.*")
    assert b"_hparams_/session_start_info" in path.read_bytes()


def test_events_of_a_run_that_was_stopped_and_edited_show_each_step_once(copy):
    for name in ("last.pt", "1.pt"):
        (copy / "checkpoints" / name).unlink()  # as if it had been killed in epoch 1
    edit(copy, lr=0.1, eval_views="crops", n_eval_epochs=2)
    assert resume(copy).code == 0
    scalars, _ = events(copy)
    assert scalars == expected(copy)
    assert [step for step, _ in scalars["train/lr"]] == [4, 6, 10, 12]
    assert [step for step, _ in scalars["probe/top1"]] == [0, 1]
    config = (copy / "tensorboard" / "projector_config.pbtxt").read_text()
    assert config.count("tensor_name") == 1


def test_the_projector_has_embeddings_pictures_and_names(finished):
    folder = finished / "tensorboard"
    config = (folder / "projector_config.pbtxt").read_text()
    assert config.count("tensor_name") == 1
    paths = re.findall(r'path: "(.*)"', config)
    assert len(paths) == 3
    assert all((folder / path).exists() for path in paths)
    rows = (folder / "00000" / "test" / "tensors.tsv").read_text().splitlines()
    x = torch.tensor([[float(value) for value in row.split("\t")] for row in rows])
    embeddings = files.read_pt(finished / "artifacts" / "test.pt")["embeddings"]
    # All components are there, so that the distances are the same.
    distances = torch.cdist(embeddings, embeddings)
    torch.testing.assert_close(torch.cdist(x, x), distances, atol=1e-4, rtol=1e-3)
    labels = (folder / "00000" / "test" / "metadata.tsv").read_text().split()
    assert labels == 5 * ["across"] + 5 * ["down"]


def test_the_projector_has_images_without_labels_too(tiny, tmp_path):
    heap = tmp_path / "heap"
    write_images(heap, 6, 0)
    trained_with("--data_dir", heap, "--n_epochs", "1", tiny=tiny, tmp_path=tmp_path)
    folder = tmp_path / RUN / "tensorboard" / "00000" / "train"
    assert len((folder / "tensors.tsv").read_text().splitlines()) == 6
    assert (folder / "sprite.png").exists()


OPTIONAL = (
    "tensorboard matplotlib sklearn scipy safetensors onnx onnxscript onnxruntime timm"
).split()
WITHOUT_OPTIONAL = f"""
import sys
sys.modules |= dict.fromkeys({OPTIONAL})
import main
sys.exit(main.main(sys.argv[1:]))
"""


def test_without_tensorboard_and_other_optional_packages(tiny, finished, tmp_path):
    assert run(*tiny, "--no-tensorboard", "--log_folder", tmp_path / "a").code == 0
    assert not (tmp_path / "a" / RUN / "tensorboard").exists()
    command = [sys.executable, "-c", WITHOUT_OPTIONAL, *tiny, "--log_folder", tmp_path / "b"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("pip install tensorboard")) == (0, 1)
    assert contents(tmp_path / "b" / RUN) == contents(finished)


def screen(*command, **environment):
    """Return what a command writes to a terminal."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))  # rows, columns
    env = {**os.environ, **environment}
    process = subprocess.Popen(command, stdout=its, stderr=its, stdin=its, env=env)
    os.close(its)
    text = b""
    try:
        while part := os.read(ours, 10_000):
            text += part
    except OSError:  # Linux raises it at the end
        pass
    os.close(ours)
    process.wait()
    return text.decode()


def test_colours_and_bars_on_a_terminal_alone(tiny, finished, tmp_path):
    program = [sys.executable, ROOT / "main.py"]
    assert "\033[1m===> Report" in screen(*program, "resume", "--exp_dir", finished)
    assert "\033" not in resume(finished).out
    text = screen(*program, *tiny, "--log_folder", tmp_path, "--n_eval_epochs", "1", NO_COLOR="1")
    assert "===> Report" in text and "\033[1m" not in text
    assert re.search(r"epoch 1: 100%\|█+\| 6/6 \[\d\d:\d\d<00:00, .* [\d,]+ patches/s\]", text)
    assert re.search(r"encode train: 100%\|█+\| 24/24 .* patches/s\]", text)


def test_lines_in_a_pipe_show_speed_and_time_left(tiny, tmp_path):
    out = run(*tiny, "--log_folder", tmp_path).out
    losses = r"sim -0\.\d{4} uniformity .* lr 0\.\d{4} [\d,]+ patches/s, \d\d:\d\d left"
    assert re.search(rf"^epoch 0 step 4/6 \| {losses}$", out, re.M)
    options = "--print_freq 1 --n_eval_epochs 4 --test_patches 1".split()
    out = run(*tiny, "--log_folder", tmp_path, *options).out
    assert re.search(r"^encode train 3/3 \| [\d,]+ patches/s, 00:00 left$", out, re.M)
    assert "\r" not in out


def test_warnings_of_libraries_are_shown_with_debug_alone(monkeypatch, finished):
    original = main.resume_command

    def warn(*args):
        warnings.warn("deprecated", stacklevel=1)
        return original(*args)

    monkeypatch.setattr(main, "resume_command", warn)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert resume(finished).code == 0
        assert not caught
        assert resume(finished, "--debug").code == 0
        assert [str(warning.message) for warning in caught] == ["deprecated"]
