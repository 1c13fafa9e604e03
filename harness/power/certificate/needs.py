"""What a bug needs of a suite or a precision to do anything, as far as it is lacking."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from harness.engines import decoding
from harness.mutations.mutation import Mutation
from harness.mutations.stopping import CORRECT
from harness.values import Golden, Run

#: Groups whose bugs show in tokens where texts end.
_OF_ENDS = frozenset({"stopping", "serving"})


def lacking(one: Mutation, runs: Sequence[Run], lengths: Sequence[int], *, text: bool) -> tuple[str, ...]:
    """What a bug needs and no run has; empty where nothing is known to be lacking.

    Args:
        one: the bug.
        runs: of the suite.
        lengths: tokens of each prompt.
        text: whether a prompt is text, and a tokenizer at hand.
    """
    if one.id in CORRECT:
        return ("penalties",)
    if one.shows == "prompt":
        return () if text else ("text",)
    suited, found = list(runs), []
    if one.shows == "tokens" or "free" in one.active:
        suited = [run for run in suited if "generate" in run.views]
        found += [] if suited else ["free"]
    if "decode" in one.active:
        suited = [run for run in suited if {"generate", "replay"} & set(run.views)]
        found += [] if suited or found else ["decode"]
    if "prefill" in one.active:
        suited = [run for run in suited if "prefill" in run.views]
        found += [] if suited or found else ["prefill"]
    # Where no run fits, what its batches should be like is still worth saying.
    shown = {name for run in suited or runs for name in _shapes(run, lengths)}
    found += [name for name in ("padding", "batch", "single") if name in one.active and name not in shown]
    # Where rows are padded there is more than one.
    return tuple(name for name in found if name != "batch" or "padding" not in found)


def _shapes(run: Run, lengths: Sequence[int]) -> Iterator[str]:
    """What the batches of a run are."""
    batches = decoding.plan_batches(lengths, run.batch_size) if run.order == "suite" else [[0]]
    for batch in batches:
        yield "batch" if len(batch) > 1 else "single"
        if len({lengths[index] for index in batch}) > 1:
            yield "padding"


def of_precision(one: Mutation, precision: str) -> tuple[str, ...]:
    """The precision that a bug needs, where this is another."""
    own = dict(one.options).get("dtype")
    if own is not None:
        return () if own == precision else (own,)
    return ("half",) if "half" in one.active and precision == "float32" else ()


def explained(one: Mutation, golden: Golden) -> tuple[str, ...]:
    """What may be lacking where a bug did nothing though all that `lacking` knows of is there."""
    chunk = dict(one.options).get("chunk")
    longest = max(len(request.prompt_ids) for request in golden.requests)
    found = ["long"] if "long" in one.active else []
    found += ["chunk"] if chunk is not None and longest <= int(chunk) else []
    found += ["second"] if wants_second(one, golden) else []
    found += ["eos"] if one.shows == "tokens" and one.group in _OF_ENDS and not _ends_apart(golden) else []
    return tuple(found)


def _ends_apart(golden: Golden) -> bool:
    """Whether texts end, and one before another."""
    ended = any(one.finish == "eos" for one in golden.generations)
    return golden.suite.stop == "eos" and ended and len({len(one.tokens) for one in golden.generations}) > 1


def wants_second(one: Mutation, golden: Golden) -> bool:
    """Whether a bug shows in what comes second alone, and no run of the suite has an order for that."""
    return "second" in one.active and all(run.order == "suite" for run in golden.suite.runs)
