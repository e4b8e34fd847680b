"""Get VerSe, the vertebrae of 355 patients in CT (CC BY-SA 4.0), in one edition or both.

    python verse_spine/download.py --out data/verse --dataset_edition 19
    python verse_spine/download.py --out data/verse --dataset_edition 19 20 --parts training validation
    python verse_spine/download.py --out data/verse --dataset_edition 20 --archives Downloads

Fetches up to six zips, about 30 GB together, each from the authors' server or, if that fails, from OSF. You
can stop it at any time; the same command goes on where it stopped. What is there already stays as it is.
VerSe20 leaves out scans that VerSe19 holds: take both for the whole data set. Ends with the number of scans
and the command that comes next, or with the steps to do by hand.
"""

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.archives import MARKER, delete_own, download_file, remote_size, unpack_zip
from common.config import make_parser, parse_args, run_script
from common.conversion import failure_reason
from verse_spine.cases import PARTS, find_cases

AUTHORS = "https://s3.bonescreen.de/public/VerSe-complete/dataset-verse{edition}{part}.zip"
# OSF packs a folder on request, so that its zips have no size beforehand and cannot be continued.
OSF = "https://files.de-1.osf.io/v1/resources/{node}/providers/osfstorage/{folder}/?zip="
OSF_NODES = {19: "jtfa5", 20: "4skx2"}
OSF_FOLDERS = {
    (19, "training"): "5ffca086e80d370320a594cc",
    (19, "validation"): "5ffcb524ba0109031c8931fa",
    (19, "test"): "5ffcbd71e80d370336a56f8c",
    (20, "training"): "5ffa463786541a01e714d390",
    (20, "validation"): "5ffa463686541a01eb15048c",
    (20, "test"): "5ffa4635ba010901f0891bd0",
}
STEPS = """By hand, in a browser:
  1. Download (second address: the same on OSF, where "Download this folder" of {nodes} does it too):
{addresses}
  2. Put the zips into one folder under the names of the first addresses.
  3. Run, with that folder in place of ZIPS:
     python verse_spine/download.py --out {out} --dataset_edition {editions} --parts {parts} \\
         --archives ZIPS"""


def sources(edition: int, part: str) -> dict[str, str]:
    """Where a zip can be had, {short name: address}, the first choice first."""
    osf = OSF.format(node=OSF_NODES[edition], folder=OSF_FOLDERS[edition, part])
    return {"authors": AUTHORS.format(edition=edition, part=part), "osf": osf}


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--out",
        default="data/verse",
        help="folder that the scans are written to, in its subfolders verse19 and verse20",
    )
    parser.add_argument(
        "--dataset_edition",
        type=int,
        nargs="+",
        choices=[19, 20],
        default=[19],
        help="editions of VerSe to fetch: 19, 20, or both (19 20)",
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        help="parts of the editions to fetch; default: all of them",
    )
    parser.add_argument(
        "--archives",
        help="folder with zips that you have already; they are unpacked instead of fetched, and are not "
        "changed",
    )
    return parser


def dataset_folder(out: Path, edition: int, part: str) -> Path:
    return out / f"verse{edition}" / f"dataset-0{PARTS.index(part) + 1}{part}"


def archive_name(edition: int, part: str) -> str:
    return f"dataset-verse{edition}{part}.zip"


def fetch(edition: int, part: str, out: Path, target: Path) -> None:
    """Fetch and unpack one zip from the first source that gives a whole one.

    Raises:
        RuntimeError: none did; says why for each.
        OSError: the disk is full.
    """
    delete_own(_unpacking(target))  # refuses before the download if someone else's folder is in the way
    reasons = []
    for source, url in sources(edition, part).items():
        # A source's own file, so that a part of one is never continued with bytes of another.
        archive = out / f".{source}_{archive_name(edition, part)}"
        try:
            print(f"VerSe{edition} {part}: {url}")
            if not archive.exists():  # it is there if the disk was too full to unpack it
                download_file(url, archive)
            unpack(archive, target)
        except (ValueError, OSError) as error:
            if getattr(error, "errno", None) is not None:
                raise
            reasons.append(failure_reason(error))
            print(f"  did not work: {error}")
            archive.unlink(missing_ok=True)
            continue
        archive.unlink()
        return
    raise RuntimeError(f"VerSe{edition} {part} could not be fetched: {'; '.join(reasons)}")


def _unpacking(target: Path) -> Path:
    return target.with_name(f".{target.name}.unpacking")


def unpack(archive: Path, target: Path) -> None:
    """Unpack beside `target`, then move the folder that holds rawdata there. After an error `target` is as it
    was before."""
    part = _unpacking(target)
    delete_own(part)
    try:
        unpack_zip(archive, part)
        found = [p.parent for depth in ("", "*/", "*/*/") for p in sorted(part.glob(f"{depth}rawdata"))]
        if len(found) != 1 or not (found[0] / "derivatives").is_dir():
            raise ValueError(
                f"{archive}: does not hold rawdata and derivatives of one part of VerSe; the zips of the "
                "subject-based release are needed, not those of the MICCAI challenge"
            )
        if found[0] != part:
            (found[0] / MARKER).touch()
        found[0].rename(target)
    finally:
        delete_own(part)


def report(out: Path, editions: list[int]) -> None:
    """Check what is there and print it with the next command."""
    cases = find_cases(out, tuple(editions))
    for part in dict.fromkeys(case.part for case in cases):
        of_part = [case for case in cases if case.part == part]
        without = [case.name for case in of_part if case.mask is None]
        note = f"; {len(without)} without a mask: {', '.join(without[:5])}" if without else ""
        print(f"{part}: {len(of_part)} scans of {len({c.subject for c in of_part})} patients{note}")
    source = out if len(editions) == 2 else out / f"verse{editions[0]}"
    print(f"Next: python verse_spine/preprocess.py --source {shlex.quote(str(source))} --out data/verse_h5")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(build_parser(), argv)
    out, editions = Path(args.out), sorted(set(args.dataset_edition))
    wanted = [(edition, part) for edition in editions for part in PARTS if part in args.parts]
    missing = [pair for pair in wanted if not dataset_folder(out, *pair).exists()]
    for pair in [pair for pair in wanted if pair not in missing]:
        print(f"{dataset_folder(out, *pair)} is there already")
    failed = []
    try:
        if missing and not args.archives:
            sizes = [remote_size(next(iter(sources(*pair).values()))) for pair in missing]
            known = sum(size or 0 for size in sizes) / 1e9
            rest = " and some of unknown size" if None in sizes else ""
            print(f"To fetch: {len(missing)} zips, {known:.1f} GB{rest}")
        for pair in missing:
            target = dataset_folder(out, *pair)
            target.parent.mkdir(parents=True, exist_ok=True)
            if args.archives:
                unpack(Path(args.archives) / archive_name(*pair), target)
                continue
            try:
                fetch(*pair, out, target)
            except RuntimeError as error:
                failed.append(pair)
                print(f"error: {error}", file=sys.stderr)
        if failed:
            rows = [f"     {url}" for pair in failed for url in sources(*pair).values()]
            nodes = " and ".join(f"https://osf.io/{OSF_NODES[e]}" for e in sorted({e for e, _ in failed}))
            steps = STEPS.format(
                nodes=nodes,
                addresses="\n".join(rows),
                out=shlex.quote(str(out)),
                editions=" ".join(sorted({str(edition) for edition, _ in failed})),
                parts=" ".join(sorted({part for _, part in failed})),
            )
            print(steps)
            return 1
        report(out, editions)
    except (OSError, ValueError) as error:
        print(f"error: {failure_reason(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped. What was fetched is kept; run the same command again.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    run_script(main)
