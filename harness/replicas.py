"""Drawn benign variants of the reference in one precision: what a correct implementation's error looks like.

A replica computes the same function with its roundings in other places (numerics.md 2.3): each Linear
sums its products in pieces, as split-K kernels and row-parallel shards do; norms round once or twice;
attention runs in another kernel; the prompt is prefilled whole or in chunks. What varies is drawn from a
seed, so K is free. The first replica is the plain reference.

Weights are views, never copies: a draw costs time, not memory.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.numerics import metrics
from harness.numerics.constants import BUCKETS, PAIR_TOP, REPLICAS
from harness.scorer import open_reference, teacher_forced
from harness.values import Floor, Request, Rows

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_SPLITS = (1, 2, 3, 4)
_CHUNKS = (None, None, 64, 96, 160)
_FEWEST_COLUMNS = 8
_ATTEMPTS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """One drawn variant.

    Attributes:
        seed: draws the split of each Linear; None leaves every Linear whole.
        attention: kernel to run attention in, None to leave it.
        norms: ``"fused"`` rounds a norm's result once, ``"unfused"`` after each step, None leaves it.
        chunk: prefill in chunks of that many tokens, None in one piece.
        wide: matrix products of fp16 operands are computed in fp32 and rounded once, as tensor cores do.
            A CPU without fp16 products is several times faster so.
    """

    seed: int | None = None
    attention: str | None = None
    norms: str | None = None
    chunk: int | None = None
    wide: bool = False

    def __str__(self) -> str:
        parts = [
            "whole sums" if self.seed is None else "split sums",
            self.attention or "attention as loaded",
            f"{self.norms} norms" if self.norms else "norms as loaded",
            f"prefill by {self.chunk}" if self.chunk else "one prefill",
            *(["fp32 products"] if self.wide else []),
        ]
        return ", ".join(parts)


def draw(count: int, seed: int, kernels: tuple[str, ...], *, wide: bool = False) -> list[Draw]:
    """``count`` variants; ``kernels`` are the attention kernels that the model has, ``wide`` as in Draw.

    The first is the plain run, so that the native products of the machine are among the variants.
    """
    rng = random.Random(seed)
    plain = [Draw(), *(Draw(attention=kernel, wide=wide) for kernel in kernels[1:])]
    drawn = [
        Draw(
            seed=rng.randrange(2**32),
            attention=rng.choice(kernels) if len(kernels) > 1 else None,
            norms=rng.choice((None, "fused", "unfused")),
            chunk=rng.choice(_CHUNKS),
            wide=wide,
        )
        for _ in range(count - len(plain))
    ]
    return [*plain, *drawn][:count]


@contextmanager
def applied(model: PreTrainedModel, variant: Draw) -> Iterator[None]:
    """Let ``model`` compute as ``variant`` says; undone on exit."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    patched: list[torch.nn.Module] = []
    before = model.config._attn_implementation
    rng = random.Random(variant.seed)
    stack = ExitStack()
    try:
        if variant.wide:
            stack.enter_context(_wide_products())
        if variant.attention is not None:
            model.config._attn_implementation = variant.attention
        for module in model.modules():
            forward: Callable[..., torch.Tensor] | None = None
            if variant.seed is not None and isinstance(module, nn.Linear):
                forward = _split_linear(module, rng)
            elif variant.seed is not None and isinstance(module, Conv1D):
                forward = _split_conv1d(module, rng)
            elif variant.norms is not None and type(module) is nn.LayerNorm:
                forward = _layer_norm(module, variant.norms)
            elif variant.norms is not None and _is_rms_norm(module):
                forward = _rms_norm(module, variant.norms)
            if forward is not None:
                module.forward = forward
                patched.append(module)
        yield
    finally:
        stack.close()
        model.config._attn_implementation = before
        for module in patched:
            del module.forward


def _wide_products() -> AbstractContextManager[object]:
    """While active, products of fp16 operands accumulate in fp32 and are rounded once."""
    import torch
    from torch.overrides import TorchFunctionMode

    products = {
        torch.nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm,
        torch.Tensor.bmm, torch.baddbmm, torch.Tensor.baddbmm, torch.addmm, torch.Tensor.addmm,
    }  # fmt: skip

    def widened(value: Any) -> Any:
        half = isinstance(value, torch.Tensor) and value.dtype is torch.float16
        return value.to(torch.float32) if half else value

    class WideProducts(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = kwargs or {}
            if func not in products or not any(widened(value) is not value for value in args):
                return func(*args, **given)
            wide = func(*map(widened, args), **{key: widened(value) for key, value in given.items()})
            return wide.to(torch.float16)

    return WideProducts()


def _cuts(width: int, rng: random.Random) -> list[slice]:
    """Cut ``width`` columns into a drawn number of pieces at drawn places."""
    pieces = min(rng.choice(_SPLITS), max(1, width // _FEWEST_COLUMNS))
    places = sorted(rng.sample(range(_FEWEST_COLUMNS, width), pieces - 1)) if pieces > 1 else []
    return [slice(a, b) for a, b in zip([0, *places], [*places, width], strict=True)]


def _split_linear(module: torch.nn.Linear, rng: random.Random) -> Callable[[torch.Tensor], torch.Tensor]:
    from torch.nn.functional import linear

    pieces = _cuts(module.in_features, rng)
    # The bias goes into the first product (rounded together with it) or is added at the end.
    early = rng.random() < 0.5

    def forward(x: torch.Tensor) -> torch.Tensor:
        total = linear(x[..., pieces[0]], module.weight[:, pieces[0]], module.bias if early else None)
        for piece in pieces[1:]:
            total = total + linear(x[..., piece], module.weight[:, piece])
        return total if early or module.bias is None else total + module.bias

    return forward


def _split_conv1d(module: torch.nn.Module, rng: random.Random) -> Callable[[torch.Tensor], torch.Tensor]:
    """GPT-2's Conv1D: a Linear whose weight is [in, out]."""
    import torch

    weight, bias = module.weight, module.bias
    assert isinstance(weight, torch.Tensor) and isinstance(bias, torch.Tensor)
    pieces = _cuts(weight.shape[0], rng)

    def forward(x: torch.Tensor) -> torch.Tensor:
        total = x[..., pieces[0]] @ weight[pieces[0]]
        for piece in pieces[1:]:
            total = total + x[..., piece] @ weight[piece]
        result: torch.Tensor = total + bias
        return result

    return forward


def _layer_norm(module: torch.nn.LayerNorm, style: str) -> Callable[[torch.Tensor], torch.Tensor]:
    from torch.nn.functional import layer_norm

    def forward(x: torch.Tensor) -> torch.Tensor:
        wide = x.float() if x.element_size() < 4 else x
        if style == "fused":
            weight = None if module.weight is None else module.weight.to(wide.dtype)
            bias = None if module.bias is None else module.bias.to(wide.dtype)
            return layer_norm(wide, module.normalized_shape, weight, bias, module.eps).to(x.dtype)
        mean = wide.mean(dim=-1, keepdim=True)
        variance = (wide - mean).pow(2).mean(dim=-1, keepdim=True)
        normed = ((wide - mean) / (variance + module.eps).sqrt()).to(x.dtype)
        scaled = normed if module.weight is None else normed * module.weight
        return scaled if module.bias is None else scaled + module.bias

    return forward


def _is_rms_norm(module: torch.nn.Module) -> bool:
    """Llama's RMSNorm and its copies: one weight vector and ``variance_epsilon``, nothing else."""
    names = {name for name, _ in module.named_parameters(recurse=False)}
    return type(module).__name__.endswith("RMSNorm") and names == {"weight"} and hasattr(module, "variance_epsilon")


def _rms_norm(module: torch.nn.Module, style: str) -> Callable[[torch.Tensor], torch.Tensor]:
    import torch

    scale, eps = module.weight, float(str(module.variance_epsilon))
    assert isinstance(scale, torch.Tensor)

    def forward(x: torch.Tensor) -> torch.Tensor:
        wide = x.float() if x.element_size() < 4 else x
        normed = wide / (wide.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt()
        if style == "fused":
            return (normed * scale.to(wide.dtype)).to(x.dtype)
        return normed.to(x.dtype) * scale

    return forward


def kernels_of(model: PreTrainedModel) -> tuple[str, ...]:
    """Attention kernels of this model on this machine, the one in force first."""
    current = model.config._attn_implementation
    others = ["eager"] + (["sdpa"] if getattr(type(model), "_supports_sdpa", False) else [])
    return (current, *(kernel for kernel in others if kernel != current))


def measure_floor(
    model: str,
    requests: Sequence[Request],
    continuations: Sequence[Sequence[int]],
    centre: Rows,
    dtype: str,
    *,
    count: int = REPLICAS,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Floor | None:
    """Run ``count`` replicas of the reference in ``dtype`` and measure their error against ``centre``.

    Returns:
        The floor, or None where the plain reference, or most variants, are not finite in that precision.
    """
    projections, tops, used = [], [], []
    with open_reference(model, dtype) as engine:
        # More than needed: a variant that is not finite here (eager attention in fp16 overflows on padded
        # rows of some models) is no correct implementation, and the next one takes its place.
        for variant in draw(_ATTEMPTS * count, seed, kernels_of(engine.model), wide=dtype == "float16"):
            with applied(engine.model, variant):
                rows = teacher_forced(engine, requests, continuations, variant.chunk)
            if not rows.nonfinite.any():
                projections.append(rows.projections.astype(np.float64) - centre.projections)
                watched = centre.top_ids[:, :PAIR_TOP]
                shown = metrics.logits_at(watched, rows.top_ids, rows.top_logits)
                tops.append(shown - centre.top_logits[:, :PAIR_TOP])
                used.append(str(variant))
            elif not used:
                return None
            progress(len(used), count)
            if len(used) == count:
                break
    if len(used) < count:
        return None
    return condense_floor(np.stack(projections), np.stack(tops), centre, len(requests), tuple(used))


def condense_floor(
    errors_KNJ: np.ndarray[tuple[int, ...], np.dtype[np.float64]],
    top_errors_KGT: np.ndarray[tuple[int, ...], np.dtype[np.float64]],
    centre: Rows,
    prompts: int,
    families: tuple[str, ...],
) -> Floor:
    """The replicas' errors as the small vectors that a golden keeps."""
    norms_KN = np.linalg.norm(errors_KNJ, axis=2)
    sigma_N = metrics.row_sigma(norms_KN)
    ratios_KN = norms_KN / np.maximum(sigma_N, np.finfo(np.float64).tiny)
    buckets_N = metrics.position_buckets(centre.position)
    scaled = errors_KNJ / np.maximum(sigma_N, np.finfo(np.float64).tiny)[None, :, None]
    return Floor(
        sigma=sigma_N.astype(np.float32),
        pair=metrics.pair_noise(top_errors_KGT, centre.request[centre.generated]).astype(np.float32),
        log_rms=_per_replica(metrics.log_rms, ratios_KN, centre.request, prompts),
        log_rms_bucket=_per_replica(metrics.log_rms, ratios_KN, buckets_N, BUCKETS),
        log_max=_per_replica(metrics.log_max, ratios_KN, centre.request, prompts),
        effective=metrics.effective_number(scaled.reshape(len(scaled), -1)),
        families=families,
    )


def _per_replica(
    statistic: Callable[..., metrics.Float64],
    ratios_KN: metrics.Float64,
    units_N: np.ndarray[tuple[int, ...], np.dtype[np.integer]],
    count: int,
) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.stack([statistic(ratios_N, units_N, count) for ratios_N in ratios_KN]).astype(np.float32)
