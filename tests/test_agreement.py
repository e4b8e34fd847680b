"""common/agreement.py: ICC and limits of agreement against published examples, volumes by hand."""

import math

import numpy as np
import pytest

from common.agreement import (
    icc_agreement,
    limits_of_agreement,
    volume_agreement,
    volume_errors_percent,
    volume_lines,
)

# Table 2 of Shrout and Fleiss 1979: six targets by four judges.
SHROUT_FLEISS = [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]]


def test_icc_of_the_published_example():
    """Their table 4: ICC(2,1) = 0.29. Mean squares 11.24, 32.49 and 1.02 give 0.2898."""
    assert icc_agreement(np.array(SHROUT_FLEISS)) == pytest.approx(0.2898, abs=5e-5)


def test_icc_asks_for_the_same_number_and_not_for_correlation():
    truth = np.array([1000.0, 1200, 1400, 1600])
    assert icc_agreement(np.stack([truth, truth], 1)) == pytest.approx(1)
    # 400 mm3 too much: mean squares 133333.3 (subjects), 320000 (raters), 0: 133333.3 / (133333.3 + 160000)
    assert icc_agreement(np.stack([truth, truth + 400], 1)) == pytest.approx(133333.333 / 293333.333)
    with_gap = np.stack([[*truth, 5.0], [*(truth + 400), math.nan]], 1)
    assert icc_agreement(with_gap) == pytest.approx(133333.333 / 293333.333), "a NaN leaves its subject out"


def test_icc_without_an_answer():
    assert math.isnan(icc_agreement(np.array([[1.0, 2.0]])))
    assert math.isnan(icc_agreement(np.ones((5, 1)))) and math.isnan(icc_agreement(np.ones((5, 2))))
    assert math.isnan(icc_agreement(np.empty((0, 2))))


def test_limits_of_agreement():
    """Differences 10, 20, 30: mean 20, sd 10, limits 20 -+ 19.6."""
    limits = limits_of_agreement([100, 200, 300, math.nan], [110, 220, 330, 1])
    assert limits == pytest.approx({"bias": 20, "sd": 10, "low": 0.4, "high": 39.6})
    one = limits_of_agreement([1], [3])
    assert one["bias"] == 2 and math.isnan(one["low"]) and math.isnan(limits_of_agreement([], [])["bias"])


def row(case, label, target, pred):
    status = {(True, True): "ok", (True, False): "missed", (False, True): "hallucinated"}
    found = status.get((target > 0, pred > 0), "absent")
    name = {1: "left", 2: "right"}[label]
    return {"case": case, "class": label, "name": name, "status": found} | {
        "target_mm3": target,
        "pred_mm3": pred,
    }


def test_volumes_by_hand():
    rows = [row("a", 1, 1000, 1100), row("b", 1, 2000, 1900), row("c", 1, 0, 30), row("d", 1, 0, 0)]
    rows += [row("a", 2, 1000, 0)]
    np.testing.assert_allclose(volume_errors_percent(rows), [10, -5, math.nan, math.nan, -100])
    left, right = volume_agreement(rows)
    assert (left["cases"], left["target_mm3"], left["pred_mm3"]) == (3, 1000, 1010), "d has it nowhere"
    assert left["error_percent"] == pytest.approx(2.5) and left["abs_error_percent"] == pytest.approx(7.5)
    assert left["bias_mm3"] == pytest.approx(10) and 0.99 < left["icc"] < 1
    assert right["cases"] == 1 and right["error_percent"] == -100 and math.isnan(right["icc"])
    *_, line, _ = volume_lines([left, right])
    assert line.startswith("| left | 3 | 1000 | 1010 | +2.5 | 7.5 | 0.99") and "| +10 | -1" in line


def test_volumes_of_nothing():
    (absent,) = volume_agreement([row("a", 1, 0, 0)])
    assert absent["cases"] == 0 and math.isnan(absent["target_mm3"]) and volume_agreement([]) == []
