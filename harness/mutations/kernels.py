"""Bugs of kernels, captured graphs and compilers: strides, stale inputs, memory that nobody wrote.

A captured graph is its static inputs: what was not copied into them is what the replay computes with.

Shape legend: B batch rows, T new tokens, S tokens so far (padding included), H heads, D head size, E hidden size,
V vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from harness.mutations.mutation import Mutation, attention_of, blocks, hooked, part, patched
from harness.mutations.steps import Call, seen, stepped

if TYPE_CHECKING:
    import torch

    from harness.engines.decoding import Step
    from harness.engines.hf import HFEngine

_BLOOM = frozenset({"bloom-tiny", "bloom-raw"})
_SHIPPED = _BLOOM | {"gpt2-tiny", "llama-tiny"}

# --- captured graphs ---------------------------------------------------------------------------


@contextmanager
def _first_row_not_copied(engine: HFEngine, _strength: float) -> Iterator[None]:
    """One graph of the decode step for each batch size; its first row goes on with what was there at the capture."""
    buffers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def step(inner: Step, call: Call) -> torch.Tensor:
        batch = len(call.ids_BT)
        if not call.decodes or batch == 1:
            return call.run(inner)
        if batch not in buffers:
            buffers[batch] = (call.ids_BT.clone(), call.position_BT.clone())
        ids_BT, position_BT = buffers[batch]
        ids_BT[1:], position_BT[1:] = call.ids_BT[1:], call.position_BT[1:]
        return replace(call, ids_BT=ids_BT, position_BT=position_BT).run(inner)

    with stepped(engine, step):
        yield


@contextmanager
def _padding_of_capture(engine: HFEngine, _strength: float) -> Iterator[None]:
    """One graph of the decode step for each batch size, with the padding of the batch that it was captured with."""
    import torch

    captured: dict[int, torch.Tensor] = {}

    def step(inner: Step, call: Call) -> torch.Tensor:
        if not call.decodes:
            return call.run(inner)
        known_B = captured.setdefault(len(call.ids_BT), call.padding_B)
        if torch.equal(known_B, call.padding_B):
            return call.run(inner)
        column_S = torch.arange(call.mask_BS.shape[1], device=call.mask_BS.device)
        prompt_BS = column_S < call.padding_B[:, None]
        # The step's own token is always seen: a row without any key is another bug.
        hidden_BS = (column_S < known_B[:, None]) & (column_S < call.start)
        mask_BS = (call.mask_BS.bool() | prompt_BS) & ~hidden_BS
        return replace(call, mask_BS=mask_BS.to(call.mask_BS.dtype)).run(inner)

    with stepped(engine, step):
        yield


@contextmanager
def _stale_start(engine: HFEngine, _strength: float) -> Iterator[None]:
    """The compiled decode step takes where it starts as a Python number.

    The first value is compiled in, the second one makes it dynamic, and of every later one the second is used.
    """
    starts: list[int] = []

    def step(inner: Step, call: Call) -> torch.Tensor:
        if not call.decodes:
            return call.run(inner)
        if call.start not in starts and len(starts) < 2:
            starts.append(call.start)
        stale = call.start if call.start in starts else starts[1]
        return replace(call, position_BT=(call.position_BT - call.start + stale).clamp(min=0)).run(inner)

    with stepped(engine, step):
        yield


# --- strides and lengths -----------------------------------------------------------------------

_FEW_QUERIES = 8


@contextmanager
def _strides_assumed(engine: HFEngine, _strength: float) -> Iterator[None]:
    """Queries are a view of the fused product; for up to 8 of them the kernel reads its memory as [B, H, T, D]."""
    model = engine.model
    heads, bloom = int(model.config.num_attention_heads), model.config.model_type == "bloom"

    def misread(_module: Any, _args: Any, _kwargs: Any, fused_BTN: torch.Tensor) -> torch.Tensor | None:
        batch, length, width = fused_BTN.shape
        if length > _FEW_QUERIES:
            return None
        result_BTN = fused_BTN.contiguous().clone()
        # BLOOM's columns are [H, 3, D], GPT-2's [3, H, D].
        parts = result_BTN.unflatten(-1, (heads, 3, -1) if bloom else (3, heads, -1))
        query_BTHD = parts[:, :, :, 0] if bloom else parts[:, :, 0]
        head_size = width // 3 // heads
        taken_BHTD = fused_BTN.flatten()[: batch * length * width // 3].view(batch, heads, length, head_size)
        query_BTHD.copy_(taken_BHTD.transpose(1, 2))
        return result_BTN

    layers = [part(attention_of(block), "query_key_value", "c_attn") for block in blocks(model)]
    with hooked(*((layer, misread, False) for layer in layers)):
        yield


_BUCKET = 32


@contextmanager
def _length_of_bucket(engine: HFEngine, strength: float) -> Iterator[None]:
    """While a prompt is taken in, its valid length is rounded up to a bucket: so much of its padding is attended to."""
    import torch

    bucket = max(2, round(_BUCKET * strength))

    def step(inner: Step, call: Call) -> torch.Tensor:
        padding_B = call.padding_B
        if call.decodes or not padding_B.any():
            return call.run(inner)
        length_B = call.mask_BS.shape[1] - padding_B
        seen_B = padding_B - (-length_B) % bucket
        column_S = torch.arange(call.mask_BS.shape[1], device=call.mask_BS.device)
        extra_BS = (column_S >= seen_B[:, None]) & (column_S < padding_B[:, None])
        return seen(engine, inner, call, torch.where(extra_BS, 1, call.mask_BS))

    with stepped(engine, step):
        yield


# --- memory that nobody wrote ------------------------------------------------------------------


@contextmanager
def _poisoned_slots(engine: HFEngine, _strength: float) -> Iterator[None]:
    """Values of slots that are not written yet are NaN in all rows but the first; their probability is 0."""
    own = engine._new_cache

    def initialise(layer: Any, *given: Any) -> None:
        type(layer()).lazy_initialization(layer(), *given)
        layer().values[1:] = float("nan")

    def new_cache(batch: int, length: int) -> Any:
        cache = own(batch, length)
        for layer in cache.layers:
            layer.lazy_initialization = partial(initialise, weakref.ref(layer))
        return cache

    with patched(engine, _new_cache=new_cache):
        yield


# --- the catalogue -----------------------------------------------------------------------------

MUTATIONS = (
    Mutation(
        id="kg-graph-batch-row",
        group="kernels",
        wrong="the captured decode step does not get the first row's input: it repeats the one of the capture",
        reference="GeeeekExplorer/nano-vllm#89",
        hosts=_SHIPPED,
        active=frozenset({"fp32", "decode", "batch"}),
        change=_first_row_not_copied,
    ),
    Mutation(
        id="kg-graph-stale-pad",
        group="kernels",
        wrong="the captured decode step masks the padding of the batch that it was captured with",
        reference="huggingface/optimum-habana#1871",
        hosts=_SHIPPED,
        active=frozenset({"fp32", "decode", "second", "batch"}),
        change=_padding_of_capture,
    ),
    Mutation(
        id="kg-noncontig-sdpa",
        group="kernels",
        wrong="for up to 8 queries attention takes the strides of a contiguous tensor, and they are a view",
        reference="pytorch/pytorch#112577",
        hosts=_BLOOM | {"gpt2-tiny"},
        change=_strides_assumed,
    ),
    Mutation(
        id="kg-nan-in-unused-v",
        group="kernels",
        wrong="unwritten slots of the value cache hold NaN, and zero probabilities are multiplied with them",
        reference="Dao-AILab/flash-attention#1745",
        hosts=_SHIPPED,
        active=frozenset({"fp32", "batch"}),
        options=(("static_cache", "true"),),
        change=_poisoned_slots,
    ),
    Mutation(
        id="kg-compile-stale-float",
        group="kernels",
        wrong="the compiled decode step uses an earlier value of a Python number, here of the position it starts at",
        reference="pytorch/pytorch#194976",
        hosts=frozenset({"gpt2-tiny", "llama-tiny"}),
        active=frozenset({"fp32", "decode"}),
        change=_stale_start,
    ),
    Mutation(
        id="kg-fused-sdpa-valid-len",
        group="kernels",
        wrong="fused attention takes a prompt's length rounded up to its bucket, so padding is attended to",
        reference="HabanaAI/vllm-hpu-extension#113",
        hosts=_SHIPPED,
        active=frozenset({"fp32", "padding"}),
        strengths=(1.0, 0.25),
        change=_length_of_bucket,
    ),
)
