"""common/prediction.py, overview.py and report.py: what is read, which scans, what is printed."""

import json
import time
import types

import numpy as np
import pytest
import torch

from common import report
from common.hardware import Precision
from common.nifti import load_nifti, open_nifti, write_nifti
from common.overview import find_body, read_overview
from common.prediction import predict_scans, prediction_notes, probability_maps, read_region
from common.windows import PredictionPeak


def scan(path, shape=(20, 30, 40), spacing_mm=(2.0, 2.0, 2.0)):
    image = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    write_nifti(path, image, spacing_mm)
    return image, open_nifti(path)


def test_a_region_smaller_than_a_patch_is_read_with_its_surroundings(tmp_path, capsys):
    """A patch of 8 x 8 x 8 voxels of 4 mm is 16 x 16 x 16 of the scan's; the region has 4 x 20 x 10."""
    image, file = scan(tmp_path / "case.nii.gz")
    region = ((10, 4, 0), (14, 24, 10))
    options = {"batch_size": 1, "device": torch.device("cpu"), "source": "body"}
    reading = read_region(file, region, (4, 4, 4), (8, 8, 8), 3, **options)
    assert (reading.start, reading.stop) == ((4, 4, 0), (20, 24, 16))
    assert reading.region == ((6, 0, 0), (10, 20, 10))
    np.testing.assert_array_equal(reading.image, image[4:20, 4:24, :16])
    told = capsys.readouterr().out
    assert told.startswith("case.nii.gz: body, 16 x 20 x 16 of 20 x 30 x 40 voxels; scores and labels take")
    assert 0 < reading.need.host_mib < 5 and reading.need.device_mib == 0
    already_read = read_region(file, region, (4, 4, 4), (8, 8, 8), 3, **options, scan=image + 1)
    np.testing.assert_array_equal(already_read.image, reading.image + 1)


def options_of(**more):
    return {
        "own_names": ("_mask",),
        "recursive": False,
        "table": "table.csv",
        "machine": "a toaster",
        "found": lambda row: f"{row['seconds'] + 1:.0f} lumps",
    } | more


def test_scans_in_turn(tmp_path, capsys):
    for name in ("b10.nii.gz", "b9.nii.gz", "b9.nii", "b9_mask.nii.gz"):
        scan(tmp_path / name)
    seen = []

    def predict(path, folder):
        assert folder == out
        seen.append(path)
        if path.name == "b10.nii.gz":
            raise ValueError("too dark")
        return {"scan": str(path), "seconds": 1.25}

    out = tmp_path / "out"
    failed = predict_scans(predict, tmp_path, out, **options_of())
    good, bad = sorted(seen, key=lambda path: path.name == "b10.nii.gz")
    assert good.name in ("b9.nii", "b9.nii.gz") and bad.name == "b10.nii.gz", "b9 twice would be one result"
    assert len(failed) == 2 and bad in failed and good not in failed
    assert (out / "table.csv").read_text().splitlines() == ["scan,seconds", f"{good},1.25"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["3 scan(s) on a toaster", f"  {good.name}: 2 lumps, 1.2 s"]
    assert lines[2] == f"1 of 3 scan(s) written to {out}"
    assert f"failed: {bad}: too dark" in lines[3:] and len(lines) == 5
    with pytest.raises(FileNotFoundError, match="no NIfTI scan in it"):
        predict_scans(predict, out, tmp_path, **options_of())


def test_at_most_20_lines_are_printed(tmp_path, capsys):
    for number in range(22):
        (tmp_path / f"s{number}.nii").touch()
    predict_scans(
        lambda path, _: {"scan": str(path), "seconds": 0}, tmp_path, tmp_path / "out", **options_of()
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "  s0.nii: 1 lumps, 0.0 s" and lines[20].startswith("  s19.nii")
    assert lines[21:] == ["  ... 2 more in table.csv", f"22 of 22 scan(s) written to {tmp_path / 'out'}"]


def test_maps_and_labels_of_a_region_lie_on_the_scans_grid(tmp_path, monkeypatch):
    _, file = scan(tmp_path / "case.nii.gz")
    options = {"batch_size": 1, "device": torch.device("cpu"), "source": "body"}
    reading = read_region(file, ((4, 4, 0), (20, 24, 16)), (2, 2, 2), (16, 16, 16), 3, **options)
    labels = reading.on_scan(np.full((16, 20, 16), 7), file)
    inside = (slice(4, 20), slice(4, 24), slice(0, 16))
    assert labels.dtype == np.uint8 and (labels[inside] == 7).all() and labels.sum() == 7 * 16 * 20 * 16
    with probability_maps(tmp_path, [2, 11], file, reading) as maps:
        maps[2][...] = 255
        maps[11][0, 0, 0] = 51
    found = [load_nifti(tmp_path / f"probabilities/case_{n}.nii.gz").array for n in ("02", "11")]
    assert found[0].sum() == pytest.approx(16 * 20 * 16, rel=1e-5) and found[0][4, 4, 0] == pytest.approx(1)
    assert found[1].sum() == found[1][4, 4, 0] == pytest.approx(0.2)
    assert not list(tmp_path.glob(".maps*"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: types.SimpleNamespace(free=2 * reading.image.size - 1))
    with pytest.raises(
        OSError, match="probability maps of case.nii.gz takes 0 MiB there, 0 are free; make room"
    ):
        with probability_maps(tmp_path, [2, 11], file, reading):  # a memory map
            pytest.fail("a memory map on a full disk ends the process")
    with probability_maps(tmp_path, [], file, reading) as maps:
        assert maps == {}


def test_notes_of_a_predicted_scan(tmp_path):
    model = types.SimpleNamespace(
        device=torch.device("cpu"), precision=Precision("fp32", None, False, "test")
    )
    notes = prediction_notes(tmp_path / "a.nii", model, PredictionPeak(30.0, 4.0), time.perf_counter() - 2)
    assert notes["scan"] == str(tmp_path / "a.nii") and 2 <= notes["seconds"] < 60
    assert notes["predicted_mib"] == {"host": 30, "device": 4} and notes["precision"] == "fp32"
    assert notes["peak_mib"] is None or notes["peak_mib"] > 0
    json.dumps(notes, allow_nan=False)


def test_overview_and_body_by_hand(tmp_path):
    """Voxels of 1 x 1.4 x 4 mm are joined by 3, 2 and 1; 10 mm are 4 (of 3 mm), 4 (of 2.8) and 3 (of 4)."""
    image = np.full((60, 60, 30), -1000, np.int16)
    image[15:45, 20:40, 10:20] = 30
    write_nifti(tmp_path / "case.nii.gz", image, (1.0, 1.4, 4.0))
    file = open_nifti(tmp_path / "case.nii.gz")
    overview = read_overview(file, (-1000, 0))
    assert overview.factors == (3, 2, 1) and overview.image.shape == (20, 30, 30)
    assert overview.image.max() == 0 and overview.image[4, 9, 9] == -1000
    coarse, box = find_body(overview, file, -500, 10.0)
    assert coarse == ((1, 6, 7), (19, 24, 23))
    assert box == ((3, 12, 7), (57, 48, 23))


def test_summary_lines_and_files(tmp_path, capsys):
    def entry(name, mean, low, high, n, missed=0):
        return {"name": name, "metric": "dice", "mean": mean, "low": low, "high": high, "n": n,
                "missed": missed, "hallucinated": 1}  # fmt: skip

    nan = float("nan")
    table = [entry("liver", 0.9, 0.85, 0.95, 4), entry("spleen", 0.5, nan, nan, 1, 2)]
    table.append(entry("not there", nan, nan, nan, 0))
    assert report.class_lines(table, ["dice"]) == [
        "| class | dice | cases | missed | hallucinated |",
        "|---|---|---|---|---|",
        "| liver | 0.900 (0.850-0.950) | 4 | 0 | 1 |",
        "| spleen | 0.500 | 1 | 2 | 1 |",
    ]
    out = tmp_path / "new"
    report.clear_report(out, ["a.csv", report.SUMMARY])
    (out / "a.csv").touch()
    (out / "mine.txt").touch()
    report.write_summary(out, ["title"], {"c7": "no mask"})
    assert (out / "summary.md").read_text() == "title\nfailed: c7: no mask\n"
    assert capsys.readouterr().out == f"title\nwritten to {out}\nfailed: c7: no mask\n"
    report.clear_report(out, ["a.csv", report.SUMMARY])
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_a_report_without_rows_leaves_no_table_of_an_earlier_one(tmp_path):
    row = {"case": "a", "patient": "a", "class": 1, "name": "liver", "status": "ok", "dice": 0.5}
    report.write_report([row], tmp_path, "title", {}, notes=["few"], more=["the end"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.csv", "summary.csv", "summary.md"]
    lines = (tmp_path / "summary.md").read_text().splitlines()
    assert lines[:3] == ["title", "NOTE: few", ""] and lines[-1] == "the end"
    assert "| all classes | 0.500 | 1 | 0 | 0 |" in lines
    report.write_report([{**row, "group": "large"}], tmp_path, "title", {})
    assert (tmp_path / "groups.csv").is_file()
    assert "all classes" not in (tmp_path / "summary.md").read_text(), "stands among the groups"
    report.write_report([], tmp_path, "title", {"a": "broken"})
    assert [path.name for path in tmp_path.iterdir()] == ["summary.md"]
