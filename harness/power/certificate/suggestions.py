"""What would show the bugs that a certificate does not see."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from harness.power.certificate.value import Bug, Certificate
from harness.report.certificate import SEEN, count_words

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


def counts_of(bugs: Iterable[Bug], precision: str) -> dict[str, int]:
    """How many bugs are seen in which way, with "of" for all."""
    found = Counter[str](bug.sights[precision].seen for bug in bugs)
    return {**{name: found[name] for name in SEEN}, "of": sum(found.values())}


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
