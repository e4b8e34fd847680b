"""common/splits.py: no patient on both sides, the same split everywhere, clear refusals."""

import json
import os
import random
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from common import splits
from common.splits import (
    check_folds,
    check_split,
    cut_in_order,
    fold_split,
    hold_out,
    leave_group_out,
    natural_key,
    patients_of,
    read_splits,
    save_splits,
    split_by_patient,
    stratified_folds,
)

ROOT = Path(__file__).resolve().parents[1]
LUNG = patients_of([f"lung_{number:03d}" for number in range(1, 64)])  # 63 cases, as Task06_Lung has
SCANS = patients_of([f"p{p}_scan{s}" for p in range(12) for s in range(1 + p % 4)], r"(p\d+)_scan\d+")


def cases_of(split):
    return [case for part in split.values() for case in part]


def assert_patients_apart(split, patients):
    parts = [{patients[case] for case in split[part]} for part in ("train", "val", "test")]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert sorted(cases_of(split)) == sorted(patients)


# ---- names ----


def test_natural_order():
    names = ["lung_10", "lung_2", "lung_1", "a2b10", "a2b9", "a10b1", "lung", "10", "9", "lung_2a", ""]
    assert sorted(names, key=natural_key) == [
        "",
        "a2b9",
        "a2b10",
        "a10b1",
        "lung",
        "lung_1",
        "lung_2",
        "lung_2a",
        "lung_10",
        "9",
        "10",
    ]


def test_natural_order_of_names_with_equal_numbers_does_not_depend_on_the_input():
    names = ["p1", "p01", "p001", "p2"]
    orders = {tuple(sorted(random.Random(s).sample(names, 4), key=natural_key)) for s in range(20)}
    assert orders == {("p001", "p01", "p1", "p2")}


def test_patients_of():
    assert patients_of(["b", "a"]) == {"b": "b", "a": "a"}
    assert patients_of([]) == {}
    assert patients_of(["p1_scan1", "p1_scan2", "p2_scan1"], r"(.+)_scan\d+") == {
        "p1_scan1": "p1",
        "p1_scan2": "p1",
        "p2_scan1": "p2",
    }


@pytest.mark.parametrize(
    "pattern, message",
    [
        (r"p\d+", "put what tells the patient in brackets, such as"),
        ("(", "not a regular expression .missing"),
        ("a{99999999999999999999}", "not a regular expression"),
        ("(" * 5000 + ")" * 5000, "not a regular expression"),
        (r"((.+)+)+\d$", "takes too long to search; write it without repeats within repeats"),
    ],
)
def test_patterns_that_no_name_is_to_blame_for(pattern, message, monkeypatch):
    """The last one would take years for this name."""
    monkeypatch.setattr(splits, "SEARCH_S", 0.5)
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(ValueError, match=f"--patient_pattern .*: {message}"):
        patients_of(["patient_" + "x" * 60], pattern)
    assert signal.getsignal(signal.SIGALRM) == before and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.mark.parametrize("pattern", [r"(.+)_scan\d+", r"(x)?p", r"(x*)p"])
def test_pattern_that_finds_no_patient_names_the_case(pattern):
    with pytest.raises(ValueError, match="case p17: the patient pattern .* finds no group in its name"):
        patients_of(["xp1_scan1", "p17"] if "scan" in pattern else ["p17"], pattern)


# ---- split ----


def test_63_cases_give_51_training_and_12_validation():
    split = split_by_patient(LUNG, val_ratio=0.2)
    assert [len(split[part]) for part in ("train", "val", "test")] == [51, 12, 0]
    assert_patients_apart(split, LUNG)
    assert split["val"] == sorted(split["val"])


@pytest.mark.parametrize(
    "num_patients, val_ratio, test_ratio, expected",
    [
        (10, 0.2, 0.1, [7, 2, 1]),
        (10, 0.0, 0.0, [10, 0, 0]),
        (3, 0.01, 0.01, [1, 1, 1]),
        (2, 0.5, 0.0, [1, 1, 0]),
    ],
)
def test_ratios(num_patients, val_ratio, test_ratio, expected):
    patients = patients_of([f"c{n}" for n in range(num_patients)])
    split = split_by_patient(patients, val_ratio=val_ratio, test_ratio=test_ratio)
    assert [len(split[part]) for part in ("train", "val", "test")] == expected
    assert_patients_apart(split, patients)


@pytest.mark.parametrize("seed", range(10))
def test_patients_with_several_scans_stay_in_one_part(seed):
    split = split_by_patient(SCANS, val_ratio=0.25, test_ratio=0.25, seed=seed)
    assert_patients_apart(split, SCANS)
    counts = [len({SCANS[c] for c in split[part]}) for part in ("train", "val", "test")]
    assert counts == [6, 3, 3]  # of 12 patients, whatever the number of their scans


def test_split_depends_on_the_seed_but_not_on_the_order_of_the_input():
    split = split_by_patient(SCANS, seed=1)
    items = list(SCANS.items())
    for shuffle in range(5):
        random.Random(shuffle).shuffle(items)
        assert split_by_patient(dict(items), seed=1) == split
        assert fold_split(dict(items), folds=4, fold=1) == fold_split(SCANS, folds=4, fold=1)
    assert split_by_patient(SCANS, seed=2) != split


def test_split_leaves_the_global_generator_alone():
    random.seed(0)
    expected = random.random()
    random.seed(0)
    split_by_patient(LUNG)
    assert random.random() == expected


def test_split_is_the_same_in_every_process():
    """Patients called 1, 01, 001 were shuffled by the hash of their names, another one in each process."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from common.splits import patients_of, split_by_patient\n"
        "print(split_by_patient(patients_of(['0' * n + '1' for n in range(12)])))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in (1, 2, 3)
    }
    assert len(outputs) == 1


@pytest.mark.parametrize(
    "num_patients, ratios", [(0, (0.2, 0)), (1, (0.2, 0)), (2, (0.2, 0.2)), (4, (0.5, 0.5))]
)
def test_split_without_training_patients_is_refused(num_patients, ratios):
    patients = patients_of([f"c{n}" for n in range(num_patients)])
    with pytest.raises(
        ValueError, match=rf"^{num_patients} patient\(s\) cannot be split .* add scans or lower"
    ):
        split_by_patient(patients, val_ratio=ratios[0], test_ratio=ratios[1])


# ---- folds ----


@pytest.mark.parametrize("patients, folds", [(LUNG, 5), (SCANS, 3), (SCANS, 12)])
def test_folds_test_every_patient_exactly_once(patients, folds):
    splits = [fold_split(patients, folds=folds, fold=fold) for fold in range(folds)]
    for fold, split in enumerate(splits):
        assert_patients_apart(split, patients)
        assert all(split.values())  # no part is empty
        assert split["val"] == splits[(fold + 1) % folds]["test"]  # never the part that is reported
    for part in ("test", "val"):
        assert sorted(case for split in splits for case in split[part]) == sorted(patients)
    counts = [len({patients[case] for case in split["test"]}) for split in splits]
    assert max(counts) - min(counts) <= 1


def test_folds_depend_on_the_seed():
    assert fold_split(LUNG, folds=5, fold=0, seed=1) != fold_split(LUNG, folds=5, fold=0, seed=2)


@pytest.mark.parametrize("folds", [-1, 0, 1, 2, 13])
def test_wrong_number_of_folds(folds):
    with pytest.raises(ValueError, match=f"--folds {folds}: choose 3 to 12 for 12 patients"):
        fold_split(SCANS, folds=folds, fold=0)


@pytest.mark.parametrize("fold", [-1, 5])
def test_wrong_fold(fold):
    with pytest.raises(ValueError, match=f"--fold {fold}: with 5 folds choose 0 to 4"):
        fold_split(LUNG, folds=5, fold=fold)


# ---- check ----


@pytest.mark.parametrize("part", ["val", "test"])
def test_patient_in_two_parts_is_refused_naming_both_cases(part):
    split = {"train": ["p1_scan0", "p2_scan0"], part: ["p2_scan1"]}
    with pytest.raises(ValueError) as info:
        check_split(split, SCANS, "my/splits.json")
    for words in ("my/splits.json: patient p2", "in train (case p2_scan0)", f"in {part} (case p2_scan1)"):
        assert words in str(info.value)


def test_case_in_two_parts_is_refused():
    with pytest.raises(
        ValueError, match=r"patient p1 .* in val \(case p1_scan0\) and in test \(case p1_scan0\)"
    ):
        check_split({"train": ["p2_scan0"], "val": ["p1_scan0"], "test": ["p1_scan0"]}, SCANS)


def test_unknown_case_is_refused():
    with pytest.raises(ValueError, match="split: val names case p99_scan0, which is not in the data set"):
        check_split({"train": ["p1_scan0"], "val": ["p99_scan0"]}, SCANS)


@pytest.mark.parametrize("split", [{}, {"train": []}, {"train": [], "val": ["p1_scan0"]}])
def test_empty_training_is_refused(split):
    with pytest.raises(ValueError, match="x.json: no training case"):
        check_split(split, SCANS, "x.json")


def test_several_scans_in_one_part_and_unused_cases_are_fine():
    check_split({"train": ["p3_scan0", "p3_scan1", "p3_scan2"], "val": ["p1_scan0"]}, SCANS)


# ---- file ----


def test_save_and_read_round_trip(tmp_path):
    path = tmp_path / "splits.json"
    split = split_by_patient(SCANS, test_ratio=0.2, seed=3)
    save_splits(path, split, SCANS, 3)
    assert read_splits(path) == (split, SCANS)
    assert json.loads(path.read_text())["seed"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["splits.json"]


def test_save_refuses_an_overlap_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "splits.json"
    path.write_text("old")
    with pytest.raises(ValueError, match="patient p2 stands in train"):
        save_splits(path, {"train": ["p2_scan0"], "val": ["p2_scan1"]}, SCANS, 0)
    assert path.read_text() == "old"


def test_hand_written_file_without_patients(tmp_path):
    path = tmp_path / "splits.json"
    path.write_text('{"train": ["b", "a"], "val": ["c"]}')
    assert read_splits(path) == (
        {"train": ["b", "a"], "val": ["c"], "test": []},
        {"b": "b", "a": "a", "c": "c"},
    )


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"train": ["a"', "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (
            b'["a", "b"]',
            "expected an object, found a list .*; a splits file holds lists of cases under train, val",
        ),
        (b'{"train": null}', "no training case"),
        (b'{"train": ["a"], "val": "abc"}', '"val" should be a list, found a text'),
        (b"{}", "no training case"),
        (b'{"train": ["a"], "val": ["a"]}', r"patient a stands in train \(case a\) and in val"),
        (b'{"train": ["a"], "val": ["b"], "patients": {"a": "x", "b": "x"}}', "patient x stands in train"),
        (
            b'{"train": ["a", "b"], "patients": {"a": "x"}}',
            "train names case b, which is not in the data set",
        ),
    ],
)
def test_read_splits_of_a_bad_file_names_it(tmp_path, content, message):
    path = tmp_path / "splits.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as info:
        read_splits(path)
    assert str(path) in str(info.value)


def test_read_splits_of_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="splits.json"):
        read_splits(tmp_path / "splits.json")


def test_leading_zeros_change_no_split():
    """Patients are shuffled and listed by number: p9 before p10, as p09 is."""
    plain, padded = (patients_of([form.format(n) for n in range(1, 13)]) for form in ("p{}", "p{:02d}"))
    split, same = (split_by_patient(p, test_ratio=0.2, seed=3) for p in (plain, padded))
    for part in split:
        numbers = [int(case[1:]) for case in split[part]]
        assert numbers == sorted(numbers) == [int(case[1:]) for case in same[part]]


# ---- folds that are exact partitions, stratified by group ----


def group_of(numbers: dict[str, int]) -> tuple[dict[str, str], dict[str, str]]:
    """({case: patient}, {case: group}) of so many patients in each group, with one case each."""
    groups = {f"{group}{n}": group for group, number in numbers.items() for n in range(1, number + 1)}
    return {case: case for case in groups}, groups


def test_patients_of_single_groups_are_dealt_out_in_natural_order():
    """Nothing to shuffle, so that every fold is known: like cards, one group after the other."""
    patients, groups = group_of({f"s{n}": 1 for n in range(1, 11)})
    assert stratified_folds(patients, groups, folds=3) == [
        ["s11", "s41", "s71", "s101"],
        ["s21", "s51", "s81"],
        ["s31", "s61", "s91"],
    ]


def test_each_group_is_spread_over_all_folds():
    """7, 5 and 3 patients lie at places 0-6, 7-11 and 12-14; fold k gets the places k, k + 5, k + 10."""
    patients, groups = group_of({"A": 7, "B": 5, "C": 3})
    parts = stratified_folds(patients, groups, folds=5)
    assert ["".join(sorted(groups[case] for case in part)) for part in parts] == [
        "AAB", "AAB", "ABC", "ABC", "ABC"
    ]  # fmt: skip
    assert sorted(case for part in parts for case in part) == sorted(patients)


def test_the_drawing_is_that_of_a_seeded_generator_of_the_group():
    """The text "<seed> <group>" seeds it, so that another site changes nothing in this one."""
    patients, groups = group_of({"A": 5})
    order = ["A1", "A2", "A3", "A4", "A5"]
    random.Random("3 A").shuffle(order)
    assert stratified_folds(patients, groups, folds=5, seed=3) == [[case] for case in order]
    assert stratified_folds(patients, groups, folds=5) == [["A3"], ["A2"], ["A4"], ["A1"], ["A5"]]
    more = group_of({"A": 5, "B": 5})
    parts = stratified_folds(*more, folds=5, seed=3)
    assert [[case for case in part if case[0] == "A"] for part in parts] == [[case] for case in order]


def test_no_patient_is_divided_and_all_are_tested_once():
    patients = SCANS | {"traveller_1": "traveller", "traveller_2": "traveller"}
    groups = {case: f"site{len(case) % 2}" for case in patients} | {"traveller_1": "x", "traveller_2": "y"}
    for folds in (2, 3, 5, 13):
        parts = stratified_folds(patients, groups, folds=folds, seed=1)
        check_folds(parts, patients)
        sizes = [len({patients[case] for case in part}) for part in parts]
        assert sum(sizes) == 13 and max(sizes) - min(sizes) <= 1


def test_folds_are_the_same_in_every_process_and_for_every_order_of_the_cases():
    """As on two machines: text hashes differ, and folders are listed in another order."""
    program = (
        "import json, random, sys; from common.splits import *; names = [f'c{n}' for n in range(40)]; "
        "random.Random(int(sys.argv[1])).shuffle(names); subjects = {c: 'p' + c[:2] for c in names}; "
        "sites = {c: 'site' + c[-1] for c in names}; "
        "print(json.dumps([stratified_folds(subjects, sites, folds=4, seed=5), "
        "hold_out(subjects, sites, seed=5), leave_group_out(subjects, {c: sites['c1'] if c[:2] == 'c1' "
        "else 'rest' for c in names}, 'site1')]))"
    )
    found = set()
    for number in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": number, "PYTHONPATH": str(ROOT)}
        found.add(
            subprocess.check_output([sys.executable, "-c", program, number], env=environment, text=True)
        )
    assert len(found) == 1


@pytest.mark.parametrize(
    ("numbers", "folds", "message"),
    [
        ({"A": 3}, 1, r"1 folds: choose 2 to 3 for 3 patient\(s\)"),
        ({"A": 2, "B": 1}, 4, r"4 folds: choose 2 to 3 for 3 patient\(s\)"),
        ({}, 2, r"2 folds: choose 2 to 0"),
    ],
)
def test_folds_that_cannot_be_made(numbers, folds, message):
    with pytest.raises(ValueError, match=message):
        stratified_folds(*group_of(numbers), folds=folds)


def test_a_sixth_of_the_patients_is_held_out_spread_over_the_groups():
    """12 patients: 2, at the places 3 and 9 of 12. 64: 10. 5: 1, since nothing cannot choose an epoch."""
    patients, groups = group_of({"A": 6, "B": 6})
    rest, held_out = hold_out(patients, groups)
    assert sorted(groups[case] for case in held_out) == ["A", "B"]
    assert sorted(rest + held_out) == sorted(patients) and not set(rest) & set(held_out)
    singles = group_of({f"s{n}": 1 for n in range(1, 13)})
    assert hold_out(*singles)[1] == ["s41", "s101"]
    assert len(hold_out(*group_of({"A": 64}))[1]) == 10
    assert len(hold_out(*group_of({"A": 5}))[1]) == 1
    rest, held_out = hold_out(SCANS, dict.fromkeys(SCANS, ""), share=0.5)
    assert not {SCANS[case] for case in rest} & {SCANS[case] for case in held_out}
    assert len({SCANS[case] for case in held_out}) == 6
    with pytest.raises(ValueError, match=r"1 patient\(s\) cannot be divided into training and validation"):
        hold_out(*group_of({"A": 1}))


def test_leaving_a_group_out_leaves_out_what_its_patients_have_elsewhere():
    patients = {"a10": "a", "a2": "a", "b1": "b", "c1": "c"}
    groups = {"a10": "X", "a2": "Y", "b1": "X", "c1": "Y"}
    assert leave_group_out(patients, groups, "X") == (["c1"], ["a10", "b1"])
    assert leave_group_out(patients, groups, "Y") == (["b1"], ["a2", "c1"])
    with pytest.raises(ValueError, match="'Z' cannot be left out: the cases are of X, Y"):
        leave_group_out(patients, groups, "Z")
    with pytest.raises(ValueError, match="'X' cannot be left out: the cases are of X"):
        leave_group_out({"a": "a"}, {"a": "X"}, "X")


@pytest.mark.parametrize(
    ("folds", "message"),
    [
        ([["a1"], ["a2", "b"]], r"patient a stands in fold 0 \(case a1\) and in fold 1 \(case a2\)"),
        ([["a1", "a2"], ["b", "b"]], "case b stands twice"),
        ([["a1", "a2"], []], "no fold tests b"),
        ([["a1", "a2"], ["b", "c"]], "fold 1 names case c, which is not in the data set"),
    ],
)
def test_folds_that_are_no_exact_partition_are_refused(folds, message):
    with pytest.raises(ValueError, match=f"folds.json: {message}"):
        check_folds(folds, {"a1": "a", "a2": "a", "b": "b"}, "folds.json")


# ---- cuts of an ordered list ----

ORDERED = list("aaabbccccd")  # patients with 3, 2, 4 and 1 items


def test_cuts_by_number_and_by_share():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cut_in_order(ORDERED, [3, 5]) == (3, 5) and cut_in_order(ORDERED, [0, 9]) == (0, 9)
        assert cut_in_order(ORDERED, [3.0, 5.0]) == (3, 5), "as numbers come from a flag"
        assert cut_in_order(ORDERED, [0.25, 0.5]) == (3, 5) and cut_in_order(ORDERED, [0, 0.75]) == (0, 9)
        assert cut_in_order(ORDERED, [0.01, 0.02]) == (3, 5), "one patient each at least"
        assert cut_in_order(ORDERED, [0.5, 0.6]) == (5, 9)


def test_cuts_inside_of_a_patient():
    with pytest.warns(UserWarning) as told:
        assert cut_in_order(ORDERED, [2, 6], flag="slice_split") == (2, 6)
    assert ["slice_split [2, 6]: 2 cuts patient a in two" in str(told[0].message), len(told)] == [True, 2]
    assert "6 cuts patient c in two; scores will be too good" in str(told[1].message)


@pytest.mark.parametrize("bounds", [[5, 3], [3, 3], [-1, 3], [3, 10], [2.5, 5], [0.5, 5], [0.5, 1]])
def test_cuts_that_do_not_fit(bounds):
    with pytest.raises(ValueError, match="there are N = 10, and 0 <= a < b < N is needed.*only, or so; give"):
        cut_in_order(ORDERED, bounds, advice=", or so")


def test_cuts_of_too_few_patients():
    with pytest.raises(ValueError, match="2 patient.s. are too few for three parts"):
        cut_in_order(ORDERED[:5], [0.2, 0.4])
    assert cut_in_order(ORDERED[:5], [0, 0.4]) == (0, 3)
