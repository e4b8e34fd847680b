"""amos_lha/evaluate.py: preprocessed cases, groups of organs, the command."""

import csv
import json
import math
import types

import numpy as np
import pytest
import torch

from amos_lha import evaluate
from amos_lha.evaluate import evaluate_cases, group_dice
from amos_lha.organs import NUM_CLASSES, ORGANS, STRUCTURES, TOLERANCES_MM, group_of
from common.checkpoints import TrainedModel
from common.class_metrics import mean_dice, score_structures
from common.hardware import Precision
from common.hdf5 import CaseFile, write_case
from common.nifti import write_nifti

SPACING_MM = (2.0, 1.0, 1.0)


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


def test_means_by_hand():
    """Dice of the liver 0.9, of the spleen 1; the adrenal is missed, the gallbladder invented."""
    rows = score_structures(shifted(), truth(), SPACING_MM, STRUCTURES, list(ORGANS), surfaces=False)
    assert all(row["group"] == group_of(row["class"]) for row in rows)
    rows = [{"case": "a", **row} for row in rows]
    assert mean_dice(rows) == pytest.approx((0.9 + 1 + 0 + 0) / 4) and math.isnan(mean_dice([]))
    groups = group_dice(rows)
    assert groups["large"] == pytest.approx(0.95) and groups["small"] == 0 and math.isnan(groups["medium"])
    assert STRUCTURES.tolerances_mm is TOLERANCES_MM


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
    preprocessing["labelled"] = [1, 6]
    model = TrainedModel(
        Grey().eval(),
        {"patch_size": [16, 16, 16]},
        torch.device("cpu"),
        Precision("fp32", None, False, "test"),
        preprocessing,
        {},
    )
    data = types.SimpleNamespace(
        cases={name: CaseFile(tmp_path / f"{name}.h5") for name in "abc"},
        patients={"a": "Ann", "b": "Ben", "c": "Ann"},
    )
    rows, failed = evaluate_cases(model, data, ["b", "a", "c"], table=tmp_path / "cases.csv")
    assert [(row["case"], row["class"]) for row in rows] == [("b", 1), ("b", 6), ("a", 1), ("a", 6)]
    assert all(row["dice"] == row["nsd_organ"] == 1 for row in rows) and list(failed) == ["c"]
    lines = (tmp_path / "cases.csv").read_text().splitlines()
    assert lines == ["case,patient,dice,missed,hallucinated", "b,Ben,1,0,0", "a,Ann,1,0,0"]
    quick, _ = evaluate_cases(model, data, ["a"], surfaces=False)
    assert "nsd_organ" not in quick[0] and quick[0]["dice"] == 1


# ---- the command ----


@pytest.fixture
def folders(tmp_path):
    """Two true masks and as many predictions."""
    for folder in ("labels", "pred"):
        (tmp_path / folder).mkdir()
    for name, pred in (("amos_0001", truth()), ("amos_0002", shifted())):
        write_nifti(tmp_path / f"labels/{name}.nii.gz", truth(), SPACING_MM, orientation="LPS")
        write_nifti(tmp_path / f"pred/{name}_mask.nii.gz", pred, SPACING_MM, orientation="LPS")
    return tmp_path


def run(folder, *flags) -> int:
    base = ["--pred", folder / "pred", "--target", folder / "labels", "--out", folder / "out"]
    return evaluate.main([str(f) for f in (*base, *flags)])


def results(folder) -> list[dict]:
    with (folder / "out/results.csv").open(encoding="utf8") as file:
        return list(csv.DictReader(file))


def test_the_command_and_its_exit_code(folders, capsys):
    assert run(folders, "--compare", folders / "pred") == 0
    found = {(row["case"], row["name"]): float(row["dice"] or "nan") for row in results(folders)}
    assert len(found) == 2 * 15 and found["amos_0002", "liver"] == pytest.approx(0.9)
    for name in ("comparison.csv", "groups.csv", "summary.md", "worst_and_median.png"):
        assert (folders / "out" / name).is_file()
    (folders / "pred/amos_0001_mask.nii.gz").unlink()
    assert run(folders) == 1 and "failed: amos_0001: no prediction for" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no such folder of label maps"):
        run(folders, "--target", folders / "nothing")


def test_partly_labelled_by_flag_or_by_dataset_json(folders):
    assert run(folders, "--labelled", 6, 1, "--num_pictures", 0) == 0
    assert [row["class"] for row in results(folders)] == ["1", "6"] * 2
    assert not (folders / "out/worst_and_median.png").exists()
    (folders / "dataset.json").write_text(json.dumps({"labelled": {"amos_0001": [1], "amos_0002": [6]}}))
    assert run(folders, "--num_pictures", 0) == 0
    found = [(row["case"], row["class"]) for row in results(folders)]
    assert found == [("amos_0001", "1"), ("amos_0002", "6")]
