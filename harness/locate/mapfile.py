"""A map of names as a JSON file, to be written, confirmed and given again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.errors import UsageError
from harness.files import replace_file
from harness.locate.naming import Made

_KEYS = {"parts": list, "dim": int, "heads": int, "piece": list, "transposed": bool}


def write_map(names: Mapping[str, Made], file: Path) -> None:
    """Write patterns of a candidate's tensors with what each is made of."""
    replace_file(file, (json.dumps({name: _plain(made) for name, made in names.items()}, indent=2) + "\n").encode())


def read_map(file: Path) -> dict[str, Made]:
    """Read what `write_map` wrote, or what was written by hand: a name alone stands for the same tensor.

    Raises:
        UsageError: for a file that is none.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return {str(name): _made(value) for name, value in values.items()}
    except OSError as error:
        raise UsageError(f"the map {file} cannot be read ({error.strerror})", fix="Check the path") from None
    except (ValueError, TypeError, AttributeError, KeyError):
        fix = 'Lines are "name": "other name", or {"parts": [...], "heads": H}; --write-map writes one'
        raise UsageError(f"the map {file} is no map of names", fix=fix) from None


def _plain(made: Made) -> Any:
    if made == Made(parts=made.parts) and len(made.parts) == 1:
        return made.parts[0]
    values = {"parts": list(made.parts), "dim": made.dim, "heads": made.heads, "transposed": made.transposed}
    return values if made.piece is None else {**values, "piece": list(made.piece)}


def _made(value: Any) -> Made:
    if isinstance(value, str):
        return Made(parts=(value,))
    if set(value) - set(_KEYS) or not all(isinstance(value[key], _KEYS[key]) for key in value):
        raise ValueError
    piece = value.get("piece")
    return Made(
        parts=tuple(map(str, value["parts"])),
        dim=value.get("dim", 0),
        heads=value.get("heads", 0),
        piece=None if piece is None else (int(piece[0]), int(piece[1])),
        transposed=value.get("transposed", False),
    )
