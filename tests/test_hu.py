"""The HU window, and the suspicion that a scan is not a CT in HU."""

import numpy as np
import pytest
from conftest import REAL_DATA

from common.hu import why_not_hu, window
from common.nifti import load_nifti

CT = (
    "lung_ct/imagesTr/lung_*",
    "spine_ct/rawdata/*/*",
    "abdomen_ct/images*/amos_000*",
    "abdomen_ct/imagesTs/*",
)
MR = ("abdomen_mr_chaos/imagesTr/*", "abdomen_ct/imagesTr/amos_05*", "hippocampus_mr/imagesTr/*5.nii.gz",
      "left_atrium_lge/imagesTr/*", "left_atrium_mr/imagesTr/*", "brain_t1_*/imagesTr/*",
      "brain_tumor_mr/*/*image.nii.gz")  # fmt: skip


def real(patterns: tuple[str, ...]) -> list:
    return [path for pattern in patterns for path in sorted(REAL_DATA.glob(pattern)) if path.is_file()]


def synthetic_ct(seed: int = 0) -> np.ndarray:
    """Air, fat, muscle and bone in a body that fills half of each slice; noise of 20 HU."""
    rng = np.random.default_rng(seed)
    image = np.full((6, 40, 40), -1000.0)
    image[:, 8:36, 6:34], image[:, 12:32, 10:30], image[:, 20:26, 18:24] = -100, 50, 600
    return np.rint(image + rng.normal(0, 20, image.shape)).astype(np.int16)


def test_window():
    got = window(np.array([-2000, -1000, 0, 1000, 3000], np.int16), -1000, 1000)
    assert got.dtype == np.float32 and got.tolist() == [0, 0, 0.5, 1, 1]
    assert window(np.array([-450.0, 0.0]), -500, -400).tolist() == [0.5, 1]
    with pytest.raises(ValueError, match="window 5 to 5 HU: the upper end must be above the lower"):
        window(np.zeros(3), 5, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda hu: (hu - hu.min()) / np.ptp(hu), "a picture scaled to 0..1"),
        (lambda hu: np.clip((hu + 160) / 400 * 255, 0, 255).astype(np.uint8), "an 8-bit picture"),
        (lambda hu: np.clip(hu + 1024, 0, 4095), "1024 must be subtracted"),
        (lambda hu: np.where(np.arange(40) < 2, -2000, hu + 1024), "1024 must be subtracted"),
        (lambda hu: (hu - hu.mean()) / hu.std(), "too close together for HU"),
        (lambda hu: hu.astype(np.int32) - 1024, "was 1024 subtracted twice"),
        (lambda hu: np.abs(hu) * 2, "hardly any below -60"),
        (lambda hu: (hu - 1024).astype(np.uint16), "hardly any below -60"),
        (lambda hu: np.zeros_like(hu), "all values are 0; the scan is empty"),
        (lambda hu: np.full_like(hu, -3024), "all values are below -1500"),
    ],
)  # fmt: skip
def test_named(change, message):
    assert message in why_not_hu(change(synthetic_ct()))


@pytest.mark.parametrize(
    "change",
    [
        lambda hu: hu,
        lambda hu: np.where(np.arange(40) < 9, -3024, hu),  # padding outside of the field of view
        lambda hu: np.clip(hu, -1000, 1000),
        lambda hu: np.clip(hu, -160, 240),
        lambda hu: hu[:, 8:36, 6:34],  # no air left
        lambda hu: np.where(hu > 500, 30000, hu),  # metal
        lambda hu: hu.astype(np.float32)[0],
        lambda hu: hu[:0],
    ],
)
def test_quiet(change):
    assert why_not_hu(change(synthetic_ct())) == ""


def test_phantoms_are_ct():
    from lung_tumor.phantoms import chest_phantom
    from verse_spine.phantoms import spine_phantom

    assert why_not_hu(chest_phantom(0, (24, 48, 48), (7, 7, 7))[0]) == ""
    assert why_not_hu(spine_phantom(0, spacing_mm=(5.0, 5.0, 5.0))[0]) == ""


def test_real_ct_pass_and_raw_ones_are_named():
    if not (paths := real(CT)):
        pytest.skip("the real scans are not on this machine")
    assert len(paths) >= 9
    for path in paths:
        image = load_nifti(path).array
        assert why_not_hu(image) == "", path.name
        raw = np.where(image < -1500, image, image.astype(np.int32) + 1024)
        assert "1024 must be subtracted" in why_not_hu(raw), path.name


def test_real_mr_are_named():
    if not (paths := real(MR)):
        pytest.skip("the real scans are not on this machine")
    assert len(paths) >= 60
    for path in paths:
        image = load_nifti(path).array
        doubt = why_not_hu(image)
        assert doubt and "raw scanner values" not in doubt, path.name
        assert "8-bit picture" in why_not_hu(image / image.max() * 255), path.name
        assert why_not_hu((image - image.mean()) / image.std()), path.name


def test_a_little_fat_is_enough_for_a_ct():
    """2 % of the voxels at -100 HU, as in a crop of the liver; without them nothing tells it from an MR."""
    values = np.linspace(20, 600, 10_000).astype(np.int16)
    assert why_not_hu(values)
    values[::50] = -100
    assert why_not_hu(values) == ""
