"""Labels of long scans by sliding window: this project's streaming prediction and MONAI's, time and memory.

    python benchmarks/sliding_window.py

A trivial network (one 3 x 3 x 3 convolution) leaves the stitching to be measured. Each prediction has a
process of its own; its peak is that of the resident memory above what the imports took, the int16 scan
included. MONAI: sliding_window_inference(mode="gaussian"), then argmax. Writes sliding_window.json and .md to
--out.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results_files import write_results
from common.config import make_parser, parse_args, positive_int
from common.hardware import peak_memory_mib
from common.inference import predict_labels
from common.windows import prediction_peak_mib

WAYS = ("ours", "monai")
COLUMNS = {"peak MiB": "peak_mib", "CPU s": "cpu_s", "s": "seconds"}
CPU = torch.device("cpu")
SPACING_MM = (
    1.0,
    1.0,
    1.0,
)  # of scan and network alike: nothing is resampled, which MONAI's function cannot do


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--slices",
        type=positive_int,
        nargs="+",
        default=[200, 400],
        help="numbers of slices: one scan is predicted for each number",
    )
    parser.add_argument("--plane", type=positive_int, default=512, help="side of a slice in voxels")
    parser.add_argument("--patch", type=positive_int, default=96, help="side of a window in voxels")
    parser.add_argument(
        "--classes", type=positive_int, default=16, help="number of classes that the network tells apart"
    )
    parser.add_argument(
        "--repeats",
        type=positive_int,
        nargs="+",
        default=[2, 1],
        help="number of runs of each way, one number for each of --slices",
    )
    parser.add_argument(
        "--threads", type=positive_int, default=2, help="number of processor threads of torch"
    )
    parser.add_argument(
        "--one",
        choices=WAYS,
        help="used by the script itself: measure only this way in this process; labels go to --out",
    )
    parser.add_argument(
        "--out",
        default="benchmarks/results",
        help="folder that the results (JSON and Markdown) are written to",
    )
    return parser


def predict(way: str, scan: np.ndarray, patch: int, classes: int) -> np.ndarray:
    """(Z, Y, X) uint8 labels of an int16 scan."""
    torch.manual_seed(0)
    network, window = nn.Conv3d(1, classes, 3, padding=1).eval(), (patch,) * 3

    def prepare(image: Tensor) -> Tensor:
        return image / 1000

    if way == "ours":
        return predict_labels(
            network,
            scan,
            spacing_mm=SPACING_MM,
            working_spacing_mm=SPACING_MM,
            patch_shape=window,
            num_classes=classes,
            prepare=prepare,
            device=CPU,
            on_message=lambda line: None,
        )
    from monai.inferers import sliding_window_inference

    with torch.inference_mode():
        image = prepare(torch.from_numpy(scan).float())[None, None]
        logits = sliding_window_inference(image, window, 1, network, overlap=0.5, mode="gaussian")
        return logits.argmax(dim=1)[0].to(torch.uint8).numpy()


def measure_here(way: str, slices: int, plane: int, patch: int, classes: int, out: str) -> None:
    """One prediction: prints seconds, CPU seconds and MiB as JSON, saves the labels to out/<way>.npy."""
    if way == "monai":
        import monai.inferers  # noqa: F401
    before_mib = peak_memory_mib(CPU)
    scan = np.random.default_rng(0).integers(-1000, 1000, (slices, plane, plane), np.int16)
    start, cpu_start = time.perf_counter(), time.process_time()
    labels = predict(way, scan, patch, classes)
    result = {"seconds": time.perf_counter() - start, "cpu_s": time.process_time() - cpu_start}
    result["peak_mib"] = peak_memory_mib(CPU) - before_mib
    np.save(Path(out, f"{way}.npy"), labels)
    print(json.dumps(result))


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(build_parser(), argv)
    if args.one:
        torch.set_num_threads(args.threads)
        measure_here(args.one, args.slices[0], args.plane, args.patch, args.classes, args.out)
        return {}
    if len(args.slices) != len(args.repeats):
        raise ValueError(f"--repeats {args.repeats} does not fit --slices {args.slices}; one for each")
    ways = [way for way in WAYS if way != "monai" or find_spec("monai")]
    if len(ways) < len(WAYS):
        print("monai: not measured: pip install -r benchmarks/requirements.txt")
    content: dict = {"plane": args.plane, "patch": args.patch, "classes": args.classes, "scans": []}
    rows = []
    for slices, repeats in zip(args.slices, args.repeats, strict=True):
        runs: dict[str, list[dict]] = {way: [] for way in ways}
        with tempfile.TemporaryDirectory(prefix="sliding_window_") as folder:
            sizes = ["--plane", args.plane, "--patch", args.patch, "--classes", args.classes]
            sizes += ["--slices", slices, "--threads", args.threads, "--out", folder]
            for _ in range(repeats):
                for way in ways:  # in turns
                    command = [sys.executable, __file__, "--one", way, *sizes]
                    done = subprocess.run(
                        list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True
                    )
                    runs[way].append(json.loads(done.stdout.splitlines()[-1]))
                    print(slices, way, runs[way][-1], flush=True)
            labels = [np.load(Path(folder, f"{way}.npy")) for way in ways]
        shape, window = (slices, args.plane, args.plane), (args.patch,) * 3
        bound = prediction_peak_mib(shape, SPACING_MM, SPACING_MM, window, args.classes)
        scan = {"slices": slices, "predicted_peak_mib": bound.host_mib, "runs": runs}
        scan["equal_labels"] = float((labels[0] == labels[-1]).mean())
        content["scans"].append(scan)
        for way in ways:
            row = {"scan": f"{slices} x {args.plane} x {args.plane}", "way": way, "runs": repeats}
            for title, key in COLUMNS.items():
                row[title] = f"{statistics.median(run[key] for run in runs[way]):,.0f}"
                ratios = [a[key] / b[key] for a, b in zip(runs[way], runs["ours"], strict=True)]
                row[f"/ ours ({title})"] = f"{statistics.median(ratios):.2f}"
            rows.append(row)
    bounds = ", ".join(f"{scan['predicted_peak_mib']:,.0f} MiB" for scan in content["scans"])
    equal = ", ".join(f"{scan['equal_labels']:.6f}" for scan in content["scans"])
    notes = f"""{args.classes} classes, windows of {args.patch}^3 voxels, overlap 0.5, one in each call,
Gaussian weights, {args.threads} threads. Medians. Other programs may use the machine at the same time:
memory does not mind, CPU seconds (all threads) a little, seconds much. Ours announces its peak
beforehand, without scan and network: {bounds}. Voxels with equal labels: {equal};
tilings differ, and so does where the network pads its windows."""
    write_results(args.out, "sliding_window", argv, content, rows, notes)
    return content


if __name__ == "__main__":
    main()
