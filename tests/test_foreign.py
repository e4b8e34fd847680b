"""common/foreign.py: scans in other formats end in a sentence that names the format and what converts it."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from common import batch
from common.config import parse_args
from common.foreign import FORMATS, foreign_files, why_foreign
from common.mask_files import label_files
from common.nifti import NIFTI_SUFFIXES, open_nifti, write_nifti

PREPROCESS = {  # task: (flag of the raw data, more flags, names of a scan and its label)
    "lung_tumor": ("--source", [], ["imagesTr/lung_001", "labelsTr/lung_001"]),
    "verse_spine": ("--source", [], ["rawdata/sub-1/sub-1_ct", "derivatives/sub-1/sub-1_seg-vert_msk"]),
    "amos_lha": ("--data_path", [], ["imagesTr/amos_0001", "labelsTr/amos_0001"]),
    "amygdala": ("--source", ["--dataset", "Amygdala"], ["imagesTr/a_1", "labelsTr/a_1"]),
    "wsss_medical": ("--source", ["--dataset", "lasc"], ["imagesTr/a_1", "labelsTr/a_1"]),
}


def find(source, out=Path("out")):
    names = {"own_names": ("_mask",), "recursive": False, "what": "NIfTI scan"}
    return batch.find_sources(source, NIFTI_SUFFIXES, out=out, **names)


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"content")
    return path


@pytest.mark.parametrize("ending", FORMATS)
def test_a_single_file_of_another_format(tmp_path, ending):
    path = touch(tmp_path / f"Case.{ending[1:].upper()}")
    what, program = FORMATS[ending]
    for read in (open_nifti, find):
        with pytest.raises(ValueError) as caught:
            read(path)
        message = str(caught.value).removeprefix("--source ")
        assert message == f"{path}: {what}, which is not read; convert it to .nii.gz, such as with {program}"


def test_what_is_read_is_not_foreign():
    assert not any(why_foreign(Path(f"case{ending}")) for ending in (*NIFTI_SUFFIXES, ".png", ".npy", ""))


def test_a_pair_is_not_read_as_half_of_it(tmp_path):
    import nibabel as nib

    nib.save(nib.Nifti1Pair(np.zeros((3, 3, 3), np.int16), np.eye(4)), tmp_path / "a.img")
    for name in ("a.img", "a.hdr"):
        with pytest.raises(ValueError, match=rf"{name}: an .hdr/.img pair .* such as with fslchfiletype"):
            open_nifti(tmp_path / name)


def test_folders_with_other_formats(tmp_path, capsys):
    for name in ("a.mha", "b.MHA", "c.mnc", ".d.mha"):
        touch(tmp_path / "in" / name)
    with pytest.raises(
        FileNotFoundError, match=r"\. There are 2 \.mha file\(s\) \(MetaImage\), to be converted"
    ):
        find(tmp_path / "in")
    write_nifti(tmp_path / "in" / "scan.nii", np.zeros((3, 3, 3), np.int16), (1, 1, 1))
    assert [path.name for path in find(tmp_path / "in")] == ["scan.nii"]
    assert capsys.readouterr().out.startswith(
        "left out: 2 .mha file(s) (MetaImage), to be converted to .nii.gz"
    )
    assert foreign_files([]) == ""
    pair = foreign_files(map(Path, ("b.img", "a.hdr", "a.img", "b.hdr", "c.mnc")))
    assert pair.startswith("2 .img and 2 .hdr file(s) (an .hdr/.img pair"), pair
    assert pair.count("fslchfiletype") == 1 and "; 1 .mnc file(s) (MINC)" in pair
    (tmp_path / "in" / "scan.nii").unlink()
    with pytest.raises(ValueError, match="no .nii or .nii.gz file. There are 2 .mha"):
        label_files(tmp_path / "in")


@pytest.mark.parametrize("task", PREPROCESS)
@pytest.mark.parametrize("ending", [".mha", ".hdr", ".dcm"])
def test_preprocessing_names_the_format(tmp_path, task, ending):
    """Of scans in the right folders, and in a folder without an order."""
    flag, more, names = PREPROCESS[task]
    module = importlib.import_module(f"{task}.preprocess")
    for layout, files in (("ordered", names), ("loose", ["case"])):
        for name in files:
            touch(tmp_path / layout / f"{name}{ending}")
        flags = [flag, str(tmp_path / layout), "--out", str(tmp_path / "out"), *more]
        parse_args(module.build_parser(), flags)
        with pytest.raises(SystemExit) as caught:
            module.main(flags)
        message = str(caught.value)
        assert "\n" not in message and f"{ending} file(s) ({FORMATS[ending][0]})" in message, message
        assert FORMATS[ending][1] in message, message
