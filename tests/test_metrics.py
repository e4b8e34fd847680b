"""common/metrics.py on masks drawn by hand."""

import csv
import math

import numpy as np
import pytest
from scipy import stats

from common.metrics import (
    binary_counts,
    bootstrap_interval,
    dice_from_counts,
    iou_from_counts,
    largest_component,
    lesion_counts,
    summary,
    write_table,
)

NAN = float("nan")


def drawn(*slices):
    """(z, y, x) mask; one string a slice, rows separated by blanks, '#' is set."""
    return np.array([[[c == "#" for c in row] for row in s.split()] for s in slices])


# ---- overlap ----


def test_binary_counts_by_hand():
    pred = np.array([[1, 1, 1, 0], [0, 0, 0, 0]], bool)
    target = np.array([[1, 1, 0, 1], [1, 1, 0, 0]], bool)
    assert binary_counts(pred, target) == (2, 1, 3, 2)
    assert binary_counts(target, pred) == (2, 3, 1, 2)
    assert all(type(n) is int for n in binary_counts(pred, target))


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float32])
def test_binary_counts_take_any_mask_type_and_any_label_as_set(dtype):
    rng = np.random.default_rng(0)
    pred, target = (rng.integers(0, 2, (3, 7, 5)).astype(dtype) for _ in range(2))
    loop = [0, 0, 0, 0]  # tp, fp, fn, tn
    for p, t in zip(pred.ravel(), target.ravel(), strict=True):
        loop[(0 if t else 1) if p else (2 if t else 3)] += 1
    assert binary_counts(pred, target) == tuple(loop)
    if dtype is not bool:
        assert binary_counts(pred * 3, target * 2) == tuple(loop)


@pytest.mark.parametrize(
    "pred, target, counts",
    [
        (0, 0, (0, 0, 0, 24)),
        (1, 0, (0, 24, 0, 0)),
        (0, 1, (0, 0, 24, 0)),
        (1, 1, (24, 0, 0, 0)),
    ],
)
def test_binary_counts_of_empty_and_full_masks(pred, target, counts):
    assert binary_counts(np.full((2, 3, 4), pred), np.full((2, 3, 4), target)) == counts


def test_binary_counts_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"prediction \(2, 3\) and target \(3, 2\) differ in shape"):
        binary_counts(np.zeros((2, 3)), np.zeros((3, 2)))
    with pytest.raises(ValueError, match="differ in shape"):
        binary_counts(np.zeros((1, 3)), np.zeros((2, 3)))  # would broadcast


@pytest.mark.parametrize(
    "tp, fp, fn, dice, iou",
    [(2, 1, 3, 4 / 8, 2 / 6), (5, 0, 0, 1, 1), (0, 4, 0, 0, 0), (0, 0, 4, 0, 0), (0, 1, 1, 0, 0)],
)
def test_dice_and_iou_by_hand(tp, fp, fn, dice, iou):
    assert dice_from_counts(tp, fp, fn) == pytest.approx(dice)
    assert iou_from_counts(tp, fp, fn) == pytest.approx(iou)
    assert dice_from_counts(tp, fn, fp) == dice_from_counts(tp, fp, fn)
    assert iou == pytest.approx(dice / (2 - dice))


@pytest.mark.parametrize("zero", [0, 0.0, np.int64(0)])
def test_overlap_of_two_empty_masks_is_nan(zero):
    assert math.isnan(dice_from_counts(zero, zero, zero))
    assert math.isnan(iou_from_counts(zero, zero, zero))


# ---- lesions ----


def test_lesion_counts_of_a_drawn_example():
    target = drawn(
        "##...# ##.... ...... .....#", "...... ...... ...... .....#"
    )  # square; corner; pair over slices
    pred = drawn(
        "#..... ...... ..##.. ...#..", "...... ...... ...... ....##"
    )  # in the square; alone; in the pair
    assert lesion_counts(pred, target) == {
        "target_lesions": 3,
        "found_lesions": 2,
        "pred_lesions": 2,  # the lone one touches the pair's across a corner, so it is no lesion of its own
        "true_lesions": 2,
    }


@pytest.mark.parametrize(
    "first, second, lesions",
    [
        ((0, 0, 0), (0, 0, 1), 1),  # faces
        ((0, 0, 0), (0, 1, 1), 1),  # edges
        ((0, 0, 0), (1, 1, 1), 1),  # corners
        ((0, 0, 1), (1, 1, 0), 1),
        ((0, 0, 0), (0, 0, 2), 2),
        ((0, 0, 0), (2, 0, 0), 2),
    ],
)
def test_neighbours_across_faces_edges_and_corners_are_one_lesion(first, second, lesions):
    mask = np.zeros((3, 3, 3), bool)
    mask[first] = mask[second] = True
    assert lesion_counts(mask, mask) == dict.fromkeys(
        ["target_lesions", "found_lesions", "pred_lesions", "true_lesions"], lesions
    )


def test_one_prediction_over_two_lesions_and_two_in_one():
    target, pred = drawn("##.## ..... ....."), drawn("##### ..... #....")
    assert lesion_counts(pred, target) == {
        "target_lesions": 2, "found_lesions": 2, "pred_lesions": 2, "true_lesions": 1,
    }  # fmt: skip
    assert lesion_counts(target, drawn("##### ..... .....")) == {
        "target_lesions": 1, "found_lesions": 1, "pred_lesions": 2, "true_lesions": 2,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [bool, np.uint8])
def test_no_lesions(dtype):
    empty, one = np.zeros((2, 4, 4), dtype), np.zeros((2, 4, 4), dtype)
    one[0, 1, 1] = 1
    assert set(lesion_counts(empty, empty).values()) == {0}
    assert list(lesion_counts(one, empty).values()) == [0, 0, 1, 0]
    assert list(lesion_counts(empty, one).values()) == [1, 0, 0, 0]


def test_lesions_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"prediction \(1, 4, 4\) and target \(2, 4, 4\) differ in shape"):
        lesion_counts(np.zeros((1, 4, 4), bool), np.zeros((2, 4, 4), bool))


@pytest.mark.parametrize("dtype", [bool, np.uint8])
def test_largest_component_keeps_one(dtype):
    mask = drawn("##...# .....# ..#... .....#", "...... .....# ...... ......").astype(dtype)
    kept = largest_component(mask)
    assert kept.dtype == dtype
    np.testing.assert_array_equal(kept, drawn(".....# .....# ...... ......", "...... .....# ...... ......"))
    assert not largest_component(np.zeros((2, 3, 3), dtype)).any()


# ---- intervals ----


def test_interval_of_many_values_is_the_normal_one():
    values = np.random.default_rng(1).normal(0.7, 0.1, 400)
    half_width = 1.96 * values.std(ddof=1) / 20
    low, high = bootstrap_interval(values)
    assert low == pytest.approx(values.mean() - half_width, abs=0.1 * half_width)
    assert high == pytest.approx(values.mean() + half_width, abs=0.1 * half_width)
    peer = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=2000, rng=2
    ).confidence_interval
    assert (low, high) == pytest.approx((peer.low, peer.high), abs=0.1 * half_width)


@pytest.mark.parametrize("level", [0.5, 0.8, 0.95, 0.99])
def test_interval_contains_the_mean_and_grows_with_the_level(level):
    values = np.random.default_rng(2).beta(5, 2, 30)
    low, high = bootstrap_interval(values, level=level)
    wider_low, wider_high = bootstrap_interval(values, level=level + 0.005)
    assert wider_low < low < values.mean() < high < wider_high


def test_interval_is_repeatable():
    values, groups = [0.1, 0.5, 0.9, 0.3], ["a", "a", "b", "c"]
    assert bootstrap_interval(values, groups) == bootstrap_interval(values, groups)


def test_scans_of_one_patient_are_drawn_together():
    patients = np.repeat(np.arange(10), 10)
    values = np.repeat(
        np.linspace(0, 1, 10), 10
    )  # ten equal scans a patient: ten observations, not a hundred
    low, high = bootstrap_interval(values)
    grouped_low, grouped_high = bootstrap_interval(values, patients)
    assert grouped_high - grouped_low > 2.5 * (high - low)
    alone = bootstrap_interval(np.linspace(0, 1, 10))
    assert (grouped_low, grouped_high) == pytest.approx(alone)
    shuffled = np.random.default_rng(0).permutation(100)
    assert bootstrap_interval(values[shuffled], patients[shuffled]) == pytest.approx(alone)


def test_patients_weigh_by_their_scans():
    values, patients = [0.0] * 9 + [1.0], ["a"] * 9 + ["b"]  # means of draws: aa 0, ab 0.1, bb 1
    assert bootstrap_interval(values, patients) == (0, 1)
    assert bootstrap_interval(values, patients, level=0.0) == pytest.approx((0.1, 0.1))  # the median draw


def test_interval_leaves_nan_out_with_its_group():
    values, groups = [0.2, NAN, 0.4, 0.9, NAN], ["a", "a", "b", "c", "d"]
    assert bootstrap_interval(values, groups) == bootstrap_interval([0.2, 0.4, 0.9], ["a", "b", "c"])
    assert bootstrap_interval(values) == bootstrap_interval([0.2, 0.4, 0.9])


@pytest.mark.parametrize(
    "values, groups",
    [
        ([], None),
        ([0.5], None),
        ([NAN, NAN], None),
        ([0.5, NAN], None),
        ([0.1, 0.5, 0.9], ["a", "a", "a"]),
        ([0.1, 0.5, NAN], ["a", "a", "b"]),
    ],
)
def test_interval_of_fewer_than_two_groups_is_nan(values, groups):
    low, high = bootstrap_interval(values, groups)
    assert math.isnan(low) and math.isnan(high)


# ---- tables ----


def test_summary_by_hand():
    values = [0.2, NAN, 0.4, 0.9]
    got = summary(values)
    low, high = bootstrap_interval(values)
    assert got == pytest.approx(
        {
            "mean": 0.5,
            "sd": math.sqrt((0.09 + 0.01 + 0.16) / 2),
            "median": 0.4,
            "low": low,
            "high": high,
            "n": 3,
        }
    )
    grouped = summary(values, ["a", "a", "b", "b"])
    assert (
        (grouped["low"], grouped["high"]) == bootstrap_interval(values, ["a", "a", "b", "b"]) != (low, high)
    )


def test_summary_of_one_value_and_of_none():
    one = summary([NAN, 0.25])
    assert (one["mean"], one["median"], one["n"]) == (0.25, 0.25, 1)
    assert math.isnan(one["sd"]) and math.isnan(one["low"]) and math.isnan(one["high"])
    for values in ([], [NAN, NAN]):
        none = summary(values)
        assert none.pop("n") == 0
        assert none.keys() == one.keys() - {"n"} and all(math.isnan(v) for v in none.values())


def test_write_table(tmp_path):
    path = tmp_path / "table.csv"
    rows = [
        {"case": "lung, 001", "dice": 0.123456789, "voxels": 12_345_678, "hd95_mm": NAN},
        {"case": "lung_é", "dice": np.float32("nan"), "voxels": np.int64(3), "hd95_mm": np.float32(1 / 3)},
        {"case": "c", "dice": np.float64("nan"), "voxels": 0, "hd95_mm": 1e-12},
    ]
    write_table(path, rows)
    assert path.read_text(encoding="utf8") == (
        'case,dice,voxels,hd95_mm\n"lung, 001",0.123457,12345678,\nlung_é,,3,0.333333\nc,,0,1e-12\n'
    )
    with path.open(newline="", encoding="utf8") as file:
        assert [row["case"] for row in csv.DictReader(file)] == ["lung, 001", "lung_é", "c"]


def test_write_table_without_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="table.csv: no rows to write"):
        write_table(tmp_path / "table.csv", [])
    assert not (tmp_path / "table.csv").exists()


def test_write_table_with_an_unknown_column_is_refused(tmp_path):
    with pytest.raises(ValueError, match="extra"):
        write_table(tmp_path / "table.csv", [{"a": 1}, {"a": 2, "extra": 3}])
