"""What is timed: batches of prompts of one length, and how many tokens are added to each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

from harness.errors import UsageError
from harness.values import Golden, Request


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """One batch.

    Attributes:
        batch: prompts at once.
        prompt: tokens of each.
        new: tokens that are added to each, two at least: the first comes with the prompt, the later ones are decoding.
    """

    batch: int
    prompt: int
    new: int

    def __str__(self) -> str:
        return f"batch {self.batch}"


def shapes(batches: Sequence[int], *, prompt: int, new: int) -> tuple[Shape, ...]:
    """A shape for each batch size.

    Raises:
        UsageError: for a size that cannot be run.
    """
    if new < 2:
        raise UsageError(f"{new} new tokens leave no step of decoding to be timed", fix="Ask for 2 or more")
    if prompt < 1 or not batches or min(batches) < 1:
        raise UsageError("a batch needs a prompt, and a prompt a token", fix="Give whole numbers from 1 on")
    return tuple(Shape(batch=batch, prompt=prompt, new=new) for batch in dict.fromkeys(batches))


def refuse_too_long(prompt: int, new: int, context: int | None, *, fix: str) -> None:
    """Refuse what does not fit a model's context; None is a context that is not known.

    Raises:
        UsageError: that says how long the context is.
    """
    if context is not None and prompt + new > context:
        problem = f"{prompt} prompt tokens and {new} new ones do not fit the model's context of {context} tokens"
        raise UsageError(problem, fix=fix)


def prompts_of(golden: Golden, shape: Shape) -> tuple[tuple[int, ...], ...]:
    """Token ids of a shape's prompts, cut one after another from the golden's own: what a model meets, not noise."""
    stream = cycle(token for request in golden.requests for token in request.prompt_ids)
    return tuple(tuple(islice(stream, shape.prompt)) for _ in range(shape.batch))


def requests_of(prompts: Sequence[Sequence[int]], new: int) -> list[Request]:
    """The prompts as requests for so many tokens each."""
    return [
        Request(id=f"timed-{number}", prompt_ids=tuple(ids), max_new_tokens=new) for number, ids in enumerate(prompts)
    ]
