"""common/dicom*.py: which files are DICOM, which series are scans, what is made of them, what can fail."""

import os
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REAL_DATA, ROOT

from common import dicom_conversion, prediction
from common.dicom import find_scans
from common.dicom_headers import BIG_ENDIAN, IMPLICIT, read_dicom_header
from common.dicom_series import find_series, why_no_volume
from common.nifti import NIFTI_SUFFIXES, load_nifti, write_nifti

EXPLICIT = "1.2.840.10008.1.2.1"
CT_KIND, REPORT_KIND = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.88.67"
HAS_PROGRAM = dicom_conversion.find_program() is not None
needs_program = pytest.mark.skipif(not HAS_PROGRAM, reason="dcm2niix is not installed")
LONG = ("OB", "OW", "SQ", "UN")


def element(tag, kind, value, *, syntax=EXPLICIT) -> bytes:
    """One element; texts and numbers are stored as `kind` wants them, and an even number of bytes."""
    order = ">" if syntax == BIG_ENDIAN else "<"
    if isinstance(value, int):
        value = struct.pack(order + "H", value)
    value = value.encode() if isinstance(value, str) else value
    value += (b"\0" if kind == "UI" else b" ") * (len(value) % 2)
    start = struct.pack(order + "HH", *tag)
    if syntax == IMPLICIT:
        return start + struct.pack("<I", len(value)) + value
    length = struct.pack(order + "2xI" if kind in LONG else order + "H", len(value))
    return start + kind.encode() + length + value


def write_dicom(
    path,
    *,
    pixels=None,
    number=1,
    position=(0, 0, 0),
    orientation=(1, 0, 0, 0, 1, 0),
    syntax=EXPLICIT,
    **other,
) -> Path:
    """A file of one image (int16, rows 0.5 mm and columns 0.75 mm apart), or without pixels of none.

    Args:
        number: of the image in its series.
        other: series (its UID), series_number, patient, modality, image_type, kind, samples, tilt, behind
            (bytes of elements behind the series').
    """
    series, kind = other.get("series", "1.2.3"), other.get("kind", CT_KIND)
    texts = {
        (0x0008, 0x0008): ("CS", other.get("image_type", "ORIGINAL\\PRIMARY\\AXIAL")),
        (0x0008, 0x0016): ("UI", kind),
        (0x0008, 0x0018): ("UI", f"{series}.{number}"),
        (0x0008, 0x0060): ("CS", other.get("modality", "CT")),
        (0x0010, 0x0020): ("LO", other.get("patient", "7")),
        (0x0020, 0x000D): ("UI", "1.2"),
        (0x0020, 0x000E): ("UI", series),
        (0x0020, 0x0011): ("IS", other.get("series_number", "3")),
        (0x0020, 0x0013): ("IS", str(number)),
    }
    if "tilt" in other:
        texts[0x0018, 0x1120] = ("DS", f"{other['tilt']:g}")
    if pixels is not None:
        bits = {0x0100: 16, 0x0101: 16, 0x0102: 15, 0x0103: 1}
        texts |= {(0x0028, key): ("US", value) for key, value in bits.items()}
        texts |= {
            (0x0018, 0x0050): ("DS", "2"),
            (0x0028, 0x0002): ("US", other.get("samples", 1)),
            (0x0028, 0x0004): ("CS", "MONOCHROME2"),
            (0x0028, 0x0010): ("US", pixels.shape[0]),
            (0x0028, 0x0011): ("US", pixels.shape[1]),
            (0x0028, 0x0030): ("DS", "0.5\\0.75"),
            (0x7FE0, 0x0010): ("OW", pixels.astype("<i2").tobytes()),
        }
    if position is not None:
        texts[0x0020, 0x0032] = ("DS", "\\".join(f"{mm:.6g}" for mm in position))
        texts[0x0020, 0x0037] = ("DS", "\\".join(f"{part:.6g}" for part in orientation))
    body = {tag: element(tag, *content, syntax=syntax) for tag, content in texts.items()}
    body[0x0021, 0] = other.get("behind", b"")
    meta = element((2, 2), "UI", kind) + element((2, 0x10), "UI", syntax)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(128) + b"DICM" + meta + b"".join(body[tag] for tag in sorted(body)))
    return path


def write_series(
    folder, positions=((-10, -20, 0), (-10, -20, 2), (-10, -20, 4), (-10, -20, 6)), **other
) -> Path:
    """Images of 24 rows and 20 columns at `positions`; that of index 2 is bright at row 5, column 7."""
    for k, position in enumerate(positions):
        pixels = np.zeros((24, 20), np.int16)
        pixels[5, 7] = 1000 * (k == 2)
        write_dicom(folder / f"im{k}.dcm", pixels=pixels, number=k + 1, position=position, **other)
    return folder


def scans_of(source, out, recursive=False, suffixes=NIFTI_SUFFIXES):
    return find_scans(
        source, suffixes, out=Path(out), own_names=("_mask",), recursive=recursive, what="NIfTI scan"
    )


# ---- headers ----


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT, BIG_ENDIAN])
def test_headers_of_all_ways_to_store_them(tmp_path, syntax):
    path = write_dicom(tmp_path / "im", pixels=np.zeros((24, 20)), position=(1, 2, 3), syntax=syntax)
    header = read_dicom_header(path)
    assert header.series == "1.2.3" and header.number == "3" and header.modality == "CT"
    assert (header.rows, header.columns, header.samples, header.bits, header.frames) == (24, 20, 1, 16, 1)
    assert header.position == "1\\2\\3" and header.syntax == syntax and header.kind == CT_KIND
    assert header.num_bytes == 24 * 20 * 2


def test_sequences_are_passed_over(tmp_path):
    """With and without a length, one in the other, and of unknown kind, which is stored implicitly inside."""
    wrong = element((0x20, 0x0E), "UI", "9.9")
    item, ends = b"\xfe\xff\x00\xe0", b"\xfe\xff\x0d\xe0\0\0\0\0"
    endless = struct.pack("<I", 0xFFFFFFFF)
    with_length = element((0x09, 0x10), "SQ", item + struct.pack("<I", len(wrong)) + wrong)
    start = struct.pack("<HH", 0x09, 0x11)
    without = start + b"SQ\0\0" + endless + item + endless + with_length + wrong + ends
    without += b"\xfe\xff\xdd\xe0\0\0\0\0"
    hidden = element((0x20, 0x0E), "UI", "8.8", syntax=IMPLICIT)
    unknown = start + b"UN\0\0" + endless + item + endless + hidden + ends + b"\xfe\xff\xdd\xe0\0\0\0\0"
    path = write_dicom(tmp_path / "im", pixels=np.zeros((4, 4)), behind=with_length + without + unknown)
    assert read_dicom_header(path).series == "1.2.3"


def test_what_is_no_dicom_file(tmp_path):
    (tmp_path / "notes").write_bytes(b"x" * 500)
    (tmp_path / "short").write_bytes(b"DICM")
    assert read_dicom_header(tmp_path / "notes") is None and read_dicom_header(tmp_path / "short") is None
    old = write_dicom(tmp_path / "old.dcm", pixels=np.zeros((4, 4)))
    old.write_bytes(old.read_bytes()[132:])  # files of before 1993 have no letters in front
    assert read_dicom_header(old).rows == 4
    for name, content, reason in (
        ("x.dcm", b"text", "named like a DICOM file"),
        ("y.ima", b"", "an empty file"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: {reason}.*fetch it again"):
            read_dicom_header(tmp_path / name)


def test_a_damaged_header_never_ends_in_another_error(tmp_path):
    path = write_dicom(tmp_path / "im", pixels=np.zeros((4, 4)))
    whole = path.read_bytes()
    end_of_header = whole.index(b"\x28\0\x01\x01US")
    for length in range(132, end_of_header, 7):  # cut anywhere
        path.write_bytes(whole[:length])
        try:
            assert read_dicom_header(path).rows in (0, 4)
        except ValueError as error:
            assert str(error).startswith(f"{path}: a damaged or truncated DICOM file")
    draw = np.random.default_rng(0)
    for _ in range(100):  # bytes that are something else
        data = bytearray(whole)
        for place in draw.integers(132, end_of_header, 3):
            data[place] = draw.integers(256)
        path.write_bytes(data)
        try:
            read_dicom_header(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: a damaged")


def test_what_should_be_a_text_is_one(tmp_path):
    for other in ({"modality": "CT\n"}, {"series_number": "3\x01"}, {"image_type": "A\x7f"}):
        path = write_dicom(tmp_path / "im", pixels=np.zeros((4, 4)), **other)
        with pytest.raises(
            ValueError, match=r"damaged or truncated DICOM file \(its \w+( \w+)? is no text\)"
        ):
            read_dicom_header(path)


# ---- series ----


def test_names_tell_folder_and_series(tmp_path):
    source = tmp_path / "export"
    write_series(source, series="1.1", series_number="2")
    write_series(source / "p1" / "CT", series="1.2", series_number="4")
    write_series(source / "p2" / "CT", series="1.3", series_number="4")
    write_series(source / "p2" / "more CT", series="1.4", series_number="")
    for k, name in enumerate(("a", "b")):  # one series in two folders
        write_dicom(source / "p3" / name / "1", pixels=np.ones((4, 4)), number=k, series="1.5")
    write_series(source / ".hidden", series="1.6")
    write_series(source / "out" / "x", series="1.7")
    write_dicom(source / "DICOMDIR", kind="1.2.840.10008.1.3.10", modality="", position=None)
    (source / "notes.txt").write_text("")
    found, damaged = find_series(source, source / "out", in_subfolders=True)
    names = ["export_2", "p1_CT_4", "p2_CT_4", "p2_more_CT", "p3_3"]
    assert [series.name for series in found] == names and not damaged
    assert [len(series.files) for series in found] == [4, 4, 4, 4, 2]
    (only,), _ = find_series(source, source / "out", in_subfolders=False)
    assert only.name == "export_2" and only.described == f"{source}, series 2"


def test_series_of_one_number_and_patients_of_one_series_stay_apart(tmp_path):
    """Some programs take the identities out and give all patients the same series."""
    for k, patient in enumerate("ab"):
        write_dicom(tmp_path / "x" / f"{k}", pixels=np.ones((4, 4)), patient=patient)
    write_dicom(tmp_path / "x" / "2", pixels=np.ones((4, 4)), series="1.9")
    found, _ = find_series(tmp_path / "x", tmp_path / "out", in_subfolders=False)
    assert [(series.name, len(series.files)) for series in found] == [("x_3", 1), ("x_3_2", 1), ("x_3_3", 1)]


@pytest.mark.parametrize(
    "other, reason",
    [
        ({}, ""),
        ({"modality": "MR"}, ""),
        ({"modality": "SR", "kind": REPORT_KIND}, "SR, neither CT nor MR"),
        ({"modality": "PT"}, "PT, neither CT nor MR"),
        ({"image_type": "ORIGINAL\\PRIMARY\\LOCALIZER"}, "a localiser, 4 image(s)"),
        ({"samples": 3}, "colour pictures, 4 image(s)"),
        ({"kind": "1.2.840.10008.5.1.4.1.1.7", "positions": [None] * 4}, "pictures of a screen, 4 image(s)"),
        ({"positions": [None] * 4}, "4 image(s) without a place in space"),
        ({"positions": [(0, 0, 0), (0, 0, 2)]}, "2 image(s), where a volume has 3 or more"),
    ],
)
def test_what_is_no_volume(tmp_path, other, reason):
    (series,), _ = find_series(write_series(tmp_path / "x", **other), tmp_path / "out", False)
    assert why_no_volume(series.headers) == reason


# ---- the program ----


@pytest.fixture
def use_program(tmp_path, monkeypatch):
    """use_program(text): from now on dcm2niix is this shell script, in which $out and $in are its folders."""

    def use(text: str) -> None:
        folder = tmp_path / "programs"
        folder.mkdir(exist_ok=True)
        script = 'while [ $# -gt 2 ]; do shift; if [ "$1" = -o ]; then out="$2"; in="$3"; fi; done\n'
        (folder / "dcm2niix").write_text(f"#!/bin/sh\n{script}{text}\n")
        (folder / "dcm2niix").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    if sys.platform == "win32":
        pytest.skip("a shell script")
    write_nifti(
        tmp_path / "made.nii.gz", np.arange(4 * 24 * 20, dtype=np.int16).reshape(4, 24, 20), (2, 1, 1)
    )
    return use


def test_scans_of_a_folder_with_both_kinds(tmp_path, use_program):
    """A series that fails costs no other; what is no volume is named."""
    fails = 'if grep -q bad "$in"/*; then echo "broken image"; exit 3; fi'
    use_program(f'{fails}; cp {tmp_path}/made.nii.gz "$out"/scan.nii.gz')
    source = tmp_path / "mixed"
    write_series(source / "ct", series="1.1")
    write_series(source / "other", series="1.2", patient="bad")
    write_dicom(source / "other" / "report", series="1.3", modality="SR", kind=REPORT_KIND, position=None)
    write_nifti(source / "a.nii.gz", np.zeros((3, 3, 3), np.int16), (1, 1, 1))
    out = tmp_path / "out"
    assert scans_of(source, out) == ([source / "a.nii.gz"], {})  # as without DICOM: --recursive looks deeper
    scans, failed = scans_of(source, out, recursive=True)
    assert scans == [source / "a.nii.gz", out / "from_dicom" / "ct_3.nii.gz"]
    ((missing, reason),) = failed.items()
    assert missing == out / "from_dicom" / "other_3.nii.gz"
    assert reason == f"{source / 'other'}, series 3: dcm2niix failed with exit code 3 (broken image)"
    assert [path.name for path in (out / "from_dicom").iterdir()] == ["ct_3.nii.gz"]


def test_left_out_is_printed(tmp_path, use_program, capsys):
    use_program(f'cp {tmp_path}/made.nii.gz "$out"/scan.nii.gz')
    write_series(tmp_path / "x" / "scout", series="1.1", image_type="ORIGINAL\\PRIMARY\\LOCALIZER")
    write_series(tmp_path / "x" / "ct", series="1.2")
    (tmp_path / "x" / "a.mha").touch()
    scans, failed = scans_of(tmp_path / "x", tmp_path / "out")
    assert [scan.name for scan in scans] == ["ct_3.nii.gz"] and not failed
    left_out, converted, other = capsys.readouterr().out.splitlines()
    assert other.startswith("left out: 1 .mha file(s) (MetaImage)")
    assert left_out == f"left out: {tmp_path / 'x' / 'scout'}, series 3: a localiser, 4 image(s)"
    assert converted == f"converted: {tmp_path / 'x' / 'ct'}, series 3, 4 file(s) to from_dicom/ct_3.nii.gz"
    shutil.rmtree(tmp_path / "x" / "ct")
    with pytest.raises(ValueError, match="no volume among its DICOM series .*a localiser"):
        scans_of(tmp_path / "x", tmp_path / "out")


@pytest.mark.parametrize(
    "script, reason",
    [
        (
            "echo working; echo 'Error: unsupported'; exit 1",
            r"failed with exit code 1 \(Error: unsupported\)",
        ),
        ('echo x > "$out"/scan.nii.gz; exit 8', r"failed with exit code 8"),
        ("exit 2", r"failed with exit code 2 \(without a word\)"),
        ("echo nothing to do", r"wrote nothing \(nothing to do\)"),
        ('echo "$in"/000002.dcm is odd; exit 1', r"\(.*im2.dcm is odd\)"),
        ('echo x > "$out"/scan.nii.gz', "no volume among its DICOM series .*not a readable|damaged"),
        ("kill -9 $$", "failed with exit code -9"),
        ("exec sleep 600", "dcm2niix did not end within 0 s and was stopped"),
    ],
)
def test_faults_of_the_program_are_one_sentence(tmp_path, use_program, monkeypatch, script, reason):
    monkeypatch.setattr(dicom_conversion, "LEAST_TIMEOUT_S", 0.2 if "sleep" in script else 60)
    use_program(script)
    with pytest.raises(ValueError, match=reason) as caught:
        scans_of(write_series(tmp_path / "x"), tmp_path / "out")
    assert "\n" not in str(caught.value) and str(tmp_path / "x") in str(caught.value)
    assert not list((tmp_path / "out" / "from_dicom").iterdir())


def test_without_the_program(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "dcm2niix", None)  # as if it were not installed
    source = write_series(tmp_path / "x")
    with pytest.raises(ValueError, match="x: converting DICOM files needs the program dcm2niix; pip install"):
        scans_of(source, tmp_path / "out")
    write_nifti(source / "a.nii", np.zeros((3, 3, 3), np.int16), (1, 1, 1))
    scans, failed = scans_of(source, tmp_path / "out")
    assert scans == [source / "a.nii"] and list(failed) == [source]


def test_damaged_files_are_named(tmp_path, use_program):
    use_program(f'cp {tmp_path}/made.nii.gz "$out"/scan.nii.gz')
    source = write_series(tmp_path / "x")
    (source / "im9.dcm").write_bytes((source / "im3.dcm").read_bytes()[:300])
    scans, failed = scans_of(source, tmp_path / "out")
    assert len(scans) == 1 and list(failed) == [source / "im9.dcm"]
    (source / "im2.dcm").write_bytes((source / "im2.dcm").read_bytes()[:-700])  # its voxels: 960 bytes
    with pytest.raises(ValueError, match="series 3: .*im2.dcm is truncated or damaged"):
        scans_of(source, tmp_path / "out")


def test_ctrl_c_leaves_nothing_half_done(tmp_path, use_program, monkeypatch):
    use_program(f'cp {tmp_path}/made.nii.gz "$out"/scan.nii.gz')
    source, folder = write_series(tmp_path / "x"), tmp_path / "out" / "from_dicom"
    scans_of(source, tmp_path / "out")
    before = (folder / "x_3.nii.gz").read_bytes()

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(dicom_conversion.subprocess, "run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        scans_of(source, tmp_path / "out")
    assert [path.name for path in folder.iterdir()] == ["x_3.nii.gz"]
    assert (folder / "x_3.nii.gz").read_bytes() == before


def test_results_within_the_source_are_no_sources(tmp_path, use_program):
    use_program(f'cp {tmp_path}/made.nii.gz "$out"/scan.nii.gz')
    source = write_series(tmp_path / "x")
    for out in (source, source / "results"):
        for _ in range(2):  # a second time, when the results are there
            scans, failed = scans_of(source, out, recursive=True)
            assert (scans, failed) == ([out / "from_dicom" / "x_3.nii.gz"], {})
        shutil.rmtree(out / "from_dicom")


def test_a_single_file_stands_for_its_series(tmp_path, use_program):
    use_program(f'ls "$in" > {tmp_path}/given; cp {tmp_path}/made.nii.gz "$out"/scan.nii.gz')
    source = write_series(tmp_path / "x", series="1.1")
    for k in range(4):
        write_dicom(source / f"other{k}", pixels=np.ones((4, 4)), series="1.2", number=k, position=(0, 0, k))
    (source / "im1.dcm").rename(source / "IM1")
    for name in ("im0.dcm", "IM1"):
        scans, failed = scans_of(source / name, tmp_path / "out")
        assert [scan.name for scan in scans] == ["x_3.nii.gz"] and not failed
        assert len((tmp_path / "given").read_text().split()) == 4


def test_names_alike_in_dicom_and_nifti_do_not_share_a_result(tmp_path, use_program):
    use_program(f'cp {tmp_path}/made.nii.gz "$out"/scan.nii.gz')
    source, out = write_series(tmp_path / "x"), tmp_path / "out"
    write_nifti(source / "x_3.nii.gz", np.zeros((3, 3, 3), np.int16), (1, 1, 1))
    seen, failed = predicted(source, out)
    assert seen == [(source / "x_3.nii.gz", out)] and list(failed) == [out / "from_dicom" / "x_3.nii.gz"]


def test_a_batch_goes_on_without_the_series_that_fails(tmp_path, use_program, capsys):
    use_program(f'if grep -q bad "$in"/*; then exit 3; fi; cp {tmp_path}/made.nii.gz "$out"/scan.nii.gz')
    write_series(tmp_path / "x" / "a", series="1.1", patient="bad")
    write_series(tmp_path / "x" / "b", series="1.2")
    seen, failed = predicted(tmp_path / "x", tmp_path / "out")
    assert seen == [(tmp_path / "out" / "from_dicom" / "b_3.nii.gz", tmp_path / "out")] and len(failed) == 1
    printed = capsys.readouterr().out
    assert "1 of 2 scan(s) written" in printed and "a, series 3: dcm2niix failed with exit code 3" in printed


def predicted(source, out) -> tuple[list[tuple[Path, Path]], dict[Path, str]]:
    """(scan, folder of its results) of each that `predict_scans` has predicted, and what failed."""
    seen = []

    def predict(path, folder):
        seen.append((path, folder))
        return {"scan": str(path), "seconds": 0.0}

    failed = prediction.predict_scans(
        predict, source, out, own_names=(), recursive=False, table="t.csv", machine="", found=lambda row: ""
    )
    return seen, failed


# ---- the real program ----


def bright_mm(path) -> np.ndarray:
    """Where the bright voxels of a NIfTI file lie on average, (x, y, z) in RAS+."""
    scan = load_nifti(path)
    weights = np.clip(scan.array, 0, None).astype(float)
    zyx = [(weights * index).sum() / weights.sum() for index in np.indices(weights.shape)]
    return (scan.affine @ [*zyx[::-1], 1])[:3]


@needs_program
def test_the_grid_is_that_of_the_images(tmp_path):
    """RAS is (-x, -y, z) of DICOM: the last column lies at x = -(-10 + 19 * 0.75) = -4.25 mm, the last row at
    y = -(-20 + 23 * 0.5) = 8.5 mm, and these are the first voxels of a volume in RAS+."""
    ((path,), failed) = scans_of(write_series(tmp_path / "x"), tmp_path / "out")
    scan = load_nifti(path)
    expected = [[0.75, 0, 0, -4.25], [0, 0.5, 0, 8.5], [0, 0, 2, 0], [0, 0, 0, 1]]
    np.testing.assert_allclose(scan.affine, expected, atol=1e-4)
    assert scan.shape == (4, 24, 20) and scan.array[2, 23 - 5, 19 - 7] == 1000 and not failed


@needs_program
def test_oblique_images_lie_where_they_were(tmp_path):
    """Turned by 30 degrees about z: row 5, column 7 of slice 2 lies 5.25 mm along the row and 2.5 mm along
    the column from the corner."""
    c, s = np.cos(np.pi / 6), np.sin(np.pi / 6)
    write_series(tmp_path / "x", orientation=(c, s, 0, -s, c, 0))
    ((path,), _) = scans_of(tmp_path / "x", tmp_path / "out")
    expected = [-(-10 + 5.25 * c - 2.5 * s), -(-20 + 5.25 * s + 2.5 * c), 4]
    np.testing.assert_allclose(bright_mm(path), expected, atol=1e-3)


@needs_program
def test_tilted_gantry_and_missing_slices(tmp_path, capsys):
    """Only resampled do they lie where they were; the file that dcm2niix writes besides is wrong by 0.6 mm in
    10 mm of slices at a tilt of 20 degrees, and by whole slices where some are missing."""
    c, s = np.cos(np.radians(20)), np.sin(np.radians(20))
    positions = [(-10, -20, 2 * k) for k in range(6)]
    write_series(tmp_path / "tilted", positions, orientation=(1, 0, 0, 0, c, -s), tilt=20)
    ((path,), _) = scans_of(tmp_path / "tilted", tmp_path / "out")
    np.testing.assert_allclose(bright_mm(path), [10 - 5.25, 20 - 2.5 * c, 4 - 2.5 * s], atol=0.3)
    assert "the gantry was tilted; the scan is resampled" in capsys.readouterr().out

    write_series(tmp_path / "gap", [(-10, -20, z) for z in (0, 2, 6, 8, 10)])
    ((path,), _) = scans_of(tmp_path / "gap", tmp_path / "out")
    assert load_nifti(path).shape[0] == 6
    np.testing.assert_allclose(bright_mm(path), [10 - 5.25, 20 - 2.5, 6], atol=0.7)  # spread into the gap
    assert "are some missing?" in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "out" / "from_dicom").iterdir()].count("gap_3.nii.gz") == 1


@needs_program
def test_series_in_one_folder_a_4d_one_and_a_cut_file(tmp_path, capsys):
    source = tmp_path / "x"
    write_series(source / "a", series="1.1", series_number="1")
    write_series(source / "b", [(0, 0, 2 * (k % 4)) for k in range(12)], series="1.2", series_number="2")
    write_series(source / "c", series="1.3", series_number="3")
    for folder in "abc":
        for path in (source / folder).iterdir():
            path.rename(source / f"{folder}{path.stem}")  # all in one folder, without an ending
    last = source / "cim3"
    last.write_bytes(last.read_bytes()[:-100])
    scans, failed = scans_of(source, tmp_path / "out")
    assert [scan.name for scan in scans] == ["x_1.nii.gz"]
    assert [path.name for path in failed] == ["x_3.nii.gz"] and "cim3" in next(iter(failed.values()))
    assert f"left out: {source}, series 2: 4-D" in capsys.readouterr().out


@needs_program
def test_lung_prediction_of_a_real_series(trained_run, tmp_path, capsys):
    """Its first image lies at x = 1.953125, y = 58.59375 in DICOM, its pixels have 0.9765625 mm."""
    from lung_tumor.predict import main

    source = REAL_DATA / "dicom_ct"
    if not source.is_dir():
        pytest.skip("no real DICOM files here")
    weights = str(trained_run / "weights" / "best.pt")
    assert (
        main(["--weights", weights, "--source", str(source), "--out", str(tmp_path), "--device", "cpu"]) == 0
    )
    mask, scan = load_nifti(tmp_path / "sts_002_3_mask.nii.gz"), tmp_path / "from_dicom" / "sts_002_3.nii.gz"
    assert mask.shape == (48, 143, 161) and mask.orientation == "LAS"
    np.testing.assert_allclose(np.diag(mask.affine)[:3], [0.9765625, 0.9765625, 3.27], atol=1e-3)
    np.testing.assert_array_equal(mask.affine, load_nifti(scan).affine)
    assert "1 of 1 file(s) written" in capsys.readouterr().out


def test_all_predict_scripts_take_them():
    for path in ROOT.glob("*/predict.py"):
        assert "predict_scans(" in path.read_text("utf8") or "find_scans(" in path.read_text("utf8"), path
