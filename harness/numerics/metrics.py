"""Metrics: each returns numbers and decides nothing.

Shape legend: N rows, J projections, K replicas, G generated rows, T top entries, U units.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from harness.numerics.constants import BUCKETS, PAIR_FLOOR, SIGMA_FLOOR
from harness.values import Rows

Float64 = NDArray[np.float64]
Float32 = NDArray[np.float32]
_TINY = float(np.finfo(np.float64).tiny)


def error_norm(projections: Float32, centre: Float32) -> Float64:
    """Estimated length of C(L - R) per row, in logits, [N]; from projections [N, J]."""
    difference = projections.astype(np.float64) - centre.astype(np.float64)
    norm: Float64 = np.sqrt(np.einsum("nj,nj->n", difference, difference))
    return norm


def rms(values: Float64) -> float:
    """Root mean square of all values, 0.0 of none."""
    return float(np.sqrt(np.mean(values**2))) if values.size else 0.0


def row_sigma(norms: Float64) -> Float64:
    """Root mean square over replicas of the error lengths [K, N], with the floor of numerics 2.2, [N]."""
    sigma: Float64 = np.sqrt(np.mean(norms**2, axis=0))
    return np.maximum(sigma, SIGMA_FLOOR * np.median(sigma)) if len(sigma) else sigma


def position_buckets(position: NDArray[np.integer]) -> NDArray[np.int64]:
    """Bucket 0..BUCKETS-1 of each row by its position, with about equally many rows in each, [N].

    A cache, window or position fault shows in some buckets only (S3).
    """
    if not len(position):
        return np.zeros(0, dtype=np.int64)
    edges = np.quantile(position, np.arange(1, BUCKETS) / BUCKETS)
    return np.searchsorted(edges, position, side="left").astype(np.int64)


def pair_noise(errors: Float64, units: NDArray[np.integer] | None = None) -> Float64:
    """Root mean square error of a logit difference among the top entries, per step, in logits, [G].

    ``errors`` are the replicas' logits less the centre's at its top entries, [K, G, T], NaN where a
    replica does not show one. For two of T values the mean squared difference is twice their unbiased
    variance. ``units`` [G] name each step's prompt: the floor is a share of what that prompt has, since
    noise grows with the position in some models (ALiBi in bf16), and a floor pooled over all prompts would
    excuse on short ones what only long ones have.
    """
    shown = np.isfinite(errors).sum(axis=2)
    usable = shown >= 2
    count = np.maximum(shown, 2)
    centred = np.where(np.isfinite(errors), errors, 0.0)
    mean = centred.sum(axis=2) / count
    spread = np.where(np.isfinite(errors), centred - mean[:, :, None], 0.0)
    squared = 2 * (spread**2).sum(axis=2) / (count - 1)
    noise = np.sqrt((squared * usable).sum(axis=0) / np.maximum(usable.sum(axis=0), 1))
    if units is None:
        units = np.zeros(len(noise), dtype=np.int64)
    steps = np.bincount(units)
    pool = np.sqrt(np.bincount(units, weights=noise**2) / np.maximum(steps, 1))
    floored: Float64 = np.maximum(noise, PAIR_FLOOR * pool[units]) if len(noise) else noise
    return floored


def logits_at(ids: NDArray[np.int32], top_ids: NDArray[np.int32], top_logits: Float32) -> Float64:
    """Logits of ``ids`` [G, W] looked up among stored top entries [G, T]; NaN where one is not there, [G, W]."""
    hit = ids[:, :, None] == top_ids[:, None, :]
    # Not a product: a server that masks a token gives it minus infinity, and 0 x infinity is NaN.
    found = np.where(hit, top_logits[:, None, :].astype(np.float64), 0.0).sum(axis=2)
    return np.where(hit.any(axis=2), found, np.nan)


def effective_number(errors: Float64) -> float:
    """Effective number of independent replicas: (sum of eigenvalues)^2 / sum of their squares (numerics 2.3).

    ``errors`` [K, M] are flattened replica errors; their mean over K, the common mode, is removed.
    Identical replicas count once; a set without any spread counts as 1.
    """
    residual = errors - errors.mean(axis=0)
    lengths = np.linalg.norm(residual, axis=1)
    alive = lengths > 0
    if alive.sum() < 2:
        return 1.0
    unit = residual[alive] / lengths[alive, None]
    eigenvalues = np.linalg.eigvalsh(unit @ unit.T)
    return float(eigenvalues.sum() ** 2 / (eigenvalues**2).sum())


def margins(top_logits: Float32) -> Float64:
    """Top-1 less top-2 logit per step, [G]; infinite for a vocabulary of one token."""
    if top_logits.shape[1] < 2:
        return np.full(len(top_logits), np.inf)
    wide = top_logits.astype(np.float64)
    return wide[:, 0] - wide[:, 1]


def deficit(top_ids: NDArray[np.int32], top_logits: Float32, token: NDArray[np.integer]) -> Float64:
    """How far below its best token the reference puts ``token``, per step, in logits, [G].

    A token outside the stored top entries gets the distance to the last of these: a lower bound.
    """
    wide = top_logits.astype(np.float64)
    hit = top_ids == token[:, None]
    logit = np.where(hit.any(axis=1), (wide * hit).sum(axis=1), wide[:, -1])
    return wide[:, 0] - logit


def coarse_divergence(reference: Rows, rows: Rows, place: NDArray[np.int64]) -> Float64:
    """KL(reference || rows) in nats over the reference's top entries and one cell for all the rest, [g].

    For the generated rows of ``rows``; ``place`` are their places (and those of all others) in the reference.
    Merging cells loses some of the divergence and never adds to it; an entry that ``rows`` does not show counts
    with the last one shown, which loses more.
    """
    step = np.where(reference.generated, np.cumsum(reference.generated) - 1, -1)[place[rows.generated]]
    ids = reference.top_ids[step]
    own = reference.top_logits[step].astype(np.float64) - reference.logsumexp[place[rows.generated], None]
    shown = logits_at(ids, rows.top_ids, rows.top_logits)
    shown = np.where(np.isnan(shown), rows.top_logits[:, -1:].astype(np.float64), shown)
    theirs = shown - rows.logsumexp[rows.generated, None]
    tiny = np.finfo(np.float64).eps
    p, q = np.exp(own), np.exp(theirs)
    rest_p, rest_q = np.maximum(1 - p.sum(axis=1), tiny), np.maximum(1 - q.sum(axis=1), tiny)
    divergence: Float64 = (p * (own - theirs)).sum(axis=1) + rest_p * np.log(rest_p / rest_q)
    return np.maximum(divergence, 0.0)
