"""Statistics S1 to S8 (numerics.md 2.4) of a choice of prompts, from Moments: of the replicas and of a candidate alike.

Magnitudes are logarithms of an error in units of round-off. Signed statistics are shares of round-off:
averages of an error that was divided by its row's round-off, so that they mean the same on every host.

Shape legend: K replicas, P prompts, J projections, D directions; an axis of 2 is prompt or generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harness.numerics.moments import Norms
from harness.values import Moments

Float64 = NDArray[np.float64]

ERROR, WORST, SHIFT = "error", "worst position", "constant shift"
PROMPT, RANGE = "error of a prompt", "error of a range"
GAIN, LOGP, ENTROPY, MARGIN = "gain", "log p", "entropy", "margin"
TOP, TOP_WORST, FLIPS, DEFICIT = "top entries", "worst step", "flips", "deficit"

#: Only too large a value of these speaks against a candidate.
MAGNITUDES = frozenset({ERROR, WORST, SHIFT, PROMPT, RANGE, TOP, TOP_WORST})
#: A bias in either direction does.
SIGNED = frozenset({GAIN, LOGP, ENTROPY, MARGIN})


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """Which rows a statistic is of.

    Attributes:
        name: for people.
        shown: how often each (prompt, prompt or generated) was shown, [P, 2].
        whole: how often all prompts together were, [2]; the pooled sums of Moments are of these alone.
    """

    name: str
    shown: NDArray[np.int64]
    whole: NDArray[np.int64]


def averaged(parts: Sequence[Moments], shown: Sequence[NDArray[np.int64]], unit: Unit) -> Moments:
    """One candidate's passes as if it had run once: sums divided by how often each prompt was shown, no leading axis.

    ``shown`` is the [P, 2] of each pass. The pooled sums take passes over all prompts alone.
    """
    times = np.maximum(unit.shown, 1)
    wholes = [part for part, each in zip(parts, shown, strict=True) if each.any(axis=1).all()]
    # A replay shows no prompt rows: each kind is averaged over the passes that have it.
    whole = np.maximum(unit.whole, 1)[:, None]

    def total(name: str, over: Sequence[Moments]) -> Float64:
        found: Float64 = np.sum([getattr(part, name).astype(np.float64) for part in over], axis=0)
        return found

    averages: dict[str, Float64] = {name: total(name, parts) / times for name in ("square", "gain", "logp", "entropy")}
    averages["along"] = total("along", parts) / times[:, :, None]
    averages |= {name: total(name, parts) / times[:, 1] for name in ("margin", "top", "flips", "deficit")}
    for name in ("bias", "bucket"):
        averages[name] = total(name, wholes) / whole if wholes else getattr(parts[0], name).astype(np.float64)
    for name in ("largest", "top_largest"):
        averages[name] = np.max([getattr(part, name) for part in parts], axis=0)
    return Moments(**{name: value.astype(np.float32) for name, value in averages.items()})


def unit_of(name: str, shown: Sequence[NDArray[np.int64]]) -> Unit:
    """The unit of one or more passes, given the [P, 2] of each."""
    wholes = [(each.all(axis=0)).astype(np.int64) for each in shown]
    return Unit(name=name, shown=np.sum(shown, axis=0), whole=np.sum(wholes, axis=0))


def logits(moments: Moments, norms: Norms, unit: Unit) -> dict[str, Float64]:
    """S1, S4 to S8 of a unit; each of the shape of the leading axis of ``moments``.

    A statistic that the unit does not allow is left out: `constant shift` needs all prompts, `margin` a
    generated row, `gain` a centre that is not zero.
    """
    times = unit.shown.astype(np.float64)
    rows = float((times * norms.count).sum())
    found: dict[str, Float64] = {}
    if not rows:
        return found

    def total(sums: NDArray[np.float32]) -> Float64:
        weighted: Float64 = (sums.astype(np.float64) * times).sum(axis=(-2, -1))
        return weighted

    found[ERROR] = 0.5 * _log(total(moments.square) / rows)
    whole = unit.whole.astype(np.float64)
    if whole.any():
        vectors = (moments.bias.astype(np.float64) * whole[:, None]).sum(axis=-2)
        kinds = norms.count.sum(axis=0)
        found[SHIFT] = _log(np.linalg.norm(vectors, axis=-1) / (whole * kinds).sum())
    length = float((times * norms.gain).sum())
    if length:
        found[GAIN] = total(moments.gain) / np.sqrt(rows * length)
    found[LOGP] = total(moments.logp) / rows
    found[ENTROPY] = total(moments.entropy) / rows
    steps = float((times * norms.count)[:, 1].sum())
    if steps:
        found[MARGIN] = (moments.margin.astype(np.float64) * times[:, 1]).sum(axis=-1) / steps
    return found


def directions(moments: Moments, norms: Norms, unit: Unit) -> tuple[Float64, Float64]:
    """(share of round-off along each direction [..., D], its coefficient [..., D]).

    The coefficient is 1 for an error that is the direction itself, and scatters about 0 for round-off; the
    weights are 1 / sigma^2 (numerics.md 2.9).
    """
    times = unit.shown.astype(np.float64)[:, :, None]
    total = (moments.along.astype(np.float64) * times).sum(axis=(-3, -2))
    length = np.maximum((times * norms.along).sum(axis=(0, 1)), np.finfo(np.float64).tiny)
    rows = float((unit.shown * norms.count).sum())
    return total / np.sqrt(max(1.0, rows) * length), total / length


def worst(moments: Moments, unit: Unit) -> Float64:
    """S2: log of the largest error ratio of any row of the unit."""
    return _log(np.where(unit.shown > 0, moments.largest.astype(np.float64), 0.0).max(axis=(-2, -1)))


def by_prompt(moments: Moments, norms: Norms, unit: Unit) -> Float64:
    """S1 of each prompt, [..., P]; -inf where nothing was shown or there is no error."""
    times = unit.shown.astype(np.float64)
    rows = (times * norms.count).sum(axis=1)
    return 0.5 * _log((moments.square.astype(np.float64) * times).sum(axis=-1) / np.maximum(rows, 1))


def by_bucket(moments: Moments, norms: Norms, unit: Unit) -> Float64:
    """S3: S1 of each range of positions over all prompts, [..., B]; -inf where it holds no row."""
    whole = unit.whole.astype(np.float64)[:, None]
    rows = (whole * norms.bucket).sum(axis=0)
    return 0.5 * _log((moments.bucket.astype(np.float64) * whole).sum(axis=-2) / np.maximum(rows, 1))


def tokens(moments: Moments, norms: Norms, unit: Unit) -> dict[str, Float64]:
    """Flips and clipped deficit a generated step (T2, T3 of numerics.md 2.6), and the error among the top entries."""
    times = unit.shown[:, 1].astype(np.float64)
    steps = float((times * norms.count[:, 1]).sum())
    if not steps:
        return {}
    mean = {
        name: (sums.astype(np.float64) * times).sum(axis=-1) / steps
        for name, sums in ((FLIPS, moments.flips), (DEFICIT, moments.deficit), (TOP, moments.top))
    }
    largest = np.where(times > 0, moments.top_largest.astype(np.float64), 0.0).max(axis=-1)
    return {
        FLIPS: mean[FLIPS],
        DEFICIT: mean[DEFICIT],
        TOP: 0.5 * _log(mean[TOP]),
        TOP_WORST: _log(largest),
    }


def _log(values: Float64) -> Float64:
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(values), dtype=np.float64)
