"""In which blocks a bug is: what it does in each part of the model alone, fitted jointly to an error.

Shape legend: K replicas, M rows, R coordinates, P prompts, L parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from harness.numerics.constants import EXPLAINED
from harness.numerics.matched import Filter, Match
from harness.templates.fitting import Projector, change_of, sums_of
from harness.templates.layers import Layered
from harness.values import Layer, Templates

if TYPE_CHECKING:
    from harness.comparison.likeness import Fitted

Float64 = NDArray[np.float64]
_SEED = 0x6C6179


@dataclass(frozen=True, kw_only=True, slots=True)
class InLayers:
    """A bug by parts of the model.

    Attributes:
        layers: of all parts that it has, outside the blocks first.
        largest: coefficient of the part with the largest |z|.
        explains: whether the parts together are what the error is beyond round-off, one of them beyond the limit of
            |z|.
    """

    layers: tuple[Layer, ...]
    largest: float
    explains: bool


def fit(fitted: Fitted, match: Match, parts: Layered, others: Sequence[Match] = ()) -> InLayers:
    """How much of a bug each part has.

    Args:
        fitted: the error.
        match: the bug as a whole.
        parts: what it does in each part.
        others: further bugs that are there, which are taken off first.
    """
    error, whole = fitted.error.copy(), fitted.projector
    for one in others:
        error -= one.coefficient * change_of(fitted.bank, one.index) / whole.sigma[:, None]
    error[~fitted.rows] = 0.0
    projector = replace(whole, bank=parts.bank)
    squares = fitted.noise.square[:, fitted.views].sum(axis=1)
    filter_ = Filter(
        gram=projector.gram()[fitted.views].sum(axis=0),
        replicas=_replicas(fitted, projector, _widened(fitted, match)),
        squares=squares,
        kinds=np.arange(len(parts.blocks)),
    )
    sums = sums_of(projector, fitted.noise, error, fitted.views)
    every = range(len(parts.blocks))
    found = filter_.fit(sums, every)
    square = float(sums.square.sum())
    inside = filter_.share(sums, every)[0] * square
    largest = max(found, key=lambda one: abs(one.z))
    return InLayers(
        layers=tuple(
            Layer(blocks=blocks, coefficient=one.coefficient, error=one.error)
            for blocks, one in zip(parts.blocks, found, strict=True)
        ),
        largest=largest.coefficient,
        explains=abs(largest.z) > fitted.limit and inside >= EXPLAINED * (square - filter_.usual()),
    )


def _replicas(fitted: Fitted, projector: Projector, widened: float) -> Float64:
    """Sums of replicas' errors with each part, [K, P, L]: drawn, since of those that were run sums alone are kept.

    Whitened round-off is alike in all coordinates and has a known size in each row; that rows of one prompt go
    together is in ``widened``.
    """
    count = len(fitted.noise.along)
    values, vectors = np.linalg.eigh(_spread(fitted, projector))
    roots = vectors * np.sqrt(np.maximum(values, 0))[:, None, :]
    drawn = np.random.default_rng(_SEED).standard_normal((count, *values.shape))
    sums = np.einsum("plm,kpm->kpl", roots, drawn)
    found: Float64 = widened * (sums - sums.mean(axis=0))
    return found


def _spread(fitted: Fitted, projector: Projector) -> Float64:
    """Covariance of the sums of a replica's error with templates, rows being independent, [P, T, T]."""
    each = fitted.noise.row.astype(np.float64) / fitted.noise.whiten.shape[0]
    sigma = np.divide(projector.sigma, np.sqrt(each), out=np.full(len(each), np.inf), where=each > 0)
    found: Float64 = replace(projector, sigma=sigma).gram()[fitted.views].sum(axis=0)
    return found


def _widened(fitted: Fitted, match: Match) -> float:
    """How much more the replicas that were run scatter along the bug as a whole than independent rows would."""
    spread = float(_spread(fitted, replace(fitted.projector, bank=_single(fitted.bank, match.index))).sum())
    length = float(fitted.filter.total[match.index, match.index])
    usual = np.sqrt(spread * (1 + 1 / len(fitted.noise.along)))
    return max(1.0, float(fitted.filter.errors[match.index]) * length / usual) if usual else 1.0


def _single(bank: Templates, index: int) -> Templates:
    """One of the templates alone."""
    return replace(
        bank,
        names=bank.names[index : index + 1],
        places=(),
        codes=bank.codes[index : index + 1],
        scales=bank.scales[index : index + 1],
    )
