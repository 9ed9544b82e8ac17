"""Backbones beside resnet18, and weights to start from, against torchvision and timm."""

import copy

import pytest
import torch
import torchvision
from helpers import RUN, run
from torch import nn

from encode import encode
from experiment import Run
from hparams import Hparams
from infra import files
from infra.device import generator
from infra.errors import UsageError
from model import Conv3x3, Encoder, build_backbone, fold_batch_norm, stage_dim, stage_means
from patches import Views
from weights import load_backbone

X = torch.randn(3, 3, 32, 32, generator=generator(0, "t"))


@pytest.mark.parametrize("name", ["resnet34", "resnet50"])
def test_resnets_equal_torchvisions(name):
    theirs = torchvision.models.get_model(name)
    theirs.fc = nn.Identity()
    ours, dim = build_backbone(f"{name}-imagenet")
    assert dim == ours.eval()(X).shape[1] == stage_means(ours, X).shape[1] - stage_dim(ours) + dim
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(X), theirs.eval()(X), rtol=1e-3, atol=1e-4)
    assert any(isinstance(module, Conv3x3) for module in ours.modules())
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    ours, _ = build_backbone(f"{name}-cifar")
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours.eval()(X[:1]), theirs.eval()(X[:1]), rtol=1e-3, atol=1e-4)


def test_timms_resnet18_equals_torchvisions():
    timm = pytest.importorskip("timm")
    weights = torchvision.models.resnet18().state_dict()
    ours, theirs = Encoder("timm/resnet18", 8, 4), Encoder("resnet18-imagenet", 8, 4)
    for encoder in (ours, theirs):
        encoder.backbone.load_state_dict(
            {k: v for k, v in weights.items() if not k.startswith("fc.")}
        )
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
    encoder(
        torch.randn(16, 3, 32, 32)
    )  # moves the statistics of batch norm from their first values
    found = encode(encoder, images, Views(1, "grid"), lambda step: None)["embeddings"]
    crop = images[:, :, 8:24, 8:24].float() / 127.5 - 1
    x = nn.functional.interpolate(crop, size=(32, 32), mode="bilinear")
    torch.testing.assert_close(found, encoder.eval()(x)[0], rtol=1e-3, atol=1e-4)


def test_what_does_not_fit_is_one_line(monkeypatch):
    pytest.importorskip("timm")
    with pytest.raises(UsageError, match="has no model 'none'"):
        build_backbone("timm/none")
    with pytest.raises(UsageError, match="can't be used for 8 pixels"):
        build_backbone("timm/vit_tiny_patch16_224", 8)
    for values, words in (
        ({"weights": "timm"}, "weights timm"),
        ({"arch": "timm/resnet18", "emb_pool": "stages"}, "emb_pool"),
    ):
        with pytest.raises(UsageError, match=words):
            Hparams(**values)
    with pytest.raises(UsageError, match="or timm/NAME"):
        Hparams(arch="resnet99")
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(UsageError, match="pip install timm"):
        build_backbone("timm/resnet18")


def test_weights_to_start_from(tmp_path, caplog):
    theirs = torchvision.models.resnet18()
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    caplog.set_level("INFO")
    whole = Encoder("resnet18-imagenet", 8, 4)
    load_backbone(whole, tmp_path / "theirs.pt")
    assert all(
        torch.equal(value, theirs.state_dict()[name])
        for name, value in whole.backbone.state_dict().items()
    )
    assert (
        "120 of the 120 tensors" in caplog.text
        and "not used: fc.weight (1000, 512), fc.bias (1000,)" in caplog.text
    )
    caplog.clear()
    small = Encoder("resnet18-cifar", 8, 4)
    first = copy.deepcopy(small.backbone.conv1.weight)
    load_backbone(small, tmp_path / "theirs.pt")
    assert torch.equal(small.backbone.conv1.weight, first)
    assert torch.equal(small.backbone.layer4[1].conv2.weight, theirs.layer4[1].conv2.weight)
    assert (
        "119 of the 120 tensors" in caplog.text
        and "random, since it has none that fit: conv1.weight" in caplog.text
    )
    assert "conv1.weight (64, 3, 7, 7)" in caplog.text

    torch.save({"other": torch.ones(2)}, tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("no weights")
    torch.save(
        {name: value * torch.nan for name, value in theirs.state_dict().items()},
        tmp_path / "nan.pt",
    )
    faults = {
        "other": "no tensor of it fits",
        "text": "can't be read",
        "none": "can't be read",
        "nan": "not finite",
    }
    for name, words in faults.items():
        with pytest.raises(UsageError, match=words):
            load_backbone(small, tmp_path / f"{name}.pt")


def test_a_run_that_starts_from_the_export_or_the_checkpoint_of_another(
    tiny, finished, copy, tmp_path
):
    pytest.importorskip("safetensors")
    theirs = files.read_pt(finished / "checkpoints" / "last.pt")["encoder"]
    for kind in ("torchvision", "safetensors"):
        assert run("export", "--exp_dir", copy, "--format", kind).code == 0
    for i, name in enumerate(
        ("export/backbone.pt", "export/backbone.safetensors", "checkpoints/last.pt")
    ):
        path = copy / name
        result = run(
            *tiny,
            "--weights",
            path,
            "--n_epochs",
            "0",
            "--seed",
            "7",
            "--log_folder",
            tmp_path / str(i),
        )
        assert result.code == 0, result.err
        assert "tensors of the backbone are from" in result.out and "random" not in result.out
        ours = files.read_pt(tmp_path / str(i) / f"{RUN}_seed7" / "checkpoints" / "last.pt")[
            "encoder"
        ]
        assert all(
            torch.equal(ours[name], theirs[name]) == name.startswith("backbone.")
            for name in ours
            if "weight" in name and ours[name].ndim > 1
        )
    result = run(*tiny, "--weights", tmp_path / "none", "--log_folder", tmp_path / "none")
    assert (result.code, result.err.count("\n")) == (2, 1) and "weights" in result.err


def test_a_model_of_timm_from_start_to_export(tiny, tmp_path):
    for package in ("timm", "safetensors", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnxruntime

    arguments = [*tiny, "--arch", "timm/resnet10t", "--n_epochs", "1", "--log_folder", tmp_path]
    assert run(*arguments).code == 0
    result = run("resume", "--exp_dir", tmp_path / RUN)
    assert result.code == 0 and "top-1" in result.out
    for options in (["onnx"], ["onnx", "--head"], ["safetensors", "--head"], ["torchvision"]):
        assert run("export", "--exp_dir", tmp_path / RUN, "--format", *options).code == 0
    hp, checkpoint = (
        Run(tmp_path / RUN).read_hparams(),
        files.read_pt(tmp_path / RUN / "checkpoints" / "last.pt"),
    )
    encoder = Encoder(hp.arch, hp.h_dim, hp.z_dim, size=16)
    encoder.load_state_dict(checkpoint["encoder"])
    x = X[:, :, :16, :16].contiguous()
    for name, expected in (("backbone", encoder.eval().backbone(x)), ("encoder", encoder(x)[0])):
        session = onnxruntime.InferenceSession(tmp_path / RUN / "export" / f"{name}.onnx")
        (found,) = session.run(None, {"images": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-4)
    assert fold_batch_norm(encoder).backbone.bn1.weight is not None
