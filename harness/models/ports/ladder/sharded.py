"""Tensor parallelism of the ladder: what the shards of a model, a process each, do together.

Heads, the MLP's inner units and the vocabulary are shared out, as in Megatron-LM (arXiv:1909.08053): two sums over the
shards a block, one behind the embedding, and the pieces of the logits put side by side. All of it goes through the
default group of torch.distributed.

Shape legend: B batch rows, T new tokens, D hidden size, V vocabulary, P vocabulary of a shard.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard of a model.

    Attributes:
        number: from 0.
        size: how many there are.
    """

    number: int = 0
    size: int = 1


def add_up(partial: Tensor) -> Tensor:
    """The sum over all shards, in place."""
    dist.all_reduce(partial)
    return partial


class SplitEmbedding(nn.Embedding):
    """A shard's rows of the table; tokens of other shards give zeros, and the sum has every token."""

    def __init__(self, rows: int, hidden: int, start: int) -> None:
        super().__init__(rows, hidden)
        self.start = start

    def forward(self, input: Tensor) -> Tensor:
        """[B, T, D], the same on every shard."""
        ids_BT = input - self.start
        own_BT = (ids_BT >= 0) & (ids_BT < self.num_embeddings)
        found_BTD = functional.embedding(ids_BT.where(own_BT, 0), self.weight) * own_BT[..., None]
        return add_up(found_BTD)


def side_by_side(logits_BTP: Tensor, vocabulary: int, size: int) -> Tensor:
    """The logits [B, T, V] of all shards, of which the last may have fewer columns."""
    most = -(-vocabulary // size)
    padded_BTP = functional.pad(logits_BTP, (0, most - logits_BTP.shape[-1])).contiguous()
    pieces = [torch.empty_like(padded_BTP) for _ in range(size)]
    dist.all_gather(pieces, padded_BTP)
    return torch.cat(pieces, dim=-1)[..., :vocabulary]
