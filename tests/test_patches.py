"""common/patches.py: places of the index, how often each is drawn, and where patches may lie."""

from collections import Counter

import numpy as np
import pytest

from common import patches
from common.hdf5 import CaseFile, write_case
from common.patches import STRATA, draw_patch, histogram, location_index, patch_start

SHAPE, PATCH = (60, 50, 40), (20, 16, 10)
SPACING_MM = (2.0, 1.0, 1.0)


def make_case(folder, labels=(1, 2, 5)) -> CaseFile:
    """Labels 1 (4,000 voxels), 2 (8) and 5 (1), or some of them; bright background in one corner."""
    label, image = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.int16)
    label[20:40, 20:30, 10:30] = 1
    label[50:52, 40:42, 30:32] = 2
    label[5, 5, 5] = 5
    label[~np.isin(label, labels)] = 0
    image[:4, :4, 36:] = 500
    index = location_index(label, image, hard_negative_above=150)
    write_case(folder / "case.h5", image, label, attributes={"spacing_mm": SPACING_MM}, index=index)
    return CaseFile(folder / "case.h5")


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> CaseFile:
    return make_case(tmp_path_factory.mktemp("patches"))


@pytest.fixture(scope="module")
def cases_of_one_label(tmp_path_factory) -> dict[int, CaseFile]:
    return {n: make_case(tmp_path_factory.mktemp("patches"), [n]) for n in (1, 2, 5)}


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


def test_boundary_of_each_label():
    """A cube of 5 has 125 - 27 voxels at its border, one of 3 has 26, also where the two touch."""
    label = np.zeros((20, 20, 20), np.uint8)
    label[2:7, 2:7, 2:7], label[7:10, 2:5, 2:5] = 1, 4
    plain, index = location_index(label), location_index(label, boundary_per_class=True)
    assert set(index) - set(plain) == {"boundary_1", "boundary_4"}
    assert all(np.array_equal(index[name], plain[name]) for name in plain)
    assert len(index["boundary_1"]) == 98 and len(index["boundary_4"]) == 26
    for n in (1, 4):
        places = index[f"boundary_{n}"].astype(int)
        assert (label[tuple(places.T)] == n).all() and places.dtype.kind == "i"
        steps = np.concatenate([np.eye(3, dtype=int), -np.eye(3, dtype=int)])
        around = np.stack([label[tuple((places + step).T)] for step in steps])
        assert (around != n).any(axis=0).all()
    together = np.concatenate([index["boundary_1"], index["boundary_4"]])
    assert {*map(tuple, together.tolist())} == {*map(tuple, index["boundary"].tolist())}


def test_boundary_of_each_label_is_limited_for_each(monkeypatch):
    monkeypatch.setattr(patches, "MOST_BOUNDARY", 20)
    label = np.zeros((20, 20, 20), np.uint8)
    label[1:10, 1:10, 1:10], label[14, 14, 14] = 1, 2
    index = location_index(label, boundary_per_class=True, seed=3)
    assert len(index["boundary_1"]) == 20 and index["boundary_2"].tolist() == [[14, 14, 14]]
    again = location_index(label, boundary_per_class=True, seed=3)
    assert all(np.array_equal(index[name], again[name]) for name in index)


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
def test_patches_hold_a_voxel_of_their_stratum(case, name, jitter, monkeypatch):
    monkeypatch.setattr(patches, "JITTER", jitter)
    starts, names = draws(case, {name: 1}, 150)
    assert set(names) == {name}
    assert (starts >= 0).all() and (starts <= np.subtract(SHAPE, PATCH)).all()
    for start in starts:
        label, image = case.read_label(start, PATCH), case.read_image(start, PATCH)
        assert (image > 150).any() if name == "hard_negative" else label.any()


def test_each_label_is_equally_likely(case):
    starts, _ = draws(case, {"class": 1}, 900, patch=(1, 1, 1))
    found = Counter(int(case.label[tuple(start)]) for start in starts)
    assert set(found) == {1, 2, 5}
    assert all(count == pytest.approx(300, abs=60) for count in found.values())  # 4 standard errors


def test_places_of_a_label_are_equally_likely(cases_of_one_label):
    starts, _ = draws(cases_of_one_label[1], {"class": 1}, 1000, patch=(1, 1, 1))
    np.testing.assert_array_equal(starts.min(axis=0), [20, 20, 10])
    np.testing.assert_array_equal(starts.max(axis=0), [39, 29, 29])
    np.testing.assert_allclose(starts.mean(axis=0), [29.5, 24.5, 19.5], atol=0.8)  # 4 standard errors


@pytest.mark.parametrize("jitter, reach", [(0.0, 0), (0.25, 5), (0.4, 8)])
def test_jitter_is_uniform_and_bounded(case, cases_of_one_label, jitter, reach, monkeypatch):
    monkeypatch.setattr(patches, "JITTER", jitter)
    starts, _ = draws(cases_of_one_label[2], {"class": 1}, 500, patch=(20, 1, 1))
    starts_of_5, _ = draws(cases_of_one_label[5], {"class": 1}, 500, patch=(1, 20, 1))
    assert starts[:, 0].max() == 40  # at the end of the volume: held back
    assert set(starts_of_5[:, 1]) == {max(0, 5 - 10 + j) for j in range(-reach, reach + 1)}

    offsets = draws(case, {"hard_negative": 1}, 500, patch=(1, 1, 20))[0][:, 2]
    assert offsets.max() == 20


def test_jitter_takes_both_directions_equally(cases_of_one_label):
    starts, _ = draws(cases_of_one_label[1], {"class": 1}, 1500, patch=(20, 1, 1))
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


def test_ends_are_the_first_and_last_millimetres(case, monkeypatch):
    default, _ = draws(case, {"ends": 1}, 600, patch=(1, 1, 1))
    assert set(default[:, 0]) == {*range(20), *range(40, 60)}  # 40 mm
    monkeypatch.setattr(patches, "ENDS_MM", 12.0)  # 6 slices of 2 mm
    starts, _ = draws(case, {"ends": 1}, 600, patch=(1, 1, 1))
    z = Counter(starts[:, 0].tolist())
    assert set(z) == {*range(6), *range(54, 60)}
    assert all(count == pytest.approx(50, abs=28) for count in z.values())
    assert starts[:, 1].min() == 0 and starts[:, 1].max() == 49
    box = ((10, 5, 5), (30, 9, 9))
    monkeypatch.setattr(patches, "ENDS_MM", 4.0)
    starts, _ = draws(case, {"ends": 1}, 600, patch=(1, 1, 1), box=box)
    assert set(starts[:, 0]) == {10, 11, 28, 29} and set(starts[:, 1]) == {5, 6, 7, 8}
    monkeypatch.setattr(patches, "ENDS_MM", 0.1)
    starts, _ = draws(case, {"ends": 1}, 600, patch=(1, 1, 1), box=box)
    assert set(starts[:, 0]) == {10, 29}  # one slice at least
    monkeypatch.setattr(patches, "ENDS_MM", 1000.0)
    starts, _ = draws(case, {"ends": 1}, 900, patch=(1, 1, 1))
    assert set(starts[:, 0]) == set(range(60))  # a scan shorter than both ends


def test_a_case_without_labels_falls_back_to_uniform(empty_case):
    weights = {"class": 1, "boundary": 1, "hard_negative": 1}
    starts, names = draws(empty_case, weights, 300)
    assert set(names) == {"uniform"}
    assert set(starts[:, 0]) == {-5} and set(starts[:, 2]) == {-1}  # centred: 20 over 9, 10 over 7
    assert set(starts[:, 1]) == set(range(35))
    assert empty_case.read_image(starts[0], PATCH).shape == PATCH


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


def test_histogram():
    assert histogram(["uniform", "class", "class", "box"]) == {"class": 0.5, "box": 0.25, "uniform": 0.25}
    assert list(histogram(["uniform", "class"])) == ["class", "uniform"]
    assert histogram([]) == {}


# ---- location index ----


def volume(shape=(45, 70, 37)) -> tuple[np.ndarray, np.ndarray]:
    """Noise as int16, and a label of two boxes."""
    label = np.zeros(shape, np.uint8)
    label[5:20, 10:30, 8:20] = 1
    label[20:24, 10:30, 8:20] = 7
    return np.random.default_rng(0).integers(-1024, 3072, shape).astype(np.int16), label


def test_every_place_is_what_its_name_says():
    image, label = volume()
    label[0, 0, 0] = label[44, 69, 36] = 255  # corners of the volume, one voxel each
    index = location_index(label, image, hard_negative_above=2900)
    assert set(index) == {"class_1", "class_7", "class_255", "boundary", "hard_negative"}
    for n in (1, 7, 255):
        places = index[f"class_{n}"]
        assert places.dtype == np.uint16 and (label[tuple(places.T)] == n).all()
        assert len(np.unique(places, axis=0)) == len(places) == (label == n).sum()
    expected = []
    padded = np.pad(label, 1, mode="edge")  # the border of the volume does not count as a boundary
    for z, y, x in np.argwhere(label):
        block = padded[z : z + 3, y : y + 3, x : x + 3]
        neighbours = [
            block[0, 1, 1],
            block[2, 1, 1],
            block[1, 0, 1],
            block[1, 2, 1],
            block[1, 1, 0],
            block[1, 1, 2],
        ]
        if any(n != label[z, y, x] for n in neighbours):
            expected.append((z, y, x))
    assert sorted(map(tuple, index["boundary"].tolist())) == sorted(map(tuple, np.array(expected).tolist()))
    negative = (label == 0) & (image > 2900)
    assert sorted(map(tuple, index["hard_negative"].tolist())) == sorted(
        map(tuple, np.argwhere(negative).tolist())
    )


def test_caps_keep_a_random_part_and_repeat(monkeypatch):
    image, label = volume()
    monkeypatch.setattr(patches, "MOST_PER_CLASS", 200)
    monkeypatch.setattr(patches, "MOST_BOUNDARY", 50)
    monkeypatch.setattr(patches, "MOST_HARD_NEGATIVES", 70)

    def index_by(seed, order=np.ascontiguousarray):
        return location_index(order(label), order(image), hard_negative_above=0, seed=seed)

    index, again, other = index_by(3), index_by(3), index_by(4)
    number = {name: len(places) for name, places in index.items()}
    assert number == {"class_1": 200, "class_7": 200, "boundary": 50, "hard_negative": 70}
    for name, places in index.items():
        assert len(np.unique(places, axis=0)) == len(places)
        np.testing.assert_array_equal(places, again[name])
        assert not np.array_equal(places, other[name])
    z = index["class_1"][:, 0]  # slices 5 to 19: from everywhere, not the first ones found
    assert abs(z.mean() - 12) < 1.2 and z.min() < 7 and z.max() > 17  # standard error 0.3
    np.testing.assert_array_equal(index_by(3, np.asfortranarray)["class_1"], index["class_1"])


def test_index_of_empty_and_full_labels():
    empty = location_index(np.zeros((4, 5, 6), np.uint8))
    assert {name: p.shape for name, p in empty.items()} == {"boundary": (0, 3)}
    full = location_index(np.ones((4, 5, 6), np.uint8), np.ones((4, 5, 6)), hard_negative_above=0)
    assert {n: p.shape for n, p in full.items()} == {
        "class_1": (120, 3),
        "boundary": (0, 3),
        "hard_negative": (0, 3),
    }


def test_empty_places_come_back(tmp_path):
    label = np.zeros((4, 5, 6), np.uint8)
    write_case(tmp_path / "a.h5", label, label, attributes={}, index=location_index(label))
    case = CaseFile(tmp_path / "a.h5")
    assert case.index_names == ("boundary",) and case.locations("boundary").shape == (0, 3)


@pytest.mark.parametrize("label", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4)), np.full((4, 4, 4), -1)])
def test_wrong_labels_are_refused(label):
    with pytest.raises(ValueError, match="label .*expected"):
        location_index(label)


@pytest.mark.parametrize("image", [None, np.zeros((2, 4, 4, 4))])
def test_hard_negatives_need_an_image(image):
    with pytest.raises(ValueError, match="hard negatives need an image"):
        location_index(np.zeros((4, 4, 4), np.uint8), image, hard_negative_above=1)
