"""The words of the project as frozen values: Suite, Request, Rows, Trace, Golden, Finding, Verdict.

Shape legend: N positions (rows), G generated positions among them, K replicas, P prompts,
J projections, T top entries, B position buckets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]
Bool = NDArray[np.bool_]

Stop = Literal["ignore-eos", "eos"]
Order = Literal["suite", "A-B-A"]
View = Literal["generate", "replay", "prefill"]
Finish = Literal["eos", "length"]


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
    """A free greedy continuation. ``tokens`` holds the end-of-sequence token where it stopped there."""

    tokens: tuple[int, ...]
    finish: Finish


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
        token_logit: logit of the token that the sequence goes on with, [N].
        projections: random projections of the centred logits, [N, J] (numerics/sketch.py).
        top_ids, top_logits: the highest logits of the generated rows, [G, T].
        fingerprint: 64-bit checksum of the raw logit bits of the generated rows, [G]; zeros where not asked.
    """

    request: Int32
    position: Int32
    generated: Bool
    argmax: Int32
    nonfinite: Int32
    logsumexp: Float32
    token_logit: Float32
    projections: Float32
    top_ids: Int32
    top_logits: Float32
    fingerprint: Int64

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
    """

    engine: str
    declared: Mapping[str, Any]
    settings: Mapping[str, Any]
    capabilities: frozenset[str]
    vocabulary: int
    suite_digest: str
    prompt_ids: tuple[tuple[int, ...], ...] | None
    passes: tuple[Pass, ...]


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
class Floor:
    """Round-off of the reference in one precision, measured with K drawn replicas (numerics.md 2.2, 2.3).

    Attributes:
        sigma: root mean square over replicas of a row's projected error, [N], in logits.
        pair: root mean square error of a logit difference among the top entries, [G], in logits.
        log_rms: S1 of each replica on each prompt, [K, P].
        log_rms_bucket: S1 of each replica on each position bucket, [K, B].
        log_max: S2 of each replica on each prompt, [K, P].
        effective: effective number of independent replicas, after the common mode is removed.
        families: what each replica varied, for people to read.
    """

    sigma: Float32
    pair: Float32
    log_rms: Float32
    log_rms_bucket: Float32
    log_max: Float32
    effective: float
    families: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Centre:
    """The reference with its weights cast to one precision, where that cast is not exact: what a
    correct implementation in that precision computes, but for round-off. Fields as in Rows.

    ``shift`` is the root mean square length of what the cast alone does to the logits.
    """

    logsumexp: Float32
    token_logit: Float32
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
        token_logit=centre.token_logit,
        projections=centre.projections,
        top_ids=centre.top_ids,
        top_logits=centre.top_logits,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Golden:
    """The reference's trace, condensed, with floors and provenance.

    ``rows`` are ordered by (request, position) and cover prompt and continuation. ``precision`` is that of
    the reference, ``stop_ids`` are the ids that end a free run (none where the suite ignores them).
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
    provenance: Mapping[str, Any]
    directory: str | None = None

    @property
    def continuations(self) -> list[tuple[int, ...]]:
        return [generation.tokens for generation in self.generations]

    def centre_rows(self, precision: str) -> Rows:
        """What a correct implementation in ``precision`` computes, but for round-off."""
        return recentred(self.rows, self.centres.get(precision))


# --- the verdict -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing seen. ``measured`` and ``allowed`` share a unit; ``why`` derives the bound in words."""

    status: Status
    check: str
    message: str
    where: str = ""
    measured: float | None = None
    allowed: float | None = None
    why: str = ""
    fix: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Power:
    """What a check could have seen.

    Attributes:
        precision: the declared precision that the floor is of.
        positions: positions whose logits were compared.
        steps, decidable: generated steps, and those whose margin exceeds that precision's noise.
        smallest: smallest error, in units of the floor, that the pooled statistic would have failed.
        unmeasured: what was not looked at, in words.
    """

    precision: str
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
class PassSummary:
    """One line of the report: a run and view, its error and the failing limit in floor units, and its tokens."""

    run: str
    view: View
    repeat: int
    ratio: float | None
    limit: float | None
    flips: int
    steps: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Status, findings and power of one candidate against one golden."""

    golden: str
    candidate: str
    status: Status
    findings: tuple[Finding, ...]
    power: Power | None
    passes: tuple[PassSummary, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return self.status.ok

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
