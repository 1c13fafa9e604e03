"""Read the pieces of a checkpoint one after another, each while the one before it is computed with.

A piece is what is in memory at once: a block, or a slice of the head. It is read into anonymous memory past the page
cache (O_DIRECT) where the files are larger than the cache could keep: a copy less for the cores that compute, and no
file pages that push out others. Smaller checkpoints come through the cache, so that a second pass reads no disk.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from harness.engines.streaming.files import FLOATS, Place
from harness.errors import EngineError, ModelError

if TYPE_CHECKING:
    import torch

#: O_DIRECT wants places, lengths and memory in whole sectors; 4096 is the largest in use.
_SECTOR = 4096
#: Tensors closer together than this are read in one go.
_GAP = 2**20
#: Bytes of one read: large enough for a device's full speed, small enough to be interrupted.
_CHUNK = 2**25


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Bytes of one file that are read in one go, and where they go in the buffer; all in whole sectors.

    ``needed`` are those up to the end of the last tensor: the file may end in the last sector.
    """

    file: Path
    start: int
    bytes: int
    needed: int
    into: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How a piece is read: the runs, and where in the buffer each tensor then lies."""

    runs: tuple[Run, ...]
    places: Mapping[str, tuple[Place, int]]
    bytes: int


def plan(places: Sequence[Place]) -> Plan:
    """The fewest reads that bring all of these tensors."""
    runs: list[Run] = []
    where: dict[str, tuple[Place, int]] = {}
    into = 0
    group: list[Place] = []

    def close() -> None:
        nonlocal into
        if not group:
            return
        start = group[0].start // _SECTOR * _SECTOR
        last = group[-1].start + group[-1].bytes
        end = -(-last // _SECTOR) * _SECTOR
        runs.append(Run(file=group[0].file, start=start, bytes=end - start, needed=last - start, into=into))
        where.update({one.name: (one, into + one.start - start) for one in group})
        into += end - start
        group.clear()

    for place in sorted(places, key=lambda one: (one.file, one.start)):
        last = group[-1] if group else None
        if last is not None and (last.file != place.file or place.start - (last.start + last.bytes) > _GAP):
            close()
        group.append(place)
    close()
    return Plan(runs=tuple(runs), places=where, bytes=into)


class Piece:
    """A piece that has been read. Its tensors are views of the buffer, and gone once it is released."""

    def __init__(self, planned: Plan, buffer: mmap.mmap, home: queue.Queue[mmap.mmap | None], seconds: float) -> None:
        self._planned, self._buffer, self._home = planned, buffer, home
        self.seconds = seconds
        self.bytes = sum(place.bytes for place, _ in planned.places.values())

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor in the dtype of the checkpoint, without a copy."""
        import torch

        place, at = self._planned.places[name]
        dtype = getattr(torch, FLOATS[place.dtype])
        count = place.bytes // dtype.itemsize
        if at % dtype.itemsize:
            raw = torch.frombuffer(bytearray(self._buffer[at : at + place.bytes]), dtype=dtype, count=count)
        else:
            raw = torch.frombuffer(self._buffer, dtype=dtype, count=count, offset=at)
        return raw.reshape(place.shape)

    def release(self) -> None:
        """Give the buffer back; done twice it does nothing."""
        if self._buffer is not None:
            self._home.put(self._buffer)
            del self._buffer
            self._buffer = None  # type: ignore[assignment]  # released


class Reader:
    """Reads pieces in their order in a thread of its own; a context manager, iterated once.

    Args:
        pieces: the tensors of each.
        direct: read past the page cache.
        buffers: pieces in memory at once: two, or one where they are copied as they come.
    """

    def __init__(self, pieces: Sequence[Sequence[Place]], *, direct: bool, buffers: int = 2) -> None:
        self._plans = [plan(places) for places in pieces]
        self._direct = direct
        self._free: queue.Queue[mmap.mmap | None] = queue.Queue()
        self._full: queue.Queue[Piece | Exception] = queue.Queue()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="stream reader", daemon=True)
        self._largest = max((one.bytes for one in self._plans), default=0)
        self._buffers = buffers

    def __enter__(self) -> Self:
        if self._largest:
            for _ in range(min(self._buffers, len(self._plans))):
                self._free.put(_memory(self._largest))
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._free.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def __iter__(self) -> Iterator[Piece]:
        for _ in self._plans:
            found = self._full.get()
            if isinstance(found, Exception):
                raise found
            yield found

    def _work(self) -> None:
        files: dict[Path, int] = {}
        try:
            for planned in self._plans:
                buffer = self._free.get()
                if buffer is None or self._stopped.is_set():
                    return
                started = time.perf_counter()
                for run in planned.runs:
                    if run.file not in files:
                        files[run.file] = _open(run.file, self._direct)
                    self._read(files[run.file], run, buffer)
                self._full.put(Piece(planned, buffer, self._free, time.perf_counter() - started))
        except Exception as error:  # noqa: BLE001  # whatever it is, it is raised where the piece is waited for
            self._full.put(error)
        finally:
            for handle in files.values():
                os.close(handle)

    def _read(self, handle: int, run: Run, buffer: mmap.mmap) -> None:
        view = memoryview(buffer)
        done = 0
        try:
            while done < run.needed and not self._stopped.is_set():
                size = min(_CHUNK, run.bytes - done)
                got = _some(handle, view[run.into + done : run.into + done + size], run.start + done)
                if got == 0:
                    break
                done += got
        except OSError as error:
            problem = f"{run.file} cannot be read at byte {run.start + done:,} ({error.strerror})"
            raise ModelError(problem, fix="Check the disk, or copy the file again") from error
        finally:
            view.release()
        # Not a byte less: what the buffer held before would be taken for weights.
        if done < run.needed and not self._stopped.is_set():
            problem = f"{run.file} ended at byte {run.start + done:,} while it was read"
            raise ModelError(problem, fix="It was changed meanwhile: copy it again, and run again")


def _some(handle: int, into: memoryview, start: int) -> int:
    """Bytes that were read; where a direct read is refused, all further ones of this file are through the cache.

    A file system may open a file for direct reads and then refuse them, all or those behind a short one.
    """
    try:
        return os.preadv(handle, [into], start)
    except OSError as error:
        flags = fcntl.fcntl(handle, fcntl.F_GETFL)
        if error.errno != errno.EINVAL or not flags & os.O_DIRECT:
            raise
        fcntl.fcntl(handle, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        return os.preadv(handle, [into], start)


def _memory(size: int) -> mmap.mmap:
    """Anonymous memory, in huge pages where the system has them: matrix products read it line by line."""
    try:
        # Private: shared memory has no huge pages by itself.
        buffer = mmap.mmap(-1, max(size, _SECTOR), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError, OverflowError) as error:
        problem = f"there is no memory for a piece of {size / 1e9:.1f} GB"
        raise EngineError(problem, fix="Use a machine with more, or a checkpoint in 16 bits") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer


def _open(file: Path, direct: bool) -> int:
    if direct:
        try:
            return os.open(file, os.O_RDONLY | os.O_DIRECT)
        except OSError:  # a file system in memory, or over a network, that has no direct reads
            pass
    return os.open(file, os.O_RDONLY)


def available_memory() -> int:
    """Bytes that the system could give without pushing out anything in use; 0 where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)
