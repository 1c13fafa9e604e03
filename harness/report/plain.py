"""A verdict as one line of text and back, exactly: workers of pytest-xdist send theirs to the process that reports.

Unlike the published JSON (harness/report/json.py) nothing is rounded or renamed, and NaN stays NaN. The way back is
read off the type hints of harness/values.py, so that a new field needs no line here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from harness.values import Verdict


def pack(verdict: Verdict) -> str:
    """The verdict as one line of ASCII; what ``settings`` holds beyond JSON's types becomes a list or text."""
    return json.dumps(_plain(verdict))


def unpack(text: str) -> Verdict:
    """The verdict that `pack` was given."""
    verdict: Verdict = _built(Verdict, json.loads(text))
    return verdict


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {one.name: _plain(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return str(value)


def _built(hint: Any, value: Any) -> Any:
    """``value`` as what ``hint`` says; the hints of a verdict are dataclasses, enums, tuples and plain values."""
    arguments = get_args(hint)
    if value is None:
        return None
    if isinstance(hint, UnionType):
        return _built(next(one for one in arguments if one is not NoneType), value)
    if get_origin(hint) is tuple:
        hints = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(_built(*pair) for pair in zip(hints, value, strict=True))
    if isinstance(hint, type) and is_dataclass(hint):
        hints_of = get_type_hints(hint)
        return hint(**{name: _built(hints_of[name], item) for name, item in value.items()})
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint(value)
    return value
