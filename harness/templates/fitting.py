"""Sums of a candidate's error with every template, by view and prompt: the one pass over rows that all fits need.

Shape legend: V views, M rows of all of them, P prompts, R coordinates, T templates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from harness.mutations.catalogue import CATALOGUE
from harness.numerics.matched import Filter, Sums
from harness.values import TemplateNoise, Templates

Float64 = NDArray[np.float64]


def change_of(bank: Templates, index: int) -> Float64:
    """What one template changes in the coordinates of the logits, [M, R]."""
    return np.asarray(_framed(bank, index) @ np.linalg.inv(bank.frame), dtype=np.float64)


def _framed(bank: Templates, index: int) -> Float64:
    framed: Float64 = bank.codes[index].astype(np.float64) * bank.scales[index].astype(np.float64)[:, None]
    return framed


@dataclass(frozen=True, kw_only=True, slots=True)
class Projector:
    """Templates beside the round-off of one precision.

    Attributes:
        bank: the templates.
        prompt: index of each row's prompt, [M].
        sigma: each row's round-off, [M].
        whiten: evens out the covariance of round-off, [R, R].
    """

    bank: Templates
    prompt: NDArray[np.int64]
    sigma: Float64
    whiten: Float64

    @classmethod
    def of(cls, bank: Templates, prompt: NDArray[np.int32], sigma: Float64, whiten: Float64) -> Projector:
        """For the templates of a golden, given each row's prompt."""
        return cls(bank=bank, prompt=prompt.astype(np.int64), sigma=sigma, whiten=whiten)

    @property
    def _cells(self) -> NDArray[np.int64]:
        """Index of each row's (view, prompt), [M]."""
        return self.bank.view * self._prompts + self.prompt

    @property
    def _prompts(self) -> int:
        return int(self.prompt.max(initial=-1)) + 1

    @property
    def _shape(self) -> tuple[int, int]:
        return (len(self.bank.views), self._prompts)

    def _summed(self, values: Float64) -> Float64:
        """Sums over the rows of each view and prompt, [V, P]."""
        total = np.bincount(self._cells, weights=values, minlength=self._shape[0] * self._shape[1])
        found: Float64 = total.astype(np.float64).reshape(self._shape)
        return found

    def template(self, index: int) -> Float64:
        """One template in units of round-off, whitened, [M, R]."""
        found: Float64 = (_framed(self.bank, index) @ self.from_frame) / self.sigma[:, None]
        return found

    @property
    def from_frame(self) -> Float64:
        """Turns a template in the bank's frame into one that is whitened, [R, R]."""
        return np.asarray(np.linalg.solve(self.bank.frame, self.whiten), dtype=np.float64)

    def sums(self, errors: NDArray[np.floating]) -> tuple[Float64, Float64]:
        """(sums with each template [K, V, P, T], squares [K, V, P]) of errors in units of round-off [K, M, R]."""
        # The templates stay in their frame and in 8 bits: what is multiplied with them is brought there once.
        to_frame, squares = self.from_frame.T, []
        framed = np.zeros(errors.shape, dtype=np.float32)
        for index, error in enumerate(errors):
            whitened = error @ self.whiten
            framed[index] = whitened @ to_frame / self.sigma[:, None]
            squares.append(self._summed((whitened**2).sum(axis=1)))
        along = np.zeros((len(errors), *self._shape, len(self.bank)))
        for index, (codes, scales) in enumerate(zip(self.bank.codes, self.bank.scales, strict=True)):
            products = np.einsum("kmr,mr->km", framed, codes.astype(np.float32)) * scales
            for error, values in enumerate(products):
                along[error, :, :, index] = self._summed(values.astype(np.float64))
        return along, np.stack(squares)

    def gram(self) -> Float64:
        """Sums of the products of templates with each other, [V, P, T, T]."""
        cells, count = self._cells, len(self.bank)
        found = np.zeros((self._shape[0] * self._shape[1], count, count))
        step = self.from_frame.astype(np.float32)
        for cell in np.unique(cells):
            rows = np.flatnonzero(cells == cell)
            scale = (self.bank.scales[:, rows] / self.sigma[rows]).astype(np.float32)
            part = (self.bank.codes[:, rows].astype(np.float32) @ step) * scale[:, :, None]
            flat = part.reshape(count, len(rows) * part.shape[2])
            # Some templates are a million times as long as others: each is brought to length 1 first.
            length = np.maximum(np.linalg.norm(flat, axis=1), np.finfo(np.float32).tiny)
            unit = flat / length[:, None]
            found[cell] = (unit @ unit.T).astype(np.float64) * length[:, None] * length
        return found.reshape(*self._shape, count, count)


def filter_of(bank: Templates, noise: TemplateNoise, views: list[int]) -> Filter:
    """The matched filter of the bugs, on the rows of some views."""
    names = [name for name, _ in bank.names]
    # A share of what a rounding does is what any other rounding shares with it: tf32 is in force or it is not.
    whole = np.array([_is_rounding(name) for name in names], dtype=np.bool_)
    return replace(_filter(noise, views, slice(len(names)), names), whole=whole)


def _is_rounding(name: str) -> bool:
    bug = CATALOGUE.get(name)
    return bug is not None and bug.group == "precision"


def places_of(bank: Templates, noise: TemplateNoise, views: list[int]) -> Filter:
    """The same of the places."""
    return _filter(noise, views, slice(len(bank.names), None), bank.places)


def _filter(noise: TemplateNoise, views: list[int], which: slice, kinds: Sequence[str]) -> Filter:
    numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
    return Filter(
        gram=noise.gram[views][:, :, which, which].sum(axis=0),
        replicas=noise.along[:, views][..., which].sum(axis=1),
        squares=noise.square[:, views].sum(axis=1),
        kinds=np.array([numbers[kind] for kind in kinds], dtype=np.int64),
    )


def part_of(sums: Sums, which: slice) -> Sums:
    """The sums with some of the templates alone."""
    return Sums(along=sums.along[:, which], raw=sums.raw[:, which], square=sums.square)


def sums_of(projector: Projector, noise: TemplateNoise, error: Float64, views: list[int]) -> Sums:
    """What an error in units of round-off [M, R] has in common with each template, on the rows of some views."""
    (along, mean), (square, _) = projector.sums(np.stack([error - noise.mean, noise.mean]))
    return Sums(
        along=along[views].sum(axis=0),
        raw=(along + mean)[views].sum(axis=0),
        square=square[views].sum(axis=0),
    )
