"""Errors of rows condensed into Moments: by one function for a replica when recording and a candidate when checking.

Shape legend: n rows of one pass, N rows of the golden, G generated rows, P prompts, J projections,
B position buckets, D directions, W watched top entries; an axis of 2 is prompt or generated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harness.numerics import metrics
from harness.numerics.constants import BUCKETS, DEFICIT_CLIP, PAIR_TOP
from harness.values import Moments, Rows

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """What errors are measured in: the centre they are taken from, and each row's own round-off.

    Attributes:
        centre: what a correct implementation computes, but for round-off.
        sigma: length of a row's projected round-off, [N].
        pair: round-off of a logit difference among the top entries, [G].
        directions: projections of the directions that errors are searched for, [D, N, J].
        buckets: position bucket of each row, [N].
        prompts: how many prompts there are.
        vocabulary: columns of the logits.
    """

    centre: Rows
    sigma: Float64
    pair: Float64
    directions: Float64
    buckets: Int64
    prompts: int
    vocabulary: int

    @property
    def step(self) -> Int64:
        """Index among generated rows of each row, -1 for prompt rows, [N]."""
        generated = self.centre.generated
        return np.where(generated, np.cumsum(generated) - 1, -1)


def scale_of(
    centre: Rows,
    sigma: NDArray[np.floating],
    pair: NDArray[np.floating],
    directions: Sequence[NDArray[np.floating]],
    prompts: int,
    vocabulary: int,
) -> Scale:
    """The scale of one precision."""
    shape = (len(directions), *centre.projections.shape)
    return Scale(
        centre=centre,
        sigma=np.maximum(sigma.astype(np.float64), _TINY),
        pair=np.maximum(pair.astype(np.float64), _TINY),
        directions=np.array([one.astype(np.float64) for one in directions]).reshape(shape),
        buckets=metrics.position_buckets(centre.position),
        prompts=prompts,
        vocabulary=vocabulary,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Norms:
    """What the sums of Moments are divided by; a property of the golden alone.

    Attributes:
        count: rows, [P, 2].
        bucket: rows by position bucket, [2, B].
        gain: sum of |c|^2 / sigma^2, [P, 2].
        along: the same of each direction, [P, 2, D].
    """

    count: Float64
    bucket: Float64
    gain: Float64
    along: Float64


def norms_of(scale: Scale) -> Norms:
    """Count rows and measure the directions."""
    rows, cells = scale.centre, _Cells(scale, np.arange(len(scale.centre)))
    one = np.ones(len(rows))
    whitened = rows.projections.astype(np.float64) / scale.sigma[:, None]
    along = [cells.sum(_dot(d, d) / scale.sigma**2) for d in scale.directions]
    return Norms(
        count=cells.sum(one),
        bucket=cells.bucket(one),
        gain=cells.sum(_dot(whitened, whitened)),
        along=_last(along, (scale.prompts, 2)),
    )


def measure(rows: Rows, scale: Scale, place: Int64) -> Moments:
    """Moments of one pass.

    Args:
        rows: what was shown, [n].
        scale: what it is held against.
        place: index in the centre of each row, [n].
    """
    centre, cells = scale.centre, _Cells(scale, place)
    error = rows.projections.astype(np.float64) - centre.projections[place]
    sigma = scale.sigma[place]
    whitened = error / sigma[:, None]
    ratio = np.linalg.norm(whitened, axis=1)
    # A row's length is that of a vector over the vocabulary; log p and entropy live on the scale of one logit.
    logit = sigma / np.sqrt(scale.vocabulary)
    reference = centre.projections[place].astype(np.float64) / sigma[:, None]
    along = [cells.sum(_dot(whitened, d[place] / sigma[:, None])) for d in scale.directions]
    chosen = rows.generated
    step = scale.step[place[chosen]]
    tops = _top_errors(rows.top_ids, rows.top_logits, centre, step)
    spread, margin = _top_spread(tops), _difference(tops)
    pair, request = scale.pair[step], centre.request[place[chosen]]
    argmax = rows.argmax[chosen].astype(np.int64)
    sums, largest = _by_prompt(np.add, request, scale.prompts), _by_prompt(np.maximum, request, scale.prompts)
    return _single(
        square=cells.sum(ratio**2),
        largest=cells.largest(ratio),
        gain=cells.sum(_dot(whitened, reference)),
        logp=cells.sum((rows.logp.astype(np.float64) - centre.logp[place]) / logit),
        entropy=cells.sum((rows.entropy.astype(np.float64) - centre.entropy[place]) / logit),
        along=_last(along, (scale.prompts, 2)),
        bias=cells.vectors(whitened),
        bucket=cells.bucket(ratio**2),
        margin=sums(margin / pair),
        top=sums(2 * spread**2 / pair**2),
        top_largest=largest(np.sqrt(2) * spread / pair),
        flips=sums((argmax != centre.top_ids[step, 0]).astype(np.float64)),
        deficit=sums(clipped_deficit(centre, step, argmax, pair)),
    )


def clipped_deficit(centre: Rows, step: Int64, token: Int64, pair: Float64) -> Float64:
    """How far below its best the centre puts each token, in units of noise, at most DEFICIT_CLIP, [g]."""
    gap = metrics.deficit(centre.top_ids[step], centre.top_logits[step], token)
    return np.minimum(gap / pair, DEFICIT_CLIP)


def entry_ratios(
    top_ids: NDArray[np.int32], top_logits: NDArray[np.float32], centre: Rows, step: Int64, pair: Float64
) -> Float64:
    """Error ratio among the top entries of steps of which an engine shows these alone, [g].

    Log-probabilities serve as well as logits: what all entries have in common is no error.

    Args:
        top_ids: the tokens it shows, best first, [g, T].
        top_logits: their logits or log-probabilities, [g, T].
        centre: rows of the reference.
        step: generated row of ``centre`` for each of them, [g].
        pair: round-off of a logit difference there, [g].
    """
    errors = _top_errors(top_ids, top_logits, centre, step)
    ratio: Float64 = np.sqrt(2) * _top_spread(errors) / np.maximum(pair, _TINY)
    return ratio


def _single(**arrays: Float64) -> Moments:
    return Moments(**{name: array.astype(np.float32) for name, array in arrays.items()})


def stack(parts: Sequence[Moments]) -> Moments:
    """Moments of several replicas as one, with a leading axis K."""
    return Moments(**{name: np.stack([getattr(part, name) for part in parts]) for name in Moments.__slots__})


def _dot(a: Float64, b: Float64) -> Float64:
    product: Float64 = np.einsum("nj,nj->n", a, b)
    return product


def _last(arrays: Sequence[Float64], shape: tuple[int, ...]) -> Float64:
    """Arrays stacked along a new last axis, which may have no entry at all."""
    return np.stack(arrays, axis=-1) if arrays else np.zeros((*shape, 0))


class _Cells:
    """Sums by (prompt, prompt or generated) of the rows at the given places."""

    def __init__(self, scale: Scale, place: Int64) -> None:
        self._prompts = scale.prompts
        self._generated = scale.centre.generated[place].astype(np.int64)
        self._cell = scale.centre.request[place].astype(np.int64) * 2 + self._generated
        self._bucket = self._generated * BUCKETS + scale.buckets[place]

    def sum(self, values: Float64) -> Float64:
        total = np.bincount(self._cell, weights=values, minlength=2 * self._prompts)
        return total.astype(np.float64).reshape(self._prompts, 2)

    def largest(self, values: Float64) -> Float64:
        found = np.zeros(2 * self._prompts)
        np.maximum.at(found, self._cell, values)
        return found.reshape(self._prompts, 2)

    def bucket(self, values: Float64) -> Float64:
        total = np.bincount(self._bucket, weights=values, minlength=2 * BUCKETS)
        return total.astype(np.float64).reshape(2, BUCKETS)

    def vectors(self, values: Float64) -> Float64:
        return np.stack([values[self._generated == kind].sum(axis=0) for kind in (0, 1)])


def _by_prompt(combine: np.ufunc, request: NDArray[np.int32], prompts: int) -> Callable[[Float64], Float64]:
    def combined(values: Float64) -> Float64:
        found = np.zeros(prompts)
        combine.at(found, request, values)
        return found

    return combined


def _top_errors(top_ids: NDArray[np.int32], top_logits: NDArray[np.float32], centre: Rows, step: Int64) -> Float64:
    """Errors at the centre's PAIR_TOP best entries, or as many as are shown, [g, W].

    An entry that is not shown lies at most at the last one that is: that bounds its error from below.
    """
    count = min(PAIR_TOP, top_ids.shape[1])
    found = metrics.logits_at(centre.top_ids[step, :count], top_ids, top_logits)
    shown = np.where(np.isnan(found), top_logits[:, -1:].astype(np.float64), found)
    return shown - centre.top_logits[step, :count]


def _top_spread(errors: Float64) -> Float64:
    """Spread of each row's top errors, [g]: a constant shift is no error."""
    if errors.shape[1] < 2:
        return np.zeros(len(errors))
    spread: Float64 = errors.std(axis=1, ddof=1)
    return spread


def _difference(errors: Float64) -> Float64:
    """Error of the margin between the centre's two best entries, [g]; 0 for a vocabulary of one token."""
    if errors.shape[1] < 2:
        return np.zeros(len(errors))
    return errors[:, 0] - errors[:, 1]
