"""What is not of any one prompt: model, tokenizer, suite, reference, floors, centres, directions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from harness.changes.prompts import FINEST_FIRST, Shared
from harness.numerics import bounds, metrics, statistics
from harness.numerics.constants import ALPHA_POOLED, EFFECT
from harness.numerics.moments import norms_of, scale_of
from harness.values import Change, Floor, Golden, Kind

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

_TINY = float(np.finfo(np.float32).tiny)
#: Of the sums over rows, those that are kept prompt by prompt.
_BY_PROMPT = ("square", "largest", "gain", "logp", "entropy", "along", "margin", "top", "flips", "deficit")


def of_model(old: Golden, new: Golden, *, ids_differ: bool) -> Iterator[Change]:
    """Another model, other weights, another tokenizer, another vocabulary."""
    if old.model.signature != new.model.signature:
        yield _note("model", Kind.STRUCTURAL, "another model: its tensors have other names or shapes")
    elif old.model.digest != new.model.digest:
        yield _note("model", Kind.BUG_SIZED, "the weights are others")
    elif old.model != new.model:
        yield _note("model", Kind.DRIFT, f"the same weights, as {_model(new)}; they were {_model(old)}")
    if old.vocabulary != new.vocabulary:
        yield _note("vocabulary", Kind.STRUCTURAL, f"{new.vocabulary} tokens, was {old.vocabulary}")
    if old.tokenizer_digest != new.tokenizer_digest:
        kind, ids = (Kind.STRUCTURAL, "other ids") if ids_differ else (Kind.DRIFT, "the same ids")
        yield _note("tokenizer", kind, f"another one, which gives {ids} for these prompts")
    if old.precision != new.precision:
        known = {name: index for index, name in enumerate(FINEST_FIRST)}
        finer = known.get(new.precision, math.inf) < known.get(old.precision, math.inf)
        kind = Kind.DRIFT if finer else Kind.BUG_SIZED
        yield _note("reference", kind, f"computed in {new.precision}, was {old.precision}")


def _model(golden: Golden) -> str:
    return f"{golden.model.name} ({golden.model.dtype}) at {golden.model.path or 'no known place'}"


def of_suite(old: Golden, new: Golden, *, prompts_differ: bool) -> Iterator[Change]:
    """Another stop rule or stop ids; and what the suite says beside its prompts."""
    if old.suite.stop != new.suite.stop:
        yield _note("suite", Kind.STRUCTURAL, f"stop is {new.suite.stop!r}, was {old.suite.stop!r}")
    elif old.stop_ids != new.stop_ids:
        yield _note("stop ids", Kind.STRUCTURAL, f"{_ids(new.stop_ids)}, were {_ids(old.stop_ids)}")
    elif old.suite.digest != new.suite.digest and not prompts_differ:
        yield _note("suite", Kind.DRIFT, "another text of it gives the same ids and limits")
    if old.suite.runs != new.suite.runs:
        names = ", ".join(run.name for run in new.suite.runs)
        yield _note("suite", Kind.DRIFT, f"the runs in which candidates are checked are others: {names}")


def _ids(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids)) or "none"


def of_floors(
    old: Golden, new: Golden, prompts: Sequence[tuple[int, int]], shared: Sequence[Shared]
) -> Iterator[Change]:
    """A precision whose round-off is no longer known, or is another on the rows that both goldens have."""
    for name in old.floors:
        if name not in new.floors:
            left_out = new.provenance.get("left_out")
            reason = left_out.get(name) if isinstance(left_out, Mapping) else None
            yield _note(f"floor {name}", Kind.STRUCTURAL, f"lost{f': {reason}' if reason else ''}")
    for name in new.floors:
        if name not in old.floors:
            yield _note(f"floor {name}", Kind.DRIFT, "new")
    for name in [name for name in old.floors if name in new.floors and shared]:
        yield from _of_floor(old, new, name, prompts, shared)


def _of_floor(
    old: Golden, new: Golden, name: str, prompts: Sequence[tuple[int, int]], shared: Sequence[Shared]
) -> Iterator[Change]:
    before, after = old.floors[name], new.floors[name]
    pairs = {
        "round-off": _joined(before.sigma, after.sigma, [(one.old, one.new) for one in shared]),
        "noise of a logit difference": _joined(
            before.pair, after.pair, [(one.old_steps, one.new_steps) for one in shared]
        ),
    }
    if _same_floor(before, after, prompts) and all(np.array_equal(*pair) for pair in pairs.values()):
        return
    effect = _effect(name)
    ratios = {words: metrics.rms(now) / max(metrics.rms(was), _TINY) for words, (was, now) in pairs.items()}
    wrong = {words: ratio for words, ratio in ratios.items() if not 1 / effect <= ratio <= effect}
    for words, ratio in wrong.items():
        widen = "widen" if ratio > 1 else "narrow"
        yield _note(f"floor {name}", Kind.BUG_SIZED, f"{words} is {ratio:.3g} x what it was: limits would {widen}")
    if not wrong:
        words = f"measured again: round-off is {ratios['round-off']:.3g} x what it was"
        yield _note(f"floor {name}", Kind.DRIFT, words)
    if after.effective < before.effective:
        wider = _pooled_limit(new, name) / _pooled_limit(old, name)
        if not wider <= effect:
            words = f"{after.effective:.3g} independent replicas, were {before.effective:.3g}: limits would widen"
            yield _note(f"floor {name}", Kind.BUG_SIZED, f"{words} {wider:.3g} times")


def _joined(
    old: NDArray[np.float32], new: NDArray[np.float32], places: Sequence[tuple[Int64, Int64]]
) -> tuple[Float64, Float64]:
    before = np.concatenate([old[place] for place, _ in places])
    after = np.concatenate([new[place] for _, place in places])
    return before.astype(np.float64), after.astype(np.float64)


def _same_floor(old: Floor, new: Floor, prompts: Sequence[tuple[int, int]]) -> bool:
    """Whether replicas, and their sums over the prompts of both, are equal to the bit."""
    if old.families != new.families or old.effective != new.effective:
        return False
    before, after = [list(side) for side in zip(*prompts, strict=True)]
    return all(
        np.array_equal(getattr(old.moments, name)[:, before], getattr(new.moments, name)[:, after])
        for name in _BY_PROMPT
    )


def _pooled_limit(golden: Golden, name: str) -> float:
    """Root mean square error, in units of round-off, from which the pooled test of a check fails; never infinite."""
    floor, prompts = golden.floors[name], len(golden.requests)
    precision = name.partition("/")[0]
    scale = scale_of(golden.centre_rows(precision), floor.sigma, floor.pair, [], prompts, golden.vocabulary)
    unit = statistics.unit_of("all", [np.ones((prompts, 2), dtype=np.int64)])
    values = statistics.logits(floor.moments, norms_of(scale), unit)
    bound = bounds.magnitude_bound(
        values[statistics.ERROR],
        bounds.spread_of(values[statistics.ERROR], floor.effective, bounds.scatter_of(precision, statistics.ERROR)),
        alpha=ALPHA_POOLED,
        tests=len(values),
        precision=precision if precision in EFFECT else "bfloat16",
    )
    return min(bounds.exponential(bound.failing[1]), float(np.finfo(np.float32).max))


def _effect(name: str) -> float:
    """Effect size of a floor's precision; of one that is not known the smallest."""
    return EFFECT.get(name.partition("/")[0], min(EFFECT.values()))


def of_centres(old: Golden, new: Golden, shared: Sequence[Shared]) -> Iterator[Change]:
    """What casting the weights to a precision makes of the logits, where either golden keeps it apart."""
    for name in sorted(({*old.centres} | {*new.centres}) & {*old.floors} if shared else ()):
        before, after = old.centre_rows(name), new.centre_rows(name)
        places = np.concatenate([one.old for one in shared]), np.concatenate([one.new for one in shared])
        was, now = before.projections[places[0]], after.projections[places[1]]
        moved = _length(now.astype(np.float64) - was) / np.maximum(old.floors[name].sigma[places[0]], _TINY)
        far = not metrics.rms(moved) <= _effect(name)
        if far:
            words = f"the weights cast to it give logits {metrics.rms(moved):.3g} x round-off from where they were"
            yield _note(f"centre {name}", Kind.BUG_SIZED, words)
        elif not _same_centre(old, new, name, shared):
            words = f"moved by {metrics.rms(moved):.2g} x round-off at most"
            yield _note(f"centre {name}", Kind.DRIFT, words)


def _same_centre(old: Golden, new: Golden, name: str, shared: Sequence[Shared]) -> bool:
    if (name in old.centres) != (name in new.centres):
        return False
    before, after = old.centres[name], new.centres[name]
    rows = all(
        np.array_equal(getattr(before, field)[one.old], getattr(after, field)[one.new])
        for field in ("logsumexp", "logp", "entropy", "projections")
        for one in shared
    )
    return rows and all(
        np.array_equal(getattr(before, field)[one.old_steps], getattr(after, field)[one.new_steps])
        for field in ("top_ids", "top_logits")
        for one in shared
    )


def of_directions(
    old: Golden, new: Golden, shared: Sequence[Shared], sigma: NDArray[np.float32] | None, effect: float
) -> Iterator[Change]:
    """Weight quantisers that would no longer be named, or whose mark on the logits is another.

    ``sigma`` [N] is the old golden's round-off; a direction is stored in float16, and one step of that is no change.
    """
    for name in old.directions:
        if name not in new.directions:
            yield _note(f"direction {name}", Kind.STRUCTURAL, "lost: weights rounded so would not be named")
    for name in new.directions:
        if name not in old.directions:
            yield _note(f"direction {name}", Kind.DRIFT, "new")
    for name in [name for name in old.directions if name in new.directions and shared]:
        was = np.concatenate([old.directions[name][one.old] for one in shared])
        now = np.concatenate([new.directions[name][one.new] for one in shared])
        if np.array_equal(was, now):
            continue
        beyond = np.abs(now.astype(np.float64) - was) - np.maximum(np.spacing(np.abs(was)), np.spacing(np.abs(now)))
        length = _length(np.maximum(beyond, 0.0))
        unit = np.concatenate([sigma[one.old] for one in shared]) if sigma is not None else np.zeros(len(length))
        moved = metrics.rms(length / np.maximum(unit, _TINY))
        kind = Kind.DRIFT if moved <= effect else Kind.BUG_SIZED
        yield _note(f"direction {name}", kind, f"moved by {moved:.2g} x round-off")


def _length(vectors: Float64) -> Float64:
    length: Float64 = np.sqrt(np.einsum("nj,nj->n", vectors, vectors))
    return length


def _note(what: str, kind: Kind, message: str) -> Change:
    """A change that is of no prompt: ``prompt`` names what it is of."""
    return Change(prompt=what, kind=kind, message=message)
