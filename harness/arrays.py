"""A golden's arrays as safetensors files: one, or shards above a size, each known by the SHA-256 in golden.json.

The index of the shards stands in golden.json, whose digest covers it. An array of several shards is their rows, in the
order of the shards. New files are staged under names of their own until golden.json names them.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.files import replace_file, sync

ARRAYS_NAME = "golden.safetensors"
#: Bytes of arrays in one file. Goldens are committed, and GitHub refuses files above 100 MB and warns from 50 MB on
#: (docs.github.com, "About large files on GitHub"); below both, with room for a header.
SHARD_BYTES = 48 * 10**6

_NAME = re.compile(r"golden(-\d{5}-of-\d{5})?\.safetensors(\.[0-9a-f]{16})?")

Part = Mapping[str, NDArray[Any]]


def is_arrays(name: str) -> bool:
    """Whether a file has a name that a golden's arrays have, staged or not."""
    return _NAME.fullmatch(name) is not None


def names(declared: Any) -> tuple[str, ...]:
    """Plain names of the files that golden.json declares; none where it declares nothing sensible."""
    count = len(_entries(declared))
    return tuple(_name(index, count) for index in range(count))


def _name(index: int, count: int) -> str:
    """As transformers names its shards; never what a file says of itself."""
    return ARRAYS_NAME if count == 1 else f"golden-{index + 1:05}-of-{count:05}.safetensors"


def _staged(name: str, digest: str) -> str:
    return f"{name}.{digest[:16]}"


def _entries(declared: Any) -> list[Mapping[str, Any]]:
    """What golden.json declares of each file; empty for what is no such declaration."""
    if not isinstance(declared, dict):
        return []
    entries = declared.get("shards", [declared])
    if not isinstance(entries, list) or not all(isinstance(one, dict) for one in entries):
        return []
    return entries if all(isinstance(one.get("sha256"), str) for one in entries) else []


# --- writing -----------------------------------------------------------------------------------


def stage(directory: Path, arrays: Part) -> dict[str, Any]:
    """Write arrays under names that no golden has yet; what golden.json is to declare of them."""
    from safetensors.numpy import save

    parts = list(_parts(arrays))
    entries = []
    for index, part in enumerate(parts):
        payload = save(dict(part))
        name, digest = _name(index, len(parts)), hashlib.sha256(payload).hexdigest()
        replace_file(directory / _staged(name, digest), payload)
        entries.append({"file": name, "sha256": digest, "bytes": len(payload)})
    return entries[0] if len(entries) == 1 else {"shards": entries}


def settle(directory: Path, declared: Mapping[str, Any]) -> None:
    """Once golden.json declares them, give staged files their plain names, and remove those of other goldens."""
    current = dict(zip(names(declared), _entries(declared), strict=True))
    for name, entry in current.items():
        os.replace(directory / _staged(name, entry["sha256"]), directory / name)
    sync(directory)
    for path in list(directory.iterdir()):
        if is_arrays(path.name) and path.name not in current:
            path.unlink(missing_ok=True)


def _parts(arrays: Part) -> Iterator[Part]:
    """The arrays as they are where they fit one file, else cut so that each part does; in the order of their names."""
    if sum(array.nbytes for array in arrays.values()) <= SHARD_BYTES:
        yield arrays
        return
    part: dict[str, NDArray[Any]] = {}
    size = 0
    for name, array in sorted(arrays.items()):
        for rows in _cuts(array):
            if part and (name in part or size + rows.nbytes > SHARD_BYTES):
                yield part
                part, size = {}, 0
            part[name] = rows
            size += rows.nbytes
    yield part


def _cuts(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Rows of an array, as many as one file holds; one row at least."""
    if array.nbytes <= SHARD_BYTES or array.ndim == 0:
        yield array
        return
    rows = max(1, SHARD_BYTES * len(array) // array.nbytes)
    for start in range(0, len(array), rows):
        yield np.ascontiguousarray(array[start : start + rows])


# --- reading -----------------------------------------------------------------------------------


def read(directory: Path, declared: Any) -> dict[str, NDArray[Any]]:
    """The arrays that golden.json declares; none is used before its file's digest is right.

    Raises:
        ValueError: in words that name the file.
    """
    entries = _entries(declared)
    if not entries:
        raise ValueError(f"{directory / 'golden.json'} does not name its arrays")
    found: dict[str, list[NDArray[Any]]] = {}
    for name, entry in zip(names(declared), entries, strict=True):
        for key, array in _loaded(directory, name, entry).items():
            found.setdefault(key, []).append(array)
    return {key: _joined(directory, key, pieces) for key, pieces in found.items()}


def _joined(directory: Path, name: str, pieces: Sequence[NDArray[Any]]) -> NDArray[Any]:
    if len(pieces) == 1:
        return pieces[0]
    if len({(one.dtype, one.shape[1:], one.ndim > 0) for one in pieces}) > 1 or not pieces[0].ndim:
        raise ValueError(f"the shards of {directory} hold pieces of {name} that do not go together")
    return np.concatenate(pieces)


def _loaded(directory: Path, name: str, entry: Mapping[str, Any]) -> Part:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    payload = _matching_file(directory, name, entry["sha256"], entry.get("bytes"))
    try:
        return load(payload)
    except (SafetensorError, ValueError, KeyError, MemoryError) as error:
        problem = f"{directory / name} cannot be read as safetensors ({type(error).__name__}: {error})"
        raise ValueError(problem) from None


def _matching_file(directory: Path, plain: str, digest: str, size: Any) -> bytes:
    problem = f"{directory / plain} is missing"
    for name in (plain, _staged(plain, digest)):
        path = directory / name
        if path.is_file():
            # A file of another size is not read at all: it may be larger than memory.
            payload = path.read_bytes() if path.stat().st_size == size else None
            if payload is not None and hashlib.sha256(payload).hexdigest() == digest:
                return payload
            problem = f"{path} {_looks_like(path)}"
    raise ValueError(problem)


def _looks_like(path: Path) -> str:
    """What a file with the wrong digest seems to be."""
    size = path.stat().st_size
    with path.open("rb") as opened:
        head = opened.read(8)
    if head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return "is a pickle or a zip archive, which is never opened"
    if size < 8:
        return "is truncated"
    if int.from_bytes(head, "little") > size - 8:
        return "is truncated, or its header is larger than the file"
    return "is damaged: its SHA-256 is not the one in golden.json"
