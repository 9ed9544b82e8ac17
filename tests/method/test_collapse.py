"""Effective rank, alignment and uniformity, against plain loops and what they are of known sets."""

import math

import pytest
import torch
import torch.nn.functional as F

import evaluate as collapse
from infra.device import generator


def test_the_effective_rank_is_the_entropy_of_the_singular_values():
    x = torch.randn(40, 12, generator=generator(0, "t")) @ torch.diag(torch.linspace(0.1, 3, 12))
    for rows in (x, x.T):  # wide and tall
        values = torch.linalg.svdvals(rows.double())
        p = (values / values.sum()).tolist()
        assert collapse.effective_rank(rows) == pytest.approx(
            math.exp(-sum(q * math.log(q) for q in p)), rel=1e-6
        )


def test_the_effective_rank_of_known_sets():
    assert collapse.effective_rank(torch.eye(16)) == pytest.approx(16)
    assert collapse.effective_rank(torch.ones(30, 8)) == pytest.approx(1, abs=1e-3)
    two = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).repeat(10, 1)
    assert collapse.effective_rank(two) == pytest.approx(2)
    assert collapse.effective_rank(torch.zeros(4, 3)) == 1


def test_alignment_and_uniformity_are_those_of_a_loop():
    z = F.normalize(torch.randn(7, 3, 5, generator=generator(1, "t")), dim=2)
    pairs = [
        (z[n, i] - z[n, j]).square().sum().item()
        for n in range(7)
        for i in range(3)
        for j in range(3)
        if i != j
    ]
    assert collapse.alignment(z) == pytest.approx(sum(pairs) / len(pairs), rel=1e-5)
    rows = z[:, 0]
    near = [math.exp(-2 * (rows[i] - rows[j]).square().sum()) for i in range(7) for j in range(i)]
    assert collapse.uniformity(rows) == pytest.approx(math.log(sum(near) / len(near)), rel=1e-5)


def test_a_collapsed_set_scores_worse_than_a_spread_one():
    spread = F.normalize(torch.randn(200, 4, 32, generator=generator(2, "t")), dim=2)
    same = F.normalize(spread * 0.01 + 1, dim=2)
    good, bad = (
        collapse.collapse_metrics(spread[:, 0], spread),
        collapse.collapse_metrics(same[:, 0], same),
    )
    assert good["rank"] > 25 and bad["rank"] < collapse.FEW_DIMENSIONS
    assert good["uniformity"] < -3 < -0.1 < bad["uniformity"] <= 0
    assert bad["alignment"] < 0.01 < good["alignment"] <= 4
    assert not collapse.collapse_warning(good)
    assert "invariance_loss_weight" in collapse.collapse_warning(bad)
    assert collapse.collapse_warning({**good, "uniformity": -0.001}) and collapse.collapse_warning(
        {**good, "rank": 4.9}
    )


def test_a_single_image_and_equal_rows():
    assert collapse.uniformity(torch.ones(1, 4)) == 0
