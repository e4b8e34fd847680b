"""common/decathlon.py: listing a folder in the Decathlon's layout, and what is wrong with it."""

import pytest

from common.decathlon import (
    Case,
    check_label_names,
    find_decathlon,
    label_names,
    labelled_numbers,
    list_cases,
    list_files,
    list_parts,
    modality_of,
    read_dataset_json,
)


def make_folder(root, images=(), labels=()):
    for folder, names in (("imagesTr", images), ("labelsTr", labels)):
        (root / folder).mkdir(parents=True)
        for name in names:
            (root / folder / name).touch()
    return root


def test_cases_in_natural_order(tmp_path):
    names = ["lung_10.nii.gz", "lung_2.nii.gz", "lung_001.nii"]
    folder = make_folder(tmp_path, names, names)
    cases = list_cases(str(folder))
    assert [c.case_id for c in cases] == ["lung_001", "lung_2", "lung_10"]
    assert cases[0] == Case("lung_001", folder / "imagesTr/lung_001.nii", folder / "labelsTr/lung_001.nii")


def test_image_and_label_may_differ_in_compression(tmp_path):
    case = list_cases(make_folder(tmp_path, ["a.nii"], ["a.NII.GZ"]))[0]
    assert (case.case_id, case.image.name, case.label.name) == ("a", "a.nii", "a.NII.GZ")


def test_resource_files_and_others_are_passed_over(tmp_path):
    names = [
        "lung_1.nii.gz",
        "._lung_1.nii.gz",
        "._lung_2.nii.gz",
        ".DS_Store",
        "readme.txt",
        "lung_3.nii.gz.part",
    ]
    cases = list_cases(make_folder(tmp_path, names, ["lung_1.nii.gz", "._lung_7.nii.gz"]))
    assert [c.case_id for c in cases] == ["lung_1"]


def test_images_without_label_and_labels_without_image_are_named(tmp_path):
    folder = make_folder(
        tmp_path, ["a.nii.gz", "c10.nii.gz", "c9.nii.gz"], ["a.nii.gz", "d1.nii.gz", "a_label.nii.gz"]
    )
    with pytest.raises(ValueError) as info:
        list_cases(folder)
    for words in (
        str(folder),
        "2 scan(s) without a file of that name in labelsTr: c9, c10",
        "2 label(s) without a file of that name in imagesTr: a_label, d1",
        "Add the missing files or move these away",
    ):
        assert words in str(info.value)


def test_one_side_alone(tmp_path):
    with pytest.raises(ValueError) as info:
        list_cases(make_folder(tmp_path / "x", ["a.nii.gz"], []))
    assert "1 scan(s) without" in str(info.value) and "label(s) without" not in str(info.value)
    with pytest.raises(ValueError) as info:
        list_cases(make_folder(tmp_path / "y", [], ["a.nii.gz"]))
    assert "1 label(s) without" in str(info.value) and "scan(s) without" not in str(info.value)


def test_many_missing_files_are_counted(tmp_path):
    names = [f"c{n}.nii.gz" for n in range(1, 31)]
    with pytest.raises(ValueError, match=r"30 scan\(s\) without .*: c1, c2, .*c10, \.\.\.\. Add"):
        list_cases(make_folder(tmp_path, names, []))


@pytest.mark.parametrize("side", ["imagesTr", "labelsTr"])
def test_two_files_of_one_case_are_refused(tmp_path, side):
    folder = make_folder(tmp_path, ["a.nii.gz"], ["a.nii.gz"])
    (folder / side / "a.nii").touch()
    with pytest.raises(ValueError, match=f"{side}: a.nii and a.nii.gz are the same case; move one away"):
        list_cases(folder)


def test_empty_folder(tmp_path):
    folder = make_folder(tmp_path, ["._a.nii.gz"], ["notes.txt"])
    with pytest.raises(ValueError, match=f"{folder}: imagesTr and labelsTr hold no scan"):
        list_cases(folder)


def test_missing_folder(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=f"{tmp_path}: no folder imagesTr; expected the Decathlon layout"
    ):
        list_cases(tmp_path)
    (tmp_path / "imagesTr").mkdir()
    with pytest.raises(FileNotFoundError, match="no folder labelsTr"):
        list_cases(tmp_path)
    (tmp_path / "labelsTr").write_text("a file")
    with pytest.raises(FileNotFoundError, match="no folder labelsTr"):
        list_cases(tmp_path)


def test_find_decathlon_here_or_one_level_deeper(tmp_path):
    assert find_decathlon(tmp_path) is None
    assert find_decathlon(tmp_path / "none") is None
    make_folder(tmp_path / "a" / "Task06_Lung", ["a.nii.gz"], ["a.nii.gz"])
    (tmp_path / "a" / "__MACOSX").mkdir()
    assert find_decathlon(tmp_path / "a" / "Task06_Lung") == tmp_path / "a" / "Task06_Lung"
    assert find_decathlon(str(tmp_path / "a")) == tmp_path / "a" / "Task06_Lung"
    assert find_decathlon(tmp_path) is None  # two levels are too many
    make_folder(tmp_path / "a" / "Task07_Pancreas")
    assert find_decathlon(tmp_path / "a") is None  # which one?
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "imagesTr").write_text("a file")
    assert find_decathlon(tmp_path / "b") is None


def test_dataset_json(tmp_path):
    assert read_dataset_json(tmp_path) == {}
    path = tmp_path / "dataset.json"
    path.write_text('{"name": "Lung", "labels": {"0": "background", "1": "cancer"}}', encoding="utf8")
    assert read_dataset_json(tmp_path)["labels"]["1"] == "cancer"


@pytest.mark.parametrize("content", [b'{"name": ', b"", b"\xff\xfe", b"[1, 2]"])
def test_broken_dataset_json_names_the_file(tmp_path, content):
    (tmp_path / "dataset.json").write_bytes(content)
    with pytest.raises(ValueError, match="not valid JSON|expected an object, found a list") as info:
        read_dataset_json(tmp_path)
    assert str(tmp_path / "dataset.json") in str(info.value)


def test_files_of_a_part_complete_or_not(tmp_path):
    folder = make_folder(tmp_path, ["a.nii.gz"], ["a.nii.gz"])
    for kind, names in (("imagesVa", ["b10.nii", "b9.nii.gz", "b9.nii"]), ("labelsVa", ["b10.nii", "c.nii"])):
        (folder / kind).mkdir()
        for name in names:
            (folder / kind / name).touch()
    cases, problems = list_files(folder, "Va")
    assert [case.case_id for case in cases] == ["b9", "b10", "c"]
    assert cases[0] == Case("b9", folder / "imagesVa/b9.nii", None)
    assert cases[2] == Case("c", None, folder / "labelsVa/c.nii")
    assert problems == [f"{folder / 'imagesVa'}: b9.nii and b9.nii.gz are the same case; move one away"]
    assert list_files(folder, "Ts") == ([], [])


def test_names_of_labels_by_number_or_by_name():
    assert label_names({"labels": {"0": "background", "3": "lung"}}) == {0: "background", 3: "lung"}
    nnunet = {"background": 0, "lung": 3, "whole": [1, 2]}
    assert label_names({"labels": nnunet}) == {0: "background", 3: "lung"}
    assert label_names({}) == label_names({"labels": None}) == {}


@pytest.mark.parametrize(
    "notes, modality",
    [
        ({"modality": {"0": "CT"}}, "ct"),
        ({"modality": {"0": "MRI"}}, "mr"),
        ({"modality": {"0": "FLAIR", "1": "T1w"}}, "mr"),
        ({"channel_names": {"0": "CT"}}, "ct"),
        ({"modality": {"0": "ultrasound"}}, None),
        ({}, None),
    ],
)
def test_modality(notes, modality):
    assert modality_of(notes) == modality


def test_parts_and_names_in_two_of_them(tmp_path):
    for part, names in {"Tr": ["b10", "b9"], "Va": ["a", "b9"], "Ts": ["c"]}.items():
        (tmp_path / f"images{part}").mkdir()
        for name in names:
            (tmp_path / f"images{part}" / f"{name}.nii.gz").touch()
    cases, problems = list_parts(tmp_path, {"Tr": "train", "Va": "val", "Ts": "test"})
    found = [(part, case.case_id) for part, case in cases]
    assert found == [("train", "b9"), ("train", "b10"), ("val", "a"), ("val", "b9"), ("test", "c")]
    assert problems == [f"{tmp_path}: b9 is a case of train and of val; remove one of them"]


def test_names_of_labels_are_compared_by_their_letters(tmp_path):
    names, spellings, path = {1: "left ear", 2: "nose"}, {2: ("snout", "nasus")}, tmp_path / "dataset.json"
    for given in ({"1": "Left_Ear", "2": "SNOUT"}, {"nose": 2, "hair": 3}, {}):
        check_label_names({"labels": given}, names, spellings, "Faces", path)
    with pytest.raises(ValueError, match="calls label 1 'nose', which is the left ear in Faces; give"):
        check_label_names({"labels": {"1": "nose"}}, names, spellings, "Faces", path)


@pytest.mark.parametrize(
    "notes, flag, expected",
    [
        ({}, None, (1, 2, 5)),
        ({"labels": {"0": "background", "5": "x", "9": "y"}}, None, (5,)),
        ({"labels": {"5": "x"}, "labelled": [2, 1, 2]}, None, (1, 2)),
        ({"labelled": {"a": [5], "b": [1]}}, None, (5,)),
        ({"labelled": [1]}, [5, 2], (2, 5)),
    ],
)
def test_which_labels_a_case_was_annotated_with(notes, flag, expected, tmp_path):
    assert labelled_numbers("a", notes, flag, {1: "x", 2: "y", 5: "z"}, tmp_path) == expected


@pytest.mark.parametrize("noted", [[], [3], "all", {"b": [1]}, [1, "2"]])
def test_lists_of_labels_that_make_no_sense(noted, tmp_path):
    with pytest.raises(ValueError, match="dataset.json: .*expected numbers of labels from 1 to 5, found"):
        labelled_numbers("a", {"labelled": noted}, None, [1, 2, 5], tmp_path / "dataset.json")
