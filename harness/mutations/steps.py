"""Ways to change how an open engine steps: what it feeds, what it reads back from its KV cache, what attention sees.

Shape legend: B batch rows, T new tokens, S tokens so far (padding included), K KV heads, D head size, V vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from harness.mutations.mutation import patched

if TYPE_CHECKING:
    import torch

    from harness.engines.decoding import Step
    from harness.engines.hf import HFEngine


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """What one forward pass of an engine is asked for; the fields are those of `decoding.Step`."""

    ids_BT: torch.Tensor
    position_BT: torch.Tensor
    mask_BS: torch.Tensor
    cache: Any
    keep: int

    def run(self, step: Step) -> torch.Tensor:
        """The logits [B, T or keep, V] of a step function."""
        return step(self.ids_BT, self.position_BT, self.mask_BS, self.cache, self.keep)

    @property
    def start(self) -> int:
        """How many columns came before these tokens."""
        return int(self.mask_BS.shape[1] - self.ids_BT.shape[1])

    @property
    def begins(self) -> bool:
        """Whether these are the first tokens that a cache takes."""
        return self.cache is not None and self.start == 0

    @property
    def decodes(self) -> bool:
        """Whether this is a single token behind others that are in the cache."""
        return self.cache is not None and self.start > 0 and self.ids_BT.shape[1] == 1

    @property
    def padding_B(self) -> torch.Tensor:
        """Columns of padding on the left of each row."""
        return (self.mask_BS.cumsum(dim=-1) == 0).sum(dim=-1)


@contextmanager
def stepped(engine: HFEngine, change: Callable[[Step, Call], torch.Tensor]) -> Iterator[None]:
    """Let ``change(step, call)`` give the logits of every forward pass; ``step`` is the engine's own."""
    own: Step = engine._step

    def step(
        ids_BT: torch.Tensor, position_BT: torch.Tensor, mask_BS: torch.Tensor, cache: Any, keep: int
    ) -> torch.Tensor:
        return change(own, Call(ids_BT=ids_BT, position_BT=position_BT, mask_BS=mask_BS, cache=cache, keep=keep))

    with patched(engine, _step=step):
        yield


#: (call, layer, keys [B, K, S, D], values [B, K, S, D]) -> keys and values that attention gets.
Read = Callable[[Call, int, "torch.Tensor", "torch.Tensor"], "tuple[torch.Tensor, torch.Tensor]"]


@contextmanager
def reading(engine: HFEngine, read: Read) -> Iterator[None]:
    """Let ``read`` give what attention gets from the KV cache; the cache itself keeps what is right.

    A static cache has more columns than there are tokens.
    """
    own = engine._new_cache
    now: list[Call] = []

    def remember(step: Step, call: Call) -> torch.Tensor:
        now[:] = [call]
        return call.run(step)

    def update(layer: Any, index: int, *given: Any, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return read(now[0], index, *type(layer()).update(layer(), *given, **more))

    def new_cache(batch: int, length: int) -> Any:
        cache = own(batch, length)
        for index, layer in enumerate(cache.layers):
            # A strong reference would be a cycle, and keep the cache's memory until the collector comes by.
            layer.update = partial(update, weakref.ref(layer), index)
        return cache

    with stepped(engine, remember), patched(engine, _new_cache=new_cache):
        yield


def seen(engine: HFEngine, step: Step, call: Call, mask_BS: torch.Tensor) -> torch.Tensor:
    """A step whose attention sees ``mask_BS``, while ALiBi still counts tokens as the call's own mask says."""
    from torch.nn.functional import pad

    changed = replace(call, mask_BS=mask_BS)
    body = getattr(engine.model, engine.model.base_model_prefix)
    if not hasattr(body, "build_alibi_tensor"):
        return changed.run(step)
    build = body.build_alibi_tensor

    def alibi(mask_BL: torch.Tensor, *given: Any, **more: Any) -> Any:
        # A static cache's mask is longer.
        return build(pad(call.mask_BS, (0, mask_BL.shape[1] - call.mask_BS.shape[1])), *given, **more)

    with patched(body, build_alibi_tensor=alibi):
        return changed.run(step)


def gathered(states_BKSD: torch.Tensor, source_BS: torch.Tensor) -> torch.Tensor:
    """Keys or values whose column s is column source[b, s] of ``states``; zeros, as unwritten, where that is -1."""
    index_B1S1 = source_BS[:, None, :, None]
    taken = states_BKSD.gather(2, index_B1S1.clamp(min=0).expand(-1, states_BKSD.shape[1], -1, states_BKSD.shape[3]))
    return taken.masked_fill(index_B1S1 < 0, 0.0)
