"""Sliding-window prediction of whole scans that never holds the class scores of a scan.

Windows advance along the axis that is longest in patches. Rows of scores behind them are final: they are
taken to the scan's own grid, reduced to labels and dropped. On either grid scores exist for the depth of one
patch only, so that of a long scan a longer one takes more time, but no more memory for scores.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.hardware import Precision, autocast
from common.volumes import crop, needed_rows, resample_slab, resampled_shape

Triple = Sequence[int]  # z y x
MIB = 2**20
AIR_LOGIT = 10.0  # how sure of the background a skipped window is
CHUNK_BYTES = 32 * MIB  # of scores on the scan's grid at a time
READ_ROWS = 16  # of the working grid, read at a time
GPU_SHARE = 0.4  # of the free GPU memory that the sums may take; the rest is for the network
OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed")


def window_starts(size: int, patch: int, overlap: float) -> list[int]:
    """First voxels of the windows along one axis: evenly spaced, the first 0, the last flush, none repeated.

    Neighbours share at least `overlap` of the patch, in [0, 1). [0] where the patch covers the axis.

    Raises:
        ValueError: size or patch below 1, or overlap outside [0, 1).
    """
    if size < 1 or patch < 1 or not 0 <= overlap < 1:
        raise ValueError(f"patch {patch} on {size} voxels, overlap {overlap}: 1 or more, and [0, 1) needed")
    if size <= patch:
        return [0]
    gaps = math.ceil((size - patch) / max(int(patch * (1 - overlap)), 1))
    return [i * (size - patch) // gaps for i in range(gaps + 1)]


def gaussian_weights(patch_shape: Triple, sigma: float = 0.125) -> Tensor:
    """Weights of a window's voxels, (z, y, x) float32 in [0.001, 1], highest in the middle.

    `sigma` is the standard deviation as a share of the patch. Same values as MONAI's "gaussian" mode, which
    raises those below 0.001 to 0.001, or to the smallest where that is higher.
    """
    weights = torch.ones(())
    for size in patch_shape:
        offset = torch.arange(size) - (size - 1) / 2
        weights = weights.unsqueeze(-1) * torch.exp(-0.5 * (offset / (sigma * size)) ** 2)
    return weights.clamp_(min=1e-3)


def stream_scores(
    network: Callable[[Tensor], Tensor],
    volume: Any,
    patch_shape: Triple,
    num_classes: int,
    *,
    device: torch.device | str,
    prepare: Callable[[Tensor], Tensor],
    overlap: float = 0.5,
    batch_size: int = 1,
    flips: Sequence[Sequence[int]] = (),
    skip: Callable[[Tensor], bool] | None = None,
    precision: Precision | None = None,
    axis: int = 0,
    pad_value: float = -1024.0,
    accumulate_on: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
    on_message: Callable[[str], None] = print,
) -> Iterator[tuple[int, int, Tensor]]:
    """Scores of a volume, slab by slab: logits of all windows over a voxel, averaged by Gaussian weight.

    Logits are averaged, not probabilities. Where (size - patch) is a multiple of the step, the tiling and so
    the scores are those of MONAI's sliding_window_inference(mode="gaussian") with the network as predictor.

    Args:
        network: (N, C, d, h, w) on `device` -> logits (N, num_classes, d, h, w); in eval mode.
        volume: (Z, Y, X) or (C, Z, Y, X), anything with .shape that gives numbers where it is sliced. Every
            row along `axis` is read once, in order.
        patch_shape: (d, h, w). A smaller volume is padded with `pad_value`, half on either side.
        prepare: (N, C, d, h, w) float32 of the volume's intensities, on `device` -> input of the network.
        overlap: least share of the patch that neighbours have in common.
        batch_size: windows a call; halved, with a message, whenever the device runs out of memory.
        flips: axes of z y x = 0 1 2 to mirror in each pass; passes are averaged. ((), (2,)): as it is, and
            left-right. Not where classes tell left from right.
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
    padded, deep = _sizes(size, patch, axis)
    before = [(p - s) // 2 for p, s in zip(padded, size, strict=True)]
    device = torch.device(device)
    home = _home_of_sums(device, accumulate_on, num_classes, deep)
    weights = gaussian_weights(patch).to(home)
    scores, weight_sum = (torch.zeros(k, *deep, device=home) for k in (num_classes, 1))
    image = torch.full((math.prod(volume.shape[:-3]), *deep), pad_value)
    starts = [window_starts(*pair, overlap) for pair in zip(size, patch, strict=True)]
    corners = itertools.product(*([0] if a == axis else starts[a] for a in range(3)))
    windows = [(slice(None), *(slice(s, s + p) for s, p in zip(c, patch, strict=True))) for c in corners]
    done, skipped, total, rows_read = 0, 0, len(windows) * len(starts[axis]), 0
    progress = progress or (lambda done, total: None)

    for start, next_start in itertools.pairwise([*starts[axis], padded[axis]]):
        while rows_read < (need := min(start + patch[axis], size[axis])):
            stop = min(rows_read + READ_ROWS, need)
            rows = _read(volume, axis, rows_read, stop)
            begin = [rows_read - start + n if a == axis else n for a, n in enumerate(before)]
            _part(image, begin, rows.shape[-3:]).copy_(rows)
            rows_read = stop

        waiting = []
        for where in windows:
            weight_sum[where].add_(weights)
            if skip is None or not skip(image[where]):
                waiting.append(where)
                continue
            scores[:1][where].add_(weights, alpha=AIR_LOGIT if num_classes > 1 else -AIR_LOGIT)
            done, skipped = done + 1, skipped + 1
            progress(done, total)
        while waiting:
            batch = torch.stack([image[where] for where in waiting[:batch_size]])
            logits = _forward(network, batch.to(device), prepare, flips, precision)
            if logits is None:
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                if len(batch) > 1:
                    batch_size = len(batch) // 2
                    on_message(f"{device} is out of memory: going on with {batch_size} windows at a time")
                    continue
                advice = "a smaller --patch_size" + " or --device cpu" * (device.type != "cpu")
                raise RuntimeError(f"{device} is out of memory with one window of {patch}: use {advice}")
            if logits.shape != (len(batch), num_classes, *patch):
                got = f"the network gives {tuple(logits.shape)} for windows {tuple(batch.shape)}"
                raise ValueError(f"{got}; expected {num_classes} classes on the same voxels")
            for where, window_logits in zip(waiting, logits.to(home), strict=False):
                scores[where].addcmul_(window_logits, weights)
            del waiting[: len(batch)]
            done += len(batch)
            progress(done, total)

        step = next_start - start
        slab = scores.narrow(axis + 1, 0, step).div_(weight_sum.narrow(axis + 1, 0, step))
        rows = min(step, size[axis])
        slab = _part(slab, before, [rows if a == axis else n for a, n in enumerate(size)])
        if not torch.isfinite(slab.sum()):
            where = f"in rows {start} to {start + rows} of axis {axis}"
            raise ValueError(f"the network gives NaN or infinite scores {where}: try --amp off")
        yield start, start + rows, slab
        if next_start < padded[axis]:
            for part, fill in ((scores, 0.0), (weight_sum, 0.0), (image, pad_value)):
                _advance(part, axis, step, fill)
    if skip is not None:
        on_message(f"{skipped} of {total} windows held only air and were skipped")


def predict_labels(
    network: Callable[[Tensor], Tensor],
    volume: Any,
    *,
    spacing_mm: Sequence[float],
    working_spacing_mm: Sequence[float],
    patch_shape: Triple,
    num_classes: int,
    prepare: Callable[[Tensor], Tensor],
    device: torch.device | str,
    overlap: float = 0.5,
    batch_size: int = 1,
    flips: Sequence[Sequence[int]] = (),
    air_below: float | None = None,
    pad_value: float = -1024.0,
    precision: Precision | None = None,
    accumulate_on: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
    on_message: Callable[[str], None] = print,
    box: tuple[Triple, Triple] | None = None,
    threshold: float | None = None,
) -> np.ndarray:
    """Labels of a scan on its own grid, (Z, Y, X) uint8, by `stream_scores` on the working grid.

    Final rows of scores are interpolated to the scan's grid, a few at a time, and reduced: several classes to
    the highest score, a single one to whether its sigmoid is above `threshold`. How much memory this takes
    goes to `on_message` beforehand.

    Args (the others as in `stream_scores`):
        volume: (Z, Y, X) or (C, Z, Y, X) on the scan's grid, in memory or read where it is sliced.
        spacing_mm, working_spacing_mm: z y x, of the scan and of what the network was trained on.
        air_below: windows where no voxel reaches this intensity are skipped; -500 suits CT. None = no window.
        box: (start, stop), each z y x: only these voxels are read and predicted, the others are 0.
        threshold: in (0, 1), with a single class only. None = 0.5.

    Raises: as `stream_scores`, and ValueError for over 256 classes, or a box or threshold out of range.
    """
    if num_classes > 256 or (threshold is not None and (num_classes > 1 or not 0 < threshold < 1)):
        rule = "labels hold up to 256 classes, a threshold in (0, 1) is for a single class"
        raise ValueError(f"{num_classes} classes, threshold {threshold}: {rule}")
    target = labels = np.zeros(volume.shape[-3:], np.uint8)
    if box is not None:
        volume, target = crop(volume, *box), crop(labels, *box)
    working_shape = resampled_shape(target.shape, spacing_mm, working_spacing_mm)
    grid = _WorkingGrid(volume, working_shape, _stream_axis(working_shape, patch_shape))
    skip = None if air_below is None else lambda window: bool(window.max() < air_below)
    where = dict(batch_size=batch_size, device=device, accumulate_on=accumulate_on)
    how = dict(prepare=prepare, overlap=overlap, flips=flips, skip=skip, pad_value=pad_value)
    grids = target.shape, spacing_mm, working_spacing_mm
    peak = prediction_peak_mib(*grids, patch_shape, num_classes, channels=grid.channels, **where)
    grid_text = " x ".join(map(str, working_shape))
    ram, gpu = (f"{mib:,.0f} MiB of" for mib in peak)
    on_message(f"predicting {grid_text} voxels takes up to {ram} RAM and {gpu} GPU memory beside the network")
    how |= dict(precision=precision, axis=grid.axis, progress=progress, on_message=on_message)
    slabs = stream_scores(network, grid, patch_shape, num_classes, **where, **how)
    cut = math.log(threshold / (1 - threshold)) if threshold is not None else 0.0
    target = np.moveaxis(target, grid.axis, 0)
    for row, scores in _native_rows(slabs, target.shape, working_shape[grid.axis], grid.axis):
        pred = scores[0] > cut if num_classes == 1 else scores.max(dim=0).indices  # 2.5 x as fast as argmax
        target[row : row + len(pred)] = pred.to(torch.uint8).cpu().numpy()
    return labels


class PredictionPeak(NamedTuple):
    """Memory in MiB; `device_mib` is that of a GPU, 0 on the CPU."""

    host_mib: float
    device_mib: float


def prediction_peak_mib(
    shape: Triple,
    spacing_mm: Sequence[float],
    working_spacing_mm: Sequence[float],
    patch_shape: Triple,
    num_classes: int,
    *,
    batch_size: int = 1,
    channels: int = 1,
    device: torch.device | str = "cpu",
    accumulate_on: torch.device | str | None = None,
    network_mib: float = 0.0,
) -> PredictionPeak:
    """Upper bound of what `predict_labels` takes beside the scan itself, from shapes alone.

    `shape` is (z, y, x) of the scan, or of the box; the rest as in `predict_labels`. `network_mib`: weights
    and activations of the network for a batch, left out unless given.
    """
    working, device = resampled_shape(shape, spacing_mm, working_spacing_mm), torch.device(device)
    axis = _stream_axis(working, patch_shape)
    _, deep = _sizes(working, patch_shape, axis)
    home = _home_of_sums(device, accumulate_on, num_classes, deep)
    block, patch = (4 * math.prod(s) / MIB for s in (deep, patch_shape))
    image = channels * block + batch_size * channels * patch
    sums = (num_classes + 1) * block + patch
    batch = batch_size * (2 * channels + 3 * num_classes) * patch + network_mib  # 3: sums over flips
    # From grid to grid: rows as they are, in order, half-way and as they become; two more at the borders.
    copies = 4 if tuple(working) != tuple(shape) else 2
    near, far = _first(shape, axis), _first(working, axis)
    read_row, row = _row_bytes(channels, near, far) / MIB, _row_bytes(num_classes, far, near) / MIB
    reading = copies * (min(READ_ROWS, far[0]) + 2) * read_row
    slab_rows = math.ceil(min(patch_shape[axis] / far[0], 1) * near[0])
    reducing = copies * (min(max(CHUNK_BYTES / MIB, row), slab_rows * row) + 2 * row)
    host, others = math.prod(shape) / MIB + image, max(reducing, block)  # labels; a class being moved
    if home.type != "cpu":
        return PredictionPeak(host + reading, sums + max(batch, others))
    host += sums + max(reading, batch, others)
    return PredictionPeak(host, 0.0 if device.type == "cpu" else batch)


class _WorkingGrid:
    """A volume on a grid of another `shape` over the same field of view, resampled where it is sliced."""

    def __init__(self, volume: Any, shape: Triple, axis: int) -> None:
        self.volume, self.axis = volume, axis
        self.shape, self.channels = (*volume.shape[:-3], *shape), math.prod(volume.shape[:-3])

    def __getitem__(self, where: tuple[slice, ...]) -> Tensor:
        axis, rows = self.axis, (where[self.axis - 3].start, where[self.axis - 3].stop)
        size_out, *plane = _first(self.shape[-3:], axis)
        size_in = self.volume.shape[axis - 3]
        first, last = needed_rows(rows, size_in, size_out)
        slab = _read(self.volume, axis, first, last).movedim(axis + 1, 1)
        return resample_slab(slab, first, size_in, size_out, rows, plane).movedim(1, axis + 1)


def _first(shape: Triple, axis: int) -> tuple[int, ...]:
    return (shape[axis], *(n for a, n in enumerate(shape) if a != axis))


def _read(volume: Any, axis: int, start: int, stop: int) -> Tensor:
    """Rows [start, stop) along `axis` of z y x: (C, Z, Y, X) float32; (Z, Y, X) volumes get C = 1."""
    where = [slice(None)] * len(volume.shape)
    where[axis - 3] = slice(start, stop)
    rows = torch.from_numpy(np.asarray(volume[tuple(where)], dtype=np.float32))
    return rows.reshape(-1, *rows.shape[-3:])


@torch.inference_mode()
def _forward(
    network: Callable, windows: Tensor, prepare: Callable, flips: Sequence, precision: Precision | None
) -> Tensor | None:
    """Float32 logits averaged over `flips`; None where memory is too small."""
    try:
        image, total = prepare(windows), None
        for axes in flips or ((),):
            dims = [axis + 2 for axis in axes]
            with autocast(windows.device, precision) if precision else contextlib.nullcontext():
                logits = network(image.flip(dims) if dims else image)
            logits = (logits.flip(dims) if dims else logits).float()
            total = logits if total is None else total + logits  # not +=: it may be the input itself
        return total / len(flips) if len(flips) > 1 else total
    except RuntimeError as error:
        if not any(words in str(error).lower() for words in OUT_OF_MEMORY):
            raise
        return None


def _native_rows(slabs: Iterator, shape: Triple, size_in: int, axis: int) -> Iterator[tuple[int, Tensor]]:
    """Slabs, `size_in` rows in all -> (first row, scores (K, rows, *plane)) on a grid of `shape`.

    `shape` and these scores have `axis` first.
    """
    need = functools.partial(needed_rows, size_in=size_in, size_out=shape[0])
    row, kept = 0, None  # kept: rows before the slab that are still needed
    for start, stop, slab in slabs:
        slab = slab.movedim(axis + 1, 1)
        chunk = max(int(CHUNK_BYTES / _row_bytes(len(slab), (size_in, *slab.shape[2:]), shape)), 1)
        while row < shape[0]:
            within = [need((i, i + 1))[1] <= stop for i in range(row, min(row + chunk, shape[0]))]
            end = row + sum(within)
            if end == row:
                kept = _join(kept, slab, need((row, row + 1))[0] - start, stop - start).clone()
                break
            first, last = need((row, end))
            part = _join(kept, slab, first - start, last - start)
            yield row, resample_slab(part, first, size_in, shape[0], (row, end), shape[1:])
            row = end


def _join(kept: Tensor | None, slab: Tensor, first: int, last: int) -> Tensor:
    """Rows [first, last) of a slab; negative ones are the last of `kept`."""
    part = slab[:, max(first, 0) : last]
    return part if first >= 0 else torch.cat([kept[:, first:], part], dim=1)


def _advance(x: Tensor, axis: int, step: int, fill: float) -> None:
    """Move (C, z, y, x) back by `step` along `axis`, in place, and put `fill` where nothing comes in."""
    for part in x:  # one channel at a time: source and target may overlap, so that a copy is needed
        keep = part.shape[axis] - step
        part.narrow(axis, 0, keep).copy_(part.narrow(axis, step, keep).clone())
        part.narrow(axis, keep, step).fill_(fill)


def _part(x: Tensor, begin: Triple, extent: Triple) -> Tensor:
    """View of a box of the last three axes."""
    return x[(..., *(slice(b, b + n) for b, n in zip(begin, extent, strict=True)))]


def _stream_axis(shape: Triple, patch_shape: Triple) -> int:
    """The axis that is longest in patches; along it one patch's depth has the fewest voxels."""
    return max(range(3), key=lambda axis: shape[axis] / patch_shape[axis])


def _sizes(shape: Triple, patch_shape: Triple, axis: int) -> tuple[list[int], list[int]]:
    """`shape` padded to the patch, and the same with a patch's depth along `axis`: what the sums span."""
    padded = [max(pair) for pair in zip(shape, patch_shape, strict=True)]
    return padded, [patch_shape[a] if a == axis else n for a, n in enumerate(padded)]


def _home_of_sums(device: torch.device, wish: torch.device | str | None, num_classes: int, deep: Triple):
    """The device for (num_classes + 1, *deep) float32 sums."""
    if wish is not None or device.type != "cuda":
        return torch.device(wish or "cpu")
    fits = 4 * (num_classes + 1) * math.prod(deep) < GPU_SHARE * torch.cuda.mem_get_info(device)[0]
    return device if fits else torch.device("cpu")


def _row_bytes(channels: int, shape_in: Triple, shape_out: Triple) -> float:
    """Float32 bytes of a row (axis 0) of the result, or of the rows that it comes from, whichever is more."""
    rows_in = max(shape_in[0] / shape_out[0], 1)
    return 4 * channels * max(rows_in * math.prod(shape_in[1:]), math.prod(shape_out[1:]))
