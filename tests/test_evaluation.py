"""common/evaluation.py and montage.py: partly labelled cases, folders of masks, pictures, two runs."""

import csv
import math
import re

import nibabel
import numpy as np
import pytest
from PIL import Image

from common import montage
from common.class_metrics import (
    Structures,
    case_row,
    case_summary,
    mean_of_classes,
    only_labelled,
    score_structures,
)
from common.evaluation import evaluate_folder
from common.montage import worst_and_median
from common.nifti import write_nifti

SPACING_MM = (2.0, 1.0, 1.0)
NAMES = {1: "spleen", 4: "gallbladder", 6: "liver", 8: "aorta", 11: "right adrenal gland"}
ALL = list(NAMES)
ORGANS = Structures(
    NAMES,
    np.arange(48, dtype=np.uint8).reshape(16, 3),
    groups={"small": (4, 11), "medium": (8,), "large": (1, 6)},
    tolerances_mm={1: 3.0, 4: 2.0, 6: 5.0, 8: 2.0, 11: 2.0},
)


def truth(shape=(12, 30, 40)):
    """Liver 4 x 10 x 10, spleen 4 x 5 x 4, right adrenal 2 x 2 x 5."""
    labels = np.zeros(shape, np.uint8)
    labels[2:6, 5:15, 25:35], labels[2:6, 5:10, 4:8], labels[8:10, 20:22, 20:25] = 6, 1, 11
    return labels


def shifted():
    """The liver one voxel to the right, the spleen as it is, no adrenal, and an invented gallbladder."""
    labels = truth()
    labels[labels == 6] = 0
    labels[2:6, 5:15, 26:36] = 6
    labels[labels == 11] = 0
    labels[8:10, 5:7, 5:7] = 4
    return labels


# ---- one case ----


def test_scores_by_hand():
    rows = {row["class"]: row for row in score_structures(shifted(), truth(), SPACING_MM, ORGANS, ALL)}
    assert list(rows) == ALL and {row["group"] for row in rows.values()} == {"small", "medium", "large"}
    liver, spleen, adrenal, gallbladder = (rows[n] for n in (6, 1, 11, 4))
    assert liver["dice"] == pytest.approx(0.9) and liver["status"] == "ok" and liver["group"] == "large"
    assert liver["nsd_1mm"] == liver["nsd_organ"] == 1 and liver["hd95_mm"] == 1
    assert liver["volume_similarity"] == 1 and liver["target_mm3"] == 800
    assert spleen["dice"] == spleen["nsd_organ"] == 1
    assert (adrenal["status"], adrenal["dice"], adrenal["nsd_organ"]) == ("missed", 0, 0)
    assert (gallbladder["status"], gallbladder["dice"]) == ("hallucinated", 0)
    assert all(row["status"] == "absent" for n, row in rows.items() if n not in (1, 4, 6, 11))
    summary = case_summary(list(rows.values()))
    assert summary == {"dice": pytest.approx((0.9 + 1 + 0 + 0) / 4), "missed": 1, "hallucinated": 1}
    row = case_row("a", "p", list(rows.values()), summary)
    assert list(row) == ["case", "patient", "dice", "missed", "hallucinated", "classes"]
    assert list(row["classes"][0])[:4] == ["case", "patient", "group", "class"] and row["patient"] == "p"
    assert math.isnan(case_summary([])["dice"]) and math.isnan(mean_of_classes([], "dice")["mean"])


def test_without_groups_and_tolerances():
    plain = Structures({1: "left", 6: "right"}, ORGANS.colors)
    target = truth() * np.isin(truth(), (1, 6))
    rows = score_structures(target, target, SPACING_MM, plain, [1, 6])
    assert all("group" not in row and "nsd_organ" not in row and row["dice"] == 1 for row in rows)


def test_the_tolerance_is_the_organs_own():
    """A plate of 1 mm that is 4 mm off: one side lies 3 mm from the truth, the other one 5 mm. Of the liver
    (5 mm) both are right, of the spleen (3 mm) only the first."""
    for organ, expected in ((6, 1.0), (1, 0.5)):
        pred, target = np.zeros((2, 9, 20, 20), np.uint8)
        target[2, 5:15, 5:15], pred[6, 5:15, 5:15] = organ, organ
        (row,) = score_structures(pred, target, (1, 1, 1), ORGANS, [organ])
        assert row["nsd_organ"] == pytest.approx(expected, abs=0.3) and (row["nsd_organ"] == 1) == (
            organ == 6
        )


def test_what_is_not_labelled_is_neither_right_nor_wrong():
    pred, target = shifted(), truth()
    rows = score_structures(pred, target, SPACING_MM, ORGANS, [1, 6])
    assert [row["class"] for row in rows] == [1, 6]
    assert case_summary(rows)["dice"] == pytest.approx(0.95)
    pred[pred == 0] = 8  # an organ without labels all over the background changes nothing
    assert score_structures(pred, target, SPACING_MM, ORGANS, [1, 6]) == rows
    np.testing.assert_array_equal(np.unique(only_labelled(pred, ORGANS, [1, 6])), [0, 1, 6])
    assert (pred == 8).any(), "a copy is changed"


def test_labels_without_a_name_are_refused():
    pred = shifted()
    pred[0, 0, 0] = 16
    with pytest.raises(ValueError, match=r"prediction: label\(s\) 16 are not among"):
        score_structures(pred, truth(), SPACING_MM, ORGANS, [1])
    with pytest.raises(ValueError, match="target: label"):
        score_structures(truth(), pred, SPACING_MM, ORGANS, [1])


# ---- folders of masks ----


@pytest.fixture
def folders(tmp_path):
    """Three true masks and as many predictions: case_1 is perfect, case_2 shifted, p3 empty."""
    for folder in ("labels", "images", "pred"):
        (tmp_path / folder).mkdir()
    for name, pred in (("case_1", truth()), ("case_2", shifted()), ("p3", truth() * 0)):
        write_nifti(tmp_path / f"labels/{name}.nii.gz", truth(), SPACING_MM, orientation="LPS")
        write_nifti(tmp_path / f"pred/{name}_mask.nii.gz", pred, SPACING_MM, orientation="LPS")
        image = np.where(truth() > 0, 60, -900).astype(np.int16)
        write_nifti(tmp_path / f"images/{name}.nii.gz", image, SPACING_MM, orientation="LPS")
    return tmp_path


def run(folder, pred="pred", labelled=ALL, window_hu=(-160, 240), **options) -> dict[str, str]:
    folders = [str(folder / name) for name in (pred, "labels")]
    cases = dict.fromkeys(("case_1", "case_2", "p3"), labelled)
    return evaluate_folder(*folders, folder / "out", ORGANS, cases, window_hu=window_hu, **options)


def table(folder, name) -> list[dict]:
    with (folder / "out" / name).open(encoding="utf8") as file:
        return list(csv.DictReader(file))


def test_tables_and_picture(folders, capsys):
    assert run(folders, images=folders / "images") == {}
    rows = table(folders, "results.csv")
    assert len(rows) == 3 * 5 and rows[0]["case"] == "case_1" and rows[0]["group"] == "large"
    summary = {(r["name"], r["metric"]): r for r in table(folders, "summary.csv")}
    assert float(summary["liver", "dice"]["mean"]) == pytest.approx((1 + 0.9 + 0) / 3, abs=1e-4)
    assert float(summary["liver", "dice"]["median"]) == 0.9 and summary["liver", "dice"]["missed"] == "1"
    assert summary["gallbladder", "dice"]["hallucinated"] == "1"
    assert {r["class"] for r in table(folders, "summary.csv")} == {str(n) for n in ALL}
    groups = {(r["group"], r["metric"]): r for r in table(folders, "groups.csv")}
    small = (1 / 3 + 0) / 2  # the adrenal in one of three cases; the gallbladder, a false alarm
    large = ((1 + 1 + 0) / 3 + (1 + 0.9 + 0) / 3) / 2
    assert float(groups["small", "dice"]["mean"]) == pytest.approx(small, abs=1e-4)
    assert float(groups["large", "dice"]["mean"]) == pytest.approx(large, abs=1e-4)
    assert float(groups["all", "dice"]["mean"]) == pytest.approx((2 * small + 2 * large) / 4, abs=1e-4)
    assert groups["medium", "dice"]["mean"] == "" and groups["all", "dice"]["missed"] == "4"
    text = (folders / "out/summary.md").read_text()
    assert "| liver | 0.633 (0.000-1.000) |" in text and "| small | 0.167" in text
    assert text.splitlines()[0] in capsys.readouterr().out
    assert [float(r["dice"]) for r in table(folders, "cases.csv")] == pytest.approx([1, 0.475, 0])
    width, height = Image.open(folders / "out/worst_and_median.png").size
    assert width > 1000 and height > 3 * 200


def test_a_missing_prediction_is_a_failure_and_a_surplus_one_is_told(folders, capsys):
    (folders / "pred/p3_mask.nii.gz").unlink()
    write_nifti(folders / "pred/other_mask.nii.gz", truth(), SPACING_MM)
    assert list(run(folders)) == ["p3"]
    told = capsys.readouterr().out
    assert "failed: p3: no prediction for" in told and "2 masks of" in told
    assert "without a true mask, not scored: other" in told
    assert {r["case"] for r in table(folders, "results.csv")} == {"case_1", "case_2"}


def test_comparison_of_two_runs(folders, capsys):
    (folders / "second").mkdir()
    for name in ("case_1", "case_2", "p3"):
        write_nifti(folders / f"second/{name}.nii.gz", truth(), SPACING_MM, orientation="LPS")
    assert run(folders, other=folders / "second") == {}
    rows = {(r["metric"], r["name"]): r for r in table(folders, "comparison.csv")}
    assert float(rows["dice", "liver"]["difference"]) == pytest.approx(1 - 1.9 / 3, abs=1e-4)
    assert rows["dice", "liver"]["missed_a"] == "1" and rows["dice", "liver"]["missed_b"] == "0"
    assert ("nsd_organ", "spleen") in rows and ("group", "liver") not in rows
    assert "B - A" in capsys.readouterr().out
    (folders / "second/p3.nii.gz").unlink()
    assert list(run(folders, other=folders / "second")) == [f"p3 of {folders / 'second'}"]
    assert "failed: p3: no prediction" in capsys.readouterr().out


def test_wrong_inputs_name_the_case_and_cost_no_other(folders, capsys):
    write_nifti(
        folders / "pred/case_2_mask.nii.gz",
        np.maximum(truth(), 16 * (truth() == 1).astype(np.uint8)),
        SPACING_MM,
    )
    write_nifti(folders / "pred/p3_mask.nii.gz", truth()[1:], SPACING_MM, orientation="LPS")
    assert list(run(folders, num_pictures=1)) == ["case_2", "p3"]
    told = capsys.readouterr().out
    assert (
        "failed: case_2: prediction: label(s) 16 are not among" in told
        and "p3_mask.nii.gz: lies on another grid than" in told
    )
    assert {r["case"] for r in table(folders, "results.csv")} == {"case_1"}
    with pytest.raises(FileNotFoundError, match=r"none of its 3 masks has the name.*case_1_mask\.nii\.gz"):
        for path in list((folders / "pred").iterdir()):
            path.rename(path.with_name(f"x{path.name}"))
        run(folders)
    assert table(folders, "results.csv"), "a mistake in the names removes no table"


def test_volumes_after_gantry_tilt(folders):
    """Slices 2 mm apart along an axis that leans by 30 degrees: 1.73 mm^3 a voxel, not 2."""
    affine = np.array([[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 3**0.5, 0], [0, 0, 0, 1]])
    for path in ("labels/p3.nii.gz", "pred/p3_mask.nii.gz"):
        image = nibabel.Nifti1Image(truth().transpose(2, 1, 0), affine)
        image.set_sform(affine, 1)
        nibabel.save(image, folders / path)
    run(folders, num_pictures=0)
    (liver,) = (r for r in table(folders, "results.csv") if (r["case"], r["name"]) == ("p3", "liver"))
    assert float(liver["target_mm3"]) == pytest.approx(400 * 3**0.5, rel=1e-4)


def test_nothing_of_an_earlier_evaluation_stays(folders):
    run(folders, other=folders / "pred")
    (folders / "out/mine.txt").touch()
    for path in (folders / "pred").iterdir():
        path.rename(path.with_name(path.name.replace("case_1", "x").replace("case_2", "y")))
    write_nifti(folders / "pred/p3_mask.nii.gz", truth()[1:], SPACING_MM)
    assert len(run(folders)) == 3
    assert sorted(path.name for path in (folders / "out").iterdir()) == ["mine.txt", "summary.md"]


def test_scans_of_the_picture_lie_on_the_masks_grid_and_may_be_mr(folders, monkeypatch, capsys):
    ranges = {}

    def pictures(image, *_, value_range, **more):
        ranges[int(image.max())] = tuple(value_range)
        return contour_pictures(image, *_, value_range=value_range, **more)

    contour_pictures = montage.contour_pictures
    monkeypatch.setattr(montage, "contour_pictures", pictures)
    mr = np.linspace(0, 2000, truth().size).reshape(truth().shape).astype(np.int16)
    write_nifti(folders / "images/p3.nii.gz", mr, SPACING_MM, orientation="LPS")
    (folders / "images/case_2.nii.gz").unlink()
    assert run(folders, images=folders / "images") == {}
    assert ranges == {60: (-160, 240), -160: (-160, 240), 2000: pytest.approx((10, 1990), abs=1)}
    write_nifti(folders / "images/p3.nii.gz", mr[1:], SPACING_MM, orientation="LPS")
    assert run(folders, images=folders / "images") == {}  # the picture is not worth the evaluation
    told = capsys.readouterr().out
    assert "warning: worst_and_median.png is left out: " in told
    assert re.search(r"p3.nii.gz lies on another grid than .*p3.nii.gz .11 x 30 x 40 and 12 x 30 x 40", told)


def test_volumes_and_sites_only_where_they_are_asked_for(folders):
    assert run(folders) == {}
    assert not {"volume_agreement.csv", "sites.csv"} & {path.name for path in (folders / "out").iterdir()}
    sites = folders / "by_site.csv"
    sites.write_text("name,site\ncase_1,north\ncase_2,north\np3,south\n")
    assert run(folders, volumes=True, sites=str(sites)) == {}
    liver = {r["name"]: r for r in table(folders, "volume_agreement.csv")}["liver"]
    assert (liver["cases"], liver["bias_mm3"]) == ("3", f"{-800 / 3:.6g}"), "p3 is empty"
    by_site = {(r["site"], r["name"]): r for r in table(folders, "sites.csv")}
    assert float(by_site["north", "liver"]["dice"]) == pytest.approx(0.95)
    assert by_site["south", "liver"]["missed"] == "1" and ("all", "aorta") in by_site
    text = (folders / "out/summary.md").read_text()
    assert "| north | liver | 2 | 0 | 0.950 |" in text and "| liver | 3 | 800 | 533 |" in text
    run(folders)
    assert not (folders / "out/sites.csv").exists(), "of an earlier evaluation"


def test_without_a_window_no_scan_is_taken_for_a_ct(folders, monkeypatch):
    ranges = []

    def pictures(image, *_, value_range, **more):
        ranges.append(tuple(value_range))
        return contour_pictures(image, *_, value_range=value_range, **more)

    contour_pictures = montage.contour_pictures
    monkeypatch.setattr(montage, "contour_pictures", pictures)
    (folders / "images/case_2.nii.gz").unlink()
    assert run(folders, images=folders / "images", window_hu=None) == {}
    assert sorted(ranges) == [(-900, 60), (-900, 60), (0, 1)]


def test_worst_and_median_cases():
    def row(case, dice):
        return {"case": case, "class": 1, "dice": dice}

    dice = {"a": 0.7, "b": 0.1, "c": 0.9, "d": 0.3, "e": 0.5, "f": 0.8, "g": float("nan")}
    rows = [row(*pair) for pair in dice.items()]
    assert worst_and_median(rows, 2) == {"b": "worst", "d": "worst", "e": "median", "a": "median"}
    assert worst_and_median(rows, 1) == {"b": "worst", "e": "median"}
    assert worst_and_median(rows, 9) == dict.fromkeys("bdeafc", "worst")
    assert worst_and_median(rows[6:], 2) == {}
