"""Where a candidate goes wrong, as text and as plain values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.locate.clues import Clue
    from harness.locate.where import Evidence, Where

_SHOWN = 6

_SCOPES = {
    "local": "this module alone",
    "configuration": "the same module of every block: look at what they have in common, a setting or a function",
    "several": "further modules are wrong on right inputs too",
    "outside": "outside of the modules: what the model is handed",
}


def where_to_text(found: Where) -> str:
    """A few lines: the place, how far it reaches, when it shows, and what says so."""
    return "\n".join(_lines(found))


def _lines(found: Where) -> Iterator[str]:
    yield f"{headline(found)} ({found.candidate} against {found.golden}, {found.seconds:.0f} s)"
    if found.found:
        yield f"  reach: {_SCOPES[found.scope]}"
        if found.others:
            more = f" and {len(found.others) - _SHOWN} more" if len(found.others) > _SHOWN else ""
            yield f"  also wrong, each on right inputs: {', '.join(found.others[:_SHOWN])}{more}"
    for one in found.evidence[:_SHOWN]:
        yield f"  seen in {found.precision}: {one.line}"
    for clue in _first(found):
        yield f"  {clue.kind}: {clue.line}"
    if found.modules:
        yield f"  {found.modules} modules tested, {found.tests} statistics, in {found.precision}"
    for note in found.notes:
        yield f"  not seen: {note}"
    if found.repro:
        yield f"  repro: {found.repro}"


def headline(found: Where) -> str:
    """The place in one line."""
    if found.scope == "unseen":
        return "nothing could be located"
    if not found.found:
        wrong = [clue for clue in found.clues if clue.wrong]
        return "no module is wrong on right inputs" + (", though weights or settings differ" if wrong else "")
    place = found.module or "the model"
    part = f", {found.part}" if found.part else ""
    when = f": {', '.join(found.conditions)}" if found.conditions else ""
    return f"first wrong: {place}{part}{when}"


def _first(found: Where) -> list[Clue]:
    """Clues of the named module first, then the largest; what is only a note comes last."""
    ordered = sorted(found.clues, key=lambda one: (not one.wrong, not _of(one, found.module), -one.size))
    return ordered[:_SHOWN]


def _of(one: Clue, module: str) -> bool:
    return bool(module) and (one.module == module or one.module.startswith(f"{module}."))


def where_to_dict(found: Where) -> dict[str, Any]:
    """Plain values, for JSON: what is infinite is null."""
    return {
        "golden": found.golden,
        "candidate": found.candidate,
        "module": found.module,
        "part": found.part,
        "scope": found.scope,
        "conditions": list(found.conditions),
        "others": list(found.others),
        "question": found.question,
        "precision": found.precision,
        "evidence": [_evidence(one) for one in found.evidence],
        "clues": [_clue(one) for one in found.clues],
        "modules": found.modules,
        "tests": found.tests,
        "notes": list(found.notes),
        "repro": found.repro or None,
        "seconds": round(found.seconds, 2),
    }


def _evidence(one: Evidence) -> dict[str, Any]:
    return {
        "module": one.module,
        "part": one.part,
        "statistic": one.statistic,
        "ratio": _finite(one.ratio),
        "limit": _finite(one.limit),
        "z": _finite(one.z),
        "unit": one.unit,
    }


def _clue(one: Clue) -> dict[str, Any]:
    return {
        "kind": one.kind,
        "module": one.module,
        "tensor": one.tensor,
        "text": one.text,
        "wrong": one.wrong,
        "size": _finite(one.size),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
