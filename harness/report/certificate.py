"""The sensitivity certificate as text and as JSON."""

from __future__ import annotations

import math
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from harness.numerics.constants import CATCH
from harness.report.characters import one_line

if TYPE_CHECKING:
    from harness.power.certificate import Bug, Certificate, Column
    from harness.power.certificate.suggestions import Suggestion

#: Its name beside golden.json.
NAME = "certificate.json"
VERSION = 1
#: How bugs are seen, as they are counted.
SEEN = ("size", "tried", "name", "not")

_WIDTH, _FIRST = 120, 20
_SHORT = ("float32", "bfloat16")


# --- text --------------------------------------------------------------------------------------


def certificate_to_text(certificate: Certificate) -> str:
    """The whole certificate, plain text of 120 columns without a final newline."""
    from harness.power.certificate.suggestions import suggestions

    lines = [_headline(certificate), *_legend(certificate)]
    lines += ["", *_table(certificate)]
    lines += ["", *_wrapped(_limits(certificate))]
    for name in _SHORT:
        if any(column.precision == name for column in certificate.columns):
            lines += ["", *_wrapped(_unseen(certificate, name))]
    found = suggestions(certificate)
    lines += ["", "to see more" if found else "to see more: nothing that is known"]
    lines += [line for one in found for line in _wrapped([_suggestion_words(one)])]
    lines += ["", *_wrapped([*_aside(certificate), *_cost(certificate)])]
    return "\n".join(lines)


def certificate_summary(certificate: Certificate) -> str:
    """A line for each precision, for `harness record`."""
    from harness.power.certificate.suggestions import counts_of

    lines = []
    for column in certificate.columns:
        counts = counts_of(certificate.bugs, column.precision)
        plain = counts["size"] + counts["tried"]
        lines.append(
            f"  {column.precision}: {plain} of {counts['of']} bugs of the catalogue turn a check red, "
            f"{counts['name']} more with --diagnose, {counts['not']} are not seen{_alarm(column)}"
        )
    return "\n".join(lines)


def _headline(certificate: Certificate) -> str:
    return one_line(
        f"{certificate.model} on {certificate.suite}: what a check sees of the {len(certificate.bugs)} bugs of the "
        f"catalogue that a model of type {certificate.model_type} with these parts can have"
    )


def _legend(certificate: Certificate) -> Iterator[str]:
    views = " and ".join(certificate.views)
    yield from _wrapped(
        [
            one_line(
                f"{certificate.prompts} prompts, {certificate.rows} positions, the longest "
                f"sequence {certificate.longest} tokens; templates are of the run {certificate.run!r} ({views})"
            ),
            f"size: red by the size of the error alone, with a probability of {CATCH:.0%}; tried: put into the model "
            "and checked, and red; name: with --diagnose alone; not: neither",
            "float32 is the function: what an engine is judged by whose copy can be widened to float32. The others "
            "are the precision: all there is of a black box or with --no-upcast",
        ]
    )


def _table(certificate: Certificate) -> Iterator[str]:
    columns = [column.precision for column in certificate.columns]
    yield " " * _FIRST + "".join(f"{name:<27}" for name in columns).rstrip()
    yield f"{'group':<{_FIRST}}" + "".join("size tried name  not  of   " for _ in columns).rstrip()
    groups = dict.fromkeys(bug.group for bug in certificate.bugs)
    for group in groups:
        yield _row(group, [bug for bug in certificate.bugs if bug.group == group], columns)
    yield _row("all", certificate.bugs, columns)


def _row(name: str, bugs: Sequence[Bug], columns: Sequence[str]) -> str:
    from harness.power.certificate.suggestions import counts_of

    cells = []
    for column in columns:
        counts = counts_of(bugs, column)
        size, tried, named, unseen, total = (counts[key] for key in (*SEEN, "of"))
        cells.append(f"{size:>4} {tried:>5} {named:>4} {unseen:>4} {total:>3}   ")
    return f"{name:<{_FIRST}}" + "".join(cells).rstrip()


def _limits(certificate: Certificate) -> Iterator[str]:
    for column in certificate.columns:
        parts = [f"{column.precision}: the reference itself is {column.status.value}{_alarm(column)}"]
        if column.smallest is not None:
            parts.append(f"an error of {column.smallest:.3g} x round-off over all positions is red")
        if column.limit is not None:
            parts.append(f"a bug is named beyond |z| = {column.limit:.1f}")
        yield ", ".join(parts)


def _alarm(column: Column) -> str:
    return "" if column.status.ok else f" (the gate is of no use in {column.precision}: the right model is not ok)"


def _unseen(certificate: Certificate, name: str) -> Iterator[str]:
    told = [f"{bug.id} ({_reason(bug, name)})" for bug in certificate.bugs if bug.sights[name].seen == "not"]
    yield f"not seen in {name} ({len(told)}): {', '.join(told) or 'none'}"
    weak = [
        f"{bug.id} {weakest:g}"
        for bug in certificate.bugs
        if (weakest := bug.sights[name].weakest) is not None and weakest < 1
    ]
    if weak:
        yield f"the weakest strength still seen in {name}, of 1 as reported: {', '.join(weak)}"


def _reason(bug: Bug, name: str) -> str:
    sight = bug.sights[name]
    if sight.tokens is not None:
        return f"{count_words(sight.tokens)} x the tokens"
    return f"needs {' and '.join(sight.needs)}" if sight.needs else sight.why or "not known"


def _suggestion_words(one: Suggestion) -> str:
    of = f" [{', '.join(one.precisions)}]" if one.precisions else ""
    return f"- {one.what}{of}: {', '.join(one.ids)}"


def _aside(certificate: Certificate) -> Iterator[str]:
    from harness.power.certificate.suggestions import BEYOND, unexplained

    by_options: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for bug in certificate.bugs:
        if bug.options and any(sight.seen != "not" for sight in bug.sights.values()):
            by_options[bug.options].append(bug.id)
    for options, ids in by_options.items():
        yield f"seen only of a candidate that runs so, as hf:{','.join(options)} does: {', '.join(ids)}"
    for need, why in BEYOND.items():
        beyond = [bug.id for bug in certificate.bugs if any(need in sight.needs for sight in bug.sights.values())]
        if beyond:
            yield f"out of reach ({why}): {', '.join(beyond)}"
    if left := unexplained(certificate):
        yield f"not seen in any precision, and nothing is known that would show them: {', '.join(left)}"
    if certificate.absent:
        yield f"not counted, since this model has no such part: {', '.join(sorted(certificate.absent))}"


def _cost(certificate: Certificate) -> Iterator[str]:
    yield (
        f"cost: templates {certificate.seconds:.0f} s and {certificate.size / 1e6:.1f} MB, once for a golden; "
        f"{certificate.trials} trials and the reference itself {certificate.trial_seconds:.0f} s"
    )


def _wrapped(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        yield from textwrap.wrap(line, _WIDTH, subsequent_indent="    ", break_on_hyphens=False, break_long_words=False)


def count_words(value: float) -> str:
    """A positive number with two significant digits and no exponent: "1.9", "270", "1,400,000"."""
    rounded = float(f"{value:.1e}")
    return f"{rounded:,.{max(0, 1 - math.floor(math.log10(rounded)))}f}"


# --- JSON --------------------------------------------------------------------------------------


def certificate_to_dict(certificate: Certificate) -> dict[str, Any]:
    """Plain JSON types; what is not finite becomes null."""
    from harness.power.certificate.suggestions import counts_of, suggestions

    plain = ("golden", "digest", "model", "model_type", "suite", "run", "prompts", "rows", "longest", "seconds", "size")
    return {
        "version": VERSION,
        **{name: getattr(certificate, name) for name in plain},
        "trials": certificate.trials,
        "trial_seconds": certificate.trial_seconds,
        "views": list(certificate.views),
        "landmarks": dict(certificate.landmarks),
        "versions": dict(certificate.versions),
        "precisions": [
            {
                "precision": column.precision,
                "status": column.status.value,
                "smallest": _number(column.smallest),
                "limit": _number(column.limit),
                **counts_of(certificate.bugs, column.precision),
            }
            for column in certificate.columns
        ],
        "bugs": [_bug(bug) for bug in certificate.bugs],
        "absent": dict(certificate.absent),
        "suggestions": [
            {"what": one.what, "precisions": list(one.precisions), "ids": list(one.ids)}
            for one in suggestions(certificate)
        ],
    }


def _bug(bug: Bug) -> dict[str, Any]:
    return {
        "id": bug.id,
        "group": bug.group,
        "wrong": bug.wrong,
        "shows": bug.shows,
        "options": list(bug.options),
        "sights": {
            precision: {
                "seen": sight.seen,
                "signal": _number(sight.signal),
                "z": _number(sight.z),
                "weakest": _number(sight.weakest),
                "tokens": _number(sight.tokens),
                "needs": list(sight.needs),
                "why": sight.why,
            }
            for precision, sight in bug.sights.items()
        },
    }


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
