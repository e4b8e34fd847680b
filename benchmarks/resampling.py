"""Resampling a CT and a cube: this project, scipy.ndimage.zoom and MONAI's Spacing, time and memory.

    python benchmarks/resampling.py

Each way runs in a process of its own, in turns; peak memory is that above the loaded input. All are linear;
only this project antialiases shrinking axes. Writes resampling.json and .md to --out.
"""

import json
import statistics
import subprocess
import sys
import time
from argparse import ArgumentParser
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results_files import write_results
from benchmarks.slice_loading import shown
from common.config import make_parser, parse_args, positive_int
from common.volumes import resample, resampled_shape

WAYS = ("ours", "scipy", "monai")
CT_SPACING_MM = (1.5, 0.8, 0.8)  # z y x


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--ct_shape",
        type=positive_int,
        nargs=3,
        default=[200, 512, 512],
        help="size of the CT in voxels, z y x",
    )
    parser.add_argument(
        "--cube", type=positive_int, default=320, help="side in voxels of the cube that is enlarged 1.5 times"
    )
    parser.add_argument("--repeats", type=positive_int, default=3, help="number of runs of each way")
    parser.add_argument(
        "--threads", type=positive_int, default=2, help="number of processor threads of torch"
    )
    parser.add_argument(
        "--out",
        default="benchmarks/results",
        help="folder that the results (JSON and Markdown) are written to",
    )
    parser.add_argument(
        "--run", nargs="+", help="used by the script itself: way, size before and size after of a single run"
    )
    return parser


def peak_mib() -> float:
    """Highest resident memory of this process so far (Linux: KiB)."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_once(way: str, shape: tuple[int, ...], new_shape: tuple[int, ...]) -> dict[str, float]:
    """Seconds on the clock and of the CPU, MiB above the input and mean of the result of one resampling."""
    volume = np.empty(shape, np.int16)
    rng = np.random.default_rng(0)
    for plane in volume:  # row by row: leaves no peak behind
        plane[...] = rng.integers(-1000, 1000, plane.shape)
    small = np.zeros((4, 4, 4), np.int16)  # so that imports and thread pools do not count

    def zoom(array: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
        if way == "ours":
            return resample(array, size)
        if way == "scipy":
            from scipy import ndimage

            ratio = np.divide(size, array.shape)
            return ndimage.zoom(array, ratio, np.float32, order=1, mode="nearest", grid_mode=True)
        from monai.data import MetaTensor
        from monai.transforms import Spacing

        pixdim = tuple(np.divide(array.shape, size))
        spacing = Spacing(pixdim, mode="bilinear", padding_mode="border", dtype=np.float32)
        return spacing(MetaTensor(torch.from_numpy(array)[None], affine=torch.eye(4)))[0].numpy()

    zoom(small, (6, 6, 6))
    before_mib, start, cpu_start = peak_mib(), time.perf_counter(), time.process_time()
    result = zoom(volume, new_shape)
    elapsed_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
    row = {"elapsed_s": elapsed_s, "cpu_s": cpu_s, "peak_mib": peak_mib() - before_mib}
    return row | {"mean": float(result.mean(dtype=np.float64))}


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(build_parser(), argv)
    if args.run:
        torch.set_num_threads(args.threads)
        way, *sizes = args.run
        sizes = tuple(map(int, sizes))
        print(json.dumps(run_once(way, sizes[:3], sizes[3:])))
        return {}
    ways = [way for way in WAYS if way != "monai" or find_spec("monai")]
    if len(ways) < len(WAYS):
        print("monai: not measured: pip install -r benchmarks/requirements.txt")
    ct, cube = tuple(args.ct_shape), (args.cube,) * 3
    sizes = {
        "CT to 1 mm": (ct, resampled_shape(ct, CT_SPACING_MM, (1, 1, 1))),
        "cube 1.5 times": (cube, resampled_shape(cube, (1.5,) * 3, (1, 1, 1))),
    }
    runs: dict[str, dict[str, list[dict]]] = {name: {way: [] for way in ways} for name in sizes}
    for name, (shape, new_shape) in sizes.items():
        for repeat in range(args.repeats):
            for way in ways if repeat % 2 == 0 else ways[::-1]:  # none always follows the other
                command = [
                    sys.executable,
                    __file__,
                    "--threads",
                    args.threads,
                    "--run",
                    way,
                    *shape,
                    *new_shape,
                ]
                done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
                runs[name][way].append(json.loads(done.stdout.splitlines()[-1]))
                print(name, way, runs[name][way][-1], flush=True)

    def column(name: str, way: str, key: str) -> list[float]:
        return [run[key] for run in runs[name][way]]

    rows, ratios = [], {}
    for name, (shape, new_shape) in sizes.items():
        for way in ways:
            elapsed, cpu = column(name, way, "elapsed_s"), column(name, way, "cpu_s")
            ratios[f"{name}, {way}"] = {
                "elapsed": [a / b for a, b in zip(elapsed, column(name, "ours", "elapsed_s"), strict=True)],
                "cpu": [a / b for a, b in zip(cpu, column(name, "ours", "cpu_s"), strict=True)],
            }
            rows.append(
                {
                    "case": f"{name}: {shape} to {new_shape}",
                    "way": way,
                    "s": shown(elapsed, 2),
                    "CPU s": shown(cpu, 2),
                    "times ours": shown(ratios[f"{name}, {way}"]["elapsed"], 1),
                    "CPU times ours": shown(ratios[f"{name}, {way}"]["cpu"], 1),
                    "MiB above the input": f"{statistics.median(column(name, way, 'peak_mib')):,.0f}",
                }
            )
    results_mib = {name: 4 * np.prod(new) / 2**20 for name, (_, new) in sizes.items()}
    shown_mib = ", ".join(f"{name} {mib:,.0f} MiB" for name, mib in results_mib.items())
    notes = f"""Median (lowest to highest) of {args.repeats} runs, in turns; {args.threads} torch threads.
Input int16, result float32, which is part of the memory: {shown_mib}.
Shapes are z y x. scipy uses one thread. Only ours antialiases the axes that shrink."""
    content = {"sizes": sizes, "runs": runs, "times_ours": ratios, "result_mib": results_mib}
    write_results(args.out, "resampling", argv, content, rows, notes)
    return content


if __name__ == "__main__":
    main()
