"""Sliding-window prediction of whole scans that never holds the class scores of a scan.

Windows advance along the axis that is longest in patches. Rows of scores behind them are final: they are
taken to the scan's own grid, reduced to labels and dropped. On either grid scores exist for the depth of one
patch only, so that a longer scan takes more time, but not more memory for scores.

A window that reaches beyond the scan sees the scan's edge repeated there, as in training patches
(common/hdf5.py) and in augmentation (common/augment.py). Where windows lie is planned in common/windows.py;
common/grids.py leads from the scan's grid to the network's and back.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.grids import WorkingGrid, native_rows, read_rows
from common.hardware import Precision, autocast
from common.messages import warn
from common.volumes import Box, crop, resampled_shape
from common.windows import (
    READ_ROWS,
    device_of_sums,
    gaussian_weights,
    padded_shape,
    prediction_peak_mib,
    reading_box,
    stream_axis,
    sums_shape,
    window_starts,
    windows_of_a_step,
)

AIR_LOGIT = 10.0  # of the background in a window that is skipped
OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed")


def stream_scores(
    network: Callable[[Tensor], Tensor],
    volume: Any,
    patch_shape: Sequence[int],
    num_classes: int,
    *,
    device: torch.device | str,
    prepare: Callable[[Tensor], Tensor],
    overlap: float = 0.5,
    batch_size: int = 1,
    flips: Sequence[Sequence[int]] = (),
    mirrored_classes: Sequence[int] | None = None,
    skip: Callable[[Tensor], bool] | None = None,
    precision: Precision | None = None,
    axis: int = 0,
    accumulate_on: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
    on_message: Callable[[str], None] = print,
) -> Iterator[tuple[int, int, Tensor]]:
    """Scores of a volume, slab by slab: logits of all windows over a voxel, averaged by Gaussian weight.

    Logits are averaged, not probabilities. Where (size - patch) is a multiple of the step, the tiling and so
    the scores are those of MONAI's sliding_window_inference(mode="gaussian", padding_mode="replicate") with
    the network as predictor.

    Args:
        network: (N, C, d, h, w) on `device` -> logits (N, num_classes, d, h, w); in eval mode.
        volume: (Z, Y, X) or (C, Z, Y, X), anything with .shape that gives numbers where it is sliced. Every
            row along `axis` is read once, in order.
        patch_shape: (d, h, w). Along an axis where the volume is smaller it lies in the middle of the patch,
            its first and last voxels repeated on either side.
        prepare: (N, C, d, h, w) float32 of the volume's intensities, on `device` -> input of the network.
        overlap: least share of the patch that neighbours have in common.
        batch_size: windows in one call; halved, with a message, whenever the device runs out of memory.
        flips: axes of z y x = 0 1 2 to mirror in each pass; passes are averaged. ((), (2,)): as it is, and
            left-right. Where classes tell left from right, that needs `mirrored_classes`.
        mirrored_classes: for each class the one that it is in a mirror, such as the left kidney for the right
            one; scores of passes that are mirrored along x change places accordingly. None: none does.
        skip: (C, d, h, w) of a window as read -> whether it is air. Such a window does not reach the network
            and counts as background, with a logit of 10 for class 0 (-10 for a single class).
        precision: of the network, None = float32. Sums are float32.
        axis: of z y x, to stream along.
        accumulate_on: where the sums lie. None = `device`, unless they take over 40 % of its free memory.
        progress, on_message: called with the windows done and all windows; with a line of text.

    Yields:
        (start, stop, slab): rows [start, stop) along `axis`, in order; their scores (num_classes, Z, Y, X),
        float32, whole on the other axes. The slab is a view of the sums: clone it to keep it.

    Raises:
        ValueError: shapes do not fit, or a score is NaN or infinite.
        RuntimeError: not even a single window fits into memory.
    """
    size, patch = tuple(volume.shape[-3:]), tuple(patch_shape)
    if len(volume.shape) not in (3, 4) or len(patch) != 3 or batch_size < 1 or num_classes < 1:
        got = f"volume {tuple(volume.shape)}, patch {patch}, {num_classes} classes, batch of {batch_size}"
        raise ValueError(f"{got}; (Z, Y, X) or (C, Z, Y, X), a patch z y x, 1 or more of the others needed")
    padded, buffer_shape = padded_shape(size, patch), sums_shape(size, patch, axis)
    before = [(p - s) // 2 for p, s in zip(padded, size, strict=True)]
    device = torch.device(device)
    sums_device = device_of_sums(device, accumulate_on, num_classes, buffer_shape)
    weights = gaussian_weights(patch).to(sums_device)
    scores = torch.zeros(num_classes, *buffer_shape, device=sums_device)
    weight_sum = torch.zeros(1, *buffer_shape, device=sums_device)
    image = torch.empty(math.prod(volume.shape[:-3]), *buffer_shape)
    starts = [window_starts(*pair, overlap) for pair in zip(size, patch, strict=True)]
    windows = windows_of_a_step(starts, patch, axis)
    done, skipped, rows_read = 0, 0, 0
    total = len(windows) * len(starts[axis])

    def tell_progress() -> None:
        if progress is not None:
            progress(done, total)

    for start, next_start in itertools.pairwise([*starts[axis], padded[axis]]):
        last_row = min(start + patch[axis], size[axis])
        for first in range(rows_read, last_row, READ_ROWS):
            corner = list(before)
            corner[axis] += first - start
            _put(image, corner, read_rows(volume, axis, first, min(first + READ_ROWS, last_row)))
        rows_read = last_row
        _repeat_edges(image, before, size)

        waiting = []
        for window in windows:
            weight_sum[window].add_(weights)
            if skip is not None and skip(image[window]):
                air_logit = AIR_LOGIT if num_classes > 1 else -AIR_LOGIT
                scores[:1][window].add_(weights, alpha=air_logit)
                done, skipped = done + 1, skipped + 1
                tell_progress()
            else:
                waiting.append(window)
        while waiting:
            batch = torch.stack([image[window] for window in waiting[:batch_size]])
            logits = _forward(network, batch.to(device), prepare, flips, mirrored_classes, precision)
            if logits is None:
                batch_size = _smaller_batch(len(batch), device, patch)
                on_message(f"{device} is out of memory: going on with {batch_size} windows at a time")
                continue
            if logits.shape != (len(batch), num_classes, *patch):
                got = f"the network gives {tuple(logits.shape)} for windows {tuple(batch.shape)}"
                raise ValueError(f"{got}; expected {num_classes} classes on the same voxels")
            for window, window_logits in zip(waiting, logits.to(sums_device), strict=False):
                scores[window].addcmul_(window_logits, weights)
            del waiting[: len(batch)]
            done += len(batch)
            tell_progress()

        step = next_start - start
        slab = scores.narrow(axis + 1, 0, step).div_(weight_sum.narrow(axis + 1, 0, step))
        extent = list(size)
        extent[axis] = min(step, size[axis])
        slab = _box_of(slab, before, extent)
        stop = start + extent[axis]
        if not torch.isfinite(slab.sum()):
            where = f"in rows {start} to {stop} of axis {axis}"
            raise ValueError(f"the network gives NaN or infinite scores {where}: try --amp off")
        yield start, stop, slab
        if next_start < padded[axis]:
            for sums in (scores, weight_sum, image):
                _advance(sums, axis, step)
    if skip is not None:
        on_message(f"{skipped} of {total} windows held only air and were skipped")


def predict_labels(
    network: Callable[[Tensor], Tensor],
    volume: Any,
    *,
    spacing_mm: Sequence[float],
    working_spacing_mm: Sequence[float],
    patch_shape: Sequence[int],
    num_classes: int,
    prepare: Callable[[Tensor], Tensor],
    device: torch.device | str,
    overlap: float = 0.5,
    batch_size: int = 1,
    flips: Sequence[Sequence[int]] = (),
    mirrored_classes: Sequence[int] | None = None,
    value_range: Sequence[float] | None = None,
    air_below: float | None = None,
    precision: Precision | None = None,
    accumulate_on: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
    on_message: Callable[[str], None] = print,
    box: Box | None = None,
    threshold: float | None = None,
    probabilities: Mapping[int, np.ndarray] | None = None,
) -> np.ndarray:
    """Labels of a scan on its own grid, (Z, Y, X) uint8, by `stream_scores` on the working grid.

    Final rows of scores are interpolated to the scan's grid, a few at a time, and reduced: several classes to
    the highest score, a single one to whether its sigmoid is above `threshold`. How much memory this takes
    goes to `on_message` beforehand.

    Args (the others as in `stream_scores`):
        volume: (Z, Y, X) or (C, Z, Y, X) on the scan's grid, in memory or read where it is sliced.
        spacing_mm, working_spacing_mm: z y x, of the scan and of what the network was trained on.
        value_range: intensities are cut to it before they are resampled, as in preprocessing. None: they stay
            as they are.
        air_below: windows where no voxel reaches this intensity are skipped; -500 suits CT. None: no window
            is skipped.
        box: (start, stop), each z y x: only these voxels are predicted, the others are 0. What is read around
            a box that is smaller than a patch: see `reading_box`.
        threshold: in (0, 1), with a single class only. None = 0.5.
        probabilities: {class: (Z, Y, X) uint8 of zeros, in memory or mapped to a file}, of several classes;
            what is predicted of each is filled with its probability, 0 to 1 as 0 to 255.

    Raises: as `stream_scores`, and ValueError for over 256 classes, or a box or threshold out of range.
    """
    if num_classes > 256 or (threshold is not None and (num_classes > 1 or not 0 < threshold < 1)):
        rule = "labels hold up to 256 classes, a threshold in (0, 1) is for a single class"
        raise ValueError(f"{num_classes} classes, threshold {threshold}: {rule}")
    labels = np.zeros(volume.shape[-3:], np.uint8)
    box = box or ((0, 0, 0), labels.shape)
    crop(labels, *box)  # refuses a box that does not lie in the scan
    read = reading_box(box, labels.shape, spacing_mm, working_spacing_mm, patch_shape)
    target = crop(labels, *read)
    working_shape = resampled_shape(target.shape, spacing_mm, working_spacing_mm)
    axis = stream_axis(working_shape, patch_shape)
    grid = WorkingGrid(volume, read, working_shape, axis, value_range)
    peak = prediction_peak_mib(
        target.shape,
        spacing_mm,
        working_spacing_mm,
        patch_shape,
        num_classes,
        batch_size=batch_size,
        channels=math.prod(volume.shape[:-3]),
        device=device,
        accumulate_on=accumulate_on,
    )
    on_message(
        f"predicting {' x '.join(map(str, working_shape))} voxels takes up to {peak.host_mib:,.0f} MiB of "
        f"RAM and {peak.device_mib:,.0f} MiB of GPU memory beside the network"
    )
    slabs = stream_scores(
        network,
        grid,
        patch_shape,
        num_classes,
        device=device,
        prepare=prepare,
        overlap=overlap,
        batch_size=batch_size,
        flips=flips,
        mirrored_classes=mirrored_classes,
        skip=None if air_below is None else lambda window: bool(window.max() < air_below),
        precision=precision,
        axis=axis,
        accumulate_on=accumulate_on,
        progress=progress,
        on_message=on_message,
    )
    threshold_logit = 0.0 if threshold is None else math.log(threshold / (1 - threshold))
    rows_first = np.moveaxis(target, axis, 0)
    maps = {k: np.moveaxis(crop(m, *read), axis, 0) for k, m in (probabilities or {}).items()}
    for row, scores in native_rows(slabs, rows_first.shape, working_shape[axis], axis):
        if num_classes == 1:
            pred = scores[0] > threshold_logit
        else:
            highest, pred = scores.max(dim=0)  # 2.5 times as fast as argmax
            if maps:  # class by class: a softmax of all would take the memory of the scores once more
                total = sum((score - highest).exp_() for score in scores)
            for label, map_rows in maps.items():
                share = (scores[label] - highest).exp_() / total
                map_rows[row : row + len(pred)] = (share * 255).round_().to(torch.uint8).cpu().numpy()
        rows_first[row : row + len(pred)] = pred.to(torch.uint8).cpu().numpy()
    if read != box:  # what was only read around the box is not wanted
        for array in (labels, *(probabilities or {}).values()):
            of_box = crop(array, *box).copy()
            crop(array, *read)[...] = 0
            crop(array, *box)[...] = of_box
    return labels


def warn_of_memory(line: str) -> None:
    """For `on_message`: prints only the lines about a lack of memory."""
    if "out of memory" in line:
        warn(line)


def _repeat_edges(image: Tensor, before: Sequence[int], size: Sequence[int]) -> None:
    """Fill (C, z, y, x) in place around the volume, which begins at `before`, with its outermost voxels."""
    for axis, (first, length) in enumerate(zip(before, size, strict=True), start=1):
        after = image.shape[axis] - first - length
        if first > 0:
            image.narrow(axis, 0, first).copy_(image.narrow(axis, first, 1))
        if after > 0:
            end = first + length
            image.narrow(axis, end, after).copy_(image.narrow(axis, end - 1, 1))


@torch.inference_mode()
def _forward(
    network: Callable,
    windows: Tensor,
    prepare: Callable,
    flips: Sequence,
    mirrored_classes: Sequence[int] | None,
    precision: Precision | None,
) -> Tensor | None:
    """Float32 logits averaged over `flips`; None where memory is too small."""
    try:
        image, total = prepare(windows), None
        for axes in flips or ((),):
            dims = [axis + 2 for axis in axes]
            with autocast(windows.device, precision) if precision else contextlib.nullcontext():
                logits = network(image.flip(dims) if dims else image)
            logits = (logits.flip(dims) if dims else logits).float()
            if mirrored_classes is not None and 2 in axes:
                logits = logits[:, list(mirrored_classes)]
            total = logits if total is None else total + logits  # not +=: it may be the input itself
        return total / len(flips) if len(flips) > 1 else total
    except RuntimeError as error:
        if not any(words in str(error).lower() for words in OUT_OF_MEMORY):
            raise
        return None


def _smaller_batch(batch_size: int, device: torch.device, patch: Sequence[int]) -> int:
    """Half the windows that the device had no memory for; RuntimeError if it was a single one."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if batch_size == 1:
        advice = "a smaller --patch_size"
        if device.type != "cpu":
            advice += " or --device cpu"
        raise RuntimeError(f"{device} is out of memory with one window of {patch}: use {advice}")
    return batch_size // 2


def _advance(x: Tensor, axis: int, step: int) -> None:
    """Move (C, z, y, x) back by `step` along `axis`, in place, with zeros where nothing comes in."""
    for part in x:  # one channel at a time: source and target may overlap, so that a copy is needed
        rest = part.shape[axis] - step
        part.narrow(axis, 0, rest).copy_(part.narrow(axis, step, rest).clone())
        part.narrow(axis, rest, step).zero_()


def _put(x: Tensor, corner: Sequence[int], part: Tensor) -> None:
    _box_of(x, corner, part.shape[-3:]).copy_(part)


def _box_of(x: Tensor, corner: Sequence[int], extent: Sequence[int]) -> Tensor:
    """View of a box of the last three axes."""
    return x[(..., *(slice(b, b + n) for b, n in zip(corner, extent, strict=True)))]
