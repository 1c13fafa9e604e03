"""Which formula a live activation or norm computes: the nearest of the known ones, in float64.

No tolerance: whatever a module's rounding is, it is nearer to its own formula than to another one's.

Shape legend: N points, E hidden size.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from harness.locate.clues import Clue
from harness.locate.tables.reference import Reference

if TYPE_CHECKING:
    import torch
    from torch import nn

_ACTIVATIONS = ("act", "act_fn", "activation", "activation_fn", "gelu_impl", "activation_func", "nonlinearity")
_SEED = 12


def formulas(reference: Reference, model: nn.Module) -> Iterator[Clue]:
    """Clues of activations and norms that compute another formula than the reference's module of that name."""
    for path, held in model.named_modules():
        right = reference.modules.get(path)
        if right is None:
            continue
        for name in _ACTIVATIONS:
            yield from _activation(path, name, getattr(right, name, None), getattr(held, name, None))
        if _is_norm(right) and _is_norm(held):
            yield from _norm(path, right, held)


def _said(path: str, here: tuple[str, float], there: tuple[str, float]) -> Iterator[Clue]:
    if here[0] and there[0] and here[0] != there[0]:
        text = f"computes {here[0]} where {there[0]} is right"
        yield Clue(kind="config", module=path, text=text, wrong=True, size=here[1])


# --- activations -------------------------------------------------------------------------------


def _activation(path: str, name: str, right: Any, held: Any) -> Iterator[Clue]:
    if callable(right) and callable(held):
        there = nearest_activation(right)
        yield from _said(f"{path}.{name}" if path else name, nearest_activation(held, there[0]), there)


def nearest_activation(function: Callable[..., Any], right: str = "") -> tuple[str, float]:
    """The name of the activation, and its relative distance from ``right``; ("", 0) where it takes no plain tensor."""
    import torch

    points_N = torch.linspace(-6, 6, 257)
    try:
        with torch.no_grad():
            found = copy.deepcopy(function)(points_N).double()
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return "", 0.0
    if found.shape != points_N.shape:
        return "", 0.0
    values = {name: one(points_N.double()) for name, one in _known_activations().items()}
    name = min(values, key=lambda one: float((values[one] - found).norm()))
    other = values.get(right, found)
    return name, float((found - other).norm() / other.norm()) if bool(other.any()) else 0.0


def _known_activations() -> Mapping[str, Callable[[torch.Tensor], torch.Tensor]]:
    import torch
    from torch.nn import functional

    return {
        "the exact GELU": functional.gelu,
        "the tanh GELU": lambda x: functional.gelu(x, approximate="tanh"),
        "x sigmoid(1.702 x)": lambda x: x * torch.sigmoid(1.702 * x),
        "SiLU": functional.silu,
        "ReLU": functional.relu,
        "the squared ReLU": lambda x: functional.relu(x).square(),
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
        "the identity": lambda x: x,
        "Mish": functional.mish,
    }


# --- norms -------------------------------------------------------------------------------------


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and getattr(weight, "ndim", 0) == 1


def _norm(path: str, right: nn.Module, held: nn.Module) -> Iterator[Clue]:
    there = _nearest_norm(right)
    yield from _said(path, _nearest_norm(held, there[0]), there)


def _nearest_norm(module: nn.Module, right: str = "") -> tuple[str, float]:
    """The formula of a norm, whatever its weights: they are replaced, in a copy, by numbers of a seed."""
    import torch

    eps = next(
        (float(one) for one in (getattr(module, name, None) for name in ("variance_epsilon", "eps")) if one), 0.0
    )
    generator = torch.Generator().manual_seed(_SEED)
    try:
        with torch.no_grad():
            probe = copy.deepcopy(module)
            probe = (probe.to_empty(device="cpu") if _on_meta(probe) else probe.cpu()).float()
            for parameter in probe.parameters():
                parameter.copy_(1.5 + 0.2 * torch.randn(parameter.shape, generator=generator))
            weight_E, bias_E = probe.get_parameter("weight").detach().double(), getattr(probe, "bias", None)
            # As large as epsilon lets be seen, and with a mean.
            x_E = math.sqrt(eps or 1.0) * (torch.randn(len(weight_E), generator=generator) + 0.5)
            found = probe(x_E[None, None])[0, 0].double()
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return "", 0.0
    shift = bias_E.detach().double() if bias_E is not None else torch.zeros_like(weight_E)
    values = {name: value + shift for name, value in _known_norms(x_E.double(), weight_E, eps).items()}
    name = min(values, key=lambda one: float((values[one] - found).norm()))
    other = values.get(right, found)
    return name, float((found - other).norm() / other.norm())


def _on_meta(module: nn.Module) -> bool:
    return any(parameter.device.type == "meta" for parameter in module.parameters())


def _known_norms(x_E: torch.Tensor, weight_E: torch.Tensor, eps: float) -> dict[str, torch.Tensor]:
    centred_E, square = x_E - x_E.mean(), x_E.square().mean()
    variance = centred_E.square().mean()
    unbiased = variance * len(x_E) / (len(x_E) - 1)
    normed = {
        "LayerNorm": centred_E / (variance + eps).sqrt(),
        "LayerNorm with epsilon outside of the root": centred_E / (variance.sqrt() + eps),
        "LayerNorm with a variance over n - 1": centred_E / (unbiased + eps).sqrt(),
        "RMSNorm": x_E / (square + eps).sqrt(),
        "RMSNorm with epsilon outside of the root": x_E / (square.sqrt() + eps),
        "centred, and divided by the root mean square": centred_E / (square + eps).sqrt(),
    }
    found = {name: value * weight_E for name, value in normed.items()}
    return {**found, **{f"{name} times 1 + weight": value * (1 + weight_E) for name, value in normed.items()}}
