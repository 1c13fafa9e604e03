"""Bugs of logits processors and stopping that show in greedy decoding: penalties, minimum lengths, stop strings.

No golden asks for a penalty or a stop string. Where a bug needs one, the mutation serves the requests as if they asked
for it, wrongly, and `CORRECT` serves the same requests rightly: the two differ by the bug alone, and a golden of it
must be recorded inside that block.

Shape legend: B batch rows, S tokens so far (padding included), V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from harness.mutations.answering import Answer, History, occurring, processed, served
from harness.mutations.mutation import Change, Mutation
from harness.values import Generation, Request

if TYPE_CHECKING:
    import torch

    from harness.engines.hf import HFEngine

_ALL = frozenset({"bloom-tiny", "bloom-raw", "llama-tiny", "gpt2-tiny"})
#: Those that know where a text ends, and what a line is.
_TRAINED = _ALL - {"bloom-raw"}

#: The repetition penalty at strength 1 is 1.2; 1 is none.
_PENALTY = 0.2
_STOP = "\n"


def _penalised(logits_BV: torch.Tensor, hit_BV: torch.Tensor, penalty: torch.Tensor | float) -> torch.Tensor:
    """A repetition penalty [B, 1] or for all: what was there already becomes less likely, whatever its logit's sign."""
    lowered_BV = (logits_BV * penalty).where(logits_BV < 0, logits_BV / penalty)
    return lowered_BV.where(hit_BV, logits_BV)


def _asking(processor: Callable[..., torch.Tensor], right: bool) -> Change:
    """Serve all requests as if they asked for what ``processor`` does; the strength is how much of it."""

    @contextmanager
    def change(engine: HFEngine, strength: float) -> Iterator[None]:
        with processed(engine, partial(processor, engine, right, strength)):
            yield

    return change


# --- penalties ---------------------------------------------------------------------------------


def _repetition(
    _engine: HFEngine, right: bool, strength: float, logits_BV: torch.Tensor, history: History
) -> torch.Tensor:
    """On log-probabilities, which are all negative, as GPT-2's own logits are."""
    scores_BV, penalty = logits_BV.log_softmax(dim=-1), 1 + _PENALTY * strength
    hit_BV = occurring(history.ids_BS, history.mask_BS, logits_BV.shape[-1])
    if right:
        return _penalised(scores_BV, hit_BV, penalty)
    return (scores_BV / penalty).where(hit_BV, scores_BV)


def _padded_history(
    engine: HFEngine, right: bool, strength: float, logits_BV: torch.Tensor, history: History
) -> torch.Tensor:
    """Prompts are padded with the end-of-sequence token: who looks at ids alone takes it for a token of the row."""
    ids_BS = history.ids_BS.where(history.mask_BS > 0, min(engine.stop_ids))
    mask_BS = history.mask_BS if right else history.mask_BS.new_ones(history.mask_BS.shape)
    return _penalised(logits_BV, occurring(ids_BS, mask_BS, logits_BV.shape[-1]), 1 + _PENALTY * strength)


def _half_asked(
    _engine: HFEngine, right: bool, strength: float, logits_BV: torch.Tensor, history: History
) -> torch.Tensor:
    """Every second row of a batch asks for the penalty. Histories that are kept from the first of them on stand one
    row too high, and the last row has none."""
    import torch

    asked_B1 = torch.arange(len(logits_BV), device=logits_BV.device)[:, None] % 2
    penalty_B1 = 1 + _PENALTY * strength * asked_B1.to(logits_BV.dtype)
    hit_BV = occurring(history.ids_BS, history.mask_BS, logits_BV.shape[-1])
    if not right:
        hit_BV = torch.cat([hit_BV[1:], torch.zeros_like(hit_BV[:1])])
    return _penalised(logits_BV, hit_BV, penalty_B1)


# --- where to stop -----------------------------------------------------------------------------


def _released_late(logits_BV: torch.Tensor, history: History) -> torch.Tensor:
    """A minimum of no tokens at all: ``pos < min_len``, with the position of the last token and the prompt's length."""
    if history.generated > 0 or not history.stop_ids:
        return logits_BV
    return logits_BV.index_fill(1, history.ids_BS.new_tensor(sorted(history.stop_ids)), -math.inf)


@contextmanager
def _min_tokens(engine: HFEngine, _strength: float) -> Iterator[None]:
    with processed(engine, _released_late):
        yield


def _at_a_string(found: Callable[[str], bool]) -> Change:
    """Stop every text behind the token with which ``found`` holds for it."""

    @contextmanager
    def change(engine: HFEngine, _strength: float) -> Iterator[None]:
        tokenizer = engine.tokenizer
        if tokenizer is None:
            raise LookupError(f"{engine.spec} has no tokenizer")

        def serve(answer: Answer, requests: Sequence[Request], _stop_ids: frozenset[int]) -> list[Generation]:
            return [_cut(tokenizer, found, generation) for generation in answer(requests)]

        with served(engine, serve):
            yield

    return change


def _cut(tokenizer: Any, found: Callable[[str], bool], given: Generation) -> Generation:
    for end in range(1, len(given.tokens) + 1):
        if found(tokenizer.decode(given.tokens[:end])):
            return replace(
                given,
                tokens=given.tokens[:end],
                finish="eos",
                top_ids=given.top_ids[:end],
                top_logits=given.top_logits[:end],
            )
    return given


def _ends_with_stop(text: str) -> bool:
    return text.endswith(_STOP)


def _holds_stop(text: str) -> bool:
    return _STOP in text


# --- the catalogue -----------------------------------------------------------------------------

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        id="sg-reppen-neg",
        group="stopping",
        wrong="a repetition penalty divides negative scores too: what was there becomes more likely",
        reference="huggingface/transformers#2302",
        hosts=_ALL,
        active=frozenset({"fp32", "free"}),
        shows="tokens",
        strengths=(1.0, 0.5, 0.25),
        change=_asking(_repetition, right=False),
    ),
    Mutation(
        id="sg-pen-pad",
        group="stopping",
        wrong="a repetition penalty counts padding, which is the end-of-sequence token: padded rows end late",
        reference="huggingface/text-generation-inference#1765",
        hosts=_TRAINED,
        active=frozenset({"fp32", "free", "padding"}),
        shows="tokens",
        strengths=(1.0, 0.5, 0.25),
        change=_asking(_padded_history, right=False),
    ),
    Mutation(
        id="sg-pen-batch-order",
        group="stopping",
        wrong="token histories are kept from the first row with a penalty on: each row is given the next one's",
        reference="vllm-project/vllm#5639",
        hosts=_ALL,
        active=frozenset({"fp32", "free", "batch"}),
        shows="tokens",
        strengths=(1.0, 0.5, 0.25),
        change=_asking(_half_asked, right=False),
    ),
    Mutation(
        id="sg-min-tokens",
        group="stopping",
        wrong="the end of sequence is released one step late: no text can end with its first token",
        reference="vllm-project/vllm#46243",
        hosts=_TRAINED,
        active=frozenset({"fp32", "free"}),
        shows="tokens",
        change=_min_tokens,
    ),
    Mutation(
        id="sg-stop-boundary",
        group="stopping",
        wrong="a stop string is found only where a token ends with it",
        reference="vllm-project/vllm#3672",
        hosts=_TRAINED,
        active=frozenset({"fp32", "free"}),
        shows="tokens",
        change=_at_a_string(_ends_with_stop),
    ),
)

#: The same requests served rightly, for the bugs that need requests of a kind that no golden holds.
CORRECT: Mapping[str, Change] = {
    "sg-reppen-neg": _asking(_repetition, right=True),
    "sg-pen-pad": _asking(_padded_history, right=True),
    "sg-pen-batch-order": _asking(_half_asked, right=True),
    "sg-stop-boundary": _at_a_string(_holds_stop),
}
