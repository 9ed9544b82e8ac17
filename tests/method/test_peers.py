"""The comparison with other methods: its views, and its rows."""

import json

import torch

from benchmarks import peers
from infra.device import generator
from patches import Augment

PLAIN = Augment(jitter=0, grey=0, blur=0, solarise=0)


def test_views_are_crops_of_the_image_in_the_stated_range():
    """In an image whose colours are the coordinates, a view shows where it was cut."""
    x = torch.arange(32).expand(32, 32)
    images = torch.stack([x, x.T, torch.full_like(x, 7)]).to(torch.uint8)[None].repeat(500, 1, 1, 1) * 4
    views = (peers.random_views(images, generator(0, "test"), 2, augmentation=PLAIN).flatten(0, 1) + 1) * 255 / 8  # in pixels
    columns, rows = views[:, 0, 8], views[:, 1, :, 8]
    width, height = (16 / 8 * (line[:, 11] - line[:, 3]) for line in (columns, rows))  # inside, where no border is repeated
    flipped = width < 0
    assert 0.4 < flipped.float().mean() < 0.6 and (height > 0).all()
    area, aspect = width.abs() * height / 32**2, width.abs() / height
    assert 0.075 < area.min() < 0.12 and 0.8 < area.max() < 1.05 and abs(area.mean() - 0.54) < 0.04
    assert 0.7 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.4
    assert (views[:, 2] - 7).abs().max() < 1e-3
    assert -0.01 <= views.min() and views[:, :2].max() < 31.01


def test_colours_of_views_are_augmented_in_their_own_order():
    """Sorting by the turn of the hue and back keeps each view at its place: a grey image stays the mean of its own view."""
    images = (torch.arange(40) * 6)[:, None, None, None].expand(-1, 3, 32, 32).to(torch.uint8)
    views = peers.random_views(images, generator(1, "test"), augmentation=Augment(jitter=0.01, grey=0, blur=0, solarise=0))
    grey = (views.mean((2, 3, 4)) + 1) * 255 / 2
    assert (grey - torch.arange(40) * 6).abs().max() < 5


def test_a_row_takes_the_best_rate_and_views_and_is_run_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peers, "N_FIT", 60)
    monkeypatch.setattr(peers, "N_SCORED", 40)
    monkeypatch.setattr(peers, "FIT", peers.FIT._replace(n_epochs=2))
    monkeypatch.setattr(peers, "step_seconds", lambda names, *_: dict.fromkeys(names, 10))
    textures = peers.load_images("textures", tmp_path, True)
    few = textures._replace(images=textures.images[::25], labels=textures.labels[::25])  # 10 classes
    monkeypatch.setattr(peers, "load_images", lambda *_: few)
    given = "--data_dir . --methods preset supervised --budgets 10 200".split()
    argv = [*given, "--log_folder", str(tmp_path / "logs"), "--out", str(tmp_path / "out")]
    (tmp_path / "out").mkdir()
    peers.main(argv)
    path = tmp_path / "out" / "peers.json"
    text = path.read_text()
    rows = {(row["method"], row["budget"]): row for row in json.loads(text)["rows"]}
    assert list(rows) == [("preset", 10), ("supervised", 10), ("preset", 200), ("supervised", 200)]
    short, long = rows["supervised", 10], rows["supervised", 200]
    assert (short["n_steps"], long["n_steps"]) == (1, 20)
    assert list(short["scores"]) == ["0.02", "0.06", "0.2"] and list(long["scores"]) == [f"{short['lr']:g}"]
    best = max(score for scores in short["scores"].values() for score in scores.values())
    assert short["scores"][f"{short['lr']:g}"][short["views"]] == best
    assert long["top1"] > 20  # chance: 10
    capsys.readouterr()
    peers.main(argv)
    assert path.read_text() == text and not capsys.readouterr().out
