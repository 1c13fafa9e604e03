"""golden-harness: is it still the same model? The public names, and nothing else."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.flow import check, compare, locate, record, reference_model, run
    from harness.locate.where import Where
    from harness.store import read_golden as load_golden
    from harness.suites import load_suite
    from harness.traces import load_trace
    from harness.values import Changes, Finding, Golden, Power, Status, Suite, Trace, Verdict

__all__ = [
    "Changes",
    "Finding",
    "Golden",
    "Power",
    "Status",
    "Suite",
    "Trace",
    "Verdict",
    "Where",
    "check",
    "compare",
    "load_golden",
    "load_suite",
    "load_trace",
    "locate",
    "record",
    "reference_model",
    "run",
]

# Imported when first used: `harness --help` must not wait for numpy, let alone for torch.
_HOMES = {
    "check": ("harness.flow", "check"),
    "compare": ("harness.flow", "compare"),
    "load_golden": ("harness.store", "read_golden"),
    "load_suite": ("harness.suites", "load_suite"),
    "load_trace": ("harness.traces", "load_trace"),
    "locate": ("harness.flow", "locate"),
    "record": ("harness.flow", "record"),
    "reference_model": ("harness.flow", "reference_model"),
    "run": ("harness.flow", "run"),
    "Where": ("harness.locate.where", "Where"),
    **{
        name: ("harness.values", name)
        for name in ("Changes", "Finding", "Golden", "Power", "Status", "Suite", "Trace", "Verdict")
    },
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'harness' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
