"""common/sites.py: which case is from where, scores by site."""

import math

import pytest

from common.sites import read_sites, site_lines, site_table


def row(case, label, dice, target=1000.0, pred=1000.0, status="ok"):
    return {"case": case, "class": label, "name": f"part {label}", "status": status, "dice": dice} | {
        "target_mm3": target,
        "pred_mm3": pred,
    }


def test_means_by_site():
    nan = math.nan
    rows = [row("a", 1, 0.9, pred=1100), row("a", 2, 0.5), row("b", 1, 0.7, pred=900)]
    rows += [row("b", 2, 0, pred=0, status="missed"), row("c", 1, 0.2), row("c", 2, nan, 0, 0, "absent")]
    table = site_table(rows, {"a": "Leipzig", "b": "Leipzig"})
    found = {(r["site"], r["class"]): r for r in table}
    assert list(found) == [(s, n) for s in ("Leipzig", "unknown", "all") for n in (1, 2)]
    assert found["Leipzig", 1]["dice"] == pytest.approx(0.8) and found["Leipzig", 1]["cases"] == 2
    assert found["Leipzig", 1]["volume_error_percent"] == pytest.approx(0)
    assert found["Leipzig", 1]["abs_volume_error_percent"] == pytest.approx(10)
    assert found["Leipzig", 2]["dice"] == pytest.approx(0.25) and found["Leipzig", 2]["missed"] == 1
    assert found["unknown", 2]["cases"] == 0 and math.isnan(found["unknown", 2]["dice"])
    assert found["all", 1]["dice"] == pytest.approx(0.6) and found["all", 2]["dice"] == pytest.approx(0.25)
    lines = site_lines(table)
    assert lines[0] == "| site | structure | cases | missed | dice | volume_error_percent |"
    assert lines[2] == "| Leipzig | part 1 | 2 | 0 | 0.800 | 0.000 |" and len(lines) == 2 + 6
    assert site_table([], {}) == []


def test_tables_of_sites(tmp_path):
    (tmp_path / "sites.csv").write_text("\ufeffname,subject,site\na,1,Bonn\nb,2,\n", encoding="utf8")
    (tmp_path / "sites.tsv").write_text("site\tname\nBonn\ta\n")
    assert read_sites(tmp_path / "sites.csv") == {"a": "Bonn", "b": "unknown"}
    assert read_sites(tmp_path / "sites.tsv") == {"a": "Bonn"}
    (tmp_path / "bad.csv").write_text("case,site\na,Bonn\n")
    with pytest.raises(ValueError, match="bad.csv: no column name; a table with the columns name"):
        read_sites(tmp_path / "bad.csv")
    (tmp_path / "twice.csv").write_text("name,site\na,Bonn\na,Trier\n")
    with pytest.raises(ValueError, match="case a stands there twice"):
        read_sites(tmp_path / "twice.csv")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(ValueError, match="no rows"):
        read_sites(tmp_path / "empty.csv")
    with pytest.raises(FileNotFoundError, match="no such table"):
        read_sites(tmp_path / "nothing.csv")
