import pytest
from conftest import REAL_DATA

from verse_spine.cases import Case, find_cases, merge_editions
from verse_spine.phantoms import PARTS, write_verse_phantoms


def scan(root, name, mask=True, centroids="subreg", image=True):
    """Empty files of one scan; what is in them does not matter here."""
    subject = name.split("_")[0]
    raw, derived = root / "rawdata" / subject, root / "derivatives" / subject
    raw.mkdir(parents=True, exist_ok=True)
    derived.mkdir(parents=True, exist_ok=True)
    if image:
        (raw / f"{name}_ct.nii.gz").touch()
    if mask:
        (derived / f"{name}_seg-vert_msk.nii.gz").touch()
    if centroids:
        (derived / f"{name}_seg-{centroids}_ctd.json").touch()
    (derived / f"{name}_seg-vert_snp.png").touch()
    return root


def test_official_layout_with_name_parts(tmp_path):
    train = scan(tmp_path / "dataset-01training", "sub-verse010_dir-sag")
    scan(train, "sub-verse004", centroids="vb")
    scan(train, "sub-verse400_split-verse155")
    scan(train, "sub-verse400_split-verse096_dir-ax", centroids=None)
    scan(tmp_path / "dataset-03test", "sub-verse500_dir-iso", mask=False)
    derived = train / "derivatives" / "sub-verse004"
    (derived / "sub-verse004_seg-subreg_msk.nii.gz").touch()  # a stray file of the real release
    (derived / "sub-verse004_seg-vert_subreg_msk.nii.gz").touch()
    (train / "rawdata" / "sub-verse004" / "._sub-verse004_ct.nii.gz").touch()
    cases = {case.name: case for case in find_cases(tmp_path)}
    assert list(cases) == [
        "sub-verse004",
        "sub-verse010_dir-sag",
        "sub-verse400_split-verse096_dir-ax",
        "sub-verse400_split-verse155",
        "sub-verse500_dir-iso",
    ]
    assert cases["sub-verse004"].mask.name == "sub-verse004_seg-vert_msk.nii.gz"
    assert cases["sub-verse004"].centroids.name == "sub-verse004_seg-vb_ctd.json"
    assert cases["sub-verse400_split-verse096_dir-ax"].centroids is None
    assert cases["sub-verse400_split-verse155"].subject == "sub-verse400"
    assert cases["sub-verse500_dir-iso"].mask is None and cases["sub-verse500_dir-iso"].part == "test"
    assert {case.part for name, case in cases.items() if "500" not in name} == {"training"}
    assert {case.edition for case in cases.values()} == {None}


def test_cases_are_in_natural_order(tmp_path):
    for number in (10, 9, 100):
        scan(tmp_path, f"sub-verse{number}")
    assert [case.name for case in find_cases(tmp_path)] == ["sub-verse9", "sub-verse10", "sub-verse100"]


def test_subreg_centroids_come_before_vb(tmp_path):
    scan(tmp_path, "sub-verse004", centroids="vb")
    scan(tmp_path, "sub-verse004", centroids="subreg")
    assert find_cases(tmp_path)[0].centroids.name == "sub-verse004_seg-subreg_ctd.json"


def test_flat_layout_has_no_part_and_looks_no_deeper(tmp_path):
    scan(tmp_path, "sub-verse901")
    scan(tmp_path / "label_only", "sub-verse004", image=False)
    assert [(case.name, case.part) for case in find_cases(tmp_path)] == [("sub-verse901", None)]


def test_real_scans():
    if not (REAL_DATA / "spine_ct").is_dir():
        pytest.skip("the real scans are not on this machine")
    cases = find_cases(REAL_DATA / "spine_ct")
    assert [case.name for case in cases] == ["sub-verse901", "sub-verse902", "sub-verse903"]
    assert all(case.mask.is_file() and case.centroids.is_file() for case in cases)


def test_phantoms_are_in_the_official_layout(tmp_path):
    cases = find_cases(write_verse_phantoms(tmp_path / "verse", 5, spacing_scale=2.5))
    assert [case.part for case in cases] == ["training"] * 3 + ["validation", "test"]
    assert all(case.mask and case.centroids for case in cases)
    assert len({case.subject for case in cases}) == 5 and PARTS[2] in str(cases[-1].image)


def test_problems_are_listed(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent: no such folder; verse_spine/download.py"):
        find_cases(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="no scan rawdata.*give the folder above dataset-01training"):
        find_cases(tmp_path)
    train = scan(tmp_path / "a" / "dataset-01training", "sub-verse004", image=False)
    with pytest.raises(ValueError, match=r"no scan for .*sub-verse004_seg-vert_msk\.nii\.gz.*Fetch what"):
        find_cases(tmp_path / "a")
    scan(train, "sub-verse004")
    (train / "rawdata" / "sub-verse004" / "sub-verse004_ct.nii").touch()
    with pytest.raises(ValueError, match=r"sub-verse004_ct\.nii.* are the same"):
        find_cases(tmp_path / "a")
    scan(tmp_path / "b" / "dataset-01training", "sub-verse004_dir-ax")
    scan(tmp_path / "b" / "dataset-02validation", "sub-verse004_dir-sag")
    with pytest.raises(ValueError, match=r"sub-verse004 \(.*training.*\); a patient belongs to one part"):
        find_cases(tmp_path / "b")


def test_both_editions_in_one_folder_are_merged(tmp_path):
    scan(tmp_path / "verse19" / "dataset-01training", "sub-verse004")
    scan(tmp_path / "verse19" / "dataset-03test", "sub-verse020_dir-ax")
    scan(tmp_path / "verse19" / "dataset-03test", "sub-verse020_dir-sag")
    scan(tmp_path / "verse20" / "dataset-01training", "sub-verse020_dir-ax")
    scan(tmp_path / "verse20" / "dataset-02validation", "sub-verse510")
    got = [(case.name, case.part, case.edition) for case in find_cases(tmp_path)]
    assert got == [
        ("sub-verse004", "training", 19),
        ("sub-verse020_dir-ax", "training", 20),  # VerSe20's annotation
        ("sub-verse020_dir-sag", "training", 19),  # moved: its patient trains in VerSe20
        ("sub-verse510", "validation", 20),
    ]
    assert [case.name for case in find_cases(tmp_path, (20,))] == ["sub-verse020_dir-ax", "sub-verse510"]
    assert {case.part for case in find_cases(tmp_path / "verse19") if "020" in case.name} == {"test"}
    assert {case.edition for case in find_cases(tmp_path / "verse20")} == {20}
    with pytest.raises(FileNotFoundError, match=r"holds the edition\(s\) \[20\], not \[19\]"):
        find_cases(tmp_path / "verse20", (19,))
    scan(tmp_path / "dataset-01training", "sub-verse900")
    with pytest.raises(ValueError, match="lies outside of the folders verse19 and verse20"):
        find_cases(tmp_path)


def test_the_edition_is_not_read_from_other_folders(tmp_path):
    scan(tmp_path / "my_verse20_copy" / "dataset-01training", "sub-verse004")
    assert find_cases(tmp_path / "my_verse20_copy")[0].edition is None
    scan(tmp_path / "x" / "dataset-verse19training", "sub-verse004")
    assert find_cases(tmp_path / "x")[0].edition == 19


def test_merge_never_splits_a_patient(tmp_path):
    def case(subject, number, part, edition):
        name = f"{subject}_split-verse{number}"
        return Case(subject, name, tmp_path / name, part=part, edition=edition)

    old = [case("sub-verse100", n, "training", 19) for n in (1, 2)] + [case("sub-verse101", 1, "test", 19)]
    new = [case("sub-verse100", n, "test", 20) for n in (2, 3)]
    merged = merge_editions(old, new)
    assert [(c.name[-1], c.part, c.edition) for c in merged if c.subject == "sub-verse100"] == [
        ("1", "test", 19),
        ("2", "test", 20),
        ("3", "test", 20),
    ]
    parts = {c.subject: {other.part for other in merged if other.subject == c.subject} for c in merged}
    assert all(len(p) == 1 for p in parts.values())
    assert merge_editions(old, []) == old and merge_editions([], new) == new


def test_merged_editions_come_by_number_not_by_letter(tmp_path):
    cases = [Case(f"sub-{n}", f"sub-{n}", tmp_path / "x.nii") for n in (10, 100, 9)]
    merged = merge_editions(cases[:1], cases[1:])
    assert [case.name for case in merged] == ["sub-9", "sub-10", "sub-100"]
