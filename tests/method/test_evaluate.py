import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import data
import patches
from encode import Output, encode
from evaluate import LRS, Fit, accuracy, knn, linear_probe
from infra.device import generator
from model import Encoder
from patches import Views


@pytest.fixture
def encoder():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Encoder("resnet18-tiny", h_dim=16, z_dim=8)


@pytest.fixture
def images():
    return data.load_images("textures", "", False).images[:10]


def blobs(n, seed):
    """Two features and a hundredth of noise: three classes that a line can tell apart."""
    random = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (n,), generator=random)
    centres = torch.tensor([[2.0, 0.0], [-2.0, 2.0], [-2.0, -2.0]])
    return centres[y] + 0.1 * torch.randn(n, 2, generator=random), y


def test_encode_is_the_mean_over_the_patches_of_each_image(encoder, images):
    rng = partial(generator, 5, "encode-test")
    pooled = encode(encoder, images, Views(3), rng, bs=4, output=Output(save_proj=True))
    encoder.eval()
    for start in (0, 4, 8):  # the last batch holds two images
        sampled = patches.sample_patches(
            images[start : start + 4], 3, generator(5, "encode-test", step=start // 4)
        )
        for b in range(sampled.shape[1]):
            with torch.no_grad():
                h, z = encoder(sampled[:, b])
            torch.testing.assert_close(
                pooled["embeddings"][start + b], h.mean(0), rtol=1e-4, atol=1e-5
            )
            torch.testing.assert_close(
                pooled["features"][start + b].float(), h, rtol=2e-3, atol=1e-3
            )
            torch.testing.assert_close(
                pooled["projections"][start + b].float(), z, rtol=2e-3, atol=1e-3
            )
    assert pooled["features"].shape == (10, 3, 16)
    by_proj = encode(encoder, images, Views(3), rng, bs=4, output=Output("proj"))["embeddings"]
    torch.testing.assert_close(by_proj, pooled["projections"].float().mean(1), rtol=2e-3, atol=1e-3)


def test_parts_of_a_grid_stand_side_by_side(encoder, images):
    """Each part of a 4 x 4 grid is the mean of its own views, here of the means of both stages."""
    embeddings = encode(
        encoder, images, Views(16, "grid"), lambda step: None, output=Output("stages", pool_grid=2)
    )["embeddings"]
    views = patches.sample_views(images, Views(16, "grid"), None)  # (16, B, 3, S, S), row by row
    encoder.eval()
    parts = []
    for rows in ((0, 1), (2, 3)):
        for columns in ((0, 1), (2, 3)):
            x = torch.stack([views[4 * i + j] for i in rows for j in columns])
            with torch.no_grad():
                seen = []
                hook = encoder.backbone.layer1.register_forward_hook(
                    lambda *args, seen=seen: seen.append(args[2].mean((2, 3)))
                )
                last = encoder.backbone(x.flatten(0, 1))
                hook.remove()
                parts += [torch.cat([seen[0], last], 1).unflatten(0, x.shape[:2]).mean(0)]
    torch.testing.assert_close(embeddings, torch.cat(parts, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_encode_leaves_the_encoder_as_it_was(encoder, images, training):
    encoder.train(training)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    rng = torch.get_rng_state()
    encode(encoder, images, Views(2), partial(generator, 0, "t"))
    assert encoder.training is training
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())


def test_encode_tunes_no_kernels(encoder, images, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    seen = []
    encoder.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.benchmark))
    encoder.backbone.register_forward_pre_hook(
        lambda *_: seen.append(torch.backends.cudnn.benchmark)
    )
    encode(encoder, images, Views(1), partial(generator, 0, "t"), bs=4)
    assert seen == [False] * 3
    assert torch.backends.cudnn.benchmark


def test_linear_probe_learns_and_reports_last_and_best():
    result, layer = linear_probe(
        *blobs(300, 0), *blobs(101, 1), n_classes=3, fit=Fit(lr=0.1, n_epochs=5, bs=32)
    )
    assert result["top1"] > 99
    assert result["top5"] == 100
    assert (
        [result["top1"], result["top5"]]
        == result["per_epoch"][-1]
        == accuracy(layer, *blobs(101, 1))
    )
    assert result["train_top1"] == accuracy(layer, *blobs(300, 0))[0]
    assert result["best_top1"] == max(top1 for top1, _ in result["per_epoch"])
    assert result["per_epoch"][result["best_epoch"]][0] == result["best_top1"]
    again, other = linear_probe(
        *blobs(300, 0), *blobs(101, 1), n_classes=3, fit=Fit(lr=0.1, n_epochs=5, bs=32)
    )
    assert again == result
    assert torch.equal(layer.weight, other.weight)


def test_standardized_dimensions_are_scaled_for_the_fit_and_the_layer_takes_them_unscaled():
    """A dimension that is a thousand times as large as the others, and shifted, changes nothing."""
    (x, y), (x_test, y_test) = blobs(300, 0), blobs(101, 1)
    fit = Fit(lr=0.1, n_epochs=5, bs=32, standardize=True)
    mean, std = x.mean(0), x.std(0, correction=0)
    expected, _ = linear_probe(
        (x - mean) / std, y, (x_test - mean) / std, y_test, 3, fit._replace(standardize=False)
    )
    scale, shift = torch.ones(x.shape[1]), torch.zeros(x.shape[1])
    scale[0], shift[0] = 1000, 5000
    found, layer = linear_probe(x * scale + shift, y, x_test * scale + shift, y_test, 3, fit)
    assert found["per_epoch"] == expected["per_epoch"]
    assert accuracy(layer, x_test * scale + shift, y_test) == found["per_epoch"][-1]
    constant, _ = linear_probe(
        F.pad(x, (0, 1), value=3), y, F.pad(x_test, (0, 1), value=3), y_test, 3, fit
    )
    assert constant["per_epoch"] == expected["per_epoch"]


def test_linear_probe_equals_steps_written_out():
    """The gradient of softmax regression by hand, two epochs, against the probe; 45 rows, so the
    last batch is short.
    """
    (x, y), lr, wd = blobs(45, 0), 0.05, 0.01
    W, velocity = torch.zeros(3, 3), torch.zeros(3, 3)  # the bias is the last column
    ones = torch.cat([x, torch.ones(45, 1)], 1)
    for epoch in range(2):
        order = torch.randperm(45, generator=generator(7, "probe", epoch))
        for start in range(0, 45, 20):
            rows = order[start : start + 20]
            error = (ones[rows] @ W.T).softmax(1) - F.one_hot(y[rows], 3)
            velocity = 0.9 * velocity + error.T @ ones[rows] / len(rows) + wd * W
            W = W - lr * (1 + math.cos(math.pi * epoch / 2)) / 2 * velocity
    _, layer = linear_probe(x, y, x, y, 3, Fit(lr, n_epochs=2, bs=20, weight_decay=wd, seed=7))
    torch.testing.assert_close(
        torch.cat([layer.weight, layer.bias[:, None]], 1).detach(), W, rtol=1e-4, atol=1e-6
    )
    _, layer = linear_probe(
        x, y, x, y, 3, Fit(lr, n_epochs=2, bs=20, weight_decay=wd, seed=7, bf16=True)
    )
    error = torch.cat([layer.weight, layer.bias[:, None]], 1) - W
    assert 0 < error.norm() < 1e-2 * W.norm()


def test_linear_probe_chooses_its_rate_on_a_held_out_tenth_and_never_on_the_test_images():
    (x, y), (x_test, y_test) = blobs(400, 0), blobs(50, 1)
    x = 0.1 * x + 0.15 * torch.randn(
        400, 2, generator=torch.Generator().manual_seed(2)
    )  # small: the greater rates learn more
    fit = Fit(n_epochs=2, bs=20, seed=3)
    result, layer = linear_probe(x, y, x_test, y_test, 3, fit)
    order = torch.randperm(400, generator=generator(3, "held-out"))
    tenth, rest = order[:40], order[40:]
    for lr in LRS:  # each rate by itself: trained on nine tenths, tested on the tenth
        alone, _ = linear_probe(x[rest], y[rest], x[tenth], y[tenth], 3, fit._replace(lr=lr))
        assert alone["top1"] == result["held_out"][lr]
    assert len(set(result["held_out"].values())) > 2
    assert result["held_out"][result["lr"]] == max(result["held_out"].values())
    again, other = linear_probe(x, y, x_test, y_test, 3, fit._replace(lr=result["lr"]))
    assert torch.equal(layer.weight, other.weight)  # refitted on all of x
    assert (again["top1"], again["held_out"]) == (result["top1"], {})
    shuffled, other = linear_probe(x, y, x_test, y_test[torch.randperm(50)], 3, fit)
    assert (shuffled["lr"], shuffled["held_out"]) == (result["lr"], result["held_out"])
    assert torch.equal(layer.weight, other.weight)
    tied, _ = linear_probe(*blobs(400, 0), x_test, y_test, 3, fit._replace(n_epochs=20))
    assert (
        list(tied["held_out"].values()).count(100) > 2
    )  # on an easy set several rates are right throughout
    assert tied["lr"] == 0.0075
    few, _ = linear_probe(x[:9], y[:9], x_test, y_test, 3, fit)
    assert (few["lr"], few["held_out"]) == (0.0075, {})


@pytest.mark.parametrize(("views", "n"), [("crops", 3), ("grid", 4), ("augmented", 3)])
def test_encode_takes_the_views_and_the_size_that_it_is_told(encoder, images, views, n):
    encoder.eval()
    views = Views(n, views, 16)
    pooled = encode(encoder, images, views, partial(generator, 1, "encode-t"), bs=10)["embeddings"]
    x = patches.sample_views(images, views, generator(1, "encode-t"))
    with torch.no_grad():
        h = torch.stack([encoder(x[v])[0] for v in range(n)]).mean(0)
    torch.testing.assert_close(pooled, h, rtol=1e-4, atol=1e-5)


def test_accuracy_counts_every_row():
    layer = torch.nn.Identity()
    logits = torch.eye(7)[[0, 1, 2, 3, 4, 5, 6]] + 0.01 * torch.arange(
        7.0, 0, -1
    )  # second choices: 0, 1, 2, ...
    assert accuracy(layer, logits, torch.tensor([0, 1, 2, 6, 0, 0, 6])) == pytest.approx(
        [100 * 4 / 7, 100 * 6 / 7]
    )


def test_knn_equals_a_plain_loop():
    random = torch.Generator().manual_seed(0)
    x, x_test = torch.randn(50, 4, generator=random), torch.randn(31, 4, generator=random)
    y, y_test = torch.randint(3, (50,), generator=random), torch.randint(3, (31,), generator=random)
    for k in (1, 20, 500):
        hits = 0
        for query, truth in zip(x_test, y_test, strict=True):
            cosine = F.cosine_similarity(query[None], x)
            votes = [0.0, 0.0, 0.0]
            for i in sorted(range(50), key=lambda i: -cosine[i])[:k]:
                votes[y[i]] += math.exp(cosine[i] / 0.07)
            hits += votes.index(max(votes)) == truth
        assert knn(x, y, x_test, y_test, 3, k=k, chunk=7) == pytest.approx(100 * int(hits) / 31)
