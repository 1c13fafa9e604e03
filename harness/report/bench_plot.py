"""A bench as a figure: a panel for each kind that was measured, a colour for each candidate."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from harness.errors import UsageError
from harness.files import replace_file
from harness.power.plot import refuse_undrawable
from harness.report.characters import one_line
from harness.speed.benching import NO_VERDICT, Bench, Result, Unmeasured
from harness.speed.kinds.burst import SHARES, Burst
from harness.speed.kinds.completion import Completion
from harness.speed.kinds.latency import Latency
from harness.speed.kinds.modules import PARTS, REST, Modules
from harness.speed.kinds.scaling import Scaling

#: Okabe and Ito's colours, which people with any colour vision tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_PANEL = (3.6, 3.4)
_METADATA: dict[str, dict[str, Any]] = {".svg": {"Date": None, "Creator": None}, ".png": {"Software": None}}

Measured = Mapping[str, Result]


def write_plot(bench: Bench, path: Path) -> None:
    """Draw all that was measured; the verdict of each candidate stands beside its name.

    Raises:
        UsageError: without matplotlib, for a suffix other than .svg and .png, and where nothing was measured.
    """
    refuse_undrawable(path)
    import matplotlib
    from matplotlib.figure import Figure

    named = {_name(bench, number): one.results for number, one in enumerate(bench.subjects)}
    kinds = [kind for kind in bench.plan.kinds if any(_drawable(results, kind) for results in named.values())]
    if not kinds:
        raise UsageError("nothing was measured that could be drawn", fix="See the report for why")
    with matplotlib.rc_context({"svg.hashsalt": "golden-harness", "font.size": 9, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(_PANEL[0] * len(kinds), _PANEL[1] + 0.25 * len(named)), layout="constrained")
        for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
            _PANELS[kind](axes, {name: found for name, found in named.items() if _drawable(found, kind)}, list(named))
            axes.spines[["top", "right"]].set_visible(False)
        patches = [matplotlib.patches.Patch(color=_colour(list(named), name), label=name) for name in named]
        figure.legend(handles=patches, loc="outside lower left", frameon=False)
        if bench.golden is None:
            figure.suptitle(NO_VERDICT, ha="left", x=0.01, size=9)
        drawn = io.BytesIO()
        figure.savefig(drawn, format=path.suffix[1:], metadata=_METADATA[path.suffix])
    replace_file(path, drawn.getvalue())


def _name(bench: Bench, number: int) -> str:
    one = bench.subjects[number]
    return one_line(f"{one.spec} ({'no verdict' if one.verdict is None else one.verdict['status']})")


def _drawable(results: Measured, kind: str) -> bool:
    found = results.get(kind)
    if isinstance(found, Scaling):
        return any(found.efficiency(point) is not None for point in found.points)
    return found is not None and not isinstance(found, Unmeasured)


def _colour(names: list[str], name: str) -> str:
    return _COLOURS[names.index(name) % len(_COLOURS)]


def _bars(axes: Any, names: list[str], values: Mapping[str, tuple[float, ...]], groups: tuple[str, ...]) -> None:
    """Groups of bars, a bar a candidate in each."""
    width = 0.8 / len(values)
    for place, (name, heights) in enumerate(values.items()):
        starts = [group + (place - (len(values) - 1) / 2) * width for group in range(len(groups))]
        axes.bar(starts, heights, width=width, color=_colour(names, name))
    axes.set_xticks(range(len(groups)), groups)


def _latency(axes: Any, measured: Mapping[str, Measured], names: list[str]) -> None:
    values = {}
    for name, results in measured.items():
        found = results["latency"]
        assert isinstance(found, Latency)
        values[name] = tuple(1e3 * one.middle for one in (found.first, found.later))
    _bars(axes, names, values, ("first forward", "each later one"))
    axes.set_title("latency at batch 1, ms", loc="left", size=9)


def _completion(axes: Any, measured: Mapping[str, Measured], names: list[str]) -> None:
    values = {}
    for name, results in measured.items():
        found = results["completion"]
        assert isinstance(found, Completion)
        values[name] = (found.rows / found.seconds.middle,)
    _bars(axes, names, values, ("",))
    axes.set_title("completion, rows/s", loc="left", size=9)


def _burst(axes: Any, measured: Mapping[str, Measured], names: list[str]) -> None:
    values = {}
    for name, results in measured.items():
        found = results["burst"]
        assert isinstance(found, Burst)
        values[name] = found.waits
    _bars(axes, names, values, tuple(f"p{share}" for share in SHARES))
    axes.set_title("burst, seconds until done", loc="left", size=9)


def _scaling(axes: Any, measured: Mapping[str, Measured], names: list[str]) -> None:
    ticks: set[int] = set()
    for name, results in measured.items():
        found = results["scaling"]
        assert isinstance(found, Scaling)
        pairs = [(one.ranks, found.efficiency(one)) for one in found.points]
        ranks, shares = zip(*((rank, share) for rank, share in pairs if share is not None), strict=True)
        axes.plot(ranks, shares, color=_colour(names, name), marker="o")
        ticks |= set(ranks)
    axes.set_xticks(sorted(ticks))
    axes.set_ylim(bottom=0)
    axes.set_title("scaling efficiency over ranks", loc="left", size=9)


def _modules(axes: Any, measured: Mapping[str, Measured], names: list[str]) -> None:
    parts = (*PARTS, REST)
    values = {}
    for name, results in measured.items():
        found = results["modules"]
        assert isinstance(found, Modules)
        values[name] = tuple(found.shares["decode"][part] for part in parts)
    _bars(axes, names, values, parts)
    axes.tick_params(axis="x", labelrotation=45)
    axes.set_title("modules, share of a later forward", loc="left", size=9)


_PANELS: dict[str, Callable[[Any, Mapping[str, Measured], list[str]], None]] = {
    "latency": _latency,
    "completion": _completion,
    "burst": _burst,
    "scaling": _scaling,
    "modules": _modules,
}
