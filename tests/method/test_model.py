import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from infra.errors import UsageError
from model import BACKBONES, Conv3x3, Encoder, build_backbone, fold_batch_norm


@pytest.mark.parametrize("arch", BACKBONES)
def test_shapes_and_unit_vectors(arch):
    encoder = Encoder(arch, h_dim=24, z_dim=12)
    backbone, feature_dim = build_backbone(arch)
    assert feature_dim == {"resnet18-mini": 256, "resnet18-tiny": 128}.get(
        arch, 2048 if "50" in arch else 512
    )
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
    seen, backbone = [], build_backbone(arch)[0]
    for module in (backbone.layer1, backbone.avgpool):
        module.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-2:]))
    backbone(torch.randn(2, 3, 32, 32))
    assert seen == [(stem, stem), (last, last)]


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("arch", ["resnet18-imagenet", "resnet18-tinyimagenet"])
def test_torchvision_loads_the_imagenet_backbone_strictly_and_computes_the_same(arch, size):
    """At 32 pixels layer3 works on 2x2 and layer4 on a single one, where our 3x3 convolution takes
    its short cut.
    """
    ours, theirs = build_backbone(arch)[0], torchvision.models.resnet18()
    theirs.fc = nn.Identity()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x, grads = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0)), []
    outputs = [network(x) for network in (ours, theirs)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)
    for network, output in zip((ours, theirs), outputs, strict=True):
        output.square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    assert (grads[0] - grads[1]).norm() < 1e-3 * grads[1].norm()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (2, 2), (3, 2)])
def test_few_pixels_are_convolved_as_many_are(size, stride):
    plain = nn.Conv2d(8, 6, 3, stride, padding=1, bias=False).double()
    x, grads = torch.randn(5, 8, *size, dtype=torch.float64, requires_grad=True), []
    ours = Conv3x3(plain)
    torch.testing.assert_close(ours(x), plain(x))
    for conv in (ours, plain):
        grads.append(torch.autograd.grad(conv(x).square().sum(), [x, plain.weight]))
    torch.testing.assert_close(*grads)
    ours.bias = nn.Parameter(torch.randn(6, dtype=torch.float64))
    torch.testing.assert_close(ours(x), plain(x) + ours.bias[:, None, None])


def test_heads():
    """h and z from the published layers, written out; batch norm and activation are options of both
    heads.
    """
    x = torch.randn(6, 3, 32, 32)
    encoder = Encoder(
        "resnet18-tiny", h_dim=10, z_dim=4, activation="tanh", batch_norm=False
    ).eval()
    (w0, b0), (w1, b1), (w2, b2) = (
        (m.weight, m.bias) for m in encoder.modules() if isinstance(m, nn.Linear)
    )
    h = torch.tanh(F.linear(encoder.backbone(x), w0, b0))
    z = F.linear(torch.tanh(F.linear(h, w1, b1)), w2, b2)
    torch.testing.assert_close(encoder(x)[0], h)
    torch.testing.assert_close(encoder(x)[1], z / z.norm(dim=1, keepdim=True))
    names = [
        type(m).__name__
        for m in [
            *Encoder("resnet18-tiny", 10, 4).features,
            *Encoder("resnet18-tiny", 10, 4).projection,
        ]
    ]
    assert names == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear"]


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
    folded, x = fold_batch_norm(encoder), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    assert encoder.training
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    for ours, plain in zip(folded(x), encoder.eval()(x), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-8, atol=1e-8)
    assert not any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in folded.modules())
    unnormalised = fold_batch_norm(Encoder("resnet18-tiny", 8, 4, batch_norm=False))
    assert unnormalised(x.float())[0].shape == (3, 8)


def test_wrong_names_are_refused():
    with pytest.raises(UsageError, match="resnet50"):
        build_backbone("resnet50")
    with pytest.raises(UsageError, match="gelu"):
        Encoder("resnet18-tiny", 8, 8, activation="gelu")
