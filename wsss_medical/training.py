"""What dist_train.py needs besides its loop: data, labels of pixels, losses, lines of the log."""

import math
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from common import distributed, hardware
from common import weak_losses as losses
from common.cells import affinity_target, get_down_size, get_mask_by_radius, propagated_label
from common.checkpoints import TrainedModel, save_checkpoint
from common.config import parse_args
from common.files import link_file, make_folder, read_json
from common.mit import to_network_input
from common.par import PAR, image01
from common.phantoms import prepare_demo
from common.pixel_labels import IGNORE, normalise_cam, refined_label, zero_pixels_background
from common.plots import PRED_COLOR, heat_picture, outline, overlay, save_curves
from common.slices import NOTES, check_slice_notes
from common.training import Run
from common.wetr import Output, multi_scale_cam
from wsss_medical import phantoms, preprocess
from wsss_medical.dataset import (
    DEMO,
    MASKS,
    MedicalClsDataset,
    MedicalSliceDataset,
    find_root,
    list_names,
    split_lines,
    split_slices,
)
from wsss_medical.segment import segment_slices
from wsss_medical.volume import by_patient, label_pixels

LOSSES = [f"loss_{name}" for name in ("class", "seg", "affinity", "negative", "contrast")]
PIXELS = ["pixels_positive", "pixels_negative"]  # of a batch that are labelled so, n+ and n-
CURVES = {
    "loss": ["train_loss", *LOSSES],
    "labels of pixels in a batch": PIXELS,
    "labels of slices, validation": ["val_f1", "val_accuracy", "val_auroc"],
    "Dice of positive slices, validation": ["val_dice_cam", "val_dice_seg"],
    "learning rate of the encoder": ["lr"],
}
LABELS = "volume_labels"  # folder of a run
REFRESH = (0.35, 0.85)  # shares of the run between which labels of pixels are made anew
UNKNOWN = (60, 120, 255)  # RGB of pixels without a label


def demo_dataset(folder: Path = DEMO) -> Path:
    """Phantom volumes in Decathlon layout, cut into slices by the ordinary route; made once."""
    source, out = folder / "volumes", folder / "slices"
    flags = ["--dataset", "demo", "--source", str(source), "--out", str(out)]

    def make() -> dict[str, str]:
        phantoms.write_wsss_phantoms(source)
        return preprocess.convert(parse_args(preprocess.build_parser(), flags))

    return prepare_demo(source, out, make, flags, [phantoms, preprocess])


def data_folder(args: Namespace) -> Path:
    """The folder of slices that the flags name."""
    if args.data_path == "demo":
        return demo_dataset()
    if args.data_path is None and args.dataset is None:
        raise ValueError(
            "no data: --data_path takes the folder that wsss_medical/preprocess.py wrote, or demo; or give "
            "--config wsss_medical/lasc.yaml"
        )
    return Path(args.data_path or f"data/{args.dataset}")


def open_data(args: Namespace) -> tuple[Path, dict, dict[str, list[str]]]:
    """The folder of slices, what preprocess.py noted about it, and the split that the flags ask for."""
    root = find_root(data_folder(args))
    path = root / "slices.json"
    found = read_json(path, dict) if path.is_file() else {}
    notes = {name: found.get(name) for name in NOTES}
    check_slice_notes(notes, str(path))
    split = split_slices(list_names(root), args.slice_split)
    return root, notes | {"data_path": str(root)}, split


def data_lines(root: Path, split: dict[str, list[str]], num_batches: int, effective_batch: int) -> list[str]:
    """What the log says about the data."""
    with_masks = "with" if MedicalSliceDataset(root, split["val"]).has_masks else "without"
    return [
        f"slices of {root}, {with_masks} masks to score against:",
        *(f"  {line}" for line in split_lines(split)),
        f"{num_batches} batches between two validations in each process, effective batch {effective_batch}",
    ]


def step_loss(output: Output, target: Tensor) -> Tensor:
    """A loss through all heads, for the prediction of a step's memory: target (N, H, W) int64."""
    heads = [output.cls.mean(), output.attn_pred.mean(), output.cam.mean()]
    if output.aux_cls is not None:
        heads.append(output.aux_cls.mean())
    return losses.get_seg_loss(output.seg, target) + sum(heads)


class PixelLabels(NamedTuple):
    """What the segmentation and the affinity of a batch learn from; 255 = unknown.

    Attributes:
        seg: (N, H, W) int64.
        affinity: (N, n, n) uint8: whether two cells belong together.
    """

    seg: Tensor
    affinity: Tensor


def known_labels(target: Tensor, radius: int) -> PixelLabels:
    """Labels of pixels (N, H, W), 255 = unknown, and what follows from them for the affinity of cells."""
    cells = get_down_size(target.shape[1:])
    near = get_mask_by_radius(*cells, radius)
    return PixelLabels(target.long(), affinity_target(target.long(), near, cells))


@torch.no_grad()
def make_labels(
    teacher: nn.Module,
    par: PAR,
    pixels: Tensor,
    classes: Tensor,
    boxes: Tensor,
    args: Namespace,
    precision: hardware.Precision,
    iteration: int,
) -> PixelLabels:
    """Labels of pixels from the teacher's class activation maps.

    Args:
        teacher: network that makes the maps, in evaluation mode while it does.
        pixels: uint8 (N, 3, H, W); classes: (N, C); boxes: (N, 4), pixels that come from the slice.
        iteration: up to --aff_iters the segmentation learns from maps that PAR draws to the edges, then from
            maps that the affinity has spread before. The affinity itself always learns from the former:
            from the latter it would only confirm itself.
    """
    high = losses.high_threshold(iteration / args.max_iters) if args.dynamic_threshold else args.high
    thresholds = {"low": min(args.low, high), "high": high}
    with hardware.autocast(pixels.device, precision):
        raw, attn_pred, cells = multi_scale_cam(teacher, to_network_input(pixels), args.scales)
    maps, image = normalise_cam(raw.float()), image01(pixels)
    refined = refined_label(par, image, maps, classes, boxes, **thresholds)
    seg = refined
    if iteration >= args.aff_iters:
        near = get_mask_by_radius(*cells, args.radius)
        seg = propagated_label(
            par, image, maps, attn_pred.float(), near, classes, boxes, size=cells, **thresholds
        )
    if args.zero_is_background:
        refined, seg = (zero_pixels_background(label, image, boxes) for label in (refined, seg))
    return known_labels(refined, args.radius)._replace(seg=seg)


def all_losses(
    output: Output, classes: Tensor, labels: PixelLabels | None, args: Namespace
) -> dict[str, Tensor]:
    """The losses of a batch by name, each with its weight; their sum is what is minimised.

    Without `labels` (the first phase) the heads of segmentation and affinity count nothing, but stand in the
    sum, since DistributedDataParallel wants a gradient for every weight.
    """
    found = {"class": losses.classification_loss(output.cls, classes)}
    if output.aux_cls is not None:
        copies = output.aux_cls.shape[1] // classes.shape[1]
        found["class"] = found["class"] + losses.classification_loss(
            output.aux_cls, classes.repeat(1, copies)
        )
    if labels is None:
        found["seg"] = 0 * output.seg.float().sum() + 0 * output.attn_pred.sum()
    else:
        if args.pixel_labels == "cam":
            seg = losses.get_seg_loss(output.seg, labels.seg)
        else:
            seg = losses.seg_loss_by_slices(output.seg, labels.seg, classes)
        found["seg"] = args.seg_weight * seg
        found["affinity"] = args.affinity_weight * losses.affinity_loss(output.attn_pred, labels.affinity)
    if args.negative_weight:
        found["negative"] = args.negative_weight * losses.negative_cam_loss(output.cam, classes)
    if args.contrast_weight:
        cells = output.tokens.shape[2:]
        near = get_mask_by_radius(*cells, args.radius)
        contrast = losses.token_contrast_loss(output.tokens, output.aux_cam, classes, near)
        found["contrast"] = args.contrast_weight * contrast
    return found


# ---- the run ----


def work_dir(args: Namespace) -> tuple[Path, str]:
    """Folder and name of --work_dir, by default work_dir_<dataset>."""
    path = Path(args.work_dir or f"work_dir_{(args.dataset or 'wsss').lower()}")
    return path.parent, path.name


def training_slices(
    args: Namespace, root: Path, names: Sequence[str], folder: Path, length: int
) -> MedicalClsDataset:
    """The training slices, `length` of them between two validations, with labels of pixels where there are
    any before the training; those of --pixel_labels escape lie in volume_labels/ of the run's folder."""
    targets = None
    if args.pixel_labels == "escape":
        targets = folder / LABELS
    if args.pixel_labels == "masks":
        targets = root / MASKS
        if not MedicalSliceDataset(root, names).has_masks:
            raise ValueError(f"--pixel_labels masks: {targets} does not hold a mask for every training slice")
    return MedicalClsDataset(
        root,
        names,
        args.crop_size,
        length=length,
        scale_range=args.scale_range,
        rotate_deg=args.rotate,
        grey_values=args.grey_values,
        targets=targets,
    )


def renew_labels(run: Run, model: TrainedModel, root: Path) -> None:
    """Before a round of --pixel_labels escape: write its labels, unless it is a round that was broken off.

    Those of the first round come from the volumes alone; later ones, in the middle of the run, also from what
    the network has learned. Ctrl-C ends the run at the next patient; --resume then begins with the first.
    """
    done = run.folder / LABELS / "round.txt"
    if model.config["pixel_labels"] != "escape" or (done.is_file() and done.read_text() == f"{run.epoch}"):
        return
    in_the_middle = REFRESH[0] <= run.progress <= REFRESH[1]
    if run.epoch == 0 or in_the_middle:
        model.network.eval()
        patients = distributed.my_share(by_patient(model.split["train"]))
        no_bar = None if distributed.is_main() else True  # None: only on a terminal
        for names in tqdm(patients, "labels of pixels", unit="patient", disable=no_bar, leave=False):
            if run.stop.requested:
                break
            label_pixels(model, root, names, run.folder / LABELS, by_model=in_the_middle)
        distributed.barrier()
        run.exit_if_asked()
    if distributed.is_main():
        done.write_text(f"{run.epoch}")


def keep_round(run: Run, weights: dict, iteration: int) -> None:
    """The curves, and checkpoints/wetr_iter_<iteration>.pth with `weights`; best.pth and last.pth beside it
    are second names of what lies in weights/. Rank 0 only."""
    if not distributed.is_main():
        return
    folder = make_folder(run.folder / "checkpoints")
    save_checkpoint(folder / f"wetr_iter_{iteration}.pth", run.notes | {"model": weights})
    for name in ("best", "last"):
        if (run.folder / "weights" / f"{name}.pt").is_file():
            link_file(folder / f"{name}.pth", f"../weights/{name}.pt")
    draw_curves(run.folder / "training_curves.png", run.history)


def count_batch(
    counts: dict[str, float], losses_of_batch: dict[str, Tensor], labels: PixelLabels | None
) -> None:
    """Add LOSSES and PIXELS of a batch to the sums of the round."""
    values = {f"loss_{name}": loss for name, loss in losses_of_batch.items()}
    if labels is not None:
        values |= {name: (labels.seg == value).sum() for name, value in zip(PIXELS, (1, 0), strict=True)}
    numbers = torch.stack([value.detach().float() for value in values.values()]).tolist()  # read together
    for name, number in zip(values, numbers, strict=True):
        counts[name] = counts.get(name, 0.0) + number
        counts[f"batches_{name}"] = counts.get(f"batches_{name}", 0) + 1


def means_of_round(run: Run, iteration: int) -> dict[str, float]:
    """Iteration and number of updates at the end of a round, and means of LOSSES and PIXELS over the batches
    that had them, NaN where none had.

    With --time_budget an iteration is not an update but a share of the time.
    """
    before = run.history[-1].get("updates", 0) if run.history else 0
    found = {"iteration": iteration, "updates": before + math.ceil(run.batch / run.accumulate)}
    for name in (*LOSSES, *PIXELS):
        number = run.counts.get(f"batches_{name}", 0)
        found[name] = run.counts[name] / number if number else math.nan
    return found


def label_pictures(
    model: TrainedModel, pixels: Tensor | None, labels: PixelLabels | None
) -> Iterator[list[np.ndarray]]:
    """Of some slices of a training batch: the slice, its class activation map, its labels of pixels if there
    are any (red: structure, blue: unknown), and what the segmentation head says.

    Args:
        pixels: uint8 (N, 3, H, W); None, as in a round that was resumed behind its last batch: no pictures.
    """
    if pixels is None:
        return
    model.network.eval()
    images = pixels[:4].movedim(1, -1).cpu().numpy()
    for i, (image, result) in enumerate(zip(images, segment_slices(model, images), strict=True)):
        row = [image, heat_picture(image, result.cam)]
        if labels is not None:
            label = labels.seg[i].cpu().numpy()
            row.append(outline(overlay(image[..., 0], label == IGNORE, UNKNOWN), label == 1, PRED_COLOR))
        yield [*row, heat_picture(image, result.seg)]


def draw_curves(path: Path, history: list[dict]) -> None:
    """CURVES, without the columns of what this run does not have."""
    panels = {title: [name for name in names if name in history[0]] for title, names in CURVES.items()}
    save_curves(path, history, panels, only_above_0=True, x="iteration")


def scores_text(scores: dict[str, float], args: Namespace) -> str:
    """The scores of a validation in one line.

    With --time_budget an iteration is not an update but a share of the time, which the line says.
    """
    where = f"iteration {scores['iteration']}"
    if args.time_budget:
        share = f"{scores['iteration'] / args.max_iters:.0%} of the time, {scores['updates']} updates"
        where = f"{where} of {args.max_iters} by the clock ({share})"
    dice = [
        f"{kind} {scores[f'val_dice_{kind}']:.3f}" for kind in ("cam", "seg") if f"val_dice_{kind}" in scores
    ]
    text = f"{where}  F1 {scores['val_f1']:.3f}, accuracy {scores['val_accuracy']:.3f}"
    return f"{text}, Dice of {', '.join(dice)}" if dice else text
