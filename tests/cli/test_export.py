"""The encoder in foreign libraries, and the embeddings of any folder."""

import csv
import importlib.util
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import ONE_THREAD, RUN, edit, fingerprints, refused, run
from PIL import Image
from torch import nn
from torchvision.models import resnet

import emp_ssl
from experiment import Run
from images.pixels import FITS, read_image
from infra import files
from infra.device import generator
from infra.errors import RunError, UsageError
from tools import embed, export
from weights import build_encoder


@pytest.fixture(scope="module")
def imagenet(tiny, tmp_path_factory):
    """The folder of a run with the ImageNet stem."""
    logs = tmp_path_factory.mktemp("imagenet")
    options = "--arch resnet18-imagenet --n_epochs 0.5 --input_size 32 --n_eval_epochs 1".split()
    assert run(*tiny, *options, "--log_folder", logs).code == 0
    return logs / RUN


def exported(exp_dir, kind, *more):
    """Export; return the path of the weights, and the description beside it."""
    result = run("export", "--exp_dir", exp_dir, "--format", kind, *more)
    assert result.code == 0, result.err
    (part,) = more or ("--backbone",)
    stem = {"--head": "encoder"}.get(part, part[2:])
    path = exp_dir / "export" / (stem + export.EXTENSIONS[kind])
    assert path.exists()
    assert path.with_name(f"{stem}_{kind}.py").exists()
    return path, files.read_json(path.with_name(f"{stem}_{kind}.json"))


def load_code(path):
    """Import a Python file by its path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outputs(exp_dir, x):
    """Return what the run's own encoder makes of x: the output of the backbone, and h."""
    encoder = build_encoder(Run(exp_dir).load("cpu")).eval()
    with torch.no_grad():
        return encoder.backbone(x), encoder(x)[0]


def head():
    """Return a feature layer as --head exports it."""
    return nn.Sequential(nn.Linear(512, 8), nn.BatchNorm1d(8), nn.ReLU())


def same(module, x, expected):
    """Assert that a module computes this.

    To 1e-5 of the greatest: the running statistics of so few steps leave features of some
    thousands.
    """
    atol = 1e-5 * expected.abs().max().item()
    with torch.no_grad():
        torch.testing.assert_close(module.eval()(x), expected, rtol=0, atol=atol)


X = 2 * torch.rand(5, 3, 32, 32, generator=generator(0, "x")) - 1


def test_torchvision_loads_it_strictly(imagenet):
    features, h = outputs(imagenet, X)
    for more, fc, expected in (((), nn.Identity(), features), (("--head",), head(), h)):
        model = torchvision.models.resnet18()
        model.fc = fc
        path, _ = exported(imagenet, "torchvision", *more)
        model.load_state_dict(torch.load(path, weights_only=True), strict=True)
        same(model, X, expected)


def test_timm_loads_it_strictly(imagenet):
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet18", num_classes=0)
    path, _ = exported(imagenet, "torchvision")
    model.load_state_dict(torch.load(path, weights_only=True), strict=True)
    same(model, X, outputs(imagenet, X)[0])


def test_a_backbone_for_small_images(finished, tmp_path):
    """resnet10-tiny: another stem and two stages of one block."""
    exp_dir = shutil.copytree(finished, tmp_path / "run")
    model = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1])
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = model.layer3 = model.layer4 = model.fc = nn.Identity()
    path, _ = exported(exp_dir, "torchvision")
    model.load_state_dict(torch.load(path, weights_only=True), strict=True)
    same(model, X, outputs(exp_dir, X)[0])


def test_safetensors(imagenet):
    safetensors = pytest.importorskip("safetensors")
    path, description = exported(imagenet, "safetensors", "--head")
    with safetensors.safe_open(path, "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert json.loads(file.metadata()["description"]) == description
    other_path, _ = exported(imagenet, "torchvision", "--head")
    expected = torch.load(other_path, weights_only=True)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)


@pytest.mark.parametrize("run_folder", ["imagenet", "finished"])
def test_onnxruntime_agrees(request, tmp_path, run_folder):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    exp_dir = shutil.copytree(request.getfixturevalue(run_folder), tmp_path / "run")
    shutil.rmtree(exp_dir / "export", ignore_errors=True)  # of another test
    size = Run(exp_dir).read_hparams().input_size or 16
    x = X[..., :size, :size].contiguous()
    for more, expected in zip(((), ("--head",)), outputs(exp_dir, x), strict=True):
        path, description = exported(exp_dir, "onnx", *more)
        session = onnxruntime.InferenceSession(path)
        atol = 1e-4 * max(1, expected.abs().max())
        for n in (1, 5):
            (ours,) = session.run(["features"], {"images": x[:n].numpy()})
            np.testing.assert_allclose(ours, expected[:n], rtol=0, atol=atol)
        assert description["input_size"] == size
        assert description["dim"] == ours.shape[1]
    # No file of weights is beside it.
    suffixes = {path.suffix for path in (exp_dir / "export").iterdir()}
    assert suffixes == {".onnx", ".json", ".py"}


@pytest.mark.parametrize(
    ("arch", "kind", "more"),
    [
        ("resnet18-tiny", "torchvision", ()),
        ("resnet18-mini", "safetensors", ("--head",)),
        ("resnet18-tiny", "onnx", ("--head",)),
        ("resnet50-imagenet", "torchvision", ("--head",)),
        ("timm/resnet10t", "torchvision", ("--head",)),
        ("timm/vit_tiny_patch16_224", "safetensors", ()),
    ],
)
def test_the_code_beside_an_export_loads_it_without_this_program(
    tiny, images, tmp_path, arch, kind, more
):
    """Run as a user runs it, in a folder of its own, on an image of which it takes the middle.

    Another format is exported too, and changes nothing of it.
    """
    for module in export.PACKAGES[kind]:
        pytest.importorskip(module)
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
    if arch.startswith("timm/"):
        pytest.importorskip("timm")
    options = ["--arch", arch, *"--input_size 32 --n_epochs 0 --no-batch_norm".split()]
    assert run(*tiny, *options, "--n_eval_epochs", "1", "--log_folder", tmp_path).code == 0
    exp_dir = tmp_path / RUN
    path, description = exported(exp_dir, kind, *more)
    exported(exp_dir, "safetensors" if kind == "torchvision" else "torchvision", *more)
    pixels = torchvision.io.read_image(images / "test" / "down" / "0.png")
    wide = torchvision.transforms.functional.pad(pixels, [5, 0])  # (3, 16, 26)
    torchvision.io.write_png(wide, tmp_path / "photo.png")
    folder = (exp_dir / "export").rename(tmp_path / "elsewhere")
    command = [sys.executable, folder / f"{path.stem}_{kind}.py", "photo.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    name, features = done.stdout.split(" ", 1)
    features = torch.tensor([json.loads(features)])  # (1, dim)
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    image = image.resize((32, 32), Image.Resampling.BILINEAR)
    x = torchvision.transforms.functional.pil_to_tensor(image)[None] / 127.5 - 1
    expected = outputs(exp_dir, x)[bool(more)]
    assert name == "photo.png"
    assert features.shape[1] == description["dim"]
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-4)


def odd_images(folder):
    """Write images whose pixels can be read in several ways; return {path: expected}.

    expected: their pixels (16, 16, 3) in 0..255, at least nearly.
    """
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (16, 16, 3))
    alpha = rng.integers(0, 256, (16, 16, 1))
    index = rng.integers(0, 4, (16, 16), np.uint8)
    image = Image.fromarray(rgb.astype(np.uint8))
    turned = image.getexif()
    turned[0x0112] = 6  # orientation: turn by 90 degrees
    smooth = image.resize((3, 3)).resize((16, 16), Image.Resampling.BICUBIC)
    palette = Image.fromarray(index, "P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0])
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]])
    grey = rgb[:, :, :1].repeat(3, 2)
    # In a run whose range is 0 to 4095.
    deep = rng.integers(0, 4096, (16, 16))
    expected_deep = (deep * 255 / 4095)[:, :, None].repeat(3, 2)
    on_white = 255 - (255 - rgb) * (alpha / 255)
    white_grey = 255 - (255 - grey) * (alpha / 255)
    images = {
        "turned.jpg": (smooth, np.rot90(np.asarray(smooth), -1), {"exif": turned, "quality": 100}),
        "plain.png": (image, rgb, {}),
        "alpha.png": (np.concatenate([rgb, alpha], 2), on_white, {}),
        "grey-alpha.png": (np.concatenate([rgb[:, :, :1], alpha], 2), white_grey, {}),
        "alpha.webp": (np.concatenate([rgb, alpha], 2), on_white, {"lossless": True}),
        "palette.png": (palette, colours[index], {"transparency": 3}),
        "palette.gif": (palette, colours[index], {"transparency": 3}),
        "cmyk.tif": (image.convert("CMYK"), rgb, {}),
        "16-bit.png": (deep.astype(np.uint16), expected_deep, {}),
        "32-bit.tif": (deep.astype(np.int32), expected_deep, {}),
        "float.tif": (deep.astype(np.float32), expected_deep, {}),
    }
    for name, (pixels, _, options) in images.items():
        if isinstance(pixels, np.ndarray):
            kind = np.uint8 if pixels.ndim == 3 else pixels.dtype
            pixels = Image.fromarray(pixels.astype(kind))
        pixels.save(folder / name, **options)
    return {folder / name: expected for name, (_, expected, _) in images.items()}


def test_the_code_beside_an_export_reads_the_pixels_that_the_program_reads(finished, tmp_path):
    """The network's input is as wide as the image here, so the last resize changes nothing."""
    exp_dir = shutil.copytree(finished, tmp_path / "run")
    path, description = exported(exp_dir, "torchvision")
    assert description["image_size"] == description["input_size"] == 16
    assert (description["value_range"], description["max_pixels"]) == (None, 89478485)
    assert description["fit"] == "crop"
    code = load_code(path.with_name("backbone_torchvision.py"))
    json_file = path.with_name("backbone_torchvision.json")
    for value_range, fit in ((None, "pad"), ([0, 4095], "crop"), (None, "stretch")):
        new = {"value_range": value_range, "fit": fit}
        files.write_json(json_file, {**description, **new})
        for image, expected in odd_images(tmp_path).items():
            if value_range is None and image.name == "float.tif":
                with pytest.raises(code.UnreadableImage, match=r"float\.tif \(values from"):
                    code.read(image)
                continue
            x = code.read(image)
            assert x.dtype == np.float32
            pixels = ((x[0] + 1) * 127.5).round().astype(np.uint8)  # (3, 16, 16)
            ours = read_image(image, 16, value_range, fit=fit)
            np.testing.assert_array_equal(pixels, ours, err_msg=image.name)
            if value_range:
                atol = 16 if image.suffix == ".jpg" else 1
                ours = ours.transpose(1, 2, 0)
                np.testing.assert_allclose(ours, expected, rtol=0, atol=atol, err_msg=image.name)
    wide = tmp_path / "wide.png"  # the others are square, so each fit reads them alike
    noise = np.random.default_rng(1).integers(0, 256, (16, 40, 3), np.uint8)
    Image.fromarray(noise).save(wide)
    read = []
    for fit in FITS:
        files.write_json(json_file, {**description, "fit": fit})
        read.append(((code.read(wide)[0] + 1) * 127.5).round().astype(np.uint8))
        np.testing.assert_array_equal(read[-1], read_image(wide, 16, fit=fit), err_msg=fit)
    assert len({pixels.tobytes() for pixels in read}) == len(FITS)


def test_the_range_of_a_run_on_12_bit_images_is_kept_and_used_by_embed_and_export(tiny, tmp_path):
    """A single image is not stretched to its own range; the same command finds the run again."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("dark", "light"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(5):
                values = rng.integers(0, 900, (16, 16)) + 3000 * (name == "light")
                image = Image.fromarray(values.astype(np.uint16))
                image.save(tmp_path / "data" / split / name / f"{i}.png")
    argv = [*tiny, "--data_dir", tmp_path / "data", "--n_epochs", "0", "--log_folder", tmp_path]
    result = run(*argv)
    assert (result.code, "percentiles .1 and 99.9 of 10 training" in result.out) == (0, True)
    exp_dir = tmp_path / RUN
    hp = Run(exp_dir).read_hparams()
    assert 0 <= hp.value_low < 20 and 3850 < hp.value_high < 3900
    again = run(*argv)
    assert (again.code, "percentiles" in again.out, "decides" in again.out) == (0, False, False)
    refused(run(*argv, "--value_range", "0", "5000"), 2, "value_low is 0.0")
    embeddings, _ = emp_ssl.load(exp_dir, "cpu").embed([tmp_path / "data/test/dark/0.png"])
    cached = files.read_pt(exp_dir / "artifacts" / "test.pt")["embeddings"]
    assert (cached[0] - cached[5]).abs().max() > 0.1
    torch.testing.assert_close(embeddings[0], cached[0], rtol=1e-5, atol=1e-6)
    _, description = exported(exp_dir, "torchvision")
    assert description["value_range"] == [hp.value_low, hp.value_high]


@pytest.mark.parametrize(
    ("pool", "kinds"),
    [
        # the images as wide as they are
        ("--emb_pool blocks --pool_grid 2 --mirror --standardize", tuple(export.EXTENSIONS)),
        ("--emb_pool stages --pool_grid 2 --input_size 32", ["torchvision"]),  # of 64 pixels
        ("--emb_pool features --mirror --input_size 48", ["onnx"]),  # of 96, by cubic splines
    ],
)
def test_the_representation_and_the_classifier_of_a_run_as_one_network(
    tiny, images, tmp_path, pool, kinds
):
    """They equal embed, and the probe's choice for each test image is the same."""
    options = ["--eval_views", "whole", "--input_size", "8", "--n_epochs", "0.5", *pool.split()]
    assert run(*tiny, *options, "--eval_lr", "0.01", "--log_folder", tmp_path).code == 0
    exp_dir = tmp_path / RUN
    test = files.read_pt(exp_dir / "artifacts" / "test.pt")
    probe = files.read_pt(exp_dir / "probe.pt")
    paths = [images / name for name in test["paths"]]
    logits = test["embeddings"] @ probe["weight"].T + probe["bias"]
    top1 = 100 * (logits.argmax(1) == test["labels"]).float().mean().item()
    assert top1 == files.read_json(exp_dir / "linear_accuracy.json")["top1"]
    for kind, (part, expected) in itertools.product(
        kinds, {"representation": test["embeddings"], "classifier": logits}.items()
    ):
        path, description = exported(exp_dir, kind, f"--{part}")
        code = load_code(path.with_name(f"{part}_{kind}.py"))
        x = np.concatenate([code.read(path) for path in paths])  # (N, 3, 16, 16)
        if kind == "onnx":
            output = torch.from_numpy(code.load()(x))
        else:
            output = code.load()(torch.from_numpy(x))
        assert output.shape[1] == description["dim"]
        atol = 1e-4 * max(1, expected.abs().max().item())
        torch.testing.assert_close(output, expected, rtol=0, atol=atol)


def test_what_one_network_cannot_express_is_refused(finished, tmp_path):
    exp_dir = shutil.copytree(finished, tmp_path / "run")
    argv = ["export", "--exp_dir", exp_dir, "--format", "torchvision"]
    refused(run(*argv, "--classifier"), 2, "eval_views", "--eval_views whole", "embed")
    edit(exp_dir, eval_views="whole")
    refused(run(*argv, "--classifier"), 2, "no linear probe of these settings", "resume")
    refused(run(*argv, "--head", "--classifier"), 2, "not allowed with")
    edit(exp_dir, emb_pool="proj")
    refused(run(*argv, "--representation"), 2, "projection")
    assert not (exp_dir / "export").exists()


def test_the_encoder_in_python(finished, images, tmp_path):
    """A text as the path of the run; a file that can't be read; images as a tensor."""
    encoder = emp_ssl.load(str(finished), "cpu")
    cached = files.read_pt(finished / "artifacts" / "test.pt")["embeddings"]
    folder = images / "test"
    names = [str(folder / name / f"{i}.png") for name in ("across", "down") for i in range(5)]
    (tmp_path / "no.png").write_bytes(b"no image")
    embeddings, paths = encoder.embed([tmp_path / "no.png", *map(Path, names)])
    assert paths == names
    pixels = torch.stack([torchvision.io.read_image(name) for name in names])
    for result in (embeddings, encoder.embed_images(pixels)):
        torch.testing.assert_close(result, cached, rtol=1e-5, atol=1e-6)
    for wrong in ([], [tmp_path / "none.png"]):
        with pytest.raises((UsageError, RunError)):
            encoder.embed(wrong)
    for wrong in (
        pixels / 255,
        pixels.float(),
        pixels[0],
        pixels.permute(0, 2, 3, 1),
        pixels.numpy(),
    ):
        with pytest.raises(TypeError, match=r"torch.uint8 tensor \(N, 3, H, W\)"):
            encoder.embed_images(wrong)


def test_the_description_prepares_an_image_as_the_program_does(finished, images, tmp_path):
    """Resize and cut by hand, normalise as it says: the embedding that the run has cached.

    The grid has one view, the middle.
    """
    exp_dir = shutil.copytree(finished, tmp_path / "run")
    _, description = exported(exp_dir, "torchvision", "--head")
    assert description["class_names"] == ["across", "down"]
    assert description["image_size"] == 16
    assert description["input_size"] == 16
    assert description["views"] == {"kind": "grid", "n": 1}
    pixels = torchvision.io.read_image(sorted((images / "test" / "across").iterdir())[0])
    middle = pixels[:, 4:12, 4:12].float() / 255
    patch = torchvision.transforms.functional.resize(middle, [16, 16])
    x = torchvision.transforms.functional.normalize(patch, **description["normalisation"])
    _, h = outputs(exp_dir, x[None])
    cached = files.read_pt(exp_dir / "artifacts" / "test.pt")["embeddings"][:1]
    torch.testing.assert_close(h, cached, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "module"), [("safetensors", "safetensors"), ("onnx", "onnx"), ("onnx", "onnxscript")]
)
def test_a_missing_package_is_named(finished, monkeypatch, kind, module):
    before = fingerprints(finished)
    monkeypatch.setitem(sys.modules, module, None)
    result = run("export", "--exp_dir", finished, "--format", kind)
    refused(result, 2, f"pip install {' '.join(export.PACKAGES[kind])}")
    assert fingerprints(finished) == before


def test_embeddings_of_a_folder_are_those_of_the_run(finished, images, tmp_path):
    out = tmp_path / "test.npz"
    argv = ["--exp_dir", finished, "--images", images / "test", "--out", out, "--device", "cpu"]
    result = run("embed", *argv)
    assert result.code == 0, result.err
    with np.load(out) as content:  # no pickle
        embeddings = content["embeddings"]
        paths = content["paths"]
    assert paths.tolist() == [f"{name}/{i}.png" for name in ("across", "down") for i in range(5)]
    assert embeddings.dtype == np.float32
    cached = files.read_pt(finished / "artifacts" / "test.pt")["embeddings"]
    np.testing.assert_allclose(embeddings, cached, rtol=1e-5, atol=1e-6)


def test_embed_leaves_out_what_it_cannot_read(finished, images, tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(200):
        shutil.copy(images / "test" / "down" / "0.png", folder / f"{i:03}.png")
    (folder / "007.png").write_bytes(b"no image")
    result = run("embed", "--exp_dir", finished, "--images", folder, "--out", tmp_path / "x.npz")
    assert result.code == 0
    assert "007.png" in result.err
    with np.load(tmp_path / "x.npz") as content:
        assert content["embeddings"].shape == (199, 8)
        assert "007.png" not in content["paths"]


def embedded(exp_dir, folder, out):
    """Embed a folder; return what the program printed and {name: array} of the .npz file."""
    result = run("embed", "--exp_dir", exp_dir, "--images", folder, "--out", out)
    assert (result.code, result.err) == (0, "")
    with np.load(out) as content:
        return result.out, dict(content)


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def test_embed_lists_what_the_probe_predicts_which_are_copies_and_what_to_label(
    half_labelled, images, tmp_path
):
    """Of the images of the run, a copy of one, and one whose pixels are nearly those of one."""
    pytest.importorskip("sklearn")
    folder = shutil.copytree(images, tmp_path / "all")
    shutil.copy(folder / "train" / "down" / "3.png", folder / "copy.png")
    pixels = np.asarray(Image.open(folder / "train" / "across" / "7.png"))
    Image.fromarray(pixels.clip(1, 254)).save(folder / "near.png")
    exp_dir = shutil.copytree(half_labelled, tmp_path / "run")
    edit(exp_dir, data_dir=folder)  # of the run, but for two images: those of train/ and test/
    edit(exp_dir, labels=half_labelled.parent / "labels.csv")
    out, content = embedded(exp_dir, folder, tmp_path / "x.npz")
    paths = content["paths"].tolist()
    assert len(paths) == 36
    probe = files.read_pt(exp_dir / "probe.pt")
    embeddings = torch.from_numpy(content["embeddings"])
    p = F.softmax(F.linear(embeddings, probe["weight"], probe["bias"]), 1)
    assert content["predicted"].tolist() == [["across", "down"][i] for i in p.argmax(1)]
    np.testing.assert_allclose(content["confidence"], p.amax(1), rtol=1e-5)
    copies = dict(zip(paths, content["copy_of"].tolist(), strict=True))
    assert copies.pop("copy.png") == "train/down/3.png"
    assert copies.pop("near.png") == "train/across/7.png"
    assert copies == {name: name if name.startswith("train/") else "" for name in copies}
    assert "* 26 of 36 embedded images are copies of training images, or nearly so; 25 with" in out

    names = ["path", "predicted", "confidence", "copy_of"]
    header, *rows = rows_of(tmp_path / "x.csv")
    columns = [content[name].astype(str) for name in ("paths", *names[1:])]
    assert (header, rows) == (names, np.stack(columns, 1).tolist())
    header, *rows = rows_of(tmp_path / "x_to_label.csv")
    assert header == ["path", "predicted", "confidence", "cluster"]
    labelled = (half_labelled.parent / "labels.csv").read_text().split()
    labelled = {row.split(",")[0] for row in labelled if not row.endswith(",")}
    assert sorted(row[0] for row in rows) == sorted(set(paths) - labelled)
    assert "_to_label.csv: 20 images whose label would help most" in out


def test_the_images_to_label_are_the_least_confident_of_each_cluster_in_turn():
    pytest.importorskip("sklearn")
    random = torch.Generator().manual_seed(0)
    kind = torch.randint(3, (90,), generator=random)
    x = 5 + 10 * torch.eye(8)[kind] + torch.randn(90, 8, generator=random)
    confidence = torch.rand(90, generator=random)
    rows, clusters = embed.to_label(x, confidence, n=10, n_clusters=3)
    order = sorted(range(90), key=lambda i: confidence[i])
    of_kind = [[i for i in order if kind[i] == k] for k in range(3)]
    turns = [sorted(turn, key=lambda i: confidence[i]) for turn in zip(*of_kind, strict=False)]
    assert rows.tolist() == [i for turn in turns for i in turn][:10]
    assert len({(int(kind[i]), int(c)) for i, c in zip(rows, clusters, strict=True)}) == 3


def test_embed_without_a_probe_or_the_images_of_the_run(copy, images, tmp_path):
    (copy / "probe.pt").unlink()
    out, content = embedded(copy, images / "test", tmp_path / "a.npz")
    assert content.keys() == {"embeddings", "paths", "copy_of"}
    assert rows_of(tmp_path / "a.csv")[0] == ["path", "copy_of"]
    edit(copy, data_dir=images / "test")
    out, content = embedded(copy, images / "test", tmp_path / "b.npz")
    assert content.keys() == {"embeddings", "paths"}
    assert "* Search for copies of images of the run: no pictures of images: the images of" in out
    assert {path.name for path in tmp_path.glob("*.*")} == {"a.npz", "a.csv", "b.npz"}


def test_embed_names_the_copies_in_a_collection_that_has_changed(copy, images, tmp_path):
    """By the paths of the images of the run that are still there."""
    folder = shutil.copytree(images, tmp_path / "grown")
    shutil.copy(folder / "train" / "down" / "3.png", folder / "train" / "down" / "new.png")
    (folder / "train" / "across" / "0.png").unlink()
    edit(copy, data_dir=folder)
    out, content = embedded(copy, folder / "train" / "down", tmp_path / "x.npz")
    expected = {f"{i}.png": f"train/down/{i}.png" for i in range(12)}
    expected["new.png"] = "train/down/3.png"
    assert dict(zip(content["paths"], content["copy_of"], strict=True)) == expected
    assert "1 of its 34 are gone" in out


def test_an_encoder_on_the_way_says_so(finished, tmp_path):
    exp_dir = shutil.copytree(finished, tmp_path / "run")
    edit(exp_dir, n_epochs=3)
    result = run("export", "--exp_dir", exp_dir, "--format", "torchvision")
    assert "Training is at epoch 2 step 0, not at its end" in result.out


def test_wrong_use(finished, images, tmp_path):
    ours = ["--exp_dir", finished, "--images", images, "--out"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "labels.csv").touch()
    no_run = ["--exp_dir", tmp_path, "--images", images, "--out", tmp_path / "x.npz"]
    for argv, words in (
        (["embed", *ours, tmp_path / "x.csv"], ".npz"),
        (["embed", *ours, tmp_path / "nowhere" / "x.npz"], "nowhere"),
        (["embed", *ours, tmp_path / "labels.npz"], "labels.csv would be overwritten"),
        (["embed", *ours, tmp_path / "x.npz", "--images", tmp_path / "empty"], "no images"),
        (["embed", *ours, tmp_path / "x.npz", "--images", tmp_path / "nowhere"], "not a folder"),
        (["embed", *ours, tmp_path / "x.npz", "--device", "cuda"], "cuda"),
        (["embed", *no_run], "not a run folder"),
        (["export", "--exp_dir", tmp_path, "--format", "onnx"], "not a run folder"),
        (["export", "--exp_dir", finished, "--format", "keras"], "keras"),
    ):
        refused(run(*argv), 2, words)
    assert not (tmp_path / "x.npz").exists()
