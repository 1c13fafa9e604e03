"""A golden's numbers against each other: what must hold exactly, but for rounding, and what replicas would not leave.

A golden that was recorded wrongly passes every later check of a candidate that is wrong in the same way. Its own
numbers are redundant enough to show it: probabilities and entropies bound each other, and each row was computed by
the reference and by every replica.

Shape legend: N rows, G generated rows, K replicas, P prompts, T top entries; an axis of 2 is prompt or generated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from harness import store
from harness.changes import yardstick
from harness.changes.prompts import STORAGE, entropy_slope
from harness.lint.anomaly import RECORD_AGAIN, Anomaly, Severity
from harness.numerics import metrics
from harness.numerics.constants import MIN_COVERAGE
from harness.values import Floor, Golden, Rows

Float64 = NDArray[np.float64]
Mask = NDArray[np.bool_]

#: How far, as a logarithm, a row's round-off in float32 may be from what that in 16 bits leads to expect; where float32
#: has no floor, or is the only one, how far it may be from the golden's median row in every precision. It is twice the
#: farthest of the 66,000 rows and 30,000 steps of the 20 shipped goldens: -1.98 to 4.09 against 16 bits (the largest in
#: llama-tiny, whose angles of far positions are computed in float32), up to 4.13 against the median row. A reference
#: that is off by 1/16 of bfloat16's round-off exceeds it. Against 16 bits the row's own condition cancels; against the
#: median it does not, and a golden without a float32 floor shows only what is gross.
OUTLIER = 8.3

#: Unit round-off of each precision, for the ratio that is expected of two of them.
_UNIT = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
_TINY = float(np.finfo(np.float32).tiny)
_NOT_LOGITS = "No softmax has such numbers: record it again, and look at how these were computed"


def look(directory: Path, golden: Golden) -> list[Anomaly]:
    """Everything that the numbers of one golden say against it."""
    with np.errstate(all="ignore"):  # hostile numbers may overflow: every comparison is written so that NaN fails
        return [
            *_undecidable(directory, golden),
            *_softmax(directory, golden, golden.rows, ""),
            *(one for name in golden.centres for one in _softmax(directory, golden, golden.centre_rows(name), name)),
            *_tokens(directory, golden),
            *_floors(directory, golden),
            *_outliers(directory, golden),
            *_offsets(directory, golden),
        ]


def _undecidable(directory: Path, golden: Golden) -> Iterator[Anomaly]:
    """Prompts of which tokens alone could say little, by precision."""
    request = golden.rows.request[golden.rows.generated]
    for precision, decidable in store.decidable_steps(golden).items():
        for index, asked in enumerate(golden.requests):
            steps = decidable[request == index]
            if steps.mean() < MIN_COVERAGE:
                yield Anomaly(
                    kind="undecidable",
                    path=directory,
                    where=f"prompt {asked.id!r} in {precision}",
                    message=f"{int(steps.sum())} of {len(steps)} steps are decidable, fewer than {MIN_COVERAGE:.0%}",
                    fix="Let candidates show logits there, since tokens alone say little; or choose surer prompts",
                    severity="warning",
                )


# --- what must hold of any softmax ---------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Numbers:
    """Rows in float64, with the rounding of the arithmetic that made them.

    Attributes:
        logp, entropy, logsumexp: [N].
        next: the token that follows each row, [N].
        slack: what rounding in logsumexp, softmax and sums may amount to, [N].
        generated: [N].
        ids, top: top entries, [G, T].
    """

    logp: Float64
    entropy: Float64
    logsumexp: Float64
    next: NDArray[np.int64]
    slack: Float64
    generated: Mask
    ids: NDArray[np.int32]
    top: Float64


def _numbers(golden: Golden, rows: Rows) -> _Numbers:
    """Logits were summed in float64, or in float32 where they are 16 bits wide (numerics/sketch.py).

    With M the size of what is added (the logsumexp, a log-probability, log V), an exponent is wrong by M units of
    round-off, hence a softmax weight by M of its own, and a mean of logits by M². Four of these terms meet.
    """
    logp, entropy, logsumexp = (values.astype(np.float64) for values in (rows.logp, rows.entropy, rows.logsumexp))
    size = 1 + np.abs(logsumexp) + np.abs(logp) + math.log(golden.vocabulary)
    unit = 2.0**-53 if golden.precision in ("float64", "float32") else 2.0**-24
    return _Numbers(
        logp=logp,
        entropy=entropy,
        logsumexp=logsumexp,
        next=_next_tokens(golden),
        slack=4 * unit * size**2,
        generated=rows.generated,
        ids=rows.top_ids,
        top=rows.top_logits.astype(np.float64),
    )


def _next_tokens(golden: Golden) -> NDArray[np.int64]:
    pairs = zip(golden.requests, golden.generations, strict=True)
    return np.array(
        [token for asked, given in pairs for token in (*asked.prompt_ids, *given.tokens)[1:]], dtype=np.int64
    )


def _softmax(directory: Path, golden: Golden, rows: Rows, centre: str) -> Iterator[Anomaly]:
    """Log-probabilities, entropies and top logits that no vector of logits has."""
    numbers = _numbers(golden, rows)
    where = np.flatnonzero(numbers.generated)
    broken = _of_rows(golden, numbers)
    broken |= {words: _spread_out(mask, where, len(rows)) for words, mask in _of_steps(golden, numbers).items()}
    for words, mask in broken.items():
        if mask.any():
            of = f"the centre of {centre}: " if centre else ""
            yield _anomaly(directory, golden, mask, of + words, _NOT_LOGITS)


def _spread_out(mask: Mask, where: NDArray[np.int64], rows: int) -> Mask:
    """A mask of generated rows as one of all rows."""
    whole = np.zeros(rows, dtype=np.bool_)
    whole[where] = mask
    return whole


def _of_rows(golden: Golden, numbers: _Numbers) -> dict[str, Mask]:
    """Of every row: log p and entropy H by themselves, and the bounds that p alone sets for H (Fano's inequality)."""
    logp, entropy, slack = numbers.logp, numbers.entropy, numbers.slack
    columns = golden.vocabulary
    p, rest = np.exp(logp), np.maximum(-np.expm1(np.minimum(logp, 0.0)), 0.0)
    own = -p * logp - rest * np.log(np.maximum(rest, _TINY))
    # d own / d log p is p log((1 - p) / p), and where p rounds to 1 the rest is as large as its rounding.
    error = slack + STORAGE * np.abs(logp)
    room = error * (math.log(columns) + math.log(1 / STORAGE) * 4) + STORAGE * entropy + slack
    return {
        "log p is above 0": ~(logp <= slack),
        "the entropy lies outside 0 to log V": ~(
            (entropy >= -room) & (entropy <= math.log(columns) * (1 + STORAGE) + slack)
        ),
        "the entropy is smaller than that of the next token alone": ~(entropy >= own - room),
        "the entropy is larger than the next token's probability leaves": ~(
            entropy <= own + rest * math.log(max(1, columns - 1)) + room
        ),
    }


def _of_steps(golden: Golden, numbers: _Numbers) -> dict[str, Mask]:
    """Of generated rows, [G]: the top logits by themselves, and with logsumexp, log p and entropy."""
    made = numbers.generated
    ids, top, columns = numbers.ids, numbers.top, golden.vocabulary
    logp, entropy, logsumexp, slack = (
        values[made] for values in (numbers.logp, numbers.entropy, numbers.logsumexp, numbers.slack)
    )
    hit = ids == numbers.next[made][:, None]
    listed = np.where(hit.any(axis=1), (top * hit).sum(axis=1), top[:, -1])
    room = slack + STORAGE * (np.abs(listed) + np.abs(logsumexp) + np.abs(logp))
    shown = top - logsumexp[:, None]
    error = slack + STORAGE * (np.abs(top).max(axis=1) + np.abs(logsumexp))
    p = np.exp(shown)
    part = -(p * shown).sum(axis=1)
    left = np.clip(1 - p.sum(axis=1) + error, 0.0, 1.0)
    others = max(1, columns - ids.shape[1])
    most = part - left * np.log(np.maximum(left, _TINY)) + left * math.log(others)
    within = error * (1 + np.abs(part)) + STORAGE * entropy + slack
    ordered = np.sort(ids, axis=1)
    return {
        "the top logits are not in order": (np.diff(top, axis=1) > 0).any(axis=1),
        "the top entries name a token twice, or one that is none": (np.diff(ordered, axis=1) == 0).any(axis=1)
        | (ordered[:, 0] < 0)
        | (ordered[:, -1] >= columns),
        "log p of the generated token is not its logit less the logsumexp": ~np.where(
            hit.any(axis=1), np.abs(listed - logsumexp - logp) <= room, logp <= listed - logsumexp + room
        ),
        "the top entries have more than the whole probability": ~(p.sum(axis=1) <= 1 + error),
        "the entropy is smaller than that of the top entries alone": ~(entropy >= part - within),
        "the entropy is larger than the top entries leave": ~(entropy <= most + within),
    }


# --- what must hold of greedy decoding ---------------------------------------------------------------------


def _tokens(directory: Path, golden: Golden) -> Iterator[Anomaly]:
    """The greedy token is the best one, and its probability is what the best one's can be."""
    rows, numbers = golden.rows, _numbers(golden, golden.rows)
    best = rows.argmax == numbers.next
    room = numbers.slack + STORAGE * (np.abs(numbers.logp) + np.abs(numbers.entropy))
    broken = {
        # Some other token has at least as much.
        "the next token is not the best, and has more than half of the probability": ~best
        & ~(numbers.logp <= math.log(0.5) + room),
        # -log p of the best token is at most the mean of -log p.
        "the next token is the best, and has less than any best token at this entropy": best
        & ~(numbers.logp >= -numbers.entropy - room),
    }
    for words, mask in broken.items():
        if mask.any():
            yield _anomaly(directory, golden, mask, words, _NOT_LOGITS)
    yield from _choices(directory, golden, numbers)


def _choices(directory: Path, golden: Golden, numbers: _Numbers) -> Iterator[Anomaly]:
    """The generated token against the best of its row.

    Where a reference is coarser than float64 its decode loop and its prefill may differ by round-off, and a near tie
    turn: as far as the golden's floor in that precision reaches. One without a floor cannot say how far that is.
    """
    rows = golden.rows
    tokens, where = numbers.next[rows.generated], np.flatnonzero(rows.generated)
    best = rows.argmax[rows.generated].astype(np.int64)
    wrong = metrics.deficit(rows.top_ids, rows.top_logits, best) > 0
    if wrong.any():
        words = "the best token is not the first of the top entries"
        yield _anomaly(directory, golden, _spread_out(wrong, where, len(rows)), words, _NOT_LOGITS)
    gap = metrics.deficit(rows.top_ids, rows.top_logits, tokens)
    yard = yardstick(golden, golden)
    excused = np.zeros(len(gap))
    if golden.precision != "float64" and yard is not None:
        excused = yard.tie * yard.floor.pair.astype(np.float64)
    wrong = ~(gap <= excused)
    if wrong.any():
        known = golden.precision == "float64" or yard is not None
        words = f"the generated token is not the reference's best, by up to {gap[wrong].max():.3g} logits"
        yield _anomaly(
            directory,
            golden,
            _spread_out(wrong, where, len(rows)),
            words if known else f"{words}; without a floor nobody knows whether that is a tie",
            "Record it again: its decode loop and its prefill differ",
            severe=known,
        )


# --- what replicas would not leave --------------------------------------------------------------------------


def _floors(directory: Path, golden: Golden) -> Iterator[Anomaly]:
    """Floors that no measurement gives."""
    for name, floor in golden.floors.items():
        problem = ""
        if (floor.sigma < 0).any() or (floor.pair < 0).any():
            problem = "its round-off is negative"
        elif not 1 <= floor.effective <= floor.replicas:
            problem = f"{floor.replicas} replicas count as {floor.effective:.3g} independent ones"
        if problem:
            yield _simple(directory, f"floor {name}", problem, RECORD_AGAIN.format(directory))


def _outliers(directory: Path, golden: Golden) -> Iterator[Anomaly]:
    """Rows at which all replicas are further from the reference than anywhere else: the reference is wrong there."""
    floors = {name: golden.floors[name] for name in _UNIT if name in golden.floors}
    if not floors:
        return
    generated = np.flatnonzero(golden.rows.generated)
    for field, what in (("sigma", "round-off"), ("pair", "noise of the top entries")):
        far, words = _distance(floors, field)
        mask = ~(np.abs(far) <= OUTLIER)
        if not mask.any():
            continue
        worst = float(far[np.argmax(np.abs(far))])
        whole = mask if field == "sigma" else _spread_out(mask, generated, len(golden.rows))
        message = f"the reference disagrees with all of its replicas: {what} there is {math.exp(worst):.3g} x {words}"
        yield _anomaly(directory, golden, whole, message, "Record it again; if it stays, the reference is wrong there")


def _distance(floors: dict[str, Floor], field: str) -> tuple[Float64, str]:
    """(log of how far each row's round-off is from what is expected, against what, in words)."""
    logs = {name: np.log(np.maximum(getattr(floor, field).astype(np.float64), _TINY)) for name, floor in floors.items()}
    coarse = next((name for name in ("bfloat16", "float16") if name in floors), None)
    if "float32" in floors and coarse is not None:
        expected = math.log(_UNIT[coarse] / _UNIT["float32"])
        return logs["float32"] - logs[coarse] + expected, f"what that in {coarse} leads to expect of float32"
    every = np.min([values - np.median(values) for values in logs.values()], axis=0)
    return np.maximum(every, 0.0), f"that of the median row, in {' and '.join(floors)}"


def _offsets(directory: Path, golden: Golden) -> Iterator[Anomaly]:
    """Prompts at which log p or entropy is off from all replicas by more than their logits are off.

    The gradient of log p has a length of at most sqrt(2), that of the entropy of `entropy_slope`; so the sum over n
    rows, in units of a row's round-off per logit, is at most n sqrt(V) times that, times the largest error ratio. The
    mean over replicas reaches 0.05 of it (log p) and 0.01 of it (entropy) on the 660 prompts of the 20 shipped
    goldens in three precisions. Only a number that was not made of the row's logits exceeds it.
    """
    for precision, floor in golden.floors.items():
        for name, (share, _) in offset_shares(golden, floor).items():
            for prompt, kind in np.argwhere(~(share <= 1)):
                yield _simple(
                    directory,
                    f"prompt {golden.requests[prompt].id!r}, {'generated' if kind else 'prompt'} rows",
                    f"all replicas in {precision} agree on another sum of {name} than is recorded, "
                    f"by {share[prompt, kind]:.3g} x what their logits can explain",
                    "Record it again; if it stays, look at which token was scored, e.g. at a chunk boundary",
                )


def offset_shares(golden: Golden, floor: Floor) -> dict[str, tuple[Float64, Float64]]:
    """Name -> (mean over replicas of its offset as a share of that bound [P, 2], the bound [P, 2])."""
    request, generated = golden.rows.request.astype(np.int64), golden.rows.generated.astype(np.int64)
    prompts = len(golden.requests)
    count = np.bincount(2 * request + generated, minlength=2 * prompts).reshape(prompts, 2)
    largest = floor.moments.largest.astype(np.float64).mean(axis=0)
    found = {}
    for field, name, slope in (
        ("logp", "log p", math.sqrt(2)),
        ("entropy", "the entropy", entropy_slope(golden.vocabulary)),
    ):
        offset = np.abs(getattr(floor.moments, field).astype(np.float64).mean(axis=0))
        room = count * math.sqrt(golden.vocabulary) * slope * largest
        found[name] = offset / np.maximum(room, _TINY), room
    return found


# --- in words ---------------------------------------------------------------------------------------------------


def _anomaly(directory: Path, golden: Golden, mask: Mask, words: str, fix: str, *, severe: bool = True) -> Anomaly:
    """An anomaly of rows: the first of them, and how many there are."""
    first, count = int(np.argmax(mask)), int(mask.sum())
    name = golden.requests[int(golden.rows.request[first])].id
    where = f"prompt {name!r}, position {int(golden.rows.position[first])}"
    more = f" (and at {count - 1} more positions)" if count > 1 else ""
    return _simple(directory, where, words + more, fix, "error" if severe else "warning")


def _simple(directory: Path, where: str, message: str, fix: str, severity: Severity = "error") -> Anomaly:
    return Anomaly(kind="anomaly", path=directory, where=where, message=message, fix=fix, severity=severity)
