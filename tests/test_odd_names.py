"""Files called as other programs and people call them: every scan is found, and no result is overwritten."""

import csv
import os
import sys

import numpy as np
import pytest

from common.config import run_script
from common.conversion import convert_data_set
from common.decathlon import list_cases, list_files
from common.files import read_json, write_json
from common.hdf5 import CaseFile, write_case
from common.mask_files import called_as, label_files, matching_files
from common.plots import save_panels
from common.prediction import predict_scans
from common.views import save_pictures
from lung_tumor import conversion
from verse_spine.cases import find_cases
from verse_spine.evaluate import true_masks


def touch(folder, *names) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


# ---- data sets ----


def test_scans_of_nnunet_belong_to_labels_without_the_channel(tmp_path):
    touch(tmp_path / "imagesTr", "liver_1_0000.nii.gz", "liver_2_0000.nii.gz", "amos_0000.nii.gz")
    touch(tmp_path / "labelsTr", "liver_1.nii.gz", "liver_2.nii.gz", "amos_0000.nii.gz")
    assert [case.case_id for case in list_cases(tmp_path)] == ["amos_0000", "liver_1", "liver_2"]
    touch(tmp_path / "imagesTs", "a_0000.nii.gz", "b_0000.nii.gz")
    touch(tmp_path / "imagesVa", "amos_0000.nii.gz", "amos_0001.nii.gz")
    assert [case.case_id for case in list_files(tmp_path, "Ts")[0]] == ["a", "b"]
    assert [case.case_id for case in list_files(tmp_path, "Va")[0]] == ["amos_0000", "amos_0001"]


def test_both_scans_of_one_case_are_told(tmp_path):
    touch(tmp_path / "imagesTr", "a.nii.gz", "a_0000.nii.gz")
    touch(tmp_path / "labelsTr", "a.nii.gz")
    with pytest.raises(ValueError, match="a.nii.gz and a_0000.nii.gz are the same case"):
        list_cases(tmp_path)


def test_verse_in_capitals(tmp_path):
    touch(tmp_path / "rawdata", "sub-1/sub-1_CT.nii.gz", "sub-2/sub-2_ct.NII.GZ")
    touch(tmp_path / "derivatives", "sub-1/sub-1_seg-vert_msk.nii.gz", "sub-2/sub-2_SEG-VERT_MSK.nii.gz")
    assert [case.name for case in find_cases(tmp_path) if case.mask] == ["sub-1", "sub-2"]


# ---- masks against masks ----


def test_predictions_of_scans_match_their_masks(tmp_path):
    touch(tmp_path / "truth", "sub-1_seg-vert_msk.nii.gz", "liver_2.nii.gz", "c_gt.nii.gz", "d_ct.nii.gz")
    touch(tmp_path / "pred", "sub-1_CT_mask.nii.gz", "liver_2_0000_mask.nii.gz", "c_T1w_pred.nii.gz")
    touch(tmp_path / "pred", "d_ct_mask.nii.gz", "e_ct_mask.nii.gz")
    targets = label_files(tmp_path / "truth")
    assert list(targets) == ["c", "d_ct", "liver_2", "sub-1"]
    preds = matching_files(tmp_path / "pred", targets, "truth")
    assert sorted(preds) == ["c", "d_ct", "e_ct", "liver_2", "sub-1"]
    assert preds["sub-1"].name == "sub-1_CT_mask.nii.gz"


def test_two_files_of_one_case_are_told(tmp_path):
    files = {"a_0000": tmp_path / "1", "a": tmp_path / "2"}
    with pytest.raises(ValueError, match="1 and 2 are the same case a"):
        called_as(files, ["a"])
    assert called_as(files, ["a", "a_0000"]) == files


def test_masks_in_subfolders(tmp_path):
    touch(tmp_path / "a", "sub-1/sub-1_seg-vert_msk.nii.gz", "sub-2/sub-2_seg-vert_msk.nii.gz")
    assert list(label_files(tmp_path / "a")) == ["sub-1", "sub-2"]
    touch(tmp_path / "b", "one/seg.nii.gz", "two/seg.nii.gz", "two/probabilities/seg_01.nii.gz")
    assert list(label_files(tmp_path / "b")) == ["one", "two"]
    assert [case.name for case in true_masks(tmp_path / "a")] == ["sub-1", "sub-2"]
    touch(tmp_path / "c", "one/seg.nii.gz", "two/seg.nii.gz", "two/mask.nii.gz")
    with pytest.raises(ValueError, match="one/seg.nii.gz and two/seg.nii.gz are the same case"):
        label_files(tmp_path / "c")


# ---- prediction ----


def predict_all(source, out, recursive=True) -> tuple[dict, list[str]]:
    """Predict with a function that writes an empty mask; (failed, files in `out`)."""

    def predict(path, folder) -> dict:
        mask = folder / f"{path.name.removesuffix('.nii.gz')}_mask.nii.gz"
        assert not mask.exists(), "a result was overwritten"
        mask.touch()
        touch(folder, "probabilities/x_01.nii.gz")
        return {"scan": str(path), "seconds": 1.0}

    failed = predict_scans(
        predict,
        source,
        out,
        own_names=("_mask",),
        recursive=recursive,
        table="t.csv",
        machine="cpu",
        found=lambda row: "",
    )
    return failed, sorted(str(path.relative_to(out)) for path in out.rglob("*_mask.nii.gz"))


def test_scans_that_are_called_alike_are_all_predicted(tmp_path):
    touch(tmp_path / "in", "case1/ct.nii.gz", "case2/ct.nii.gz", "deep/er/ct.nii.gz", "other.nii.gz")
    failed, masks = predict_all(tmp_path / "in", tmp_path / "out")
    assert not failed
    folders = ("case1/ct", "case2/ct", "deep/er/ct", "other")
    assert masks == [f"{name}_mask.nii.gz" for name in folders]
    assert list(label_files(tmp_path / "out" / "case1")) == ["ct"]


@pytest.mark.parametrize("out", ["in", "in/predictions", "beside"])
def test_results_beside_or_inside_the_source_are_not_predicted_again(tmp_path, out):
    touch(tmp_path / "in", "a.nii.gz", "sub/b_MASK.nii.gz", "sub/c.nii.gz")
    for _ in range(2):
        for mask in (tmp_path / out).rglob("*_mask.nii.gz"):
            mask.unlink()
        failed, masks = predict_all(tmp_path / "in", tmp_path / out)
        assert not failed and masks == ["a_mask.nii.gz", "c_mask.nii.gz"]


# ---- names that are not UTF-8 ----

ODD = os.fsdecode(b"caf\xe9")


def test_names_that_are_not_utf8_stand_in_tables_and_on_the_screen(tmp_path, monkeypatch):
    touch(tmp_path / "in", f"{ODD}.nii.gz", "b.nii.gz")
    output = tmp_path / "screen.txt"
    with output.open("w", encoding="utf8") as screen:
        monkeypatch.setattr(sys, "stdout", screen)
        with pytest.raises(SystemExit) as ended:
            run_script(lambda: len(predict_all(tmp_path / "in", tmp_path / "out")[0]))
    assert ended.value.code == 0
    with (tmp_path / "out" / "t.csv").open(encoding="utf8") as table:
        assert sorted(row["scan"].rsplit("/")[-1] for row in csv.DictReader(table)) == [
            "b.nii.gz",
            r"caf\udce9.nii.gz",
        ]
    assert r"caf\udce9.nii.gz" in output.read_text(encoding="utf8")


def test_names_that_are_not_utf8_in_files_and_pictures(tmp_path):
    path = tmp_path / f"{ODD}.h5"
    write_case(path, np.zeros((4, 4, 4), np.int16), attributes={"name": ODD})
    assert CaseFile(path).attributes["name"] == ODD
    write_json(tmp_path / f"{ODD}.json", {"case": ODD})
    assert read_json(tmp_path / f"{ODD}.json") == {"case": ODD}
    for name in (ODD, "cost_$1_and_$2", "$\\frac$"):
        save_panels(tmp_path / "picture.png", [[np.zeros((8, 8, 3), np.uint8)]], [[name]])
        save_pictures(tmp_path / "views.png", [np.zeros((8, 8, 3), np.uint8)], [name])


# ---- results among the data ----


@pytest.mark.parametrize("name", ["imagesTr", "rawdata"])
def test_nothing_is_converted_into_a_folder_with_scans(tmp_path, name):
    touch(tmp_path, f"{name}/a.nii.gz", "dataset.json")
    with pytest.raises(ValueError, match=f"holds scans .{name}/.*name another folder"):
        convert_data_set(len, {}, tmp_path, files={}, settings={}, about_all={}, workers=0)
    with pytest.raises(ValueError, match=f"holds scans .{name}/.*name another folder"):
        conversion.convert_all([], tmp_path, conversion.Settings(1.0), 0)
    assert (tmp_path / "dataset.json").is_file()
