"""What the templates of the bug catalogue say of an error, as lines of a report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from harness.values import Answer, Diagnosis, Layer, Likeness

_SHOWN = 3
#: Standard errors that a block's coefficient lies from the midpoint of with and without, to be said to be either.
_SURE = 2.0


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
            yield f"looks like {likeness_words(one)}{_joined(one.layers)}: {one.wrong}"
        others = [one for one in diagnosis.nearest if one.name not in {bug.name for bug in named}]
        nearest = f"; next best {likeness_words(others[0])}" if others else ""
        yield f"the largest {limit}{nearest}"
    else:
        hints = [one for one in diagnosis.nearest if one.layers]
        for one in hints:
            yield f"looks like {one.name} {layer_words(one.layers)}, a hint: {one.wrong}"
        nearest = ", ".join(map(likeness_words, diagnosis.nearest)) or "none"
        yield f"like no bug of the catalogue{' as a whole' if hints else ''}: the largest {limit}; nearest {nearest}"
    if diagnosis.residual:
        yield f"left over: {'; '.join(diagnosis.residual)}"
    if small := untestable_words(diagnosis.untestable):
        yield f"too small to be seen in this suite: {small}"


def likeness_words(one: Likeness) -> str:
    """``na-gelu (a = 1.02, z = 12)``, with the bugs that are the same on this suite."""
    others = "".join(f" or {alias}" for alias in one.aliases[:_SHOWN])
    more = f" or {len(one.aliases) - _SHOWN} more" if len(one.aliases) > _SHOWN else ""
    return f"{one.name}{others}{more} (a = {one.coefficient:.2f}, z = {one.z:.1f})"


def _joined(layers: Sequence[Layer]) -> str:
    told = layer_words(layers)
    return f" {told}" if told else ""


def layer_words(layers: Sequence[Layer]) -> str:
    """``in every block (a = 0.93 to 1.05)``, ``in block 3 alone (a = 0.98; the others within 0.06)``; "" for none.

    A part has the bug when its coefficient is above half of the largest, and has it not when it is below; one too near
    to that to tell is said to be so.
    """
    if not layers:
        return ""
    top = max((one.coefficient for one in layers), key=abs)
    half, sign = abs(top) / 2, math.copysign(1.0, top)
    sure = [one for one in layers if abs(sign * one.coefficient - half) >= _SURE * one.error]
    inside = [one for one in sure if sign * one.coefficient >= half]
    outside = [one for one in sure if sign * one.coefficient < half]
    unknown = [one for one in layers if one not in sure]
    if not inside:
        return "in blocks that cannot be told"
    told = [f"a = {_range(inside)}"]
    if outside:
        largest = max(abs(one.coefficient) for one in outside)
        told.append(f"the others within {largest:.2g}")
    if unknown:
        told.append(f"{_parts(unknown)} cannot be told")
    where = f"in {_parts(inside)}"
    if len(layers) == 1:
        where += ", where alone it changes anything"
    elif not outside and not unknown:
        where = "in every block"
    elif len(inside) == 1 and not unknown:
        where += " alone"
    return f"{where} ({'; '.join(told)})"


def _range(layers: Sequence[Layer]) -> str:
    low, high = (f"{end(one.coefficient for one in layers):.2f}" for end in (min, max))
    return low if low == high else f"{low} to {high}"


def _parts(layers: Sequence[Layer]) -> str:
    """``block 3``, ``blocks 0 and 4``, ``blocks 0 to 3 and outside the blocks``."""
    groups = [one.blocks for one in layers if one.blocks]
    numbers = [str(group[0]) if len(group) == 1 else f"{group[0]} to {group[-1]}" for group in groups]
    told = []
    if numbers:
        several = len(numbers) > 1 or " to " in numbers[0]
        told.append(f"block{'s' if several else ''} {_and(numbers)}")
    if len(numbers) < len(layers):
        told.append("what is outside the blocks")
    return " and ".join(told)


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def untestable_words(untestable: Mapping[str, float]) -> str:
    """The bugs that a suite is too small for, those that need least first."""
    # One that has no row in what the candidate shows no number of tokens would show.
    ordered = sorted((pair for pair in untestable.items() if math.isfinite(pair[1])), key=lambda pair: pair[1])
    told = ", ".join(f"{name} ({multiple:.2g} x the tokens would do)" for name, multiple in ordered[:_SHOWN])
    return told + (f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else "")
