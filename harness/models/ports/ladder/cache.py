"""Two KV caches: one that is copied to grow, as the first port of a model has it, and one that is written in place.

Both show what a cache of transformers shows: `layers`, each with `keys`, `values` and `update`, and a length.

Shape legend: B batch rows, H heads, T new tokens, S tokens so far, L capacity, C size of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor


class GrowingLayer:
    """Keys and values [B, H, S, C] of one layer; each step copies all of them."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens so far."""
        return 0 if self.keys is None else self.keys.shape[2]

    def update(self, keys_BHTC: Tensor, values_BHTC: Tensor) -> tuple[Tensor, Tensor]:
        """Take in new tokens; returns all so far."""
        if self.keys is None or self.values is None:
            self.keys, self.values = keys_BHTC, values_BHTC
        else:
            self.keys = torch.cat([self.keys, keys_BHTC], dim=2)
            self.values = torch.cat([self.values, values_BHTC], dim=2)
        return self.keys, self.values


class PreallocatedLayer:
    """Keys and values of one layer in buffers [B, H, L, C]: a step writes its own tokens, and nothing is copied."""

    def __init__(self, capacity: int) -> None:
        self.capacity = max(1, capacity)
        self.length = 0
        self.buffers: tuple[Tensor, Tensor] | None = None

    def update(self, keys_BHTC: Tensor, values_BHTC: Tensor) -> tuple[Tensor, Tensor]:
        """Take in new tokens; returns views [B, H, S, C] of all so far."""
        self.reserve(keys_BHTC, keys_BHTC.shape[2])
        assert self.buffers is not None
        keys, values = self.buffers
        start, new = self.length, keys_BHTC.shape[2]
        self.length = end = start + new
        keys.narrow(2, start, new).copy_(keys_BHTC)
        values.narrow(2, start, new).copy_(values_BHTC)
        return keys.narrow(2, 0, end), values.narrow(2, 0, end)

    def reserve(self, like_BHTC: Tensor, new: int) -> None:
        """Make room for ``new`` more tokens: the first time, and where more come than were announced."""
        if self.buffers is not None and self.length + new <= self.capacity:
            return
        before = self.buffers
        if self.length + new > self.capacity:
            self.capacity = 2 * (self.length + new)
        batch, heads, _, size = like_BHTC.shape
        # Zeros, not whatever lay there: a NaN times a probability of 0 is a NaN.
        self.buffers = (
            like_BHTC.new_zeros((batch, heads, self.capacity, size)),
            like_BHTC.new_zeros((batch, heads, self.capacity, size)),
        )
        for buffer, old in zip(self.buffers, before or (), strict=False):
            buffer[:, :, : self.length] = old[:, :, : self.length]

    @property
    def keys(self) -> Tensor | None:
        """[B, H, S, C], a view; None before the first token."""
        return None if self.buffers is None else self.buffers[0][:, :, : self.length]

    @keys.setter
    def keys(self, keys_BHSC: Tensor) -> None:
        self._replace(0, keys_BHSC)

    @property
    def values(self) -> Tensor | None:
        """[B, H, S, C], a view; None before the first token."""
        return None if self.buffers is None else self.buffers[1][:, :, : self.length]

    @values.setter
    def values(self, values_BHSC: Tensor) -> None:
        self._replace(1, values_BHSC)

    def _replace(self, which: int, states_BHSC: Tensor) -> None:
        """Other contents, mostly fewer tokens: what was drafted and is rejected."""
        assert self.buffers is not None
        buffer, length = self.buffers[which], states_BHSC.shape[2]
        if states_BHSC.data_ptr() != buffer.data_ptr():
            buffer[:, :, :length] = states_BHSC
        self.length = length


class Cache:
    """The KV cache of all layers.

    Args:
        layers: how many.
        capacity: tokens that each has room for at once; None for layers that grow.
    """

    def __init__(self, layers: int, capacity: int | None) -> None:
        self.preallocated = capacity is not None
        self.layers: list[GrowingLayer] | list[PreallocatedLayer]
        if capacity is None:
            self.layers = [GrowingLayer() for _ in range(layers)]
        else:
            self.layers = [PreallocatedLayer(capacity) for _ in range(layers)]

    def update(self, keys_BHTC: Tensor, values_BHTC: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Take in a layer's new tokens; returns all of its keys and values so far."""
        return self.layers[layer].update(keys_BHTC, values_BHTC)

    def get_seq_length(self, layer: int = 0) -> int:
        """Tokens so far, padding included."""
        return self.layers[layer].length
