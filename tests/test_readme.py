import re

import numpy as np
import readme
import torch
from conftest import ROOT, run

import data

TEXT = (ROOT / "README.md").read_text()


def test_options_and_figures_are_those_of_the_declaration_and_the_results():
    assert readme.render(TEXT) == TEXT


def test_commands_use_options_that_exist():
    options = set(re.findall(r"--[\w-]+", run("train", "--help").out))
    for command in ("resume", "cleanup"):
        options |= set(re.findall(r"--[\w-]+", run(command, "--help").out))
    used = re.findall(r"^python main\.py .*$", TEXT, re.M)
    assert len(used) >= 5
    for line in used:
        assert set(re.findall(r"--[\w-]+", line)) <= options, line
    for target in re.findall(r"^make (\w+)", TEXT, re.M):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)


def test_the_readmes_own_data_set_loads(tmp_path):
    """The function in the README, as it stands there, in data.py's place."""
    code = re.search(r"```python\n(def load_npz.*?)```", TEXT, re.S)[1]
    scope = dict(vars(data))
    exec(code, scope)
    images = np.random.default_rng(0).integers(0, 256, (5, 12, 10, 3), dtype=np.uint8)
    np.savez(tmp_path / "test.npz", images=images, labels=np.array([0, 1, 1, 0, 1]), class_names=["cat", "dog"])
    loaded = scope["load_npz"](tmp_path, False)
    assert loaded.images.shape == (5, 3, 12, 10)
    assert torch.equal(loaded.images.permute(0, 2, 3, 1), torch.from_numpy(images))
    assert (loaded.labels.tolist(), loaded.class_names) == ([0, 1, 1, 0, 1], ["cat", "dog"])
    x = data.sample_patches(loaded.images, 3, data.generator(0, "t"), 16)
    assert x.shape == (3, 5, 3, 16, 16)
