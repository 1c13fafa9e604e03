"""How a server turns batches into answers: what stands between the logits of a step and the token that is taken.

Free runs alone: where tokens are forced, nothing is chosen, stopped or handed out.

Shape legend: B batch rows, T new tokens, S tokens so far (padding included), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from harness.engines import decoding
from harness.mutations.mutation import patched
from harness.values import Generation, Request

if TYPE_CHECKING:
    import torch

    from harness.engines.hf import HFEngine

#: Continues the requests of one batch.
Answer = Callable[[Sequence[Request]], list[Generation]]
#: Answers the requests of one batch, given what continues them and the ids that stop them.
Serve = Callable[[Answer, Sequence[Request], frozenset[int]], list[Generation]]
#: Changes the logits [B, V] of a step before the best of each row is taken.
Processor = Callable[["torch.Tensor", "History"], "torch.Tensor"]


def served(engine: HFEngine, serve: Serve) -> AbstractContextManager[None]:
    """Let every batch of a free run be answered by ``serve``; the batches are those that the engine plans itself."""
    generate = engine.generate

    def generate_served(
        requests: Sequence[Request], *, batch_size: int | None, stop_ids: frozenset[int]
    ) -> list[Generation]:
        found: dict[int, Generation] = {}
        lengths = [len(request.prompt_ids) for request in requests]
        for batch in decoding.plan_batches(lengths, engine._batch(batch_size)):
            answer: Answer = partial(generate, batch_size=len(batch), stop_ids=stop_ids)
            found.update(zip(batch, serve(answer, [requests[i] for i in batch], stop_ids), strict=True))
        return [found[i] for i in range(len(requests))]

    return patched(engine, generate=generate_served)


@contextmanager
def processed(engine: HFEngine, processor: Processor) -> Iterator[None]:
    """Put a logits processor between each step of a free run and its argmax."""
    step = engine._step

    def serve(answer: Answer, requests: Sequence[Request], stop_ids: frozenset[int]) -> list[Generation]:
        history = History(max(len(request.prompt_ids) for request in requests), stop_ids)

        def processed_step(
            input_ids_BT: torch.Tensor,
            position_ids_BT: torch.Tensor,
            attention_mask_BS: torch.Tensor,
            cache: Any,
            keep: int,
        ) -> torch.Tensor:
            logits_BTV = step(input_ids_BT, position_ids_BT, attention_mask_BS, cache, keep)
            history.take(input_ids_BT, attention_mask_BS)
            # The pieces of a prompt before its last one are followed by no choice.
            return logits_BTV if history.generated < 0 else processor(logits_BTV[:, -1], history)[:, None]

        with patched(engine, _step=processed_step):
            return answer(requests)

    with served(engine, serve):
        yield


class History:
    """What the steps of one batch were fed so far.

    Attributes:
        stop_ids: the ids that end a row.
        ids_BS: token ids, padding included.
        mask_BS: 1 where they are tokens of the row, 0 on padding.
    """

    def __init__(self, width: int, stop_ids: frozenset[int]) -> None:
        self.stop_ids = stop_ids
        self._width = width
        self.ids_BS: torch.Tensor
        self.mask_BS: torch.Tensor

    def take(self, input_ids_BT: torch.Tensor, mask_BS: torch.Tensor) -> None:
        """Add what one step was fed, and the mask that it was given."""
        import torch

        before = mask_BS.shape[1] - input_ids_BT.shape[1]
        self.ids_BS = torch.cat([self.ids_BS, input_ids_BT], dim=1) if before else input_ids_BT
        self.mask_BS = mask_BS

    @property
    def generated(self) -> int:
        """How many tokens were generated; negative while the prompts are fed in pieces."""
        return self.ids_BS.shape[1] - self._width


def occurring(ids_BS: torch.Tensor, mask_BS: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Which tokens a history holds where its mask is 1, bool [B, V]."""
    counts_BV = ids_BS.new_zeros(len(ids_BS), vocabulary).scatter_add_(1, ids_BS, mask_BS)
    return counts_BV > 0


def choosing(logits_BV: torch.Tensor, chosen_B: torch.Tensor) -> torch.Tensor:
    """Logits whose best entry is the chosen one: it changes places with the best that was."""
    best_B1, chosen_B1 = logits_BV.argmax(dim=-1, keepdim=True), chosen_B[:, None]
    high_B1, low_B1 = logits_BV.gather(1, best_B1), logits_BV.gather(1, chosen_B1)
    # In this order a row whose choice is the best already keeps it.
    return logits_BV.scatter(1, best_B1, low_B1).scatter(1, chosen_B1, high_B1)
