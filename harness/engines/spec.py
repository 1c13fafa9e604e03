"""Parse a SPEC, ``ENGINE[:key=value,...]``; values may be quoted."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from harness.errors import UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """An engine's name and its options as text, as the user wrote them."""

    text: str
    engine: str
    options: Mapping[str, str]


def parse_spec(text: str) -> Spec:
    """Split a SPEC.

    Raises:
        UsageError: for an empty spec, a part without ``=``, an empty or a repeated key, an open quote.
    """
    engine, _, rest = text.strip().partition(":")
    if not engine:
        raise UsageError(f"the spec {text!r} names no engine", fix="Write ENGINE:key=value,..., e.g. hf:dtype=bfloat16")
    options: dict[str, str] = {}
    for part in _split(rest, text):
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"{part!r} in the spec {text!r} is not key=value", fix="Write e.g. hf:dtype=bfloat16")
        if key.strip() in options:
            raise UsageError(f"the spec {text!r} gives {key.strip()!r} twice", fix="Keep one of them")
        options[key.strip()] = value.strip()
    return Spec(text=text.strip(), engine=engine.strip(), options=options)


def _split(rest: str, text: str) -> list[str]:
    lexer = shlex.shlex(rest, posix=True)
    lexer.whitespace, lexer.whitespace_split, lexer.commenters, lexer.escape = ",", True, "", ""
    try:
        return list(lexer)
    except ValueError:
        raise UsageError(f"the spec {text!r} has an open quote", fix="Close it, e.g. hf:model='my dir'") from None


def read_options(spec: Spec, readers: Mapping[str, Callable[[str], Any]]) -> dict[str, Any]:
    """Convert the options with one reader a key; a reader raises ValueError with what it wants.

    Raises:
        UsageError: for an unknown key (the closest known one is suggested) or a refused value.
    """
    values: dict[str, Any] = {}
    for key, value in spec.options.items():
        if key not in readers:
            raise UsageError(f"the engine {spec.engine!r} has no key {key!r}", fix=suggest(key, readers))
        try:
            values[key] = readers[key](value)
        except ValueError as error:
            problem = f"{key}={value!r} is not a value of the engine {spec.engine!r}"
            raise UsageError(problem, fix=f"It takes {error}") from None
    return values


def suggest(word: str, known: Iterable[str]) -> str:
    """'Did you mean ...?' and the list of what there is."""
    choices = sorted(known)
    close = difflib.get_close_matches(word, choices, n=1)
    asked = f"Did you mean {close[0]!r}? " if close else ""
    return f"{asked}There are: {', '.join(choices)}"


def one_of(*choices: str) -> Callable[[str], str]:
    """A reader for one of a few words."""

    def read(value: str) -> str:
        if value not in choices:
            raise ValueError("one of " + ", ".join(choices))
        return value

    return read


def flag(value: str) -> bool:
    """A reader for true or false."""
    if value not in ("true", "false"):
        raise ValueError("true or false")
    return value == "true"


def positive(value: str) -> int:
    """A reader for a whole number from 1 to 2^20; larger ones are mistakes that would eat the machine."""
    if not (value.isascii() and value.isdigit() and len(value) <= 7 and 1 <= int(value) <= 2**20):
        raise ValueError("a whole number from 1 to 1048576")
    return int(value)
