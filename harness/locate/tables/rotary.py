"""Rotary embeddings in float64 from a configuration, and what a candidate's frequencies and angles are instead.

Shape legend: B rows, T positions, D rotated part of a head, F = D/2 frequencies.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.locate.clues import Clue
from harness.locate.tables.reference import Reference, text_config

if TYPE_CHECKING:
    import torch
    from torch import nn

_UNIT = 2.0**-24


@dataclass(frozen=True, kw_only=True, slots=True)
class Rotary:
    """What a configuration says of the rotary embedding.

    Attributes:
        size: D.
        theta: its base.
        scaling: rope_type and its numbers.
        longest: max_position_embeddings.
    """

    size: int
    theta: float
    scaling: Mapping[str, Any]
    longest: int

    @property
    def kind(self) -> str:
        return str(self.scaling.get("rope_type") or self.scaling.get("type") or "default")


def rotary_of(config: Any) -> Rotary | None:
    """The rotary embedding of a config; None where there is none, or one a layer type."""
    config = text_config(config)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    theta = rope.get("rope_theta") or getattr(config, "rope_theta", None) if isinstance(rope, Mapping) else None
    heads = getattr(config, "num_attention_heads", 0)
    if not isinstance(theta, (int, float)) or not heads:
        return None
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    share = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    longest = int(getattr(config, "max_position_embeddings", 0) or 0)
    return Rotary(size=int(head * share), theta=float(theta), scaling=dict(rope), longest=longest)


def frequencies(rotary: Rotary) -> torch.Tensor | None:
    """The frequencies of positions below the longest, float64 [F]; None for a scaling that is not derived here.

    theta^(-2i/D) (Su et al. 2021), divided by a factor for linear scaling (Chen et al. 2023); llama3: divided where the
    wavelength is beyond original / low_freq_factor, kept below original / high_freq_factor, and blended between; yarn:
    Peng et al. 2023, equations 11 to 14. Dynamic scaling begins beyond the longest.
    """
    return _scaled(rotary, _plain(rotary))


def _plain(rotary: Rotary) -> torch.Tensor:
    """theta^(-2i/D), float64 [F]."""
    import torch

    share_F = torch.arange(0, rotary.size, 2, dtype=torch.float64) / rotary.size
    plain_F: torch.Tensor = rotary.theta**-share_F
    return plain_F


def _scaled(rotary: Rotary, plain_F: torch.Tensor) -> torch.Tensor | None:
    scaling = rotary.scaling
    if rotary.kind in ("default", "dynamic"):
        return plain_F
    if rotary.kind == "linear":
        return plain_F / float(scaling["factor"])
    if rotary.kind == "llama3":
        turns_F = scaling["original_max_position_embeddings"] * plain_F / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        share_F = ((turns_F - low) / (high - low)).clamp(0, 1)
        blended_F: torch.Tensor = plain_F * (share_F + (1 - share_F) / scaling["factor"])
        return blended_F
    return _yarn(rotary, plain_F) if rotary.kind == "yarn" else None


def _yarn(rotary: Rotary, plain_F: torch.Tensor) -> torch.Tensor:
    import torch

    scaling, size = rotary.scaling, rotary.size
    original = scaling["original_max_position_embeddings"]
    factor = scaling.get("factor") or rotary.longest / original

    def dim_of(turns: float) -> float:
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rotary.theta))

    low, high = dim_of(scaling.get("beta_fast") or 32), dim_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp_F = (torch.arange(len(plain_F), dtype=torch.float64) - low) / ((high - low) or 1e-3)
    kept_F = 1 - ramp_F.clamp(0, 1)
    blended_F: torch.Tensor = plain_F * (kept_F + (1 - kept_F) / factor)
    return blended_F


def rounding(rotary: Rotary, right_F: torch.Tensor) -> torch.Tensor:
    """By how much, relative, float32 arithmetic may miss the frequencies, [F].

    With t = -log f: exponent and base are rounded (and the base grown by a scaling, a power of its own), 4 roundings
    that the exponential multiplies by t; the power, its reciprocal, the scaling and the blend are 8 of the result. How
    a blend depends on the frequency multiplies both: its condition, from the formula itself.
    """
    plain_F = _plain(rotary)
    step = 2.0**-20
    moved_F = _scaled(rotary, plain_F * (1 + step))
    assert moved_F is not None
    condition_F = ((moved_F / right_F).log().abs() / step).clamp(min=1)
    return _UNIT * (8 + 4 * plain_F.log().abs()) * condition_F


# --- the candidate -----------------------------------------------------------------------------


def rotary_tables(reference: Reference, model: nn.Module) -> Iterator[Clue]:
    """Clues of every module that keeps rotary frequencies: the table, and then cosines and sines that it gives."""
    rotary = rotary_of(reference.config)
    right_F = None if rotary is None else frequencies(rotary)
    if rotary is None or right_F is None:
        return
    for path, module in model.named_modules():
        held = getattr(module, "inv_freq", None)
        if getattr(held, "ndim", None) != 1:
            continue
        assert held is not None
        clue = _frequencies(path, held.detach().cpu(), rotary, right_F)
        if clue is not None:
            yield clue
        else:
            yield from _angles(path, module, model, rotary, right_F)


def _frequencies(path: str, held: torch.Tensor, rotary: Rotary, right_F: torch.Tensor) -> Clue | None:
    if held.shape != right_F.shape:
        text = f"{len(held)} frequencies where {len(right_F)} are right (rotated dims of a head)"
        return Clue(kind="table", module=path, tensor="inv_freq", text=text, wrong=True, size=1.0)
    error_F = (held.double() / right_F - 1).abs()
    allowed_F = rounding(rotary, right_F)
    if bool((error_F <= allowed_F).all()):
        return None
    worst = int(error_F.nan_to_num(nan=math.inf).argmax())
    return Clue(
        kind="table",
        module=path,
        tensor="inv_freq",
        text=_reason(held, rotary, right_F),
        wrong=True,
        size=float(error_F[worst]),
        evidence={"frequency": worst, "held": float(held[worst]), "right": float(right_F[worst])},
    )


def _reason(held: torch.Tensor, rotary: Rotary, right_F: torch.Tensor) -> str:
    import torch

    wide, allowed_F = held.double(), rounding(rotary, right_F)
    if not bool(held.any()):
        return "all zero: never filled"
    for name in ("bfloat16", "float16"):
        dtype = getattr(torch, name)
        if held.dtype == dtype or bool((held.to(dtype).double() == wide).all()):
            near = ((wide / right_F - 1).abs() <= torch.finfo(dtype).eps / 2 + allowed_F) | (
                wide < torch.finfo(dtype).tiny
            )
            if bool(near.all()):
                return f"rounded to {name}"
    share_F = torch.arange(0, rotary.size, 2, dtype=torch.float64) / rotary.size
    plain_F = _plain(rotary)
    if rotary.kind != "default" and bool(((wide / plain_F - 1).abs() <= allowed_F).all()):
        return f"the {rotary.kind} scaling is not applied"
    theta = float(wide[-1] ** (-1 / float(share_F[-1]))) if len(wide) > 1 and float(wide[-1]) > 0 else math.nan
    plain = rotary.kind in ("default", "dynamic") and math.isfinite(theta)
    if plain and bool(((wide / theta**-share_F - 1).abs() <= allowed_F).all()):
        return f"theta is {theta:.6g} where {rotary.theta:.6g} is right"
    ratio_F = wide / right_F
    if bool(((ratio_F / ratio_F[0] - 1).abs() <= 2 * allowed_F).all()):
        return f"all frequencies are {float(ratio_F[0]):.6g} times what they should be"
    worst = int((ratio_F - 1).abs().argmax())
    return (
        f"not what the config leads to: frequency {worst} is {float(wide[worst]):.6g} for {float(right_F[worst]):.6g}"
    )


def _angles(path: str, module: nn.Module, model: nn.Module, rotary: Rotary, right_F: torch.Tensor) -> Iterator[Clue]:
    """Cosines and sines of a copy of the module, which may keep a state, at positions up to the longest."""
    import torch

    dtype = next((one.dtype for one in model.parameters() if one.is_floating_point()), torch.float32)
    last = max(1, (rotary.longest or 2) - 1)
    place_T = torch.tensor(sorted({0, 1, 2, min(257, last), last // 2, last}))
    try:
        with torch.no_grad():
            probe = copy.deepcopy(module).cpu()
            found = probe(torch.zeros(2, len(place_T), 1, dtype=dtype), place_T.expand(2, -1))
        cos_BTD, sin_BTD = (one.double() for one in found)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, KeyError):
        return
    angle_TF = place_T.double()[:, None] * right_F
    # The frequency's own error, and the rounding of the product, turn the angle; then the result is rounded.
    turn_TF = angle_TF * (rounding(rotary, right_F) + _UNIT)
    scale = float(getattr(module, "attention_scaling", 1.0) or 1.0)
    slack_TF = abs(scale) * (turn_TF + 4 * _UNIT + torch.finfo(cos_BTD.dtype if dtype is torch.float64 else dtype).eps)
    for name, held_BTD, right_TF in (("cos", cos_BTD, angle_TF.cos()), ("sin", sin_BTD, angle_TF.sin())):
        if held_BTD.shape[-1] not in (len(right_F), 2 * len(right_F)):
            return
        for row, held_TD in enumerate(held_BTD):
            halves = (held_TD[:, : len(right_F)], held_TD[:, -len(right_F) :])
            neighbours = (held_TD[:, ::2], held_TD[:, 1::2])
            error = min(_excess(halves, scale * right_TF, slack_TF), _excess(neighbours, scale * right_TF, slack_TF))
            if not error <= 1:
                where = "" if row == 0 else f" in row {row} of a batch alone"
                text = f"{name} of positions up to {last} is off by {error:.3g} times what rounding allows{where}"
                yield Clue(
                    kind="table", module=path, tensor=name, text=text, wrong=True, size=_size(held_TD, right_TF, scale)
                )
                return


def _excess(halves: tuple[torch.Tensor, torch.Tensor], right_TF: torch.Tensor, slack_TF: torch.Tensor) -> float:
    if any(half.shape != right_TF.shape for half in halves):
        return math.inf
    return max(float(((half - right_TF).abs() / slack_TF).max()) for half in halves)


def _size(held_TD: torch.Tensor, right_TF: torch.Tensor, scale: float) -> float:
    right = scale * right_TF
    return float((held_TD[:, : right.shape[1]] - right).norm() / right.norm())
