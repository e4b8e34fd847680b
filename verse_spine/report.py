"""Tables and the readable summary of an evaluation."""

from pathlib import Path

import numpy as np

from common import report
from common.class_metrics import class_table
from common.files import make_folder
from common.metrics import write_table

HEAT_MAP_FAINT = "whole scan, heat map faint"  # in the column "region"
FILES = ("results.csv", "cases.csv", "summary.csv", report.SUMMARY)


def clear_report(out: Path) -> None:
    """Make the folder, and remove what an earlier evaluation left there."""
    report.clear_report(out, FILES)


def write_report(
    rows: list[dict], out: Path, title: str, failed: dict[str, str], notes: tuple[str, ...] = ()
) -> None:
    """Write the four FILES; print the summary, `notes` and what failed."""
    make_folder(out)
    lines = [title, *(f"NOTE: {note}" for note in notes), ""]
    if rows:
        by_class = [r for row in rows for r in row["classes"]]
        table = class_table(by_class)
        write_table(out / "results.csv", by_class)
        write_table(out / "cases.csv", [{k: v for k, v in row.items() if k != "classes"} for row in rows])
        write_table(out / "summary.csv", table)
        lines += summary_lines(rows, table)
    else:
        clear_report(out)  # tables of an earlier evaluation
    report.write_summary(out, lines, failed)


def summary_lines(rows: list[dict], table: list[dict]) -> list[str]:
    """Markdown: one line for each class, then what only whole cases tell."""
    lines = report.class_lines(table, ("dice", "nsd_1mm", "nsd_2mm", "hd95_mm", "assd_mm"))
    lines += ["", report.EXPLANATION]
    if without := sum(row.get("region") == HEAT_MAP_FAINT for row in rows):
        lines.append(f"In {without} scan(s) the heat map found no spine and the whole scan was searched.")
    if "hits" in rows[0]:
        hits, targets = sum(r["hits"] for r in rows), sum(r["targets"] for r in rows)
        lines.append(f"Identification rate {hits} of {targets} vertebrae ({hits / max(targets, 1):.3f})")
    for key, text in (
        ("dice_any", "Dice of all vertebrae together"),
        ("dice_classes", "Dice by name, mean over the classes that each case's truth has"),
        ("dice_instance", "Dice of the best matching vertebra, whatever its name"),
        ("dice_inner", "Dice by name of vertebrae that the scan does not cut"),
        ("region_recall", "share of vertebra voxels inside the region"),
    ):
        values = [r[key] for r in rows if key in r and not np.isnan(r[key])]
        has_names = len(rows[0]["classes"]) > 1
        if values and (has_names or key not in ("dice_classes", "dice_inner")):
            lines.append(f"{text}: mean {np.mean(values):.4f}, lowest {np.min(values):.4f}")
    return lines
