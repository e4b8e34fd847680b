"""How well heat maps find the spine: loss, box, share of the vertebrae inside the box."""

import math
from pathlib import Path

import numpy as np
import torch

from common import batch, distributed
from common.metrics import summary
from common.plots import costs_the_picture
from verse_spine.dataset import HeatmapDataset, SmallScan, VerSe
from verse_spine.heatmap import box_iou, box_recall, heatmap_box, heatmap_loss, make_target, scan_box
from verse_spine.networks import TrainedModel
from verse_spine.pictures import save_heatmap_preview
from verse_spine.segment import predict_heatmap


@torch.inference_mode()
def validate_heatmaps(
    model: TrainedModel, scans: list[SmallScan], targets: list[np.ndarray], loss: str
) -> dict:
    """Means over scans, shared over the processes: loss, MAE, RMSE, R2 of the heat map; IoU of its box with
    that of the target; box_recall, the share of the vertebrae in the box with its margin; and the lowest
    box_recall."""
    rows = []
    for scan, target in distributed.my_share(list(zip(scans, targets, strict=True))):
        heat = predict_heatmap(model, scan.image)
        logits = torch.logit(torch.from_numpy(heat), eps=1e-6)[None, None]
        error = heat - target
        box = heatmap_box(heat)
        found = None if box is None else scan_box(scan.grid, box)
        if found is not None:  # back to the small grid, whose occupancy is at hand
            found = np.clip(np.rint([scan.grid.from_scan(v) for v in found]), 0, heat.shape).astype(int)
        variance = float(((target - target.mean()) ** 2).mean())
        rows.append(
            {
                "val_loss": float(heatmap_loss(loss, logits, torch.from_numpy(target)[None, None])),
                "mae": float(np.abs(error).mean()),
                "rmse": float(np.sqrt((error**2).mean())),
                "r2": 1 - float((error**2).mean()) / variance if variance else float("nan"),
                "box_iou": box_iou(box, heatmap_box(target)),
                "box_recall": box_recall(scan.occupancy, found),
            }
        )
    rows = [row for part in distributed.gather(rows) for row in part]
    if not rows:
        return dict.fromkeys(
            ("val_loss", "mae", "rmse", "r2", "box_iou", "box_recall", "lowest_recall"), math.nan
        )
    means = {key: summary([row[key] for row in rows])["mean"] for key in rows[0]}
    recalls = [row["box_recall"] for row in rows if not math.isnan(row["box_recall"])]
    return means | {"lowest_recall": min(recalls, default=math.nan)}


def evaluate_boxes(
    model: TrainedModel, verse: VerSe, names: list[str], table: Path
) -> tuple[list[dict], dict[str, str]]:
    """Score the predicted boxes of preprocessed cases, shared over the processes.

    Args:
        table: CSV file that gets each row as soon as its case is scored.

    Returns:
        (one row for each case in the order of `names`: share of its vertebra voxels inside the predicted box
        with its margin, and without, since a margin that fills a narrow scan makes every box good;
        {failed case: reason}), the same in every process.
    """
    table.parent.mkdir(exist_ok=True)

    def score(name: str) -> dict:
        case = verse.cases[name]
        small = SmallScan(case, tuple(model.config["patch_size"]), verse.path / "small_grids")
        heat = predict_heatmap(model, small.image)
        box = heatmap_box(heat)
        found = None if box is None else scan_box(small.grid, box)
        bare = None if box is None else scan_box(small.grid, box, (0.0, 0.0, 0.0))
        mask = case.label[...] > 0
        share = 1.0 if found is None else float(np.prod(np.subtract(*found[::-1])) / np.prod(case.shape))
        target = make_target(model.config["target"], small.grid, small.boxes, small.occupancy)
        return {
            "case": name,
            "patient": verse.subjects[name],
            "box_recall": box_recall(mask, found),
            "recall_without_margin": box_recall(mask, bare),
            "box_iou": box_iou(box, heatmap_box(target)),
            "box_share_of_scan": share,
            "max_heat": float(heat.max()),
        }

    return batch.each(score, names, unit="case", table=table)


@costs_the_picture("the preview of the heat map")
def save_preview(path: Path, model: TrainedModel, val_set: HeatmapDataset) -> None:
    """Three planes of the first validation scan with boxes, target and heat map."""
    path.parent.mkdir(exist_ok=True)
    if not val_set.scans:
        return
    scan, target = val_set.scans[0], val_set.targets[0]
    heat = predict_heatmap(model, scan.image)
    boxes = {"truth": heatmap_box(target), "prediction": heatmap_box(heat)}
    save_heatmap_preview(path, scan.image, target, heat, boxes)
