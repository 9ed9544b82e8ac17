"""Stage 1: the steps, and what is kept of them."""

import math
import re
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import RUN, contents, refused, resume, run, trained_with
from torch.utils._python_dispatch import TorchDispatchMode

import data
import encode
import forecast
import loss
import train
from experiment import Run
from hparams import Hparams
from images import cache as image_cache
from infra import files
from infra.device import generator
from lars import LARS
from model import Encoder
from patches import Views, sample_patches
from weights import new_encoder


def plain_optimizer(hp, encoder):
    """Return torch's SGD or our LARS, with the settings of the paper."""
    shared = {"momentum": 0.9, "nesterov": True, "weight_decay": hp.weight_decay}
    if hp.optimizer == "sgd":
        return torch.optim.SGD(encoder.parameters(), 1, **shared)
    return LARS(encoder.parameters(), 1, eta=0.005, clip=True, **shared)


def weighted(hp, z):
    """Return the sum of the two losses of embeddings (P, B, d), by their weights."""
    invariance, uniformity = plain_losses(hp, z)
    return hp.invariance_loss_weight * invariance + hp.uniformity_loss_weight * uniformity


def plain_losses(hp, z):
    """Return the two losses of embeddings (P, B, d)."""
    if hp.bags == 2:  # patches 0 and 1 of an image as those of two images, and so on
        z = torch.stack([torch.cat([z[0], z[1]]), torch.cat([z[2], z[3]])])
    # The invariance first: the order in which autograd adds gradients decides their last bits.
    invariance = loss.invariance_loss(z)
    if hp.uniformity_loss == "vonmises":
        return invariance, loss.vonmises_loss(z)
    if hp.uniformity_loss == "contrastive":
        return invariance, loss.contrastive_loss(z, hp.temperature)
    return invariance, loss.tcr_loss(z, hp.tcr_eps)


def plain_projections(hp, encoder, x):
    """Return z of each stage with a projection, the last one last, of patches (P, B, 3, S, S)."""
    net = encoder.backbone
    if not hp.stage_loss_weight:
        z = [encoder(x.flatten(0, 1))[1]]
    else:
        first = net.layer1(net.relu(net.bn1(net.conv1(x.flatten(0, 1)))))
        last = net.layer2(first).mean((2, 3))
        (head,) = encoder.stage_heads
        outputs = head(first.mean((2, 3))), encoder.projection(encoder.features(last))
        z = [F.normalize(output, dim=-1) for output in outputs]
    return [stage.view(*x.shape[:2], -1) for stage in z]  # (P, B, d) each


def plain_loop(hp):
    """Return the weights after epochs of three steps on a subset of 13 images, written out."""
    train_set = data.load_images("folder", hp.data_dir, True, 16)
    subset = data.balanced_subset(train_set.labels, 24, 13, generator(hp.seed, "subset"))
    pixels = train_set.images[subset]
    encoder = new_encoder(hp).to(memory_format=torch.channels_last)
    optimizer = plain_optimizer(hp, encoder)
    n_total = math.ceil(3 * hp.n_epochs)
    for t in range(n_total):
        epoch, step = divmod(t, 3)
        decay = (1 + math.cos(math.pi * t / n_total)) / 2 if hp.schedule == "cosine" else 1
        optimizer.param_groups[0]["lr"] = hp.lr * decay
        order = torch.randperm(13, generator=generator(hp.seed, "order", epoch))
        images = pixels[order[4 * step : 4 * step + 4]]
        rng = generator(hp.seed, "patches", epoch, step)
        x = sample_patches(images, hp.n_patches, rng, hp.input_size or 16)
        *earlier, last = plain_projections(hp, encoder, x)
        total = weighted(hp, last)
        for z in earlier:
            total = total + hp.stage_loss_weight * weighted(hp, z)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    return encoder.state_dict()


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--optimizer sgd --lr 0.01 --weight_decay 0.1",
        "--uniformity_loss vonmises --uniformity_loss_weight 30",
        "--uniformity_loss contrastive --temperature 0.5 --invariance_loss_weight 10",
        "--tcr_eps 0.5 --invariance_loss_weight 3 --weight_decay 0.5 --n_patches 3 --seed 7",
        "--n_patches 4 --bags 2 --input_size 8 --n_epochs 1.5",
        "--stage_loss_weight 0.3",
        "--schedule constant",
    ],
)
def test_training_is_what_a_plain_loop_does(tiny, tmp_path, options):
    """Bit for bit, from the images and the seed alone."""
    trained_with(*options.split(), "--n_images", "13", tiny=tiny, tmp_path=tmp_path)
    exp_dir = next(tmp_path.glob("default__*"))
    expected = plain_loop(Run(exp_dir).read_hparams())
    trained = files.read_pt(exp_dir / "checkpoints" / "last.pt")["encoder"]
    assert all(torch.equal(trained[name], value) for name, value in expected.items())


@pytest.mark.parametrize("uniformity_loss", loss.UNIFORMITY)
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_step_never_waits_for_the_device(device, uniformity_loss, monkeypatch):
    """The device "meta" has no values to read; on the CPU, the functions that read one fail."""

    def refuse(*args):
        raise AssertionError("a value was read")

    if device == "meta":  # which has no autocast
        monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    hp = Hparams(n_patches=3, h_dim=8, z_dim=4, uniformity_loss=uniformity_loss)
    for arch in ("resnet18-tiny", "resnet18-imagenet"):
        encoder = Encoder(arch, 8, 4).to(device)
        step = train.build_step(hp, encoder, train.build_optimizer(hp, encoder), bf16=False)
        images = torch.zeros(8, 3, 32, 32, dtype=torch.uint8, device=device)
        with monkeypatch.context() as patch:
            for name in ("item", "__bool__", "__float__", "__int__", "numpy"):
                patch.setattr(torch.Tensor, name, refuse)
            metrics = [step(images, generator(0, "t", step=i)) for i in range(2)]
        assert metrics[1].device.type == device
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.zeros(2, device="meta").sum().item()


@pytest.mark.parametrize(
    ("max_patches", "expected"), [(None, [8]), (8, [8]), (7, [4, 4] * 2), (3, [3, 3, 2] * 2)]
)
def test_max_patches_bounds_what_is_in_the_network_at_once(max_patches, expected, monkeypatch):
    """With a bound each patch passes twice: without a graph, and then with one.

    Patches are sampled chunk by chunk, and are the same as all at once.
    """
    rng = torch.manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=rng)
    whole = sample_patches(images, 2, generator(0, "t")).flatten(0, 1)  # (2, 4, ...) to (8, ...)
    chunks = []

    def record(conv, args):
        chunks.append(args[0])

    hp = Hparams(n_patches=2, h_dim=8, z_dim=4, max_patches=max_patches)
    encoder = Encoder("resnet18-tiny", 8, 4)
    encoder.backbone.conv1.register_forward_pre_hook(record)
    render, rendered = train.render, []

    def render_and_count(*args, **kwargs):
        x = render(*args, **kwargs)
        rendered.append(len(x))
        return x

    monkeypatch.setattr(train, "render", render_and_count)
    step = train.build_step(hp, encoder, train.build_optimizer(hp, encoder), bf16=False)
    step(images, generator(0, "t"))
    assert [len(x) for x in chunks] == rendered == expected
    n_passes = 1 if expected == [8] else 2
    torch.testing.assert_close(
        torch.cat(chunks), whole.repeat(n_passes, 1, 1, 1), rtol=0, atol=1e-6
    )


def test_the_memory_of_a_step_is_forecast(tiny, tmp_path):
    """What autograd keeps of a patch, counted by hand for an encoder without a backbone."""
    encoder = Encoder("resnet18-tiny", h_dim=32, z_dim=16, activation="tanh")
    encoder.backbone = torch.nn.Flatten()
    encoder.features[0] = torch.nn.Linear(3 * 16 * 16, 32)
    state = {name: value.clone() for name, value in encoder.state_dict().items()}
    seven, six = (forecast.saved_bytes(encoder, n, 16, False) for n in (7, 6))
    patch = seven - six
    # The input of each layer, the output of tanh, which is the next one's input, and the norm of z
    # and its clamp.
    assert 4 * (768 + 4 * 32 + 16) <= patch <= 4 * (768 + 4 * 32 + 2 * 16 + 4)
    assert all(torch.equal(state[name], value) for name, value in encoder.state_dict().items())
    result = run(*tiny, "--log_folder", tmp_path)
    line = r"^\* Memory: about \d+\.\d GB for a step of 8 patches; \d+\.\d GB are there$"
    assert re.search(line, result.out, re.M)
    assert re.search(r"^memory           [1-9]?\d\.\d\d GB at most", result.out, re.M)
    assert result.err == ""


def test_a_step_that_does_not_fit_into_memory_is_refused_and_a_new_run_takes_chunks_that_fit(
    tiny, tmp_path, monkeypatch
):
    """With 4 GB for each patch, and 28 GB for all: 0.7 of that are 4 patches and the weights."""
    monkeypatch.setattr(forecast, "step_memory", lambda *args: forecast.StepMemory(4e9, 1e9, 0, 0))
    monkeypatch.setattr(forecast, "total_memory", lambda device: 28e9)
    options = [*tiny, "--n_epochs", "1", "--log_folder", tmp_path]
    dry = run(*options, "--dry_run")
    assert dry.code == 0
    assert "max_patches: 4\n" in dry.out
    words = (
        "a step of 8 patches takes about 33.0 GB, and 28.0 GB are there: set max_patches 4, or "
        "lower bs or n_patches\n"
    )
    assert refused(run(*options, "--max_patches", "none"), 2, words)
    assert not any(tmp_path.iterdir())

    result = run(*options)
    assert result.code == 0
    assert "* max_patches: 4 of the 8 patches of a step are in the network at once" in result.out
    assert "about 17.0 GB for a step of 4 patches" in result.out
    monkeypatch.setattr(forecast, "total_memory", lambda device: 100e9)
    assert resume(tmp_path / RUN).code == 0
    assert run(*options).code == 0
    assert Run(tmp_path / RUN).read_hparams().max_patches == 4

    monkeypatch.setattr(forecast, "total_memory", lambda device: 2e9)
    assert resume(tmp_path / RUN).code == 0  # it trains no more
    assert refused(
        resume(tmp_path / RUN, "--n_epochs 2"), 2, "take a smaller network or input_size"
    )
    assert Run(tmp_path / RUN).read_hparams().n_epochs == 1


def test_compile_trains_the_same_weights(tiny, finished, tmp_path, monkeypatch):
    """Without the compiler, which needs a minute: the network is passed to it, and saved."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(module) or module)
    trained_with("--compile", tiny=tiny, tmp_path=tmp_path)
    assert [type(module) for module in compiled] == [Encoder]
    ours, plain = contents(tmp_path / RUN), contents(finished)
    assert ours["artifacts/train.pt"] == plain["artifacts/train.pt"]


def test_no_epochs_leave_the_seeded_random_encoder(tiny, tmp_path):
    trained_with("--n_epochs", "0", tiny=tiny, tmp_path=tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        other = Encoder("resnet18-tiny", 8, 4).state_dict()
    rng = torch.get_rng_state()
    fresh = new_encoder(Run(tmp_path / RUN).read_hparams()).state_dict()
    assert torch.equal(rng, torch.get_rng_state())
    saved = files.read_pt(tmp_path / RUN / "checkpoints" / "last.pt")["encoder"]
    assert all(torch.equal(saved[name], fresh[name]) for name in fresh)
    assert not torch.equal(other["backbone.conv1.weight"], fresh["backbone.conv1.weight"])


def test_evaluations_on_the_way_change_nothing_else(tiny, finished, tmp_path):
    result = trained_with("--eval_freq", "5", tiny=tiny, tmp_path=tmp_path)
    line = r"\| kNN \d+\.\d\d% rank \d+\.\d alignment \d\.\d{3} uniformity -\d\.\d\d"
    assert len(re.findall(line, result.out)) == 2
    ours, plain = contents(tmp_path / RUN), contents(finished)
    for name in ("artifacts/train.pt", "probe.pt"):
        assert ours[name] == plain[name]
    lines = ours["metrics.jsonl"]
    steps = [(line["epoch"], line["step"]) for line in lines if "knn_top1" in line]
    assert steps == [(0, 5), (1, 4)]
    assert [line for line in lines if "knn_top1" not in line] == plain["metrics.jsonl"]


def test_pretrained_projection_is_loaded_and_frozen(tiny, finished, tmp_path):
    source = finished / "checkpoints" / "0.pt"
    trained_with("--pretrained_proj", source, "--seed", "1", tiny=tiny, tmp_path=tmp_path)
    last = tmp_path / f"{RUN}_seed1" / "checkpoints" / "last.pt"
    theirs, ours = (files.read_pt(path)["encoder"] for path in (source, last))
    for name in theirs:
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            assert torch.equal(theirs[name], ours[name]) == name.startswith("projection."), name

    empty = tmp_path / "none.pt"
    files.write_pt(empty, {"encoder": {"backbone.conv1.weight": torch.ones(1)}})
    command = [*tiny, "--log_folder", tmp_path / "other", "--pretrained_proj"]
    assert refused(run(*command, empty), 2, "holds no projection")
    assert refused(run(*command, tmp_path / "missing.pt"), 2, "is not a file")
    assert refused(run(*command, source, "--z_dim", "5"), 2, "z_dim")
    assert not (tmp_path / "other").exists()


def test_images_that_stay_in_a_file_train_the_same_weights(tiny, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(image_cache, "MANY", 4)
    monkeypatch.setattr(image_cache, "LARGE", 0)
    read = []
    get = image_cache.ImageFile.__getitem__
    monkeypatch.setattr(
        image_cache.ImageFile, "__getitem__", lambda *args: read.append(1) or get(*args)
    )
    trained_with(tiny=tiny, tmp_path=tmp_path)
    assert len(read) > 12
    ours, undisturbed = contents(tmp_path / RUN), contents(finished)
    assert ours["checkpoints/last.pt"]["encoder"] == undisturbed["checkpoints/last.pt"]["encoder"]
    assert ours["metrics.jsonl"] == undisturbed["metrics.jsonl"]
    for name in ("artifacts/train.pt", "artifacts/test.pt", "linear_accuracy.json"):
        for result in (ours[name], undisturbed[name]):
            del result["key"]  # the fingerprint of images in a file is another one
        assert ours[name] == undisturbed[name]


def test_no_float64_in_a_training_step_or_the_encoding(finished):
    """Apple's GPUs have none."""

    class Types(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for value in torch.utils._pytree.tree_leaves(out):
                assert getattr(value, "dtype", None) != torch.float64, function
            return out

    hp = Run(finished).read_hparams()
    encoder = new_encoder(hp)
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    with Types():
        for uniformity_loss in loss.UNIFORMITY:
            step_hp = replace(hp, uniformity_loss=uniformity_loss)
            optimizer = train.build_optimizer(hp, encoder)
            step = train.build_step(step_hp, encoder, optimizer, bf16=False)
            step(images, generator(0, "t"))
        encode.encode(encoder, images, Views(2), partial(generator, 0, "t"))


def test_a_slow_machine_shows_losses_between_the_reports_and_records_nothing_more(
    tiny, finished, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, "SHOW_EVERY", -1.0)
    result = trained_with(tiny=tiny, tmp_path=tmp_path)
    losses = r"^epoch \d step \d/6 \| sim -?\d\.\d{4} uniformity "
    time_left = r"^\* Training will take about \d\d:\d\d from here on$"
    assert len(re.findall(losses, result.out, re.M)) == 12
    assert len(re.findall(time_left, result.out, re.M)) == 1
    assert contents(tmp_path / RUN) == contents(finished)


def test_a_long_training_on_a_cpu_names_what_is_quicker(caplog):
    for seconds, name, named in ((3601, "cpu", True), (3599, "cpu", False), (10**6, "cuda", False)):
        caplog.clear()
        train.log_end(seconds, torch.device(name))
        assert ("--preset laptop" in caplog.text) == named
