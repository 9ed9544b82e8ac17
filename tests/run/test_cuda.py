"""The command on CUDA without a GPU: tests/simulated_cuda.py runs it on tensors without content, and says where the host waits,
what is copied, and how many kernels are launched."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT

COMPILER = os.environ.get("CXX", "c++")
pytestmark = pytest.mark.skipif(not shutil.which(COMPILER), reason="the simulation of CUDA needs a C++ compiler")

HOT = ("step", "encode", "probe")  # the phases in which the host must not wait

# Faults of the program that are known: what must be found in the hot phases of a scenario, and nothing else.
KNOWN = {
    # Features and projections of each batch are copied into CPU tensors, which the host waits for.
    "save_proj": {"encode: copy to the CPU in encode.py, encode"},
}

# Launches of a step of 2,000 patches in bf16, of its augmentation, and of an inner step of the probe, as counted with torch 2.14.
# A launch takes the host longer than many of these kernels take the device. Lower the numbers when the program needs fewer.
LAUNCHES_PER_STEP = {"resnet18-imagenet": 485, "resnet18-cifar": 421}
AUGMENTATION_LAUNCHES = 86
PROBE_LAUNCHES = {"bf16": 10, "fp32": 8}
MEMORY = ("resnet18-imagenet", "resnet18-cifar", "fp32 step", "chunks")  # scenarios that announce memory

SETTINGS = ("--h_dim 16 --z_dim 8 --n_patches 4 --bs 6 --n_epochs 1 --n_eval_epochs 2 --print_freq 3 --image_size 16 "
            "--no-tensorboard --device cuda --dataset folder").split()  # fmt: skip


def scenarios(images, logs):
    """Return the scenarios, in the order in which they run: a later one may need the run folder of an earlier one."""

    def folder(name):
        return logs / f"{name}__numpatch4_bs6_lr0.3"

    def train(name, options="", *more, like=None, **settings):
        arguments = ["--data_dir", images, "--log_folder", logs, "--exp_name", like or name, *options.split(), *more]
        return command(name, ["train", "--arch", "resnet18-tiny", *SETTINGS, *arguments], **settings)

    def command(name, argv, **settings):
        return {"name": name, "argv": [str(arg) for arg in argv], **settings}

    def step(name, options):
        options = f"--dataset textures --device cuda --bs 100 --dry_run {options}"
        return command(name, ["train", *options.split()])

    on_cuda, of_bf16 = ("--device", "cuda"), ("--exp_dir", folder("bf16"))
    return [
        train("bf16", "--precision bf16 --tensorboard --checkpoint_every 0"),
        train("fp32", "--precision fp32"),
        train("more epochs", "--precision bf16 --n_epochs 2", like="bf16"),
        train("max_patches", "--max_patches 7"),
        train("save_proj", "--save_proj"),
        train("sgd", "--optimizer sgd --uniformity_loss vonmises --emb_pool proj --eval_views augmented"),
        train("pretrained_proj", "--pretrained_proj", folder("fp32") / "checkpoints" / "0.pt"),
        train("muon", "--optimizer muon --eval_freq 2 --eval_lr 0.1 --eval_views crops --bags 2"),
        train("image file", image_file=True),
        command("embed", ["embed", *on_cuda, *of_bf16, "--images", images, "--out", logs / "embeddings.npz"]),
        command("report", ["report", *of_bf16]),
        step("resnet18-imagenet", "--arch resnet18-imagenet --n_patches 20"),
        step("resnet18-cifar", "--arch resnet18-cifar --n_patches 20"),
        step("fp32 step", "--arch resnet18-cifar --n_patches 20 --precision fp32"),
        step("chunks", "--arch resnet18-cifar --n_patches 100 --max_patches 2000"),
    ]


NAMES = [scenario["name"] for scenario in scenarios(ROOT, ROOT)]


@pytest.fixture(scope="module")
def results(images, tmp_path_factory):
    """What the script printed of each scenario, by its name."""
    folder = tmp_path_factory.mktemp("cuda")
    todo = json.dumps(scenarios(images, folder / "logs"))
    command, env = [sys.executable, "-m", "tests.simulated_cuda", folder], {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, input=todo, capture_output=True, text=True, cwd=ROOT, env=env, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return {result["name"]: result for result in map(json.loads, done.stdout.splitlines())}


def in_hot_phases(events):
    """Return the events of the phases HOT as texts without line numbers, and the same with them."""
    events = [event for event in events if event["phase"] in HOT]
    texts = {f"{event['phase']}: {event['what']} in {event['file']}, {event['function']}" for event in events}
    return texts, [f"{event['file']}:{event['line']}" for event in events]


@pytest.mark.parametrize("name", NAMES)
def test_runs_on_cuda_and_the_host_never_waits(results, name):
    result = results[name]
    assert result["code"] == 0, result["err"]
    found, lines = in_hot_phases(result["reads"] + result["copies"])
    assert found == KNOWN.get(name, set()), lines


@pytest.mark.parametrize("name", NAMES)
def test_each_phase_is_seen(results, name):
    fewer = {"embed": {"encode"}, "report": set(), **{name: {"step"} for name in MEMORY}}
    assert fewer.get(name, set(HOT)) <= set(results[name]["phases"])


def test_training_goes_on_from_the_checkpoint(results):
    assert "Going on at epoch 1 step 0" in results["more epochs"]["out"]
    assert len(results["more epochs"]["launches"]) == 4


def test_chunks_take_less_memory_on_the_device(results):
    assert results["max_patches"]["peak"] < results["bf16"]["peak"]


@pytest.mark.parametrize("arch", LAUNCHES_PER_STEP)
def test_launches_of_a_step(results, arch):
    launches, augmentation = results[arch]["launches"][-1]
    assert launches <= LAUNCHES_PER_STEP[arch]
    assert 0 < augmentation <= AUGMENTATION_LAUNCHES


@pytest.mark.parametrize("precision", PROBE_LAUNCHES)
def test_launches_of_a_step_of_the_probe(results, precision):
    launches, steps = results[precision]["probe"]
    assert steps == 4  # two epochs, with six learning rates and then with one
    assert launches <= PROBE_LAUNCHES[precision] * steps


@pytest.mark.parametrize("name", MEMORY)
def test_the_announced_memory_is_that_of_the_tensors_and_what_kernels_take(results, name):
    found = re.search(r"\* Memory: about ([\d.]+) GB for .*, of which ([\d.]+) GB are for kernels", results[name]["out"])
    need, kernels = map(float, found.groups())
    assert 0.98 * results[name]["peak"] / 1e9 < need - kernels < 1.2 * results[name]["peak"] / 1e9


def test_what_fp32_means_on_cuda_is_said(results):
    assert "precision: fp32, convolutions in TF32" in results["fp32"]["out"]
    assert "TF32" not in results["bf16"]["out"]
