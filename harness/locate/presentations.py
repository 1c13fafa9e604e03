"""How the prompts are put to a candidate while its modules are replayed: alone, padded, long, decoded, again.

A bug may be there on one path alone, so each presentation has its prefill and a few decode steps, and the positions
that are decoded lie where implementations change: the first tokens, the edges of blocks of a paged cache, the edge of
a sliding window, and behind the longest prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice
from typing import Any

from harness.values import Golden, Request

#: Tokens forced behind each prompt: two decode steps, of which the second sees what the first one stored.
_STEPS = 3
#: Slots of a block in a paged cache, as servers have by default; prompts end one token before an edge.
_BLOCK = 16
#: Tokens of the prompt that is alone, and of the longest one where no window and no table asks for more.
_ALONE, _LONGEST = 24, 96
#: Most tokens that a window or a table of positions makes the longest prompt have.
_FAR = 640


@dataclass(frozen=True, kw_only=True, slots=True)
class Presentation:
    """Prompts in one batch, decoded together.

    Attributes:
        name: as a report says it: "one prompt", "a padded batch".
        requests: the prompts.
        continuations: tokens that are forced behind each, equally many.
    """

    name: str
    requests: tuple[Request, ...]
    continuations: tuple[tuple[int, ...], ...]

    @property
    def padded(self) -> bool:
        """Whether some row has padding."""
        return len({len(one.prompt_ids) for one in self.requests}) > 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Driven:
    """How a candidate's loop cuts what it is given, so that the reference's is cut alike.

    Attributes:
        batch: rows of a batch, None for all of a presentation.
        chunk: tokens of each piece of a prompt, None for prompts in one piece.
        cached: whether there is a KV cache, and so a decode loop; without one a pass takes prompt and continuation.
    """

    batch: int | None = None
    chunk: int | None = None
    cached: bool = True


def driven_as(engine: Any) -> Driven:
    """How an engine drives its model: as its options say, row by row where it could not tell padding from tokens."""
    batch = getattr(engine.options, "batch", None)
    return Driven(
        batch=batch if "batch" in engine.capabilities else 1,
        chunk=getattr(engine.options, "chunk", None),
        cached="replay" in engine.capabilities,
    )


def presentations(texts: Sequence[Sequence[int]], config: Any) -> tuple[Presentation, ...]:
    """What a replay runs.

    Args:
        texts: token ids of some texts, which are cut and joined to the lengths that are asked.
        config: of the model: its sliding window, its original context and its longest one.
    """
    lines = sorted(texts, key=len, reverse=True)
    long = _length_of_longest(config, max(map(len, lines)))
    # The longest lines first: what is short is made of as few as can be.
    cut = [_cut(lines[index % len(lines) :] + lines[: index % len(lines)], long + _STEPS) for index in range(5)]
    short = min(_ALONE, long)
    mixed = [length for length in (_BLOCK - 1, 2 * _BLOCK - 1, 5, 3 * _BLOCK) if length < long] or [1, long]
    alone = _presented("one prompt", [cut[0]], [short])
    return (
        alone,
        _presented("one token", [cut[1]], [1]),
        _presented("a padded batch", cut[: len(mixed)], mixed),
        _presented("a long prompt", [cut[4]], [long]),
        _presented("one prompt, a second time", [cut[0]], [short]),
    )


def texts_of(golden: Golden) -> list[tuple[int, ...]]:
    """The golden's prompts, each with its continuation."""
    return [(*one.prompt_ids, *tokens) for one, tokens in zip(golden.requests, golden.continuations, strict=True)]


def _length_of_longest(config: Any, shown: int) -> int:
    """Past a sliding window, past the original context of a scaled RoPE, inside the context."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    edges = [getattr(text, "sliding_window", None), rope.get("original_max_position_embeddings")]
    if rope.get("rope_type") == "dynamic":
        edges.append(getattr(text, "max_position_embeddings", None))
    known = [edge for edge in edges if isinstance(edge, int) and 0 < edge <= _FAR]
    wanted = max([min(_LONGEST, shown), *(edge + _BLOCK // 2 for edge in known)])
    lengths = [getattr(text, key, None) for key in ("max_position_embeddings", "n_positions")]
    context = [length for length in lengths if isinstance(length, int) and length > 0]
    if not context or rope.get("rope_type") == "dynamic":
        return int(wanted)
    return max(2, min(int(wanted), context[0] - _STEPS - 1))


def _cut(lines: Sequence[Sequence[int]], length: int) -> tuple[int, ...]:
    return tuple(islice(cycle(chain.from_iterable(lines)), length))


def _presented(name: str, texts: Sequence[Sequence[int]], lengths: Sequence[int]) -> Presentation:
    return Presentation(
        name=name,
        requests=tuple(
            Request(id=f"{name} {row}", prompt_ids=tuple(text[:length]), max_new_tokens=_STEPS)
            for row, (text, length) in enumerate(zip(texts, lengths, strict=True))
        ),
        continuations=tuple(tuple(text[length : length + _STEPS]) for text, length in zip(texts, lengths, strict=True)),
    )
