"""common/sweep.py: counts at many thresholds, by hand and by brute force."""

import numpy as np
import pytest

from common.sweep import Sweep, size_line


def test_sweep_by_hand():
    sweep = Sweep([0.5, 0.25])
    sweep.add(np.array([[0.9, 0.3], [0.6, 0.1]]), np.array([[1, 1], [0, 0]]), "a")
    sweep.add(np.array([[0.3, 0.5]]), np.array([[0, 0]]), "a")  # 0.5 is not above 0.5
    sweep.add(np.array([[0.7, 0.7, 0.9]]), np.array([[1, 0, 255]]), "b")
    sweep.add(np.array([[0.1]]), np.array([[0]]), "c")
    low, high = sweep.rows()
    assert low == pytest.approx(
        {
            "threshold": 0.25,
            "dice_slices": (4 / 5 + 2 / 3) / 2,
            "iou_slices": (2 / 3 + 1 / 2) / 2,
            "dice_volumes": (4 / 7 + 2 / 3) / 2,  # a: tp 2, fp 1 + 2; b: tp 1, fp 1; c has no Dice
            "iou_volumes": (2 / 5 + 1 / 2) / 2,
            "false_alarms": 1 / 2,
        }
    )
    assert high == pytest.approx(
        {
            "threshold": 0.5,
            "dice_slices": (1 / 2 + 2 / 3) / 2,
            "iou_slices": (1 / 3 + 1 / 2) / 2,
            "dice_volumes": (1 / 2 + 2 / 3) / 2,
            "iou_volumes": (1 / 3 + 1 / 2) / 2,
            "false_alarms": 0,
        }
    )
    assert sweep.best("dice_slices") == low and sweep.best() == low


def test_sweep_against_counting_at_each_threshold():
    rng = np.random.default_rng(0)
    scores = (rng.random((30, 40)) * 50).round() / 50  # many lie exactly on a threshold
    mask = (rng.random((30, 40)) < 0.3).astype(np.uint8)
    sweep = Sweep()
    sweep.add(scores.astype(np.float32), mask, "a")
    for row, threshold in zip(sweep.rows(), np.arange(1, 50) / 50, strict=True):
        above = scores.astype(np.float32) > np.float32(threshold)
        tp = (above & (mask == 1)).sum()
        assert row["threshold"] == threshold
        assert row["dice_volumes"] == pytest.approx(2 * tp / (above.sum() + mask.sum()))


def test_dice_by_size_by_hand():
    """Slices of 8 pixels with 4, 1, 8, 2 pixels of tissue: the small third is the two smallest."""
    sweep, other = Sweep([0.5]), Sweep([0.5])
    for part, pixels, found in ((sweep, 4, 4), (sweep, 1, 0), (other, 8, 2), (other, 2, 1)):
        mask, scores = np.zeros((2, 8)), np.zeros((2, 8))
        mask[0, :pixels] = scores[0, :found] = 1
        part.add(scores, mask, "a")
    sweep.add(np.ones((2, 8)), np.zeros((2, 8)), "a")
    sweep.merge(other)
    small, medium, large = sweep.rows_by_size(0.5)
    assert small == {
        "size": "small",
        "pixels_from": 1,
        "pixels_to": 2,
        "slices": 2,
        "dice_slices": pytest.approx((0 + 2 / 3) / 2),
        "missed": 0.5,
    }
    assert (medium["pixels_from"], medium["dice_slices"], medium["missed"]) == (4, 1, 0)
    assert (large["pixels_to"], large["slices"], large["dice_slices"]) == (8, 1, pytest.approx(0.4))
    assert (
        size_line("seg", [small])
        == "Dice of seg by pixels of tissue in the slice: small (1 to 2) 0.333, 50% missed"
    )
    assert Sweep().rows_by_size(0.5) == []


def test_sweeps_of_two_processes_are_merged():
    rng = np.random.default_rng(1)
    slices = [(rng.random((5, 6)), rng.integers(0, 2, (5, 6)) * (i % 2), "ab"[i // 3]) for i in range(6)]
    one, first, second = Sweep(), Sweep(), Sweep()
    for i, item in enumerate(slices):
        one.add(*item)
        (first if i < 2 else second).add(*item)
    first.merge(second)
    for a, b in zip(first.rows(), one.rows(), strict=True):
        assert a == pytest.approx(b)


def test_sweep_without_masks_and_with_another_shape():
    sweep = Sweep()
    sweep.add(np.zeros((2, 2)), np.zeros((2, 2)), "a")
    assert np.isnan(sweep.rows()[0]["dice_slices"]) and sweep.rows()[0]["false_alarms"] == 0
    with pytest.raises(ValueError, match="none of the slices"):
        sweep.best()
    with pytest.raises(ValueError, match=r"patient a: scores \(2, 3\), mask \(3, 2\)"):
        sweep.add(np.zeros((2, 3)), np.zeros((3, 2)), "a")
