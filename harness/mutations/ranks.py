"""Bugs of sharding in the engines `tp` and `pp` themselves: each is a function that every rank calls on its own part.

`tp:size=2,prepare=harness.mutations.ranks:bias_on_every_rank` runs the model with one of them. The same bugs in one
process are in tensor_parallel.py and pipeline_parallel.py. Every change keeps the collectives of the ranks in step: a
rank that left one out would hold up the others, which is another failure. A part that is closed is loaded anew, so
nothing is put back but what the process would keep.

Shape legend: B batch rows, T new tokens, S tokens so far, E inputs, N outputs, H hidden units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from harness.engines import hf, hooks
from harness.engines.ranks import evidence, plans, stages
from harness.mutations.mutation import attention_of, patched

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from harness.engines.ranks.rank import RankEngine

#: Makes what a rank goes on with from its partial products, [B, T, N] both.
Reduce = Callable[["torch.Tensor"], "torch.Tensor"]

_BLOOM = frozenset({"bloom-tiny"})
_TIED = frozenset({"bloom-tiny", "gpt2-tiny"})
_ALL = frozenset({"bloom-tiny", "llama-tiny", "gpt2-tiny"})
_SEED = 88_007
#: The rank that is wrong where only one is.
_ODD = 1
#: How far a stale tensor is from the one to load, as a share of its spread.
_STALE = 0.03


@dataclass(frozen=True, kw_only=True, slots=True)
class RankMutation:
    """One bug of sharding, and where it is put in.

    Attributes:
        id: as the catalogue names it, where the same bug is there: "tp-bias-xN".
        wrong: the wrong maths, in one line.
        reference: where it was reported, "owner/repo#number"; "" where no report is known.
        spec: of the engine, without dtype and prepare: "tp:size=2".
        hosts: names of the shipped models that have the part.
        where: the ranks that are wrong; of `pp` a rank is a stage.
        weights: whether a rank then holds tensors that are not its part of the checkpoint.
        prepare: name of the function of this module that puts it in.
    """

    id: str
    wrong: str
    reference: str = ""
    spec: str
    hosts: frozenset[str] = _ALL
    where: Literal["all"] | tuple[int, ...]
    weights: bool = False
    prepare: str

    def candidate(self, dtype: str = "float32") -> str:
        """The SPEC that runs it."""
        return f"{self.spec},dtype={dtype},prepare={__name__}:{self.prepare}"


# --- what the functions below share ----------------------------------------------------------------


def whole_model(engine: RankEngine) -> PreTrainedModel:
    """The uncut model of a part, loaded beside it."""
    return hf.HFEngine(engine.options, text=engine.spec)._load()


def row_layers(engine: RankEngine) -> list[Any]:
    """The layers of a part whose outputs are sums over the shards, in the order of the forward."""
    return [engine.model.get_submodule(name) for name in engine.summed_layers()]


def _own_cut(engine: RankEngine, name: str) -> plans.Cut | None:
    style = plans.style_of(engine.model, name)
    return None if style is None else plans.cut_of(style, name)


def _overwrite(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """This rank's part of a parameter, set to a tensor of its shape."""
    evidence.local_part(parameter).copy_(value)


def _own_forward(module: Any, reduce: Reduce, early_bias: bool, x_BTE: torch.Tensor) -> torch.Tensor:
    from torch import nn
    from torch.nn.functional import linear

    weight = evidence.local_part(module.weight)
    rows_NE = weight if isinstance(module, nn.Linear) else weight.T
    bias_N = None if module.bias is None else evidence.local_part(module.bias)
    if early_bias:
        return reduce(linear(x_BTE, rows_NE, bias_N))
    total_BTN = reduce(linear(x_BTE, rows_NE))
    return total_BTN if bias_N is None else total_BTN + bias_N


def _summed(partial_BTN: torch.Tensor) -> torch.Tensor:
    """The sum over the shards, in the dtype of the partial products."""
    import torch.distributed as dist

    total_BTN = partial_BTN.contiguous()
    dist.all_reduce(total_BTN)
    return total_BTN


def _rewire(engine: RankEngine, layers: Sequence[Any], reduce: Reduce, *, early_bias: bool = False) -> None:
    """Give row-parallel layers a forward with another sum; ``early_bias`` adds the bias before it."""
    for layer in layers:
        forward = partial(_own_forward, layer, reduce, early_bias)
        engine._stack.enter_context(patched(layer, forward=forward))


def _go_on_with(engine: RankEngine, model: PreTrainedModel) -> None:
    """Run another model in place of the part."""
    engine._model = engine._forward = model
    _report_blocks(engine)


def _report_blocks(engine: RankEngine) -> None:
    """Let the blocks tell that the rank gets on, as those that were loaded do."""
    for name in hooks.block_names(engine.model):
        engine.model.get_submodule(name).register_forward_pre_hook(engine._beat(name))


# --- tensor parallel: the sum ----------------------------------------------------------------------


def bias_on_every_rank(engine: RankEngine) -> None:
    """Row-parallel layers add their bias on each rank, before the sum."""
    _rewire(engine, row_layers(engine), _summed, early_bias=True)


def no_reduce(engine: RankEngine) -> None:
    """No row-parallel layer is summed: each rank goes on with its own partial products."""
    _rewire(engine, row_layers(engine), lambda partial_BTN: partial_BTN)


def no_reduce_in_one_layer(engine: RankEngine) -> None:
    """The row-parallel layer in the middle is not summed."""
    layers = row_layers(engine)
    _rewire(engine, layers[len(layers) // 2 :][:1], lambda partial_BTN: partial_BTN)


def reduce_in_bfloat16(engine: RankEngine) -> None:
    """Partial products are rounded to bfloat16 and summed in it."""
    import torch

    def reduce(partial_BTN: torch.Tensor) -> torch.Tensor:
        return _summed(partial_BTN.to(torch.bfloat16)).to(partial_BTN.dtype)

    _rewire(engine, row_layers(engine), reduce)


def one_rank_reduces_in_bfloat16(engine: RankEngine) -> None:
    """One rank hands its partial products over rounded to bfloat16."""
    import torch

    def reduce(partial_BTN: torch.Tensor) -> torch.Tensor:
        return _summed(partial_BTN.to(torch.bfloat16).to(partial_BTN.dtype))

    if engine.place.rank == _ODD:
        _rewire(engine, row_layers(engine), reduce)


# --- tensor parallel: what is cut in the wrong place -----------------------------------------------


def qkv_in_chunks(engine: RankEngine) -> None:
    """The rows of q, k and v are joined, q first, and each rank takes one contiguous chunk for its own q, k and v."""
    whole = whole_model(engine)
    for name in hooks.block_names(engine.model):
        _chunk(engine, attention_of(engine.model.get_submodule(name)), attention_of(whole.get_submodule(name)))


def _chunk(engine: RankEngine, attention: Any, whole: Any) -> None:
    shard, size = engine.place.shard, engine.layout.tensor
    for kind in ("weight", "bias"):
        if hasattr(attention, "c_attn"):
            # Conv1D: outputs are the last dimension, of q, k and v in a row.
            _overwrite(getattr(attention.c_attn, kind), getattr(whole.c_attn, kind).chunk(size, dim=-1)[shard])
        elif hasattr(attention, "query_key_value"):
            rows = getattr(whole.query_key_value, kind)
            by_kind = rows.view(whole.num_heads, 3, whole.head_dim, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)
            _overwrite(getattr(attention.query_key_value, kind), by_kind.chunk(size)[shard])
        else:
            layers = [getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj")]
            if getattr(layers[0], kind) is None:
                continue
            rows = _joined(whole, kind).chunk(size)[shard]
            held = [getattr(layer, kind) for layer in layers]
            for place, own in zip(held, rows.split([len(evidence.local_part(one)) for one in held]), strict=True):
                _overwrite(place, own)


def _joined(attention: Any, kind: str) -> torch.Tensor:
    import torch

    return torch.cat([getattr(getattr(attention, name), kind) for name in ("q_proj", "k_proj", "v_proj")])


def slopes_of_the_first_rank(engine: RankEngine) -> None:
    """Every rank has the ALiBi slopes of heads 0 to H/k - 1 of all heads: those of rank 0."""
    own = engine.model.config.num_attention_heads // engine.layout.tensor
    _reslope(engine, lambda make, heads: make(heads).unflatten(0, (-1, heads))[:, :own])


def slopes_of_fewer_heads(engine: RankEngine) -> None:
    """Every rank makes the ALiBi slopes of a model that has as many heads as the rank."""
    own = engine.model.config.num_attention_heads // engine.layout.tensor
    _reslope(engine, lambda make, _heads: make(own).unflatten(0, (-1, own)))


def _reslope(engine: RankEngine, local: Callable[[Callable[[int], torch.Tensor], int], torch.Tensor]) -> None:
    """Biases of the rank's heads from ``local``, [B, H/k, 1, S], in the place of those of every rank."""
    body: Any = engine.model.base_model
    build = body.build_alibi_tensor

    def made(mask_BS: torch.Tensor, heads: int, dtype: torch.dtype) -> torch.Tensor:
        found = local(lambda count: build(mask_BS, count, dtype), heads)
        return found.repeat(1, engine.layout.tensor, 1, 1).flatten(0, 1)

    engine._stack.enter_context(patched(body, build_alibi_tensor=made))


# --- which part a rank holds -----------------------------------------------------------------------


def shard_0_everywhere(engine: RankEngine) -> None:
    """Each rank holds shard 0 of every layer that is cut."""
    _hold_shard_0(engine, [name for name, _ in engine.model.named_parameters()])


def shard_0_in_one_layer(engine: RankEngine) -> None:
    """One rank holds shard 0 of the row-parallel layer in the middle: an offset that was not added."""
    if engine.place.rank == engine.layout.world - 1:
        layers = row_layers(engine)
        middle = layers[len(layers) // 2].weight
        _hold_shard_0(engine, [name for name, held in engine.model.named_parameters() if held is middle])


def _hold_shard_0(engine: RankEngine, names: Sequence[str]) -> None:
    whole = whole_model(engine)
    for name in names:
        cut, held = _own_cut(engine, name), evidence.local_part(engine.model.get_parameter(name))
        if cut is None:
            continue
        tensor = whole.get_parameter(_in_whole(engine, name))
        first = cut.of(tensor, 0, engine.layout.tensor)
        # The last shard of what does not divide is shorter.
        held.copy_(first.narrow(cut.dim, 0, held.shape[cut.dim]))


def _in_whole(engine: RankEngine, name: str) -> str:
    """A parameter's name in the whole model."""
    return stages.renumbered(name, engine.model.config, engine.layers.start) if engine.layout.stages > 1 else name


def whole_on_every_rank(engine: RankEngine) -> None:
    """Nothing is cut: each rank computes the whole model by itself."""
    _go_on_with(engine, whole_model(engine))


def one_rank_at_random(engine: RankEngine) -> None:
    """One rank loads nothing: its part stays at its random initialisation."""
    if engine.place.rank == _ODD:
        initialise(engine.model, engine.place.rank)


def all_ranks_at_random(engine: RankEngine) -> None:
    """No rank loads anything."""
    initialise(engine.model, engine.place.rank)


def initialise(model: PreTrainedModel, rank: int) -> None:
    """Weights as a new model has them: matrices N(0, initializer_range), biases 0, norms 1; drawn by each rank."""
    import torch

    generator = torch.Generator().manual_seed(_SEED + rank)
    config: Any = model.config
    for name, parameter in model.named_parameters():
        held = evidence.local_part(parameter)
        if held.ndim > 1:
            fresh = torch.randn(held.shape, generator=generator) * config.initializer_range
        else:
            fresh = torch.full(held.shape, 0.0 if name.endswith("bias") else 1.0)
        held.copy_(fresh)


def one_replica_drifted(engine: RankEngine) -> None:
    """The last norm of one rank, which all hold alike, is another than that of the others."""
    if engine.place.rank == _ODD:
        whole = [held for name, held in engine.model.named_parameters() if _own_cut(engine, name) is None]
        norm = next(held for held in reversed(whole) if held.ndim == 1)
        _overwrite(norm, _stale(evidence.local_part(norm), _STALE))


def _stale(tensor: torch.Tensor, strength: float) -> torch.Tensor:
    """A tensor as it was some updates ago: noise of ``strength`` times its spread away, or all noise for 1."""
    import torch

    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(_SEED), dtype=torch.float64)
    wide = tensor.double()
    share = (1 - strength**2) ** 0.5
    old: torch.Tensor = share * wide + strength * wide.std() * noise.to(wide.device)
    return old.to(tensor.dtype)


# --- pipeline parallel -----------------------------------------------------------------------------


def remainder_dropped(engine: RankEngine) -> None:
    """Stages of equal size, rounded down: the layers that are left over are in none."""
    size = engine._full.get_text_config().num_hidden_layers // engine.layout.stages
    hold_blocks(engine, range(engine.place.stage * size, (engine.place.stage + 1) * size))


def last_block_dropped(engine: RankEngine) -> None:
    """The last stage leaves out its last block."""
    if engine.place.last:
        hold_blocks(engine, engine.layers[:-1])


def hold_blocks(engine: RankEngine, layers: range) -> None:
    """Make these blocks of the whole model the stage's own, as if it had been told so before it loaded them."""
    from torch import nn

    name = stages.anatomy_of(engine.model.config).blocks
    found = getattr(whole_model(engine).base_model, name)
    kept = [found[i] for i in layers]
    for number, block in enumerate(kept):
        attention_of(block).layer_idx = number
    setattr(engine.model.base_model, name, nn.ModuleList(kept))
    engine.model.config.num_hidden_layers = len(kept)
    engine.layers = layers
    _report_blocks(engine)


def first_blocks_again(engine: RankEngine) -> None:
    """A stage counts its blocks from 0 in the checkpoint as well, and loads the first ones again."""
    name = stages.anatomy_of(engine.model.config).blocks
    held, found = getattr(engine.model.base_model, name), getattr(whole_model(engine).base_model, name)
    for number, block in enumerate(held):
        block.load_state_dict(found[number].state_dict())


def micro_batches_exchanged(engine: RankEngine) -> None:
    """The first stage hands its two micro-batches over in the wrong order; of unequal ones, the rows that both have."""
    if not engine.place.first:
        return
    send, flush = engine.groups.send, engine.groups.flush
    waiting: list[torch.Tensor] = []

    def hold(hidden_BTH: torch.Tensor) -> None:
        waiting.append(hidden_BTH)

    def hand_over() -> None:
        for hidden_BTH in exchanged(waiting):
            send(hidden_BTH)
        waiting.clear()
        flush()

    engine._stack.enter_context(patched(engine.groups, send=hold, flush=hand_over))


def exchanged(parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Two micro-batches, [B, T, H] each, with the rows of the other one, as many as both have; one alone is itself."""
    import torch

    if len(parts) != 2:
        return list(parts)
    rows = min(map(len, parts))
    return [torch.cat([there[:rows], here[rows:]]) for here, there in (parts, reversed(parts))]


def head_at_random(engine: RankEngine) -> None:
    """The last stage does not load the embedding, which is its head: it stays random."""
    _change_head(engine, 1.0)


def head_of_before(engine: RankEngine) -> None:
    """The head of the last stage is the embedding as it was before the last updates."""
    _change_head(engine, _STALE)


def _change_head(engine: RankEngine, strength: float) -> None:
    if engine.place.last:
        weight_VH: Any = engine.model.get_output_embeddings().weight
        _overwrite(weight_VH, _stale(evidence.local_part(weight_VH), strength))


# --- the list --------------------------------------------------------------------------------------

RANK_MUTATIONS: tuple[RankMutation, ...] = (
    RankMutation(
        id="tp-bias-xN",
        wrong="each of 2 ranks adds the bias of a row-parallel layer before the sum: twice the bias",
        reference="EleutherAI/gpt-neox#962",
        spec="tp:size=2",
        where="all",
        prepare="bias_on_every_rank",
    ),
    RankMutation(
        id="tp-qkv-chunk",
        wrong="q, k and v, joined, are cut into 2 contiguous chunks, and each is read as a rank's own q, k, v",
        reference="sgl-project/sglang#24321",
        spec="tp:size=2",
        where="all",
        weights=True,
        prepare="qkv_in_chunks",
    ),
    RankMutation(
        id="pos-alibi-rank-slopes",
        wrong="every rank has the slopes of the first rank's heads",
        spec="tp:size=2",
        hosts=_BLOOM,
        where=(1,),
        prepare="slopes_of_the_first_rank",
    ),
    RankMutation(
        id="pos-alibi-local-count",
        wrong="every rank makes the slopes of a model with as many heads as it has itself",
        spec="tp:size=2",
        hosts=_BLOOM,
        where="all",
        prepare="slopes_of_fewer_heads",
    ),
    RankMutation(
        id="tp-shard-0",
        wrong="every rank loads shard 0 of each layer",
        spec="tp:size=3",
        where=(1, 2),
        weights=True,
        prepare="shard_0_everywhere",
    ),
    RankMutation(
        id="tp-shard-0-layer",
        wrong="one rank loads shard 0 of one row-parallel layer",
        spec="tp:size=3",
        where=(2,),
        weights=True,
        prepare="shard_0_in_one_layer",
    ),
    RankMutation(
        id="tp-no-reduce",
        wrong="no row-parallel layer is summed over the ranks",
        spec="tp:size=2",
        where="all",
        prepare="no_reduce",
    ),
    RankMutation(
        id="tp-no-reduce-layer",
        wrong="one row-parallel layer is not summed over the ranks",
        spec="tp:size=2",
        where="all",
        prepare="no_reduce_in_one_layer",
    ),
    RankMutation(
        id="tp-bf16-reduce",
        wrong="partial sums in float32 are rounded to bfloat16 and added in it",
        reference="NVIDIA/TransformerEngine#1761",
        spec="tp:size=2",
        where="all",
        prepare="reduce_in_bfloat16",
    ),
    RankMutation(
        id="tp-bf16-reduce-rank",
        wrong="one rank rounds its partial sums to bfloat16",
        spec="tp:size=3",
        where=(_ODD,),
        prepare="one_rank_reduces_in_bfloat16",
    ),
    RankMutation(
        id="tp-size-1",
        wrong="a tensor-parallel size of 3 was asked for, and each rank runs the whole model",
        spec="tp:size=3",
        where="all",
        prepare="whole_on_every_rank",
    ),
    RankMutation(
        id="tp-random-init",
        wrong="no rank loads its weights",
        spec="tp:size=2",
        where="all",
        weights=True,
        prepare="all_ranks_at_random",
    ),
    RankMutation(
        id="tp-random-init-rank",
        wrong="one rank does not load its weights",
        spec="tp:size=3",
        where=(_ODD,),
        weights=True,
        prepare="one_rank_at_random",
    ),
    RankMutation(
        id="tp-replica-drift",
        wrong="the last norm, which every rank holds alike, has drifted on one of them",
        reference="NVIDIA/Megatron-LM#1446",
        spec="tp:size=3",
        where=(_ODD,),
        weights=True,
        prepare="one_replica_drifted",
    ),
    RankMutation(
        id="pp-layers-dropped",
        wrong="3 stages of a third of the layers, rounded down: of 5 layers the last 2 are in none",
        reference="NVIDIA/Megatron-LM#1304",
        spec="pp:stages=3",
        where="all",
        prepare="remainder_dropped",
    ),
    RankMutation(
        id="pp-layers-dropped-last",
        wrong="the last of 2 stages leaves out its last layer",
        reference="NVIDIA/Megatron-LM#1304",
        spec="pp:stages=2",
        where=(1,),
        prepare="last_block_dropped",
    ),
    RankMutation(
        id="wc-layer-dup",
        wrong="layer indices without the offset of the stage: the second stage loads the first layers again",
        reference="huggingface/transformers#24381",
        spec="pp:stages=2",
        where=(1,),
        weights=True,
        prepare="first_blocks_again",
    ),
    RankMutation(
        id="pp-batch-mix",
        wrong="the first stage hands over each of two micro-batches for the other",
        reference="deepspeedai/DeepSpeed#5729",
        spec="pp:stages=2,micro_batches=2",
        where=(0,),
        prepare="micro_batches_exchanged",
    ),
    RankMutation(
        id="pp-tied-head",
        wrong="the last stage does not load the embedding, which is its head: random",
        reference="sgl-project/sglang#15890",
        spec="pp:stages=2",
        hosts=_TIED,
        where=(1,),
        weights=True,
        prepare="head_at_random",
    ),
    RankMutation(
        id="pp-tied-head-old",
        wrong="the last stage's head is an older copy of the embedding",
        reference="vllm-project/vllm#56689",
        spec="pp:stages=2",
        hosts=_TIED,
        where=(1,),
        weights=True,
        prepare="head_of_before",
    ),
    RankMutation(
        id="pp-random-init-stage",
        wrong="one stage does not load its weights",
        spec="pp:stages=3",
        where=(_ODD,),
        weights=True,
        prepare="one_rank_at_random",
    ),
    RankMutation(
        id="tp-shard-0-stage",
        wrong="of 2 stages with 2 ranks each, the last rank loads shard 0 of one row-parallel layer",
        spec="tp:size=2,stages=2",
        where=(3,),
        weights=True,
        prepare="shard_0_in_one_layer",
    ),
)
