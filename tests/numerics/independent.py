"""S1 to S8, K_eff, sigma, T1 and T2 row by row, written from shared/numerics.md 2.2 to 2.6 and from nothing else.

No function of harness/numerics is used, and its constants are typed again. The formulas for full vectors are applied
to projected ones. The signed statistics are means of errors that were divided by their own row's round-off first: of
one logit (sigma / sqrt V) for log p and entropy, of a difference of two logits for the margin.

Shape legend: N rows, G generated rows, K replicas, J projections, V columns, P prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from harness.values import Rows

SIGMA_FLOOR, PAIR_FLOOR, WATCHED, BUCKETS, CLIP = 0.2, 0.7, 5, 6, 5.5


# --- round-off, from replicas ----------------------------------------------------------------------


def row_sigmas(replicas: Sequence[Rows], centre: Rows) -> np.ndarray:
    """sigma_t: root mean square over replicas of the length of a row's error, and 0.2 of the median at least, [N]."""
    found = []
    for row in range(len(centre)):
        lengths = [math.dist(one.projections[row].tolist(), centre.projections[row].tolist()) for one in replicas]
        found.append(math.sqrt(sum(length**2 for length in lengths) / len(lengths)))
    return np.array([max(one, SIGMA_FLOOR * np.median(found)) for one in found])


def pair_sigmas(replicas: Sequence[Rows], centre: Rows) -> np.ndarray:
    """s_t: root mean square over replicas of differences of two errors among the top five, floored by prompt, [G]."""
    raw = []
    for step in range(len(centre.top_ids)):
        squares = []
        for one in replicas:
            errors = errors_at_top(one, step, centre, step)
            pairs = [(a - b) ** 2 for i, a in enumerate(errors) for b in errors[:i]]
            squares.append(sum(pairs) / len(pairs) if pairs else 0.0)
        raw.append(math.sqrt(sum(squares) / len(squares)))
    prompt = centre.request[centre.generated]
    pooled = [
        math.sqrt(sum(s**2 for s, p in zip(raw, prompt, strict=True) if p == q) / sum(prompt == q)) for q in prompt
    ]
    return np.array([max(one, PAIR_FLOOR * pool) for one, pool in zip(raw, pooled, strict=True)])


def errors_at_top(rows: Rows, step: int, centre: Rows, centre_step: int) -> list[float]:
    """Errors of the logits of the centre's five best tokens, those that the rows show."""
    shown = dict(zip(rows.top_ids[step].tolist(), rows.top_logits[step].tolist(), strict=True))
    best = zip(centre.top_ids[centre_step].tolist()[:WATCHED], centre.top_logits[centre_step].tolist(), strict=False)
    return [shown[token] - logit for token, logit in best if token in shown]


def effective_number(errors: np.ndarray) -> float:
    """K_eff = (sum of eigenvalues)^2 / sum of their squares, of the correlation matrix of errors less their mean."""
    residual = errors - errors.mean(axis=0)
    unit = np.array([one / math.sqrt((one**2).sum()) for one in residual])
    # The trace of a matrix is the sum of its eigenvalues, the sum of its squared entries that of their squares.
    return len(unit) ** 2 / sum(float(a @ b) ** 2 for a in unit for b in unit)


# --- statistics, from rows that were shown ---------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One shown row: error and centre in units of its own round-off, and what else its statistics need."""

    prompt: int
    generated: bool
    place: int
    bucket: int
    whole: bool
    error: np.ndarray
    centre: np.ndarray
    directions: list[np.ndarray]
    logp: float
    entropy: float
    margin: float | None = None
    top: float | None = None
    flipped: bool = False
    deficit: float = 0.0

    @property
    def ratio(self) -> float:
        return math.sqrt(float(self.error @ self.error))


def shown_rows(
    rows: Rows,
    centre: Rows,
    sigma: np.ndarray,
    pair: np.ndarray,
    vocabulary: int,
    *,
    directions: Sequence[np.ndarray] = (),
    whole: bool,
) -> list[Row]:
    """Every row of one pass; ``whole`` where it shows all prompts."""
    places = {(int(r), int(p)): n for n, (r, p) in enumerate(zip(centre.request, centre.position, strict=True))}
    edges = [float(np.quantile(centre.position, k / BUCKETS)) for k in range(1, BUCKETS)]
    found, step = [], 0
    for n in range(len(rows)):
        place = places[int(rows.request[n]), int(rows.position[n])]
        s = float(sigma[place])
        logit = s / math.sqrt(vocabulary)
        more: dict[str, object] = {}
        if rows.generated[n]:
            own = int(centre.generated[:place].sum())
            more = _step(rows, step, int(rows.argmax[n]), centre, own, float(pair[own]))
            step += 1
        found.append(
            Row(
                prompt=int(rows.request[n]),
                generated=bool(rows.generated[n]),
                place=place,
                bucket=sum(int(rows.position[n]) > edge for edge in edges),
                whole=whole,
                error=(rows.projections[n].astype(float) - centre.projections[place].astype(float)) / s,
                centre=centre.projections[place].astype(float) / s,
                directions=[one[place].astype(float) / s for one in directions],
                logp=(float(rows.logp[n]) - float(centre.logp[place])) / logit,
                entropy=(float(rows.entropy[n]) - float(centre.entropy[place])) / logit,
                **more,  # type: ignore[arg-type]
            )
        )
    return found


def _step(rows: Rows, step: int, token: int, centre: Rows, own: int, s: float) -> dict[str, object]:
    errors = errors_at_top(rows, step, centre, own)
    ids, logits = centre.top_ids[own].tolist(), centre.top_logits[own].tolist()
    below = logits[0] - (logits[ids.index(token)] if token in ids else logits[-1])
    return {
        "margin": (errors[0] - errors[1]) / s if len(errors) > 1 else 0.0,
        "top": math.sqrt(2 * np.var(errors, ddof=1)) / s if len(errors) > 1 else 0.0,
        "flipped": token != ids[0],
        "deficit": min(below / s, CLIP),
    }


def log_rms(rows: Sequence[Row]) -> float:
    """S1: half the log of the mean squared ratio; S3 for the rows of one range of positions."""
    mean = sum(row.ratio**2 for row in rows) / len(rows) if rows else 0.0
    return 0.5 * math.log(mean) if mean else -math.inf


def log_largest(rows: Sequence[Row]) -> float:
    """S2: log of the largest ratio."""
    largest = max((row.ratio for row in rows), default=0.0)
    return math.log(largest) if largest else -math.inf


def log_shift(rows: Sequence[Row]) -> float:
    """S4: log of the length of the mean error, over the passes that show all prompts."""
    return math.log(np.linalg.norm(np.mean([row.error for row in rows if row.whole], axis=0)))


def gain(rows: Sequence[Row]) -> float:
    """S5 as a share of round-off: sum of <e, c> over the root of (rows times the sum of |c|^2)."""
    size = sum(float(row.centre @ row.centre) for row in rows)
    return sum(float(row.error @ row.centre) for row in rows) / math.sqrt(len(rows) * size)


def mean(rows: Sequence[Row], name: str) -> float:
    """S6, S7, S8, flips and deficit a row: the mean over all rows that have it."""
    values = [float(getattr(row, name)) for row in rows if getattr(row, name) is not None]
    return sum(values) / len(values)


def share_along(rows: Sequence[Row], index: int) -> tuple[float, float]:
    """(share of round-off along a direction, its coefficient) of 2.9, weights 1 / sigma^2."""
    product = sum(float(row.error @ row.directions[index]) for row in rows)
    size = sum(float(row.directions[index] @ row.directions[index]) for row in rows)
    return product / math.sqrt(len(rows) * size), product / size


# --- tokens ----------------------------------------------------------------------------------------


def tie_limit(tokens: int, alpha: float) -> float:
    """T1: c = sqrt(2 ln(N / alpha))."""
    return math.sqrt(2 * math.log(tokens / alpha))


def expected_flips(top_logits: np.ndarray, noise: np.ndarray) -> float:
    """T2: the sum over steps of q_t = sum over rivals of Phi(-gap / s_t), a probability and so at most 1."""
    return sum(
        min(1.0, sum(stats.norm.cdf(-(row[0] - rival) / s) for rival in row[1:]))
        for row, s in zip(top_logits.astype(float).tolist(), noise.tolist(), strict=True)
    )


def expected_depth(top_logits: np.ndarray, noise: np.ndarray) -> tuple[float, float]:
    """T3: mean and mean square of the sum of clipped margins, each rival v being taken with Phi(-gap_v / s_t)."""
    mean = square = 0.0
    for row, s in zip(top_logits.astype(float).tolist(), noise.tolist(), strict=True):
        for rival in row[1:]:
            depth, probability = (row[0] - rival) / s, stats.norm.cdf(-(row[0] - rival) / s)
            mean += probability * min(depth, CLIP)
            square += probability * min(depth, CLIP) ** 2
    return mean, square
