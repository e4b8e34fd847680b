"""amos_lha/segment.py, region.py, predict.py, pictures.py: organs on the scan's own grid."""

import contextlib
import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from amos_lha import predict
from amos_lha import segment as segment_module
from amos_lha.networks import get_model
from amos_lha.organs import COMPACT, LIVER, NUM_CLASSES, ORGANS, PARTED, SIDES, SPLEEN
from amos_lha.region import find_region, scaling_of, scan_modality
from amos_lha.segment import segment
from common.checkpoints import TrainedModel, save_checkpoint
from common.hardware import Precision
from common.intensity import Scaling, mr_scaling
from common.nifti import load_label, load_nifti, open_nifti, write_nifti
from common.prediction import check_tta, mirrored_classes

CPU = torch.device("cpu")
FP32 = Precision("fp32", None, False, "test")
CT_SCALING = [-100.0, 300.0, 0.0, 100.0]  # low, high, mean, sd
STOMACH = 7


class Bands(torch.nn.Module):
    """A network that needs no training: an organ where the scaled grey value is nearest to its own."""

    def __init__(self, values: dict[int, float]) -> None:
        super().__init__()
        self.values = values

    def forward(self, image):
        scores = torch.full((len(image), NUM_CLASSES, *image.shape[2:]), -100.0)
        for label, value in self.values.items():
            scores[:, label] = -20 * (image[:, 0] - value).abs()
        return scores


class Sides(torch.nn.Module):
    """Tells kidneys apart by where they lie: what is bright is the right one in the right half of x."""

    def forward(self, image):
        bright = image[:, 0] > 0.5
        right = (torch.arange(image.shape[-1]) >= image.shape[-1] / 2).expand(bright.shape)
        scores = torch.zeros(len(image), NUM_CLASSES, *image.shape[2:])
        scores[:, 0] = 2.0 * ~bright
        scores[:, 2], scores[:, 3] = 2.0 * (bright & right), 2.0 * (bright & ~right)
        return scores


def model(
    network,
    patch=(16, 16, 16),
    spacing=(2.0, 2.0, 2.0),
    modality="ct",
    scaling=CT_SCALING,
    labelled=tuple(ORGANS),
):
    preprocessing = {"spacing_mm": list(spacing), "modality": modality, "scaling": scaling}
    preprocessing["labelled"] = list(labelled)
    config = {"patch_size": list(patch)}
    return TrainedModel(network.eval(), config, CPU, FP32, preprocessing, {"train": []})


def body(shape=(30, 40, 50)):
    """CT of a body of 0 HU in air, with a liver of 100 HU and a spleen of 200 HU; and its labels."""
    labels = np.zeros(shape, np.uint8)
    labels[8:18, 12:24, 28:40], labels[10:16, 10:16, 10:16] = LIVER, SPLEEN
    image = np.full(shape, -1000, np.int16)
    image[4:26, 6:34, 6:44] = 0
    image[labels == LIVER], image[labels == SPLEEN] = 100, 200
    return image, labels


ORGANS_BY_HU = Bands({0: 0.0, LIVER: 1.0, SPLEEN: 2.0})  # HU / 100, as CT_SCALING makes them


# ---- clean-up ----


def test_clean_up_treats_each_organ_in_its_way():
    """Stomach and duodenum stay as they are; of all others a voxel beside 100 is a stray piece."""
    assert sorted({*COMPACT, *PARTED} ^ set(ORGANS)) == [STOMACH, 13] and not {*COMPACT} & {*PARTED}
    assert set(PARTED) == {5, 8, 9, 10} and (ORGANS[LIVER], ORGANS[SPLEEN]) == ("liver", "spleen")


# ---- flips ----


def test_labels_that_change_sides_in_a_mirror():
    expected = list(range(16))
    expected[2], expected[3], expected[11], expected[12] = 3, 2, 12, 11
    assert mirrored_classes(NUM_CLASSES, SIDES) == expected and SIDES == ((2, 3), (11, 12))


@pytest.mark.parametrize("flips", [((2,),), ((), (0,), (1,), (2,)), segment_module.FLIPS])
def test_left_and_right_survive_flips(monkeypatch, flips):
    """One window as large as the scan, so that "the right half" is that of the patient."""
    monkeypatch.setattr(segment_module, "FLIPS", flips)
    image = np.zeros((16, 16, 16), np.int16)
    image[4:9, 5:11, 1:5] = image[4:9, 5:11, 11:15] = 300
    share = {k: np.zeros(image.shape, np.uint8) for k in (2, 3)}
    pred = segment(
        model(Sides()), image, (2, 2, 2), Scaling(*CT_SCALING), "ct", tta=True, probabilities=share
    )
    assert (pred[4:9, 5:11, 11:15] == 2).all() and (pred[4:9, 5:11, 1:5] == 3).all()
    assert (pred > 0).sum() == 2 * 5 * 6 * 4
    alone = np.exp(2) / (np.exp(2) + 15)  # one score of 2 among 15 of 0, whatever the flip
    assert share[2].max() == share[3].max() == round(255 * alone)


def test_flips_are_left_to_right_and_only_if_asked_for():
    calls = []

    class Count(torch.nn.Module):
        def forward(self, image):
            calls.append(image.clone())
            return torch.zeros(len(image), NUM_CLASSES, *image.shape[2:])

    image = np.random.default_rng(0).integers(-100, 300, (16, 16, 16)).astype(np.int16)
    segment(model(Count()), image, (2, 2, 2), Scaling(*CT_SCALING), "ct")
    assert len(calls) == 1
    segment(model(Count()), image, (2, 2, 2), Scaling(*CT_SCALING), "ct", tta=True)
    plain, same, mirrored = calls
    assert torch.equal(same, plain) and torch.equal(mirrored, plain.flip(4))


def test_flips_only_for_networks_that_were_trained_with_them():
    trained = model(ORGANS_BY_HU)
    for flip_sides in (0.0, 0.5):
        trained.config["flip_sides"] = flip_sides
        with contextlib.nullcontext() if flip_sides else pytest.raises(ValueError, match="--tta"):
            check_tta(trained)


# ---- modality and scaling ----


def test_organs_that_no_training_case_had_labels_for_are_background():
    """Liver 2, stomach 1.8 and background 1.5: without labels of the stomach, it and the background win."""

    class Everywhere(torch.nn.Module):
        def forward(self, image):
            logits = torch.zeros(len(image), NUM_CLASSES, *image.shape[2:])
            logits[:, [0, 6, 7]] = torch.tensor([1.5, 2.0, 1.8]).view(1, 3, 1, 1, 1)
            return logits

    def found(labelled):
        trained = model(Everywhere(), labelled=labelled)
        volume = np.full((20, 20, 20), 40, np.int16)
        return np.unique(segment(trained, volume, (3, 3, 3), Scaling(*CT_SCALING), "ct")).tolist()

    assert found(tuple(ORGANS)) == [6]
    assert found((1, 6)) == [0], "log(e^1.5 + e^1.8 + 12 e^0) = 3.14"


def test_modality_by_flag_name_model_or_values():
    ct, mr = np.array([-1000, -100, 50, 100] * 20), np.array([0, 300, 500, 900] * 20)
    assert scan_modality("amos_0507", "ct", "both", mr) == "ct", "the flag wins"
    assert scan_modality("amos_0499", "auto", "both", mr) == "ct"
    assert scan_modality("amos_0500", "auto", "mr", ct) == "mr", "AMOS's number"
    assert scan_modality("patient7", "auto", "ct", mr) == "ct", "what the model knows"
    assert (scan_modality("a", "auto", "both", ct), scan_modality("a", "auto", "both", mr)) == ("ct", "mr")


def test_scans_of_the_other_modality_are_refused(tmp_path):
    write_nifti(tmp_path / "amos_0507.nii.gz", body()[0], (2, 2, 2))
    file = open_nifti(tmp_path / "amos_0507.nii.gz")
    ct_model, mr_model = model(Bands({})), model(Bands({}), modality="mr", scaling=None)
    message = "amos_0507: a scan of MR, but the model was trained on CT only.* --modality ct"
    with pytest.raises(ValueError, match=message):
        find_region(file, ct_model)
    assert find_region(file, ct_model, wish="ct")[0] == "ct"
    assert find_region(file, mr_model) == ("mr", ((0, 0, 0), file.shape))
    with pytest.raises(ValueError, match="a scan of CT, but the model was trained on MR only"):
        find_region(file, mr_model, wish="ct")


def test_the_body_of_a_ct_is_searched_with_a_margin_of_10_mm(tmp_path):
    """Voxels of 4 mm, taken one by one: 10 mm are 3 voxels."""
    write_nifti(tmp_path / "scan.nii.gz", body()[0], (4, 4, 4))
    file = open_nifti(tmp_path / "scan.nii.gz")
    assert find_region(file, model(Bands({}))) == ("ct", ((1, 3, 3), (29, 37, 47)))
    assert find_region(file, model(Bands({})), whole_scan=True) == ("ct", ((0, 0, 0), file.shape))


def test_grey_values_are_scaled_by_the_fingerprint_or_by_the_scan():
    image = np.random.default_rng(0).integers(0, 900, (10, 10, 10)).astype(np.int16)
    assert scaling_of(model(Bands({})), "ct", image) == Scaling(*CT_SCALING)
    assert scaling_of(model(Bands({})), "mr", image) == mr_scaling(image)


# ---- the command ----


def run(monkeypatch, network_model, source, out, *flags) -> int:
    monkeypatch.setattr(predict, "load_trained", lambda *args: network_model)
    base = ["--weights", "run/weights/best.pt", "--source", source, "--out", out]
    return predict.main([str(f) for f in (*base, "--device", "cpu", "--amp", "off", *flags)])


def table(out) -> list[dict]:
    with (out / "volumes.csv").open(encoding="utf8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "PIR"])
def test_masks_lie_on_the_scans_grid(tmp_path, monkeypatch, orientation):
    image, labels = body()
    write_nifti(tmp_path / "case.nii.gz", image, (2, 2, 2), orientation=orientation, origin_mm=(3, -4, 5))
    out = tmp_path / "out"
    assert run(monkeypatch, model(ORGANS_BY_HU), tmp_path / "case.nii.gz", out) == 0
    scan, mask = load_nifti(tmp_path / "case.nii.gz"), load_label(out / "case_mask.nii.gz")
    np.testing.assert_array_equal(mask.array, labels)
    np.testing.assert_array_equal(mask.file_affine, scan.file_affine)
    assert mask.array.dtype == np.uint8 and mask.header["sform_code"] == scan.header["sform_code"]
    (row,) = table(out)
    assert float(row["liver_ml"]) == pytest.approx(10 * 12 * 12 * 8 / 1000)
    assert float(row["spleen_ml"]) == pytest.approx(6**3 * 8 / 1000)
    assert float(row["left_adrenal_gland_ml"]) == 0 and row["modality"] == "ct" and row["organs"] == "2"
    assert len([key for key in row if key.endswith("_ml")]) == 15 + 1  # and removed_ml
    note = json.loads((out / "case.json").read_text())
    assert note["volume_ml"]["liver"] == pytest.approx(11.52) and note["clean_up"] == {}
    assert note["region"] == {"start": [0, 1, 1], "stop": [30, 39, 49], "axes": "z y x in RAS"}
    assert Image.open(out / "case_preview.png").size[0] > 300


def test_pictures_that_fail_cost_the_pictures_alone(tmp_path, monkeypatch, capsys):
    def fails(*_, **__):
        raise IndexError("index 65 is out of bounds")

    write_nifti(tmp_path / "case.nii.gz", body()[0], (2, 2, 2))
    for name in ("save_planes", "save_views"):
        monkeypatch.setattr(predict, name, fails)
    assert run(monkeypatch, model(ORGANS_BY_HU), tmp_path / "case.nii.gz", tmp_path / "out", "--save_3d") == 0
    told = capsys.readouterr().out
    assert (
        "warning: case_preview.png is left out: IndexError: index 65" in told
        and "case_3d.png is left" in told
    )
    assert float(table(tmp_path / "out")[0]["liver_ml"]) == pytest.approx(11.52)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "case_mask.nii.gz",
        "case.json",
        "volumes.csv",
    }


def test_what_clean_up_removes_is_reported_and_can_be_kept(tmp_path, monkeypatch):
    image, labels = body()
    image[20:22, 20:22, 20:22] = 100
    write_nifti(tmp_path / "case.nii.gz", image, (2, 2, 2))
    flags = (tmp_path / "case.nii.gz", tmp_path / "out", "--save_preview", "False")
    assert run(monkeypatch, model(ORGANS_BY_HU), *flags) == 0
    np.testing.assert_array_equal(load_label(tmp_path / "out/case_mask.nii.gz").array, labels)
    note = json.loads((tmp_path / "out/case.json").read_text())
    assert note["clean_up"] == {"liver": {"removed_ml": pytest.approx(0.064), "components": 1}}
    assert float(table(tmp_path / "out")[0]["removed_ml"]) == pytest.approx(0.064)
    assert run(monkeypatch, model(ORGANS_BY_HU), *flags, "--no-clean_up") == 0
    kept = load_label(tmp_path / "out/case_mask.nii.gz").array
    assert (kept > 0).sum() == (labels > 0).sum() + 8
    assert not (tmp_path / "out/case_preview.png").exists()


def test_pieces_of_the_stomach_stay(tmp_path, monkeypatch):
    image, _ = body()
    image[20:22, 20:22, 20:22] = 200  # 8 voxels beside 216
    write_nifti(tmp_path / "case.nii.gz", image, (2, 2, 2))
    network = Bands({0: 0.0, LIVER: 1.0, STOMACH: 2.0})
    assert run(monkeypatch, model(network), tmp_path / "case.nii.gz", tmp_path / "out") == 0
    assert (load_label(tmp_path / "out/case_mask.nii.gz").array == STOMACH).sum() == 216 + 8


def test_nothing_is_predicted_outside_of_the_body(tmp_path, monkeypatch):
    """A network that takes air for liver; the box of the body with its margin of 5 voxels."""
    write_nifti(tmp_path / "case.nii.gz", body()[0], (2, 2, 2))
    network = Bands({0: 0.0, LIVER: -1.0})
    flags = (tmp_path / "case.nii.gz", tmp_path / "out", "--save_preview", "False")
    assert run(monkeypatch, model(network), *flags) == 0
    found = load_label(tmp_path / "out/case_mask.nii.gz").array == LIVER
    inside = np.zeros(found.shape, bool)
    inside[:, 1:39, 1:49] = True
    assert found[inside].any() and not found[~inside].any()
    assert run(monkeypatch, model(network), *flags, "--no_roi") == 0
    assert (load_label(tmp_path / "out/case_mask.nii.gz").array == LIVER)[~inside].any()


def test_dark_windows_are_air_in_a_ct_only():
    image = np.full((16, 16, 16), -800, np.int16)
    network = model(Bands({LIVER: -1.0}))
    scaling = Scaling(-900.0, -700.0, -700.0, 100.0)  # -800 becomes -1
    assert not segment(network, image, (2, 2, 2), scaling, "ct").any()
    assert (segment(network, image, (2, 2, 2), scaling, "mr") == LIVER).all()


def test_mirrored_scans_and_empty_masks_are_told(tmp_path, monkeypatch, capsys):
    image, _ = body()
    write_nifti(tmp_path / "mirrored.nii.gz", image[:, :, ::-1], (2, 2, 2))
    write_nifti(tmp_path / "empty.nii.gz", np.minimum(image, 0), (2, 2, 2))
    assert run(monkeypatch, model(ORGANS_BY_HU), tmp_path, tmp_path / "out", "--save_3d") == 0
    told = capsys.readouterr().out
    assert "mirrored.nii.gz: the liver lies left of the spleen" in told
    assert "empty.nii.gz: no organ found" in told and "empty.nii.gz: the liver" not in told
    rows = {row["scan"].split("/")[-1]: row for row in table(tmp_path / "out")}
    assert rows["mirrored.nii.gz"]["looks_mirrored"] == "True"
    assert rows["empty.nii.gz"]["looks_mirrored"] == "False"
    assert "2 of 2 scan(s) written" in told and "mirrored.nii.gz: 2 organ(s), " in told
    gif = Image.open(tmp_path / "out/mirrored_turntable.gif")
    assert gif.n_frames == 24 and (tmp_path / "out/mirrored_3d.png").is_file()
    assert not (tmp_path / "out/empty_3d.png").exists()


def test_probability_maps_only_of_the_organs_asked_for(tmp_path, monkeypatch):
    image, labels = body()
    write_nifti(tmp_path / "case.nii.gz", image, (2, 2, 2), orientation="LPS")
    out = tmp_path / "out"
    flags = ("--save_probabilities", 1, 12, "--no_roi")
    assert run(monkeypatch, model(ORGANS_BY_HU), tmp_path / "case.nii.gz", out, *flags) == 0
    maps = sorted(path.name for path in (out / "probabilities").iterdir())
    assert maps == ["case_01.nii.gz", "case_12.nii.gz"]
    spleen, adrenal = (load_nifti(out / "probabilities" / name).array for name in maps)
    assert spleen.shape == labels.shape and not adrenal.any()
    assert (spleen[labels == SPLEEN] > 0.99).all() and (spleen[labels != SPLEEN] < 0.01).all()
    assert not list(out.glob(".maps*"))


def test_nothing_is_said_of_organs_without_labels_in_training(tmp_path, monkeypatch):
    write_nifti(tmp_path / "scan.nii.gz", body()[0], (2, 2, 2))
    part = model(ORGANS_BY_HU)
    part.preprocessing["labelled"] = [LIVER]
    assert run(monkeypatch, part, tmp_path / "scan.nii.gz", tmp_path / "out") == 0
    row = table(tmp_path / "out")[0]
    assert row["spleen_ml"] == "" and float(row["liver_ml"]) > 0 and row["organs"] == "1"
    with pytest.raises(SystemExit, match="not trained on labels of spleen"):
        run(monkeypatch, part, tmp_path / "scan.nii.gz", tmp_path / "out", "--save_probabilities", "1", "6")


def test_one_bad_scan_does_not_cost_the_others(tmp_path, monkeypatch, capsys):
    write_nifti(tmp_path / "amos_0600.nii.gz", body()[0], (2, 2, 2))
    write_nifti(tmp_path / "amos_0001.nii.gz", body()[0], (2, 2, 2))
    (tmp_path / "cut.nii.gz").write_bytes((tmp_path / "amos_0001.nii.gz").read_bytes()[:500])
    assert run(monkeypatch, model(ORGANS_BY_HU), tmp_path, tmp_path / "out") == 1
    told = capsys.readouterr().out
    assert "1 of 3 scan(s) written" in told and len(table(tmp_path / "out")) == 1
    assert "amos_0600: a scan of MR, but the model was trained on CT only" in told
    assert "failed: " in told and "cut.nii.gz: truncated" in told
    with pytest.raises(SystemExit, match=r"1 file\(s\) are left out as results"):
        run(monkeypatch, model(ORGANS_BY_HU), tmp_path / "out", tmp_path / "again")


def test_an_mr_is_predicted_whole_with_its_own_scaling(tmp_path, monkeypatch):
    image = body()[0] + 1000
    scaling = mr_scaling(image)
    values = {0: (1000 - scaling.mean) / scaling.sd, LIVER: (1100 - scaling.mean) / scaling.sd}
    write_nifti(tmp_path / "amos_0600.nii.gz", image, (2, 2, 2))
    mr_model = model(Bands(values), modality="mr", scaling=None)
    mr_model.config["flip_sides"] = 0.5
    assert run(monkeypatch, mr_model, tmp_path / "amos_0600.nii.gz", tmp_path / "out", "--tta") == 0
    pred = load_label(tmp_path / "out/amos_0600_mask.nii.gz").array
    np.testing.assert_array_equal(pred == LIVER, body()[1] == LIVER)
    note = json.loads((tmp_path / "out/amos_0600.json").read_text())
    assert note["modality"] == "mr" and note["scaling"] == pytest.approx(scaling._asdict())
    assert note["region"]["stop"] == list(image.shape)


def test_a_checkpoint_is_enough(tmp_path):
    """A network of random weights, as train.py stores it, on a scan smaller than a patch."""
    config = {"model": "LHANet", "preset": "tiny", "heads": "size_aware", "attention": True, "router": False,
              "deep_supervision": False, "checkpointing": "none",
              "feature_size": 24, "patch_size": [32, 32, 32]}  # fmt: skip
    torch.manual_seed(0)
    state = {
        "model": get_model(config, (4.0, 4.0, 4.0)).state_dict(),
        "config": config,
        "stage": "amos_lha",
        "preprocessing": {
            "spacing_mm": [4.0, 4.0, 4.0],
            "modality": "both",
            "scaling": CT_SCALING,
            "labelled": list(ORGANS),
        },
        "split": {"train": [], "val": [], "test": []},
    }
    weights = tmp_path / "run/weights/best.pt"
    weights.parent.mkdir(parents=True)
    save_checkpoint(weights, state)
    write_nifti(tmp_path / "scan.nii.gz", body()[0], (3, 2, 2))
    flags = ["--weights", weights, "--source", tmp_path / "scan.nii.gz", "--device", "cpu", "--amp", "off"]
    assert predict.main([str(f) for f in flags]) == 0
    mask = load_label(tmp_path / "run/predictions/scan_mask.nii.gz")
    assert mask.shape == (30, 40, 50) and mask.array.max() < NUM_CLASSES
