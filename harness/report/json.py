"""Verdicts as plain JSON types."""

from __future__ import annotations

import importlib.resources
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from harness.values import (
    Answer,
    Blame,
    Diagnosis,
    Difference,
    Finding,
    Layer,
    Likeness,
    PassSummary,
    Power,
    Sharding,
    Statistic,
    Verdict,
)

#: Raised when a key changes its meaning or goes away; verdict.schema.json says the same.
VERSION = 3
_SCHEMA = "verdict.schema.json"


def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of an array of verdicts, which is what `harness check --json` writes."""
    text = importlib.resources.files("harness.report").joinpath(_SCHEMA).read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def verdict_to_dict(verdict: Verdict) -> dict[str, Any]:
    """Everything a verdict says; NaN and infinities become null, since JSON has none."""
    plain: dict[str, Any] = _plain(
        {
            "version": VERSION,
            "golden": verdict.golden,
            "candidate": verdict.candidate,
            "status": verdict.status.value,
            "ok": verdict.ok,
            "exit_code": verdict.status.exit_code,
            "findings": [_fields(finding, Finding.__slots__) for finding in verdict.findings],
            "answers": [_answer(one) for one in verdict.answers],
            "power": _power(verdict.power),
            "statistics": [_fields(one, Statistic.__slots__) for one in _told(verdict.statistics)],
            "passes": [_fields(one, PassSummary.__slots__) for one in verdict.passes],
            "settings": verdict.settings,
            "environment": [_fields(one, Difference.__slots__) for one in verdict.environment],
            "blame": None if verdict.blame is None else _fields(verdict.blame, Blame.__slots__),
            "sharding": None if verdict.sharding is None else _fields(verdict.sharding, Sharding.__slots__),
            "seconds": round(verdict.seconds, 3),
        }
    )
    return plain


def _told(found: Sequence[Statistic]) -> Iterator[Statistic]:
    """The pooled statistics, and of the groups the one with the largest |z| of each question and name."""
    yield from (one for one in found if one.unit == "all")
    groups = [one for one in found if one.unit != "all"]
    for kind in sorted({(one.question, one.name) for one in groups}):
        yield max((one for one in groups if (one.question, one.name) == kind), key=lambda one: abs(one.z))


def _answer(answer: Answer) -> dict[str, Any]:
    return {
        **_fields(answer, Answer.__slots__),
        "power": _power(answer.power),
        "diagnosis": None if answer.diagnosis is None else _diagnosis(answer.diagnosis),
    }


def _diagnosis(diagnosis: Diagnosis) -> dict[str, Any]:
    likenesses = {name: [_likeness(one) for one in getattr(diagnosis, name)] for name in ("named", "nearest")}
    return {**_fields(diagnosis, Diagnosis.__slots__), **likenesses}


def _likeness(likeness: Likeness) -> dict[str, Any]:
    layers = [_fields(one, Layer.__slots__) for one in likeness.layers]
    return {**_fields(likeness, Likeness.__slots__), "layers": layers}


def _power(power: Power | None) -> dict[str, Any] | None:
    return None if power is None else {**_fields(power, Power.__slots__), "coverage": power.coverage}


def _fields(value: object, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(value, name) for name in names}


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=str)  # a set has no order, and a report that differs at random cannot be compared
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
