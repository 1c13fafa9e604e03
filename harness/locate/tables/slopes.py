"""ALiBi slopes in float64, and those of a candidate."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from harness.locate.clues import Clue
from harness.locate.tables.reference import Reference, text_config

if TYPE_CHECKING:
    import torch
    from torch import nn

_ALIBI = ("bloom",)
_UNIT = 2.0**-24


def slopes(heads: int) -> list[float]:
    """2^(-8 h / n) for n heads, a power of 2; for others those of the next lower power, then every other one of the
    next higher (Press et al. 2022, and its authors' code).
    """
    power = 2 ** math.floor(math.log2(heads))
    plain = [2.0 ** (-8 * (head + 1) / power) for head in range(power)]
    return plain + [2.0 ** (-4 * (2 * head + 1) / power) for head in range(heads - power)]


def slope_tables(reference: Reference, model: nn.Module) -> Iterator[Clue]:
    """Clues of whatever builds or keeps the slopes."""
    config = text_config(reference.config)
    if getattr(config, "model_type", "") not in _ALIBI:
        return
    heads = int(config.num_attention_heads)
    for path, module in model.named_modules():
        build = getattr(module, "build_alibi_tensor", None)
        if callable(build):
            held = _built(build, heads)
            if held is not None:
                yield from _compared(path, "alibi", held, heads)
        for name, buffer in module.named_buffers(recurse=False):
            if "slope" in name and buffer.numel() == heads:
                yield from _compared(path, name, buffer.detach().double().cpu().flatten(), heads)


def _built(build: Any, heads: int) -> torch.Tensor | None:
    """What one key's bias has more than that of the key before it, [H]; a shift of a whole row is none."""
    import torch

    try:
        bias = build(torch.ones((1, 3), dtype=torch.int64), heads, torch.float32)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return None
    bias_HS = bias.double().reshape(heads, -1, bias.shape[-1])[:, -1]
    found: torch.Tensor = bias_HS[:, 1] - bias_HS[:, 0]
    return found


def _compared(path: str, name: str, held_H: torch.Tensor, heads: int) -> Iterator[Clue]:
    import torch

    right = slopes(heads)
    right_H = torch.tensor(right, dtype=torch.float64)
    # The base, its power and the difference of two biases: exponents multiply the rounding of the base, as for RoPE.
    allowed_H = _UNIT * (8 + 4 * right_H.log().abs())
    error_H = (held_H / right_H - 1).abs()
    if bool((error_H <= allowed_H).all()):
        return
    worst = int(error_H.nan_to_num(nan=math.inf).argmax())
    plain_H = 2.0 ** (-8 * torch.arange(1, heads + 1, dtype=torch.float64) / heads)
    text = f"the slope of head {worst} is {float(held_H[worst]):.6g} for {right[worst]:.6g}"
    if bool(((held_H / plain_H - 1).abs() <= allowed_H).all()):
        text = f"slopes 2^(-8 h / {heads}), which are right for a power of 2 heads only"
    half = heads // 2
    if heads % 2 == 0 and bool((held_H[half:] == held_H[:half]).all()):
        text = f"heads {half}-{heads - 1} have the slopes of heads 0-{half - 1}, as on a rank that counts from 0"
    if not bool(held_H.any()):
        text = "all slopes are zero"
    yield Clue(
        kind="table",
        module=path,
        tensor=name,
        text=text,
        wrong=True,
        size=float(error_H[worst]),
        evidence={"head": worst, "held": float(held_H[worst]), "right": right[worst]},
    )
