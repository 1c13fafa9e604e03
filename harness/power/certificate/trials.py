"""Bugs that templates cannot tell, put into the model one after another and checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path

from harness import flow
from harness.engines import hf
from harness.engines.spec import parse_spec
from harness.errors import HarnessError
from harness.mutations.mutation import Mutation
from harness.power.certificate.needs import explained
from harness.power.certificate.value import Seen, Sight
from harness.power.opening import Kept, spec_text
from harness.report.characters import one_line
from harness.values import Golden, Status

Progress = Callable[[str], None]

_LOOKS_LIKE = "looks like"
#: A verdict that nobody takes for a pass because of what the candidate did.
_RED = frozenset({Status.DEVIATES, Status.STRUCTURAL, Status.NONDETERMINISTIC, Status.ERROR})
#: Bugs with one of these may show in other runs than templates are of.
_ELSEWHERE = frozenset({"second", "single", "free"})


def is_rounding(one: Mutation, precision: str) -> bool:
    """Whether a bug rounds what this precision may round already: templates, made in float32, cannot tell."""
    return one.group == "precision" and precision != "float32"


def is_tried(one: Mutation, precision: str, sight: Sight, others: int) -> bool:
    """Whether a bug that is not seen yet is put into the model.

    Args:
        one: the bug.
        precision: that it would compute in.
        sight: what is known of it.
        others: runs of the suite beside the one that templates are of.
    """
    if sight.seen in ("size", "tried") or sight.needs:
        return False
    if one.shows != "logits" or "half" in one.active or is_rounding(one, precision):
        return True
    # What changes nothing in the run that templates are of may change other runs.
    return others > 0 and (sight.signal is None or bool(one.active & _ELSEWHERE))


def trials(
    asked: Sequence[Mutation],
    sights: Mapping[str, Mapping[str, Sight]],
    absent: Mapping[str, str],
    golden: Golden,
    model: Path,
    progress: Progress,
) -> Iterator[tuple[Mutation, str, Sight | None]]:
    """(bug, precision, what a check says of it) of each that is tried; None where the model lacks the part."""
    others = len(golden.suite.runs) - 1
    wanted = [
        (precision, one.options, one)
        for one in asked
        if one.id not in absent
        for precision, sight in sights[one.id].items()
        if is_tried(one, precision, sight, others)
    ]
    # One engine is open at a time, for all bugs that run in it.
    wanted.sort(key=lambda each: each[:2])
    number = 0
    for (precision, options), members in groupby(wanted, key=lambda each: each[:2]):
        text = spec_text({**dict(options), "dtype": precision})
        with hf.build(parse_spec(text), model=str(model)) as engine:
            for _, _, one in members:
                number += 1
                progress(f"trial {number} of {len(wanted)}: {one.id} in {precision}")
                yield one, precision, _trial(golden, model, engine, text, one)


def _trial(golden: Golden, model: Path, engine: hf.HFEngine, text: str, one: Mutation) -> Sight | None:
    with ExitStack() as stack:
        try:
            stack.enter_context(one.applied(engine))
        except (HarnessError, LookupError, AttributeError, TypeError, ValueError, RuntimeError):
            return None  # as templates/making.py has it: the model lacks the part
        # Only of these templates may say something that the first look at them could not.
        diagnose = one.group == "precision" and "half" not in one.active
        verdict = flow.check(golden, Kept(engine, spec=text), reference=model, upcast=False, diagnose=diagnose)
    status = verdict.answers[-1].status if verdict.answers else verdict.status
    if status in _RED:
        red = [each for each in verdict.findings if each.status is status]
        found = f": {one_line(red[0].message)}" if red else ""
        seen: Seen = "name" if red and all(each.check == _LOOKS_LIKE for each in red) else "tried"
        return Sight(seen=seen, weakest=max(one.strengths), why=f"{status.value}{found}")
    return Sight(seen="not", needs=explained(one, golden), why=f"tried, and {status.value}")
