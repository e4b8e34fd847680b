"""common/augment.py on spheres and boxes measured in mm, with values and labels counted by hand."""

import math
from collections import Counter
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F

from common.augment import FOLDING_SHARE, Augmentation3d, augment_batch, draw
from common.warp import sampling_grid, warp

CHANGES = ("spatial", "elastic", "noise", "blur", "brightness", "contrast", "low_resolution", "gamma")
NOTHING = Augmentation3d(**{f"{name}_probability": 0.0 for name in CHANGES})
EVERYTHING = Augmentation3d(
    flip_probability=(0.5, 0.5, 0.5), **{f"{name}_probability": 1.0 for name in CHANGES}
)
ANISOTROPIC = ((14, 40, 30), (3.0, 1.0, 1.25))  # (D, H, W) and mm: 42 x 40 x 37.5 mm


def only(**settings) -> Augmentation3d:
    """Nothing but what is named; a probability that is not named is 0."""
    return replace(NOTHING, **settings)


def noise_batch(n=2, c=1, shape=(12, 16, 20), seed=0):
    """Images uniform in -1..1 and labels 0, 3, 7 in equal parts."""
    generator = torch.Generator().manual_seed(seed)
    image = 2 * torch.rand(n, c, *shape, generator=generator) - 1
    return image, torch.tensor([0, 3, 7], dtype=torch.uint8)[
        torch.randint(3, (n, *shape), generator=generator)
    ]


def positions_mm(shape, spacing_mm):
    """(3, D, H, W): z, y, x of each voxel about the patch centre."""
    axes = [(torch.arange(n) - (n - 1) / 2) * mm for n, mm in zip(shape, spacing_mm, strict=True)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def blob(shape, spacing_mm, centre_mm=(0.0, 0.0, 0.0), sd_mm=(4.0, 4.0, 4.0)):
    """Gaussian ball or ellipsoid, (D, H, W)."""
    offset = positions_mm(shape, spacing_mm) - torch.tensor(centre_mm).view(3, 1, 1, 1)
    return torch.exp(-0.5 * (offset / torch.tensor(sd_mm).view(3, 1, 1, 1)).square().sum(0))


def moments(volume, spacing_mm):
    """Centre (3,) and covariance (3, 3) in mm of a positive volume."""
    position = positions_mm(volume.shape, spacing_mm).flatten(1).double()
    weight = volume.flatten().double() / volume.double().sum()
    centre = position @ weight
    offset = position - centre[:, None]
    return centre, (offset * weight) @ offset.T


def warped(volume, spacing_mm, mode="bilinear", **change):
    return warp(volume[None], sampling_grid(volume.shape, spacing_mm, **change), mode)[0]


def first_seeds(settings, condition, count=1, shape=(12, 16, 20)):
    found = [s for s in range(2000) if condition(draw(settings, s, shape, (1.0, 1.0, 1.0)))]
    assert len(found) >= count
    return found[:count]


# ---- nothing and everything ----


def test_without_any_change_the_batch_stays_bit_for_bit():
    image, label = noise_batch(n=3, c=2)
    new_image, new_label = augment_batch(image, label, NOTHING, [5, 6, 7])
    assert torch.equal(new_image, image) and torch.equal(new_label, label)
    assert new_image.data_ptr() != image.data_ptr() and new_label.data_ptr() != label.data_ptr()


@pytest.mark.parametrize("label_dtype", [torch.uint8, torch.int16, torch.int64])
@pytest.mark.parametrize("image_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_types_shapes_labels_and_inputs_are_kept(image_dtype, label_dtype):
    image, label = noise_batch(n=6, c=2)
    image, label = image.to(image_dtype), label.to(label_dtype)
    before = image.clone(), label.clone()
    new_image, new_label = augment_batch(image, label, EVERYTHING, range(6), (2.0, 1.0, 0.7))
    assert new_image.dtype == torch.float32 and new_image.shape == image.shape
    assert new_label.dtype == label_dtype and new_label.shape == label.shape
    assert new_image.isfinite().all() and not torch.equal(new_image, image.float())
    assert not torch.equal(new_label, label) and set(new_label.unique().tolist()) == {0, 3, 7}
    assert torch.equal(image, before[0]) and torch.equal(label, before[1])
    assert not new_image.requires_grad


def test_no_label_gives_no_label_and_the_same_image():
    image, label = noise_batch()
    alone, none = augment_batch(image, None, EVERYTHING, [1, 2])
    assert none is None
    assert torch.equal(alone, augment_batch(image, label, EVERYTHING, [1, 2])[0])


@pytest.mark.parametrize("shape", [(1, 16, 20), (5, 1, 1), (1, 1, 1), (3, 64, 2)])
def test_thin_patches_and_constant_images_stay_finite(shape):
    constant = torch.full((20, 1, *shape), -1.0)
    settings = replace(EVERYTHING, noise_sd=0.0, blur_mm=(0.0, 3.0), low_resolution=(1.0, 9.0))
    image, _ = augment_batch(constant, None, replace(settings, brightness=0.0), range(20), (5.0, 0.5, 0.5))
    # Nothing may come in from outside a constant patch; gamma below 1 magnifies rounding at its lower end.
    torch.testing.assert_close(image, constant, atol=1e-4, rtol=0)


def test_extreme_amounts_stay_finite():
    extreme = replace(EVERYTHING, rotation_deg=(180, 180, 180), scale=0.99, elastic_mm=9.0, contrast=1.0)
    extreme = replace(extreme, gamma=(0.01, 100), blur_mm=(0, 50), low_resolution=(1, 100), noise_sd=10)
    image, label = noise_batch(n=30)
    new_image, new_label = augment_batch(image, label, extreme, range(30))
    assert new_image.isfinite().all() and set(new_label.unique().tolist()) <= {0, 3, 7}


# ---- seeds ----


def test_an_item_depends_on_its_seed_alone():
    image, label = noise_batch(n=4)
    seeds = [11, 12, 2**63 - 1, -3]
    together = augment_batch(image, label, EVERYTHING, seeds)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    for order in ([0], [3, 1], [2, 0, 1, 3]):
        parts = augment_batch(image[order], label[order], EVERYTHING, torch.tensor([seeds[i] for i in order]))
        for a, b in zip(together, parts, strict=True):
            assert torch.equal(a[order], b)
    assert torch.equal(torch.get_rng_state(), state)  # torch's own generator is left alone


def test_other_seeds_give_other_patches():
    image, label = noise_batch(n=1)
    images, labels = augment_batch(
        image.expand(40, -1, -1, -1, -1), label.expand(40, -1, -1, -1), EVERYTHING, range(40)
    )
    assert len({tuple(i.flatten()[:50].tolist()) for i in images}) == 40
    assert len({tuple(i.flatten().tolist()) for i in labels}) == 40


def test_switching_one_change_off_leaves_the_others():
    shape, spacing_mm = ANISOTROPIC
    for seed in range(20):
        full = draw(EVERYTHING, seed, shape, spacing_mm)
        for name in CHANGES:
            part = draw(replace(EVERYTHING, **{f"{name}_probability": 0.0}), seed, shape, spacing_mm)
            changed = {key for key in full if str(full[key]) != str(part[key])}
            expected = {"spatial": {"rotation_deg", "scale"}, "elastic": {"elastic_mm"}}
            expected |= {"noise": {"noise_sd"}, "blur": {"blur_mm"}}
            assert changed == expected.get(name, {name})


def test_how_often_and_how_much():
    probabilities = dict(zip(CHANGES, (0.5, 0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.9), strict=True))
    settings = Augmentation3d(
        flip_probability=(0.0, 1.0, 0.25), **{f"{k}_probability": p for k, p in probabilities.items()}
    )
    n, counts, values, pairs = 3000, Counter(), {}, Counter()
    for seed in range(n):
        drawn = draw(settings, seed, (8, 8, 8), (1.0, 1.0, 1.0))
        counts.update(f"flip{axis}" for axis in range(3) if drawn["flip"][axis])
        counts["spatial"] += drawn["scale"] != 1
        assert (drawn["scale"] != 1) == any(drawn["rotation_deg"])
        names = dict(elastic="elastic_mm", noise="noise_sd", blur="blur_mm")
        for name in CHANGES[1:]:
            value = drawn[names.get(name, name)]
            if value is not None:
                counts[name] += 1
                values.setdefault(name, []).append(value)
        if drawn["scale"] != 1:
            for key, value in zip("zyx", drawn["rotation_deg"], strict=True):
                values.setdefault(key, []).append(value)
            values.setdefault("scale", []).append(drawn["scale"])
        pairs["both"] += drawn["gamma"] is not None and drawn["contrast"] is not None
    expected = probabilities | {"flip0": 0.0, "flip1": 1.0, "flip2": 0.25}
    for name, p in expected.items():
        assert counts[name] / n == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / n) + 1e-9), name
    assert pairs["both"] / n == pytest.approx(0.9 * 0.6, abs=0.04)  # drawn apart from each other
    s = settings
    ranges = dict(z=(-15, 15), y=(-15, 15), x=(-15, 15), scale=(0.85, 1.15), noise=(0, s.noise_sd))
    ranges |= dict(blur=s.blur_mm, brightness=(-0.1, 0.1), contrast=(0.75, 1.25))
    ranges |= dict(low_resolution=s.low_resolution)
    for name, (low, high) in ranges.items():
        u = (torch.tensor(values[name]) - low) / (high - low)
        assert u.min() >= 0 and u.max() <= 1 and u.std() == pytest.approx(12**-0.5, abs=0.02), name
        assert u.mean() == pytest.approx(0.5, abs=4 / math.sqrt(12 * len(u))), name
    gamma = torch.tensor(values["gamma"])
    assert 0.7 <= gamma.min() < 0.72 and 1.45 < gamma.max() <= 1.5
    middle = (0.7 * 1.5) ** 0.5
    assert (gamma < middle).float().mean() == pytest.approx(0.5, abs=0.04)  # uniform in the logarithm


# ---- rotation and scale ----


@pytest.mark.parametrize("axis, dims", [(0, (-1, -2)), (1, (-3, -1)), (2, (-2, -3))])
@pytest.mark.parametrize("n", [8, 9])
def test_quarter_turns_of_a_cube(axis, dims, n):
    image = torch.rand(n, n, n, generator=torch.Generator().manual_seed(n))
    for turns in (1, 2, 3, -1):
        angles = [0.0, 0.0, 0.0]
        angles[axis] = 90.0 * turns
        expected = torch.rot90(image, turns, dims)  # about z from x towards y
        torch.testing.assert_close(
            warped(image, (1.0, 1.0, 1.0), rotation_deg=angles), expected, atol=1e-5, rtol=0
        )
        nearest = warped(image, (2.0, 2.0, 2.0), "nearest", rotation_deg=angles)
        assert torch.equal(nearest, expected)


def test_rotations_follow_each_other_about_x_then_y_then_z():
    image = torch.rand(7, 7, 7, generator=torch.Generator().manual_seed(0))
    expected = torch.rot90(torch.rot90(torch.rot90(image, 1, (-2, -3)), 1, (-3, -1)), 1, (-1, -2))
    torch.testing.assert_close(
        warped(image, (1, 1, 1), rotation_deg=(90, 90, 90)), expected, atol=1e-5, rtol=0
    )
    half = torch.rot90(torch.rot90(image, 1, (-2, -3)), 1, (-1, -2))
    torch.testing.assert_close(warped(image, (1, 1, 1), rotation_deg=(90, 0, 90)), half, atol=1e-5, rtol=0)


@pytest.mark.parametrize("angles", [(30.0, 0, 0), (0, 25.0, 0), (0, 0, -40.0), (20.0, -15.0, 35.0)])
def test_a_ball_in_mm_stays_a_ball_on_anisotropic_voxels(angles):
    shape, spacing_mm = ANISOTROPIC
    centre, covariance = moments(warped(blob(shape, spacing_mm), spacing_mm, rotation_deg=angles), spacing_mm)
    assert centre.abs().max() < 0.02
    eigenvalues = torch.linalg.eigvalsh(covariance)
    # 16 mm^2, and what linear interpolation widens it by: at most h^2 / 4, 2.25 mm^2 at 3 mm.
    assert eigenvalues.min() > 15.5 and eigenvalues.max() < 18.0


def test_an_ellipsoid_off_the_centre_turns_by_the_angle_in_mm():
    shape, spacing_mm, angle = (20, 60, 48), (3.0, 1.0, 1.25), math.radians(30)
    before = blob(shape, spacing_mm, (3.0, 4.0, 10.0), (4.0, 4.0, 6.0))
    for axis, (a, b) in {0: (2, 1), 1: (0, 2), 2: (1, 0)}.items():  # turns from axis a towards axis b
        angles = [0.0, 0.0, 0.0]
        angles[axis] = 30.0
        turn = torch.eye(3, dtype=torch.float64)
        turn[a, a] = turn[b, b] = math.cos(angle)
        turn[b, a], turn[a, b] = math.sin(angle), -math.sin(angle)
        centre, covariance = moments(before, spacing_mm)
        new_centre, new_covariance = moments(warped(before, spacing_mm, rotation_deg=angles), spacing_mm)
        torch.testing.assert_close(new_centre, turn @ centre, atol=0.15, rtol=0)
        torch.testing.assert_close(new_covariance, turn @ covariance @ turn.T, atol=1.8, rtol=0)


@pytest.mark.parametrize("scale", [0.8, 1.25])
def test_scale_enlarges_in_mm_about_the_centre(scale):
    shape, spacing_mm = (24, 60, 60), (2.0, 1.0, 1.0)
    volume = blob(shape, spacing_mm, (2.0, -3.0, 5.0))
    centre, covariance = moments(volume, spacing_mm)
    new_centre, new_covariance = moments(warped(volume, spacing_mm, scale=scale), spacing_mm)
    torch.testing.assert_close(new_centre, scale * centre, atol=0.1, rtol=0)
    torch.testing.assert_close(new_covariance, scale**2 * covariance, atol=1.3, rtol=0)


def test_a_batch_grows_by_the_scale_that_was_drawn():
    shape, spacing_mm, settings = (24, 60, 60), (2.0, 1.0, 1.0), only(spatial_probability=1.0, scale=0.3)
    settings = replace(settings, rotation_deg=(0.0, 0.0, 0.0))
    volume = blob(shape, spacing_mm)
    _, covariance = moments(volume, spacing_mm)
    for seed in (1, 2):
        scale = draw(settings, seed, shape, spacing_mm)["scale"]
        assert abs(scale - 1) > 0.1
        image, _ = augment_batch(volume[None, None], None, settings, [seed], spacing_mm)
        _, new_covariance = moments(image[0, 0], spacing_mm)
        torch.testing.assert_close(new_covariance, scale**2 * covariance, atol=1.3, rtol=0)


def test_image_and_label_move_together():
    shape, spacing_mm = ANISOTROPIC
    volume = blob(shape, spacing_mm, (4.0, 5.0, -3.0), (7.0, 5.0, 4.0))
    mask = (volume > 0.5).to(torch.uint8)
    settings = only(
        spatial_probability=1.0,
        elastic_probability=1.0,
        flip_probability=(0.5, 0.5, 0.5),
        rotation_deg=(40, 40, 40),
    )
    n = 12
    images, masks = augment_batch(
        volume.expand(n, 1, -1, -1, -1), mask.expand(n, -1, -1, -1), settings, range(n), spacing_mm
    )
    for image, moved in zip(images[:, 0], masks, strict=True):
        dice = 2 * ((image > 0.5) & (moved > 0)).sum() / ((image > 0.5).sum() + (moved > 0).sum())
        still = 2 * (mask & moved).sum() / (mask.sum() + moved.sum())
        assert dice > 0.88 and still < 0.88


def test_soft_targets_move_as_the_image_does():
    image, _ = noise_batch(n=5, c=3)
    settings = replace(
        NOTHING, spatial_probability=0.7, elastic_probability=0.7, flip_probability=(0.5, 0.5, 0.5)
    )
    new_image, new_target = augment_batch(image, image.half(), settings, range(5))
    assert new_target.dtype == torch.float16
    torch.testing.assert_close(new_image, new_target.float(), atol=2e-3, rtol=0)
    assert augment_batch(image, image[:, :1].double(), settings, range(5))[1].shape == (5, 1, 12, 16, 20)


def test_large_label_values_survive():
    label = torch.full((1, 8, 8, 8), 2**24 - 1)
    settings = only(spatial_probability=1.0)
    assert torch.equal(augment_batch(torch.zeros(1, 1, 8, 8, 8), label, settings, [0])[1], label)


# ---- elastic ----


def test_elastic_field_is_bounded_smooth_and_folds_nothing():
    shape, spacing_mm = (24, 50, 40), (3.0, 1.0, 1.5)
    settings = only(elastic_probability=1.0, elastic_mm=FOLDING_SHARE * 20, elastic_grid_mm=20.0)
    to_mm = torch.tensor([n * mm / 2 for n, mm in zip(shape, spacing_mm, strict=True)]).flip(0)
    still = sampling_grid(shape, spacing_mm)
    spread = []
    for seed in range(6):
        points = draw(settings, seed, shape, spacing_mm)["elastic_mm"]
        assert points.shape == (7, 6, 6, 3) and points.abs().max() <= 8.0
        moved = sampling_grid(shape, spacing_mm, elastic_mm=points, elastic_grid_mm=20.0)
        field = ((moved - still) * to_mm).flip(-1)  # mm, z y x
        assert field.abs().max() < 8.0
        spread.append(field.std().item())
        place = (moved * to_mm).flip(-1)
        steps = [place.diff(dim=axis) for axis in range(3)]
        d, h, w = (n - 1 for n in shape)
        jacobian = torch.stack(
            [step[:d, :h, :w] / mm for step, mm in zip(steps, spacing_mm, strict=True)], dim=-1
        )
        assert torch.linalg.det(jacobian).min() > 0
        curvature = [field.diff(n=2, dim=axis).abs().max() / mm**2 for axis, mm in enumerate(spacing_mm)]
        assert max(curvature) < 4 * 8.0 / 20**2  # of a uniform cubic B-spline: at most 4 max |c| / h^2
    assert 0.15 < sum(spread) / len(spread) / 8.0 < 0.25  # "about a fifth"


def test_a_constant_and_a_linear_control_grid_give_that_field_everywhere():
    shape, spacing_mm, grid_mm = (10, 21, 16), (3.0, 1.0, 1.3), 7.0
    still = sampling_grid(shape, spacing_mm)
    to_mm = torch.tensor([n * mm / 2 for n, mm in zip(shape, spacing_mm, strict=True)])
    points = [math.ceil(n * mm / grid_mm) + 3 for n, mm in zip(shape, spacing_mm, strict=True)]
    shift = torch.tensor([1.0, -2.0, 0.5]).expand(*points, 3)
    field = (sampling_grid(shape, spacing_mm, elastic_mm=shift, elastic_grid_mm=grid_mm) - still).flip(
        -1
    ) * to_mm
    torch.testing.assert_close(field, shift[0, 0, 0].expand(*shape, 3), atol=1e-4, rtol=0)
    # B-splines repeat linear functions: a tenth of the position, whose second control point is at the edge
    axes = [(torch.arange(p) - 1) * grid_mm - edge for p, edge in zip(points, to_mm, strict=True)]
    linear = 0.1 * torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    field = (sampling_grid(shape, spacing_mm, elastic_mm=linear, elastic_grid_mm=grid_mm) - still).flip(
        -1
    ) * to_mm
    expected = 0.1 * positions_mm(shape, spacing_mm).permute(1, 2, 3, 0)
    torch.testing.assert_close(field, expected, atol=1e-4, rtol=0)


# ---- flips ----


def test_flips_only_along_allowed_axes_and_without_interpolation():
    image, label = noise_batch(n=30)
    for axis in range(3):
        probability = [0.0, 0.0, 0.0]
        probability[axis] = 0.5
        images, labels = augment_batch(
            image[:1].expand_as(image),
            label[:1].expand_as(label),
            only(flip_probability=probability),
            range(30),
        )
        flipped = 0
        for new_image, new_label in zip(images[:, 0], labels, strict=True):
            if not torch.equal(new_image, image[0, 0]):
                assert torch.equal(new_image, image[0, 0].flip(axis))
                assert torch.equal(new_label, label[0].flip(axis))
                flipped += 1
            else:
                assert torch.equal(new_label, label[0])
        assert 5 <= flipped <= 25


def test_a_flip_along_x_alone_exchanges_sides():
    image = torch.zeros(1, 1, 2, 2, 6)
    label = torch.tensor([[0, 1, 2, 3, 4, 7]], dtype=torch.uint8).expand(1, 2, 2, 6)
    swap = ((1, 4), (2, 3), (5, 6))
    by_x = augment_batch(image, label, only(flip_probability=(0, 0, 1), swap_labels=swap), [0])[1]
    assert by_x[0, 0, 0].tolist() == [7, 1, 2, 3, 4, 0]
    by_zy = augment_batch(image, label, only(flip_probability=(1, 1, 0), swap_labels=swap), [0])[1]
    assert torch.equal(by_zy, label)
    soft = F.one_hot(label.long(), 8).movedim(-1, 1).float()
    by_x_soft = augment_batch(image, soft, only(flip_probability=(0, 0, 1), swap_labels=swap), [0])[1]
    assert torch.equal(by_x_soft.argmax(1), by_x.long())
    turned = only(
        flip_probability=(0, 0, 1),
        swap_labels=swap,
        spatial_probability=1.0,
        rotation_deg=(0, 0, 0),
        scale=0.01,
    )
    assert augment_batch(image, label, turned, [0])[1][0, 0, 0].tolist() == [7, 1, 2, 3, 4, 0]
    assert label[0, 0, 0].tolist() == [0, 1, 2, 3, 4, 7]


# ---- grey values ----


def test_grey_value_changes_leave_labels_alone():
    image, label = noise_batch(n=10)
    settings = replace(EVERYTHING, flip_probability=(0, 0, 0), spatial_probability=0, elastic_probability=0)
    new_image, new_label = augment_batch(image, label, settings, range(10))
    assert torch.equal(new_label, label) and not torch.equal(new_image, image)


def test_noise_has_the_drawn_standard_deviation_in_each_channel():
    settings = only(noise_probability=1.0, noise_sd=0.4)
    image = torch.full((5, 2, 20, 30, 30), 0.3)
    noise = augment_batch(image, None, settings, range(5))[0] - image
    for seed in range(5):
        sd = draw(settings, seed, (20, 30, 30), (1, 1, 1))["noise_sd"]
        for channel in noise[seed]:
            assert channel.std() == pytest.approx(sd, rel=0.03) and channel.mean().abs() < 5 * sd / 18000**0.5
        assert torch.corrcoef(noise[seed].flatten(1))[0, 1].abs() < 0.05
    between_items = torch.corrcoef(noise[:, 0].flatten(1)) - torch.eye(5)
    assert between_items.abs().max() < 0.05


def test_blur_widens_by_sigma_in_mm():
    shape, spacing_mm = (30, 60, 40), (3.0, 1.0, 1.5)
    volume = blob(shape, spacing_mm, sd_mm=(5.0, 5.0, 5.0))
    image = augment_batch(
        volume[None, None], None, only(blur_probability=1.0, blur_mm=(3.0, 3.0)), [0], spacing_mm
    )[0]
    centre, covariance = moments(image[0, 0], spacing_mm)
    assert centre.abs().max() < 1e-3
    torch.testing.assert_close(
        covariance, (25.0 + 9.0) * torch.eye(3, dtype=torch.float64), atol=0.15, rtol=0
    )
    assert image.sum() == pytest.approx(volume.sum().item(), rel=1e-3)


def test_brightness_shifts():
    image, _ = noise_batch(n=20)
    settings = only(brightness_probability=1.0, brightness=0.2)
    change = (augment_batch(image, None, settings, range(20))[0] - image).flatten(1)
    assert (change.std(1) < 1e-6).all() and change.abs().max() <= 0.2 and change.mean(1).std() > 0.05


def test_contrast_stretches_about_the_mean_of_each_channel():
    image, _ = noise_batch(n=20, c=2)
    image[:, 1] = 0.1 * image[:, 1] + 0.5
    settings = only(contrast_probability=1.0, contrast=0.5)
    new = augment_batch(image, None, settings, range(20))[0]
    torch.testing.assert_close(new.mean((2, 3, 4)), image.mean((2, 3, 4)), atol=1e-6, rtol=0)
    ratio = new.std((2, 3, 4)) / image.std((2, 3, 4))
    torch.testing.assert_close(ratio[:, 0], ratio[:, 1])
    expected = [draw(settings, seed, (9, 9, 9), (1, 1, 1))["contrast"] for seed in range(20)]
    torch.testing.assert_close(ratio[:, 0], torch.tensor(expected))


def test_low_resolution_removes_detail_along_its_axis_only():
    image, _ = noise_batch(n=1, shape=(24, 24, 24))
    settings = only(low_resolution_probability=1.0, low_resolution=(3.0, 3.0))
    for axis in range(3):
        seed = first_seeds(settings, lambda drawn, axis=axis: drawn["low_resolution_axis"] == axis)
        new = augment_batch(image, None, settings, seed)[0]
        # The mean over that axis is kept: whole averages, linear between them.
        torch.testing.assert_close(new.mean(2 + axis), image.mean(2 + axis), atol=0.25, rtol=0)
        for other in range(3):
            # 2 of white noise, 0.316 after means of 3, linear
            detail = (new.diff(dim=2 + other).var() / new.var()).item()
            assert detail == pytest.approx(0.316 if other == axis else 2, abs=0.15)


def test_low_resolution_by_hand():
    image = torch.arange(6.0).view(1, 1, 1, 1, 6).square()  # 0 1 4 9 16 25; means of pairs 0.5 6.5 20.5
    settings = only(low_resolution_probability=1.0, low_resolution=(2.0, 2.0))
    seed = first_seeds(settings, lambda drawn: drawn["low_resolution_axis"] == 2)
    new = augment_batch(image, None, settings, seed)[0].flatten()
    torch.testing.assert_close(new, torch.tensor([0.5, 2.0, 5.0, 10.0, 17.0, 20.5]))


def test_what_comes_in_from_beyond_the_patch_repeats_its_edge():
    """Shrunk to half: the middle four of eight voxels hold the patch, the others its outermost voxels."""
    image = torch.arange(8.0).view(1, 1, 1, 8).expand(1, 8, 8, 8)
    grid = sampling_grid((8, 8, 8), (1, 1, 1), scale=0.5)
    new, new_label = (warp(image, grid, mode)[0] for mode in ("bilinear", "nearest"))
    expected = torch.tensor([0, 0, 0.5, 2.5, 4.5, 6.5, 7, 7]).expand(8, 8, 8)
    torch.testing.assert_close(new, expected)
    assert torch.equal(new_label[..., :2], torch.zeros(8, 8, 2))
    assert torch.equal(new_label[..., -2:], torch.full((8, 8, 2), 7.0)), "no background comes in"


def test_gamma_keeps_the_range_and_the_order():
    values = torch.linspace(-1.5, 1.5, 601)
    settings = only(gamma_probability=1.0, gamma=(0.5, 2.0))
    for seed in range(20):
        exponent = draw(settings, seed, (1, 1, 1), (1, 1, 1))["gamma"]
        new = augment_batch(values.view(1, 1, 1, 1, -1), None, settings, [seed])[0].flatten()
        assert (new.diff() > 0).all()
        inside = values.abs() <= 1
        expected = torch.where(inside, 2 * ((values.clamp(-1, 1) + 1) / 2) ** exponent - 1, values)
        torch.testing.assert_close(new, expected, atol=1e-5, rtol=0)
    other = replace(settings, value_range=(0.0, 3.0), gamma=(2.0, 2.0))
    new = augment_batch(torch.tensor([-1.0, 0, 1.5, 3, 4]).view(1, 1, 1, 1, 5), None, other, [0])[0]
    torch.testing.assert_close(new.flatten(), torch.tensor([-1.0, 0, 0.75, 3, 4]))


def test_order_of_the_grey_value_changes():
    """Noise is blurred; gamma comes after brightness."""
    image = torch.zeros(1, 1, 24, 24, 24)
    noisy = only(noise_probability=1.0, noise_sd=1.0, blur_probability=1.0, blur_mm=(2.0, 2.0))
    new = augment_batch(image, None, noisy, [3])[0]
    assert new.std() < 0.2 * draw(noisy, 3, (24, 24, 24), (1, 1, 1))["noise_sd"]
    both = only(brightness_probability=1.0, brightness=0.5, gamma_probability=1.0, gamma=(2.0, 2.0))
    shift = draw(both, 4, (1, 1, 1), (1, 1, 1))["brightness"]
    expected = 2 * ((shift + 1) / 2) ** 2 - 1
    assert augment_batch(image, None, both, [4])[0].mean() == pytest.approx(expected, abs=1e-5)


def test_a_callers_autocast_changes_nothing():
    image, label = noise_batch()
    expected = augment_batch(image, label, EVERYTHING, [1, 2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = augment_batch(image, label, EVERYTHING, [1, 2])
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")
def test_gpu_and_cpu_agree_but_for_the_noise():
    image, label = noise_batch(n=8, c=2)
    settings = replace(EVERYTHING, noise_probability=0.0)
    expected = augment_batch(image, label, settings, range(8), (2.0, 1.0, 0.7))
    found = augment_batch(image.cuda(), label.cuda(), settings, range(8), (2.0, 1.0, 0.7))
    torch.testing.assert_close(found[0].cpu(), expected[0], atol=1e-3, rtol=0)
    assert (found[1].cpu() != expected[1]).float().mean() < 1e-3  # ties of nearest


# ---- bad input ----


@pytest.mark.parametrize(
    "setting, message",
    [
        (dict(noise_probability=1.5), r"noise_probability 1.5: expected a number in 0..1"),
        (dict(gamma_probability=-0.1), "gamma_probability -0.1"),
        (dict(gamma_probability=float("nan")), "gamma_probability nan"),
        (dict(flip_probability=(0.5, 0.5)), r"flip_probability \(0.5, 0.5\): expected z y x, each in 0..1"),
        (dict(flip_probability=0.5), r"flip_probability 0.5"),
        (dict(flip_probability=(0, 0, 2)), r"flip_probability \(0, 0, 2\)"),
        (dict(rotation_deg=(15, 15)), r"rotation_deg \(15, 15\)"),
        (dict(rotation_deg=(-15, 0, 0)), r"rotation_deg \(-15, 0, 0\)"),
        (dict(scale=1.0), "scale 1.0: out of range"),
        (dict(elastic_mm=11.0), r"elastic_mm 11.0: at most 0.4 of elastic_grid_mm \(24.0\), or it folds"),
        (dict(elastic_grid_mm=0), "elastic_grid_mm 0"),
        (dict(noise_sd=-1), "noise_sd -1"),
        (dict(blur_mm=(2, 1)), r"blur_mm \(2, 1\)"),
        (dict(blur_mm=(-1, 1)), r"blur_mm \(-1, 1\)"),
        (dict(brightness=-1), "brightness -1"),
        (dict(contrast=1.5), "contrast 1.5"),
        (dict(low_resolution=(0.5, 2)), r"low_resolution \(0.5, 2\)"),
        (dict(gamma=(0, 2)), r"gamma \(0, 2\)"),
        (dict(value_range=(1, 1)), r"value_range \(1, 1\)"),
        (dict(swap_labels=((1, 2), (2, 3))), r"swap_labels .*: each label may stand in one pair only"),
        (dict(swap_labels=((1, 1),)), "swap_labels"),
        (dict(swap_labels=((1, 2, 3),)), "swap_labels"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        Augmentation3d(**setting)


def test_settings_from_yaml_lists_do_the_same():
    def listed(value):
        return [listed(v) for v in value] if isinstance(value, tuple) else value

    settings = replace(EVERYTHING, swap_labels=((3, 7),))
    lists = Augmentation3d(**{f.name: listed(getattr(settings, f.name)) for f in fields(settings)})
    image, label = noise_batch()
    a, b = (augment_batch(image, label, s, [1, 2]) for s in (settings, lists))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize(
    "image, label, seeds, spacing_mm, message",
    [
        ((2, 12, 16, 20), None, 2, (1, 1, 1), r"image \(2, 12, 16, 20\) of torch.float32: expected floats"),
        ((2, 1, 0, 16, 20), None, 2, (1, 1, 1), r"image \(2, 1, 0, 16, 20\)"),
        ((2, 1, 4, 4, 4), None, 3, (1, 1, 1), "3 seeds for 2 items"),
        ((2, 1, 4, 4, 4), None, 2, (1, 1), r"spacing_mm \(1, 1\): expected z y x"),
        ((2, 1, 4, 4, 4), None, 2, (1, 0, 1), "spacing_mm"),
        (
            (2, 1, 4, 4, 4),
            (2, 4, 4, 5),
            2,
            (1, 1, 1),
            r"label \(2, 4, 4, 5\) of torch.uint8 does not fit .* as labels",
        ),
        ((2, 1, 4, 4, 4), (1, 4, 4, 4), 2, (1, 1, 1), "does not fit"),
        ((2, 1, 4, 4, 4), (2, 1, 4, 4, 4), 2, (1, 1, 1), r"labels \(N, D, H, W\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(image, label, seeds, spacing_mm, message):
    label = None if label is None else torch.zeros(label, dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        augment_batch(torch.zeros(image), label, EVERYTHING, list(range(seeds)), spacing_mm)


def test_types_that_do_not_fit_are_refused():
    image = torch.zeros(1, 1, 4, 4, 4)
    with pytest.raises(ValueError, match="of torch.int16: expected floats"):
        augment_batch(image.short(), None, EVERYTHING, [0])
    with pytest.raises(ValueError, match=r"as a soft target \(N, K, D, H, W\)"):
        augment_batch(image, image[:, 0], EVERYTHING, [0])
    with pytest.raises(ValueError, match="swap_labels .* only 1 channels"):
        augment_batch(image, image, replace(EVERYTHING, swap_labels=((0, 1),)), [0])
