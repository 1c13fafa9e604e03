"""A golden and traces made from plain arrays, so that comparing is tested without any model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from harness.numerics.sketch import Sketcher
from harness.replicas import condense_floor
from harness.values import Generation, Golden, ModelRef, Pass, Request, Rows, Run, Suite, Trace

VOCABULARY, PROMPTS, PROMPT, STEPS = 60, 4, 12, 10
NOISE = 1e-3
FREE = (Run(name="single", batch_size=1, views=("generate",)),)
ORDER = (Run(name="order", batch_size=1, order="A-B-A", views=("replay",)),)


def reference_logits(seed: int = 0) -> np.ndarray:
    """The 'true' logits of every row, float64 [N, V], in golden order."""
    return np.random.default_rng(seed).normal(0, 3, (PROMPTS * (PROMPT + STEPS - 1), VOCABULARY))


def row_keys() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Request, position and generated flag of every row."""
    position = np.tile(np.arange(1, PROMPT + STEPS, dtype=np.int32), PROMPTS)
    request = np.repeat(np.arange(PROMPTS, dtype=np.int32), PROMPT + STEPS - 1)
    return request, position, position >= PROMPT


def condense(logits: np.ndarray, keep: np.ndarray | None = None) -> Rows:
    """Rows of the given logits [N, V]; the token that follows is always the reference's best."""
    request, position, generated = row_keys()
    keep = np.ones(len(request), dtype=bool) if keep is None else keep
    following = torch.from_numpy(reference_logits().argmax(axis=1))
    sketcher = Sketcher(VOCABULARY, fingerprints=True)
    sketcher.add(
        torch.from_numpy(logits[keep]),
        following[torch.from_numpy(keep)],
        request=request[keep],
        position=position[keep],
        generated=generated[keep],
    )
    return sketcher.rows()


def noise(seed: int, scale: float = NOISE) -> np.ndarray:
    """Round-off like a replica's, float64 [N, V]."""
    return np.random.default_rng(1000 + seed).normal(0, scale, reference_logits().shape)


def golden(replicas: int = 24) -> Golden:
    """A golden of the reference logits, with a bf16 floor from simulated replicas."""
    truth = reference_logits()
    rows = condense(truth)
    request, _, generated = row_keys()
    errors, tops = [], []
    for k in range(replicas):
        one = condense(truth + noise(k))
        errors.append(one.projections.astype(np.float64) - rows.projections)
        entries = rows.top_ids[:, :5].astype(np.int64)
        tops.append(np.take_along_axis(noise(k)[generated], entries, axis=1))
    floor = condense_floor(np.stack(errors), np.stack(tops), rows, PROMPTS, ("literal",) * replicas)
    best = truth.argmax(axis=1)
    return Golden(
        name="literal/suite",
        suite=suite(),
        requests=tuple(
            Request(id=f"p{i}", prompt_ids=tuple(range(PROMPT)), max_new_tokens=STEPS) for i in range(PROMPTS)
        ),
        generations=tuple(
            Generation(tokens=tuple(int(t) for t in best[(request == i) & generated]), finish="length")
            for i in range(PROMPTS)
        ),
        model=ModelRef(name="literal", path=None, digest="d", signature="s", dtype="bfloat16"),
        tokenizer_digest=None,
        stop_ids=(),
        vocabulary=VOCABULARY,
        precision="float64",
        rows=rows,
        centres={},
        floors={"bfloat16": floor},
        provenance={},
    )


def suite() -> Suite:
    """The suite that the literal golden is of."""
    return Suite(
        name="suite",
        description="",
        stop="ignore-eos",
        add_special_tokens=True,
        max_new_tokens=STEPS,
        prompts=(),
        runs=(Run(name="batched", views=("replay", "prefill"), quick=True),),
        digest="suite-digest",
    )


def trace(replay: np.ndarray, prefill: np.ndarray | None = None) -> Trace:
    """A candidate's trace from its logits [N, V] in both views."""
    everyone = tuple(range(PROMPTS))
    _, _, generated = row_keys()
    prefill = replay if prefill is None else prefill
    return Trace(
        engine="literal",
        declared={"dtype": "bfloat16"},
        settings={"dtype": "bfloat16"},
        capabilities=frozenset({"tokens", "logits", "replay", "deterministic"}),
        vocabulary=replay.shape[1],
        suite_digest="suite-digest",
        prompt_ids=None,
        passes=(
            Pass(run="batched", view="replay", requests=everyone, rows=condense(replay, generated)),
            Pass(run="batched", view="prefill", requests=everyone, rows=condense(prefill)),
        ),
    )


def free_run(tokens: list[tuple[int, ...]], finish: str = "length") -> Trace:
    """A trace that only shows free continuations."""
    generations = tuple(Generation(tokens=one, finish=finish) for one in tokens)  # type: ignore[arg-type]
    one = Pass(run="single", view="generate", requests=tuple(range(PROMPTS)), generations=generations)
    base = trace(reference_logits())
    return replace(base, passes=(one,))
