"""Bugs of tensor parallelism, in one process: SimTP, which is the same function, and what sharding got wrong.

A rank is a slice of the weights. What it holds is computed by itself; then the ranks' outputs are put side by side
(column-parallel layers) or summed (row-parallel layers), as a gather and an all-reduce would.

Shape legend: B batch rows, T new tokens, E inputs, N outputs, V vocabulary, R ranks, G groups of a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from harness.mutations.answering import History, choosing, processed
from harness.mutations.mutation import Mutation, attention_of, blocks, part, patched, rewritten, weight_rows

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from harness.engines.hf import HFEngine

#: Sums the partial products of the ranks, [B, T, N] each.
Reduce = Callable[[Sequence["torch.Tensor"]], "torch.Tensor"]
Forward = Callable[..., "torch.Tensor"]
#: The rows of a weight that each rank holds of one part of it (q, k or v), in the order of the ranks.
Part = list[slice]

_ALL = frozenset({"bloom-tiny", "bloom-raw", "llama-tiny", "gpt2-tiny"})
_SEED = 61_403


class _Process:
    """What the process remembers of the model that was loaded last, as a module-level variable does."""

    num_kv_heads: int | None = None


# --- SimTP -------------------------------------------------------------------------------------


def in_order(partials: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of the ranks' partial products, rank 0 first."""
    total = partials[0]
    for partial_BTN in partials[1:]:
        total = total + partial_BTN
    return total


@contextmanager
def tensor_parallel(
    model: PreTrainedModel, ranks: int, *, reduce: Reduce = in_order, more_biases: float = 0.0
) -> Iterator[None]:
    """SimTP: compute embedding, attention, MLP and head in ``ranks`` shards; by default this is the same function.

    Heads, hidden units and vocabulary need not divide evenly: the first ranks get one more.

    Args:
        model: a BLOOM, a GPT-2 or a Llama.
        ranks: how many shards; at most as many as there are KV heads.
        reduce: sums the partial products of a row-parallel layer.
        more_biases: the bias of a row-parallel layer is added by rank 0, and this many times by every other rank.

    Raises:
        LookupError: on entry, where the model lacks a part.
    """
    with ExitStack() as stack:
        for module, forward in _sharded(model, ranks, reduce, more_biases):
            stack.enter_context(patched(module, forward=forward))
        yield


def _sharded(
    model: PreTrainedModel, ranks: int, reduce: Reduce, more_biases: float
) -> Iterator[tuple[nn.Module, Forward]]:
    """Each layer with its forward over the ranks. Shards are cut at the call, so that a copy cuts its own weights."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    yield embedding, partial(_embedded, embedding, ranks)
    yield head, partial(_column, (head,), [_cut(_shares(head.weight.shape[0], ranks))])
    heads = _kv_heads(model)
    for block in blocks(model):
        attention, mlp = attention_of(block), part(block, "mlp")
        for layer, parts in _attention_parts(model, attention, ranks):
            yield layer, partial(_column, (layer,), parts)
        output = _attention_output(attention)
        yield output, partial(_row, output, ranks, heads, True, reduce, more_biases)
        for up in _named(mlp, "dense_h_to_4h", "c_fc", "gate_proj", "up_proj"):
            yield up, partial(_column, (up,), [_cut(_shares(len(weight_rows(up)), ranks))])
        down = part(mlp, "dense_4h_to_h", "c_proj", "down_proj")
        yield down, partial(_row, down, ranks, weight_rows(down).shape[1], False, reduce, more_biases)


def _kv_heads(model: PreTrainedModel) -> int:
    """What ranks share out: query heads go with the KV head that they read."""
    config: Any = model.config
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _attention_parts(model: PreTrainedModel, attention: Any, ranks: int) -> list[tuple[nn.Module, list[Part]]]:
    """Each layer into the attention, with the rows of its parts on each rank."""
    heads, shares = _kv_heads(model), _shares(_kv_heads(model), ranks)
    if hasattr(attention, "c_attn"):
        # Rows are q, k, v, each of all heads.
        rows = len(weight_rows(attention.c_attn)) // 3
        return [(attention.c_attn, [_cut(shares, rows // heads, i * rows) for i in range(3)])]
    # BLOOM's rows go by head, each with its q, k, v; Llama's layers hold one of the three.
    layers = _named(attention, "query_key_value", "q_proj", "k_proj", "v_proj")
    if not layers:
        raise LookupError(f"{type(attention).__name__} is not known to SimTP")
    return [(layer, [_cut(shares, len(weight_rows(layer)) // heads)]) for layer in layers]


def _attention_output(attention: Any) -> nn.Module:
    output: nn.Module = part(attention, "dense", "c_proj", "o_proj")
    return output


def _named(owner: Any, *names: str) -> list[Any]:
    return [getattr(owner, name) for name in names if hasattr(owner, name)]


def _shares(total: int, ranks: int) -> list[int]:
    """As even as can be, the first ranks one more."""
    return [total // ranks + (rank < total % ranks) for rank in range(ranks)]


def _exchanged(heads: int, ranks: int) -> list[int]:
    """The heads that each rank gets to see at run time: by the count that the process remembers, where that divides."""
    remembered = _Process.num_kv_heads
    if remembered is None or heads % remembered:
        return _shares(heads, ranks)
    return [share * (heads // remembered) for share in _shares(remembered, ranks)]


def _cut(shares: Sequence[int], unit: int = 1, start: int = 0) -> Part:
    """Consecutive slices of ``unit`` times the shares."""
    edges = [start, *(start + unit * end for end in accumulate(shares))]
    return [slice(low, high) for low, high in pairwise(edges)]


def _embedded(module: Any, ranks: int, ids_BT: torch.Tensor) -> torch.Tensor:
    """Each rank looks up the ids of its own rows and gives zeros for the others; the sum is the embedding."""
    from torch.nn.functional import embedding

    parts = []
    for rows in _cut(_shares(len(module.weight), ranks)):
        own_BT = (ids_BT >= rows.start) & (ids_BT < rows.stop)
        local_BT = (ids_BT - rows.start).where(own_BT, 0)
        parts.append(embedding(local_BT, module.weight[rows]) * own_BT[..., None])
    return in_order(parts)


def _column(modules: Sequence[Any], parts: Sequence[Part], x_BTE: torch.Tensor) -> torch.Tensor:
    """Each rank multiplies by its rows of the modules' joined weights; then part by part the ranks side by side."""
    import torch
    from torch.nn.functional import linear

    weight_NE = torch.cat([weight_rows(module) for module in modules])
    bias_N = None if modules[0].bias is None else torch.cat([module.bias for module in modules])
    outputs = []
    for own in zip(*parts, strict=True):
        shard_NE = torch.cat([weight_NE[rows] for rows in own])
        output = linear(x_BTE, shard_NE, None if bias_N is None else torch.cat([bias_N[rows] for rows in own]))
        outputs.append(output.split([rows.stop - rows.start for rows in own], dim=-1))
    return torch.cat([output[i] for i in range(len(parts)) for output in outputs], dim=-1)


def _row(
    module: Any, ranks: int, units: int, by_head: bool, reduce: Reduce, more_biases: float, x_BTE: torch.Tensor
) -> torch.Tensor:
    """Each rank multiplies its slice of the input by its columns; the products are summed, and the bias added once.

    ``units`` are what is shared out: KV heads where ``by_head``, else hidden units.
    """
    from torch.nn.functional import linear

    width, bias_N = x_BTE.shape[-1] // units, module.bias
    columns = _cut(_shares(units, ranks), width)
    given = _cut(_exchanged(units, ranks), width) if by_head else columns
    partials = []
    for rank, (own, seen) in enumerate(zip(columns, given, strict=True)):
        partial_BTN = linear(_fitted(x_BTE[..., seen], own.stop - own.start), weight_rows(module)[:, own])
        if rank and more_biases and bias_N is not None:
            partial_BTN = partial_BTN + more_biases * bias_N
        partials.append(partial_BTN)
    total = reduce(partials)
    return total if bias_N is None else total + bias_N


def _fitted(x_BTE: torch.Tensor, width: int) -> torch.Tensor:
    """A receive buffer of ``width``: what is too much is lost, and what is missing is zeros."""
    from torch.nn.functional import pad

    surplus = x_BTE.shape[-1] - width
    return x_BTE if surplus == 0 else pad(x_BTE, (0, -surplus))


@contextmanager
def _forwards(pairs: Sequence[tuple[nn.Module, Forward]]) -> Iterator[None]:
    with ExitStack() as stack:
        for module, forward in pairs:
            stack.enter_context(patched(module, forward=forward))
        yield


# --- what is cut in the wrong place ------------------------------------------------------------


@contextmanager
def _biases(engine: HFEngine, strength: float) -> Iterator[None]:
    with tensor_parallel(engine.model, 2, more_biases=strength):
        yield


def _chunked(modules: Sequence[Any], sizes: Sequence[int], ranks: int = 2) -> list[Part]:
    """The parts of ``sizes`` rows as ranks read them that got one contiguous chunk each of all rows joined."""
    chunks = _cut(_shares(sum(len(weight_rows(module)) for module in modules), ranks))
    local = [_cut([size // ranks for size in sizes], start=chunk.start) for chunk in chunks]
    return [[rank[i] for rank in local] for i in range(len(sizes))]


@contextmanager
def _qkv_chunk(engine: HFEngine, _strength: float) -> Iterator[None]:
    pairs: list[tuple[nn.Module, Forward]] = []
    for block in blocks(engine.model):
        attention = attention_of(block)
        if hasattr(attention, "c_attn"):
            layer = attention.c_attn
            sizes = [len(weight_rows(layer)) // 3] * 3
            pairs.append((layer, partial(_column, (layer,), _chunked((layer,), sizes))))
        else:
            pairs += _joined_and_chunked(_named(attention, "q_proj", "k_proj", "v_proj"))
    with tensor_parallel(engine.model, 2), _forwards(pairs):
        yield


@contextmanager
def _gate_up_chunk(engine: HFEngine, _strength: float) -> Iterator[None]:
    pairs = [
        pair
        for block in blocks(engine.model)
        for pair in _joined_and_chunked((part(block.mlp, "gate_proj"), part(block.mlp, "up_proj")))
    ]
    with tensor_parallel(engine.model, 2), _forwards(pairs):
        yield


def _joined_and_chunked(layers: Sequence[Any]) -> list[tuple[nn.Module, Forward]]:
    """Layers that were fused into one weight, and each rank's chunk of it taken for its share of each of them."""
    parts = _chunked(layers, [len(weight_rows(layer)) for layer in layers])
    return [(layer, partial(_column, layers, [own])) for layer, own in zip(layers, parts, strict=True)]


@contextmanager
def _stale_head_count(engine: HFEngine, _strength: float) -> Iterator[None]:
    with patched(_Process, num_kv_heads=3), tensor_parallel(engine.model, 4):
        yield


# --- the all-reduce ----------------------------------------------------------------------------


class _Racing:
    """An all-reduce that now and then reads rank 1's buffer before this step's partial is visible in it.

    Every layer uses the one buffer, so what is read there is what the all-reduce before this one left.
    """

    def __init__(self, probability: float) -> None:
        import torch

        self._probability = probability
        self._draws = torch.Generator().manual_seed(_SEED)
        self._buffer: torch.Tensor | None = None

    def __call__(self, partials: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        fresh = partials[1].flatten()
        before, self._buffer = self._buffer, fresh
        late = float(torch.rand((), generator=self._draws, dtype=torch.float64)) < self._probability
        if before is None or not late:
            return in_order(partials)
        size = min(len(before), len(fresh))
        read = torch.cat([before[:size], fresh[size:]]).view_as(partials[1])
        return in_order([partials[0], read, *partials[2:]])


@contextmanager
def _race(engine: HFEngine, strength: float) -> Iterator[None]:
    with tensor_parallel(engine.model, 2, reduce=_Racing(0.1 * strength)):
        yield


def _in_bfloat16(partials: Sequence[torch.Tensor]) -> torch.Tensor:
    """A ring in bfloat16: each hop adds one rank's partial to the sum so far, and rounds."""
    return in_order([partial_BTN.bfloat16() for partial_BTN in partials]).to(partials[0].dtype)


@contextmanager
def _bfloat16_reduce(engine: HFEngine, strength: float) -> Iterator[None]:
    # A model of 32 bits is reduced in 32 bits.
    if engine.model.dtype.itemsize > 2:
        yield
        return
    with tensor_parallel(engine.model, max(2, round(8 * strength)), reduce=_in_bfloat16):
        yield


# --- the head, quantised shards ----------------------------------------------------------------


def _mixed_argmax(ranks: int, logits_BV: torch.Tensor, _history: History) -> torch.Tensor:
    """Each rank's best logit and its id, gathered as [R, B] and read as [B, R]: right for one row alone."""
    import torch

    shards = _cut(_shares(logits_BV.shape[-1], ranks))
    values_RB = torch.stack([logits_BV[:, own].amax(dim=-1) for own in shards])
    ids_RB = torch.stack([logits_BV[:, own].argmax(dim=-1) + own.start for own in shards])
    values_BR, ids_BR = values_RB.reshape(-1, ranks), ids_RB.reshape(-1, ranks)
    return choosing(logits_BV, ids_BR.gather(1, values_BR.argmax(dim=-1, keepdim=True))[:, 0])


@contextmanager
def _argmax_rows(engine: HFEngine, _strength: float) -> Iterator[None]:
    with processed(engine, partial(_mixed_argmax, 2)):
        yield


def _unordered_scales(weight_NE: torch.Tensor, group: int, ranks: int) -> torch.Tensor:
    """A weight of GPTQ with act-order whose codes meet the scales of other groups.

    Its columns were quantised from the largest to the smallest (by norm: there are no activations here), and share a
    scale with their neighbours in that order; a rank takes the column's own place for its group. The rounding of the
    codes is left out: what changes is the index alone.
    """
    import torch

    columns = weight_NE.shape[1]
    order_E = weight_NE.norm(dim=0).argsort(descending=True, stable=True)
    right_E = torch.empty_like(order_E)
    right_E[order_E] = torch.arange(columns, device=order_E.device) // group
    largest_NG = weight_NE.new_zeros(len(weight_NE), -(-columns // group))
    largest_NG.scatter_reduce_(1, right_E.expand_as(weight_NE), weight_NE.abs(), "amax")
    groups = _cut(_shares(largest_NG.shape[1], ranks))
    local = [
        (torch.arange(own.stop - own.start, device=order_E.device) // group + held.start).clamp(max=held.stop - 1)
        for own, held in zip(_cut(_shares(columns, ranks)), groups, strict=True)
    ]
    wrong_NE, right_NE = largest_NG[:, torch.cat(local)], largest_NG[:, right_E]
    return weight_NE * wrong_NE / right_NE.where(right_NE > 0, 1)


@contextmanager
def _act_order(engine: HFEngine, _strength: float) -> Iterator[None]:
    import torch

    layers = [
        layer
        for block in blocks(engine.model)
        for layer in (
            _attention_output(attention_of(block)),
            part(part(block, "mlp"), "dense_4h_to_h", "c_proj", "down_proj"),
        )
    ]
    with rewritten(*(layer.get_parameter("weight") for layer in layers)), tensor_parallel(engine.model, 2):
        for layer in layers:
            rows = weight_rows(layer)
            wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
            rows.copy_(_unordered_scales(wide, 32, 2))
        yield


# --- the catalogue -----------------------------------------------------------------------------

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        id="tp-bias-xN",
        group="tensor parallel",
        wrong="each of 2 ranks adds the bias of a row-parallel layer before the sum: twice the bias",
        reference="EleutherAI/gpt-neox#962",
        hosts=_ALL,
        subtlety="subtle",
        strengths=(1.0, 0.3, 0.1, 0.03, 0.01),
        change=_biases,
    ),
    Mutation(
        id="tp-qkv-chunk",
        group="tensor parallel",
        wrong="the fused q, k, v are cut into 2 contiguous chunks, and each is read as a rank's own q, k, v",
        reference="sgl-project/sglang#24321",
        hosts=frozenset({"llama-tiny", "gpt2-tiny"}),
        subtlety="gross",
        change=_qkv_chunk,
    ),
    Mutation(
        id="tp-gateup-chunk",
        group="tensor parallel",
        wrong="the fused gate and up are cut in the middle: one rank pairs gate with gate, the other up with up",
        reference="xLLM-AI/xllm#1616",
        hosts=frozenset({"llama-tiny"}),
        subtlety="gross",
        change=_gate_up_chunk,
    ),
    Mutation(
        id="tp-uneven-global",
        group="tensor parallel",
        wrong="heads go to the ranks by the head count of another model: more than a rank holds weights for are lost",
        reference="deepspeedai/DeepSpeed#8316",
        hosts=_ALL,
        change=_stale_head_count,
    ),
    Mutation(
        id="tp-allreduce-race",
        group="tensor parallel",
        wrong="one all-reduce in ten reads what the one before it left in rank 1's buffer",
        reference="vllm-project/vllm#2760",
        hosts=_ALL,
        strengths=(1.0, 0.3, 0.1, 0.03),
        change=_race,
    ),
    Mutation(
        id="tp-bf16-reduce",
        group="tensor parallel",
        wrong="partial sums of 8 ranks are rounded to bfloat16 and added in it, hop by hop",
        reference="NVIDIA/TransformerEngine#1761",
        hosts=_ALL,
        subtlety="subtle",
        active=frozenset({"half"}),
        strengths=(1.0, 0.5, 0.25),
        change=_bfloat16_reduce,
    ),
    Mutation(
        id="tp-argmax-rows",
        group="tensor parallel",
        wrong="the ranks' best tokens, gathered by rank and row, are read by row and rank",
        reference="NVIDIA/TensorRT-LLM#7128",
        hosts=_ALL,
        subtlety="gross",
        active=frozenset({"fp32", "batch", "free"}),
        shows="tokens",
        change=_argmax_rows,
    ),
    Mutation(
        id="tp-actorder",
        group="tensor parallel",
        wrong="quantised columns that were put in order of size take their scales by their place in the rank's shard",
        reference="vllm-project/vllm#7374",
        hosts=_ALL,
        subtlety="gross",
        change=_act_order,
    ),
)
