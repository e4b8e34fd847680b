"""The readable summary of an evaluation: a table in Markdown, notes, what failed."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from common import distributed
from common.batch import failed_lines
from common.files import make_folder, replacing

SUMMARY = "summary.md"
EXPLANATION = (
    "Means, with a 95 % bootstrap interval by patient where there are several; a missed class counts Dice 0, "
    "and so does one in a scan that does not have it (hallucinated)."
)


def clear_report(out: Path, files: Sequence[str]) -> None:
    """Make the folder, and remove the `files` that an earlier evaluation left there."""
    make_folder(out)
    if distributed.is_main():
        for name in files:
            (out / name).unlink(missing_ok=True)


def class_lines(table: Sequence[dict], shown: Sequence[str]) -> list[str]:
    """Markdown table with one line for each class that a scan shows.

    Args:
        table: rows of `class_table`.
        shown: the metrics that get a column.
    """
    lines = [f"| class | {' | '.join(shown)} | cases | missed | hallucinated |"]
    lines.append("|---" * (len(shown) + 4) + "|")
    for name in dict.fromkeys(r["name"] for r in table):
        entries = {r["metric"]: r for r in table if r["name"] == name}
        values = [mean_and_interval(entries[metric]) for metric in shown]
        dice = entries["dice"]
        if dice["n"]:  # a class that no scan shows would be a row of nothing
            counts = f"{dice['n']} | {dice['missed']} | {dice['hallucinated']}"
            lines.append(f"| {name} | {' | '.join(values)} | {counts} |")
    return lines


def mean_and_interval(entry: Mapping[str, float]) -> str:
    """0.853 (0.820-0.880) of a dict with mean, low and high; without an interval the mean alone."""
    interval = "" if math.isnan(entry["low"]) else f" ({entry['low']:.3f}-{entry['high']:.3f})"
    return f"{entry['mean']:.3f}{interval}"


def write_summary(out: Path, lines: Sequence[str], failed: Mapping[str, str]) -> None:
    """Write `lines` and what failed to summary.md, and print them.

    Args:
        failed: {case: reason}.
    """
    failures = failed_lines(failed)
    with replacing(out / SUMMARY) as partial:
        partial.write_text("\n".join([*lines, *failures]) + "\n", encoding="utf8")
    print("\n".join([*lines, f"written to {out}", *failures]))
