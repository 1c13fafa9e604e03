"""What the process of one side does: judges its candidate, opens it, times it.

Requests and answers are plain values: the other end may be another version of this file.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from harness.engines.base import Engine
from harness.errors import EngineError
from harness.speed import processors

#: What every engine needs; a round need not wait for it.
LIBRARIES = ("torch", "numpy", "safetensors", "tokenizers", "transformers", "harness")
_PARTS = ("transformers.modeling_utils", "transformers.models.auto.modeling_auto", "harness.engines")


class Server:
    """One side's process; made by engines/ranks/worker.py.

    Args:
        rank: its number, of which nothing depends.
        store: of ranks, and not needed.
        pulse: called with a few words whenever it has got somewhere.
    """

    @staticmethod
    def prepare() -> None:
        """What is done once for all lives of the process: nothing that starts a thread, which no fork would have."""
        for name in (*LIBRARIES, *_PARTS):
            importlib.import_module(name)

    def __init__(self, rank: int, store: Callable[..., Any], pulse: Callable[[str], None]) -> None:
        del rank, store
        self._pulse = pulse
        self._stack = ExitStack()
        self._engine: Engine | None = None
        self._model: str | None = None

    def answer(self, request: str, *arguments: Any) -> Any:
        """Do one request; the names are those of the methods below."""
        asked: dict[str, Callable[..., Any]] = {
            "place": self.place, "check": self.check, "open": self.open, "sample": self.sample, "close": self.close,
            "roofline": self.roofline, "measure": self.measure,
        }  # fmt: skip
        return asked[request](*arguments)

    def place(self, path: Sequence[str], directory: str) -> None:
        """Look for code of the user's in another place, and run there."""
        os.chdir(directory)
        sys.path[:] = path
        importlib.invalidate_caches()

    def check(self, golden: str, spec: str, reference: str | None, quick: bool) -> dict[str, Any]:
        """The verdict on a candidate: status, whether it is ok, exit code, text, and all of it as JSON has it."""
        from harness import flow
        from harness.report.terminal import verdict_to_text

        verdict = flow.check(golden, spec, reference=reference, quick=quick, progress=self._pulse)
        return {
            "status": verdict.status.value,
            "ok": verdict.ok,
            "exit_code": verdict.status.exit_code,
            "text": verdict_to_text(verdict),
            "data": verdict.to_dict(),
        }

    def open(self, spec: str, model: str | None, processors_: Sequence[int] | None = None) -> dict[str, Any]:
        """Open the engine, on some processors alone where they are named; shows its settings."""
        from harness.engines import build_engine

        self.close()
        if processors_ is not None:
            # Before the engine has threads or processes: those get theirs from this one.
            processors.use(processors_)
        engine = build_engine(spec, model=model)
        engine.progress = self._pulse
        self._engine, self._model = self._stack.enter_context(engine), model
        shown = engine.settings
        told = {key: shown.get(key) for key in ("dtype", "device", "threads", "parameters")}
        return {**told, "processors": processors.needed(told["threads"])}

    def sample(self, prompts: Sequence[Sequence[int]], new: int, repeats: int) -> dict[str, float]:
        """One run of a shape, as clock.Sample."""
        from harness.speed import clock

        # What others left behind is not this run's to clear away.
        gc.collect()
        found = clock.sample(self._opened, prompts, new, repeats=repeats)
        self._pulse("timed")
        return asdict(found)

    def roofline(self, shapes: Sequence[tuple[int, int, int]]) -> dict[str, Any]:
        """The limits of the engine that is open, as roofline.observe tells them."""
        from harness.speed import roofline

        found = roofline.observe(self._opened, self._model, shapes)
        self._pulse("measured the machine")
        return found

    def measure(self, kind: str, work: Any) -> Any:
        """One measurement of speed/kinds on the engine that is open, by types of ours: both ends are of one version."""
        from harness.speed.kinds import measure

        gc.collect()
        return measure(kind, self._opened, work, self._pulse)

    @property
    def _opened(self) -> Engine:
        if self._engine is None:
            raise EngineError("no engine is open", fix="Open one first")
        return self._engine

    def close(self) -> None:
        """Free the engine."""
        self._engine = None
        self._stack.close()
