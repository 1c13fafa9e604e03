"""Interleaved rounds of base and candidate: A B, then B A, after a warm-up, until enough is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from harness.speed.clock import Sample
from harness.speed.shapes import Shape
from harness.speed.sides import Side

#: Rounds whose times are thrown away: kernels are chosen, caches filled, clocks raised.
WARM_UP = 2
#: The first token is taken so often that it lasts this many seconds in all, but at most so many times.
_PREFILL_SECONDS = 0.05
_MOST_REPEATS = 9


@dataclass(slots=True)
class Rounds:
    """What was sampled of one shape; entry i of both lists is of the same round."""

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

    def warm_up(self) -> None:
        """Run each shape on both sides without counting it, and see how often its first token is to be taken."""
        for shape, prompts in self._work:
            self._progress(f"warming up, {shape}")
            seen = [side.sample(prompts, shape.new, repeats=1) for _ in range(WARM_UP) for side in self._sides]
            shortest = min(one.prefill for one in seen[-len(self._sides) :])
            self._repeats.append(min(_MOST_REPEATS, max(1, math.ceil(_PREFILL_SECONDS / max(shortest, 1e-6)))))

    def extend(self, count: int) -> None:
        """Sample until there are ``count`` rounds of each shape."""
        for number in range(len(self.rounds[0].base), count):
            self._progress(f"round {number + 1} of {count}")
            for (shape, prompts), repeats, rounds in zip(self._work, self._repeats, self.rounds, strict=True):
                # Whoever comes first has the colder machine: they take turns.
                first, second = self._sides if number % 2 == 0 else self._sides[::-1]
                found = {id(side): side.sample(prompts, shape.new, repeats=repeats) for side in (first, second)}
                rounds.base.append(found[id(self._sides[0])])
                rounds.candidate.append(found[id(self._sides[1])])
