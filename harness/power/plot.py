"""Detection against S/N as a figure, one line a judge: the fitted curve, and rates in half decades."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.errors import UsageError
from harness.power.curves import Curve
from harness.power.detection import Row, Table
from harness.power.judges import ALL, TOKENS

#: Peers that are drawn, those that find most.
PEERS = 7

#: Okabe and Ito's colours, which people with any colour vision tell apart, without their yellow, too pale for a line.
_OURS = "#000000"
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
_MARKERS = ("s", "^", "D", "v", "P", "X", "<")

_INCHES = (9.0, 5.0)
_DPI = 100
_POINTS = 200
#: Least distance of two labels, as a share of the axis.
_LABEL = 0.062

_METADATA: dict[str, dict[str, Any]] = {".svg": {"Date": None, "Creator": None}, ".png": {"Software": None}}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Line:
    name: str
    curve: Curve
    colour: str
    marker: str
    style: str
    width: float


def refuse_undrawable(path: Path) -> None:
    """Refuse before hours of work what could not be drawn after them.

    Raises:
        UsageError: without matplotlib, and for a suffix other than .svg and .png.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError("a plot needs matplotlib", fix="pip install 'golden-harness[report]'") from None
    if path.suffix not in _METADATA:
        raise UsageError(f"no plot can be written as {path.name}", fix="Name a file that ends in .svg or .png")


def write_plot(table: Table, path: Path) -> None:
    """Write the figure of one precision; the same table gives the same bytes with the same matplotlib.

    This project's verdict on everything and on tokens alone, and the PEERS that find most at thresholds per host.
    The S/N that bugs have are those of this table.

    Raises:
        UsageError: without matplotlib, for a suffix other than .svg and .png, and for a table without a curve.
    """
    refuse_undrawable(path)
    import matplotlib
    from matplotlib.figure import Figure

    lines = _lines(table)
    if not lines:
        raise UsageError(
            f"no bug with an S/N was judged in {table.precision}", fix="Run trials in that precision first"
        )
    # The salt makes the ids inside an SVG the same each time.
    with matplotlib.rc_context({"svg.hashsalt": "golden-harness", "font.size": 10, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=_INCHES, dpi=_DPI)
        _draw(figure, lines, table.precision)
        figure.savefig(path, metadata=_METADATA[path.suffix])


def _lines(table: Table) -> list[_Line]:
    ours = [row for name in (ALL.name, TOKENS.name) for row in table.rows if row.judge.name == name]
    peers = [row for row in table.rows if row.judge.threshold == "per host" and _separates(row, table.precision)]
    lines = []
    for place, row in enumerate(ours):
        if row.judge.name in table.curves:
            style, width = ("-", 2.8) if place == 0 else ("--", 2.0)
            curve = table.curves[row.judge.name]
            lines.append(_Line(name=row.judge.name, curve=curve, colour=_OURS, marker="o", style=style, width=width))
    drawn = [row for row in peers if row.judge.name in table.curves][:PEERS]
    for row, colour, marker in zip(drawn, _COLOURS, _MARKERS, strict=False):
        name, curve = row.judge.criterion, table.curves[row.judge.name]
        lines.append(_Line(name=name, curve=curve, colour=colour, marker=marker, style="-", width=1.4))
    return lines


def _separates(row: Row, precision: str) -> bool:
    return min(row.judge.within(precision).values(), default=math.inf) < math.inf


def _draw(figure: Any, lines: Sequence[_Line], precision: str) -> None:
    axes = figure.add_axes((0.075, 0.11, 0.64, 0.80))
    largest = max(line.curve.largest for line in lines)
    for line in reversed(lines):  # ours last, on top
        _draw_line(axes, line)
    axes.set_xscale("log")
    axes.set_xlim(min(line.curve.smallest for line in lines), largest)
    axes.set_ylim(-0.02, 1.02)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.grid(visible=True, color="#DDDDDD", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(f"size of the bug in units of {precision} round-off (S/N)")
    axes.set_title("Share of bugs found; peers' rules without an alarm on the same correct ports", loc="left", size=10)
    _label(axes, lines)


def _draw_line(axes: Any, line: _Line) -> None:
    signals = np.geomspace(line.curve.smallest, line.curve.largest, _POINTS)
    shares = [line.curve.share(float(signal)) for signal in signals]
    axes.plot(signals, shares, color=line.colour, linestyle=line.style, linewidth=line.width)
    middles = [_middle(one.low, one.high, line.curve) for one in line.curve.bins]
    rates = [one.share for one in line.curve.bins]
    axes.plot(middles, rates, color=line.colour, marker=line.marker, linestyle="", markersize=4, clip_on=False)
    if line.name == ALL.name:  # bars of all lines would hide them
        low, high = zip(*(one.interval for one in line.curve.bins), strict=True)
        axes.vlines(middles, low, high, color=line.colour, linewidth=0.8, alpha=0.5)


def _middle(low: float, high: float, curve: Curve) -> float:
    """Of the part of a bin in which there are bugs."""
    return math.sqrt(max(low, curve.smallest) * min(high, curve.largest))


def _label(axes: Any, lines: Sequence[_Line]) -> None:
    """Names right of the axes, each led to its line's end: highest end first, then the smallest S/N of even odds."""
    ends = [line.curve.share(line.curve.largest) for line in lines]
    order = sorted(range(len(lines)), key=lambda one: (-round(ends[one], 2), lines[one].curve.even.value, one))
    heights = spread([ends[one] for one in order])
    # Heights in data and places as shares of the width, beyond the right end of the axes.
    beyond = axes.get_yaxis_transform()
    for one, height in zip(order, heights, strict=True):
        line = lines[one]
        look: dict[str, Any] = {"color": line.colour, "transform": beyond, "clip_on": False}
        axes.plot([1.0, 1.025], [ends[one], height], linewidth=0.7, linestyle=line.style, **look)
        axes.plot([1.025], [height], marker=line.marker, markersize=5, **look)
        weight = "bold" if line.name == ALL.name else "normal"
        axes.text(1.04, height, f"{line.name}, {_even(line.curve)}", va="center", size=9, weight=weight, **look)
    axes.text(1.04, 1.04, "rule, S/N found half of the time", transform=axes.transAxes, size=9, color="#444444")


def _even(curve: Curve) -> str:
    value = curve.even.value
    if value == 0:
        return f"< {curve.smallest:.1g}"
    return f"> {curve.largest:.1g}" if math.isinf(value) else f"{value:.2g}"


def spread(heights: Sequence[float], least: float = _LABEL) -> list[float]:
    """Heights from top to bottom, moved down and then up again until any two are ``least`` apart."""
    placed: list[float] = []
    for height in heights:
        placed.append(min(height, placed[-1] - least) if placed else height)
    floor = 0.0
    for index in reversed(range(len(placed))):
        placed[index] = max(placed[index], floor)
        floor = placed[index] + least
    return placed
