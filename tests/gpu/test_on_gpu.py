"""The program on a GPU: commands run, results are those of the CPU, and the host does not wait.

python -m pytest tests/gpu --gpu
"""

import subprocess
import sys
from functools import partial

import pytest
import torch
from helpers import ROOT, RUN, contents, pictures, run

import emp_ssl
from encode import Output, encode
from evaluate import Fit, softmax_regressions
from hparams import Hparams
from infra.device import generator
from optimizers import build_optimizer
from patches import Views
from train import build_step
from weights import new_encoder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and --gpu")
COMMANDS = [
    "resume --device cuda --n_epochs 3",
    "embed --device cuda --images {images} --out {out}",
    "probe --device cuda",
    "finetune --device cuda --n_epochs 2",
    "export --format torchvision",
    "report",
]


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """The folder of a run that was trained on the GPU, in bf16."""
    logs = tmp_path_factory.mktemp("gpu")
    result = run(*tiny, "--precision", "bf16", "--device", "cuda", "--log_folder", logs)
    assert result.code == 0, result.err
    return logs / RUN


@pytest.fixture
def set_sync_debug_mode():
    """torch.cuda.set_sync_debug_mode: in mode "error" an operation raises if the host must wait."""
    yield torch.cuda.set_sync_debug_mode
    torch.cuda.set_sync_debug_mode("default")


def small_training(device, bf16):
    """Return (step, images) of a small run."""
    hp = Hparams(n_patches=4, bs=16, h_dim=256, z_dim=64)
    encoder = new_encoder(hp).to(device, memory_format=torch.channels_last)
    step = build_step(hp, encoder, build_optimizer(hp, encoder, bf16), bf16)
    return step, pictures(hp.bs).to(device)


@pytest.mark.parametrize("command", COMMANDS)
def test_command(trained, images, tmp_path, command):
    for package in ("matplotlib", "sklearn") if command == "report" else ():
        pytest.importorskip(package)
    argv = command.format(images=images, out=tmp_path / "embeddings.npz").split()
    result = run(*argv, "--exp_dir", trained)
    assert result.code == 0, result.err
    assert run("compare", trained.parent).code == 0


@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 5e-4), (True, 0.05)])
def test_losses_and_gradient_norm_are_those_of_the_cpu(monkeypatch, bf16, tolerance):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    metrics = {}
    for device in ("cpu", "cuda"):
        step, images = small_training(device, bf16)
        metrics[device] = step(images, generator(0, "patches")).cpu()
    torch.testing.assert_close(metrics["cuda"], metrics["cpu"], rtol=tolerance, atol=0)


def test_embeddings_are_those_of_the_cpu(monkeypatch, finished):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    images = pictures(20, 16, 16)
    expected = emp_ssl.load(finished, "cpu").embed_images(images)
    embeddings = emp_ssl.load(finished, "cuda").embed_images(images)
    tolerance = 1e-4 * expected.abs().max().item()
    torch.testing.assert_close(embeddings, expected, rtol=0, atol=tolerance)


def test_deterministic_means_the_same_bits(tiny, tmp_path):
    options = "--deterministic --arch resnet18-imagenet --device cuda".split()
    for folder in ("a", "b"):
        command = [sys.executable, "main.py", *tiny, *options, "--log_folder", tmp_path / folder]
        subprocess.run(command, check=True, cwd=ROOT)
    assert contents(tmp_path / "a" / RUN) == contents(tmp_path / "b" / RUN)


def test_a_step_of_training_does_not_wait(set_sync_debug_mode):
    step, images = small_training("cuda", bf16=True)
    step(images, generator(0, "patches"))  # the first one fills caches
    set_sync_debug_mode("error")
    step(images, generator(0, "patches", step=1))


def test_encoding_does_not_wait_between_batches(set_sync_debug_mode):
    def between_batches(steps):
        set_sync_debug_mode("error")
        yield from steps
        set_sync_debug_mode("default")

    encoder = new_encoder(Hparams(h_dim=256, z_dim=64)).to("cuda")
    images = pictures(30).to("cuda")
    rng = partial(generator, 0, "views")
    encode(encoder, images, Views(4), rng, 10, Output(bf16=True), between_batches)


def test_a_step_of_the_probe_does_not_wait(set_sync_debug_mode):
    x = torch.randn(100, 32).to("cuda")
    y = torch.arange(100).remainder(3).to("cuda")
    set_sync_debug_mode("error")
    list(softmax_regressions(x.bfloat16(), y, [0.1, 0.2], 3, Fit(n_epochs=2, bf16=True), range(2)))
