"""Which modules of a reference are replayed, coarse first: its submodules, then the operations in some of them."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from harness.engines.hooks import block_names

if TYPE_CHECKING:
    import torch


def submodules(model: Any) -> tuple[str, ...]:
    """Blocks, their parts (attention, MLP, norms), and what lies outside the blocks: embeddings, norms, the head."""
    blocks = set(block_names(model))
    return tuple(
        name
        for name, module in model.named_modules()
        if name and _computes(module) and (name in blocks or submodule_of(name, blocks) == name)
    )


def operations(model: Any, inside: Collection[str]) -> tuple[str, ...]:
    """Everything below some submodules, with these themselves: linear maps, activations, norms of heads."""
    return tuple(
        name
        for name, module in model.named_modules()
        if _computes(module) and any(name == one or name.startswith(f"{one}.") for one in inside)
    )


def submodule_of(name: str, blocks: Collection[str]) -> str:
    """The submodule that a module lies in: the part of a block, or the part of the model outside of its blocks.

    "model.layers.2.mlp.up_proj" lies in "model.layers.2.mlp", and "model.layers.2" is a block and itself.
    """
    for block in blocks:
        if name == block:
            return name
        if name.startswith(f"{block}."):
            return f"{block}.{name[len(block) + 1 :].partition('.')[0]}"
    base = name.partition(".")[0]
    inside = name.split(".")
    # The base model holds the parts; what stands beside it (the head) is a part itself.
    return ".".join(inside[:2]) if any(block.startswith(f"{base}.") for block in blocks) else base


def kind_of(name: str) -> str:
    """A module's name with a star for the number of its block: "model.layers.*.mlp"."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _computes(module: torch.nn.Module) -> bool:
    """Whether it is called at all, and does more than nothing: no list of modules, no dropout."""
    from torch import nn

    return not isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Dropout | nn.Identity)
