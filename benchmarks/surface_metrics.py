"""Scores of 15 organs on a CT of 512 x 512 x 300: this project, MONAI and surface-distance, in turns.

    python benchmarks/surface_metrics.py

Ellipsoids of the sizes of abdominal organs, and as prediction the same, moved by 1.2 voxels and 2 % larger.
Each way computes Dice, HD, HD95, ASSD and NSD at 1 and 2 mm of every class: label maps go in, numbers come
out. Every run is a process of its own, so that its peak memory can be read; importing and making the organs
is not timed. Writes surface_metrics.json and .md to --out.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from argparse import ArgumentParser
from importlib.util import find_spec
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results_files import write_results
from common.class_metrics import case_metrics
from common.config import make_parser, parse_args, positive_int

FULL = (300, 512, 512)
SPACING_MM = (1.5, 0.8, 0.8)
TOLERANCES_MM = (1.0, 2.0)
WAYS = {"ours": "numpy", "surface-distance": "surface_distance", "monai": "monai"}  # and the package of each
ORGANS = (  # centre and semi-axes z y x, voxels of the full size
    ((190, 250, 150), (75, 90, 100)),  # liver
    ((200, 260, 370), (45, 50, 40)),  # spleen
    ((140, 330, 170), (40, 32, 32)),  # kidneys
    ((145, 330, 345), (40, 32, 32)),
    ((215, 250, 255), (35, 12, 12)),  # oesophagus
    ((150, 190, 190), (22, 25, 22)),  # gall bladder
    ((195, 190, 330), (45, 60, 55)),  # stomach
    ((150, 320, 275), (150, 14, 14)),  # aorta
    ((150, 310, 235), (150, 14, 14)),  # vena cava
    ((160, 240, 270), (20, 20, 70)),  # pancreas
    ((190, 330, 215), (10, 12, 8)),  # adrenal glands
    ((190, 330, 310), (10, 12, 8)),
    ((130, 250, 220), (35, 18, 22)),  # duodenum
    ((35, 220, 256), (33, 45, 45)),  # bladder
    ((25, 290, 256), (20, 20, 25)),  # prostate
)


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--ways",
        nargs="+",
        choices=list(WAYS),
        default=list(WAYS),
        help="packages to measure: ours is this project",
    )
    parser.add_argument(
        "--shape",
        nargs=3,
        type=positive_int,
        default=list(FULL),
        help="size of the label maps in voxels, z y x",
    )
    parser.add_argument("--repeats", type=positive_int, default=3, help="number of runs of each way")
    parser.add_argument(
        "--threads", type=positive_int, default=2, help="number of processor cores that a run may use"
    )
    parser.add_argument(
        "--single",
        choices=list(WAYS),
        help="used by the script itself: a single run of this way in this process, which prints JSON",
    )
    parser.add_argument(
        "--out",
        default="benchmarks/results",
        help="folder that the results (JSON and Markdown) are written to",
    )
    return parser


def organs(shape: tuple[int, ...], shift: float = 0.0, scale: float = 1.0) -> np.ndarray:
    """(z, y, x) uint8 label map of ellipsoids 1..15, later ones in front; moved by `shift` voxels an axis."""
    labels = np.zeros(shape, np.uint8)
    factor = np.divide(shape, FULL)
    for label, (centre, axes) in enumerate(ORGANS, start=1):
        sign = np.array([(-1) ** label, 1, (-1) ** (label // 2)])
        centre, axes = centre * factor + shift * sign, axes * factor * scale
        low = np.floor(centre - axes).astype(int).clip(min=0)
        high = np.minimum(np.ceil(centre + axes).astype(int) + 1, shape)
        ranges = zip(low, high, centre, axes, strict=True)
        z, y, x = (((np.arange(a, b) - middle) / half) ** 2 for a, b, middle, half in ranges)
        labels[tuple(map(slice, low, high))][z[:, None, None] + y[:, None] + x <= 1] = label
    return labels


def score_ours(pred: np.ndarray, target: np.ndarray) -> list[dict]:
    names = {label: str(label) for label in range(1, len(ORGANS) + 1)}
    return case_metrics(pred, target, SPACING_MM, names, TOLERANCES_MM)


def score_surface_distance(pred: np.ndarray, target: np.ndarray) -> list[dict]:
    import surface_distance as peer

    rows = []
    for label in range(1, len(ORGANS) + 1):
        masks = target == label, pred == label
        distances = peer.compute_surface_distances(*masks, SPACING_MM)
        row = {"dice": peer.compute_dice_coefficient(*masks)}
        for name, percent in (("hd_mm", 100), ("hd95_mm", 95)):
            row[name] = peer.compute_robust_hausdorff(distances, percent)
        row["assd_mm"] = statistics.mean(peer.compute_average_surface_distance(distances))
        for t in TOLERANCES_MM:
            row[f"nsd_{t:g}mm"] = peer.compute_surface_dice_at_tolerance(distances, t)
        rows.append(row)
    return rows


def score_monai(pred: np.ndarray, target: np.ndarray) -> list[dict]:
    import torch
    from monai import metrics as peer

    rows = []
    for label in range(1, len(ORGANS) + 1):  # one class at a time: all at once would be 1.2 GB for each map
        masks = [torch.from_numpy(labels == label)[None, None] for labels in (pred, target)]
        row = {"dice": peer.compute_dice(*masks).item()}
        for name, percent in (("hd_mm", None), ("hd95_mm", 95)):
            value = peer.compute_hausdorff_distance(
                *masks, include_background=True, percentile=percent, spacing=SPACING_MM
            )
            row[name] = value.item()
        row["assd_mm"] = peer.compute_average_surface_distance(
            *masks, include_background=True, symmetric=True, spacing=SPACING_MM
        ).item()
        for t in TOLERANCES_MM:
            row[f"nsd_{t:g}mm"] = peer.compute_surface_dice(
                *masks, [t], include_background=True, spacing=SPACING_MM, use_subvoxels=True
            ).item()
        rows.append(row)
    return rows


SCORES = {"ours": score_ours, "surface-distance": score_surface_distance, "monai": score_monai}


def run_single(way: str, shape: tuple[int, ...], threads: int) -> dict:
    """Seconds (wall, processor), MiB above what was there before, and mean of each metric over the organs."""
    if hasattr(os, "sched_setaffinity"):  # k-d tree searches take every core that they may use
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    target, pred = organs(shape), organs(shape, 1.2, 1.02)
    SCORES[way](*(organs((60, 100, 100), voxels) for voxels in (0.0, 1.2)))  # imports, tables
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, start_cpu = time.perf_counter(), time.process_time()
    rows = SCORES[way](pred, target)
    result = {"wall_s": time.perf_counter() - start, "cpu_s": time.process_time() - start_cpu}
    result["peak_mib"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    metrics = [k for k in rows[0] if k.startswith(("dice", "hd", "assd", "nsd"))]
    return result | {k: float(np.mean([row[k] for row in rows])) for k in metrics}


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(build_parser(), argv)
    if args.single:
        result = run_single(args.single, tuple(args.shape), args.threads)
        print(json.dumps(result))
        return result
    ways = [way for way in args.ways if find_spec(WAYS[way])]
    for way in set(args.ways) - set(ways):
        print(f"{way}: not measured: pip install -r benchmarks/requirements.txt")
    runs: dict[str, list[dict]] = {way: [] for way in ways}
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    for _ in range(args.repeats):
        for way in ways:
            flags = ["--single", way, "--threads", args.threads, "--shape", *args.shape]
            command = [sys.executable, __file__, *map(str, flags)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
            runs[way].append(json.loads(done.stdout.splitlines()[-1]))
            print(way, {k: round(v, 3) for k, v in runs[way][-1].items()}, flush=True)
        ways.reverse()  # neither always follows the other
    rows = []
    for way, results in runs.items():
        middle = {k: statistics.median(r[k] for r in results) for k in results[0]}
        ratio = ""
        if "ours" in runs:
            ratios = [r["wall_s"] / o["wall_s"] for r, o in zip(results, runs["ours"], strict=True)]
            ratio = f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
        row = {"way": way, "wall s": f"{middle['wall_s']:.1f}", "times ours": ratio}
        row |= {"processor s": f"{middle['cpu_s']:.1f}", "MiB": f"{middle['peak_mib']:,.0f}"}
        rows.append(row | {k: f"{v:.4f}" for k, v in list(middle.items())[3:]})
    size = " x ".join(map(str, args.shape))
    notes = f"""Label maps of {size} voxels z y x, {len(ORGANS)} organs, spacing {SPACING_MM} mm,
{args.threads} cores. Median of {args.repeats} runs each, in turns; times ours: run by run, lowest to highest.
MiB: peak above the two maps. MONAI: its HD, HD95 and ASSD are over voxel edges, its NSD over surface elements
(use_subvoxels). ASSD of surface-distance: mean of its two directed means. Other programs may have used the
machine at the same time."""
    content = {"shape": args.shape, "threads": args.threads, "runs": runs}
    write_results(args.out, "surface_metrics", argv, content, rows, notes)
    return content


if __name__ == "__main__":
    main()
