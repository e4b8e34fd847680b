"""common/patches.py: how often each place is drawn, and where patches may lie."""

from collections import Counter

import numpy as np
import pytest

from common.hdf5 import CaseFile, location_index, write_case
from common.patches import STRATA, draw_patch, histogram, patch_start

SHAPE, PATCH = (60, 50, 40), (20, 16, 10)
SPACING_MM = (2.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> CaseFile:
    """Labels 1 (4,000 voxels), 2 (8) and 5 (1); bright background in one corner."""
    label, image = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.int16)
    label[20:40, 20:30, 10:30] = 1
    label[50:52, 40:42, 30:32] = 2
    label[5, 5, 5] = 5
    image[:4, :4, 36:] = 500
    path = tmp_path_factory.mktemp("patches") / "case.h5"
    index = location_index(label, image, hard_negative_above=150)
    write_case(path, image, label, attributes={"spacing_mm": SPACING_MM}, index=index)
    return CaseFile(path)


@pytest.fixture(scope="module")
def empty_case(tmp_path_factory) -> CaseFile:
    """No label at all, smaller than the patch along z and x."""
    image = np.zeros((9, 50, 7), np.int16)
    path = tmp_path_factory.mktemp("patches") / "empty.h5"
    index = location_index(np.zeros(image.shape, np.uint8), image, hard_negative_above=150)
    write_case(path, image, attributes={"spacing_mm": SPACING_MM}, index=index)
    return CaseFile(path)


def draws(case, weights, n=400, seed=0, patch=PATCH, **options):
    """(n, 3) starts and the names of n draws."""
    rng = np.random.default_rng(seed)
    starts, names = zip(*(draw_patch(case, patch, weights, rng, **options) for _ in range(n)), strict=True)
    return np.array(starts), names


# ---- patch_start ----


@pytest.mark.parametrize(
    "centre, patch, volume, start",
    [
        (10, 4, 20, 8),  # 8 to 11: the centre is the first voxel of the second half
        (10, 5, 20, 8),  # 8 to 12
        (0, 4, 20, 0),
        (-7, 4, 20, 0),
        (19, 4, 20, 16),  # the last offset
        (99, 4, 20, 16),
        (18, 4, 20, 16),
        (17, 4, 20, 15),
        (3, 20, 20, 0),
        (3, 21, 20, 0),  # one voxel of padding, at the end
        (3, 24, 20, -2),
        (19, 25, 20, -2),
        (0, 7, 1, -3),
    ],
)
def test_patch_start_by_hand(centre, patch, volume, start):
    assert patch_start((centre, 0, 0), (patch, 1, 1), (volume, 1, 1)) == (start, 0, 0)
    assert patch_start((0, 0, centre), (1, 1, patch), (1, 1, volume)) == (0, 0, start)


def test_patch_start_reaches_every_offset_and_no_other():
    for patch, volume in [(4, 9), (5, 9), (9, 9), (1, 9)]:
        found = {patch_start((c,) * 3, (patch,) * 3, (volume,) * 3) for c in range(volume)}
        assert found == {(s,) * 3 for s in range(volume - patch + 1)}
    start = patch_start(np.array([3, 65_535, 0], np.uint16), (128, 4, 4), (200, 65_536, 9))
    assert start == (0, 65_532, 0) and all(type(s) is int for s in start)


# ---- draw_patch ----


def test_strata_come_as_often_as_they_weigh(case):
    weights = {"class": 0.9, "boundary": 0.3, "hard_negative": 0.3, "ends": 0.1, "box": 0.2, "uniform": 0.2}
    _, names = draws(case, weights, 1500, box=((10, 10, 10), (40, 40, 30)))
    shares = histogram(names)
    assert list(shares) == list(STRATA) and sum(shares.values()) == pytest.approx(1)
    for name, weight in weights.items():
        assert shares[name] == pytest.approx(weight / 2, abs=0.05)  # 4 standard errors at 0.45
    _, names = draws(case, {"class": 0, "uniform": 3, "boundary": 0})
    assert set(names) == {"uniform"}


@pytest.mark.parametrize("name", ["class", "boundary", "hard_negative"])
@pytest.mark.parametrize("jitter", [0.0, 0.25, 0.49])
def test_patches_hold_a_voxel_of_their_stratum(case, name, jitter):
    starts, names = draws(case, {name: 1}, 150, jitter=jitter)
    assert set(names) == {name}
    assert (starts >= 0).all() and (starts <= np.subtract(SHAPE, PATCH)).all()
    for start in starts:
        label, image = case.read_label(start, PATCH), case.read_image(start, PATCH, 0)
        assert (image > 150).any() if name == "hard_negative" else label.any()


def test_each_label_is_equally_likely(case):
    starts, _ = draws(case, {"class": 1}, 900, patch=(1, 1, 1))
    found = Counter(int(case.label[tuple(start)]) for start in starts)
    assert set(found) == {1, 2, 5}
    assert all(count == pytest.approx(300, abs=60) for count in found.values())  # 4 standard errors
    starts, _ = draws(case, {"class": 1}, 200, patch=(1, 1, 1), classes=[2, 5, 9])
    found = Counter(int(case.label[tuple(start)]) for start in starts)
    assert set(found) == {2, 5} and found[5] == pytest.approx(100, abs=30)
    _, names = draws(case, {"class": 1}, 20, classes=[9])
    assert set(names) == {"uniform"}


def test_places_of_a_label_are_equally_likely(case):
    starts, _ = draws(case, {"class": 1}, 1000, patch=(1, 1, 1), classes=[1])
    np.testing.assert_array_equal(starts.min(axis=0), [20, 20, 10])
    np.testing.assert_array_equal(starts.max(axis=0), [39, 29, 29])
    np.testing.assert_allclose(starts.mean(axis=0), [29.5, 24.5, 19.5], atol=0.8)  # 4 standard errors


@pytest.mark.parametrize("jitter, reach", [(0.0, 0), (0.25, 5), (0.4, 8)])
def test_jitter_is_uniform_and_bounded(case, jitter, reach):
    starts, _ = draws(case, {"class": 1}, 500, patch=(20, 1, 1), classes=[2], jitter=jitter)
    starts_of_5, _ = draws(case, {"class": 1}, 500, patch=(1, 20, 1), classes=[5], jitter=jitter)
    assert starts[:, 0].max() == 40  # at the end of the volume: held back
    assert set(starts_of_5[:, 1]) == {max(0, 5 - 10 + j) for j in range(-reach, reach + 1)}

    offsets = draws(case, {"hard_negative": 1}, 500, patch=(1, 1, 20), jitter=jitter)[0][:, 2]
    assert offsets.max() == 20


def test_jitter_takes_both_directions_equally(case):
    starts, _ = draws(case, {"class": 1}, 1500, patch=(20, 1, 1), classes=[1], jitter=0.25)
    moves = starts[:, 0] + 10 - 29.5  # of the centre: place (sd 5.8) plus jitter (sd 3.2)
    assert abs(moves.mean()) < 0.68  # 4 standard errors
    assert starts[:, 0].min() == 20 - 10 - 5 and starts[:, 0].max() == 39 - 10 + 5


def test_uniform_draws_every_offset_equally_often(case):
    patch = (58, 50, 37)  # 3 x 1 x 4 offsets
    starts, names = draws(case, {"uniform": 1}, 1200, patch=patch)
    assert set(names) == {"uniform"}
    counts = Counter(map(tuple, starts.tolist()))
    assert set(counts) == {(z, 0, x) for z in range(3) for x in range(4)}
    assert all(count == pytest.approx(100, abs=41) for count in counts.values())  # 4.3 standard errors


def test_box_is_respected_and_filled(case):
    low, high = (10, 20, 30), (14, 23, 35)
    starts, names = draws(case, {"box": 1}, 900, patch=(1, 1, 1), box=(low, high))
    assert set(names) == {"box"}
    counts = Counter(map(tuple, starts.tolist()))
    assert set(counts) == {(z, y, x) for z in range(10, 14) for y in range(20, 23) for x in range(30, 35)}
    assert max(counts.values()) < 35  # 15 each
    starts, _ = draws(case, {"box": 1}, 100, box=(low, high))  # the centre is in the box, not moved by jitter
    assert ((starts + np.array(PATCH) // 2 >= low) & (starts + np.array(PATCH) // 2 < high))[:, :2].all()
    starts, names = draws(case, {"box": 1}, 300, patch=(1, 1, 1), box=((-9, -9, -9), (2, 999, 2)))
    assert set(names) == {"box"} and starts.min() == 0 and starts[:, 0].max() == starts[:, 2].max() == 1
    assert starts[:, 1].max() > 40


@pytest.mark.parametrize("box", [None, ((10, 10, 10), (10, 20, 20)), ((70, 0, 0), (80, 9, 9))])
def test_no_box_or_an_empty_one_falls_back(case, box):
    assert set(draws(case, {"box": 1}, 20, box=box)[1]) == {"uniform"}
    ends = {"ends"} if box is None else {"uniform"}
    assert set(draws(case, {"ends": 1}, 20, box=box)[1]) == ends


def test_ends_are_the_first_and_last_millimetres(case):
    starts, _ = draws(case, {"ends": 1}, 600, patch=(1, 1, 1), ends_mm=12.0)  # 6 slices of 2 mm
    z = Counter(starts[:, 0].tolist())
    assert set(z) == {*range(6), *range(54, 60)}
    assert all(count == pytest.approx(50, abs=28) for count in z.values())
    assert starts[:, 1].min() == 0 and starts[:, 1].max() == 49
    box = ((10, 5, 5), (30, 9, 9))
    starts, _ = draws(case, {"ends": 1}, 600, patch=(1, 1, 1), ends_mm=4.0, box=box)
    assert set(starts[:, 0]) == {10, 11, 28, 29} and set(starts[:, 1]) == {5, 6, 7, 8}
    starts, _ = draws(case, {"ends": 1}, 600, patch=(1, 1, 1), ends_mm=0.1, box=box)
    assert set(starts[:, 0]) == {10, 29}  # one slice at least
    starts, _ = draws(case, {"ends": 1}, 900, patch=(1, 1, 1), ends_mm=1000)
    assert set(starts[:, 0]) == set(range(60))  # a scan shorter than both ends
    default, _ = draws(case, {"ends": 1}, 600, patch=(1, 1, 1))
    assert set(default[:, 0]) == {*range(20), *range(40, 60)}  # 40 mm


def test_a_case_without_labels_falls_back_to_uniform(empty_case):
    weights = {"class": 1, "boundary": 1, "hard_negative": 1}
    starts, names = draws(empty_case, weights, 300)
    assert set(names) == {"uniform"}
    assert set(starts[:, 0]) == {-5} and set(starts[:, 2]) == {-1}  # centred: 20 over 9, 10 over 7
    assert set(starts[:, 1]) == set(range(35))
    assert empty_case.read_image(starts[0], PATCH, 5).shape == PATCH


def test_small_volumes_of_every_stratum(tmp_path):
    label = np.zeros((6, 30, 6), np.uint8)
    label[3, 29, 3] = 1
    index = location_index(label, 1 - label, hard_negative_above=0)
    write_case(tmp_path / "a.h5", label, label, attributes={"spacing_mm": (9, 9, 9)}, index=index)
    small, box = CaseFile(tmp_path / "a.h5"), ((1, 1, 1), (3, 9, 3))
    for name in STRATA:
        starts, names = draws(small, {name: 1}, 30, box=box)
        assert set(names) == {name}
        assert set(starts[:, 0]) == {-7} and set(starts[:, 2]) == {-2}
        assert starts[:, 1].min() >= 0 and starts[:, 1].max() <= 14


def test_draws_repeat_with_the_seed(case):
    weights = {"class": 1, "ends": 1, "uniform": 1}
    first, other = draws(case, weights, 50, seed=1), draws(case, weights, 50, seed=2)
    again = draws(CaseFile(case.path), weights, 50, seed=1)
    np.testing.assert_array_equal(first[0], again[0])
    assert first[1] == again[1] and first[1] != other[1]


@pytest.mark.parametrize(
    "weights", [{}, {"vertebra": 1.0}, {"class": 0.0}, {"class": 2.0, "box": -1.0}, {"class": float("nan")}]
)
def test_wrong_weights_are_refused(case, weights):
    with pytest.raises(ValueError, match="patch weights .*expected class, boundary"):
        draw_patch(case, PATCH, weights, np.random.default_rng(0))


@pytest.mark.parametrize("jitter", [-0.1, 0.5, float("nan")])
def test_jitter_that_loses_the_object_is_refused(case, jitter):
    with pytest.raises(ValueError, match="jitter"):
        draw_patch(case, PATCH, {"class": 1}, np.random.default_rng(0), jitter=jitter)


def test_histogram():
    assert histogram(["uniform", "class", "class", "box"]) == {"class": 0.5, "box": 0.25, "uniform": 0.25}
    assert list(histogram(["uniform", "class"])) == ["class", "uniform"]
    assert histogram([]) == {}
