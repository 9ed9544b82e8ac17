"""The commands and their options, as users type them."""

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from helpers import (
    ONE_THREAD,
    ROOT,
    RUN,
    changed_files,
    contents,
    edit,
    fingerprints,
    refused,
    resume,
    run,
    trained_with,
)

import cli
import forecast
import main
from experiment import Run
from hparams import PRESETS, SETTINGS, yaml_value
from infra import device, files
from infra.lock import locked
from model import Encoder


def test_a_preset_is_ordinary_hyperparameters(finished, tmp_path):
    command = ["train", "--preset", "laptop", "--log_folder", tmp_path]
    assert refused(run(*command, "--config_from", finished), 2, "exclude each other")
    given = dict(dataset="textures", n_epochs=0, n_eval_epochs=1, n_images=100, test_patches=16)
    options = [text for name, value in given.items() for text in (f"--{name}", value)]
    result = run(*command, *options)
    assert result.code == 0, result.err
    (exp_dir,) = tmp_path.iterdir()
    defaults = {name: setting.default for name, setting in SETTINGS.items()}
    assert vars(Run(exp_dir).read_hparams()) == {**defaults, **PRESETS["laptop"], **given}


def test_a_preset_that_shrinks_the_patches_of_larger_images_says_so(images, tmp_path, monkeypatch):
    """It encodes whole images. The option that it names works, and ends the warning."""
    command = ["train", "--preset", "laptop", "--dataset", "folder", "--data_dir", images]
    command += ["--log_folder", tmp_path, "--bs", 8, "--n_epochs", 0, "--image_size"]
    monkeypatch.setattr(main, "dry_run", lambda hp: None)
    assert run(*command, 64, "--dry_run").err == (
        "warning: patches of 32 pixels are shrunk to 16 (input_size of the preset), so "
        "--image_size 64 adds little: add --input_size 32, about 4 times slower\n"
    )
    for options in ("32 --dry_run", "64 --input_size 16 --dry_run", "64 --input_size 32"):
        result = run(*command, *options.split())
        assert (result.code, result.err) == (0, ""), options


STANDING_CLOCK = SimpleNamespace(monotonic=lambda: 0.0)


def test_a_budget_sets_the_epochs_of_a_new_run(tiny, tmp_path, monkeypatch):
    """12 seconds without 5 of encoding and 1 of the probe are 30 steps of 0.2 s, six an epoch."""
    costs = forecast.Costs(step=0.2, encoding=5.0, probe=1.0)
    monkeypatch.setattr(forecast, "measure_costs", lambda *_: costs)
    monkeypatch.setattr(forecast, "time", STANDING_CLOCK)
    i = tiny.index("--n_epochs")
    argv = [*tiny[:i], *tiny[i + 2 :]]
    argv += ["--log_folder", tmp_path, "--budget", "0.2"]
    result = run(*argv)
    assert result.code == 0, result.err
    assert "--budget 0.2: n_epochs 5.0; 30 steps of 0.2 s" in result.out
    exp_dir = tmp_path / RUN
    assert Run(exp_dir).read_hparams().n_epochs == 5
    before = fingerprints(exp_dir)
    monkeypatch.setattr(forecast, "measure_costs", None)
    again = run(*argv)
    assert again.code == 0 and "--budget has no effect on a run that exists" in again.out
    assert not changed_files(exp_dir, before)
    assert refused(run(*argv, "--n_epochs", "3"), 2, "--budget sets n_epochs")
    assert refused(run(*argv, "--budget", "nan"), 2, "minutes above 0")


def test_a_short_budget_takes_a_smaller_network_of_the_preset(monkeypatch, caplog):
    """Encoding takes 50 s with the preset's network, 40 with the smaller one, half without mirror
    images; 40 steps of 100 images are an epoch.
    """

    def costs_of(hp, *_):
        encoding = {"resnet10-mini": 50.0, "resnet10-tiny": 40.0}[hp.arch] / (1 + (not hp.mirror))
        return forecast.Costs(step=0.5, encoding=encoding, probe=0.0)

    monkeypatch.setattr(forecast, "measure_costs", costs_of)
    monkeypatch.setattr(forecast, "time", STANDING_CLOCK)
    options = "--dataset textures --preset laptop --dry_run --device cpu".split()
    for minutes, given, expected in (
        (2, [], ": n_epochs 3.5; 140 steps"),
        (1.2, [], ": arch resnet10-tiny, n_epochs 1.6; 64 steps"),
        (0.9, [], ": arch resnet10-tiny, mirror false, bs 50, n_epochs 0.85; 68 steps"),
        (0.9, ["--arch", "resnet10-mini"], ": mirror false, bs 50, n_epochs 0.725; 58 steps"),
        # 5,000 images are encoded in 20 s; 12 s are for 1,000 test and 2,000 training images
        (
            0.3,
            [],
            ": arch resnet10-tiny, mirror false, bs 50, n_images 2000, n_epochs 0.3; 12 steps",
        ),
    ):
        caplog.clear()
        args = cli.parse(["train", *options, *given])
        hp = cli.hparams_of(args)
        changed = forecast.within_budget(hp, minutes, cli.lighter_settings(args))
        assert f"--budget {minutes:g}{expected}" in caplog.text
        names = ("n_epochs", "arch", "mirror", "bs", "n_images")
        assert changed == replace(hp, **{name: getattr(changed, name) for name in names})
        for name in set(names) & set(expected.replace(",", "").split()):
            assert f"{name} {yaml_value(getattr(changed, name))}" in expected


def test_the_seconds_of_the_probe_grow_with_images_epochs_and_queries(monkeypatch):
    """By a clock on which an image takes 10 us in an epoch of a rate, and a query 1 us."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)

    def regressions(x, y, lrs, n_classes, fit, epochs):
        for epoch in epochs:
            clock.now += 1e-5 * len(x) * len(lrs)
            yield epoch

    def neighbours(x, y, queries, *_, **__):
        clock.now += 1e-6 * len(x) * len(queries)

    monkeypatch.setattr(forecast, "time", clock)
    monkeypatch.setattr(forecast, "softmax_regressions", regressions)
    monkeypatch.setattr(forecast, "knn", neighbours)
    hp = SimpleNamespace(eval_lr=0.01, n_eval_epochs=10)
    machine = SimpleNamespace(device="cpu", bf16=False)
    train = SimpleNamespace(class_names=["a", "b"], images=range(50_000))
    images = {"train": train, "test": SimpleNamespace(images=range(10_000))}
    seconds = forecast.seconds_of_probe(hp, machine, images, 2)
    assert seconds == pytest.approx(50_000 * (10 * 1e-5 + 10_000 * 1e-6))


def test_a_budget_that_leaves_no_time_for_training(tiny, tmp_path):
    i = tiny.index("--n_epochs")
    argv = [*tiny[:i], *tiny[i + 2 :]]
    result = run(*argv, "--log_folder", tmp_path, "--budget", "0.0001")
    assert refused(result, 2, "too short", "encoding takes about", "--n_images")
    assert not list(tmp_path.iterdir())


def test_config_from_another_run(finished, tmp_path):
    command = ["train", "--config_from", finished, "--log_folder"]
    result = run(*command, tmp_path, "--exp_name", "new", "--n_epochs", "1")
    assert result.code == 0, result.err
    there = vars(Run(finished).read_hparams())
    here = vars(Run(tmp_path / RUN.replace("default", "new")).read_hparams())
    assert here == {**there, "n_epochs": 1}
    assert refused(run(*command, finished.parent), 2, "--exp_name")


@pytest.mark.parametrize(
    "options",
    [
        "--optimizer sgd --lr 0.01 --activation tanh --no-batch_norm --n-epochs=1",
        "--uniformity_loss vonmises --emb_pool proj --invariance_loss_weight 1.5 --n_epochs 1 "
        "--deterministic",
        "--uniformity_loss contrastive --invariance_loss_weight 10.0 --temperature 0.1 "
        "--eval_views whole --mirror --n_epochs 1 --max_patches 5",
        "--precision bf16 --n_images 12 --test_patches 3 --n_epochs 1 --save_proj",
        "--n_epochs 0",
    ],
)
def test_options_run_through(tiny, tmp_path, options):
    result = trained_with(*options.split(), tiny=tiny, tmp_path=tmp_path)
    assert "===> Report" in result.out
    hp = Run(next(tmp_path.glob("default__*"))).read_hparams()
    for name, value in re.findall(r"--(\w+) ([\w.]+)", options):
        assert str(getattr(hp, name)).removesuffix(".0") == value.removesuffix(".0")


def test_precision_auto_and_unknown_devices(monkeypatch, tmp_path):
    cpu = torch.device("cpu")
    assert device.pick_precision("auto", cpu) in ("fp32", "bf16")
    assert [device.pick_precision(name, cpu) for name in ("fp32", "bf16")] == ["fp32", "bf16"]
    monkeypatch.setattr(device.os.path, "exists", lambda path: True)
    for flags, expected in (("fpu avx2 avx512f", "fp32"), ("avx512f avx512_bf16", "bf16")):
        text = f"flags : {flags}\n"
        monkeypatch.setattr(device.Path, "read_text", lambda self, text=text: text)
        assert device.pick_precision("auto", cpu) == expected
    monkeypatch.undo()
    for name in ("cuda", "cuda:3", "tpu", "cuda:x", "meta"):
        result = run("train", "--device", name, "--log_folder", tmp_path / "logs")
        assert refused(result, 2, name)
    assert not (tmp_path / "logs").exists()


def test_cleanup_keeps_the_newest_checkpoint_that_is_whole(copy, tmp_path):
    newest = copy / "checkpoints" / "1.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    result = run("cleanup", "--log_folder", tmp_path, "--keep", "1", "-y")
    assert result.code == 0
    assert "1.pt can't be read" in result.err
    assert {path.name for path in (copy / "checkpoints").iterdir()} >= {"0.pt", "1.pt"}


def test_cleanup_asks_keeps_the_newest_and_says_how_much_it_freed(copy, tmp_path, monkeypatch):
    for epoch in range(2, 12):
        shutil.copy(copy / "checkpoints" / "1.pt", copy / "checkpoints" / f"{epoch}.pt")
    before = fingerprints(copy)
    command = ["cleanup", "--log_folder", tmp_path, "--keep"]
    for answer in ("n", ""):
        monkeypatch.setattr("builtins.input", lambda question, answer=answer: answer)
        result = run(*command, "2")
        assert result.code == 0
        assert "Nothing removed" in result.out
        assert fingerprints(copy) == before
    result = run(*command, "2", "-y")
    gone = set(before) - set(fingerprints(copy))
    assert gone == {copy / "checkpoints" / f"{epoch}.pt" for epoch in range(10)}
    assert f"Freed {sum(len(before[path][0]) for path in gone) / 1e6:,.1f} MB" in result.out
    assert resume(copy).code == 0
    assert run(*command, "0", "-y").code == 2
    assert run("cleanup", "--log_folder", tmp_path / "missing", "--keep", "1", "-y").code == 2


def test_cleanup_says_what_takes_the_room_and_removes_embeddings_that_no_process_uses(
    copy, tmp_path, cache
):
    in_use = shutil.copytree(copy, tmp_path / "in use")
    (cache / "x.u8").parent.mkdir(exist_ok=True)
    (cache / "x.u8").write_bytes(bytes(3_000_000))
    result = run("cleanup", "--log_folder", tmp_path)
    sizes = {
        name: 2 * sum({p.stat().st_ino: p.stat().st_size for p in (copy / name).iterdir()}.values())
        for name in ("checkpoints", "artifacts")
    }
    assert f"{sizes['checkpoints'] / 1e6:.1f} MB checkpoints" in result.out
    assert f"{sizes['artifacts'] / 1e6:.1f} MB embeddings (--artifacts)" in result.out
    (cached,) = re.findall(r"([\d.]+) MB decoded images of all runs in", result.out)
    assert float(cached) >= 3 and "Nothing removed" in result.out
    (cache / "x.u8").unlink()

    before = files.read_pt(copy / "artifacts" / "test.pt")["embeddings"]
    with locked(Run(in_use).lock):
        result = run("cleanup", "--log_folder", tmp_path, "--artifacts", "-y")
    assert "2 files of 2 experiments can go" in result.out
    assert not list((copy / "artifacts").iterdir())
    assert len(list((in_use / "artifacts").iterdir())) == 2
    assert "Encoding 'train'" in resume(copy).out
    assert torch.equal(files.read_pt(copy / "artifacts" / "test.pt")["embeddings"], before)


def test_help_lists_every_option_with_its_default():
    out = run("train", "--help").out
    flat = " ".join(out.split())
    for param in SETTINGS.values():
        assert f"--{param.name}" in flat
        assert param.help in flat
        assert param.default is None or f"(default: {param.default})" in flat
    for command in ("resume", "cleanup"):
        result = run(command, "--help")
        assert result.code == 0
        assert command in run("--help").out


def test_importing_does_nothing(tmp_path):
    paths = [path for folder in (".", "infra", "tools") for path in ROOT.glob(f"{folder}/*.py")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    code = f"import {', '.join(names)}, torch; assert not torch.cuda.is_initialized()"
    command, environment = [sys.executable, "-c", code, "--bogus"], {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr, list(tmp_path.iterdir())) == (0, "", "", [])


def test_a_dry_run_prints_its_plan_and_writes_nothing(tiny, images, tmp_path):
    before = fingerprints(images)
    result = run(*tiny, "--dry_run", "--log_folder", tmp_path / "logs")
    assert (result.code, result.err) == (0, "")
    assert yaml.safe_load(result.out.split("* ")[0])["params"]["bs"] == 4
    n = sum(p.numel() for p in Encoder("resnet10-tiny", 8, 4).parameters())
    assert f"* Parameters: {n / 1e6:.2f} million" in result.out
    assert "12 steps of 8 patches" in result.out
    assert re.search(r"\* Memory: about \d", result.out)
    parts = r"about (\S+) s of training, (\S+) of encoding and (\S+) of the probe; (\S+) minutes in"
    *seconds, minutes = map(
        float, re.search(rf"\* Time: \S+ s a step; {parts}", result.out).groups()
    )
    assert minutes == pytest.approx(sum(seconds) / 60, rel=0.06)
    assert fingerprints(images) == before
    assert not list(tmp_path.iterdir())


def test_a_dry_run_prints_the_seconds_that_were_measured(tiny, tmp_path, monkeypatch):
    """12 steps of 0.5 s, 20 s of encoding and 4 of the probe are half a minute."""
    costs = forecast.Costs(step=0.5, encoding=20.0, probe=4.0)
    monkeypatch.setattr(forecast, "measure_costs", lambda *_: costs)
    result = run(*tiny, "--dry_run", "--log_folder", tmp_path)
    parts = "6 s of training, 20 of encoding and 4 of the probe; 0.5 minutes in all"
    assert f"* Time: 0.5 s a step; about {parts}\n" in result.out


def test_labels_from_a_csv_file(tiny, images, finished, tmp_path):
    """The same images in folders that mean nothing, the labels in a file: the same result."""
    folder = tmp_path / "data"
    rows = ["path,label"]
    for split in ("train", "test"):
        for i, path in enumerate(sorted((images / split).rglob("*.png"))):
            to = folder / split / f"{i:02}" / "é, x.png"
            to.parent.mkdir(parents=True)
            shutil.copy(path, to)
            rows.append(f'"{to.relative_to(folder)}",{path.parent.name}')
    file = tmp_path / "labels.csv"
    file.write_text("\n".join(rows) + "\n")
    trained_with("--data_dir", folder, "--labels", file, tiny=tiny, tmp_path=tmp_path)
    ours, undisturbed = contents(tmp_path / RUN), contents(finished)
    assert ours["checkpoints/last.pt"]["data"] == undisturbed["checkpoints/last.pt"]["data"]
    assert ours["linear_accuracy.json"] == undisturbed["linear_accuracy.json"]

    command = [*tiny, "--data_dir", folder, "--labels", file, "--log_folder", tmp_path / "no"]
    for text, words in (
        ("a,b,c", "row 1 has 3 columns"),
        ("\n".join(rows).replace("down", "across"), "fewer than two labels"),
    ):
        file.write_text(text)
        assert refused(run(*command), 2, words)
    file.unlink()
    assert "can't be read" in run(*command).err


def test_options_of_resume_follow_the_rules_of_an_edit(copy):
    before = fingerprints(copy)
    result = resume(copy, "--n_eval_epochs 4 --eval-lr=0.1")
    assert result.code == 0
    assert "Training SSL" not in result.out
    assert "Encoding" not in result.out
    hp = Run(copy).read_hparams()
    assert (hp.n_eval_epochs, hp.eval_lr) == (4, 0.1)
    assert len(contents(copy)["linear_accuracy.json"]["per_epoch"]) == 4
    after = fingerprints(copy)
    assert after != before
    for name, value in (("h_dim", 9), ("seed", 1), ("n_epochs", -1), ("lr", 0.5)):
        assert refused(resume(copy, f"--{name} {value}"), 2, name)
        assert fingerprints(copy) == after


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        ("train --batch_size 3", "--bs"),
        ("train --n_epoch 3", "--n_epochs"),
        ("train --no-batchnorm", "--no-batch_norm"),
        ("train --learning-rate=3", "--lr"),
        ("cleanup --keeps 3", "--keep"),
    ],
)
def test_a_near_miss_of_an_option_is_named(argv, meant):
    words = f"did you mean {meant}? (see main.py {argv.split()[0]} --help)"
    assert refused(run(*argv.split()), 2, words)


def test_version_and_help_alone():
    assert run("--version").out.startswith("EMP-SSL, commit ")
    alone, asked = run(), run("--help")
    assert (alone.code, alone.out) == (0, asked.out)


def test_a_tilde_is_the_home_folder(copy, tmp_path, monkeypatch):
    """In options, which the shell leaves as they are after `=`, and in hparams.yaml."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for command in (
        "train --log_folder=~/x",
        "train --config_from=~/x",
        "train --data_dir=~/x",
        "train --weights=~/x",
        "resume --exp_dir=~/x",
        "resume --exp_dir=. --labels=~/x",
        "resume --exp_dir=. --pretrained_proj=~/x",
        "report --exp_dir=~/x",
        "export --exp_dir=~/x --format=onnx",
        "embed --exp_dir=~/x --images=. --out=y",
        "embed --exp_dir=. --images=~/x --out=y",
        "embed --exp_dir=. --images=. --out=~/x",
        "probe --exp_dir=~/x",
        "finetune --exp_dir=~/x",
        "cleanup --log_folder=~/x",
        "compare ~/x",
    ):
        values = [str(value) for value in vars(cli.parse(command.split())).values()]
        assert str(tmp_path / "x") in values, command
    edit(copy, data_dir="~/data", labels="~/labels.csv", weights="~/w.pt")
    hp = Run(copy).read_hparams()
    assert [hp.data_dir, hp.labels, hp.weights] == [
        f"{tmp_path}/data",
        f"{tmp_path}/labels.csv",
        f"{tmp_path}/w.pt",
    ]


def test_python_may_leave_the_folder_of_main_py_out_of_its_path(tmp_path):
    command = [sys.executable, ROOT / "main.py", "--version"]
    environment = {**ONE_THREAD, "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("EMP-SSL, commit ")


def test_the_seed_is_in_the_name_of_the_folder(tiny, tmp_path):
    for seed in (42, 43):
        assert run(*tiny, "--n_epochs", "0", "--seed", seed, "--log_folder", tmp_path).code == 0
    assert {path.name for path in tmp_path.iterdir()} == {RUN, f"{RUN}_seed43"}
