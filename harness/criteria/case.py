"""What the peers' rules see: a candidate beside references, and a view of it in which shared work is done once.

Shape legend: P prompts, T own tokens, S forced tokens, L prompt tokens, V vocabulary, N forced rows (all decode
rows of all prompts, then all prefill rows), Q parts (one pass of one prompt, without those that have no row).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
Bools = NDArray[np.bool_]
Array = NDArray[np.float32] | NDArray[np.float64]
T = TypeVar("T")

PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """What one implementation shows of one prompt.

    Attributes:
        prompt_ids: as this side tokenised the prompt, [L].
        tokens: its own greedy continuation, [T].
        free: logits of these steps, [T, V].
        forced_ids: the golden's prompt and tokens, [L + S].
        decode: logits with the golden's tokens forced through the running decode loop, [S, V].
        prefill: logits of one pass over the golden's sequence, row i foretells token i + 1, [L + S - 1, V].
    """

    prompt_ids: Int64
    tokens: Int64
    free: Array
    forced_ids: Int64
    decode: Array
    prefill: Array


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A candidate beside the references that peers use, prompt by prompt, all in the same batch.

    Attributes:
        precision: what the candidate computes in: float32, bfloat16 or float16.
        candidate: what is judged.
        same: the reference in the candidate's own precision.
        exact: the reference in float64.
        repeats: logits [S, V] of one prompt that the candidate ran twice alone, another prompt between them.
    """

    precision: str
    candidate: tuple[Side, ...]
    same: tuple[Side, ...]
    exact: tuple[Side, ...]
    repeats: tuple[tuple[Array, Array], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Criterion:
    """A peer's rule as a score that grows with badness.

    Attributes:
        name: e.g. ``vllm-top5``.
        source: the project it is of.
        rule: in one line, words and formula.
        sees: the least evidence it needs: token ids, a few log-probabilities a step as well, or full logits.
        published: precision -> threshold, on the scale of the score; empty where the project states none.
        score: the rule alarms where it exceeds the threshold; never NaN, and inf alarms at any threshold.
    """

    name: str
    source: str
    rule: str
    sees: Literal["tokens", "top", "logits"]
    published: Mapping[str, float]
    score: Callable[[Case], float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Free:
    """Both sides' own continuations of one prompt.

    Attributes:
        candidate, same: tokens, [Tc] and [Tr].
        candidate_rows, same_rows: their logits, [Tc, V] and [Tr, V].
        candidate_logp, same_logp: log-probabilities of the tokens, -inf outside the vocabulary, [Tc] and [Tr].
        common: steps before the first different token, or the shorter length.
    """

    candidate: Int64
    same: Int64
    candidate_rows: Float64
    same_rows: Float64
    candidate_logp: Float64
    same_logp: Float64
    common: int

    @property
    def equal(self) -> bool:
        """Whether both continuations are the same, length included."""
        return self.common == len(self.candidate) == len(self.same)


@dataclass(frozen=True, kw_only=True)
class View:
    """A case with all forced rows in one array a side; each property is computed when first asked for.

    Raises:
        ValueError: for a precision that no peer has a threshold for, and where the sides have not the same prompts
            or forced rows.
    """

    case: Case
    _memo: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        case = self.case
        sides = (case.candidate, case.same, case.exact)
        shapes = [[(one.decode.shape, one.prefill.shape) for one in side] for side in sides]
        if case.precision not in PRECISIONS:
            raise ValueError(f"{case.precision!r} is none of {', '.join(PRECISIONS)}")
        if not shapes[0]:
            raise ValueError("a case without a prompt")
        if shapes[0] != shapes[1] or shapes[0] != shapes[2]:
            raise ValueError("candidate and references must show the same prompts and forced rows")

    def once(self, compute: Callable[[View], T]) -> T:
        """The result of a function of this view, computed at most once."""
        if compute not in self._memo:
            self._memo[compute] = compute(self)
        found: T = self._memo[compute]
        return found

    @property
    def precision(self) -> str:
        return self.case.precision

    # --- the forced rows ---------------------------------------------------------------------------

    @cached_property
    def candidate(self) -> Float64:
        return _rows(self.case.candidate)

    @cached_property
    def same(self) -> Float64:
        return _rows(self.case.same)

    @cached_property
    def exact(self) -> Float64:
        return _rows(self.case.exact)

    @cached_property
    def finite(self) -> bool:
        """Whether all forced logits of the candidate are numbers."""
        return all(bool(np.isfinite(one).all()) for side in self.case.candidate for one in (side.decode, side.prefill))

    @cached_property
    def lengths(self) -> Int64:
        """Tokens of each golden prompt, [P]."""
        return np.array([len(one.forced_ids) - len(one.decode) for one in self.case.same], dtype=np.int64)

    @cached_property
    def _counts(self) -> Int64:
        """Rows of each pass of each prompt, decode first, [2 P]."""
        same = self.case.same
        return np.array([len(one.decode) for one in same] + [len(one.prefill) for one in same], dtype=np.int64)

    @cached_property
    def prompt(self) -> Int64:
        """The prompt of each row, [N]."""
        return np.repeat(np.tile(np.arange(len(self.case.same)), 2), self._counts)

    @cached_property
    def decode(self) -> Bools:
        """Rows of the decode loop; the others are of prefill, [N]."""
        found: Bools = np.arange(int(self._counts.sum())) < self._counts[: len(self.case.same)].sum()
        return found

    @cached_property
    def place(self) -> Int64:
        """The sequence position whose token each row has read last, counted from 0, [N]."""
        same = self.case.same
        parts = [np.arange(len(one.decode)) + length - 1 for one, length in zip(same, self.lengths, strict=True)]
        parts += [np.arange(len(one.prefill)) for one in same]
        return np.concatenate(parts).astype(np.int64)

    @cached_property
    def given(self) -> Int64:
        """The golden's token that each row foretells, [N]."""
        ids = [one.forced_ids[length:] for one, length in zip(self.case.same, self.lengths, strict=True)]
        ids += [one.forced_ids[1 : 1 + len(one.prefill)] for one in self.case.same]
        return np.concatenate(ids).astype(np.int64)

    @cached_property
    def inside(self) -> Bools:
        """Prefill rows that foretell a token of the prompt itself, [N]."""
        return ~self.decode & (self.place + 1 < self.lengths[self.prompt])

    @cached_property
    def _starts(self) -> Int64:
        ends: Int64 = np.cumsum(self._counts)
        return (ends - self._counts)[self._counts > 0]

    @cached_property
    def part_prompt(self) -> Int64:
        """The prompt of each part, [Q]."""
        return self.prompt[self._starts]

    def parts(self, combine: np.ufunc, rows: NDArray[Any]) -> Float64:
        """Row values [N] combined over each part, [Q]; NaN of a row is NaN of its part."""
        if not len(rows):
            return np.zeros(0)
        found: Float64 = combine.reduceat(rows, self._starts).astype(np.float64)
        return found

    def kinds(self, reduce: Callable[[Float64], float], rows: NDArray[Any]) -> float:
        """Row values [N] reduced over the decode rows, and over the prefill rows: the larger of the two."""
        wide = rows.astype(np.float64)
        return largest([reduce(wide[chosen]) for chosen in (self.decode, ~self.decode) if chosen.any()])

    # --- errors, and probabilities -----------------------------------------------------------------

    @cached_property
    def error(self) -> Float64:
        """Candidate less the reference in its precision, [N, V]."""
        return self.candidate - self.same

    @cached_property
    def size(self) -> Float64:
        """Absolute error against the reference in its precision, [N, V]."""
        return np.abs(self.error)

    @cached_property
    def candidate_error(self) -> Float64:
        """Candidate less the float64 reference, [N, V]."""
        return self.candidate - self.exact

    @cached_property
    def same_error(self) -> Float64:
        """The reference in the candidate's precision less the float64 one, [N, V]."""
        return self.same - self.exact

    @cached_property
    def candidate_logp(self) -> Float64:
        return log_softmax(self.candidate)

    @cached_property
    def same_logp(self) -> Float64:
        return log_softmax(self.same)

    @cached_property
    def candidate_best(self) -> Int64:
        """Token that the candidate would choose, [N]."""
        found: Int64 = self.candidate.argmax(axis=1)
        return found

    @cached_property
    def same_best(self) -> Int64:
        """Token that the reference would choose, [N]."""
        found: Int64 = self.same.argmax(axis=1)
        return found

    @cached_property
    def given_logp(self) -> tuple[Float64, Float64]:
        """Log-probability of the given tokens, candidate's and reference's, [N] each."""
        return pick(self.candidate_logp, self.given), pick(self.same_logp, self.given)

    # --- the free runs -----------------------------------------------------------------------------

    @cached_property
    def free_finite(self) -> bool:
        """Whether all logits of the candidate's own continuations are numbers."""
        return all(bool(np.isfinite(side.free).all()) for side in self.case.candidate)

    @cached_property
    def free(self) -> tuple[Free, ...]:
        """The two own continuations of each prompt."""
        return tuple(_free(*sides) for sides in zip(self.case.candidate, self.case.same, strict=True))


Rule = Callable[[View], float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A criterion with its rule as a function of the view, so that several can share one."""

    criterion: Criterion
    rule: Rule


def entry(
    rule: Rule,
    *,
    name: str,
    source: str,
    words: str,
    sees: Literal["tokens", "top", "logits"],
    published: Mapping[str, float],
    numbers: tuple[Literal["forced", "free"], ...],
) -> Entry:
    """A rule with its description; ``numbers`` names the logits of the candidate that must be finite, else inf."""

    def guarded(view: View) -> float:
        if ("forced" in numbers and not view.finite) or ("free" in numbers and not view.free_finite):
            return math.inf
        with np.errstate(all="ignore"):
            value = float(rule(view))
        return math.inf if math.isnan(value) else value

    def score(case: Case) -> float:
        return guarded(View(case=case))

    criterion = Criterion(name=name, source=source, rule=words, sees=sees, published=published, score=score)
    return Entry(criterion=criterion, rule=guarded)


def everywhere(threshold: float) -> Mapping[str, float]:
    """One threshold for all precisions."""
    return dict.fromkeys(PRECISIONS, threshold)


def by_precision(float32: float, half: float) -> Mapping[str, float]:
    """A threshold for float32 and another for both 16-bit precisions."""
    return {"float32": float32, "bfloat16": half, "float16": half}


def log_softmax(logits: Float64) -> Float64:
    """Log-probabilities in nats along the last axis."""
    shifted: Float64 = logits - logits.max(axis=-1, keepdims=True, initial=-np.inf)
    total = np.exp(shifted).sum(axis=-1, keepdims=True)
    shifted -= np.log(total)
    return shifted


def pick(rows: Float64, ids: Int64) -> Float64:
    """The entry of each row [n, V] at its id [n]; -inf where the id is outside the vocabulary."""
    if not rows.size:
        return np.full(len(ids), -np.inf)
    known = (ids >= 0) & (ids < rows.shape[1])
    found = rows[np.arange(len(ids)), np.where(known, ids, 0)]
    return np.where(known, found, -np.inf)


def largest(values: Any) -> float:
    """The largest of some numbers, NaN where one is NaN, 0 where there is none."""
    array = np.asarray(values, dtype=np.float64)
    return float(array.max()) if array.size else 0.0


def ratio(above: Any, below: Any) -> Float64:
    """Quotient of numbers that are not negative: 0 / 0 is 0, and anything else over 0 is infinite."""
    top, bottom = np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(top == 0, 0.0, top / bottom)


def _rows(sides: tuple[Side, ...]) -> Float64:
    parts = [one.decode for one in sides] + [one.prefill for one in sides]
    return np.concatenate([part.astype(np.float64) for part in parts])


def _free(candidate: Side, same: Side) -> Free:
    shorter = min(len(candidate.tokens), len(same.tokens))
    differ = np.flatnonzero(candidate.tokens[:shorter] != same.tokens[:shorter])
    rows = [side.free.astype(np.float64) for side in (candidate, same)]
    with np.errstate(invalid="ignore"):
        logp = [log_softmax(one) for one in rows]
    return Free(
        candidate=candidate.tokens,
        same=same.tokens,
        candidate_rows=rows[0],
        same_rows=rows[1],
        candidate_logp=pick(logp[0], candidate.tokens[: len(rows[0])]),
        same_logp=pick(logp[1], same.tokens[: len(rows[1])]),
        common=int(differ[0]) if len(differ) else shorter,
    )
