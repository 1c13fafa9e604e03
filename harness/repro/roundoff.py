"""What the reference gives for any token ids, how its own round-off scatters there, and the limit that follows.

One pass over a sequence tells of all its beginnings: a model that looks back alone gives the same there.

Shape legend: K replicas, T tokens, N places, V vocabulary, J projections.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from harness import replicas
from harness.engines import hf
from harness.numerics import bounds, metrics, statistics
from harness.numerics.constants import ALPHA, REPLICAS
from harness.numerics.sketch import signs
from harness.repro.trying import Keeper
from harness.scorer import open_reference
from harness.values import Request

Float64 = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """Of one sequence.

    Attributes:
        logits: of the reference in the precision of the golden, [T, V].
        errors: projections of the replicas' errors, [K, T, J].
        norms: lengths of these errors, a constant shift taken out, [K, T].
    """

    logits: Float64
    errors: Float64
    norms: Float64


@dataclass(frozen=True, kw_only=True, slots=True)
class Allowed:
    """What is right at some places and how much is round-off: ``logits`` [N, V], ``sigma`` [N], and the limit on the
    largest error in units of it."""

    logits: Float64
    sigma: Float64
    limit: float
    why: str


class Ruler:
    """The live reference in the golden's precision, and its replicas in that of the candidate; a context manager.

    Args:
        model: the reference's directory.
        precision: that its golden was recorded in.
        dtype: that the candidate computes in.
        weights: what the weights are cast to first, None to leave them.
        vocabulary: columns of the logits.
        count, seed: of the replicas.
    """

    def __init__(
        self,
        model: str,
        *,
        precision: str,
        dtype: str,
        weights: str | None,
        vocabulary: int,
        count: int = REPLICAS,
        seed: int = 0,
    ) -> None:
        self.dtype, self.count, self.seed, self.vocabulary = dtype, count, seed, vocabulary
        self._exact = open_reference(model, precision, weights=weights)
        self._plain = open_reference(model, dtype, weights=weights)
        self._known: dict[tuple[int, ...], Known] = {}
        self._stack = ExitStack()
        #: The smallest round-off of any position so far, in logits.
        self.finest = 0.0

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        try:
            self._stack.enter_context(self._exact)
            self._stack.enter_context(self._plain)
        except BaseException:
            self._stack.close()
            raise
        kernels = replicas.kernels_of(self._plain.model)
        self._variants = replicas.draw(2 * self.count, self.seed, kernels, wide=self.dtype == "float16")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def right(self, ids: tuple[int, ...]) -> Float64:
        """Logits of the reference behind each token, [T, V]."""
        found = self._of(ids)
        return found.logits[: len(ids)] if found is not None else _logits(self._exact, ids, self.vocabulary)

    def allowed(self, sequences: Sequence[tuple[int, ...]], places: Sequence[tuple[int, int]]) -> Allowed:
        """What is right and what is round-off at places (sequence, tokens seen), and the limit on their largest error.

        As the verdict has it for the worst position: the largest error of each replica, and the tail of a maximum.
        """
        known = [self._measured(ids) for ids in sequences]
        sigma = [metrics.row_sigma(one.norms) for one in known]
        sigma_N = np.array([sigma[row][seen - 1] for row, seen in places])
        norms_KN = np.stack([known[row].norms[:, seen - 1] for row, seen in places], axis=1)
        errors_KNJ = np.stack([known[row].errors[:, seen - 1] for row, seen in places], axis=1)
        scaled_KNJ = errors_KNJ / sigma_N[None, :, None]
        effective = metrics.effective_number(scaled_KNJ.reshape(len(scaled_KNJ), -1))
        with np.errstate(divide="ignore"):
            largest_K = np.log((norms_KN / sigma_N).max(axis=1))
        spread = bounds.spread_of(largest_K, effective, bounds.scatter_of(self.dtype, statistics.WORST))
        bound = bounds.maximum_bound(largest_K, spread, alpha=ALPHA, tests=1, precision=self.dtype)
        return Allowed(
            logits=np.stack([known[row].logits[seen - 1] for row, seen in places]),
            sigma=sigma_N,
            limit=bounds.exponential(bound.failing[1]),
            why=bound.why,
        )

    def _of(self, ids: tuple[int, ...]) -> Known | None:
        return next((one for known, one in self._known.items() if known[: len(ids)] == ids), None)

    def _measured(self, ids: tuple[int, ...]) -> Known:
        found = self._of(ids)
        if found is None:
            found = self._known[ids] = self._measure(ids)
            finest = float(metrics.row_sigma(found.norms).min())
            self.finest = min(self.finest or finest, finest)
        return Known(
            logits=found.logits[: len(ids)], errors=found.errors[:, : len(ids)], norms=found.norms[:, : len(ids)]
        )

    def _measure(self, ids: tuple[int, ...]) -> Known:
        right_TV = _logits(self._exact, ids, self.vocabulary)
        matrix_VJ = signs(self.vocabulary).T
        errors, norms = [], []
        for variant in self._variants:
            with replicas.applied(self._plain.model, variant):
                shown_TV = _logits(self._plain, ids, self.vocabulary, variant.chunk)
            if not np.isfinite(shown_TV).all():
                continue  # no correct implementation in this precision: the next one takes its place
            error_TV = shown_TV - right_TV
            error_TV -= error_TV.mean(axis=1, keepdims=True)
            errors.append(error_TV @ matrix_VJ)
            norms.append(np.linalg.norm(error_TV, axis=1))
            if len(norms) == self.count:
                break
        return Known(logits=right_TV, errors=np.stack(errors), norms=np.stack(norms))


def _logits(engine: hf.HFEngine, ids: tuple[int, ...], vocabulary: int, chunk: int | None = None) -> Float64:
    keeper = Keeper(vocabulary)
    request = Request(id="case", prompt_ids=ids, max_new_tokens=1)
    engine.prefill([request], [(0,)], batch_size=1, sketcher=keeper, chunk=chunk)
    return np.stack([keeper.shown[0, seen] for seen in range(1, len(ids) + 1)])
