"""The matched filter (numerics.md 2.9): how much of each template is in an error, and which templates are it.

A template is what one bug does to the logits. Errors and templates are divided by their row's round-off and whitened
by the covariance that the replicas' round-off has over the columns, so that directions in which round-off is small
count for what they are worth; then they are summed by prompt, and all that follows works on these sums.

Shape legend: K replicas, M rows, R coordinates of a row, P prompts, T templates, F sign flips.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from harness.numerics.bounds import normal_quantile, student_quantile
from harness.numerics.constants import ALIAS, CATCH, COEFFICIENT, EXPLAINED, FURTHER, RIDGE, SIGN_FLIPS

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
_TINY = float(np.finfo(np.float64).tiny)
_SEED = 0x7465


def whitening(errors: NDArray[np.floating]) -> Float64:
    """The symmetric W [R, R] for which errors times W have no direction in which round-off is larger than in another.

    Coordinates in which the replicas hardly differ are held at a share RIDGE of the mean variance: a finite number of
    rows knows no smaller one.

    Args:
        errors: of the replicas less their mean, in units of their rows' round-off, [K, M, R].
    """
    flat = errors.reshape(-1, errors.shape[-1]).astype(np.float64)
    values, vectors = np.linalg.eigh(flat.T @ flat / max(1, len(flat)))
    floor = RIDGE * max(float(values.mean()), _TINY)
    found: Float64 = (vectors / np.sqrt(np.maximum(values, 0) + floor)) @ vectors.T
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Sums:
    """What a candidate's error has in common with each template, by prompt.

    Attributes:
        along: sum over rows of <error, template>, the replicas' mean taken off, [P, T].
        raw: the same of the whole error, [P, T].
        square: sum of |error|^2, the mean taken off, [P].
    """

    along: Float64
    raw: Float64
    square: Float64

    def of_prompts(self, prompts: Sequence[int]) -> Sums:
        """The same on some of the prompts alone."""
        which = list(prompts)
        return Sums(along=self.along[which], raw=self.raw[which], square=self.square[which])


@dataclass(frozen=True, kw_only=True, slots=True)
class Match:
    """One template, fitted.

    Attributes:
        index: of the template.
        coefficient: its share of the error, 1 for a bug that is there as the template has it.
        raw: the same where the replicas' mean is left in the error.
        error: standard error of the coefficient: the larger of the replicas' scatter and the prompts' jackknife.
        gain: how much of the squared error it takes away.
    """

    index: int
    coefficient: float
    raw: float
    error: float
    gain: float

    @property
    def z(self) -> float:
        return self.coefficient / self.error if self.error else math.copysign(math.inf, self.coefficient)


def fits(coefficient: float) -> bool:
    """Whether a bug is there as its template has it (COEFFICIENT)."""
    low, high = COEFFICIENT
    return low <= coefficient <= high


@dataclass(frozen=True, kw_only=True)
class Filter:
    """All templates of one precision, on the rows of some views.

    Attributes:
        gram: sums over rows of <template, template>, [P, T, T].
        replicas: of each replica, the sums of <error less the replicas' mean, template>, [K, P, T].
        squares: of each replica, the sums of |error less the replicas' mean|^2, [K, P].
        kinds: templates of one kind are one bug at several strengths, [T].
        whole: templates of bugs that are there at their own size or not at all, [T]; None for no such.
    """

    gram: Float64
    replicas: Float64
    squares: Float64
    kinds: Int64
    whole: NDArray[np.bool_] | None = None

    def of_prompts(self, prompts: Sequence[int]) -> Filter:
        """The same on some of the prompts alone."""
        which = list(prompts)
        return replace(self, gram=self.gram[which], replicas=self.replicas[:, which], squares=self.squares[:, which])

    # --- what round-off alone gives ----------------------------------------------------------------

    @cached_property
    def total(self) -> Float64:
        """Gram matrix of all prompts, [T, T]."""
        found: Float64 = self.gram.sum(axis=0)
        return found

    @property
    def _one_more(self) -> float:
        """A replica less the mean that it is part of is smaller than one more implementation less that mean."""
        count = len(self.replicas)
        return math.sqrt((1 + 1 / count) / (1 - 1 / count))

    def scatter(self, weights: Float64) -> Float64:
        """Standard deviation over replicas of weighted sums over templates, [S] for weights [T, S].

        That of independent prompts, or of whole replicas where that is larger: errors of one replica's prompts may go
        together, and few replicas may hide that.
        """
        sums = self.replicas @ weights
        count = max(1, len(sums) - 1)
        by_prompt = (sums**2).sum(axis=(0, 1)) / count
        whole = (sums.sum(axis=1) ** 2).sum(axis=0) / count
        found: Float64 = np.sqrt(np.maximum(by_prompt, whole) * (1 + 1 / len(sums)))
        return found

    @cached_property
    def errors(self) -> Float64:
        """Standard error of each template's own coefficient, from replicas, [T]; infinite for an empty template."""
        length = np.diag(self.total)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(length > 0, self.scatter(np.eye(len(length))) / length, np.inf)

    def limit(self, alpha: float) -> float:
        """|z| that the largest of all templates passes by chance at a rate of at most ``alpha``.

        From the largest |z| over templates of each replica under random sign flips of its prompts, which are as
        likely as what was seen where errors of prompts are independent: their Gumbel distribution by moments, widened
        as Student's t is against the normal, since standard errors come from these very replicas.
        """
        usable = np.isfinite(self.errors) & (self.errors > 0)
        if not usable.any():
            return math.inf
        scale = self.errors[usable] * np.diag(self.total)[usable]
        flips = np.random.default_rng(_SEED).choice((-1.0, 1.0), size=(SIGN_FLIPS, self.replicas.shape[1]))
        sums = np.einsum("fp,kpt->kft", flips, self.replicas[:, :, usable], optimize=True) * self._one_more
        largest = (np.abs(sums) / scale).max(axis=2).ravel()
        beta = float(largest.std()) * math.sqrt(6) / math.pi
        quantile = float(largest.mean()) - beta * (float(np.euler_gamma) + math.log(-math.log1p(-alpha)))
        each = alpha / int(usable.sum()) / 2
        return quantile * student_quantile(1 - each, self._degrees) / normal_quantile(1 - each)

    @cached_property
    def _degrees(self) -> float:
        """Degrees of freedom of a standard error: those of its prompts' variances together (Satterthwaite)."""
        variances = (self.replicas**2).sum(axis=0)
        variances = variances[:, variances.any(axis=0)]
        shares = variances / variances.sum(axis=0)
        return float(np.median(1 / (shares**2).sum(axis=0))) * max(1, len(self.replicas) - 1)

    def usual(self) -> float:
        """Squared error that CATCH of correct implementations stay below."""
        squares = self.squares.sum(axis=1) * self._one_more**2
        spread = float(squares.std(ddof=1)) if len(squares) > 1 else 0.0
        return float(squares.mean()) + normal_quantile(CATCH) * spread

    # --- which templates are one -------------------------------------------------------------------

    @cached_property
    def classes(self) -> Int64:
        """Number of the alias class of each template, [T]: chains of one bug's, or with |cosine| above ALIAS."""
        from scipy.sparse.csgraph import connected_components

        alike = (np.abs(self.cosines) > ALIAS) | (self.kinds[:, None] == self.kinds[None, :])
        found: Int64 = connected_components(alike, directed=False)[1].astype(np.int64)
        return found

    @cached_property
    def cosines(self) -> Float64:
        """Cosine of each pair of templates, [T, T]; 0 beside an empty one."""
        length = np.sqrt(np.maximum(np.diag(self.total), 0))
        with np.errstate(divide="ignore", invalid="ignore"):
            found: Float64 = np.nan_to_num(self.total / length[:, None] / length[None, :], posinf=0, neginf=0)
        return found

    # --- what an error is --------------------------------------------------------------------------

    def fit(self, sums: Sums, chosen: Sequence[int]) -> list[Match]:
        """The templates ``chosen``, fitted together by least squares."""
        which = list(chosen)
        weights: Float64 = np.linalg.pinv(self.total[np.ix_(which, which)], hermitian=True).astype(np.float64)
        along, raw = sums.along[:, which].sum(axis=0), sums.raw[:, which].sum(axis=0)
        coefficients, raws = weights @ along, weights @ raw
        spread = np.zeros((len(self.total), len(which)))
        spread[which] = weights
        errors = np.maximum(self.scatter(spread), self._jackknife(sums, which, coefficients, weights))
        return [
            Match(
                index=index,
                coefficient=float(coefficients[i]),
                raw=float(raws[i]),
                error=float(errors[i]),
                gain=float(coefficients[i] ** 2 / max(float(weights[i, i]), _TINY)),
            )
            for i, index in enumerate(which)
        ]

    def _jackknife(self, sums: Sums, which: list[int], coefficients: Float64, weights: Float64) -> Float64:
        """Standard error from the scatter of prompts about the fit: the infinitesimal jackknife (Jaeckel 1972).

        Leaving out whole prompts, as numerics.md has it, blows up where one long prompt holds most of a template.
        """
        left = sums.along[:, which] - self.gram[np.ix_(range(len(self.gram)), which, which)] @ coefficients
        influence = left @ weights
        count = len(influence)
        found: Float64 = np.sqrt((influence**2).sum(axis=0) * count / max(1, count - 1))
        return found

    def ranked(self, sums: Sums, chosen: Sequence[int] = ()) -> list[Match]:
        """Templates of other classes than ``chosen``, by how much each takes away beside these, best first.

        Of each class the best member stands. One whose coefficient lies outside COEFFICIENT is the bug at another
        strength, and must take away twice as much as one that fits as it is; where a bug has no other strength
        (``whole``) it is not that bug.
        """
        taken = {int(self.classes[index]) for index in chosen}
        gains, coefficients = self._beside(sums, list(chosen))
        as_it_is = np.array([fits(one) for one in coefficients])
        worth = np.where(as_it_is, 2.0, 1.0) * gains
        if self.whole is not None:
            worth[self.whole & ~as_it_is] = 0.0
        best: dict[int, int] = {}
        # Of members that are alike the one whose strength fits as it is.
        order = sorted(
            np.flatnonzero(worth > 0),
            key=lambda i: (-round(math.log(worth[i]), 2), abs(math.log(abs(coefficients[i])))),
        )
        for index in order:
            if int(self.classes[index]) not in taken:
                best.setdefault(int(self.classes[index]), int(index))
        return [self.fit(sums, [*chosen, index])[-1] for index in best.values()]

    def _beside(self, sums: Sums, chosen: list[int]) -> tuple[Float64, Float64]:
        """Of each template the squared error that it takes away beside ``chosen``, and its coefficient there."""
        along, length = sums.along.sum(axis=0), np.diag(self.total).copy()
        own = length.copy()
        if chosen:
            cross = self.total[:, chosen]
            weights = np.linalg.pinv(self.total[np.ix_(chosen, chosen)], hermitian=True)
            along = along - cross @ (weights @ along[chosen])
            length = length - np.einsum("ts,su,tu->t", cross, weights, cross)
        # What is left of a template that the others nearly hold is rounding.
        known = length > 1e-4 * np.maximum(own, _TINY)
        safe = np.where(known, length, 1.0)
        return np.where(known, along**2 / safe, 0.0), np.where(known, along / safe, 0.0)

    def named(self, sums: Sums, limit: float, most: int = 3) -> list[Match]:
        """The templates that the error is made of, fitted together; none where nothing is beyond chance.

        One after another, best first. Each must lie beyond ``limit`` beside those before it, and must explain a share
        EXPLAINED of what was left beyond round-off: a gross error has a part along every template. A further one must
        take away a share FURTHER of what the first does: a wrong function has other round-off than the right one.
        """
        chosen: list[int] = []
        left, usual, first = float(sums.square.sum()), self.usual(), 0.0
        while len(chosen) < most:
            best = next(iter(self.ranked(sums, chosen)), None)
            if best is None or not abs(best.z) > limit or best.gain < EXPLAINED * (left - usual):
                break
            if chosen and best.gain < FURTHER * first:
                break
            first = first or best.gain
            if not all(abs(one.z) > limit for one in self.fit(sums, [*chosen, best.index])):
                break
            chosen.append(best.index)
            left -= best.gain
        return self.fit(sums, chosen) if chosen else []

    def share(self, sums: Sums, chosen: Sequence[int]) -> tuple[float, float]:
        """Share of an error that lies in the span of ``chosen``, and the largest that round-off alone gives."""
        which = list(chosen)
        weights = np.linalg.pinv(self.total[np.ix_(which, which)], hermitian=True)
        along = sums.along[:, which].sum(axis=0)
        chance = self.replicas[:, :, which].sum(axis=1)
        inside = np.einsum("kt,tu,ku->k", chance, weights, chance) / self.squares.sum(axis=1)
        return float(along @ weights @ along) / max(float(sums.square.sum()), _TINY), float(inside.max())

    def needed(self, index: int, limit: float) -> float:
        """Multiple of the suite's rows from which a bug as its template has it passes ``limit`` half of the time."""
        return float((limit * self.errors[index]) ** 2)
