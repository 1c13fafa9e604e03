"""What a rank shows of itself: the shapes it holds, whether they are its part of the checkpoint, checksums.

Sharding is believed only where it is seen: from live shapes, and from the checkpoint's bytes read a second time and cut
by the plan, not by what loaded them.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.engines import hooks
from harness.engines.ranks import stages

if TYPE_CHECKING:
    import torch

    from harness.engines.ranks.rank import RankEngine

#: Multiplies a checksum before the next step's is added; odd, so that no step is lost modulo 2^64.
_FACTOR = 0x9E3779B97F4A7C15 - 2**64
#: Elements that a checksum takes at once: they are widened to 8 bytes each.
_PIECE = 2**20


def of_rank(engine: RankEngine) -> dict[str, Any]:
    """Place, layers, parameters, shapes by kind of tensor, and the tensors that are not the checkpoint's."""
    shapes: dict[str, list[int]] = {}
    cut = whole = held = 0
    for name, parameter in engine.model.named_parameters():
        local = local_part(parameter)
        held += local.numel()
        shapes.setdefault(re.sub(r"\.\d+\.", ".*.", name), list(local.shape))
        _, how = engine.cut(name, parameter)
        if how is not None:
            cut += 1
            shape = engine.whole_shape(name, parameter)
            whole += local.numel() == math.prod(shape) and how.divides(shape)
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


def local_part(tensor: Any) -> torch.Tensor:
    """What of a tensor lies on this rank: of a DTensor, of a parameter of ZeRO-3 (flat), or all of any other."""
    if hasattr(tensor, "ds_tensor"):
        import torch.distributed as dist

        piece: torch.Tensor = tensor.ds_tensor
        # The last ranks' parts are filled up to the length of the others.
        start = dist.get_rank() * piece.numel()
        return piece[: max(0, min(piece.numel(), tensor.ds_numel - start))]
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
    with ExitStack() as stack:
        opened: dict[Path, Any] = {}
        for name, parameter in engine.model.named_parameters():
            named = _in_model(engine, name)
            key = _in_checkpoint(named, keys, engine)
            known, cut = engine.cut(name, parameter)
            if key is None or not known:
                unaudited.append(named)
                continue
            file = keys[key]
            if file not in opened:
                opened[file] = stack.enter_context(safe_open(file, framework="pt"))
            whole = opened[file].get_tensor(key)
            own = whole if cut is None else cut.of(whole, engine.place.shard, engine.layout.shards)
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


def _in_checkpoint(name: str, keys: dict[str, Path], engine: RankEngine) -> str | None:
    """A parameter's name in the checkpoint: with or without the base model's prefix; a tied head is the embedding."""
    config: Any = engine.model.config
    base = engine.model.base_model_prefix
    names = [name, name.removeprefix(f"{base}."), f"{base}.{name}"]
    if name == "lm_head.weight" and config.tie_word_embeddings:
        embedding = f"{stages.embedding_of(config)}.weight"
        names += [f"{base}.{embedding}", embedding]
    return next((one for one in names if one in keys), None)


# --- what every rank of a stage must agree on --------------------------------------------------


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """A checksum modulo 2^64 of a tensor's bytes, as a tensor where the tensor is."""
    import torch

    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().contiguous().view(integer).flatten()
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for piece in bits.split(_PIECE):
        # Odd weights: a change of one element always shows, an exchange of two nearly always.
        total = total * _FACTOR + (piece * _odd(str(bits.device))[: len(piece)]).sum()
    return total


@lru_cache(maxsize=2)
def _odd(device: str) -> torch.Tensor:
    """The first odd numbers, int64 [_PIECE]."""
    import torch

    return torch.arange(1, 2 * _PIECE, 2, device=device)


def checksum(tensor: torch.Tensor) -> int:
    """A checksum of a tensor's bytes, what of it lies on this rank."""
    return int(_bits(local_part(tensor))) if tensor.numel() else 0


class Checksums:
    """One checksum a module, over all of its outputs: what is replicated must be equal to the bit on every shard."""

    def __init__(self) -> None:
        self._sums: dict[str, _OnHost | _OnDevice] = {}

    def add(self, name: str, output: torch.Tensor) -> None:
        if not output.numel():
            return
        if name not in self._sums:
            self._sums[name] = _OnHost() if output.device.type == "cpu" else _OnDevice()
        self._sums[name].add(output)

    def shown(self) -> list[tuple[str, int]]:
        """Modules in the order of their first output, each with its checksum."""
        return [(name, value.shown()) for name, value in self._sums.items()]


class _OnHost:
    """A digest of bytes that are in this machine's memory; a step of decoding has few, and each operation counts."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, output: torch.Tensor) -> None:
        import torch

        self._digest.update(output.detach().contiguous().flatten().view(torch.uint8).numpy().data)

    def shown(self) -> int:
        return int.from_bytes(self._digest.digest()[:8], "big")


class _OnDevice:
    """A sum that stays where the outputs are: to bring them here would cost more than the forward."""

    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None

    def add(self, output: torch.Tensor) -> None:
        one = _bits(output)
        self._sum = one if self._sum is None else self._sum * _FACTOR + one

    def shown(self) -> int:
        return 0 if self._sum is None else int(self._sum)


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
    if engine.layout.shards == 1:
        yield sums
        return
    model = engine.model
    watched_ = [*_ends(engine), *engine.summed_layers(), *hooks.block_names(model)]
    names = {name: name_in_model(engine, name) for name in watched_}
    observe: Callable[[str, Any], None] = lambda name, output: sums.add(names[name], output)  # noqa: E731
    with hooks.watched(model, watched_, observe):
        yield sums
