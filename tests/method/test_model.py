"""The encoder against torchvision and timm, its parts, and weights to start from."""

import argparse
import copy
import sys

import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import RUN, refused, resume, run
from PIL import Image
from torch import nn
from torchvision.transforms import functional as TF

from encode import encode
from experiment import Run
from hparams import Hparams
from infra import files
from infra.device import generator
from infra.errors import UsageError
from model import (
    BACKBONES,
    Conv3x3,
    Encoder,
    build_backbone,
    fold_batch_norm,
    map_means,
    stage_dims,
    stage_maps,
)
from patches import Views
from weights import load_backbone, new_encoder

X = torch.randn(3, 3, 32, 32, generator=generator(0, "t"))


@pytest.mark.parametrize("arch", BACKBONES)
def test_shapes_and_unit_vectors(arch):
    encoder = Encoder(arch, h_dim=24, z_dim=12)
    backbone, feature_dim = build_backbone(arch)
    small = {"mini": 256, "tiny": 128}
    assert feature_dim == small.get(arch.split("-")[1], 2048 if "50" in arch else 512)
    for size in (32, 48):
        x = torch.randn(3, 3, size, size)
        assert backbone(x).shape == (3, feature_dim)
        h, z = encoder(x)
        assert h.shape == (3, 24)
        assert z.shape == (3, 12)
        torch.testing.assert_close(z.norm(dim=1), torch.ones(3))


@pytest.mark.parametrize(
    ("arch", "stem", "last"),
    [
        ("resnet18-cifar", 32, 4),
        ("resnet18-mini", 32, 8),
        ("resnet18-tiny", 32, 16),
        ("resnet18-imagenet", 8, 1),
    ],
)
def test_resolution_after_the_stem_and_before_the_pooling(arch, stem, last):
    sizes, backbone = [], build_backbone(arch)[0]
    for module in (backbone.layer1, backbone.avgpool):
        module.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[-2:]))
    backbone(torch.randn(2, 3, 32, 32))
    assert sizes == [(stem, stem), (last, last)]


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("arch", ["resnet18-imagenet", "resnet18-tinyimagenet"])
def test_torchvision_loads_the_imagenet_backbone_strictly_and_computes_the_same(arch, size):
    """At 32 pixels the feature maps of the last layers are 2x2 and 1x1, which Conv3x3 is for."""
    ours, theirs = build_backbone(arch)[0], torchvision.models.resnet18()
    theirs.fc = nn.Identity()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(4, 3, size, size, generator=generator(0, "t"))
    outputs = [network(x) for network in (ours, theirs)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)
    grads = []
    for network, output in zip((ours, theirs), outputs, strict=True):
        output.square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    assert (grads[0] - grads[1]).norm() < 1e-3 * grads[1].norm()


@pytest.mark.parametrize("name", ["resnet34", "resnet50"])
def test_resnets_equal_torchvisions(name):
    theirs = torchvision.models.get_model(name)
    theirs.fc = nn.Identity()
    ours, dim = build_backbone(f"{name}-imagenet")
    assert dim == ours.eval()(X).shape[1]
    for pool in ("stages", "blocks"):
        means = map_means(stage_maps(ours, X, pool))
        assert means.shape[1] == sum(stage_dims(ours, pool))
        torch.testing.assert_close(means[:, -dim:], ours(X))
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(X), theirs.eval()(X), rtol=1e-3, atol=1e-4)
    assert any(isinstance(module, Conv3x3) for module in ours.modules())
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    ours, _ = build_backbone(f"{name}-cifar")
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours.eval()(X[:1]), theirs.eval()(X[:1]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
def test_few_pixels_are_convolved_as_many_are(stride):
    plain = nn.Conv2d(8, 6, 3, stride, padding=1, bias=False).double()
    with_bias = copy.deepcopy(plain)
    with_bias.bias = nn.Parameter(torch.randn(6, dtype=torch.float64))
    for size in ((1, 1), (1, 2), (2, 1), (2, 2), (3, 2)):
        x = torch.randn(5, 8, *size, dtype=torch.float64, requires_grad=True)
        ours = Conv3x3(plain)
        torch.testing.assert_close(ours(x), plain(x))
        losses = [conv(x).square().sum() for conv in (ours, plain)]
        grads = [torch.autograd.grad(loss, [x, plain.weight]) for loss in losses]
        torch.testing.assert_close(*grads)
        ours.bias = with_bias.bias
        torch.testing.assert_close(ours(x), with_bias(x))


def test_heads():
    """h and z from the published layers, written out, with and without the options."""
    encoder = Encoder("resnet18-tiny", h_dim=10, z_dim=4, activation="tanh", batch_norm=False)
    encoder.eval()
    linear = [m for m in encoder.modules() if isinstance(m, nn.Linear)]
    (w0, b0), (w1, b1), (w2, b2) = ((m.weight, m.bias) for m in linear)
    h = torch.tanh(F.linear(encoder.backbone(X), w0, b0))
    z = F.linear(torch.tanh(F.linear(h, w1, b1)), w2, b2)
    torch.testing.assert_close(encoder(X)[0], h)
    torch.testing.assert_close(encoder(X)[1], z / z.norm(dim=1, keepdim=True))
    normalised = Encoder("resnet18-tiny", 10, 4)
    names = [type(m).__name__ for m in [*normalised.features, *normalised.projection]]
    assert names == "Linear BatchNorm1d ReLU Linear BatchNorm1d ReLU Linear".split()


@pytest.mark.parametrize("arch", BACKBONES)
def test_folding_batch_norm_changes_nothing_but_the_layers(arch):
    torch.manual_seed(0)
    encoder = Encoder(arch, h_dim=16, z_dim=8)
    for m in encoder.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):  # as after some training
            for tensor in (m.weight.data, m.running_var):
                tensor.uniform_(0.5, 2)
            for tensor in (m.bias.data, m.running_mean):
                tensor.uniform_(-1, 1)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    encoder.double()  # so that rounding, which differs between processors, does not count
    folded, x = fold_batch_norm(encoder), X.double()
    assert encoder.training
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    for ours, plain in zip(folded(x), encoder.eval()(x), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-8, atol=1e-8)
    assert not any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in folded.modules())


def test_without_batch_norm_there_is_nothing_to_fold_in_the_heads():
    unnormalised = fold_batch_norm(Encoder("resnet18-tiny", 8, 4, batch_norm=False))
    assert unnormalised(X)[0].shape == (3, 8)


def test_timms_resnet18_equals_torchvisions():
    timm = pytest.importorskip("timm")
    weights = torchvision.models.resnet18().state_dict()
    del weights["fc.weight"], weights["fc.bias"]
    ours, theirs = Encoder("timm/resnet18", 8, 4), Encoder("resnet18-imagenet", 8, 4)
    for encoder in (ours, theirs):
        encoder.backbone.load_state_dict(weights)
        encoder.features.load_state_dict(theirs.features.state_dict())
    torch.testing.assert_close(ours.eval()(X)[0], theirs.eval()(X)[0], rtol=1e-4, atol=1e-5)
    model = timm.create_model("resnet18", num_classes=0).eval()
    model.load_state_dict(ours.backbone.state_dict())
    torch.testing.assert_close(ours.backbone(X), model(X))


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "mobilenetv3_small_050"])
def test_models_of_timm_encode_as_they_are(name):
    """Their batch norms, which may include the activation, are not folded.

    A transformer is built for the size of the patches.
    """
    pytest.importorskip("timm")
    encoder = Encoder(f"timm/{name}", 8, 4)
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8, generator=generator(1, "t"))
    # Moves the statistics of batch norm from their first values.
    encoder(torch.randn(16, 3, 32, 32))
    embeddings = encode(encoder, images, Views(1, "grid"), lambda step: None)["embeddings"]
    crop = images[:, :, 8:24, 8:24].float() / 127.5 - 1
    x = F.interpolate(crop, size=(32, 32), mode="bilinear")
    torch.testing.assert_close(embeddings, encoder.eval()(x)[0], rtol=1e-3, atol=1e-4)


def test_a_model_of_timm_from_start_to_export(tiny, tmp_path):
    for package in ("timm", "safetensors", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnxruntime

    exp_dir = tmp_path / RUN
    options = "--arch timm/resnet10t --n_epochs 1 --log_folder".split()
    assert run(*tiny, *options, tmp_path).code == 0
    result = resume(exp_dir)
    assert result.code == 0
    assert "top-1" in result.out
    for kind in ("onnx", "onnx --head", "safetensors --head", "torchvision"):
        assert run("export", "--exp_dir", exp_dir, "--format", *kind.split()).code == 0
    hp = Run(exp_dir).read_hparams()
    encoder = Encoder(hp.arch, hp.h_dim, hp.z_dim, size=16)
    encoder.load_state_dict(files.read_pt(exp_dir / "checkpoints" / "last.pt")["encoder"])
    encoder.eval()
    x = X[:, :, :16, :16].contiguous()
    for name, expected in (("backbone", encoder.backbone(x)), ("encoder", encoder(x)[0])):
        session = onnxruntime.InferenceSession(exp_dir / "export" / f"{name}.onnx")
        (output,) = session.run(None, {"images": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-3, atol=1e-4)
    assert fold_batch_norm(encoder).backbone.bn1.weight is not None


def test_pretrained_weights_without_training_encode_as_timm_does_and_training_goes_on_from_them(
    tiny, images, tmp_path
):
    """The recipe of the guide, with a file in the place of a download; against timm itself."""
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet10t", num_classes=0).eval()
    torch.save(model.state_dict(), tmp_path / "theirs.pt")
    options = f"--arch timm/resnet10t --weights {tmp_path}/theirs.pt --n_epochs 0 --image_size 32"
    options += f" --input_size 16 --eval_views whole --emb_pool backbone --log_folder {tmp_path}"
    result = run(*tiny, *options.split())
    assert (result.code, result.err) == (0, "")
    content = files.read_pt(tmp_path / RUN / "artifacts" / "test.pt")
    pixels = torch.stack([TF.pil_to_tensor(read(images / path)) for path in content["paths"]])
    with torch.no_grad():
        expected = model(pixels / 127.5 - 1)
    torch.testing.assert_close(content["embeddings"], expected, rtol=1e-3, atol=1e-4)

    options = f"--exp_name on --config_from {tmp_path / RUN} --n_epochs 1 --log_folder {tmp_path}"
    options += f" --weights {tmp_path / RUN}/checkpoints/last.pt"
    result = run("train", *options.split())
    n = len(model.state_dict())
    assert f"{n} of the {n} tensors of the backbone are from" in result.out
    assert (result.code, "===> Training" in result.out) == (0, True)


def read(path):
    """Return an image of 16 pixels at 32, as Pillow does it."""
    return Image.open(path).resize((32, 32), Image.Resampling.BICUBIC)


def test_wrong_names_and_settings_are_refused(monkeypatch):
    pytest.importorskip("timm")
    for arguments, words in (
        (["resnet50"], "resnet50"),
        (["timm/none"], "has no model 'none'"),
        (["timm/vit_tiny_patch16_224", 8], "can't be used for 8 pixels"),
    ):
        with pytest.raises(UsageError, match=words):
            build_backbone(*arguments)
    with pytest.raises(UsageError, match="gelu"):
        Encoder("resnet18-tiny", 8, 8, activation="gelu")
    for values, words in (
        ({"weights": "timm"}, "weights timm"),
        ({"arch": "timm/resnet18", "emb_pool": "stages"}, "emb_pool"),
        ({"arch": "timm/resnet18", "stage_loss_weight": 1}, "stage_loss_weight"),
        ({"arch": "resnet99"}, "or timm/NAME"),
    ):
        with pytest.raises(UsageError, match=words):
            Hparams(**values)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match="pip install timm"):
        build_backbone("timm/resnet18")


def test_weights_to_start_from(tmp_path, caplog):
    theirs = torchvision.models.resnet18()
    weights = theirs.state_dict()
    torch.save(weights, tmp_path / "theirs.pt")
    caplog.set_level("INFO")
    whole = Encoder("resnet18-imagenet", 8, 4)
    load_backbone(whole, tmp_path / "theirs.pt")
    loaded = whole.backbone.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in loaded.items())
    assert "120 of the 120 tensors" in caplog.text
    assert "not used: fc.weight (1000, 512), fc.bias (1000,)" in caplog.text
    caplog.clear()
    small = Encoder("resnet18-cifar", 8, 4)
    first = copy.deepcopy(small.backbone.conv1.weight)
    load_backbone(small, tmp_path / "theirs.pt")
    assert torch.equal(small.backbone.conv1.weight, first)
    assert torch.equal(small.backbone.layer4[1].conv2.weight, theirs.layer4[1].conv2.weight)
    assert "119 of the 120 tensors" in caplog.text
    assert "random, since it has none that fit: conv1.weight" in caplog.text
    assert "conv1.weight (64, 3, 7, 7)" in caplog.text

    torch.save({"other": torch.ones(2)}, tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("no weights")
    not_finite = {name: value * torch.nan for name, value in weights.items()}
    torch.save(not_finite, tmp_path / "nan.pt")
    for name, words in (
        ("other", "no tensor of it fits"),
        ("text", "can't be read"),
        ("none", "can't be read"),
        ("nan", "not finite"),
    ):
        with pytest.raises(UsageError, match=words):
            load_backbone(small, tmp_path / f"{name}.pt")


@pytest.mark.parametrize(
    ("wrapped", "prefix"),
    [
        (lambda sd, other: under("module.", sd), "module."),
        (lambda sd, other: {"epoch": 3, "model": sd, "optimizer": {"state": {0: other}}}, "model."),
        (  # MoCo
            lambda sd, other: {
                "state_dict": under("module.encoder_q.", sd) | under("module.encoder_k.", other)
            },
            "state_dict.module.encoder_q.",
        ),
        (  # DINO
            lambda sd, other: {
                "student": under("module.backbone.", other),
                "teacher": under("backbone.", sd),
            },
            "teacher.backbone.",
        ),
        (  # solo-learn, by Lightning
            lambda sd, other: {
                "state_dict": under("backbone.", sd) | {"classifier.weight": torch.ones(2, 2)},
                "hyper_parameters": {"lr": 1},
            },
            "state_dict.backbone.",
        ),
    ],
)
def test_weights_in_the_files_of_other_programs(tmp_path, caplog, wrapped, prefix):
    caplog.set_level("INFO")
    ours, sd, other = (Encoder("resnet18-tiny", 8, 4).backbone.state_dict() for _ in range(3))
    torch.save(wrapped(sd, other), tmp_path / "theirs.pth")
    encoder = Encoder("resnet18-tiny", 8, 4)
    load_backbone(encoder, tmp_path / "theirs.pth")
    assert all(
        torch.equal(value, sd[name]) for name, value in encoder.backbone.state_dict().items()
    )
    assert f"begin with {prefix}\n" in caplog.text
    assert f"{len(ours)} of the {len(ours)} tensors" in caplog.text


def under(prefix, weights):
    """Return a state dict whose names have this prefix."""
    return {prefix + name: value for name, value in weights.items()}


def test_files_of_weights_that_can_not_be_taken_say_what_is_in_them(tmp_path):
    encoder = Encoder("resnet18-tiny", 8, 4)
    # torch.nn.Sequential of the layers of a resnet: only a batch norm has a name that fits.
    layers = {"net.0.weight": torch.ones(64, 3, 7, 7), "net.4.0.bn1.weight": torch.ones(64)}
    for content, words in (
        ({"state_dict": layers}, "file state_dict.net.0.weight, state_dict.net.4.0.bn1.weight"),
        ({"epoch": 1, "args": {"lr": 2}}, "is not a state dict: its keys are epoch, args"),
        ([1], "is not a state dict"),
        ({"student": {}, "args": argparse.Namespace(lr=1)}, "holds argparse.Namespace, .* student"),
    ):
        torch.save(content, tmp_path / "theirs.pth")
        with pytest.raises(UsageError, match=words) as error:
            load_backbone(encoder, tmp_path / "theirs.pth")
        assert str(error.value).isprintable()
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(UsageError, match=r"it is not a file of torch.save"):
        load_backbone(encoder, tmp_path / "text.pth")


def test_pretrained_weights_of_timm_that_can_not_be_downloaded(monkeypatch):
    timm = pytest.importorskip("timm")
    create = timm.create_model

    def offline(name, pretrained=False, **options):
        if pretrained:
            raise OSError("we couldn't connect to the hub")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    hp = Hparams(arch="timm/resnet10t", weights="timm", h_dim=8, z_dim=4)
    with pytest.raises(UsageError, match=r"weights timm: .*couldn't connect.*the network") as error:
        new_encoder(hp)
    assert "pixels" not in str(error.value)
    too_small = Hparams(arch="timm/vit_tiny_patch16_224", weights="timm", input_size=8)
    with pytest.raises(UsageError, match="can't be used for 8 pixels"):
        new_encoder(too_small)


def test_a_run_that_starts_from_the_export_or_the_checkpoint_of_another(
    tiny, finished, copy, tmp_path
):
    pytest.importorskip("safetensors")
    theirs = files.read_pt(finished / "checkpoints" / "last.pt")["encoder"]
    for kind in ("torchvision", "safetensors"):
        assert run("export", "--exp_dir", copy, "--format", kind).code == 0
    command = [*tiny, *"--n_epochs 0 --seed 7 --log_folder".split()]
    for file in ("export/backbone.pt", "export/backbone.safetensors", "checkpoints/last.pt"):
        logs = tmp_path / file
        result = run(*command, logs, "--weights", copy / file)
        assert result.code == 0, result.err
        assert "tensors of the backbone are from" in result.out
        assert "random" not in result.out
        ours = files.read_pt(logs / f"{RUN}_seed7" / "checkpoints" / "last.pt")["encoder"]
        for name in ours:
            if "weight" in name and ours[name].ndim > 1:
                assert torch.equal(ours[name], theirs[name]) == name.startswith("backbone.")
    none = tmp_path / "none"
    assert refused(run(*command, none, "--weights", none), 2, "weights")
