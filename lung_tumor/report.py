"""Tables and pictures of an evaluation."""

from pathlib import Path

import numpy as np

from common import distributed
from common.batch import failed_lines
from common.files import make_folder
from common.metrics import binary_counts, dice_from_counts, iou_from_counts, presence, summary
from common.plots import (
    PRED_COLOR,
    TRUTH_COLOR,
    costs_the_picture,
    new_figure,
    outline,
    overlay,
    save_figure,
    save_panels,
)
from common.tables import write_table
from lung_tumor.dataset import SliceDataset
from lung_tumor.model import TrainedModel, predict_squares

FILES = ("per_volume.csv", "results.csv", "summary.csv", "sweep.csv", "evaluation.png")
THRESHOLDS = np.arange(1, 10) / 10  # of the sweep


def summarise(rows: list[dict]) -> list[dict]:
    """One row for each metric: mean, sd, median, 95 % bootstrap interval by patient, n and what it is.

    Pooled metrics come from one confusion matrix and have no spread.
    """
    patients = [r["patient"] for r in rows]
    kept = [sum(r[f"kept_{k}"] for r in rows) for k in ("tp", "fp", "fn", "tn")]
    every = [sum(r[k] for r in rows) for k in ("tp", "fp", "fn")]
    num = {
        k: sum(r[k] for r in rows)
        for k in ("target_lesions", "found_lesions", "pred_lesions", "true_lesions", "empty_slices")
    }
    alarms = sum(r["empty_with_false_positive"] for r in rows)
    with_tumour = sum(r["tp"] + r["fn"] > 0 for r in rows)
    missed = sum(r["tp"] + r["fn"] > 0 and r["tp"] == 0 for r in rows)
    invented = sum(r["tp"] + r["fn"] == 0 and r["fp"] > 0 for r in rows)
    scope = "all slices" if all(r["all_slices"] for r in rows) else "converted slices only"

    def pooled(name: str, value: float, note: str) -> dict:
        empty = dict.fromkeys(("sd", "median", "low", "high"), float("nan"))
        return {"metric": name, "mean": value, **empty, "n": len(rows), "note": note}

    def ratio(a: int, b: int) -> float:
        return a / b if b else float("nan")

    return [
        pooled(
            "pooled_dice", dice_from_counts(*kept[:3]), "one count over the slices chosen as for training"
        ),
        pooled("pooled_iou", iou_from_counts(*kept[:3]), "the same pixels"),
        pooled(
            "pixel_accuracy",
            ratio(kept[0] + kept[3], sum(kept)),
            "the same; near 1 even for an empty prediction",
        ),
        {
            "metric": "volume_dice",
            **summary([r["dice"] for r in rows], patients),
            "note": f"per volume, {scope}",
        },
        {"metric": "volume_iou", **summary([r["iou"] for r in rows], patients), "note": "the same voxels"},
        pooled("pooled_volume_dice", dice_from_counts(*every), f"one count over {scope}"),
        {
            "metric": "slice_dice",
            **summary([r["slice_dice"] for r in rows], patients),
            "note": "tumour slices, mean within a volume first",
        },
        pooled(
            "missed_volumes", ratio(missed, with_tumour), f"{missed} of {with_tumour} volumes with tumour"
        ),
        pooled(
            "hallucinated", ratio(invented, len(rows) - with_tumour), f"{invented} of the volumes without"
        ),
        pooled(
            "false_alarm_slices",
            ratio(alarms, num["empty_slices"]),
            f"{alarms} of {num['empty_slices']} empty slices",
        ),
        pooled(
            "lesion_recall",
            ratio(num["found_lesions"], num["target_lesions"]),
            f"{num['found_lesions']} of {num['target_lesions']} lesions touched",
        ),
        pooled(
            "lesion_precision",
            ratio(num["true_lesions"], num["pred_lesions"]),
            f"{num['true_lesions']} of {num['pred_lesions']} predicted components touch a lesion",
        ),
    ]


def print_summary(table: list[dict], title: str) -> None:
    """The summary as aligned text; n is the number of volumes behind a number."""
    print(f"\n{title}")
    print(f"{'metric':<20}{'mean':>7}{'sd':>7}{'median':>8}{'95 % interval':>16}{'n':>4}  what")
    for row in table:
        numbers = {}
        for key in ("mean", "sd", "median", "low", "high"):
            numbers[key] = "" if np.isnan(row[key]) else f"{row[key]:.3f}"
        interval = f"{numbers['low']}..{numbers['high']}" if numbers["low"] else ""
        print(
            f"{row['metric']:<20}{numbers['mean']:>7}{numbers['sd']:>7}{numbers['median']:>8}"
            f"{interval:>16}{row['n']:>4}  {row['note']}"
        )


def sweep_table(rows: list[dict]) -> list[dict]:
    """Pooled and mean per-volume Dice over all slices at each threshold: to choose one, not to report."""
    table = []
    for i, threshold in enumerate(THRESHOLDS):
        counts = [r["sweep"][i] for r in rows]
        values = [dice_from_counts(tp, fp, fn) for tp, fp, fn in counts]
        pooled = dice_from_counts(*np.sum(counts, axis=0).tolist())
        mean = summary(values)["mean"]
        table.append({"threshold": float(threshold), "pooled_volume_dice": pooled, "volume_dice": mean})
    return table


def comparable(row: dict) -> dict:
    """The scores of a volume in the form of all tasks, for common/compare.py."""
    return {
        "case": row["volume"],
        "patient": row["patient"],
        "class": 1,
        "name": "tumour",
        "status": presence(row["tp"] + row["fn"], row["tp"] + row["fp"]),
        "dice": row["dice"],
        "iou": row["iou"],
    }


def clear_report(out: Path) -> None:
    """Make the folder, and remove what an earlier evaluation left there."""
    make_folder(out)
    if distributed.is_main():
        for name in FILES:
            (out / name).unlink(missing_ok=True)


def _save_picture(path: Path, rows: list[dict], sweep: list[dict]) -> None:
    """Dice of each volume, Dice by threshold, and true against predicted volumes."""
    figure, axes = new_figure(1, 3, (13, max(3.8, 0.16 * len(rows))))
    order = sorted(rows, key=lambda r: np.nan_to_num(r["dice"]))
    bars = axes[0, 0].barh([r["volume"] for r in order], [r["dice"] for r in order])
    axes[0, 0].bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
    axes[0, 0].tick_params(axis="y", labelsize=7)
    axes[0, 0].set(title="Dice per volume", xlim=(0, 1.1))
    for name in ("volume_dice", "pooled_volume_dice"):
        axes[0, 1].plot([r["threshold"] for r in sweep], [r[name] for r in sweep], marker=".", label=name)
    axes[0, 1].set(title="threshold sweep", xlabel="threshold", ylim=(0, 1))
    axes[0, 1].legend()
    volumes_ml = [row[key] / 1000 for row in rows for key in ("target_mm3", "pred_mm3")]
    largest = max([1.0, *(ml for ml in volumes_ml if not np.isnan(ml))])
    axes[0, 2].plot([0, largest], [0, largest], color="grey", linewidth=0.8)
    axes[0, 2].plot(
        [r["target_mm3"] / 1000 for r in rows], [r["pred_mm3"] / 1000 for r in rows], "o", alpha=0.7
    )
    axes[0, 2].locator_params(axis="x", nbins=5)  # else the numbers run into each other
    axes[0, 2].set(title="tumour volume, mL", xlabel="truth", ylabel="prediction")
    save_figure(figure, path)


def write_report(rows: list[dict], out: Path, title: str, failed: dict[str, str] | None = None) -> None:
    """Print the summary and what failed; write FILES.

    Raises:
        ValueError: all volumes failed; with the reasons.
    """
    if not rows:
        raise ValueError("; ".join((failed or {}).values()) or "no volume to score")
    make_folder(out)
    table, sweep = summarise(rows), sweep_table(rows)
    write_table(out / "per_volume.csv", [{k: v for k, v in r.items() if k != "sweep"} for r in rows])
    write_table(out / "results.csv", [comparable(row) for row in rows])
    write_table(out / "summary.csv", table)
    write_table(out / "sweep.csv", sweep)

    with costs_the_picture("evaluation.png"):
        _save_picture(out / "evaluation.png", rows, sweep)
    print_summary(table, title)
    for r in rows:
        if not r["all_slices"]:
            print(
                f"note: {r['volume']} was scored on {r['slices']} converted slices only; convert with "
                "--all_slices or name the scans with --source to score all of them"
            )
            break
    print(f"written: {out}/ with {', '.join(FILES)}")
    for line in failed_lines(failed or {}):
        print(line)


@costs_the_picture("val_predictions.png")
def save_val_predictions(path: Path, model: TrainedModel, dataset: SliceDataset, count: int = 4) -> None:
    """The largest tumour slice of up to `count` volumes: image, truth, prediction, probability."""
    packed, chosen = dataset.packed, {}
    areas = packed.labels[dataset.indices].sum(axis=(1, 2), dtype=np.int64)
    for i in np.argsort(-areas, kind="stable"):
        index = int(dataset.indices[i])
        if areas[i] > 0 and len(chosen) < count:
            chosen.setdefault(packed.volumes[index], index)
    images = packed.images[list(chosen.values())]
    rows, titles = [], []
    for (name, index), image, prob in zip(
        chosen.items(), images, predict_squares(model, images), strict=True
    ):
        mask, pred = packed.labels[index] > 0, prob > 0.5
        tp, fp, fn, _ = binary_counts(pred, mask)
        shown = outline(overlay(image, pred, PRED_COLOR), mask, TRUTH_COLOR)
        rows.append([image, overlay(image, mask, TRUTH_COLOR), shown, (prob * 255).astype(np.uint8)])
        dice = f"prediction (red), Dice {dice_from_counts(tp, fp, fn):.2f}"
        titles.append([name, "truth (green)", dice, "tumour probability"])
    save_panels(path, rows, titles)
