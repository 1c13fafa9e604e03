"""Residual: what an error has beyond round-off when the named bugs are taken away, and its pattern in words.

Shape legend: M rows of all views, R coordinates, P prompts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from harness.comparison.context import Context, request_name
from harness.engines import decoding
from harness.numerics.constants import EXPLAINED, MOSTLY
from harness.numerics.matched import Filter, Sums
from harness.templates.fitting import part_of

if TYPE_CHECKING:
    from harness.comparison.likeness import Fitted

Float64 = NDArray[np.float64]
_TINY = float(np.finfo(np.float64).tiny)
_TOKENS = 3
#: Uniform rounding has a variance of a step's square over this.
_UNIFORM = 12
#: A place is told that holds so many times what any other, or round-off, does.
_CLEAR = 2.0


def words(context: Context, fitted: Fitted, places: Filter) -> tuple[str, ...]:
    """Size and pattern of what is left; empty where it is no more than round-off."""
    left, rounding = _left(fitted), _rounding(fitted)
    if float((left**2).sum()) <= fitted.filter.usual() + 2 * float(rounding.sum()):
        return ()
    square = (left**2).sum(axis=1)
    usual = fitted.noise.row.astype(np.float64) * (1 + 1 / len(fitted.noise.along)) + rounding
    rows = fitted.rows
    ratio = math.sqrt(float(square[rows].sum()) / max(float(usual[rows].sum()), _TINY))
    # An excess below zero is round-off that came out small.
    excess = np.where(rows, np.maximum(square - usual, 0.0), 0.0)
    beside = " beside what is named" if fitted.named else ""
    told = [f"{ratio:.3g} x round-off{beside}"]
    told += list(_by_view(context, fitted, excess)) or list(_by_kind(context, fitted, excess, usual))
    told += list(_by_prompt(context, fitted, excess, usual)) or list(_by_padding(context, fitted, excess, usual))
    told += _by_position(context, fitted, excess, usual)
    told += _by_token(context, fitted, left)
    told += _by_place(fitted, left, places)
    return tuple(told)


def _left(fitted: Fitted) -> Float64:
    """The whitened error less the replicas' mean and the named bugs, [M, R]; zero in rows that are not shown."""
    left = (fitted.error - fitted.noise.mean) @ fitted.noise.whiten
    for match in fitted.named:
        left -= match.coefficient * fitted.projector.template(match.index)
    left[~fitted.rows] = 0.0
    return left


def _rounding(fitted: Fitted) -> Float64:
    """Squared error of each row from the 8 bits of the named templates, [M]: a step's square over 12 a coordinate."""
    found = np.zeros(len(fitted.rows))
    spread = float((fitted.projector.from_frame**2).sum()) / _UNIFORM
    for match in fitted.named:
        step = match.coefficient * fitted.bank.scales[match.index].astype(np.float64) / fitted.projector.sigma
        found += step**2 * spread
    return found * fitted.rows


def _mostly(part: Float64, excess: Float64) -> bool:
    return float(part.sum()) >= MOSTLY * float(excess.sum())


def _by_view(context: Context, fitted: Fitted, excess: Float64) -> Iterator[str]:
    """Which path shows it, on the positions that both show."""
    views = {fitted.bank.views[index]: index for index in fitted.views}
    if len(views) < 2:
        return
    generated = context.golden.rows.generated[fitted.bank.place]
    common: dict[str, float] = {
        view: float(excess[(fitted.bank.view == index) & generated].sum()) for view, index in views.items()
    }
    total = sum(common.values())
    for view, text in (("replay", "decode"), ("prefill", "prefill")):
        if total and common[view] >= MOSTLY * total:
            yield f"on the {text} path alone, of the positions that both paths show"


def _by_prompt(context: Context, fitted: Fitted, excess: Float64, usual: Float64) -> Iterator[str]:
    """The prompt that has nearly all of it, where others are as large."""
    prompt = fitted.projector.prompt
    by_prompt, sizes = np.bincount(prompt, weights=excess), np.bincount(prompt, weights=usual * fitted.rows)
    worst = int(by_prompt.argmax())
    if len(by_prompt) > 1 and by_prompt[worst] >= MOSTLY * by_prompt.sum() and sizes[worst] < MOSTLY * sizes.sum():
        yield f"in prompt {request_name(context.golden, worst)!r} alone"


def _by_padding(context: Context, fitted: Fitted, excess: Float64, usual: Float64) -> Iterator[str]:
    """Whether rows with padding alone show it."""
    run = next((one for one in context.golden.suite.runs if one.name == fitted.bank.run), None)
    if run is None or run.batch_size is None:
        return  # planned batches are hardly padded
    lengths = [len(one.prompt_ids) for one in context.golden.requests]
    batches = decoding.plan_batches(lengths, run.batch_size)
    padded = np.zeros(len(lengths), dtype=np.bool_)
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        padded[[index for index in batch if lengths[index] < longest]] = True
    inside = padded[fitted.projector.prompt]
    for mask, text in ((inside, "with padding"), (~inside, "without padding")):
        share = float((usual * mask * fitted.rows).sum()) / max(float((usual * fitted.rows).sum()), _TINY)
        if _mostly(excess * mask, excess) and share < MOSTLY:
            yield f"in rows {text} alone"


def _by_kind(context: Context, fitted: Fitted, excess: Float64, usual: Float64) -> Iterator[str]:
    """Generated or prompt positions alone, where these are not nearly all."""
    generated = context.golden.rows.generated[fitted.bank.place]
    here = usual * fitted.rows
    for mask, text in ((generated, "generated"), (~generated, "prompt")):
        if _mostly(excess * mask, excess) and float((here * mask).sum()) < EXPLAINED * float(here.sum()):
            yield f"at {text} positions alone"


def _by_position(context: Context, fitted: Fitted, excess: Float64, usual: Float64) -> Iterator[str]:
    """The positions between which it lies, where many others have none of it."""
    position = context.golden.rows.position[fitted.bank.place]
    order = np.argsort(position, kind="stable")
    here, sums = (usual * fitted.rows)[order], np.cumsum(excess[order])
    first, last = (
        int(position[order[min(int(np.searchsorted(sums, share * sums[-1])), len(order) - 1)]])
        for share in (1 - MOSTLY, MOSTLY)
    )
    inside = position[order]
    before, behind = float(here[inside < first].sum()), float(here[inside > last].sum())
    if first == last:
        yield f"at position {first} alone"
    elif before >= EXPLAINED * float(here.sum()):
        yield f"from position {first} on"
    elif behind >= EXPLAINED * float(here.sum()):
        yield f"up to position {last}"


def _by_token(context: Context, fitted: Fitted, left: Float64) -> Iterator[str]:
    """A shift that all positions share, and the tokens that it moves most; or a change of the logits' scale."""
    whole = float((left**2).sum())
    if not whole:
        return
    rows = fitted.rows
    mean = left[rows].mean(axis=0)
    # The squared length of a mean of n rows, n times, is its share of all.
    if rows.sum() * float(mean @ mean) >= EXPLAINED * whole:
        logits = fitted.bank.basis @ (fitted.bank.turn @ np.linalg.solve(fitted.noise.whiten, mean))
        worst = np.argsort(-np.abs(logits))[:_TOKENS]
        yield f"a shift that all positions share, most of tokens {', '.join(map(str, sorted(map(int, worst))))}"
    centre = fitted.bank.centres[context.precision] / fitted.projector.sigma[:, None] @ fitted.noise.whiten
    length = float((centre[rows] ** 2).sum())
    gain = float((left[rows] * centre[rows]).sum()) / max(length, _TINY)
    if gain**2 * length >= EXPLAINED * whole:
        yield f"the logits are scaled by {1 + gain:.4g}"


def _by_place(fitted: Fitted, left: Float64, places: Filter) -> Iterator[str]:
    """The part of the model that small changes of are most alike."""
    bank = fitted.bank
    if not bank.places:
        return
    count = len(bank.names)
    sums = part_of(fitted.all_sums, slice(count, None))
    along = sums.along
    if fitted.named:
        chosen = [match.index for match in fitted.named]
        cross = fitted.noise.gram[fitted.views][:, :, count:, chosen].sum(axis=0)
        along = along - cross @ np.array([match.coefficient for match in fitted.named])
    square = np.bincount(fitted.projector.prompt, weights=(left**2).sum(axis=1), minlength=len(along))
    sums = Sums(along=along, raw=along, square=square.astype(np.float64))
    shares = {
        place: places.share(sums, [index for index, name in enumerate(bank.places) if name == place])
        for place in dict.fromkeys(bank.places)
    }
    (best, (share, chance)), *others = sorted(shares.items(), key=lambda pair: -pair[1][0])
    second = others[0][1][0] if others else 0.0
    if share > max(_CLEAR * max(chance, second), 1 - MOSTLY):
        yield f"most like a change in {best} ({share:.2g} of it, {second:.2g} in the next part)"
