"""A map of names found by content: which rows of the checkpoint a port's tensors are made of.

What is equal in one layer stands for all of them: a pattern with ``{}`` for the layer's number is kept if more tensors
speak for it than for any other, so that a tensor that is wrong gets its place from the layers in which it is right.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from harness.locate.naming import Made
from harness.locate.weights.casting import Casts
from harness.locate.weights.layouts import layout_of
from harness.locate.weights.orders import row_keys
from harness.locate.weights.pairing import Pairing, pair
from harness.locate.weights.stored import Stored, opened

if TYPE_CHECKING:
    import torch
    from torch import nn

_NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")

#: (tensor, whether it is turned over, index of the row) by the key of a row.
Place = tuple[str, bool, int]


def proposed(checkpoint: Path, model: nn.Module, *, declared: str | None = None) -> dict[str, Made]:
    """Patterns for all tensors of a model that do not go by name, to be confirmed; see `naming.Names`.

    Args:
        checkpoint: a model directory.
        model: the candidate as it is loaded.
        declared: how it says that it stores its weights, as for `audit`.

    Raises:
        ModelError: where the checkpoint cannot be read.
    """
    stored = opened(checkpoint)
    return propose(stored, pair(stored, model, None), Casts(declared=declared, config=stored.config))


def propose(stored: Stored, pairing: Pairing, casts: Casts) -> dict[str, Made]:
    """Patterns for the candidate's tensors that a pairing left out, in their order."""
    extra = {name: tensor.cpu() for name, tensor in pairing.extra.items() if tensor.device.type != "meta"}
    extra = {name: tensor for name, tensor in extra.items() if tensor.is_floating_point() and tensor.ndim in (1, 2)}
    found: dict[str, list[Made]] = {}
    for dtype in {tensor.dtype for tensor in extra.values()}:
        these = {name: tensor for name, tensor in extra.items() if tensor.dtype == dtype}
        index = _index(stored, pairing.missing, dtype, casts)
        vectors = _vectors(stored, pairing.missing, dtype, casts)
        for name, tensor in these.items():
            if tensor.ndim == 2:
                found[name] = [made for made in [_matched(stored, tensor, index)] if made is not None]
            else:
                found[name] = [Made(parts=(other,)) for other in vectors.get(row_keys(tensor[None])[0], [])]
    _biases(stored, extra, found)
    return _patterns(found)


def _index(stored: Stored, names: Sequence[str], dtype: torch.dtype, casts: Casts) -> dict[bytes, Place]:
    """Rows and columns of the matrices that no tensor of the candidate is yet; what is there twice is left out."""
    index: dict[bytes, Place] = {}
    twice: set[bytes] = set()
    for name in names:
        if len(stored.shapes[name]) != 2:
            continue
        for tensor in casts(name, stored.read(name), dtype):
            for turned, each in ((False, tensor), (True, tensor.T)):
                for number, row in enumerate(row_keys(each)):
                    place = (name, turned, number)
                    if index.setdefault(row, place) != place:
                        twice.add(row)
    return {row: place for row, place in index.items() if row not in twice}


def _vectors(stored: Stored, names: Sequence[str], dtype: torch.dtype, casts: Casts) -> dict[bytes, list[str]]:
    found: dict[bytes, list[str]] = defaultdict(list)
    for name in names:
        if len(stored.shapes[name]) == 1:
            for tensor in casts(name, stored.read(name), dtype):
                found[row_keys(tensor[None])[0]].append(name)
    return found


# --- one matrix ----------------------------------------------------------------------------------


def _matched(stored: Stored, tensor: torch.Tensor, index: Mapping[bytes, Place]) -> Made | None:
    """How a matrix is made of stored ones, all of whose rows are found; None where they are not."""
    for turned, each in ((False, tensor), (True, tensor.T)):
        places = [index.get(row) for row in row_keys(each)]
        known = [place for place in places if place is not None]
        if len(known) == len(places):
            return _made(stored, known, outer=turned)
    return None


def _made(stored: Stored, places: Sequence[Place], *, outer: bool) -> Made | None:
    """From the places of all rows, in order. The rows are those of the candidate's tensor, or its columns (outer)."""
    parts = tuple(dict.fromkeys(name for name, _, _ in places))
    inner = places[0][1]  # rows of the checkpoint's tensor, or its columns
    if any(turned != inner for _, turned, _ in places):
        return None
    dim, transposed = int(inner), outer != inner
    sizes = {name: stored.shapes[name][dim] for name in parts}
    rows = [(name, number) for name, _, number in places]
    if len(parts) == 1 and len(rows) < sizes[parts[0]]:
        return _piece(stored, parts[0], [number for _, number in rows], dim=dim, transposed=transposed)
    for heads in _head_counts(stored, parts):
        if rows == list(_joined(parts, sizes, heads)):
            return Made(parts=parts, dim=dim, heads=heads, transposed=transposed)
    return None


def _head_counts(stored: Stored, parts: Sequence[str]) -> Iterator[int]:
    yield 0
    for name in ("num_key_value_heads", "num_attention_heads", "n_head", "num_heads"):
        count = stored.config.get(name)
        if isinstance(count, int) and count > 0:
            yield count


def _joined(parts: Sequence[str], sizes: Mapping[str, int], heads: int) -> Iterator[tuple[str, int]]:
    """Rows of the parts in the order in which they are joined."""
    if not heads:
        yield from ((part, number) for part in parts for number in range(sizes[part]))
        return
    for head in range(heads):
        for part in parts:
            each = sizes[part] // heads
            yield from ((part, number) for number in range(head * each, (head + 1) * each))


def _piece(stored: Stored, name: str, numbers: list[int], *, dim: int, transposed: bool) -> Made | None:
    """A part of a fused tensor: one of so many in a row, or of each head."""
    total = stored.shapes[name][dim]
    if total % len(numbers):
        return None
    count = total // len(numbers)
    layout = layout_of(name, stored.shapes[name], stored.config)
    for heads in dict.fromkeys((0, *_head_counts(stored, [name]), *(layout.heads if layout else ()))):
        if total % (count * max(1, heads)):
            continue
        each = total // count // max(1, heads)
        for index in range(count):
            runs = (((head * count) + index) * each for head in range(max(1, heads)))
            if numbers == [start + step for start in runs for step in range(each)]:
                return Made(parts=(name,), dim=dim, heads=heads, piece=(index, count), transposed=transposed)
    return None


# --- all of them -----------------------------------------------------------------------------------


def _biases(stored: Stored, extra: Mapping[str, torch.Tensor], found: dict[str, list[Made]]) -> None:
    """A bias is made as its weight is."""
    for name in extra:
        weight = found.get(name.removesuffix("bias") + "weight", []) if name.endswith("bias") else []
        for made in weight:
            parts = tuple(part.removesuffix("weight") + "bias" for part in made.parts)
            if all(part in stored.shapes for part in parts):
                found[name] = [replace(made, parts=parts, dim=0, transposed=False)]


def _patterns(found: Mapping[str, Sequence[Made]]) -> dict[str, Made]:
    votes: dict[str, Counter[Made]] = defaultdict(Counter)
    for name, choices in found.items():
        pattern, numbers = _NUMBER.sub("{}", name), _NUMBER.findall(name)
        for made in choices:
            parts = tuple(_holed(part, numbers) for part in made.parts)
            if all(part is not None for part in parts):
                votes[pattern][replace(made, parts=tuple(part or "" for part in parts))] += 1
            else:
                votes[name][made] += 1
    return {pattern: counted.most_common(1)[0][0] for pattern, counted in votes.items() if counted}


def _holed(part: str, numbers: Sequence[str]) -> str | None:
    """The stored name with a hole where the same number stands; None where other numbers do."""
    return _NUMBER.sub("{}", part) if _NUMBER.findall(part) == list(numbers) else None
