"""How well measurements agree: intraclass correlation, limits of agreement, volumes of structures."""

from collections.abc import Sequence

import numpy as np


def icc_agreement(measurements: np.ndarray) -> float:
    """ICC(2,1): absolute agreement of single measurements, raters being a random sample (two-way).

    A rater who always measures too much lowers it, unlike a correlation.

    Args:
        measurements: (subjects, raters); subjects with a NaN are left out.

    Returns:
        1 for perfect agreement; around 0, also below, for none. NaN with fewer than two subjects or two
        raters, or if all measurements are equal.

    Source: Shrout and Fleiss 1979, Psychological Bulletin 86, 420-428.
    """
    values = np.asarray(measurements, float)
    values = values[~np.isnan(values).any(axis=1)]
    subjects, raters = values.shape
    if subjects < 2 or raters < 2:
        return float("nan")
    of_subjects = raters * values.mean(axis=1).var(ddof=1)  # mean squares of the analysis of variance
    of_raters = subjects * values.mean(axis=0).var(ddof=1)
    rest = values - values.mean(axis=1, keepdims=True) - values.mean(axis=0) + values.mean()
    error = np.square(rest).sum() / ((subjects - 1) * (raters - 1))
    total = of_subjects + (raters - 1) * error + raters * (of_raters - error) / subjects
    return float((of_subjects - error) / total) if total > 0 else float("nan")


def limits_of_agreement(reference: Sequence[float], measured: Sequence[float]) -> dict[str, float]:
    """Bland and Altman's bias (mean of measured - reference) and limits, bias -+ 1.96 standard deviations.

    Pairs with a NaN are left out.

    Returns:
        bias, sd (of a sample), low, high; all NaN without a pair, all but the bias with a single one.

    Source: Bland and Altman 1986, Lancet 327, 307-310.
    """
    difference = np.subtract(measured, reference, dtype=float)
    difference = difference[~np.isnan(difference)]
    bias = float(difference.mean()) if difference.size else float("nan")
    sd = float(difference.std(ddof=1)) if difference.size > 1 else float("nan")
    return {"bias": bias, "sd": sd, "low": bias - 1.96 * sd, "high": bias + 1.96 * sd}


def volume_errors_percent(rows: Sequence[dict]) -> np.ndarray:
    """(rows,) 100 * (pred - target) / target of rows of `case_metrics`; NaN where the target has nothing."""
    target, pred = (np.array([row[key] for row in rows], float) for key in ("target_mm3", "pred_mm3"))
    return np.divide(100 * (pred - target), target, out=np.full(target.shape, np.nan), where=target > 0)


def volume_agreement(rows: Sequence[dict]) -> list[dict]:
    """One row for each class: how well predicted volumes agree with the true ones over the cases.

    Args:
        rows: of `case_metrics`. Cases that have the class neither in truth nor in the prediction are left
            out; missed and hallucinated ones count with a volume of 0.

    Returns:
        rows of class, name, cases, target_mm3 and pred_mm3 (means), error_percent and abs_error_percent
        (means over the cases whose truth has the class), icc (`icc_agreement`), bias_mm3, sd_mm3, low_mm3,
        high_mm3 (`limits_of_agreement`).
    """
    table = []
    for label in dict.fromkeys(row["class"] for row in rows):
        of_class = [row for row in rows if row["class"] == label]
        some = [row for row in of_class if row["status"] != "absent"]
        volumes = np.array([(row["target_mm3"], row["pred_mm3"]) for row in some], float).reshape(-1, 2)
        means = volumes.mean(axis=0) if some else (float("nan"), float("nan"))
        limits = limits_of_agreement(*volumes.T)
        errors = volume_errors_percent(some)
        table.append(
            {
                "class": label,
                "name": of_class[0]["name"],
                "cases": len(some),
                "target_mm3": float(means[0]),
                "pred_mm3": float(means[1]),
                "error_percent": mean_or_nan(errors),
                "abs_error_percent": mean_or_nan(np.abs(errors)),
                "icc": icc_agreement(volumes),
                **{f"{key}_mm3": value for key, value in limits.items()},
            }
        )
    return table


def volume_lines(table: Sequence[dict]) -> list[str]:
    """Markdown lines about the rows of `volume_agreement`."""
    lines = [
        "Volumes: ICC(2,1) of absolute agreement; bias (prediction - truth) with 95 % limits of agreement "
        "(Bland and Altman).",
        "",
        "| structure | cases | truth mm3 | prediction mm3 | error % | absolute error % | ICC | bias mm3 "
        "| limits mm3 |",
        "|---" * 9 + "|",
    ]
    for row in table:
        lines.append(
            f"| {row['name']} | {row['cases']} | {row['target_mm3']:.0f} | {row['pred_mm3']:.0f} "
            f"| {row['error_percent']:+.1f} | {row['abs_error_percent']:.1f} | {row['icc']:.3f} "
            f"| {row['bias_mm3']:+.0f} | {row['low_mm3']:+.0f} to {row['high_mm3']:+.0f} |"
        )
    return lines


def mean_or_nan(values: Sequence[float]) -> float:
    """Mean of the values that are not NaN; NaN if there is none."""
    values = np.asarray(values, float)
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")


def spread_or_nan(values: Sequence[float]) -> float:
    """Standard deviation (divided by n) of the values that are not NaN; NaN if there is none."""
    values = np.asarray(values, float)
    values = values[~np.isnan(values)]
    return float(values.std()) if values.size else float("nan")
