"""Conversion of scans with tumour masks to slices; what lung_tumor/preprocess.py does for each case."""

import glob
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.conversion import convert_cases
from common.decathlon import Case
from common.files import make_folder, refuse_raw_data, write_json
from common.hu import why_not_hu
from common.messages import warn
from common.slices import to_display, to_pixel_size, write_png
from common.splits import natural_key
from lung_tumor.cases import load_case, pixel_size_mm, source_files, source_stamp
from lung_tumor.kaggle import KaggleCase
from lung_tumor.slice_files import parse_slice_name, read_volumes
from lung_tumor.slices import volume_to_slices

WINDOW_HU = (-1024.0, 325.0)  # wide enough for lung, soft tissue and contrast; a grey level is 5.3 HU


@dataclass(frozen=True)
class Settings:
    """What decides the pixels; a volume made with other settings is made again."""

    pixel_mm: float
    window_hu: tuple[float, float] = WINDOW_HU
    empty_ratio: float = 0.1
    all_slices: bool = False
    min_pixels: int = 0
    seed: int = 42


def median_pixel_mm(cases: list) -> float:
    """Median over the cases of the side of a pixel (the shorter one of an oblong pixel), to 0.001 mm; 1 if no
    header can be read."""
    sides = []
    for case in cases:
        try:
            sides.append(min(pixel_size_mm(case)))
        except (ValueError, OSError):
            continue  # its conversion will fail with the reason
    return round(float(np.median(sides)), 3) if sides else 1.0


def choose_slices(
    tumour_pixels: list[int], has_tumour: np.ndarray, volume: str, settings: Settings
) -> list[int]:
    """Numbers of the slices for training: all with tumour, and a share of those without.

    Left out are slices with less tumour than min_pixels. The choice depends on the volume's name, so that it
    differs from volume to volume but not with the other volumes that are converted.

    Args:
        tumour_pixels: of each slice as it is written.
        has_tumour: of each slice of the scan; a tiny tumour may be lost on the way to larger pixels.
    """
    tumour = [z for z, pixels in enumerate(tumour_pixels) if pixels >= max(1, settings.min_pixels)]
    empty = [int(z) for z in np.flatnonzero(~has_tumour)]
    chooser = random.Random(f"{settings.seed} {volume}")
    num_empty = round(settings.empty_ratio * len(empty))
    if not tumour and empty:
        num_empty = max(1, num_empty)  # a volume without any slice could not stand in a split
    return sorted(tumour + chooser.sample(empty, num_empty))


def convert_case(case: Case | KaggleCase, out: Path, settings: Settings) -> dict:
    """Write the slices of one case; returns its entry of volumes.json. Runs in a worker process."""
    volume = case.case_id
    scan, mask = load_case(case)
    pixel_size_mm, pixel_mm = scan.spacing_mm[1:], settings.pixel_mm
    slices = volume_to_slices(scan.array, settings.window_hu)
    masks = [to_pixel_size(plane, pixel_size_mm, pixel_mm, is_mask=True) for plane in to_display(mask)]
    tumour_pixels = [int(plane.sum()) for plane in masks]
    has_tumour = mask.any(axis=(1, 2))
    chosen = choose_slices(tumour_pixels, has_tumour, volume, settings)
    for folder in ("images", "labels"):
        for old in (out / folder).glob(f"{glob.escape(volume)}_slice_*.png"):
            if parse_slice_name(old.stem)[0] == volume:  # those of a volume lung_slice_7 begin alike
                old.unlink()
    for z in range(len(slices)) if settings.all_slices else chosen:
        name = f"{volume}_slice_{z:04d}.png"
        write_png(out / "images" / name, to_pixel_size(slices[z], pixel_size_mm, pixel_mm))
        write_png(out / "labels" / name, masks[z] * np.uint8(255))
    return {
        "source": source_files(case),
        "stamp": source_stamp(case),
        "num_slices": len(slices),
        "kept": chosen,
        "tumour_slices": [int(z) for z in np.flatnonzero(has_tumour)],
        "tumour_mm3": round(float(mask.sum()) * scan.voxel_mm3, 1),
        "tumour_pixels_kept": sum(tumour_pixels[z] for z in chosen),
        "slice_shape": list(masks[0].shape),
        "shape_zyx": list(scan.array.shape),
        "spacing_mm": [round(s, 6) for s in scan.spacing_mm],
        "voxel_mm3": scan.voxel_mm3,
        "affine": scan.affine.tolist(),
        "file_orientation": scan.orientation,
        "why_not_hu": why_not_hu(scan.array),
        "settings": json.loads(json.dumps(asdict(settings))),
    }


def _known_entries(out: Path) -> dict[str, dict]:
    """volumes.json of an earlier conversion; {} if it is damaged, since it can be made again."""
    try:
        return read_volumes(out)
    except ValueError as error:
        warn(f"{error}; all volumes are converted again")
        return {}


def convert_all(cases: list, out: Path, settings: Settings, workers: int) -> tuple[dict, dict[str, str]]:
    """Convert what is not done yet with these settings from these files.

    Returns:
        (entries of volumes.json, {failed volume: reason}).
    """
    refuse_raw_data(out)
    for folder in ("images", "labels"):
        make_folder(out / folder)
    wanted, known = json.loads(json.dumps(asdict(settings))), _known_entries(out)
    done = {}
    for case in cases:
        entry = known.get(case.case_id)
        if entry and entry.get("settings") == wanted and entry["stamp"] == source_stamp(case):
            done[case.case_id] = entry
    todo = [c for c in cases if c.case_id not in done]
    if todo:
        # volumes.json without dataset.json tells that the conversion is unfinished.
        write_json(out / "volumes.json", known)
        (out / "dataset.json").unlink(missing_ok=True)
    if done:
        print(f"{len(done)} of {len(cases)} volumes are converted already")
    failed: dict[str, str] = {}
    for case, entry, error in tqdm(
        convert_cases(convert_case, todo, out, settings, workers=workers),
        "converting",
        total=len(todo),
        unit="volume",
        disable=None,
    ):
        if entry is None:
            failed[case.case_id] = error
            continue
        done[case.case_id] = entry
        ordered = dict(sorted(done.items(), key=lambda item: natural_key(item[0])))
        write_json(out / "volumes.json", ordered)
    return done, failed
