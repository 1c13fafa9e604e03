"""Verdicts as plain JSON types."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from harness.values import Finding, PassSummary, Power, Verdict

#: Raised when a key changes its meaning or goes away.
VERSION = 1


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
            "power": None
            if verdict.power is None
            else {**_fields(verdict.power, Power.__slots__), "coverage": verdict.power.coverage},
            "passes": [_fields(one, PassSummary.__slots__) for one in verdict.passes],
            "settings": verdict.settings,
            "seconds": round(verdict.seconds, 3),
        }
    )
    return plain


def _fields(value: object, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(value, name) for name in names}


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, frozenset)):
        return [_plain(item) for item in value]
    return value
