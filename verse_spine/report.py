"""Tables and the readable summary of an evaluation."""

from pathlib import Path

import numpy as np

from common import report
from common.tables import write_table

CASES = "cases.csv"  # grows case by case
HEAT_MAP_FAINT = "whole scan, heat map faint"  # in the column "region"
SHOWN = ("dice", "nsd_1mm", "nsd_2mm", "hd95_mm", "assd_mm")


def clear_report(out: Path) -> None:
    """Make the folder, and remove what an earlier evaluation left there."""
    report.clear_report(out, (*report.FILES, CASES))


def write_report(
    rows: list[dict], out: Path, title: str, failed: dict[str, str], notes: tuple[str, ...] = ()
) -> None:
    """Write cases.csv and the files of the common `write_report`; print the summary, `notes`, what failed."""
    cases = [{key: value for key, value in row.items() if key != "classes"} for row in rows]
    by_class = [row for of_case in rows for row in of_case["classes"]]
    clear_report(out)
    if cases:
        write_table(out / CASES, cases)
    more = summary_lines(rows) if rows else []
    report.write_report(by_class, out, title, failed, notes=notes, shown=SHOWN, more=more)


def summary_lines(rows: list[dict]) -> list[str]:
    """What only whole cases tell."""
    lines = []
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
