"""How far the tensors of each module are from the reference's: a few numbers by place and by unit.

Shape legend: N rows (tokens), W width, U units, K replicas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from harness.locate.replaying import Pass, Phase, Place, Replay, Rows
from harness.numerics.constants import SIGMA_FLOOR

Float64 = NDArray[np.float64]

#: The statistics of a place, in the order of `statistics_of` (numerics.md 2.8).
STATISTICS = ("error", "worst token", "worst channel", "constant shift", "gain")


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Unit:
    """One phase of one presentation."""

    presentation: int
    phase: Phase


@dataclass(frozen=True, kw_only=True, slots=True)
class Deviation:
    """The errors of one place, condensed; each array of the units counts these in ``units``.

    Attributes:
        units: those that it ran in.
        unit_N: the unit of each row.
        squares_N: mean square of each row's error.
        sizes_N: mean square of each row of the reference.
        channels_UW: sums over rows of squared errors.
        widths_UW: sums over rows of the reference's squares.
        sums_UW: sums over rows of errors.
        products_U: sums of errors times the reference.
        batch_row_N, positions_N: of each row, -1 where rows are no tokens.
        passes_N: number of the pass of each row.
    """

    units: tuple[Unit, ...]
    unit_N: NDArray[np.int64]
    squares_N: Float64
    sizes_N: Float64
    channels_UW: Float64
    widths_UW: Float64
    sums_UW: Float64
    products_U: Float64
    batch_row_N: NDArray[np.int64]
    positions_N: NDArray[np.int64]
    passes_N: NDArray[np.int64]


def deviations(replay: Replay, passes: Sequence[Pass]) -> dict[Place, Deviation]:
    """All places of a replay, condensed."""
    return {place: _condensed(rows, passes) for place, rows in replay.rows.items()}


def _condensed(parts: Sequence[Rows], passes: Sequence[Pass]) -> Deviation:
    units = sorted({_unit(passes[one.number]) for one in parts})
    lengths = [len(one.right) for one in parts]
    unit_N = np.repeat([units.index(_unit(passes[one.number])) for one in parts], lengths)
    error_NW = torch.cat([one.error for one in parts])
    right_NW = torch.cat([one.right for one in parts])
    index_N = torch.from_numpy(unit_N)
    square_NW, size_NW = error_NW.square(), right_NW.square()

    def summed(values: torch.Tensor) -> Float64:
        total = torch.zeros((len(units), *values.shape[1:]), dtype=torch.float64)
        found: Float64 = total.index_add_(0, index_N, values).numpy()
        return found

    return Deviation(
        units=tuple(units),
        unit_N=unit_N,
        squares_N=square_NW.mean(dim=1).numpy(),
        sizes_N=size_NW.mean(dim=1).numpy(),
        channels_UW=summed(square_NW),
        widths_UW=summed(size_NW),
        sums_UW=summed(error_NW),
        products_U=summed((error_NW * right_NW).sum(dim=1)),
        batch_row_N=np.concatenate([one.batch_row for one in parts]),
        positions_N=np.concatenate([one.positions for one in parts]),
        passes_N=np.repeat([one.number for one in parts], lengths),
    )


def _unit(one: Pass) -> Unit:
    return Unit(presentation=one.presentation, phase=one.phase)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """What round-off of one place is like, from its replicas, for each row and channel.

    A result that a correct implementation rounds once more than any replica differs by that rounding, so nothing is
    smaller than one rounding: eps / sqrt(12) of the value, the rms of an error uniform within half a unit.

    Attributes:
        rounding: eps^2 / 12 of the precision.
        squares_N: mean square of each row's round-off.
        channels_UW: of each channel's, summed over the unit's rows.
    """

    rounding: float
    squares_N: Float64
    channels_UW: Float64


@dataclass(frozen=True, kw_only=True, slots=True)
class Stacked:
    """Deviations of K implementations at one place: the fields of `Deviation`, each with an axis K in front."""

    unit_N: NDArray[np.int64]
    squares_KN: Float64
    sizes_KN: Float64
    channels_KUW: Float64
    widths_KUW: Float64
    sums_KUW: Float64
    products_KU: Float64


def stacked(those: Sequence[Deviation]) -> Stacked:
    """Deviations of one place, which ran in the same units."""
    return Stacked(
        unit_N=those[0].unit_N,
        squares_KN=np.stack([one.squares_N for one in those]),
        sizes_KN=np.stack([one.sizes_N for one in those]),
        channels_KUW=np.stack([one.channels_UW for one in those]),
        widths_KUW=np.stack([one.widths_UW for one in those]),
        sums_KUW=np.stack([one.sums_UW for one in those]),
        products_KU=np.stack([one.products_U for one in those]),
    )


def scale_of(replicas: Stacked, eps: float) -> Scale:
    """The scale of a place from what its replicas show; ``eps`` is the precision's."""
    rounding = eps**2 / 12
    squares_N = np.maximum(replicas.squares_KN.mean(axis=0), rounding * replicas.sizes_KN[0])
    floor = SIGMA_FLOOR**2 * np.median(squares_N)
    return Scale(
        rounding=rounding,
        squares_N=np.maximum(squares_N, floor),
        channels_UW=np.maximum(replicas.channels_KUW.mean(axis=0), rounding * replicas.widths_KUW[0]),
    )


def statistics_of(those: Stacked, scale: Scale, unit: int | None) -> Float64:
    """STATISTICS of a place, [K, 5], in one of its units, or over all; of magnitudes the logarithm.

    Rows and channels without any round-off whose value is not 0 count as infinite.
    """
    rows = np.ones(len(those.unit_N), dtype=bool) if unit is None else those.unit_N == unit
    cut = slice(None) if unit is None else slice(unit, unit + 1)
    count = int(rows.sum())
    ratio_KN = _ratio(those.squares_KN[:, rows] + scale.rounding * those.sizes_KN[:, rows], scale.squares_N[rows])
    widths_KUW = those.widths_KUW[:, cut]
    channel_KW = _ratio(
        (those.channels_KUW[:, cut] + scale.rounding * widths_KUW).sum(axis=1), scale.channels_UW[cut].sum(axis=0)
    )
    size_K = widths_KUW.sum(axis=(1, 2))
    shift_K = (those.sums_KUW[:, cut].sum(axis=1) ** 2).sum(axis=1) / count**2 + scale.rounding * size_K / count**2
    gain_K = np.divide(those.products_KU[:, cut].sum(axis=1), size_K, out=np.zeros_like(size_K), where=size_K != 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs_SK = np.log([ratio_KN.mean(axis=1), ratio_KN.max(axis=1), channel_KW.max(axis=1), shift_K]) / 2
        return np.stack([*logs_SK, gain_K], axis=1)


def row_ratios(one: Deviation, scale: Scale) -> Float64:
    """Each row's error in units of its round-off, [N]."""
    return np.sqrt(_ratio(one.squares_N + scale.rounding * one.sizes_N, scale.squares_N))


def _ratio(found: Float64, usual: Float64) -> Float64:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(usual > 0, found / usual, np.where(found == 0, 1.0, np.inf))


Deviations = Mapping[Place, Deviation]
