"""Draws charts as SVG text for a page, with matplotlib; the page's style sheet sets the colours of text.

Lines and bars have colours that show on white and on black; axes are grey and text has the page's colour.
A line of a class has the id `<chart>-class-<index>`, by which the page hides the others.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

Line = tuple[Any, Any]  # x, y: sequences of numbers or arrays

PALETTE = ("#3b82f6", "#f97316", "#22a06b", "#d946ef", "#e11d48", "#8b8000", "#0ea5b7", "#a16207")
_GREY = "#8a8f98"
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's font
    "svg.hashsalt": "weaksam",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": _GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": mpl.cycler(color=PALETTE),  # pyright: ignore[reportAttributeAccessIssue]
    "xtick.color": _GREY,
    "ytick.color": _GREY,
    "grid.color": _GREY,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "text.parse_math": False,  # names of classes, splits and steps may have dollar signs
}
_UNUSED_ID = re.compile(r' id="(?:[a-z0-9.]+_\d+)"')  # matplotlib gives groups the same ids in every chart


def curves(
    lines: Mapping[str, Line],
    *,
    chart: str,
    x: str,
    y: str,
    faint: Sequence[Line | None] = (),
    percent: bool = True,
    log_x: bool = False,
) -> str:
    """Draws lines with a legend, above a thin line for each class.

    Args:
        lines: lines by their name in the legend.
        chart: id of the chart, prefix of the ids of its lines.
        x: label of the x axis.
        y: label of the y axis.
        faint: x and y of thin lines, by class index; None: the class has no line.
        percent: whether y is a fraction, shown as percent from 0 to 100.
        log_x: whether the x axis is logarithmic.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(x, y)
        for index, line in enumerate(faint):
            if line is not None:
                (drawn,) = axes.plot(line[0], _scaled(line[1], percent), color=_GREY, linewidth=0.8, alpha=0.55)
                drawn.set_gid(f"{chart}-class-{index}")
        for name, (places, values) in lines.items():
            marker = "o" if len(places) < 12 else None
            axes.plot(places, _scaled(values, percent), label=_legend(name), linewidth=2, marker=marker, markersize=4)
        if log_x:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())  # matplotlib's default formatter writes formulas
        if percent:
            axes.set_ylim(0, 102)
        axes.legend(loc="best")
        return _svg(figure)


def histogram(groups: Mapping[str, np.ndarray], *, x: str, y: str) -> str:
    """Draws a histogram of values in [0, 1]: an outline for each group, twenty bins, a logarithmic axis of counts."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(x, y)
        edges = np.linspace(0, 1, 21)
        for index, (name, values) in enumerate(groups.items()):
            counts, _ = np.histogram(np.clip(values, 0, 1), edges)
            axes.stairs(counts, edges, label=_legend(name), linewidth=2, color=PALETTE[index % len(PALETTE)])
        axes.set_yscale("symlog", linthresh=1)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(0, 1)
        axes.legend(loc="best")
        return _svg(figure)


def bars(groups: Mapping[str, Sequence[float | None]], names: Sequence[str], *, x: str, percent: bool = False) -> str:
    """Draws horizontal bars: for each name one bar per group; None: no bar."""
    with mpl.rc_context(_STYLE):
        columns = 3
        figure, axes = _axes(x, "", height=1.0 + 0.25 * -(-len(groups) // columns) + 0.24 * len(names) * len(groups))
        size = 0.8 / len(groups)
        for index, (group, values) in enumerate(groups.items()):
            places = np.arange(len(names)) - 0.4 + size * (index + 0.5)
            lengths = [np.nan if value is None else value * (100 if percent else 1) for value in values]
            axes.barh(places, lengths, height=size * 0.9, label=_legend(group), color=PALETTE[index % len(PALETTE)])
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=not percent))
        if percent:
            axes.set_xlim(0, 100)
        figure.legend(loc="outside upper left", ncols=columns)
        return _svg(figure)


def _axes(x: str, y: str, *, height: float = 3.2) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.2, height), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(visible=True)
    axes.set_axisbelow(True)
    return figure, axes


def _legend(name: str) -> str:
    """Returns a name for a legend: matplotlib leaves out names that begin with an underscore."""
    return f"\u200b{name}" if name.startswith("_") else name


def _scaled(values: Any, percent: bool) -> np.ndarray:
    return np.asarray(values, np.float64) * (100 if percent else 1)


def _svg(figure: Figure) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL
    )  # the page has its own style
    text = re.sub(r"\s*\n\s*", " ", text)
    return _UNUSED_ID.sub("", re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'aria-hidden="true"', text, count=1))
