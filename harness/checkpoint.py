"""Identify a checkpoint by its tensors: a content digest and a shape signature, whatever the files and shards."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.errors import ModelError

#: Elements of a tensor that are hashed at a time.
_ELEMENTS = 2**24


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """``digest`` covers (name, shape, native dtype, bytes), ``signature`` names and shapes alone; ``dtype`` is
    the one of most elements. All hex SHA-256 or torch's dtype word."""

    digest: str
    signature: str
    dtype: str
    parameters: int


def identify(directory: Path) -> Identity:
    """Read every tensor of a model directory's safetensors files, one at a time.

    Raises:
        ModelError: where there are none, or a file is damaged.
    """
    content, shapes, sizes = hashlib.sha256(), hashlib.sha256(), dict[str, int]()
    for name, path in sorted(tensor_files(directory)):
        shape, dtype, count, bytes_digest = _tensor(path, name)
        shapes.update(f"{name} {shape}\n".encode())
        content.update(f"{name} {shape} {dtype}\n".encode() + bytes_digest)
        sizes[dtype] = sizes.get(dtype, 0) + count
    if not sizes:
        raise ModelError(f"{directory} holds no tensor", fix="Give a directory written by save_pretrained")
    native = max(sizes, key=lambda dtype: (sizes[dtype], dtype))
    return Identity(
        digest=content.hexdigest(), signature=shapes.hexdigest(), dtype=native, parameters=sum(sizes.values())
    )


def tensor_files(directory: Path) -> Iterator[tuple[str, Path]]:
    """Each tensor's name, and the file that holds it.

    Raises:
        ModelError: where there are none, a file is damaged, or two hold the same.
    """
    from safetensors import SafetensorError, safe_open

    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"{directory} holds no .safetensors file",
            fix="Give a directory written by save_pretrained; pickled .bin weights are never loaded",
        )
    seen: set[str] = set()
    for path in files:
        try:
            with safe_open(path, framework="pt") as opened:
                names = list(opened.keys())
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{path} is not a readable safetensors file ({error})", fix="Copy or download it again"
            ) from None
        for name in names:
            if name in seen:
                raise ModelError(f"{path} repeats the tensor {name}", fix="Remove stale shards from the directory")
            seen.add(name)
            yield name, path


def _tensor(path: Path, name: str) -> tuple[tuple[int, ...], str, int, bytes]:
    """Shape, dtype, elements and SHA-256 of a tensor's bytes, of which few are in memory at once."""
    import torch
    from safetensors import SafetensorError, safe_open

    content, dtype = hashlib.sha256(), ""
    try:
        with safe_open(path, framework="pt") as opened:
            shape = tuple(opened.get_slice(name).get_shape())
        for rows in _cuts(shape):
            # Opened anew: what was read of a mapped file stays in memory for as long as it is mapped.
            with safe_open(path, framework="pt") as opened:
                piece = opened.get_tensor(name) if rows is None else opened.get_slice(name)[rows]
            dtype = str(piece.dtype).removeprefix("torch.")
            if piece.numel():
                content.update(piece.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            del piece
    except (SafetensorError, TypeError, RuntimeError) as error:  # a dtype or a shape that torch does not have
        problem = f"the tensor {name} of {path} cannot be read ({str(error).splitlines()[0]})"
        raise ModelError(problem, fix="Write it in a dtype that this torch has") from None
    return shape, dtype, math.prod(shape), content.digest()


def _cuts(shape: tuple[int, ...]) -> list[slice | None]:
    """Some rows of a large tensor at a time; None for the whole of another."""
    if math.prod(shape) <= _ELEMENTS or not shape:
        return [None]
    rows = max(1, _ELEMENTS * shape[0] // math.prod(shape))
    return [slice(start, start + rows) for start in range(0, shape[0], rows)]
