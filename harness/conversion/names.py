"""Which tensors a BLOOM checkpoint has: their names in both layouts, their shapes, how ranks share them.

Sources: a layer's number is its place in the list of `GPTModelPipe` (bigscience-workshop/Megatron-DeepSpeed,
megatron/model/gpt_model.py): 0 a cast, 1 the embedding, 2 a transpose, from 3 the blocks, a transpose, the final norm.
DeepSpeed writes a file for each layer that has weights. Cuts are those of megatron/mpu/layers.py, names those of
transformers' convert_bloom_original_checkpoint_to_pytorch.py.

Shape legend: V vocabulary, E hidden size; "3E" is three times E.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum


class Cut(Enum):
    """How tensor-parallel ranks share a tensor: the dimension along which each holds a slice, None for all of it."""

    COLUMN = 0
    ROW = 1
    REPLICATED = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What a BLOOM config says about shapes."""

    hidden: int
    layers: int
    heads: int
    vocabulary: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One tensor: its key in a layer file, its name in transformers (``{block}`` the block's number), shape and cut."""

    megatron: str
    transformers: str
    shape: tuple[str, ...]
    cut: Cut

    def shape_in(self, sizes: Sizes, ranks: int = 1) -> tuple[int, ...]:
        """The whole tensor's shape, or with ``ranks`` that of one rank's part."""
        one = {"E": sizes.hidden, "V": sizes.vocabulary}
        whole = [int(word[:-1] or 1) * one[word[-1]] for word in self.shape]
        if self.cut is not Cut.REPLICATED:
            whole[self.cut.value] //= ranks
        return tuple(whole)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """The tensors of one layer file; ``number`` is in the file's name, ``block`` is None where it is no block."""

    number: int
    block: int | None
    entries: tuple[Entry, ...]

    def name(self, entry: Entry) -> str:
        """The tensor's name in transformers."""
        return PREFIX + entry.transformers.format(block=self.block)


#: What BloomForCausalLM puts before the names of BloomModel; checkpoints are found with it and without.
PREFIX = "transformer."
HEAD = "lm_head.weight"

_EMBEDDING_NUMBER = 1
_FIRST_BLOCK = 3
#: The final norm's number is that of the last block, a transpose, and one.
_BEHIND_BLOCKS = 1

VOCABULARY = Entry(
    megatron="word_embeddings.weight", transformers="word_embeddings.weight", shape=("V", "E"), cut=Cut.COLUMN
)
EMBEDDING = (
    VOCABULARY,
    Entry(
        megatron="word_embeddings.norm.weight",
        transformers="word_embeddings_layernorm.weight",
        shape=("E",),
        cut=Cut.REPLICATED,
    ),
    Entry(
        megatron="word_embeddings.norm.bias",
        transformers="word_embeddings_layernorm.bias",
        shape=("E",),
        cut=Cut.REPLICATED,
    ),
)


def _in_block(name: str, shape: tuple[str, ...], cut: Cut) -> Entry:
    return Entry(megatron=name, transformers="h.{block}." + name, shape=shape, cut=cut)


BLOCK = (
    _in_block("input_layernorm.weight", ("E",), Cut.REPLICATED),
    _in_block("input_layernorm.bias", ("E",), Cut.REPLICATED),
    # Rows go by head, each with its query, key and value, in both layouts: ranks hold whole heads, one after the other.
    _in_block("self_attention.query_key_value.weight", ("3E", "E"), Cut.COLUMN),
    _in_block("self_attention.query_key_value.bias", ("3E",), Cut.COLUMN),
    _in_block("self_attention.dense.weight", ("E", "E"), Cut.ROW),
    _in_block("self_attention.dense.bias", ("E",), Cut.REPLICATED),
    _in_block("post_attention_layernorm.weight", ("E",), Cut.REPLICATED),
    _in_block("post_attention_layernorm.bias", ("E",), Cut.REPLICATED),
    _in_block("mlp.dense_h_to_4h.weight", ("4E", "E"), Cut.COLUMN),
    _in_block("mlp.dense_h_to_4h.bias", ("4E",), Cut.COLUMN),
    _in_block("mlp.dense_4h_to_h.weight", ("E", "4E"), Cut.ROW),
    _in_block("mlp.dense_4h_to_h.bias", ("E",), Cut.REPLICATED),
)
FINAL = (
    Entry(megatron="weight", transformers="ln_f.weight", shape=("E",), cut=Cut.REPLICATED),
    Entry(megatron="bias", transformers="ln_f.bias", shape=("E",), cut=Cut.REPLICATED),
)


def layers(blocks: int) -> Iterator[Layer]:
    """Every layer of a model of that many blocks that has a file, in order."""
    yield Layer(number=_EMBEDDING_NUMBER, block=None, entries=EMBEDDING)
    for block in range(blocks):
        yield Layer(number=_FIRST_BLOCK + block, block=block, entries=BLOCK)
    yield Layer(number=_FIRST_BLOCK + blocks + _BEHIND_BLOCKS, block=None, entries=FINAL)


def blocks_before(last: int) -> int:
    """How many blocks a checkpoint has whose final norm is layer ``last``; 0 or less for one that has none."""
    return last - _BEHIND_BLOCKS - _FIRST_BLOCK
