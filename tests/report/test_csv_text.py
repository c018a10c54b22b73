from __future__ import annotations

import csv
import io

import pytest

from lrag_ray.report.csv_text import csv_text


@pytest.mark.parametrize("name", ["=cmd|'/c calc'!A0", "+1", "-2+3", "@SUM(1)", "\t=1"])
def test_no_text_of_a_stranger_is_a_formula(name: str) -> None:
    (row,) = csv.DictReader(io.StringIO(csv_text(["method", "difference"], [{"method": name, "difference": -0.25}])))
    assert row == {"method": f"'{name}", "difference": "-0.25"}


def test_other_text_and_what_is_missing_stay_as_they_are() -> None:
    text = csv_text(["method", "mean"], [{"method": 'a "fox", = it'}, {"method": "rag", "mean": 1 / 3}])
    assert text == 'method,mean\n"a ""fox"", = it",\nrag,0.3333333333333333\n'


def test_a_line_break_in_a_name_does_not_end_its_row() -> None:
    text = csv_text(["method", "mean"], [{"method": "a\r=1\nb", "mean": 2}])
    (row,) = csv.DictReader(io.StringIO(text, newline=""))
    assert row == {"method": "a =1\nb", "mean": "2"}
