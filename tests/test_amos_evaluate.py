"""amos_lha/scores.py and evaluate.py: partly labelled cases, tables, pictures, two runs, wrong inputs."""

import csv
import json
import math
import types

import numpy as np
import pytest
import torch
from PIL import Image

from amos_lha import evaluate
from amos_lha.evaluate import evaluate_cases, group_dice, mean_dice
from amos_lha.organs import GROUPS, NUM_CLASSES, ORGANS, TOLERANCES_MM
from amos_lha.pictures import worst_and_median
from amos_lha.scores import only_labelled, score
from common.checkpoints import TrainedModel
from common.hardware import Precision
from common.hdf5 import CaseFile, write_case
from common.nifti import write_nifti

SPACING_MM = (2.0, 1.0, 1.0)
ALL = list(ORGANS)


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
    rows = {row["class"]: row for row in score(shifted(), truth(), SPACING_MM, ALL)}
    assert list(rows) == ALL and {row["group"] for row in rows.values()} == set(GROUPS)
    liver, spleen, adrenal, gallbladder = (rows[n] for n in (6, 1, 11, 4))
    assert liver["dice"] == pytest.approx(0.9) and liver["status"] == "ok" and liver["group"] == "large"
    assert liver["nsd_1mm"] == liver["nsd_organ"] == 1 and liver["hd95_mm"] == 1
    assert liver["volume_similarity"] == 1 and liver["target_mm3"] == 800
    assert spleen["dice"] == spleen["nsd_organ"] == 1
    assert (adrenal["status"], adrenal["dice"], adrenal["nsd_organ"]) == ("missed", 0, 0)
    assert (gallbladder["status"], gallbladder["dice"]) == ("hallucinated", 0)
    assert all(row["status"] == "absent" for n, row in rows.items() if n not in (1, 4, 6, 11))
    assert mean_dice(list_of(rows)) == pytest.approx((0.9 + 1 + 0 + 0) / 4)
    groups = group_dice(list_of(rows))
    assert groups["large"] == pytest.approx(0.95) and groups["small"] == 0 and math.isnan(groups["medium"])
    assert math.isnan(mean_dice([]))


def list_of(rows: dict) -> list[dict]:
    return [{"case": "a", **row} for row in rows.values()]


def test_the_tolerance_is_the_organs_own():
    """A plate of 1 mm that is 4 mm off: one side lies 3 mm from the truth, the other one 5 mm. Of the liver
    (5 mm) both are right, of the spleen (3 mm) only the first."""
    assert TOLERANCES_MM[6] == 5 and TOLERANCES_MM[1] == 3
    for organ, expected in ((6, 1.0), (1, 0.5)):
        pred, target = np.zeros((2, 9, 20, 20), np.uint8)
        target[2, 5:15, 5:15], pred[6, 5:15, 5:15] = organ, organ
        (row,) = score(pred, target, (1, 1, 1), [organ])
        assert row["nsd_organ"] == pytest.approx(expected, abs=0.3) and (row["nsd_organ"] == 1) == (
            organ == 6
        )


def test_what_is_not_labelled_is_neither_right_nor_wrong():
    pred, target = shifted(), truth()
    rows = score(pred, target, SPACING_MM, [1, 6])
    assert [row["class"] for row in rows] == [1, 6]
    assert mean_dice([{"case": "a", **row} for row in rows]) == pytest.approx(0.95)
    pred[pred == 0] = 13  # an organ without labels all over the background changes nothing
    assert score(pred, target, SPACING_MM, [1, 6]) == rows
    np.testing.assert_array_equal(np.unique(only_labelled(pred, [1, 6])), [0, 1, 6])
    assert pred.max() == 13, "a copy is changed"


def test_labels_that_are_no_organs_are_refused():
    pred = shifted()
    pred[0, 0, 0] = 16
    with pytest.raises(ValueError, match=r"the prediction holds label\(s\) 16; organs are 1 to 15"):
        score(pred, truth(), SPACING_MM, [1])
    with pytest.raises(ValueError, match="the target holds"):
        score(truth(), pred, SPACING_MM, [1])


# ---- preprocessed cases ----


class Grey(torch.nn.Module):
    """Organ 6 above a scaled value of 0.5, organ 1 above 1.5."""

    def forward(self, image):
        scores = torch.zeros(len(image), NUM_CLASSES, *image.shape[2:])
        scores[:, 6], scores[:, 1] = 10 * (image[:, 0] - 0.5), 30 * (image[:, 0] - 1.5)
        return scores


@pytest.mark.parametrize("modality", ["ct", "mr"])
def test_preprocessed_cases(tmp_path, modality):
    """Grey values 0, 100, 200; CT by the model's scaling, MR by the case's own: another one would miss."""
    labels = truth() * np.isin(truth(), (1, 6))
    image = np.where(labels == 6, 100, np.where(labels == 1, 200, 0)).astype(np.int16)
    right, wrong = [-100.0, 300.0, 0.0, 100.0], [-100.0, 300.0, 0.0, 1e6]
    notes = {
        "spacing_mm": SPACING_MM,
        "modality": modality,
        "labelled": [1, 6],
        "scaling": right if modality == "mr" else None,
    }
    for name in ("a", "b"):
        write_case(tmp_path / f"{name}.h5", image, labels, attributes=notes)
    preprocessing = {"spacing_mm": list(SPACING_MM), "scaling": right if modality == "ct" else wrong}
    model = TrainedModel(
        Grey().eval(),
        {"patch_size": [16, 16, 16]},
        torch.device("cpu"),
        Precision("fp32", None, False, "test"),
        preprocessing,
        {},
    )
    data = types.SimpleNamespace(cases={name: CaseFile(tmp_path / f"{name}.h5") for name in "abc"})
    rows, failed = evaluate_cases(model, data, ["b", "a", "c"], table=tmp_path / "cases.csv")
    assert [(row["case"], row["class"]) for row in rows] == [("b", 1), ("b", 6), ("a", 1), ("a", 6)]
    assert all(row["dice"] == row["nsd_organ"] == 1 for row in rows) and list(failed) == ["c"]
    lines = (tmp_path / "cases.csv").read_text().splitlines()
    assert lines == ["case,patient,dice,missed,hallucinated", "b,b,1,0,0", "a,a,1,0,0"]
    quick, _ = evaluate_cases(model, data, ["a"], surfaces=False)
    assert "nsd_organ" not in quick[0] and quick[0]["dice"] == 1


# ---- the command ----


@pytest.fixture
def folders(tmp_path):
    """Three true masks and as many predictions: amos_0001 is perfect, amos_0002 shifted, p3 empty."""
    for folder in ("labels", "images", "pred"):
        (tmp_path / folder).mkdir()
    for name, pred in (("amos_0001", truth()), ("amos_0002", shifted()), ("p3", truth() * 0)):
        write_nifti(tmp_path / f"labels/{name}.nii.gz", truth(), SPACING_MM, orientation="LPS")
        write_nifti(tmp_path / f"pred/{name}_mask.nii.gz", pred, SPACING_MM, orientation="LPS")
        image = np.where(truth() > 0, 60, -900).astype(np.int16)
        write_nifti(tmp_path / f"images/{name}.nii.gz", image, SPACING_MM, orientation="LPS")
    return tmp_path


def run(folder, *flags, pred="pred") -> int:
    base = ["--pred", folder / pred, "--target", folder / "labels", "--out", folder / "out"]
    return evaluate.main([str(f) for f in (*base, *flags)])


def table(folder, name) -> list[dict]:
    with (folder / "out" / name).open(encoding="utf8") as file:
        return list(csv.DictReader(file))


def test_tables_and_picture(folders, capsys):
    assert run(folders, "--images", folders / "images") == 0
    rows = table(folders, "results.csv")
    assert len(rows) == 3 * 15 and rows[0]["case"] == "amos_0001" and rows[0]["group"] == "large"
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


def test_partly_labelled_by_flag_or_by_dataset_json(folders):
    assert run(folders, "--labelled", 6, 1, "--num_pictures", 0) == 0
    assert [r["class"] for r in table(folders, "results.csv")] == ["1", "6"] * 3
    assert not (folders / "out/worst_and_median.png").exists()
    notes = {"labelled": {"amos_0001": [1], "amos_0002": [6], "p3": [1, 6]}}
    (folders / "dataset.json").write_text(json.dumps(notes))
    assert run(folders, "--num_pictures", 0) == 0
    found = [(r["case"], r["class"]) for r in table(folders, "results.csv")]
    assert found == [("amos_0001", "1"), ("amos_0002", "6"), ("p3", "1"), ("p3", "6")]


def test_a_missing_prediction_is_a_failure_and_a_surplus_one_is_told(folders, capsys):
    (folders / "pred/p3_mask.nii.gz").unlink()
    write_nifti(folders / "pred/other_mask.nii.gz", truth(), SPACING_MM)
    assert run(folders) == 1
    told = capsys.readouterr().out
    assert "failed: p3: no prediction for" in told and "2 masks of" in told
    assert "without a true mask, not scored: other" in told
    assert {r["case"] for r in table(folders, "results.csv")} == {"amos_0001", "amos_0002"}


def test_comparison_of_two_runs(folders, capsys):
    (folders / "second").mkdir()
    for name in ("amos_0001", "amos_0002", "p3"):
        write_nifti(folders / f"second/{name}.nii.gz", truth(), SPACING_MM, orientation="LPS")
    assert run(folders, "--compare", folders / "second") == 0
    rows = {(r["metric"], r["name"]): r for r in table(folders, "comparison.csv")}
    assert float(rows["dice", "liver"]["difference"]) == pytest.approx(1 - 1.9 / 3, abs=1e-4)
    assert rows["dice", "liver"]["missed_a"] == "1" and rows["dice", "liver"]["missed_b"] == "0"
    assert ("nsd_organ", "spleen") in rows and ("group", "liver") not in rows
    assert "B - A" in capsys.readouterr().out
    (folders / "second/p3.nii.gz").unlink()
    assert run(folders, "--compare", folders / "second") == 1
    assert "failed: p3: no prediction" in capsys.readouterr().out


def test_wrong_inputs_name_the_case_and_cost_no_other(folders, capsys):
    write_nifti(
        folders / "pred/amos_0002_mask.nii.gz",
        np.maximum(truth(), 16 * (truth() == 1).astype(np.uint8)),
        SPACING_MM,
    )
    write_nifti(folders / "pred/p3_mask.nii.gz", truth()[1:], SPACING_MM, orientation="LPS")
    assert run(folders, "--num_pictures", 1) == 1
    told = capsys.readouterr().out
    assert (
        "failed: amos_0002: the prediction holds label(s) 16" in told
        and "p3_mask.nii.gz: lies on another grid than" in told
    )
    assert {r["case"] for r in table(folders, "results.csv")} == {"amos_0001"}
    with pytest.raises(SystemExit, match=r"none of its 3 masks has the name.*amos_0001_mask\.nii\.gz"):
        for path in list((folders / "pred").iterdir()):
            path.rename(path.with_name(f"x{path.name}"))
        run(folders)
    assert table(folders, "results.csv"), "a mistake in the flags removes no table"


def test_worst_and_median_cases():
    def row(case, dice):
        return {"case": case, "class": 1, "dice": dice}

    dice = {"a": 0.7, "b": 0.1, "c": 0.9, "d": 0.3, "e": 0.5, "f": 0.8, "g": float("nan")}
    rows = [row(*pair) for pair in dice.items()]
    assert worst_and_median(rows, 2) == {"b": "worst", "d": "worst", "e": "median", "a": "median"}
    assert worst_and_median(rows, 1) == {"b": "worst", "e": "median"}
    assert worst_and_median(rows, 9) == dict.fromkeys("bdeafc", "worst")
    assert worst_and_median(rows[6:], 2) == {}
