"""The command for the day when there is a GPU, tried on a CPU."""

import json
import subprocess
import sys
from argparse import Namespace

from helpers import ONE_THREAD, ROOT

from benchmarks import gpu
from infra import files


def test_each_part_writes_its_figures(images, tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--quick", "--device", "cpu"]
    command += ["--dataset", "folder", "--data_dir", images, "--out", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {
        f"gpu-{name}.json" for name in gpu.GPU_PARTS
    }
    for name in gpu.GPU_PARTS:
        content = json.loads((tmp_path / f"gpu-{name}.json").read_text())
        assert "failed" not in content and content["commit"], content
        assert content["machine"]["device"] == "cpu" and content["measured"]
        for figures in content["measured"].values():
            if name == "equal":
                assert figures["within"] and figures["difference"] <= figures["tolerance"]
            elif name.startswith("run-"):
                assert figures["wall_seconds"] > sum(figures["seconds"].values()) > 0
                assert len(figures["losses"]) == 1 and 0 <= figures["top1"] <= 100
            else:
                assert 0 < figures["least"] <= figures["ms"] <= figures["greatest"]


def test_a_part_that_fails_keeps_what_it_measured(tmp_path, monkeypatch):
    def failing(options):
        yield "before", {"ms": 1.0}
        raise ValueError("no such thing")

    monkeypatch.setitem(gpu.GPU_PARTS, "step", failing)
    gpu.run_part("step", Namespace(out=tmp_path, device="cpu"))
    content = files.read_json(tmp_path / "gpu-step.json")
    assert content["measured"] == {"before": {"ms": 1.0}}
    assert content["failed"] == "ValueError: no such thing"


def test_a_difference_from_the_cpu_is_seen(monkeypatch):
    """A step on the device under test whose gradient is off by 2%: more than its tolerance."""
    first_step = gpu.first_step

    def wrong(hp, device):
        results = first_step(hp, "cpu")
        return results if device == "cpu" else {**results, "gradient": 1.02 * results["gradient"]}

    monkeypatch.setattr(gpu, "first_step", wrong)
    monkeypatch.setattr(gpu, "UNIFORMITY", ("tcr",))
    options = Namespace(archs=("resnet18-tiny",), bs=4, device="other")
    figures = dict(gpu.equal(options))
    beyond = {name for name, row in figures.items() if not row["within"]}
    assert beyond == {"resnet18-tiny, tcr, gradient"}
