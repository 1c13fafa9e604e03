"""compare: two goldens prompt by prompt, a golden and a trace, or two traces of one golden."""

from __future__ import annotations

from pathlib import Path

from harness import store
from harness.changes import compare_goldens
from harness.comparison.pairs import rows_of
from harness.errors import UsageError
from harness.flow.checking import check
from harness.flow.references import read
from harness.traces import load_trace
from harness.values import Changes, Golden, Pair, Trace, Verdict


def compare(
    a: Golden | Trace | str | Path, b: Golden | Trace | str | Path, *, golden: Golden | str | Path | None = None
) -> Changes | Verdict | Pair:
    """What differs between an old golden and a new one, the verdict on a trace, or how far two traces are apart.

    Args:
        a: a golden or a trace, or where one lies.
        b: a golden or a trace, or where one lies.
        golden: of two traces, or its directory: it says how much of their difference is round-off.

    Returns:
        Changes for two goldens, a Verdict for a golden and a trace, a Pair for two traces.

    Raises:
        HarnessError: for what cannot be read, and for two traces without a golden.
    """
    first, second = _read(a), _read(b)
    if golden is not None and not (isinstance(first, Trace) and isinstance(second, Trace)):
        raise UsageError("a golden beside the two is of two traces alone", fix="Leave --golden (golden=) out")
    if isinstance(first, Golden) and isinstance(second, Golden):
        return compare_goldens(first, second)
    if isinstance(first, Golden) and isinstance(second, Trace):
        return check(first, second)
    if isinstance(first, Trace) and isinstance(second, Golden):
        return check(second, first)
    assert isinstance(first, Trace)
    assert isinstance(second, Trace)
    if golden is None:
        fix = "Add --golden DIR (in Python golden=), the golden that both were made of"
        raise UsageError("two traces do not say how much of their difference is round-off", fix=fix)
    found = read(golden)
    verdicts = check(found, first), check(found, second)
    rows = rows_of(found, first, second) if all(one.answers for one in verdicts) else ()
    return Pair(first=verdicts[0], second=verdicts[1], rows=rows)


def _read(given: Golden | Trace | str | Path) -> Golden | Trace:
    if isinstance(given, Golden | Trace):
        return given
    return load_trace(given) if Path(given).is_file() else store.read_golden(given)
