"""Fetch and check the lung tumour scans, from Kaggle or from the Medical Segmentation Decathlon's archive.

    python lung_tumor/download.py --out data/lung_tumor_raw
    python lung_tumor/download.py --out data/lung_tumor_raw --archive Task06_Lung.tar

Ends with the number of cases and the command that comes next, or with the steps to do by hand.
"""

import argparse
import os
import shlex
import shutil
import sys
import tarfile
import zlib
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.archives import MARKER, check_own, delete_own, leads_outside, make_own, require_space
from common.config import Switch, make_parser, parse_args, run_script
from common.conversion import failure_reason
from common.decathlon import find_decathlon, list_cases
from common.files import refuse_pipe
from lung_tumor.kaggle import find_task, is_kaggle_folder, list_kaggle_cases

KAGGLE_SET = "modaresimr/medical-image-segmentation"
KAGGLE_STEPS = """By hand, in a browser:
  1. Open https://www.kaggle.com/datasets/{set} and sign in; an account is free.
  2. Click Download, then "Download dataset as zip" (about 40 GB; only its folder Task006_Lung is used).
  3. Unzip it so that {out}/Task006_Lung holds CT.zip (leave this one packed), GroundTruth and metadata.json.
  4. Run: python lung_tumor/download.py --out {out}
If Kaggle asked for credentials: on kaggle.com click your picture, Settings, API, create a token, save it as
kaggle.json in the folder .kaggle of your home folder, and run this command again.
Without Kaggle: python lung_tumor/download.py --out {out} --source msd"""
MSD_STEPS = """The Decathlon hands out its files through a browser:
  1. Open http://medicaldecathlon.com and follow the link to the data.
  2. Download Task06_Lung.tar (several GB).
  3. Run: python lung_tumor/download.py --out {out} --archive <where it lies>/Task06_Lung.tar"""


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("--out", default="data/lung_tumor_raw", help="folder that the scans are written to")
    parser.add_argument(
        "--source",
        choices=["kaggle", "msd"],
        default="kaggle",
        help="where to get the scans: kaggle fetches about 40 GB, msd prints the steps to do by hand",
    )
    parser.add_argument(
        "--archive",
        help="what you have already: Task06_Lung.tar, which is unpacked, or a folder of scans, which is "
        "used in place",
    )
    parser.add_argument(
        "--force",
        action=Switch,
        default=False,
        help="fetch the scans anew, although --out holds some; it is replaced only if this script made it",
    )
    return parser


def checked_members(tar: tarfile.TarFile, archive: Path, folder: Path) -> list[tarfile.TarInfo]:
    """The files of a tar, whose headers are all read before anything is unpacked; macOS resource files are
    left out.

    Raises:
        ValueError: a member that is a link or a device or leads outside.
        OSError: there is no room in `folder` for what they announce.
        tarfile.TarError: damaged or cut off.
    """
    members, size = [], 0
    for member in tar:
        if member.isdir() or member.name.rpartition("/")[2].startswith("._"):
            continue
        if not member.isfile() or leads_outside(member.name):
            raise ValueError(
                f"{archive}: member {member.name!r} is a link, a device or leads out of the folder; "
                "nothing was unpacked. Get the archive from http://medicaldecathlon.com"
            )
        members.append(member)
        size += member.size
        require_space(size, folder, archive)  # at once: the headers of a bomb alone take hours
    tar.fileobj.seek(tar.offset)
    # tarfile would take a cut between two members for the end.
    if tar.fileobj.read(512) != bytes(512):
        raise tarfile.ReadError("its end is missing")
    return members


def unpack_tar(archive: Path, out: Path) -> None:
    """Unpack beside `out`, then rename. After an error `out` is as it was before.

    Raises:
        ValueError: a damaged tar, as `checked_members`, or another layout than the Decathlon's.
        OSError: the disk has no room for it.
    """
    refuse_pipe(archive)
    part = out.with_name(out.name + ".unpacking")
    delete_own(part)
    print(f"Unpacking {archive} ...")
    try:
        with tarfile.open(archive) as tar, tqdm(unit="B", unit_scale=True, disable=None) as bar:
            make_own(part)
            for member in checked_members(tar, archive, part):
                target = part / member.name
                target.parent.mkdir(parents=True, exist_ok=True)
                with tar.extractfile(member) as packed, open(target, "wb") as file:
                    shutil.copyfileobj(packed, file, 1 << 20)
                bar.update(member.size)
        if find_decathlon(part) is None:
            raise ValueError(
                f"{archive}: holds no folder imagesTr; Task06_Lung.tar of the Decathlon is needed"
            )
        delete_own(out)
        part.rename(out)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        advice = "download it again; a zip from Kaggle is to be unzipped by hand"
        raise ValueError(f"{archive}: not a complete tar ({error}); {advice}") from error
    finally:
        delete_own(part)


def download_kaggle(out: Path) -> Path:
    """Let kagglehub fetch the set beside `out`, then rename it to `out`; returns where the set lies.

    Raises:
        RuntimeError: kagglehub is missing or gave up; what it has fetched stays in `out`.partial for the next
            time.
    """
    part = out.with_name(out.name + ".partial")
    try:
        import kagglehub

        make_own(part)
        os.environ["KAGGLEHUB_CACHE"] = str(part.resolve())
        found = Path(kagglehub.dataset_download(KAGGLE_SET))
    except Exception as error:  # network, credentials, disk, ...: all end in the steps by hand
        raise RuntimeError(f"kagglehub (pip install kagglehub): {type(error).__name__}: {error}") from error
    finally:
        if not any(path.is_file() and path.name != MARKER for path in part.rglob("*")):
            delete_own(part)
    if part.resolve() not in found.resolve().parents:  # a Kaggle notebook mounts its own copy, read-only
        return found
    (found / MARKER).touch()
    delete_own(out)
    found.rename(out)
    delete_own(part)
    return out


def report(folder: Path) -> None:
    """Check what lies in the folder and print it with the next command."""
    if (task := find_decathlon(folder)) is not None:
        num_cases, source, flag = len(list_cases(task)), task, ""
    elif is_kaggle_folder(folder):
        task = find_task(folder, "lung")
        num_cases, source, flag = len(list_kaggle_cases(task)), folder, f" --task {shlex.quote(task.name)}"
    else:
        raise ValueError(
            f"{folder}: holds neither imagesTr and labelsTr (Decathlon) nor CT.zip and GroundTruth (Kaggle). "
            "Give the right folder as --archive, or another --out for a download"
        )
    size_gb = sum(path.stat().st_size for path in task.rglob("*") if path.is_file()) / 1e9
    print(f"{task}: {num_cases} cases, {size_gb:.2f} GB")
    source = shlex.quote(str(source))
    print(f"Next: python lung_tumor/preprocess.py --source {source} --out data/lung_tumor{flag}")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(build_parser(), argv)
    out = found = Path(args.out)
    try:
        if args.archive and Path(args.archive).is_dir():
            found = Path(args.archive)
        elif args.force or not out.is_dir() or not any(out.iterdir()):
            check_own(out)
            if args.archive:
                unpack_tar(Path(args.archive), out)
            elif args.source == "kaggle":
                if args.force:
                    delete_own(out.with_name(out.name + ".partial"))
                found = download_kaggle(out)
            else:
                print(MSD_STEPS.format(out=out))
                return 1
        else:
            print(f"{out} is there already; --force gets it anew")
        report(found)
    except RuntimeError as error:
        print(f"{error}\n{KAGGLE_STEPS.format(set=KAGGLE_SET, out=out)}")
        return 1
    except (OSError, ValueError) as error:
        print(f"error: {failure_reason(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"Stopped. {out} is as it was; run the same command again.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    run_script(main)
