"""Bugs of pipeline parallelism, in one process: SimPP, which is the same function, and what staging got wrong.

A stage is a range of layers. Stages run one after the other, in micro-batches where asked, each with a KV cache of
its own; the last stage holds its own copy of a tied head.

Shape legend: B batch rows, T new tokens, S tokens so far, V vocabulary, E hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from harness.mutations.mutation import Mutation, attention_of, blocks, hooked, patched

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from harness.engines.hf import HFEngine

#: Hands out the outputs of the micro-batches, [B, T, V] each.
Deliver = Callable[[list["torch.Tensor"]], list["torch.Tensor"]]
#: Makes one weight [V, E] from another.
Load = Callable[["torch.Tensor"], "torch.Tensor"]

_ALL = frozenset({"bloom-tiny", "bloom-raw", "llama-tiny", "gpt2-tiny"})
_TIED = frozenset({"bloom-tiny", "bloom-raw", "gpt2-tiny"})
_SEED = 71_917


# --- SimPP -------------------------------------------------------------------------------------


def stages_of(layers: int, stages: int) -> list[range]:
    """Layer ranges as even as can be, the first stages one more."""
    ends = accumulate(layers // stages + (stage < layers % stages) for stage in range(stages))
    return [range(low, high) for low, high in pairwise([0, *ends])]


def _copied(weight_VE: torch.Tensor) -> torch.Tensor:
    return weight_VE.clone()


@contextmanager
def pipeline_parallel(
    engine: HFEngine,
    stages: Sequence[range],
    *,
    load_head: Load = _copied,
    micro_batch: int | None = None,
    deliver: Deliver = list,
) -> Iterator[None]:
    """SimPP: run the layer ranges one after the other; by default, and if they hold all layers, the same function.

    Args:
        engine: an open engine.
        stages: the layers of each stage. Layers are numbered anew, as a model of so many layers numbers them.
        load_head: makes the last stage's head [V, E] from the embedding, where the two are tied.
        micro_batch: rows that go through the stages together; None is the whole batch.
        deliver: puts the micro-batches' outputs into the order in which they are handed out.
    """
    model, body = engine.model, _body(engine.model)
    name = "h" if hasattr(body, "h") else "layers"
    found = blocks(model)
    kept = [[found[i] for i in stage] for stage in stages]
    with ExitStack() as stack:
        stack.enter_context(patched(body, **{name: type(found)(block for stage in kept for block in stage)}))
        for number, block in enumerate(block for stage in kept for block in stage):
            stack.enter_context(patched(attention_of(block), layer_idx=number))
        stack.enter_context(hooked(*((stage[0], _received, True) for stage in kept[1:])))
        stack.enter_context(_own_head(model, load_head))
        if micro_batch is not None:
            stack.enter_context(_micro_batches(engine, micro_batch, deliver))
        yield


def _body(model: PreTrainedModel) -> Any:
    whole: Any = model
    return whole.transformer if hasattr(model, "transformer") else whole.model


def _received(_module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The hidden states as the stage before sent them: in a buffer of its own."""
    return (inputs[0].clone(), *inputs[1:]), named


@contextmanager
def _own_head(model: PreTrainedModel, load: Load) -> Iterator[None]:
    from torch import nn

    if not _tied(model):
        yield
        return
    head = model.get_output_embeddings()
    weight_VE: torch.Tensor = head.get_parameter("weight")
    # As before: whether torch folds a batch into one product hangs on this, and with it the last bit.
    copy = nn.Parameter(load(weight_VE.detach()), requires_grad=weight_VE.requires_grad)
    with patched(head, weight=copy):
        yield


def _tied(model: PreTrainedModel) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


@contextmanager
def _micro_batches(engine: HFEngine, size: int, deliver: Deliver) -> Iterator[None]:
    step, new_cache = engine._step, engine._new_cache

    def rows_of(batch: int) -> list[slice]:
        return [slice(start, min(start + size, batch)) for start in range(0, batch, size)]

    def new_caches(batch: int, length: int) -> list[Any]:
        return [new_cache(rows.stop - rows.start, length) for rows in rows_of(batch)]

    def step_by_step(
        input_ids_BT: torch.Tensor,
        position_ids_BT: torch.Tensor,
        attention_mask_BS: torch.Tensor,
        caches: list[Any] | None,
        keep: int,
    ) -> torch.Tensor:
        import torch

        outputs = [
            step(
                input_ids_BT[rows],
                position_ids_BT[rows],
                attention_mask_BS[rows],
                None if caches is None else caches[number],
                keep,
            )
            for number, rows in enumerate(rows_of(len(input_ids_BT)))
        ]
        return torch.cat(deliver(outputs))

    with patched(engine, _step=step_by_step, _new_cache=new_caches):
        yield


# --- what is left out or mixed up --------------------------------------------------------------


@contextmanager
def _dropped(engine: HFEngine, _strength: float) -> Iterator[None]:
    size = len(blocks(engine.model)) // 2
    with pipeline_parallel(engine, [range(size), range(size, 2 * size)]):
        yield


@contextmanager
def _last_stage_alone(engine: HFEngine, _strength: float) -> Iterator[None]:
    layers = len(blocks(engine.model))
    # What the last of two stages would hold.
    with pipeline_parallel(engine, [range(layers // 2, layers)]):
        yield


@contextmanager
def _stale_head(engine: HFEngine, strength: float) -> Iterator[None]:
    model = engine.model
    if not _tied(model):
        raise LookupError(f"the head of {type(model).__name__} is not tied to its embedding")
    stages = stages_of(len(blocks(model)), 2)
    with pipeline_parallel(engine, stages, load_head=partial(_not_loaded, strength)):
        yield


def _not_loaded(strength: float, weight_VE: torch.Tensor) -> torch.Tensor:
    """Random weights of the same spread; below a strength of 1 with so much in common with the weights to load."""
    import torch

    generator = torch.Generator().manual_seed(_SEED)
    wide_VE = weight_VE.double()
    random_VE = torch.randn(weight_VE.shape, generator=generator, dtype=torch.float64).to(weight_VE.device)
    share = math.sqrt(1 - strength**2)
    return (share * wide_VE + strength * wide_VE.std() * random_VE).to(weight_VE.dtype)


def _next_request(outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The output of each micro-batch goes to the request of the next one."""
    return [outputs[-1], *outputs[:-1]]


@contextmanager
def _batch_mix(engine: HFEngine, _strength: float) -> Iterator[None]:
    stages = stages_of(len(blocks(engine.model)), 2)
    with pipeline_parallel(engine, stages, micro_batch=1, deliver=_next_request):
        yield


# --- the catalogue -----------------------------------------------------------------------------

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        id="pp-layers-dropped",
        group="pipeline parallel",
        wrong="2 stages of half the layers, rounded down: of an odd number the last layer is in neither",
        reference="NVIDIA/Megatron-LM#1304",
        hosts=_ALL,
        change=_dropped,
    ),
    Mutation(
        id="pp-last-k",
        group="pipeline parallel",
        wrong="the layer count that was meant for the last stage makes the whole model: its last layers alone",
        reference="NVIDIA/Megatron-LM#1778",
        hosts=_ALL,
        subtlety="gross",
        change=_last_stage_alone,
    ),
    Mutation(
        id="pp-tied-head",
        group="pipeline parallel",
        wrong="the last stage does not load the embedding, which is its head: random, or of other weights than now",
        reference="sgl-project/sglang#15890",
        hosts=_TIED,
        subtlety="gross",
        strengths=(1.0, 0.3, 0.1, 0.03, 0.01),
        change=_stale_head,
    ),
    Mutation(
        id="pp-batch-mix",
        group="pipeline parallel",
        wrong="the output of each micro-batch goes to the request of the next one",
        reference="deepspeedai/DeepSpeed#5729",
        hosts=_ALL,
        active=frozenset({"fp32", "batch"}),
        change=_batch_mix,
    ),
)
