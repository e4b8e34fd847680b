"""Where in a scan to segment: before stage 2, the spine is looked for on a coarse copy of the scan."""

from pathlib import Path

import numpy as np

from common.files import check_keys, read_json
from common.hu import why_not_hu
from common.messages import warn
from common.nifti import NiftiFile
from common.overview import find_body, read_overview
from common.volumes import crop
from verse_spine.heatmap import HU_RANGE, small_grid, to_small_grid
from verse_spine.networks import TrainedModel
from verse_spine.preprocess import BODY_MARGIN_MM
from verse_spine.segment import AIR_BELOW_HU, Region, predict_heatmap, spine_region


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
    overview = read_overview(file, HU_RANGE)
    coarse = overview.image
    if suspicion := why_not_hu(coarse):
        warn(f"{file.path.name}: {suspicion}")
    if roi:
        return Region(read_roi(roi, file), "given")
    if whole_scan:
        return Region(((0, 0, 0), file.shape), "whole scan")
    (low, high), body = find_body(overview, file, AIR_BELOW_HU, BODY_MARGIN_MM)  # as preprocessing leaves it
    start, stop = body
    if heatmap is None:
        return Region(body, "body")
    shape = tuple(np.subtract(stop, start).tolist())
    grid = small_grid(shape, file.spacing_mm, tuple(heatmap.config["patch_size"]))
    heat = predict_heatmap(heatmap, to_small_grid(crop(coarse, low, high), grid))
    if region := spine_region(heat, grid):
        box = tuple(tuple(int(v) for v in np.add(corner, start)) for corner in region.box)
        return Region(box, region.source, region.heat)
    warn(
        f"{file.path.name}: the heat map found no spine (highest value {heat.max():.2f}); "
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
