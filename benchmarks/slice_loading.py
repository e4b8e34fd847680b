"""Reading training slices: PNG files decoded one by one, or the packed array that training maps into memory.

    python benchmarks/slice_loading.py

Writes slices of chest phantoms as preprocess.py does, packs them as train.py does, and reads both in the same
random order, in turns; the page cache is warm for both. Writes slice_loading.json and .md to --out.
"""

import shutil
import statistics
import sys
import tempfile
import time
from argparse import ArgumentParser
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results_files import write_results
from common.config import make_parser, parse_args, positive_int
from lung_tumor.dataset import pack_slices
from lung_tumor.phantoms import chest_phantom
from lung_tumor.slice_files import list_slices
from lung_tumor.slices import volume_to_slices

FIELD_MM = (165.0, 350.0, 350.0)  # z y x, of a phantom scan
WINDOW_HU = (-1024.0, 325.0)  # default of lung_tumor/preprocess.py


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("--cases", type=positive_int, default=2, help="number of phantom scans")
    parser.add_argument("--slices", type=positive_int, default=60, help="number of slices of each scan")
    parser.add_argument("--image_size", type=positive_int, default=512, help="side of the slices in pixels")
    parser.add_argument(
        "--repeats",
        type=positive_int,
        default=15,
        help="number of times that all slices are read in each way",
    )
    parser.add_argument(
        "--out",
        default="benchmarks/results",
        help="folder that the results (JSON and Markdown) are written to",
    )
    return parser


def write_slices(folder: Path, cases: int, slices: int, size: int) -> None:
    """Phantom scans as images/*.png and labels/*.png (0 / 255), `size` x `size` pixels."""
    shape = (slices, size, size)
    spacing_mm = tuple(mm / n for mm, n in zip(FIELD_MM, shape, strict=True))
    for case in range(cases):
        volume, label = chest_phantom(case, shape, spacing_mm)
        for part, data, window in (("images", volume, WINDOW_HU), ("labels", label, (0.0, 1.0))):
            (folder / part).mkdir(parents=True, exist_ok=True)
            for number, plane in enumerate(volume_to_slices(data, window)):
                cv2.imwrite(str(folder / part / f"{case}_slice_{number:04d}.png"), plane)


def measure(folder: Path, size: int, repeats: int) -> tuple[dict[str, list[float]], list[float]]:
    """Slices per second (image and label as uint8 arrays) of each way, one number for each pass; and how many
    ms it takes to pack a slice.

    Raises:
        ValueError: the two ways give different pixels.
    """
    slices, packing_ms = list_slices(folder), []
    for _ in range(5):
        shutil.rmtree(folder / "cache", ignore_errors=True)
        start = time.perf_counter()
        packed = pack_slices(folder, slices, size)
        packing_ms.append(1000 * (time.perf_counter() - start) / len(slices))

    def decode(i: int) -> tuple[np.ndarray, np.ndarray]:
        gray = cv2.IMREAD_GRAYSCALE
        return cv2.imread(str(slices[i].image), gray), cv2.imread(str(slices[i].label), gray)

    def copy(i: int) -> tuple[np.ndarray, np.ndarray]:
        return np.array(packed.images[i]), np.array(packed.labels[i])

    for i in range(len(slices)):
        (image, mask), (packed_image, packed_mask) = decode(i), copy(i)
        if not (np.array_equal(image, packed_image) and np.array_equal(mask > 127, packed_mask > 0)):
            raise ValueError(f"{slices[i].image}: the packed slice differs from the file")
    rates, rng = {"png": [], "packed": []}, np.random.default_rng(0)
    ways = [("png", decode), ("packed", copy)]
    for _ in range(repeats):
        order = rng.permutation(len(slices))
        for name, read in ways:
            start = time.perf_counter()
            for i in order:
                read(i)
            rates[name].append(len(slices) / (time.perf_counter() - start))
        ways.reverse()  # neither always follows the other
    return rates, packing_ms


def shown(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(build_parser(), argv)
    with tempfile.TemporaryDirectory(prefix="slice_loading_", ignore_cleanup_errors=True) as temporary:
        folder, count = Path(temporary), args.cases * args.slices
        write_slices(folder, args.cases, args.slices, args.image_size)
        rates, packing_ms = measure(folder, args.image_size, args.repeats)
        files = {"png": folder.glob("*s/*.png"), "packed": folder.glob("cache/*/*.npy")}
        kib = {name: sum(p.stat().st_size for p in found) / count / 1024 for name, found in files.items()}
    speedup = [b / a for a, b in zip(rates["png"], rates["packed"], strict=True)]
    content = {"image_size": args.image_size, "slices": count, "slices_per_s": rates, "kib_per_slice": kib}
    content |= {"speedup": speedup, "packing_ms_per_slice": packing_ms}
    rows = [
        {"way": name, "slices a second": shown(passes, 0), "KiB a slice on disk": f"{kib[name]:,.0f}"}
        for name, passes in rates.items()
    ]
    notes = f"""{count} slices of {args.image_size} x {args.image_size} pixels, image and label.
Median (lowest to highest) of {args.repeats} passes each way, in turns.
Packed over PNG, pass by pass: {shown(speedup, 1)} times as many slices a second.
Packing, once for a data set: {shown(packing_ms, 1)} ms a slice."""
    write_results(args.out, "slice_loading", argv, content, rows, notes)
    return content


if __name__ == "__main__":
    main()
