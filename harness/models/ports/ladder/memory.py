"""Where the weights lie: in one block of memory, for which huge pages are asked."""

from __future__ import annotations

import contextlib
import mmap
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from harness.models.ports.ladder.model import Bloom


def into_one_block(model: Bloom) -> None:
    """Move all weights into one block of memory, in the order in which a step reads them.

    Linux gives huge pages to what asks for them, and a product that runs through a weight then waits less for the
    table of its pages. Where there are none it is plain memory. Only on the CPU.
    """
    if model.device.type != "cpu":
        return
    parameters: list[Tensor] = [*model.transformer.parameters()]
    if model.lm_head.weight is not model.transformer.word_embeddings.weight:
        parameters.append(model.lm_head.weight)
    starts, end = [], 0
    for one in parameters:
        starts.append(end)
        end += -(-one.numel() * one.element_size() // 64) * 64  # each begins a line of the caches
    block = mmap.mmap(-1, max(1, end), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            block.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(block, dtype=torch.uint8)
    for one, start in zip(parameters, starts, strict=True):
        place = memory[start : start + one.numel() * one.element_size()].view(one.dtype).view(one.shape)
        place.copy_(one.data)
        one.data = place
