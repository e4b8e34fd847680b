"""Files from the network and archives from strangers: downloads that go on after a break, zips that are
checked and unpacked whole or not at all."""

import errno
import http.client
import json
import re
import shutil
import stat
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path

from tqdm import tqdm

from common.files import read_json, refuse_pipe

MARKER = ".made_by_download"  # file in folders that a download script made and may delete
BLOCK = 1 << 20  # bytes read at once
TIMEOUT_S = 60  # without an answer from the server
AGENT = {"User-Agent": "Mozilla/5.0 (dataset download)"}  # some hosts refuse Python's own name
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO}
FAILURES = (OSError, http.client.HTTPException)  # of a connection; URLError and TimeoutError are OSErrors


def check_own(folder: Path) -> None:
    """Raise ValueError unless the folder is absent, empty or made by a download script."""
    foreign = folder.is_dir() and any(folder.iterdir()) and not (folder / MARKER).is_file()
    if foreign or folder.is_symlink() or folder.is_file():
        raise ValueError(
            f"{folder} is not empty and was not made by this script (it has no file {MARKER}), so it is left "
            "alone; give another --out or move it away yourself"
        )


def delete_own(folder: Path) -> None:
    """Delete a folder that a download script made; links in it are removed, not followed."""
    check_own(folder)
    if folder.exists():
        for path in [path for path in folder.iterdir() if path.name != MARKER]:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        (folder / MARKER).unlink(missing_ok=True)  # last, so that an interrupted deletion can be repeated
        folder.rmdir()


def make_own(folder: Path) -> None:
    """Make a folder and mark it as a download script's."""
    check_own(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()


def leads_outside(member: str) -> bool:
    """Whether an archive's member with this name could be written outside of the folder it is unpacked to.

    `\\` and `C:` are harmless on one system and lead outside on another; here they always count as that.
    """
    return bool(re.search(r"[\\:\x00-\x1f]|^/|(^|/)\.\.(/|$)", member))


def remote_size(url: str) -> int | None:
    """How many bytes a file on a server has; None if the server cannot be reached or does not say."""
    try:
        request = urllib.request.Request(url, headers=AGENT, method="HEAD")
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            return int(response.headers["Content-Length"])
    except (*FAILURES, TypeError, ValueError):
        return None


def download_file(url: str, path: Path, *, tries: int = 5) -> Path:
    """Fetch a file. What has arrived when the connection breaks stays in `path`.part; the rest is fetched at
    once or by the next call. `path` appears when it is complete.

    Only the rest is asked for, as a byte range. All of the file is fetched anew if the server does not know
    ranges, or if its file has changed (by ETag, date or size).

    Args:
        tries: how many times in a row nothing may arrive.

    Raises:
        OSError: the server cannot be reached or refuses, nothing arrived `tries` times, or the disk is full.
        KeyboardInterrupt: is passed on; the part stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    failed = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _fetch(url, part)
            break
        except urllib.error.HTTPError as error:
            raise OSError(f"{url}: the server answers {error.code} {error.reason}") from error
        except FAILURES as error:
            if getattr(error, "errno", None) in DISK_ERRORS:
                raise
            now = part.stat().st_size if part.exists() else 0
            failed = 0 if now > before else failed + 1
            if failed >= tries or isinstance(error, urllib.error.URLError):
                raise OSError(
                    f"{url}: {getattr(error, 'reason', None) or error or type(error).__name__}"
                ) from error
    part.replace(path)
    _notes(part).unlink(missing_ok=True)
    return path


def _notes(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _fetch(url: str, part: Path) -> None:
    have, known = part.stat().st_size if part.exists() else 0, {}
    if have and _notes(part).is_file():
        try:
            known = read_json(_notes(part), {"url": str, "version": str, "size": int | None})
        except ValueError:
            known = {}  # damaged, or the server gave no version: nothing tells what the part is a part of
    headers = dict(AGENT)
    if have and known.get("url") == url:
        headers |= {"Range": f"bytes={have}-", "If-Range": known["version"]}
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        if error.headers.get("Content-Range") == f"bytes */{have}" and known.get("size") == have:
            return  # it was complete already
        part.unlink()
        return _fetch(url, part)
    with response:
        version = response.headers.get("ETag") or response.headers.get("Last-Modified")
        if version and version.startswith("W/"):
            version = response.headers.get("Last-Modified")  # a weak tag allows no range
        length = response.headers.get("Content-Length")
        size = int(length) if length else None
        if response.status == 206:
            match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
            size = int(match[2]) if match and match[2] != "*" else None
            if not match or int(match[1]) != have or version != known["version"] or size != known.get("size"):
                part.unlink()
                return _fetch(url, part)
        else:
            have = 0
        need = (size or 0) - have
        if need > shutil.disk_usage(part.parent).free:
            raise OSError(
                errno.ENOSPC,
                f"{need / 1e9:.1f} GB are missing, {part.parent} has less free; make room",
            )
        _notes(part).write_text(json.dumps({"url": url, "version": version, "size": size}))
        name = part.name.removesuffix(".part")
        with (
            open(part, "ab" if have else "wb") as file,
            tqdm(desc=name, total=size, initial=have, unit="B", unit_scale=True, disable=None) as bar,
        ):
            while block := response.read(BLOCK):
                file.write(block)
                bar.update(len(block))
                have += len(block)
    if size is not None and have != size:
        raise ConnectionError(f"{url}: the connection broke after {have} of {size} bytes")


def require_space(size: int, folder: Path, what: str | Path) -> None:
    """Refuse to write `size` bytes to the disk of a folder that has less free.

    Raises:
        OSError: with the size; `what` stands in front.
    """
    if size > shutil.disk_usage(folder).free:
        raise OSError(
            errno.ENOSPC,
            f"{what} takes {size / 1e9:.1f} GB unpacked, {folder} has less free; make room",
        )


def check_zip(archive: Path, folder: Path | None = None) -> list[zipfile.ZipInfo]:
    """The files in a zip, all of which is read once and compared with its checksums.

    Args:
        folder: on whose disk there must be room for what the members announce; None: that is not asked.

    Raises:
        ValueError: not a zip, damaged or encrypted, or a member is a link or leads out of the folder.
        OSError: the disk has no room for it.
    """
    refuse_pipe(archive)
    try:
        with zipfile.ZipFile(archive) as packed:
            members = [m for m in packed.infolist() if not m.is_dir()]
            for member in members:
                if leads_outside(member.filename) or stat.S_ISLNK(member.external_attr >> 16):
                    raise ValueError(
                        f"{archive}: member {member.filename!r} is a link or leads out of the folder; "
                        "nothing was unpacked. Get the archive from its publisher"
                    )
            if folder is not None:  # before reading, which unpacks a bomb as well
                require_space(sum(member.file_size for member in members), folder, archive)
            broken = packed.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise ValueError(f"{archive}: not a complete zip ({error}); download it again") from error
    if broken is not None:
        raise ValueError(f"{archive}: member {broken} is damaged; download it again")
    return members


def unpack_zip(archive: Path, folder: Path) -> None:
    """Unpack a zip into a new folder made by `make_own`; macOS resource files are left out.

    Raises:
        ValueError: as `check_zip`, before anything is written.
        OSError: the disk has no room for it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    members = check_zip(archive, folder.parent)
    members = [m for m in members if not re.search(r"(^|/)(\._|__MACOSX/)", m.filename)]
    size = sum(member.file_size for member in members)
    make_own(folder)
    with (
        zipfile.ZipFile(archive) as packed,
        tqdm(desc=f"unpacking {archive.name}", total=size, unit="B", unit_scale=True, disable=None) as bar,
    ):
        for member in members:
            target = folder / member.filename
            target.parent.mkdir(parents=True, exist_ok=True)
            with packed.open(member) as source, open(target, "wb") as file:
                while block := source.read(BLOCK):
                    file.write(block)
                    bar.update(len(block))
