"""Amygdala or hippocampus by MONAI's BasicUNet in a plain script, on a fold of amygdala/train.py.

    python benchmarks/brain_peers.py --data_path dataset/Amygdala --fold 0 --minutes 10
    python benchmarks/brain_peers.py --data_path dataset/Hippocampus --fold test --minutes 30 --width 24 \\
        --patch_size 48 64 48 --batch_size 4 --lr 2e-3

What one writes first with MONAI: a region around the structures that the TRUTH gives (of training and of test
scans), z-scores of the voxels above 0, random affine transforms, BasicUNet, Dice + cross-entropy, AdamW with
a cosine of the elapsed time. It reads the scans that amygdala/preprocess.py has converted. Dice is that of
the whole scan at 1 mm. The minutes count training only. Each run is added to brain_peers.json and .md.
"""

import sys
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from amygdala.dataset import Cohort
from amygdala.structures import DATASETS, NUM_CLASSES
from benchmarks.results_files import write_results
from common.class_metrics import mean_dice, score_structures
from common.config import make_parser, parse_args, positive_float, positive_int, run_script, seed_number
from common.files import read_json
from common.hardware import autocast, choose_precision
from common.hdf5 import CaseFile
from common.runs import git_state
from common.schedules import learning_rate

CPU = torch.device("cpu")
COLUMNS = ("run", "data", "fold", "seed", "minutes", "threads", "updates", "precision", "parameters", "Dice")
JITTER = 4  # voxels, random move of the training region


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("--data_path", required=True, help="folder that amygdala/preprocess.py wrote")
    parser.add_argument("--fold", default="0", help="number of the fold that is tested, or test")
    parser.add_argument("--minutes", type=positive_float, default=10.0, help="time for training")
    parser.add_argument(
        "--threads", type=positive_int, default=2, help="number of processor threads of torch"
    )
    parser.add_argument("--width", type=positive_int, default=16, help="channels of the first level")
    parser.add_argument(
        "--patch_size", type=positive_int, nargs=3, default=[48, 64, 80], help="region in voxels, z y x"
    )
    parser.add_argument("--batch_size", type=positive_int, default=2, help="number of regions in an update")
    parser.add_argument("--lr", type=positive_float, default=1e-3, help="highest learning rate of AdamW")
    parser.add_argument("--amp", choices=["bf16", "off"], default="off", help="precision of the network")
    parser.add_argument("--seed", type=seed_number, default=1, help="number that fixes what is random")
    parser.add_argument("--out", default="benchmarks/results", help="folder that the results are written to")
    return parser


def region_start(case: CaseFile, patch_size: list[int], localised: bool) -> np.ndarray:
    """First voxel of the region: around what the truth labels, or around the middle of a crop."""
    middle = case.attributes["centre"] if localised else np.subtract(case.shape, 1) / 2
    return np.rint(middle - np.subtract(patch_size, 1) / 2).astype(int)


def train(args: Namespace, data: Cohort) -> tuple[torch.nn.Module, dict]:
    """The trained network, and what the run's row says about the training."""
    from monai.losses import DiceCELoss
    from monai.networks.nets import BasicUNet
    from monai.transforms import RandAffined
    from monai.utils import set_determinism

    set_determinism(args.seed)
    w = args.width
    network = BasicUNet(3, 1, NUM_CLASSES, features=(w, w, 2 * w, 4 * w, 8 * w, w))
    loss_function = DiceCELoss(to_onehot_y=True, softmax=True)
    affine = RandAffined(
        ["image", "label"],
        prob=0.8,
        rotate_range=(0.26,) * 3,
        scale_range=(0.15,) * 3,
        translate_range=(4,) * 3,
        mode=["bilinear", "nearest"],
        padding_mode="border",
    )
    affine.set_random_state(args.seed)
    localised = DATASETS[data.dataset].localised
    cases = [data.cases[name] for name in data.split["train"]]
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.lr, weight_decay=1e-4)
    precision, rng = choose_precision(args.amp, CPU), np.random.default_rng(args.seed)
    began, updates = time.perf_counter(), 0
    while (elapsed_s := time.perf_counter() - began) < 60 * args.minutes:
        images, labels = [], []
        for number in rng.integers(len(cases), size=args.batch_size):
            case = cases[number]
            start = region_start(case, args.patch_size, localised) + rng.integers(-JITTER, JITTER + 1, 3)
            item = affine(
                {
                    "image": torch.from_numpy(normalised(case.read_image(tuple(start), args.patch_size)))[
                        None
                    ],
                    "label": torch.from_numpy(case.read_label(tuple(start), args.patch_size)).float()[None],
                }
            )
            images.append(item["image"].as_tensor())
            labels.append(item["label"].as_tensor())
        lr = learning_rate("cosine_annealing", elapsed_s / (60 * args.minutes), args.lr)
        optimizer.param_groups[0]["lr"] = lr
        with autocast(CPU, precision):
            logits = network(torch.stack(images))
        optimizer.zero_grad(set_to_none=True)
        loss_function(logits.float(), torch.stack(labels)).backward()
        optimizer.step()
        updates += 1
    notes = {
        "updates": updates,
        "train_s": time.perf_counter() - began,
        "precision": precision.name,
        "parameters": sum(p.numel() for p in network.parameters()),
    }
    return network.eval(), notes


def normalised(image: np.ndarray) -> np.ndarray:
    """Z-scores by the voxels above 0."""
    image = image.astype(np.float32)
    inside = image[image > 0]
    return (image - inside.mean()) / max(float(inside.std()), 1e-6) if inside.size else image


def score(args: Namespace, data: Cohort, network: torch.nn.Module) -> list[dict]:
    """Rows of `score_structures` of the test scans, with "case"."""
    dataset, rows = DATASETS[data.dataset], []
    precision = choose_precision(args.amp, CPU)
    for name in data.split["test"]:
        case = data.cases[name]
        start = region_start(case, args.patch_size, dataset.localised)
        image = torch.from_numpy(normalised(case.read_image(tuple(start), args.patch_size)))
        with torch.inference_mode(), autocast(CPU, precision):
            found = network(image[None, None]).float().argmax(1)[0].numpy().astype(np.uint8)
        pred = np.zeros(case.shape, np.uint8)
        low = np.maximum(start, 0)
        high = np.minimum(start + args.patch_size, case.shape)
        inside = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
        pred[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = found[inside]
        scores = score_structures(
            pred, case.label[...], case.spacing_mm, dataset.structures, [1, 2], surfaces=False
        )
        rows += [{"case": name, **row} for row in scores]
    return rows


def main(argv: list[str] | None = None) -> int:
    args = parse_args(build_parser(), argv)
    torch.set_num_threads(args.threads)
    fold = None if args.fold == "test" else int(args.fold)
    data = Cohort(args.data_path, fold=fold, validation=False)
    network, notes = train(args, data)
    rows = score(args, data, network)
    structures = DATASETS[data.dataset].structures
    run = {"run": f"BasicUNet {args.width}", "data": Path(args.data_path).name, "fold": args.fold}
    run |= {"seed": args.seed, "minutes": args.minutes, "threads": args.threads, **notes}
    run |= {"Dice": mean_dice(rows)}
    for number, name in structures.names.items():
        run[name] = float(np.mean([row["dice"] for row in rows if row["class"] == number]))
    print(f"{run['run']}: Dice {run['Dice']:.4f}, {run['updates']} updates")
    path = Path(args.out, "brain_peers.json")
    runs = [*(read_json(path)["runs"] if path.is_file() else []), run | {"commit": git_state(), "rows": rows}]
    table = [{key: f"{of[key]:.3f}" if key == "Dice" else of[key] for key in COLUMNS} for of in runs]
    notes = (
        "Dice of whole scans at 1 mm, mean over both labels of the mean over the test cases; the region is "
        "given by the truth. Machine, versions and command above are those of the last run."
    )
    write_results(args.out, "brain_peers", argv, {"runs": runs}, table, notes)
    return 0


if __name__ == "__main__":
    run_script(main)
