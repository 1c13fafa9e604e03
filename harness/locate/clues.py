"""What was seen at one place of a candidate, as a value: a `Clue`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

#: Where a clue comes from: tensors against the checkpoint, settings of the live modules against the reference's
#: configuration, tables against what the configuration leads to, a module replayed alone.
Source = Literal["weights", "config", "table", "module"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Clue:
    """One thing that is to be said of one place.

    Attributes:
        kind: what was looked at.
        module: dotted name in the reference's names, such as ``model.layers.3.self_attn.q_proj``; empty where it is
            of the whole model.
        tensor: full name of the parameter or buffer in the reference's names; for `table` the buffer's name below
            ``module``; empty where the clue is of no tensor.
        text: one plain line without a full stop, such as ``rows of heads 0 and 1 swapped``. It does not repeat
            ``module``.
        wrong: whether the candidate deviates here, so that a red verdict may come from it. A note is not: ``tied here,
            not in the checkpoint, same values``.
        size: relative size of the deviation: the Euclidean norm of the difference over that of what is right, for a
            setting that is a number the relative difference. 0 for a note, infinite where nothing is left to divide by
            or what is there is not finite, 1 for a setting that is a word.
        evidence: plain numbers by name, such as ``{"elements": 512, "changed": 128}``.
    """

    kind: Source
    module: str
    text: str
    wrong: bool
    tensor: str = ""
    size: float = 0.0
    evidence: Mapping[str, float] = field(default_factory=dict)

    @property
    def line(self) -> str:
        """The place and the text, for a report: ``model.layers.3.self_attn.q_proj.weight: rows ... swapped``."""
        full = not self.tensor or (bool(self.module) and self.tensor.startswith(f"{self.module}."))
        place = (self.tensor or self.module) if full or not self.module else f"{self.module}.{self.tensor}"
        return f"{place}: {self.text}" if place else self.text


def wrong(clues: Iterable[Clue]) -> tuple[Clue, ...]:
    """The deviations among clues, the largest first; equals stay in their order."""
    return tuple(sorted((clue for clue in clues if clue.wrong), key=lambda clue: -clue.size))
