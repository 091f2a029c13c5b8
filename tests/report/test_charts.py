"""Charts are small SVG with text as text, nothing that reaches beyond them, and a name for each line of a class."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import numpy as np

from weaksam.report import charts


def ids(svg: str) -> list[str]:
    return re.findall(r' id="([^"]+)"', svg)


def test_curves_name_the_line_of_each_class_and_nothing_else() -> None:
    x = np.linspace(0, 1, 101)
    svg = charts.curves(
        {"mean": (x, 1 - x)}, chart="pr", x="recall", y="precision, %", faint=[(x, 1 - x), None, (x, x)]
    )
    ET.fromstring(svg)
    assert [name for name in ids(svg) if "class" in name] == ["pr-class-0", "pr-class-2"]
    assert not re.search(r'id="(figure|axes|patch|text)_', svg)
    assert ">precision, %</text>" in svg
    assert ">mean</text>" in svg
    assert "<style" not in svg
    assert len(svg) < 40_000


def test_the_same_figures_give_the_same_bytes() -> None:
    drawn = [charts.curves({"a": ([1, 10], [0.2, 0.9])}, chart="c", x="x", y="y", log_x=True) for _ in range(2)]
    assert drawn[0] == drawn[1]


def test_a_histogram_takes_scores_at_its_ends_and_no_scores_at_all() -> None:
    for values in (np.array([0.0, 1.0, 1.0000001]), np.zeros(0)):
        ET.fromstring(charts.histogram({"a": values}, x="score", y="boxes"))


def test_names_with_dollar_signs_and_underscores_are_shown_as_they_are() -> None:
    svg = charts.bars({"_$train^": [1.0, 2.0]}, ["$5 bill_{", "a$b$"], x="images")
    for name in ("$5 bill_{", "a$b$", "_$train^"):
        assert f"{name}</text>" in svg.replace("\u200b", "")
    line = ([1, 10], [0.2, 0.9])
    svg = charts.curves({"$a_{b": line}, chart="c", x="$x$", y="y", log_x=True)
    assert ">$a_{b</text>" in svg
    assert "mathdefault" not in svg
    assert "mathdefault" not in charts.histogram({"$\\frac{": np.array([0.5])}, x="score", y="boxes")


def test_bars_leave_out_what_is_not_there_and_grow_with_their_names() -> None:
    def height(svg: str) -> float:
        return float(ET.fromstring(svg).attrib["viewBox"].split()[3])

    few = charts.bars({"a": [0.5, None]}, ["x", "y"], x="%", percent=True)
    many = charts.bars({"a": [1.0] * 80, "b": [2.0] * 80}, [f"class {i}" for i in range(80)], x="images")
    assert height(many) > 5 * height(few)
    assert ">class 79</text>" in many
