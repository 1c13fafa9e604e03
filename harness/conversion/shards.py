"""Write safetensors files tensor by tensor, so that no more than one of them is in memory.

The format (huggingface/safetensors, README): the length of the header in 8 bytes, little-endian; the header, JSON with
dtype, shape and place of each tensor, padded with spaces; the tensors' bytes, without holes.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Self

from harness.files import replace_file

if TYPE_CHECKING:
    from torch import Tensor

#: torch's word for a dtype to that of safetensors: those that checkpoints are trained in.
DTYPES: Mapping[str, str] = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
_ALIGNED = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """A tensor that will be written; ``dtype`` in torch's word."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * _BYTES[DTYPES[self.dtype]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One file of them."""

    file: str
    tensors: tuple[Planned, ...]

    def header(self) -> bytes:
        """The file's first bytes, up to the first tensor's."""
        document: dict[str, object] = {"__metadata__": {"format": "pt"}}  # without it transformers refuses the file
        start = 0
        for one in self.tensors:
            place = [start, start := start + one.bytes]
            document[one.name] = {"dtype": DTYPES[one.dtype], "shape": list(one.shape), "data_offsets": place}
        text = json.dumps(document, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNED)
        return struct.pack("<Q", len(text)) + text


def plan(tensors: Sequence[Planned], limit: int) -> tuple[Shard, ...]:
    """The files that hold tensors in this order: each at most ``limit`` bytes, or one tensor that is larger."""
    groups: list[list[Planned]] = []
    size = 0
    for one in tensors:
        if not groups or size + one.bytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(one)
        size += one.bytes
    if len(groups) == 1:
        return (Shard(file="model.safetensors", tensors=tuple(groups[0])),)
    return tuple(
        Shard(file=f"model-{number:05}-of-{len(groups):05}.safetensors", tensors=tuple(group))
        for number, group in enumerate(groups, start=1)
    )


class Writer:
    """Writes the shards of a plan into a directory; with several of them also the index that transformers reads.

    Used as a context manager. Tensors come in the order of the plan.
    """

    def __init__(self, directory: Path, shards: Sequence[Shard]) -> None:
        self._directory = directory
        self._shards = tuple(shards)
        self._left = [(shard, one) for shard in shards for one in shard.tensors]
        self._left.reverse()
        self._shard: Shard | None = None
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()
        if kind is None:
            assert not self._left, "the plan has more tensors"
            if len(self._shards) > 1:
                self._write_index()

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor of the plan.

        Raises:
            ValueError: for another name, shape or dtype than planned.
        """
        import torch

        shard, planned = self._left.pop()
        given = Planned(name=name, shape=tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))
        if given != planned:
            raise ValueError(f"planned {planned}, given {given}")
        if shard is not self._shard:
            self._close()
            self._shard = shard
            self._file = open(self._directory / shard.file, "xb")  # noqa: SIM115  # closed with its last tensor
            self._file.write(shard.header())
        assert self._file is not None
        self._file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def _close(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def _write_index(self) -> None:
        places = {one.name: shard.file for shard in self._shards for one in shard.tensors}
        total = sum(one.bytes for shard in self._shards for one in shard.tensors)
        document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        replace_file(self._directory / "model.safetensors.index.json", (json.dumps(document, indent=2) + "\n").encode())
