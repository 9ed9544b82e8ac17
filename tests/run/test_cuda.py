"""The program on a simulated GPU: it mixes no devices, and the host does not wait in a step of
training or of the probe, or between two batches of encoding.
"""

import pytest
import torch
from helpers import RUN, run
from simulated_cuda import HOT, simulated_gpu

import train
from images import cache
from infra import files

TRAININGS = {
    "bf16": "--precision bf16 --standardize",
    "max_patches": "--max_patches 7 --eval_lr 0.1",
    "sgd": "--optimizer sgd --uniformity_loss vonmises --emb_pool proj --eval_views augmented",
    "muon": "--optimizer muon --bags 2 --eval_freq 2 --eval_views crops",
    "pretrained": "--pretrained_proj {checkpoint} --weights {checkpoint}",
    "save_proj": "--save_proj",
}
KNOWN = {"save_proj": {"encode: blocking copy in encode.py, encode"}}


@pytest.fixture
def gpu():
    with simulated_gpu() as gpu:
        yield gpu


def run_on(gpu, *argv):
    """Run a command on the simulated GPU."""
    result = run(*argv, "--device", "cuda")
    assert result.code == 0, result.err


@pytest.mark.parametrize("name", TRAININGS)
def test_training(gpu, tiny, finished, tmp_path, name):
    options = TRAININGS[name].format(checkpoint=finished / "checkpoints" / "0.pt").split()
    run_on(gpu, *tiny, *options, "--n_epochs", 1, "--log_folder", tmp_path)
    assert gpu.phases == set(HOT)
    assert gpu.events == KNOWN.get(name, set())


def test_results_are_those_of_the_cpu(gpu, tiny, finished, tmp_path, monkeypatch):
    """In fp32, with images that stay in their file."""
    monkeypatch.setattr(cache, "MANY", 4)
    monkeypatch.setattr(cache, "LARGE", 0)
    run_on(gpu, *tiny, "--log_folder", tmp_path)
    assert gpu.events == set()
    ours = files.read_pt(tmp_path / RUN / "artifacts" / "train.pt")
    cpus = files.read_pt(finished / "artifacts" / "train.pt")
    torch.testing.assert_close(ours["embeddings"], cpus["embeddings"])


def test_other_commands(gpu, copy, images, tmp_path):
    run_on(gpu, "resume", "--exp_dir", copy, "--n_epochs", 3)
    run_on(gpu, "embed", "--exp_dir", copy, "--images", images, "--out", tmp_path / "e.npz")
    run_on(gpu, "probe", "--exp_dir", copy)
    run_on(gpu, "finetune", "--exp_dir", copy, "--n_epochs", 1)
    assert gpu.events == set()


def test_dry_run(gpu):
    options = "--dataset textures --h_dim 64 --bs 4 --n_patches 2 --precision bf16 --dry_run"
    run_on(gpu, "train", *options.split())


FAULTS = {
    "_local_scalar_dense": lambda x: bool(x.sum() > 0),
    "nonzero": lambda x: x.nonzero(),
    "index by a mask": lambda x: x[x > 0],
    "index on the CPU": lambda x: x[torch.tensor([0, 1])],
    "blocking copy": lambda x: torch.ones(3).to("cuda", non_blocking=True),
}


def test_the_simulation_finds_what_waits(gpu, tiny, tmp_path, monkeypatch):
    def faulty(images, params, size):
        for fault in FAULTS.values():
            fault(images)
        return render(images, params, size)

    render = train.render
    monkeypatch.setattr(train, "render", faulty)
    run_on(gpu, *tiny, "--n_epochs", 0.2, "--log_folder", tmp_path)
    assert gpu.events == {f"step: {event} in train.py, forward" for event in FAULTS}


def test_the_simulation_refuses_to_mix_devices(gpu):
    on_gpu = torch.zeros(3).to("cuda")
    for mixed in (lambda: on_gpu + torch.ones(3), lambda: torch.ones(3)[on_gpu.long()]):
        with pytest.raises(RuntimeError, match="on the CPU and on the GPU"):
            mixed()
