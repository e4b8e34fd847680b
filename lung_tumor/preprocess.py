"""Convert lung CT with tumour masks to 8-bit slices for training.

    python lung_tumor/preprocess.py --source Task06_Lung --out data/lung_tumor

Reads the Decathlon layout (imagesTr/, labelsTr/) or the Kaggle layout (TaskXXX_Name/CT.zip,
GroundTruth/*.pkl). Writes images/ and labels/ (PNG), dataset.json, volumes.json (geometry of each scan) and
splits.json (by patient). All slices with tumour are kept and a share of the others. Run it again to go on
where it stopped.
"""

import math
import shlex
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.config import (
    Switch,
    finite_float,
    fraction,
    make_parser,
    non_negative_int,
    parse_args,
    positive_float,
    run_script,
    seed_number,
)
from common.decathlon import find_decathlon, read_dataset_json
from common.faults import ending_in_a_sentence
from common.files import write_json
from common.flags import add_workers_flag
from common.hu import check_window
from common.messages import warn
from common.phantoms import prepare_demo
from common.splits import check_split, natural_key, patients_of, read_splits, save_splits, split_by_patient
from lung_tumor import conversion, phantoms
from lung_tumor.cases import find_cases, load_case
from lung_tumor.conversion import WINDOW_HU, Settings, convert_all, median_pixel_mm
from lung_tumor.explore import explore


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--source",
        default="data/lung_tumor_raw",
        help="folder with the scans and masks, in the Decathlon or the Kaggle layout",
    )
    parser.add_argument(
        "--out", default="data/lung_tumor", help="folder that the converted data set is written to"
    )
    parser.add_argument(
        "--task",
        default="Task006_Lung",
        help="task to convert where --source has the Kaggle layout; any part of its name will do",
    )
    parser.add_argument(
        "--window",
        type=finite_float,
        nargs=2,
        default=WINDOW_HU,
        metavar=("LOW", "HIGH"),
        help="densities in HU that become grey values 0 and 255, the same for all slices; the default suits "
        "lung and soft tissue, -1350 150 shows lung only and -160 240 soft tissue only",
    )
    parser.add_argument(
        "--pixel_mm",
        type=positive_float,
        help="side in mm of a pixel of the converted slices, the same for all scans, so that the network "
        "sees one scale; default: the median of the scans, which suits most data sets",
    )
    parser.add_argument(
        "--empty_ratio",
        type=fraction,
        default=0.1,
        help="share of the slices without tumour, 0 to 1, that training uses; more of them give fewer false "
        "alarms and longer epochs",
    )
    parser.add_argument(
        "--all_slices",
        action=Switch,
        default=False,
        help="write every slice as PNG, so that whole volumes can be scored when the scans are gone; "
        "training uses the same slices with or without it",
    )
    parser.add_argument(
        "--min_pixels",
        type=non_negative_int,
        default=0,
        help="leave out of training the slices that show some tumour, but fewer pixels of it than this; 0 "
        "keeps all of them",
    )
    parser.add_argument(
        "--seed",
        type=seed_number,
        default=42,
        help="number that fixes what is random: which slices without tumour are taken, and the split",
    )
    parser.add_argument(
        "--val_ratio",
        type=fraction,
        default=0.2,
        help="share of the patients, 0 to 1, on whom the best epoch is chosen",
    )
    parser.add_argument(
        "--test_ratio",
        type=fraction,
        default=0.0,
        help="share of the patients, 0 to 1, who are kept for the final score and nothing else",
    )
    parser.add_argument(
        "--val_cases",
        nargs="+",
        help="names of the volumes for validation; default: they are drawn, see --val_ratio",
    )
    parser.add_argument(
        "--test_cases",
        nargs="+",
        help="names of the volumes for the final score; default: they are drawn, see --test_ratio",
    )
    parser.add_argument(
        "--patient_pattern",
        help="regular expression whose group finds the patient in the name of a volume, such as "
        "'(.+)_scan'; needed where a patient has several scans, which must stay in one part of the "
        "split",
    )
    add_workers_flag(parser)
    parser.add_argument(
        "--explore",
        action=Switch,
        default=False,
        help="convert nothing; print what is in the scans, and write explore.csv and explore.png to --out",
    )
    return parser


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
    source, out = folder / "Task06_Lung", folder / "slices"
    flags = ["--source", str(source), "--out", str(out), "--test_ratio", "0.2", "--empty_ratio", "0.2"]
    flags += ["--pixel_mm", "2.4"]  # the finest of the phantoms: no small tumour loses pixels

    def make() -> dict[str, str]:
        phantoms.write_chest_phantoms(source)
        return convert(parse_args(build_parser(), flags))

    return prepare_demo(source, out, make, flags, [phantoms, conversion])


def convert(args: Namespace) -> dict[str, str]:
    """The whole conversion that the flags ask for; returns {failed volume: reason}.

    Raises:
        ValueError, OSError: nothing can be converted as asked.
    """
    low, high = check_window(args.window, "--window")
    cases, out = find_cases(args.source, args.task), Path(args.out)
    ids = [c.case_id for c in cases]
    patients_of(ids, args.patient_pattern)  # before the work, not after it
    for name in [*(args.val_cases or []), *(args.test_cases or [])]:
        if name not in ids:
            raise ValueError(f"volume {name}, which is not in the data set: {', '.join(ids[:10])}")
    pixel_mm = args.pixel_mm or median_pixel_mm(cases)
    settings = Settings(pixel_mm, (low, high), args.empty_ratio, args.all_slices, args.min_pixels, args.seed)
    done, failed = convert_all(cases, out, settings, args.workers)
    if failed:
        print(f"{len(failed)} volume(s) could not be converted:")
        for volume, reason in failed.items():
            print(f"  {volume}: {reason}")
    if not done:
        return failed
    for volume, entry in done.items():
        if entry["why_not_hu"]:
            warn(f"{volume}: {entry['why_not_hu']}")
    write_splits(out, list(done), args)
    origin = find_decathlon(args.source) or args.source
    num_slices = sum(len(e["kept"]) for e in done.values())
    tumour = sum(len(set(e["kept"]) & set(e["tumour_slices"])) for e in done.values())
    pixels = sum(len(e["kept"]) * math.prod(e["slice_shape"]) for e in done.values())
    share = sum(e["tumour_pixels_kept"] for e in done.values()) / max(pixels, 1)
    content = {
        "name": read_dataset_json(origin).get("name", Path(origin).name),
        "window_hu": [low, high],
        "pixel_mm": pixel_mm,
        "labels": {"0": "background", "1": "tumour"},
        "num_volumes": len(done),
        "num_slices": num_slices,
        "num_tumour_slices": tumour,
        "tumour_pixel_share": share,
    }
    write_json(out / "dataset.json", content)
    chosen = f"{num_slices} slices for training, validation and test"
    print(f"{len(done)} volumes, {chosen}, {tumour} of them with tumour")
    print(
        f"{100 * share:.2f} % of the pixels are tumour; window {low:g}..{high:g} HU; pixels {pixel_mm:g} mm"
    )
    return failed


def main(argv: list[str] | None = None) -> int:
    args = parse_args(build_parser(), argv)
    with ending_in_a_sentence():
        if args.explore:
            return explore(find_cases(args.source, args.task), load_case, Path(args.out))
        if convert(args):
            return 1
    print(f"next: python lung_tumor/train.py --data_path {shlex.quote(args.out)}")
    return 0


if __name__ == "__main__":
    run_script(main)
