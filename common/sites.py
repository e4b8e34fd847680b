"""Scores apart for each site (hospital, scanner): which case is from where, and tables by site."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from common.agreement import mean_or_nan, volume_errors_percent
from common.class_metrics import metric_columns

UNKNOWN = "unknown"  # site of a case that no table names


def read_sites(path: str | Path) -> dict[str, str]:
    """{case: site} of a table with the columns name and site: comma-separated, or by tabs if it ends in .tsv.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no rows, a missing column, or a case that stands there twice.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such table of sites")
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ","))
    if missing := {"name", "site"} - set(rows[0] if rows else ()):
        what = f"no column {' and no column '.join(sorted(missing))}" if rows else "no rows"
        raise ValueError(f"{path}: {what}; a table with the columns name (of the case) and site is needed")
    sites: dict[str, str] = {}
    for row in rows:
        if row["name"] in sites:
            raise ValueError(f"{path}: case {row['name']} stands there twice; remove one of the two lines")
        sites[row["name"]] = row["site"] or UNKNOWN
    return sites


def site_table(rows: Sequence[dict], sites: Mapping[str, str]) -> list[dict]:
    """One row for each site and class, at last for each class over all sites as site "all".

    Args:
        rows: of `case_metrics`, each with "case".
        sites: {case: site}; cases that are not in it are of the site "unknown".

    Returns:
        rows of site, class, name, cases (that are not absent), missed, hallucinated, the means of the metrics
        without NaN, volume_error_percent and abs_volume_error_percent (means over cases whose truth has the
        class).
    """
    site_of = {row["case"]: sites.get(row["case"], UNKNOWN) for row in rows}
    names = {row["class"]: row["name"] for row in rows}
    metrics = [m for m in metric_columns(rows) if m not in ("target_mm3", "pred_mm3")] if rows else []
    table = []
    for site in [*sorted(set(site_of.values())), "all"]:
        for label, name in names.items():
            of_class = [r for r in rows if r["class"] == label and site in (site_of[r["case"]], "all")]
            status = [row["status"] for row in of_class]
            errors = volume_errors_percent(of_class)
            table.append(
                {
                    "site": site,
                    "class": label,
                    "name": name,
                    "cases": len(status) - status.count("absent"),
                    "missed": status.count("missed"),
                    "hallucinated": status.count("hallucinated"),
                    **{metric: mean_or_nan([row[metric] for row in of_class]) for metric in metrics},
                    "volume_error_percent": mean_or_nan(errors),
                    "abs_volume_error_percent": mean_or_nan(np.abs(errors)),
                }
            )
    return table


def site_lines(
    table: Sequence[dict],
    shown: Sequence[str] = ("dice", "hd95_mm", "asd_mm", "nsd_1mm", "volume_error_percent"),
) -> list[str]:
    """Markdown table of the rows of `site_table`, with the metrics of `shown` that they have."""
    shown = [metric for metric in shown if table and metric in table[0]]
    lines = [f"| site | structure | cases | missed | {' | '.join(shown)} |", "|---" * (len(shown) + 4) + "|"]
    for row in table:
        values = (f"{row[metric]:.3f}" for metric in shown)
        lines.append(
            f"| {row['site']} | {row['name']} | {row['cases']} | {row['missed']} | {' | '.join(values)} |"
        )
    return lines
