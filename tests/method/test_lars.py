"""LARS against a plain computation in float64, and against torch's SGD."""

import pytest
import torch

from benchmarks import baseline
from lars import LARS


def plain_lars(params, grads, lr, buffers, momentum, weight_decay, nesterov, eta, clip, eps=1e-8):
    """Return the parameters after one step, computed tensor by tensor."""
    new = []
    for p, g, buffer in zip(params, grads, buffers, strict=True):
        if p.dim() > 1:
            p_norm, g_norm = float(p.norm()), float(g.norm())
            if p_norm != 0 and g_norm != 0:
                trust = eta * p_norm / (g_norm + weight_decay * p_norm + eps)
                g = (g + weight_decay * p) * (min(trust / lr, 1) if clip else trust)
        buffer.copy_(momentum * buffer + g)
        new.append(p - lr * (g + momentum * buffer if nesterov else buffer))
    return new


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("LARS", [LARS, baseline.LARS], ids=["ours", "baseline"])
def test_ten_steps_equal_the_plain_computation(LARS, nesterov, clip, weight_decay):
    random = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (4,), (2, 3, 3, 3), (5, 2), (3, 3), (1,)]
    start = [torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes]
    start[3].zero_()  # zero weights
    settings = dict(momentum=0.9, weight_decay=weight_decay, nesterov=nesterov, eta=0.02, clip=clip)
    ours = [p.clone().requires_grad_() for p in start]
    plain, buffers = start, [torch.zeros_like(p) for p in start]
    optimizer = LARS(ours, lr=0.3, **settings)
    # So that the clip is reached in some steps and not in others.
    scales = torch.logspace(-4, 2, 10)
    for step in range(10):
        lr = 0.3 * (1 - step / 10)
        optimizer.param_groups[0]["lr"] = lr
        noise = [torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes]
        grads = [scales[step] * g for g in noise]
        grads[4].zero_()  # zero gradients
        if step == 5:
            grads[0].zero_()
        for p, g in zip(ours, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        plain = plain_lars(plain, grads, lr, buffers, **settings)
        for p, expected in zip(ours, plain, strict=True):
            torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(ours[4].detach(), start[4])


def test_vectors_move_as_with_torch_sgd():
    """1-D tensors get neither the trust ratio nor weight decay, as torch's SGD without decay."""
    start = torch.randn(7, generator=torch.Generator().manual_seed(0))
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    optimizers = [
        LARS([ours], lr=0.1, weight_decay=0.5, nesterov=True, eta=0.005, clip=True),
        torch.optim.SGD([theirs], lr=0.1, momentum=0.9, nesterov=True),
    ]
    for _ in range(5):
        for p, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            (p - 1).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


def test_tensors_without_gradient_stay_and_a_zero_rate_moves_nothing():
    frozen, p = torch.ones(2, 2, requires_grad=True), torch.ones(2, 2, requires_grad=True)
    p.grad = torch.ones(2, 2)
    optimizer = LARS([frozen, p], lr=0.0, clip=True, weight_decay=0.1)
    optimizer.step()
    assert torch.equal(frozen, torch.ones(2, 2))
    assert torch.equal(p, torch.ones(2, 2))


def test_closure_gets_gradients_and_its_loss_is_returned():
    p = torch.ones(2, 2, requires_grad=True)
    optimizer = LARS([p], lr=0.1)

    def closure():
        total = p.square().sum()
        total.backward()
        return total

    assert optimizer.step(closure).item() == 4
    assert (p < 1).all()


def test_wrong_settings_are_refused():
    for wrong in (
        {"lr": -1},
        {"momentum": -0.1},
        {"weight_decay": -1},
        {"nesterov": True, "momentum": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LARS([torch.ones(1, requires_grad=True)], **{"lr": 0.1, **wrong})
