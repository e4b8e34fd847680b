"""common/phantoms.py: distances, paint and noise by hand, and folders written whole or not at all."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from common.nifti import load_label, load_nifti, same_grid
from common.phantoms import (
    Canvas,
    already_written,
    box_between,
    ellipsoid_mm,
    new_folder,
    noisy_hu,
    oval_mm,
    paint,
    prepare_demo,
    smooth_field,
    tube_mm,
    voxel_axes_mm,
    write_pair,
)


def test_voxel_centres_lie_around_the_middle():
    z, y, x = voxel_axes_mm((2, 3, 4), (5.0, 1.0, 0.5), (100, 0, -1))
    assert z.tolist() == [97.5, 102.5] and y.tolist() == [-1, 0, 1]
    assert x.tolist() == [-1.75, -1.25, -0.75, -0.25] and x.dtype == np.float32


def test_a_box_holds_the_voxels_between_two_corners():
    axes_mm = voxel_axes_mm((5, 5, 4), (2.0, 1.0, 10.0))  # -4..4, -2..2, -15..15
    low, high = (-2.5, -0.5, -100), (2.5, 0.5, 0)
    assert box_between(axes_mm, low, high) == (slice(1, 4), slice(2, 3), slice(0, 2))
    assert box_between(axes_mm, low, high, margin=1) == (slice(0, 5), slice(1, 4), slice(0, 3))
    outside = box_between(axes_mm, (50, 0, 0), (60, 1, 1))
    assert np.zeros((5, 5, 4))[outside].size == 0


def test_distance_to_an_oval_along_the_axes_and_on_its_outline():
    y, x = np.array([0.0, 0, 10, 6, 0]), np.array([0.0, 8, 0, 4 * 0.8, 4])
    np.testing.assert_allclose(oval_mm(y, x, 10, 4)[1:], [4, 0, 0, 0], atol=5e-3)
    assert oval_mm(y, x, 10, 4)[0] < 0
    # power 4: (0.84, 0.84) half axes lie on the outline; at half the size, 8 is 6 mm beyond the outline at 2
    corner = 0.5**0.25
    assert oval_mm(10 * corner, 4 * corner, 10, 4, power=4) == pytest.approx(0, abs=5e-3)
    assert oval_mm(0.0, 8.0, 10, 4, scale=0.5) == pytest.approx(6, abs=5e-3)


def test_distance_to_a_tapering_tube():
    # From (0, 0) to (0, 10), radius 2 to 1: beside its middle, before its start, beyond its end, inside.
    points = np.array([3.0, 0, 0, 1]), np.array([5.0, -4, 14, 0])
    np.testing.assert_allclose(tube_mm(points, (0, 0), (0, 10), 2, 1), [1.5, 2, 3, -1], atol=1e-4)
    np.testing.assert_allclose(tube_mm(points, (0, 0), (0, 10), 2), [1, 2, 2, -1], atol=1e-4)


def test_distance_to_an_ellipsoid():
    points = np.array([0.0, 8, 0, 0]), np.array([0.0, 0, 1, 0]), np.array([0.0, 0, 0, 4])
    distances = ellipsoid_mm(points, (0, 0, 0), (8, 1, 1))
    np.testing.assert_allclose(distances, [-2, 0, 0, 6], atol=1e-6)  # 2: cube root of 8 * 1 * 1


def test_paint_covers_the_inside_and_half_of_the_outline():
    image = np.full(5, -1000.0)
    paint(image, np.array([-10.0, -1, 0, 0.5, 10]), 1000.0, edge_mm=2.0)
    assert image.tolist() == [1000, 1000, 0, -500, -1000]


def test_noise_has_the_asked_strength_and_values_are_those_of_a_scanner():
    image = np.zeros((20, 30, 30), np.float32)
    image[0], image[1], image[2] = -5000, 5000, 0.6
    clean = noisy_hu(np.random.default_rng(0), image, 0, blur=1)
    assert clean.dtype == np.int16 and np.unique(clean).tolist() == [-1024, 0, 1, 3071]
    noise = noisy_hu(np.random.default_rng(0), image, 40, blur=(0, 1, 1))[3:].astype(float)
    assert noise.std() == pytest.approx(40, rel=0.03)
    along_x = np.corrcoef(noise[..., 1:].ravel(), noise[..., :-1].ravel())[0, 1]
    along_z = np.corrcoef(noise[1:].ravel(), noise[:-1].ravel())[0, 1]
    assert along_x > 0.5 and abs(along_z) < 0.05
    assert image.max() == 5000, "the image given stays as it is"


def test_smooth_field_varies_over_its_scale():
    axes_mm = [np.arange(0, 200, 2.0)] * 3
    field = smooth_field(np.random.default_rng(0), axes_mm, 30)
    assert field.dtype == np.float32 and field.mean() == pytest.approx(0, abs=1e-4)
    assert field.std() == pytest.approx(1, abs=1e-4)
    for axis in range(3):
        near = np.corrcoef(field.take(range(99), axis).ravel(), field.take(range(1, 100), axis).ravel())
        far = np.corrcoef(field.take(range(55), axis).ravel(), field.take(range(45, 100), axis).ravel())
        assert near[0, 1] > 0.98 and abs(far[0, 1]) < 0.3, "2 mm apart alike, 90 mm apart not"


def canvas(bend_mm: float = 0.0) -> Canvas:
    return Canvas(np.random.default_rng(0), voxel_axes_mm((20, 30, 40), (2, 2, 2)), 0.1, bend_mm)


def test_a_canvas_holds_what_is_painted():
    scan = canvas()
    assert np.unique(scan.image).tolist() == [-1000] and not scan.label.any()
    scan.add(ellipsoid_mm(scan.grid, (0, 0, 0), (10, 10, 10)), 40, label=3)
    inside = sum(g**2 for g in scan.grid) < 100
    assert np.array_equal(scan.label == 3, inside) and (scan.image[~inside] == -1000).mean() > 0.99
    assert np.median(scan.image[inside]) == 40 and np.ptp(scan.image[10:12, 14:16, 19:21]) == 0
    scan.add(ellipsoid_mm(scan.grid, (0, 0, 0), (5, 5, 5)), 90, within_hu=7)
    core = sum(g**2 for g in scan.grid) < 16
    assert np.array_equal(scan.label == 3, inside), "without a number the label stays"
    np.testing.assert_allclose(scan.image[core], (90 + 7 * scan.texture)[core], rtol=1e-4)


def test_a_chain_is_the_same_as_its_tubes():
    stations = [(-10, 0, -20, 4), (0, 5, 0, 6), (8, -10, 15, 3)]
    scan, whole = canvas(bend_mm=3.0), canvas(bend_mm=3.0)
    scan.add_chain(stations, 50, label=2)
    tubes = [
        tube_mm(whole.grid, a[:3], b[:3], a[3], b[3]) for a, b in zip(stations, stations[1:], strict=False)
    ]
    whole.add(np.minimum.reduce(tubes), 50, label=2)
    assert np.array_equal(scan.label, whole.label) and np.array_equal(scan.image, whole.image)
    assert np.count_nonzero(scan.label) > 300
    scan.add_chain([(500, 0, 0, 5), (600, 0, 0, 5)], 50, label=1)
    assert 1 not in scan.label, "outside of the scan"


def test_a_bent_canvas_moves_shapes_smoothly():
    straight, bent = canvas(), canvas(bend_mm=4.0)
    shifts = [b - s for b, s in zip(bent.grid, np.broadcast_arrays(*straight.grid), strict=True)]
    assert all(2 < shift.std() < 6 for shift in shifts)
    assert max(np.abs(np.diff(shift, axis=0)).max() for shift in shifts) < 1


def test_a_pair_is_written_on_one_grid(tmp_path):
    image = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    entry = write_pair(
        tmp_path,
        "Va",
        "ear_1",
        image,
        (image % 2).astype(np.uint8),
        (3, 2, 1),
        (1, 2, 3),
        "LPS",
    )
    assert entry == {"image": "./imagesVa/ear_1.nii.gz", "label": "./labelsVa/ear_1.nii.gz"}
    scan, label = load_nifti(tmp_path / entry["image"]), load_label(tmp_path / entry["label"])
    assert same_grid(scan, label) and scan.orientation == "LPS" and scan.spacing_mm == (3, 2, 1)
    assert np.array_equal(scan.array, image) and np.array_equal(label.array, image % 2)


def test_a_folder_appears_when_it_is_whole(tmp_path):
    target = tmp_path / "deep" / "phantoms"
    with new_folder(target) as root:
        (root / "scan").write_text("voxels")
        assert not target.exists()
    assert [path.name for path in target.parent.iterdir()] == ["phantoms"]
    assert (target / "scan").read_text() == "voxels"
    empty = tmp_path / "empty"
    empty.mkdir()
    with new_folder(empty) as root:
        (root / "scan").touch()
    assert [path.name for path in empty.iterdir()] == ["scan"]


def test_after_an_error_nothing_is_left(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with new_folder(tmp_path / "phantoms") as root:
            (root / "scan").touch()
            raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_phantoms_that_are_there_are_known_by_their_index(tmp_path):
    folder, contents = tmp_path / "phantoms", {"cases": 3, "shape": [1, 2]}
    assert not already_written(folder, "index.json", contents)
    folder.mkdir()
    assert not already_written(folder, "index.json", contents), "an empty folder can be used"
    (folder / "index.json").write_text(json.dumps(contents, indent=2))
    assert already_written(folder, "index.json", contents)
    with pytest.raises(FileExistsError, match="holds something else than {'cases': 4}; remove it or name"):
        already_written(folder, "index.json", {"cases": 4})
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="something else than three phantoms;"):
        already_written(tmp_path, "index.json", {"description": "three phantoms"})


def test_a_demo_is_made_once_and_anew_where_code_or_flags_changed(tmp_path):
    code, made = tmp_path / "phantoms.py", []
    code.write_text("radius = 1")
    source, out = tmp_path / "demo" / "scans", tmp_path / "demo" / "h5"

    def make(failed=None):
        made.append([folder.name for folder in (source, out) if folder.is_dir()])
        for folder in (source, out):
            folder.mkdir(exist_ok=True)
        if failed is KeyboardInterrupt:
            raise KeyboardInterrupt
        return failed or {}

    def prepare(failed=None, flags=("--spacing", "4")):
        return prepare_demo(source, out, lambda: make(failed), flags, [SimpleNamespace(__file__=str(code))])

    with pytest.raises(KeyboardInterrupt):
        prepare(KeyboardInterrupt)
    with pytest.raises(ValueError, match="could not be converted; delete .*demo .a: too thin"):
        prepare({"a": "too thin"})
    assert prepare() == prepare() == out
    assert made == [[], ["scans", "h5"], ["scans", "h5"]], "what was stopped goes on, what is finished stays"
    prepare(flags=("--spacing", "5"))
    code.write_text("radius = 2")
    prepare(flags=("--spacing", "5"))
    prepare(flags=("--spacing", "5"))
    assert made[3:] == [[], []], "older ones are removed first"
    (tmp_path / "demo" / "made_by.txt").unlink()  # as of versions without it
    prepare(flags=("--spacing", "5"))
    assert made[5:] == [[]]
