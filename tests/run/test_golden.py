"""A tiny run whose numbers are kept in golden.json: a change of the numerics must be meant.

    UPDATE_GOLDEN=1 python -m pytest tests/run/test_golden.py      # after a change that is meant
"""

import json
import os
from pathlib import Path

import pytest
from helpers import RUN, trained_with, training_lines

from infra import files

GOLDEN = Path(__file__).with_name("golden.json")


def test_losses_and_embeddings_are_those_that_were_kept(tiny, tmp_path):
    """30 steps in float32. Other processors and numbers of threads round otherwise: up to 1e-5 was seen."""
    trained_with("--n_epochs", "5", "--lr", "0.03", "--print_freq", "1", tiny=tiny, tmp_path=tmp_path)
    lines = training_lines(tmp_path / RUN)
    embeddings = files.load(tmp_path / RUN / "artifacts" / "test.pt")["embeddings"]
    found = {"invariance": [line["loss_sim"] for line in lines], "uniformity": [line["loss_uniformity"] for line in lines],
             "embeddings": embeddings.flatten().tolist()}  # fmt: skip
    assert len(lines) == 30
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps({name: [round(value, 6) for value in values] for name, values in found.items()}) + "\n")
    for name, values in json.loads(GOLDEN.read_text()).items():
        assert found[name] == pytest.approx(values, rel=1e-3, abs=1e-4), name
