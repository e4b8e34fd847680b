"""verse_spine/views.py and curved.py: which pictures are written, of which masks, and along which curve."""

import numpy as np
import pytest
from conftest import REAL_DATA
from PIL import Image

from common.nifti import load_label, load_nifti, write_nifti
from verse_spine import views
from verse_spine.curved import curved_planar
from verse_spine.labels import body_centres

SPACING_MM = (2.0, 2.0, 2.0)


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    monkeypatch.setattr(views, "HEIGHT", 60)
    monkeypatch.setattr(views, "FRAMES", 3)


def spine(first=19, count=4):
    """(image, labels): bodies 22 mm high with a spinous process, along an arc; T12 is on top."""
    shape = (60, 50, 40)
    image, labels = np.full(shape, -50, np.int16), np.zeros(shape, np.uint8)
    for i in range(count):
        z, y = 46 - 13 * i, 28 + (3, 0, 0, 3)[i]
        labels[z : z + 9, y : y + 14, 12:28] = first + i
        labels[z + 1 : z + 6, y - 16 : y, 18:22] = first + i
    image[labels > 0] = 400
    return image, labels


def test_all_files_of_a_scan_with_truth_and_image(tmp_path):
    image, labels = spine()
    target = labels.copy()
    target[:12] = 0
    written = views.save_views(tmp_path / "a.case", labels, SPACING_MM, target=target, image=image)
    kinds = ("3d.png", "turntable.gif", "mesh.html", "error.png", "curved.png")
    assert written == [tmp_path / f"a.case_{kind}" for kind in kinds]
    assert sorted(tmp_path.iterdir()) == sorted(written)
    for path in written:
        if path.suffix != ".html":
            assert Image.open(path).size[0] >= 18
    page = written[2].read_text(encoding="utf8")
    assert '"T12"' in page and '"L3"' in page and len(page) < 5e6


@pytest.mark.parametrize(("highest", "names"), [(1, ['"vertebrae"']), (2, ['"label 1"', '"label 2"'])])
def test_masks_without_levels_are_not_called_cervical(tmp_path, highest, names):
    labels = np.minimum(spine(1)[1], highest)
    written = views.save_views(tmp_path / "case", labels, SPACING_MM)
    page = written[2].read_text(encoding="utf8")
    assert len(written) == 3 and all(name in page for name in names) and '"C1"' not in page


def test_an_empty_mask_writes_nothing_but_what_was_missed(tmp_path):
    image, labels = spine()
    empty = np.zeros_like(labels)
    assert views.save_views(tmp_path / "case", empty, SPACING_MM, image=image, target=empty) == []
    assert views.save_views(tmp_path / "case", empty, SPACING_MM, target=labels) == [
        tmp_path / "case_error.png"
    ]


def test_the_curve_goes_through_bodies_that_the_scan_holds_whole():
    _, labels = spine()
    centres = body_centres(labels, np.diag([2.0, 2, 2, 1]))
    expected = np.array([centres[n] for n in (19, 20, 21, 22)]) / 2
    np.testing.assert_allclose(views.body_points(labels, SPACING_MM), expected)
    cut = labels[:52]  # through T12
    np.testing.assert_allclose(views.body_points(cut, SPACING_MM), expected[1:])
    only_cut = np.where(np.isin(labels, (19, 20)), labels, 0)[36:52]
    assert len(views.body_points(only_cut, SPACING_MM)) == 2  # better than none
    counted = views.body_points((labels > 0).astype(np.uint8), SPACING_MM)
    np.testing.assert_allclose(counted, expected, atol=3)


def test_a_counted_piece_beside_the_bodies_is_not_on_the_curve():
    points_mm = np.array(
        [(90, 0, 0), (72, 2, 0), (66, 3, 30), (60, 30, 0), (54, 4, 1), (35, 9, 0), (31, 9, 6)]
    )
    assert views._longest_chain(points_mm) == [0, 1, 4, 5]
    too_oblique = np.array([(90, 0, 0), (72, 2, 0), (60, 30, 0), (30, 31, 0)])
    assert views._longest_chain(too_oblique) == [0, 1, 3]
    assert views._longest_chain(points_mm[:0]) == []


def test_the_command(tmp_path, capsys):
    image, labels = spine()
    write_nifti(tmp_path / "mask.nii.gz", labels, SPACING_MM, orientation="PIR")
    write_nifti(tmp_path / "ct.nii.gz", image, SPACING_MM, orientation="LPS")
    flags = ["--mask", tmp_path / "mask.nii.gz", "--out", tmp_path / "out" / "new"]
    assert views.main([str(f) for f in [*flags, "--image", tmp_path / "ct.nii.gz"]]) == 0
    names = sorted(p.name for p in (tmp_path / "out" / "new").iterdir())
    assert names == ["mask_3d.png", "mask_curved.png", "mask_mesh.html", "mask_turntable.gif"]
    assert "mask_mesh.html: " in capsys.readouterr().out
    write_nifti(tmp_path / "other.nii.gz", labels[1:], SPACING_MM)
    with pytest.raises(SystemExit, match=r"other\.nii\.gz is not on the grid of .*\(59 x 50 x 40 and 60"):
        views.main([str(f) for f in [*flags, "--target", tmp_path / "other.nii.gz"]])
    write_nifti(tmp_path / "mask.nii.gz", labels * 0, SPACING_MM)
    assert views.main([str(f) for f in flags]) == 0
    assert "the mask is empty, nothing to draw" in capsys.readouterr().out


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the real scans are not on this machine")
def test_real_scan_that_cuts_a_vertebra(tmp_path):
    folder = REAL_DATA / "spine_ct"
    mask = load_label(folder / "derivatives/sub-verse901/sub-verse901_seg-vert_msk.nii.gz")
    image = load_nifti(folder / "rawdata/sub-verse901/sub-verse901_ct.nii.gz")
    points = views.body_points(mask.array, mask.spacing_mm)
    assert len(points) == 5  # L1 to L5; T11 is a process, T12 is cut
    assert (np.diff(points[:, 0]) < -8).all() and abs(np.diff(points[:, 1:], axis=0)).max() < 6
    written = views.save_views(tmp_path / "case", mask.array, mask.spacing_mm, image=image.array)
    assert len(written) == 4


# ---- along a curve ----


def test_a_straight_curve_gives_the_plane_itself():
    volume = np.random.default_rng(0).integers(-1000, 1000, (30, 21, 25)).astype(np.int16)
    points = [(25, 10, 12), (15, 10, 12), (5, 10, 12)]
    sagittal = curved_planar(volume, points, (1, 1, 1), 8, beyond_mm=4)
    coronal = curved_planar(volume, points[::-1], (1, 1, 1), 8, beyond_mm=4, plane="coronal")
    assert sagittal.dtype == np.int16
    np.testing.assert_array_equal(sagittal, volume[29:1:-1, 18:1:-1, 12])  # head up, front left
    np.testing.assert_array_equal(coronal, volume[29:1:-1, 10, 20:3:-1])  # the patient's right is left


def test_a_bent_tube_becomes_straight_and_keeps_its_width_in_mm():
    spacing_mm = (2.0, 1.0, 1.0)
    z_mm = np.arange(0, 120, 2.0)
    y_mm, x_mm = 40 + 15 * np.sin(z_mm / 30), 30 + 8 * np.cos(z_mm / 40)
    grid = np.meshgrid(z_mm, np.arange(80.0), np.arange(60.0), indexing="ij")
    slope = 0.5 * np.cos(z_mm / 30)
    off = (grid[1] - y_mm[:, None, None]) / np.sqrt(1 + slope**2)[:, None, None]
    tube = (np.hypot(off, grid[2] - x_mm[:, None, None]) < 10).astype(np.uint8)
    points = np.stack([z_mm / 2, y_mm, x_mm], axis=1)[5:-5:5]
    for plane in ("sagittal", "coronal"):
        straight = curved_planar(
            tube, points, spacing_mm, 20, plane=plane, pixel_mm=0.5, beyond_mm=0, order=0, fill=0
        )
        assert straight.shape[1] == 81 and set(np.unique(straight)) == {0, 1}
        np.testing.assert_allclose(straight.sum(axis=1) * 0.5, 20, atol=2.1)
        centre = (straight * np.arange(81)).sum(axis=1) / straight.sum(axis=1)
        np.testing.assert_allclose(centre, 40, atol=2.5)
    length = np.linalg.norm(np.diff(points * spacing_mm, axis=0), axis=1).sum()
    assert straight.shape[0] == pytest.approx(length / 0.5, abs=2)


def test_outside_of_the_volume_is_filled_and_bad_curves_are_refused():
    volume = np.ones((10, 10, 10), np.float32)
    picture = curved_planar(volume, [(8, 5, 5), (1, 5, 5)], (1, 1, 1), 20, fill=-7)
    assert picture[0, 0] == -7 and picture[len(picture) // 2, 20] == 1
    with pytest.raises(ValueError, match="two or more points, all at different places, got 1"):
        curved_planar(volume, [(1, 2, 3)], (1, 1, 1))
    with pytest.raises(ValueError, match="got 2"):
        curved_planar(volume, [(1, 2, 3), (1, 2, 3)], (1, 1, 1))
    with pytest.raises(ValueError, match="plane 'axial' is unknown"):
        curved_planar(volume, [(8, 5, 5), (1, 5, 5)], (1, 1, 1), plane="axial")
