"""What every rank does with a request, whoever hands it over: open its part, run, show what it has, close."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from harness.engines import hf
from harness.engines.ranks import evidence, probes
from harness.engines.ranks.layout import Layout
from harness.errors import EngineError, UsageError, first_line
from harness.numerics.sketch import Sketcher
from harness.values import Generation, Request, View

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

    from harness.engines.ranks.rank import RankEngine
    from harness.engines.streaming.spreading import Asked, Scored


#: Starting a rank and loading a model, which send no pulses, may take this many times the limit of silence.
LOADING = 10


def patience(timeout: float) -> float:
    """Seconds that a rank waits for another, where ``timeout`` without progress is a failure.

    It outlasts the watch over all ranks, which knows better whom it waits for.
    """
    return 2 * timeout + 30


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepSpeed:
    """What DeepSpeed does with a model.

    Attributes:
        zero: stage of ZeRO: 3 partitions the parameters; 0 is none, and AutoTP cuts the layers.
        offload: where ZeRO-3 keeps what is not in use, "cpu"; None is the device.
        kernels: whether blocks are replaced by DeepSpeed's own kernels.
        all_reduce: "shm", its own sum in the memory that this machine's processes share, or "gloo"; None is the first
            where it can be.
        build: seconds that compiling it may take, the first time.
    """

    zero: int = 0
    offload: str | None = None
    kernels: bool = False
    all_reduce: str | None = None
    build: float = 600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """What a rank opens.

    Attributes:
        options: of the model.
        text: the SPEC.
        layout: of all ranks.
        micro_batches: how many parts a batch goes through the stages in.
        prepare: MODULE:FUNCTION, called on every rank with its engine once the model is loaded; None for nothing.
        timeout: seconds that a rank waits for another.
        meeting: where the ranks meet, a new place each time; what it means is the team's.
        deepspeed: what DeepSpeed does with the model; None where transformers cuts it.
    """

    options: hf.Options
    text: str
    layout: Layout
    micro_batches: int
    prepare: str | None
    timeout: float
    meeting: str
    deepspeed: DeepSpeed | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """A pass over some requests; ``continuations`` and ``sketcher`` are of the forced views alone."""

    view: View
    requests: Sequence[Request]
    continuations: Sequence[Sequence[int]] = ()
    batch_size: int | None = None
    stop_ids: frozenset[int] = frozenset()
    sketcher: Sketcher | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """What a rank shows of a pass.

    Attributes:
        generations: on the head, of a free pass.
        sketcher: on the head, of a forced pass, filled.
        checksums: modules in the order of the forward, on every rank.
        running: on the head, the settings that are only true once a pass has run, as `Engine.settings` names them.
    """

    generations: list[Generation] | None = None
    sketcher: Sketcher | None = None
    checksums: tuple[tuple[str, int], ...] = ()
    running: dict[str, Any] = field(default_factory=dict)


class Server:
    """One rank's side of a team.

    Args:
        rank: its number.
        store: makes the store of a setup's meeting.
        pulse: called with a few words whenever the rank has got somewhere.
    """

    def __init__(self, rank: int, store: Callable[[Setup], Store], pulse: Callable[[str], None]) -> None:
        self.rank = rank
        self._store, self._pulse = store, pulse
        self._stack, self._wide = ExitStack(), ExitStack()
        self._engine: RankEngine | None = None

    def answer(self, request: str, *arguments: Any) -> Any:
        """Do one request; the names are those of the methods below."""
        return _REQUESTS[request](self, *arguments)

    @property
    def engine(self) -> RankEngine:
        """The open part."""
        if self._engine is None:
            raise EngineError("this rank has no open engine", fix="Open one first")
        return self._engine

    def open(self, setup: Setup) -> Mapping[str, Any]:
        """Load this rank's part; shows its settings."""
        self.close()
        layout, make = setup.layout, _kind_of(setup)
        engine = make(
            setup.options,
            text=setup.text,
            layout=layout,
            place=layout.place(self.rank),
            micro_batches=setup.micro_batches,
            store=self._store(setup),
            timeout=setup.timeout,
            prepare=None if setup.prepare is None else _function(setup.prepare),
            pulse=self._pulse,
        )
        self._engine = self._stack.enter_context(engine)
        return engine.settings

    def close(self) -> None:
        """Free the part, and leave the groups."""
        opened, self._engine = self._engine is not None, None
        self._wide.close()
        self._stack.close()
        if opened:
            # A model is full of cycles; what it holds (groups with their threads, weights) would wait for the next one.
            gc.collect()

    def widen(self) -> Mapping[str, Any]:
        """Compute in float32 with weights and buffers as they are, until `narrow`; shows the settings."""
        self._wide.enter_context(self.engine.widened())
        return self.engine.settings

    def narrow(self) -> None:
        """Compute as loaded again."""
        self._wide.close()

    def narrow_operation(self) -> str:
        """As `Engine.narrow_operation`."""
        return self.engine.narrow_operation()

    def run(self, work: Work) -> Done:
        """One pass, with every other rank."""
        engine, head = self.engine, self.rank == self.engine.layout.head
        with evidence.watched(engine) as sums:
            if work.view == "generate":
                found = engine.generate(work.requests, batch_size=work.batch_size, stop_ids=work.stop_ids)
                done = Done(generations=found if head else None, checksums=tuple(sums.shown()))
            else:
                assert work.sketcher is not None
                sketcher = work.sketcher if head else probes.Unheard(work.sketcher.vocabulary)
                forced = engine.replay if work.view == "replay" else engine.prefill
                forced(work.requests, work.continuations, batch_size=work.batch_size, sketcher=sketcher)
                done = Done(sketcher=sketcher if head else None, checksums=tuple(sums.shown()))
        return replace(done, running=engine.running) if head else done

    def probe(self, requests: Sequence[Request], continuations: Sequence[Sequence[int]]) -> list[probes.Shown]:
        """What this rank computes inside its blocks on one batch, with every other rank."""
        return probes.of_rank(self.engine, requests, continuations)

    def score(self, asked: Asked) -> Scored:
        """A streamed pass with this rank's share of the prompts, without any other rank."""
        from harness.engines.streaming import spreading

        return spreading.answer(self.rank, asked, self._pulse)


_REQUESTS: Mapping[str, Callable[..., Any]] = {
    "open": Server.open,
    "close": Server.close,
    "widen": Server.widen,
    "narrow": Server.narrow,
    "narrow_operation": Server.narrow_operation,
    "run": Server.run,
    "probe": Server.probe,
    "score": Server.score,
}


def _kind_of(setup: Setup) -> Callable[..., RankEngine]:
    """What makes the part of a rank: of transformers' model, of DeepSpeed's, of this project's BLOOM."""
    from harness.engines import bloom
    from harness.engines.ranks.bloom_rank import BloomRank
    from harness.engines.ranks.deepspeed_rank import DeepSpeedRank
    from harness.engines.ranks.rank import RankEngine

    if isinstance(setup.options, bloom.Options):
        return BloomRank
    return RankEngine if setup.deepspeed is None else partial(DeepSpeedRank, how=setup.deepspeed)


def _function(target: str) -> Callable[..., Any]:
    """What MODULE:FUNCTION names.

    Raises:
        UsageError: where it is written otherwise, the module cannot be imported, or holds no such function.
    """
    fix = "Write prepare=MODULE:FUNCTION, of a module that can be imported where the ranks run (see PYTHONPATH)"
    name, _, attribute = target.partition(":")
    if not all(part.isidentifier() for path in (name, attribute) for part in path.split(".")):
        raise UsageError(f"{target!r} names no function", fix=fix)
    try:
        function: Any = importlib.import_module(name)
    except ImportError as error:
        raise UsageError(f"the module of prepare={target} cannot be imported ({first_line(error)})", fix=fix) from error
    for part in attribute.split("."):
        function = getattr(function, part, None)
    if not callable(function):
        raise UsageError(f"there is no function {target!r}", fix=fix)
    found: Callable[..., Any] = function
    return found
