"""Simple bugs that belong to no report: one tensor, one layer, one number. Whatever finds real ones finds these.

Shape legend: K KV heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from harness.mutations.mutation import Mutation, attention_of, blocks, part, patched, rewritten, weight_rows

if TYPE_CHECKING:
    import torch
    from torch import nn

    from harness.engines.hf import HFEngine

_ALL = frozenset({"bloom-tiny", "bloom-raw", "llama-tiny", "gpt2-tiny"})


def _up(block: nn.Module) -> Any:
    """The first projection of the MLP; Llama's gate stays."""
    mlp: Any = block.mlp
    return part(mlp, "up_proj", "dense_h_to_4h", "c_fc")


@contextmanager
def _scaled_row(engine: HFEngine, strength: float) -> Iterator[None]:
    layer = _up(blocks(engine.model)[2])
    with rewritten(layer.weight):
        weight_rows(layer)[3] *= 1 + 0.2 * strength
        yield


@contextmanager
def _swapped_rows(engine: HFEngine, _strength: float) -> Iterator[None]:
    layer = _up(blocks(engine.model)[1])
    with rewritten(layer.weight, layer.bias):
        for rows in (weight_rows(layer), layer.bias):
            rows[[3, 17]] = rows[[17, 3]]
        yield


@contextmanager
def _attention_scale(engine: HFEngine, strength: float) -> Iterator[None]:
    attention = attention_of(blocks(engine.model)[1])
    scale = part(attention, "scaling", "inv_norm_factor")
    name = "scaling" if hasattr(attention, "scaling") else "inv_norm_factor"
    with patched(attention, **{name: scale * (1 + 0.01 * strength)}):
        yield


@contextmanager
def _qkv_bias_lost(engine: HFEngine, _strength: float) -> Iterator[None]:
    attention = attention_of(blocks(engine.model)[2])
    names = ("q_proj", "k_proj", "v_proj", "query_key_value", "c_attn")
    biases = [getattr(attention, name).bias for name in names if hasattr(attention, name)]
    with rewritten(*biases):
        for bias in biases:
            bias.zero_()
        yield


@contextmanager
def _doubled_bias(engine: HFEngine, strength: float) -> Iterator[None]:
    bias = part(attention_of(blocks(engine.model)[2]), "o_proj", "dense", "c_proj").bias
    with rewritten(bias):
        bias *= 1 + strength
        yield


@contextmanager
def _swapped_kv_heads(engine: HFEngine, _strength: float) -> Iterator[None]:
    """Heads 0 and 1, of as many KV heads as there are."""
    attention = attention_of(blocks(engine.model)[1])
    names = ("k_proj", "v_proj", "query_key_value", "c_attn")
    layers = [getattr(attention, name) for name in names if hasattr(attention, name)]
    with rewritten(*(tensor for layer in layers for tensor in layer.parameters())):
        for layer in layers:
            for rows in (weight_rows(layer), layer.bias):
                for heads in _kv_heads(rows, engine.model.config):
                    heads[[0, 1]] = heads[[1, 0]]
        yield


def _kv_heads(rows: torch.Tensor, config: Any) -> list[torch.Tensor]:
    """Views [K, D, ...] of the rows of keys and of values, or of those of the two that the rows are."""
    heads = int(config.num_attention_heads)
    if config.model_type == "bloom":
        return list(rows.unflatten(0, (heads, 3, -1)).unbind(1))[1:]
    if config.model_type == "gpt2":
        return list(rows.unflatten(0, (3, heads, -1)).unbind(0))[1:]
    return [rows.unflatten(0, (int(config.num_key_value_heads), -1))]


@contextmanager
def _last_layer_missing(engine: HFEngine, _strength: float) -> Iterator[None]:
    model = engine.model
    body = part(model, "transformer", "model")
    with patched(body, **{"h" if hasattr(body, "h") else "layers": blocks(model)[:-1]}):
        yield


MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        id="x-row-scaled",
        group="conversion",
        wrong="one weight row of one MLP 20 % too large",
        reference="",
        hosts=_ALL,
        subtlety="subtle",
        strengths=(1.0, 0.1),
        change=_scaled_row,
    ),
    Mutation(
        id="x-rows-swapped",
        group="conversion",
        wrong="two rows of the first projection of one MLP exchanged, those of the second not",
        reference="",
        hosts=_ALL,
        subtlety="subtle",
        change=_swapped_rows,
    ),
    Mutation(
        id="x-attention-scale",
        group="attention",
        wrong="the scores of one layer 1 % too large",
        reference="",
        hosts=_ALL,
        subtlety="subtle",
        strengths=(1.0, 0.1),
        change=_attention_scale,
    ),
    Mutation(
        id="x-qkv-bias-lost",
        group="conversion",
        wrong="the biases of query, key and value of one layer dropped",
        reference="",
        hosts=_ALL,
        change=_qkv_bias_lost,
    ),
    Mutation(
        id="x-bias-doubled",
        group="tensor parallel",
        wrong="the bias behind the attention of one layer added twice, as by two ranks",
        reference="",
        hosts=_ALL,
        subtlety="subtle",
        strengths=(1.0, 0.1),
        change=_doubled_bias,
    ),
    Mutation(
        id="x-kv-head-swapped",
        group="attention",
        wrong="in one layer the queries of two KV heads see each other's keys and values",
        reference="",
        hosts=_ALL,
        change=_swapped_kv_heads,
    ),
    Mutation(
        id="x-last-layer",
        group="pipeline parallel",
        wrong="the last block never runs",
        reference="",
        hosts=_ALL,
        subtlety="gross",
        change=_last_layer_missing,
    ),
)
