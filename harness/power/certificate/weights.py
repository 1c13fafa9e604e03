"""What the templates of a golden say of its bugs: red by the size of the error, or named with --diagnose.

Shape legend: M rows of all views, T templates, U units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harness.numerics import bounds, metrics, statistics
from harness.numerics.bounds import Bound
from harness.numerics.constants import BUCKETS, CATCH
from harness.power.certificate.value import Seen, Sight
from harness.templates.fitting import change_of
from harness.values import Golden, Statistic, Templates

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

#: Statistics whose limit is one of an error's size.
SIZES = frozenset({statistics.ERROR, statistics.PROMPT, statistics.RANGE})


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """One template beside the limits of one precision.

    Attributes:
        signal: S/N over all rows; of a model wider than COORDINATES what its coordinates hold of it.
        large: whether the size of its error alone is red with a probability of CATCH: over all rows, a pass, a prompt
            or a range of positions.
        z: expected.
        tokens: multiple of the rows from which it is named with a probability of CATCH; infinite where none is known.
    """

    signal: float
    large: bool
    z: float
    tokens: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Units:
    """Rows that a statistic pools: the unit of each row, its weight there, and the names of the units."""

    statistic: str
    names: list[str]
    unit: Int64
    weight: Float64

    def signals(self, ratios: Float64) -> Float64:
        """Root mean square over each unit's rows of error ratios, given squared [M] -> [U]."""
        rows = np.bincount(self.unit, weights=self.weight, minlength=len(self.names))
        total = np.bincount(self.unit, weights=self.weight * ratios, minlength=len(self.names))
        found: Float64 = np.sqrt(total / np.maximum(rows, np.finfo(np.float64).tiny))
        return found


def units_of(golden: Golden, bank: Templates) -> list[Units]:
    """The units of a check of the diagnosed run whose statistic is the size of an error, named as it names them."""
    ids = [request.id for request in golden.requests]
    passes = [f"{bank.run}/{view}" for view in bank.views]
    view, prompt = bank.view.astype(np.int64), golden.rows.request[bank.place].astype(np.int64)
    bucket = metrics.position_buckets(golden.rows.position)
    inside = [golden.rows.position[bucket == index] for index in range(BUCKETS)]
    ranges = [f"positions {one.min()} to {one.max()}" if len(one) else "no position" for one in inside]
    # What several views show is averaged over them.
    times = np.bincount(bank.place, minlength=len(golden.rows))[bank.place]
    once = np.ones(len(view))
    return [
        Units(statistic=statistics.ERROR, names=["all"], unit=np.zeros_like(view), weight=1 / times),
        Units(statistic=statistics.ERROR, names=passes, unit=view, weight=once),
        Units(
            statistic=statistics.PROMPT,
            names=[f"{name}, prompt {one!r}" for name in passes for one in ids],
            unit=view * len(ids) + prompt,
            weight=once,
        ),
        Units(
            statistic=statistics.RANGE,
            names=[f"{name}, {one}" for name in passes for one in ranges],
            unit=view * BUCKETS + bucket[bank.place],
            weight=once,
        ),
    ]


def smallest_of(statistics_: Sequence[Statistic], replicas: int) -> dict[tuple[str, str], float]:
    """By (statistic, unit) the smallest error that fails it, in units of round-off (bounds.smallest_caught)."""
    return {
        (one.name, one.unit): bounds.smallest_caught(
            Bound(
                centre=one.centre,
                own=one.own,
                spread=one.spread,
                error=one.spread * math.sqrt(1 + 1 / max(1, replicas)),
                significant=one.significant,
                failing=one.failing,
                why=one.why,
            )
        )
        for one in statistics_
        if one.name in SIZES
    }


def weigh(
    squares: Float64,
    sigma: Float64,
    units: Sequence[Units],
    smallest: Mapping[tuple[str, str], float],
    errors: Float64,
    limit: float,
) -> list[Weight]:
    """Each template beside the limits.

    Args:
        squares: of what each changes in a row's logits, [T, M].
        sigma: each row's round-off, [M].
        units: whose errors are judged.
        smallest: error that fails each of them, in units of round-off.
        errors: standard error of each template's coefficient, [T].
        limit: of |z|.
    """
    catch, found = bounds.normal_quantile(CATCH), []
    for square, error in zip(squares, errors, strict=True):
        signals = [one.signals(square / sigma**2) for one in units]
        large = any(
            signal >= smallest.get((one.statistic, name), math.inf)
            for one, part in zip(units, signals, strict=True)
            for name, signal in zip(one.names, part, strict=True)
        )
        found.append(
            Weight(
                signal=float(signals[0][0]),
                large=large,
                z=1 / float(error) if error > 0 else math.inf,
                tokens=float(((limit + catch) * error) ** 2) if math.isfinite(limit) else math.inf,
            )
        )
    return found


def _named(weight: Weight) -> bool:
    return weight.tokens <= 1


def sight_of_templates(weights: Mapping[float, Weight]) -> Sight:
    """The sight of a bug from its templates by strength; the strongest, as it was reported, decides."""
    one = weights[max(weights)]
    seen: Seen = "size" if one.large else "name" if _named(one) else "not"
    weakest = min((strength for strength, each in weights.items() if each.large or _named(each)), default=None)
    return Sight(
        seen=seen,
        signal=one.signal,
        z=one.z,
        weakest=weakest,
        tokens=one.tokens if seen == "not" and math.isfinite(one.tokens) else None,
    )


def squares_of(bank: Templates) -> Float64:
    """What each bug's template changes in each row's logits, squared, [T, M]."""
    found = np.zeros((len(bank.names), len(bank.view)))
    for index in range(len(bank.names)):
        found[index] = (change_of(bank, index) ** 2).sum(axis=1)
    return found
