"""Muon against a singular value decomposition and steps written out."""

import pytest
import torch

from optimizers import Muon, orthogonalised


@pytest.mark.parametrize("shape", [(8, 8), (5, 40), (40, 5)])
def test_orthogonalised_keeps_the_singular_vectors_and_levels_the_values(shape):
    """The greatest singular value is a hundred times the smallest."""
    M = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    S = torch.logspace(-1.9, 0, len(S))
    levelled = orthogonalised(U @ torch.diag(S) @ Vh)
    core = U.T @ levelled @ Vh.T  # diagonal, if the vectors are the same
    assert (core - torch.diag(core.diagonal())).abs().max() < 1e-4
    assert 0.7 < core.diagonal().min()
    assert core.diagonal().max() < 1.28
    assert (U @ Vh - levelled).norm() < 0.28 * (U @ Vh).norm()
    low = orthogonalised(M, dtype=torch.bfloat16)
    torch.testing.assert_close(low, orthogonalised(M), rtol=0.05, atol=0.02)
    assert not orthogonalised(torch.zeros(shape)).any()


def test_two_steps_written_out():
    """A convolution keeps its length; a bias; the first step from zeros has length lr."""
    random = torch.Generator().manual_seed(0)
    convolution = torch.randn(6, 2, 3, 3, generator=random)
    bias = torch.randn(6, generator=random)
    values = [convolution, bias, torch.zeros(3, 4)]
    grads = [[torch.randn(value.shape, generator=random) for value in values] for _ in range(2)]
    params = [torch.nn.Parameter(value.clone()) for value in values]
    optimizer = Muon(params, lr=0.1, momentum=0.9, lr_1d=3.0)
    momenta = [torch.zeros_like(value) for value in values]
    for step in grads:
        for i, (value, g) in enumerate(zip(values, step, strict=True)):
            params[i].grad = g.clone()
            momenta[i] = 0.9 * momenta[i] + g
            update = g + 0.9 * momenta[i]
            if value.ndim == 1:
                values[i] = value - 0.3 * update
                continue
            U = orthogonalised(update.reshape(len(value), -1)).reshape(value.shape)
            if not value.any():
                values[i] = -0.1 * U / U.norm()
                continue
            moved = value - 0.1 * value.norm() * U / U.norm()
            values[i] = moved * value.norm() / moved.norm()
        optimizer.step()
    for p, value in zip(params, values, strict=True):
        torch.testing.assert_close(p.detach(), value)


def test_a_quadratic_is_solved():
    """One direction of the gradient is a thousand times longer, which orthogonalising levels."""
    target, scale = torch.eye(4), torch.tensor([1000.0, 1.0, 1.0, 1.0])
    p = torch.nn.Parameter(torch.ones(4, 4) / 2)
    optimizer = Muon([p], lr=0.2)
    for i in range(300):
        optimizer.param_groups[0]["lr"] = 0.2 * (1 - i / 300)
        optimizer.zero_grad()
        (scale[:, None] * (p - target).square()).sum().backward()
        optimizer.step()
    assert (p.detach() - target).abs().max() < 0.05
