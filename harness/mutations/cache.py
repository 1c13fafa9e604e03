"""Bugs of the KV cache: slots that belong to another token, row or request, and what was left in them.

What several requests or pieces of a prompt do to one cache needs no server: the engine's steps are changed, and
the cache that they share is a real one. Paged caches are the engine's own with their block tables worked out here.

Shape legend: B batch rows, T new tokens, S tokens so far (padding included), K KV heads, D head size, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from harness.mutations.mutation import Mutation, attention_of, blocks, hooked, patched, rewritten, weight_rows
from harness.mutations.steps import Call, gathered, reading, seen, stepped

if TYPE_CHECKING:
    import torch

    from harness.engines.decoding import Step
    from harness.engines.hf import HFEngine

    #: Keys and values [B, K, S, D] of each layer.
    States = list[tuple[torch.Tensor, torch.Tensor]]

_SEED = 41_203
#: Slots of a block of a paged cache, as in vLLM.
_BLOCK = 16

_SHIPPED = frozenset({"bloom-tiny", "bloom-raw", "gpt2-tiny", "llama-tiny"})
_CHUNKED = (("chunk", str(_BLOCK)),)


def _states(cache: Any) -> States:
    """The tensors that a cache keeps, to be changed in place."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def _lengths(call: Call) -> tuple[list[int], list[int]]:
    """Padding and tokens of each row."""
    padding = call.padding_B.tolist()
    return padding, [call.mask_BS.shape[1] - columns for columns in padding]


# --- one request after another -----------------------------------------------------------------


@contextmanager
def _not_reset(engine: HFEngine, _strength: float) -> Iterator[None]:
    """The cache of a request begins with all that the request before it left there, and none of it is masked.

    Rows that the earlier batch did not have begin empty.
    """
    import torch

    own = engine._new_cache
    last: list[Call] = []
    stale_BS: list[torch.Tensor] = []

    def new_cache(batch: int, length: int) -> Any:
        offset = sum(mask.shape[1] for mask in stale_BS)
        stale_BS.clear()
        if not last:
            return own(batch, length)
        call = last.pop()
        columns = call.mask_BS.shape[1]
        cache = own(batch, length + columns)
        for layer, pair in zip(cache.layers, _states(call.cache), strict=True):
            layer.update(*(_rows(states[:, :, offset : offset + columns], batch) for states in pair))
        stale_BS.append(_rows(call.mask_BS, batch))
        return cache

    def step(inner: Step, call: Call) -> torch.Tensor:
        if call.cache is None:
            return call.run(inner)
        last[:] = [call]
        return replace(call, mask_BS=torch.cat([*stale_BS, call.mask_BS], dim=1)).run(inner)

    with stepped(engine, step), patched(engine, _new_cache=new_cache):
        yield


def _rows(tensor: torch.Tensor, batch: int) -> torch.Tensor:
    """A copy of the first ``batch`` rows, with rows of zeros where there are fewer."""
    import torch

    rows = tensor[:batch]
    return torch.cat([rows, rows.new_zeros((batch - len(rows), *rows.shape[1:]))])


@contextmanager
def _padding_extracted(engine: HFEngine, _strength: float) -> Iterator[None]:
    """A prompt cache: rows of a left-padded batch are kept with their padding, cut to the length of the prompt.

    The next request for the same prompt gets all but its last token from there, once.
    """
    import torch

    kept: dict[tuple[int, ...], States] = {}

    def step(inner: Step, call: Call) -> torch.Tensor:
        if not call.begins or call.ids_BT.shape[1] == 1:
            return call.run(inner)
        padding, lengths = _lengths(call)
        prompts = [tuple(ids[start:]) for ids, start in zip(call.ids_BT.tolist(), padding, strict=True)]
        hits = {row: kept.pop(prompt) for row, prompt in enumerate(prompts) if prompt in kept}
        logits_BTV = _resumed(inner, call, hits, padding, lengths) if hits else call.run(inner)
        for row, prompt in enumerate(prompts):
            if padding[row] and row not in hits:
                kept[prompt] = [
                    (keys[row, :, : lengths[row]].clone(), values[row, :, : lengths[row]].clone())
                    for keys, values in _states(call.cache)
                ]
        return logits_BTV

    def _resumed(
        inner: Step, call: Call, hits: dict[int, States], padding: Sequence[int], lengths: Sequence[int]
    ) -> torch.Tensor:
        most = replace(
            call, ids_BT=call.ids_BT[:, :-1], position_BT=call.position_BT[:, :-1], mask_BS=call.mask_BS[:, :-1]
        )
        before_BTV = most.run(inner)
        for row, stored in hits.items():
            cut, known = slice(padding[row], padding[row] + lengths[row] - 1), slice(lengths[row] - 1)
            for (keys, values), (old_keys, old_values) in zip(_states(call.cache), stored, strict=True):
                keys[row, :, cut], values[row, :, cut] = old_keys[:, known], old_values[:, known]
        last = replace(call, ids_BT=call.ids_BT[:, -1:], position_BT=call.position_BT[:, -1:])
        after_B1V = last.run(inner)
        return after_B1V if call.keep == 1 else torch.cat([before_BTV, after_B1V], dim=1)

    with stepped(engine, step):
        yield


# --- rows of one batch -------------------------------------------------------------------------


@contextmanager
def _rows_crossed(engine: HFEngine, _strength: float) -> Iterator[None]:
    """An external store gives the first two rows each other's tokens, as many as both have."""

    def step(inner: Step, call: Call) -> torch.Tensor:
        logits_BTV = call.run(inner)
        if call.begins and len(call.ids_BT) > 1:
            padding, lengths = _lengths(call)
            first, second = (slice(start, start + min(lengths[:2])) for start in padding[:2])
            for states in (tensor for pair in _states(call.cache) for tensor in pair):
                mine = states[0, :, first].clone()
                states[0, :, first] = states[1, :, second]
                states[1, :, second] = mine
        return logits_BTV

    with stepped(engine, step):
        yield


@contextmanager
def _stale_tails(engine: HFEngine, _strength: float) -> Iterator[None]:
    """Block tables keep the ids of an earlier load behind a row's own blocks, and padding is written through them.

    Blocks are given out in order, row by row; the earlier load was of rows that grew side by side.
    """

    def step(inner: Step, call: Call) -> torch.Tensor:
        logits_BTV = call.run(inner)
        if call.begins:
            targets, sources = _overrun(*_lengths(call))
            if targets:
                for states in (tensor for pair in _states(call.cache) for tensor in pair):
                    rows, columns = zip(*sources, strict=True)
                    padding_NKD = states[list(rows), :, list(columns)]
                    rows, columns = zip(*targets, strict=True)
                    states[list(rows), :, list(columns)] = padding_NKD
        return logits_BTV

    with stepped(engine, step):
        yield


def _overrun(padding: Sequence[int], lengths: Sequence[int]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(row, column) of tokens that are overwritten, and of the padding that is written there.

    Prompts are padded to the longest one; the pads of a row stand behind its tokens in a paged cache.
    """
    batch, longest = len(lengths), padding[0] + lengths[0]
    needed = [-(-length // _BLOCK) for length in lengths]
    first = [0, *accumulate(needed)]
    owner = {first[row] + number: (row, number) for row in range(batch) for number in range(needed[row])}
    targets, sources = [], []
    for row in range(batch):
        for place in range(needed[row] * _BLOCK, longest):
            column, slot = divmod(place, _BLOCK)
            other, number = owner.get(column * batch + row, (row, -1))
            if number >= 0 and number * _BLOCK + slot < lengths[other]:
                targets.append((other, padding[other] + number * _BLOCK + slot))
                sources.append((row, place - lengths[row]))
    return targets, sources


@contextmanager
def _slots_by_position(engine: HFEngine, _strength: float) -> Iterator[None]:
    """Tokens go to the slot of their position, which padding does not count; the mask goes by columns.

    A prompt that is taken at once attends to its own keys and values and not to the cache's.
    """
    import torch

    def read(call: Call, _layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if call.start == 0:
            return keys, values
        source_BS = torch.arange(keys.shape[2], device=keys.device) + call.padding_B[:, None]
        source_BS = source_BS.masked_fill(source_BS >= call.mask_BS.shape[1], -1)
        return gathered(keys, source_BS), gathered(values, source_BS)

    with reading(engine, read):
        yield


# --- pieces of one prompt ----------------------------------------------------------------------


@contextmanager
def _slots_of_first_piece(engine: HFEngine, _strength: float) -> Iterator[None]:
    """Every later piece of a prompt is written where the first one was; single tokens go where they should."""
    import torch

    table: list[int] = []  # the column whose token each slot holds, -1 for none

    def read(_call: Call, _layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if table == list(range(len(table))):
            return keys, values
        source_S = torch.tensor([*table, *range(len(table), keys.shape[2])], device=keys.device)
        source_BS = source_S.expand(len(keys), -1)
        return gathered(keys, source_BS), gathered(values, source_BS)

    def step(inner: Step, call: Call) -> torch.Tensor:
        if call.cache is not None:
            end, new = call.mask_BS.shape[1], call.ids_BT.shape[1]
            if call.begins or call.decodes:
                table[call.start :] = range(call.start, end)
            else:
                table[call.start :] = [-1] * new
                table[:new] = range(call.start, end)
        return call.run(inner)

    with reading(engine, read), stepped(engine, step):
        yield


_DROPPED = 8


@contextmanager
def _dropped_behind_second(engine: HFEngine, strength: float) -> Iterator[None]:
    """Tokens behind the second piece of a prompt, a shift too far, are removed once the third has been taken in."""
    dropped = max(1, round(_DROPPED * strength))
    taken: list[tuple[int, int]] = []  # first column of each piece of this prompt, and the one behind it

    def step(inner: Step, call: Call) -> torch.Tensor:
        if call.cache is None:
            return call.run(inner)
        if call.begins:
            taken.clear()
        third = taken[2] if len(taken) > 2 else None
        if not call.decodes:
            taken.append((call.start, call.mask_BS.shape[1]))
        if third is None:
            return call.run(inner)
        mask_BS = call.mask_BS.clone()
        mask_BS[:, third[0] : min(third[0] + dropped, third[1])] = 0
        return seen(engine, inner, call, mask_BS)

    with stepped(engine, step):
        yield


_ADAPTER_RANK, _ADAPTER_SIZE = 4, 0.2


@contextmanager
def _prefix_of_adapter(engine: HFEngine, strength: float) -> Iterator[None]:
    """The first block of a prompt is found in a prefix cache that an adapter's request has filled."""
    updates = _adapter(engine, _ADAPTER_SIZE * strength)
    weights = [rows for rows, _ in updates]

    def others(inner: Step, call: Call) -> States:
        with rewritten(*weights):
            for rows, update in updates:
                rows.add_(update)
            return _recomputed(engine, inner, call)

    with stepped(engine, partial(_with_prefix, others, slice(_BLOCK))):
        yield


def _adapter(engine: HFEngine, size: float) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Weights of query, key and value of each layer [out, in], with a low-rank update of that relative size."""
    import torch

    generator = torch.Generator().manual_seed(_SEED)
    found = []
    for block in blocks(engine.model):
        for name in ("q_proj", "k_proj", "v_proj", "query_key_value", "c_attn"):
            layer = getattr(attention_of(block), name, None)
            if layer is not None:
                rows = weight_rows(layer)
                left = torch.randn((rows.shape[0], _ADAPTER_RANK), generator=generator, dtype=torch.float64)
                right = torch.randn((_ADAPTER_RANK, rows.shape[1]), generator=generator, dtype=torch.float64)
                update = left @ right
                update *= size * float(rows.double().norm() / update.norm())
                found.append((rows, update.to(rows)))
    return found


def _recomputed(engine: HFEngine, step: Step, call: Call, ids_BT: torch.Tensor | None = None) -> States:
    """Keys and values of the call's tokens, or of others in their place, taken into a cache of their own."""
    batch, length = call.ids_BT.shape
    cache = engine._new_cache(batch, length)
    replace(call, ids_BT=call.ids_BT if ids_BT is None else ids_BT, cache=cache, keep=1).run(step)
    return _states(cache)


def _with_prefix(
    others: Callable[[Step, Call], States | None], columns: slice, inner: Step, call: Call
) -> torch.Tensor:
    """A step after which columns of a prompt's first piece hold other keys and values; only full blocks are shared."""
    logits_BTV = call.run(inner)
    length = call.ids_BT.shape[1]
    found = others(inner, call) if call.begins and length >= _BLOCK else None
    for mine, theirs in zip(_states(call.cache), found, strict=True) if found else ():
        for states, other in zip(mine, theirs, strict=True):
            states[:, :, :length][:, :, columns] = other[:, :, :length][:, :, columns]
    return logits_BTV


@contextmanager
def _block_refilled(engine: HFEngine, _strength: float) -> Iterator[None]:
    """A race: at every other request or so, the last block of the first piece was given to another one meanwhile."""
    races = random.Random(_SEED)
    vocabulary = engine.vocabulary

    def others(inner: Step, call: Call) -> States | None:
        if races.random() < 0.5:
            return None
        return _recomputed(engine, inner, call, (call.ids_BT + vocabulary // 3) % vocabulary)

    with stepped(engine, partial(_with_prefix, others, slice(-_BLOCK, None))):
        yield


# --- assisted decoding -------------------------------------------------------------------------

_DRAFTS = 3


@contextmanager
def _first_layer_rewound(engine: HFEngine, _strength: float) -> Iterator[None]:
    with assisted(engine, slice(1)):
        yield


@contextmanager
def assisted(engine: HFEngine, rewound: slice) -> Iterator[None]:
    """Decode with drafted tokens that are all rejected; only the ``rewound`` layers forget them.

    With slice(None) this is what assisted decoding should do, and changes nothing.
    """
    import torch

    static = engine.options.static_cache
    own, last = engine._new_cache, (engine.context or 2**30) - 1

    def read(call: Call, _layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Slots behind the counter of the first layer are not looked at; a static cache's mask takes care of it.
        cut = slice(None) if static else slice(call.mask_BS.shape[1])
        return keys[:, :, cut], values[:, :, cut]

    def step(inner: Step, call: Call) -> torch.Tensor:
        if not call.decodes:
            return call.run(inner)
        ahead = torch.arange(1, 1 + _DRAFTS, device=call.ids_BT.device)
        drafts_BT = (7 * call.ids_BT + 13 * ahead) % engine.vocabulary
        fed = Call(
            ids_BT=torch.cat([call.ids_BT, drafts_BT], dim=1),
            position_BT=torch.cat([call.position_BT, call.position_BT + ahead], dim=1).clamp(max=last),
            mask_BS=torch.cat([call.mask_BS, call.mask_BS[:, -1:].expand(-1, _DRAFTS)], dim=1),
            cache=call.cache,
            keep=1 + _DRAFTS,
        )
        logits_BTV = fed.run(inner)
        for layer in call.cache.layers[rewound]:
            if static:
                layer.cumulative_length.sub_(_DRAFTS)
            else:
                layer.keys, layer.values = layer.keys[:, :, :-_DRAFTS], layer.values[:, :, :-_DRAFTS]
        return logits_BTV[:, :1]

    # Layers that are not rewound need more room in a static cache.
    roomy = patched(engine, _new_cache=lambda batch, length: own(batch, (1 + _DRAFTS) * length))
    with roomy, reading(engine, read), stepped(engine, step):
        yield


_BURST = 5


@contextmanager
def _window_with_burst(engine: HFEngine, strength: float) -> Iterator[None]:
    """A sliding-window cache that records its past for draft bursts gives all of it, and the mask hides none.

    Token i of a burst so sees i tokens behind the window.
    """
    import torch

    window = getattr(engine.model.config, "sliding_window", None)
    if window is None:
        raise LookupError(f"{type(engine.model).__name__} has no sliding window")
    own, burst = engine._new_cache, 1 + max(1, round((_BURST - 1) * strength))
    decoded = extra = 0
    now: list[Call] = []

    def new_cache(batch: int, length: int) -> Any:
        nonlocal decoded
        cache, decoded = own(batch, length), 0
        for layer in cache.layers:
            if layer.is_sliding:
                layer.activate_past_recording()
        return cache

    def read(call: Call, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kept = call.cache.layers[layer]
        if not extra or not kept.is_sliding:
            return keys, values
        cut = slice(-(window + extra), None)
        return kept.keys[:, :, cut], kept.values[:, :, cut]

    def widened(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs.get("attention_mask")
        if not extra or mask is None:
            return None
        length = now[0].mask_BS.shape[1]
        visible = now[0].mask_BS[:, None, None, length - window - extra : length - window].bool()
        if mask.dtype != torch.bool:
            visible = torch.zeros_like(visible, dtype=mask.dtype).masked_fill(~visible, torch.finfo(mask.dtype).min)
        wide = torch.cat([visible.expand(-1, -1, mask.shape[2], -1), mask], dim=-1)
        return args, {**kwargs, "attention_mask": wide}

    def step(inner: Step, call: Call) -> torch.Tensor:
        nonlocal decoded, extra
        now[:], extra = [call], 0
        if call.decodes:
            extra = max(0, min(decoded % burst, call.mask_BS.shape[1] - window))
            decoded += 1
        return call.run(inner)

    hooks = [(attention_of(block), widened, True) for block in blocks(engine.model)]
    with patched(engine, _new_cache=new_cache), reading(engine, read), stepped(engine, step), hooked(*hooks):
        yield


# --- an fp8 cache ------------------------------------------------------------------------------

_CALIBRATION_TOKENS = 64


@contextmanager
def _fp8_scale_lost(engine: HFEngine, strength: float) -> Iterator[None]:
    """Keys and values are stored in e4m3 with a scale for each layer, and read back with it to a lower power."""
    scales = _fp8_scales(engine)

    def read(call: Call, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if call.start == 0:
            return keys, values
        of_keys, of_values = scales[layer]
        return (
            _e4m3(keys / of_keys) * of_keys ** (1 - strength),
            _e4m3(values / of_values) * of_values ** (1 - strength),
        )

    with reading(engine, read):
        yield


@contextmanager
def _fp8_unscaled(engine: HFEngine, _strength: float) -> Iterator[None]:
    def read(call: Call, _layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (keys, values) if call.start == 0 else (_e4m3(keys), _e4m3(values))

    with reading(engine, read):
        yield


def _e4m3(states: torch.Tensor) -> torch.Tensor:
    """Rounded to e4m3 as kernels do it: what lies beyond its range is its largest number."""
    import torch

    limit = torch.finfo(torch.float8_e4m3fn).max
    return states.clamp(-limit, limit).to(torch.float8_e4m3fn).to(states.dtype)


def _fp8_scales(engine: HFEngine) -> list[tuple[float, float]]:
    """For keys and values of each layer the scale that brings the largest one of a calibration text to e4m3's."""
    import torch

    length = min(_CALIBRATION_TOKENS, engine.context or _CALIBRATION_TOKENS)
    ids_BT = torch.arange(3, 3 + length, device=engine.model.device)[None] % engine.vocabulary
    position_BT = torch.arange(length, device=engine.model.device)[None]
    # Which class of cache the engine has used is part of its settings.
    with patched(engine, _cache_class=engine._cache_class):
        cache = engine._new_cache(1, length)
        engine._step(ids_BT, position_BT, torch.ones_like(ids_BT), cache, 1)
    limit = torch.finfo(torch.float8_e4m3fn).max
    return [(float(keys.abs().max()) / limit, float(values.abs().max()) / limit) for keys, values in _states(cache)]


# --- the catalogue -----------------------------------------------------------------------------

MUTATIONS = (
    Mutation(
        id="kv-not-reset",
        group="cache",
        wrong="a request attends to the keys and values that the request before it left in the cache",
        reference="deepspeedai/DeepSpeed#2669",
        hosts=_SHIPPED,
        active=frozenset({"fp32", "second"}),
        change=_not_reset,
    ),
    Mutation(
        id="kv-static-crop",
        group="cache",
        wrong="after rejected drafts only the first layer's length is rewound; the others keep the drafts",
        reference="huggingface/transformers#30312",
        hosts=_SHIPPED,
        active=frozenset({"fp32", "decode"}),
        change=_first_layer_rewound,
    ),
    Mutation(
        id="kv-slot-from-rope-pos",
        group="cache",
        wrong="the cache slot is the token's position instead of its column, so padded rows read empty slots",
        reference="vllm-project/vllm#54498",
        hosts=_SHIPPED,
        subtlety="subtle",
        active=frozenset({"fp32", "decode", "padding"}),
        change=_slots_by_position,
    ),
    Mutation(
        id="kv-reuse-head",
        group="cache",
        wrong="after the second reused piece of a prompt the tokens behind it are removed from the cache",
        reference="ggml-org/llama.cpp#12160",
        hosts=_SHIPPED,
        active=frozenset({"fp32", "chunk"}),
        strengths=(1.0, 0.5, 0.25),
        options=_CHUNKED,
        change=_dropped_behind_second,
    ),
    Mutation(
        id="kv-slot-map-chunk",
        group="cache",
        wrong="the slots of every later piece of a prompt are counted from the start of the first",
        reference="vllm-project/vllm#36580",
        hosts=_SHIPPED,
        active=frozenset({"fp32", "chunk"}),
        options=_CHUNKED,
        change=_slots_of_first_piece,
    ),
    Mutation(
        id="kv-stale-block-tail",
        group="cache",
        wrong="padding is written through stale ids at the end of a block table into other requests' blocks",
        reference="vllm-project/vllm#42494",
        hosts=_SHIPPED,
        subtlety="subtle",
        active=frozenset({"fp32", "decode", "batch"}),
        change=_stale_tails,
    ),
    Mutation(
        id="kv-prefix-adapter",
        group="cache",
        wrong="a prefix is looked up by its tokens alone and found with an adapter's keys and values",
        reference="vllm-project/vllm#3264",
        hosts=_SHIPPED,
        active=frozenset({"fp32", "chunk"}),
        strengths=(1.0, 0.3, 0.1),
        options=_CHUNKED,
        change=_prefix_of_adapter,
    ),
    Mutation(
        id="kv-prefix-toctou",
        group="cache",
        wrong="a block of a found prefix is refilled for another request before it is locked",
        reference="jundot/omlx#3087",
        hosts=_SHIPPED,
        subtlety="subtle",
        active=frozenset({"fp32", "chunk"}),
        options=_CHUNKED,
        change=_block_refilled,
    ),
    Mutation(
        id="kv-fp8-scale",
        group="cache",
        wrong="keys and values are divided by their fp8 scale when stored and not multiplied by it when read",
        reference="sgl-project/sglang#18818",
        hosts=_SHIPPED,
        active=frozenset({"fp32", "decode"}),
        strengths=(1.0, 0.1, 0.03),
        change=_fp8_scale_lost,
    ),
    Mutation(
        id="kv-fp8-scale-one",
        group="cache",
        wrong="keys and values are stored in fp8 with a scale of 1 in place of the checkpoint's",
        reference="ROCm/vllm#317",
        hosts=_SHIPPED,
        subtlety="subtle",
        active=frozenset({"fp32", "decode"}),
        change=_fp8_unscaled,
    ),
    Mutation(
        id="kv-cross-request-store",
        group="cache",
        wrong="a store of keys and values gives two requests each other's blocks",
        reference="LMCache/LMCache#4385",
        hosts=_SHIPPED,
        active=frozenset({"fp32", "decode", "batch"}),
        change=_rows_crossed,
    ),
    Mutation(
        id="kv-batch-merge-offset",
        group="cache",
        wrong="a row is taken out of a left-padded batch with its padding, and found by the next equal prompt",
        reference="ml-explore/mlx-lm#1776",
        hosts=_SHIPPED,
        active=frozenset({"fp32", "second"}),
        change=_padding_extracted,
    ),
    Mutation(
        id="kv-swa-assist",
        group="cache",
        wrong="during a burst of drafts the sliding-window cache gives tokens from behind the window",
        reference="huggingface/transformers#48280",
        hosts=frozenset({"mistral-window"}),
        active=frozenset({"fp32", "decode", "long"}),
        strengths=(1.0, 0.25),
        change=_window_with_burst,
    ),
)
