"""Token ids and the way in which they are fed, as values: what is shrunk, and what is written down."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

#: What goes wrong: the logits are another function's, are not finite, differ from one time to the next, or there are
#: none since the candidate raises.
Kind = Literal["logits", "finite", "repeat", "raises"]

#: A row of a batch, and how many of its tokens the logits have seen.
Place = tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One sequence: ``prompt`` in one pass, then each token of ``fed`` in a decode step of its own."""

    prompt: tuple[int, ...]
    fed: tuple[int, ...] = ()

    @property
    def ids(self) -> tuple[int, ...]:
        return (*self.prompt, *self.fed)


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Rows that are run together, left-padded where their prompts differ in length, with equally many ``fed``.

    ``decode`` runs them with a KV cache, and shows the logits behind the prompt and behind each fed token; without it
    one pass shows the logits of all positions.
    """

    rows: tuple[Row, ...]
    decode: bool

    @property
    def tokens(self) -> int:
        return sum(len(row.ids) for row in self.rows)

    @property
    def steps(self) -> int:
        """Decode steps behind the prompts."""
        return len(self.rows[0].fed)

    @property
    def padded(self) -> bool:
        return len({len(row.prompt) for row in self.rows}) > 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A batch, and those that run before it in the same candidate; these are not judged."""

    batch: Batch
    before: tuple[Batch, ...] = ()

    @property
    def words(self) -> str:
        """What it is, for people: "1 prompt of 3 tokens, 1 decode step"."""
        return "; ".join(_words(self))


def _words(case: Case) -> Iterator[str]:
    batch = case.batch
    lengths = sorted({len(row.prompt) for row in batch.rows})
    rows = "1 prompt" if len(batch.rows) == 1 else f"a batch of {len(batch.rows)} prompts"
    tokens = f"of {' and '.join(map(str, lengths))} token{'' if lengths == [1] else 's'}"
    path = "in one pass" if not batch.decode else f"and {batch.steps} decode step{'' if batch.steps == 1 else 's'}"
    yield f"{rows} {tokens}{' (padded)' if batch.padded else ''} {path}"
    if case.before:
        plural = "" if len(case.before) == 1 else "s"
        yield f"after {len(case.before)} earlier request{plural} in the same candidate"


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """How a case fails.

    Attributes:
        kind: what goes wrong.
        places: where, worst first; none for a case that raises.
        ratio: the error there, in units of the reference's own round-off; infinite where it is no number.
        limit: the ratio from which it fails.
        why: the derivation of the limit.
        error: what was raised, in words.
    """

    kind: Kind
    places: tuple[Place, ...]
    ratio: float
    limit: float
    why: str = ""
    error: str = ""

    @property
    def margin(self) -> float:
        """How far it is beyond the limit, as a multiple of it."""
        return self.ratio / self.limit
