"""The comparison with other methods: its views, and its rows."""

import importlib
import json

import pytest
import torch
import torch.nn.functional as F
from helpers import pictures

from benchmarks import peers, peers_methods
from benchmarks.peers_methods import METHODS, PRESET_TRY, Try
from data import ImageSet, load_images, select
from infra.device import generator
from model import build_backbone
from patches import Augment

PLAIN = Augment(jitter=0, grey=0, blur=0, solarise=0)


def textures(every):
    """Return each of so many images of the ten textures, in 16 pixels."""
    images = load_images("textures", ".", True)
    images = select(images, torch.arange(0, len(images.images), every))
    return images._replace(images=images.images[:, :, ::2, ::2])


def test_views_are_crops_of_the_image_in_the_stated_range():
    """In an image whose colours are the coordinates, a view shows where it was cut."""
    x = torch.arange(32).expand(32, 32)
    image = 4 * torch.stack([x, x.T, torch.full_like(x, 7)]).to(torch.uint8)
    images = image[None].repeat(500, 1, 1, 1)
    views = peers_methods.random_views(images, generator(0, "test"), 2, augmentation=PLAIN)
    views = (views.flatten(0, 1) + 1) * 255 / 8  # in pixels
    columns, rows = views[:, 0, 8], views[:, 1, :, 8]
    width = 16 / 8 * (columns[:, 11] - columns[:, 3])  # inside, where no border is repeated
    height = 16 / 8 * (rows[:, 11] - rows[:, 3])
    flipped = width < 0
    assert 0.4 < flipped.float().mean() < 0.6 and (height > 0).all()
    area, aspect = width.abs() * height / 32**2, width.abs() / height
    assert 0.075 < area.min() < 0.12 and 0.8 < area.max() < 1.05 and abs(area.mean() - 0.54) < 0.04
    assert 0.7 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.4
    assert (views[:, 2] - 7).abs().max() < 1e-3
    assert -0.01 <= views.min() and views[:, :2].max() < 31.01


def test_colours_of_views_are_augmented_in_their_own_order():
    """Sorting by the turn of the hue and back keeps the order: each view has its image's grey."""
    grey = torch.arange(40) * 6
    images = grey[:, None, None, None].expand(-1, 3, 32, 32).to(torch.uint8)
    little = Augment(jitter=0.01, grey=0, blur=0, solarise=0)
    views = peers_methods.random_views(images, generator(1, "test"), augmentation=little)
    assert ((views.mean((2, 3, 4)) + 1) * 255 / 2 - grey).abs().max() < 5


@pytest.mark.parametrize("name", METHODS)
def test_a_step_trains_the_backbone_with_each_of_its_settings(name):
    if name not in ("preset", "preset-stages", "search", "supervised"):
        pytest.importorskip("lightly")
    for _, how in peers.not_timed([name], {}):  # one of each settings
        backbone, _, step = METHODS[name].build(how, False)
        assert backbone.conv1.weight.is_contiguous(memory_format=torch.channels_last)
        first = [p.clone() for p in backbone.parameters()]
        for i in range(2):
            step(pictures(6), torch.arange(6), generator(0, "test", i))
        for p, before in zip(backbone.parameters(), first, strict=True):
            assert (p != before).any() and p.isfinite().all()


def test_the_target_of_byol_follows_by_a_hundredth():
    pytest.importorskip("lightly")
    backbone = build_backbone(peers_methods.ARCH)[0]
    heads, forward, criterion = peers_methods.byol(backbone, momentum=0.99)
    images, labels = pictures(6), torch.arange(6)
    *predicted, z0, z1 = forward(images, labels, generator(0, "test"))
    assert not z0.requires_grad and all(p.requires_grad for p in predicted)
    with torch.no_grad():
        for p in [*backbone.parameters(), *heads[0].parameters()]:
            p.mul_(3)
    followed = torch.cat([z.flatten() for z in forward(images, labels, generator(0, "test"))[2:]])
    before = torch.cat([z0.flatten(), z1.flatten()])
    assert 0 < (followed - before).norm() / before.norm() < 0.3
    assert criterion(z0, z1, z1, z0) == pytest.approx(-1)


def test_the_covariance_of_vicreg_is_lightlys():
    reference = importlib.reload(
        pytest.importorskip("lightly.loss.vicreg_loss")
    )  # a test before may have replaced it
    z = torch.randn(7, 20, generator=generator(0, "test"), dtype=torch.float64)
    cov = torch.cov(z.T)
    cov.fill_diagonal_(0)
    assert peers_methods.covariance_loss(z) == pytest.approx(cov.square().sum() / 20)
    assert reference.VICRegLoss(lambda_param=0, mu_param=0)(z, z) == pytest.approx(
        2 * peers_methods.covariance_loss(z)
    )


def test_a_row_takes_the_best_try_and_is_run_once(tmp_path, monkeypatch, capsys):
    few = textures(25)  # 160 images
    kmeans = {}, [F.one_hot(few.labels, 10).repeat(1, 99)] * 2  # which give the labels away
    monkeypatch.setattr(peers, "kmeans_row", lambda *_: kmeans)
    monkeypatch.setattr(peers, "untrained_entry", lambda *_: {})
    for name, value in {"TRIED": 20, "N_FIT": 60, "N_SCORED": 40}.items():
        monkeypatch.setattr(peers, name, value)
    monkeypatch.setattr(peers, "FIT", peers.FIT._replace(n_epochs=2))
    small = PRESET_TRY._replace(settings="--bs 4")
    monkeypatch.setitem(METHODS, "preset", METHODS["preset"]._replace(tries=(small,)))
    monkeypatch.setitem(METHODS, "supervised", METHODS["supervised"]._replace(bs=4))
    seconds = {"preset muon --bs 4": 10, "supervised muon": 10}
    seconds |= {"preset muon --bs 4 --bs 8": 20, "supervised muon bs 8": 20}
    timed = {name: {"seconds": value} for name, value in seconds.items()}
    monkeypatch.setattr(peers, "time_steps", lambda *_: timed)
    monkeypatch.setattr(peers, "load_images", lambda *_: few)
    argv = "--data_dir . --methods preset supervised --budgets 20 40".split()
    argv += ["--log_folder", str(tmp_path / "logs"), "--out", str(tmp_path)]
    peers.main(argv)
    path = tmp_path / "peers.json"
    text = path.read_text()
    rows = {(row["method"], row["budget"]): row for row in json.loads(text)["rows"]}
    assert list(rows) == [("preset", 20), ("supervised", 20), ("preset", 40), ("supervised", 40)]
    short, long = rows["supervised", 20], rows["supervised", 40]
    chosen = f"{short['optimizer']} {short['lr']:g}"
    assert short["n_steps"] == 20 / seconds[f"supervised {short['optimizer']}"]
    assert list(short["scores"]) == ["muon 0.02", "muon 0.05"]
    assert short["scores"][chosen] == max(short["scores"].values())
    n_runs = len(list((tmp_path / "logs").glob("*steps*")))
    assert list(long["scores"]) == [chosen] and n_runs == 2 + 3
    assert short["size"] in (12, 16) and rows["preset", 40]["size"] == 16
    assert rows["preset", 40]["with_kmeans_top1"] > max(95, rows["preset", 40]["top1"])
    capsys.readouterr()
    peers.main(argv)
    assert path.read_text() == text and not capsys.readouterr().out

    elsewhere = text.replace('"cores": ', '"cores": 9')  # another machine adds rows, but no times
    path.write_text(elsewhere)
    peers.main([*argv, "--seed", "43", "--methods", "supervised", "--budgets", "20"])
    *_, last = json.loads(path.read_text())["rows"]
    assert last["seed"] == 43 and list(last["scores"]) == [chosen]
    other = text.replace('"precision": "', '"precision": "other ')
    for content, options, reason in (
        (elsewhere, [], "none of byol muon momentum 0.9"),
        (other, [], "in other"),
        (text, ["--budgets", "40"], "no choice of byol: give --budgets 20, too"),
    ):
        path.write_text(content)
        with pytest.raises(SystemExit):
            peers.main([*argv, "--methods", "byol", *options])
        assert reason in capsys.readouterr().err and path.read_text() == content


def test_a_longer_budget_tries_the_choice_and_twice_its_batch():
    row = {
        "method": "simclr",
        "budget": 60,
        "optimizer": "muon",
        "lr": 0.1,
        "settings": "area 0.25",
    }
    how = Try("muon", 0.1, "area 0.25")
    larger = Try("muon", 0.1, "area 0.25 bs 256")
    assert peers.tries_of("simclr", 60, []) == METHODS["simclr"].tries
    assert peers.tries_of("simclr", 60, [row]) == (how,)  # of another seed
    assert peers.tries_of("simclr", 180, [row]) == peers.tries_of("simclr", 600, [row])
    assert peers.tries_of("simclr", 180, [row]) == (how, larger)
    rows = [row, row | {"budget": 180, "settings": larger.settings}]
    assert peers.tries_of("simclr", 600, rows) == (larger,)
    assert [peers_methods.bs_of(METHODS["simclr"], how) for how in (how, larger)] == [128, 256]
    ours = peers_methods.with_larger_batch("preset", PRESET_TRY)
    assert peers_methods.settings_of(ours).bs == 2 * peers_methods.PRESET["bs"]


def test_the_scored_images_train_nothing():
    images = ImageSet(torch.arange(29000), torch.arange(29000), ())
    scored, fitted, rest = (set(part.labels.tolist()) for part in peers.scored_split(images, 42))
    assert len(scored) == peers.N_SCORED and len(fitted) == peers.N_FIT
    assert not scored & rest and fitted < rest and scored | rest == set(range(29000))


def test_a_method_learns():
    """Training by the labels makes better features of other images than as many steps at no rate.

    Those change batch norm's statistics alone. Measured: 20-NN 68.5 against 49.5.
    """
    train, test = (select(textures(10), torch.arange(i, 400, 2)) for i in range(2))
    method = METHODS["supervised"]._replace(bs=40)
    still, trained = (
        peers.train_method(method, Try("muon", rate), 0, train, 20, False) for rate in (1e-9, 0.05)
    )
    scores = [
        peers.accuracies_of(backbone, train, test, 0, False, size=8)["knn_top1"]
        for backbone in (still, trained)
    ]
    assert scores[1] > scores[0] + 5
