"""Views of images and vectors: filters, geometry, colour, draws, named strengths."""

import math
import pickle
from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.signal import correlate2d
from sklearn.base import clone

from deepmix.augmentation import (
    IMAGE_AUGMENTATIONS,
    IMAGE_DRAWS,
    VECTOR_AUGMENTATIONS,
    ImageAugmentation,
    VectorAugmentation,
    adjust_light,
    affine_matrix,
    chroma_matrix,
    grayscale,
    mix_channels,
    nearest_other,
    sobel,
    warp,
)

EVERYTHING = ImageAugmentation(30, 0.3, 0.2, 0.6, 15, 0.4, 0.4, 0.5, 0.2, True)
ALL_IMAGE = [EVERYTHING, *IMAGE_AUGMENTATIONS.values()]
ALL_VECTOR = [VectorAugmentation(0.2, 0.3, 0.5), *VECTOR_AUGMENTATIONS.values()]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_images(n=4, channels=3, height=6, width=9, dtype=torch.float64):
    shape = n, channels, height, width
    return torch.rand(shape, generator=generator(7), dtype=torch.float64).to(dtype)


def random_rows(n=40, d=5, dtype=torch.float64):
    return torch.randn(n, d, generator=generator(8), dtype=torch.float64).to(dtype)


def random_draws(n=4):
    return 2 * torch.rand(n, len(IMAGE_DRAWS), generator=generator(9)) - 1


def place(size, n=1, **changes):
    """`affine_matrix` of n images, neutral but for the changes."""
    neutral = {"angle": 0.0, "zoom": 1.0, "shear": 0.0, "shift": (0.0, 0.0)}
    neutral |= {"keep": 1.0, "centre": (0.0, 0.0), "mirror": 1.0}
    values = {k: torch.tensor(v, dtype=torch.float64) for k, v in {**neutral, **changes}.items()}
    return affine_matrix(size, **{k: v.expand(n, *v.shape) for k, v in values.items()})


# --- Fixed filters ---


def test_gray_is_the_weighted_sum_of_red_green_blue():
    images = random_images()
    gray = grayscale(images)
    assert gray.shape == (4, 1, 6, 9)
    for i in range(4):
        for y in range(6):
            for x in range(9):
                r, g, b = images[i, :, y, x].tolist()
                value = 0.299 * r + 0.587 * g + 0.114 * b
                assert gray[i, 0, y, x].item() == pytest.approx(value, rel=1e-12)


def test_gray_images_stay_as_they_are():
    images = random_images(channels=1)
    assert torch.equal(grayscale(images), images)


def test_edges_are_correlations_with_the_sobel_kernels():
    images = random_images(channels=1)
    vertical = np.array([[1, 0, -1], [2, 0, -2], [1, 0, -1]])
    edges = sobel(images)
    assert edges.shape == (4, 2, 6, 9)
    for image, found in zip(images.numpy(), edges.numpy()):
        for kernel, plane in zip((vertical, vertical.T), found):
            np.testing.assert_allclose(plane, correlate2d(image[0], kernel, "same"), atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 2, 5, 5), (4, 5, 5), (4, 25)])
@pytest.mark.parametrize("function", [grayscale, sobel])
def test_filters_refuse_other_channel_counts(function, shape):
    with pytest.raises(ValueError, match=r"images must have shape \(B, 1.*height, width\); got"):
        function(torch.rand(shape))


def test_sobel_asks_for_gray():
    with pytest.raises(ValueError, match=r"\(4, 3, 6, 9\). Apply grayscale first"):
        sobel(random_images())


# --- Geometry ---


@pytest.mark.parametrize("size", [(11, 11), (7, 12), (12, 7)])
@pytest.mark.parametrize("degrees", [17.0, -65.0, 90.0, 180.0])
def test_a_rotation_is_that_of_scipy(size, degrees):
    images = random_images(2, 2, *size)
    views = warp(images, place(size, 2, angle=math.radians(degrees)))
    # SciPy turns the other way, and grid-constant is what torch calls zeros.
    settings = {"axes": (3, 2), "reshape": False, "order": 1, "mode": "grid-constant"}
    expected = ndimage.rotate(images.numpy(), -degrees, **settings)
    np.testing.assert_allclose(views, expected, atol=1e-12)


def test_a_quarter_turn_moves_pixels():
    images = random_images(2, 3, 8, 8)
    views = warp(images, place((8, 8), 2, angle=math.pi / 2))
    torch.testing.assert_close(views, images.rot90(-1, (2, 3)), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("right", "down"), [(2, 0), (0, -1), (-3, 2)])
def test_a_shift_by_whole_pixels_moves_pixels(right, down):
    images = random_images()
    views = warp(images, place((6, 9), 4, shift=(right / 9, down / 6)))
    expected = torch.zeros_like(images)
    for y in range(6):
        for x in range(9):
            if 0 <= y - down < 6 and 0 <= x - right < 9:
                expected[:, :, y, x] = images[:, :, y - down, x - right]
    torch.testing.assert_close(views, expected, rtol=0, atol=1e-12)


def test_a_mirror_swaps_left_and_right():
    images = random_images()
    views = warp(images, place((6, 9), 4, mirror=-1.0))
    torch.testing.assert_close(views, images.flip(3), rtol=0, atol=1e-12)


@pytest.mark.parametrize("centre", [(0.0, 0.0), (1.0, 1.0), (-1.0, 1.0), (0.3, -1.0)])
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_a_crop_sees_only_the_image(centre, keep):
    images = torch.ones(1, 1, 6, 9, dtype=torch.float64)
    views = warp(images, place((6, 9), keep=keep, centre=centre))
    torch.testing.assert_close(views, images, rtol=0, atol=1e-12)


def test_a_crop_of_half_the_sides_at_a_corner_enlarges_that_corner():
    x = torch.arange(8, dtype=torch.float64).expand(1, 1, 8, 8)
    views = warp(x, place((8, 8), keep=0.5, centre=(-1.0, 0.0)))
    # Half a pixel a step, from 0 + 1/2 - 7/16 on a line through the middle of the window.
    expected = 3.5 - 3.5 * 0.5 + (torch.arange(8) - 3.5) * 0.5
    torch.testing.assert_close(views[0, 0, 3], expected.double(), rtol=0, atol=1e-12)


def one_after_another(row, column, size, **p):
    """Where a pixel of the view lies in the image: each map undone in its turn, in pixels."""
    height, width = size
    x, y = column - (width - 1) / 2, row - (height - 1) / 2
    x, y = x - p["shift"][0] * width, y - p["shift"][1] * height
    point = complex(x, y) * complex(math.cos(p["angle"]), -math.sin(p["angle"])) / p["zoom"]
    x, y = point.real - math.tan(p["shear"]) * point.imag, point.imag
    x *= p["mirror"]
    x = p["keep"] * x + (1 - p["keep"]) * p["centre"][0] * (width - 1) / 2
    y = p["keep"] * y + (1 - p["keep"]) * p["centre"][1] * (height - 1) / 2
    return y + (height - 1) / 2, x + (width - 1) / 2


@pytest.mark.parametrize("mirror", [-1.0, 1.0])
def test_one_matrix_does_what_the_maps_do_one_after_another(mirror):
    images, size = random_images(1, 1), (6, 9)
    p = {"angle": 0.4, "zoom": 1.3, "shear": 0.2, "shift": (0.1, -0.2), "keep": 0.7}
    p |= {"centre": (0.6, -0.8), "mirror": mirror}
    points = [one_after_another(y, x, size, **p) for y in range(6) for x in range(9)]
    expected = ndimage.map_coordinates(
        images[0, 0].numpy(), np.array(points).T, order=1, mode="grid-constant"
    )
    views = warp(images, place(size, **p))
    np.testing.assert_allclose(views[0, 0], expected.reshape(size), atol=1e-12)


def test_every_image_has_its_own_matrix():
    images = random_images(2)
    both = torch.cat([place((6, 9), angle=0.3), place((6, 9), mirror=-1.0)])
    views = warp(images, both)
    for i in range(2):
        torch.testing.assert_close(views[i : i + 1], warp(images[i : i + 1], both[i : i + 1]))


# --- Colour ---


def test_light_scales_about_each_images_own_mean():
    images = random_images()
    contrast = torch.tensor([0.5, 1.0, 1.5, 0.0]).double()
    brightness = torch.tensor([1.0, 0.7, 1.2, 0.9]).double()
    views = adjust_light(images, contrast, brightness)
    for i in range(4):
        mean = sum(images[i].flatten().tolist()) / images[i].numel()
        for old, new in zip(images[i].flatten().tolist(), views[i].flatten().tolist()):
            value = brightness[i].item() * (mean + contrast[i].item() * (old - mean))
            assert new == pytest.approx(value, rel=1e-12)


def test_saturation_is_a_blend_with_gray():
    images, saturation = random_images(), torch.tensor([0.0, 0.4, 1.0, 1.7]).double()
    views = mix_channels(images, chroma_matrix(saturation, torch.zeros(4).double()))
    for i in range(4):
        for y in range(6):
            for x in range(9):
                pixel, gray = images[i, :, y, x], grayscale(images)[i, 0, y, x]
                expected = gray + saturation[i] * (pixel - gray)
                torch.testing.assert_close(views[i, :, y, x], expected)


def test_hue_turns_the_chroma_plane_and_keeps_the_brightness():
    images, hue = random_images(), torch.tensor([0.0, 0.5, -1.0, 3.0]).double()
    views = mix_channels(images, chroma_matrix(torch.ones(4).double(), hue))
    yiq = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    for i in range(4):
        for y in range(6):
            for x in range(9):
                before = yiq @ images[i, :, y, x].numpy()
                after = yiq @ views[i, :, y, x].numpy()
                turned = complex(*before[1:]) * np.exp(1j * hue[i].item())
                assert after[0] == pytest.approx(before[0], abs=1e-12)
                assert complex(*after[1:]) == pytest.approx(turned, abs=1e-12)


def test_gray_pixels_have_no_hue_or_saturation():
    gray = random_images(channels=1).expand(-1, 3, -1, -1)
    matrix = chroma_matrix(torch.full((4,), 1.6).double(), torch.full((4,), 2.0).double())
    torch.testing.assert_close(mix_channels(gray, matrix), gray)


# --- Views of images ---


def test_no_strength_is_no_change():
    images = random_images()
    views = ImageAugmentation()(images, generator())
    assert torch.equal(views, images)
    assert views.data_ptr() != images.data_ptr()


def test_neutral_draws_are_no_change():
    draws = torch.zeros(4, len(IMAGE_DRAWS))
    draws[:, IMAGE_DRAWS.index("crop")] = -1
    images = random_images()
    torch.testing.assert_close(EVERYTHING.apply(images, draws), images)


@pytest.mark.parametrize("channels", [1, 3])
def test_views_are_the_formulas_at_the_drawn_strengths(channels):
    images, draws = random_images(channels=channels), random_draws()
    views = EVERYTHING.apply(images, draws)
    for i in range(4):
        u = dict(zip(IMAGE_DRAWS, draws[i].tolist()))
        matrix = place(
            (6, 9),
            angle=math.radians(30 * u["rotation"]),
            zoom=1 + 0.3 * u["scale"],
            shear=math.radians(15 * u["shear"]),
            shift=(0.2 * u["shift_x"], 0.2 * u["shift_y"]),
            keep=1 - 0.4 * (u["crop"] + 1) / 2,
            centre=(u["crop_x"], u["crop_y"]),
            mirror=-1.0 if u["flip"] < 0 else 1.0,
        )
        light = torch.tensor([[1 + 0.4 * u["contrast"]], [1 + 0.4 * u["brightness"]]])
        expected = adjust_light(warp(images[i : i + 1], matrix), *light.double())
        if channels == 3:
            chroma = torch.tensor([[1 + 0.5 * u["saturation"]], [2 * math.pi * 0.2 * u["hue"]]])
            expected = mix_channels(expected, chroma_matrix(*chroma.double()))
        torch.testing.assert_close(views[i : i + 1], expected.clamp(0, 1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", [f.name for f in fields(ImageAugmentation)])
def test_every_strength_alone_changes_the_images(name):
    one = ImageAugmentation(**{name: getattr(EVERYTHING, name)})
    change = (one(random_images(8), generator()) - random_images(8)).abs().amax(dim=(1, 2, 3))
    assert change.max() > 0.01
    if name != "flip":
        assert change.min() > 1e-4


def test_saturation_and_hue_need_three_channels():
    colour = ImageAugmentation(saturation=0.5, hue=0.2)
    for channels in (1, 2, 4):
        images = random_images(channels=channels)
        assert torch.equal(colour(images, generator()), images)


def test_half_of_the_images_are_flipped():
    images = random_images(1).expand(2000, -1, -1, -1)
    views = ImageAugmentation(flip=True)(images, generator())
    flipped = (views - images.flip(3)).abs().amax(dim=(1, 2, 3)) < 1e-9
    kept = (views - images).abs().amax(dim=(1, 2, 3)) < 1e-9
    assert torch.equal(flipped, ~kept)
    assert flipped.double().mean().item() == pytest.approx(0.5, abs=0.04)


def test_without_flip_nothing_is_mirrored():
    views, images, draws = replace(EVERYTHING, flip=False), random_images(), random_draws()
    other = draws.clone()
    other[:, IMAGE_DRAWS.index("flip")] *= -1
    assert torch.equal(views.apply(images, draws), views.apply(images, other))
    assert not torch.equal(EVERYTHING.apply(images, draws), EVERYTHING.apply(images, other))


@pytest.mark.parametrize("size", [(8, 8), (5, 12), (1, 7)])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("views", ALL_IMAGE)
def test_views_are_images(views, channels, size):
    images = random_images(50, channels, *size, dtype=torch.float32)
    made = views(images, generator())
    assert made.shape == images.shape
    assert made.dtype == images.dtype
    assert made.min() >= 0
    assert made.max() <= 1


def test_an_image_does_not_depend_on_the_others():
    images, draws = random_images(), random_draws()
    together = EVERYTHING.apply(images, draws)
    for i in range(4):
        alone = EVERYTHING.apply(images[i : i + 1], draws[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("views", ALL_IMAGE)
def test_image_draws_come_from_the_generator_alone(views, global_random_states):
    images, before = random_images(), global_random_states()
    kept = images.clone()
    first, second = views(images, generator(1)), views(images, generator(1))
    assert global_random_states() == before
    assert torch.equal(images, kept)
    assert torch.equal(first, second)
    assert not torch.equal(first, views(images, generator(2)))


def test_strengths_do_not_change_the_stream_of_draws():
    after = []
    for views in [ImageAugmentation(), *ALL_IMAGE]:
        stream = generator()
        views(random_images(), stream)
        after.append(stream.get_state())
    assert all(torch.equal(state, after[0]) for state in after)


@pytest.mark.parametrize("channels", [1, 3])
def test_views_of_both_dtypes_are_the_same(channels):
    images = random_images(channels=channels)
    double, single = EVERYTHING(images, generator()), EVERYTHING(images.float(), generator())
    torch.testing.assert_close(single.double(), double, rtol=0, atol=2e-5)


def test_autocast_does_not_reach_the_geometry():
    images = random_images(dtype=torch.float32)
    expected = EVERYTHING(images, generator())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(EVERYTHING(images, generator()), expected)


@pytest.mark.parametrize("views", [EVERYTHING, VectorAugmentation(0.1, 0.2, 0.3)])
def test_augmentations_are_values(views):
    copies = pickle.loads(pickle.dumps(views)), clone(views, safe=False), replace(views)
    for copy in copies:
        assert copy == views
        assert hash(copy) == hash(views)
    assert views != type(views)()
    with pytest.raises(FrozenInstanceError):
        setattr(views, fields(views)[0].name, 0.0)


@pytest.mark.parametrize(
    ("name", "value", "interval"),
    [
        ("rotation", -1, r"\[0, 180\]"),
        ("rotation", 181, r"\[0, 180\]"),
        ("rotation", True, r"\[0, 180\]"),
        ("scale", 1, r"\[0, 1\)"),
        ("shift", 1.5, r"\[0, 1\]"),
        ("crop", 0, r"\(0, 1\]"),
        ("crop", 2.0, r"\(0, 1\]"),
        ("shear", 90, r"\[0, 90\)"),
        ("brightness", "high", r"\[0, 1\]"),
        ("contrast", None, r"\[0, 1\]"),
        ("saturation", math.nan, r"\[0, 1\]"),
        ("hue", 0.6, r"\[0, 0.5\]"),
    ],
)
def test_bad_image_strengths_are_refused(name, value, interval):
    message = rf"{name} must be a number in {interval}; got {value!r}. The default, .* leaves"
    with pytest.raises(ValueError, match=message):
        ImageAugmentation(**{name: value})


def test_a_flip_is_a_bool():
    with pytest.raises(ValueError, match="flip must be a bool; got 'yes'"):
        ImageAugmentation(flip="yes")


@pytest.mark.parametrize("views", [EVERYTHING, VectorAugmentation(0.1)])
@pytest.mark.parametrize("bad", [None, 0])
def test_the_global_generator_is_refused(views, bad):
    with pytest.raises(ValueError, match=rf"generator must be a torch.Generator.*got {bad}"):
        views(random_rows(), bad)


def test_rows_are_not_images():
    with pytest.raises(ValueError, match=r"images must have shape .* got \(40, 5\). Reshape"):
        EVERYTHING(random_rows(), generator())


# --- Views of vectors ---


def test_the_nearest_other_row_is_found():
    rows = random_rows()
    for i, found in enumerate(nearest_other(rows)):
        distances = [math.dist(rows[i], row) if j != i else math.inf for j, row in enumerate(rows)]
        assert torch.equal(found, rows[int(np.argmin(distances))])


def test_no_vector_strength_is_no_change():
    assert torch.equal(VectorAugmentation()(random_rows(), generator()), random_rows())


def test_noise_has_its_deviation():
    rows = random_rows(2000)
    noise = VectorAugmentation(noise=0.3)(rows, generator()) - rows
    assert noise.std().item() == pytest.approx(0.3, rel=0.03)
    assert noise.mean().item() == pytest.approx(0.0, abs=0.01)
    assert np.corrcoef(noise.T).ravel() == pytest.approx(np.eye(5).ravel(), abs=0.08)


@pytest.mark.parametrize("masking", [0.05, 0.5, 0.9, 1.0])
def test_masks_replace_their_share_by_zero(masking):
    rows = random_rows(4000)
    masked = VectorAugmentation(masking=masking)(rows, generator())
    zero = masked == 0
    assert torch.equal(masked[~zero], rows[~zero])
    assert zero.double().mean(dim=0).tolist() == pytest.approx([masking] * 5, abs=0.03)


@pytest.mark.parametrize("mixup", [0.5, 1.0])
def test_mixup_moves_a_uniform_share_of_the_way_to_the_nearest_other_row(mixup):
    rows = random_rows(1000)
    moved, way = (
        VectorAugmentation(mixup=mixup)(rows, generator()) - rows,
        nearest_other(rows) - rows,
    )
    share = (moved * way).sum(dim=1) / (way * way).sum(dim=1)
    torch.testing.assert_close(moved, share[:, None] * way)
    assert share.min() >= 0
    assert share.max() <= mixup
    quarters = share.quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist()
    assert quarters == pytest.approx([mixup / 4, mixup / 2, 3 * mixup / 4], abs=0.06 * mixup)


def test_a_row_alone_has_nothing_to_mix_with():
    row = random_rows(1)
    assert torch.equal(VectorAugmentation(mixup=1.0)(row, generator()), row)


def test_the_three_views_follow_each_other():
    rows, every = random_rows(), VectorAugmentation(0.2, 0.3, 0.5)
    draws = torch.randn(40, 11, generator=generator())
    step = VectorAugmentation(mixup=0.5).apply(rows, draws[:, :1])
    step = VectorAugmentation(noise=0.2).apply(step, draws[:, 1:6])
    step = VectorAugmentation(masking=0.3).apply(step, draws[:, 6:])
    assert torch.equal(every.apply(rows, draws), step)


@pytest.mark.parametrize("views", ALL_VECTOR)
def test_vector_draws_come_from_the_generator_alone(views, global_random_states):
    rows, before = random_rows(), global_random_states()
    kept = rows.clone()
    first, second = views(rows, generator(1)), views(rows, generator(1))
    assert global_random_states() == before
    assert torch.equal(rows, kept)
    assert torch.equal(first, second)
    assert not torch.equal(first, views(rows, generator(2)))


@pytest.mark.parametrize("views", ALL_VECTOR)
def test_vector_views_of_both_dtypes_are_the_same(views):
    rows = random_rows()
    single = views(rows.float(), generator())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), views(rows, generator()), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "value"), [("noise", -0.1), ("noise", math.inf), ("masking", 1.1), ("mixup", "all")]
)
def test_bad_vector_strengths_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be a number in \[0, .*; got {value!r}"):
        VectorAugmentation(**{name: value})


# --- Named strengths ---


def test_named_strengths_grow():
    growing = [IMAGE_AUGMENTATIONS[name] for name in ("weak", "medium", "strong")]
    for name in ("rotation", "scale", "shift", "brightness", "contrast", "saturation", "hue"):
        strengths = [getattr(views, name) for views in growing]
        assert strengths == sorted(set(strengths))


def test_only_natural_images_are_flipped_and_cropped():
    for name, views in IMAGE_AUGMENTATIONS.items():
        assert (views.flip, views.crop < 1) == (name == "natural", name == "natural")


def test_vector_views_are_named_after_their_one_strength():
    for name, views in VECTOR_AUGMENTATIONS.items():
        assert views == VectorAugmentation(**{name: getattr(views, name)})
        assert getattr(views, name) > 0
