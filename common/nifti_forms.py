"""Where the voxels of a scan lie: the affines of a NIfTI header, and whether two scans lie on one grid."""

import itertools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

MM_PER_UNIT = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # NIfTI's codes: unknown, metre, millimetre, micrometre
FORM_TOLERANCE_MM = 1.0  # sform and qform may differ by this much at a corner without a warning
SIDE_TOLERANCE = 1e-3  # and their voxels by this share of a side
SMALLEST_VOXEL_MM, LARGEST_VOXEL_MM = 1e-4, 100.0
SHORTEST_MM, LONGEST_MM = 1.0, 10_000.0  # of the longest side of a scan
FARTHEST_MM = 1e5  # from the origin; a float32 there is off by as much as two grids may be
GRID_TOLERANCE_MM = 0.01  # two grids are one if no corner of one is farther from that of the other


def unit_mm(path: Path, header: Any) -> float:
    """Length in mm of the unit that a NIfTI header names; mm without one, with a warning for unknown ones."""
    code = int(header["xyzt_units"]) & 7  # the higher bits are the unit of time
    if code not in MM_PER_UNIT:
        warnings.warn(
            f"{path}: its header names a unit of length that does not exist (code {code}); taken as mm",
            stacklevel=3,
        )
    return MM_PER_UNIT.get(code, 1.0)


def choose_affine(path: Path, image: Any, shape: Sequence[int], mm: float) -> np.ndarray:
    """The (4, 4) affine of a NIfTI file, in the file's unit; warns where it says less or more than one thing.

    The sform counts, or the qform where the sform is not set or not usable.

    Args:
        image: nibabel's.
        shape: x y z.
        mm: length of the file's unit.

    Raises:
        ValueError: no form is usable.
    """
    from nibabel.orientations import aff2axcodes

    def warn(message: str) -> None:
        warnings.warn(f"{path}: {message}", stacklevel=4)

    header = image.header
    forms = {name: _form(header, name, shape) for name in ("sform", "qform") if header[f"{name}_code"] > 0}
    is_guess = not forms
    forms = forms or {"voxel size": np.asarray(image.affine, np.float64)}
    reasons = {name: _why_unusable(affine, shape, mm) for name, affine in forms.items()}
    usable = [name for name, reason in reasons.items() if not reason]
    if not usable:
        raise ValueError(f"{path}: its affine is not usable ({next(iter(reasons.values()))})")
    affine, (used, *others) = forms[usable[0]], usable
    if is_guess:
        codes = "".join(aff2axcodes(affine))
        warn(
            f"neither sform nor qform is set, so its orientation is a guess ({codes}); left and right "
            "may be exchanged"
        )
    for name, reason in reasons.items():
        if reason:
            warn(f"its {name} is not usable ({reason}); the {used} is used")
    for name in others:
        apart_mm = mm * off_mm(affine, forms[name], shape)
        sizes = _sizes_differ(affine, forms[name], mm)
        if apart_mm > FORM_TOLERANCE_MM or sizes:
            warn(f"sform and qform {apart_mm:.3g} mm apart; the {used} is used{sizes}")
    sides = np.abs(header["pixdim"][1:4].astype(float))
    if used == "sform" and "qform" not in forms and sides.all() and np.isfinite(sides).all():
        if sizes := _sizes_differ(affine, _with_sides(affine, sides), mm):
            warn(f"sform and voxel size (pixdim) disagree; the sform is used{sizes}")
    return affine


def _form(header: Any, name: str, shape: Sequence[int]) -> np.ndarray:
    """The sform or qform of a header; NaN where the qform is not a rotation."""
    try:
        with np.errstate(all="ignore"):
            affine = np.array(getattr(header, f"get_{name}")(), np.float64)
    except ValueError:
        return np.full((4, 4), np.nan)
    if shape[2] == 1 and not affine[:3, 2].any():  # a single slice needs no thickness: 1 is taken
        normal = np.cross(affine[:3, 0], affine[:3, 1])
        affine[:3, 2] = normal / max(np.linalg.norm(normal), 1e-30)
    return affine


def _why_unusable(affine: np.ndarray, shape: Sequence[int], mm: float) -> str:
    """A few words why no scan has this affine, "" if one may; arguments as of `choose_affine`."""
    if not np.isfinite(affine).all():
        return "not finite"
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not lengths.all():
        return "an axis of length zero"
    if abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-6:
        return "flat"
    sides_mm = mm * lengths
    longest_mm = float((sides_mm * shape).max())
    is_voxel = SMALLEST_VOXEL_MM <= min(sides_mm) and max(sides_mm) <= LARGEST_VOXEL_MM
    if not (is_voxel and SHORTEST_MM <= longest_mm <= LONGEST_MM):
        unit = "" if mm == 1 else f" with its unit of {mm:g} mm"
        return f"voxels of {by(sides_mm)} mm{unit}, {longest_mm:.3g} mm along the longest side"
    if (farthest_mm := mm * float(np.abs(affine[:3, 3]).max())) > FARTHEST_MM:
        return f"{farthest_mm:.3g} mm away from the origin"
    return ""


def _with_sides(affine: np.ndarray, sides: np.ndarray) -> np.ndarray:
    """The affine with other lengths of its axes."""
    return affine / np.append(np.linalg.norm(affine[:3, :3], axis=0) / sides, 1.0)


def _sizes_differ(affine: np.ndarray, other: np.ndarray, mm: float) -> str:
    """The end of a warning that tells what the other voxel size would do to volumes, "" if it is the same."""
    sides = [mm * np.linalg.norm(form[:3, :3], axis=0) for form in (affine, other)]
    if np.allclose(*sides, rtol=SIDE_TOLERANCE, atol=0):
        return ""
    ml = 100 * abs(np.linalg.det(other[:3, :3]) / np.linalg.det(affine[:3, :3]))
    return (
        f". Its voxels are {by(sides[0])} mm (x y z); with the other {by(sides[1])} mm, volumes in mL would "
        f"be off: {ml:.4g} mL instead of 100"
    )


def by(sides: Sequence[float]) -> str:
    """Numbers such as "1 x 1.5 x 2"."""
    return " x ".join(f"{side:.4g}" for side in sides)


def off_mm(a: np.ndarray, b: np.ndarray, shape_xyz: Sequence[int]) -> float:
    """Largest difference in a coordinate, mm, of two (4, 4) affines at the corners of a grid."""
    corners = np.array([[*corner, 1] for corner in itertools.product(*((0, n - 1) for n in shape_xyz))])
    return float(np.abs(corners @ (a - b).T).max())


def grid_difference(a: Any, b: Any, tolerance_mm: float = GRID_TOLERANCE_MM) -> str:
    """What differs between the grids of two scans, in words; "" if they are one, whatever the files' axes.

    Args:
        a, b: of type NiftiFile.
        tolerance_mm: how far a corner may be from that of the other one.
    """
    if a.shape != b.shape:
        return f"{by(a.shape)} and {by(b.shape)} voxels (z y x)"
    distance_mm = off_mm(a.affine, b.affine, a.shape[::-1])
    if distance_mm <= tolerance_mm:
        return ""
    spacings = f"spacing {by(a.spacing_mm)} and {by(b.spacing_mm)} mm (z y x)"
    return f"corners up to {distance_mm:.3g} mm apart, {spacings}"
