"""Splits and folds by patient: drawn once, written to splits.json, checked wherever they are used.

The second half draws folds that are exact partitions, stratified by group, such as the site of the scanner.
"""

import contextlib
import random
import re
import signal
import threading
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from common.files import check_names, read_json, write_json

PARTS = ("train", "val", "test")
SEARCH_S = 10.0  # a good pattern takes milliseconds for thousands of names, a bad one years for one of them


def natural_key(text: str) -> tuple[list, str]:
    """Sort key by which lung_2 comes before lung_10; the text itself decides between lung_2 and lung_02."""
    parts = [(1, int(part)) if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", text) if part]
    return parts, text


def patients_of(cases: list[str], pattern: str | None = None) -> dict[str, str]:
    """{case: patient}. Without a pattern each case is a patient of its own.

    Args:
        pattern: regular expression whose first group is the patient in the case name, e.g. `(.+)_scan\\d+`.

    Raises:
        ValueError: no regular expression, one without a group, one that takes for ever, or a case that it
            does not fit.
    """
    if pattern is None:
        return {case: case for case in cases}
    patients = {}
    flag = f"--patient_pattern {pattern!r}"
    with _time_limit(SEARCH_S, f"{flag}: takes too long to search; write it without repeats within repeats"):
        try:
            wanted = re.compile(pattern)
        except (re.error, OverflowError, RecursionError, MemoryError) as error:
            raise ValueError(f"{flag}: not a regular expression ({error})") from error
        if not wanted.groups:
            raise ValueError(f"{flag}: put what tells the patient in brackets, such as 'p([0-9]+)'")
        for case in cases:
            match = wanted.search(case)
            if not match or not match.group(1):
                raise ValueError(f"case {case}: the patient pattern {pattern!r} finds no group in its name")
            patients[case] = match.group(1)
    return patients


@contextlib.contextmanager
def _time_limit(seconds: float, message: str) -> Iterator[None]:
    """ValueError if what is inside takes longer; without limit on Windows and outside of the main thread."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise ValueError(message)

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before or signal.SIG_DFL)  # None: one that Python did not set


def split_by_patient(
    patients: dict[str, str], *, val_ratio: float = 0.2, test_ratio: float = 0.0, seed: int = 42
) -> dict[str, list[str]]:
    """Draw {"train", "val", "test"}: lists of cases, no patient in two of them.

    Patients in natural order are shuffled by a private generator; the last int(ratio * n), at least one if
    the ratio is above 0, become validation, those before them test.

    Raises:
        ValueError: nothing would be left for training.
    """
    order = _shuffled(patients, seed)
    num_val, num_test = (max(1, int(r * len(order))) if r > 0 else 0 for r in (val_ratio, test_ratio))
    num_train = len(order) - num_val - num_test
    if num_train < 1:
        raise ValueError(
            f"{len(order)} patient(s) cannot be split into training, {num_val} validation and {num_test} "
            "test; add scans or lower the ratios"
        )
    parts = {
        "train": order[:num_train],
        "val": order[num_train + num_test :],
        "test": order[num_train : num_train + num_test],
    }
    return _cases_of(parts, patients)


def fold_split(patients: dict[str, str], *, folds: int, fold: int, seed: int = 42) -> dict[str, list[str]]:
    """Fold `fold` of `folds` is held out for the test, the next one chooses the best epoch, the rest trains.

    Choosing the epoch on the part that is reported would flatter the score, hence three parts.
    """
    order = _shuffled(patients, seed)
    if not 3 <= folds <= len(order):
        raise ValueError(f"--folds {folds}: choose 3 to {len(order)} for {len(order)} patients")
    if not 0 <= fold < folds:
        raise ValueError(f"--fold {fold}: with {folds} folds choose 0 to {folds - 1}")
    rest = [p for k in range(folds) if k not in (fold, (fold + 1) % folds) for p in order[k::folds]]
    parts = {"train": rest, "val": order[(fold + 1) % folds :: folds], "test": order[fold::folds]}
    return _cases_of(parts, patients)


def cut_in_order(
    patients: Sequence[str],
    bounds: Sequence[float],
    *,
    flag: str = "split",
    advice: str = "",
) -> tuple[int, int]:
    """Where a list in which each patient's items lie together is cut in three parts: items [:a], [a:b], [b:].

    Args:
        patients: of each item.
        bounds: a and b, 0 <= a < b: numbers of items, or shares of the patients below 1, which are cut so
            that at least one patient is in each part. With a = 0 the first part is empty. A number inside of
            a patient is told by a loud warning.
        flag: what the bounds are called; advice: what else a message about them should say.

    Raises:
        ValueError: the bounds do not fit the list.
    """
    a, b = bounds
    asked = f"{flag} [{a:g}, {b:g}]"
    num = len(patients)
    ends = [i for i in range(num) if not i or patients[i] != patients[i - 1]] + [num]
    if 0 <= a < b < 1:
        first = max(1, round(a * (len(ends) - 1))) if a else 0
        last = max(first + 1, round(b * (len(ends) - 1)))
        if last >= len(ends) - 1:
            raise ValueError(f"{asked}: {len(ends) - 1} patient(s) are too few for three parts; add some")
        return ends[first], ends[last]
    if int(a) != a or int(b) != b or not 0 <= a < b < num:
        raise ValueError(
            f"{asked}: there are N = {num}, and 0 <= a < b < N is needed. Numbers fit one list only{advice}; "
            "give those of this one, or shares of the patients such as 0.2 0.35"
        )
    for index in sorted({a, b} - set(ends)):
        warnings.warn(
            f"{asked}: {index:g} cuts patient {patients[int(index)]} in two; scores will be too good. Choose "
            "a number between two patients",
            stacklevel=3,
        )
    return int(a), int(b)


def check_split(split: dict[str, list[str]], patients: dict[str, str], where: str | Path = "split") -> None:
    """Refuse a split in which a case or a patient stands in two parts, or that names unknown cases.

    Raises:
        ValueError: naming part, case and patient.
    """
    seen: dict[str, tuple[str, str]] = {}
    for part in PARTS:
        for case in split.get(part, []):
            if case not in patients:
                raise ValueError(f"{where}: {part} names case {case}, which is not in the data set")
            patient = patients[case]
            earlier_part, earlier_case = seen.setdefault(patient, (part, case))
            if earlier_part != part:
                raise ValueError(
                    f"{where}: patient {patient} stands in {earlier_part} (case {earlier_case}) and in "
                    f"{part} (case {case}); scores would be too good. Keep a patient's scans in one part"
                )
    if not split.get("train"):
        raise ValueError(f"{where}: no training case")


def save_splits(path: str | Path, split: dict[str, list[str]], patients: dict[str, str], seed: int) -> None:
    """Write the split after checking it."""
    check_split(split, patients, path)
    content = {**split, "patients": patients, "seed": seed}
    write_json(path, content)


def read_splits(path: str | Path) -> tuple[dict[str, list[str]], dict[str, str]]:
    """(split, patients) from splits.json, checked.

    Raises:
        ValueError: not valid, or a patient in two parts.
    """
    advice = f"a splits file holds lists of cases under {', '.join(PARTS)}"
    expected = dict.fromkeys(PARTS, list | None) | {"patients": dict | None}
    content = read_json(path, expected, advice=advice)
    split = {part: check_names(content.get(part) or [], f'{path}: "{part}"') for part in PARTS}
    patients = content.get("patients") or patients_of([case for part in split.values() for case in part])
    check_names(list(patients.values()), f'{path}: "patients"')
    check_split(split, patients, path)
    return split, patients


# ---- folds that are exact partitions, stratified by group ----


def stratified_folds(
    patients: Mapping[str, str], groups: Mapping[str, str], *, folds: int, seed: int = 0
) -> list[list[str]]:
    """`folds` lists of cases: each case in one of them, no patient in two, each group spread over all.

    The patients of each group are shuffled by a generator of its own, then all are dealt out like cards, one
    group after the other. So two folds differ by one patient at most, in all and in each group; and the same
    names give the same folds on every machine, in whatever order they come.

    Args:
        patients: {case: patient}.
        groups: {case: group}. A patient with cases in several groups is dealt out with others of the same
            groups.

    Raises:
        ValueError: fewer than 2 folds, or fewer patients than folds.
    """
    order = _by_group(patients, groups, seed)
    if not 2 <= folds <= len(order):
        raise ValueError(f"{folds} folds: choose 2 to {len(order)} for {len(order)} patient(s)")
    return [_of_patients(order[k::folds], patients) for k in range(folds)]


def hold_out(
    patients: Mapping[str, str], groups: Mapping[str, str], *, share: float = 1 / 6, seed: int = 0
) -> tuple[list[str], list[str]]:
    """(cases to train on, cases held out to choose the best epoch): no patient in both.

    `share` of the patients, rounded down but one at least, is held out; the groups are represented in it as
    evenly as so few allow. Drawn as `stratified_folds` draws.

    Raises:
        ValueError: nothing would be left for training.
    """
    order = _by_group(patients, groups, seed)
    number = max(1, int(share * len(order) + 1e-9))
    if number >= len(order):
        raise ValueError(
            f"{len(order)} patient(s) cannot be divided into training and validation; add scans, or train "
            "without validation"
        )
    held_out = {order[int((i + 0.5) * len(order) / number)] for i in range(number)}  # evenly along the groups
    return _of_patients([p for p in order if p not in held_out], patients), _of_patients(held_out, patients)


def leave_group_out(
    patients: Mapping[str, str], groups: Mapping[str, str], group: str
) -> tuple[list[str], list[str]]:
    """(cases of the other groups, cases of `group`); what a patient of it has elsewhere is in neither.

    Raises:
        ValueError: no case is of the group, or all are.
    """
    test = [case for case in patients if groups[case] == group]
    inside = {patients[case] for case in test}
    rest = [case for case in patients if patients[case] not in inside]
    if not test or not rest:
        found = ", ".join(sorted(set(groups.values()), key=natural_key))
        raise ValueError(f"{group!r} cannot be left out: the cases are of {found}")
    return sorted(rest, key=natural_key), sorted(test, key=natural_key)


def folds_of(
    folder: Path, patients: Mapping[str, str], groups: Mapping[str, str], *, folds: int, seed: int
) -> list[list[str]]:
    """The folds of a `folds.json` in the folder, see `read_folds`, else those of `stratified_folds`."""
    if (own := folder / "folds.json").is_file():
        return read_folds(own, patients)
    return stratified_folds(patients, groups, folds=folds, seed=seed)


def read_folds(path: Path, patients: Mapping[str, str]) -> list[list[str]]:
    """Folds of one's own: a JSON file with a list of the names of the cases for each fold.

    Args:
        patients: {case: patient} of all cases.

    Raises:
        ValueError: not such a file, or as `check_folds`.
    """
    parts = read_json(path, list, advice="a list with a list of names for each fold is expected")
    for number, part in enumerate(parts):
        check_names(part, f"{path}: fold {number}")
    check_folds(parts, patients, path)
    return parts


def check_folds(
    folds: Sequence[Collection[str]], patients: Mapping[str, str], where: str | Path = "folds"
) -> None:
    """Refuse folds that are no exact partition of the cases, or that divide a patient.

    Raises:
        ValueError: naming fold, case and patient.
    """
    seen: dict[str, tuple[int, str]] = {}
    cases: set[str] = set()
    for number, fold in enumerate(folds):
        for case in fold:
            if case not in patients:
                raise ValueError(f"{where}: fold {number} names case {case}, which is not in the data set")
            if case in cases:
                raise ValueError(f"{where}: case {case} stands twice in the folds; it must be tested once")
            cases.add(case)
            earlier, other = seen.setdefault(patients[case], (number, case))
            if earlier != number:
                raise ValueError(
                    f"{where}: patient {patients[case]} stands in fold {earlier} (case {other}) and in fold "
                    f"{number} (case {case}); scores would be too good. Keep a patient's scans in one fold"
                )
    if missing := sorted(set(patients) - cases, key=natural_key):
        raise ValueError(f"{where}: no fold tests {', '.join(missing[:5])}; name every case once")


def _by_group(patients: Mapping[str, str], groups: Mapping[str, str], seed: int) -> list[str]:
    """All patients, group after group, shuffled within each."""
    groups_of: dict[str, set[str]] = {}
    for case, patient in patients.items():
        groups_of.setdefault(patient, set()).add(groups[case])
    strata: dict[str, list[str]] = {}
    for patient in sorted(groups_of, key=natural_key):
        name = " + ".join(sorted(groups_of[patient], key=natural_key))
        strata.setdefault(name, []).append(patient)
    order = []
    for name in sorted(strata, key=natural_key):
        random.Random(f"{seed} {name}").shuffle(strata[name])  # of a text: the same on every machine
        order += strata[name]
    return order


def _of_patients(chosen: Collection[str], patients: Mapping[str, str]) -> list[str]:
    chosen = set(chosen)
    return sorted((case for case, patient in patients.items() if patient in chosen), key=natural_key)


def _shuffled(patients: dict[str, str], seed: int) -> list[str]:
    order = sorted(set(patients.values()), key=natural_key)
    random.Random(seed).shuffle(order)
    return order


def _cases_of(parts: dict[str, list[str]], patients: dict[str, str]) -> dict[str, list[str]]:
    return {part: _of_patients(chosen, patients) for part, chosen in parts.items()}
