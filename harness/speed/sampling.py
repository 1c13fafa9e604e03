"""Rounds of base and candidate: new processes for both, a warm-up, then A B, B A, A B, until enough is known.

How memory happens to be laid out makes one process faster than another of the same code for as long as it lives
(Mytkowicz et al., Producing wrong data without doing anything obviously wrong!, ASPLOS 2009), and so does the processor
that it happens to be on. Turns within one pair of processes would measure that ever more exactly; so a round is a
pair of new ones, both on the same processors.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.speed import processors
from harness.speed.clock import Sample
from harness.speed.shapes import Shape
from harness.speed.sides import Side

#: Turns of each side in a round, each with a ratio of its own, of which the median counts. To open both sides and to
#: warm them up costs as much as three or four turns of a small model, and rounds scatter as their turns do.
TURNS = 5
#: The first token is taken so often that it lasts this many seconds in all, but at most so many times.
_PREFILL_SECONDS = 0.05
_MOST_REPEATS = 9


@dataclass(slots=True)
class Rounds:
    """What was sampled of one shape; entry i of both lists is the turns of round i, in the same order."""

    shape: Shape
    base: list[tuple[Sample, ...]] = field(default_factory=list)
    candidate: list[tuple[Sample, ...]] = field(default_factory=list)

    def ratios(self, value: Callable[[Sample], float]) -> list[float]:
        """Logarithm of candidate over base by rounds: the median of the turns', each of two neighbouring samples.

        What slows the machine for a while slows both sides of most turns, and the median leaves out the others.
        """
        return [
            statistics.median(
                math.log(max(value(other), 1e-9)) - math.log(max(value(one), 1e-9))
                for one, other in zip(base, candidate, strict=True)
            )
            for base, candidate in zip(self.base, self.candidate, strict=True)
        ]


class Sampler:
    """Samples both sides, which are open.

    Args:
        base: the side that is believed to be fast enough.
        candidate: the other.
        settings: of both, as they were opened.
        work: each shape with its prompts.
        progress: called with a few words before each round.
    """

    def __init__(
        self,
        base: Side,
        candidate: Side,
        settings: tuple[Mapping[str, Any], Mapping[str, Any]],
        work: Sequence[tuple[Shape, Sequence[Sequence[int]]]],
        progress: Callable[[str], None],
    ) -> None:
        self._sides = (base, candidate)
        self._counts = (settings[0].get("processors"), settings[1].get("processors"))
        self._prompts = dict(work)
        self._progress = progress
        self._repeats: dict[Shape, int] = {}
        self.rounds = tuple(Rounds(shape=shape) for shape, _ in work)

    @property
    def count(self) -> int:
        """Rounds so far, of the shape that has most."""
        return max(len(one.base) for one in self.rounds)

    def extend(self, count: int, shapes: Sequence[Shape]) -> None:
        """Sample until there are ``count`` rounds of the named shapes; the others stay as they are."""
        asked = [one for one in self.rounds if one.shape in shapes]
        for number in range(self.count, count):
            self._progress(f"round {number + 1} of {count}")
            self._start(number)
            for rounds in asked:
                self._warm_up(rounds.shape)
            for rounds in asked:
                self._sample(rounds, number)

    def _start(self, number: int) -> None:
        drawn = processors.drawn(self._counts, number)
        # What makes one side's processes unlike the other's for all rounds would count as the candidate's.
        whole = any(side.apart for side in self._sides)
        if not whole:
            self._sides[0].exchange(self._sides[1])
        for side in self._sides:
            side.restart(whole=whole)
        for side in self._sides:
            side.open(drawn)

    def _warm_up(self, shape: Shape) -> None:
        """Run a shape on both sides without counting it; the first time, see how often its first token is taken."""
        seen = [side.sample(self._prompts[shape], shape.new, repeats=1) for side in self._sides]
        if shape not in self._repeats:
            shortest = max(min(one.prefill for one in seen), 1e-6)
            self._repeats[shape] = min(_MOST_REPEATS, max(1, math.ceil(_PREFILL_SECONDS / shortest)))

    def _sample(self, rounds: Rounds, number: int) -> None:
        shape = rounds.shape
        found: tuple[list[Sample], list[Sample]] = ([], [])
        for turn in range(number, number + TURNS):
            # Whoever comes first has the colder machine: they take turns at it.
            for which in (0, 1) if turn % 2 == 0 else (1, 0):
                side = self._sides[which]
                found[which].append(side.sample(self._prompts[shape], shape.new, repeats=self._repeats[shape]))
        rounds.base.append(tuple(found[0]))
        rounds.candidate.append(tuple(found[1]))
