"""A trained network applied to slices: the one way of validation, evaluation, prediction and maps."""

from argparse import ArgumentParser
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.cells import propagated_cam
from common.checkpoints import TrainedModel
from common.config import positive_float, positive_int
from common.hardware import autocast
from common.mit import to_network_input
from common.pixel_labels import normalise_cam, resize, slice_peaks_at_1
from common.wetr import multi_scale_cam
from wsss_medical.dataset import DEMO, list_names

SCALES = (1.0, 0.5, 1.5)  # of the class activation map
OUTPUTS = ("seg", "cam", "affinity")  # maps of a SliceResult that a mask can be made of
THRESHOLD, GATE = 0.5, 0.5  # probability of a pixel, of a slice
RADIUS = 8  # cells; for networks whose configuration does not tell


class SliceResult(NamedTuple):
    """What the network says of one slice; maps are float32 (H, W), in [0, 1] except for `cam_raw`.

    Attributes:
        score: probability that the slice shows the structure.
        seg: probability of the segmentation head, mean of the slice and its mirror image.
        cam: class activation map, its minimum 0 and its maximum just below 1, however weak it is.
        affinity: that map after it was propagated along the affinities, on the same scale.
        cam_raw: the map as it was summed over the scales.
        attention: {"attn_pred": (n, n), "attn_layer_0" to "attn_layer_3": (heads, n, n) raw logits of the
            last four blocks; of blocks with coarser keys n is smaller}.
    """

    score: float
    seg: np.ndarray
    cam: np.ndarray | None = None
    affinity: np.ndarray | None = None
    cam_raw: np.ndarray | None = None
    attention: dict[str, np.ndarray] | None = None


def segment_slices(
    model: TrainedModel,
    slices: Iterable[np.ndarray],
    *,
    scales: Sequence[float] | None = None,
    batch_size: int = 4,
    gate: float = 0.0,
    cams: bool = True,
    attention: bool = False,
) -> Iterator[SliceResult]:
    """Results of slices, one after the other, each at its own size.

    Args:
        slices: uint8 (H, W) or (H, W, 3) each; neighbours of one shape are computed together.
        scales: of the class activation map, see `scales_of`; the affinities are those of scale 1.
        batch_size: slices at a time; the network sees twice as many, with their mirror images.
        gate: slices with a lower score are taken for empty: their maps are 0.
        cams: False leaves out cam, cam_raw and affinity, which take three quarters of the time.
        attention: also hand out the attention.
    """
    for _, group in groupby(slices, key=np.shape):
        while some := list(islice(group, batch_size)):  # not all of them: they may be read on the way
            stack = np.stack([s if s.ndim == 3 else np.repeat(s[..., None], 3, axis=-1) for s in some])
            image = torch.from_numpy(stack).movedim(-1, 1).to(model.device)
            yield from _segment(model, image, scales_of(model, scales), gate, cams, attention)


@torch.no_grad()  # not inference_mode: training must be able to use the masks that cells.py keeps
def _segment(
    model: TrainedModel, image: Tensor, scales: Sequence[float], gate: float, cams: bool, attention: bool
) -> list[SliceResult]:
    """Results of uint8 (N, 3, H, W) on the device."""
    count, size = len(image), image.shape[2:]
    inputs = to_network_input(image)
    with autocast(model.device, model.precision):
        output = model.network(torch.cat([inputs, inputs.flip(-1)]))
    scores = torch.sigmoid(output.cls[:, 0].float()).view(2, count).mean(0)
    shown = scores >= gate
    seg = resize(output.seg, size).softmax(1)[:, 1:]
    seg = (seg[:count] + seg[count:].flip(-1)) / 2
    if model.config.get("slice_peaks"):
        seg = slice_peaks_at_1(seg)
    maps = {"seg": seg * shown.view(-1, 1, 1, 1)}
    if cams:
        maps |= {name: torch.zeros_like(maps["seg"]) for name in ("cam", "affinity", "cam_raw")}
    if cams and shown.any():
        with autocast(model.device, model.precision):
            cam_raw = multi_scale_cam(model.network, inputs[shown], scales)[0].float()
        cam, affinity = normalise_cam(cam_raw), output.attn_pred[:count][shown].float()
        maps["cam_raw"][shown], maps["cam"][shown] = cam_raw, cam
        maps["affinity"][shown] = propagated_cam(cam, affinity, model.config.get("radius", RADIUS))
    arrays = {name: values[:, 0].cpu().numpy() for name, values in maps.items()}
    layers = {}
    if attention:
        with autocast(model.device, model.precision):
            last = model.network.last_attention(inputs)
        layers = {"attn_pred": output.attn_pred} | {f"attn_layer_{k}": a for k, a in enumerate(last)}
    results = []
    for i, score in enumerate(scores.tolist()):
        found = {name: layer[i].float().cpu().numpy() for name, layer in layers.items()}
        of_slice = {name: values[i] for name, values in arrays.items()}
        results.append(SliceResult(score, **of_slice, attention=found or None))
    return results


def add_slice_flags(parser: ArgumentParser, batch_size: int) -> None:
    """--scales, see `scales_of`, and --batch_size."""
    parser.add_argument(
        "--scales",
        type=positive_float,
        nargs="+",
        help="sizes of the slices, as shares, whose class activation maps are added up; default: those of "
        "the training",
    )
    number = "number of slices that are computed at a time; fewer take less memory"
    parser.add_argument("--batch_size", type=positive_int, default=batch_size, help=number)


def scales_of(model: TrainedModel, scales: Sequence[float] | None) -> Sequence[float]:
    """Those that are asked for, else those of the training."""
    return scales or model.config.get("scales") or SCALES


def threshold_of(model: TrainedModel, output: str) -> float:
    """The threshold of `output`, one of OUTPUTS, that was best on the validation slices, else 0.5."""
    return (model.preprocessing.get("threshold") or {}).get(output, THRESHOLD)


def part_of(model: TrainedModel, data_path: str | None, part: str) -> tuple[Path, list[str]]:
    """Folder and names of the slices of a part of the split, or of "all".

    Args:
        data_path: None = the folder that the model was trained on. Of a folder without any of the slices of
            that one all are taken.
    """
    root = DEMO / "slices" if data_path == "demo" else data_path or model.preprocessing.get("data_path")
    if not root:
        raise ValueError("the weights do not tell which slices they are for; name them with --data_path")
    there = list_names(root)
    if part == "all" or set(there).isdisjoint(sum(model.split.values(), [])):
        return Path(root), there
    if not model.split[part]:
        raise ValueError(f"the model's split has no part '{part}'; take another one with --split")
    return Path(root), model.split[part]
