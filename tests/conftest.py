import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers import RUN, run, write_images

from experiment import Run
from infra import files


def pytest_addoption(parser):
    parser.addoption(
        "--runs",
        type=int,
        default=10,
        help="kills of test_chaos.py, and a third of the rounds of test_campaign.py",
    )
    parser.addoption("--slow", action="store_true", help="the tests that are marked slow too")
    parser.addoption("--gpu", action="store_true", help="CUDA may be used, for tests/gpu")


def pytest_configure(config):
    if not config.getoption("--gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # of this process and those that it starts


def pytest_collection_modifyitems(config, items):
    for item in items if not config.getoption("--slow") else ():
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: pass --slow"))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """The cache folder: not the user's own."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    return Path(os.environ["XDG_CACHE_HOME"], "emp-ssl")


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A data set in train/<class> and test/<class>: 24 training and 10 test images, two classes."""
    root = tmp_path_factory.mktemp("images")
    for seed, (split, n) in enumerate((("train", 12), ("test", 5))):
        for name in ("across", "down"):
            write_images(root / split / name, n, 2 * seed + len(name))
    return root


@pytest.fixture(scope="session")
def tiny(images):
    """The arguments of a run of twelve steps, about a second, with a checkpoint at each step."""
    return (
        "train --dataset folder --image_size 16 --arch resnet10-tiny --h_dim 8 --z_dim 4 "
        "--n_patches 2 --bs 4 --n_epochs 2 --n_eval_epochs 3 --print_freq 4 --checkpoint_every 0 "
        "--device cpu --precision fp32"
    ).split() + ["--data_dir", str(images)]


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory):
    """The folder of such a run, undisturbed.

    Tests read it and copy it, and change nothing in it.
    """
    logs = tmp_path_factory.mktemp("finished")
    result = run(*tiny, "--log_folder", logs)
    assert result.code == 0, result.err
    return logs / RUN


@pytest.fixture(scope="session")
def half_labelled(tiny, images, tmp_path_factory):
    """The folder of such a run with a CSV file: half of the training images have no label.

    Of the ten test images four have one. half_labelled.parent / "labels.csv" is the file.
    """
    logs = tmp_path_factory.mktemp("half_labelled")
    lines = []
    for name in ("across", "down"):
        lines += [f"train/{name}/{i}.png,{name}\n" for i in range(6)]
        lines += [f"train/{name}/{i}.png,\n" for i in (6, 7)]  # the others have no line
        lines += [f"test/{name}/{i}.png,{name}\n" for i in (1, 3)]
    (logs / "labels.csv").write_text("".join(lines))
    options = ["--labels", logs / "labels.csv", "--eval_freq", "6", "--log_folder", logs]
    result = run(*tiny, *options)
    assert (result.code, result.err.count("\n")) == (0, 2), result.err  # two warnings of a collapse
    (logs / "out.txt").write_text(result.out)
    return logs / RUN


@pytest.fixture
def copy(finished, tmp_path):
    """The finished run in a folder of the test's own, moved and renamed."""
    return shutil.copytree(finished, tmp_path / "renamed")


@pytest.fixture(scope="session")
def small_checkpoints(finished, tmp_path_factory):
    """A folder with last.pt and previous.pt of steps 9 and 8, a few kB each."""
    run = Run(tmp_path_factory.mktemp("small"))
    run.checkpoints.mkdir()
    content = files.read_pt(finished / "checkpoints" / "0.pt")
    content["encoder"] = {"weight": torch.randn(20, 20)}
    content["optimizer"] = {0: {"momentum_buffer": torch.randn(20, 20)}}
    for step in (8, 9):
        run.save_checkpoint({**content, "state": {**content["state"], "step": step}})
    return run.dir
