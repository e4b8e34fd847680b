"""Whose scan each case is, from which site (hospital, scanner), and scores apart for each site."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from common import distributed
from common.agreement import mean_or_nan, volume_errors_percent
from common.class_metrics import metric_columns
from common.files import listed
from common.messages import warn
from common.tables import read_table

UNKNOWN = "unknown"  # site of a case that no table names


def read_subjects(
    path: str | Path, needed: Sequence[str] = ("name", "subject")
) -> dict[str, tuple[str, str]]:
    """{name: (subject, site)} of a table: comma-separated, or by tabs if its name ends in .tsv.

    The columns are name (of the case), subject and site; participant_id, as BIDS calls it, is name and
    subject in one. Without a subject it is the name, without a site "unknown".

    Args:
        needed: names of the columns that have to be there.

    Raises:
        FileNotFoundError: no such file.
        ValueError: as `read_table`; a column that is needed is missing or empty, no rows, or two rows of one
            name that differ.
    """
    people: dict[str, tuple[str, str]] = {}
    columns, rows = read_table(path)
    for number, values in enumerate(rows, 1):
        if "participant_id" in values:
            same = values["participant_id"]
            values = {"name": same, "subject": same} | values
        if not set(needed) <= set(values):
            break
        name, subject = values["name"], values.get("subject", values["name"])
        person = subject, values.get("site") or UNKNOWN
        if not name or not subject:
            raise ValueError(f"{path}, row {number}: no name or no subject in it")
        if people.setdefault(name, person) != person:
            raise ValueError(f"{path}: two rows of {name} with different subjects or sites; remove one")
    if not people:
        found = f"its columns are {', '.join(columns)}" if columns else "it is empty"
        raise ValueError(f"{path}: no row with {' and '.join(needed)}; {found}")
    return people


def read_sites(path: str | Path, cases: Collection[str]) -> dict[str, str]:
    """{case: site} of a table with the columns name and site, for each of `cases` that has a row; prints
    which rows have no case, and which cases no row. Else as `read_subjects`."""
    people = read_subjects(path, ("name", "site"))
    sites = {name: person[1] for name in cases if (person := person_of(name, people))}
    warnings = rows_without_case(path, people, cases)
    if missing := [name for name in cases if name not in sites]:
        warnings.append(f"{path}: has no row of {listed(missing)}; the site is {UNKNOWN}")
    for warning in warnings if distributed.is_main() else ():
        warn(warning)
    return sites


def person_of(name: str, people: Mapping[str, tuple[str, str]]) -> tuple[str, str] | None:
    """(subject, site) of a case by its name, or by a BIDS name that it goes on from, such as sub-01_ses-1;
    None without either."""
    return people.get(_row_of(name, people))


def rows_without_case(path: str | Path, people: Collection[str], cases: Collection[str]) -> list[str]:
    """A sentence about the rows of a table that belong to none of the cases, if there are any.

    Args:
        path: of the table.
        people: the names in its rows.
    """
    used = {_row_of(name, people) for name in cases}
    if not (others := [name for name in people if name not in used]):
        return []
    return [f"{path}: no case belongs to its row(s) of {listed(others)}; are the names right?"]


def _row_of(name: str, people: Collection[str]) -> str:
    parts = name.split("_")
    beginnings = ["_".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((beginning for beginning in beginnings if beginning in people), "")


def lonely_sites(people: Collection[tuple[str, str]]) -> list[str]:
    """A sentence for each site that has one subject only, where there are several sites.

    Args:
        people: (subject, site) of every case.
    """
    subjects: dict[str, set[str]] = {}
    for subject, site in people:
        subjects.setdefault(site, set()).add(subject)
    if len(subjects) < 2:
        return []
    return [
        f"site {site} has one subject only ({', '.join(of_site)}): what a fold tests there is a single person"
        for site, of_site in subjects.items()
        if len(of_site) == 1
    ]


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
