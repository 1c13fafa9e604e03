"""Whether a tensor is what a fresh module starts with: random numbers, related to nothing that is stored."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from harness.numerics.constants import ALPHA

if TYPE_CHECKING:
    import torch

#: A fresh tensor is missed, and another one taken for one, at this many standard errors.
_SIGMAS = NormalDist().inv_cdf(1 - ALPHA / 2)

#: Fourth moment over the squared second one, less 1: what the scatter of a variance goes by.
_NORMAL, _UNIFORM = 2.0, 0.8


def fresh(held: torch.Tensor, right: torch.Tensor | None, config: Mapping[str, Any]) -> str:
    """How a tensor was initialised, in words; "" where it is related to what it should be, or is too small to say.

    Two independent tensors of n elements have a correlation of 0 ± 1/sqrt(n), and a variance is known to
    ± sqrt((kurtosis - 1)/n) of itself.
    """
    count = held.numel()
    # As many elements as show a correlation of a half: with fewer "unrelated" means nothing.
    if count <= (2 * _SIGMAS) ** 2 or not bool(held.isfinite().all()):
        return ""
    wide = held.double()
    if right is not None and abs(_correlation(wide, right.double())) > _SIGMAS / math.sqrt(count):
        return ""
    variance = float(wide.square().mean())
    for words, deviation, scatter in _starts(tuple(held.shape), config):
        if abs(variance / deviation**2 - 1) <= _SIGMAS * math.sqrt(scatter / count):
            bounded = float(wide.abs().max()) <= deviation * math.sqrt(3) * (1 + 2.0**-8)
            if (scatter == _UNIFORM) == bounded:
                return f"left at its random initialisation ({words})"
    return "unrelated to what the checkpoint has" if right is not None else ""


def _correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    size = float(a.norm() * b.norm())
    return float((a * b).sum()) / size if size else 0.0


def _starts(shape: tuple[int, ...], config: Mapping[str, Any]) -> Iterator[tuple[str, float, float]]:
    """(in words, standard deviation, scatter of a variance) of the ways in which modules start."""
    chosen = config.get("initializer_range")
    if isinstance(chosen, float) and chosen > 0:
        yield f"normal, {chosen:g}", chosen, _NORMAL
        layers = config.get("n_layer") or config.get("num_hidden_layers")
        if isinstance(layers, int) and layers > 0:
            yield f"normal, {chosen:g} over the root of {2 * layers} sums", chosen / math.sqrt(2 * layers), _NORMAL
    yield "normal, 1", 1.0, _NORMAL
    if len(shape) == 2:
        for inputs in set(shape):
            yield f"uniform, 1/sqrt({inputs})", 1 / math.sqrt(3 * inputs), _UNIFORM
        yield "normal, of both sides", math.sqrt(2 / sum(shape)), _NORMAL
        yield "uniform, of both sides", math.sqrt(2 / sum(shape)), _UNIFORM
