"""Hounsfield units (HU): the window that makes grey values of them, and whether an array holds any.

Air is -1000, fat about -100, water 0, soft tissue 20 to 80, dense bone 1000 and more.
"""

import numpy as np

from common.files import check_numbers

MOST_VOXELS = 500_000  # as many are looked at; percentiles of them are exact enough
PADDING_BELOW_HU = -1500  # e.g. -2000 or -3024 outside of the scanner's round field of view
RAW_OFFSET = 1024  # scanners store HU + 1024 and note the offset in the header


def window(array: np.ndarray, low_hu: float, high_hu: float) -> np.ndarray:
    """float32 copy with `low_hu` mapped to 0, `high_hu` to 1, and all beyond cut off.

    Raises:
        ValueError: high_hu is not above low_hu.
    """
    if not high_hu > low_hu:
        raise ValueError(f"window {low_hu:g} to {high_hu:g} HU: the upper end must be above the lower")
    scaled = array.astype(np.float32)
    scaled -= np.float32(low_hu)
    scaled /= np.float32(high_hu - low_hu)
    return np.clip(scaled, 0, 1, out=scaled)


def check_window(values: object, what: str) -> tuple[float, float] | None:
    """(low, high) in HU of a note; None if there is none.

    Args:
        what: names file and key in the error message.

    Raises:
        ValueError: not two numbers of which the first is the lower one.
    """
    if values is None:
        return None
    low, high = check_numbers(values, 2, what)
    if not low < high:
        raise ValueError(f"{what}: window {low:g} to {high:g} HU; the first number must be the lower one")
    return low, high


def why_not_hu(array: np.ndarray) -> str:
    """A sentence that names why the values are probably not HU of a CT, or "" where they may well be.

    Judged by the values alone, of at most half a million voxels. It is a suspicion and belongs into a
    warning, not into an error. A CT passes that was cropped so that no air is left, was cut to a window that
    keeps fat (-100 HU), or has padding below -1500 outside of the field of view. A crop of one organ without
    any fat or air cannot be told from an MR.

    Args:
        array: numbers of any shape, finite. An empty array gives "".
    """
    values = np.asarray(array).ravel()
    values = values[:: max(1, values.size // MOST_VOXELS)].astype(np.float32)
    inside = values[values >= PADDING_BELOW_HU]
    if values.size == 0:
        return ""
    if inside.size == 0:
        return f"all values are below {PADDING_BELOW_HU}, which no tissue is; not a CT in HU"
    low, high = float(inside.min()), float(inside.max())
    found = f"values from {low:g} to {high:g}"
    if low == high:
        return f"all values are {low:g}; the scan is empty"
    if -0.01 <= low and high <= 1.01:
        return f"{found} look like a picture scaled to 0..1, not like HU; use the scan before it was scaled"
    if high - low < 50:
        return f"{found} are too close together for HU; use the scan before its values were normalised"
    if np.mean(inside < -60) > 0.005:  # a CT has air or fat somewhere; an MR may dip below 0 a little
        if np.percentile(inside, 99.9) < -200:
            return (
                f"{found}, hardly any above -200, where all tissue lies; was {RAW_OFFSET} subtracted twice?"
            )
        return ""
    if high <= 255:
        return f"{found} look like an 8-bit picture (0..255), not like HU; use the original scan"
    # Without the offset fat and soft tissue lie around 1024. The share was 0.76 and more in eight CT shifted
    # so, and 0.52 and less in 154 MR.
    dense = inside[inside > RAW_OFFSET - 424]
    if dense.size and np.mean(np.abs(dense - RAW_OFFSET) < 130) > 0.65:
        return (
            f"{found} look like raw scanner values: {RAW_OFFSET} must be subtracted to make them HU "
            "(the rescale intercept was lost; convert the DICOM files again)"
        )
    return f"{found}, hardly any below -60, where a CT has fat (-100) and air (-1000); is it an MR?"
