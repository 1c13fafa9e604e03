"""Bugs of precision: what is rounded, summed or kept in fewer bits than the model was meant to have there.

Those that are active in 16 bits alone do nothing in float32 and float64, nor in a copy widened to them: there the
same code has room enough.

Shape legend: N entries that are summed, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from harness.mutations.mutation import Mutation, blocks, hooked, part, patched, weight_rows
from harness.mutations.steps import Call, stepped

if TYPE_CHECKING:
    import torch

    from harness.engines.decoding import Step
    from harness.engines.hf import HFEngine

_ROTARY = frozenset({"llama-scaled", "llama-tiny", "llama-untied"})
_SHIPPED = frozenset({"bloom-tiny", "bloom-raw", "gpt2-tiny", "llama-tiny"})

#: Partial sums that a vector unit keeps side by side.
_LANES = 8


def _in_half(engine: HFEngine) -> bool:
    return engine.model.dtype.itemsize == 2


@contextmanager
def _forwards(modules: list[Any], forward: Callable[..., Any]) -> Iterator[None]:
    """Give each module ``forward(module, ...)``, in the place of its own."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(patched(module, forward=partial(forward, module)))
        yield


# --- float32 -----------------------------------------------------------------------------------


@contextmanager
def _tf32(engine: HFEngine, _strength: float) -> Iterator[None]:
    from harness.mutations.operations import tf32

    with _under(engine, tf32):
        yield


@contextmanager
def _under(engine: HFEngine, mode: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Run every step under a mode of torch's dispatcher."""

    def step(inner: Step, call: Call) -> torch.Tensor:
        with mode():
            return call.run(inner)

    with stepped(engine, step):
        yield


@contextmanager
def _bf16_logits(engine: HFEngine, _strength: float) -> Iterator[None]:
    import torch

    def step(inner: Step, call: Call) -> torch.Tensor:
        logits_BTV = call.run(inner)
        return logits_BTV.to(torch.bfloat16).to(logits_BTV.dtype)

    with stepped(engine, step):
        yield


# --- tables and clamps -------------------------------------------------------------------------


@contextmanager
def _buffers_cast(engine: HFEngine, _strength: float) -> Iterator[None]:
    """The dtype is the one that the checkpoint was loaded in: what was rounded stays so in a widened copy."""
    dtype: Any = engine.model.config.dtype
    with ExitStack() as stack:
        for module in engine.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if dtype.itemsize == 2 and buffer.is_floating_point():
                    stack.enter_context(patched(module, **{name: buffer.to(dtype)}))
        yield


@contextmanager
def _rotary_in_half(engine: HFEngine, _strength: float) -> Iterator[None]:
    modules = [module for module in engine.model.modules() if hasattr(module, "inv_freq")] if _in_half(engine) else []
    with _forwards(modules, _narrow_rotary):
        yield


def _narrow_rotary(module: Any, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [B, T, D] of angles that were computed, like positions and frequencies, in the dtype of x."""
    import torch

    half = position_ids[..., None].to(x.dtype) * module.inv_freq.to(x.dtype)
    angles, scaling = torch.cat([half, half], dim=-1), module.attention_scaling
    return angles.cos() * scaling, angles.sin() * scaling


#: The residual stream of the hosts is this many times smaller than that of models which overflow float16.
_STREAM_SCALE = 2**11
_T5_MARGIN = 1000


@contextmanager
def _stream_clamped(engine: HFEngine, strength: float) -> Iterator[None]:
    """The largest entries of the residual stream are cut off where float16 ends, as if the model were a large one.

    A pre-norm model with a stream 2^11 times larger, and norms' epsilon to match, computes the same function in every
    dtype; in float16 it overflows, and the clamp that keeps infinities away changes it.
    """
    import torch

    limit = (torch.finfo(torch.float16).max - _T5_MARGIN) / _STREAM_SCALE / strength

    def clamped(_module: Any, _args: Any, _kwargs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0].clamp(-limit, limit), *output[1:])
        return output.clamp(-limit, limit)

    found = blocks(engine.model) if engine.model.dtype == torch.float16 else []
    with hooked(*((block, clamped, False) for block in found)):
        yield


# --- sums in 16 bits ---------------------------------------------------------------------------


@contextmanager
def _product_in_half(engine: HFEngine, strength: float) -> Iterator[None]:
    """The product that ends the MLP of the block in the middle, which has the longest sums; rounded at every step."""
    found = blocks(engine.model)
    last = part(found[len(found) // 2].mlp, "down_proj", "dense_4h_to_h", "c_proj")
    exact = max(1, round(1 / strength))
    with _forwards([last] if _in_half(engine) else [], partial(_narrow_product, exact)):
        yield


def _narrow_product(exact: int, module: Any, x: torch.Tensor) -> torch.Tensor:
    """A Linear or Conv1D whose accumulator is rounded to the dtype after every ``exact`` products."""
    import torch

    weight = weight_rows(module)
    total = x.new_zeros((*x.shape[:-1], len(weight)))
    for x_piece, weight_piece in zip(x.split(exact, dim=-1), weight.split(exact, dim=1), strict=True):
        if exact == 1:
            # A fused multiply and add: the product itself is not rounded.
            total = torch.addcmul(total, x_piece, weight_piece[:, 0])
        else:
            total = total + torch.nn.functional.linear(x_piece, weight_piece)
    return total if module.bias is None else total + module.bias


@contextmanager
def _softmax_in_half(engine: HFEngine, _strength: float) -> Iterator[None]:
    from harness.mutations.operations import narrow_softmax

    if not _in_half(engine):
        yield
        return
    with _under(engine, partial(narrow_softmax, _LANES)):
        yield


@contextmanager
def _norms_in_half(engine: HFEngine, _strength: float) -> Iterator[None]:
    from torch import nn

    modules = list(engine.model.modules()) if _in_half(engine) else []
    layer = [module for module in modules if type(module) is nn.LayerNorm]
    rms = [module for module in modules if hasattr(module, "variance_epsilon")]
    with _forwards(layer, _narrow_layer_norm), _forwards(rms, _narrow_rms_norm):
        yield


def _narrow_layer_norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    from harness.mutations.operations import narrow_sum

    centred = x - narrow_sum(x, _LANES) / x.shape[-1]
    variance = narrow_sum(centred * centred, _LANES) / x.shape[-1]
    result: torch.Tensor = centred * (variance + module.eps).rsqrt() * module.weight + module.bias
    return result


def _narrow_rms_norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    from harness.mutations.operations import narrow_sum

    square = narrow_sum(x * x, _LANES) / x.shape[-1]
    result: torch.Tensor = module.weight * (x * (square + module.variance_epsilon).rsqrt())
    return result


# --- the catalogue -----------------------------------------------------------------------------

MUTATIONS = (
    Mutation(
        id="pr-tf32",
        group="precision",
        wrong="matrix products declared float32 take 10 bits of each factor's mantissa",
        reference="huggingface/transformers#16588",
        hosts=_SHIPPED,
        subtlety="subtle",
        options=(("dtype", "float32"),),
        change=_tf32,
    ),
    Mutation(
        id="pr-logits-bf16",
        group="precision",
        wrong="the logits of a wider model are rounded to bfloat16",
        reference="huggingface/optimum-habana#1859",
        hosts=_SHIPPED,
        subtlety="subtle",
        change=_bf16_logits,
    ),
    Mutation(
        id="pr-eval-cast-buffers",
        group="precision",
        wrong="the whole model is cast to 16 bits after loading, its float32 tables too",
        reference="huggingface/transformers#30709",
        hosts=_ROTARY,
        subtlety="subtle",
        active=frozenset({"half"}),
        change=_buffers_cast,
    ),
    Mutation(
        id="pr-rope-half",
        group="precision",
        wrong="rotary angles are computed in 16 bits: positions above 256 are no bfloat16 numbers",
        reference="huggingface/candle#3520",
        hosts=_ROTARY,
        subtlety="subtle",
        active=frozenset({"half"}),
        change=_rotary_in_half,
    ),
    Mutation(
        id="pr-fp16-clamp",
        group="precision",
        wrong="large entries of the residual stream overflow float16 and are clamped",
        reference="huggingface/transformers#9295",
        hosts=_SHIPPED,
        active=frozenset({"half"}),
        strengths=(1.0, 0.5),
        options=(("dtype", "float16"),),
        change=_stream_clamped,
    ),
    Mutation(
        id="pr-accumulate-half",
        group="precision",
        wrong="one matrix product is accumulated in the 16 bits of its output",
        reference="microsoft/onnxruntime#29611",
        hosts=_SHIPPED,
        subtlety="subtle",
        active=frozenset({"half"}),
        strengths=(1.0, 0.25),
        change=_product_in_half,
    ),
    Mutation(
        id="pr-softmax-half",
        group="precision",
        wrong="the softmax of attention is not computed in float32 but in 16 bits, sums included",
        reference="apple/axlearn#18",
        hosts=_SHIPPED,
        subtlety="subtle",
        active=frozenset({"half"}),
        change=_softmax_in_half,
    ),
    Mutation(
        id="pr-norm-half",
        group="precision",
        wrong="norms take their statistics in 16 bits instead of float32",
        reference="sgl-project/sglang#27540",
        hosts=_SHIPPED,
        subtlety="subtle",
        active=frozenset({"half"}),
        change=_norms_in_half,
    ),
)
