"""An old golden against a new one: what an update would change, prompt by prompt, and whether round-off explains it.

Arrays in, values out: no engine runs here. `prompts` judges the numbers of a prompt, `general` what is of no prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from harness import environment
from harness.changes import general
from harness.changes.prompts import Compared, Shared, Yardstick, compare_prompt, shared_rows, yardstick
from harness.numerics.constants import EFFECT
from harness.values import Change, Changes, Golden, Kind, first_difference

__all__ = ["Compared", "Yardstick", "compare_goldens", "compare_prompt", "yardstick"]


def compare_goldens(old: Golden, new: Golden) -> Changes:
    """What differs from an old golden to a new one. Prompts are matched by their ids; their order does not matter.

    A prompt is `same` when every stored number of it is equal to the bit; `drift` when its error is within the limit
    that the old golden's replicas set for a prompt, in the finest precision that has a floor; `tie` when a token
    differs that round-off there can turn; `bug-sized` beyond either; `structural` when it is another prompt.

    Args:
        old: the golden that is believed.
        new: the one that would take its place.
    """
    before = {request.id: index for index, request in enumerate(old.requests)}
    after = {request.id: index for index, request in enumerate(new.requests)}
    comparable = old.vocabulary == new.vocabulary
    yard = yardstick(old, new) if comparable else None
    prompts, pairs, shared = [], list[tuple[int, int]](), list[Shared]()
    for name, index in before.items():
        other = after.get(name)
        if other is None:
            prompts.append(_structural(name, "removed"))
        elif old.requests[index].prompt_ids != new.requests[other].prompt_ids:
            prompts.append(_structural(name, _other_ids(old, index, new, other)))
        elif not comparable:
            prompts.append(_structural(name, "of another vocabulary"))
        else:
            prompts.append(_of_prompt(old, index, new, other, yard))
            pairs.append((index, other))
            shared.append(shared_rows(old, index, new, other))
    prompts += [_structural(name, "added") for name in after if name not in before]
    differ = any(one.kind is Kind.STRUCTURAL for one in prompts)
    ids_differ = any(
        old.requests[before[name]].prompt_ids != new.requests[after[name]].prompt_ids
        for name in before
        if name in after
    )
    return Changes(
        old=old.name,
        new=new.name,
        prompts=tuple(prompts),
        general=(
            *general.of_model(old, new, ids_differ=ids_differ),
            *general.of_suite(old, new, prompts_differ=differ),
            *general.of_floors(old, new, pairs, shared),
            *general.of_centres(old, new, shared),
            *general.of_directions(
                old, new, shared, yard.floor.sigma if yard else None, EFFECT[yard.precision] if yard else 0.0
            ),
        ),
        environment=environment.differences(_environment(old), _environment(new)),
    )


def _environment(golden: Golden) -> dict[str, Any]:
    """Versions and machine, and of the settings what is one word; digests have lines of their own."""
    words = {
        name: value
        for name, value in _mapping(golden.provenance.get("settings")).items()
        if isinstance(value, str | int) and name not in ("checkpoint", "signature")
    }
    return {**golden.provenance, "machine": {**_mapping(golden.provenance.get("machine")), **words}}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _of_prompt(old: Golden, index: int, new: Golden, other: int, yard: Yardstick | None) -> Change:
    change = compare_prompt(old, index, new, other, yard).change
    was, now = old.requests[index].max_new_tokens, new.requests[other].max_new_tokens
    if was != now:
        return replace(change, kind=Kind.STRUCTURAL, message=f"up to {now} new tokens, was {was}")
    before, after = old.generations[index], new.generations[other]
    if change.step is None and before != after:
        words = (
            f"ends by {after.finish} after {len(after.tokens)} tokens, was {before.finish} after {len(before.tokens)}"
        )
        return replace(change, kind=Kind.STRUCTURAL, message=words)
    return change


def _structural(name: str, message: str) -> Change:
    return Change(prompt=name, kind=Kind.STRUCTURAL, message=message)


def _other_ids(old: Golden, index: int, new: Golden, other: int) -> str:
    was, now = old.requests[index].prompt_ids, new.requests[other].prompt_ids
    first = first_difference(was, now)
    return f"other prompt ids from position {first} on ({len(now)} tokens, was {len(was)})"
