"""What a rank shows of itself: the shapes it holds, whether they are its part of the checkpoint, checksums.

Sharding is believed only where it is seen: from live shapes, and from the checkpoint's bytes read a second time and cut
by the plan, not by what loaded them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from harness.engines import hooks
from harness.engines.ranks import plans, stages

if TYPE_CHECKING:
    import torch

    from harness.engines.ranks.rank import RankEngine

#: Multiplies a checksum before the next step's is added; odd, so that no step is lost modulo 2^64.
_FACTOR = 0x9E3779B97F4A7C15 - 2**64


def of_rank(engine: RankEngine) -> dict[str, Any]:
    """Place, layers, parameters, shapes by kind of tensor, and the tensors that are not the checkpoint's."""
    shapes: dict[str, list[int]] = {}
    cut = whole = held = 0
    for name, parameter in engine.model.named_parameters():
        local = local_part(parameter)
        held += local.numel()
        shapes.setdefault(re.sub(r"\.\d+\.", ".*.", name), list(local.shape))
        if is_cut(engine, name):
            cut += 1
            whole += local.shape == parameter.shape and parameter.shape[0] > 1
    unlike, unaudited = audit(engine)
    return {
        "rank": engine.place.rank,
        "stage": engine.place.stage,
        "shard": engine.place.shard,
        "blocks": [engine.layers.start, engine.layers.start + len(hooks.block_names(engine.model))],
        "parameters": held,
        "shapes": shapes,
        "cut": bool(cut) and not whole,
        "tables": {_in_model(engine, name): checksum(buffer) for name, buffer in engine.model.named_buffers()},
        "unlike_checkpoint": unlike,
        "unaudited": unaudited,
    }


def is_cut(engine: RankEngine, name: str) -> bool:
    """Whether the plan cuts a parameter."""
    if engine.layout.tensor == 1:
        return False
    style = plans.style_of(engine.model, name)
    return style is not None and (style not in plans.STYLES or plans.cut_of(style, name) is not None)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What of a tensor lies on this rank."""
    local = getattr(tensor, "to_local", None)
    found: torch.Tensor = tensor if local is None else local()
    return found


def audit(engine: RankEngine) -> tuple[list[str], list[str]]:
    """Names of the tensors that are not this rank's part of the checkpoint, and of those that could not be held to it.

    Names count the whole model's blocks.
    """
    import torch
    from safetensors import safe_open

    keys = stages.checkpoint_keys(engine.source)
    unlike, unaudited = [], []
    for name, parameter in engine.model.named_parameters():
        named = _in_model(engine, name)
        key = _in_checkpoint(named, keys, engine)
        style = plans.style_of(engine.model, name) if engine.layout.tensor > 1 else None
        if key is None or (style is not None and style not in plans.STYLES):
            unaudited.append(named)
            continue
        with safe_open(keys[key], framework="pt") as opened:
            whole = opened.get_tensor(key)
        cut = None if style is None else plans.cut_of(style, name)
        own = whole if cut is None else cut.of(whole, engine.place.shard, engine.layout.tensor)
        held = local_part(parameter)
        same = own.shape == held.shape and torch.equal(own.to(held.device, held.dtype), held)
        if not same:
            unlike.append(named)
    return unlike, unaudited


def _in_model(engine: RankEngine, name: str) -> str:
    """A parameter's name in the whole model."""
    return name if engine.layout.stages == 1 else stages.renumbered(name, engine.model.config, engine.layers.start)


def name_in_model(engine: RankEngine, module: str) -> str:
    """A module's name in the whole model."""
    return _in_model(engine, f"{module}.")[:-1]


def _in_checkpoint(name: str, keys: dict[str, Any], engine: RankEngine) -> str | None:
    """A parameter's name in the checkpoint: with or without the base model's prefix; a tied head is the embedding."""
    config: Any = engine.model.config
    base = engine.model.base_model_prefix
    names = [name, name.removeprefix(f"{base}."), f"{base}.{name}"]
    if name == "lm_head.weight" and config.tie_word_embeddings:
        embedding = _embedding(config)
        names += [f"{base}.{embedding}", embedding]
    return next((one for one in names if one in keys), None)


def _embedding(config: Any) -> str:
    return {"bloom": "word_embeddings.weight", "gpt2": "wte.weight"}.get(config.model_type, "embed_tokens.weight")


# --- what every rank of a stage must agree on --------------------------------------------------


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """A checksum modulo 2^64 of a tensor's bytes, as a tensor where the tensor is."""
    import torch

    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().contiguous().view(integer).flatten().to(torch.int64)
    # Odd weights: a change of one element always shows, an exchange of two nearly always.
    return (bits * torch.arange(1, 2 * len(bits), 2, device=bits.device)).sum()


def checksum(tensor: torch.Tensor) -> int:
    """A checksum of a tensor's bytes, what of it lies on this rank."""
    return int(_bits(local_part(tensor))) if tensor.numel() else 0


class Checksums:
    """One checksum a module, over all of its outputs: what is replicated must be equal to the bit on every shard."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, name: str, output: torch.Tensor) -> None:
        if not output.numel():
            return
        one = _bits(output)
        before = self._sums.get(name)
        self._sums[name] = one if before is None else before * _FACTOR + one

    def shown(self) -> list[tuple[str, int]]:
        """Modules in the order of their first output, each with its checksum."""
        return [(name, int(value)) for name, value in self._sums.items()]


def summed_layers(engine: RankEngine) -> list[str]:
    """Names of the rank's layers whose outputs are sums over the shards; none where nothing is cut."""
    if engine.layout.tensor == 1:
        return []
    return [
        name
        for name, module in engine.model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
        and plans.style_of(engine.model, f"{name}.weight") in plans.SUMMED
    ]


def _ends(engine: RankEngine) -> list[str]:
    """What of the model lies outside its blocks: embeddings, norms, the head, each whole on every shard."""
    from torch import nn

    model: Any = engine.model
    base = model.base_model_prefix
    parts = [
        f"{base}.{name}" for name, part in model.base_model.named_children() if not isinstance(part, nn.ModuleList)
    ]
    return [*parts, "lm_head"] if hasattr(model, "lm_head") else parts


@contextmanager
def watched(engine: RankEngine) -> Iterator[Checksums]:
    """Checksums of the outputs of the blocks, of the parts of them that are sums over the shards, and of the model."""
    sums = Checksums()
    if engine.layout.tensor == 1:
        yield sums
        return
    model = engine.model
    watched_ = [*_ends(engine), *summed_layers(engine), *hooks.block_names(model)]
    names = {name: name_in_model(engine, name) for name in watched_}
    observe: Callable[[str, Any], None] = lambda name, output: sums.add(names[name], output)  # noqa: E731
    with hooks.watched(model, watched_, observe):
        yield sums
