import http.server
import json
import threading
import zipfile
from pathlib import Path

import pytest

from common import archives
from common.archives import MARKER, check_zip, download_file, leads_outside, remote_size, unpack_zip
from verse_spine import download
from verse_spine.download import dataset_folder, main

SUBJECTS = ("sub-verse004", "sub-verse005")


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` {path: bytes}; the switches make it behave badly. Logs (method, path, range)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.log, self.etag = {}, [], '"1"'
        self.ranges, self.length, self.cut_after, self.heed_if_range = True, True, None, True

    def url(self, path):
        return f"http://127.0.0.1:{self.server_port}/{path}"

    def gets(self):
        return [entry[1:] for entry in self.log if entry[0] == "GET"]


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        server, path, asked = self.server, self.path.lstrip("/"), self.headers.get("Range")
        server.log.append((self.command, path, asked))
        if path not in server.files:
            return self.send_error(404)
        data, start = server.files[path], 0
        same = self.headers.get("If-Range") == server.etag or not server.heed_if_range
        if asked and server.ranges and same:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(data):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(data)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        if server.etag:
            self.send_header("ETag", server.etag)
        if server.length:
            self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if body:
            stop = len(data) if server.cut_after is None else start + server.cut_after
            self.wfile.write(data[start:stop])


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def make_zip(path, top="dataset-01training/", subjects=SUBJECTS, extra=()):
    """A zip in VerSe's layout; `top` is empty for the zips that OSF packs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr(f"{top}rawdata/", "")
        for s in subjects:
            packed.writestr(f"{top}rawdata/{s}/{s}_ct.nii.gz", s.encode() * 500)
            packed.writestr(f"{top}derivatives/{s}/{s}_seg-vert_msk.nii.gz", b"mask" * 100)
            packed.writestr(f"{top}derivatives/{s}/{s}_seg-subreg_ctd.json", "[]")
            packed.writestr(f"__MACOSX/{top}rawdata/{s}/._{s}_ct.nii.gz", b"resource fork")
        for member in extra:
            packed.writestr(member, b"evil")
    return path


def everything(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


DATA = bytes(range(256)) * 4000


# ---- download_file ----


def test_a_file_arrives_whole_and_its_size_is_known_before(server, tmp_path):
    server.files["a.zip"] = DATA
    assert remote_size(server.url("a.zip")) == len(DATA)
    assert remote_size(server.url("absent.zip")) is None
    path = download_file(server.url("a.zip"), tmp_path / "deep" / "a.zip")
    assert path.read_bytes() == DATA and everything(tmp_path) == ["deep/a.zip"]


def test_a_broken_connection_is_continued_by_range(server, tmp_path):
    server.files["a.zip"], server.cut_after = DATA, 400_000
    assert download_file(server.url("a.zip"), tmp_path / "a.zip").read_bytes() == DATA
    assert [asked for _, asked in server.gets()] == [None, "bytes=400000-", "bytes=800000-"]
    assert everything(tmp_path) == ["a.zip"]


def test_the_next_run_continues_what_the_last_one_left(server, tmp_path, monkeypatch):
    server.files["a.zip"], server.cut_after = DATA, 300_000
    with monkeypatch.context() as patch:
        patch.setattr(archives, "BLOCK", 1000)
        real_tqdm, blocks = archives.tqdm, []

        class Interrupting(real_tqdm):
            def update(self, n):
                blocks.append(n)
                if len(blocks) == 50:
                    raise KeyboardInterrupt

        patch.setattr(archives, "tqdm", Interrupting)
        with pytest.raises(KeyboardInterrupt):
            download_file(server.url("a.zip"), tmp_path / "a.zip")
    assert (tmp_path / "a.zip.part").stat().st_size == 50_000
    server.cut_after = None
    assert download_file(server.url("a.zip"), tmp_path / "a.zip").read_bytes() == DATA
    assert server.gets()[-1] == ("a.zip", "bytes=50000-")


@pytest.mark.parametrize("change", ["etag", "size", "etag of a server that ignores If-Range", "no etag"])
def test_a_changed_file_is_fetched_anew(server, tmp_path, change):
    server.files["a.zip"], server.cut_after = DATA, 300_000
    server.etag = None if change == "no etag" else server.etag
    part = tmp_path / "a.zip.part"
    with pytest.raises(ConnectionError, match="300000 of 1024000"):
        archives._fetch(server.url("a.zip"), part)
    server.files["a.zip"] = new = DATA[::-1] + (b"more" if change == "size" else b"")
    server.cut_after, server.heed_if_range = None, "ignores" not in change
    if "etag of" in change or change == "etag":
        server.etag = '"2"'
    elif change == "size":
        server.heed_if_range = False
    assert download_file(server.url("a.zip"), tmp_path / "a.zip").read_bytes() == new


def test_a_file_that_comes_in_more_pieces_than_tries_still_arrives(server, tmp_path):
    server.files["a.zip"], server.cut_after = DATA, 150_000
    assert download_file(server.url("a.zip"), tmp_path / "a.zip", tries=2).read_bytes() == DATA
    assert len(server.gets()) == 7


def test_a_server_without_ranges_sends_all_of_it_again(server, tmp_path):
    server.files["a.zip"], server.ranges, server.cut_after = DATA, False, 500_000
    with pytest.raises(OSError, match="500000 of 1024000"):
        download_file(server.url("a.zip"), tmp_path / "a.zip", tries=2)
    server.cut_after = None
    assert download_file(server.url("a.zip"), tmp_path / "a.zip").read_bytes() == DATA


def test_a_part_that_is_complete_already(server, tmp_path):
    """Ctrl-C between the last byte and the renaming: the server answers 416."""
    server.files["a.zip"] = DATA
    part = tmp_path / "a.zip.part"
    archives._fetch(server.url("a.zip"), part)
    assert download_file(server.url("a.zip"), tmp_path / "a.zip").read_bytes() == DATA
    assert server.gets()[-1] == ("a.zip", f"bytes={len(DATA)}-") and everything(tmp_path) == ["a.zip"]


def test_a_part_that_is_too_long_starts_again(server, tmp_path):
    server.files["a.zip"] = DATA
    part = tmp_path / "a.zip.part"
    archives._fetch(server.url("a.zip"), part)
    part.write_bytes(DATA + b"x")
    assert download_file(server.url("a.zip"), tmp_path / "a.zip").read_bytes() == DATA


def test_a_file_of_unknown_size(server, tmp_path):
    server.files["a.zip"], server.length = DATA, False
    assert download_file(server.url("a.zip"), tmp_path / "a.zip").read_bytes() == DATA


def test_refusals_name_the_address(server, tmp_path):
    with pytest.raises(OSError, match=r"absent\.zip: the server answers 404"):
        download_file(server.url("absent.zip"), tmp_path / "a.zip")
    with pytest.raises(OSError, match="127.0.0.1:9/a.zip"):
        download_file("http://127.0.0.1:9/a.zip", tmp_path / "a.zip")
    assert everything(tmp_path) == []


def test_a_full_disk_is_known_beforehand(server, tmp_path, monkeypatch):
    server.files["a.zip"] = DATA
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match="0.0 GB are missing, .* has less free") as caught:
        download_file(server.url("a.zip"), tmp_path / "a.zip")
    assert caught.value.errno == archives.errno.ENOSPC
    with pytest.raises(OSError, match="has less free"):
        unpack_zip(make_zip(tmp_path / "b.zip"), tmp_path / "out")
    assert everything(tmp_path) == ["b.zip"]


# ---- zips ----


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/etc/evil", "C:/evil", "..\\evil"])
def test_a_zip_that_leads_outside_leaves_nothing(tmp_path, name):
    assert leads_outside(name)
    archive = make_zip(tmp_path / "evil.zip", extra=[name])
    with pytest.raises(
        ValueError, match=r"evil\.zip: member .* leads out of the folder; nothing was unpacked"
    ):
        unpack_zip(archive, tmp_path / "out")
    assert everything(tmp_path) == ["evil.zip"] and not (tmp_path / "out").exists()


def test_a_link_in_a_zip_is_refused(tmp_path):
    link = zipfile.ZipInfo("rawdata/link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as packed:
        packed.writestr(link, "/etc")
    with pytest.raises(ValueError, match="'rawdata/link' is a link"):
        check_zip(tmp_path / "evil.zip")


def test_damaged_zips(tmp_path):
    whole = make_zip(tmp_path / "whole.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[:-300])
    (tmp_path / "page.zip").write_bytes(b"<html>Sorry</html>")
    position = whole.index(b"sub-verse004sub-verse004")
    (tmp_path / "bit.zip").write_bytes(whole[:position] + b"X" + whole[position + 1 :])
    for name, reason in (
        ("cut", "not a complete zip"),
        ("page", "not a complete zip"),
        ("bit", "is damaged"),
    ):
        with pytest.raises(ValueError, match=rf"{name}\.zip: .*{reason}.*download it again"):
            check_zip(tmp_path / f"{name}.zip")


# ---- the script ----


@pytest.fixture
def two_sources(server, monkeypatch):
    monkeypatch.setattr(
        download,
        "sources",
        lambda edition, part: {
            name: server.url(f"{name}/{download.archive_name(edition, part)}") for name in ("authors", "osf")
        },
    )
    return server


def serve(server, tmp_path, source, edition=19, part="training", **kwargs):
    archive = make_zip(tmp_path / "served.zip", **kwargs)
    server.files[f"{source}/{download.archive_name(edition, part)}"] = archive.read_bytes()
    archive.unlink()


def test_downloads_unpacks_and_says_what_comes_next(two_sources, tmp_path, capsys):
    out = tmp_path / "my data" / "verse"
    serve(two_sources, tmp_path, "authors")
    argv = ["--out", str(out), "--parts", "training"]
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert "To fetch: 1 zips, 0.0 GB\n" in text and "training: 2 scans of 2 patients\n" in text
    assert f"Next: python verse_spine/preprocess.py --source '{out}/verse19' --out data/verse_h5" in text
    folder = dataset_folder(out, 19, "training")
    assert folder == out / "verse19" / "dataset-01training"
    files = [f"rawdata/{s}/{s}_ct.nii.gz" for s in SUBJECTS]
    files += [f"derivatives/{s}/{s}_seg-vert_msk.nii.gz" for s in SUBJECTS]
    files += [f"derivatives/{s}/{s}_seg-subreg_ctd.json" for s in SUBJECTS]
    assert everything(folder) == sorted([*files, MARKER])
    assert everything(out) == sorted(f"verse19/dataset-01training/{f}" for f in [*files, MARKER])  # no zip
    before = len(two_sources.log)
    assert main(argv) == 0
    assert "is there already" in capsys.readouterr().out and len(two_sources.log) == before


@pytest.mark.parametrize("wrong", ["absent", "a page instead of a zip", "truncated", "another data set"])
def test_the_second_source_takes_over(two_sources, tmp_path, capsys, wrong):
    name = "authors/" + download.archive_name(19, "training")
    if wrong == "a page instead of a zip":
        two_sources.files[name] = b"<html>Moved</html>"
    elif wrong == "truncated":
        serve(two_sources, tmp_path, "authors")
        two_sources.files[name] = two_sources.files[name][:-200]
    elif wrong == "another data set":
        two_sources.files[name] = make_zip(tmp_path / "z.zip", top="a/b/c/d/").read_bytes()
    serve(two_sources, tmp_path, "osf", top="")
    assert main(["--out", str(tmp_path / "out"), "--parts", "training"]) == 0
    assert "did not work" in capsys.readouterr().out
    assert len(list(dataset_folder(tmp_path / "out", 19, "training").glob("rawdata/*/*_ct.nii.gz"))) == 2
    assert not list((tmp_path / "out").glob(".*"))


def test_offline_prints_the_steps_and_they_work(two_sources, tmp_path, capsys, monkeypatch):
    real = {"authors": download.AUTHORS, "osf": download.OSF}
    serve(two_sources, tmp_path, "authors", 20, "validation", top="dataset-02validation/")
    out = tmp_path / "out"
    assert main(["--out", str(out), "--dataset_edition", "20", "--parts", "validation", "test"]) == 1
    captured = capsys.readouterr()
    assert "VerSe20 test could not be fetched" in captured.err and "404" in captured.err
    assert two_sources.url("authors/dataset-verse20test.zip") in captured.out
    assert "dataset-verse20validation" not in captured.out.split("By hand")[1]  # this one was fetched
    assert "https://osf.io/4skx2" in captured.out
    assert f"--out {out} --dataset_edition 20 --parts test" in captured.out
    make_zip(tmp_path / "zips" / "dataset-verse20test.zip", top="", subjects=("sub-verse511",))
    argv = ["--out", str(out), "--dataset_edition", "20", "--parts", "test"]
    assert main([*argv, "--archives", str(tmp_path / "zips")]) == 0
    assert "test: 1 scans of 1 patients" in capsys.readouterr().out
    assert (tmp_path / "zips" / "dataset-verse20test.zip").is_file()
    assert "s3.bonescreen.de" in real["authors"] and "osf.io" in real["osf"]


def test_a_missing_or_bad_archive_leaves_things_as_they_were(tmp_path, capsys):
    zips = tmp_path / "zips"
    argv = ["--out", str(tmp_path / "out"), "--parts", "training", "--archives", str(zips)]
    assert main(argv) == 1
    assert "dataset-verse19training.zip" in capsys.readouterr().err
    for extra in (["../evil"], ()):
        make_zip(zips / "dataset-verse19training.zip", top="" if extra else "MICCAI/x/y/", extra=extra)
        assert main(argv) == 1
    assert "subject-based release" in capsys.readouterr().err
    assert everything(tmp_path) == ["zips/dataset-verse19training.zip"]
    assert not list((tmp_path / "out" / "verse19").iterdir())


def test_what_a_killed_run_left_is_cleared(tmp_path, capsys):
    left = tmp_path / "out" / "verse19" / ".dataset-01training.unpacking"
    left.mkdir(parents=True)
    (left / "half").touch()
    make_zip(tmp_path / "zips" / "dataset-verse19training.zip")
    argv = ["--out", str(tmp_path / "out"), "--parts", "training", "--archives", str(tmp_path / "zips")]
    assert main(argv) == 1  # without the marker it may be anyone's
    assert "was not made by this script" in capsys.readouterr().err
    (left / MARKER).touch()
    assert main(argv) == 0 and not left.exists()


def test_ctrl_c_keeps_the_part(two_sources, tmp_path, capsys, monkeypatch):
    serve(two_sources, tmp_path, "authors")

    def interrupt(url, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(path.name + ".part").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "download_file", interrupt)
    assert main(["--out", str(tmp_path / "out"), "--parts", "training"]) == 130
    assert "run the same command again" in capsys.readouterr().err
    assert everything(tmp_path) == ["out/.authors_dataset-verse19training.zip.part"]


def test_six_zips_have_two_sources_each():
    urls = [url for e in (19, 20) for p in download.PARTS for url in download.sources(e, p).values()]
    assert len(set(urls)) == 12
    assert "https://s3.bonescreen.de/public/VerSe-complete/dataset-verse20validation.zip" in urls
    assert all("jtfa5" in download.sources(19, p)["osf"] for p in download.PARTS)


def test_help_shows_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "python verse_spine/download.py --out data/verse" in capsys.readouterr().out
    assert Path(download.__file__).name == "download.py"


def test_a_full_disk_while_unpacking_keeps_the_zip(two_sources, tmp_path, capsys, monkeypatch):
    serve(two_sources, tmp_path, "authors")
    argv = ["--out", str(tmp_path / "out"), "--parts", "training"]
    with monkeypatch.context() as patch:
        patch.setattr(download, "unpack_zip", lambda *args: (_ for _ in ()).throw(OSError(28, "disk full")))
        assert main(argv) == 1
    assert "disk full" in capsys.readouterr().err
    fetched = len(two_sources.gets())
    assert main(argv) == 0 and len(two_sources.gets()) == fetched


def test_a_folder_in_the_way_is_noticed_before_the_download(two_sources, tmp_path, capsys):
    serve(two_sources, tmp_path, "authors")
    left = tmp_path / "out" / "verse19" / ".dataset-01training.unpacking"
    left.mkdir(parents=True)
    (left / "mine.txt").touch()
    assert main(["--out", str(tmp_path / "out"), "--parts", "training"]) == 1
    assert "was not made by this script" in capsys.readouterr().err and not two_sources.gets()


def test_a_zip_that_announces_too_much_is_not_even_read(tmp_path, monkeypatch):
    archive = make_zip(tmp_path / "b.zip")
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda self: pytest.fail("it was read"))
    with pytest.raises(OSError, match="b.zip takes 0.0 GB unpacked, .* has less free"):
        unpack_zip(archive, tmp_path / "out")
    assert everything(tmp_path) == ["b.zip"]


@pytest.mark.parametrize("note", ["other", "broken", '{"url": 1}', '{"url": "u", "version": null}'])
def test_a_part_of_another_address_is_not_continued(server, tmp_path, note):
    server.files["a.zip"] = DATA
    (tmp_path / "a.zip.part").write_bytes(b"x" * 1000)
    version = {"url": server.url("b.zip"), "version": server.etag, "size": len(DATA)}
    (tmp_path / "a.zip.part.json").write_text(json.dumps(version) if note == "other" else note)
    assert download_file(server.url("a.zip"), tmp_path / "a.zip").read_bytes() == DATA
    assert [asked for _, asked in server.gets()] == [None]
