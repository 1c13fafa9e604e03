"""Batches, left padding, the greedy decode loop and the teacher-forced pass, for any step function.

Shape legend: B batch rows, T new tokens, S tokens so far (padding included), V vocabulary, N rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from harness.numerics.sketch import Sketcher
from harness.values import Generation, Request

if TYPE_CHECKING:
    import torch

#: Planned batches: no row is padded beyond twice its length (short prompts: beyond this many tokens).
_SHORT = 96
_BUFFER_BYTES = 64 * 2**20


class Step(Protocol):
    """One forward pass. ``keep`` asks for the logits of the last ``keep`` positions, 0 for all."""

    def __call__(
        self,
        input_ids_BT: torch.Tensor,
        position_ids_BT: torch.Tensor,
        attention_mask_BS: torch.Tensor,
        cache: Any,
        keep: int,
    ) -> torch.Tensor: ...


def _best_of(logits_BV: torch.Tensor) -> list[int]:
    """The greedy choice of each row."""
    return [int(token) for token in logits_BV.argmax(dim=-1).tolist()]


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoder:
    """A step function with what the loops need to know about it.

    ``choose`` takes the tokens of a step from its logits [B, V]; a rank without logits is told them there.

    ``new_cache(batch, length)`` makes an empty KV cache for ``length`` tokens; None where the step
    keeps no cache, and only ``teacher_forced`` can be used. ``prefill_tokens`` bounds a planned batch of
    ``teacher_forced``, whose logits are all there at once.
    """

    step: Step
    new_cache: Callable[[int, int], Any]
    pad_id: int
    device: str
    prefill_tokens: int = 2**20
    choose: Callable[[torch.Tensor], list[int]] = _best_of


def recomputing(decoder: Decoder) -> Decoder:
    """The decoder of a step without a cache, made to decode: each step runs the whole prefix again.

    The cost is quadratic, and the decode path itself is not what runs: for references, and never for a view.
    """
    import torch

    def step(
        input_ids_BT: torch.Tensor,
        position_ids_BT: torch.Tensor,
        attention_mask_BS: torch.Tensor,
        cache: list[torch.Tensor],
        keep: int,
    ) -> torch.Tensor:
        cache.append(input_ids_BT)
        ids_BS = torch.cat(cache, dim=1)
        keep = keep or input_ids_BT.shape[1]
        return decoder.step(ids_BS, positions(attention_mask_BS), attention_mask_BS, None, keep)

    return replace(decoder, step=step, new_cache=lambda _batch, _length: [])


def plan_batches(lengths: Sequence[int], batch_size: int | None, tokens: int = 2**20) -> list[list[int]]:
    """Indices of the requests of each batch.

    With a ``batch_size`` requests are taken in the suite's order, however unequal their lengths.
    Without one, batches are made of prompts of similar length, so that at most half is padding, with at most
    ``tokens`` tokens in each (a single longer prompt is a batch of its own).
    """
    if batch_size is not None:
        return [list(range(i, min(i + batch_size, len(lengths)))) for i in range(0, len(lengths), batch_size)]
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        last = batches[-1] if batches else []
        similar = bool(last) and lengths[index] <= max(_SHORT, 2 * lengths[last[0]])
        if similar and (len(last) + 1) * lengths[index] <= tokens:
            last.append(index)
        else:
            batches.append([index])
    return batches


def left_pad(sequences: Sequence[Sequence[int]], pad_id: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, int64 [B, S], padded on the left."""
    import torch

    length = max(len(sequence) for sequence in sequences)
    ids = torch.full((len(sequences), length), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(sequences), length), dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        ids[row, length - len(sequence) :] = torch.tensor(sequence, dtype=torch.int64)
        mask[row, length - len(sequence) :] = 1
    return ids.to(device), mask.to(device)


def positions(mask_BS: torch.Tensor) -> torch.Tensor:
    """Position of each token in its own sequence, 0 on padding, [B, S]."""
    return (mask_BS.cumsum(dim=-1) - 1).clamp(min=0)


def greedy(
    decoder: Decoder,
    requests: Sequence[Request],
    *,
    batch_size: int | None,
    stop_ids: frozenset[int],
    chunk: int | None = None,
    top: int = 0,
) -> list[Generation]:
    """Free greedy continuations, in the order of ``requests``.

    ``chunk`` feeds the prompts in pieces of that many tokens; ``top`` keeps as many of the highest
    log-probabilities of each step.
    """
    found: dict[int, Generation] = {}
    for batch in plan_batches([len(request.prompt_ids) for request in requests], batch_size):
        best = _Best(top)
        rows = _decode(decoder, [requests[i] for i in batch], None, stop_ids, best.take, chunk)
        found.update(zip(batch, best.added_to(rows), strict=True))
    return [found[i] for i in range(len(requests))]


class _Best:
    """Gathers the highest log-probabilities of each step, float32, for as long as each row goes on."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._steps: list[list[list[tuple[int, float]]]] = []

    def take(self, _step: int, logits_BV: torch.Tensor) -> None:
        import torch

        if not self._count:
            return
        logprobs_BV = torch.log_softmax(logits_BV, dim=-1, dtype=torch.float32)
        logits_BT, ids_BT = logits_BV.topk(min(self._count, logits_BV.shape[-1]), dim=-1)
        columns = (logits_BT.tolist(), ids_BT.tolist(), logprobs_BV.gather(-1, ids_BT).tolist())
        self._steps.append([_ordered(*row) for row in zip(*columns, strict=True)])

    def added_to(self, generations: Sequence[Generation]) -> list[Generation]:
        if not self._count:
            return list(generations)
        return [
            replace(
                given,
                top_ids=tuple(tuple(token for token, _ in step[row]) for step in self._steps[: len(given.tokens)]),
                top_logits=tuple(tuple(value for _, value in step[row]) for step in self._steps[: len(given.tokens)]),
            )
            for row, given in enumerate(generations)
        ]


def _ordered(logits: list[float], ids: list[int], logprobs: list[float]) -> list[tuple[int, float]]:
    """(token, log-probability) in the order of argmax: by logit, which rounding makes no new ties of, then by id."""
    order = sorted(range(len(ids)), key=lambda i: (-logits[i], ids[i]))
    return [(ids[i], logprobs[i]) for i in order]


def replay(
    decoder: Decoder,
    requests: Sequence[Request],
    continuations: Sequence[Sequence[int]],
    *,
    batch_size: int | None,
    sketcher: Sketcher,
    chunk: int | None = None,
) -> None:
    """Force the continuations through the decode loop; the logits of every step go to ``sketcher``.

    ``chunk`` feeds the prompts in pieces of that many tokens through the KV cache (chunked prefill).
    """
    for batch in plan_batches([len(request.prompt_ids) for request in requests], batch_size):
        collector = _Collector(
            sketcher, batch, [len(requests[i].prompt_ids) for i in batch], [continuations[i] for i in batch]
        )
        forced = [continuations[i] for i in batch]
        _decode(decoder, [requests[i] for i in batch], forced, frozenset(), collector.take, chunk)
        collector.flush()


class _Collector:
    """Gathers the steps' logits and condenses them a buffer at a time, not a step at a time."""

    def __init__(
        self, sketcher: Sketcher, batch: list[int], starts: list[int], continuations: Sequence[Sequence[int]]
    ) -> None:
        self._sketcher, self._batch, self._starts, self._continuations = sketcher, batch, starts, continuations
        self._logits: list[torch.Tensor] = []
        self._keys: list[tuple[int, int, int]] = []
        self._bytes = 0

    def take(self, step: int, logits_BV: torch.Tensor) -> None:
        rows = [row for row, tokens in enumerate(self._continuations) if step < len(tokens)]
        self._logits.append(logits_BV if len(rows) == len(logits_BV) else logits_BV[rows])
        self._keys += [(self._batch[r], self._starts[r] + step, self._continuations[r][step]) for r in rows]
        self._bytes += self._logits[-1].numel() * logits_BV.element_size()
        if self._bytes > _BUFFER_BYTES:
            self.flush()

    def flush(self) -> None:
        import torch

        if not self._keys:
            return
        keys = np.array(self._keys)
        logits_NV = torch.cat(self._logits)
        self._sketcher.add(
            logits_NV,
            torch.from_numpy(keys[:, 2]).to(logits_NV.device),
            request=keys[:, 0].astype(np.int32),
            position=keys[:, 1].astype(np.int32),
            generated=np.ones(len(keys), dtype=np.bool_),
        )
        self._logits, self._keys, self._bytes = [], [], 0


def _decode(
    decoder: Decoder,
    requests: Sequence[Request],
    forced: Sequence[Sequence[int]] | None,
    stop_ids: frozenset[int],
    observe: Callable[[int, torch.Tensor], None],
    chunk: int | None,
) -> list[Generation]:
    """The loop of both free and forced runs: prefill the prompts, then one token a step.

    A row that has ended goes on with padding that nobody looks at, so that the batch keeps its shape.
    """
    import torch

    limits = [request.max_new_tokens for request in requests] if forced is None else [len(ids) for ids in forced]
    steps = max(limits)
    ids_BS, mask_BS = left_pad([request.prompt_ids for request in requests], decoder.pad_id, decoder.device)
    cache = decoder.new_cache(len(requests), ids_BS.shape[1] + steps)
    tokens: list[list[int]] = [[] for _ in requests]
    finished = [False] * len(requests)
    start = _feed(decoder, ids_BS, mask_BS, cache, chunk) if chunk and steps else 0
    input_BT, position_BT = ids_BS[:, start:], positions(mask_BS)[:, start:]
    for step in range(steps):
        logits_BV = decoder.step(input_BT, position_BT, mask_BS, cache, 1)[:, -1]
        observe(step, logits_BV)
        if forced is None:
            chosen = decoder.choose(logits_BV)
        else:
            chosen = [ids[step] if step < len(ids) else decoder.pad_id for ids in forced]
        for row, token in enumerate(chosen):
            if finished[row] or step >= limits[row]:
                chosen[row] = decoder.pad_id
                continue
            tokens[row].append(token)
            finished[row] = token in stop_ids
        going_on = [step + 1 < limits[row] and not done for row, done in enumerate(finished)]
        if not any(going_on):
            break
        input_BT = torch.tensor(chosen, dtype=torch.int64, device=decoder.device)[:, None]
        # A row that has ended goes on with masked padding: it may stand at the end of the context, where one
        # position more would lie behind a table of learned positions.
        mask_BS = torch.cat([mask_BS, torch.tensor(going_on, device=decoder.device).to(mask_BS.dtype)[:, None]], dim=1)
        position_BT = mask_BS.sum(dim=-1, keepdim=True) - 1
    return [
        Generation(tokens=tuple(row), finish="eos" if done else "length")
        for row, done in zip(tokens, finished, strict=True)
    ]


def _feed(decoder: Decoder, ids_BS: torch.Tensor, mask_BS: torch.Tensor, cache: Any, chunk: int) -> int:
    """Feed all chunks of the prompts but the last through the cache; returns the column where the last one starts."""
    position_BS = positions(mask_BS)
    last = (ids_BS.shape[1] - 1) // chunk * chunk
    for start in range(0, last, chunk):
        cut = slice(start, start + chunk)
        decoder.step(ids_BS[:, cut], position_BS[:, cut], mask_BS[:, : cut.stop], cache, 1)
    return last


def teacher_forced(
    decoder: Decoder,
    requests: Sequence[Request],
    continuations: Sequence[Sequence[int]],
    *,
    batch_size: int | None,
    sketcher: Sketcher,
    chunk: int | None = None,
) -> None:
    """One pass over prompt and continuation; every position's logits go to ``sketcher``.

    ``chunk`` feeds the sequence in pieces of that many tokens through the KV cache (chunked prefill).
    """
    sequences = [(*request.prompt_ids, *tokens) for request, tokens in zip(requests, continuations, strict=True)]
    for batch in plan_batches([len(sequence) for sequence in sequences], batch_size, decoder.prefill_tokens):
        inputs = [sequences[i][:-1] for i in batch]
        if max(map(len, inputs)) == 0:
            continue
        ids_BS, mask_BS = left_pad(inputs, decoder.pad_id, decoder.device)
        _forced_pass(decoder, ids_BS, mask_BS, chunk or ids_BS.shape[1], requests, sequences, batch, sketcher)


def _forced_pass(
    decoder: Decoder,
    ids_BS: torch.Tensor,
    mask_BS: torch.Tensor,
    chunk: int,
    requests: Sequence[Request],
    sequences: Sequence[Sequence[int]],
    batch: Sequence[int],
    sketcher: Sketcher,
) -> None:
    length = ids_BS.shape[1]
    position_BS = positions(mask_BS)
    cache = decoder.new_cache(len(batch), length) if chunk < length else None
    for start in range(0, length, chunk):
        cut = slice(start, min(start + chunk, length))
        logits_BTV = decoder.step(ids_BS[:, cut], position_BS[:, cut], mask_BS[:, : cut.stop], cache, 0)
        real_BT = mask_BS[:, cut].bool()
        row_N, column_N = (index.cpu().numpy() for index in real_BT.nonzero(as_tuple=True))
        # The logits at sequence index p predict the token at p + 1; padding comes first.
        padding_B = np.array([length - len(sequences[i]) + 1 for i in batch])
        position_N = column_N + start - padding_B[row_N] + 1
        request_N = np.array(batch)[row_N]
        next_N = np.array([sequences[r][p] for r, p in zip(request_N, position_N, strict=True)], dtype=np.int64)
        prompt_N = np.array([len(requests[i].prompt_ids) for i in batch])[row_N]
        sketcher.add(
            logits_BTV[real_BT],
            _tensor(next_N, logits_BTV),
            request=request_N.astype(np.int32),
            position=position_N.astype(np.int32),
            generated=position_N >= prompt_N,
        )


def _tensor(array: np.ndarray[Any, np.dtype[np.int64]], like: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.from_numpy(array).to(like.device)
