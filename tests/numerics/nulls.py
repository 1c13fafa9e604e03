"""Correct candidates through the whole rule: goldens and candidates drawn from the same round-off, and judged."""

from __future__ import annotations

from collections import Counter

import numpy as np

from harness.values import Status
from harness.verdict import overall
from tests.comparison import literal

#: Candidates that are judged against one golden, before another is drawn.
EACH = 20
#: Share of the steps whose two best tokens noise can turn: without them no test of tokens would have anything to do.
_NEAR = 0.3

Counts = Counter[tuple[str, ...]]


def reference(seed: int) -> np.ndarray:
    """Logits of a reference, some of whose steps are near ties in the one or the other precision."""
    rng = np.random.default_rng([seed, 1])
    truth = literal.reference_logits(seed)
    rows = np.flatnonzero(rng.random(len(truth)) < _NEAR)
    order = np.argsort(-truth[rows], axis=1)
    noise = rng.choice(sorted(literal.NOISES.values()), len(rows))
    truth[rows, order[:, 1]] = truth[rows, order[:, 0]] - rng.uniform(0, 4, len(rows)) * noise
    return truth


def judged(seed: int, scatter: float, candidates: int = EACH) -> Counts:
    """What was said about some correct candidates against one golden.

    Args:
        seed: of the golden and of its candidates.
        scatter: what families of implementations are allowed to scatter. None of these candidates does.
        candidates: how many.

    Returns:
        Counts of verdicts: ("judged",), ("failing",), and by question and check those with a finding that is
        ("failing", question, check) or beyond chance, ("significant", question, check).
    """
    truth = reference(seed)
    golden = literal.golden(precisions=tuple(literal.NOISES), truth=truth, seed=seed + 1)
    spreads = literal.scatter(scatter)
    rng = np.random.default_rng([seed, 2])
    counts: Counts = Counter()
    for _ in range(candidates):
        shipped, wide = (truth + rng.normal(0, literal.NOISES[name], truth.shape) for name in ("bfloat16", "float32"))
        comparison = literal.judged(golden, literal.trace(shipped, upcast=wide, truth=truth), spreads=spreads)
        counts["judged",] += 1
        counts["failing",] += not overall([finding.status for finding in comparison.findings]).ok
        # An excused tie is drift and no claim that anything is beyond chance.
        beyond = [one for one in comparison.findings if one.check != "tokens" or one.status is not Status.DRIFT]
        counts.update({("significant", one.question, one.check) for one in beyond})
        counts.update({("failing", one.question, one.check) for one in beyond if not one.status.ok})
        counts["significant",] += bool(beyond)
    return counts
