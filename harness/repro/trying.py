"""Run a case in an open engine and keep its logits whole.

Shape legend: N rows, V columns of the golden's vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from harness.engines import Engine
from harness.numerics.sketch import Sketcher
from harness.repro.cases import Batch, Case, Place
from harness.values import Request

if TYPE_CHECKING:
    import torch

#: Logits [V] in float64, by the place that they are of.
Shown = dict[Place, NDArray[np.float64]]


class Keeper(Sketcher):
    """Keeps the logits themselves, by row and by the number of tokens seen: a case has few."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__(vocabulary)
        self.shown: Shown = {}

    def add(
        self,
        logits_NV: torch.Tensor,
        next_ids_N: torch.Tensor,
        *,
        request: NDArray[np.int32],
        position: NDArray[np.int32],
        generated: NDArray[np.bool_],
    ) -> None:
        import torch

        wide_NV = logits_NV[:, : self.vocabulary].detach().to("cpu", torch.float64).numpy()
        for row, seen, logits_V in zip(request.tolist(), position.tolist(), wide_NV, strict=True):
            self.shown[row, seen] = logits_V


def run_case(engine: Engine, case: Case, vocabulary: int) -> Shown:
    """The logits of a case, what is to run before it first. Whatever the candidate raises is passed on."""
    for batch in case.before:
        run_batch(engine, batch, vocabulary)
    return run_batch(engine, case.batch, vocabulary)


def run_batch(engine: Engine, batch: Batch, vocabulary: int) -> Shown:
    """The logits of one batch, as the engine's own loops run it."""
    keeper = Keeper(vocabulary)
    # The last token of a continuation is asked for and never fed: any will do.
    if batch.decode:
        requests = [_request(row.prompt) for row in batch.rows]
        forced = [(*row.fed, 0) for row in batch.rows]
        engine.replay(requests, forced, batch_size=len(batch.rows), sketcher=keeper)
    else:
        requests = [_request(row.ids) for row in batch.rows]
        engine.prefill(requests, [(0,)] * len(requests), batch_size=len(batch.rows), sketcher=keeper)
    return keeper.shown


def _request(ids: tuple[int, ...]) -> Request:
    return Request(id="case", prompt_ids=ids, max_new_tokens=1)
