"""amygdala/segment.py, predict.py, evaluate.py, cross_validation.py: from a scan to labels and scores."""

import csv
import json
import math
import types

import nibabel
import numpy as np
import pytest
import torch
from conftest import read_cross_validation
from PIL import Image

from amygdala import evaluate, predict
from amygdala.cross_validation import write_cross_validation
from amygdala.segment import segment
from amygdala.structures import DATASETS
from common.checkpoints import TrainedModel
from common.class_metrics import mean_dice
from common.hardware import Precision
from common.hdf5 import CaseFile, write_case
from common.nifti import NIFTI_SUFFIXES, load_label, load_nifti, write_nifti
from common.prediction import check_ensemble, mean_network

CPU = torch.device("cpu")
FP32 = Precision("fp32", None, False, "test")
BOX = ((10, 8, 8), (38, 36, 38))  # of the phantom's region
LEFT, RIGHT = 1, 2
NUM_VOXELS = 9 * 10 * 8  # of each structure


class Brightness(torch.nn.Module):
    """A network that needs no training: the brightest of a window is left, the half bright right."""

    def forward(self, image):
        low, high = (f(image, dim=(1, 2, 3, 4), keepdim=True)[:, 0] for f in (torch.amin, torch.amax))
        share = (image[:, 0] - low) / (high - low)
        return -20 * torch.stack([share, (share - 1).abs(), (share - 0.5).abs()], 1)


class Constant(torch.nn.Module):
    """The same probabilities everywhere."""

    def __init__(self, *probabilities: float) -> None:
        super().__init__()
        self.logits = torch.tensor(probabilities).log()

    def forward(self, image):
        return self.logits.view(1, 3, 1, 1, 1).expand(len(image), 3, *image.shape[2:]) + 5


def model(network=None, patch=(32, 32, 32), spacing=(1.0, 1.0, 1.0), dataset="Amygdala", **config):
    preprocessing = {"spacing_mm": list(spacing), "dataset": dataset, "localiser": None}
    config = {"patch_size": list(patch), "flip_sides": 0.5} | config
    return TrainedModel((network or Brightness()).eval(), config, CPU, FP32, preprocessing, {})


def head(shape=(48, 44, 46)):
    """A head of 100 in air of 0, with a left structure of 300 and a right one of 200; and the labels.

    A cavity of 0 between them is there for the scaling of a window, which takes its darkest value for air.
    """
    labels = np.zeros(shape, np.uint8)
    labels[18:27, 16:26, 11:19], labels[18:27, 16:26, 27:35] = LEFT, RIGHT
    image = np.zeros(shape, np.int16)
    image[4:44, 4:40, 3:43] = 100
    image[14:17, 18:22, 22:24] = 0
    image[labels == LEFT], image[labels == RIGHT] = 300, 200
    return image, labels


# ---- segment ----


def test_folds_are_averaged_as_probabilities():
    """(0.3, 0.69, 0.01) and (0.3, 0.05, 0.65): label 1 by their mean, 0.37; the background by mean logits."""
    models = [model(Constant(0.3, 0.69, 0.01)), model(Constant(0.3, 0.05, 0.65))]
    image = head()[0][:20, :20, :20]
    shares = {n: np.zeros(image.shape, np.uint8) for n in (1, 2)}
    labels = segment(models, image, (1, 1, 1), probabilities=shares)
    assert (labels == 1).all()
    assert (shares[1] == round(255 * 0.37)).all() and (shares[2] == round(255 * 0.33)).all()
    window = torch.zeros(2, 1, 4, 5, 6)
    mean = mean_network([m.network for m in models])(window).softmax(1)
    assert mean.shape == (2, 3, 4, 5, 6)
    torch.testing.assert_close(mean[1, :, 3, 4, 5], torch.tensor([0.3, 0.37, 0.33]))
    assert mean_network([models[0].network]) is models[0].network


def test_folds_that_cannot_be_averaged_are_refused():
    weights = ["a.pt", "b.pt", "c.pt"]
    check_ensemble([model(), model(), model()], weights, 3)
    others = {
        "data set": model(dataset="Hippocampus"),
        "spacing in mm": model(spacing=(1, 1, 2)),
        "classes": model(num_classes=2),
        "patch size": model(patch=(16, 32, 32)),
    }
    for what, other in others.items():
        with pytest.raises(
            ValueError, match=rf"--weights: c\.pt was trained with another {what} .* than a\.pt"
        ):
            check_ensemble([model(), model(), other], weights, 3)


class Sides(torch.nn.Module):
    """What is bright is the right one in the right half of x, else the left one."""

    def forward(self, image):
        bright = image[:, 0] > 0
        right = (torch.arange(image.shape[-1]) >= image.shape[-1] / 2).expand(bright.shape)
        return 4.0 * torch.stack([~bright, bright & ~right, bright & right], 1)


@pytest.mark.parametrize("dataset", ["Amygdala", "Hippocampus"])
def test_tta_exchanges_the_sides_where_labels_are_sides(dataset):
    image = np.full((16, 16, 16), 100, np.int16)
    image[0] = 0
    image[4:9, 5:11, 1:5] = image[4:9, 5:11, 11:15] = 300
    plain = segment([model(Sides(), patch=(16, 16, 16))], image, (1, 1, 1))
    assert (plain[4:9, 5:11, 1:5] == LEFT).all() and (plain[4:9, 5:11, 11:15] == RIGHT).all()
    shares = {n: np.zeros(image.shape, np.uint8) for n in (1, 2)}
    mirrored = model(Sides(), patch=(16, 16, 16), dataset=dataset)
    found = segment([mirrored], image, (1, 1, 1), tta=True, probabilities=shares)
    if dataset == "Amygdala":
        np.testing.assert_array_equal(found, plain)
    else:  # front and back stay what they are: the two passes contradict each other here
        assert (shares[1][4:9, 5:11, 1:5] == shares[2][4:9, 5:11, 1:5]).all()


def test_nothing_is_found_outside_of_the_box():
    image, labels = head()
    found = segment([model()], image, (1, 1, 1), box=((10, 8, 8), (22, 36, 38)))
    np.testing.assert_array_equal(found[:22], labels[:22])
    assert not found[22:].any()


# ---- predict ----


def run(monkeypatch, source, out, *flags, models=None, box=BOX) -> int:
    """predict.py with networks that answer by brightness, and a localiser that knows the answer."""
    models = dict(models or {"fold_0_best.pt": model()})
    monkeypatch.setattr(predict, "load_trained", lambda weights, *_: models[weights])
    monkeypatch.setattr(predict, "find_box", lambda m, image, mm: box or ((0, 0, 0), image.shape))
    monkeypatch.setattr(predict, "LEAST_HEAD_MM", 40)  # heads of these tests are small
    base = ["--weights", *models, "--source", source, "--out", out, "--device", "cpu", "--amp", "off"]
    return predict.main([str(f) for f in (*base, *flags)])


def table(path) -> list[dict]:
    with path.open(encoding="utf8") as file:
        return list(csv.DictReader(file))


def test_a_picture_that_fails_costs_the_picture_alone(tmp_path, monkeypatch, capsys):
    def fails(*_, **__):
        raise IndexError("index 65 is out of bounds")

    write_nifti(tmp_path / "T1.nii.gz", head()[0], (1, 1, 1))
    monkeypatch.setattr(predict, "save_planes", fails)
    assert run(monkeypatch, tmp_path / "T1.nii.gz", tmp_path / "out", "--overlay") == 0
    assert "warning: T1_overlay.png is left out: IndexError: index 65" in capsys.readouterr().out
    assert float(table(tmp_path / "out/volumes.csv")[0]["left_mm3"]) == NUM_VOXELS


@pytest.mark.parametrize("orientation", ["RAS", "LAS", "LIA", "PIR"])
def test_masks_lie_on_the_scans_grid(tmp_path, monkeypatch, orientation):
    image, labels = head()
    path = tmp_path / "T1.nii.gz"
    write_nifti(path, image, (1, 1, 1), orientation=orientation, origin_mm=(3, -4, 5))
    assert run(monkeypatch, path, tmp_path / "out", "--overlay") == 0
    scan, mask = load_nifti(path), load_label(tmp_path / "out/T1_mask.nii.gz")
    np.testing.assert_array_equal(mask.array, labels)
    np.testing.assert_array_equal(mask.file_affine, scan.file_affine)
    stored = nibabel.load(tmp_path / "out/T1_mask.nii.gz")
    assert stored.get_data_dtype() == np.uint8 and mask.orientation == orientation
    assert [mask.header[key] for key in ("qform_code", "sform_code")] == [1, 1]
    (row,) = table(tmp_path / "out/volumes.csv")
    assert float(row["left_mm3"]) == float(row["right_mm3"]) == NUM_VOXELS
    assert float(row["asymmetry_index"]) == 0 and row["warnings"] == ""
    note = json.loads((tmp_path / "out/T1.json").read_text())
    assert note["region"] == {"start": [10, 8, 8], "stop": [38, 36, 38], "axes": "z y x in RAS"}
    assert note["weights"] == ["fold_0_best.pt"] and note["volumes"]["left_mm3"] == NUM_VOXELS
    assert Image.open(tmp_path / "out/T1_overlay.png").size[0] > 300


def turned(spacing_mm, degrees=20):
    """(4, 4) affine with axes L, P, S that are turned about the patient's x axis, as in an oblique scan."""
    a = math.radians(degrees)
    turn = np.array([[1, 0, 0], [0, math.cos(a), -math.sin(a)], [0, math.sin(a), math.cos(a)]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-spacing_mm[2], -spacing_mm[1], spacing_mm[0]])
    affine[:3, 3] = 10, -20, 30
    return affine


def test_an_oblique_scan_of_other_voxels(tmp_path, monkeypatch):
    """Slices of 1.6 mm and pixels of 0.9 x 0.8 mm, resampled for the network and back; left stays left."""
    image, labels = head()
    affine = turned((1.6, 0.9, 0.8))
    stored = nibabel.Nifti1Image(image[:, ::-1, ::-1].transpose(2, 1, 0), affine)  # from RAS to LPS
    nibabel.save(stored, tmp_path / "T1.nii.gz")
    assert run(monkeypatch, tmp_path / "T1.nii.gz", tmp_path / "out") == 0
    mask = nibabel.load(tmp_path / "out/T1_mask.nii.gz")
    np.testing.assert_allclose(mask.affine, affine, atol=1e-5)
    found = np.asarray(mask.dataobj).transpose(2, 1, 0)[:, ::-1, ::-1]
    for label in (LEFT, RIGHT):
        both = 2 * ((found == label) & (labels == label)).sum()
        assert both / ((found == label).sum() + NUM_VOXELS) > 0.8, "left loses its rim, which looks right"
    (row,) = table(tmp_path / "out/volumes.csv")
    for label, column in ((LEFT, "left_mm3"), (RIGHT, "right_mm3")):
        expected = (found == label).sum() * abs(np.linalg.det(affine[:3, :3]))
        assert float(row[column]) == pytest.approx(expected, rel=1e-5)


def test_the_volume_of_a_sheared_voxel_is_its_determinant(tmp_path, monkeypatch):
    """Slices 1 mm apart along an axis that leans by 30 degrees: 0.866 mm^3, not 1."""
    affine = np.array([[1, 0, 0, 0], [0, 1, 0.5, 0], [0, 0, 0.75**0.5, 0], [0, 0, 0, 1]])
    nibabel.save(nibabel.Nifti1Image(head()[0].transpose(2, 1, 0), affine), tmp_path / "T1.nii.gz")
    assert run(monkeypatch, tmp_path / "T1.nii.gz", tmp_path / "out") == 0
    (row,) = table(tmp_path / "out/volumes.csv")
    assert float(row["left_mm3"]) == pytest.approx(NUM_VOXELS * 0.75**0.5, rel=1e-4)


@pytest.mark.skipif(".mgz" not in NIFTI_SUFFIXES, reason="FreeSurfer's files are not read here")
def test_masks_of_freesurfers_scans_are_nifti(tmp_path, monkeypatch):
    image, labels = head()
    affine = np.array([[-1.0, 0, 0, 20], [0, 0, 1, -30], [0, -1, 0, 40], [0, 0, 0, 1]])  # LIA, as orig.mgz
    stored = image[::-1, :, ::-1].transpose(2, 0, 1).astype(np.uint8)
    stored[stored == 44] = 255  # 300 does not fit into uint8; 300 - 256 = 44
    nibabel.save(nibabel.MGHImage(stored, affine), tmp_path / "orig.mgz")
    network = {"fold_0_best.pt": model()}
    assert run(monkeypatch, tmp_path / "orig.mgz", tmp_path / "out", "--save_prob", models=network) == 0
    np.testing.assert_allclose(nibabel.load(tmp_path / "out/orig_mask.nii.gz").affine, affine)
    found = load_label(tmp_path / "out/orig_mask.nii.gz").array
    np.testing.assert_array_equal(found == LEFT, labels == LEFT)
    assert load_nifti(tmp_path / "out/probabilities/orig_01.nii.gz").shape == labels.shape


def test_probability_maps_of_both_labels_and_of_several_folds(tmp_path, monkeypatch):
    write_nifti(tmp_path / "T1.nii.gz", head()[0], (1, 1, 1), orientation="LIA")
    models = {"a.pt": model(Constant(0.3, 0.69, 0.01)), "b.pt": model(Constant(0.3, 0.05, 0.65))}
    out = tmp_path / "out"
    assert run(monkeypatch, tmp_path / "T1.nii.gz", out, "--save_prob", "--tta", models=models) == 0
    assert sorted(p.name for p in (out / "probabilities").iterdir()) == ["T1_01.nii.gz", "T1_02.nii.gz"]
    share = load_nifti(out / "probabilities/T1_01.nii.gz")
    inside = tuple(slice(a, b) for a, b in zip(*BOX, strict=True))
    # The mirrored pass has 0.37 for the other side: sqrt(0.37 * 0.33) of both, 0.3 of the background.
    both = math.sqrt(0.37 * 0.33)
    np.testing.assert_allclose(share.array[inside], both / (2 * both + 0.3), atol=0.003)
    outside = share.array.copy()
    outside[inside] = 0
    assert share.orientation == "LIA" and not outside.any()
    with pytest.raises(SystemExit, match="b.pt was trained with another data set"):
        run(monkeypatch, tmp_path, out, models=models | {"b.pt": model(dataset="Hippocampus")})
    with pytest.raises(SystemExit, match="trained without mirrored scans"):
        run(monkeypatch, tmp_path, out, "--tta", models={"a.pt": model(flip_sides=0)})


def test_stray_pieces_are_removed_and_reported(tmp_path, monkeypatch):
    image, labels = head()
    image[30:32, 30:32, 11:13] = 300
    write_nifti(tmp_path / "T1.nii.gz", image, (1, 1, 1))
    assert run(monkeypatch, tmp_path / "T1.nii.gz", tmp_path / "out") == 0
    np.testing.assert_array_equal(load_label(tmp_path / "out/T1_mask.nii.gz").array, labels)
    note = json.loads((tmp_path / "out/T1.json").read_text())
    assert note["clean_up"] == {"left amygdala": {"removed_ml": pytest.approx(0.008), "components": 1}}
    assert float(table(tmp_path / "out/volumes.csv")[0]["removed_mm3"]) == pytest.approx(8)
    assert run(monkeypatch, tmp_path / "T1.nii.gz", tmp_path / "out", "--no-clean_up") == 0
    assert (load_label(tmp_path / "out/T1_mask.nii.gz").array == LEFT).sum() == NUM_VOXELS + 8


def test_a_hippocampus_has_parts_and_no_sides(tmp_path, monkeypatch, capsys):
    write_nifti(tmp_path / "crop.nii.gz", head()[0][:39], (1, 1, 1))
    models = {"fold_0_best.pt": model(dataset="Hippocampus", patch=(48, 48, 48))}
    assert run(monkeypatch, tmp_path / "crop.nii.gz", tmp_path / "out", models=models, box=None) == 0
    (row,) = table(tmp_path / "out/volumes.csv")
    assert float(row["anterior_hippocampus_mm3"]) == float(row["posterior_hippocampus_mm3"]) == NUM_VOXELS
    assert "asymmetry_index" not in row and row["warnings"] == ""
    assert "crop.nii.gz: anterior_hippocampus 720 mm3, posterior" in capsys.readouterr().out
    write_nifti(tmp_path / "head.nii.gz", head()[0], (1, 1, 1))
    assert run(monkeypatch, tmp_path / "head.nii.gz", tmp_path / "out", models=models, box=None) == 0
    assert "head.nii.gz: 48 x 44 x 46 mm (z y x), which is no crop around" in capsys.readouterr().out


def test_asymmetry():
    assert predict.asymmetry_index(1100, 900) == pytest.approx(20)
    assert predict.asymmetry_index(0, 900) == -200 and predict.asymmetry_index(0, 0) is None


def test_what_a_person_should_look_at(tmp_path, monkeypatch, capsys):
    """A head mirrored, empty, with a small left structure, with its region beside the middle, cut off."""
    image, labels = head()
    folder, out = tmp_path / "scans", tmp_path / "out"
    folder.mkdir()
    write_nifti(folder / "mirrored.nii.gz", image[:, :, ::-1], (1, 1, 1))
    small = image.copy()
    small[18:27, 16:26, 16:19] = 100
    write_nifti(folder / "small.nii.gz", small, (1, 1, 1))
    moved = np.zeros((48, 44, 120), np.int16)  # a head that reaches far to the right
    moved[..., :46] = image
    moved[4:44, 4:40, 40:118] = 100
    write_nifti(folder / "beside.nii.gz", moved, (1, 1, 1))
    write_nifti(folder / "piece.nii.gz", image[:39], (1, 1, 1))
    assert run(monkeypatch, folder, out, "--overlay") == 0
    told = capsys.readouterr().out
    assert "warning: mirrored.nii.gz: the right amygdala lies left of the left amygdala; are left" in told
    assert "warning: small.nii.gz: left amygdala of 450 mm3 is hardly plausible (500 to 3000 mm3" in told
    assert "warning: beside.nii.gz: the region searched lies 38 mm beside the middle of the head" in told
    assert "warning: piece.nii.gz: 39 x 44 x 46 mm (z y x), which is no whole head" in told
    assert told.count("warning: ") == 4
    rows = {row["scan"].split("/")[-1]: row for row in table(out / "volumes.csv")}
    assert float(rows["small.nii.gz"]["asymmetry_index"]) == pytest.approx(200 * (450 - 720) / 1170, rel=1e-5)
    assert "hardly plausible" in rows["small.nii.gz"]["warnings"]
    nothing = {"fold_0_best.pt": model(Constant(1 - 2e-9, 1e-9, 1e-9))}
    assert run(monkeypatch, folder / "small.nii.gz", out, "--overlay", models=nothing) == 0
    assert "warning: small.nii.gz: nothing found, its mask is empty" in capsys.readouterr().out
    (row,) = table(out / "volumes.csv")
    assert row["asymmetry_index"] == "" and row["left_mm3"] == "0"


def test_scans_that_cannot_be_used(tmp_path, monkeypatch, capsys):
    write_nifti(tmp_path / "slice.nii.gz", head()[0][20:21], (1, 1, 1))
    write_nifti(tmp_path / "blank.nii.gz", np.full((9, 9, 9), 7, np.int16), (1, 1, 1))
    nibabel.save(nibabel.Nifti1Image(np.ones((4, 5, 6, 2)), np.eye(4)), tmp_path / "series.nii.gz")
    write_nifti(tmp_path / "good.nii.gz", head()[0], (1, 1, 1))
    assert run(monkeypatch, tmp_path, tmp_path / "out") == 1
    told = capsys.readouterr().out
    assert "slice.nii.gz: a single slice ((1, 44, 46) voxels z y x); a 3-D scan is needed" in told
    assert "blank.nii.gz: all voxels are 7; is it the right file?" in told
    assert "failed: " in told and "series.nii.gz" in told and "1 of 4 scan(s) written" in told


# ---- evaluate ----


def test_preprocessed_cases(tmp_path, monkeypatch):
    """Case b is searched in a box that leaves out the upper 5 of the 9 slices of both structures."""
    image, labels = head()
    for name in "ab":
        write_case(tmp_path / f"{name}.h5", image, labels, attributes={"spacing_mm": (1.0, 1.0, 1.0)})
    boxes = iter([BOX, ((10, 8, 8), (22, 36, 38))])
    monkeypatch.setattr(evaluate, "find_box", lambda *_: next(boxes))
    cohort = types.SimpleNamespace(
        dataset="Amygdala",
        cases={name: CaseFile(tmp_path / f"{name}.h5") for name in "abc"},
        subjects={"a": "Ann", "b": "Ben", "c": "Ann"},
        sites=dict.fromkeys("abc", "Bonn"),
    )
    rows, failed = evaluate.evaluate_cases([model()], cohort, ["a", "b", "c"], table=tmp_path / "cases.csv")
    assert [(row["case"], row["patient"], row["class"]) for row in rows] == [
        ("a", "Ann", 1), ("a", "Ann", 2), ("b", "Ben", 1), ("b", "Ben", 2),
    ]  # fmt: skip
    assert list(failed) == ["c"] and rows[0]["dice"] == rows[1]["nsd_0.5mm"] == 1
    assert rows[2]["dice"] == pytest.approx(2 * 4 / 13) and rows[2]["hd95_mm"] == 5
    cases = {row["case"]: row for row in table(tmp_path / "cases.csv")}
    assert (cases["a"]["voxels_outside"], cases["b"]["voxels_outside"]) == ("0", str(2 * 5 * 10 * 8))
    assert cases["a"]["site"] == "Bonn"
    assert mean_dice(rows) == pytest.approx((1 + 8 / 13) / 2)
    boxes = iter([BOX])
    quick, _ = evaluate.evaluate_cases([model(), model()], cohort, ["a"], surfaces=False)
    assert "hd95_mm" not in quick[0] and quick[0]["dice"] == 1


def test_the_command_with_sites_and_a_second_run(tmp_path, capsys):
    _, labels = head()
    shifted = np.roll(labels, 1, axis=0)
    for folder in ("labels", "a", "b"):
        (tmp_path / folder).mkdir()
    for name in ("s1", "s2", "s3"):
        write_nifti(tmp_path / f"labels/{name}.nii.gz", labels, (1, 1, 1), orientation="LAS")
        write_nifti(tmp_path / f"a/{name}_mask.nii.gz", shifted, (1, 1, 1), orientation="LAS")
        write_nifti(tmp_path / f"b/{name}_mask.nii.gz", labels, (1, 1, 1), orientation="LAS")
    (tmp_path / "sites.csv").write_text("name,site\ns1,Bonn\ns2,Bonn\ns3,Trier\ns4,Trier\n")
    flags = ["--pred", "a", "--target", "labels", "--compare", "b", "--out", "out", "--sites", "sites.csv"]
    words = [str(tmp_path / word) if not word.startswith("--") else word for word in flags]
    assert evaluate.main([*words, "--num_pictures", "1"]) == 0
    rows = table(tmp_path / "out/results.csv")
    assert len(rows) == 6 and {row["name"] for row in rows} == {"left amygdala", "right amygdala"}
    assert float(rows[0]["dice"]) == pytest.approx(8 / 9, abs=1e-5) and float(rows[0]["nsd_1mm"]) == 1
    assert float(rows[0]["nsd_0.5mm"]) < 1 and "nsd_2mm" not in rows[0]
    assert {row["site"] for row in table(tmp_path / "out/sites.csv")} == {"Bonn", "Trier", "all"}
    volumes = table(tmp_path / "out/volume_agreement.csv")
    assert [row["bias_mm3"] for row in volumes] == ["0", "0"] and volumes[0]["cases"] == "3"
    dice = {(r["metric"], r["class"]): r for r in table(tmp_path / "out/comparison.csv")}["dice", "all"]
    assert float(dice["difference"]) == pytest.approx(1 / 9, abs=1e-5)
    told = capsys.readouterr().out
    assert (
        "| Bonn | left amygdala | 2 |" in told and "sites.csv: no case belongs to its row(s) of s4;" in told
    )
    assert (tmp_path / "out/worst_and_median.png").is_file()


def test_the_picture_tells_truth_from_prediction(tmp_path, monkeypatch):
    """Dice of the moved mask: 8 / 9, see above. The names stand in two lines: a long one was cut off."""
    titles = []
    monkeypatch.setattr("common.montage.save_panels", lambda path, rows, names, **_: titles.extend(names))
    _, labels = head()
    scored(tmp_path, labels, np.roll(labels, 1, axis=0), "--num_pictures", "1")
    assert titles[0][0] == "worst: s1\nleft amygdala 0.89"
    assert titles[0][1] == "coronal\nsolid: truth, dashed: prediction"


def scored(folder, truth, pred, *flags):
    """(exit code, {label: (status, dice)}) of one case by the script."""
    for name, array in (("labels", truth), ("masks", pred)):
        (folder / name).mkdir(exist_ok=True)
        write_nifti(folder / name / "s1.nii.gz", array, (1, 1, 1))
    words = [
        "--pred",
        str(folder / "masks"),
        "--target",
        str(folder / "labels"),
        "--out",
        str(folder / "out"),
    ]
    code = evaluate.main([*words, "--num_pictures", "0", *flags])
    rows = table(folder / "out/results.csv") if code == 0 else []
    return code, {int(row["class"]): (row["status"], row["dice"]) for row in rows}


def test_masks_of_another_data_set_are_refused(tmp_path):
    """predict.py notes volumes of what it found; scored as amygdalae, hippocampi would be called so."""
    _, labels = head()
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks/volumes.csv").write_text("scan,anterior_hippocampus_mm3,removed_mm3\ns1,5,0\n")
    with pytest.raises(SystemExit, match=r"has anterior_hippocampus_mm3 and not left_mm3, .* --dataset"):
        scored(tmp_path, labels, labels)
    assert scored(tmp_path, labels, labels, "--dataset", "Hippocampus")[0] == 0


def test_masks_with_other_numbers(tmp_path, capsys):
    """FreeSurfer's, one's own, one number for both sides; a lone left side is no mask of both."""
    _, labels = head()
    both = {1: ("ok", "1"), 2: ("ok", "1")}
    aseg = np.array([0, 18, 54])[labels].astype(np.int16)
    aseg[:2] = 2
    assert scored(tmp_path, aseg, labels) == scored(tmp_path, labels, aseg) == (0, both)
    own = np.array([0, 32, 31], np.uint8)[labels]
    assert scored(tmp_path, own, labels, "--label_map", "1=32,2=31") == (0, both)
    swapped = np.array([0, 2, 1], np.uint8)[labels]
    assert scored(tmp_path, swapped, labels, "--label_map", "1=2,2=1") == (0, both), "of the truth alone"
    apart = np.insert(labels, [labels.shape[2] // 2] * 10, 0, axis=2)
    assert scored(tmp_path, (apart > 0) * np.uint8(1), apart) == (0, both)
    left = (labels == LEFT) * np.uint8(LEFT)
    assert scored(tmp_path, left, labels)[1] == {1: ("ok", "1"), 2: ("hallucinated", "0")}
    assert scored(tmp_path, labels, left)[1] == {1: ("ok", "1"), 2: ("missed", "0")}
    assert scored(tmp_path, labels, (labels > 0) * np.uint8(LEFT))[1][2] == ("missed", "0")
    capsys.readouterr()
    assert scored(tmp_path, np.where(labels == 2, 3, labels).astype(np.uint8), labels)[0] == 1
    assert "labels/s1.nii.gz: label value(s) 1, 3 fit no label map" in capsys.readouterr().out


# ---- cross validation ----

NAMES = DATASETS["Amygdala"].structures.names


def score(case, label, dice, hd95=1.0, asd=0.5, status="ok"):
    return {"case": case, "patient": case, "class": label, "name": NAMES[label], "status": status} | {
        "dice": dice,
        "hd95_mm": hd95,
        "asd_mm": asd,
        "target_mm3": 0.0 if status == "absent" else 1000.0,
        "pred_mm3": 0.0 if status == "absent" else 1000.0,
    }


def two_folds():
    """Left 0.85 and 0.9123456, right 0.7 and nothing."""
    nan = math.nan
    first = [
        score("a", 1, 0.8, 1.0),
        score("a", 2, 0.6, 3.0),
        score("b", 1, 0.9, 2.0),
        score("b", 2, 0.8, 4.0),
    ]
    return [first, [score("c", 1, 0.9123456, 12345.678), score("c", 2, nan, nan, nan, "absent")]]


def test_cross_validation_in_the_parents_layout(tmp_path):
    path = tmp_path / "cross_validation.txt"
    write_cross_validation(
        path, two_folds(), NAMES, {"a": "Bonn", "b": "Bonn"}, notes=["chosen on the test folds"]
    )
    text = path.read_text()
    assert text.startswith(
        "Dice\n"
        "Fold 0: [0.85 0.7 ]\n"
        "Fold 1: [0.9123    nan]\n"
        "Each Class Dice Avg: [0.8812 0.7   ]\n"
        "Each Class Dice Std: [0.0312 0.    ]\n"
        "All classes Dice Avg: 0.8208\n"
        "All classes Dice Std: 0.0687\n"
        "\n"
        "HD\n"
        "Fold 0: [1.5 3.5]\n"
        "Fold 1: [12345.678       nan]\n"
        "Each Class HD Avg: ["
    )
    blocks = text.split("\n\n")
    assert [block.split("\n")[0] for block in blocks[:3]] == ["Dice", "HD", "ASD"]
    assert [len(block.split("\n")) for block in blocks[:3]] == [1 + 2 + 4] * 3
    rest = "\n\n".join(blocks[3:])
    assert "Fold " not in rest and "Each Class" not in rest and "All classes" not in rest
    assert "NOTE: chosen on the test folds" in rest and "HD95" in rest
    assert "| Bonn | left amygdala | 2 | 0 | 0.850 |" in rest and "| unknown | left" in rest
    assert "| right amygdala | 3 | 0 | 0 | 1 |" in rest, "one is left out"
    rows = table(tmp_path / "cross_validation.csv")
    assert [(row["fold"], row["class"], row["cases"]) for row in rows] == [
        ("0", "1", "2"), ("0", "2", "2"), ("1", "1", "1"), ("1", "2", "1"),
    ]  # fmt: skip
    assert rows[2]["dice"] == "0.912346" and rows[3]["dice"] == "" and rows[3]["absent"] == "1"


def test_what_is_read_is_what_was_written(tmp_path):
    rng = np.random.default_rng(0)
    folds = [[score(f"{fold}_{k}", n, *rng.random(3)) for k in range(3) for n in (1, 2)] for fold in range(5)]
    write_cross_validation(tmp_path / "cross_validation.txt", folds, NAMES, {})
    found = read_cross_validation(tmp_path / "cross_validation.txt")
    for title, metric in {"Dice": "dice", "HD": "hd95_mm", "ASD": "asd_mm"}.items():
        expected = [
            [np.mean([r[metric] for r in rows if r["class"] == label]) for label in (1, 2)] for rows in folds
        ]
        np.testing.assert_array_equal(found[title], np.round(expected, 4))
    write_cross_validation(tmp_path / "again.txt", two_folds(), NAMES, {})
    np.testing.assert_array_equal(
        read_cross_validation(tmp_path / "again.txt")["Dice"][1], [0.9123, math.nan]
    )


def test_folds_without_cases_and_cases_in_two_folds(tmp_path):
    first, second = two_folds()
    write_cross_validation(tmp_path / "cv.txt", [first, []], NAMES, {})
    assert np.isnan(read_cross_validation(tmp_path / "cv.txt")["ASD"][1]).all()
    with pytest.raises(ValueError, match="case a was tested in fold 0 and in fold 1"):
        write_cross_validation(tmp_path / "cv.txt", [first, [*second, first[0]]], NAMES, {})
    with pytest.raises(ValueError, match="no fold has a scored case"):
        write_cross_validation(tmp_path / "cv.txt", [[], []], NAMES, {})
