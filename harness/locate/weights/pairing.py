"""Which tensor of a live candidate is which of the checkpoint: by name, by a given map, by ties."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.locate.naming import Made, Names, expanded, piece_of, taken_apart
from harness.locate.weights.stored import Stored

if TYPE_CHECKING:
    import torch
    from torch import nn

#: What wrappers put before or into names: torch.compile, data parallelism.
_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|module|_fsdp_wrapped_module)\.")
_PREFIXES = ("model.", "transformer.", "gpt_neox.", "backbone.", "language_model.", "model.language_model.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One tensor of the checkpoint, and where the candidate has it.

    Attributes:
        name: in the checkpoint.
        candidate: in the candidate.
        held: what it holds, in the checkpoint's orientation; a view.
        made: how it is cut out; None for a tensor as it is.
    """

    name: str
    candidate: str
    held: torch.Tensor
    made: Made | None = None

    def stored(self, stored: Stored) -> torch.Tensor:
        """The checkpoint's tensor, or the piece of it that the candidate has here."""
        tensor = stored.read(self.name)
        return tensor if self.made is None else piece_of(self.made, tensor)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairing:
    """All tensors of both sides.

    Attributes:
        pairs: those that are on both.
        missing: names that the checkpoint alone has.
        extra: by name, those that the candidate alone has; a tensor that is there already under another name is not.
        tied: by name in the candidate, the name in the candidate that has the same storage and comes first.
    """

    pairs: tuple[Pair, ...]
    missing: tuple[str, ...]
    extra: Mapping[str, torch.Tensor]
    tied: Mapping[str, str]


def pair(stored: Stored, model: nn.Module, names: Names | None) -> Pairing:
    """Pair the tensors of a live model with those of a checkpoint."""
    held = dict(tensors(model))
    tied = _tied(held)
    made = expanded(names or {}, held)
    pairs: list[Pair] = []
    extra: dict[str, torch.Tensor] = {}
    for name, tensor in held.items():
        found = list(_mapped(name, tensor, made[name], stored)) if name in made else list(_same(name, tensor, stored))
        pairs += found
        if not found:
            extra[name] = tensor
    seen = {one.name for one in pairs}
    # Tied tensors are one: where any of them is paired, none is extra.
    paired = {tied.get(one.candidate, one.candidate) for one in pairs}
    extra = {name: tensor for name, tensor in extra.items() if tied.get(name, name) not in paired}
    return Pairing(
        pairs=tuple(pairs), missing=tuple(name for name in stored.shapes if name not in seen), extra=extra, tied=tied
    )


def tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and the buffers that a checkpoint would have, under every name that they have."""
    yield from ((name, tensor.detach()) for name, tensor in model.named_parameters(remove_duplicate=False))
    for path, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer.detach()


def _tied(held: Mapping[str, torch.Tensor]) -> dict[str, str]:
    first: dict[tuple[int, tuple[int, ...]], str] = {}
    found: dict[str, str] = {}
    for name, tensor in held.items():
        if not tensor.numel() or tensor.device.type == "meta":
            continue
        key = (tensor.data_ptr(), tuple(tensor.shape))
        other = first.setdefault(key, name)
        if other != name:
            found[name] = other
    return found


def _same(name: str, tensor: torch.Tensor, stored: Stored) -> Iterator[Pair]:
    plain = _WRAPPERS.sub("", name)
    choices = (name, plain, *(prefix + plain for prefix in _PREFIXES))
    choices += tuple(plain.removeprefix(prefix) for prefix in _PREFIXES)
    found = next((one for one in choices if one in stored.shapes), None)
    if found is not None:
        yield Pair(name=found, candidate=name, held=tensor)


def _mapped(name: str, tensor: torch.Tensor, made: Made, stored: Stored) -> Iterator[Pair]:
    if any(part not in stored.shapes for part in made.parts):
        return
    for part, held in taken_apart(made, tensor, stored.read).items():
        yield Pair(name=part, candidate=name, held=held, made=made if made.piece is not None else None)
