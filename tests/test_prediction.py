"""common/prediction.py, overview.py and report.py: what is read, which scans, what is printed."""

import numpy as np
import pytest
import torch

from common import report
from common.nifti import open_nifti, write_nifti
from common.overview import find_body, read_overview
from common.prediction import predict_scans, print_written, read_region


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


def test_scans_in_turn(tmp_path, capsys):
    for name in ("b10.nii.gz", "b9.nii.gz", "b9.nii", "b9_mask.nii.gz"):
        scan(tmp_path / name)
    seen = []

    def predict(path):
        seen.append(path.name)
        if path.name == "b10.nii.gz":
            raise ValueError("too dark")
        return {"scan": path.name}

    out = tmp_path / "out"
    options = {"own_names": ("_mask",), "recursive": False, "table": "table.csv", "machine": "a toaster"}
    rows, failed = predict_scans(predict, tmp_path, out, **options)
    assert len(seen) == 2 and "b10.nii.gz" in seen and len(rows) == 1, "b9 twice would be one result"
    assert sorted(path.name for path in failed) in (["b10.nii.gz", "b9.nii"], ["b10.nii.gz", "b9.nii.gz"])
    assert (out / "table.csv").read_text().splitlines() == ["scan", rows[0]["scan"]]
    assert capsys.readouterr().out == "3 scan(s) on a toaster\n"
    with pytest.raises(FileNotFoundError, match="no NIfTI scan in it"):
        predict_scans(predict, out, tmp_path, **options)


def test_at_most_20_lines_are_printed(tmp_path, capsys):
    print_written([f"scan {n}" for n in range(22)], {"x": "broken"}, tmp_path, "table.csv")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "  scan 0" and lines[19:21] == ["  scan 19", "  ... 2 more in table.csv"]
    assert lines[21:] == [f"22 of 23 scan(s) written to {tmp_path}", "failed: x: broken"]


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
