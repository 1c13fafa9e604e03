"""Round-to-nearest weight quantisers that anyone can repeat: symmetric, scales from the largest weight alone.

No calibration and no zero point, so that what int8 or int4 weights compute is known to the last bit, and an
implementation of them is judged by its round-off like any other (numerics.md 2.7). For a quantiser that is not
known (GPTQ, AWQ) the same rounding, at its bits and group, says what loss is usual.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

#: (bits, inputs that share a scale) by name; None is one scale for each output channel.
SCHEMES: Mapping[str, tuple[int, int | None]] = {"int8": (8, None), "int4": (4, 32)}

_GROUPED = re.compile(r"int([2-8])-g([1-9][0-9]{0,5})")


def parse(text: str) -> tuple[int, int | None]:
    """Bits and group of a declared quantiser: a name of SCHEMES, or ``intB-gN``, e.g. ``int4-g128``.

    Another width needs its group: a name alone means here what it means in SCHEMES.

    Raises:
        ValueError: for any other text, with what it could have been.
    """
    if text in SCHEMES:
        return SCHEMES[text]
    match = _GROUPED.fullmatch(text)
    if match is None:
        raise ValueError(f"{', '.join(SCHEMES)}, or bits (2 to 8) and inputs of a scale, e.g. int4-g128")
    return int(match[1]), int(match[2])


def dequantised(weight: torch.Tensor, scheme: str, *, input_dim: int) -> torch.Tensor:
    """The weight as a scheme of SCHEMES leaves it, float32; arguments as in `round_to_nearest`."""
    bits, group = SCHEMES[scheme]
    return round_to_nearest(weight, bits, group, input_dim=input_dim)


def round_to_nearest(weight: torch.Tensor, bits: int, group: int | None, *, input_dim: int) -> torch.Tensor:
    """The weight quantised and dequantised in float32: code times scale, ties of codes to even.

    A scale is the largest absolute value of its group over 2^(bits - 1) - 1.

    Args:
        weight: any shape and float dtype.
        bits: 2 to 8.
        group: neighbouring inputs that share a scale, the last group may be shorter; None is all of them.
        input_dim: the dimension that is summed over, 1 for a Linear and 0 for a Conv1D.

    Returns:
        A contiguous float32 tensor of the same shape; groups of zeros stay zeros.
    """
    import torch

    inputs = weight.shape[input_dim]
    width = inputs if group is None else min(group, inputs)
    rows = weight.detach().to(torch.float32).movedim(input_dim, -1)
    # Padding with zeros changes no largest value.
    groups = torch.nn.functional.pad(rows, (0, -inputs % width)).unflatten(-1, (-1, width))
    largest = 2 ** (bits - 1) - 1
    scale = groups.abs().amax(dim=-1, keepdim=True) / largest
    codes = (groups / torch.where(scale == 0, 1.0, scale)).round().clamp(-largest, largest)
    result: torch.Tensor = (codes * scale).flatten(-2)[..., :inputs].movedim(-1, input_dim).contiguous()
    return result
