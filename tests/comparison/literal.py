"""A golden and traces made from plain arrays, so that comparing is tested without any model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from harness.comparison import Comparison, compare
from harness.comparison.context import Context, compare_context
from harness.numerics import metrics, quantise, statistics
from harness.numerics.sketch import Sketcher
from harness.replicas import condense_floor
from harness.values import Centre, Floor, Generation, Golden, ModelRef, Pass, Request, Rows, Run, Suite, Trace

VOCABULARY, PROMPTS, PROMPT, STEPS = 60, 4, 12, 10
NOISE = 1e-3
#: Round-off of one logit by precision: far enough apart that one is nothing to the other.
NOISES: Mapping[str, float] = {"bfloat16": NOISE, "float32": NOISE / 100}
FREE = (Run(name="single", batch_size=1, views=("generate",)),)
ORDER = (Run(name="order", batch_size=1, order="A-B-A", views=("replay",)),)

_NAMES = (*statistics.MAGNITUDES, *statistics.SIGNED, *(f"direction {scheme}" for scheme in quantise.SCHEMES))


def scatter(size: float) -> Mapping[str, Mapping[str, float]]:
    """The same scatter between families for every statistic: these tests stand apart from what real models have."""
    return {name: dict.fromkeys(_NAMES, size) for name in NOISES}


#: Next to none: what the replicas show is all that there is, since nothing else varies here.
SPREADS = scatter(1e-9)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Columns, tokens of each prompt, tokens that each continuation adds."""

    vocabulary: int = VOCABULARY
    prompts: tuple[int, ...] = (PROMPT,) * PROMPTS
    steps: int = STEPS

    @property
    def rows(self) -> int:
        """A row predicts each token but the first of a prompt."""
        return sum(self.prompts) + len(self.prompts) * (self.steps - 1)


SHAPE = Shape()


def reference_logits(seed: int = 0, shape: Shape = SHAPE) -> np.ndarray:
    """The 'true' logits of every row, float64 [N, V], in golden order."""
    return np.random.default_rng(seed).normal(0, 3, (shape.rows, shape.vocabulary))


def noise(seed: int, scale: float = NOISE, shape: Shape = SHAPE) -> np.ndarray:
    """Round-off like a replica's, float64 [N, V]."""
    return np.random.default_rng(1000 + seed).normal(0, scale, (shape.rows, shape.vocabulary))


def row_keys(shape: Shape = SHAPE) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Request, position and generated flag of every row."""
    lengths = [length + shape.steps - 1 for length in shape.prompts]
    position = np.concatenate([np.arange(1, length + 1, dtype=np.int32) for length in lengths])
    request = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    return request, position, position >= np.array(shape.prompts)[request]


def condense(
    logits: np.ndarray, keep: np.ndarray | None = None, *, truth: np.ndarray | None = None, shape: Shape = SHAPE
) -> Rows:
    """Rows of the given logits [N, V]; the token that follows is always the best of ``truth``."""
    request, position, generated = row_keys(shape)
    keep = np.ones(len(request), dtype=bool) if keep is None else keep
    following = torch.from_numpy((reference_logits(shape=shape) if truth is None else truth).argmax(axis=1))
    sketcher = Sketcher(shape.vocabulary, fingerprints=True)
    sketcher.add(
        torch.from_numpy(logits[keep]),
        following[torch.from_numpy(keep)],
        request=request[keep],
        position=position[keep],
        generated=generated[keep],
    )
    return sketcher.rows()


def projected(change: np.ndarray, shape: Shape = SHAPE) -> np.ndarray:
    """What a change of the logits [N, V] is in a golden's directions, float16 [N, J]."""
    return condense(change, shape=shape).projections.astype(np.float16)


def floor(
    replicas: Sequence[np.ndarray],
    truth: np.ndarray,
    *,
    directions: Sequence[np.ndarray] = (),
    shape: Shape = SHAPE,
) -> Floor:
    """The floor of some replicas' logits, each [N, V], about the truth."""
    return condense_floor(
        [condense(one, truth=truth, shape=shape) for one in replicas],
        condense(truth, truth=truth, shape=shape),
        directions,
        len(shape.prompts),
        shape.vocabulary,
        ("literal",) * len(replicas),
    )


def golden(
    replicas: int = 24,
    *,
    precisions: Sequence[str] = ("bfloat16",),
    directions: Mapping[str, np.ndarray] | None = None,
    truth: np.ndarray | None = None,
    shape: Shape = SHAPE,
    seed: int = 0,
) -> Golden:
    """A golden of the reference logits, with floors from simulated replicas.

    Args:
        replicas: how many.
        precisions: of NOISES, each with a floor.
        directions: what each quantiser does to the logits, [N, V] by its name.
        truth: the reference's logits, `reference_logits` by default.
        shape: prompts and columns.
        seed: of the replicas' noise.
    """
    truth = reference_logits(shape=shape) if truth is None else truth
    along = {name: projected(change, shape) for name, change in (directions or {}).items()}
    request, _, generated = row_keys(shape)
    best = truth.argmax(axis=1)
    everyone = range(len(shape.prompts))
    floors = {}
    for number, name in enumerate(precisions):
        first = 10**6 * seed + 10**5 * number
        shown = [truth + noise(first + k, NOISES[name], shape) for k in range(replicas)]
        floors[name] = floor(shown, truth, directions=tuple(along.values()), shape=shape)
    return Golden(
        name="literal/suite",
        suite=suite(shape),
        requests=tuple(
            Request(id=f"p{i}", prompt_ids=tuple(range(shape.prompts[i])), max_new_tokens=shape.steps) for i in everyone
        ),
        generations=tuple(
            Generation(tokens=tuple(int(t) for t in best[(request == i) & generated]), finish="length")
            for i in everyone
        ),
        model=ModelRef(name="literal", path=None, digest="d", signature="s", dtype="bfloat16"),
        tokenizer_digest=None,
        stop_ids=(),
        vocabulary=shape.vocabulary,
        precision="float64",
        rows=condense(truth, truth=truth, shape=shape),
        centres={},
        floors=floors,
        directions=along,
        provenance={},
    )


def centre(cast: np.ndarray, truth: np.ndarray | None = None) -> Centre:
    """A centre whose logits are ``cast``, where those of the weights as they are would be ``truth``."""
    native = reference_logits() if truth is None else truth
    rows, before = condense(cast, truth=native), condense(native, truth=native)
    return Centre(
        logsumexp=rows.logsumexp,
        logp=rows.logp,
        entropy=rows.entropy,
        projections=rows.projections,
        top_ids=rows.top_ids,
        top_logits=rows.top_logits,
        shift=float(np.sqrt(np.mean(metrics.error_norm(rows.projections, before.projections) ** 2))),
        inexact_tensors=1,
    )


def suite(shape: Shape = SHAPE) -> Suite:
    """The suite that the literal golden is of."""
    return Suite(
        name="suite",
        description="",
        stop="ignore-eos",
        add_special_tokens=True,
        max_new_tokens=shape.steps,
        prompts=(),
        runs=(Run(name="batched", views=("replay", "prefill"), quick=True),),
        digest="suite-digest",
    )


def trace(
    replay: np.ndarray,
    prefill: np.ndarray | None = None,
    *,
    upcast: np.ndarray | None = None,
    reason: str = "",
    dtype: str = "bfloat16",
    truth: np.ndarray | None = None,
    shape: Shape = SHAPE,
) -> Trace:
    """A candidate's trace from its logits [N, V] in both views.

    Args:
        replay: logits of the decode loop.
        prefill: logits of the prefill, the same by default.
        upcast: logits of its copy widened to float32, where there is one.
        reason: why there is none.
        dtype: what it declares, and what is in force.
        truth: decides the token that follows, as in `condense`.
        shape: prompts and columns.
    """
    everyone = tuple(range(len(shape.prompts)))
    _, _, generated = row_keys(shape)
    prefill = replay if prefill is None else prefill
    return Trace(
        engine="literal",
        declared={"dtype": dtype},
        settings={"dtype": dtype},
        capabilities=frozenset({"tokens", "logits", "replay", "deterministic", "upcast"}),
        vocabulary=replay.shape[1],
        suite_digest="suite-digest",
        prompt_ids=None,
        passes=(
            Pass(
                run="batched", view="replay", requests=everyone,
                rows=condense(replay, generated, truth=truth, shape=shape),
            ),
            Pass(
                run="batched", view="prefill", requests=everyone, rows=condense(prefill, truth=truth, shape=shape)
            ),
        ),
        upcast=None if upcast is None else trace(upcast, dtype="float32", truth=truth, shape=shape),
        upcast_reason=reason,
    )  # fmt: skip


def free_run(
    tokens: Sequence[tuple[int, ...]],
    finish: str = "length",
    *,
    top: np.ndarray | None = None,
    entries: int = 5,
    shape: Shape = SHAPE,
) -> Trace:
    """A trace that only shows free continuations, and where ``top`` [G, V] is given the best entries of each step."""
    generations = tuple(Generation(tokens=one, finish=finish) for one in tokens)  # type: ignore[arg-type]
    capabilities = frozenset({"tokens", "logits", "replay", "deterministic"})
    if top is not None:
        capabilities = frozenset({"tokens", "top_logprobs", "deterministic"})
        parts = np.split(top, np.cumsum([len(one.tokens) for one in generations])[:-1])
        generations = tuple(
            replace(one, **_entries(part, entries)) for one, part in zip(generations, parts, strict=True)
        )
    one = Pass(run="single", view="generate", requests=tuple(range(len(shape.prompts))), generations=generations)
    base = trace(reference_logits(shape=shape), shape=shape)
    return replace(base, passes=(one,), capabilities=capabilities)


def _entries(logits: np.ndarray, count: int) -> dict[str, tuple[tuple[float, ...], ...]]:
    """The highest log-probabilities of some steps, best first, as a server shows them."""
    wide = logits - np.log(np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1, keepdims=True))
    order = np.argsort(-wide, axis=1, kind="stable")[:, :count]
    values = np.take_along_axis(wide, order, axis=1)
    return {
        "top_ids": tuple(tuple(int(token) for token in row) for row in order),
        "top_logits": tuple(tuple(float(value) for value in row) for row in values),
    }


def judged(golden: Golden, trace: Trace, runs: Sequence[Run] | None = None, **more: object) -> Comparison:
    """`compare` with the spreads that the replicas show and no other."""
    return compare(golden, trace, runs, **{"spreads": SPREADS, **more})  # type: ignore[arg-type]


def context(golden: Golden, trace: Trace, **more: object) -> Context:
    """The context of one question, with the spreads that the replicas show and no other."""
    return compare_context(golden, trace, **{"spreads": SPREADS, **more})  # type: ignore[arg-type]


def failing(comparison: Comparison) -> set[tuple[str, str]]:
    """(question, check) of each finding that is not ok."""
    return {(finding.question, finding.check) for finding in comparison.findings if not finding.status.ok}
