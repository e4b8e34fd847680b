"""What foreground-aware patches and a fixed HU scale are worth: the same training without them, on phantoms.

    python benchmarks/spine_ablation.py --seeds 1 2 3

Trains the second stage of verse_spine on the demo's phantoms as it is, with uniform sampling, and with each
patch scaled by its own range, all else equal, and scores whole test scans. Several trainings run side by side
on one thread each. Writes spine_ablation.json and .md to --out.
"""

import csv
import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results_files import write_results
from common.config import make_parser, parse_args, positive_int, run_script, seed_number

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = {
    "as it is": [],
    "uniform sampling": ["--sampling", "uniform"],
    "each patch by its range": ["--intensity", "patch"],
}


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--seeds",
        type=seed_number,
        nargs="+",
        default=[1, 2, 3],
        help="seeds; each variant is trained once with each of them",
    )
    parser.add_argument(
        "--epochs",
        type=positive_int,
        default=None,
        help="number of passes over the training set; default: that of demo.yaml",
    )
    parser.add_argument(
        "--side_by_side", type=positive_int, default=2, help="number of trainings that run at the same time"
    )
    parser.add_argument(
        "--out",
        default="benchmarks/results",
        help="folder that the results (JSON and Markdown) are written to",
    )
    return parser


def train(variant: str, seed: int, epochs: int | None, folder: Path) -> dict:
    """Scores of one training: means over the test scans."""
    name = f"{variant.replace(' ', '_')}_{seed}"
    command = [sys.executable, str(ROOT / "verse_spine/train_segmentation.py")]
    command += ["--config", str(ROOT / "verse_spine/demo.yaml"), "--model_name", name, "--out", str(folder)]
    command += ["--seed", str(seed), "--workers", "0", "--amp", "off", *VARIANTS[variant]]
    command += ["--epochs", str(epochs)] if epochs else []
    environment = {"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{name}: {run.stderr[-2000:]}")
    with (folder / name / "evaluation" / "results.csv").open(encoding="utf8") as file:
        rows = list(csv.DictReader(file))
    return {
        "variant": variant,
        "seed": seed,
        "dice": float(np.mean([float(r["dice"]) for r in rows])),
        "hd95_mm": float(np.mean([float(r["hd95_mm"]) for r in rows])),
    }


def main(argv: list[str] | None = None) -> int:
    args = parse_args(build_parser(), argv)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.side_by_side) as pool:
        jobs = [(variant, seed) for seed in args.seeds for variant in VARIANTS]
        runs = list(pool.map(lambda job: train(*job, args.epochs, Path(folder)), jobs))
    base = {r["seed"]: r["dice"] for r in runs if r["variant"] == "as it is"}
    rows = []
    for variant in VARIANTS:
        of_variant = [r for r in runs if r["variant"] == variant]
        change = [r["dice"] - base[r["seed"]] for r in of_variant]
        rows.append(
            {
                "training": variant,
                "Dice of each seed": " ".join(f"{r['dice']:.3f}" for r in of_variant),
                "mean": f"{np.mean([r['dice'] for r in of_variant]):.3f}",
                "difference, seed by seed": " ".join(f"{c:+.3f}" for c in change if variant != "as it is"),
                "HD95 mm": f"{np.mean([r['hd95_mm'] for r in of_variant]):.1f}",
            }
        )
    notes = (
        "Dice of all vertebrae, mean of the demo's four test scans; whole scans, no region, phantoms only."
    )
    write_results(args.out, "spine_ablation", argv, {"runs": runs}, rows, notes)
    return 0


if __name__ == "__main__":
    run_script(main)
