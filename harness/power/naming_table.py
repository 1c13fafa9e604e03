"""What the templates named, as a table: of single bugs, of pairs, and of implementations in which there is none."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from harness.power.ledger import SKIPPED, of_this_rule
from harness.power.naming import Naming
from harness.power.nulls import ALARMS, Rate

#: Edges of the ranges of S/N in 16 bits, and the two that targets are of.
_EDGES = (0.0, 0.03, 0.1, 0.3, 1.0, 1.5, 3.0, float("inf"))
_BELOW, _MIDDLE = (0.03, 1.0), (1.5, 3.0)
_LISTED = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """Bugs of one range of S/N: how many are found without templates and with them, and named right."""

    low: float
    high: float
    bugs: int
    without: int
    found: int
    named: int
    nearest: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Named:
    """What the templates named.

    Attributes:
        function: bugs that the float32 test finds by logits, and those of them whose class is named first.
        ranges: of S/N in bfloat16.
        below: bugs with S/N of 0.03 to 1 in bfloat16, and those whose class is named first.
        middle: bugs with S/N of 1.5 to 3 there, and those that are found.
        pairs: two bugs at once.
        nulls: names among correct implementations, by precision, and in all.
        controls: names among negative controls.
        missed: bugs of `function` that are not named right.
        wrong: names of another class, in any precision.
        alarms: what was named where there is no bug.
        largest: by precision the largest |z| of a correct implementation, and its limit.
    """

    function: tuple[int, int]
    ranges: tuple[Range, ...]
    below: tuple[int, int]
    middle: tuple[int, int]
    pairs: tuple[Naming, ...]
    nulls: dict[str, Rate]
    controls: Rate
    missed: tuple[Naming, ...]
    wrong: tuple[Naming, ...]
    alarms: tuple[Naming, ...]
    largest: dict[str, tuple[float, float]]


def summarise(records: Sequence[Naming]) -> Named:
    """Of those that were judged by this rule."""
    judged = [one for one in of_this_rule(records) if one.status != SKIPPED]
    bugs = [one for one in judged if one.kind == "bug"]
    function = [one for one in bugs if one.precision == "float32" and one.without in ALARMS and one.limit]
    half = [one for one in bugs if one.precision == "bfloat16" and one.signal is not None]
    below = [one for one in half if _BELOW[0] <= (one.signal or 0.0) < _BELOW[1]]
    middle = [one for one in half if _MIDDLE[0] <= (one.signal or 0.0) < _MIDDLE[1]]
    nulls = [one for one in judged if one.kind == "null"]
    controls = [one for one in judged if one.kind == "control"]
    by_precision: dict[str, list[Naming]] = defaultdict(list)
    for one in nulls:
        by_precision[one.precision] += [one]
        by_precision["all"] += [one]
    return Named(
        function=(len(function), sum(one.right for one in function)),
        ranges=tuple(_range(half, low, high) for low, high in itertools.pairwise(_EDGES)),
        below=(len(below), sum(one.right for one in below)),
        middle=(len(middle), sum(one.status in ALARMS for one in middle)),
        pairs=tuple(one for one in judged if one.kind == "pair"),
        nulls={name: _rate(members) for name, members in by_precision.items()},
        controls=_rate(controls),
        missed=tuple(one for one in function if not one.right),
        wrong=tuple(one for one in bugs if one.named and not one.right),
        alarms=tuple(one for one in (*nulls, *controls) if one.named),
        largest={
            name: max((abs(one.z), one.limit) for one in members) for name, members in by_precision.items() if members
        },
    )


def _range(bugs: Sequence[Naming], low: float, high: float) -> Range:
    inside = [one for one in bugs if low <= (one.signal or 0.0) < high]
    return Range(
        low=low,
        high=high,
        bugs=len(inside),
        without=sum(one.without in ALARMS for one in inside),
        found=sum(one.status in ALARMS for one in inside),
        named=sum(one.right for one in inside),
        nearest=sum(one.nearest_right for one in inside),
    )


def _rate(records: Sequence[Naming]) -> Rate:
    return Rate(alarms=sum(bool(one.named) for one in records), count=len(records))


# --- as text and as plain types ------------------------------------------------------------------


def summary_to_text(named: Named) -> str:
    """Everything, 120 columns wide, without a final newline."""
    lines = [
        f"float32: the class of the bug is named first for {_of(named.function)} bugs that the function test finds",
        f"bfloat16, S/N 0.03 to 1: the class of the bug is named first for {_of(named.below)}",
        f"bfloat16, S/N 1.5 to 3: found with templates {_of(named.middle)}",
        "",
        "S/N in bfloat16   bugs   found without   found with   named first   nearest, named or not",
        *(_row(one) for one in named.ranges if one.bugs),
    ]
    if named.pairs:
        lines += ["", "two bugs at once"]
        lines += [
            f"  {one.name:36} {one.host:12} {one.precision:9} {'both named' if one.right else 'not both'}: "
            f"{', '.join(one.named) or 'none'}"
            for one in named.pairs
        ]
    lines += ["", "names where there is no bug"]
    lines += [f"  correct, {name:10} {rate}{_largest(named, name)}" for name, rate in named.nulls.items()]
    if named.controls.count:
        lines.append(f"  negative controls   {named.controls}")
    for title, records in (("named, and not there", named.alarms), ("not named first in float32", named.missed),
                           ("another one named", named.wrong)):  # fmt: skip
        lines += _listed(title, records)
    return "\n".join(lines)


def _of(pair: tuple[int, int]) -> str:
    count, right = pair
    return f"{right} of {count}" + (f" ({right / count:.0%})" if count else "")


def _row(one: Range) -> str:
    label = f"{one.low:g} to {one.high:g}" if one.high != float("inf") else f"{one.low:g} and more"
    cells = [f"{one.bugs:<6}", f"{one.without:<15}", f"{one.found:<12}", f"{one.named:<13}", f"{one.nearest}"]
    return f"{label:17} {' '.join(cells)}"


def _largest(named: Named, name: str) -> str:
    z, limit = named.largest[name]
    return f"; largest |z| {z:.1f}, limit {limit:.1f}"


def _listed(title: str, records: Iterable[Naming]) -> list[str]:
    lines = [
        f"  {one.name} at {one.strength:g} on {one.host}, {one.precision}"
        + (f", S/N {one.signal:.2g}" if one.signal is not None else "")
        + f": {', '.join(one.named) or f'nearest {one.nearest}'} (a = {one.coefficient:.2f}, z = {one.z:.1f})"
        for one in records
    ]
    more = [f"  and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
    return ["", f"{title}: {len(lines)}", *lines[:_LISTED], *more] if lines else []


def summary_to_dict(named: Named, records: Sequence[Naming]) -> dict[str, Any]:
    """Everything as plain JSON types."""
    return {
        **{name: list(getattr(named, name)) for name in ("function", "below", "middle")},
        "ranges": [{**asdict(one), "high": one.high if math.isfinite(one.high) else None} for one in named.ranges],
        "nulls": {name: {**asdict(rate), "bound": rate.bound} for name, rate in named.nulls.items()},
        "controls": asdict(named.controls),
        "records": [asdict(one) for one in of_this_rule(records)],
    }
