"""Which module of a candidate stands for which of the reference's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from harness.locate.naming import Made

if TYPE_CHECKING:
    import torch

#: How outputs of several of the reference's modules lie in one of the candidate's: one behind the other, or head by
#: head.
Join = Literal["concat", "heads"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Mapped:
    """One module of a candidate.

    Attributes:
        reference: the names of the reference's modules that it does the work of; several for a fused one.
        candidate: its own name.
        join: how the outputs of several lie in its own.
        heads: groups of ``join="heads"``.
        inputs: whether what it is given is what the reference's is given; not where a norm was merged into it.
        output: whether what it returns is.
        first_input: its first hidden state stands for the first of the reference's, whatever the two are called.
    """

    reference: tuple[str, ...]
    candidate: str
    join: Join = "concat"
    heads: int = 1
    inputs: bool = True
    output: bool = True
    first_input: bool = False

    def joined(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The outputs of the reference's modules as this one's, [..., W1 + W2 + ...]."""
        import torch

        if self.join == "concat":
            return torch.cat(list(parts), dim=-1)
        grouped = [part.unflatten(-1, (self.heads, -1)) for part in parts]
        return torch.cat(grouped, dim=-1).flatten(-2)

    def apart(self, output: torch.Tensor, widths: Sequence[int]) -> list[torch.Tensor] | None:
        """This one's output [..., W1 + W2 + ...] as the reference's; None where it is not as wide as they are."""
        if output.shape[-1] != sum(widths):
            return None
        if self.join == "concat":
            return list(output.split(list(widths), dim=-1))
        if any(width % self.heads for width in widths):
            return None
        grouped = output.unflatten(-1, (self.heads, -1))
        return [one.flatten(-2) for one in grouped.split([width // self.heads for width in widths], dim=-1)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    """How the modules of a live candidate are reached.

    Attributes:
        owner: the live model or port.
        modules: those that stand for the reference's.
    """

    owner: Any
    modules: tuple[Mapped, ...]


def same_names(model: Any, names: Sequence[str]) -> Route:
    """The route into a model of the reference's own class."""
    return Route(owner=model, modules=tuple(Mapped(reference=(name,), candidate=name) for name in names))


def route_of(port: Any, made: Mapping[str, Made]) -> Route:
    """The route into a port, from what its weights are made of.

    A linear map, a norm or an embedding is where its weight is. A module whose weight is a piece of one of the
    reference's returns a piece of its output, and is given the same.

    Args:
        port: the live module.
        made: by the name of each of its tensors (`naming.expanded`).
    """
    found = []
    for name, how in made.items():
        module, _, tensor = name.rpartition(".")
        parts = [part.rpartition(".") for part in how.parts]
        if tensor != "weight" or not module or any(last != "weight" for _, _, last in parts):
            continue
        found.append(
            Mapped(
                reference=tuple(part for part, _, _ in parts),
                candidate=module,
                join="heads" if how.heads else "concat",
                heads=max(1, how.heads),
                output=how.piece is None,
                first_input=True,
            )
        )
    return Route(owner=port, modules=tuple(found))
