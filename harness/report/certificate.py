"""The sensitivity certificate as text and as JSON, and the line of a verdict that refers to one beside its golden."""

from __future__ import annotations

import json
import math
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.numerics.constants import CATCH
from harness.report.characters import one_line

if TYPE_CHECKING:
    from harness.power.certificate import Bug, Certificate, Column
    from harness.values import Answer, Verdict

#: Its name beside golden.json.
NAME = "certificate.json"
VERSION = 1

_GOLDEN = "golden.json"
_LARGEST, _LARGEST_GOLDEN = 4 * 2**20, 64 * 2**20
_WIDTH, _FIRST = 120, 20
_SEEN = ("size", "tried", "name", "not")
_SHORT = ("float32", "bfloat16")
#: Multiples of the tokens beyond this are told of a bug, and suggested to nobody.
_SENSIBLE = 2**10

#: What a bug needs that is not there, in words; {longest} and {lengths} are the certificate's.
NEEDS: Mapping[str, str] = {
    "batch": "a run that puts two prompts or more into one batch",
    "padding": "prompts of unequal length in one batch (a run with a batch_size takes them in order)",
    "single": "a run with batch_size = 1",
    "decode": 'a run with the view "replay"',
    "prefill": 'a run with the view "prefill"',
    "free": 'a run with the view "generate"',
    "second": 'a run with order = "A-B-A"',
    "long": "longer prompts (the longest sequence has {longest} tokens{lengths})",
    "chunk": "a prompt that is longer than one piece",
    "eos": 'stop = "eos", with prompts whose texts end at different steps',
    "text": "prompts that are text, and a tokenizer",
    "half": "a floor for 16 bits, and a candidate judged in them as shipped",
    "float32": "a floor for float32, and a candidate that computes in it",
    "bfloat16": "a floor for bfloat16, and a candidate judged in it as shipped",
    "float16": "a floor for float16, and a candidate judged in it as shipped",
}
#: Needs that no suite can meet.
BEYOND: Mapping[str, str] = {"penalties": "greedy goldens ask for no penalties and no stop strings"}
#: Needs that another precision of the same golden meets.
_PRECISIONS = frozenset({"half", "float32", "bfloat16", "float16"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Suggestion:
    """Something to add, and the bugs that it would show.

    Attributes:
        what: in words.
        precisions: in which they are not seen; empty for all.
        ids: of the bugs.
    """

    what: str
    precisions: tuple[str, ...]
    ids: tuple[str, ...]


# --- counts and suggestions --------------------------------------------------------------------


def counts_of(bugs: Iterable[Bug], precision: str) -> dict[str, int]:
    """How many bugs are seen in which way, with "of" for all."""
    found = Counter[str](bug.sights[precision].seen for bug in bugs)
    return {**{name: found[name] for name in _SEEN}, "of": sum(found.values())}


def suggestions(certificate: Certificate) -> list[Suggestion]:
    """What to add to see more: what is there already first, then what suites lack, then more tokens."""
    names = [column.precision for column in certificate.columns]
    found = [
        *_by_name(certificate, names),
        *_elsewhere(certificate, names),
        *_needed(certificate, names),
        *_more_tokens(certificate, names),
    ]
    merged: dict[tuple[str, tuple[str, ...]], tuple[str, ...]] = {}
    for one in found:
        merged[one.what, one.ids] = (*merged.get((one.what, one.ids), ()), *one.precisions)
    return [Suggestion(what=what, precisions=precisions, ids=ids) for (what, ids), precisions in merged.items()]


def unexplained(certificate: Certificate) -> list[str]:
    """Bugs that no precision sees, and of which no suggestion and nothing beyond reach is known."""
    told = {name for one in suggestions(certificate) for name in one.ids}
    beyond = {bug.id for bug in certificate.bugs for sight in bug.sights.values() if set(sight.needs) & set(BEYOND)}
    unseen = [bug.id for bug in certificate.bugs if all(sight.seen == "not" for sight in bug.sights.values())]
    return [name for name in unseen if name not in told | beyond]


def _by_name(certificate: Certificate, names: Sequence[str]) -> Iterator[Suggestion]:
    for name in names:
        if ids := tuple(bug.id for bug in certificate.bugs if bug.sights[name].seen == "name"):
            yield Suggestion(what="check with --diagnose", precisions=(name,), ids=ids)


def _elsewhere(certificate: Certificate, names: Sequence[str]) -> Iterator[Suggestion]:
    """What one precision does not see and another of the golden does."""
    for name in names:
        by_other: dict[str, list[str]] = defaultdict(list)
        for bug in certificate.bugs:
            if bug.sights[name].seen == "not":
                other = next((one for one in names if bug.sights[one].seen != "not"), None)
                by_other[other or ""].append(bug.id)
        for other, ids in by_other.items():
            if other == "float32":
                what = "judge the function too: an engine whose copy can be widened to float32, or a float32 candidate"
                yield Suggestion(what=what, precisions=(name,), ids=tuple(ids))
            elif other:
                what = f"judge a candidate in {other} as shipped too"
                yield Suggestion(what=what, precisions=(name,), ids=tuple(ids))


def _needed(certificate: Certificate, names: Sequence[str]) -> Iterator[Suggestion]:
    """What the suite lacks, for bugs that no precision sees."""
    by_needs: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for bug in certificate.bugs:
        unseen = [bug.sights[name] for name in names if bug.sights[name].seen == "not"]
        if len(unseen) < len(names):
            continue
        # A precision that the golden has, and in which the bug is not seen for another reason, says that reason.
        needs = [one.needs for one in unseen if one.needs and not _met(one.needs, names)]
        for one in dict.fromkeys(needs):
            by_needs[one].append(bug.id)
    for lacking, ids in by_needs.items():
        if not set(lacking) & set(BEYOND):
            words = " and ".join(needs_words(certificate, need) for need in lacking)
            yield Suggestion(what=f"add {words}", precisions=(), ids=tuple(ids))


def _met(needs: Sequence[str], names: Sequence[str]) -> bool:
    """Whether all that is needed is a precision that the golden has."""
    have = {*names, *({"half"} if {"bfloat16", "float16"} & set(names) else set())}
    return set(needs) <= _PRECISIONS & have


def needs_words(certificate: Certificate, need: str) -> str:
    """One need with the certificate's own lengths."""
    words = NEEDS[need]
    told = "".join(f", {name.replace('_', ' ')} {value}" for name, value in certificate.landmarks.items())
    return words.format(longest=certificate.longest, lengths=told) if need == "long" else words


def _more_tokens(certificate: Certificate, names: Sequence[str]) -> Iterator[Suggestion]:
    """Multiples of the tokens, rounded up to powers of two, with what --diagnose would name from there on."""
    for name in names:
        by_power: dict[int, list[str]] = defaultdict(list)
        for bug in certificate.bugs:
            tokens = bug.sights[name].tokens
            if tokens is not None and tokens <= _SENSIBLE:
                by_power[max(1, math.ceil(math.log2(tokens)))].append(bug.id)
        for power, ids in sorted(by_power.items()):
            rows = count_words(certificate.rows * 2**power)
            what = f"{2**power} x the tokens (about {rows} positions), with --diagnose"
            yield Suggestion(what=what, precisions=(name,), ids=tuple(ids))


def count_words(value: float) -> str:
    """A positive number with two significant digits and no exponent: "1.9", "270", "1,400,000"."""
    rounded = float(f"{value:.1e}")
    return f"{rounded:,.{max(0, 1 - math.floor(math.log10(rounded)))}f}"


# --- text --------------------------------------------------------------------------------------


def certificate_to_text(certificate: Certificate) -> str:
    """The whole certificate, plain text of 120 columns without a final newline."""
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
    cells = []
    for column in columns:
        counts = counts_of(bugs, column)
        size, tried, named, unseen, total = (counts[key] for key in (*_SEEN, "of"))
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


# --- JSON --------------------------------------------------------------------------------------


def certificate_to_dict(certificate: Certificate) -> dict[str, Any]:
    """Plain JSON types; what is not finite becomes null."""
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


# --- beside a golden ---------------------------------------------------------------------------


def golden_digest(directory: Path) -> str | None:
    """The digest that a golden's JSON carries; None where there is none to be read."""
    try:
        document = _loaded(directory / _GOLDEN, _LARGEST_GOLDEN)
    except (OSError, ValueError, RecursionError):
        return None
    found = document.get("digest") if isinstance(document, dict) else None
    return found if isinstance(found, str) and found else None


def unseen_lines(directory: Path, verdict: Verdict) -> list[str]:
    """What a verdict says of the certificate beside its golden; empty where there is none, or nothing was compared.

    The file may be another's: nothing of it is shown but numbers.
    """
    path = directory / NAME
    if not path.is_file() or not any(answer.power for answer in verdict.answers):
        return []
    again = f"make it again with harness record --update --certificate --out {directory}"
    try:
        digest, counts = _read(path)
    except (OSError, ValueError, RecursionError):
        return [one_line(f"not seen: {path} cannot be read; {again}")]
    if digest != golden_digest(directory):
        return [one_line(f"not seen: {path} is out of date, the golden is another by now; {again}")]
    told = [words for answer in verdict.answers if (words := _counted(answer, counts))]
    return [one_line(f"not seen: {', '.join(told)}; see {path}")] if told else []


def _counted(answer: Answer, counts: Mapping[str, Mapping[str, int]]) -> str:
    """How many bugs one answer could not see; empty for a precision that the certificate lacks."""
    power = answer.power
    if power is None or power.level == "nothing" or power.precision not in counts:
        return ""
    found = counts[power.precision]
    named = 0 if answer.diagnosis is not None else found["name"]
    # The certificate is of logits: who shows less sees less.
    least = "" if power.level == "logits" else "at least "
    told = f"{least}{found['not'] + named} of {found['of']} bugs of the catalogue in {power.precision}"
    return told + (f" ({found['not']} with --diagnose)" if named else "")


def _read(path: Path) -> tuple[str, dict[str, dict[str, int]]]:
    """Digest and counts by precision.

    Raises:
        OSError, ValueError, RecursionError: for what is no certificate.
    """
    document = _loaded(path, _LARGEST)
    if not isinstance(document, dict) or document.get("version") != VERSION:
        raise ValueError("no certificate of this version")
    digest, rows = document.get("digest"), document.get("precisions")
    if not isinstance(digest, str) or not isinstance(rows, list):
        raise ValueError("no digest or no precisions")
    counts: dict[str, dict[str, int]] = {}
    for row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("precision"), str):
            raise ValueError("a precision without a name")
        numbers = {key: row.get(key) for key in (*_SEEN, "of")}
        known = {key: value for key, value in numbers.items() if type(value) is int and value >= 0}
        if len(known) < len(numbers):
            raise ValueError("a count that is no number")
        counts[row["precision"]] = known
    return digest, counts


def _loaded(path: Path, largest: int) -> Any:
    with path.open("rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"larger than {largest // 2**20} MiB")
    return json.loads(content)
