"""What the templates of the bug catalogue say of an error, as lines of a report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from harness.values import Answer, Diagnosis, Likeness

_SHOWN = 3


def diagnosis_lines(answer: Answer) -> list[str]:
    """Of one question; none where templates were not asked for."""
    if answer.diagnosis is None:
        return []
    return [f"{answer.question}: {line}" for line in _lines(answer.diagnosis)]


def _lines(diagnosis: Diagnosis) -> Iterator[str]:
    if diagnosis.reason:
        yield f"no bug can be named: {diagnosis.reason}"
        return
    named, limit = (
        diagnosis.named,
        f"|z| of {diagnosis.templates} templates stays below {diagnosis.limit:.1f} by chance",
    )
    if named:
        for one in named:
            yield f"looks like {likeness_words(one)}: {one.wrong}"
        others = [one for one in diagnosis.nearest if one.name not in {bug.name for bug in named}]
        nearest = f"; next best {likeness_words(others[0])}" if others else ""
        yield f"the largest {limit}{nearest}"
    else:
        nearest = ", ".join(map(likeness_words, diagnosis.nearest)) or "none"
        yield f"like no bug of the catalogue: the largest {limit}; nearest {nearest}"
    if diagnosis.residual:
        yield f"left over: {'; '.join(diagnosis.residual)}"
    if small := untestable_words(diagnosis.untestable):
        yield f"too small to be seen in this suite: {small}"


def likeness_words(one: Likeness) -> str:
    """``na-gelu (a = 1.02, z = 12)``, with the bugs that are the same on this suite."""
    others = "".join(f" or {alias}" for alias in one.aliases[:_SHOWN])
    more = f" or {len(one.aliases) - _SHOWN} more" if len(one.aliases) > _SHOWN else ""
    return f"{one.name}{others}{more} (a = {one.coefficient:.2f}, z = {one.z:.1f})"


def untestable_words(untestable: Mapping[str, float]) -> str:
    """The bugs that a suite is too small for, those that need least first."""
    # One that has no row in what the candidate shows no number of tokens would show.
    ordered = sorted((pair for pair in untestable.items() if math.isfinite(pair[1])), key=lambda pair: pair[1])
    told = ", ".join(f"{name} ({multiple:.2g} x the tokens would do)" for name, multiple in ordered[:_SHOWN])
    return told + (f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else "")
