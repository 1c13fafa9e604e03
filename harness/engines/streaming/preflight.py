"""Before hours are spent: will memory and disk do, and how long will it take?"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.engines.streaming import reading
from harness.engines.streaming.files import FLOATS, Place
from harness.errors import EngineError, UsageError

if TYPE_CHECKING:
    from harness.engines.streaming.grouping import Group
    from harness.engines.streaming.passes import Settings
    from harness.engines.streaming.skeleton import Skeleton

#: Bytes that are read to see how fast the disk is.
_PROBE = 2**27
#: Rows and width of the product that shows how fast the machine multiplies.
_ROWS, _WIDTH = 512, 4096
#: Below this a pass is over before it could be timed.
_SMALL = 2**30
#: Of passes.PART_BYTES.
_PART_BYTES = 2**29
#: Bytes of a block from which its layers are widened one by one: again for every group, but one at a time.
LARGE_BLOCK = 2**30
_SIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What a pass will need: bytes to read, operations, peak memory and disk; seconds of each, 0 where too small."""

    read: int
    operations: float
    memory: int
    disk: int
    read_seconds: float
    compute_seconds: float

    @property
    def seconds(self) -> float:
        """Read and computed at the same time: the slower one."""
        return max(self.read_seconds, self.compute_seconds)

    def __str__(self) -> str:
        took = f"; about {_duration(self.seconds)} here" if self.seconds else ""
        disk = f", {self.disk / 1e9:.2f} GB of disk" if self.disk else ""
        return f"one pass reads {self.read / 1e9:.2f} GB with {self.memory / 1e9:.2f} GB of memory{disk}{took}"


def check(skeleton: Skeleton, settings: Settings, groups: Sequence[Group], variants: int) -> Estimate:
    """What the pass will need, once it is sure that it is there.

    Raises:
        EngineError: for too little memory.
        UsageError: for too little disk, or a directory that cannot be written.
    """
    blocks = skeleton.block_places()
    head, _ = skeleton.head_places
    largest = max(sum(place.bytes for place in block) for block in blocks)
    size = _SIZES[settings.dtype]
    widened = max(_elements(block) for block in blocks) * size
    tokens = sum(group.ids_BT.size for group in groups)
    hidden = tokens * skeleton.embedding_place.shape[1] * size * variants
    # Two buffers, and beside them a block where only some of its tensors are used as they were read.
    kept = 2 * largest if all(_is_loaded_as_stored(block, settings) for block in blocks) else 2 * largest + widened
    weights = largest + widened if settings.copies else kept
    if settings.late:
        layer = max(_elements([place]) for block in blocks for place in block) * size
        weights = 2 * largest + _PART_BYTES + (layer if variants > 1 else 0)
    memory = weights + min(hidden, settings.budget) + _activations(skeleton, groups, size)
    disk = 2 * hidden if settings.directory is not None or hidden > settings.budget else 0
    free = reading.available_memory()
    if free and memory * settings.beside > free:
        several = "a pass needs" if settings.beside == 1 else f"each of {settings.beside} passes on this machine needs"
        raise EngineError(
            f"{several} {memory / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free",
            fix="Free some, give fewer prompts, a smaller hidden_gb, or the dtype of the checkpoint",
        )
    if disk:
        _refuse_small_disk(settings.directory, disk)
    read = sum(place.bytes for block in blocks for place in block) + head.bytes
    operations = 2.0 * tokens * variants * sum(map(_elements, blocks)) + 2.0 * head.shape[0] * head.shape[1] * tokens
    timed = read > _SMALL
    return Estimate(
        read=read,
        operations=operations,
        memory=memory,
        disk=disk,
        read_seconds=read / read_speed(_largest_file(blocks), settings.direct) if timed else 0.0,
        compute_seconds=operations / multiply_speed(settings.dtype) if timed else 0.0,
    )


def _is_loaded_as_stored(block: Sequence[Place], settings: Settings) -> bool:
    return all(FLOATS.get(place.dtype, settings.load) == settings.load for place in block)


def is_large(skeleton: Skeleton, dtype: str) -> bool:
    """Whether a block in this dtype is so large that no more of it than one layer should be there."""
    return max(map(_elements, skeleton.block_places())) * _SIZES[dtype] > LARGE_BLOCK


def reads_directly(places: Mapping[str, Place]) -> bool:
    """Whether the files are larger than what the page cache could keep of them beside all else."""
    return sum(place.bytes for place in places.values()) > reading.available_memory() / 2


def _elements(places: Iterable[Place]) -> int:
    return sum(math.prod(place.shape) for place in places)


def _activations(skeleton: Skeleton, groups: Sequence[Group], size: int) -> int:
    """The widest that a block holds of one group: some copies of its widest layer's output."""
    config = skeleton.model.config.get_text_config()
    width = skeleton.embedding_place.shape[1]
    inner = int(getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * width)
    return max(group.ids_BT.size for group in groups) * inner * size * 4


def _largest_file(blocks: Sequence[Sequence[Place]]) -> Place:
    return max((place for block in blocks for place in block), key=lambda one: one.bytes)


def _refuse_small_disk(directory: Path | None, disk: int) -> None:
    place = directory if directory is not None else Path(tempfile.gettempdir())
    try:
        place.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(place).free
    except OSError as error:
        problem = f"{place} cannot be written ({error.strerror})"
        raise UsageError(problem, fix="Name another directory with work=") from None
    if disk > free:
        problem = f"hidden states need {disk / 1e9:.2f} GB in {place}, and {free / 1e9:.2f} GB are free there"
        raise UsageError(problem, fix="Free some, name another directory with work=, or give fewer prompts")


def read_speed(place: Place, direct: bool) -> float:
    """Bytes a second of the checkpoint's disk, measured on the first of a tensor's bytes."""
    start = place.start // 4096 * 4096
    part = Place(name="", file=place.file, start=start, dtype="U8", shape=(min(_PROBE, place.bytes),))
    begun = time.perf_counter()
    with reading.Reader([[part]], direct=direct, buffers=1) as reader:
        for piece in reader:
            piece.release()
    return part.bytes / max(time.perf_counter() - begun, 1e-9)


def multiply_speed(dtype: str) -> float:
    """Operations a second of a matrix product in a dtype, measured."""
    import torch

    wide = getattr(torch, dtype)
    a, b = torch.ones((_ROWS, _WIDTH), dtype=wide), torch.ones((_WIDTH, _WIDTH), dtype=wide)
    best = float("inf")
    for _ in range(3):
        begun = time.perf_counter()
        torch.nn.functional.linear(a, b)
        best = min(best, time.perf_counter() - begun)
    return 2.0 * _ROWS * _WIDTH * _WIDTH / best


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
