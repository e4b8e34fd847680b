"""common/escape.py: mean times of a random walk, by hand and by solving the equations, and what they tell."""

import numpy as np
import pytest
import torch

from common.escape import STEPS, escape_map, escape_times, otsu_threshold


def test_a_corridor_by_hand():
    """Five alike voxels in a row between exits: k (6 - k) steps from the k-th, the gambler's ruin."""
    image = torch.full((1, 1, 7), 0.5)
    is_exit = torch.zeros(1, 1, 7, dtype=torch.bool)
    is_exit[..., [0, 6]] = True
    times = escape_times(image, is_exit, tolerance=1e-7)[0, 0]
    assert times.tolist() == pytest.approx([0, 5, 8, 9, 8, 5, 0], abs=1e-4)


def test_times_solve_the_equations():
    """Each time is the mean of those of the neighbours, by their weights, and one step more."""
    generator = torch.Generator().manual_seed(0)
    image = 0.2 * torch.rand(3, 5, 6, generator=generator)
    is_exit = torch.zeros(3, 5, 6, dtype=torch.bool)
    is_exit[0], is_exit[:, 0] = True, True
    times = escape_times(image, is_exit, tolerance=1e-7)
    assert (times[is_exit] == 0).all() and (times[~is_exit] >= 1).all()
    z, y, x = 1, 2, 3
    total = expected = 0.0
    for dz, dy, dx, likelihood in STEPS:
        for sign in (1, -1):
            place = (z + sign * dz, y + sign * dy, x + sign * dx)
            if all(0 <= p < n for p, n in zip(place, image.shape, strict=True)):
                difference = float(image[place] - image[z, y, x])
                weight = likelihood * max(np.exp(-((difference / 0.06) ** 2)), 1e-3)
                total, expected = total + weight, expected + weight * float(times[place])
    assert float(times[z, y, x]) == pytest.approx(1 + expected / total, rel=1e-4)


def test_a_wall_of_another_grey_value_keeps_the_walker_in():
    image = torch.full((1, 1, 9), 0.5)
    is_exit = torch.zeros(1, 1, 9, dtype=torch.bool)
    is_exit[..., [0, 8]] = True
    free = escape_times(image, is_exit)[0, 0, 4]
    image[..., 2:7] = 0.9
    assert escape_times(image, is_exit)[0, 0, 4] > 50 * free


def test_otsu_parts_two_groups():
    values = torch.cat([torch.full((60,), 0.2), torch.full((40,), 0.7)])
    assert 0.2 <= otsu_threshold(values) < 0.7


def volume() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two bright rods in dark surroundings: one through all slices, one in the middle slices only.

    Returns:
        Slices, whether the short rod is in them, and the short rod.
    """
    rng = np.random.default_rng(0)
    slices = rng.integers(10, 40, (20, 48, 64)).astype(np.uint8)
    slices[:, 14:30, 8:24] = rng.integers(180, 200, (20, 16, 16))
    rod = np.zeros(slices.shape, bool)
    rod[6:14, 16:32, 36:54] = True
    slices[rod] = rng.integers(180, 200, int(rod.sum()))
    return slices, rod.any(axis=(1, 2)), rod


def test_what_runs_through_is_told_from_what_is_seen_in_positive_slices_only():
    slices, is_positive, rod = volume()
    found, shares = escape_map(slices, is_positive)
    assert found.dtype == np.float32 and found.shape == slices.shape
    assert found.min() >= 0 and found.max() <= 1 and not found[~is_positive].any()
    mask = found > 0.6
    assert 2 * (mask & rod).sum() / (mask.sum() + rod.sum()) > 0.75
    assert found[6:14, 18:28, 12:20].max() < 0.35, "the rod that runs through"
    assert shares.max() == 1 and not shares[~is_positive].any() and shares[6] < shares[9]


def test_volumes_in_which_nothing_is_closed_in():
    slices, is_positive, _ = volume()
    found, shares = escape_map(slices, np.zeros(20, bool))
    assert not found.any() and not shares.any()
    found, shares = escape_map(np.zeros((4, 16, 16), np.uint8), np.ones(4, bool))
    assert np.isfinite(found).all() and np.isfinite(shares).all()
    found, _ = escape_map(slices, np.ones(20, bool))  # beyond both ends of the volume one is out
    assert np.isfinite(found).all() and found.any()


def test_brighter_than_most_of_the_tissue():
    """Tissue of 100 all over, in which a lesion of 200 lies: with dark = 1.3 the tissue is surroundings."""
    slices = np.full((12, 40, 40), 100, np.uint8)
    slices[:, :4] = 0
    lesion = np.zeros(slices.shape, bool)
    lesion[4:8, 16:28, 16:28] = True
    slices[lesion] = 200
    found, _ = escape_map(slices, lesion.any(axis=(1, 2)), dark=1.3)
    assert not found[~lesion.any(axis=(1, 2))].any()
    assert (found[lesion] > 0.3).mean() > 0.7 and (found[~lesion] > 0.3).mean() < 0.02
