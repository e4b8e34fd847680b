"""Segmentation of slices, maps, prediction and evaluation of wsss_medical, with networks known by heart."""

import csv
import json
import math
import os

import nibabel
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from common import nifti_checks
from common.cells import propagated_cam
from common.checkpoints import TrainedModel, save_checkpoint
from common.hardware import Precision
from common.mit import MEAN, SD
from common.nifti import load_label, load_nifti, save_label, write_nifti
from common.raw_layouts import find_sequences
from common.slices import volume_to_slices
from common.wetr import Output
from wsss_medical import evaluate, gen_attn, maps, predict
from wsss_medical.dataset import MedicalSliceDataset
from wsss_medical.evaluate import BY_SCORE, BY_TRUTH, evaluate_split
from wsss_medical.maps import generate_maps
from wsss_medical.model import get_model
from wsss_medical.segment import part_of, segment_slices, threshold_of

CPU = torch.device("cpu")
FP32 = Precision("fp32", None, False, "test")
CONFIG = {"backbone": "tiny", "num_classes": 2, "pooling": "gmp", "scales": [1.0], "radius": 8}
NOTES = {"dataset": "LASC", "channels": ["lge"], "pixel_mm": None, "step": 1}


class BrightIsIt(torch.nn.Module):
    """Needs no training: bright pixels are the structure, and slices with one of them show it."""

    def forward(self, image):
        mean, sd = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, SD))
        grey = ((image * sd + mean) / 255)[:, :1]
        margin = 20 * (grey - 0.5)
        cells = F.avg_pool2d(grey, 16, ceil_mode=True, count_include_pad=False)
        n = cells[0].numel()
        is_dark = (margin.amax((2, 3)) < 0).float()[:, :, None]  # then all cells are alike
        return Output(
            cls=margin.amax((2, 3)),
            seg=torch.cat([-margin, margin], 1),
            attn_pred=torch.maximum(torch.eye(n), is_dark.expand(-1, n, n)),
            attentions=[],
            tokens=cells,
            aux_cls=None,
            aux_cam=None,
            cam=cells,
        )

    def cam_only(self, image):
        output = self(image)
        return output.cam, output.attn_pred, output.attentions

    def last_attention(self, image):
        n = self(image).attn_pred.shape[1]
        return [torch.full((len(image), 8, n, n), float(k)) for k in range(4)]


class LeftIsIt(BrightIsIt):
    """Says the structure is in the left half, whatever it sees."""

    def forward(self, image):
        output = super().forward(image)
        margin = torch.full_like(output.seg[:, :1], -50.0)
        margin[..., : margin.shape[-1] // 2] = 50.0
        return output._replace(seg=torch.cat([-margin, margin], 1))


def bright_model(network=None, split=None, **notes) -> TrainedModel:
    split = split or {"train": [], "val": [], "test": []}
    return TrainedModel((network or BrightIsIt()).eval(), dict(CONFIG), CPU, FP32, NOTES | notes, split)


def blob(size=(32, 32), rows=slice(0, 16), columns=slice(0, 16), value=255) -> np.ndarray:
    image = np.full(size, 51, np.uint8)  # 0.2: margin -6
    image[rows, columns] = value
    return image


# ---- segment ----


def test_results_of_slices():
    """Bright quarter: probability near 1 in it, near 0 beside it; its CAM of 2 x 2 cells is highest there."""
    bright, dark = blob(), blob(value=51)
    first, second = segment_slices(bright_model(), [bright, dark], scales=(1.0,))
    assert first.score == pytest.approx(1 / (1 + math.exp(-10))) and second.score == pytest.approx(
        1 / (1 + math.exp(6))
    )
    inside = np.zeros((32, 32), bool)
    inside[:16, :16] = True
    # softmax of -10 and 10, and of 6 and -6
    assert first.seg[inside] == pytest.approx(1 / (1 + math.exp(-20)))
    assert first.seg[~inside] == pytest.approx(1 / (1 + math.exp(12)), rel=1e-3)
    assert first.cam_raw[0, 0] == pytest.approx(1) and first.cam_raw[-1, -1] == pytest.approx(0.2, abs=1e-6)
    assert first.cam[0, 0] == pytest.approx(1, abs=1e-4) and first.cam[-1, -1] < 1e-6
    assert second.cam.max() < 0.01 and first.attention is None
    assert all(a.dtype == np.float32 and a.shape == (32, 32) for a in first[1:5])


def test_order_and_batches_do_not_matter():
    """Slices of several shapes, grey and in colour, come back one by one, each at its own size."""
    rng = np.random.default_rng(0)
    shapes = [(64, 80), (64, 80), (70, 65), (64, 80, 3), (64, 80, 3), (64, 80)]
    slices = [rng.integers(0, 256, shape).astype(np.uint8) for shape in shapes]
    torch.manual_seed(0)
    model = bright_model(get_model(CONFIG))
    one = list(segment_slices(model, iter(slices), scales=(1.0, 0.5), batch_size=1))
    many = list(segment_slices(model, slices, scales=(1.0, 0.5), batch_size=4))
    assert [r.seg.shape for r in one] == [shape[:2] for shape in shapes]
    for a, b in zip(one, many, strict=True):
        assert a.score == pytest.approx(b.score, abs=1e-5)
        for name in ("seg", "cam", "affinity"):
            assert np.abs(getattr(a, name) - getattr(b, name)).max() < 2e-3, name
            assert getattr(a, name).min() >= 0 and getattr(a, name).max() <= 1


def test_slices_are_read_when_they_are_needed():
    read = []

    def slices():
        for k in range(6):
            read.append(k)
            yield blob()

    results = segment_slices(bright_model(), slices(), batch_size=2)
    next(results)
    assert len(read) <= 3


def test_mean_with_the_mirror_image():
    """A network that always says left says half on either side after averaging with the mirror image."""
    (result,) = segment_slices(bright_model(LeftIsIt()), [blob()], cams=False)
    assert result.seg == pytest.approx(np.full((32, 32), 0.5))
    assert result.cam is None and result.affinity is None


def test_gate_empties_slices_and_leaves_the_others():
    slices = [blob(value=51), blob(), blob(value=51)]
    gated = list(segment_slices(bright_model(), slices, gate=0.5, batch_size=3))
    free = list(segment_slices(bright_model(), slices, batch_size=3))
    for k in (0, 2):
        assert not any(a.any() for a in gated[k][1:5]) and free[k].seg.any()
    for a, b in zip(gated[1][1:5], free[1][1:5], strict=True):
        assert np.array_equal(a, b) and a.any()
    assert [r.score for r in gated] == [r.score for r in free]
    nothing = list(segment_slices(bright_model(), slices[:1], gate=0.5))
    assert not nothing[0].cam.any()


def test_attention_on_request():
    (result,) = segment_slices(bright_model(), [blob((32, 48))], attention=True)
    assert np.array_equal(result.attention["attn_pred"], np.eye(6))
    assert (result.attention["attn_layer_1"] == 1).all() and result.attention["attn_layer_0"].shape == (
        8,
        6,
        6,
    )


def test_propagation_by_hand():
    """Cells 1 and 0. Alone they keep their values. If all are alike, each has the mean of the shares:
    e / (e + e^.35) = .6570 and 1 / (1 + e^.35) = .4134, so log(.5352 / .4648) + .35 = .4910."""
    cam = torch.zeros(1, 1, 16, 32)
    cam[..., :16] = 1
    alone = propagated_cam(cam, torch.eye(2)[None], 8)
    assert alone[0, 0, 0, [0, -1]].tolist() == pytest.approx([1, 0], abs=1e-5)
    alike = propagated_cam(cam, torch.ones(1, 2, 2), 8)
    assert alike.flatten().tolist() == pytest.approx([0.4910] * 512, abs=2e-4)
    apart = propagated_cam(cam, torch.ones(1, 2, 2), 0)
    assert apart[0, 0, 0, [0, -1]].tolist() == pytest.approx([1, 0], abs=1e-5), "outside of the radius"


def test_training_can_use_what_validation_cached():
    """Masks that are kept for all later calls must not be tensors that backward refuses."""
    from common.cells import get_mask_by_radius

    get_mask_by_radius.cache_clear()
    list(segment_slices(bright_model(), [blob()]))
    weight = torch.ones(4, 4, requires_grad=True)
    (weight * get_mask_by_radius(2, 2, 8)).sum().backward()
    assert weight.grad.sum() == 16


# ---- slices on disk ----


@pytest.fixture
def folder(tmp_path):
    """Two patients of two slices, a bright quarter in the second ones; the masks are its upper half."""
    root = tmp_path / "data"
    (root / "imageSlice").mkdir(parents=True)
    (root / "maskSlice").mkdir()
    for patient in (1, 2):
        for z, label in ((0, 0), (1, 1)):
            mask = np.zeros((32, 32), np.uint8)
            mask[:8, :16] = label
            stem = f"LASC_{patient:03d}_{z:03d}_{label}"
            np.save(root / "imageSlice" / f"{stem}.npy", blob(value=255 if label else 51))
            np.save(root / "maskSlice" / f"{stem}.npy", mask)
    return root


NAMES = ["LASC_001_000_0", "LASC_001_001_1", "LASC_002_000_0", "LASC_002_001_1"]


def test_part_of_the_split(folder):
    split = {"train": NAMES[2:], "val": NAMES[:2], "test": []}
    model = bright_model(split=split, data_path=str(folder))
    assert part_of(model, None, "val") == (folder, NAMES[:2])
    assert part_of(model, None, "all") == (folder, NAMES)
    with pytest.raises(ValueError, match="no part 'test'"):
        part_of(model, None, "test")
    other = bright_model(split={"train": ["A_1_1_1"], "val": ["A_2_1_1"], "test": []})
    assert part_of(other, str(folder), "test")[1] == NAMES, "of another data set every slice is new"
    with pytest.raises(ValueError, match="--data_path"):
        part_of(other, None, "test")


def test_threshold_of_a_model():
    assert threshold_of(bright_model(), "seg") == 0.5
    assert threshold_of(bright_model(threshold={"seg": 0.3}), "seg") == 0.3
    assert threshold_of(bright_model(threshold={"seg": 0.3}), "cam") == 0.5


# ---- maps ----


def test_every_file_of_the_maps(folder, tmp_path):
    data = MedicalSliceDataset(folder, NAMES)
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / f"{NAMES[1]}_0.123.png").touch()  # of an earlier checkpoint
    folders = [tmp_path / "maps", tmp_path / "cams", tmp_path / "attention"]
    counts, failed = generate_maps(bright_model(), data, *folders, scales=(1.0,), batch_size=3)
    assert counts == {"slices": 4, "positives": 2} and not failed
    expected = [f"{n}_{'1.000' if n.endswith('1') else '0.002'}.png" for n in NAMES]
    assert sorted(p.name for p in folders[0].iterdir()) == sorted(expected)
    picture = np.asarray(Image.open(folders[0] / expected[1]))
    # White of its own slice and (.5, 0, 0) of the map, divided by 2: white and the full green in between.
    assert picture[0, 0].tolist() == [191, 128, 128]
    assert picture[0, 0].tolist()[0] > picture[0, 0].tolist()[2] and picture[-1, -1, 2] > picture[-1, -1, 0]
    dark = np.load(folders[1] / f"{NAMES[2]}.npy", allow_pickle=True).item()
    found = np.load(folders[1] / f"{NAMES[3]}.npy", allow_pickle=True).item()
    assert sorted(found) == ["cam", "cam_raw", "cls_label", "pred_score", "scales"]
    assert type(found["pred_score"]) is float and found["pred_score"] > 0.99 > dark["pred_score"]
    assert found["cls_label"].tolist() == [1] and found["cls_label"].dtype == np.uint8
    assert dark["cls_label"].tolist() == [0] and found["scales"] == [1.0]
    assert found["cam"].dtype == np.float32 and found["cam"].max() < 1
    assert found["cam_raw"].min() == pytest.approx(0.2, abs=1e-6), "as summed, not from 0 to 1"
    twin = np.load(folders[1] / f"{NAMES[3]}.npz", allow_pickle=False)
    assert all(np.array_equal(twin[key], found[key]) for key in found)
    attention = np.load(folders[2] / f"{NAMES[0]}.npy", allow_pickle=True).item()
    assert attention["num_attn_layers"] == 4 and attention["attn_layer_1"].dtype == np.float32
    assert attention["attn_pred"].shape == (4, 4)


def test_a_slice_that_cannot_be_read_costs_only_its_patient(folder, tmp_path):
    (folder / "imageSlice" / f"{NAMES[1]}.npy").write_bytes(b"no slice")
    data = MedicalSliceDataset(folder, NAMES)
    counts, failed = generate_maps(bright_model(), data, tmp_path / "a", tmp_path / "b")
    assert counts["slices"] == 2 and list(failed) == ["LASC_001"] and NAMES[1] in failed["LASC_001"]


@pytest.fixture
def checkpoint(folder, tmp_path):
    """Random weights as dist_train.py writes them; a second checkpoint as the last of the run."""
    torch.manual_seed(0)
    state = {"model": get_model(CONFIG).state_dict(), "config": CONFIG, "stage": "wsss_medical"}
    state["preprocessing"] = NOTES | {"data_path": str(folder)}
    state["split"] = {"train": NAMES[2:], "val": NAMES[:2], "test": NAMES[2:]}
    path = tmp_path / "work" / "checkpoints" / "best.pth"
    path.parent.mkdir(parents=True)
    for name in ("best", "wetr_iter_900", "wetr_iter_1000"):
        save_checkpoint(path.with_name(f"{name}.pth"), state)
    return path


def test_gen_attn_finds_everything_by_the_checkpoint(checkpoint, capsys):
    assert (
        gen_attn.main(["--checkpoint", str(checkpoint), "--save_attn", "--device", "cpu", "--amp", "off"])
        == 0
    )
    work = checkpoint.parents[1]
    assert {p.stem[:14] for p in (work / "attention_maps").iterdir()} == set(NAMES[:2])
    assert len(list((work / "cam_npy").iterdir())) == 4 and len(list((work / "attn_npy").iterdir())) == 2
    assert "2 slices" in capsys.readouterr().out


def test_gen_attn_by_the_training_config(checkpoint, tmp_path):
    """Only work_dir and data_path of the file count; what else stands in it is for training."""
    config = tmp_path / "lasc.yaml"
    config.write_text(f"dataset: LASC\nmax_iters: 10000\nbatch_size: 4\nwork_dir: {checkpoint.parents[1]}\n")
    words = ["--config", str(config), "--use_final", "--split", "all", "--device", "cpu", "--amp", "off"]
    out = ["--output_dir", str(tmp_path / "p"), "--cam_npy_dir", str(tmp_path / "c"), "--scales", "1", "1.5"]
    checkpoint.unlink()
    assert gen_attn.main([*words, *out]) == 0
    assert len(list((tmp_path / "p").iterdir())) == 4
    assert np.load(tmp_path / "c" / f"{NAMES[0]}.npz")["scales"].tolist() == [1, 1.5]
    assert not (checkpoint.parents[1] / "attn_npy").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a model"),
        (["--checkpoint", "BEST", "--pooling", "gap"], "trained with --pooling gmp"),
        (["--checkpoint", "BEST", "--data_path", "nowhere"], "nowhere"),
        (["--checkpoint", "EMPTY/best.pth", "--use_final"], "no wetr_iter"),
        (["--config", "voc.yaml"], "VOC and COCO"),
    ],
)
def test_gen_attn_says_what_is_missing(words, message, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "voc.yaml").write_text("dataset: VOC12\nwork_dir: w\n")
    words = [str(checkpoint) if word == "BEST" else word for word in words]
    with pytest.raises(SystemExit, match=message):
        gen_attn.main([*words, "--device", "cpu", "--amp", "off"])


def test_use_final_counts_iterations_as_numbers(checkpoint):
    assert gen_attn.find_checkpoint(str(checkpoint), None, True).name == "wetr_iter_1000.pth"
    assert gen_attn.find_checkpoint(None, str(checkpoint.parents[1]), False) == checkpoint


# ---- predict ----


def run_predict(source, out, *flags) -> int:
    words = ["--weights", "w/checkpoints/best.pth", "--source", source, "--out", out, "--device", "cpu"]
    return predict.main([str(word) for word in [*words, "--amp", "off", *flags]])


def results(out) -> list[dict]:
    with (out / "results.csv").open(encoding="utf8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def use(monkeypatch):
    """use(model): predict.py gets this model whatever the weights."""
    return lambda model: monkeypatch.setattr(predict, "load_trained", lambda *_: model)


def box_scan(path, orientation="RAS", shape=(6, 40, 48), **kwargs) -> np.ndarray:
    """A scan with grey 100 and a box of 400 off the middle along every axis; returns where the box is."""
    inside = np.zeros(shape, bool)
    inside[1:4, 4:24, 8:28] = True
    write_nifti(
        path, np.where(inside, 400, 100).astype(np.int16), (5, 1, 2), orientation=orientation, **kwargs
    )
    return inside


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "PIR", "SAL"])
@pytest.mark.parametrize("pixel_mm", [None, 1.0])
def test_mask_lies_on_the_scans_own_grid(orientation, pixel_mm, tmp_path, use):
    path = tmp_path / "scan.nii.gz"
    inside = box_scan(path, orientation, origin_mm=(3, -7, 11))
    use(bright_model(pixel_mm=pixel_mm))
    assert run_predict(path, tmp_path / "out", "--overlay") == 0
    scan, mask = nibabel.load(path), nibabel.load(tmp_path / "out" / "scan_mask.nii.gz")
    assert mask.shape == scan.shape and np.array_equal(mask.affine, scan.affine)
    found = load_label(tmp_path / "out" / "scan_mask.nii.gz").array
    assert found.dtype == np.uint8
    wrong = np.count_nonzero(found != inside)
    assert wrong == 0 if pixel_mm is None else wrong < 0.06 * inside.sum()
    (row,) = results(tmp_path / "out")
    assert int(row["slices"]) == 6 and int(row["slices_with"]) == 3
    assert float(row["volume_ml"]) == pytest.approx(found.sum() * 10 / 1000)
    assert float(row["lowest_score"]) < 0.01 < 0.99 < float(row["highest_probability"])
    assert (tmp_path / "out" / "scan_overlay.png").stat().st_size > 1000


def test_threshold_of_the_training_unless_the_flag_says_another(tmp_path, use):
    """A grey level between: probability 1 / (1 + e^4) = .018 for 40 % grey."""
    image = blob(value=255)
    image[16:] = 102
    np.save(tmp_path / "a.npy", image)
    use(bright_model(threshold={"seg": 0.01}))
    assert run_predict(tmp_path / "a.npy", tmp_path / "low") == 0
    assert run_predict(tmp_path / "a.npy", tmp_path / "high", "--threshold", "0.5") == 0
    assert run_predict(tmp_path / "a.npy", tmp_path / "gated", "--gate", "0.99999") == 0
    assert not np.asarray(Image.open(tmp_path / "gated" / "a_mask.png")).any(), "its score is 0.99995"
    areas = [np.asarray(Image.open(tmp_path / f / "a_mask.png")) for f in ("low", "high")]
    assert [int((a == 255).sum()) for a in areas] == [16 * 16 + 16 * 32, 16 * 16]
    assert all(set(np.unique(a)) == {0, 255} for a in areas)


def test_slices_in_files(folder, tmp_path, use, capsys):
    """The gate leaves the dark slices empty; a map with --overlay; one file that is no slice fails alone."""
    (folder / "imageSlice" / "LASC_009_001_1.npy").write_bytes(b"x")
    use(bright_model())
    out = tmp_path / "out"
    assert run_predict(folder / "imageSlice", out, "--output", "cam", "--overlay", "--scales", "1") == 1
    masks = {n: np.asarray(Image.open(out / f"{n}_mask.png")) for n in NAMES}
    assert masks[NAMES[1]][0, 0] == 255 and not masks[NAMES[0]].any() and not masks[NAMES[1]][-1, -1]
    assert (out / f"{NAMES[1]}_1.000.png").is_file() and [r["volume_ml"] for r in results(out)] == [""] * 4
    text = capsys.readouterr().out
    assert "LASC_009_001_1.npy" in text and "4 of 5" in text


def test_clean_up_of_a_scan(tmp_path, use):
    """One voxel beside the box goes by either flag, a second box only with --largest_only."""
    volume = np.full((8, 48, 48), 100, np.int16)
    volume[1:6, 4:24, 4:24] = 400
    volume[1:6, 32:40, 32:40] = 400
    volume[3, 44, 4] = 400
    write_nifti(tmp_path / "scan.nii.gz", volume, (1, 1, 1))
    use(bright_model())
    counts = {}
    for flags in ((), ("--smooth_slices",), ("--largest_only",)):
        assert run_predict(tmp_path / "scan.nii.gz", tmp_path / f"out{len(counts)}", *flags) == 0
        mask = load_label(tmp_path / f"out{len(counts)}" / "scan_mask.nii.gz").array
        counts[flags] = (mask[1:6, 4:24, 4:24].sum(), mask[:, 28:, 28:].any(), mask[3, 44, 4])
    assert counts[()] == (2000, True, 1) and counts["--largest_only",] == (2000, False, 0)
    assert counts["--smooth_slices",][1:] == (True, 0) and 1800 < counts["--smooth_slices",][0] < 2000


def test_sequences_of_a_scan(tmp_path):
    """BraTS' files by their names, Decathlon's channels by dataset.json, any other file as it is."""
    case = tmp_path / "BraTS20_Training_001"
    case.mkdir()
    for name in ("flair", "t1ce", "t1", "t2", "seg"):
        box_scan(case / f"BraTS20_Training_001_{name}.nii.gz")
    flair, t1ce = (case / f"BraTS20_Training_001_{name}.nii.gz" for name in ("flair", "t1ce"))
    assert find_sequences(flair, ["flair", "t1ce"]) == [(flair, None), (t1ce, None)]
    box_scan(case / "BraTS20_Training_0010_adc.nii.gz")
    with pytest.raises(ValueError, match="needs the sequence adc"):
        find_sequences(flair, ["flair", "adc"])  # of a patient whose name begins alike
    gli = tmp_path / "BraTS-GLI-00005-000-t2f.nii.gz"
    box_scan(gli)
    assert find_sequences(gli, ["flair"]) == [(gli, None)]
    with pytest.raises(ValueError, match="needs the sequence t1ce; there is flair"):
        find_sequences(gli, ["flair", "t1ce"])
    (tmp_path / "imagesTs").mkdir()
    (tmp_path / "dataset.json").write_text(json.dumps({"modality": {"0": "FLAIR", "1": "t1gd"}}))
    path = tmp_path / "imagesTs" / "BRATS_001.nii.gz"
    assert find_sequences(path, ["t1ce"]) == [(path, 1)]
    assert find_sequences(tmp_path / "mine.nrrd", ["lge"]) == [(tmp_path / "mine.nrrd", None)]


def test_scans_called_alike_and_names_that_are_not_utf8(tmp_path, use):
    odd = os.fsdecode(b"caf\xe9")
    for case in ("case1", "case2", odd):
        (tmp_path / "in" / case).mkdir(parents=True)
        box_scan(tmp_path / "in" / case / "mr.nii.gz")
    np.save(tmp_path / "in" / f"{odd}.npy", blob())
    use(bright_model())
    assert run_predict(tmp_path / "in", tmp_path / "out", "--recursive", "--overlay") == 0
    found = {str(path.relative_to(tmp_path / "out").parent) for path in (tmp_path / "out").rglob("mr_mask.*")}
    assert found == {"case1", "case2", odd} and (tmp_path / "out" / f"{odd}_mask.png").is_file()
    assert sum(r"caf\udce9" in row["scan"] for row in results(tmp_path / "out")) == 2


def fails(*_, **__):
    raise IndexError("index 65 is out of bounds")


def test_pictures_that_fail_cost_the_pictures_alone(folder, tmp_path, use, monkeypatch, capsys):
    monkeypatch.setattr(predict, "save_planes", fails)
    monkeypatch.setattr(maps, "heat_picture", fails)
    use(bright_model())
    box_scan(tmp_path / "scan.nii")
    assert run_predict(tmp_path / "scan.nii", tmp_path / "scan", "--overlay") == 0
    assert run_predict(folder / "imageSlice", tmp_path / "slices", "--overlay") == 0
    told = capsys.readouterr().out
    assert "warning: scan_overlay.png is left out: IndexError: index 65 is out of bounds" in told
    assert f"warning: the picture of {NAMES[1]} is left out: IndexError" in told
    assert (tmp_path / "scan/scan_mask.nii.gz").is_file() and len(results(tmp_path / "slices")) == 4
    data = MedicalSliceDataset(folder, NAMES)
    counts, failed = generate_maps(bright_model(), data, tmp_path / "png", tmp_path / "cam")
    assert counts["slices"] == 4 and not failed
    assert len(list((tmp_path / "cam").iterdir())) == 8 and not list((tmp_path / "png").iterdir())


@pytest.mark.parametrize("output", ["seg", "cam"])
def test_a_scan_beyond_the_free_memory_is_refused(output, tmp_path, use, monkeypatch, capsys):
    """6 x 40 x 48 voxels take 11,520 float32 in two maps or in five: 92 or 230 kB."""
    box_scan(tmp_path / "scan.nii")
    use(bright_model())
    monkeypatch.setattr(nifti_checks, "ALWAYS_FREE", 0)
    free_kb = {"seg": 91, "cam": 229}[output]
    for kilobytes, code in ((free_kb + 2, 0), (free_kb, 1)):
        machine = (1, 1.0, 1000 * kilobytes / 2**30)
        monkeypatch.setattr("common.hardware.cores_and_ram_gib", lambda machine=machine: machine)
        assert run_predict(tmp_path / "scan.nii", tmp_path / "out", "--output", output) == code
    advice = "" if output == "seg" else "--output seg, or "
    last = capsys.readouterr().out.splitlines()[-1]
    assert "scan.nii: predicting it takes 0.0 GiB" in last
    assert last.endswith(f"are free; it needs {advice}a scan cut to the part that matters")


def test_a_2d_scan_gets_a_2d_mask(tmp_path, use):
    grey = np.full((40, 48), 100, np.int16)
    grey[8:28, 4:24] = 400
    nibabel.save(nibabel.Nifti1Image(grey, np.diag([2, 1, 5, 1])), tmp_path / "scan.nii")
    use(bright_model())
    assert run_predict(tmp_path / "scan.nii", tmp_path / "out", "--overlay") == 0
    mask = nibabel.load(tmp_path / "out/scan_mask.nii.gz")
    np.testing.assert_array_equal(np.asarray(mask.dataobj), grey > 100)


def test_cases_of_several_files_are_predicted_once(tmp_path, use):
    for number in (1, 2):
        case = tmp_path / "raw" / f"BraTS20_Training_{number:03d}"
        case.mkdir(parents=True)
        for name in ("flair", "t1ce", "seg"):
            box_scan(case / f"{case.name}_{name}.nii.gz")
    use(bright_model(channels=["t1ce"]))
    assert run_predict(tmp_path / "raw", tmp_path / "out", "--recursive") == 0
    masks = sorted(p.name for p in (tmp_path / "out").glob("*.nii.gz"))
    assert masks == [f"BraTS20_Training_00{k}_mask.nii.gz" for k in (1, 2)]
    assert all(row["scan"].endswith("t1ce.nii.gz") for row in results(tmp_path / "out"))


def test_scans_of_the_atrium_challenge_have_the_names_of_their_folders(tmp_path, use):
    for patient in ("A1B", "C2D"):
        (tmp_path / "raw" / patient).mkdir(parents=True)
        box_scan(tmp_path / "raw" / patient / "lgemri.nii.gz")
        box_scan(tmp_path / "raw" / patient / "laendo.nii.gz")
    use(bright_model())
    assert run_predict(tmp_path / "raw", tmp_path / "out", "--recursive") == 0
    assert sorted(p.name for p in (tmp_path / "out").glob("*.nii.gz")) == [
        "A1B_mask.nii.gz",
        "C2D_mask.nii.gz",
    ]


def test_one_scan_and_its_stored_slices_give_one_result(tmp_path, use):
    """Prediction shows the network what preprocessing stores of the scan."""
    box_scan(tmp_path / "scan.nii.gz", "LPS")
    torch.manual_seed(0)
    model = bright_model(get_model(CONFIG))
    use(model)
    run_predict(tmp_path / "scan.nii.gz", tmp_path / "out", "--gate", "0", "--threshold", "0.5")
    slices = volume_to_slices(load_nifti(tmp_path / "scan.nii.gz").array)
    probs = np.stack([r.seg for r in segment_slices(model, slices, cams=False)])[:, ::-1, ::-1]
    found = load_label(tmp_path / "out" / "scan_mask.nii.gz").array
    assert np.array_equal(found, probs > 0.5)


def lesion_scan(path) -> None:
    """Slices 4 to 7 of 12 show a bright box, which the network finds."""
    volume = np.full((12, 48, 48), 100, np.int16)
    volume[4:8, 12:36, 12:36] = 400
    write_nifti(path, volume, (1, 1, 1))


def test_slices_of_a_patient_in_one_folder_are_segmented_as_a_volume(tmp_path, use):
    """By a model that was trained on volumes: the masks, and the scores, are those of the scan. Slices whose
    names tell no patient, or of another model, are segmented one by one."""
    lesion_scan(tmp_path / "scan.nii.gz")
    (tmp_path / "slices").mkdir()
    slices = volume_to_slices(load_nifti(tmp_path / "scan.nii.gz").array)
    names = [f"P_001_{z:03d}_{int(4 <= z < 8)}" for z in range(12)]
    for name, image in zip(names, slices, strict=True):
        np.save(tmp_path / "slices" / f"{name}.npy", image)
    np.save(tmp_path / "slices" / "a_6.npy", slices[6])
    model = bright_model()
    model.config |= {"pixel_labels": "escape", "dark": 0.8}
    use(model)
    flags = ["--threshold", "0.3"]
    assert run_predict(tmp_path / "scan.nii.gz", tmp_path / "scan", *flags) == 0
    assert run_predict(tmp_path / "slices", tmp_path / "out", *flags) == 0
    expected = load_label(tmp_path / "scan" / "scan_mask.nii.gz").array[:, ::-1, ::-1]
    masks = [np.asarray(Image.open(tmp_path / "out" / f"{name}_mask.png")) > 0 for name in names]
    assert np.array_equal(np.stack(masks), expected > 0) and expected.any()
    scores = {os.path.basename(row["scan"]): float(row["highest_score"]) for row in results(tmp_path / "out")}
    assert scores[f"{names[3]}.npy"] == pytest.approx(0.4, abs=0.01), "two of slices 1 to 5 show it"
    assert scores["a_6.npy"] > 0.99
    assert run_predict(tmp_path / "slices" / f"{names[5]}.npy", tmp_path / "one", *flags) == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "one" / f"{names[5]}_mask.png")) > 0, masks[5])
    model.config["pixel_labels"] = "cam"
    assert run_predict(tmp_path / "slices", tmp_path / "alone", *flags) == 0
    assert float(results(tmp_path / "alone")[3]["highest_score"]) < 0.01


def test_maps_have_the_scores_of_the_evaluation(tmp_path):
    """Means over neighbouring slices, if the model was trained on volumes."""
    lesion_scan(tmp_path / "scan.nii.gz")
    (tmp_path / "data" / "imageSlice").mkdir(parents=True)
    names = [f"P_001_{z:03d}_{int(4 <= z < 8)}" for z in range(12)]
    for name, image in zip(names, volume_to_slices(load_nifti(tmp_path / "scan.nii.gz").array), strict=True):
        np.save(tmp_path / "data" / "imageSlice" / f"{name}.npy", image)
    model = bright_model()
    model.config |= {"pixel_labels": "escape", "dark": 0.8}
    data = MedicalSliceDataset(tmp_path / "data", names)
    counts, _ = generate_maps(model, data, tmp_path / "maps", tmp_path / "cams", scales=(1.0,), batch_size=5)
    found = [np.load(tmp_path / "cams" / f"{name}.npz")["pred_score"] for name in names]
    # Scores of the network alone: 1 in slices 4 to 7, about 0 in the others.
    assert found == pytest.approx([0, 0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.6, 0.4, 0.2, 0, 0], abs=0.01)
    assert counts == {"slices": 12, "positives": 4}
    evaluated = evaluate_split(model, tmp_path / "data", names)
    assert evaluated.scores["f1"] == 1
    assert (tmp_path / "maps" / f"{names[3]}_{found[3]:.3f}.png").is_file()


def test_titles_do_not_claim_a_plane_that_the_header_may_be_wrong_about(tmp_path, use, monkeypatch):
    titles = []
    monkeypatch.setattr("common.planes.save_panels", lambda path, rows, names, **_: titles.extend(names))
    box_scan(tmp_path / "scan.nii.gz")
    use(bright_model())
    assert run_predict(tmp_path / "scan.nii.gz", tmp_path / "out", "--overlay") == 0
    assert [row[0] for row in titles] == ["as sliced scan", "across the rows", "across the columns"]


# ---- evaluate ----


def test_scores_of_a_folder_by_hand(folder):
    """Predicted: the bright quarter, 256 pixels; true: its half, 128. Dice 2/3 in both positive slices."""
    evaluation = evaluate_split(bright_model(), folder, NAMES, scales=(1.0,), batch_size=3)
    assert (
        evaluation.scores["f1"] == evaluation.scores["auroc"] == 1 and evaluation.scores["prevalence"] == 0.5
    )
    rows = {(r["output"], r["group"]): r for r in evaluation.overlap({})}
    assert list(rows)[:2] == [("seg", BY_SCORE), ("seg", BY_TRUTH)]
    row = rows["seg", BY_SCORE]
    assert row["threshold"] == 0.5 and row["false_alarms"] == 0
    assert (row["positive_slices"], row["negative_slices"]) == (2, 2)
    for key in ("dice_slices", "dice_volumes"):
        assert row[key] == pytest.approx(2 / 3)
    assert row["iou_slices"] == pytest.approx(1 / 2)
    assert {output for output, _ in rows} == {"seg", "cam", "affinity"}
    assert evaluation.thresholds()["seg"] == pytest.approx(0.02), "the lowest of those that are equal"


def test_gates_by_prediction_and_by_truth(folder):
    """A bright slice without tissue: a false alarm by its score, but none if the label is given away."""
    np.save(folder / "imageSlice" / f"{NAMES[0]}.npy", blob())
    evaluation = evaluate_split(bright_model(), folder, NAMES)
    rows = {r["group"]: r for r in evaluation.overlap({}) if r["output"] == "seg"}
    assert rows[BY_SCORE]["false_alarms"] == 0.5 and rows[BY_TRUTH]["false_alarms"] == 0
    # Patient 1: 128 hit, 128 + 256 too many; patient 2: as before.
    assert rows[BY_SCORE]["dice_volumes"] == pytest.approx((256 / 640 + 2 / 3) / 2)
    assert rows[BY_TRUTH]["dice_volumes"] == pytest.approx(2 / 3)
    assert evaluation.scores["precision"] == pytest.approx(2 / 3)
    dark = blob(value=140)  # margin 1: score 0.71
    np.save(folder / "imageSlice" / f"{NAMES[3]}.npy", dark)
    strict = evaluate_split(bright_model(), folder, NAMES, gate=0.9)
    assert strict.scores["recall"] == 0.5
    rows = {r["group"]: r for r in strict.overlap({}) if r["output"] == "seg"}
    assert rows[BY_SCORE]["dice_slices"] == pytest.approx(1 / 3), "a missed slice counts 0"
    assert rows[BY_TRUTH]["dice_slices"] == pytest.approx(2 / 3)


def test_validation_leaves_the_network_in_training(folder):
    model = bright_model()
    model.network.train()
    evaluate_split(model, folder, NAMES)
    assert model.network.training


def test_without_masks_only_the_classification(folder, tmp_path, capsys):
    for path in (folder / "maskSlice").iterdir():
        path.unlink()
    evaluation = evaluate_split(bright_model(), folder, NAMES)
    assert not evaluation.sweeps and evaluation.thresholds() == {} and evaluation.scores["accuracy"] == 1
    evaluate.write_evaluation(tmp_path / "out", "title", evaluation, {})
    assert "nothing can be said" in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["classification.csv"]


def run_evaluate(*words) -> int:
    return evaluate.main([str(word) for word in [*words, "--device", "cpu", "--amp", "off"]])


def test_threshold_is_chosen_on_validation_slices(folder, tmp_path, monkeypatch, capsys):
    """Grey of 40 % (probability .018) is tissue in the validation patient, and is not in the test patient:
    the test is scored at the threshold that lets it in, although another would be better there."""
    for stem, share in ((NAMES[1], 32), (NAMES[3], 8)):
        image = blob(rows=slice(0, 8))
        image[8:, :16] = 108  # margin -1.53: probability .045
        mask = np.zeros((32, 32), np.uint8)
        mask[:share, :16] = 1
        np.save(folder / "imageSlice" / f"{stem}.npy", image)
        np.save(folder / "maskSlice" / f"{stem}.npy", mask)
    split = {"train": ["X_1_1_1"], "val": NAMES[:2], "test": NAMES[2:]}
    model = bright_model(split=split, data_path=str(folder))
    monkeypatch.setattr(evaluate, "load_trained", lambda *_: model)
    out = tmp_path / "out"
    assert run_evaluate("--weights", "w/best.pth", "--out", out) == 0
    with (out / "overlap.csv").open() as file:
        row = next(csv.DictReader(file))
    assert float(row["threshold"]) < 0.045 and float(row["dice_slices"]) == pytest.approx(
        2 * 128 / (128 + 512)
    )
    with (out / "sweep.csv").open() as file:
        sweep = list(csv.DictReader(file))
    assert float(sweep[24]["seg dice_slices"]) == pytest.approx(1) and len(sweep) == 49
    with (out / "volumes.csv").open() as file:
        (volume,) = csv.DictReader(file)
    assert volume["patient"] == "LASC_002" and float(volume["seg dice"]) == pytest.approx(0.4)
    with (out / "sizes.csv").open() as file:
        size = next(csv.DictReader(file))
    assert (size["output"], size["size"], size["pixels_to"]) == ("seg", "small", "128")
    assert float(size["dice_slices"]) == pytest.approx(0.4)
    assert (out / "sweep.png").stat().st_size > 5000 and "seg, gated by score" in capsys.readouterr().out
    model.preprocessing["threshold"] = {"seg": 0.5}
    assert run_evaluate("--weights", "w/best.pth", "--out", out) == 0
    with (out / "overlap.csv").open() as file:
        assert float(next(csv.DictReader(file))["dice_slices"]) == pytest.approx(1), "that of the training"


def test_masks_in_files(tmp_path):
    """Every value above 0 counts, in LASC's 255 as in BraTS' parts 1 to 4."""
    for name in ("pred", "target"):
        (tmp_path / name).mkdir()
    inside = box_scan(tmp_path / "scan.nii.gz")
    scan = load_nifti(tmp_path / "scan.nii.gz")
    parts = inside.astype(np.uint8) * 255
    parts[1] = inside[1] * 2
    save_label(tmp_path / "target" / "a.nii.gz", parts, scan)
    half = inside.copy()
    half[:, :14] = False
    save_label(tmp_path / "pred" / "a_mask.nii.gz", half.astype(np.uint8), scan)
    out = tmp_path / "out"
    words = ["--pred", tmp_path / "pred", "--target", tmp_path / "target", "--out", out]
    assert run_evaluate(*words) == 0
    with (out / "results.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["dice"]) == pytest.approx(2 / 3) and float(row["target_mm3"]) == inside.sum() * 10
    assert (out / "worst_and_median.png").is_file()


@pytest.mark.parametrize("words", [[], ["--weights", "a", "--pred", "b"], ["--pred", "b", "--out", "c"]])
def test_evaluate_says_what_to_give(words):
    with pytest.raises(SystemExit, match="give --weights"):
        run_evaluate(*words)


def test_cells_that_resemble_nothing_keep_a_finite_map():
    """Affinities whose squares are 0 in float32, even of a cell with itself: the map is at the background."""
    found = propagated_cam(torch.rand(1, 1, 32, 48), torch.full((1, 6, 6), 1e-30), radius=8)
    torch.testing.assert_close(found, torch.full((1, 1, 32, 48), 0.35))
