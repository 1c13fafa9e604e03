"""golden-harness: is it still the same model? The public names, and nothing else."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.flow import check, record, reference_model
    from harness.store import read_golden as load_golden
    from harness.suites import load_suite
    from harness.values import Finding, Golden, Power, Status, Suite, Trace, Verdict

__all__ = [
    "Finding",
    "Golden",
    "Power",
    "Status",
    "Suite",
    "Trace",
    "Verdict",
    "check",
    "load_golden",
    "load_suite",
    "record",
    "reference_model",
]

# Imported when first used: `harness --help` must not wait for numpy, let alone for torch.
_HOMES = {
    "check": ("harness.flow", "check"),
    "load_golden": ("harness.store", "read_golden"),
    "load_suite": ("harness.suites", "load_suite"),
    "record": ("harness.flow", "record"),
    "reference_model": ("harness.flow", "reference_model"),
    **{
        name: ("harness.values", name) for name in ("Finding", "Golden", "Power", "Status", "Suite", "Trace", "Verdict")
    },
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'harness' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
