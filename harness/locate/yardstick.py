"""What correct implementations show at each place of a model: its limits, from drawn variants of the reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from harness import replicas as variants
from harness.engines import hf
from harness.locate.deviations import (
    STATISTICS,
    Deviation,
    Scale,
    Stacked,
    Unit,
    deviations,
    scale_of,
    stacked,
    statistics_of,
)
from harness.locate.maps import same_names
from harness.locate.presentations import Driven, Presentation
from harness.locate.replaying import Place, Recording, Replay, record, replay
from harness.numerics.bounds import Bound, Spread, magnitude_bound, maximum_bound, signed_bound, spread_of
from harness.numerics.constants import (
    ALPHA_GROUPS,
    ALPHA_POOLED,
    MODULE_DEGREES,
    MODULE_REPLICAS,
    SPREAD_DEFAULT,
)

_SEED = 11

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one place may show.

    Attributes:
        scale: its round-off.
        bounds: of STATISTICS by unit, None for all units together.
    """

    scale: Scale
    bounds: Mapping[Unit | None, tuple[Bound, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Yardstick:
    """A recording of the reference with the limits of each place.

    Attributes:
        precision: of the candidate that it is for.
        presentations: what was run.
        names: modules that are looked at.
        recording: the reference's values.
        limits: by place.
        tests: how many statistics there are.
    """

    precision: str
    presentations: tuple[Presentation, ...]
    names: tuple[str, ...]
    recording: Recording
    limits: Mapping[Place, Limits]
    tests: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Alarm:
    """A place whose tensor is beyond what correct implementations show.

    Attributes:
        place: where.
        unit: in which unit, None over all of them.
        statistic: of STATISTICS.
        value: what was measured.
        bound: what is allowed, and why.
    """

    place: Place
    unit: Unit | None
    statistic: str
    value: float
    bound: Bound

    @property
    def z(self) -> float:
        """How many standard deviations it lies from what is usual."""
        return self.bound.z(self.value)


def yardstick(
    exact: hf.HFEngine,
    plain: hf.HFEngine,
    asked: Sequence[Presentation],
    names: Sequence[str],
    driven: Driven,
    *,
    count: int = MODULE_REPLICAS,
    progress: Progress,
) -> Yardstick:
    """Record the reference, and replay drawn variants of it.

    Args:
        exact: the reference in float64 (float32 where that cannot be), open.
        plain: the reference in the candidate's precision, open.
        asked: what is run.
        names: modules to look at.
        driven: as the candidate is.
        count: how many variants.
        progress: called with a few words.
    """
    dtype = plain.model.dtype
    recording = record(exact, asked, names, dtype, driven)
    route = same_names(plain.model, names)
    shown: list[dict[Place, Deviation]] = []
    kernels = variants.kernels_of(plain.model)
    drawn = variants.draw(2 * count, _SEED, kernels, wide=dtype == torch.float16, fused=True)
    for one in drawn:
        progress(f"{hf_name(dtype)}: variant {len(shown) + 1} of {count}")
        with variants.applied(plain.model, one):
            found = deviations(replay(plain, route, asked, recording, driven), recording.passes)
        if all(np.isfinite(part.squares_N).all() for part in found.values()):
            shown.append(found)
        if len(shown) == count:
            break
    return Yardstick(
        precision=hf_name(dtype),
        presentations=tuple(asked),
        names=tuple(names),
        recording=recording,
        limits=limits_of(shown, hf_name(dtype)),
        tests=sum(1 + len(one.units) for one in shown[0].values()) * len(STATISTICS),
    )


def hf_name(dtype: torch.dtype) -> str:
    """The dtype as users write it."""
    return str(dtype).removeprefix("torch.")


def limits_of(shown: Sequence[Mapping[Place, Deviation]], precision: str) -> dict[Place, Limits]:
    """Limits of every place that all variants show."""
    eps = float(torch.finfo(getattr(torch, precision)).eps)
    places = [place for place in shown[0] if all(place in one for one in shown)]
    pooled, groups = len(places), sum(len(shown[0][place].units) for place in places)
    found = {}
    for place in places:
        replicas = stacked([one[place] for one in shown])
        scale = scale_of(replicas, eps)
        # Copies are not counted: a variant that computes this place as another one does adds nothing.
        effective = float(len({squares_N.tobytes() for squares_N in replicas.squares_KN}))
        bounds: dict[Unit | None, tuple[Bound, ...]] = {
            None: _bounds(replicas, scale, None, effective, precision, eps, ALPHA_POOLED, pooled)
        }
        for number, unit in enumerate(shown[0][place].units):
            bounds[unit] = _bounds(replicas, scale, number, effective, precision, eps, ALPHA_GROUPS, groups)
        found[place] = Limits(scale=scale, bounds=bounds)
    return found


def _bounds(
    replicas: Stacked,
    scale: Scale,
    unit: int | None,
    effective: float,
    precision: str,
    eps: float,
    alpha: float,
    places: int,
) -> tuple[Bound, ...]:
    values_KS = statistics_of(replicas, scale, unit)
    tests = places * len(STATISTICS)
    found: list[Bound] = []
    for name, values_K in zip(STATISTICS, values_KS.T, strict=True):
        if name == "gain":
            # A constant factor that a correct implementation rounds once more scales all by eps / sqrt(12), rms.
            spread = _spread(values_K, effective, eps / float(np.sqrt(12)))
            found.append(signed_bound(values_K, spread, alpha=alpha, tests=tests))
            continue
        spread = _spread(values_K, effective, SPREAD_DEFAULT)
        if name.startswith("worst"):
            found.append(maximum_bound(values_K, spread, alpha=alpha, tests=tests, precision=precision))
        else:
            found.append(magnitude_bound(values_K, spread, alpha=alpha, tests=tests, precision=precision, hull=True))
    return tuple(found)


def _spread(values_K: NDArray[np.float64], effective: float, families: float) -> Spread:
    """The spread of one more correct implementation, with the degrees of freedom of its two parts.

    Variants of a norm are few, and alike: then nearly all of the spread is that between families, which is known from
    many (Welch and Satterthwaite's degrees of freedom of a sum of variances).
    """
    own = spread_of(values_K, effective, 0.0)
    shares = own.own**4 / own.degrees + families**4 / MODULE_DEGREES
    value = float(np.hypot(own.own, families))
    return Spread(own=own.own, value=value, degrees=max(1.0, value**4 / shares))


def alarms(found: Replay, by: Yardstick) -> list[Alarm]:
    """What of a candidate's replay is beyond the limits, in the order in which the reference comes to the places."""
    shown = deviations(found, by.recording.passes)
    raised: list[Alarm] = []
    for place in sorted((one for one in shown if one in by.limits), key=by.recording.places.__getitem__):
        one, limits = shown[place], by.limits[place]
        if len(one.squares_N) != len(limits.scale.squares_N):
            continue  # it did not run in every pass, which is told elsewhere
        alone = stacked([one])
        for unit, bounds in limits.bounds.items():
            number = None if unit is None else one.units.index(unit)
            values = statistics_of(alone, limits.scale, number)[0]
            for name, value, bound in zip(STATISTICS, values, bounds, strict=True):
                # Written so that NaN is an alarm.
                if not bound.failing[0] <= value <= bound.failing[1]:
                    raised.append(Alarm(place=place, unit=unit, statistic=name, value=float(value), bound=bound))
    return raised
