"""Parse a SPEC, ``ENGINE[:key=value,...]`` or, for an engine with a target, ``ENGINE:TARGET[?key=value&...]``.

Values may be quoted.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from harness.errors import UsageError

#: Engines that are told by a target what to run, each with an example.
TARGETS: Mapping[str, str] = {"py": "py:my_pkg.port:build?dtype=bfloat16"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """An engine's name and its options as text, as the user wrote them; ``target`` is empty where it takes none."""

    text: str
    engine: str
    options: Mapping[str, str]
    target: str = ""


def is_port(text: str) -> bool:
    """Whether a text is the SPEC of a port rather than a directory."""
    return text.partition(":")[0].strip() == "py"


def is_streamed(text: str) -> bool:
    """Whether a text is the SPEC of a streamed model rather than a directory."""
    return text.partition(":")[0].strip() == "stream"


def parse_spec(text: str) -> Spec:
    """Split a SPEC.

    Raises:
        UsageError: for an empty spec, a part without ``=``, an empty or a repeated key, an open quote.
    """
    engine, _, rest = text.strip().partition(":")
    if not engine:
        raise UsageError(f"the spec {text!r} names no engine", fix="Write ENGINE:key=value,..., e.g. hf:dtype=bfloat16")
    engine, target, separator = engine.strip(), "", ","
    if engine in TARGETS:
        target, _, rest = rest.partition("?")
        separator = "&"
    options: dict[str, str] = {}
    for part in _split(rest, text, separator):
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            example = TARGETS.get(engine, "hf:dtype=bfloat16")
            raise UsageError(f"{part!r} in the spec {text!r} is not key=value", fix=f"Write e.g. {example}")
        if key.strip() in options:
            raise UsageError(f"the spec {text!r} gives {key.strip()!r} twice", fix="Keep one of them")
        options[key.strip()] = value.strip()
    return Spec(text=text.strip(), engine=engine, options=options, target=target.strip())


def _split(rest: str, text: str, separator: str) -> list[str]:
    lexer = shlex.shlex(rest, posix=True)
    lexer.whitespace, lexer.whitespace_split, lexer.commenters, lexer.escape = separator, True, "", ""
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


def refuse_pairs(text: str, problems: Iterable[tuple[Any, str, str]]) -> None:
    """Refuse the first of (whether it is so, what is wrong, how to fix it) that is so.

    Raises:
        UsageError: that says what in the spec ``text`` cannot be together.
    """
    for wrong, problem, fix in problems:
        if wrong:
            raise UsageError(f"{problem}, in the spec {text!r}", fix=fix)


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


def seconds(value: str) -> float:
    """A reader for a length of time, up to a day."""
    try:
        found = float(value)
    except ValueError:
        found = 0.0
    if not 0 < found <= 86_400:
        raise ValueError("a number of seconds, up to 86400")
    return found


def positive(value: str) -> int:
    """A reader for a whole number from 1 to 2^20; larger ones are mistakes that would eat the machine."""
    if not (value.isascii() and value.isdigit() and len(value) <= 7 and 1 <= int(value) <= 2**20):
        raise ValueError("a whole number from 1 to 1048576")
    return int(value)
