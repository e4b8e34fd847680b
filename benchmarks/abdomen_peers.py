"""Organs by MONAI's BasicUNet or by nnU-Net v2, trained for some minutes and scored with this project's Dice.

    python benchmarks/abdomen_peers.py --peer monai --data_path ../shared/data/abdomen_mr_chaos \\
        --labels 1 2 3 6 --train amos_0601 amos_0602 --test amos_0605 --minutes 15

--data_path is a folder in AMOS22's layout; each peer does its own preprocessing from the NIfTI files. The
minutes count training only: the peer's preprocessing, MONAI's cache of preprocessed scans, and predictions
come on top. Predictions lie on the grids of the scans, and Dice is taken there, organ by organ.
--peer files scores the label files of any other program (--pred), such as this project's predict.py.
Each run is added to abdomen_peers.json and .md in --out.

The labels of --train may hold other organs: they count as background. nnU-Net: the plan that it makes for
8 GB (--gpu_memory_gb), 3d_fullres, its trainer and augmentation; its learning rate falls with the time
instead of with 1000 epochs. BasicUNet: 32 to 256 channels, MONAI's transforms, Dice + cross-entropy, AdamW.
"""

import sys
import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from amos_lha.cases import Case, list_data_set
from amos_lha.organs import ORGANS, STRUCTURES, group_of
from benchmarks.abdomen_training import CPU, FILE_ENDING, train_monai, train_nnunet
from benchmarks.results_files import write_results
from common.class_metrics import score_structures
from common.config import (
    Switch,
    make_parser,
    parse_args,
    positive_float,
    positive_int,
    run_script,
    seed_number,
)
from common.files import read_json
from common.hardware import choose_precision
from common.nifti import load_label
from common.runs import git_state

PEERS = ("monai", "nnunet", "files")


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("--peer", choices=PEERS, required=True, help="what to train, or files for --pred")
    parser.add_argument("--data_path", required=True, help="folder that holds scans in AMOS22's layout")
    parser.add_argument(
        "--labels", type=int, nargs="+", choices=ORGANS, default=list(ORGANS), help="numbers of the organs"
    )
    parser.add_argument("--train", nargs="+", default=[], help="names of the training cases")
    parser.add_argument("--test", nargs="+", required=True, help="names of the cases to score")
    parser.add_argument("--minutes", type=positive_float, default=15.0, help="time for training")
    parser.add_argument("--pred", help="folder with a label file for each test case, for --peer files")
    parser.add_argument("--name", help="what the table calls this run; default: the peer")
    parser.add_argument(
        "--threads",
        type=positive_int,
        default=2,
        help="number of processor threads of torch; another process prepares patches",
    )
    parser.add_argument(
        "--amp",
        choices=["bf16", "off"],
        default="bf16",
        help="precision of networks: bf16, which processors with AVX512-BF16 or AMX compute fast, or off = "
        "float32",
    )
    parser.add_argument("--seed", type=seed_number, default=1, help="number that fixes what is random")
    monai = parser.add_argument_group("MONAI")
    monai.add_argument(
        "--spacing",
        type=positive_float,
        nargs=3,
        default=[2.0, 1.5, 1.5],
        help="voxel size in mm, z y x, to which scans are resampled",
    )
    monai.add_argument(
        "--patch_size", type=positive_int, nargs=3, default=[96, 96, 96], help="voxels z y x, multiples of 16"
    )
    monai.add_argument("--batch_size", type=positive_int, default=2, help="number of patches in an update")
    monai.add_argument("--lr", type=positive_float, default=1e-3, help="highest learning rate of AdamW")
    nnunet = parser.add_argument_group("nnU-Net")
    nnunet.add_argument(
        "--gpu_memory_gb",
        type=positive_float,
        default=8.0,
        help="memory that nnU-Net plans patch and network for; less gives smaller patches and faster updates",
    )
    nnunet.add_argument(
        "--mirroring",
        action=Switch,
        default=True,
        help="mirror along all axes in training and prediction, as nnU-Net does; --no-mirroring is its "
        "trainer without",
    )
    parser.add_argument(
        "--keep", help="folder that the predictions are written to; default: a temporary one that is removed"
    )
    parser.add_argument(
        "--out",
        default="benchmarks/results",
        help="folder that the results (JSON and Markdown) are written to",
    )
    return parser


# ---- scores ----


def score_files(test: list[Case], labels: list[int], pred: Path) -> list[dict]:
    """{"case", "organ", "dice"} of every test case and organ."""
    rows = []
    for case in test:
        label = load_label(case.label)
        found = load_label(pred / f"{case.name}{FILE_ENDING}").array
        scores = score_structures(found, label.array, label.spacing_mm, STRUCTURES, labels, surfaces=False)
        for row in scores:
            rows.append({"case": case.name, "organ": row["class"], "dice": row["dice"]})
    return rows


def organ_means(rows: list[dict]) -> dict[int, float]:
    """{organ: mean Dice over the cases that have it or were given it}; NaN without any."""
    means = {}
    for organ in dict.fromkeys(row["organ"] for row in rows):
        dice = np.array([row["dice"] for row in rows if row["organ"] == organ])
        means[organ] = float(dice[~np.isnan(dice)].mean()) if not np.isnan(dice).all() else float("nan")
    return means


def table_rows(runs: list[dict], organs: list[int]) -> list[dict]:
    """Cells of the Markdown table, a row for each run."""
    rows = []
    for run in runs:
        means = {int(organ): dice for organ, dice in run["organs"].items()}
        small = [dice for organ, dice in means.items() if group_of(organ) == "small" and not np.isnan(dice)]
        cells = {
            "run": run["name"],
            "data": run["data"],
            "training, test": f"{len(run['train'])}, {len(run['test'])}",
            "first test case": run["test"][0],
            "seed": run["seed"],
            "minutes": f"{run['train_s'] / 60:.1f}" if "train_s" in run else "",
            "updates": run.get("iterations", ""),
            "precision": run.get("precision", ""),
            "Dice": f"{run['dice']:.3f}",
            "small organs": f"{np.mean(small):.3f}" if small else "",
        }
        rows.append(cells | {str(organ): f"{means[organ]:.3f}" if organ in means else "" for organ in organs})
    return rows


def chosen_cases(args: Namespace) -> tuple[list[Case], list[Case]]:
    """Training and test cases by their names.

    Raises:
        ValueError: a name that the folder does not have with a label, or that is in both lists; nothing to
            train on, or CT and MR.
    """
    cases = {case.name: case for case in list_data_set(args.data_path)[0] if case.image and case.label}
    for name in args.train + args.test:
        if name not in cases:
            raise ValueError(f"{args.data_path}: no case {name} with scan and label; see --train and --test")
    if not args.train and args.peer != "files":
        raise ValueError(f"--peer {args.peer} needs the names of --train")
    if both := sorted(set(args.train) & set(args.test)):
        raise ValueError(f"{', '.join(both)}: in --train and in --test")
    train, test = ([cases[name] for name in names] for names in (args.train, args.test))
    if len({case.modality for case in train}) > 1:
        raise ValueError("--train names CT and MR; the peers are set up for one of them")
    return train, test


def train_peer(args: Namespace, train: list[Case], test: list[Case], folder: Path) -> tuple[Path, dict]:
    """Folder with the predictions, and what the run's row says about the training."""
    if args.peer == "files":
        return Path(args.pred or "."), {}
    pred = Path(args.keep or folder / "pred")
    pred.mkdir(parents=True, exist_ok=True)
    precision = choose_precision(args.amp, CPU)
    if args.peer == "monai":
        notes = train_monai(
            train,
            test,
            args.labels,
            pred,
            minutes=args.minutes,
            precision=precision,
            seed=args.seed,
            spacing_mm=args.spacing,
            patch_size=args.patch_size,
            batch_size=args.batch_size,
            lr=args.lr,
        )
    else:
        notes = train_nnunet(
            train,
            test,
            args.labels,
            pred,
            minutes=args.minutes,
            precision=precision,
            seed=args.seed,
            work=folder,
            gpu_memory_gb=args.gpu_memory_gb,
            mirroring=args.mirroring,
        )
    return pred, notes | {"precision": precision.name}


def main(argv: list[str] | None = None) -> int:
    args = parse_args(build_parser(), argv)
    torch.set_num_threads(args.threads)
    run = {"name": args.name or args.peer, "data": Path(args.data_path).resolve().name, "labels": args.labels}
    run |= {"train": args.train, "test": args.test, "seed": args.seed, "threads": args.threads}
    try:
        train, test = chosen_cases(args)
        with tempfile.TemporaryDirectory() as folder:
            pred, notes = train_peer(args, train, test, Path(folder))
            rows = score_files(test, args.labels, pred)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
    run |= notes | {"rows": rows, "organs": organ_means(rows), "commit": git_state()}
    run["dice"] = float(np.nanmean(list(run["organs"].values())))
    print(f"{run['name']}: Dice {run['dice']:.4f}, {run.get('iterations', 0)} updates")
    path = Path(args.out, "abdomen_peers.json")
    runs = [*(read_json(path)["runs"] if path.is_file() else []), run]
    organs = sorted({int(organ) for r in runs for organ in r["organs"]})
    notes = (
        "Dice on the scans' own grids: mean over organs of the mean over test cases, then organ by organ "
        "(AMOS's numbers). Minutes are those of training alone. The JSON file has each run's cases and "
        "commit; machine, versions and command above are those of the last run."
    )
    write_results(args.out, "abdomen_peers", argv, {"runs": runs}, table_rows(runs, organs), notes)
    return 0


if __name__ == "__main__":
    run_script(main)
