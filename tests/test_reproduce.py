import json
import re
from types import SimpleNamespace

import one_minute
import pytest
import readme
import reproduce
import torch

import data
import experiment
import main


@pytest.fixture
def options(images, tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path / "reproduction.json")
    tiny = "--image_size 16 --arch resnet18-tiny --h_dim 8 --z_dim 4 --n_patches 2 --bs 4 --n_epochs 1 --n_eval_epochs 3"
    monkeypatch.setattr(reproduce, "BASE", {"small": tiny, "full": tiny})
    return SimpleNamespace(scale="small", seeds=2, dataset="folder", data_dir=str(images), log_folder=str(tmp_path / "logs"))


@pytest.mark.parametrize("scale", ["small", "full"])
def test_each_row_is_a_command_that_the_program_takes(scale):
    options = SimpleNamespace(log_folder=None, dataset="cifar10", data_dir="./datasets")
    base = main.hyperparameters(main.parse(["train", *reproduce.BASE[scale].split()]))
    for row in reproduce.ROWS:
        if getattr(row, scale) is not None:
            hp = main.hyperparameters(main.parse(reproduce.command(row, scale, 42, options)))
            changed = set(experiment.differences(vars(base), vars(hp))) - {"seed"}
            text = getattr(row, scale).replace("no-batch_norm", "batch_norm") + " "
            names = {name for name in vars(hp) if f"--{name} " in text}
            assert changed == names or row.table == "views", row.name  # a row says nothing that the base says already


def test_rows_are_run_once_and_a_failed_one_is_told(options, monkeypatch):
    base, untrained, broken = (
        reproduce.Row("base", "the base", "89.25 (document)", None, ""),
        reproduce.Row("untrained", "untrained", "", None, "--n_epochs 0"),
        reproduce.Row("broken", "diverges", "", None, "--optimizer sgd --lr 1e6"),
    )
    for row in (base, untrained, broken):
        reproduce.run(row, options)
    text = reproduce.RESULTS.read_text()
    rows = json.loads(text)["small"]
    for name in ("base", "untrained"):
        folders = [next((reproduce.Path(options.log_folder)).glob(f"{name}-{seed}__*")) for seed in (42, 43)]
        results = [json.loads((folder / "linear_accuracy.json").read_text()) for folder in folders]
        assert [entry["top1"] for entry in rows[name]["runs"]] == [result["top1"] for result in results]
    assert [list(entry["losses"][0]) for entry in rows["base"]["runs"]] == [["mean", "last"]] * 2
    assert rows["untrained"]["runs"][0]["losses"] == []
    assert "not finite" in rows["broken"]["runs"][0]["failed"] or "is nan" in rows["broken"]["runs"][0]["failed"]

    monkeypatch.setattr(main, "train", lambda *args: pytest.fail("trained again"))
    for row in (base, untrained):
        reproduce.run(row, options)
    assert reproduce.RESULTS.read_text() == text

    monkeypatch.setattr(reproduce, "ROWS", [base, untrained, broken, base._replace(name="later", title="not run")])
    table = readme.reproduction("small", "findings")
    top1 = [entry["top1"] for entry in rows["base"]["runs"]]
    assert f"| the base |  | 89.25 (document) | {sum(top1) / 2:.1f}% ({min(top1):.1f} to {max(top1):.1f})" in table
    assert re.search(r"^\| diverges \| `--optimizer sgd --lr 1e6` \|  \| epoch 0 step \d+: .* \|  \|  \|$", table, re.M)
    assert "| not run |  | 89.25 (document) | not yet measured |  |  |" in table


def test_the_mean_of_an_epoch_is_over_its_steps(finished):
    """Lines of metrics.jsonl stand for 4 and 2 of the 6 steps of an epoch."""
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    losses = reproduce.read_run(finished)["losses"]
    assert len(losses) == 2
    for epoch, values in enumerate(losses):
        first, last = (lines[2 * epoch + i] for i in (0, 1))
        for i, name in enumerate(("loss_sim", "loss_uniformity")):
            assert values["mean"][i] == pytest.approx((4 * first[name] + 2 * last[name]) / 6)
            assert values["last"][i] == last[name]


def test_a_stopped_reproduction_leaves_with_the_code(options, monkeypatch):
    monkeypatch.setattr(main, "main", lambda argv: 143)
    with pytest.raises(SystemExit, match="143"):
        reproduce.run(reproduce.Row("base", "the base", "", None, ""), options)
    assert not reproduce.RESULTS.exists()


# ------------------------------------------------------------------------------------------ the one-minute search


def train_steps(n_steps, n_images=20):
    """Steps of a tiny encoder from the same start: its weights after each, and the size of its patches."""
    hp = main.hyperparameters(main.parse(
        f"train --n_images {n_images} --bs 4 --n_patches 2 --n_epochs 1 --arch resnet18-tiny --h_dim 8 --z_dim 4 --input_size 16"
        .split()))  # fmt: skip
    encoder, sizes = main.build_encoder(hp, None), []
    encoder.backbone.conv1.register_forward_hook(lambda conv, args, out: sizes.append(args[0].shape[-1]))
    optimizer, images, states = main.build_optimizer(hp, encoder), data.load_images("textures", "", False).images[:4], []
    for i in range(n_steps):
        main.train_step(hp, encoder, optimizer, images, data.generator(0, "t", step=i), False)
        states.append({name: value.clone() for name, value in encoder.state_dict().items() if value.is_floating_point()})
    return states, sizes


def test_the_average_of_the_weights_is_what_is_encoded():
    plain, _ = train_steps(5)
    with one_minute.averaged(0.75):
        states, _ = train_steps(5)
    for i in range(4):
        assert all(torch.equal(states[i][name], plain[i][name]) for name in plain[i])
    for name, value in states[4].items():
        average = plain[0][name]
        for state in plain[1:]:
            average = 0.75 * average + 0.25 * state[name]
        torch.testing.assert_close(value, average)


def test_the_size_grows():
    with one_minute.growing(8):
        _, sizes = train_steps(5)
    assert sizes == [16, 8, 8, 16, 16]  # the change comes after a step


def test_other_shapes_of_the_rate_and_the_program_as_it_was_afterwards():
    before, hp = main.learning_rate, SimpleNamespace(lr=2.0, schedule="cosine")
    with one_minute.linear():
        assert [main.learning_rate(hp, t) for t in (0, 0.25, 0.5)] == [2, 1.5, 1]
    with one_minute.warm_up():
        rates = [main.learning_rate(hp, t) for t in (0, 0.05, 0.1, 0.55, 1)]
        assert rates == pytest.approx([0, 1, 2, 1, 0])
    assert main.learning_rate is before


def test_each_try_is_a_command_that_the_program_takes():
    for name, (text, change) in one_minute.TRIES.items():
        hp = main.hyperparameters(main.parse(["train", *one_minute.BASE.split(), *text.split()]))
        assert name == "base" or text or change
        if "the patches" in name or "images" in name:  # said to cost as much as the base
            assert hp.n_images * hp.n_patches * hp.n_epochs == 40000, name
