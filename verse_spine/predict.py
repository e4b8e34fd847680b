"""Segment the vertebrae of CT scans: find the spine, then segment inside its box, on the scan's own grid.

    python verse_spine/predict.py --weights seg/best.pt --heatmap_weights hm/best.pt --source scan.nii.gz
    python verse_spine/predict.py --weights seg/best.pt --source scans/ --out masks/

Of each scan <name>.nii.gz it writes <name>_mask.nii.gz (its own grid, affine and codes), <name>_ctd.json
(centres of the vertebral bodies in VerSe's format; of models trained without levels26 they are only counted
from head to foot, in <name>_bodies.json), <name>.json (region, seconds, memory) and <name>_preview.png.
Without --heatmap_weights the whole body is searched. The scan is read where it is needed, and class scores
exist for a few rows at a time. For research only.
"""

import math
import sys
import time
import warnings
from argparse import ArgumentParser, Namespace
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import batch, distributed
from common.config import (
    Switch,
    add_prediction_flags,
    fraction,
    make_parser,
    parse_args,
    positive_int,
    run_script,
)
from common.files import check_keys, read_json, write_json
from common.hardware import choose_precision, describe_device, peak_memory_mib, start_device
from common.hu import why_not_hu
from common.nifti import NIFTI_SUFFIXES, NiftiFile, case_name, open_nifti, save_label
from common.runs import run_dir_of
from common.volumes import body_box, crop
from common.windows import prediction_peak_mib, reading_box
from verse_spine.heatmap import HU_RANGE, small_grid, to_small_grid
from verse_spine.labels import class_names, num_outputs, unmap_labels, write_centroids
from verse_spine.networks import TrainedModel, load_trained
from verse_spine.pictures import save_planes
from verse_spine.preprocess import BODY_MARGIN_MM
from verse_spine.segment import (
    AIR_BELOW_HU,
    Region,
    clean_up,
    mask_centroids,
    predict_heatmap,
    segment,
    spine_region,
)

OWN_NAMES = ("_mask", "_msk")  # masks of this script and of VerSe are not scans
OVERVIEW_MM = 3.0  # voxels of the coarse copy that stage 1 and the body box look at


def build_parser() -> ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("--weights", required=True, help="best.pt of train_segmentation.py")
    parser.add_argument("--heatmap_weights", help="best.pt of train_heatmap.py, to look only at the spine")
    parser.add_argument("--source", required=True, help="a NIfTI scan, or a folder of them")
    parser.add_argument("--out", help="folder of the results; default: predictions/ in the run's folder")
    parser.add_argument("--recursive", action=Switch, default=False, help="also subfolders")
    parser.add_argument(
        "--no_roi", action="store_true", help="search the whole scan, also the air around the body"
    )
    parser.add_argument("--roi", help="JSON from an earlier run, or {'start': [z, y, x], 'stop': [z, y, x]}")
    parser.add_argument("--tta", action=Switch, default=False, help="average with the mirrored scan: 2x time")
    parser.add_argument(
        "--overlap", type=fraction, default=0.5, help="of neighbouring windows; 0.25 is faster"
    )
    parser.add_argument("--batch_size", type=positive_int, default=1, help="windows at a time")
    parser.add_argument("--clean_up", action=Switch, default=True, help="remove what is no part of a spine")
    parser.add_argument("--save_preview", action=Switch, default=True, help="a picture of three planes")
    parser.add_argument(
        "--save_3d",
        action=Switch,
        default=False,
        help="also a shaded surface and a mesh to open in a browser",
    )
    add_prediction_flags(parser)
    return parser


# ---- stage 1 ----


def find_region(file: NiftiFile, heatmap: TrainedModel | None, args: Namespace) -> Region:
    """Where to segment: by --roi, --no_roi, the heat map, or the box of the body."""
    if args.roi:
        return Region(read_roi(args.roi, file), "given")
    if args.no_roi:
        return Region(((0, 0, 0), file.shape), "whole scan")
    factors = tuple(max(1, int(OVERVIEW_MM / s)) for s in file.spacing_mm)
    coarse = file.read_reduced(factors, HU_RANGE)
    if doubt := why_not_hu(coarse):
        tqdm.write(f"warning: {file.path.name}: {doubt}")
    margin = tuple(map(int, np.ceil(BODY_MARGIN_MM / np.multiply(file.spacing_mm, factors))))
    low, high = body_box(coarse, AIR_BELOW_HU, margin)  # the field of view that preprocessing leaves
    start = np.multiply(low, factors)
    stop = np.minimum(np.multiply(high, factors), file.shape)
    body = (tuple(map(int, start)), tuple(map(int, stop)))
    if heatmap is None:
        return Region(body, "body")
    grid = small_grid(tuple(map(int, stop - start)), file.spacing_mm, tuple(heatmap.config["patch_size"]))
    heat = predict_heatmap(heatmap, to_small_grid(crop(coarse, low, high), grid))
    if region := spine_region(heat, grid):
        box = tuple(tuple(int(v) for v in np.add(corner, start)) for corner in region.box)
        return Region(box, region.source, region.heat)
    tqdm.write(
        f"warning: {file.path.name}: the heat map found no spine (highest value {heat.max():.2f}); "
        "searching the whole body"
    )
    return Region(body, "body", float(heat.max()))


def read_roi(path: str | Path, file: NiftiFile) -> tuple[tuple, tuple]:
    """Box in voxels (z y x, RAS) of a JSON file: {"start", "stop"}, or a result of this script.

    Raises:
        FileNotFoundError, ValueError: the file is missing, or holds no box inside the scan.
    """
    advice = '--roi needs {"start": [z, y, x], "stop": [z, y, x]} in voxels of the scan in RAS'
    content = read_json(path, advice=advice)
    box = content.get("region", content)
    check_keys(box, {"start": list, "stop": list}, str(path), advice=advice)
    start, stop = tuple(box["start"]), tuple(box["stop"])
    is_inside = len(start) == len(stop) == 3 and all(isinstance(v, int) for v in (*start, *stop))
    is_inside = is_inside and all(0 <= a < b <= n for a, b, n in zip(start, stop, file.shape, strict=True))
    if not is_inside:
        name = f"{file.path.name} {file.shape}"
        raise ValueError(f"{path}: box {start} to {stop} is not inside {name}; {advice}")
    return start, stop


# ---- one scan ----


def predict_scan(
    model: TrainedModel, heatmap: TrainedModel | None, path: Path, out: Path, args: Namespace
) -> dict:
    """Everything of one scan; returns its line of results.csv."""
    started = time.perf_counter()
    file, labels = open_nifti(path), model.config["labels"]
    name = case_name(path)
    region = find_region(file, heatmap, args)
    found_s = time.perf_counter() - started
    working_mm, patch_size = model.preprocessing["spacing_mm"], tuple(model.config["patch_size"])
    # What is read is larger than a region smaller than a patch: the network sees the tissue around it.
    start, stop = reading_box(region.box, file.shape, file.spacing_mm, working_mm, patch_size)
    shape = tuple(np.subtract(stop, start).tolist())
    peak = prediction_peak_mib(
        shape,
        file.spacing_mm,
        working_mm,
        patch_size,
        num_outputs(labels),
        batch_size=args.batch_size,
        device=model.device,
    )
    box_mib = 2 * math.prod(shape) / 2**20
    tqdm.write(
        f"{path.name}: {region.source}, {' x '.join(map(str, shape))} of {' x '.join(map(str, file.shape))} "
        f"voxels; scores and labels take up to {peak.host_mib + box_mib:,.0f} MiB of RAM, "
        f"{peak.device_mib:,.0f} MiB of GPU memory, besides the network"
    )
    image = file.read_box(start, stop)  # int16 of most files: stage 2 reads it several times
    with tqdm(desc=path.name, unit="window", disable=None, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        inside = segment(
            model,
            image,
            file.spacing_mm,
            box=tuple(tuple(np.subtract(corner, start).tolist()) for corner in region.box),
            mirror=args.tta,
            overlap=args.overlap,
            batch_size=args.batch_size,
            progress=progress,
        )
    mask = np.zeros(file.shape, np.uint8)
    crop(mask, start, stop)[...] = inside
    del inside
    report = {"removed_ml": 0.0, "filled_ml": 0.0}
    if args.clean_up:
        mask, report = clean_up(mask, file.spacing_mm, file.voxel_mm3)
    counts = np.zeros(256, np.int64)
    for plane in mask:  # plane by plane: as an index the whole mask would take 8 bytes a voxel
        plane[...] = unmap_labels(plane, labels)
        counts += np.bincount(plane.ravel(), minlength=256)
    volumes = {int(v): float(counts[v] * file.voxel_mm3 / 1000) for v in np.flatnonzero(counts) if v}
    if not volumes:
        tqdm.write(f"warning: {path.name}: no vertebra found, its mask is empty")
    save_label(out / f"{name}_mask.nii.gz", mask, file)
    # Without levels the numbers only count: a name of its own, lest they be taken for C1, C2 ...
    centres = out / f"{name}_{'ctd' if labels == 'levels26' else 'bodies'}.json"
    write_centroids(centres, mask_centroids(mask, file, labels))
    inside = crop(mask, start, stop)
    if args.save_preview:
        save_planes(out / f"{name}_preview.png", image, file.spacing_mm, inside, title=name)
    if args.save_3d:
        from verse_spine.views import save_views

        save_views(out / name, inside, file.spacing_mm, image=image)
    seconds = time.perf_counter() - started
    memory = peak_memory_mib(model.device)
    write_json(
        out / f"{name}.json",
        {
            "scan": str(path),
            "labels": labels,
            "classes": class_names(labels),
            "volume_ml": volumes,
            "region": {
                "source": region.source,
                "start": list(region.box[0]),
                "stop": list(region.box[1]),
                "axes": "z y x, voxels of the scan in RAS",
                "max_heat": None if math.isnan(region.heat) else region.heat,
            },
            "clean_up": report,
            "seconds": {"region": found_s, "all": seconds},
            "predicted_mib": {"host": peak.host_mib + box_mib, "device": peak.device_mib},
            "peak_mib": None if math.isnan(memory) else memory,
            "device": describe_device(model.device),
            "precision": model.precision.name,
        },
    )
    return {
        "scan": str(path),
        "region": region.source,
        "volume_ml": sum(volumes.values()),
        "labels": " ".join(map(str, volumes)),
        "removed_ml": report["removed_ml"],
        "seconds": seconds,
        "peak_mib": memory,
    }


def main(argv: list[str] | None = None) -> int:
    args = parse_args(build_parser(), argv)
    with distributed.session():
        if args.roi and args.no_roi:
            raise ValueError("--roi and --no_roi contradict each other")
        device = start_device(args.device, distributed.local_rank())
        precision = choose_precision(args.amp, device)
        model = load_trained(args.weights, device, precision, "segmentation")
        heatmap = None
        if args.heatmap_weights:
            heatmap = load_trained(args.heatmap_weights, device, precision, "heatmap")
        out = Path(args.out) if args.out else run_dir_of(args.weights) / "predictions"
        scans = batch.find_sources(
            args.source,
            NIFTI_SUFFIXES,
            out=out,
            own_names=OWN_NAMES,
            recursive=args.recursive,
            what="NIfTI scan",
        )
        out.mkdir(parents=True, exist_ok=True)
        if distributed.is_main():
            print(f"{len(scans)} scan(s) on {describe_device(device)}, {precision.name}")
        warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # without a line of code
        clashes = batch.name_clashes({path: out / case_name(path) for path in scans})

        def predict(path: Path) -> dict:
            return predict_scan(model, heatmap, path, out, args)

        todo = [path for path in scans if path not in clashes]
        rows, failed = batch.each(predict, todo, unit="scan", table=out / "predictions.csv")
        failed = clashes | failed
        if distributed.is_main():
            report(rows, failed, out)
        return batch.exit_code(failed)


def report(rows: list[dict], failed: dict[Path, str], out: Path) -> None:
    for row in rows[:20]:
        name = Path(row["scan"]).name
        print(f"  {name}: {row['volume_ml']:.1f} mL of vertebrae, {row['seconds']:.1f} s")
    if len(rows) > 20:
        print(f"  ... {len(rows) - 20} more in predictions.csv")
    print(f"{len(rows)} of {len(rows) + len(failed)} scan(s) written to {out}")
    for line in batch.failed_lines(failed):
        print(line)


if __name__ == "__main__":
    run_script(main)
