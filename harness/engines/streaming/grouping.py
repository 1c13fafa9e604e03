"""Sequences put together for one pass: padded on the right, where no token before it sees the padding.

A causal model computes at each real token what it would without the rest: there is no mask to get wrong, and no row
that is all padding. What padding costs is arithmetic, which is planned away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

#: A group of fewer tokens costs what this many do: the weights come from memory once a group (a bf16 block's product
#: of 256 tokens takes as long as reading the block from memory, at 1.8 TFLOP/s and 14 GB/s).
_FEWEST = 256
#: Tokens of a group, padding included: bounds what attention and the MLP hold at once.
_MOST = 4096
#: Attention scores of a group, float32, all heads: bounds what a kernel that holds them all needs.
_SCORES = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Sequences that go through a block together: their indices, and their ids padded on the right, [B, T]."""

    members: tuple[int, ...]
    lengths: tuple[int, ...]
    ids_BT: NDArray[np.int64]

    @property
    def tokens(self) -> int:
        """Real ones."""
        return sum(self.lengths)


def groups(sequences: Sequence[Sequence[int]], *, heads: int = 1) -> list[Group]:
    """The groups of least cost: shortest sequences first, each group a stretch of them.

    Args:
        sequences: token ids; empty ones are in no group.
        heads: of attention.
    """
    order = sorted((i for i, one in enumerate(sequences) if len(one)), key=lambda i: (len(sequences[i]), i))
    lengths = [len(sequences[i]) for i in order]
    return [
        _group([order[k] for k in range(start, stop)], sequences) for start, stop in pairwise(_cuts(lengths, heads))
    ]


def _cuts(lengths: Sequence[int], heads: int) -> list[int]:
    """Where sorted lengths are cut, by dynamic programming over the last group."""
    best: list[tuple[int, int]] = [(0, 0)]  # (cost of the first n, start of their last group)
    for stop in range(1, len(lengths) + 1):
        choices = []
        for start in range(stop - 1, -1, -1):
            tokens = (stop - start) * lengths[stop - 1]
            large = tokens > _MOST or 4 * tokens * lengths[stop - 1] * heads > _SCORES
            if large and start < stop - 1:
                break
            choices.append((best[start][0] + max(tokens, _FEWEST), start))
        best.append(min(choices))
    found = [len(lengths)]
    while found[-1] > 0:
        found.append(best[found[-1]][1])
    return found[::-1]


def _group(members: Sequence[int], sequences: Sequence[Sequence[int]]) -> Group:
    lengths = tuple(len(sequences[i]) for i in members)
    # Padded with a token that is there anyway: any would do.
    ids_BT = np.full((len(members), max(lengths)), sequences[members[0]][0], dtype=np.int64)
    for row, index in enumerate(members):
        ids_BT[row, : lengths[row]] = sequences[index]
    return Group(members=tuple(members), lengths=lengths, ids_BT=ids_BT)
