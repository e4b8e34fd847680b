"""amygdala/phantoms.py: amygdalae at their places and volumes, and the layout of the synthetic heads."""

import hashlib
import json

import numpy as np
import pytest

from amygdala import preprocess
from amygdala.phantoms import SITES, head_phantom, write_head_phantoms
from amygdala.structures import DATASETS
from common.nifti import load_nifti


def middle_mm(label: np.ndarray, number: int, spacing_mm: float) -> np.ndarray:
    return np.argwhere(label == number).mean(0) * spacing_mm


@pytest.mark.parametrize("site", SITES)
def test_amygdalae_have_their_volume_and_place(site):
    for seed in range(3):
        image, label = head_phantom(seed, site, spacing_mm=(2, 2, 2))
        assert (image.dtype, label.dtype) == (np.int16, np.uint8) and image.shape == label.shape
        assert image.min() >= 0 and set(np.unique(label)) == {0, 1, 2}
        for number in (1, 2):
            assert 950 < (label == number).sum() * 8 < 1950
        left, right = (middle_mm(label, number, 2) for number in (1, 2))
        assert 38 < right[2] - left[2] < 54 and np.abs((right - left)[:2]).max() < 9
        # In the head: below its middle, before it, left and right of it.
        head = np.argwhere(image > image.mean()).mean(0) * 2
        assert left[2] < head[2] < right[2] and left[1] > head[1] - 5 and left[0] < head[0]


def test_they_are_grey_among_white():
    image, label = head_phantom(1, "north", spacing_mm=(2, 2, 2))
    inside, white = image[label > 0].mean(), SITES["north"].white
    assert 0.5 < inside / white < 0.9


def test_a_stripped_head_shows_the_brain_alone():
    whole, label = head_phantom(5, "south", spacing_mm=(3, 3, 3))
    stripped, same = head_phantom(5, "south", spacing_mm=(3, 3, 3), stripped=True)
    np.testing.assert_array_equal(label, same)
    blank = stripped == 0
    assert 0.5 < blank.mean() < 0.9 and not blank[label > 0].any() and (whole == 0).mean() < 0.1
    np.testing.assert_array_equal(stripped[~blank], whole[~blank])


def test_the_layout_and_its_conversion(tmp_path, capsys):
    source = write_head_phantoms(tmp_path / "heads", 3, 1, seed=3, voxel_mm=4.0)
    assert [p.name for p in sorted((source / "imagesTr").iterdir())] == [
        f"sub-0{k}.nii.gz" for k in (1, 2, 3)
    ]
    assert (source / "imagesTs" / "sub-04.nii.gz").is_file()
    scan = load_nifti(source / "imagesTr" / "sub-01.nii.gz")
    assert scan.orientation == "LIA"
    values = np.unique(load_nifti(source / "labelsTr" / "sub-02.nii.gz").array)
    assert values.tolist() == [0, 18, 54], "FreeSurfer's numbers"
    before = {p: hashlib.sha256(p.read_bytes()).digest() for p in source.rglob("*.nii.gz")}
    assert write_head_phantoms(source, 3, 1, seed=3, voxel_mm=4.0) == source
    assert before == {p: hashlib.sha256(p.read_bytes()).digest() for p in source.rglob("*.nii.gz")}
    with pytest.raises(FileExistsError, match="holds something else"):
        write_head_phantoms(source, 3, 1, seed=4, voxel_mm=4.0)
    assert preprocess.main(["--source", str(source), "--out", str(tmp_path / "h5"), "--workers", "0"]) == 0
    notes = json.loads((tmp_path / "h5" / "preprocessing.json").read_text())
    assert [entry["site"] for entry in notes["cases"]] == ["north", "south"] * 2
    assert [entry["part"] for entry in notes["cases"]] == ["train"] * 3 + ["test"]
    low, high = DATASETS["Amygdala"].volume_mm3
    for entry in notes["cases"]:
        assert not entry["notes"] and all(low < v < high for v in entry["volume_mm3"].values())


def test_the_same_seed_gives_the_same_heads():
    first, again, other = (head_phantom(seed, spacing_mm=(4, 4, 4))[0] for seed in (7, 7, 8))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
