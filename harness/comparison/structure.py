"""Structural checks, before any number: key sets, prompt ids, lengths, vocabulary, settings, NaN pattern, repeats."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations, zip_longest

import numpy as np

from harness.comparison import ranks
from harness.comparison.context import pass_name, request_name
from harness.engines.runner import planned
from harness.values import (
    NOT_USED,
    Finding,
    Generation,
    Golden,
    Pass,
    Rows,
    Run,
    Status,
    Trace,
    View,
    first_difference,
    work_digest,
)


def check(
    golden: Golden, trace: Trace, runs: Sequence[Run] | None = None, *, views: tuple[View, ...] | None = None
) -> list[Finding]:
    """Everything that can be wrong before two numbers are compared.

    ``runs`` are what the candidate was asked to do, the suite's own by default, and ``views`` the only views of
    them that it was asked for, all by default.
    """
    runs = golden.suite.runs if runs is None else runs
    found = list(_suite(golden, trace))
    if found:
        return found  # it answers other questions
    found = [*_settings(trace), *ranks.check(trace), *_vocabulary(golden, trace)]
    if any(one.check == "vocabulary" for one in found):
        return found  # nothing was run
    found += [
        *_prompt_ids(golden, trace),
        *_passes(golden, trace, runs, views),
    ]
    if found:
        return found
    return [
        *_nonfinite(golden, trace),
        *_nonfinite_entries(golden, trace),
        *_extra_columns(golden, trace),
        *_lengths(golden, trace),
        *_entries(golden, trace),
        *_repeats(golden, trace),
    ]


def _structural(check: str, message: str, fix: str, where: str = "") -> Finding:
    return Finding(status=Status.STRUCTURAL, check=check, message=message, where=where, fix=fix)


def _suite(golden: Golden, trace: Trace) -> Iterator[Finding]:
    if trace.suite_digest != golden.suite.digest:
        yield Finding(
            status=Status.STALE,
            check="suite",
            message=f"the trace is of another version of the suite {golden.suite.name!r}",
            fix="Run the candidate again on the golden's suite",
        )
    elif trace.forced and trace.forced != work_digest(golden):
        yield Finding(
            status=Status.STALE,
            check="suite",
            message="the trace was made with other prompt ids or tokens than the golden holds now",
            fix="Run the candidate again on this golden",
        )


def _settings(trace: Trace) -> Iterator[Finding]:
    for key, promised in trace.declared.items():
        actual = trace.settings.get(key)
        if actual != promised and actual != NOT_USED:
            yield _structural(
                "settings",
                f"{trace.engine} says {key}={promised}, but {key}={actual} is in force",
                "Name what runs, or make it run what the name says",
            )
    missing = trace.settings.get("missing_tensors") or []
    if missing:
        named = ", ".join(map(str, missing[:3])) + (", ..." if len(missing) > 3 else "")
        yield _structural(
            "settings",
            f"{len(missing)} tensors were not in the checkpoint and are random: {named}",
            "Write the checkpoint with all tensors",
        )


def _vocabulary(golden: Golden, trace: Trace) -> Iterator[Finding]:
    if trace.vocabulary < golden.vocabulary:
        yield _structural(
            "vocabulary",
            f"the candidate has {trace.vocabulary} logit columns, the reference {golden.vocabulary}",
            "Do not cut the vocabulary; padding it is fine",
        )


def _prompt_ids(golden: Golden, trace: Trace) -> Iterator[Finding]:
    if trace.prompt_ids is None:
        return
    wrong = [
        (i, own)
        for i, (request, own) in enumerate(zip(golden.requests, trace.prompt_ids, strict=False))
        if own != request.prompt_ids
    ]
    if len(trace.prompt_ids) != len(golden.requests):
        yield _structural(
            "prompt ids",
            f"the candidate has {len(trace.prompt_ids)} prompts, the golden {len(golden.requests)}",
            "Run it on the golden's suite",
        )
    elif wrong:
        index, own = wrong[0]
        wanted = golden.requests[index].prompt_ids
        first = first_difference(own, wanted)
        yield _structural(
            "prompt ids",
            f"the candidate's tokenizer encodes {len(wrong)} of {len(golden.requests)} prompts differently: "
            f"{len(own)} ids for {len(wanted)}, first at position {first}",
            "Compare tokenizer files, special tokens (a doubled BOS?) and the chat template",
            where=request_name(golden, index),
        )


def _passes(golden: Golden, trace: Trace, runs: Sequence[Run], views: tuple[View, ...] | None) -> Iterator[Finding]:
    """Exactly the passes that were asked for, each visit of them, with exactly the golden's positions.

    What was asked is derived from the runs and from what the engine can show: a trace that lists itself what it
    had to show could leave out anything.
    """
    asked = [
        (run.name, view, repeat, visit)
        for run, view, repeat, visit in planned(runs, golden.requests, trace.capabilities, views)
    ]
    held = [(one.run, one.view, one.repeat, one.requests) for one in trace.passes]
    for run, view, repeat, visit in asked:
        if (run, view, repeat, visit) not in held:
            yield _structural(
                "passes", f"the output of {run}/{view}, visit {repeat + 1}, is missing", "Show it, or do not run it"
            )
    surplus = [one for one in held if one not in asked or held.count(one) > 1]
    for run, view, repeat, _ in sorted(set(surplus)):
        yield _structural(
            "passes", f"there is an output {run}/{view}, visit {repeat + 1}, that was not asked for", "Check the names"
        )
    if not surplus:
        for one in trace.passes:
            yield from _positions(golden, one)


def _positions(golden: Golden, one: Pass) -> Iterator[Finding]:
    if one.view == "generate":
        if len(one.generations) != len(one.requests):
            yield _structural(
                "lengths",
                f"{len(one.generations)} continuations for {len(one.requests)} prompts",
                "Return one continuation for each prompt, in the order asked",
                where=pass_name(one),
            )
        return
    keep = np.isin(golden.rows.request, one.requests)
    if one.view == "replay":
        keep &= golden.rows.generated
    wanted = _keys(golden.rows, keep)
    shown = set() if one.rows is None else _keys(one.rows, np.ones(len(one.rows), dtype=np.bool_))
    if shown != wanted or (one.rows is not None and len(one.rows) != len(shown)):
        yield _structural(
            "lengths",
            f"logits of {len(shown & wanted)} of {len(wanted)} positions, and {len(shown - wanted)} that do not exist",
            "Show logits at every position asked for, once",
            where=pass_name(one),
        )


def _keys(rows: Rows, keep: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> set[tuple[int, int]]:
    return set(zip(rows.request[keep].tolist(), rows.position[keep].tolist(), strict=True))


def _nonfinite(golden: Golden, trace: Trace) -> Iterator[Finding]:
    for one in trace.passes:
        if one.rows is None:
            continue
        # Any NaN or infinity that is not counted as such is caught too: `not finite`, never `diff > bound`.
        broken = (one.rows.nonfinite > 0) | ~np.isfinite(one.rows.projections).all(axis=1)
        broken |= ~np.isfinite([one.rows.logsumexp, one.rows.logp, one.rows.entropy]).all(axis=0)
        if broken.any():
            first = int(np.flatnonzero(broken)[0])
            yield _structural(
                "finite",
                f"{int(broken.sum())} of {len(broken)} positions hold NaN or infinite logits, the reference none",
                "Look for overflow (fp16 ends at 65,504), masked rows without a key, uninitialised memory",
                where=f"{pass_name(one)}, prompt {request_name(golden, int(one.rows.request[first]))!r}, "
                f"position {int(one.rows.position[first])}",
            )


def _nonfinite_entries(golden: Golden, trace: Trace) -> Iterator[Finding]:
    """A probability of zero is sound for any token but the best: one that a server masks has it."""
    for one in trace.passes:
        if one.view != "generate":
            continue
        values = [
            (index, step, value, rank)
            for index, given in zip(one.requests, one.generations, strict=True)
            for step, row in enumerate(given.top_logits)
            for rank, value in enumerate(row)
        ]
        broken = [
            (index, step)
            for index, step, value, rank in values
            if not math.isfinite(value) and not (rank > 0 and value == -math.inf)
        ]
        if broken:
            index, step = broken[0]
            yield _structural(
                "finite",
                f"{len(broken)} of {len(values)} top entries are NaN or infinite",
                "Look for overflow (fp16 ends at 65,504), masked rows without a key, uninitialised memory",
                where=f"{pass_name(one)}, prompt {request_name(golden, index)!r}, step {step}",
            )


def _extra_columns(golden: Golden, trace: Trace) -> Iterator[Finding]:
    for one in trace.passes:
        if one.rows is None:
            won = [token for given in one.generations for token in given.tokens if token >= golden.vocabulary]
        else:
            won = one.rows.argmax[one.rows.argmax >= golden.vocabulary].tolist()
        if won:
            yield _structural(
                "vocabulary",
                f"a padding column wins {len(won)} times, first token {won[0]} of {golden.vocabulary}",
                "Mask the padded columns of the head with -inf",
                where=pass_name(one),
            )


def _lengths(golden: Golden, trace: Trace) -> Iterator[Finding]:
    """A free run must end where its own tokens end it: at a stop id, or at the limit."""
    stops = set(golden.stop_ids) if golden.suite.stop == "eos" else set()
    for one in trace.passes:
        if one.view != "generate":
            continue
        for index, given in zip(one.requests, one.generations, strict=True):
            limit = golden.requests[index].max_new_tokens
            ends = next((i + 1 for i, token in enumerate(given.tokens[:limit]) if token in stops), None)
            wanted = (ends, "eos") if ends is not None else (limit, "length")
            if (len(given.tokens), given.finish) != wanted:
                yield _structural(
                    "lengths",
                    f"the continuation has {len(given.tokens)} tokens and ends by {given.finish!r}; "
                    f"its own tokens end it at {wanted[0]} by {wanted[1]!r}",
                    "Check stop ids, the token limit and how finished rows of a batch are treated",
                    where=f"{pass_name(one)}, prompt {request_name(golden, index)!r}",
                )


def _entries(golden: Golden, trace: Trace) -> Iterator[Finding]:
    """Top entries are there for each token or, from an engine that does not promise them, for none."""
    promised = "top_logprobs" in trace.capabilities
    for one in trace.passes:
        if one.view != "generate":
            continue
        for index, given in zip(one.requests, one.generations, strict=True):
            wanted = len(given.tokens) if promised or given.top_ids or given.top_logits else 0
            ids, values = list(map(len, given.top_ids)), list(map(len, given.top_logits))
            if ids != values or len(ids) != wanted or 0 in ids:
                yield _structural(
                    "lengths",
                    f"top entries of {len(ids)} steps, with values of {len(values)}, for {len(given.tokens)} tokens",
                    "Show the best tokens of each step, each with its value",
                    where=f"{pass_name(one)}, prompt {request_name(golden, index)!r}",
                )


def _repeats(golden: Golden, trace: Trace) -> Iterator[Finding]:
    """The first and the last visit of A-B-A must agree, to the bit for an engine that calls itself deterministic."""
    by_key: dict[tuple[str, str, tuple[int, ...]], list[Pass]] = {}
    for one in trace.passes:
        by_key.setdefault((one.run, one.view, one.requests), []).append(one)
    for seen in by_key.values():
        for first, again in combinations(seen, 2):
            deterministic = "deterministic" in trace.capabilities
            place = _first_difference(first, again, exact=deterministic)
            if place is None:
                continue
            yield Finding(
                status=Status.NONDETERMINISTIC if deterministic else Status.DRIFT,
                check="repeat",
                message=f"the same request gives other bits the second time, first at generated step {place}",
                where=f"{pass_name(first)}, prompt {request_name(golden, first.requests[0])!r}",
                why="the engine declares itself deterministic, so every bit is asked for"
                if deterministic
                else "judged against round-off like any other pass",
                fix="Look for state kept from an earlier request (cache, position counters), dropout, atomic sums",
            )


def _first_difference(first: Pass, again: Pass, *, exact: bool) -> int | None:
    """The first generated step at which two visits differ, None where they do not.

    Rows differ in any bit. Free runs differ in tokens or end and, where ``exact`` is asked, in any bit of their top
    entries: elsewhere these are judged as numbers.
    """
    if first.rows is None or again.rows is None:
        for a, b in zip(first.generations, again.generations, strict=True):
            one, other = _steps(a, exact=exact), _steps(b, exact=exact)
            if (one, a.finish) != (other, b.finish):
                # Of equal steps only the end can differ, which is behind the last of them.
                found = first_difference(one, other)
                return len(one) if found is None else found
        return None
    differs = first.rows.fingerprint != again.rows.fingerprint
    return int(np.flatnonzero(differs)[0]) if differs.any() else None


def _steps(given: Generation, *, exact: bool) -> list[tuple[object, ...]]:
    """What a free run shows of each step: its token and, where ``exact`` is asked, its top entries."""
    if not exact:
        return [(token,) for token in given.tokens]
    return list(zip_longest(given.tokens, given.top_ids, given.top_logits))
