"""Rounds of base and candidate: new processes for both, a warm-up, then A B, B A, A B, until enough is known.

How memory happens to be laid out makes one process faster than another of the same code, by up to a tenth here, for as
long as it lives (Mytkowicz et al., Producing wrong data without doing anything obviously wrong!, ASPLOS 2009). Turns
within one pair of processes would measure that ever more exactly; so a round is a pair of new ones.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from harness.speed.clock import Sample
from harness.speed.shapes import Shape
from harness.speed.sides import Side

#: Turns of each side in a round, of which the median counts.
TURNS = 3
#: The first token is taken so often that it lasts this many seconds in all, but at most so many times.
_PREFILL_SECONDS = 0.05
_MOST_REPEATS = 9


@dataclass(slots=True)
class Rounds:
    """What was sampled of one shape; entry i of both lists is the medians of round i."""

    shape: Shape
    base: list[Sample] = field(default_factory=list)
    candidate: list[Sample] = field(default_factory=list)


class Sampler:
    """Samples both sides, which are open.

    Args:
        base: the side that is believed to be fast enough.
        candidate: the other.
        work: each shape with its prompts.
        progress: called with a few words before each round.
    """

    def __init__(
        self,
        base: Side,
        candidate: Side,
        work: Sequence[tuple[Shape, Sequence[Sequence[int]]]],
        progress: Callable[[str], None],
    ) -> None:
        self._sides = (base, candidate)
        self._work = work
        self._progress = progress
        self._repeats: list[int] = []
        self.rounds = tuple(Rounds(shape=shape) for shape, _ in work)

    def extend(self, count: int) -> None:
        """Sample until there are ``count`` rounds of each shape; the first is of the processes that are there."""
        for number in range(len(self.rounds[0].base), count):
            self._progress(f"round {number + 1} of {count}")
            if number:
                # Both begin to load before either is waited for.
                for side in self._sides:
                    side.restart()
                for side in self._sides:
                    side.open()
            self._warm_up()
            for (shape, prompts), repeats, rounds in zip(self._work, self._repeats, self.rounds, strict=True):
                found: tuple[list[Sample], list[Sample]] = ([], [])
                for turn in range(number, number + TURNS):
                    # Whoever comes first has the colder machine: they take turns at it.
                    for which in (0, 1) if turn % 2 == 0 else (1, 0):
                        found[which].append(self._sides[which].sample(prompts, shape.new, repeats=repeats))
                rounds.base.append(_median(found[0]))
                rounds.candidate.append(_median(found[1]))

    def _warm_up(self) -> None:
        """Run each shape on both sides without counting it; the first time, see how often its first token is taken."""
        for shape, prompts in self._work:
            seen = [side.sample(prompts, shape.new, repeats=1) for side in self._sides]
            if len(self._repeats) < len(self._work):
                shortest = max(min(one.prefill for one in seen), 1e-6)
                self._repeats.append(min(_MOST_REPEATS, max(1, math.ceil(_PREFILL_SECONDS / shortest))))


def _median(turns: Sequence[Sample]) -> Sample:
    """Of each figure by itself."""
    return Sample(
        prefill=statistics.median(one.prefill for one in turns),
        step=statistics.median(one.step for one in turns),
        memory=round(statistics.median(one.memory for one in turns)),
    )
