"""common/compare.py on tables and label maps written by hand."""

import csv
import math

import numpy as np
import pytest
from conftest import run_script
from scipy import stats

from common.class_metrics import case_metrics
from common.compare import compare, dropped_lines, main, read_results, score_folders
from common.nifti import write_nifti
from common.tables import write_table

NAN = float("nan")
SPACING = (2.0, 1.0, 0.5)


def results(dices, classes=(1, 2)):
    """Rows of len(dices) cases; dices[case][class], NaN = absent, 0 = missed."""
    status = {True: "absent", False: "ok"}
    return [
        {
            "case": f"case{i}",
            "patient": f"p{i // 2}",
            "class": label,
            "name": f"organ {label}",
            "status": "missed" if dice == 0 else status[math.isnan(dice)],
            "dice": dice,
            "hd95_mm": 99.0 if dice == 0 else 10 * (1 - dice),
        }
        for i, values in enumerate(dices)
        for label, dice in zip(classes, values, strict=True)
    ]


def random_results(seed, cases=8):
    return results(np.random.default_rng(seed).uniform(0.3, 0.9, (cases, 2)).round(3).tolist())


def table_of(path):
    with path.open(newline="") as file:
        return {(r["metric"], r["class"]): r for r in csv.DictReader(file)}


def test_tables_are_compared_as_by_scipy(tmp_path, capsys):
    a, b = random_results(0), random_results(1)
    for name, rows in (("a", a), ("b", b[::-1])):  # another order of cases
        (tmp_path / name).mkdir()
        write_table(tmp_path / name / "results.csv", rows)
    flags = [tmp_path / "a", tmp_path / "b" / "results.csv", "--out", tmp_path / "out"]
    assert main(flags) == 0
    table = table_of(tmp_path / "out/comparison.csv")
    assert list(table) == [(m, c) for m in ("dice", "hd95_mm") for c in ("1", "2", "all")]
    ps = []
    for label in (1, 2):
        of_a, of_b = (np.array([r["dice"] for r in rows if r["class"] == label]) for rows in (a, b))
        row = table["dice", str(label)]
        ps.append(stats.wilcoxon(of_b - of_a).pvalue)
        assert float(row["p"]) == pytest.approx(ps[-1], rel=1e-5)
        assert float(row["mean_a"]) == pytest.approx(of_a.mean(), rel=1e-5)
        assert float(row["difference"]) == pytest.approx((of_b - of_a).mean(), rel=1e-4)
        assert row["n"] == "8" and row["name"] == f"organ {label}"
    assert float(table["dice", "1"]["p_holm"]) == pytest.approx(
        min(1, 2 * ps[0]) if ps[0] < ps[1] else max(ps[0], min(1, 2 * ps[1])), rel=1e-5
    )
    means = np.array([r["dice"] for r in b]).reshape(8, 2).mean(1)
    assert float(table["dice", "all"]["mean_b"]) == pytest.approx(means.mean(), rel=1e-5)
    assert table["dice", "all"]["p_holm"] == table["dice", "all"]["p"]
    out = capsys.readouterr().out
    assert "dice (higher is better)" in out and "hd95_mm (lower is better)" in out and "8 cases" in out


def test_interval_is_by_patient():
    a, b = results([(0.5, 0.5)] * 4), results([(0.6, 0.5), (0.6, 0.5), (0.9, 0.5), (0.9, 0.5)])
    row = compare(a, b, ["dice"])[0]
    assert (row["low"], row["high"]) == pytest.approx((0.1, 0.4))  # two patients
    alone = compare(*([{k: v for k, v in r.items() if k != "patient"} for r in x] for x in (a, b)), ["dice"])
    assert alone[0]["high"] - alone[0]["low"] == pytest.approx(0.3) and alone[0]["n"] == 4


def test_same_run_twice():
    rows = compare(random_results(0), random_results(0))
    assert all(r["difference"] == 0 and r["p"] == 1 and r["p_holm"] == 1 for r in rows)


def test_missed_structures_count_against_a_run_and_absent_ones_are_left_out():
    a = results([(0.5, 0.4), (0.5, NAN), (0.5, 0.4)])
    b = results([(0.5, 0.0), (0.5, NAN), (0.5, 0.4)])
    _, two, every = compare(a, b, ["dice"])
    assert (two["n"], two["nan_pairs"], two["missed_a"], two["missed_b"]) == (2, 1, 0, 1)
    assert two["difference"] == pytest.approx(-0.2) and every["difference"] == pytest.approx(-0.2 / 3)
    _, two, every = compare(a, b, ["hd95_mm"])
    assert two["difference"] > 0 and every["difference"] > 0 and every["missed_b"] == 1


@pytest.mark.parametrize("status", ["missed", "hallucinated", "ok"])
def test_an_empty_score_of_a_present_structure_is_refused(tmp_path, status):
    rows = random_results(0)
    rows[3] |= {"status": status, "hd95_mm": NAN}
    write_table(tmp_path / "r.csv", rows)
    with pytest.raises(ValueError, match=f"case case1, class 2: {status}, but its hd95_mm is empty"):
        read_results(tmp_path / "r.csv")


def test_read_results_round_trip(tmp_path):
    write_table(tmp_path / "results.csv", results([(0.5, NAN), (0.25, 0.0)]))
    rows = read_results(tmp_path)
    assert [r["dice"] for r in rows] == pytest.approx([0.5, NAN, 0.25, 0.0], nan_ok=True)
    assert rows[3]["status"] == "missed" and rows[3]["hd95_mm"] == 99


def test_tables_that_are_refused(tmp_path):
    path, rows = tmp_path / "r.csv", random_results(0)
    with pytest.raises(FileNotFoundError, match="no such table"):
        read_results(tmp_path)
    for column in ("case", "class", "status"):
        write_table(path, [{k: v for k, v in r.items() if k != column} for r in rows])
        with pytest.raises(ValueError, match=f"r.csv: no column {column};"):
            read_results(path)
    write_table(path, [*rows, rows[2]])
    with pytest.raises(ValueError, match="case case1, class 1: stands there twice"):
        read_results(path)
    write_table(path, [{**rows[0], "dice": "good"}])
    with pytest.raises(ValueError, match="dice is 'good', not a number"):
        read_results(path)
    path.write_text("case,class,status,dice\n")
    with pytest.raises(ValueError, match="no rows"):
        read_results(path)


def test_runs_that_do_not_fit_are_refused():
    rows = random_results(0)
    with pytest.raises(ValueError, match="no case in common.*'case0' and 'xcase0'"):
        compare(rows, [{**r, "case": "x" + r["case"]} for r in rows])
    with pytest.raises(ValueError, match="case case0: class 2 is in one run only"):
        compare(rows, [r for r in rows if (r["case"], r["class"]) != ("case0", 2)])
    with pytest.raises(ValueError, match="no column iou in both runs; there are dice, hd95_mm"):
        compare(rows, rows, ["dice", "iou"])
    with pytest.raises(ValueError, match="case case0: patient p0 or q"):
        compare(rows, [{**r, "patient": "q"} for r in rows])


def test_cases_of_one_run_only_are_listed_and_left_out(tmp_path, capsys):
    write_table(tmp_path / "a.csv", random_results(0, cases=5))
    write_table(tmp_path / "b.csv", random_results(1, cases=3))
    main([tmp_path / "a.csv", tmp_path / "b.csv", "--metric", "dice", "--out", tmp_path])
    out = capsys.readouterr().out
    assert "only in A, left out: case3, case4\n  B has no row of them: not predicted, or failed\n" in out
    table = table_of(tmp_path / "comparison.csv")
    assert {r["n"] for r in table.values()} == {"3"} and {m for m, _ in table} == {"dice"}


def test_what_is_left_out_of_a_mean_is_named_with_the_reason(tmp_path, capsys):
    """Structure 2: absent in both, and absent in A but invented in B, which then has a score and A none."""
    a, b = results([(0.5, NAN), (0.6, NAN), (0.7, 0.8)]), results([(0.5, NAN), (0.6, 0.3), (0.7, 0.9)])
    for row in b:
        row |= {"iou": 0.5}
        if (row["case"], row["class"]) == ("case1", 2):
            row["status"] = "hallucinated"
    assert dropped_lines(a, b) == [
        "columns of one run only, left out: iou",
        "organ 2: absent in truth and predictions, left out: case0",
        "organ 2: left out: case1: absent in A, hallucinated in B, so that only one has a score",
    ]
    table = {(row["metric"], row["class"]): row for row in compare(a, b)}
    assert (table["dice", "1"]["n"], table["dice", "2"]["n"]) == (3, 1)


# ---- label maps ----


@pytest.fixture
def folders(tmp_path):
    """Three cases, B misses structure 2 of case_2; each folder has another ending of the names."""
    rng, maps = np.random.default_rng(0), {}
    for folder in ("a", "b", "labels"):
        (tmp_path / folder).mkdir()
    for i in range(3):
        target = np.zeros((8, 16, 20), np.uint8)
        target[1:5, 2:9, 3:12], target[6, 10:14, 12:16] = 1, 2
        a, b = target.copy(), np.roll(target, 1, 1)
        a[rng.random(a.shape) < 0.01] = 1
        if i == 2:
            b[b == 2] = 0
        for folder, ending, labels in (("a", "_pred", a), ("b", "_seg", b), ("labels", "", target)):
            write_nifti(tmp_path / folder / f"case_{i}{ending}.nii.gz", labels, SPACING)
            maps[folder, i] = labels
    return tmp_path, maps


def test_folders_of_label_maps(folders, capsys):
    path, maps = folders
    write_nifti(path / "a" / "more_pred.nii", maps["a", 0], SPACING)
    flags = [path / "a", path / "b", "--target", path / "labels", "--out", path / "out"]
    assert main([*flags, "--patient_pattern", "(case)_"]) == 0
    out = capsys.readouterr().out
    lacks = f"no such mask in {path / 'b'}, {path / 'labels'}"
    assert f"left out: more of {path / 'a'}: {lacks}\n" in out and "3 cases" in out
    table = table_of(path / "out/comparison.csv")
    dices = [
        case_metrics(maps["b", i], maps["labels", i], SPACING, {1: "1", 2: "2"})[1]["dice"] for i in range(3)
    ]
    assert dices[2] == 0
    row = table["dice", "2"]
    assert float(row["mean_b"]) == pytest.approx(np.mean(dices), rel=1e-5)
    assert (row["missed_a"], row["missed_b"], row["n"]) == ("0", "1", "3")
    assert row["low"] == ""  # one patient: no interval
    assert float(table["hd95_mm", "2"]["mean_b"]) > float(table["hd95_mm", "2"]["mean_a"])
    assert [r["case"] for r in read_results(path / "out/results_b.csv")] == sorted(
        f"case_{i}" for i in [0, 1, 2] * 2
    )


def test_a_case_without_any_structure_is_named(folders, capsys):
    path, maps = folders
    for folder in ("a", "b", "labels"):
        write_nifti(path / folder / "case_9.nii.gz", np.zeros_like(maps["a", 0]), SPACING)
    assert main([path / "a", path / "b", "--target", path / "labels", "--out", path / "out"]) == 0
    out = capsys.readouterr().out
    assert (
        "left out: case_9: nothing is in the true mask, nor in the predictions\n" in out and "3 cases" in out
    )


def test_cases_of_folders_come_by_number_not_by_letter(tmp_path):
    labels = np.zeros((4, 8, 8), np.uint8)
    labels[1:3, 2:6, 2:6] = 1
    for folder in "abt":
        (tmp_path / folder).mkdir()
        for name in ("p10", "p9"):
            write_nifti(tmp_path / folder / f"{name}.nii", labels, SPACING)
    (rows, _), failed = score_folders([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "t"), None)
    assert [row["case"] for row in rows] == ["p9", "p10"] and not failed


def test_a_wrong_grid_is_named_and_the_others_are_compared(folders, capsys):
    path, maps = folders
    write_nifti(path / "b" / "case_1_seg.nii.gz", maps["b", 1], SPACING, origin_mm=(0, 0, 5))
    flags = [path / "a", path / "b", "--target", path / "labels", "--out", path / "out"]
    assert main(flags) == 1
    out = capsys.readouterr().out
    assert "failed: case_1: " in out and "lies on another grid than" in out and "case_1_seg.nii.gz" in out
    assert {r["n"] for r in table_of(path / "out/comparison.csv").values()} == {"2"}
    for i in (0, 2):
        write_nifti(path / "a" / f"case_{i}_pred.nii.gz", maps["a", i][1:], SPACING)
    with pytest.raises(SystemExit, match=r"error: nothing to compare: .*7 x 16 x 20 and 8 x 16 x 20"):
        main(flags)


def test_folders_without_a_mask_are_refused(folders):
    path, _ = folders
    (path / "c").mkdir()
    with pytest.raises(ValueError, match=r"no .nii or .nii.gz file"):
        score_folders([path / "c", path / "b"], path / "labels", None)


def test_as_a_script_and_a_missing_table(tmp_path):
    write_table(tmp_path / "a.csv", random_results(0))
    done = run_script("common/compare.py", "a.csv", "a.csv", cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "comparison/comparison.csv").is_file(), done.stderr
    with pytest.raises(SystemExit, match="error: .*missing.csv: no such table"):
        main([tmp_path / "a.csv", tmp_path / "missing.csv"])


def test_a_run_is_named_by_its_folder(tmp_path):
    """The table lies in the folder itself, or in that of the evaluation after training."""
    for folder in (tmp_path / "table", tmp_path / "run" / "evaluation"):
        folder.mkdir(parents=True)
        write_table(folder / "results.csv", results([(0.5, 0.7)]))
    rows = read_results(tmp_path / "table")
    assert read_results(tmp_path / "run") == read_results(tmp_path / "run" / "evaluation") == rows
    with pytest.raises(FileNotFoundError, match="no such table"):
        read_results(tmp_path)


def test_a_cross_validation_that_is_not_complete_is_named(tmp_path):
    folder = tmp_path / "fold_1" / "evaluation"
    folder.mkdir(parents=True)
    write_table(folder / "results.csv", results([(0.5, 0.7)]))
    with pytest.raises(FileNotFoundError, match=r"not all folds are done; .* such as .*fold_1$"):
        read_results(tmp_path)
