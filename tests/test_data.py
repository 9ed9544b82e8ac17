import hashlib
import io
import os
import pickle
import re
import shutil
import struct
import tarfile
import urllib.request
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from conftest import run
from PIL import Image
from torchvision import datasets, transforms

import data
from experiment import RunError, UsageError

FLAT = [(0, 0, 0), (255, 255, 255), (1, 1, 1), (127, 127, 127), (128, 128, 128), (128, 127, 129)]
SATURATED = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 255, 255), (255, 0, 255), (255, 255, 0)]


def pictures(n, height=32, width=32, seed=0, noise=0.1):
    """Smooth random colours and noise, uint8."""
    random = torch.Generator().manual_seed(seed)
    smooth = F.interpolate(torch.randn(n, 3, 4, 4, generator=random), size=(height, width), mode="bicubic")
    x = 0.5 + 0.3 * smooth + noise * torch.randn(n, 3, height, width, generator=random)
    return x.clamp(0, 1).mul(255).round().to(torch.uint8)


def flat_images(colours):
    return torch.tensor(colours, dtype=torch.uint8)[:, :, None, None].expand(-1, -1, 32, 32)


def through_pil(function, image, *values):
    """Apply a torchvision function to a uint8 tensor as a PIL image; returns float32, 0 to 255."""
    return TF.pil_to_tensor(function(TF.to_pil_image(image), *values)).float()


# ------------------------------------------------------------------------------------------ augmentations

FACTORS = torch.linspace(0.6, 1.4, 7).tolist()
SHIFTS = [k / 255 for k in (-50.5, -30.5, -7.5, 0, 9.5, 22.5, 50.5)]  # Pillow shifts by int(255 * shift)
TORCHVISION = {
    "brightness": TF.adjust_brightness,
    "contrast": TF.adjust_contrast,
    "saturation": TF.adjust_saturation,
    "hue": TF.adjust_hue,
    "grey": lambda image, _: TF.rgb_to_grayscale(image, num_output_channels=3),
    "blur": lambda image, sigma: TF.gaussian_blur(image, 13, sigma),
    "solarise": lambda image, _: TF.solarize(image, 128),
}


def mapped(operation):
    return lambda x, factor: data.map_colours(x, *data.colour_map(torch.tensor(operation), factor))


@pytest.mark.parametrize(
    ("name", "ours", "values"),
    [
        ("brightness", mapped(data.BRIGHTNESS), FACTORS),
        ("contrast", mapped(data.CONTRAST), FACTORS),
        ("saturation", mapped(data.SATURATION), FACTORS),
        ("hue", data.adjust_hue, SHIFTS),
        ("grey", lambda x, _: data.greyscale(x), [0.0]),
        ("blur", data.gaussian_blur, [0.1, 0.3, 0.7, 1.0, 1.4, 2.0]),
        ("solarise", lambda x, _: data.solarise(x), [0.0]),
    ],
)
def test_augmentations_equal_torchvisions(name, ours, values):
    images = torch.cat([pictures(12), flat_images(FLAT + SATURATED)]).repeat_interleave(len(values), 0)
    values = values * (len(images) // len(values))  # each row its own
    result = ours(images / 255, torch.tensor(values)) * 255
    rows = list(zip(images, values, strict=True))
    error = (result - torch.stack([through_pil(TORCHVISION[name], *row) for row in rows])).abs()
    if name == "hue":  # which Pillow rounds to whole 255ths of a turn, each up to 6 levels of a channel
        assert error.max() <= 18
        assert error.mean() <= 1
    else:
        assert error.max() <= (1e-3 if name == "solarise" else 2)
    if name in data.JITTER or name == "blur":
        exact = torch.stack([TORCHVISION[name](image / 255, value) for image, value in rows]) * 255
        torch.testing.assert_close(result, exact, rtol=0, atol=0.05)


@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 32), (40, 28, 32), (64, 64, 32), (96, 80, 32), (128, 120, 112)])
def test_crops_equal_torchvisions(height, width, size, monkeypatch):
    monkeypatch.setattr(data, "augment", lambda x, params, n_by_turn: x)
    images = pictures(5, height, width)
    patches = (data.sample_patches(images, 6, data.generator(0, "t"), size).flatten(0, 1) + 1) * 127.5
    params = data.sample_params(30, height, width, data.generator(0, "t"))
    for i, patch in enumerate(patches):
        box = int(params["top"][i]), int(params["left"][i]), height // 2, width // 2
        mode = TF.InterpolationMode.BICUBIC if size > 32 else TF.InterpolationMode.BILINEAR
        expected = through_pil(TF.resized_crop, images[i % 5], *box, [size, size], mode)
        gap = (patch - (expected.flip(-1) if params["flip"][i] else expected)).abs()
        assert gap.max() <= (8 if size > 32 else 2)  # Pillow clips what overshoots between the two axes too
        assert (gap <= 2).float().mean() > 0.995


def test_patches_equal_a_plain_loop_over_pil_images(monkeypatch):
    images, n = pictures(20), 20
    params = data.sample_params(n * len(images), 32, 32, data.generator(0, "t"))
    for rare, every in [("grey", 3), ("blur", 4), ("solarise", 2)]:  # so that all of them meet
        params[rare] |= torch.arange(n * len(images)) % every == 0
    monkeypatch.setattr(data, "sample_params", lambda n, H, W, generator: params)
    patches = (data.sample_patches(images, n, None) + 1) * 127.5
    assert patches.shape == (n, len(images), 3, 32, 32)
    errors = []
    for i, patch in enumerate(patches.flatten(0, 1)):
        own = {name: values[i].tolist() for name, values in params.items()}
        plain = TF.resized_crop(TF.to_pil_image(images[i % 20]), own["top"], own["left"], 16, 16, [32, 32])
        if own["flip"]:
            plain = TF.hflip(plain)
        for k in own["order"] if own["jitter"] else []:
            name = list(data.JITTER)[k]
            plain = TORCHVISION[name](plain, own[name])
        for name, value in [("grey", None), ("blur", own["sigma"]), ("solarise", None)]:
            if own[name]:
                plain = TORCHVISION[name](plain, value)
        errors.append((patch - TF.pil_to_tensor(plain)).abs())
    errors = torch.stack(errors)
    assert errors.median() <= 1
    assert errors.mean((1, 2, 3)).max() <= 4  # of the worst patch; single pixels are inverted by a rounding before solarise


# -------------------------------------------------------------------------------------------- randomness


def chi2(values, n_cells):
    expected = len(values) / n_cells
    return float((torch.bincount(values, minlength=n_cells) - expected).square().sum() / expected)


def test_parameters_are_drawn_independently_from_the_right_distributions():
    n = 24_000
    params = data.sample_params(n, 32, 32, data.generator(0, "t"))
    assert {len(values) for values in params.values()} == {n}
    assert (params["order"].sort(1).values == torch.arange(4)).all()
    _, permutation = params["order"].unique(dim=0, return_inverse=True)
    assert chi2(permutation, 24) < 60  # 23 degrees of freedom
    assert set(params["top"].tolist()) == set(params["left"].tolist()) == set(range(17))
    assert chi2(17 * params["top"] + params["left"], 17 * 17) < 288 + 5 * (2 * 288) ** 0.5
    for name, p in [("flip", 0.5), ("jitter", 0.8), ("grey", 0.2), ("blur", 0.1), ("solarise", 0.1)]:
        assert params[name].float().mean() == pytest.approx(p, abs=4 * (p * (1 - p) / n) ** 0.5), name
    ranges = dict.fromkeys(("brightness", "contrast", "saturation"), (0.6, 1.4)) | {"hue": (-0.2, 0.2), "sigma": (0.1, 2.0)}
    for name, (low, high) in ranges.items():
        cells = ((params[name] - low) / (high - low) * 20).long()
        assert params[name].min() >= low - 1e-6, name
        assert params[name].max() <= high + 1e-6, name
        assert chi2(cells.clamp(0, 19), 20) < 55, name  # 19 degrees of freedom
    columns = [values[:, 0] if values.dim() == 2 else values for values in params.values()]
    correlation = torch.corrcoef(torch.stack(columns).double()) - torch.eye(len(columns))
    assert correlation.abs().max() < 5 / n**0.5


def draw_with_torchvision(images):
    pipeline = transforms.Compose(
        [
            transforms.RandomResizedCrop(32, scale=(0.25, 0.25), ratio=(1, 1)),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.2)], 0.8),
            transforms.RandomGrayscale(0.2),
            transforms.RandomApply([transforms.GaussianBlur(13, (0.1, 2.0))], 0.1),
            transforms.RandomSolarize(128, 0.1),
        ]
    )
    return torch.from_numpy(np.stack([pipeline(image) for image in images])).permute(0, 3, 1, 2)


def statistics(x):
    """Mean and standard deviation of each channel, and the gradient energy, of x (n, 3, 32, 32) in [0, 1]."""
    energy = x.diff(dim=2).square().mean() + x.diff(dim=3).square().mean()
    return torch.stack([*x.mean((0, 2, 3)), *x.std((0, 2, 3)), energy])


def test_patches_have_the_statistics_of_torchvisions():
    """20,000 each, 50 of each image, so that images and draws that differ do not add to the noise (below 0.8%)."""
    textures, smooth = data.load_images("textures", "", False).images[:400].float(), pictures(200, noise=0).float()
    images = torch.cat([textures[:200], 0.6 * textures[200:] + 0.4 * smooth]).round().to(torch.uint8)
    loader = torch.utils.data.DataLoader(
        [TF.to_pil_image(image) for image in images] * 50,
        batch_size=400,
        num_workers=2,
        collate_fn=draw_with_torchvision,
        generator=torch.Generator().manual_seed(0),
    )
    theirs = torch.cat(list(loader)) / 255
    ours = torch.cat([data.sample_patches(images, 5, data.generator(0, "t", step=step)) for step in range(10)])
    assert len(theirs) == ours[:, :, 0, 0, 0].numel() == 20_000
    torch.testing.assert_close(statistics(ours.flatten(0, 1).add(1).div(2)), statistics(theirs), rtol=0.02, atol=0)


def test_patches_depend_on_the_generator_alone():
    images, state = pictures(4, 64, 64), torch.get_rng_state()
    before = images.clone()
    draws = [data.sample_patches(images, 3, data.generator(0, "t", step=step), size=16) for step in (0, 0, 1)]
    assert draws[0].shape == (3, 4, 3, 16, 16)
    assert draws[0].dtype == torch.float32
    assert torch.equal(draws[0], draws[1])
    assert not torch.isclose(draws[0], draws[2]).all(dim=(2, 3, 4)).any()
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_patches_lie_between_minus_one_and_one_and_are_of_their_own_image():
    """Black stays black under every augmentation."""
    images = torch.zeros(6, 3, 32, 32, dtype=torch.uint8)
    images[4] = pictures(1)[0]
    images[5] = flat_images([(255, 255, 255)])[0]
    patches = data.sample_patches(images, 200, data.generator(0, "t"))
    assert (patches[:, :4] == -1).all()
    assert (patches[:, 4].std((1, 2, 3)) > 0.01).all()
    assert patches.min() >= -1 - 1e-6
    assert patches.max() <= 1 + 1e-6
    assert (patches[:, 5].mean((1, 2, 3)) > 0.1).any()


def test_generators_differ_with_each_argument():
    arguments = [(0, "a", 0, 0), (1, "a", 0, 0), (0, "b", 0, 0), (0, "a", 1, 0), (0, "a", 0, 1), (2**31 - 1, "a", 12, 3)]
    draws = [tuple(torch.rand(4, generator=data.generator(*argument)).tolist()) for argument in arguments]
    assert len(set(draws)) == len(draws)
    assert draws[0] == tuple(torch.rand(4, generator=data.generator(0, "a")).tolist())


# -------------------------------------------------------------------------------------------- image files


def write(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(image, Image.Image):
        image = Image.fromarray(np.asarray(image, dtype=np.uint8))
    image.save(path, **options)


def write_many(folder, n):
    """n images, half in class a, half in b; image i is of the grey level i."""
    for i in range(n):
        write(folder / "ba"[i < n // 2] / f"{i:03}.png", np.full((8, 8, 3), i))


def quadrants(size):
    """(size, size, 3): red, green / blue, white."""
    colours = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8)
    return colours.repeat(size // 2, 0).repeat(size // 2, 1)


def test_folder_reads_every_format_and_mode_as_rgb(tmp_path):
    random = np.random.default_rng(0)
    rgb = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    grey, alpha, bits = rgb[:, :, 0], rgb[:, :, 1:2] | 1, rgb[:, :, 2] > 127
    palette = Image.fromarray(grey % 7)
    palette.putpalette(rgb[0, :7].tobytes())
    smooth = pictures(1, noise=0)[0].permute(1, 2, 0).numpy()
    files = {
        "0.png": (Image.fromarray(rgb), rgb),
        "1.png": (Image.fromarray(grey), np.stack([grey] * 3, 2)),
        "2.png": (palette, rgb[0][grey % 7]),
        "3.png": (Image.fromarray(np.concatenate([rgb, alpha], 2)), rgb),
        "4.png": (Image.fromarray(grey.astype(np.uint16) * 257), np.stack([grey] * 3, 2)),
        "5.png": (Image.fromarray(bits), np.stack([bits * 255] * 3, 2)),
        "6.bmp": (Image.fromarray(rgb), rgb),
        "7.WEBP": (Image.fromarray(rgb), rgb),
        "8 ein Bild.jpg": (Image.fromarray(smooth), smooth),
        "9 größer 图.JPEG": (Image.fromarray(smooth).convert("L"), None),
    }
    for name, (image, _) in files.items():
        options = {"lossless": True} if name == "7.WEBP" else {"quality": 95} if name[0] == "8" else {}
        write(tmp_path / "train" / "zwei Wörter" / name, image, **options)
    write(tmp_path / "train" / "a" / "deep" / "er" / "x.png", rgb)
    write(tmp_path / "test" / "zwei Wörter" / "x.png", rgb)
    (tmp_path / "train" / "notes.txt").write_text("not an image")
    images, labels, class_names = data.load_images("folder", tmp_path, True)
    assert images.dtype == torch.uint8
    assert images.shape == (11, 3, 32, 32)
    assert class_names == ["a", "zwei Wörter"]
    assert labels.tolist() == [0] + [1] * 10
    pixels = images.permute(0, 2, 3, 1).numpy()
    assert np.array_equal(pixels[0], rgb)
    for i, (name, (_, expected)) in enumerate(files.items(), 1):
        if name[0] == "8":
            assert np.abs(pixels[i].astype(int) - expected).mean() < 3, name
        elif expected is not None:
            assert np.array_equal(pixels[i], expected), name
    assert (pixels[10] == pixels[10][:, :, :1]).all()
    test = data.load_images("folder", tmp_path, False)
    assert test.labels.tolist() == [1]
    assert test.class_names == class_names
    assert np.array_equal(test.images[0].permute(1, 2, 0), rgb)


def test_folder_resizes_crops_and_turns(tmp_path):
    """Wide, tall, small and EXIF-turned images all show the same four quadrants, without the grey beside them."""
    square, beside = quadrants(100), np.full((100, 60, 3), 128, np.uint8)
    write(tmp_path / "wide.png", np.concatenate([beside, square, beside], 1))
    write(tmp_path / "tall.png", np.concatenate([beside.swapaxes(0, 1), square, beside.swapaxes(0, 1)], 0))
    write(tmp_path / "small.png", quadrants(8))
    for orientation, quarter_turns in [(3, 2), (6, 1), (8, 3)]:  # as the EXIF standard numbers them
        exif = Image.Exif()
        exif[0x0112] = orientation
        write(tmp_path / f"turned{orientation}.jpg", np.rot90(square, quarter_turns), exif=exif, quality=95)
    for image_size in (32, 48):
        images = data.load_images("folder", tmp_path, True, image_size).images
        assert images.shape == (6, 3, image_size, image_size)
        near_corners = images[:, :, 4 :: image_size - 9, 4 :: image_size - 9].float()
        expected = torch.from_numpy(quadrants(2)).permute(2, 0, 1).float().expand(6, -1, -1, -1)
        torch.testing.assert_close(near_corners, expected, rtol=0, atol=12)
        assert ((images.float() - 128).abs() < 20).all(1).float().mean() < 0.06  # none of the grey


def test_images_without_class_folders_have_no_labels(tmp_path):
    write_many(tmp_path / "heap" / "x", 6)
    write(tmp_path / "heap" / "7.png", np.full((8, 8, 3), 7))
    write_many(tmp_path / "folders", 7)
    write_many(tmp_path / "beside" / "train", 6)
    write(tmp_path / "beside" / "train" / "7.png", np.full((8, 8, 3), 7))
    for split, n in [("train", 7), ("test", 2)]:
        for i in range(n):
            write(tmp_path / "one class" / split / "a" / f"{i}.png", np.zeros((8, 8, 3)))
    for root in ("heap", "folders", "beside", "one class"):
        images, labels, class_names = data.load_images("folder", tmp_path / root, True)
        assert (len(images), labels, class_names) == (7, None, []), root
    assert data.load_images("folder", tmp_path / "heap", False) is None
    assert data.load_images("folder", tmp_path / "beside", False) is None
    test = data.load_images("folder", tmp_path / "one class", False)
    assert (len(test.images), test.labels) == (2, None)


def test_a_link_to_the_parent_folder_is_not_followed(tmp_path):
    write_many(tmp_path / "train", 4)
    (tmp_path / "train" / "a" / "up").symlink_to(tmp_path / "train", target_is_directory=True)
    assert data.load_images("folder", tmp_path, True).labels.tolist() == [0, 0, 1, 1]


def test_what_can_not_be_loaded_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("missing", "empty"):
        with pytest.raises(UsageError, match=re.escape(str(tmp_path / name))):
            data.load_images("folder", tmp_path / name, True)
    write_many(tmp_path / "full" / "train", 4)
    write(tmp_path / "full" / "test" / "a" / "1.png", np.zeros((8, 8, 3)))
    write(tmp_path / "full" / "test" / "unheard-of" / "1.png", np.zeros((8, 8, 3)))
    with pytest.raises(UsageError, match="unheard-of"):
        data.load_images("folder", tmp_path / "full", False)
    with pytest.raises(UsageError, match="mnist"):
        data.load_images("mnist", tmp_path, True)
    for name in ("textures", "cifar10", "cifar100"):
        with pytest.raises(UsageError, match="image_size 48"):
            data.load_images(name, tmp_path, True, 48)


def test_one_unreadable_image_in_a_hundred_is_left_out_and_two_are_an_error(tmp_path, capsys):
    write_many(tmp_path / "train", 100)
    bad, cut = tmp_path / "train" / "a" / "030.png", tmp_path / "train" / "b" / "070.png"
    bad.write_bytes(b"not an image")
    images, labels, _ = data.load_images("folder", tmp_path, True)
    assert images[:, 0, 0, 0].tolist() == [i for i in range(100) if i != 30]
    assert labels.tolist() == [0] * 49 + [1] * 50
    stderr = capsys.readouterr().err
    assert str(bad) in stderr
    assert "1 of 100" in stderr
    cut.write_bytes(cut.read_bytes()[:-30])
    with pytest.raises(RunError, match="2 of 100"):
        data.load_images("folder", tmp_path, True)


def test_images_in_a_file_are_those_in_memory(tmp_path, monkeypatch):
    write_many(tmp_path / "train", 30)
    memory = data.load_images("folder", tmp_path, True, 16).images
    monkeypatch.setattr(data, "MANY", 4)
    monkeypatch.setattr(data, "LARGE", 0)
    file = data.load_images("folder", tmp_path, True, 16).images
    assert isinstance(file, data.ImageFile)
    assert (len(file), file.shape) == (30, memory.shape)
    assert torch.equal(file[:], memory)
    index = torch.tensor([7, 3, 29, 3])
    assert torch.equal(file[index], memory[index])
    assert torch.equal(data.subset_of(file, index)[1:3], memory[index][1:3])
    for images in (memory, file):
        rows = [index, slice(5, 9), torch.tensor([0])] * 4
        found = list(data.batches(images, rows, torch.device("cpu")))
        assert all(torch.equal(batch, memory[index]) for batch, index in zip(found, rows, strict=True))
    os.truncate(file.path, 20 * 3 * 16 * 16)
    with pytest.raises(RunError, match="cut off"):
        list(data.batches(file, rows, torch.device("cpu")))


@pytest.mark.parametrize("many", [4, 1000])
def test_odd_files_and_names(tmp_path, monkeypatch, capsys, many):
    """One pixel, names of any letters and bytes; and what is left out: an image of 144 million pixels, a link to nowhere, a
    file that is gone when it is read. As many files as are cached, and fewer."""
    monkeypatch.setattr(data, "MANY", many)
    folder = tmp_path / "train"
    write_many(folder, 300)
    write(folder / "c d é 犬" / "pixel of 犬.png", np.full((1, 1, 3), 77))
    name = os.fsdecode(b"caf\xe9.png")  # not UTF-8
    write(folder / "c d é 犬" / "x.png", np.full((8, 8, 3), 78))
    os.rename(folder / "c d é 犬" / "x.png", folder / "c d é 犬" / name)
    write(folder / "a" / "bomb.png", Image.new("1", (12_000, 12_000)))
    (folder / "a" / "link.png").symlink_to(folder / "nowhere.png")
    find_images = data.find_images
    monkeypatch.setattr(data, "find_images", lambda root: [*find_images(root), folder / "b" / "gone.png"])
    for _ in range(2):
        images, labels, class_names = data.load_images("folder", tmp_path, True, 16)
        assert class_names == ["a", "b", "c d é 犬"]
        assert labels.bincount().tolist() == [150, 150, 2]
        assert sorted(images[labels == 2].float().mean((1, 2, 3)).tolist()) == [77, 78]
        stderr = capsys.readouterr().err
        assert all(name in stderr for name in ("bomb.png", "link.png", "gone.png", "3 of 305"))


def test_ten_thousand_images_of_one_class_and_one_of_another(tiny, images, tmp_path):
    folder = tmp_path / "train"
    shutil.copytree(images / "test", tmp_path / "test")
    write(folder / "across" / "0.png", np.zeros((16, 16, 3)))
    write(folder / "down" / "0.png", np.zeros((16, 16, 3)))
    for i in range(1, 10_000):
        os.link(folder / "across" / "0.png", folder / "across" / f"{i}.png")
    result = run(*tiny, "--data_dir", tmp_path, "--n_images", "24", "--log_folder", tmp_path / "logs")
    assert (result.code, result.err) == (0, "")
    assert "* Images: 24 train, 10 test, 2 classes" in result.out
    assert "top-1 50.00%" in result.out  # it can't know better


def test_many_images_are_decoded_once(tmp_path, monkeypatch, capsys, cache):
    """The second time they come from the cache folder, unless a file changed or the cache is damaged."""
    monkeypatch.setattr(data, "MANY", 4)
    write_many(tmp_path / "train", 120)
    (tmp_path / "train" / "a" / "030.png").write_bytes(b"not an image")
    decoded, pool = [], data.ProcessPoolExecutor
    monkeypatch.setattr(data, "ProcessPoolExecutor", lambda **kwargs: decoded.append(kwargs) or pool(**kwargs))

    def load():
        images, _, class_names = data.load_images("folder", tmp_path, True)
        assert images[:, 0, 0, 0].tolist() == [i for i in range(120) if i not in (7, 30)] + [7] * ("c" in class_names)
        assert "030.png" in capsys.readouterr().err
        return len(decoded)

    (tmp_path / "train" / "a" / "007.png").unlink()
    assert [load(), load()] == [1, 1]
    write(tmp_path / "train" / "c" / "999.png", np.full((8, 8, 3), 7))
    assert [load(), load()] == [2, 2]
    before = set(cache.iterdir())
    os.utime(tmp_path / "train" / "b" / "100.png", (1, 1))
    assert [load(), load()] == [3, 3]
    assert set(cache.iterdir()) == before  # in the place of the old one
    for n, suffix in ((4, "pt"), (5, "u8")):
        for path in cache.glob(f"*.{suffix}"):
            path.write_bytes(path.read_bytes()[:-100])
        assert [load(), load()] == [n, n]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "train" / "b" / "100.png"))  # no folder can be made there
    images = data.load_images("folder", tmp_path, True).images
    assert len(images) == 119
    assert "not kept" in capsys.readouterr().err


def test_an_image_with_odd_exif_does_no_harm(tmp_path):
    """Pillow writes the EXIF again when it turns an image, and raises nearly anything on tags of the wrong type."""
    write_many(tmp_path / "train", 100)
    description = struct.pack(">HHII", 0x010E, 5, 1, 38)  # as a fraction, at byte 38, where a text belongs
    orientation = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
    exif = b"Exif\0\0MM" + struct.pack(">HIH", 42, 8, 2) + description + orientation + struct.pack(">III", 0, 1, 2)
    write(tmp_path / "train" / "b" / "999.jpg", np.zeros((8, 8, 3)), exif=exif)
    images, labels, _ = data.load_images("folder", tmp_path, True)
    assert len(images) == len(labels) >= 100


# -------------------------------------------------------------------------------------------------- CIFAR


def pack_cifar(monkeypatch, dataset_class, root, batches, meta):
    """The archive that torchvision would download, of these files, and their checksums where it looks for them."""
    files = {name: pickle.dumps(content, protocol=2) for name, content in (batches | meta).items()}
    root.mkdir()
    with tarfile.open(root / dataset_class.filename, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{dataset_class.base_folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(dataset_class, "tgz_md5", hashlib.md5((root / dataset_class.filename).read_bytes()).hexdigest())
    monkeypatch.setattr(dataset_class, "train_list", [[name, md5[name]] for name in batches if "test" not in name])
    monkeypatch.setattr(dataset_class, "test_list", [[name, md5[name]] for name in batches if "test" in name])
    (name,) = meta
    monkeypatch.setattr(dataset_class, "meta", dataset_class.meta | {"md5": md5[name]})


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(name, tmp_path, monkeypatch, offline):
    dataset_class = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    with pytest.raises(UsageError) as caught:
        data.load_images(name, tmp_path / "none", True)
    for part in (dataset_class.filename, str(tmp_path / "none"), "textures", "folder"):
        assert part in str(caught.value)

    random = np.random.default_rng(0)
    n_classes = int(name.removeprefix("cifar"))
    key, names_key = ("labels", "label_names") if n_classes == 10 else ("fine_labels", "fine_label_names")
    file_names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"] if n_classes == 10 else ["train", "test"]
    batches = {
        file_name: {
            "data": random.integers(0, 256, (20, 3072), dtype=np.uint8),
            key: random.integers(0, n_classes, 20).tolist(),
            "coarse_labels": [0] * 20,
        }
        for file_name in file_names
    }
    class_names = [f"class {i}" for i in range(n_classes)]
    meta = {dataset_class.meta["filename"]: {names_key: class_names, "coarse_label_names": ["x"]}}
    pack_cifar(monkeypatch, dataset_class, tmp_path / "data", batches, meta)
    for train, parts in [(True, file_names[:-1]), (False, file_names[-1:])]:
        images, labels, names = data.load_images(name, tmp_path / "data", train)
        expected = np.concatenate([batches[part]["data"] for part in parts])  # rows of red, then of green, of blue
        assert images.dtype == torch.uint8
        assert images.shape == (len(expected), 3, 32, 32)
        assert np.array_equal(images.flatten(1), expected)
        assert labels.tolist() == [label for part in parts for label in batches[part][key]]
        assert labels.dtype == torch.int64
        assert names == class_names

    archive, folder = (tmp_path / "data" / part for part in (dataset_class.filename, dataset_class.base_folder))
    for path in (folder / file_names[0], archive):
        path.write_bytes(path.read_bytes()[:-10])
        if path == archive:
            shutil.rmtree(folder)
            with pytest.raises(UsageError, match=re.escape(dataset_class.filename)):
                data.load_images(name, tmp_path / "data", True)
        else:  # unpacked again
            assert len(data.load_images(name, tmp_path / "data", True).images) == 20 * len(file_names[:-1])


# --------------------------------------------------------------------------------------- textures, subsets


def test_textures():
    train, test = (data.load_images("textures", "not used", train) for train in (True, False))
    for split, n in [(train, 4000), (test, 1000)]:
        assert split.images.shape == (n, 3, 32, 32)
        assert split.images.dtype == torch.uint8
        assert split.labels.bincount().tolist() == [n / 10] * 10
        means = split.images.float().mean((2, 3))
        assert (means.amax(1) - means.amin(1)).max() <= 0.12 * 255 + 1  # near-grey
    assert len(set(train.class_names)) == 10
    assert all(map(torch.equal, train[:2], data.load_images("textures", "", True)[:2]))
    assert len({image.numpy().tobytes() for split in (train, test) for image in split.images}) == 5000
    # The nearest class mean tells classes apart by single pixels alone: chance is 0.1.
    x, y = train.images.flatten(1) / 255, test.images.flatten(1) / 255
    centres = torch.stack([x[train.labels == label].mean(0) for label in range(10)])
    accuracy = (torch.cdist(y, centres).argmin(1) == test.labels).float().mean()
    assert accuracy < 0.2


def test_balanced_subset():
    random = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 4)[torch.randperm(84, generator=random)]

    def subset(n, seed=0, labels=labels):
        return data.balanced_subset(labels, 84, n, data.generator(seed, "t"))

    for n, counts in [(1, [1]), (10, [4, 3, 3]), (12, [4, 4, 4]), (40, [18, 18, 4]), (70, [36, 30, 4]), (84, [50, 30, 4])]:
        chosen = subset(n)
        assert chosen.tolist() == sorted(set(chosen.tolist()))
        assert len(chosen) == n
        assert chosen.min() >= 0
        assert chosen.max() < 84
        found = labels[chosen].bincount(minlength=3).tolist()
        assert sorted(found, reverse=True)[: len(counts)] == counts, n
    assert torch.equal(subset(40), subset(40))
    assert not torch.equal(subset(40), subset(40, seed=1))
    unlabelled = subset(20, labels=None)
    assert unlabelled.tolist() == sorted(set(unlabelled.tolist()))
    assert len(unlabelled) == 20
    assert subset(84, labels=None).tolist() == list(range(84))
    for too_many in (labels, None):
        with pytest.raises(UsageError, match="85"):
            subset(85, labels=too_many)


# -------------------------------------------------------------------------------------------------- views


def test_a_grid_is_of_crops_at_even_distances():
    """At its own size a crop is the pixels themselves."""
    images = data.load_images("textures", "", False).images[:3]
    for n, places in ((1, [8]), (3, [8]), (4, [0, 16]), (9, [0, 8, 16]), (20, [0, 5, 11, 16])):
        views = data.sample_views(images, n, "grid", None, 16)
        expected = [images[:, :, i : i + 16, j : j + 16] / 127.5 - 1 for i in places for j in places]
        torch.testing.assert_close(views, torch.stack(expected), rtol=0, atol=1e-6)
    large = data.sample_views(images, 4, "grid", None)
    expected = F.interpolate(images[:, :, :16, 16:] / 127.5 - 1, size=32, mode="bilinear", align_corners=False)
    torch.testing.assert_close(large[1], expected, rtol=0, atol=1e-5)


def test_random_crops_are_crops_and_nothing_else():
    images = torch.arange(2 * 3 * 32 * 32).remainder(251).view(2, 3, 32, 32).to(torch.uint8)
    views = data.sample_views(images, 400, "crops", data.generator(0, "t"), 16)
    assert views.shape == (400, 2, 3, 16, 16)
    for b in range(2):
        windows = images[b].unfold(1, 16, 1).unfold(2, 16, 1).permute(1, 2, 0, 3, 4).reshape(17 * 17, 3 * 16 * 16)
        seen = views[:, b].flatten(1).add(1).mul(127.5).round().to(torch.uint8)
        distance = torch.cdist(seen.double(), windows.double())
        assert (distance.min(1).values == 0).all()
        assert len(distance.argmin(1).unique()) > 150  # of 289 places, 400 draws: 217 are expected
    again = data.sample_views(images, 400, "crops", data.generator(0, "t"), 16)
    assert torch.equal(views, again)
