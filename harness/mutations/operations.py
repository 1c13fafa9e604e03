"""Other arithmetic under a model's own code: products and softmax are replaced as torch dispatches them.

This imports torch on load; import it where a mutation starts.

Shape legend: B batch rows, H heads, T queries, S keys, D head size, N entries that are summed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Replacement = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class Replaced(TorchFunctionMode):
    """While active, ``replacements[function](function, args, kwargs)`` stands for each call of these functions."""

    def __init__(self, replacements: Mapping[Any, Replacement]) -> None:
        super().__init__()
        self._replacements = replacements

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        replacement = self._replacements.get(func)
        given = dict(kwargs or {})
        return func(*args, **given) if replacement is None else replacement(func, tuple(args), given)


# --- TF32 --------------------------------------------------------------------------------------

_TF32_BITS = 10

#: Operations that multiply, each with the places and names of its factors.
_PRODUCTS: Mapping[Any, tuple[int | str, ...]] = {
    functional.linear: (0, 1, "input", "weight"),
    functional.scaled_dot_product_attention: (0, 1, 2, "query", "key", "value"),
    torch.matmul: (0, 1),
    torch.Tensor.matmul: (0, 1),
    torch.Tensor.__matmul__: (0, 1),
    torch.bmm: (0, 1),
    torch.Tensor.bmm: (0, 1),
    torch.addmm: (1, 2),
    torch.Tensor.addmm: (1, 2),
    torch.baddbmm: (1, 2, "batch1", "batch2"),
    torch.Tensor.baddbmm: (1, 2, "batch1", "batch2"),
}


def tf32() -> Replaced:
    """While active, factors of matrix products are rounded to the 10 bits that tensor cores take of float32."""

    def rounded(places: tuple[int | str, ...], func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = [to_mantissa(value, _TF32_BITS) if place in places else value for place, value in enumerate(args)]
        named = {key: to_mantissa(value, _TF32_BITS) if key in places else value for key, value in kwargs.items()}
        return func(*inputs, **named)

    def of(places: tuple[int | str, ...]) -> Replacement:
        return lambda func, args, kwargs: rounded(places, func, args, kwargs)

    return Replaced({function: of(places) for function, places in _PRODUCTS.items()})


def to_mantissa(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Rounded to so many bits of the mantissa, ties away from zero as tensor cores do; 16-bit floats stay."""
    known = {torch.float32: (torch.int32, 23), torch.float64: (torch.int64, 52)}
    if values.dtype not in known:
        return values
    integer, mantissa = known[values.dtype]
    dropped = mantissa - bits
    # The sign is a bit of its own, so adding half a step rounds the magnitude.
    codes = (values.view(integer) + (1 << (dropped - 1))) & ~((1 << dropped) - 1)
    rounded: torch.Tensor = codes.view(values.dtype)
    return rounded


# --- 16 bits -----------------------------------------------------------------------------------


def narrow_sum(values: torch.Tensor, lanes: int) -> torch.Tensor:
    """Sum over the last dimension, [..., 1], each partial sum rounded to the dtype.

    The entries are added to ``lanes`` sums in turn, a power of two, and these in pairs: what vector units do.
    """
    padded = functional.pad(values, (0, -values.shape[-1] % lanes)).unflatten(-1, (-1, lanes))
    total = padded[..., 0, :]
    for number in range(1, padded.shape[-2]):
        total = total + padded[..., number, :]
    while total.shape[-1] > 1:
        first, second = total.chunk(2, dim=-1)
        total = first + second
    result: torch.Tensor = total
    return result


def narrow_softmax(lanes: int) -> Replaced:
    """While active, softmax is computed in the dtype of its input, and attention is not fused."""

    def softmax(_func: Any, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> torch.Tensor:
        return _softmax(args[0], lanes)

    def attention(_func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        return _attention(lanes, *args, **kwargs)

    return Replaced(
        {
            functional.softmax: softmax,
            torch.softmax: softmax,
            torch.Tensor.softmax: softmax,
            functional.scaled_dot_product_attention: attention,
        }
    )


def _softmax(scores: torch.Tensor, lanes: int) -> torch.Tensor:
    # A row that sees nothing is all -inf, and gives zeros as torch's fused kernel does.
    highest = scores.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    powers = (scores - highest).exp()
    total = narrow_sum(powers, lanes)
    return torch.where(total == 0, torch.zeros_like(powers), powers / total)


def _attention(
    lanes: int,
    query_BHTD: torch.Tensor,
    key_BHSD: torch.Tensor,
    value_BHSD: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """The scaled_dot_product_attention of torch in plain steps; what it scales and masks is rounded once."""
    if enable_gqa:
        groups = query_BHTD.shape[1] // key_BHSD.shape[1]
        key_BHSD, value_BHSD = (states.repeat_interleave(groups, dim=1) for states in (key_BHSD, value_BHSD))
    scale = query_BHTD.shape[-1] ** -0.5 if scale is None else scale
    scores = query_BHTD.float() @ key_BHSD.float().transpose(-1, -2) * scale
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return _softmax(scores.to(query_BHTD.dtype), lanes) @ value_BHSD
