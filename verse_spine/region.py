"""Where in a scan to segment: before stage 2, the spine is looked for on a coarse copy of the scan."""

from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.files import check_keys, read_json
from common.hu import why_not_hu
from common.nifti import NiftiFile
from common.volumes import body_box, crop
from verse_spine.heatmap import HU_RANGE, small_grid, to_small_grid
from verse_spine.networks import TrainedModel
from verse_spine.preprocess import BODY_MARGIN_MM
from verse_spine.segment import AIR_BELOW_HU, Region, predict_heatmap, spine_region

OVERVIEW_MM = 3.0  # voxels of the coarse copy that stage 1 and the body box look at


def find_region(
    file: NiftiFile,
    heatmap: TrainedModel | None,
    *,
    roi: str | Path | None = None,
    whole_scan: bool = False,
) -> Region:
    """Box of a scan to segment: that of a file, the whole scan, else the box that the heat map finds.

    Without a heat map, or if it finds no spine, it is the box of the body.

    Args:
        roi: JSON file as for `read_roi`.

    Raises:
        FileNotFoundError, ValueError: as `read_roi`, or a scan that cannot be read.
    """
    factors = tuple(max(1, int(OVERVIEW_MM / s)) for s in file.spacing_mm)
    coarse = file.read_reduced(factors, HU_RANGE)
    if suspicion := why_not_hu(coarse):
        tqdm.write(f"warning: {file.path.name}: {suspicion}")
    if roi:
        return Region(read_roi(roi, file), "given")
    if whole_scan:
        return Region(((0, 0, 0), file.shape), "whole scan")
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
    """Box in voxels (z y x, RAS) of a JSON file: {"start", "stop"}, or <name>.json of predict.py.

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
