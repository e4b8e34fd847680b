"""From the numbers that a scan's file stores to voxel values: channel, slope and intercept, NaN, range."""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Stored:
    """Where and how a file stores its voxels: the first byte of them, their type, slope and intercept."""

    offset: int
    dtype: np.dtype
    slope: float
    inter: float


def choose_channel(
    path: Path, shape: tuple[int, ...], stored: Stored, channel: int
) -> tuple[tuple[int, ...], Stored]:
    """Shape and place of one 3-D volume of a 4-D file, whose volumes lie one behind the other.

    Args:
        shape: x y z and, in a 4-D file, the number of channels.

    Raises:
        ValueError: the file does not have that channel, or more than four axes.
    """
    num_channels = math.prod(shape[3:])
    if not 0 <= channel < num_channels or len(shape) > 4:
        raise ValueError(f"{path}: no channel {channel} in a file of shape {shape} (x y z channel)")
    volume_bytes = math.prod(shape[:3]) * stored.dtype.itemsize
    return shape[:3], replace(stored, offset=stored.offset + channel * volume_bytes)


def scaled(raw: np.ndarray, slope: float, intercept: float, *, by_value: bool = False) -> np.ndarray:
    """raw * slope + intercept in native byte order, without a float64 copy.

    Args:
        raw: numbers as stored, any shape.
        by_value: whether int16 or int32 may be chosen because the values in `raw` fit; otherwise only if all
            values of its type would fit, so that parts of one file have one type.

    Returns:
        Integers if slope and intercept are whole numbers and the results fit int16 or int32 (the stored type
        if the slope is 1 and the intercept 0), else float32.
    """
    raw = raw.astype(raw.dtype.newbyteorder("="), copy=False)
    if (slope, intercept) == (1.0, 0.0):
        return raw.astype(np.float32, copy=False) if raw.dtype.kind == "f" else raw
    if raw.dtype.kind in "iu" and slope.is_integer() and intercept.is_integer():
        info = np.iinfo(raw.dtype)
        limits = (raw.min(), raw.max()) if by_value else (info.min, info.max)
        low, high = sorted(int(v) * int(slope) + int(intercept) for v in limits)
        for dtype in (np.int16, np.int32):
            if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
                return (raw.astype(np.int64) * int(slope) + int(intercept)).astype(dtype)
    return raw.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def lowest_finite(parts: Iterable[np.ndarray], path: Path) -> float:
    """Smallest finite value of the parts of a file, with a warning that counts NaN and infinity.

    Raises:
        ValueError: no value is finite.
    """
    lowest, num_bad = np.inf, 0
    for part in parts:
        finite = np.isfinite(part)
        lowest = min(lowest, part.min(where=finite, initial=np.inf))
        num_bad += part.size - np.count_nonzero(finite)
    if lowest == np.inf:
        raise ValueError(f"{path}: holds no finite value")
    if num_bad:
        warnings.warn(f"{path}: {num_bad} NaN or infinite voxels set to {lowest:g}", stacklevel=5)
    return lowest


def without_nan(array: np.ndarray, lowest: Callable[[], float]) -> np.ndarray:
    """NaN and infinity replaced by `lowest()`, which is only called if there are any."""
    if array.dtype.kind != "f" or (finite := np.isfinite(array)).all():
        return array
    return np.where(finite, array, np.float32(lowest()))


def clip_values(array: np.ndarray, value_range: Sequence[float] | None) -> np.ndarray:
    """The array cut to [low, high], of its type; as it is if `value_range` is None.

    Comes before any resampling or averaging: a screw of 30,000 HU or padding of -3024 would else spread into
    the voxels beside it. Preprocessing and prediction do so alike.
    """
    if value_range is None:
        return array
    low, high = value_range
    if array.dtype.kind in "iu":  # numpy refuses limits that the type cannot hold
        low, high = max(low, np.iinfo(array.dtype).min), min(high, np.iinfo(array.dtype).max)
    return array.clip(low, high)
