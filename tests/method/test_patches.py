"""The patches against torchvision and Pillow, and the views."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from helpers import pictures
from torchvision import transforms

import data
import patches
from infra.device import generator
from patches import Views

FLAT = [(0, 0, 0), (255, 255, 255), (1, 1, 1), (127, 127, 127), (128, 128, 128), (128, 127, 129)]
SATURATED = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 255, 255), (255, 0, 255), (255, 255, 0)]
FACTORS = torch.linspace(0.6, 1.4, 7).tolist()
SHIFTS = [k / 255 for k in (-50.5, -30.5, -7.5, 0, 9.5, 22.5, 50.5)]  # Pillow: int(255 * shift)
TORCHVISION = {
    "brightness": TF.adjust_brightness,
    "contrast": TF.adjust_contrast,
    "saturation": TF.adjust_saturation,
    "hue": TF.adjust_hue,
    "grey": lambda image, _: TF.rgb_to_grayscale(image, num_output_channels=3),
    "blur": lambda image, sigma: TF.gaussian_blur(image, 13, sigma),
    "solarise": lambda image, _: TF.solarize(image, 128),
}


def flat_images(colours):
    return torch.tensor(colours, dtype=torch.uint8)[:, :, None, None].expand(-1, -1, 32, 32)


def through_pil(function, image, *values):
    """Apply a torchvision function to a uint8 tensor as a PIL image; return float32, 0 to 255."""
    return TF.pil_to_tensor(function(TF.to_pil_image(image), *values)).float()


def mapped(operation):
    code = torch.tensor(operation)
    return lambda x, factor: patches.map_colours(x, *patches.colour_map(code, factor))


@pytest.mark.parametrize(
    ("name", "ours", "values"),
    [
        ("brightness", mapped(patches.BRIGHTNESS), FACTORS),
        ("contrast", mapped(patches.CONTRAST), FACTORS),
        ("saturation", mapped(patches.SATURATION), FACTORS),
        ("hue", patches.adjust_hue, SHIFTS),
        ("grey", lambda x, _: patches.greyscale(x), [0.0]),
        ("blur", patches.gaussian_blur, [0.1, 0.3, 0.7, 1.0, 1.4, 2.0]),
        ("solarise", lambda x, _: patches.solarise(x), [0.0]),
    ],
)
def test_augmentations_equal_torchvisions(name, ours, values):
    images = torch.cat([pictures(12), flat_images(FLAT + SATURATED)])
    images = images.repeat_interleave(len(values), 0)  # each image with each value
    values = values * (len(images) // len(values))
    result = ours(images / 255, torch.tensor(values)) * 255
    rows = list(zip(images, values, strict=True))
    error = (result - torch.stack([through_pil(TORCHVISION[name], *row) for row in rows])).abs()
    if name == "hue":
        # Pillow rounds to whole 255ths of a turn, each up to 6 levels of a channel.
        assert error.max() <= 18
        assert error.mean() <= 1
    else:
        assert error.max() <= (1e-3 if name == "solarise" else 2)
    if name in patches.JITTER or name == "blur":
        exact = torch.stack([TORCHVISION[name](image / 255, value) for image, value in rows]) * 255
        torch.testing.assert_close(result, exact, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(32, 32, 32), (40, 28, 32), (64, 64, 32), (96, 80, 32), (128, 120, 112)],
)
def test_crops_equal_torchvisions(height, width, size, monkeypatch):
    monkeypatch.setattr(patches, "augment_", lambda x, plan: None)
    images = pictures(5, height, width)
    sampled = patches.sample_patches(images, 6, generator(0, "t"), size)
    sampled = (sampled.flatten(0, 1) + 1) * 127.5  # (P * B, 3, S, S), 0 to 255
    params = patches.sample_params(30, height, width, generator(0, "t"))
    for i, patch in enumerate(sampled):
        box = int(params["top"][i]), int(params["left"][i]), height // 2, width // 2
        mode = TF.InterpolationMode.BICUBIC if size > 32 else TF.InterpolationMode.BILINEAR
        expected = through_pil(TF.resized_crop, images[i % 5], *box, [size, size], mode)
        error = (patch - (expected.flip(-1) if params["flip"][i] else expected)).abs()
        # Bicubic: Pillow also clips what overshoots between the two axes.
        assert error.max() <= (8 if size > 32 else 2)
        assert (error <= 2).float().mean() > 0.995


def augmented_with_pil(image, own):
    """Return a patch of a uint8 tensor as a PIL image; own: the parameters of this patch."""
    box = own["top"], own["left"], 16, 16
    patch = TF.resized_crop(TF.to_pil_image(image), *box, [32, 32])
    if own["flip"]:
        patch = TF.hflip(patch)
    names = list(patches.JITTER)
    for k in own["order"] if own["jitter"] else []:
        patch = TORCHVISION[names[k]](patch, own[names[k]])
    for name, value in [("grey", None), ("blur", own["sigma"]), ("solarise", None)]:
        if own[name]:
            patch = TORCHVISION[name](patch, value)
    return TF.pil_to_tensor(patch)


def test_patches_equal_a_plain_loop_over_pil_images(monkeypatch):
    images, n = pictures(20), 20
    params = patches.sample_params(n * len(images), 32, 32, generator(0, "t"))
    for rare, every in [("grey", 3), ("blur", 4), ("solarise", 2)]:  # so that all of them meet
        params[rare] |= torch.arange(n * len(images)) % every == 0
    monkeypatch.setattr(patches, "sample_params", lambda *args: params)
    sampled = (patches.sample_patches(images, n, None) + 1) * 127.5
    assert sampled.shape == (n, len(images), 3, 32, 32)
    errors = []
    for i, patch in enumerate(sampled.flatten(0, 1)):
        own = {name: values[i].tolist() for name, values in params.items()}
        errors.append((patch - augmented_with_pil(images[i % 20], own)).abs())
    errors = torch.stack(errors)
    assert errors.median() <= 1
    # Of the worst patch; before solarise, a rounding may invert a single pixel.
    assert errors.mean((1, 2, 3)).max() <= 4


def test_strengths_of_the_augmentation():
    images = pictures(8)

    def draw(**strengths):
        augment = patches.Augment(**strengths)
        return patches.sample_patches(images, 20, generator(0, "t"), 16, augment=augment)

    crops = draw(jitter=0, grey=0, blur=0, solarise=0).flatten(0, 1)
    params = patches.sample_params(160, 32, 32, generator(0, "t"))
    for i, patch in enumerate(crops):
        top, left = params["top"][i], params["left"][i]
        expected = images[i % 8, :, top : top + 16, left : left + 16] / 127.5 - 1
        if params["flip"][i]:
            expected = expected.flip(-1)
        torch.testing.assert_close(patch, expected, atol=1e-4, rtol=0)
    grey = draw(grey=1, blur=0, solarise=0)
    torch.testing.assert_close(grey, grey[:, :, :1].expand_as(grey))
    for strength, low, high, hue in ((0.5, 0.8, 1.2, 0.1), (2.5, 0, 2, 0.5)):
        augment = patches.Augment(jitter=strength)
        params = patches.sample_params(9000, 32, 32, generator(0, "t"), augment)
        for name in ("brightness", "contrast", "saturation"):
            assert low <= params[name].min() < low + 0.01
            assert high - 0.01 < params[name].max() <= high
        assert 0.99 * hue < params["hue"].max() <= hue


def chi2(values, n_cells):
    expected = len(values) / n_cells
    return float((torch.bincount(values, minlength=n_cells) - expected).square().sum() / expected)


def test_parameters_are_drawn_independently_from_the_right_distributions():
    n = 24_000
    params = patches.sample_params(n, 32, 32, generator(0, "t"))
    assert {len(values) for values in params.values()} == {n}
    assert (params["order"].sort(1).values == torch.arange(4)).all()
    _, permutation = params["order"].unique(dim=0, return_inverse=True)
    assert chi2(permutation, 24) < 60  # 23 degrees of freedom
    assert set(params["top"].tolist()) == set(params["left"].tolist()) == set(range(17))
    assert chi2(17 * params["top"] + params["left"], 17 * 17) < 288 + 5 * (2 * 288) ** 0.5
    probabilities = dict(flip=0.5, jitter=0.8, grey=0.2, blur=0.1, solarise=0.1)
    for name, p in probabilities.items():
        bound = 4 * (p * (1 - p) / n) ** 0.5
        assert params[name].float().mean() == pytest.approx(p, abs=bound), name
    factor = (0.6, 1.4)
    ranges = dict(brightness=factor, contrast=factor, saturation=factor, hue=(-0.2, 0.2))
    for name, (low, high) in {**ranges, "sigma": (0.1, 2.0)}.items():
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
    """Return mean and standard deviation of each channel, and the gradient energy.

    x: (n, 3, 32, 32), in [0, 1].
    """
    energy = x.diff(dim=2).square().mean() + x.diff(dim=3).square().mean()
    return torch.stack([*x.mean((0, 2, 3)), *x.std((0, 2, 3)), energy])


def test_patches_have_the_statistics_of_torchvisions():
    """20,000 each, 50 of each image, so that the noise of the draws is below 0.8%."""
    textures = data.load_images("textures", "", False).images[:400].float()
    smooth = pictures(200, noise=0).float()
    images = torch.cat([textures[:200], 0.6 * textures[200:] + 0.4 * smooth])
    images = images.round().to(torch.uint8)
    loader = torch.utils.data.DataLoader(
        [TF.to_pil_image(image) for image in images] * 50,
        batch_size=400,
        num_workers=2,
        collate_fn=draw_with_torchvision,
        generator=torch.Generator().manual_seed(0),
    )
    theirs = torch.cat(list(loader)) / 255
    steps = [patches.sample_patches(images, 5, generator(0, "t", step=step)) for step in range(10)]
    ours = torch.cat(steps).flatten(0, 1).add(1).div(2)  # (n, 3, 32, 32), in [0, 1]
    assert len(theirs) == len(ours) == 20_000
    torch.testing.assert_close(statistics(ours), statistics(theirs), rtol=0.02, atol=0)


def test_patches_depend_on_the_generator_alone():
    images, state = pictures(4, 64, 64), torch.get_rng_state()
    before = images.clone()
    rngs = [generator(0, "t", step=step) for step in (0, 0, 1)]
    draws = [patches.sample_patches(images, 3, rng, size=16) for rng in rngs]
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
    sampled = patches.sample_patches(images, 200, generator(0, "t"))
    assert (sampled[:, :4] == -1).all()
    assert (sampled[:, 4].std((1, 2, 3)) > 0.01).all()
    assert sampled.min() >= -1 - 1e-6
    assert sampled.max() <= 1 + 1e-6
    assert (sampled[:, 5].mean((1, 2, 3)) > 0.1).any()


def test_generators_differ_with_each_argument():
    def draw(*arguments):
        return tuple(torch.rand(4, generator=generator(*arguments)).tolist())

    draws = {draw(0, "a", 0, 0), draw(1, "a", 0, 0), draw(0, "b", 0, 0)}
    draws |= {draw(0, "a", 1, 0), draw(0, "a", 0, 1), draw(2**31 - 1, "a", 12, 3)}
    assert len(draws) == 6
    assert draw(0, "a") == draw(0, "a", 0, 0)


def test_a_grid_is_of_crops_at_even_distances():
    """At its own size a crop is the pixels themselves."""
    images = data.load_images("textures", "", False).images[:3]
    for n, offsets in ((1, [8]), (3, [8]), (4, [0, 16]), (9, [0, 8, 16]), (20, [0, 5, 11, 16])):
        views = patches.sample_views(images, Views(n, "grid", 16), None)
        crops = [images[:, :, i : i + 16, j : j + 16] for i in offsets for j in offsets]
        torch.testing.assert_close(views, torch.stack(crops) / 127.5 - 1, rtol=0, atol=1e-6)
    large = patches.sample_views(images, Views(4, "grid"), None)
    crop = images[:, :, :16, 16:] / 127.5 - 1
    expected = F.interpolate(crop, size=32, mode="bilinear", align_corners=False)
    torch.testing.assert_close(large[1], expected, rtol=0, atol=1e-5)


def test_random_crops_are_crops_and_nothing_else():
    images = torch.arange(2 * 3 * 32 * 32).remainder(251).view(2, 3, 32, 32).to(torch.uint8)
    views = patches.sample_views(images, Views(400, "crops", 16), generator(0, "t"))
    assert views.shape == (400, 2, 3, 16, 16)
    for b in range(2):
        windows = images[b].unfold(1, 16, 1).unfold(2, 16, 1)  # (3, 17, 17, 16, 16)
        windows = windows.permute(1, 2, 0, 3, 4).reshape(17 * 17, 3 * 16 * 16)
        crops = views[:, b].flatten(1).add(1).mul(127.5).round()
        distance = torch.cdist(crops.double(), windows.double())
        assert (distance.min(1).values == 0).all()
        assert len(distance.argmin(1).unique()) > 150  # of 289 crops, 400 draws: 217 are expected
    again = patches.sample_views(images, Views(400, "crops", 16), generator(0, "t"))
    assert torch.equal(views, again)
