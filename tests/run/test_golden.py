"""Numbers of a fixed run that are kept in golden.json: a change of the numerics must be meant.

UPDATE_GOLDEN=1 python -m pytest tests/run/test_golden.py      # after a change that is meant
"""

import copy
import json
import os
from functools import partial
from pathlib import Path

import pytest
from helpers import pictures

from encode import encode
from hparams import Hparams
from infra.device import generator
from patches import Views
from train import build_optimizer, build_step
from weights import new_encoder

GOLDEN = Path(__file__).with_name("golden.json")
# Twice the greatest difference that was measured.
TOLERANCE = {"invariance": 2e-3, "uniformity": 2e-3, "gradient norm": 4e-2, "embeddings": 5e-3}
HP = Hparams(
    arch="resnet18-tiny", h_dim=64, z_dim=16, n_patches=4, bs=16, precision="fp32", device="cpu"
)


def test_losses_gradients_and_embeddings_are_those_that_were_kept():
    """Three times three steps from the same weights, each with other patches.

    More steps in a row would multiply the rounding, which differs between processors and numbers of
    threads.
    """
    images, first = pictures(16), new_encoder(HP)
    metrics = []
    for i in range(3):
        encoder = copy.deepcopy(first)
        step = build_step(HP, encoder, build_optimizer(HP, encoder), bf16=False)
        metrics += [step(images, generator(0, "golden", i, k)).tolist() for k in range(3)]
    encoded = encode(first, images, Views(4, "grid", 32), partial(generator, 0, "golden"))
    invariance, uniformity, grad_norm = map(list, zip(*metrics, strict=True))
    numbers = {
        "invariance": invariance,
        "uniformity": uniformity,
        "gradient norm": grad_norm,
        "embeddings": encoded["embeddings"][:4].flatten().tolist(),
    }
    if os.environ.get("UPDATE_GOLDEN"):
        rounded = {}
        for name, values in numbers.items():
            rounded[name] = [float(f"{value:.6g}") for value in values]
        GOLDEN.write_text(json.dumps(rounded) + "\n")
    for name, values in json.loads(GOLDEN.read_text()).items():
        assert numbers[name] == pytest.approx(values, rel=TOLERANCE[name], abs=2e-3), name
