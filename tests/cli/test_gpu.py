"""The command for the day a GPU is there, tried on a CPU."""

import functools
import json
import os
import subprocess
import sys
import time

import pytest
import torch
from helpers import ROOT

from benchmarks import gpu, gpu_jobs


def command(out, *words):
    """Run the trial on a CPU; return its standard output."""
    line = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--quick",
        "--device",
        "cpu",
        "--out",
        out,
        *words,
    ]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    """The folder of a trial of all parts, and what it printed."""
    out = tmp_path_factory.mktemp("gpu") / "results"
    return out, command(out)


def test_each_part_has_a_file_with_its_figures(trial):
    out, printed = trial
    assert set(contents(out)) == {f"gpu-{part}.json" for part in gpu.PARTS}
    for part in gpu.PARTS:
        content = json.loads((out / f"gpu-{part}.json").read_text())
        assert content["part"] == part and content["seed"] == gpu.SEED and content["skipped"] == {}
        assert (
            content["machine"]["device"] == "cpu"
            and content["machine"]["torch"] == torch.__version__
        )
        assert (
            content["left_out"].items() >= dict.fromkeys(gpu.ON_CUDA, "only on CUDA").items()
            and content["left_out"]["fp16"]
        )
        assert all(seconds > 0 for seconds in content["seconds"].values()) and content["measured"]
        for name, value in content["measured"].items():
            assert f"{part:10} {name} " in printed
            check(value)


def check(value):
    """Assert that a measurement is a possible one."""
    if "within" in value:
        assert value["within"] and 0 <= value["relative"] <= value["tolerance"]
    elif "wall_seconds" in value:
        assert value["wall_seconds"] > sum(value["seconds"].values()) > 0
        assert set(value["seconds"]) == {"training", "encoding", "probe"}
        assert all(0 <= value[name] <= 100 for name in ("top1", "top5", "best_top1", "knn_top1"))
        assert len(value["losses"]) == 2 and all(
            len(epoch["mean"]) == 2 for epoch in value["losses"]
        )
    else:
        assert 0 < value["least"] <= value["ms"] <= value["greatest"] and value["host_ms"] > 0


def test_what_is_compared_and_measured(trial):
    names = {
        part: set(json.loads((trial[0] / f"gpu-{part}.json").read_text())["measured"])
        for part in gpu.PARTS
    }
    kinds = ("gradient", "losses", "weights", "update")
    assert names["equal"] >= {f"resnet18-tiny step: {kind}" for kind in kinds} | {
        "tcr loss",
        "resnet18-tiny embeddings",
    }
    assert names["step"] == {"resnet18-tiny bf16", "resnet18-tiny fp32"}
    assert names["parts"] >= {
        "augmentation",
        "LARS step",
        "encoding, resnet18-tiny",
        "tcr loss, both ways",
    }


def test_a_second_call_rewrites_what_it_is_asked_for_alone(trial):
    out, _ = trial
    path, before, times = (
        out / "gpu-equal.json",
        contents(out),
        {path: path.stat().st_mtime_ns for path in out.iterdir()},
    )
    path.write_text('{"measured": {"of an earlier call": {}}}')
    command(out, "--only", "equal")
    assert {path.name for path in out.iterdir() if path.stat().st_mtime_ns != times[path]} == {
        path.name
    }
    now, then = json.loads(path.read_text()), json.loads(before[path.name])
    assert list(now["measured"]) == list(then["measured"])


def test_without_time_every_part_is_skipped_and_keeps_its_file(tmp_path, capsys):
    (tmp_path / "gpu-run.json").write_text("{}")
    assert gpu.main(["--quick", "--device", "cpu", "--out", str(tmp_path), "--minutes", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(gpu.PARTS)
    assert all("skipped: 0 s left for it" in line for line in lines)
    assert contents(tmp_path) == {"gpu-run.json": b"{}"}


def test_without_cuda_there_is_one_line(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path / "none")]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: device cuda is not available here") and told.count("\n") == 1
    assert not (tmp_path / "none").exists()


def test_the_jobs_are_in_order_of_worth():
    """The graph and the modes of --compile are optional; all of them come once more at the end."""
    jobs = gpu.jobs_of(gpu.PARTS, gpu.Sizes(), cuda=True)
    optional = [job for job in jobs if job.optional]
    half = len(gpu.ON_CUDA) * len(gpu.Sizes().archs)
    assert optional[:half] == optional[half:] == jobs[-half:]
    assert [job.part for job in jobs if not job.optional] == [
        "equal",
        "step",
        "step",
        "parts",
        "run",
        "one-minute",
    ]


def test_a_difference_is_seen():
    there = torch.ones(100)
    here = there.clone()
    here[3] += 1e-3
    assert gpu_jobs.difference(here, there, 1e-3) == pytest.approx(
        {"relative": 1e-4, "greatest": 1e-3, "tolerance": 1e-3, "within": True}, rel=1e-2)  # fmt: skip
    assert not gpu_jobs.difference(here, there, 1e-5)["within"]
    assert not gpu_jobs.difference(here * torch.nan, there, 1e-5)["within"]


def crash(task):
    task.emit("before", {"ms": 1.0})
    os._exit(3)


def fail(task):
    raise ValueError("no\nsuch thing")


def overrun(task):
    time.sleep(60)


@pytest.mark.parametrize("function, told", [(crash, "ended with code 3"), (fail, "ValueError: no such thing"),
                                            (overrun, "not done after 3 s")])  # fmt: skip
def test_a_job_that_fails_is_told_and_ends(function, told, tmp_path):
    results = gpu.Results(tmp_path)
    start = time.monotonic()
    task = gpu.Task(torch.device("cpu"), gpu.QUICK, (), limit=3 if function is overrun else 60)
    gpu.carry_out(
        gpu.Job("parts", "it", function, 1), task, functools.partial(results.emit, "parts")
    )
    assert time.monotonic() - start < 50
    measured = json.loads((tmp_path / "gpu-parts.json").read_text())["measured"]
    assert told in measured["it"]["failed"] and told in results.table() and not results.succeeded()
    assert ("before" in measured) == (function is crash)


@pytest.mark.parametrize(
    "expected, order", [(30, ["a", "graph", "b"]), (40, ["a", "b", "graph"]), (70, ["a", "b"])]
)
def test_an_optional_job_leaves_the_later_parts_their_time(expected, order, tmp_path, monkeypatch):
    """In a minute, of which b is expected to take 25 s, the graph runs before b, after it, or not at all."""
    graph = gpu.Job("step", "graph", None, expected, optional=True)
    jobs, done = [gpu.Job("step", "a", None, 10), graph, gpu.Job("parts", "b", None, 25), graph], []
    monkeypatch.setattr(gpu, "jobs_of", lambda *_: jobs)

    def pretend(job, task, emit):
        done.append((job.name, task.limit))
        emit(job.name, {"ms": 1.0})

    monkeypatch.setattr(gpu, "carry_out", pretend)
    assert gpu.main(["--quick", "--device", "cpu", "--out", str(tmp_path), "--minutes", "1"]) == 0
    assert [name for name, _ in done] == order
    limits = dict(done)
    assert 55 < limits["b"] <= 60 and (
        "graph" not in limits or (limits["graph"] <= 35) == (order[1] == "graph")
    )
    skipped = json.loads((tmp_path / "gpu-step.json").read_text())["skipped"]
    assert set(skipped) == {"a", "b", "graph"} - set(order)
