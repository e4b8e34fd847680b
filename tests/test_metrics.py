"""common/metrics.py on masks drawn by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from common.class_metrics import case_metrics, class_table, group_table, mean_of_classes
from common.metrics import (
    auroc,
    binary_counts,
    bootstrap_interval,
    classification_scores,
    dice_from_counts,
    holm,
    iou_from_counts,
    largest_component,
    lesion_counts,
    paired_wilcoxon,
    summary,
    volume_similarity,
)
from common.surfaces import surface_metrics

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
        "pred_lesions": 2,  # the lone one touches the pair's across a corner and belongs to it
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


# ---- cases, tables, paired test ----

CLASSES = {1: "liver", 2: "spleen", 5: "aorta", 7: "cyst", 9: "stent"}


def label_maps():
    """All four kinds: 1 in both, 2 missed, 5 hallucinated, 7 the same in both, 9 absent."""
    pred, target = np.zeros((2, 6, 20, 24), np.uint8)
    target[1:4, 2:8, 3:9], pred[1:4, 2:8, 4:10] = 1, 1
    target[4, 12:15, 2:4], pred[4, 12:16, 10:12] = 2, 5
    target[0, 0, 0] = pred[0, 0, 0] = 7
    return pred, target


def test_volume_similarity_by_hand():
    assert volume_similarity(10, 0, 0) == 1
    assert volume_similarity(0, 5, 5) == 1  # equal volumes, elsewhere
    assert volume_similarity(2, 1, 3) == pytest.approx(1 - 2 / 8) == volume_similarity(2, 3, 1)
    assert volume_similarity(0, 4, 0) == volume_similarity(0, 0, 4) == 0
    assert math.isnan(volume_similarity(0, 0, 0))


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.uint16])
def test_case_metrics_of_all_four_kinds(dtype):
    pred, target = (labels.astype(dtype) for labels in label_maps())
    spacing = (3.0, 2.0, 0.5)
    rows = case_metrics(pred, target, spacing, CLASSES, (0.5, 2))
    assert [r["class"] for r in rows] == list(CLASSES) and [r["name"] for r in rows] == [*CLASSES.values()]
    assert [r["status"] for r in rows] == ["ok", "missed", "hallucinated", "ok", "absent"]
    for row in rows:  # the same as one mask at a time, without any cropping
        masks = pred == row["class"], target == row["class"]
        tp, fp, fn, _ = binary_counts(*masks)
        expected = {
            "dice": dice_from_counts(tp, fp, fn),
            "iou": iou_from_counts(tp, fp, fn),
            "volume_similarity": volume_similarity(tp, fp, fn),
            **surface_metrics(*masks, spacing, (0.5, 2)),
            "target_mm3": (tp + fn) * 3.0,
            "pred_mm3": (tp + fp) * 3.0,
        }
        assert {k: row[k] for k in expected} == pytest.approx(expected, nan_ok=True)
        assert row.keys() == expected.keys() | {"class", "name", "status"}
    assert rows[0]["dice"] == pytest.approx(5 / 6)
    worst = math.sqrt(18**2 + 40**2 + 12**2)
    for row in rows[1:3]:
        assert row["dice"] == row["iou"] == row["nsd_2mm"] == row["volume_similarity"] == 0
        assert row["hd_mm"] == row["hd95_mm"] == row["assd_mm"] == pytest.approx(worst)
    assert math.isnan(rows[4]["dice"]) and math.isnan(rows[4]["hd95_mm"]) and rows[4]["target_mm3"] == 0


def test_case_metrics_take_the_volume_of_a_voxel():
    pred, target = label_maps()
    for given, expected in ((None, 3.0), (1.7, 1.7)):
        (row, *_) = case_metrics(pred, target, (3, 2, 0.5), CLASSES, surfaces=False, voxel_mm3=given)
        assert row["target_mm3"] == pytest.approx(108 * expected) == row["pred_mm3"]


def test_case_metrics_of_boolean_masks_and_order_of_classes():
    pred, target = (labels == 1 for labels in label_maps())
    (row,) = case_metrics(pred, target, (1, 1, 1), {1: "x"})
    assert row["dice"] == pytest.approx(5 / 6) and row["hd_mm"] == 1
    forward = case_metrics(*label_maps(), (1, 1, 1), CLASSES)
    backward = case_metrics(*label_maps(), (1, 1, 1), dict(reversed(CLASSES.items())))
    assert [r["pred_mm3"] for r in forward] == [r["pred_mm3"] for r in backward][::-1]


def test_case_metrics_refuses_what_it_would_have_to_ignore():
    pred, target = label_maps()
    with pytest.raises(ValueError, match=r"prediction: label\(s\) 5 are not among \[1, 2, 7\]"):
        case_metrics(pred, target, (1, 1, 1), {1: "a", 2: "b", 7: "c"})
    with pytest.raises(ValueError, match=r"target: label\(s\) 2 are not among"):
        case_metrics(pred, target, (1, 1, 1), {1: "a", 5: "b", 7: "c"})
    with pytest.raises(ValueError, match="prediction: label maps hold integers of at least 0, got float32"):
        case_metrics(pred.astype(np.float32), target, (1, 1, 1), CLASSES)
    with pytest.raises(ValueError, match="at least 0"):
        case_metrics(pred, target.astype(np.int8) - 1, (1, 1, 1), CLASSES)
    with pytest.raises(ValueError, match=r"prediction \(5, 20, 24\) and target \(6, 20, 24\)"):
        case_metrics(pred[1:], target, (1, 1, 1), CLASSES)
    for classes in ({}, {0: "background"}):
        with pytest.raises(ValueError, match="at least 1"):
            case_metrics(pred, target, (1, 1, 1), classes)


def test_missing_a_structure_never_improves_a_score():
    """However bad the prediction of a structure, leaving it out gives no better mean in any metric."""
    target = np.zeros((8, 20, 24), np.uint8)
    target[1:4, 2:8, 3:9], target[7, 19, 23] = 1, 2
    bad = np.where(target == 1, 1, 0).astype(np.uint8)
    missed = bad.copy()
    bad[0, 0, 0] = 2  # as far away as can be
    rows = [[{"case": "a", **r} for r in case_metrics(p, target, (2, 1, 1), {1: "x", 2: "y"})]
            for p in (bad, missed)]  # fmt: skip
    for r_bad, r_missed in zip(class_table(rows[0]), class_table(rows[1]), strict=True):
        better = r_bad["mean"] - r_missed["mean"]
        if r_bad["metric"] != "pred_mm3":
            assert r_missed["n"] == r_bad["n"] and (
                better <= 0 if r_bad["metric"].endswith("_mm") else better >= 0
            )
    assert [r["missed"] for r in class_table(rows[1]) if r["metric"] == "dice"] == [0, 1, 1]


def test_each_class_with_its_own_tolerance():
    """Two plates 2 mm apart: within 2 mm all of both surfaces, within 1 mm none but the shared sides."""
    pred, target = np.zeros((2, 6, 20, 20), np.uint8)
    target[1, 5:9, 5:9], pred[3, 5:9, 5:9] = 1, 1
    target[1, 12:16, 12:16], pred[3, 12:16, 12:16] = 2, 2
    rows = case_metrics(pred, target, (1, 1, 1), {1: "one", 2: "two"}, organ_tolerances_mm={1: 2.0, 2: 1.0})
    assert rows[0]["nsd_organ"] == rows[0]["nsd_2mm"] == 1
    assert rows[1]["nsd_organ"] == rows[1]["nsd_1mm"] < 0.6 and rows[1]["nsd_2mm"] == 1
    only = case_metrics(pred * 0, target, (1, 1, 1), {1: "a", 5: "b"} | {2: "c"}, organ_tolerances_mm={
        1: 99.0, 2: 99.0, 5: 99.0})  # fmt: skip
    assert only[0]["nsd_organ"] == 0 and math.isnan(only[1]["nsd_organ"])
    assert "nsd_organ" not in case_metrics(pred, target, (1, 1, 1), {1: "one", 2: "two"})[0]


def rows_of_two_patients():
    def row(case, patient, label, status, dice):
        return {"case": case, "patient": patient, "group": f"group {label}", "class": label,
                "name": f"organ {label}", "status": status, "dice": dice}  # fmt: skip

    return [
        row("a", "p", 1, "ok", 0.8), row("a", "p", 2, "missed", 0.0),
        row("b", "p", 1, "ok", 0.6), row("b", "p", 2, "absent", NAN),
        row("c", "q", 1, "hallucinated", 0.0), row("c", "q", 2, "ok", 0.9),
    ]  # fmt: skip


def test_mean_of_classes_by_hand():
    """Organ 1: 1.4 / 3, organ 2: 0.9 / 2. Patients p p give (0.7 + 0) / 2, q q (0 + 0.9) / 2."""
    rows = rows_of_two_patients()
    result = mean_of_classes(rows, "dice")
    both = (1.4 / 3 + 0.45) / 2
    assert result == pytest.approx({"mean": both, "low": 0.35, "high": both})
    of_one_patient = [row for row in rows if row["patient"] == "q"]
    result = mean_of_classes(of_one_patient, "dice")
    assert result["mean"] == 0.45 and math.isnan(result["low"]) and math.isnan(result["high"])
    nothing = mean_of_classes([rows[3]], "dice")
    assert all(map(math.isnan, nothing.values()))


def test_group_table_by_hand():
    table = group_table(rows_of_two_patients())
    assert [(r["group"], r["metric"]) for r in table] == [(g, "dice") for g in ("group 1", "group 2", "all")]
    assert [r["mean"] for r in table] == pytest.approx([1.4 / 3, 0.45, (1.4 / 3 + 0.45) / 2])
    assert [(r["missed"], r["hallucinated"], r["absent"]) for r in table] == [(0, 1, 0), (1, 0, 1), (1, 1, 1)]


def test_class_table_by_hand():
    rows = rows_of_two_patients()
    one, two, every = class_table(rows)
    assert (one["class"], one["name"], one["metric"], one["n"]) == (1, "organ 1", "dice", 3)
    assert one["mean"] == pytest.approx(1.4 / 3) and one["median"] == 0.6
    assert (one["low"], one["high"]) == bootstrap_interval([0.8, 0.6, 0.0], ["p", "p", "q"])
    assert (one["missed"], one["hallucinated"], one["absent"]) == (0, 1, 0)
    assert two["n"] == 2 and two["mean"] == pytest.approx(0.45)
    assert (two["missed"], two["hallucinated"], two["absent"]) == (1, 0, 1)
    assert every["class"] == "all" and every["n"] == 3
    assert every["mean"] == pytest.approx((0.4 + 0.6 + 0.45) / 3)
    assert (every["missed"], every["hallucinated"], every["absent"]) == (1, 1, 1)
    alone = class_table([{k: v for k, v in r.items() if k != "patient"} for r in rows])[0]
    assert (alone["low"], alone["high"]) == bootstrap_interval([0.8, 0.6, 0.0])


def test_paired_wilcoxon_is_scipys():
    rng = np.random.default_rng(3)
    a = {f"case{i}": x for i, x in enumerate(rng.random(14))}
    b = {case: x + rng.normal(0.05, 0.1) for case, x in reversed(a.items())}
    patients = {case: case[-1] for case in a}
    got = paired_wilcoxon(a, b, patients)
    difference = [b[case] - a[case] for case in a]
    assert got["p"] == pytest.approx(stats.wilcoxon(list(a.values()), [b[c] for c in a]).pvalue)
    assert got["difference"] == pytest.approx(np.mean(difference))
    assert got["mean_a"] == pytest.approx(np.mean(list(a.values())))
    assert got["mean_b"] - got["mean_a"] == pytest.approx(got["difference"])
    assert (got["low"], got["high"]) == bootstrap_interval(difference, [patients[c] for c in a])
    assert (got["n"], got["nan_pairs"], got["unpaired"]) == (14, 0, 0)
    back = paired_wilcoxon(b, a)
    assert back["p"] == got["p"] and back["difference"] == pytest.approx(-got["difference"])


def test_paired_wilcoxon_leaves_out_and_counts():
    a = {"a": 0.1, "b": NAN, "c": 0.5, "d": 0.7, "only": 1.0}
    b = {"c": 0.6, "b": 0.3, "a": 0.3, "d": NAN, "x": 0.0, "y": 0.0}
    got = paired_wilcoxon(a, b)
    assert (got["n"], got["nan_pairs"], got["unpaired"]) == (2, 2, 3)
    assert got["mean_a"] == pytest.approx(0.3) and got["difference"] == pytest.approx(0.15)


def test_paired_wilcoxon_of_equal_runs_and_of_none():
    a = {f"case{i}": 0.3 + i / 20 for i in range(8)}
    equal = paired_wilcoxon(a, {case: x + 1e-15 for case, x in a.items()})  # differ in the last bits
    assert equal["p"] == 1 and equal["difference"] == pytest.approx(0)
    for none in (paired_wilcoxon({}, {}), paired_wilcoxon({"a": NAN}, {"a": 1.0})):
        assert none["n"] == 0 and all(math.isnan(none[k]) for k in ("p", "mean_a", "difference", "low"))


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.04, NAN, 0.01])[::2] == pytest.approx([0.04, 0.02]) and math.isnan(holm([NAN, 1])[0])
    assert holm([0.5, 0.6]) == [1, 1] and holm([0.2]) == [0.2] and holm([]) == []


def test_case_metrics_without_surfaces_has_the_same_overlap():
    rng = np.random.default_rng(0)
    pred, target = rng.integers(0, 3, (2, 6, 7, 8))
    whole = case_metrics(pred, target, (1, 1, 2), {1: "a", 2: "b"})
    short = case_metrics(pred, target, (1, 1, 2), {1: "a", 2: "b"}, surfaces=False)
    assert "hd95_mm" in whole[0] and "hd95_mm" not in short[0]
    assert all(row[key] == full[key] for row, full in zip(short, whole, strict=True) for key in row)


# ---- yes-or-no decisions ----


def test_classification_scores_by_hand():
    """Called: 0.9, 0.8, 0.7, so tp 2, fp 1, fn 1, tn 2; of 9 pairs of a positive and a negative 7."""
    found = classification_scores([0.9, 0.8, 0.7, 0.4, 0.3, 0.1], [1, 0, 1, 1, 0, 0])
    expected = {
        "f1": 4 / 6,
        "accuracy": 4 / 6,
        "balanced_accuracy": (2 / 3 + 2 / 3) / 2,
        "precision": 2 / 3,
        "recall": 2 / 3,
        "auroc": 7 / 9,
        "prevalence": 1 / 2,
    }
    assert found == pytest.approx(expected) and list(found) == list(expected)
    strict = classification_scores([0.9, 0.8, 0.7, 0.4, 0.3, 0.1], [1, 0, 1, 1, 0, 0], threshold=0.8)
    assert (strict["precision"], strict["recall"], strict["auroc"]) == (1, 1 / 3, pytest.approx(7 / 9))
    assert strict["balanced_accuracy"] == pytest.approx((1 / 3 + 1) / 2)


def test_equal_scores_count_half_in_the_auroc():
    positive = np.array([True, False, True, False, False])
    assert auroc(np.array([0.5, 0.5, 0.5, 0.5, 0.5]), positive) == 0.5
    assert auroc(np.array([0.5, 0.5, 0.7, 0.7, 0.1]), positive) == pytest.approx((1.5 + 2.5) / 6)
    assert auroc(np.array([0.9, 0.1, 0.8, 0.2, 0.3]), positive) == 1


def test_auroc_against_all_pairs():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 20, 200) / 20, rng.random(200) < 0.3
    difference = scores[positive][:, None] - scores[~positive][None]
    assert auroc(scores, positive) == pytest.approx(((difference > 0) + (difference == 0) / 2).mean())


def test_calling_all_positive_does_not_beat_a_good_classifier():
    """TP / N, a score in use, would: 0.71 against 0.64. F1 as well as the others are right."""
    labels = np.repeat([1, 0], [71, 29])
    lazy = classification_scores(np.ones(100), labels)
    good = classification_scores(np.repeat([0.9, 0.1, 0.9, 0.1], [64, 7, 3, 26]), labels)
    assert lazy["f1"] == pytest.approx(142 / 171) and good["f1"] == pytest.approx(128 / 138)
    assert lazy["balanced_accuracy"] == lazy["auroc"] == 0.5 and lazy["prevalence"] == 0.71
    assert all(good[name] > lazy[name] for name in ("f1", "accuracy", "balanced_accuracy", "auroc"))


def test_classification_scores_without_one_of_the_classes():
    positive = classification_scores([0.9, 0.2], [1, 1])
    assert positive["recall"] == 0.5 and positive["f1"] == pytest.approx(2 / 3)
    assert math.isnan(positive["balanced_accuracy"]) and math.isnan(positive["auroc"])
    negative = classification_scores([0.1, 0.2], [0, 0])
    assert negative["accuracy"] == 1 and negative["prevalence"] == 0
    assert all(math.isnan(negative[name]) for name in ("f1", "precision", "recall", "auroc"))
    assert all(math.isnan(value) for value in classification_scores([], []).values())


def test_classification_scores_refuse_what_is_no_probability_or_label():
    with pytest.raises(ValueError, match="1 of 2 probabilities are not finite"):
        classification_scores([0.1, math.nan], [0, 1])
    with pytest.raises(ValueError, match=r"labels \[2\] are neither"):
        classification_scores([0.1, 0.2], [0, 2])
    with pytest.raises(ValueError, match=r"\(2,\) do not fit labels \(3,\)"):
        classification_scores([0.1, 0.2], [0, 1, 1])
