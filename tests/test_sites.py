"""common/sites.py: which case is from where, scores by site."""

import math

import pytest

from common.sites import lonely_sites, person_of, read_sites, read_subjects, site_lines, site_table


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


def test_tables_of_sites(tmp_path, capsys):
    (tmp_path / "sites.csv").write_text("\ufeffname,subject,site\na,1,Bonn\nb,2,\n", encoding="utf8")
    (tmp_path / "sites.tsv").write_text("site\tname\nBonn\ta\n")
    assert read_sites(tmp_path / "sites.csv", ["a", "b_ses-1"]) == {"a": "Bonn", "b_ses-1": "unknown"}
    assert read_sites(tmp_path / "sites.tsv", ["a"]) == {"a": "Bonn"}
    assert capsys.readouterr().out == ""
    assert read_sites(tmp_path / "sites.csv", ["b", "c", "d"]) == {"b": "unknown"}
    no_case, no_row = capsys.readouterr().out.splitlines()
    assert no_case.endswith("sites.csv: no case belongs to its row(s) of a; are the names right?")
    assert no_row.endswith("sites.csv: has no row of c, d; the site is unknown")
    (tmp_path / "bad.csv").write_text("case,site\na,Bonn\n")
    with pytest.raises(ValueError, match="bad.csv: no row with name and site; its columns are case, site"):
        read_sites(tmp_path / "bad.csv", [])
    (tmp_path / "twice.csv").write_text("name,site\na,Bonn\na,Trier\n")
    with pytest.raises(ValueError, match="two rows of a with different subjects or sites"):
        read_sites(tmp_path / "twice.csv", [])
    with pytest.raises(FileNotFoundError, match="no such table"):
        read_sites(tmp_path / "nothing.csv", [])


def test_tables_of_subjects(tmp_path):
    (tmp_path / "t.csv").write_text("name, subject, site\na1,anna,X\na2, anna ,\n", encoding="utf-8-sig")
    people = read_subjects(tmp_path / "t.csv")
    assert people == {"a1": ("anna", "X"), "a2": ("anna", "unknown")}
    (tmp_path / "participants.tsv").write_text("participant_id\tage\tsite\nsub-01\t30\tX\n")
    people = read_subjects(tmp_path / "participants.tsv")
    assert people == {"sub-01": ("sub-01", "X")}
    assert person_of("sub-01_ses-1", people) == ("sub-01", "X") and person_of("sub-011", people) is None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["id,person", "a,anna"], "no row with name and subject; its columns are id, person"),
        (["name,subject,site"], "no row with name and subject; its columns are name, subject, site"),
        ([], "no row with name and subject; it is empty"),
        (["name,subject,site", "a,,X"], "row 1: no name or no subject in it"),
        (["name,subject,site", "a,anna,X", "a,anna,Y"], "two rows of a with different subjects or sites"),
    ],
)
def test_tables_of_subjects_that_cannot_be_used(tmp_path, rows, message):
    (tmp_path / "t.csv").write_text("\n".join(rows), encoding="utf-8-sig")
    with pytest.raises(ValueError, match=message):
        read_subjects(tmp_path / "t.csv")


def test_sites_of_a_single_subject():
    people = [("anna", "X"), ("anna", "X"), ("ben", "Y"), ("carl", "Y")]
    (line,) = lonely_sites(people)
    assert line.startswith("site X has one subject only (anna)")
    assert lonely_sites(people[:2]) == lonely_sites([]) == []
