"""Bugs of serving: what happens to prompts before the model sees them, and to answers after it gave them.

Shape legend: B batch rows, T new tokens, E hidden size, N rows of logits, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from harness.mutations.answering import Answer, served
from harness.mutations.mutation import Mutation, attention_of, blocks, hooked, patched
from harness.numerics.sketch import Sketcher
from harness.values import Generation, Request, Suite

if TYPE_CHECKING:
    import torch

    from harness.engines.hf import HFEngine

_ALL = frozenset({"bloom-tiny", "bloom-raw", "llama-tiny", "gpt2-tiny"})
#: Those whose texts end before the limit, at different lengths.
_TRAINED = _ALL - {"bloom-raw"}

#: Data-parallel ranks of an evaluation.
_RANKS = 3


# --- prompts -----------------------------------------------------------------------------------


@contextmanager
def _double_bos(engine: HFEngine, _strength: float) -> Iterator[None]:
    tokenizer = engine.tokenizer
    bos = None if tokenizer is None else tokenizer.bos_token_id
    if tokenizer is None or tokenizer("a")["input_ids"][0] != bos:
        raise LookupError(f"the tokenizer of {engine.spec} adds no beginning of sequence")
    tokenize = engine.tokenize

    def tokenize_twice_begun(suite: Suite) -> tuple[Request, ...] | None:
        requests = tokenize(suite)
        return requests and tuple(
            # Prompts that are ids go past the template and the tokenizer.
            replace(request, prompt_ids=(bos, *request.prompt_ids))
            if request.text is not None and request.prompt_ids[0] == bos
            else request
            for request in requests
        )

    with patched(engine, tokenize=tokenize_twice_begun):
        yield


@contextmanager
def _truncated(engine: HFEngine, strength: float) -> Iterator[None]:
    if engine.context is None:
        raise LookupError(f"{engine.spec} states no context length")
    window = engine.context - round(engine.context // 2 * strength)
    tokenize, generate, replay, prefill = engine.tokenize, engine.generate, engine.replay, engine.prefill

    def cut(requests: Sequence[Request]) -> tuple[Request, ...]:
        return tuple(replace(request, prompt_ids=request.prompt_ids[-window:]) for request in requests)

    def shifted(requests: Sequence[Request], sketcher: Sketcher) -> _Shifted:
        return _Shifted(sketcher, [max(0, len(request.prompt_ids) - window) for request in requests])

    def tokenize_cut(suite: Suite) -> tuple[Request, ...] | None:
        requests = tokenize(suite)
        return requests and cut(requests)

    def generate_cut(requests: Sequence[Request], **more: Any) -> list[Generation]:
        return generate(cut(requests), **more)

    def replay_cut(requests: Sequence[Request], continuations: Any, *, sketcher: Sketcher, **more: Any) -> None:
        replay(cut(requests), continuations, sketcher=shifted(requests, sketcher), **more)

    def prefill_cut(requests: Sequence[Request], continuations: Any, *, sketcher: Sketcher, **more: Any) -> None:
        prefill(cut(requests), continuations, sketcher=shifted(requests, sketcher), **more)

    with patched(engine, tokenize=tokenize_cut, generate=generate_cut, replay=replay_cut, prefill=prefill_cut):
        yield


class _Shifted(Sketcher):
    """Hands rows of logits on to a sketcher, at the places that they would have in whole prompts."""

    def __init__(self, sketcher: Sketcher, removed: Sequence[int]) -> None:
        super().__init__(sketcher.vocabulary, fingerprints=sketcher.fingerprints)
        self._sketcher, self._removed = sketcher, np.array(removed, dtype=np.int32)

    def add(
        self,
        logits_NV: torch.Tensor,
        next_ids_N: torch.Tensor,
        *,
        request: NDArray[np.int32],
        position: NDArray[np.int32],
        generated: NDArray[np.bool_],
    ) -> None:
        position = position + self._removed[request]
        self._sketcher.add(logits_NV, next_ids_N, request=request, position=position, generated=generated)


# --- batches -----------------------------------------------------------------------------------


@contextmanager
def _by_completion(engine: HFEngine, _strength: float) -> Iterator[None]:
    def serve(answer: Answer, requests: Sequence[Request], _stop_ids: frozenset[int]) -> list[Generation]:
        return sorted(answer(requests), key=lambda generation: len(generation.tokens))

    with served(engine, serve):
        yield


@contextmanager
def _last_parameters(engine: HFEngine, _strength: float) -> Iterator[None]:
    context = engine.context

    def limited(request: Request, limit: int) -> Request:
        room = limit if context is None else context - len(request.prompt_ids)
        return replace(request, max_new_tokens=min(limit, room))

    def serve(answer: Answer, requests: Sequence[Request], _stop_ids: frozenset[int]) -> list[Generation]:
        return answer([limited(request, requests[-1].max_new_tokens) for request in requests])

    with served(engine, serve):
        yield


@contextmanager
def _filled_batches(engine: HFEngine, _strength: float) -> Iterator[None]:
    generate = engine.generate

    def generate_filled(
        requests: Sequence[Request], *, batch_size: int | None, stop_ids: frozenset[int]
    ) -> list[Generation]:
        found = generate(requests, batch_size=batch_size, stop_ids=stop_ids)
        at_once = _RANKS * (engine._batch(batch_size) or -(-len(found) // _RANKS))
        return [*found, *(found[i % len(found)] for i in range(-len(found) % at_once))]

    with patched(engine, generate=generate_filled):
        yield


# --- padding -----------------------------------------------------------------------------------


@contextmanager
def _empty_rows(engine: HFEngine, _strength: float) -> Iterator[None]:
    with hooked(*((attention_of(block), _nothing_attended, False) for block in blocks(engine.model))):
        yield


def _nothing_attended(_module: Any, _inputs: Any, named: dict[str, Any], output: tuple[Any, ...]) -> Any:
    """A softmax over nothing but -inf is 0/0, in 16 bits: there the lowest score and the mask add up to -inf."""
    import torch

    mask, result_BTE = named.get("attention_mask"), output[0]
    if mask is None or result_BTE.element_size() > 2:
        return None
    seen = mask if mask.dtype is torch.bool else mask > torch.finfo(mask.dtype).min / 2
    empty_BT1 = ~seen.any(dim=-1)[:, 0, :, None]
    return (result_BTE.masked_fill(empty_BT1, math.nan), *output[1:])


# --- the catalogue -----------------------------------------------------------------------------

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        id="bs-double-bos",
        group="serving",
        wrong="the template begins the sequence, and the tokenizer begins it again",
        reference="sgl-project/sglang#888",
        hosts=frozenset({"llama-tiny"}),
        shows="prompt",
        change=_double_bos,
    ),
    Mutation(
        id="bs-result-order",
        group="serving",
        wrong="the answers of a batch are handed out in the order in which they were complete",
        reference="deepspeedai/DeepSpeed-MII#384",
        hosts=_TRAINED,
        active=frozenset({"fp32", "batch", "free"}),
        shows="tokens",
        change=_by_completion,
    ),
    Mutation(
        id="bs-params-last",
        group="serving",
        wrong="all requests of a batch get as many tokens as its last one asks for",
        reference="EvolvingLMMs-Lab/lmms-eval#1326",
        hosts=_ALL,
        active=frozenset({"fp32", "batch", "free"}),
        shows="tokens",
        change=_last_parameters,
    ),
    Mutation(
        id="bs-empty-row-nan",
        group="serving",
        wrong="a padded position attends to nothing and becomes NaN, which its keys and values carry to the whole row",
        reference="unslothai/unsloth#9708",
        hosts=_ALL,
        active=frozenset({"half", "padding"}),
        change=_empty_rows,
    ),
    Mutation(
        id="bs-truncate-head-or-tail",
        group="serving",
        wrong="of a prompt longer than half the context the front is cut off, without a word",
        reference="JustVugg/colibri#506",
        hosts=_ALL,
        subtlety="subtle",
        active=frozenset({"fp32", "long"}),
        shows="prompt",
        strengths=(1.0, 0.5, 2 / 512),
        change=_truncated,
    ),
    Mutation(
        id="bs-gather-dup",
        group="serving",
        wrong="the last batches of 3 data-parallel ranks are filled with answers from the first, which stay in",
        reference="huggingface/accelerate#350",
        hosts=_ALL,
        subtlety="subtle",
        active=frozenset({"fp32", "free"}),
        shows="tokens",
        change=_filled_batches,
    ),
)
