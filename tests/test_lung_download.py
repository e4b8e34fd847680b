import io
import pickle
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import pytest

from lung_tumor import download
from lung_tumor.download import MARKER, main


@pytest.fixture(autouse=True)
def never_the_network(monkeypatch):
    """Without a stand-in of its own a test meets a machine that has no kagglehub."""
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    monkeypatch.setenv("KAGGLEHUB_CACHE", "restored after the test")


def fake_kagglehub(monkeypatch, dataset_download):
    monkeypatch.setitem(sys.modules, "kagglehub", types.SimpleNamespace(dataset_download=dataset_download))


def make_decathlon(folder, cases=("lung_001", "lung_002")):
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
        for case in cases:
            (folder / name / f"{case}.nii.gz").write_bytes(b"scan" * 100)
        (folder / name / f"._{cases[0]}.nii.gz").write_bytes(b"resource fork")
    return folder


def make_kaggle(folder, tasks=("Task001_LiverTumor", "Task006_Lung")):
    for task in tasks:
        (folder / task / "GroundTruth").mkdir(parents=True)
        (folder / task / "GroundTruth" / "1.pkl").write_bytes(pickle.dumps([]))
        with zipfile.ZipFile(folder / task / "CT.zip", "w") as archive:
            archive.writestr("1.nii", "scan" * 100)
    return folder


def make_tar(path, folder, extra=(), mode="w"):
    with tarfile.open(path, mode) as tar:
        tar.add(folder, arcname="Task06_Lung")
        for member in extra:
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    return path


def member(name, kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, 4 if kind == tarfile.REGTYPE else 0
    return info


def everything(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# ---- what is there already ----


def test_a_decathlon_folder_is_checked_in_place(tmp_path, capsys):
    folder = make_decathlon(tmp_path / "my scans" / "Task06_Lung")
    for given in (folder, folder.parent):
        assert main(["--archive", str(given), "--out", str(tmp_path / "out")]) == 0
        out = capsys.readouterr().out
        assert f"{folder}: 2 cases, 0.00 GB" in out
        assert f"Next: python lung_tumor/preprocess.py --source '{folder}' --out data/lung_tumor\n" in out
    assert not (tmp_path / "out").exists()


def test_a_kaggle_folder_put_in_place_by_hand_is_checked(tmp_path, capsys):
    folder = make_kaggle(tmp_path / "raw")
    for argv in (["--out", str(folder)], ["--archive", str(folder), "--out", str(tmp_path / "out")]):
        assert main(argv) == 0
        out = capsys.readouterr().out
        assert f"{folder / 'Task006_Lung'}: 1 cases, " in out
        assert f"--source {folder} --out data/lung_tumor --task Task006_Lung\n" in out


def test_an_incomplete_folder_is_named(tmp_path, capsys):
    folder = make_decathlon(tmp_path / "Task06_Lung")
    (folder / "labelsTr" / "lung_002.nii.gz").unlink()
    assert main(["--archive", str(folder)]) == 1
    assert "lung_002" in capsys.readouterr().err


def test_kaggle_folder_without_lung_lists_what_is_there(tmp_path, capsys):
    folder = make_kaggle(tmp_path / "raw", tasks=("Task001_LiverTumor", "Task003_Multiorgan"))
    assert main(["--out", str(folder)]) == 1
    err = capsys.readouterr().err
    assert "Task001_LiverTumor" in err and "Task003_Multiorgan" in err


@pytest.mark.parametrize("force", [[], ["--force"]])
@pytest.mark.parametrize("source", [["--source", "kaggle"], ["--archive", "x.tar"]])
def test_a_foreign_folder_is_never_touched(tmp_path, capsys, monkeypatch, force, source):
    fake_kagglehub(monkeypatch, lambda handle: pytest.fail("downloaded although the folder is taken"))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("mine")
    assert main(["--out", str(tmp_path / "thesis"), *source, *force]) == 1
    err = capsys.readouterr().err
    assert str(tmp_path / "thesis") in err and "another --out" in err
    assert everything(tmp_path) == ["thesis", "thesis/chapter1.txt"]


def test_own_folder_is_kept_without_force_and_replaced_with_it(tmp_path, capsys):
    out = tmp_path / "out"
    first = make_tar(tmp_path / "1.tar", make_decathlon(tmp_path / "a"))
    second = make_tar(tmp_path / "2.tar", make_decathlon(tmp_path / "b", cases=("lung_007",)))
    assert main(["--archive", str(first), "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["--archive", str(second), "--out", str(out)]) == 0
    assert "there already; --force" in capsys.readouterr().out
    assert (out / "Task06_Lung" / "imagesTr" / "lung_001.nii.gz").is_file()
    assert main(["--archive", str(second), "--out", str(out), "--force"]) == 0
    assert [path.name for path in (out / "Task06_Lung" / "imagesTr").iterdir()] == ["lung_007.nii.gz"]


def test_force_keeps_what_is_there_until_the_new_is_whole(tmp_path):
    out = tmp_path / "out"
    assert (
        main(
            [
                "--archive",
                str(make_tar(tmp_path / "1.tar", make_decathlon(tmp_path / "a"))),
                "--out",
                str(out),
            ]
        )
        == 0
    )
    before = everything(out)
    for broken in ("absent.tar", "broken.tar"):
        (tmp_path / "broken.tar").write_bytes(b"no tar")
        assert main(["--archive", str(tmp_path / broken), "--out", str(out), "--force"]) == 1
        assert main(["--out", str(out), "--force"]) == 1  # no kagglehub
    assert everything(out) == before


def test_force_does_not_follow_links(tmp_path):
    target = make_decathlon(tmp_path / "target")
    (target / MARKER).touch()
    before = everything(target)
    (tmp_path / "out").symlink_to(target)
    archive = make_tar(tmp_path / "1.tar", target)
    assert main(["--archive", str(archive), "--out", str(tmp_path / "out"), "--force"]) == 1
    inside = make_tar(tmp_path / "2.tar", target)
    assert main(["--archive", str(inside), "--out", str(tmp_path / "own")]) == 0
    (tmp_path / "own" / "link").symlink_to(target)
    assert main(["--archive", str(inside), "--out", str(tmp_path / "own"), "--force"]) == 0
    assert not (tmp_path / "own" / "link").exists()
    assert everything(target) == before


# ---- tar ----


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_unpacks_a_tar(tmp_path, capsys, mode):
    archive = make_tar(tmp_path / "Task06_Lung.tar", make_decathlon(tmp_path / "a"), mode=mode)
    out = tmp_path / "deep" / "out"
    assert main(["--source", "msd", "--archive", str(archive), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert f"{out / 'Task06_Lung'}: 2 cases" in text and "--task" not in text
    files = [name for name in everything(out) if "." in Path(name).name]
    names = [f"Task06_Lung/{kind}/lung_00{n}.nii.gz" for kind in ("imagesTr", "labelsTr") for n in (1, 2)]
    assert files == [MARKER, *names]  # no ._ file
    assert everything(out.parent)[0] == "out" and not (out.parent / "out.unpacking").exists()


@pytest.mark.parametrize(
    "evil",
    [
        member("../evil.nii.gz"),
        member("Task06_Lung/../../evil.nii.gz"),
        member("/tmp/evil.nii.gz"),
        member("C:/evil.nii.gz"),
        member("..\\evil.nii.gz"),
        member("Task06_Lung/link", tarfile.SYMTYPE, "/etc"),
        member("Task06_Lung/hard", tarfile.LNKTYPE, "Task06_Lung/imagesTr/lung_001.nii.gz"),
        member("Task06_Lung/pipe", tarfile.FIFOTYPE),
        member("Task06_Lung/device", tarfile.CHRTYPE),
    ],
    ids=lambda info: info.name.replace("/", "_"),
)
def test_a_hostile_tar_leaves_nothing(tmp_path, capsys, evil):
    archive = make_tar(tmp_path / "evil.tar", make_decathlon(tmp_path / "a"), extra=[evil])
    before = everything(tmp_path)
    assert main(["--archive", str(archive), "--out", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert "evil.tar" in err and repr(evil.name) in err and "nothing was unpacked" in err
    assert everything(tmp_path) == before


def test_a_link_then_a_file_through_it(tmp_path):
    (tmp_path / "victim").mkdir()
    extra = [member("Task06_Lung/d", tarfile.SYMTYPE, str(tmp_path / "victim")), member("Task06_Lung/d/evil")]
    archive = make_tar(tmp_path / "evil.tar", make_decathlon(tmp_path / "a"), extra=extra)
    assert main(["--archive", str(archive), "--out", str(tmp_path / "out")]) == 1
    assert not any((tmp_path / "victim").iterdir())


def test_damaged_or_wrong_archives(tmp_path, capsys):
    whole = make_tar(tmp_path / "whole.tar", make_decathlon(tmp_path / "a")).read_bytes()
    zipped = make_tar(tmp_path / "whole.tar.gz", tmp_path / "a", mode="w:gz").read_bytes()
    first_label = whole.index(b"Task06_Lung/labelsTr")
    (tmp_path / "cut_in_data.tar").write_bytes(whole[: first_label - 700])
    (tmp_path / "cut_in_header.tar").write_bytes(whole[: first_label + 100])
    (tmp_path / "cut_between.tar").write_bytes(whole[:first_label])
    (tmp_path / "overwritten.tar").write_bytes(whole[:first_label] + b"x" * 512 + whole[first_label + 512 :])
    (tmp_path / "short.tar.gz").write_bytes(zipped[: len(zipped) // 2])
    make_kaggle(tmp_path / "raw")
    make_tar(tmp_path / "other.tar", tmp_path / "raw")
    before = everything(tmp_path)
    for name, reason in (
        ("cut_in_data.tar", "not a complete tar"),
        ("cut_in_header.tar", "not a complete tar"),
        ("cut_between.tar", "not a complete tar"),
        ("overwritten.tar", "not a complete tar"),
        ("short.tar.gz", "not a complete tar"),
        ("raw/Task006_Lung/CT.zip", "a zip from Kaggle is to be unzipped by hand"),
        ("other.tar", "holds no folder imagesTr"),
        ("absent.tar", "absent.tar"),
    ):
        assert main(["--archive", str(tmp_path / name), "--out", str(tmp_path / "out")]) == 1
        assert reason in capsys.readouterr().err
    assert everything(tmp_path) == before


def test_ctrl_c_while_unpacking_leaves_nothing(tmp_path, capsys, monkeypatch):
    archive = make_tar(tmp_path / "whole.tar", make_decathlon(tmp_path / "a"))
    before = everything(tmp_path)

    def interrupt(packed, file, size):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(download.shutil, "copyfileobj", interrupt)
    assert main(["--archive", str(archive), "--out", str(tmp_path / "out")]) == 130
    assert "Stopped" in capsys.readouterr().err
    assert everything(tmp_path) == before


def test_what_a_killed_run_left_is_cleared(tmp_path):
    part = tmp_path / "out.unpacking"
    (part / "Task06_Lung").mkdir(parents=True)
    archive = make_tar(tmp_path / "whole.tar", make_decathlon(tmp_path / "a"))
    argv = ["--archive", str(archive), "--out", str(tmp_path / "out")]
    assert main(argv) == 1  # without the marker it may be anyone's
    assert part.is_dir()
    (part / MARKER).touch()
    assert main(argv) == 0
    assert not part.exists()


# ---- Kaggle ----


def by_hand(capsys, out):
    text = capsys.readouterr().out
    for words in (
        "https://www.kaggle.com/datasets/modaresimr/medical-image-segmentation",
        "Click Download",
        f"{out}/Task006_Lung",
        f"python lung_tumor/download.py --out {out}",
        "--source msd",
    ):
        assert words in text
    return text


def test_without_kagglehub_the_steps_by_hand_are_printed(tmp_path, capsys):
    assert main(["--out", str(tmp_path / "out")]) == 1
    assert "pip install kagglehub" in by_hand(capsys, tmp_path / "out")
    assert everything(tmp_path) == []


@pytest.mark.parametrize(
    "error", [ConnectionError("no route to host"), ValueError("no credentials"), Exception("403 Forbidden")]
)
def test_offline_or_refused_prints_the_reason_and_the_steps(tmp_path, capsys, monkeypatch, error):
    def fail(handle):
        Path(download.os.environ["KAGGLEHUB_CACHE"], "datasets").mkdir()
        raise error

    fake_kagglehub(monkeypatch, fail)
    assert main(["--out", str(tmp_path / "out")]) == 1
    text = by_hand(capsys, tmp_path / "out")
    assert f"{type(error).__name__}: {error}" in text
    assert everything(tmp_path) == []


def test_source_msd_prints_its_steps(tmp_path, capsys):
    assert main(["--source", "msd", "--out", str(tmp_path / "out")]) == 1
    text = capsys.readouterr().out
    assert "medicaldecathlon.com" in text and f"--out {tmp_path / 'out'} --archive" in text
    assert everything(tmp_path) == []


def test_downloads_then_moves_into_place(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()  # an empty folder may be there

    def fetch(handle):
        assert handle == "modaresimr/medical-image-segmentation"
        cache = Path(download.os.environ["KAGGLEHUB_CACHE"])
        (cache / "datasets" / "1.complete").parent.mkdir(parents=True)
        (cache / "datasets" / "1.complete").touch()
        return str(make_kaggle(cache / "datasets" / "versions" / "1"))

    fake_kagglehub(monkeypatch, fetch)
    assert main(["--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert f"{out / 'Task006_Lung'}: 1 cases" in text
    assert (
        f"Next: python lung_tumor/preprocess.py --source {out} --out data/lung_tumor --task Task006_Lung"
        in text
    )
    assert sorted(path.name for path in out.iterdir()) == [MARKER, "Task001_LiverTumor", "Task006_Lung"]
    assert everything(tmp_path)[0] == "out" and not (tmp_path / "out.partial").exists()
    assert main(["--out", str(out), "--force"]) == 0


def test_ctrl_c_keeps_the_fetched_part_for_the_next_run(tmp_path, capsys, monkeypatch):
    def interrupt(handle):
        Path(download.os.environ["KAGGLEHUB_CACHE"], "1.archive").write_bytes(b"half of 40 GB")
        raise KeyboardInterrupt

    fake_kagglehub(monkeypatch, interrupt)
    out = tmp_path / "out"
    assert main(["--out", str(out)]) == 130
    assert "run the same command again" in capsys.readouterr().err
    assert not out.exists()
    assert everything(tmp_path) == ["out.partial", f"out.partial/{MARKER}", "out.partial/1.archive"]

    def go_on(handle):
        cache = Path(download.os.environ["KAGGLEHUB_CACHE"])
        assert (cache / "1.archive").read_bytes() == b"half of 40 GB"
        return str(make_kaggle(cache / "1"))

    fake_kagglehub(monkeypatch, go_on)
    assert main(["--out", str(out)]) == 0
    assert not (tmp_path / "out.partial").exists()


def test_a_mounted_copy_is_used_where_it_is(tmp_path, capsys, monkeypatch):
    """In a Kaggle notebook kagglehub returns a read-only folder outside of its cache."""
    mounted = make_kaggle(tmp_path / "input")
    fake_kagglehub(monkeypatch, lambda handle: str(mounted))
    assert main(["--out", str(tmp_path / "out")]) == 0
    assert f"--source {mounted} " in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["input"]


def test_help_shows_the_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "python lung_tumor/download.py --out" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_tar_that_announces_more_than_the_disk_has_leaves_nothing(tmp_path, monkeypatch, mode):
    with tarfile.open(tmp_path / "bomb.tar", mode) as tar:
        for number in range(3):
            member = tarfile.TarInfo(f"Task06_Lung/imagesTr/lung_{number:03}.nii.gz")
            member.size = 600
            tar.addfile(member, io.BytesIO(bytes(600)))
    usage = type("Usage", (), {"free": 1500})
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(tarfile.TarFile, "extractfile", lambda *args: pytest.fail("something was unpacked"))
    with pytest.raises(OSError, match="bomb.tar takes 0.0 GB unpacked, .* has less free"):
        download.unpack_tar(tmp_path / "bomb.tar", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bomb.tar"]
    usage.free = 2000
    monkeypatch.undo()
    with tarfile.open(tmp_path / "bomb.tar") as tar:
        assert len(download.checked_members(tar, tmp_path / "bomb.tar", tmp_path)) == 3
