"""Encoding, the linear probe, kNN and collapse, against plain loops and known sets."""

import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import data
import patches
from encode import Output, encode
from evaluate import (
    FEW_DIMENSIONS,
    LRS,
    Fit,
    accuracy,
    alignment,
    balance,
    collapse_metrics,
    collapse_warning,
    confusion_matrix,
    effective_rank,
    knn,
    linear_probe,
    nearest,
    uniformity,
)
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
    """Two features and a hundredth of noise: three classes that lines separate."""
    random = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (n,), generator=random)
    centres = torch.tensor([[2.0, 0.0], [-2.0, 2.0], [-2.0, -2.0]])
    return centres[y] + 0.1 * torch.randn(n, 2, generator=random), y


def test_encode_is_the_mean_over_the_patches_of_each_image(encoder, images):
    rng = partial(generator, 5, "encode-test")
    pooled = encode(encoder, images, Views(3), rng, bs=4, output=Output(save_proj=True))
    encoder.eval()
    for step in range(3):  # the last batch holds two images
        part = images[4 * step : 4 * step + 4]
        sampled = patches.sample_patches(part, 3, generator(5, "encode-test", step=step))
        for b in range(sampled.shape[1]):
            with torch.no_grad():
                h, z = encoder(sampled[:, b])
            i = 4 * step + b
            torch.testing.assert_close(pooled["embeddings"][i], h.mean(0), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(pooled["features"][i].float(), h, rtol=2e-3, atol=1e-3)
            torch.testing.assert_close(pooled["projections"][i].float(), z, rtol=2e-3, atol=1e-3)
    assert pooled["features"].shape == (10, 3, 16)
    by_proj = encode(encoder, images, Views(3), rng, bs=4, output=Output("proj"))["embeddings"]
    torch.testing.assert_close(by_proj, pooled["projections"].float().mean(1), rtol=2e-3, atol=1e-3)


def test_parts_of_a_grid_stand_side_by_side(encoder, images):
    """Each part of a 4 x 4 grid is the mean of its own views, here of the means of both stages."""
    grid = Views(16, "grid")
    output = Output("stages", pool_grid=2)
    encoded = encode(encoder, images, grid, lambda step: None, output=output)
    views = patches.sample_views(images, grid, None)  # (16, B, 3, S, S), row by row
    encoder.eval()
    means = []
    encoder.backbone.layer1.register_forward_hook(
        lambda layer, args, out: means.append(out.mean((2, 3)))
    )
    parts = []
    for rows, columns in itertools.product(((0, 1), (2, 3)), repeat=2):
        x = torch.stack([views[4 * i + j] for i in rows for j in columns])  # (4, B, 3, S, S)
        with torch.no_grad():
            last = encoder.backbone(x.flatten(0, 1))
        stages = torch.cat([means.pop(), last], 1)
        parts.append(stages.unflatten(0, x.shape[:2]).mean(0))
    expected = torch.cat(parts, 1)
    torch.testing.assert_close(encoded["embeddings"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pool", ["stages", "blocks"])
def test_a_whole_image_and_its_mirror_image_are_pooled_in_places(images, pool):
    """The means of quarters of what torchvision's modules give, over image and mirror image."""
    encoder = Encoder("resnet18-mini", 16, 8).eval()
    maps = []
    net = encoder.backbone
    blocks = [block for stage in (net.layer1, net.layer2, net.layer3) for block in stage]
    wanted = {"stages": blocks[1::2], "blocks": [net.relu, *blocks]}[pool]
    for module in wanted:
        module.register_forward_hook(lambda module, args, out: maps.append(out))
    x = images.float() / 127.5 - 1
    with torch.no_grad():
        net(x)
        net(x.flip(3))
    n = len(wanted)
    pairs = zip(maps[:n], maps[n:], strict=True)
    means = [
        F.avg_pool2d(a + b, a.shape[2] // 2).flatten(1) / 2 for a, b in pairs
    ]  # (B, C 2 2) each
    views = Views(1, "whole", size=16, mirror=True)
    output = Output(pool, pool_grid=2, save_proj=True)
    encoded = encode(encoder, images, views, lambda step: None, output=output)
    assert encoded["n_views"] == 2
    torch.testing.assert_close(encoded["embeddings"], torch.cat(means, 1), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        h, z = encoder(x.flip(3))
    torch.testing.assert_close(encoded["features"][:, 1].float(), h, rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(encoded["projections"][:, 1].float(), z, rtol=2e-3, atol=1e-3)


def test_a_whole_image_is_as_large_as_its_patches_are_in_the_network(images):
    """Of 32 pixels, with patches of 16 pixels that are resized to 32, it becomes 64 pixels wide."""
    x = patches.sample_views(images, Views(1, "whole", size=32), None)
    expected = F.interpolate(images.float(), size=64, mode="bilinear") / 127.5 - 1
    torch.testing.assert_close(x[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["grid", "crops", "augmented"])
def test_mirrored_views_are_those_of_the_mirror_image(images, kind):
    views = Views(4, kind)
    x = patches.sample_views(images, views._replace(mirror=True), generator(0, "t"))
    rng = generator(0, "t")
    expected = [patches.sample_views(part, views, rng) for part in (images, images.flip(3))]
    assert torch.equal(x, torch.cat(expected))
    assert len(x) == views._replace(mirror=True).count == 8


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
    tuned = []
    for module in (encoder, encoder.backbone):
        module.register_forward_pre_hook(lambda *_: tuned.append(torch.backends.cudnn.benchmark))
    encode(encoder, images, Views(1), partial(generator, 0, "t"), bs=4)
    assert tuned == [False] * 3
    assert torch.backends.cudnn.benchmark


def test_candidates_in_bf16_give_the_same_neighbours():
    """Of vectors without negative numbers, whose cosines lie close together near 1."""
    x = F.normalize(3 + torch.rand(20_000, 64, generator=generator(0, "x")), dim=1)
    query = F.normalize(3 + torch.rand(30, 64, generator=generator(1, "x")), dim=1)
    cosine, index = nearest(x, query, 5)
    in_bf16 = nearest(x, query, 5, (x - x.mean(0)).bfloat16())
    assert (in_bf16[1] == index).float().mean() > 0.99
    torch.testing.assert_close(in_bf16[0], cosine)
    few = nearest(x[:3], query, 5, x[:3].bfloat16())
    assert few[1].shape == (30, 3)
    y = torch.arange(20_000) % 50
    y_test = y[index[:, 0]]  # the label of the nearest one, which knn finds
    assert knn(x, y, query, y_test, 50, k=1, bf16=True) == 100


def test_linear_probe_learns_and_reports_last_and_best():
    train, test = blobs(300, 0), blobs(101, 1)
    fit = Fit(lr=0.1, n_epochs=5, bs=32)
    result, layer = linear_probe(*train, *test, 3, fit)
    assert result["top1"] > 99
    assert result["top5"] == 100
    assert result["per_epoch"][-1] == [result["top1"], result["top5"]]
    assert result["per_epoch"][-1] == accuracy(layer, *test)
    assert result["train_top1"] == accuracy(layer, *train)[0]
    assert result["best_top1"] == max(top1 for top1, _ in result["per_epoch"])
    assert result["per_epoch"][result["best_epoch"]][0] == result["best_top1"]
    again, other = linear_probe(*train, *test, 3, fit)
    assert again == result
    assert torch.equal(layer.weight, other.weight)


def test_standardized_dimensions_are_scaled_for_the_fit_and_the_layer_takes_them_unscaled():
    """A dimension that is a thousand times as large as the others, and shifted, changes nothing."""
    (x, y), (x_test, y_test) = blobs(300, 0), blobs(101, 1)
    fit = Fit(lr=0.1, n_epochs=5, bs=32, standardize=True)
    plain_fit = fit._replace(standardize=False)
    mean, std = x.mean(0), x.std(0, correction=0)
    unit, unit_test = ((rows - mean) / std for rows in (x, x_test))
    expected, _ = linear_probe(unit, y, unit_test, y_test, 3, plain_fit)
    scale, shift = torch.tensor([1000.0, 1.0]), torch.tensor([5000.0, 0.0])
    large, large_test = (rows * scale + shift for rows in (x, x_test))
    result, layer = linear_probe(large, y, large_test, y_test, 3, fit)
    assert result["per_epoch"] == expected["per_epoch"]
    assert accuracy(layer, large_test, y_test) == result["per_epoch"][-1]
    padded, padded_test = (F.pad(rows, (0, 1), value=3) for rows in (x, x_test))
    constant, _ = linear_probe(padded, y, padded_test, y_test, 3, fit)
    assert constant["per_epoch"] == expected["per_epoch"]


def test_linear_probe_equals_steps_written_out():
    """Two epochs with the gradient of softmax regression by hand; the last batch holds 5 rows."""
    (x, y), lr, wd = blobs(45, 0), 0.05, 0.01
    W, velocity = torch.zeros(3, 3), torch.zeros(3, 3)  # the bias is the last column
    ones = torch.cat([x, torch.ones(45, 1)], 1)
    for epoch in range(2):
        order = torch.randperm(45, generator=generator(7, "probe", epoch))
        for rows in order.split(20):
            error = (ones[rows] @ W.T).softmax(1) - F.one_hot(y[rows], 3)
            velocity = 0.9 * velocity + error.T @ ones[rows] / len(rows) + wd * W
            W = W - lr * (1 + math.cos(math.pi * epoch / 2)) / 2 * velocity
    fit = Fit(lr, n_epochs=2, bs=20, weight_decay=wd, seed=7)

    def fitted(fit):
        _, layer = linear_probe(x, y, x, y, 3, fit)
        return torch.cat([layer.weight, layer.bias[:, None]], 1).detach()

    torch.testing.assert_close(fitted(fit), W, rtol=1e-4, atol=1e-6)
    error = fitted(fit._replace(bf16=True)) - W
    assert 0 < error.norm() < 1e-2 * W.norm()


def test_linear_probe_chooses_its_rate_on_a_held_out_tenth_and_never_on_the_test_images():
    (x, y), (x_test, y_test) = blobs(400, 0), blobs(50, 1)
    # Small, so that the greater rates learn more.
    x = 0.1 * x + 0.15 * torch.randn(400, 2, generator=torch.Generator().manual_seed(2))
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


def test_linear_probe_chooses_the_middle_rate_when_rates_tie_or_rows_are_few():
    (x, y), test = blobs(400, 0), blobs(50, 1)
    fit = Fit(n_epochs=20, bs=20, seed=3)
    tied, _ = linear_probe(x, y, *test, 3, fit)
    assert list(tied["held_out"].values()).count(100) > 2
    assert tied["lr"] == 0.0075
    few, _ = linear_probe(x[:9], y[:9], *test, 3, fit._replace(n_epochs=2))
    assert (few["lr"], few["held_out"]) == (0.0075, {})


@pytest.mark.parametrize(("views", "n"), [("crops", 3), ("grid", 4), ("augmented", 3)])
def test_encode_takes_views_of_each_kind_and_size(encoder, images, views, n):
    encoder.eval()
    views = Views(n, views, 16)
    pooled = encode(encoder, images, views, partial(generator, 1, "encode-t"), bs=10)["embeddings"]
    x = patches.sample_views(images, views, generator(1, "encode-t"))
    with torch.no_grad():
        h = torch.stack([encoder(x[v])[0] for v in range(n)]).mean(0)
    torch.testing.assert_close(pooled, h, rtol=1e-4, atol=1e-5)


def test_accuracy_counts_every_row():
    logits = torch.eye(7) + 0.01 * torch.arange(7.0, 0, -1)  # second choices: 0, 1, 2, ...
    labels = torch.tensor([0, 1, 2, 6, 0, 0, 6])
    expected = [100 * 4 / 7, 100 * 6 / 7]
    assert accuracy(torch.nn.Identity(), logits, labels) == pytest.approx(expected)


def test_the_balanced_accuracy_and_the_largest_class():
    """Of six classes, the first is frequent, the last has no test images but is predicted."""
    metrics = pytest.importorskip("sklearn.metrics")
    random = torch.Generator().manual_seed(0)
    truth = torch.cat([torch.zeros(60, dtype=int), torch.randint(5, (40,), generator=random)])
    predicted = torch.where(torch.rand(100, generator=random) < 0.6, truth, 5 - truth)
    result = balance(confusion_matrix(truth, predicted, 6))
    with pytest.warns(UserWarning, match="not in y_true"):
        expected = 100 * metrics.balanced_accuracy_score(truth, predicted)
    assert result["balanced_top1"] == pytest.approx(expected)
    assert result["largest_class"] == 100 * metrics.accuracy_score(truth, torch.zeros(100))
    assert abs(expected - 100 * metrics.accuracy_score(truth, predicted)) > 2


def test_knn_equals_a_plain_loop():
    random = torch.Generator().manual_seed(0)
    x, x_test = torch.randn(50, 4, generator=random), torch.randn(231, 4, generator=random)
    y, y_test = (torch.randint(3, (n,), generator=random) for n in (50, 231))
    for k in (1, 20, 500):
        hits = 0
        for query, truth in zip(x_test, y_test, strict=True):
            cosine = F.cosine_similarity(query[None], x)
            votes = [0.0, 0.0, 0.0]
            for i in sorted(range(50), key=lambda i: -cosine[i])[:k]:
                votes[y[i]] += math.exp(cosine[i] / 0.07)
            hits += votes.index(max(votes)) == truth
        for bf16 in (False, True):
            top1 = knn(x, y, x_test, y_test, 3, k=k, bf16=bf16)
            assert top1 == pytest.approx(100 * int(hits) / 231)


def test_the_effective_rank_is_the_entropy_of_the_singular_values():
    x = torch.randn(40, 12, generator=generator(0, "t")) @ torch.diag(torch.linspace(0.1, 3, 12))
    for rows in (x, x.T):  # wide and tall
        values = torch.linalg.svdvals(rows.double())
        p = (values / values.sum()).tolist()
        entropy = -sum(q * math.log(q) for q in p)
        assert effective_rank(rows) == pytest.approx(math.exp(entropy), rel=1e-6)


def test_the_effective_rank_of_known_sets():
    assert effective_rank(torch.eye(16)) == pytest.approx(16)
    assert effective_rank(torch.ones(30, 8)) == pytest.approx(1, abs=1e-3)
    two = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).repeat(10, 1)
    assert effective_rank(two) == pytest.approx(2)
    assert effective_rank(torch.zeros(4, 3)) == 1


def test_alignment_and_uniformity_are_those_of_a_loop():
    z = F.normalize(torch.randn(7, 3, 5, generator=generator(1, "t")), dim=2)
    distances = []
    for n in range(7):
        for i, j in itertools.permutations(range(3), 2):
            distances.append((z[n, i] - z[n, j]).square().sum().item())
    assert alignment(z) == pytest.approx(sum(distances) / len(distances), rel=1e-5)
    rows = z[:, 0]
    near = [math.exp(-2 * (a - b).square().sum()) for a, b in itertools.combinations(rows, 2)]
    assert uniformity(rows) == pytest.approx(math.log(sum(near) / len(near)), rel=1e-5)
    assert uniformity(torch.ones(1, 4)) == 0


def test_a_collapsed_set_scores_worse_than_a_spread_one():
    spread = F.normalize(torch.randn(200, 4, 32, generator=generator(2, "t")), dim=2)
    same = F.normalize(spread * 0.01 + 1, dim=2)
    good, bad = (collapse_metrics(z[:, 0], z) for z in (spread, same))
    assert good["rank"] > 25
    assert bad["rank"] < FEW_DIMENSIONS
    assert good["uniformity"] < -3 < -0.1 < bad["uniformity"] <= 0
    assert bad["alignment"] < 0.01 < good["alignment"] <= 4
    assert not collapse_warning(good)
    assert "invariance_loss_weight" in collapse_warning(bad)
    assert collapse_warning({**good, "uniformity": -0.001})
    assert collapse_warning({**good, "rank": 4.9})
