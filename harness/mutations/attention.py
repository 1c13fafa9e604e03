"""Bugs of attention: scale, masks, windows, heads, softmax.

Shape legend: B batch rows, T new tokens, S keys, H heads, D head size, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from harness.mutations.mutation import (
    Change,
    Mutation,
    attention_of,
    blocks,
    hooked,
    patched,
    together,
)
from harness.mutations.passes import Pass, watched

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from harness.engines.hf import HFEngine

_BUCKET = 16
_DROPOUT_SEED = 31_337


def _attentions(model: PreTrainedModel) -> list[Any]:
    return [attention_of(block) for block in blocks(model)]


# --- the scale of the scores ---------------------------------------------------------------------


def _scale_name(attention: Any) -> str:
    """Where the scale is kept: "inv_norm_factor" in BLOOM, "scaling" elsewhere."""
    for name in ("inv_norm_factor", "scaling"):
        if hasattr(attention, name):
            return name
    raise LookupError(f"{type(attention).__name__} keeps no scale")


def _rescaled(attention: Any, factor: float) -> Any:
    name = _scale_name(attention)
    return patched(attention, **{name: getattr(attention, name) * factor})


@contextmanager
def _layer_factor(engine: HFEngine, strength: float) -> Iterator[None]:
    """Scores divided by the number of the layer, from 1, and not multiplied again."""
    found = enumerate(_attentions(engine.model), start=1)
    with together(_rescaled(attention, number**-strength) for number, attention in found):
        yield


# --- which keys a query sees ------------------------------------------------------------------------

#: The keys that each query sees in a pass, bool [B, T, S], None where the right mask stays.
Sight = Callable[[Pass], "torch.Tensor | None"]


@contextmanager
def _seeing(engine: HFEngine, sight: Sight, hidden: float | None = None) -> Iterator[None]:
    """Attention with the mask of ``sight``; ``hidden`` is added to what is not seen, by default half the least float.

    The lowest float itself overflows beside a score in fp16, and a row that sees nothing would be NaN.
    """
    import torch

    found = _attentions(engine.model)

    def masked(_module: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        seen_BTS = sight(current)
        if seen_BTS is None:
            return None
        dtype = (args[0] if args else given["hidden_states"]).dtype
        value = torch.finfo(dtype).min / 2 if hidden is None else hidden
        mask_BTS = torch.zeros(seen_BTS.shape, dtype=dtype, device=seen_BTS.device).masked_fill(~seen_BTS, value)
        return args, {**given, "attention_mask": mask_BTS[:, None]}

    with watched(engine) as current, hooked(*((attention, masked, True) for attention in found)):
        yield


def _keys_S(current: Pass) -> torch.Tensor:
    import torch

    mask_BS = current.padding_BS()
    return torch.arange(mask_BS.shape[1], device=mask_BS.device)


def _causal(current: Pass, shift: int = 0) -> torch.Tensor:
    """Keys up to the query's own column and ``shift`` more, without padding."""
    causal_TS = _keys_S(current) <= current.columns_T()[:, None] + shift
    return causal_TS & current.padding_BS().bool()[:, None]


def _from_top_left(current: Pass) -> torch.Tensor | None:
    return _causal(current, -current.past) if current.continuing else None


def _first_key(current: Pass) -> torch.Tensor | None:
    return _causal(current, -current.past) if current.decoding else None


def _everything(current: Pass) -> torch.Tensor | None:
    import torch

    mask_BS = current.padding_BS()
    if not current.continuing:
        return None
    return torch.ones((current.rows, current.new, mask_BS.shape[1]), dtype=torch.bool, device=mask_BS.device)


def _as(sight: Sight) -> Change:
    @contextmanager
    def change(engine: HFEngine, _strength: float) -> Iterator[None]:
        with _seeing(engine, sight):
            yield

    return change


@contextmanager
def _unwritten_keys(engine: HFEngine, _strength: float) -> Iterator[None]:
    """A chunk's kv length is that of the whole cache, and its mask ends there: it sees slots not written yet."""
    if not engine.options.chunk or not engine.options.static_cache:
        raise LookupError("only prompts in chunks, with a static cache, have slots that are not written yet")

    def sight(current: Pass) -> torch.Tensor | None:
        if current.new != engine.options.chunk:
            return None
        keys_S, end = _keys_S(current), current.past + current.new
        seen_TS = keys_S <= current.columns_T()[:, None] + (len(keys_S) - end)
        return seen_TS & (current.padding_BS().bool() | (keys_S >= end))[:, None]

    with _seeing(engine, sight):
        yield


@contextmanager
def _small_mask(engine: HFEngine, strength: float) -> Iterator[None]:
    with _seeing(engine, _causal, hidden=-1e4 / strength):
        yield


@contextmanager
def _wider_window(engine: HFEngine, _strength: float) -> Iterator[None]:
    """One key more, in the mask and in the cache, which both go by the config."""
    config: Any = engine.model.config
    if not getattr(config, "sliding_window", None):
        raise LookupError(f"{type(engine.model).__name__} has no sliding window")
    with patched(config, sliding_window=config.sliding_window + 1):
        yield


@contextmanager
def _mask_as_length(engine: HFEngine, _strength: float) -> Iterator[None]:
    """The mask of a row becomes its sum, and that many tokens from the left are taken for real."""
    import torch

    def collapsed(_model: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        mask_BS = given["attention_mask"]
        keys_S = torch.arange(mask_BS.shape[1], device=mask_BS.device)
        wrong_BS = (keys_S < mask_BS.sum(dim=-1, keepdim=True)).to(mask_BS.dtype)
        return args, {**given, "attention_mask": wrong_BS}

    with hooked((engine.model, collapsed, True)):
        yield


def _bucketed(seen: int) -> Change:
    """Single prompts are padded on the left to a multiple of 16, as servers do that compile one graph a length.

    ``seen`` is the mask of that padding: with 0 nothing changes; with 1 it is attended to.
    """

    @contextmanager
    def change(engine: HFEngine, _strength: float) -> Iterator[None]:
        step, new_cache, pads = engine._step, engine._new_cache, [0]

        def padded_step(
            ids_BT: torch.Tensor, position_BT: torch.Tensor, mask_BS: torch.Tensor, cache: Any, keep: int
        ) -> torch.Tensor:
            from torch.nn.functional import pad

            if len(ids_BT) > 1:
                return step(ids_BT, position_BT, mask_BS, cache, keep)
            new = ids_BT.shape[1]
            if cache is None or int(cache.get_seq_length()) == 0:
                pads[0] = _BUCKET - new % _BUCKET
                ids_BT = pad(ids_BT, (pads[0], 0), value=engine.decoder.pad_id)
                position_BT = pad(position_BT, (pads[0], 0))
            return step(ids_BT, position_BT, pad(mask_BS, (pads[0], 0), value=seen), cache, keep)[:, -new:]

        def longer_cache(batch: int, length: int) -> Any:
            return new_cache(batch, length + _BUCKET if batch == 1 else length)

        with patched(engine, _step=padded_step, _new_cache=longer_cache):
            yield

    return change


# --- softmax, heads, dropout ------------------------------------------------------------------------


@contextmanager
def _finite_start(engine: HFEngine, strength: float) -> Iterator[None]:
    """GPT-2's attention with a running maximum that starts at -50, where it should at minus infinity."""
    if engine.model.config.model_type != "gpt2":
        raise LookupError(f"{type(engine.model).__name__} is no GPT-2")
    found = _attentions(engine.model)
    kernels = (patched(each, forward=partial(_softmax_from, -50.0 / strength, each)) for each in found)
    with _seeing(engine, _causal), together(kernels):
        yield


def _softmax_from(
    start: float,
    module: Any,
    hidden_BTE: torch.Tensor,
    past_key_values: Any = None,
    attention_mask: torch.Tensor | None = None,
    **_others: Any,
) -> tuple[torch.Tensor, None]:
    """Weights exp(score - max(score, start)): all of them underflow where no score comes near ``start``."""
    import torch

    parts = module.c_attn(hidden_BTE).split(module.split_size, dim=2)
    query_BHTD, key_BHSD, value_BHSD = (x.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for x in parts)
    if past_key_values is not None:
        key_BHSD, value_BHSD = past_key_values.update(key_BHSD, value_BHSD, module.layer_idx)
    wide = torch.promote_types(query_BHTD.dtype, torch.float32)
    scores_BHTS = query_BHTD.to(wide) @ key_BHSD.transpose(-1, -2).to(wide) * module.scaling + attention_mask
    weights_BHTS = (scores_BHTS - scores_BHTS.amax(dim=-1, keepdim=True).clamp(min=start)).exp()
    # Of a row without any weight nothing is written, and nothing is what the output held before.
    weights_BHTS = (weights_BHTS / weights_BHTS.sum(dim=-1, keepdim=True)).nan_to_num(nan=0.0)
    mixed_BTE = (weights_BHTS.to(value_BHSD.dtype) @ value_BHSD).transpose(1, 2).flatten(2)
    return module.c_proj(mixed_BTE), None


@contextmanager
def _tiled_heads(engine: HFEngine, _strength: float) -> Iterator[None]:
    """Query head h takes KV head h % KV, where it should take h // (H / KV).

    The kernel gives slot s the KV head s // (H / KV); so the query heads change their slots, and go back behind it.
    """
    found = _attentions(engine.model)
    groups, heads = _grouping(engine.model)
    head_of_slot = [kv + (heads // groups) * member for kv in range(heads // groups) for member in range(groups)]
    slot_of_head = [head_of_slot.index(head) for head in range(heads)]

    def into_slots(_module: Any, _args: tuple[Any, ...], _given: dict[str, Any], x: torch.Tensor) -> Any:
        return x.unflatten(-1, (heads, -1))[..., head_of_slot, :].flatten(-2)

    def back(_module: Any, args: tuple[torch.Tensor, ...], given: dict[str, Any]) -> Any:
        return (args[0].unflatten(-1, (heads, -1))[..., slot_of_head, :].flatten(-2),), given

    hooks = [(each.q_proj, into_slots, False) for each in found] + [(each.o_proj, back, True) for each in found]
    with hooked(*hooks):
        yield


def _grouping(model: PreTrainedModel) -> tuple[int, int]:
    """Query heads a KV head, and query heads."""
    config: Any = model.config
    heads = int(config.num_attention_heads)
    groups = heads // int(getattr(config, "num_key_value_heads", heads))
    if groups == 1 or groups == heads:
        raise LookupError(f"{type(model).__name__} has no groups of query heads")
    return groups, heads


@contextmanager
def _dropout(engine: HFEngine, strength: float) -> Iterator[None]:
    """Attention weights are dropped though the model is in evaluation; from a fixed seed, so that tables repeat."""
    import torch

    found = [change for each in _attentions(engine.model) for change in _dropping(each, 0.1 * strength)]
    with torch.random.fork_rng(devices=[]), together(found):
        torch.manual_seed(_DROPOUT_SEED)
        yield


def _dropping(attention: Any, share: float) -> Iterator[Any]:
    if hasattr(attention, "inv_norm_factor"):  # BLOOM: a module of its own
        yield patched(attention.attention_dropout, p=share, training=True)
        return
    yield patched(attention, training=True)
    if hasattr(attention, "attn_dropout"):
        yield patched(attention.attn_dropout, p=share)
    else:
        yield patched(attention, attention_dropout=share)


# --- the list ---------------------------------------------------------------------------------------

_SHIPPED = frozenset({"bloom-raw", "bloom-tiny", "gpt2-tiny", "llama-tiny"})
_STEADY = _SHIPPED - {"bloom-raw"}
_CHUNK = (("chunk", "16"),)

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        id="at-scale",
        group="attention",
        wrong="scores are divided by the number of the layer, and not multiplied again",
        reference="NVIDIA/Megatron-LM#848",
        hosts=_SHIPPED,
        strengths=(1.0, 0.1, 0.01, 0.001),
        change=_layer_factor,
    ),
    Mutation(
        id="at-swa-off1",
        group="attention",
        wrong="a sliding window of one key more, from an inclusive bound",
        reference="huggingface/transformers#39408",
        hosts=frozenset({"gemma2-softcap", "mistral-window"}),
        subtlety="subtle",
        active=frozenset({"fp32", "long"}),
        change=_wider_window,
    ),
    Mutation(
        id="at-causal-topleft",
        group="attention",
        wrong="the causal mask of a chunk begins at the first key, so that its queries miss the newest ones",
        reference="gittensor-ai-lab/sparkinfer#3",
        hosts=_STEADY,
        active=frozenset({"fp32", "chunk"}),
        options=_CHUNK,
        change=_as(_from_top_left),
    ),
    Mutation(
        id="at-causal-on-decode",
        group="attention",
        wrong="decode has a causal mask of one row, which leaves the first key alone",
        reference="google/flax#5591",
        hosts=_SHIPPED,
        subtlety="gross",
        active=frozenset({"fp32", "decode"}),
        change=_as(_first_key),
    ),
    Mutation(
        id="at-chunk-future",
        group="attention",
        wrong="a chunk's kv length is that of the whole sequence, so that slots not written yet are read",
        reference="GeeeekExplorer/nano-vllm#212",
        hosts=_STEADY,
        active=frozenset({"fp32", "chunk"}),
        options=(*_CHUNK, ("static_cache", "true")),
        change=_unwritten_keys,
    ),
    Mutation(
        id="at-mask-dropped-multi",
        group="attention",
        wrong="several tokens behind a cache have no mask, and see each other and the padding",
        reference="huggingface/transformers#30311",
        hosts=_STEADY,
        subtlety="subtle",
        active=frozenset({"fp32", "chunk"}),
        options=_CHUNK,
        change=_as(_everything),
    ),
    Mutation(
        id="at-mask-b1",
        group="attention",
        wrong="the padding of a prompt that is alone in its batch is not masked",
        reference="huggingface/transformers#46773",
        hosts=_STEADY,
        active=frozenset({"fp32", "single"}),
        change=_bucketed(1),
    ),
    Mutation(
        id="at-mask-1e4",
        group="attention",
        wrong="-10000 is added to masked scores, where scores are thousands themselves",
        reference="microsoft/onnxruntime#12843",
        hosts=frozenset({"gpt2-sharp"}),
        subtlety="subtle",
        strengths=(1.0, 0.7, 0.5),
        change=_small_mask,
    ),
    Mutation(
        id="at-mask-as-length",
        group="attention",
        wrong="the padding mask becomes a length, as if padding were on the right",
        reference="microsoft/onnxruntime#18945",
        hosts=_STEADY,
        active=frozenset({"fp32", "padding", "batch"}),
        change=_mask_as_length,
    ),
    Mutation(
        id="at-finite-sentinel",
        group="attention",
        wrong="the running maximum of softmax starts at a finite number: rows of scores far below it give zero",
        reference="flashinfer-ai/flashinfer#4401",
        hosts=frozenset({"gpt2-sharp"}),
        subtlety="subtle",
        strengths=(1.0, 0.1, 0.02),
        change=_finite_start,
    ),
    Mutation(
        id="at-gqa-tile",
        group="attention",
        wrong="KV heads are tiled, 0 1 0 1, where each should be repeated, 0 0 1 1",
        reference="vectorch-ai/ScaleLLM#213",
        hosts=frozenset({"llama-scaled", "llama-tiny"}),
        subtlety="gross",
        change=_tiled_heads,
    ),
    Mutation(
        id="at-dropout-eval",
        group="attention",
        wrong="attention weights are dropped in evaluation",
        reference="pytorch/pytorch#124464",
        hosts=_SHIPPED,
        strengths=(1.0, 0.1, 0.01),
        change=_dropout,
    ),
)
