"""A model's exact greedy continuation from few passes over its weights (Leviathan et al. 2023, with greedy choices).

A draft proposes how each text goes on. One pass gives the model's own choice at every position of it: the longest
prefix of the draft that the model would have said itself is accepted, and its choice behind that is the next token,
whatever the draft said there. So each pass gives every text one token at least, and no token depends on the draft.

A text's rows are those of the pass that accepted them: each of a token is the model's on the tokens before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from harness.errors import EngineError
from harness.numerics.sketch import concatenate, select_rows, sort_rows
from harness.values import Finish, Generation, Request, Rows

#: (requests, what each has so far) -> what each goes on with, as long as it likes.
Draft = Callable[[Sequence[Request], Sequence[Sequence[int]]], Sequence[Sequence[int]]]
#: (requests, continuations) -> the model's rows on them, ``request`` counting these.
Score = Callable[[Sequence[Request], Sequence[Sequence[int]]], Rows]


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a recording is: between two rounds nothing else is needed.

    Attributes:
        tokens: of each text so far.
        ended: texts that are whole.
        mistakes: of each text how often the draft was wrong.
        rounds: passes so far.
        rows: of all accepted tokens, and of the prompts.
    """

    tokens: tuple[tuple[int, ...], ...]
    ended: tuple[bool, ...]
    mistakes: tuple[int, ...]
    rounds: int
    rows: tuple[Rows, ...]

    @property
    def is_done(self) -> bool:
        return all(self.ended)


def start(requests: Sequence[Request]) -> Progress:
    """Nothing said yet."""
    count = len(requests)
    return Progress(tokens=((),) * count, ended=(False,) * count, mistakes=(0,) * count, rounds=0, rows=())


def advance(
    progress: Progress, requests: Sequence[Request], draft: Draft, score: Score, stop_ids: frozenset[int]
) -> Progress:
    """One round: the draft proposes, one pass accepts and corrects.

    Raises:
        EngineError: where the model's own logits are not finite.
    """
    open_ = [index for index, ended in enumerate(progress.ended) if not ended]
    asked = [requests[index] for index in open_]
    had = [progress.tokens[index] for index in open_]
    proposed = [
        _proposal(request, before, tail) for request, before, tail in zip(asked, had, draft(asked, had), strict=True)
    ]
    rows = score(asked, [(*before, *tail) for before, tail in zip(had, proposed, strict=True)])
    if rows.nonfinite.any():
        raise EngineError("the reference's logits are not finite", fix="Stream it in float32")
    tokens, ended, mistakes = list(progress.tokens), list(progress.ended), list(progress.mistakes)
    keep = np.zeros(len(rows), dtype=np.bool_)
    for place, index in enumerate(open_):
        mine = np.flatnonzero(rows.request == place)
        first = len(requests[index].prompt_ids) + len(had[place])
        choices = rows.argmax[mine[rows.position[mine] >= first]].tolist()
        accepted = _accepted(choices, proposed[place], stop_ids)
        tokens[index] = (*had[place], *accepted)
        mistakes[index] += int(accepted[-1] != proposed[place][len(accepted) - 1])
        ended[index] = accepted[-1] in stop_ids or len(tokens[index]) >= requests[index].max_new_tokens
        # The prompt's own rows once; of the continuation, those of the tokens that were accepted now.
        start_ = 0 if not had[place] else first
        within = (rows.position[mine] >= start_) & (rows.position[mine] < first + len(accepted))
        keep[mine[within]] = True
    kept = select_rows(rows, keep)
    kept = _corrected(replace(kept, request=np.asarray(open_, dtype=np.int32)[kept.request]), requests, tokens)
    return Progress(
        tokens=tuple(tokens),
        ended=tuple(ended),
        mistakes=tuple(mistakes),
        rounds=progress.rounds + 1,
        rows=(*progress.rows, kept),
    )


def result(progress: Progress, stop_ids: frozenset[int], vocabulary: int) -> tuple[tuple[Generation, ...], Rows]:
    """The continuations, and the rows of prompts and continuations."""
    generations = tuple(Generation(tokens=tokens, finish=_finish(tokens, stop_ids)) for tokens in progress.tokens)
    return generations, sort_rows(concatenate(list(progress.rows), vocabulary))


def _finish(tokens: Sequence[int], stop_ids: frozenset[int]) -> Finish:
    return "eos" if tokens and tokens[-1] in stop_ids else "length"


def _proposal(request: Request, before: Sequence[int], tail: Sequence[int]) -> tuple[int, ...]:
    """What is put behind a text: as much as may still come, and one token at least, whose place is asked about."""
    room = request.max_new_tokens - len(before)
    return tuple(tail[:room]) or (request.prompt_ids[-1],)


def _accepted(choices: Sequence[int], proposed: Sequence[int], stop_ids: frozenset[int]) -> list[int]:
    """The model's choices up to and with the first that the draft did not have, or that ends the text."""
    found: list[int] = []
    for choice, guess in zip(choices, proposed, strict=True):
        found.append(choice)
        if choice != guess or choice in stop_ids:
            break
    return found


def _corrected(rows: Rows, requests: Sequence[Request], tokens: Sequence[Sequence[int]]) -> Rows:
    """Rows whose token that follows is the accepted one: behind a wrong draft that is the best, not the draft's.

    The best token's log-probability is its logit less logsumexp, which the row holds.
    """
    following = np.array(
        [
            tokens[request][position - len(requests[request].prompt_ids)]
            for request, position in zip(rows.request[rows.generated], rows.position[rows.generated], strict=True)
        ],
        dtype=np.int64,
    )
    logp = rows.logp.copy()
    generated = np.flatnonzero(rows.generated)
    best = rows.top_ids[:, 0] == following
    logp[generated[best]] = rows.top_logits[best, 0] - rows.logsumexp[generated[best]]
    return replace(rows, logp=logp)


# --- drafts --------------------------------------------------------------------------------------------


def looked_up(requests: Sequence[Request], had: Sequence[Sequence[int]], length: int = 64) -> list[list[int]]:
    """What followed the last tokens where they stood before, in prompt or text (prompt look-up): costs nothing."""
    return [
        _continued([*request.prompt_ids, *tokens], min(length, request.max_new_tokens - len(tokens)))
        for request, tokens in zip(requests, had, strict=True)
    ]


def _continued(ids: list[int], length: int) -> list[int]:
    found: list[int] = []
    whole = list(ids)
    while len(found) < length:
        place = _earlier(whole)
        if place is None:
            break
        found += whole[place : place + length - len(found)]
        whole = ids + found
    return found


def _earlier(ids: Sequence[int]) -> int | None:
    """Where the last three, two or one tokens have stood last before; the place behind them."""
    for width in (3, 2, 1):
        last = list(ids[-width:])
        for start_ in range(len(ids) - width - 1, -1, -1):
            if list(ids[start_ : start_ + width]) == last:
                return start_ + width
    return None


def said_before(answers: Mapping[tuple[int, ...], Sequence[int]]) -> Draft:
    """What a candidate has said to each prompt; where it was corrected it goes on as it did, place by place."""

    def draft(requests: Sequence[Request], had: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        return [
            answers.get(request.prompt_ids, ())[len(tokens) :] for request, tokens in zip(requests, had, strict=True)
        ]

    return draft
