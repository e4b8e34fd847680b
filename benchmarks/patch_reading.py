"""Random training patches of one large CT: milliseconds and megabytes of each way to store it.

    python benchmarks/patch_reading.py
    python benchmarks/patch_reading.py --source scan.nii.gz

--source (else a chest phantom) is mirrored until it fills --shape, so that its grain stays that of a scan.
All ways read the same boxes, in turns, with a warm page cache; CPU time beside wall time tells how far other
work on the machine disturbed. Writes patch_reading.json and .md to --out.
"""

import statistics
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

import h5py
import hdf5plugin
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results_files import write_results
from common.config import make_parser, parse_args, positive_int
from common.hdf5 import CaseFile, write_case
from common.nifti import load_nifti, write_nifti
from lung_tumor.phantoms import chest_phantom

SPACING_MM = (1.0, 1.0, 1.0)
PHANTOM_SHAPE = (128, 192, 256)
HU_RANGE = (-1024, 3071)
BLOSC2 = {"cname": "lz4", "clevel": 5}
# Chunk side in voxels (0: contiguous) and options of h5py's create_dataset.
VARIANTS = {
    "lzf": (32, {"compression": "lzf", "shuffle": True}),
    "gzip": (32, {"compression": "gzip", "compression_opts": 1, "shuffle": True}),
    "not compressed": (32, {}),
    "blosc2, bit-shuffle": (32, dict(hdf5plugin.Blosc2(**BLOSC2, filters=hdf5plugin.Blosc2.BITSHUFFLE))),
    "blosc2, 64^3 chunks": (64, dict(hdf5plugin.Blosc2(**BLOSC2, filters=hdf5plugin.Blosc2.SHUFFLE))),
    "contiguous": (0, {}),
}


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("--source", help="CT (NIfTI) to read patches of; default: a phantom")
    parser.add_argument(
        "--shape",
        type=positive_int,
        nargs=3,
        default=[512, 320, 320],
        help="size of the scan in voxels, z y x",
    )
    parser.add_argument(
        "--patch_sizes",
        type=positive_int,
        nargs="+",
        default=[128, 96],
        help="sides of the patches in voxels",
    )
    parser.add_argument(
        "--reads",
        type=positive_int,
        default=60,
        help="number of patches of each size that are read in each way",
    )
    parser.add_argument(
        "--out",
        default="benchmarks/results",
        help="folder that the results (JSON and Markdown) are written to",
    )
    return parser


def large_scan(source: str | None, shape: tuple[int, ...]) -> np.ndarray:
    """(z, y, x) int16 HU of `shape`: the source, or a phantom with noise, cut or mirrored."""
    if source:
        scan = load_nifti(source).array
    else:
        spacing_mm = tuple(mm / n for mm, n in zip((250.0, 300.0, 400.0), PHANTOM_SHAPE, strict=True))
        scan = chest_phantom(0, PHANTOM_SHAPE, spacing_mm)[0]
    scan = np.clip(scan[tuple(slice(n) for n in shape)], *HU_RANGE).astype(np.int16)
    return np.pad(scan, [(0, n - m) for n, m in zip(shape, scan.shape, strict=True)], mode="symmetric")


def write_variant(path: Path, scan: np.ndarray, chunk: int, options: dict) -> None:
    """An HDF5 file of one dataset `image`, stored as common/hdf5.py does not."""
    chunks = tuple(min(chunk, n) for n in scan.shape) if chunk else None
    with h5py.File(path, "w", libver=("v110", "v110")) as file:
        file.create_dataset("image", data=scan, chunks=chunks, **options)


def ways_to_read(folder: Path, scan: np.ndarray) -> dict[str, tuple[Path, Callable]]:
    """File and function(start, side) of each way; writes the files."""
    ways = {}

    def sliced(stored) -> Callable:
        return lambda start, side: np.array(stored[tuple(slice(s, s + side) for s in start)])

    path = folder / "case.h5"
    compression = write_case(path, scan, attributes={"spacing_mm": SPACING_MM})
    read = CaseFile(path).read_image
    ways[f"hdf5.py: {compression}"] = path, lambda start, side: read(start, (side,) * 3)
    for name, (chunk, options) in VARIANTS.items():
        path = folder / f"{name}.h5"
        write_variant(path, scan, chunk, options)
        ways[f"h5py, {name}"] = path, sliced(h5py.File(path, "r", locking=False)["image"])
    np.save(folder / "scan.npy", scan)
    ways["npy, mapped into memory"] = folder / "scan.npy", sliced(np.load(folder / "scan.npy", mmap_mode="r"))
    return ways


def measure(ways: dict, scan: np.ndarray, side: int, reads: int) -> dict[str, dict[str, list[float]]]:
    """wall_ms and cpu_ms of each read of each way; ValueError: a way gives other voxels."""
    rng, order = np.random.default_rng(side), list(ways)
    found = {name: {"wall_ms": [], "cpu_ms": []} for name in ways}
    for number in range(reads + 1):
        start = [int(rng.integers(n - side + 1)) for n in scan.shape]
        for name in rng.permutation(order):
            wall, cpu = time.perf_counter(), time.process_time()
            patch = ways[name][1](start, side)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if not np.array_equal(patch, scan[tuple(slice(s, s + side) for s in start)]):
                raise ValueError(f"{ways[name][0]}: other voxels than the scan at {start}")
            if number:  # the first read opens the file
                found[name]["wall_ms"].append(round(1000 * wall, 3))
                found[name]["cpu_ms"].append(round(1000 * cpu, 3))
    return found


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(build_parser(), argv)
    if min(args.shape) < max(args.patch_sizes):
        raise SystemExit(f"--patch_sizes {args.patch_sizes} do not fit into --shape {args.shape}")
    scan = large_scan(args.source, tuple(args.shape))
    with tempfile.TemporaryDirectory(prefix="patch_reading_", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        ways = ways_to_read(folder, scan)
        times = {side: measure(ways, scan, side, args.reads) for side in args.patch_sizes}
        megabytes = {name: path.stat().st_size / 1e6 for name, (path, _) in ways.items()}
        nifti = folder / "scan.nii.gz"
        write_nifti(nifti, scan, SPACING_MM)
        wall, cpu = time.perf_counter(), time.process_time()
        load_nifti(nifti)
        nifti_ms = [1000 * (time.perf_counter() - wall), 1000 * (time.process_time() - cpu)]
        megabytes["nii.gz, the whole scan"] = nifti.stat().st_size / 1e6
    rows = []
    for name, size in megabytes.items():
        row = {"stored as": name, "file MB": f"{size:.1f}"}
        for side in args.patch_sizes:
            values = times[side].get(name, {"wall_ms": nifti_ms[:1], "cpu_ms": nifti_ms[1:]})
            wall, cpu = (statistics.median(values[key]) for key in ("wall_ms", "cpu_ms"))
            row[f"{side}^3: ms (fastest)"] = f"{wall:,.1f} ({min(values['wall_ms']):,.1f})"
            row[f"{side}^3: CPU ms"] = f"{cpu:,.1f}"
        rows.append(row)
    content = {"shape": args.shape, "file_mb": megabytes, "patches": times, "nifti_ms": nifti_ms}
    content["versions_hdf5"] = {"h5py": h5py.__version__, "HDF5": h5py.version.hdf5_version}
    content["versions_hdf5"]["hdf5plugin"] = hdf5plugin.version
    texture = "the CT given" if args.source else "a phantom"
    shape = " x ".join(map(str, args.shape))
    notes = f"""{shape} voxels (z y x) of {texture}, int16, {scan.nbytes / 1e6:.0f} MB.
Median (fastest) of {args.reads} random patches each way, in turns, warm page cache; the scan once as NIfTI.
{", ".join(f"{k} {v}" for k, v in content["versions_hdf5"].items())}."""
    write_results(args.out, "patch_reading", argv, content, rows, notes)
    return content


if __name__ == "__main__":
    main()
