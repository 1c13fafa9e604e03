"""One prompt of a golden against the same prompt of another, on the tokens that both have seen.

The newer reference is judged as one more correct implementation in the finest precision that the older golden has a
floor for: by its root mean square error over the prompt, with the limit that a candidate's prompts have in a check.

Shape legend: N rows of a golden, n rows of the shared prefix, g generated rows among these, K replicas, P prompts,
J projections, T top entries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harness.numerics import bounds, metrics, statistics
from harness.numerics.bounds import Spread
from harness.numerics.constants import ALPHA_GROUPS, ALPHA_TOKENS, EFFECT, MAX_SMALLEST
from harness.numerics.moments import norms_of, scale_of
from harness.numerics.sketch import select_rows
from harness.values import Change, Floor, Golden, Kind, Rows

Float64 = NDArray[np.float64]

#: What is finer: the first of these that both references resolve and the golden has a floor for is the yardstick.
FINEST_FIRST = ("float64", "float32", "float16", "bfloat16")

#: Half a unit in the last place of a stored number, as a share of it.
STORAGE = 2.0**-24

_TINY = float(np.finfo(np.float32).tiny)
_ROW_FIELDS = ("argmax", "logsumexp", "logp", "entropy", "projections")
_STEP_FIELDS = ("top_ids", "top_logits")


@dataclass(frozen=True, kw_only=True, slots=True)
class Yardstick:
    """What a golden says about round-off in one precision, ready to judge another reference by.

    Attributes:
        precision: whose floor it is.
        floor: that floor.
        replicas: log root mean square error of each replica on each prompt, [K, P].
        spreads: of one more correct implementation, for each prompt.
        tie: a flip is a tie up to this multiple of its step's noise.
    """

    precision: str
    floor: Floor
    replicas: Float64
    spreads: tuple[Spread, ...]
    tie: float

    def limit(self, prompt: int, share: float) -> float:
        """Root mean square error, in units of round-off, from which a share of a prompt's rows is no round-off.

        A mean over a share of rows scatters by at most the root of that share more than over all of them: so much
        where the rows are independent, less where their errors go together. Beyond MAX_SMALLEST the floor is too
        poor to excuse anything.
        """
        own = self.spreads[prompt].own / math.sqrt(share)
        value = math.hypot(own, bounds.scatter_of(self.precision, statistics.PROMPT))
        spread = Spread(own=own, value=value, degrees=self.spreads[prompt].degrees)
        bound = bounds.magnitude_bound(
            self.replicas[:, prompt],
            spread,
            alpha=ALPHA_GROUPS,
            tests=self.replicas.shape[1],
            precision=self.precision,
        )
        return min(bounds.exponential(bound.failing[1]), MAX_SMALLEST)


def yardstick(golden: Golden, other: Golden) -> Yardstick | None:
    """The finest floor of ``golden`` that neither reference is coarser than; None where it has none."""
    coarsest = max(
        (FINEST_FIRST.index(one.precision) for one in (golden, other) if one.precision in FINEST_FIRST), default=0
    )
    name = next((name for name in FINEST_FIRST[coarsest:] if name in golden.floors and name in EFFECT), None)
    if name is None:
        return None
    floor, prompts = golden.floors[name], len(golden.requests)
    scale = scale_of(golden.centre_rows(name), floor.sigma, floor.pair, [], prompts, golden.vocabulary)
    unit = statistics.unit_of("all", [np.ones((prompts, 2), dtype=np.int64)])
    replicas = statistics.by_prompt(floor.moments, norms_of(scale), unit)
    return Yardstick(
        precision=name,
        floor=floor,
        replicas=replicas,
        spreads=tuple(bounds.moderated(replicas, floor.effective, bounds.scatter_of(name, statistics.PROMPT))),
        tie=bounds.tie_factor(int(golden.rows.generated.sum()), ALPHA_TOKENS),
    )


# --- the rows that two prompts share ---------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Shared:
    """The rows of two prompts of the same ids, up to and with the first step whose token differs.

    Attributes:
        old, new: places of these rows in each golden, [n].
        old_steps, new_steps: places of the generated ones among each golden's generated rows, [g].
        step: the first generated step whose token differs, None where none does.
        share: share of the old prompt's rows.
    """

    old: NDArray[np.int64]
    new: NDArray[np.int64]
    old_steps: NDArray[np.int64]
    new_steps: NDArray[np.int64]
    step: int | None
    share: float


def shared_rows(old: Golden, prompt: int, new: Golden, other: int) -> Shared:
    """Which rows were predicted from the same tokens; the prompt ids are the same."""
    before, after = old.generations[prompt].tokens, new.generations[other].tokens
    common = min(len(before), len(after))
    step = next((i for i in range(common) if before[i] != after[i]), None)
    steps = common if step is None else step + 1
    rows = len(old.requests[prompt].prompt_ids) - 1 + steps
    starts = [int(np.searchsorted(golden.rows.request, at)) for golden, at in ((old, prompt), (new, other))]
    firsts = [sum(len(one.tokens) for one in golden.generations[:at]) for golden, at in ((old, prompt), (new, other))]
    return Shared(
        old=starts[0] + np.arange(rows),
        new=starts[1] + np.arange(rows),
        old_steps=firsts[0] + np.arange(steps),
        new_steps=firsts[1] + np.arange(steps),
        step=step,
        share=rows / max(1, len(old.requests[prompt].prompt_ids) - 1 + len(before)),
    )


def unequal_rows(old: Rows, new: Rows, shared: Shared) -> NDArray[np.bool_]:
    """Which of the shared rows are not equal to the bit in all that is stored of them, [n]."""
    unequal = np.zeros(len(shared.old), dtype=np.bool_)
    for name in _ROW_FIELDS:
        differs = getattr(old, name)[shared.old] != getattr(new, name)[shared.new]
        unequal |= differs if differs.ndim == 1 else differs.any(axis=1)
    steps = unequal[len(unequal) - len(shared.old_steps) :]
    for name in _STEP_FIELDS:
        before, after = getattr(old, name)[shared.old_steps], getattr(new, name)[shared.new_steps]
        steps |= (before != after).any(axis=1) if before.shape == after.shape else np.True_
    return unequal


# --- judging -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """A prompt's change, the first position that shows it, and by how many times the limit."""

    change: Change
    position: int | None = None
    times: float | None = None


def compare_prompt(old: Golden, prompt: int, new: Golden, other: int, yard: Yardstick | None) -> Compared:
    """How the numbers and tokens of two prompts of the same ids differ on what they share.

    Args:
        old: the golden that is believed.
        prompt: which of its prompts.
        new: the other golden, of the same vocabulary.
        other: which of its prompts.
        yard: round-off of ``old``; without it whatever is not equal to the bit is bug-sized.
    """
    shared = shared_rows(old, prompt, new, other)
    name = old.requests[prompt].id
    unequal = unequal_rows(old.rows, new.rows, shared)
    if shared.step is None and not unequal.any():
        return Compared(change=Change(prompt=name, kind=Kind.SAME))
    if yard is None:
        return _without_floor(old, name, shared, unequal)
    return _judged(old, new, name, shared, yard, prompt)


def _without_floor(old: Golden, name: str, shared: Shared, unequal: NDArray[np.bool_]) -> Compared:
    first = int(np.argmax(unequal)) if unequal.any() else len(unequal) - 1
    change = Change(
        prompt=name,
        kind=Kind.BUG_SIZED,
        message="not equal to the bit, and no floor to say how much is round-off",
        step=shared.step,
        margin=_margin(old, shared),
    )
    return Compared(change=change, position=int(old.rows.position[shared.old[first]]))


def _judged(old: Golden, new: Golden, name: str, shared: Shared, yard: Yardstick, prompt: int) -> Compared:
    """All three tests: the error of the rows, what else is stored of them, and the token that differs."""
    sigma = np.maximum(yard.floor.sigma[shared.old].astype(np.float64), _TINY)
    error = metrics.error_norm(new.rows.projections[shared.new], old.rows.projections[shared.old])
    ratio = error / sigma
    deviation = metrics.rms(ratio)
    limit = yard.limit(prompt, shared.share)
    found = [
        _error(old, shared, ratio, deviation, limit),
        *_values(old, new, shared, np.maximum(error, limit * sigma)),
        _flip(old, new, shared, yard),
    ]
    kinds = list(Kind)
    worst = max((one for one in found if one is not None), key=lambda one: (kinds.index(one.kind), one.times))
    change = Change(
        prompt=name,
        kind=worst.kind,
        message=worst.message,
        step=shared.step,
        margin=_margin(old, shared),
        deviation=deviation,
        limit=limit,
    )
    return Compared(change=change, position=worst.position, times=worst.times)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seen:
    """One thing seen: how bad, in words, where first, and by how many times what is allowed."""

    kind: Kind
    message: str
    position: int | None
    times: float


def _error(old: Golden, shared: Shared, ratio: Float64, deviation: float, limit: float) -> _Seen:
    # Written so that NaN fails.
    if deviation <= limit:
        return _Seen(kind=Kind.DRIFT, message="within round-off", position=None, times=deviation / limit)
    beyond = np.flatnonzero(~(ratio <= limit))
    first = int(beyond[0]) if len(beyond) else int(np.argmax(ratio))
    position = int(old.rows.position[shared.old[first]])
    return _Seen(
        kind=Kind.BUG_SIZED,
        message=f"the logits are off by {deviation:.3g} x round-off, from position {position} on",
        position=position,
        times=deviation / limit,
    )


def _values(old: Golden, new: Golden, shared: Shared, error: Float64) -> list[_Seen]:
    """What is stored beside the projections may move as far as the row's logits can move it, and no further.

    ``error`` [n] bounds the length of a row's change. Then log p changes by at most sqrt(2) times that, whose
    gradient is (one-hot - p); the entropy by `entropy_slope` times; each logit and the logsumexp by once. To it
    comes the rounding of both numbers when they were stored.
    """
    before, after = select_rows(old.rows, shared.old), select_rows(new.rows, shared.new)
    until = len(error) - 1 if shared.step is not None else len(error)
    kept = np.arange(len(error)) < until  # log p of the step that differs is of two tokens
    named = {
        "log p": (before.logp * kept, after.logp * kept, math.sqrt(2) * error),
        "the entropy": (before.entropy, after.entropy, entropy_slope(old.vocabulary) * error),
        "the logsumexp": (before.logsumexp, after.logsumexp, error),
    }
    seen = [_moved(old, shared.old, name, was, now, room) for name, (was, now, room) in named.items()]
    generated = old.rows.generated[shared.old]
    top = metrics.logits_at(before.top_ids, after.top_ids, after.top_logits)
    last = after.top_logits[:, -1:].astype(np.float64)
    # An entry that the other golden does not list lies at most at the last one that it does.
    shown = np.where(np.isnan(top), np.minimum(last, before.top_logits), top)
    worst = np.abs(shown - before.top_logits).argmax(axis=1)[:, None]
    was, now = (np.take_along_axis(values, worst, axis=1)[:, 0] for values in (before.top_logits, shown))
    seen.append(_moved(old, shared.old[generated], "a top logit", was, now, error[generated]))
    return [one for one in seen if one is not None]


def _moved(
    old: Golden,
    place: NDArray[np.int64],
    name: str,
    before: NDArray[np.floating],
    after: NDArray[np.floating],
    allowed: Float64,
) -> _Seen | None:
    was, now = before.astype(np.float64), after.astype(np.float64)
    room = allowed + STORAGE * (np.abs(was) + np.abs(now))
    times = np.abs(now - was) / np.maximum(room, _TINY)
    beyond = np.flatnonzero(~(times <= 1))
    if not len(beyond):
        return None
    first = int(beyond[0])
    position = int(old.rows.position[place[first]])
    return _Seen(
        kind=Kind.BUG_SIZED,
        message=f"{name} at position {position} was {was[first]:.4g} and is {now[first]:.4g}, "
        "further than its logits have moved",
        position=position,
        times=float(times[first]),
    )


def entropy_slope(vocabulary: int) -> float:
    """Largest change of an entropy per length of a change of V logits, in nats.

    The gradient is -p_i (log p_i + H); its length is at most the standard deviation of -log p, whose square is at
    most log²(V - 1) / 4 + 1 (Reeb and Wolf 2015, "Tight bound on relative entropy by entropy difference").
    """
    return math.sqrt(math.log(max(1, vocabulary - 1)) ** 2 / 4 + 1)


def _margin(golden: Golden, shared: Shared) -> float | None:
    if shared.step is None:
        return None
    at = shared.old_steps[shared.step]
    return float(metrics.margins(golden.rows.top_logits[at : at + 1])[0])


def _flip(old: Golden, new: Golden, shared: Shared, yard: Yardstick) -> _Seen | None:
    """The token that differs first: a tie where noise can lift it above the old golden's best."""
    if shared.step is None:
        return None
    at = shared.old_steps[shared.step]
    row, there = int(shared.old[-1]), int(shared.new[-1])
    was, now = _token(old, row), _token(new, there)
    ids, logits = old.rows.top_ids[at : at + 1], old.rows.top_logits[at : at + 1]
    gap = float(metrics.deficit(ids, logits, np.array([now]))[0])
    noise = max(float(yard.floor.pair[at]), _TINY)
    times = gap / (yard.tie * noise)
    known = bool((ids == now).any())
    tie = known and times <= 1
    words = f"{gap:.2g} logits below its best" if known else f"at least {gap:.2g} logits below its best"
    return _Seen(
        kind=Kind.TIE if tie else Kind.BUG_SIZED,
        message=f"token {was} became {now}, {words}, where noise is {noise:.2g} ({yard.tie:.1f} x that can be chance)",
        position=int(old.rows.position[row]),
        times=times,
    )


def _token(golden: Golden, row: int) -> int:
    """The token that a generated row predicts, as the golden goes on."""
    request = int(golden.rows.request[row])
    step = int(golden.rows.position[row]) - len(golden.requests[request].prompt_ids)
    return golden.generations[request].tokens[step]
