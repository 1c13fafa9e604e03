"""Seconds and memory of a batch on an open engine, the first forward apart from the later ones."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from harness.engines.base import Engine
from harness.errors import EngineError
from harness.speed.shapes import requests_of
from harness.values import Request


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One run of a shape.

    Attributes:
        prefill: seconds until every row has its first token.
        step: seconds of each later token of the batch.
        memory: bytes at the highest, of this process and all that it started, or on the accelerator where one is used;
            0 where the system does not tell.
    """

    prefill: float
    step: float
    memory: int


def sample(engine: Engine, prompts: Sequence[Sequence[int]], new: int, *, repeats: int) -> Sample:
    """Run a batch for one token and for ``new``; what the latter takes longer is decoding.

    Any engine that continues prompts can be timed so, whatever happens inside. The first token is taken ``repeats``
    times, and the median counts: it may last a few milliseconds.

    Args:
        engine: open.
        prompts: token ids of each row.
        new: tokens to add, two at least.
        repeats: of the first token.

    Raises:
        EngineError: while a profiler is on, or when fewer tokens come back than were asked for.
    """
    _refuse_profiler()
    memory = Peak()
    first = statistics.median(_seconds(engine, prompts, 1) for _ in range(repeats))
    whole = _seconds(engine, prompts, new)
    return Sample(prefill=first, step=max(0.0, whole - first) / (new - 1), memory=memory.bytes())


def _seconds(engine: Engine, prompts: Sequence[Sequence[int]], new: int) -> float:
    requests = requests_of(prompts, new)
    _synchronise()
    start = time.perf_counter()
    complete(engine, requests)
    _synchronise()
    return time.perf_counter() - start


def complete(engine: Engine, requests: Sequence[Request]) -> None:
    """Continue some rows at once. Their tokens are back on the host, so nothing of them is still to be done.

    Raises:
        EngineError: when fewer tokens come back than were asked for.
    """
    found = engine.generate(requests, batch_size=len(requests), stop_ids=frozenset())
    told, asked = [len(one.tokens) for one in found], [one.max_new_tokens for one in requests]
    if told != asked:
        problem = f"{engine.spec} was asked for {sum(asked)} tokens on {len(requests)} prompts, and gave {sum(told)}"
        raise EngineError(problem, fix="Let it go on to max_new_tokens where stop_ids is empty")


def _synchronise() -> None:
    """Wait for what an accelerator still has to do; nothing where none is in use."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _refuse_profiler() -> None:
    import torch

    if torch._C._autograd._profiler_enabled():
        raise EngineError("a torch profiler is on, and slows what is timed", fix="Stop it before the speed is measured")


class Peak:
    """The most memory that is in use from now on."""

    def __init__(self) -> None:
        import torch

        self._on_device = torch.cuda.is_available() and torch.cuda.is_initialized()
        if self._on_device:
            torch.cuda.reset_peak_memory_stats()
            return
        for process in _family():
            # Linux: 5 sets the highest resident size back to the present one (proc_pid_clear_refs(5)).
            with suppress(OSError):
                Path(f"/proc/{process}/clear_refs").write_text("5", encoding="ascii")

    def bytes(self) -> int:
        """So far."""
        import torch

        if self._on_device:
            return int(torch.cuda.max_memory_allocated())
        return sum(_highest(process) for process in _family())


def _family() -> list[int]:
    """This process and all that it started: the ranks of an engine hold the model."""
    import psutil

    own = psutil.Process()
    with suppress(psutil.Error):
        return [own.pid, *(child.pid for child in own.children(recursive=True))]
    return [own.pid]


def _highest(process: int) -> int:
    with suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return 0
