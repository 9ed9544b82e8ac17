"""The program as its users run it: stages, what resume does with an edited hparams.yaml, options, cleanup."""

import json
import math
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
import yaml
from conftest import ROOT, RUN, changed_files, contents, edit, fingerprints, run, training_lines, write_images
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import data
import evaluate
import experiment
import loss
import main
from lars import LARS
from model import Encoder


@pytest.fixture
def copy(finished, tmp_path):
    """The finished run in a folder of the test's own, moved and renamed."""
    return shutil.copytree(finished, tmp_path / "renamed")


def trained_with(*changes, tiny, tmp_path):
    result = run(*tiny, "--log_folder", tmp_path, *changes)
    assert result.code == 0, result.err
    return result


def test_three_stages_from_the_shell(tiny, finished, tmp_path):
    command = [sys.executable, ROOT / "main.py", *tiny, "--log_folder", "logs"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^Epoch: 0 \| Loss sim: -0\.\d{5} \| Loss TCR: -\d+\.\d{5}$", done.stdout, re.M)
    stages = ["Training SSL", "Encoding 'train'", "Encoding 'test'", "Fitting a linear", "Report"]
    assert re.findall(r"^===> (\w+(?: '?\w+'?)?(?: linear)?)", done.stdout, re.M) == stages
    assert "epoch 1 step 4/6 | sim" in done.stdout
    assert contents(tmp_path / "logs" / RUN) == contents(finished)  # another process, the same bits
    assert set(contents(finished)) == {
        "hparams.yaml", "metrics.jsonl", "patches.png", "linear_accuracy.json", "probe.pt",
        "checkpoints/0.pt", "checkpoints/1.pt", "checkpoints/last.pt", "artifacts/train.pt", "artifacts/test.pt",
    }  # fmt: skip


def test_the_report_tells_what_the_files_hold(finished):
    result = json.loads((finished / "linear_accuracy.json").read_text())
    embeddings = {split: experiment.load(finished / "artifacts" / f"{split}.pt") for split in ("train", "test")}
    probe = experiment.load(finished / "probe.pt")
    logits = embeddings["test"]["embeddings"] @ probe["weight"].T + probe["bias"]
    assert result["top1"] == pytest.approx(100 * (logits.argmax(1) == embeddings["test"]["labels"]).double().mean().item())
    assert (result["n_train"], result["n_test"]) == (24, 10)
    out = run("resume", "--exp_dir", finished).out
    assert re.search(rf"top-1 {result['top1']:.2f}%  top-5 {result['top5']:.2f}%  last epoch", out)
    assert re.search(rf"top-1 {result['best_top1']:.2f}%  best epoch", out)
    assert re.search(rf"20-NN +top-1 {result['knn_top1']:.2f}%", out)
    assert str(finished) in out
    assert Image.open(finished / "patches.png").size == (2 * (3 * 18 + 2), 2 * (8 * 18 + 2))  # 8 rows: image, 2 patches


def test_metrics_and_rate(finished):
    lines = training_lines(finished)
    assert [(line["epoch"], line["step"]) for line in lines] == [(0, 4), (0, 6), (1, 4), (1, 6)]
    # A cosine over all 12 steps, from lr towards 0; each line gives the rate of its last step: 3, 5, 9 and 11.
    expected = [0.15 * (1 + torch.tensor(torch.pi * step / 12).cos().item()) for step in (3, 5, 9, 11)]
    assert [line["lr"] for line in lines] == pytest.approx(expected)


def test_training_lowers_the_loss_and_leaves_the_labels_alone(tiny, images, tmp_path, finished):
    """The weights do not depend on the labels: a heap of the same images trains the same encoder."""
    heap = tmp_path / "heap"
    (heap / "train").mkdir(parents=True)
    for i, path in enumerate(sorted((images / "train").rglob("*.png"))):
        shutil.copy(path, heap / "train" / f"{i:02}.png")
    trained_with("--data_dir", heap, tiny=tiny, tmp_path=tmp_path)
    ours, labelled = (experiment.load(folder / "checkpoints" / "last.pt")["encoder"] for folder in (tmp_path / RUN, finished))
    assert all(torch.equal(ours[name], labelled[name]) for name in labelled)
    first, *_, last = training_lines(tmp_path / RUN)
    assert 200 * last["loss_sim"] + last["loss_uniformity"] < 200 * first["loss_sim"] + first["loss_uniformity"]


def test_images_without_labels_skip_the_probe_and_say_why(tiny, tmp_path):
    for name in ("a", "b/c"):
        write_images(tmp_path / "heap" / name, 6, len(name))
    result = trained_with("--data_dir", tmp_path / "heap", tiny=tiny, tmp_path=tmp_path)
    assert "linear probe     skipped: the images have no labels" in result.out
    assert (tmp_path / RUN / "artifacts" / "train.pt").exists()
    before = fingerprints(tmp_path / RUN)
    assert run("resume", "--exp_dir", tmp_path / RUN).code == 0
    assert fingerprints(tmp_path / RUN) == before


def test_a_finished_run_reports_and_writes_nothing(copy):
    """Neither its images nor the place where it was are needed."""
    before = fingerprints(copy)
    result = run("resume", "--exp_dir", copy)
    assert result.code == 0
    assert "===> Report" in result.out
    assert "Loading" not in result.out
    assert fingerprints(copy) == before


# ------------------------------------------------------------------------------------- an edited hparams.yaml


def test_a_probe_setting_runs_only_the_probe_again(copy):
    before = fingerprints(copy)
    edit(copy, eval_lr="1e-1")
    result = run("resume", "--exp_dir", copy)
    assert result.code == 0, result.err
    changed = changed_files(copy, before)
    assert changed == {"hparams.yaml", "linear_accuracy.json", "probe.pt"}  # the first by our edit
    assert yaml.safe_load((copy / "hparams.yaml").read_text())["params"]["eval_lr"] == "1e-1"  # as it was typed
    assert json.loads((copy / "linear_accuracy.json").read_text())["key"]["eval_lr"] == 0.1


@pytest.mark.parametrize(
    "change", [{"test_patches": 3}, {"emb_pool": "proj"}, {"save_proj": "true"}, {"eval_views": "crops"}]
)
def test_an_encode_setting_encodes_and_probes_again(copy, change):
    before = fingerprints(copy)
    edit(copy, **change)
    assert run("resume", "--exp_dir", copy).code == 0
    changed = changed_files(copy, before)
    assert changed == {"hparams.yaml", "train.pt", "test.pt", "linear_accuracy.json", "probe.pt"}
    encoded = experiment.load(copy / "artifacts" / "test.pt")
    assert encoded["embeddings"].shape == (10, 4 if change == {"emb_pool": "proj"} else 8)
    assert ("features" in encoded) == ("save_proj" in change)


def test_more_epochs_train_on_from_the_last_checkpoint(copy):
    old = {name: value for name, value in contents(copy).items() if name in ("checkpoints/0.pt", "checkpoints/1.pt")}
    encoder = contents(copy)["linear_accuracy.json"]["key"]["encoder"]
    edit(copy, n_epochs=3)
    result = run("resume", "--exp_dir", copy)
    assert result.code == 0, result.err
    assert "Going on at epoch 2 step 0" in result.out
    assert "Epoch: 2 |" in result.out
    assert "Epoch: 1 |" not in result.out
    new = contents(copy)
    assert {name: new[name] for name in old} == old
    assert experiment.load(copy / "checkpoints" / "last.pt")["epoch"] == 3
    assert new["linear_accuracy.json"]["key"]["encoder"] != encoder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"h_dim": 16}, ("h_dim is 16", "h_dim 8", "--exp_name")),
        ({"z_dim": 5}, ("z_dim is 5", "z_dim 4")),
        ({"arch": "resnet18-mini"}, ("resnet18-mini", "resnet18-tiny")),
        ({"dataset": "textures", "image_size": 32}, ("dataset is textures", "dataset folder")),
        ({"seed": 1}, ("seed is 1", "seed 42")),
        ({"lr": 0.2}, ("lr is 0.2", "lr 0.3", "no effect")),
        ({"n_patches": 5}, ("n_patches is 5", "n_patches 2", "no effect")),
        ({"n_epochs": 1}, ("n_epochs is 1", "epoch 2", "raise it")),
    ],
)
def test_what_the_weights_rule_out_is_refused(copy, change, words):
    edit(copy, **change)
    before = fingerprints(copy)
    result = run("resume", "--exp_dir", copy)
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert all(word in result.err for word in words), result.err
    assert fingerprints(copy) == before


def test_a_part_of_an_epoch_and_the_rest_of_it(tiny, tmp_path):
    """1.5 epochs of 6 steps: 9 steps and a cosine over them; then on to 2 epochs, from the middle of the second."""
    trained_with("--n_epochs", "1.5", "--print_freq", "1", tiny=tiny, tmp_path=tmp_path)
    exp_dir = tmp_path / RUN
    lines = training_lines(exp_dir)
    assert [(line["epoch"], line["step"]) for line in lines] == [(0, n) for n in range(1, 7)] + [(1, 1), (1, 2), (1, 3)]
    assert [line["lr"] for line in lines] == pytest.approx([0.15 * (1 + math.cos(math.pi * t / 9)) for t in range(9)])
    assert {path.name for path in (exp_dir / "checkpoints").iterdir()} == {"0.pt", "previous.pt", "last.pt"}
    before = fingerprints(exp_dir)
    assert run("resume", "--exp_dir", exp_dir).code == 0
    assert fingerprints(exp_dir) == before
    edit(exp_dir, n_epochs=1.25)
    assert run("resume", "--exp_dir", exp_dir).code == 2
    edit(exp_dir, n_epochs=2)
    result = run("resume", "--exp_dir", exp_dir)
    assert "Going on at epoch 1 step 3" in result.out
    assert (exp_dir / "checkpoints" / "1.pt").exists()
    assert len(training_lines(exp_dir)) == 9 + 1 + 3  # a line says that n_epochs changed


def test_a_preset_is_ordinary_hyperparameters(finished, tmp_path):
    options = ["--dataset", "textures", "--n_epochs", "0", "--n_eval_epochs", "1", "--n_images", "100", "--test_patches", "1"]
    result = run("train", "--preset", "one-minute", *options, "--log_folder", tmp_path)
    assert result.code == 0, result.err
    hp = vars(experiment.read_hparams(next(tmp_path.iterdir())))
    given = {"dataset": "textures", "n_epochs": 0, "n_eval_epochs": 1, "n_images": 100, "test_patches": 1}
    defaults = {param.name: param.default for param in experiment.PARAMS}
    assert hp == {**defaults, **experiment.PRESETS["one-minute"], **given}
    result = run("train", "--preset", "one-minute", "--config_from", finished, "--log_folder", tmp_path)
    assert (result.code, len(list(tmp_path.iterdir()))) == (2, 1)


def test_more_epochs_after_none_at_all(tiny, finished, tmp_path):
    trained_with("--n_epochs", "0", tiny=tiny, tmp_path=tmp_path)
    edit(tmp_path / RUN, n_epochs=2)
    assert run("resume", "--exp_dir", tmp_path / RUN).code == 0
    ours, undisturbed = contents(tmp_path / RUN), contents(finished)
    assert ours["metrics.jsonl"][0]["event"] == "changed"
    assert ours["checkpoints/last.pt"] == undisturbed["checkpoints/last.pt"]
    assert ours["linear_accuracy.json"] == undisturbed["linear_accuracy.json"]


def test_bs_edited_within_an_epoch(copy, tiny):
    """After 4 of 6 steps of 4 images, bs 5 goes on at step 3 of 4: 15 of the 16 images lie behind it."""
    last = copy / "checkpoints" / "last.pt"
    content = experiment.load(copy / "checkpoints" / "0.pt")
    experiment.save(last, {**content, "step": 4})
    (copy / "checkpoints" / "1.pt").unlink()
    edit(copy, bs=5)
    result = run("resume", "--exp_dir", copy)
    assert result.code == 0, result.err
    assert "Going on at epoch 1 step 3" in result.out
    assert "nan" not in result.out


def test_a_training_setting_edited_on_the_way_is_used_and_recorded(copy):
    (copy / "checkpoints" / "last.pt").unlink()
    (copy / "checkpoints" / "1.pt").unlink()  # as if it had been stopped after epoch 0
    old = contents(copy)["metrics.jsonl"]
    edit(copy, lr=0.1, weight_decay=0.5)
    result = run("resume", "--exp_dir", copy)
    assert result.code == 0, result.err
    assert "lr was 0.3, from here on it is 0.1" in result.out
    new = contents(copy)["metrics.jsonl"]
    assert new[:2] == old[:2]
    assert new[2] == {"event": "changed", "epoch": 1, "step": 0, "global_step": 6, "name": "lr", "old": 0.3, "new": 0.1}
    assert new[3]["name"] == "weight_decay"
    assert new[4]["lr"] == pytest.approx(old[2]["lr"] / 3)
    assert new[4]["loss_sim"] != old[2]["loss_sim"]
    assert run("resume", "--exp_dir", copy).code == 0  # and the run is whole


def test_other_images_under_the_same_name_are_refused(copy, images, tmp_path):
    other = shutil.copytree(images, tmp_path / "other")
    edit(copy, data_dir=other)
    assert run("resume", "--exp_dir", copy).code == 0  # moved, but the same
    Image.new("RGB", (16, 16)).save(other / "train" / "down" / "0.png")
    result = run("resume", "--exp_dir", copy)
    assert result.code == 2
    assert "are not those that this run was trained on" in result.err


# ----------------------------------------------------------------------------------- train in an existing folder


def test_train_again_goes_on_says_what_differs_and_starts_over_only_when_told(tiny, finished, tmp_path):
    exp_dir = shutil.copytree(finished, tmp_path / RUN)
    before = fingerprints(exp_dir)
    again = [*tiny, "--log_folder", tmp_path]
    assert run(*again).code == 0
    assert fingerprints(exp_dir) == before

    result = run(*again, "--eval-lr=0.5")
    assert result.code == 0
    assert "eval_lr is None in" in result.out
    assert experiment.read_hparams(exp_dir).eval_lr == 0.5

    before = fingerprints(exp_dir)
    result = run(*again, "--eval_lr", "0.5", "--h_dim", "16")
    assert (result.code, fingerprints(exp_dir)) == (2, before)

    result = run(*again, "--no-resume", "--data_dir", tmp_path / "none")  # an error moves nothing aside
    assert (result.code, fingerprints(exp_dir)) == (2, before)

    result = run(*again, "--no-resume", "--h-dim", "16")
    assert result.code == 0
    assert {path.relative_to(exp_dir): value for path, value in before.items()} == {
        path.relative_to(tmp_path / f"{RUN}.old1"): value for path, value in fingerprints(tmp_path / f"{RUN}.old1").items()
    }
    assert experiment.read_hparams(exp_dir).h_dim == 16


def test_config_from_another_run(finished, tmp_path):
    result = run("train", "--config_from", finished, "--exp_name", "new", "--n_epochs", "1", "--log_folder", tmp_path)
    assert result.code == 0, result.err
    there, here = vars(experiment.read_hparams(finished)), vars(experiment.read_hparams(tmp_path / RUN.replace("default", "new")))
    assert here == {**there, "n_epochs": 1}
    result = run("train", "--config_from", finished, "--log_folder", finished.parent)
    assert result.code == 2
    assert "--exp_name" in result.err


# ------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer": "sgd", "lr": 0.01, "weight_decay": 0.1},
        {"uniformity_loss": "vonmises", "uniformity_loss_weight": 30.0},
        {"tcr_eps": 0.5, "invariance_loss_weight": 3.0, "weight_decay": 0.5, "n_patches": 3, "seed": 7},
        {"n_patches": 4, "bags": 2, "input_size": 8, "n_epochs": 1.5},
        {"schedule": "constant"},
    ],
)
def test_training_is_what_a_plain_loop_does(tiny, tmp_path, options):
    """Two epochs of three steps, written out with torch's SGD or our LARS, from the images and the seed alone."""
    argv = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    trained_with(*argv, "--n_images", "13", tiny=tiny, tmp_path=tmp_path)
    exp_dir = next(tmp_path.glob("default__*"))
    hp = experiment.read_hparams(exp_dir)
    assert options.items() <= vars(hp).items()
    train_set = data.load_images("folder", hp.data_dir, True, 16)
    subset = data.balanced_subset(train_set.labels, 24, 13, data.generator(hp.seed, "subset"))
    pixels, encoder = train_set.images[subset], main.build_encoder(hp, None).to(memory_format=torch.channels_last)
    if hp.optimizer == "sgd":
        optimizer = torch.optim.SGD(encoder.parameters(), 1, momentum=0.9, nesterov=True, weight_decay=hp.weight_decay)
    else:
        settings = {"momentum": 0.9, "nesterov": True, "weight_decay": hp.weight_decay, "eta": 0.005, "clip": True}
        optimizer = LARS(encoder.parameters(), 1, **settings)
    n_total = math.ceil(3 * hp.n_epochs)
    for t in range(n_total):
        epoch, step = divmod(t, 3)
        optimizer.param_groups[0]["lr"] = hp.lr * (1 + math.cos(math.pi * t / n_total)) / 2 if hp.schedule == "cosine" else hp.lr
        batch = torch.randperm(13, generator=data.generator(hp.seed, "order", epoch))[4 * step : 4 * step + 4]
        x = data.sample_patches(pixels[batch], hp.n_patches, data.generator(hp.seed, "patches", epoch, step), hp.input_size or 16)
        z = encoder(x.flatten(0, 1))[1].view(hp.n_patches, 4, 4)
        if hp.bags == 2:  # patches 0 and 1 of an image as those of two images, and so on
            z = torch.stack([torch.cat([z[0], z[1]]), torch.cat([z[2], z[3]])])
        invariance = loss.invariance_loss(z)  # first: in what order autograd adds gradients decides their last bits
        uniformity = loss.vonmises_loss(z) if hp.uniformity_loss == "vonmises" else loss.tcr_loss(z, hp.tcr_eps)
        optimizer.zero_grad()
        (hp.invariance_loss_weight * invariance + hp.uniformity_loss_weight * uniformity).backward()
        optimizer.step()
    trained = experiment.load(exp_dir / "checkpoints" / "last.pt")["encoder"]
    assert all(torch.equal(trained[name], value) for name, value in encoder.state_dict().items())


@pytest.mark.parametrize("uniformity_loss", ["tcr", "vonmises"])
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_step_never_waits_for_the_device(device, uniformity_loss, monkeypatch):
    """The device "meta" has no values that could be read; on the CPU, what reads one is forbidden."""

    def refuse(*args):
        raise AssertionError("a value was read")

    if device == "meta":
        monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # which there is none of on meta
    hp = main.hyperparameters(main.parse(f"train --n_patches 3 --h_dim 8 --z_dim 4 --uniformity_loss {uniformity_loss}".split()))
    for arch in ("resnet18-tiny", "resnet18-imagenet"):
        encoder = Encoder(arch, 8, 4).to(device)
        optimizer = main.build_optimizer(hp, encoder)
        images = torch.zeros(8, 3, 32, 32, dtype=torch.uint8, device=device)
        with monkeypatch.context() as patch:
            for name in ("item", "__bool__", "__float__", "__int__", "numpy"):
                patch.setattr(torch.Tensor, name, refuse)
            metrics = [main.train_step(hp, encoder, optimizer, images, data.generator(0, "t", step=i), False) for i in range(2)]
        assert metrics[1].device.type == device
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.zeros(2, device="meta").sum().item()


def test_the_memory_of_a_step_is_told_before_and_warned_of(tiny, tmp_path, monkeypatch):
    """What autograd keeps of a patch, counted by hand for an encoder without a backbone; and the lines about it."""
    encoder = Encoder("resnet18-tiny", h_dim=32, z_dim=16, activation="tanh")
    encoder.backbone = torch.nn.Flatten()
    encoder.features[0] = torch.nn.Linear(3 * 16 * 16, 32)
    state = {name: value.clone() for name, value in encoder.state_dict().items()}
    patch = main.saved_bytes(encoder, 7, 16, False) - main.saved_bytes(encoder, 6, 16, False)
    # The input of each layer, the output of tanh, which is the next one's input, and the norm of z and its clamp.
    assert 4 * (768 + 4 * 32 + 16) <= patch <= 4 * (768 + 4 * 32 + 2 * 16 + 4)
    assert all(torch.equal(state[name], value) for name, value in encoder.state_dict().items())
    result = run(*tiny, "--log_folder", tmp_path)
    assert re.search(r"^\* Memory: about \d+\.\d GB for a step of 8 patches; \d+\.\d GB are there$", result.out, re.M)
    assert re.search(r"^memory           [1-9]?\d\.\d\d GB at most", result.out, re.M)
    assert result.err == ""
    monkeypatch.setattr(main, "saved_bytes", lambda encoder, n_patches, size, bf16: n_patches * 10**12)
    result = run(*tiny, "--log_folder", tmp_path, "--exp_name", "huge", "--n_epochs", "0")
    assert "about 12800.0 GB for a step of 8 patches" in result.out
    assert "lower bs, n_patches or max_patches" in result.err


def test_compile_trains_the_same_weights(tiny, finished, tmp_path, monkeypatch):
    """Without the compiler, which takes a minute: what is compiled is called, and its weights are the checkpoint's."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(module) or module)
    trained_with("--compile", tiny=tiny, tmp_path=tmp_path)
    assert [type(module) for module in compiled] == [Encoder]
    assert contents(tmp_path / RUN)["artifacts/train.pt"] == contents(finished)["artifacts/train.pt"]


@pytest.mark.parametrize(
    "options",
    [
        "--optimizer sgd --lr 0.01 --activation tanh --no-batch_norm --n-epochs=1",
        "--uniformity_loss vonmises --emb_pool proj --invariance_loss_weight 1.5 --n_epochs 1 --deterministic",
        "--precision bf16 --n_images 12 --test_patches 3 --n_epochs 1 --save_proj",
        "--n_epochs 0",
    ],
)
def test_options_run_through(tiny, tmp_path, options):
    result = trained_with(*options.split(), tiny=tiny, tmp_path=tmp_path)
    assert "===> Report" in result.out
    hp = experiment.read_hparams(next(tmp_path.glob("default__*")))
    for name, value in re.findall(r"--(\w+) ([\w.]+)", options):
        assert str(getattr(hp, name)).removesuffix(".0") == value.removesuffix(".0")


def test_no_epochs_leave_the_seeded_random_encoder(tiny, tmp_path):
    trained_with("--n_epochs", "0", tiny=tiny, tmp_path=tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        other = Encoder("resnet18-tiny", 8, 4).state_dict()
    rng = torch.get_rng_state()
    fresh = main.build_encoder(experiment.read_hparams(tmp_path / RUN), None).state_dict()
    assert torch.equal(rng, torch.get_rng_state())
    saved = experiment.load(tmp_path / RUN / "checkpoints" / "last.pt")["encoder"]
    assert all(torch.equal(saved[name], fresh[name]) for name in fresh)
    assert not torch.equal(other["backbone.conv1.weight"], fresh["backbone.conv1.weight"])


def test_quick_knn_on_the_way_changes_nothing_else(tiny, finished, tmp_path):
    result = trained_with("--eval_freq", "5", tiny=tiny, tmp_path=tmp_path)
    assert len(re.findall(r"\| kNN \d+\.\d\d%", result.out)) == 2
    ours, plain = contents(tmp_path / RUN), contents(finished)
    for name in ("artifacts/train.pt", "probe.pt"):
        assert ours[name] == plain[name]
    steps = [(line["epoch"], line["step"]) for line in ours["metrics.jsonl"] if "knn_top1" in line]
    assert steps == [(0, 5), (1, 4)]
    assert [line for line in ours["metrics.jsonl"] if "knn_top1" not in line] == plain["metrics.jsonl"]


def test_pretrained_projection_is_loaded_and_frozen(tiny, finished, tmp_path):
    source = finished / "checkpoints" / "0.pt"
    trained_with("--pretrained_proj", source, "--seed", "1", tiny=tiny, tmp_path=tmp_path)
    theirs, ours = (experiment.load(path)["encoder"] for path in (source, tmp_path / RUN / "checkpoints" / "last.pt"))
    for name in theirs:
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            assert torch.equal(theirs[name], ours[name]) == name.startswith("projection."), name

    torch.save({"format": experiment.FORMAT, "encoder": {"backbone.conv1.weight": torch.ones(1)}}, tmp_path / "none.pt")
    for path, words in ((tmp_path / "none.pt", "holds no projection"), (tmp_path / "missing.pt", "is not a file")):
        result = run(*tiny, "--pretrained_proj", path, "--log_folder", tmp_path / "other")
        assert (result.code, (tmp_path / "other").exists()) == (2, False)
        assert words in result.err
    result = run(*tiny, "--pretrained_proj", source, "--z_dim", "5", "--log_folder", tmp_path / "other")
    assert result.code == 2
    assert "z_dim" in result.err


def test_precision_auto_and_unknown_devices(monkeypatch, tmp_path):
    cpu = torch.device("cpu")
    assert main.pick_precision("auto", cpu) in ("fp32", "bf16")
    assert [main.pick_precision(name, cpu) for name in ("fp32", "bf16")] == ["fp32", "bf16"]
    monkeypatch.setattr(main.os.path, "exists", lambda path: True)
    for flags, expected in (("fpu avx2 avx512f", "fp32"), ("avx512f avx512_bf16", "bf16")):
        monkeypatch.setattr(main.Path, "read_text", lambda self, flags=flags: f"flags : {flags}\n")
        assert main.pick_precision("auto", cpu) == expected
    monkeypatch.undo()
    for device in ("cuda", "cuda:3", "tpu", "cuda:x", "meta"):
        result = run("train", "--device", device, "--log_folder", tmp_path / "logs")
        assert (result.code, (tmp_path / "logs").exists()) == (2, False)
        assert device in result.err


# ------------------------------------------------------------------------------------------------- cleanup


def test_cleanup_asks_keeps_the_newest_and_says_how_much_it_freed(copy, tmp_path, monkeypatch):
    for epoch in range(2, 12):
        shutil.copy(copy / "checkpoints" / "1.pt", copy / "checkpoints" / f"{epoch}.pt")
    before = fingerprints(copy)
    for answer in ("n", ""):
        monkeypatch.setattr("builtins.input", lambda question, answer=answer: answer)
        result = run("cleanup", "--log_folder", tmp_path, "--keep", "2")
        assert (result.code, fingerprints(copy)) == (0, before)
        assert "Nothing removed" in result.out
    result = run("cleanup", "--log_folder", tmp_path, "--keep", "2", "-y")
    gone = set(before) - set(fingerprints(copy))
    assert gone == {copy / "checkpoints" / f"{epoch}.pt" for epoch in range(10)}
    assert f"Freed {sum(len(before[path][0]) for path in gone) / 1e6:,.1f} MB" in result.out
    assert run("resume", "--exp_dir", copy).code == 0
    assert run("cleanup", "--log_folder", tmp_path, "--keep", "0", "-y").code == 2
    assert run("cleanup", "--log_folder", tmp_path / "missing", "--keep", "1", "-y").code == 2


# ---------------------------------------------------------------------------------------------------- help


def test_help_lists_every_option_with_its_default():
    out = run("train", "--help").out
    flat = " ".join(out.split())
    for param in experiment.PARAMS:
        assert f"--{param.name}" in flat
        assert param.help in flat
        assert param.default is None or f"(default: {param.default})" in flat
    for command in ("resume", "cleanup"):
        result = run(command, "--help")
        assert result.code == 0
        assert command in run("--help").out


def test_importing_does_nothing(tmp_path):
    code = "import main, experiment, model, loss, lars, data, evaluate, torch; assert not torch.cuda.is_initialized()"
    command, environment = [sys.executable, "-c", code, "--bogus"], {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr, list(tmp_path.iterdir())) == (0, "", "", [])


def test_a_dry_run_tells_and_writes_nothing(tiny, images, tmp_path):
    before = fingerprints(images)
    result = run(*tiny, "--dry_run", "--log_folder", tmp_path / "logs")
    assert (result.code, result.err) == (0, "")
    assert yaml.safe_load(result.out.split("* ")[0])["params"]["bs"] == 4
    n = sum(p.numel() for p in Encoder("resnet18-tiny", 8, 4).parameters())
    assert f"* Parameters: {n / 1e6:.2f} million" in result.out
    assert "12 steps of 8 patches" in result.out
    assert re.search(r"\* Memory: about \d", result.out)
    assert re.search(r"\* Time: [\d.e-]+ s a step, about [\d.e-]+ minutes", result.out)
    assert fingerprints(images) == before
    assert not list(tmp_path.iterdir())


def test_images_that_stay_in_a_file_train_the_same_weights(tiny, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MANY", 4)
    monkeypatch.setattr(data, "LARGE", 0)
    read = []
    monkeypatch.setattr(data.ImageFile, "__getitem__", lambda *args, get=data.ImageFile.__getitem__: read.append(1) or get(*args))
    trained_with(tiny=tiny, tmp_path=tmp_path)
    assert len(read) > 12
    ours, undisturbed = contents(tmp_path / RUN), contents(finished)
    assert ours["checkpoints/last.pt"]["encoder"] == undisturbed["checkpoints/last.pt"]["encoder"]
    for name in ("artifacts/train.pt", "artifacts/test.pt", "linear_accuracy.json", "metrics.jsonl"):
        assert ours[name] == undisturbed[name]


def test_labels_from_a_csv_file(tiny, images, finished, tmp_path):
    """The same images in folders that mean nothing, the labels in a file: the same result."""
    rows = ["path,label"]
    for split in ("train", "test"):
        for i, path in enumerate(sorted((images / split).rglob("*.png"))):
            to = tmp_path / "data" / split / f"{i:02}" / "é, x.png"
            to.parent.mkdir(parents=True)
            shutil.copy(path, to)
            rows.append(f'"{to.relative_to(tmp_path / "data")}",{path.parent.name}')
    file = tmp_path / "labels.csv"
    file.write_text("\n".join(rows) + "\n")
    trained_with("--data_dir", tmp_path / "data", "--labels", file, tiny=tiny, tmp_path=tmp_path)
    ours, undisturbed = contents(tmp_path / RUN), contents(finished)
    assert ours["checkpoints/last.pt"]["data"] == undisturbed["checkpoints/last.pt"]["data"]
    assert ours["linear_accuracy.json"] == undisturbed["linear_accuracy.json"]
    for text, words in (
        ("\n".join(rows[:-1]), "have no label"),
        ("a,b,c", "row 1 has 3 columns"),
        ("\n".join(row.replace("down", "across") for row in rows), "fewer than two labels"),
    ):
        file.write_text(text)
        result = run(*tiny, "--data_dir", tmp_path / "data", "--labels", file, "--log_folder", tmp_path / "no")
        assert (result.code, words in result.err) == (2, True), result.err
    file.unlink()
    assert "can't be read" in run(*tiny, "--data_dir", tmp_path / "data", "--labels", file, "--log_folder", tmp_path / "no").err


def test_no_float64_in_a_training_step_or_the_encoding(finished):
    """Apple's GPUs have none."""

    class Types(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                assert not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float64, function
            return out

    hp = experiment.read_hparams(finished)
    encoder, images = main.build_encoder(hp, None), torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    with Types():
        for losses in ("tcr", "vonmises"):
            hp.uniformity_loss = losses
            main.train_step(hp, encoder, main.build_optimizer(hp, encoder), images, data.generator(0, "t"), False)
        evaluate.encode(encoder, images, 2, views="augmented")
