"""Read what a candidate said from a file of JSON lines: token ids, or text, of any program that can write them.

    {"id": "story-en", "prompt_ids": [17, 4, 9], "tokens": [23, 5]}
    {"id": "story-fr", "prompt": "Le matin", "text": " le chat dort"}

Text is turned into ids by the reference's tokenizer, prompt and continuation together: ids are surer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import suites
from harness.errors import TraceError, UsageError
from harness.values import Generation, Pass, Request, Suite, Trace

#: The vocabulary of a candidate that shows tokens alone.
UNKNOWN = 2**31 - 1

_LARGEST = 256 * 2**20
_EXAMPLE = '{"id": "a", "prompt_ids": [17, 4], "tokens": [23, 5]}'


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A prompt and its continuation, as ids."""

    id: str
    prompt_ids: tuple[int, ...]
    tokens: tuple[int, ...]


def read_answers(path: Path, tokenizer: Any) -> list[Answer]:
    """The answers of a file, one a line.

    Args:
        path: the file.
        tokenizer: the reference's, None where it has none.

    Raises:
        TraceError: for a file that is missing or too large, or a line that cannot be used, which is named.
    """
    if not path.is_file() or path.stat().st_size > _LARGEST:
        raise TraceError(f"{path} is no file of answers", fix=f"Give JSON lines such as {_EXAMPLE}")
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                found.append(_answer(json.loads(line), str(number), tokenizer))
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                problem = f"line {number} of {path} cannot be used ({type(error).__name__}: {error})"
                raise TraceError(problem, fix=f"Write e.g. {_EXAMPLE}") from None
    if not found or len({one.id for one in found}) != len(found):
        raise TraceError(f"{path} holds no answer, or an id twice", fix=f"Write e.g. {_EXAMPLE}")
    return found


def _answer(words: dict[str, Any], number: str, tokenizer: Any) -> Answer:
    if "tokens" in words:
        prompt, tokens = words["prompt_ids"], words["tokens"]
    else:
        prompt, tokens = _encoded(words["prompt"], words["text"], tokenizer)
    for ids in (prompt, tokens):
        if not isinstance(ids, list) or not ids or not all(type(one) is int and 0 <= one < 2**31 for one in ids):
            raise ValueError("ids must be a list of whole numbers, and some")
    return Answer(id=str(words.get("id", number)), prompt_ids=tuple(prompt), tokens=tuple(tokens))


def _encoded(prompt: Any, text: Any, tokenizer: Any) -> tuple[list[int], list[int]]:
    if tokenizer is None:
        raise ValueError("the reference has no tokenizer to read text with")
    if not isinstance(prompt, str) or not isinstance(text, str):
        raise TypeError("prompt and text must be text")
    before = [int(one) for one in tokenizer(prompt)["input_ids"]]
    whole = [int(one) for one in tokenizer(prompt + text)["input_ids"]]
    if whole[: len(before)] != before:
        raise ValueError("a token spans the end of the prompt: give ids")
    return before, whole[len(before) :]


def suite_of(answers: Sequence[Answer], name: str) -> Suite:
    """The work that these are answers to: each prompt as ids, continued by as many tokens as there are."""
    return suites.suite_from_dict(
        {
            "name": name,
            "description": "what a file of answers holds",
            "stop": "ignore-eos",
            "add_special_tokens": False,
            "max_new_tokens": max(len(one.tokens) for one in answers),
            "prompts": [
                {"id": one.id, "ids": list(one.prompt_ids), "max_new_tokens": len(one.tokens)} for one in answers
            ],
            "runs": [{"name": "given", "views": ["generate"], "quick": True}],
        },
        where=name,
    )


def trace_of(answers: Sequence[Answer], requests: Sequence[Request], suite: Suite, *, name: str, dtype: str) -> Trace:
    """The answers as the trace of a free run.

    Raises:
        UsageError: where these are not the answers to the requests.
    """
    if [one.prompt_ids for one in answers] != [one.prompt_ids for one in requests]:
        raise UsageError(f"{name} answers other prompts", fix="Give the answers to these, in their order")
    given = Pass(
        run="given",
        view="generate",
        requests=tuple(range(len(answers))),
        generations=tuple(Generation(tokens=one.tokens, finish="length") for one in answers),
    )
    return Trace(
        engine=name,
        declared={},
        settings={"dtype": dtype},
        capabilities=frozenset({"tokens"}),
        vocabulary=UNKNOWN,
        suite_digest=suite.digest,
        prompt_ids=None,
        passes=(given,),
        limits=("settings: a file of answers shows none",),
    )
