"""The words of the project as frozen values: Suite, Request, Rows, Trace, Golden, Finding, Verdict.

Shape legend: N positions (rows), G generated positions among them, K replicas, P prompts,
J projections, T top entries, B position buckets. Where a moment is kept for prompt and continuation apart,
an axis of 2 says which: 0 prompt, 1 generated.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Bool = NDArray[np.bool_]

Stop = Literal["ignore-eos", "eos"]
Order = Literal["suite", "A-B-A"]
View = Literal["generate", "replay", "prefill"]
Finish = Literal["eos", "length"]
Question = Literal["function", "precision"]
Who = Literal["environment", "change", "both", "nobody", "unknown"]
Level = Literal["logits", "top entries", "tokens", "nothing"]


class Status(StrEnum):
    """What a check says. Only `identical` and `drift` are ok; `unmeasured` never counts as a pass."""

    IDENTICAL = "identical"
    DRIFT = "drift"
    DEVIATES = "deviates"
    STRUCTURAL = "structural"
    NONDETERMINISTIC = "nondeterministic"
    UNMEASURED = "unmeasured"
    STALE = "stale"
    ERROR = "error"

    @property
    def ok(self) -> bool:
        return self in (Status.IDENTICAL, Status.DRIFT)

    @property
    def exit_code(self) -> int:
        """0 ok, 1 failed, 3 unmeasured or stale, 4 engine error (2 is bad input, see errors)."""
        return _EXIT_CODES[self]


_EXIT_CODES = {
    Status.IDENTICAL: 0,
    Status.DRIFT: 0,
    Status.DEVIATES: 1,
    Status.STRUCTURAL: 1,
    Status.NONDETERMINISTIC: 1,
    Status.UNMEASURED: 3,
    Status.STALE: 3,
    Status.ERROR: 4,
}

#: Where several apply, the first of these is the verdict.
PRECEDENCE = (
    Status.ERROR,
    Status.STRUCTURAL,
    Status.NONDETERMINISTIC,
    Status.DEVIATES,
    Status.STALE,
    Status.UNMEASURED,
    Status.DRIFT,
    Status.IDENTICAL,
)


def overall(statuses: Sequence[Status]) -> Status:
    """The first of PRECEDENCE that is there; `identical` where there is nothing."""
    return next((status for status in PRECEDENCE if status in statuses), Status.IDENTICAL)


def first_difference(one: Sequence[Any], other: Sequence[Any]) -> int | None:
    """Index of the first element that differs, or of the first that only the longer one has; None where all agree."""
    common = min(len(one), len(other))
    return next((i for i in range(common) if one[i] != other[i]), None if len(one) == len(other) else common)


# --- what is asked -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One prompt as the suite writes it: exactly one of ``text``, ``messages``, ``ids``.

    ``repeat_to_tokens`` (a number, or ``"context-N"``) repeats the text up to that many tokens.
    """

    id: str
    text: str | None = None
    messages: tuple[Mapping[str, str], ...] | None = None
    ids: tuple[int, ...] | None = None
    repeat_to_tokens: int | str | None = None
    max_new_tokens: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One way a suite is run. ``batch_size`` None puts all prompts into one left-padded batch.

    ``order`` "A-B-A" runs the first prompt, the longest other one, then the first again in one live engine.
    """

    name: str
    batch_size: int | None = None
    order: Order = "suite"
    views: tuple[View, ...] = ("generate", "replay", "prefill")
    quick: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Suite:
    """Fixed prompts, decoding parameters, and the runs. ``digest`` covers what changes a golden."""

    name: str
    description: str
    stop: Stop
    add_special_tokens: bool
    max_new_tokens: int
    prompts: tuple[Prompt, ...]
    runs: tuple[Run, ...]
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A prompt resolved against a model: token ids, and how many tokens to add."""

    id: str
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    text: str | None = None


#: A setting of a part that no view made use of: neither in force nor out of it.
NOT_USED = "not used"

# --- what an engine shows ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """A free greedy continuation. ``tokens`` holds the end-of-sequence token where it stopped there.

    ``top_ids`` and ``top_logits`` are the highest entries of each step, best first, from an engine that shows
    these alone (log-probabilities serve as well as logits); empty otherwise.
    """

    tokens: tuple[int, ...]
    finish: Finish
    top_ids: tuple[tuple[int, ...], ...] = ()
    top_logits: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Logits of N positions, condensed. A row is the prediction of one token of one request.

    Attributes:
        request: index of the request, [N].
        position: index in its sequence of the token that the row predicts, [N], 1 or more.
        generated: whether that token belongs to the continuation, [N].
        argmax: the greedy token over *all* columns the engine shows, [N].
        nonfinite: count of NaN or infinite logits, [N].
        logsumexp: in nats, [N].
        logp: log-probability of the token that the sequence goes on with, [N].
        entropy: of the softmax, in nats, [N].
        projections: random projections of the centred logits, [N, J] (numerics/sketch.py).
        top_ids, top_logits: the highest logits of the generated rows, [G, T].
        fingerprint: 64-bit checksum of the raw logit bits of the generated rows, [G]; zeros where not asked.
        fine: products of the logits with each column of the templates' basis, [N, B]; None where not asked.
    """

    request: Int32
    position: Int32
    generated: Bool
    argmax: Int32
    nonfinite: Int32
    logsumexp: Float32
    logp: Float32
    entropy: Float32
    projections: Float32
    top_ids: Int32
    top_logits: Float32
    fingerprint: Int64
    fine: Float64 | None = None

    def __len__(self) -> int:
        return len(self.request)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """What one view of one run showed: free continuations (`generate`) or rows (`replay`, `prefill`).

    ``repeat`` numbers the visits of a prompt in an A-B-A run. ``requests`` are the indices covered.
    """

    run: str
    view: View
    repeat: int = 0
    requests: tuple[int, ...]
    generations: tuple[Generation, ...] = ()
    rows: Rows | None = None
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """What one engine produced on one suite.

    ``declared`` is what its name says, ``settings`` what is in force (read back from the live engine);
    ``prompt_ids`` are the ids that the engine's own tokenizer gives, None where it has none.
    ``upcast`` is the trace of the same live candidate, its weights and buffers widened to float32 as they are
    (numerics.md 2.1, question F); None where it was not made, for the reason in ``upcast_reason``.
    ``forced`` is the digest of the golden's prompts and tokens that were forced (`work_digest`); empty where the
    candidate continued the suite's prompts on its own alone. ``quick`` says that only the quick runs were asked for.
    ``limits`` says in words what the engine cannot show of itself, for the verdict to repeat.
    ``basis`` is the digest of the model whose head made the basis of the rows' ``fine``; empty where there are none.
    """

    engine: str
    declared: Mapping[str, Any]
    settings: Mapping[str, Any]
    capabilities: frozenset[str]
    vocabulary: int
    suite_digest: str
    prompt_ids: tuple[tuple[int, ...], ...] | None
    passes: tuple[Pass, ...]
    upcast: Trace | None = None
    upcast_reason: str = ""
    forced: str = ""
    quick: bool = False
    limits: tuple[str, ...] = ()
    basis: str = ""

    def save(self, path: str | Path) -> None:
        """Write it to a file, to be judged elsewhere."""
        from harness.traces import save_trace

        save_trace(self, path)


# --- the golden --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelRef:
    """Which checkpoint a golden is of.

    ``path`` is relative to the golden's directory where the model lies in the same tree.
    ``digest`` is over (canonical name, shape, native dtype, bytes) of every tensor, ``signature`` over
    names and shapes alone: another signature is another model, another digest the same one with other weights.
    """

    name: str
    path: str | None
    digest: str
    signature: str
    dtype: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Moments:
    """Sums over rows from which every statistic of numerics.md 2.4 can be made, for any choice of prompts.

    Each row's error is divided by that row's own round-off first. Leading axes ``...`` are K for replicas and
    absent for one pass of a candidate.

    Attributes:
        square: sum of squared error ratios r, [..., P, 2].
        largest: largest r, [..., P, 2].
        gain: sum of <e, c> / sigma^2, c being the centre's own logits, [..., P, 2].
        logp: sum of the differences in log p of the token that follows, [..., P, 2].
        entropy: sum of the differences in entropy, [..., P, 2].
        along: for each direction d the sum of <e, d> / sigma^2, [..., P, 2, D].
        bias: sum of e / sigma, [..., 2, J], over all prompts.
        bucket: sum of r^2 by position bucket, [..., 2, B], over all prompts.
        margin: sum of the differences in top-1 less top-2 logit, over generated rows, [..., P].
        top: sum of squared error ratios among the top entries, over generated rows, [..., P].
        top_largest: the largest of these ratios, [..., P].
        flips: generated rows whose best token is not the centre's, [..., P].
        deficit: sum of how far below its best the centre puts that token, clipped, [..., P].
    """

    square: Float32
    largest: Float32
    gain: Float32
    logp: Float32
    entropy: Float32
    along: Float32
    bias: Float32
    bucket: Float32
    margin: Float32
    top: Float32
    top_largest: Float32
    flips: Float32
    deficit: Float32


@dataclass(frozen=True, kw_only=True, slots=True)
class Floor:
    """Round-off of the reference in one precision, measured with K drawn replicas (numerics.md 2.2, 2.3).

    Attributes:
        sigma: root mean square over replicas of a row's projected error, [N], in logits.
        pair: root mean square error of a logit difference among the top entries, [G], in logits.
        moments: of each replica, with leading axis K.
        effective: effective number of independent replicas, after the common mode is removed.
        families: what each replica varied, for people to read.
    """

    sigma: Float32
    pair: Float32
    moments: Moments
    effective: float
    families: tuple[str, ...]

    @property
    def replicas(self) -> int:
        return len(self.families)


@dataclass(frozen=True, kw_only=True, slots=True)
class TemplateNoise:
    """Round-off of the reference in one precision, as templates are held against it. M rows as in Templates.

    Attributes:
        mean: what the replicas' errors have in common, in units of their rows' round-off, [M, R].
        whiten: the symmetric matrix that evens out their covariance over coordinates, [R, R].
        row: mean over replicas of a row's squared whitened error, the mean taken off, [M].
        along: of each replica the sums of <whitened error less the mean, whitened template>, [K, V, P, T].
        square: of each replica the sums of |whitened error less the mean|^2, [K, V, P].
        gram: sums of <whitened template, whitened template>, [V, P, T, T].
    """

    mean: Float32
    whiten: Float64
    row: Float32
    along: Float64
    square: Float64
    gram: Float64


@dataclass(frozen=True, kw_only=True, slots=True)
class Templates:
    """What the bugs of the catalogue do to the logits of one golden's work (numerics.md 2.9).

    V views, M rows of all of them one after another, P prompts, R coordinates, T templates.

    Attributes:
        run: the run of the suite whose passes they are of.
        views: its views that show logits, [V].
        view: index of each row's view, [M].
        place: index in the golden of each row, [M].
        basis: columns that logits are multiplied with, a function of the head alone, [vocabulary, B].
        turn: turns those products into orthonormal coordinates, [B, R].
        names: of each bug's template, its id and its strength.
        wrong: of each of them, the bug in one line.
        places: of each further template, the part of the model that it changes at random: these name no bug, and tell
            where one lies that has no template.
        frame: symmetric matrix that the templates were multiplied with before they were rounded, [R, R].
        codes: the templates in that frame, rounded, [T, M, R].
        scales: what each row of them is multiplied with, [T, M].
        centres: coordinates of what a correct implementation computes but for round-off, by precision, [M, R].
        noises: by precision.
        left_out: bugs without a template, each with the reason.
        seconds: that making them took.
    """

    run: str
    views: tuple[View, ...]
    view: Int64
    place: Int64
    basis: Float64
    turn: Float64
    names: tuple[tuple[str, float], ...]
    wrong: tuple[str, ...]
    places: tuple[str, ...]
    frame: Float64
    codes: NDArray[np.int8]
    scales: Float32
    centres: Mapping[str, Float64]
    noises: Mapping[str, TemplateNoise]
    left_out: Mapping[str, str]
    seconds: float

    def __len__(self) -> int:
        return len(self.names) + len(self.places)


@dataclass(frozen=True, kw_only=True, slots=True)
class Centre:
    """The reference with its weights cast to one precision, where that cast is not exact: what a
    correct implementation in that precision computes, but for round-off. Fields as in Rows.

    ``shift`` is the root mean square length of what the cast alone does to the logits.
    """

    logsumexp: Float32
    logp: Float32
    entropy: Float32
    projections: Float32
    top_ids: Int32
    top_logits: Float32
    shift: float
    inexact_tensors: int


def recentred(rows: Rows, centre: Centre | None) -> Rows:
    """The rows with a centre's numbers in the place of their own; as they are where there is none."""
    if centre is None:
        return rows
    return replace(
        rows,
        logsumexp=centre.logsumexp,
        logp=centre.logp,
        entropy=centre.entropy,
        projections=centre.projections,
        top_ids=centre.top_ids,
        top_logits=centre.top_logits,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Golden:
    """The reference's trace, condensed, with floors and provenance.

    ``rows`` are ordered by (request, position) and cover prompt and continuation. ``precision`` is that of
    the reference, ``stop_ids`` are the ids that end a free run (none where the suite ignores them).
    ``directions`` are the projections [N, J] of what rounding the weights to few bits does to the logits:
    a candidate whose error lies along one of them has had its weights rounded so.
    ``directory`` is where it was read from, None for one that was never stored.
    """

    name: str
    suite: Suite
    requests: tuple[Request, ...]
    generations: tuple[Generation, ...]
    model: ModelRef
    tokenizer_digest: str | None
    stop_ids: tuple[int, ...]
    vocabulary: int
    precision: str
    rows: Rows
    centres: Mapping[str, Centre]
    floors: Mapping[str, Floor]
    directions: Mapping[str, NDArray[np.float16]]
    provenance: Mapping[str, Any]
    directory: str | None = None

    @property
    def continuations(self) -> list[tuple[int, ...]]:
        return [generation.tokens for generation in self.generations]

    def centre_rows(self, precision: str) -> Rows:
        """What a correct implementation in ``precision`` computes, but for round-off."""
        return recentred(self.rows, self.centres.get(precision))


def work_digest(golden: Golden) -> str:
    """SHA-256 of what a candidate is given of a golden: prompt ids, forced tokens, limits and stop ids."""
    content = [
        list(golden.stop_ids),
        [[list(one.prompt_ids), one.max_new_tokens] for one in golden.requests],
        [list(tokens) for tokens in golden.continuations],
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Scoring:
    """What the live reference said when it was asked at check time; all None where it was absent.

    Attributes:
        free: the reference's rows on continuations other than the golden's; ``request`` counts ``continuations``.
        continuations: (request, tokens) of each of them.
        centre: rows of the reference with its weights rounded as the candidate declares.
        nearest: the same with plain round-to-nearest, for a candidate whose quantiser is not known; computed in the
            candidate's precision, whose own divergence belongs to what is usual.
        nearest_wide: the same in the reference's precision, for the candidate's float32 copy.
        reason: why the reference was not asked, in words.
    """

    free: Rows | None = None
    continuations: tuple[tuple[int, tuple[int, ...]], ...] = ()
    centre: Rows | None = None
    nearest: Rows | None = None
    nearest_wide: Rows | None = None
    reason: str = ""


# --- the verdict -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing seen. ``measured`` and ``allowed`` share a unit; ``why`` derives the bound in words."""

    status: Status
    check: str
    message: str
    question: Question = "precision"
    where: str = ""
    measured: float | None = None
    allowed: float | None = None
    why: str = ""
    fix: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Statistic:
    """One statistic of one unit, held against the replicas.

    Attributes:
        question: which of the two questions it answers.
        precision: names the floor that it was held against.
        name: which statistic ("error", "gain", ...; numerics/statistics.py).
        unit: "all", or the pass, prompt or range of positions.
        value: of the candidate. Logarithms for magnitudes, shares of round-off for signed statistics.
        centre: mean over the replicas.
        own: standard deviation over the replicas.
        spread: the same with the scatter between families of correct implementations added.
        z: (value - centre) / (spread sqrt(1 + 1/K)).
        significant: beyond these (low, high) it is not chance.
        failing: beyond these it is also too large to be round-off.
        why: the derivation, for people.
    """

    question: Question
    precision: str
    name: str
    unit: str
    value: float
    centre: float
    own: float
    spread: float
    z: float
    significant: tuple[float, float]
    failing: tuple[float, float]
    why: str

    @property
    def is_significant(self) -> bool:
        return not self.significant[0] <= self.value <= self.significant[1]

    @property
    def is_failing(self) -> bool:
        return not self.failing[0] <= self.value <= self.failing[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Power:
    """What a check could have seen.

    Attributes:
        precision: names the floor.
        level: what the candidate showed, and so what could be tested.
        positions: positions whose logits were compared.
        steps, decidable: generated steps, and those whose margin exceeds that precision's noise.
        smallest: a bug whose own error is this many times round-off fails with a probability of 99 %.
        unmeasured: what was not looked at, in words.
    """

    precision: str
    level: Level
    positions: int
    steps: int
    decidable: int
    smallest: float | None
    unmeasured: tuple[str, ...] = ()

    @property
    def coverage(self) -> float:
        """Share of generated steps that are decidable, 0 to 1."""
        return self.decidable / self.steps if self.steps else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """How much of a bug is in some of a model's blocks, fitted together with all others.

    Attributes:
        blocks: from 0, neighbours in a deep model; none for what the bug does outside them.
        coefficient: 1 where the bug is there as the catalogue has it, 0 where it is not.
        error: standard error of the coefficient.
    """

    blocks: tuple[int, ...]
    coefficient: float
    error: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Likeness:
    """What an error has in common with what one bug of the catalogue does.

    Attributes:
        name: the bug's id, behind a strength below 1 with that: "x-row-scaled at 0.1".
        wrong: what the bug is, in one line.
        coefficient: its share of the error, 1 for a bug that is there as the catalogue has it.
        raw: the same where what replicas have in common is left in the error.
        z: the coefficient over its standard error.
        aliases: other bugs that this suite cannot tell from it.
        layers: how much of it is in which blocks; empty where that was not fitted, for a bug that no block has a part
            of, and for one that is not named and not beyond chance in any block either.
    """

    name: str
    wrong: str
    coefficient: float
    raw: float
    z: float
    aliases: tuple[str, ...] = ()
    layers: tuple[Layer, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """What the templates of the bug catalogue say of an error.

    Attributes:
        limit: |z| that the largest of all templates stays below by chance.
        named: the bugs that the error is made of, fitted together; empty where none is beyond the limit.
        nearest: the best two whether beyond the limit or not, each by itself.
        templates: how many were fitted.
        untestable: those that this suite is too small to see in this precision, with the multiple of its rows needed.
        residual: where what the named ones leave is larger than round-off, in words; empty where it is not.
        reason: why nothing was fitted, in words; empty where something was.
    """

    limit: float | None = None
    named: tuple[Likeness, ...] = ()
    nearest: tuple[Likeness, ...] = ()
    templates: int = 0
    untestable: Mapping[str, float] = field(default_factory=dict)
    residual: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """The answer to one question: its status, its power, and the precision that the candidate really shows.

    ``diagnosis`` is there where the catalogue's templates were asked for.
    """

    question: Question
    status: Status
    power: Power | None
    effective: str = ""
    diagnosis: Diagnosis | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PassSummary:
    """One line of the report: a run and view, its error and the failing limit in floor units, and its tokens."""

    question: Question
    run: str
    view: View
    repeat: int
    ratio: float | None
    limit: float | None
    flips: int
    steps: int
    seconds: float


def worst_of(passes: Iterable[PassSummary], questions: Container[str] | None = None) -> PassSummary | None:
    """The pass whose pooled error comes nearest to its own limit, None where none was measured."""
    asked = [one for one in passes if questions is None or one.question in questions]
    measured = [one for one in asked if one.ratio is not None and one.limit]
    return max(measured, key=lambda one: (one.ratio or 0.0) / (one.limit or 1.0), default=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """A version or setting that is another today than when the golden was recorded; None where it has none."""

    name: str
    golden: str | None
    today: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Blame:
    """What the recorded reference does in today's environment, held against the same golden.

    Attributes:
        who: which of the two moved beyond round-off: the environment, the candidate's own change, or both.
        message: the answer in words, with its figures.
        status: of the reference, run again today.
        ratio, limit: its error in units of round-off, and the limit from which that fails; None where not measured.
    """

    who: Who
    message: str
    status: Status
    ratio: float | None = None
    limit: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharding:
    """What only a candidate of several ranks has.

    Attributes:
        ranks: size of its tensor parallelism.
        plain: its error about the reference, in units of round-off; None where it was not measured.
        emulated: its distance from the reference with sums in the order of so many ranks, in the same unit.
        equal: share of positions at which it equals that one to the bit.
        first_wrong: the first place where a rank leaves the reference, in words; "" where there is none or none was
            looked for.
        reason: why something of this is not there, in words; "" where all is.
    """

    ranks: int = 1
    plain: float | None = None
    emulated: float | None = None
    equal: float | None = None
    first_wrong: str = ""
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Status, findings and power of one candidate against one golden.

    ``environment`` lists what is another today than when the golden was recorded; ``blame`` is there when the
    reference was asked to run again, ``sharding`` for a candidate of several ranks.
    """

    golden: str
    candidate: str
    status: Status
    findings: tuple[Finding, ...]
    answers: tuple[Answer, ...] = ()
    statistics: tuple[Statistic, ...] = ()
    passes: tuple[PassSummary, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    environment: tuple[Difference, ...] = ()
    blame: Blame | None = None
    sharding: Sharding | None = None
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return self.status.ok

    def __bool__(self) -> bool:
        """Whether it is ok: ``assert harness.check(...)`` must not pass because there is a verdict."""
        return self.ok

    @property
    def power(self) -> Power | None:
        """Of the run as shipped, or of the only run there was; None where nothing was compared."""
        return next((answer.power for answer in reversed(self.answers) if answer.power is not None), None)

    @property
    def failures(self) -> Sequence[Finding]:
        """The findings that decided a verdict that is not ok."""
        return [finding for finding in self.findings if not finding.status.ok]

    def to_dict(self) -> dict[str, Any]:
        """The verdict as plain JSON types (NaN and infinities become null)."""
        from harness.report.json import verdict_to_dict

        return verdict_to_dict(self)

    def raise_if_failed(self) -> None:
        """Raise AssertionError with the report unless the status is ok."""
        if not self.ok:
            raise AssertionError(str(self))

    def __str__(self) -> str:
        from harness.report.terminal import verdict_to_text

        return verdict_to_text(self)


# --- two candidates of one golden ----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class PairRow:
    """One pass that two traces hold.

    Attributes:
        run, view, repeat: of the pass.
        first, second: errors about the golden, in units of the coarser precision's round-off; None where not measured.
        apart: root mean square distance of the two, in the same unit.
        equal: share of positions at which both are equal to the bit.
        differ, steps: greedy tokens that differ between the two, of how many.
    """

    run: str
    view: View
    repeat: int
    first: float | None = None
    second: float | None = None
    apart: float | None = None
    equal: float | None = None
    differ: int = 0
    steps: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two traces of one golden: the verdict on each, and how far they are apart."""

    first: Verdict
    second: Verdict
    rows: tuple[PairRow, ...]

    def __str__(self) -> str:
        from harness.report.pair import pair_to_text

        return pair_to_text(self)


# --- one golden against another ------------------------------------------------------------------


class Kind(StrEnum):
    """How one prompt of a golden differs from the same prompt of another, from nothing to worst."""

    SAME = "same"
    DRIFT = "drift"
    TIE = "tie"
    BUG_SIZED = "bug-sized"
    STRUCTURAL = "structural"

    @property
    def needs_reason(self) -> bool:
        """Whether an update with it is refused without a reason."""
        return self in (Kind.BUG_SIZED, Kind.STRUCTURAL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One prompt, in an old golden and a new one.

    Attributes:
        prompt: its id.
        kind: `tie` where a token differs that round-off can turn, `drift` where only numbers moved, within round-off.
        message: what changed, in words.
        step: the first generated step whose token differs, None where none does.
        margin: of that step in the old golden, in logits.
        deviation: root mean square difference of the logits over the shared prefix, in units of the old golden's
            round-off in its finest precision; None where it cannot be measured.
        limit: the deviation from which it is bug-sized.
    """

    prompt: str
    kind: Kind
    message: str = ""
    step: int | None = None
    margin: float | None = None
    deviation: float | None = None
    limit: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Changes:
    """All prompts of two goldens, and what is not of any prompt (``general``: model, suite, floors)."""

    old: str
    new: str
    prompts: tuple[Change, ...]
    general: tuple[Change, ...] = ()
    environment: tuple[Difference, ...] = ()

    @property
    def worst(self) -> Kind:
        order = list(Kind)
        return max((one.kind for one in (*self.prompts, *self.general)), key=order.index, default=Kind.SAME)

    def __str__(self) -> str:
        from harness.report.terminal import changes_to_text

        return changes_to_text(self)
