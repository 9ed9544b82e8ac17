"""The plain program that benchmarks compare with computes what ours does."""

from functools import partial

import pytest
import torch

import data
import encode
import evaluate
import loss
import train
from benchmarks import baseline
from evaluate import Fit
from hparams import Hparams
from infra.device import generator
from model import Encoder
from patches import Views, sample_patches


def test_a_step_is_the_same_as_ours():
    """Losses and weights after two steps, in float64, from the same weights and patches."""
    hp = Hparams(n_patches=3)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    for arch in ("resnet18-tiny", "resnet18-imagenet"):
        ours, plain = Encoder(arch, 32, 16).double(), baseline.Encoder(arch, 32, 16).double()
        plain.load_state_dict(ours.state_dict())
        optimizer = train.build_optimizer(hp, ours)
        plain_optimizer = baseline.LARS(
            plain.parameters(), hp.lr, weight_decay=1e-4, nesterov=True, eta=0.005, clip=True
        )
        for step in range(2):
            x = sample_patches(images, 3, generator(0, "t", step=step)).double()
            plain_losses = baseline.train_step(plain, plain_optimizer, x.transpose(0, 1))
            z = ours(x.flatten(0, 1))[1].unflatten(0, (3, 8))  # (P, B, d)
            losses = torch.stack([loss.invariance_loss(z), loss.tcr_loss(z)])
            optimizer.zero_grad()
            (200 * losses[0] + losses[1]).backward()
            optimizer.step()
            assert losses.tolist() == pytest.approx(plain_losses, rel=1e-5, abs=1e-5)
        expected = plain.state_dict()
        for name, value in ours.state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5, msg=name)


def test_its_patches_have_the_moments_of_ours():
    images = data.load_images("textures", "", False).images[:40]
    theirs = torch.cat(list(baseline.loader(images, 50, 20, train=False)))  # (40, 50, 3, 32, 32)
    ours = sample_patches(images, 50, generator(0, "t")).transpose(0, 1)
    assert theirs.shape == ours.shape
    means = [x.mean((1, 2, 3, 4)) for x in (theirs, ours)]
    torch.testing.assert_close(*means, rtol=0, atol=0.35)
    torch.testing.assert_close(theirs.std(), ours.std(), rtol=0.03, atol=0)


def test_its_probe_and_encoding_agree_with_ours(monkeypatch):
    torch.manual_seed(0)
    centres, y = torch.randn(4, 8), torch.arange(400) % 4
    x = centres[y] + 0.1 * torch.randn(400, 8)
    assert baseline.linear_probe(x, y, x, y, 4, "cpu", n_epochs=3, lr=0.1) > 99
    assert evaluate.linear_probe(x, y, x, y, 4, Fit(lr=0.1, n_epochs=3))[0]["top1"] > 99
    images = data.load_images("textures", "", False).images[:6]
    plain, ours = baseline.Encoder("resnet18-tiny", 16, 8), Encoder("resnet18-tiny", 16, 8)
    ours.load_state_dict(plain.state_dict())
    batches = []
    for step in range(2):
        part = images[4 * step : 4 * step + 4]
        batches.append(sample_patches(part, 2, generator(0, "encode-t", step=step)))
    theirs = [x.transpose(0, 1) for x in batches]
    monkeypatch.setattr(baseline, "loader", lambda *args, **kwargs: theirs)
    encoded = baseline.encode(plain, images, 2, bs=4)
    assert encoded.shape == (6, 16)
    expected = encode.encode(ours, images, Views(2), partial(generator, 0, "encode-t"), bs=4)
    torch.testing.assert_close(encoded, expected["embeddings"], rtol=1e-4, atol=1e-5)
