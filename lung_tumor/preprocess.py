"""Convert lung CT with tumour masks to 8-bit slices for training.

    python lung_tumor/preprocess.py --source Task06_Lung --out data/lung_tumor

Reads the Decathlon layout (imagesTr/, labelsTr/) or the Kaggle layout (TaskXXX_Name/CT.zip,
GroundTruth/*.pkl). Writes images/ and labels/ (PNG), dataset.json, volumes.json (geometry of each scan) and
splits.json (by patient). All slices with tumour are kept and a share of the others. Run it again to go on
where it stopped.
"""

import glob
import json
import os
import random
import shlex
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.config import Switch, fraction, make_parser, parse_args, run_script
from common.conversion import convert_cases, write_json
from common.decathlon import Case, find_decathlon, read_dataset_json
from common.splits import check_split, natural_key, patients_of, read_splits, save_splits, split_by_patient
from lung_tumor.cases import find_cases, load_case, source_files, source_stamp
from lung_tumor.dataset import read_json
from lung_tumor.explore import explore
from lung_tumor.kaggle import KaggleCase
from lung_tumor.phantoms import write_chest_phantoms
from lung_tumor.slices import to_display, volume_to_slices, write_png

WINDOW_HU = (-1024.0, 325.0)  # wide enough for lung, soft tissue and contrast; 5.3 HU a grey level


@dataclass(frozen=True)
class Settings:
    """What decides the pixels; a volume made with other settings is made again."""

    window_hu: tuple[float, float] = WINDOW_HU
    empty_ratio: float = 0.1
    all_slices: bool = False
    min_pixels: int = 0
    seed: int = 42


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("--source", default="data/lung_tumor_raw", help="folder in one of the two layouts")
    parser.add_argument("--out", default="data/lung_tumor", help="folder of the converted data set")
    parser.add_argument(
        "--task", default="Task006_Lung", help="Kaggle layout: which task, any part of its name"
    )
    parser.add_argument(
        "--window",
        type=float,
        nargs=2,
        default=WINDOW_HU,
        metavar=("LOW", "HIGH"),
        help="HU that become 0 and 255, the same for all slices; lung -1350 150, mediastinum -160 240",
    )
    parser.add_argument(
        "--empty_ratio", type=fraction, default=0.1, help="share of tumour-free slices to keep"
    )
    parser.add_argument(
        "--all_slices",
        action=Switch,
        default=False,
        help="write every slice, so that evaluation needs no NIfTI; training still uses the kept ones",
    )
    parser.add_argument(
        "--min_pixels", type=int, default=0, help="leave out slices with less tumour than this"
    )
    parser.add_argument("--seed", type=int, default=42, help="draws the empty slices and the split")
    parser.add_argument("--val_ratio", type=fraction, default=0.2, help="share of patients for validation")
    parser.add_argument("--test_ratio", type=fraction, default=0.0, help="share of patients for a test set")
    parser.add_argument("--val_cases", nargs="+", help="name the validation volumes instead of drawing them")
    parser.add_argument("--test_cases", nargs="+", help="name the test volumes instead of drawing them")
    parser.add_argument(
        "--patient_pattern", help="regular expression whose group is the patient in a case name"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes; 0 = this one only"
    )
    parser.add_argument(
        "--explore",
        action=Switch,
        default=False,
        help="only print and plot what is there: explore.csv and explore.png under --out",
    )
    return parser


def choose_slices(mask: np.ndarray, volume: str, settings: Settings) -> list[int]:
    """Numbers of the slices to keep: all with tumour, a share of the others, none with less than min_pixels.

    Seeded by volume, so the choice does not depend on which other volumes are converted.
    """
    pixels = mask.reshape(len(mask), -1).sum(axis=1)
    tumour = [int(z) for z in np.flatnonzero(pixels >= max(1, settings.min_pixels))]
    empty = [int(z) for z in np.flatnonzero(pixels == 0)]
    chooser = random.Random(f"{settings.seed} {volume}")
    num_empty = round(settings.empty_ratio * len(empty))
    if not tumour and empty:
        num_empty = max(1, num_empty)  # a volume without any slice could not stand in a split
    return sorted(tumour + chooser.sample(empty, num_empty))


def convert_case(case: Case | KaggleCase, out: Path, settings: Settings) -> dict:
    """Write the slices of one case; returns its entry of volumes.json. Runs in a worker process."""
    volume = case.case_id
    scan, mask = load_case(case)
    slices, masks = volume_to_slices(scan.array, settings.window_hu), to_display(mask)
    kept = choose_slices(mask, volume, settings)
    for folder in ("images", "labels"):
        for old in (out / folder).glob(f"{glob.escape(volume)}_slice_*.png"):
            old.unlink()
    for z in range(len(slices)) if settings.all_slices else kept:
        name = f"{volume}_slice_{z:04d}.png"
        write_png(out / "images" / name, slices[z])
        write_png(out / "labels" / name, masks[z] * np.uint8(255))
    return {
        "source": source_files(case),
        "stamp": source_stamp(case),
        "num_slices": len(slices),
        "kept": kept,
        "tumour_slices": [int(z) for z in np.flatnonzero(mask.any(axis=(1, 2)))],
        "tumour_mm3": round(float(mask.sum()) * scan.voxel_mm3, 1),
        "tumour_pixels_kept": int(mask[kept].sum()),
        "shape_zyx": list(scan.array.shape),
        "spacing_mm": [round(s, 6) for s in scan.spacing_mm],
        "voxel_mm3": scan.voxel_mm3,
        "affine": scan.affine.tolist(),
        "file_orientation": scan.orientation,
        "settings": json.loads(json.dumps(asdict(settings))),
    }


def convert_all(cases: list, out: Path, settings: Settings, workers: int) -> tuple[dict, dict[str, str]]:
    """Convert what is not done yet with these settings from these files.

    Returns:
        (entries of volumes.json, {failed volume: reason}).
    """
    for folder in ("images", "labels"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    wanted, known = json.loads(json.dumps(asdict(settings))), read_json(out, "volumes.json")
    done = {}
    for case in cases:
        entry = known.get(case.case_id)
        if entry and entry["settings"] == wanted and entry["stamp"] == source_stamp(case):
            done[case.case_id] = entry
    todo = [c for c in cases if c.case_id not in done]
    if todo:
        (out / "dataset.json").unlink(missing_ok=True)  # its absence tells that the conversion is unfinished
    if done:
        print(f"{len(done)} of {len(cases)} volumes are converted already")
    failed: dict[str, str] = {}
    for case, entry, error in tqdm(
        convert_cases(convert_case, todo, out, settings, workers=workers),
        "converting",
        total=len(todo),
        unit="volume",
        disable=None,
    ):
        if entry is None:
            failed[case.case_id] = error
            continue
        done[case.case_id] = entry
        ordered = dict(sorted(done.items(), key=lambda item: natural_key(item[0])))
        write_json(out / "volumes.json", ordered)
    return done, failed


def write_splits(out: Path, volumes: list[str], args) -> None:
    """splits.json as the flags ask for; one that fits the volumes is kept unless volumes are named."""
    volumes = sorted(volumes, key=natural_key)
    patients = patients_of(volumes, args.patient_pattern)
    path = out / "splits.json"
    if args.val_cases or args.test_cases:
        val, test = args.val_cases or [], args.test_cases or []
        split = {"train": [v for v in volumes if v not in {*val, *test}], "val": val, "test": test}
    else:
        if path.is_file():
            split, known = read_splits(path)
            if known == patients:
                print(f"split: kept as it stands in {path}; delete that file to draw another")
                return
            print(f"split: drawn anew, because {path} was of other volumes")
        split = split_by_patient(
            patients, val_ratio=args.val_ratio, test_ratio=args.test_ratio, seed=args.seed
        )
    check_split(split, patients, path)
    save_splits(path, split, patients, args.seed)
    print("split by patient: " + ", ".join(f"{part} {len(cases)}" for part, cases in split.items()))


def demo_dataset(folder: str | Path = "data/demo/lung_tumor") -> Path:
    """Phantom chest CT in the Decathlon layout, converted by the ordinary route; made once."""
    folder = Path(folder)
    source = write_chest_phantoms(folder / "Task06_Lung")
    out = folder / "slices"
    if not (out / "splits.json").is_file():
        flags = ["--source", str(source), "--out", str(out), "--test_ratio", "0.2", "--empty_ratio", "0.2"]
        if convert(parse_args(build_parser(), flags)):
            raise ValueError(f"{source}: the phantoms could not be converted; delete {folder} and try again")
    return out


def convert(args: Namespace) -> dict[str, str]:
    """The whole conversion that the flags ask for; returns {failed volume: reason}.

    Raises:
        ValueError, OSError: nothing can be converted as asked.
    """
    low, high = args.window
    if not low < high:
        raise ValueError(f"--window {low:g} {high:g}: the first number must be the lower one")
    cases, out = find_cases(args.source, args.task), Path(args.out)
    ids = [c.case_id for c in cases]
    patients_of(ids, args.patient_pattern)  # before the work, not after it
    for name in [*(args.val_cases or []), *(args.test_cases or [])]:
        if name not in ids:
            raise ValueError(f"volume {name}, which is not in the data set: {', '.join(ids[:10])}")
    settings = Settings((low, high), args.empty_ratio, args.all_slices, args.min_pixels, args.seed)
    done, failed = convert_all(cases, out, settings, args.workers)
    if failed:
        print(f"{len(failed)} volume(s) could not be converted:")
        for volume, reason in failed.items():
            print(f"  {volume}: {reason}")
    if not done:
        return failed
    write_splits(out, list(done), args)
    origin = find_decathlon(args.source) or args.source
    kept = sum(len(e["kept"]) for e in done.values())
    tumour = sum(len(set(e["kept"]) & set(e["tumour_slices"])) for e in done.values())
    pixels = sum(len(e["kept"]) * e["shape_zyx"][1] * e["shape_zyx"][2] for e in done.values())
    share = sum(e["tumour_pixels_kept"] for e in done.values()) / max(pixels, 1)
    content = {
        "name": read_dataset_json(origin).get("name", Path(origin).name),
        "window_hu": [low, high],
        "labels": {"0": "background", "1": "tumour"},
        "num_volumes": len(done),
        "num_slices": kept,
        "num_tumour_slices": tumour,
        "tumour_pixel_share": share,
    }
    write_json(out / "dataset.json", content)
    print(f"{len(done)} volumes, {kept} slices for training, {tumour} of them with tumour")
    print(f"{100 * share:.2f} % of the pixels are tumour; window {low:g}..{high:g} HU")
    return failed


def main(argv: list[str] | None = None) -> int:
    args = parse_args(build_parser(), argv)
    try:
        if args.explore:
            return explore(find_cases(args.source, args.task), load_case, Path(args.out))
        if convert(args):
            return 1
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"next: python lung_tumor/train.py --data_path {shlex.quote(args.out)}")
    return 0


if __name__ == "__main__":
    run_script(main)
