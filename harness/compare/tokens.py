"""Tokens: a flip inside the step's own noise is a tie and excused; any other is a bug (numerics.md 2.6, T1)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from harness.compare.context import Context, pass_name, request_name
from harness.numerics import metrics
from harness.values import Finding, Pass, Status


def check(context: Context) -> list[Finding]:
    """Judge every flip of every pass, and what no pass has looked at."""
    found = [finding for one in context.trace.passes for finding in _one_pass(context, one)]
    behind = _behind(context)
    if behind and not any(one.view == "replay" for one in context.trace.passes):
        found.append(
            Finding(
                status=Status.UNMEASURED,
                check="tokens",
                message=f"{behind} free-running tokens behind a first divergence, and no replay of these steps",
                fix="Give the suite a run with the view replay",
            )
        )
    return found


def steps(context: Context, one: Pass) -> int:
    """Generated steps that a pass shows tokens of."""
    if one.rows is None:
        return sum(len(context.golden.generations[index].tokens) for index in one.requests)
    return int(one.rows.generated.sum())


def flips(context: Context, one: Pass) -> int:
    """Steps at which the candidate's greedy token is another one than the golden's.

    A free run is compared place by place, so this also counts what follows a first divergence.
    """
    if one.rows is not None:
        return len(_flipped_steps(context, one)[0])
    return sum(
        _differing(context.golden.generations[index].tokens, given.tokens)
        for index, given in zip(one.requests, one.generations, strict=True)
    )


def unmeasured(context: Context) -> list[str]:
    """Free tokens behind a first divergence, in words."""
    behind = _behind(context)
    if not behind:
        return []
    return [f"{behind} free-running tokens behind a first divergence (only a replay judges these steps)"]


def _behind(context: Context) -> int:
    """Free tokens behind a first divergence: their prefix is not the golden's, and no scorer was asked."""
    behind = 0
    for one in context.trace.passes:
        for index, given in zip(one.requests, one.generations, strict=False):
            expected = context.golden.generations[index].tokens
            place = _divergence(expected, given.tokens)
            behind += len(expected) - place - 1 if place is not None else 0
    return behind


def _differing(expected: tuple[int, ...], given: tuple[int, ...]) -> int:
    same = sum(a == b for a, b in zip(expected, given, strict=False))
    return max(len(expected), len(given)) - same


def _divergence(expected: tuple[int, ...], given: tuple[int, ...]) -> int | None:
    """First step at which two continuations differ (one may end earlier), None where they are equal."""
    if expected == given:
        return None
    return next(
        (i for i, (a, b) in enumerate(zip(expected, given, strict=False)) if a != b), min(len(expected), len(given)) - 1
    )


def _flipped_steps(context: Context, one: Pass) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(golden steps, the candidate's tokens) wherever its greedy token differs from the golden's."""
    if one.rows is not None:
        generated = one.rows.generated
        place = context.steps_of[context.place(one.rows)[generated]]
        token = one.rows.argmax[generated].astype(np.int64)
        other = token != _golden_tokens(context)[place]
        return place[other], token[other]
    found = []
    for index, given in zip(one.requests, one.generations, strict=True):
        expected = context.golden.generations[index].tokens
        step = _divergence(expected, given.tokens)
        if step is not None and step < min(len(expected), len(given.tokens)):
            found.append((_first_step(context, index) + step, given.tokens[step]))
    pairs = np.array(found, dtype=np.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def _golden_tokens(context: Context) -> NDArray[np.int64]:
    """The golden's token of every generated step, [G]."""
    return np.array([token for given in context.golden.generations for token in given.tokens], dtype=np.int64)


def _first_step(context: Context, index: int) -> int:
    return sum(len(given.tokens) for given in context.golden.generations[:index])


def _one_pass(context: Context, one: Pass) -> Iterator[Finding]:
    step, token = _flipped_steps(context, one)
    if not len(step):
        return
    centre, floor = context.centre, context.floor
    if floor is None:
        yield Finding(
            status=Status.UNMEASURED,
            check="tokens",
            message=f"{len(step)} tokens differ, and the golden has no floor for {context.precision} to judge them by",
            where=pass_name(one),
            fix="Record the golden with this precision, or check in one that it has",
        )
        return
    # How far below its own best does the reference (cast to this precision) put the candidate's token?
    gap = metrics.deficit(centre.top_ids[step], centre.top_logits[step], token)
    share = gap / np.maximum(floor.pair[step], np.finfo(np.float32).tiny)
    worst = int(np.argmax(share))
    wrong = ~(share <= context.tie)
    golden = context.golden
    request = int(golden.rows.request[golden.rows.generated][step[worst]])
    place = step[worst] - _first_step(context, request)
    where = f"{pass_name(one)}, prompt {request_name(golden, request)!r}, step {place}"
    why = f"the reference's own noise there is {floor.pair[step[worst]]:.2g}; {context.tie:.1f} x that can be chance"
    if wrong.any():
        yield Finding(
            status=Status.DEVIATES,
            check="tokens",
            message=f"{int(wrong.sum())} of {len(step)} differing tokens are no ties; worst margin {gap[worst]:.2g}",
            where=where,
            measured=float(share[worst]),
            allowed=context.tie,
            why=why,
            fix="The reference clearly prefers another token: look at the first such step with --json",
        )
        return
    unknown = ~(centre.top_ids[step] == token[:, None]).any(axis=1)
    if unknown.any():
        yield Finding(
            status=Status.UNMEASURED,
            check="tokens",
            message=f"{int(unknown.sum())} differing tokens are not among the {centre.top_ids.shape[1]} best that the "
            "golden keeps: how far away they are is not known",
            where=where,
            fix="Check logits too (the replay view), or record on prompts that the model is surer of",
        )
    else:
        yield Finding(
            status=Status.DRIFT,
            check="tokens",
            message=f"{len(step)} differing tokens, all ties; largest margin {gap[worst]:.2g}",
            where=where,
            measured=float(share[worst]),
            allowed=context.tie,
            why=why,
        )
