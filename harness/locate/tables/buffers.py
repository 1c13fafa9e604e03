"""Buffers that are derived and not stored (masks, positions, scales), against a live reference's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from harness.locate.clues import Clue
from harness.locate.tables.reference import Reference

if TYPE_CHECKING:
    from torch import nn

_ELSEWHERE = ("inv_freq", "original_inv_freq")  # harness/locate/tables/rotary.py


def buffers(reference: Reference, model: nn.Module) -> Iterator[Clue]:
    """Clues of buffers of one name that differ; nothing where the reference has no memory.

    A floating buffer that was cast to the candidate's dtype is right if it is that of the reference, cast.
    """
    import torch

    for path, held in model.named_modules():
        right = reference.modules.get(path)
        if right is None:
            continue
        theirs = dict(right.named_buffers(recurse=False))
        for name, buffer in held.named_buffers(recurse=False):
            other = theirs.get(name)
            if (
                other is None
                or other.device.type == "meta"
                or name in _ELSEWHERE
                or name not in held._non_persistent_buffers_set
            ):
                continue
            mine, cast = buffer.detach().cpu(), other.detach().cpu().to(buffer.dtype)
            if mine.shape == cast.shape and torch.equal(mine, cast):
                continue
            count = int((mine != cast).sum()) if mine.shape == cast.shape else mine.numel()
            size = math.inf
            if mine.shape == cast.shape and mine.numel():
                size = float((mine.double() - cast.double()).norm() / cast.double().norm().clamp(min=1))
            text = f"{count} of {mine.numel()} elements are not those of the reference"
            yield Clue(kind="table", module=path, tensor=name, text=text, wrong=True, size=size)
