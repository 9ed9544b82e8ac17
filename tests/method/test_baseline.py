from functools import partial

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
    """From the same weights and patches: losses and the weights after two steps. float64, so that
    only errors differ.
    """
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
            _, z = ours(x.flatten(0, 1))
            losses = (
                loss.invariance_loss(z.unflatten(0, (3, 8))),
                loss.tcr_loss(z.unflatten(0, (3, 8))),
            )
            optimizer.zero_grad()
            (200 * losses[0] + losses[1]).backward()
            optimizer.step()
            torch.testing.assert_close(
                torch.stack(losses),
                torch.tensor(plain_losses),
                rtol=1e-5,
                atol=1e-5,
                check_dtype=False,
            )
        for (name, a), (_, b) in zip(
            ours.state_dict().items(), plain.state_dict().items(), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)


def test_its_patches_have_the_moments_of_ours():
    images = data.load_images("textures", "", False).images[:40]
    theirs = torch.cat(list(baseline.loader(images, 50, 20, train=False)))  # (40, 50, 3, 32, 32)
    ours = sample_patches(images, 50, generator(0, "t")).transpose(0, 1)
    assert theirs.shape == ours.shape
    torch.testing.assert_close(
        theirs.mean((1, 2, 3, 4)), ours.mean((1, 2, 3, 4)), rtol=0, atol=0.35
    )
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
    batches = [
        sample_patches(images[i : i + 4], 2, generator(0, "encode-t", step=i // 4)) for i in (0, 4)
    ]
    monkeypatch.setattr(
        baseline, "loader", lambda *args, **kwargs: [x.transpose(0, 1) for x in batches]
    )
    encoded = baseline.encode(plain, images, 2, bs=4)
    assert encoded.shape == (6, 16)
    expected = encode.encode(ours, images, Views(2), partial(generator, 0, "encode-t"), bs=4)[
        "embeddings"
    ]
    torch.testing.assert_close(encoded, expected, rtol=1e-4, atol=1e-5)
