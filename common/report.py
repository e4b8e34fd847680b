"""The readable summary of an evaluation: a table in Markdown, notes, what failed."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from common import distributed
from common.batch import failed_lines
from common.class_metrics import class_table, group_table
from common.files import make_folder, printable, replacing
from common.tables import write_table

SUMMARY = "summary.md"
RESULTS, BY_CLASS, BY_GROUP = "results.csv", "summary.csv", "groups.csv"
FILES = (RESULTS, BY_CLASS, BY_GROUP, SUMMARY)  # of `write_report`
SHOWN = ("dice", "nsd_0.5mm", "nsd_1mm", "nsd_2mm", "nsd_organ", "hd95_mm", "assd_mm", "volume_similarity")
ABOUT_GROUPS = "A group's mean is that of its classes' means over the cases."
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


def group_lines(table: Sequence[dict], shown: Sequence[str]) -> list[str]:
    """Markdown table with one line for each group of classes; `table` holds the rows of `group_table`."""
    lines = [f"| group | {' | '.join(shown)} |", "|---" * (len(shown) + 1) + "|"]
    for group in dict.fromkeys(row["group"] for row in table):
        entries = {row["metric"]: row for row in table if row["group"] == group}
        lines.append(f"| {group} | {' | '.join(mean_and_interval(entries[metric]) for metric in shown)} |")
    return lines


def write_report(
    rows: Sequence[dict],
    out: Path,
    title: str,
    failed: Mapping[str, str],
    *,
    notes: Sequence[str] = (),
    shown: Sequence[str] = SHOWN,
    more: Sequence[str] = (),
) -> None:
    """Write results.csv, summary.csv, groups.csv where classes have groups, and summary.md, which is printed.

    Tables of an earlier evaluation go, also where there are no rows.

    Args:
        rows: of `case_metrics`, each with "case" and "patient" in front, and "group" or not.
        failed: {case: reason}.
        notes: what a reader of the scores must know.
        shown: metrics of the summary, of those that the rows have.
        more: lines for the end of the summary.
    """
    clear_report(out, FILES)
    lines = [title, *(f"NOTE: {note}" for note in notes), ""]
    if rows:
        shown = [metric for metric in shown if metric in rows[0]]
        table = class_table(rows)
        write_table(out / RESULTS, list(rows))
        if "group" in rows[0]:
            table = [row for row in table if row["class"] != "all"]  # which stands among the groups
            groups = group_table(rows)
            write_table(out / BY_GROUP, groups)
            about_groups = ["", *group_lines(groups, shown), "", EXPLANATION, ABOUT_GROUPS]
        else:
            about_groups = ["", EXPLANATION]
        write_table(out / BY_CLASS, table)
        lines += [*class_lines(table, shown), *about_groups, *more]
    write_summary(out, lines, failed)


def write_summary(out: Path, lines: Sequence[str], failed: Mapping[str, str]) -> None:
    """Write `lines` and what failed to summary.md, and print them.

    Args:
        failed: {case: reason}.
    """
    failures = failed_lines(failed)
    with replacing(out / SUMMARY) as partial:
        partial.write_text(printable("\n".join([*lines, *failures]) + "\n"), encoding="utf8")
    print("\n".join([*lines, f"written to {out}", *failures]))
