"""Where each tensor of a checkpoint lies in its safetensors files: headers read and checked, no tensor touched.

The format (huggingface/safetensors, README): the length of the header in 8 bytes, little-endian; the header, JSON with
dtype, shape and place of each tensor; the tensors' bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.errors import ModelError

INDEX = "model.safetensors.index.json"

#: Bytes of an element, by safetensors' word for its dtype; those that a checkpoint may hold beside its weights too.
_BYTES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
#: Those that weights are streamed from, with torch's word.
FLOATS: Mapping[str, str] = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_LARGEST_HEADER = 100 * 10**6
_RESTORE = "Copy or download it again"


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A tensor's bytes in a file; ``dtype`` is safetensors' word."""

    name: str
    file: Path
    start: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * _BYTES[self.dtype]

    def rows(self, start: int, stop: int) -> Place:
        """Rows ``start`` to ``stop`` of its first dimension, which lie together."""
        each = self.bytes // max(1, self.shape[0])
        return replace(self, start=self.start + start * each, shape=(stop - start, *self.shape[1:]))


def survey(directory: Path) -> dict[str, Place]:
    """Where every tensor of a model directory lies.

    Raises:
        ModelError: for no files, a damaged header, a file that is shorter or longer than its header says, a tensor
            that two files hold, or an index that names a file or a tensor which is not there.
    """
    index = _index(directory)
    found: dict[str, Place] = {}
    for path in sorted(directory.glob("*.safetensors")):
        for name, place in _header(path).items():
            if name in found:
                raise ModelError(f"{path} repeats the tensor {name}", fix="Remove stale shards from the directory")
            found[name] = place
    for name, file in index.items():
        if name not in found or found[name].file.name != file:
            raise ModelError(f"{directory / INDEX} places {name} in {file}, which does not hold it", fix=_RESTORE)
    if not found:
        raise ModelError(
            f"{directory} holds no .safetensors file",
            fix="Give a directory written by save_pretrained; pickled .bin weights are never loaded",
        )
    return found


def _index(directory: Path) -> dict[str, str]:
    """Tensor -> file as the index says, once every file that it names is there; empty without an index."""
    path = directory / INDEX
    if not path.is_file():
        return {}
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        named = {str(name): str(file) for name, file in places.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path} is not an index of safetensors files ({error})", fix=_RESTORE) from None
    missing = sorted({file for file in named.values() if not (directory / file).is_file()})
    if missing:
        raise ModelError(
            f"{len(missing)} of {len(set(named.values()))} shards that {path} names are not there, e.g. {missing[0]}",
            fix="Download the missing files",
        )
    return named


def _header(path: Path) -> dict[str, Place]:
    size = path.stat().st_size
    with path.open("rb") as opened:
        head = opened.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(size - 8, _LARGEST_HEADER):
            raise ModelError(f"{path} is not a safetensors file, or is truncated ({size:,} bytes)", fix=_RESTORE)
        text = opened.read(length)
    try:
        document = json.loads(text)
        places = {
            name: _place(path, name, words, 8 + length) for name, words in document.items() if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"the header of {path} cannot be read ({error})", fix=_RESTORE) from None
    end = max((place.start + place.bytes for place in places.values()), default=8 + length)
    if end != size:
        word = "truncated" if size < end else "longer than its header says"
        raise ModelError(f"{path} is {word}: {size:,} bytes, and its tensors end at {end:,}", fix=_RESTORE)
    return places


def _place(path: Path, name: str, words: Any, base: int) -> Place:
    start, end = words["data_offsets"]
    shape = words["shape"]
    if not all(type(one) is int and one >= 0 for one in (start, end, *shape)):
        raise ValueError(f"{name} has a place or a shape that is no whole number")
    place = Place(name=name, file=path, start=base + start, dtype=words["dtype"], shape=tuple(shape))
    if place.dtype not in _BYTES or place.bytes != end - start:
        raise ValueError(f"{name} is {words['dtype']}{shape} in {end - start} bytes")
    return place


def signature(places: Mapping[str, Place]) -> str:
    """That of checkpoint.identify, over names and shapes."""
    shapes = hashlib.sha256()
    for name in sorted(places):
        shapes.update(f"{name} {places[name].shape}\n".encode())
    return shapes.hexdigest()


def stamp(places: Mapping[str, Place]) -> str:
    """Digest of what tells without reading a tensor that a checkpoint is still the same: layout, sizes, times."""
    words = [[one.name, one.file.name, one.start, one.dtype, list(one.shape)] for _, one in sorted(places.items())]
    files = {place.file for place in places.values()}
    times = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    return hashlib.sha256(json.dumps([words, times]).encode()).hexdigest()


def native_dtype(places: Mapping[str, Place]) -> str:
    """The dtype of most elements, in torch's word.

    Raises:
        ModelError: where that is none to compute in.
    """
    sizes: dict[str, int] = {}
    for place in places.values():
        sizes[place.dtype] = sizes.get(place.dtype, 0) + math.prod(place.shape)
    most = max(sizes, key=lambda dtype: (sizes[dtype], dtype))
    if most not in FLOATS:
        raise ModelError(f"the checkpoint's weights are {most}", fix="Stream one in float32, bfloat16 or float16")
    return FLOATS[most]
