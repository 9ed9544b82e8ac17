"""The losses against their formulas as they are written, in float64."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from benchmarks import baseline
from loss import (
    UNIFORMITY,
    contrastive_loss,
    emp_ssl_loss,
    invariance_loss,
    tcr_loss,
    vonmises_loss,
)

LOSSES = [tcr_loss, vonmises_loss, contrastive_loss, invariance_loss]
# (P, B, d): d above B, below, equal, tiny
SHAPES = [(4, 6, 20), (3, 24, 8), (5, 10, 10), (2, 2, 3)]


def unit_vectors(*shape, dtype=torch.float32):
    rng = torch.Generator().manual_seed(0)
    return F.normalize(torch.randn(shape, generator=rng, dtype=dtype), dim=-1)


def plain_tcr(z, eps):
    """The formula as it is written: one d x d determinant per patch."""
    _, B, d = z.shape
    eye = torch.eye(d, dtype=z.dtype)
    rates = [0.5 * torch.logdet(eye + d / (B * eps) * Z.T @ Z) for Z in z]
    return -torch.stack(rates).mean()


def plain_invariance(z):
    mean = z.mean(0)
    return -torch.stack([F.cosine_similarity(patches, mean, dim=1).mean() for patches in z]).mean()


def plain_vonmises(z):
    mean = z.mean(0)
    pairs = [(mean[i] - mean[j]).square().sum() for i in range(len(mean)) for j in range(i)]
    return torch.stack([torch.exp(-2 * pair) for pair in pairs]).mean().log()


def plain_contrastive(z, temperature):
    """Each patch beside all patches of other images, one pair at a time."""
    P, B, _ = z.shape
    logs = []
    for p, b in itertools.product(range(P), range(B)):
        others = [z[q, c] for q in range(P) for c in range(B) if c != b]
        similar = [torch.exp(z[p, b] @ other / temperature) for other in others]
        logs.append(torch.stack(similar).mean().log())
    return torch.stack(logs).mean()


PAIRS = {  # our function and the plain one
    "tcr": (tcr_loss, lambda z: plain_tcr(z, 0.2)),
    "tcr eps .05": (lambda z: tcr_loss(z, eps=0.05), lambda z: plain_tcr(z, 0.05)),
    "invariance": (invariance_loss, plain_invariance),
    "vonmises": (vonmises_loss, plain_vonmises),
    "contrastive": (contrastive_loss, lambda z: plain_contrastive(z, 0.2)),
    "contrastive 2": (lambda z: contrastive_loss(z, 2.0), lambda z: plain_contrastive(z, 2.0)),
    "baseline tcr": (baseline.tcr_loss, lambda z: plain_tcr(z, 0.2)),
    "baseline invariance": (baseline.invariance_loss, plain_invariance),
    "baseline vonmises": (baseline.vonmises_loss, plain_vonmises),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PAIRS)
def test_equals_the_plain_formula_in_float64(name, shape):
    ours, plain = PAIRS[name]
    y = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y += 2 * y[:1]  # patches of one image resemble each other
    values, gradients = [], []
    for function, dtype in ((ours, torch.float32), (plain, torch.float64)):
        leaf = y.to(dtype).requires_grad_()
        value = function(F.normalize(leaf, dim=-1))
        value.backward()
        values.append(value.item())
        gradients.append(leaf.grad.double())
    assert values[0] == pytest.approx(values[1], rel=1e-5, abs=1e-7)
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[1].norm()


@pytest.mark.parametrize("loss", [tcr_loss, vonmises_loss, contrastive_loss])
def test_collapsed_is_worse_than_spread(loss):
    spread = unit_vectors(4, 16, 32)
    collapsed = spread[:, :1].expand_as(spread)
    half = torch.cat([spread[:, :8], spread[:, :8]], 1)  # two images share each embedding
    assert loss(collapsed) > loss(half) + 1e-3 > loss(spread) + 2e-3


def test_invariance_is_best_where_the_patches_of_an_image_agree():
    z = unit_vectors(4, 16, 32)
    assert invariance_loss(z[:1].expand_as(z)).item() == pytest.approx(-1)
    assert invariance_loss(z) > -0.7


@pytest.mark.parametrize(
    ("name", "options", "plain"),
    [
        ("tcr", {"eps": 0.05}, lambda z: plain_tcr(z, 0.05)),
        ("vonmises", {}, plain_vonmises),
        ("contrastive", {"temperature": 0.1}, lambda z: plain_contrastive(z, 0.1)),
    ],
)
def test_the_loss_is_the_weighted_sum_of_its_terms(name, options, plain):
    """With two bags, patches 0 and 1 of an image count as patches of two images; so do 2 and 3."""
    z = unit_vectors(4, 5, 8, dtype=torch.float64)
    assert set(UNIFORMITY) == {"tcr", "vonmises", "contrastive"}
    in_bags = torch.stack([torch.cat([z[0], z[1]]), torch.cat([z[2], z[3]])])  # (2, 10, 8)
    for bags, dealt in ((1, z), (2, in_bags)):
        total, invariance, uniformity = emp_ssl_loss(
            z, name, invariance_weight=3, uniformity_weight=0.5, bags=bags, **options
        )
        torch.testing.assert_close(invariance, plain_invariance(dealt))
        torch.testing.assert_close(uniformity, plain(dealt))
        torch.testing.assert_close(total, 3 * plain_invariance(dealt) + 0.5 * plain(dealt))


def test_known_values():
    z = torch.eye(4)[None]  # four orthogonal images of one patch: the matrix is (1 + 1/eps) I
    assert tcr_loss(z, eps=0.5).item() == pytest.approx(-0.5 * 4 * math.log(3), rel=1e-6)
    assert vonmises_loss(z).item() == pytest.approx(-4, rel=1e-6)  # each squared distance is 2
    assert contrastive_loss(z).item() == 0
    assert contrastive_loss(z[:, :1].expand(3, 4, 4), 0.5).item() == pytest.approx(2)


def test_float32_inside_autocast():
    z = unit_vectors(4, 8, 64)
    with torch.autocast("cpu", torch.bfloat16):
        inside = [loss(z) for loss in LOSSES]
    assert all(value.dtype == torch.float32 for value in inside)
    assert inside == [loss(z) for loss in LOSSES]


@pytest.mark.parametrize("loss", LOSSES)
def test_one_number_that_is_not_finite_shows_and_wrong_shapes_are_refused(loss):
    z = unit_vectors(2, 4, 8)
    assert loss(z).isfinite()
    for value in (math.nan, math.inf):
        z[1, 2, 3] = value
        assert not loss(z).isfinite()
    with pytest.raises(ValueError, match="patches, images"):
        loss(z[0])


@pytest.mark.parametrize("loss", [vonmises_loss, contrastive_loss])
def test_images_are_compared_with_each_other_so_there_must_be_two(loss):
    with pytest.raises(ValueError, match="at least 2"):
        loss(torch.ones(3, 1, 4))
