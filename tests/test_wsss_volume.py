"""wsss_medical/volume.py: labels of pixels from whole volumes, and predictions that use them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_escape import volume

from common.checkpoints import TrainedModel
from common.escape import escape_map
from common.hardware import Precision
from wsss_medical import volume as module
from wsss_medical.segment import SliceResult
from wsss_medical.volume import by_patient, label_pixels, segment_patient


def model_of(pixel_labels: str = "escape") -> TrainedModel:
    config = {"pixel_labels": pixel_labels, "dark": 0.8}
    precision = Precision("fp32", None, False, "test")
    return TrainedModel(torch.nn.Identity(), config, torch.device("cpu"), precision, {}, {})


def write_slices(root: Path) -> list[str]:
    slices, is_positive, _ = volume()
    (root / "imageSlice").mkdir(parents=True)
    names = []
    for z, (image, positive) in enumerate(zip(slices, is_positive, strict=True)):
        names.append(f"X_001_{z:03d}_{int(positive)}")
        np.save(root / "imageSlice" / f"{names[-1]}.npy", image)
    return names


def say(monkeypatch, scores: list[float], seg: np.ndarray) -> None:
    """Let the network say this of the slices, in their order."""

    def results(model, slices, *, gate=0.0, **options):
        assert gate == 0 or model.config["pixel_labels"] != "escape"
        return iter([SliceResult(score, of_slice) for score, of_slice in zip(scores, seg, strict=True)])

    monkeypatch.setattr(module, "segment_slices", results)


def test_slices_of_a_patient_stay_together():
    assert by_patient(["A_1_0_0", "A_1_1_1", "A_2_0_1"]) == [["A_1_0_0", "A_1_1_1"], ["A_2_0_1"]]


def test_first_labels_come_from_the_volume_alone(tmp_path):
    names = write_slices(tmp_path)
    label_pixels(model_of(), tmp_path, names, tmp_path / "labels", by_model=False)
    labels = np.stack([np.load(tmp_path / "labels" / f"{name}.npy") for name in names])
    slices, is_positive, rod = volume()
    found, shares = escape_map(slices, is_positive)
    sure = is_positive & (shares >= 0.35)
    assert (labels[sure][found[sure] > 0.69] == 1).all() and (labels[sure][found[sure] < 0.57] == 0).all()
    between = (found[sure] > 0.58) & (found[sure] < 0.68)
    assert between.any() and (labels[sure][between] == 255).all()
    assert (labels[is_positive & ~sure] == 255).all() and not labels[~is_positive].any()
    assert (labels == 1).any() and rod[labels == 1].mean() > 0.95


def test_later_labels_need_both(tmp_path, monkeypatch):
    """The network denies the left half of the rod: the mean with 0 is 0, so it is background there."""
    names = write_slices(tmp_path)
    seg = np.ones((20, 48, 64), np.float32)
    seg[..., :45] = 0
    say(monkeypatch, [1.0] * 20, seg)
    label_pixels(model_of(), tmp_path, names, tmp_path / "labels", by_model=True)
    labels = np.stack([np.load(tmp_path / "labels" / f"{name}.npy") for name in names])
    slices, is_positive, _ = volume()
    expected = np.sqrt(escape_map(slices, is_positive)[0])
    assert not labels[..., :45].any()
    right = labels[..., 45:]
    assert (right == 1).sum() == (expected[..., 45:] > 0.65).sum() > 0


def test_slices_of_different_size_are_no_volume(tmp_path):
    names = write_slices(tmp_path)
    np.save(tmp_path / "imageSlice" / f"{names[3]}.npy", np.zeros((8, 8), np.uint8))
    with pytest.raises(ValueError, match="X_001_000_0 and other slices .*differ in size.*--pixel_labels cam"):
        label_pixels(model_of(), tmp_path, names, tmp_path / "labels", by_model=False)


def test_a_patient_is_predicted_as_a_volume(monkeypatch):
    """Scores are means over five neighbours, which removes one that is wrong; the map is a geometric mean."""
    slices, is_positive, _ = volume()
    scores = is_positive.astype(float)
    scores[10] = 0.0  # one slice of eight is not recognised
    seg = np.full(slices.shape, 0.81, np.float32)
    say(monkeypatch, scores.tolist(), seg)
    results = segment_patient(model_of(), list(slices), gate=0.5)
    assert results[10].score == pytest.approx(0.8) and results[0].score == 0
    expected = 0.9 * np.sqrt(escape_map(slices, is_positive)[0])
    np.testing.assert_allclose(np.stack([r.seg for r in results]), expected, atol=1e-6)


def test_other_models_predict_slice_by_slice(monkeypatch):
    slices, *_ = volume()
    seg = np.full(slices.shape, 0.5, np.float32)
    say(monkeypatch, [0.7] * 20, seg)
    assert [r.score for r in segment_patient(model_of("cam"), list(slices), gate=0.5)] == [0.7] * 20
    say(monkeypatch, [0.7], seg[:1])
    (alone,) = segment_patient(model_of(), [slices[0]])  # a single slice is no volume
    assert alone.seg.max() == 0.5
