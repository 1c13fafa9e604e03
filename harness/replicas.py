"""Drawn benign variants of the reference in one precision: what a correct implementation's error looks like.

A replica computes the same function with its roundings in other places (numerics.md 2.3): each Linear
sums its products in pieces, as split-K kernels and row-parallel shards do; norms round once or twice;
attention runs in another kernel; the prompt is prefilled whole or in chunks. What varies is drawn from a
seed, so K is free. The first replica is the plain reference.

Weights are views, never copies: a draw costs time, not memory.
"""

from __future__ import annotations

import itertools
import math
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from harness.engines.ranks import plans
from harness.numerics import metrics
from harness.numerics.constants import PAIR_TOP, REPLICAS
from harness.numerics.moments import measure, scale_of, stack
from harness.scorer import open_reference, teacher_forced
from harness.values import Floor, Request, Rows

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from harness.engines.streaming.engine import StreamEngine

_SPLITS = (1, 2, 3, 4)
_CHUNKS = (None, None, 64, 96, 160)
_FEWEST_COLUMNS = 8
_ATTEMPTS = 4
_HALF = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """One drawn variant.

    Attributes:
        seed: draws the split of each Linear; None leaves every Linear whole.
        attention: kernel to run attention in, None to leave it.
        norms: ``"fused"`` rounds a norm's result once, ``"unfused"`` after each step, ``"mixed"`` draws that for
            each norm by itself, None leaves them.
        chunk: prefill in chunks of that many tokens, None in one piece.
        pieces: cut each Linear evenly into that many, as tensor parallelism of that size does, instead of at
            drawn places; None draws.
        wide: matrix products of fp16 operands are computed in fp32 and rounded once, as tensor cores do.
            A CPU without fp16 products is several times faster so.
        ordered: the layers that tensor parallelism of that size cuts along their inputs, and no others, sum their
            products as its ranks do: one partial product a rank, then the bias.
        fused: activations, and the product of a gated MLP, are computed in fp32 and rounded once, as fused kernels do.
    """

    seed: int | None = None
    attention: str | None = None
    norms: str | None = None
    chunk: int | None = None
    pieces: int | None = None
    wide: bool = False
    ordered: int | None = None
    fused: bool = False

    def __str__(self) -> str:
        parts = [
            "whole sums" if self.seed is None else f"sums in {self.pieces or 'drawn'} pieces",
            self.attention or "attention as loaded",
            f"{self.norms} norms" if self.norms else "norms as loaded",
            f"prefill by {self.chunk}" if self.chunk else "one prefill",
            *([f"partial sums of {self.ordered} ranks"] if self.ordered else []),
            *(["fp32 products"] if self.wide else []),
            *(["fused activations"] if self.fused else []),
        ]
        return ", ".join(parts)


def draw(
    count: int,
    seed: int,
    kernels: tuple[str, ...],
    *,
    wide: bool = False,
    parallel: int | None = None,
    fused: bool = False,
) -> list[Draw]:
    """``count`` variants; ``kernels`` are the attention kernels that the model has, ``wide`` as in Draw.

    The first is the plain run, so that the native products of the machine are among the variants. Under a
    declared tensor parallelism of size ``parallel`` half of the others cut each Linear into so many even pieces,
    and the rest at drawn places: a shard's own kernel cuts its part again. With ``fused`` half of the others
    have fused activations; all else is drawn as without.
    """
    rng = random.Random(seed)
    plain = [Draw(), *(Draw(attention=kernel, wide=wide) for kernel in kernels[1:])]
    drawn = [
        Draw(
            seed=rng.randrange(2**32),
            attention=rng.choice(kernels) if len(kernels) > 1 else None,
            norms=rng.choice((None, "fused", "unfused", "mixed", "mixed")),
            chunk=rng.choice(_CHUNKS),
            pieces=rng.choice((parallel, None)) if parallel is not None else None,
            wide=wide,
        )
        for _ in range(count - len(plain))
    ]
    if fused:
        coin = random.Random(seed + 1)
        drawn = [replace(one, fused=coin.random() < _HALF) for one in drawn]
    return [*plain, *drawn][:count]


@dataclass(frozen=True, kw_only=True, slots=True)
class OfParts:
    """A variant of a model of which only parts are there, one after another; opened on each of them.

    Each part draws by its own name, so that it computes the same however the parts come.
    """

    variant: Draw
    config: Any

    def __call__(self, name: str, module: torch.nn.Module) -> AbstractContextManager[None]:
        """Let a part compute as the variant says."""
        seed = self.variant.seed
        # A hash of text that is the same in every process.
        drawn = None if seed is None else seed ^ zlib.crc32(name.encode())
        return applied(_Part(config=self.config, named_modules=module.named_modules), replace(self.variant, seed=drawn))

    def __str__(self) -> str:
        return f"{self.variant} ({self.variant.seed})"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """A part of a model that answers what a model is asked for here."""

    config: Any
    named_modules: Callable[[], Iterator[tuple[str, torch.nn.Module]]]


@contextmanager
def applied(model: PreTrainedModel | _Part, variant: Draw) -> Iterator[None]:
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
        summed: frozenset[str] = frozenset()
        if variant.ordered is not None and not isinstance(model, _Part):
            summed = plans.summed_layers(model)
        for name, module in model.named_modules():
            forward: Callable[..., torch.Tensor] | None = None
            if variant.ordered is not None and name in summed:
                forward = _ordered_sum(module, variant.ordered)
            elif variant.seed is not None and isinstance(module, nn.Linear):
                forward = _split_linear(module, rng, variant.pieces)
            elif variant.seed is not None and isinstance(module, Conv1D):
                forward = _split_conv1d(module, rng, variant.pieces)
            elif type(module) is nn.LayerNorm and (style := _norm_style(variant, rng)):
                forward = _layer_norm(module, style)
            elif _is_rms_norm(module) and (style := _norm_style(variant, rng)):
                forward = _rms_norm(module, style)
            elif variant.fused and _is_gated(module):
                forward = _fused_gate(module)
            elif variant.fused and _is_activation(module):
                forward = _fused_activation(module)
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


def _norm_style(variant: Draw, rng: random.Random) -> str | None:
    return rng.choice((None, "fused", "unfused")) if variant.norms == "mixed" else variant.norms


def _cuts(width: int, rng: random.Random, even: int | None) -> list[slice]:
    """Cut ``width`` columns into a drawn number of pieces at drawn places, or into ``even`` equal ones."""
    if even is not None:
        edges = [width * i // even for i in range(even + 1)]
        return [slice(a, b) for a, b in itertools.pairwise(edges) if a < b]
    pieces = min(rng.choice(_SPLITS), max(1, width // _FEWEST_COLUMNS))
    places = sorted(rng.sample(range(_FEWEST_COLUMNS, width), pieces - 1)) if pieces > 1 else []
    return [slice(a, b) for a, b in zip([0, *places], [*places, width], strict=True)]


def _split_linear(
    module: torch.nn.Linear, rng: random.Random, even: int | None
) -> Callable[[torch.Tensor], torch.Tensor]:
    from torch.nn.functional import linear

    pieces = _cuts(module.in_features, rng, even)
    # The bias goes into the first product (rounded together with it) or is added at the end.
    early = rng.random() < 0.5

    def forward(x: torch.Tensor) -> torch.Tensor:
        total = linear(x[..., pieces[0]], module.weight[:, pieces[0]], module.bias if early else None)
        for piece in pieces[1:]:
            total = total + linear(x[..., piece], module.weight[:, piece])
        return total if early or module.bias is None else total + module.bias

    return forward


def _ordered_sum(module: torch.nn.Module, ranks: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The partial products of even parts of the inputs, each rounded, summed as gloo's ranks do; then the bias.

    BLOOM's ``slow_but_exact`` for any layer, and with its bias, which that leaves out.
    """
    from torch import nn

    by_rows = isinstance(module, nn.Linear)
    weight = module.get_parameter("weight")
    bias = None if module.bias is None else module.get_parameter("bias")
    parts = plans.Cut(dim=1 if by_rows else 0)

    def forward(x: torch.Tensor) -> torch.Tensor:
        products = []
        for rank in range(ranks):
            own = parts.of(weight, rank, ranks)
            share = plans.Cut(dim=x.ndim - 1).of(x, rank, ranks).contiguous()
            products.append(nn.functional.linear(share, own.contiguous()) if by_rows else share @ own.contiguous())
        total = _ring(products)
        result: torch.Tensor = total if bias is None else total + bias
        return result

    return forward


def _ring(partials: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of the ranks' partials, [...] each, as gloo's ring all-reduce rounds it.

    The flat buffer is cut into as many chunks as there are ranks, of whole 8 bytes; the sum of chunk c starts at rank
    c + 1, goes round, and ends at rank c (measured, with values whose sum tells the order).
    """
    import torch

    ranks, flat = len(partials), [one.flatten() for one in partials]
    each = 8 // flat[0].element_size()
    share = math.ceil(flat[0].numel() / ranks)
    size = math.ceil(share / each) * each
    total = torch.empty_like(flat[0])
    for chunk in range(ranks):
        cut = slice(chunk * size, (chunk + 1) * size)
        part = flat[(chunk + 1) % ranks][cut]
        for hop in range(2, ranks + 1):
            part = part + flat[(chunk + hop) % ranks][cut]
        total[cut] = part
    return total.view_as(partials[0])


def _split_conv1d(
    module: torch.nn.Module, rng: random.Random, even: int | None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """GPT-2's Conv1D: a Linear whose weight is [in, out]."""
    import torch

    weight, bias = module.weight, module.bias
    assert isinstance(weight, torch.Tensor) and isinstance(bias, torch.Tensor)
    pieces = _cuts(weight.shape[0], rng, even)

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


def _is_activation(module: torch.nn.Module) -> bool:
    """An activation function as a module: without weights and parts of its own, from where these are kept."""
    if any(True for _ in module.children()) or any(True for _ in module.parameters()):
        return False
    place = type(module).__module__
    return (
        place in ("transformers.activations", "torch.nn.modules.activation") or "gelu" in type(module).__name__.lower()
    )


def _fused_activation(module: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    original: Callable[[torch.Tensor], torch.Tensor] = module.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        return original(x.float()).to(x.dtype) if x.element_size() < 4 else original(x)

    return forward


def _is_gated(module: torch.nn.Module) -> bool:
    """Llama's MLP and its copies."""
    names = {name for name, _ in module.named_children()}
    return names == {"gate_proj", "up_proj", "down_proj", "act_fn"}


def _fused_gate(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        gate, up = module.gate_proj(x), module.up_proj(x)
        if gate.element_size() < 4:
            product: torch.Tensor = (module.act_fn(gate.float()) * up.float()).to(gate.dtype)
        else:
            product = module.act_fn(gate) * up
        result: torch.Tensor = module.down_proj(product)
        return result

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
    directions: Sequence[NDArray[np.floating]] = (),
    count: int = REPLICAS,
    seed: int = 0,
    parallel: int | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Floor | None:
    """Run ``count`` replicas of the reference in ``dtype`` and measure their error against ``centre``.

    Args:
        model: the reference's directory.
        requests: the prompts.
        continuations: the tokens that are forced behind them.
        centre: what errors are taken from.
        dtype: the precision.
        directions: what errors are projected on, each [N, J].
        count: how many replicas.
        seed: of the draws.
        parallel: size of a declared tensor parallelism.
        progress: called with (done, total) after each.

    Returns:
        The floor, or None where the plain reference, or most variants, are not finite in that precision.
    """
    shown: list[Rows] = []
    used = []
    with open_reference(model, dtype) as engine:
        # More than needed: a variant that is not finite here (eager attention in fp16 overflows on padded
        # rows of some models) is no correct implementation, and the next one takes its place.
        kernels, wide = kernels_of(engine.model), dtype == "float16"
        for variant in draw(_ATTEMPTS * count, seed, kernels, wide=wide, parallel=parallel):
            with applied(engine.model, variant):
                rows = teacher_forced(engine, requests, continuations, variant.chunk)
            if not rows.nonfinite.any():
                shown.append(rows)
                used.append(str(variant))
            elif not used:
                return None
            progress(len(used), count)
            if len(used) == count:
                break
        vocabulary = engine.vocabulary
    if len(used) < count:
        return None
    return condense_floor(shown, centre, directions, len(requests), vocabulary, tuple(used))


def streamed_floor(
    engine: StreamEngine,
    sequences: Sequence[Sequence[int]],
    starts: Sequence[int],
    centre: Rows,
    *,
    prompts: int,
    count: int,
    seed: int = 0,
) -> Floor | None:
    """As `measure_floor`, by a streamed model: all variants in one pass over its weights, prompts in one piece.

    Args:
        engine: open, in the precision to be measured.
        sequences: prompt and continuation.
        starts: where the continuation of each begins.
        centre: what errors are taken from.
        prompts: how many requests the rows are of.
        count: how many replicas.
        seed: of the draws.

    Returns:
        The floor, or None where a variant is not finite in that precision.
    """
    config = engine.skeleton.model.config
    wide = engine.settings["dtype"] == "float16"
    drawn = [replace(one, chunk=None) for one in draw(count, seed, kernels_of(engine.skeleton.model), wide=wide)]
    variants = [None, *(OfParts(variant=one, config=config) for one in drawn[1:])]
    shown = engine.score(sequences, starts, variants=variants)
    if any(rows.nonfinite.any() for rows in shown):
        return None
    return condense_floor(shown, centre, [], prompts, engine.vocabulary, tuple(map(str, drawn)))


def condense_floor(
    shown: Sequence[Rows],
    centre: Rows,
    directions: Sequence[NDArray[np.floating]],
    prompts: int,
    vocabulary: int,
    families: tuple[str, ...],
) -> Floor:
    """The replicas' rows as the small vectors that a golden keeps."""
    errors_KNJ = np.stack([rows.projections.astype(np.float64) - centre.projections for rows in shown])
    sigma_N = metrics.row_sigma(np.linalg.norm(errors_KNJ, axis=2))
    watched = centre.top_ids[:, :PAIR_TOP]
    tops_KGT = np.stack(
        [metrics.logits_at(watched, rows.top_ids, rows.top_logits) - centre.top_logits[:, :PAIR_TOP] for rows in shown]
    )
    pair_G = metrics.pair_noise(tops_KGT, centre.request[centre.generated])
    scale = scale_of(centre, sigma_N, pair_G, directions, prompts, vocabulary)
    everywhere = np.arange(len(centre))
    scaled_KNJ = errors_KNJ / scale.sigma[None, :, None]
    return Floor(
        sigma=sigma_N.astype(np.float32),
        pair=pair_G.astype(np.float32),
        moments=stack([measure(rows, scale, everywhere) for rows in shown]),
        effective=metrics.effective_number(scaled_KNJ.reshape(len(scaled_KNJ), -1)),
        families=families,
    )
