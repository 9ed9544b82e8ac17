"""What a run tells of itself: its environment, its TensorBoard events, and what is on the screen."""

import fcntl
import json
import os
import platform
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
import warnings

import pytest
import torch
from helpers import ROOT, RUN, contents, edit, run, write_images
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main
from experiment import Run
from infra import files, metrics


def events(exp_dir):
    """({tag: [(step, value), ...]}, tags of pictures), of all event files of the run."""
    assert (
        len(list((exp_dir / "tensorboard").glob("events.*"))) == 1
    )  # of earlier launches none is left
    board = EventAccumulator(str(exp_dir / "tensorboard"), {"scalars": 0}).Reload()
    scalars = {
        tag: [(event.step, event.value) for event in board.Scalars(tag)]
        for tag in board.Tags()["scalars"]
    }
    return scalars, board.Tags()["images"]


def expected(exp_dir):
    """The scalars that metrics.jsonl and linear_accuracy.json ask for."""
    scalars = {}
    for line in files.read_jsonl(Run(exp_dir).metrics):
        for name in set(line) - {
            "epoch",
            "step",
            "global_step",
            "probe_epoch",
            "event",
            "name",
            "old",
            "new",
        }:
            stage, step = (
                ("train", line["global_step"])
                if "global_step" in line
                else ("probe", line["probe_epoch"])
            )
            scalars.setdefault(f"{stage}/{name}", []).append(
                (step, pytest.approx(line[name], rel=1e-6))
            )
    result = files.read_json(exp_dir / "linear_accuracy.json")
    return scalars | {
        f"result/{name}": [(0, pytest.approx(result[name]))]
        for name in ("top1", "top5", "knn_top1")
    }


def test_environment(finished):
    (launch,) = Run(finished).read_launches()
    assert launch["command"].startswith("main.py train --dataset folder --image_size 16")
    assert (launch["outcome"], launch["stages"]) == (
        "finished",
        ["training", "encoding train", "encoding test", "probe"],
    )
    assert (launch["python"], launch["torch"], launch["device"]) == (
        platform.python_version(),
        torch.__version__,
        "cpu",
    )
    assert launch["start"] <= launch["end"] <= metrics.now()
    assert set(launch["seconds"]) == {"training", "encoding", "probe"}
    assert launch["hparams"] == vars(Run(finished).read_hparams())
    if (ROOT / ".git").exists():
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        assert launch["commit"] == head and launch["dirty"] in (True, False)


def test_each_launch_that_did_something_is_noted(finished, tmp_path):
    exp_dir = shutil.copytree(finished, tmp_path / "run")
    edit(exp_dir, eval_lr=0.5)
    assert run("resume", "--exp_dir", exp_dir).code == 0
    assert run("resume", "--exp_dir", exp_dir).code == 0  # nothing to do
    edit(exp_dir, n_epochs=3, optimizer="sgd", lr="1.0e+9", print_freq=1)
    assert run("resume", "--exp_dir", exp_dir).code == 1  # diverges
    launches = Run(exp_dir).read_launches()
    assert [launch["stages"] for launch in launches[1:]] == [["probe"], ["training"]]
    assert re.match(r"epoch 2 step \d+: the .* is (nan|inf)", launches[-1]["outcome"])


@pytest.mark.parametrize("outcome", [None, "no space left"])
def test_a_launch_that_ended_before_its_end_was_noted(finished, tmp_path, outcome):
    exp_dir = shutil.copytree(finished, tmp_path / "run")
    launches = Run(exp_dir).read_launches()
    (exp_dir / "environment.json").write_text(
        json.dumps(
            [
                files.sealed(
                    {name: value for name, value in launches[0].items() if name != "checksum"}
                    | {"end": None, "outcome": outcome}
                )
            ]
        )
    )
    (exp_dir / "metrics.jsonl").write_text(
        "".join((exp_dir / "metrics.jsonl").read_text().splitlines(True)[:-1])
    )
    assert run("resume", "--exp_dir", exp_dir).code == 0
    assert contents(exp_dir) == contents(finished)
    assert [launch["outcome"] for launch in Run(exp_dir).read_launches()] == [outcome, "finished"]
    assert events(exp_dir)[0] == expected(exp_dir)


def test_events_show_what_metrics_jsonl_holds(finished):
    scalars, pictures = events(finished)
    assert scalars == expected(finished)
    assert {
        "train/loss_sim",
        "train/lr",
        "train/grad_norm",
        "train/patches_per_second",
        "probe/top1",
    } < set(scalars)
    assert pictures == ["patches"]
    (path,) = (finished / "tensorboard").glob("events.*")
    assert b"_hparams_/session_start_info" in path.read_bytes()


def test_events_of_a_run_that_was_stopped_and_edited_show_each_step_once(finished, tmp_path):
    exp_dir = shutil.copytree(finished, tmp_path / "run")
    for name in ("last.pt", "1.pt"):
        (exp_dir / "checkpoints" / name).unlink()  # as if it had been killed in epoch 1
    edit(exp_dir, lr=0.1, eval_views="crops", n_eval_epochs=2)
    assert run("resume", "--exp_dir", exp_dir).code == 0
    scalars, _ = events(exp_dir)
    assert scalars == expected(exp_dir)
    assert [step for step, _ in scalars["train/lr"]] == [4, 6, 10, 12]
    assert [step for step, _ in scalars["probe/top1"]] == [0, 1]
    assert (exp_dir / "tensorboard" / "projector_config.pbtxt").read_text().count(
        "tensor_name"
    ) == 1


def test_the_projector_finds_embeddings_pictures_and_names(finished):
    folder = finished / "tensorboard"
    config = (folder / "projector_config.pbtxt").read_text()
    assert config.count("tensor_name") == 1
    paths = re.findall(r'path: "(.*)"', config)
    assert len(paths) == 3 and all((folder / path).exists() for path in paths)
    rows = (folder / "00000" / "test" / "tensors.tsv").read_text().splitlines()
    x = torch.tensor([[float(value) for value in row.split("\t")] for row in rows])
    embeddings = files.read_pt(finished / "artifacts" / "test.pt")["embeddings"]
    torch.testing.assert_close(
        torch.cdist(x, x), torch.cdist(embeddings, embeddings), atol=1e-4, rtol=1e-3
    )  # all components
    assert (folder / "00000" / "test" / "metadata.tsv").read_text().split() == 5 * [
        "across"
    ] + 5 * ["down"]


def test_the_projector_has_images_without_labels_too(tiny, tmp_path):
    write_images(tmp_path / "heap", 6, 0)
    assert (
        run(
            *tiny, "--data_dir", tmp_path / "heap", "--n_epochs", "1", "--log_folder", tmp_path
        ).code
        == 0
    )
    rows = (
        (tmp_path / RUN / "tensorboard" / "00000" / "train" / "tensors.tsv")
        .read_text()
        .splitlines()
    )
    assert (
        len(rows) == 6
        and (tmp_path / RUN / "tensorboard" / "00000" / "train" / "sprite.png").exists()
    )


OPTIONAL = (
    "tensorboard",
    "matplotlib",
    "sklearn",
    "scipy",
    "safetensors",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "timm",
)


def test_without_tensorboard_and_other_optional_packages(tiny, finished, tmp_path):
    assert run(*tiny, "--no-tensorboard", "--log_folder", tmp_path / "a").code == 0
    assert not (tmp_path / "a" / RUN / "tensorboard").exists()
    code = f"import sys; sys.modules |= dict.fromkeys({OPTIONAL}); import main; sys.exit(main.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *tiny, "--log_folder", tmp_path / "b"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("pip install tensorboard")) == (0, 1)
    assert contents(tmp_path / "b" / RUN) == contents(finished)


def screen(*command, **environment):
    """What a command writes to a terminal."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))  # rows, columns
    process = subprocess.Popen(
        command, stdout=its, stderr=its, stdin=its, env={**os.environ, **environment}
    )
    os.close(its)
    text = b""
    try:
        while part := os.read(ours, 10_000):
            text += part
    except OSError:  # what Linux says at the end
        pass
    os.close(ours)
    process.wait()
    return text.decode()


def test_colours_and_bars_on_a_terminal_alone(tiny, finished, tmp_path):
    program = [sys.executable, ROOT / "main.py"]
    assert "\033[1m===> Report" in screen(*program, "resume", "--exp_dir", finished)
    assert "\033" not in run("resume", "--exp_dir", finished).out
    text = screen(*program, *tiny, "--log_folder", tmp_path, "--n_eval_epochs", "1", NO_COLOR="1")
    assert "===> Report" in text and "\033[1m" not in text
    assert re.search(r"epoch 1: 100%\|█+\| 6/6 \[\d\d:\d\d<00:00, .* [\d,]+ patches/s\]", text)
    assert re.search(r"encode train: 100%\|█+\| 24/24 .* patches/s\]", text)


def test_lines_in_a_pipe_tell_speed_and_time_left(tiny, tmp_path):
    out = run(*tiny, "--log_folder", tmp_path).out
    assert re.search(
        r"^epoch 0 step 4/6 \| sim -0\.\d{4} uniformity .* lr 0\.\d{4} [\d,]+ patches/s, \d\d:\d\d left$",
        out,
        re.M,
    )
    out = run(
        *tiny,
        "--log_folder",
        tmp_path,
        "--print_freq",
        "1",
        "--n_eval_epochs",
        "4",
        "--test_patches",
        "1",
    ).out
    assert re.search(r"^encode train 3/3 \| [\d,]+ patches/s, 00:00 left$", out, re.M)
    assert "\r" not in out


def test_warnings_of_libraries_are_shown_with_debug_alone(monkeypatch, finished):
    def warn(*args):
        warnings.warn("deprecated", stacklevel=1)
        return resume(*args)

    resume = main.resume_command
    monkeypatch.setattr(main, "resume_command", warn)
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        assert run("resume", "--exp_dir", finished).code == 0
        assert not noted
        assert run("resume", "--debug", "--exp_dir", finished).code == 0
        assert [str(warning.message) for warning in noted] == ["deprecated"]
