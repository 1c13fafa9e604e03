"""compare: two goldens prompt by prompt, or a golden and a trace."""

from __future__ import annotations

from pathlib import Path

from harness import store
from harness.changes import compare_goldens
from harness.errors import UsageError
from harness.flow.checking import check
from harness.traces import load_trace
from harness.values import Changes, Golden, Trace, Verdict


def compare(a: Golden | Trace | str | Path, b: Golden | Trace | str | Path) -> Changes | Verdict:
    """What differs between an old golden and a new one; or the verdict on a trace.

    Args:
        a: a golden, or the directory of one.
        b: a golden or a trace, or where one lies.

    Returns:
        Changes for two goldens, a Verdict for a golden and a trace.

    Raises:
        HarnessError: for what cannot be read, and for two traces: only a golden says how much is round-off.
    """
    first, second = _read(a), _read(b)
    if isinstance(first, Golden) and isinstance(second, Golden):
        return compare_goldens(first, second)
    if isinstance(first, Golden) and isinstance(second, Trace):
        return check(first, second)
    if isinstance(first, Trace) and isinstance(second, Golden):
        return check(second, first)
    raise UsageError(
        "two traces do not say how much of their difference is round-off", fix="Compare each of them with a golden"
    )


def _read(given: Golden | Trace | str | Path) -> Golden | Trace:
    if isinstance(given, Golden | Trace):
        return given
    return load_trace(given) if Path(given).is_file() else store.read_golden(given)
