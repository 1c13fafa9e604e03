"""Likeness: which bugs of the catalogue an error is made of, below the size of round-off too (numerics.md 2.9)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from harness.comparison import layering, residual
from harness.comparison.context import Context
from harness.numerics.constants import ALPHA_TEMPLATES
from harness.numerics.matched import Filter, Match, Sums, fits
from harness.report.diagnosis import likeness_words
from harness.templates.fitting import Projector, filter_of, part_of, places_of, sums_of
from harness.templates.layers import Maker
from harness.values import Diagnosis, Finding, Likeness, Status, TemplateNoise, Templates

Float64 = NDArray[np.float64]

#: Share of the limit from which a bug is looked for in single blocks. A choice of cost, of no verdict.
_HALF = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    """The templates beside one candidate's error, for all that is asked of them.

    Attributes:
        bank, noise, projector: the templates, and the round-off that they are held against.
        views: indices of the views that the candidate shows.
        rows: which rows of the templates these are, [M].
        error: of the candidate, in units of round-off, zero where it shows nothing, [M, R].
        sums: of the bugs.
        all_sums: of bugs and places.
        filter: of the bugs.
        limit: of |z|.
        named: the bugs that the error is made of.
    """

    bank: Templates
    noise: TemplateNoise
    projector: Projector
    views: list[int]
    rows: NDArray[np.bool_]
    error: Float64
    sums: Sums
    all_sums: Sums
    filter: Filter
    limit: float
    named: tuple[Match, ...]


def diagnose(context: Context, bank: Templates, maker: Maker | None = None) -> tuple[Diagnosis, list[Finding]]:
    """What the templates say, and a finding for each bug that is there as the catalogue has it.

    ``maker`` makes what a bug does in single blocks; without it nothing is said of blocks.
    """
    fitted, reason = fit(context, bank)
    if fitted is None:
        return Diagnosis(reason=reason), []
    one = fitted.filter
    ranked = one.ranked(fitted.sums)
    needed = {index: one.needed(index, fitted.limit) for index in range(len(bank.names))}
    left = residual.words(context, fitted, places_of(bank, fitted.noise, fitted.views))
    diagnosis = Diagnosis(
        limit=fitted.limit,
        named=_named(fitted, maker),
        nearest=_nearest(fitted, ranked[:2], bool(left), maker),
        templates=len(bank.names),
        untestable={_name(bank, index): multiple for index, multiple in needed.items() if multiple > 1},
        residual=left,
    )
    # At another strength it is a hint, and the error's own size and statistics decide.
    return diagnosis, [_finding(context, fitted, match) for match in fitted.named if fits(match.coefficient)]


def fit(context: Context, bank: Templates) -> tuple[Fitted | None, str]:
    """Fit the templates to a candidate's error; None and the reason where that cannot be done."""
    noise = bank.noises.get(context.precision)
    if context.floor is None or context.missing or noise is None:
        return None, context.missing or f"the templates have no round-off of {context.precision}"
    if context.scoring.centre is not None:
        return None, "the candidate's weights are rounded as it declares, and templates are of the checkpoint's own"
    if not bank.names:
        return None, "no bug of the catalogue changes anything here"
    if context.trace.basis not in ("", context.golden.model.digest):
        return None, "the trace was made with the head of another model"
    error, views = _error(context, bank)
    if not views:
        return None, f"no logits of the run {bank.run!r} were shown for it (a trace is made with --diagnose as well)"
    if not np.isfinite(error).all():
        return None, "its logits are not finite"
    # Of the precision itself, which the templates' round-off was measured in, whatever parallelism is declared.
    sigma = context.golden.floors[context.precision].sigma[bank.place].astype(np.float64)
    prompt = context.golden.rows.request[bank.place]
    projector = Projector.of(bank, prompt, sigma, noise.whiten)
    rows = np.isin(bank.view, views)
    error /= sigma[:, None]
    whole = sums_of(projector, noise, error, views)
    sums = part_of(whole, slice(len(bank.names)))
    one = filter_of(bank, noise, views)
    limit = one.limit(ALPHA_TEMPLATES)
    return Fitted(
        bank=bank,
        noise=noise,
        projector=projector,
        views=views,
        rows=rows,
        error=error,
        sums=sums,
        all_sums=whole,
        filter=one,
        limit=limit,
        named=tuple(one.named(sums, limit)),
    ), ""


def _error(context: Context, bank: Templates) -> tuple[Float64, list[int]]:
    """What the candidate shows less what it should, [M, R], and the indices of the views that it shows."""
    centre = bank.centres[context.declared if context.declared in bank.centres else context.precision]
    error, views = np.zeros(centre.shape), []
    for index, view in enumerate(bank.views):
        shown = next((one for one in context.trace.passes if one.run == bank.run and one.view == view), None)
        if shown is None or shown.rows is None or shown.rows.fine is None:
            continue
        rows = np.flatnonzero(bank.view == index)
        fine = shown.rows.fine
        if fine.shape != (len(rows), len(bank.turn)) or (context.place(shown.rows) != bank.place[rows]).any():
            continue
        error[rows] = fine @ bank.turn - centre[rows]
        views.append(index)
    return error, views


# --- in which blocks ---------------------------------------------------------------------------


def _named(fitted: Fitted, maker: Maker | None) -> tuple[Likeness, ...]:
    """The bugs that the error is made of, each with its blocks."""
    found = []
    for match in fitted.named:
        parts = None if maker is None else maker(*fitted.bank.names[match.index])
        others = [one for one in fitted.named if one is not match]
        layers = () if parts is None else layering.fit(fitted, match, parts, others).layers
        found.append(replace(_likeness(fitted, match), layers=layers))
    return tuple(found)


def _nearest(fitted: Fitted, ranked: list[Match], left: bool, maker: Maker | None) -> tuple[Likeness, ...]:
    """The best templates, the first that is there in some of its blocks with these.

    A bug in one block of many is little of its template. Blocks are tried where something is there: an error that is
    ``left`` beyond round-off, or a |z| beyond its limit that explains too little. So of a correct candidate hardly
    any run is made.
    """
    found = [_likeness(fitted, match) for match in ranked]
    if fitted.named or maker is None:
        return tuple(found)
    for number, match in enumerate(ranked):
        if abs(match.z) > fitted.limit * (_HALF if left else 1.0) and (one := _in_blocks(fitted, match, maker)):
            found[number] = one
            break
    return tuple(found)


def _in_blocks(fitted: Fitted, match: Match, maker: Maker) -> Likeness | None:
    """A bug that is what the error is made of in some of its blocks, at the strength that it has there."""
    bank = fitted.bank
    for _ in range(2):
        parts = maker(*bank.names[match.index])
        one = None if parts is None else layering.fit(fitted, match, parts)
        if one is None or not one.explains:
            return None
        if fits(one.largest):
            return replace(_likeness(fitted, match), layers=one.layers)
        # A bug in one block is about that bug at a lower strength in all, which ranked first.
        name, strength = bank.names[match.index]
        others = [index for index, (other, _) in enumerate(bank.names) if other == name]
        far = {index: abs(math.log(abs(one.largest) * strength / bank.names[index][1])) for index in others}
        (match,) = fitted.filter.fit(fitted.sums, [min(others, key=far.__getitem__)])
    return None


# --- in words ----------------------------------------------------------------------------------


def _name(bank: Templates, index: int) -> str:
    name, strength = bank.names[index]
    return name if strength == 1 else f"{name} at {strength:g}"


def _likeness(fitted: Fitted, match: Match) -> Likeness:
    bank = fitted.bank
    alike = np.flatnonzero(fitted.filter.classes == fitted.filter.classes[match.index])
    own = bank.names[match.index][0]
    return Likeness(
        name=_name(bank, match.index),
        wrong=bank.wrong[match.index],
        coefficient=match.coefficient,
        raw=match.raw,
        z=match.z,
        aliases=tuple(sorted({bank.names[index][0] for index in alike} - {own})),
    )


def _finding(context: Context, fitted: Fitted, match: Match) -> Finding:
    one = _likeness(fitted, match)
    return Finding(
        status=Status.DEVIATES,
        check="looks like",
        question=context.question,
        message=f"{likeness_words(one)}: {one.wrong}",
        where=f"all passes of the run {fitted.bank.run!r}",
        measured=match.z,
        allowed=fitted.limit,
        why=f"largest |z| of {len(fitted.bank.names)} templates over {len(fitted.filter.replicas)} replicas under "
        f"sign flips of prompts, for rate {ALPHA_TEMPLATES:.2g}",
        fix=f"Look whether it has this: {one.wrong}",
    )
