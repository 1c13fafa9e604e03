"""Live engines with a correct family or a bug in them, and all the logits that they show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from harness.engines import bloom, hf
from harness.engines.base import Engine
from harness.engines.spec import parse_spec
from harness.errors import EngineError, UsageError
from harness.mutations.benign import Family
from harness.mutations.mutation import patched
from harness.numerics.sketch import Sketcher
from harness.values import Generation, Request, Suite, View

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """All logits of one call of an engine.

    Attributes:
        view: replay or prefill.
        requests: ids of the requests, in the order of the call.
        logits: by request, [n, V] in the order of the positions.
        positions: by request, index in its sequence of the token that each row foretells, [n].
    """

    view: View
    requests: tuple[str, ...]
    logits: tuple[NDArray[np.floating], ...]
    positions: tuple[NDArray[np.int32], ...]


class _Tee(Sketcher):
    """Hands everything on to another sketcher, and keeps a copy of the logits."""

    def __init__(self, inner: Sketcher) -> None:
        super().__init__(inner.vocabulary, fingerprints=inner.fingerprints)
        self._inner = inner
        self._kept: list[tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.floating]]] = []

    def add(
        self,
        logits_NV: torch.Tensor,
        next_ids_N: torch.Tensor,
        *,
        request: NDArray[np.int32],
        position: NDArray[np.int32],
        generated: NDArray[np.bool_],
    ) -> None:
        import torch

        self._inner.add(logits_NV, next_ids_N, request=request, position=position, generated=generated)
        wide = logits_NV.dtype if logits_NV.dtype == torch.float64 else torch.float32
        known = logits_NV[:, : self.vocabulary].detach().to(wide).cpu().numpy()
        self._kept.append((request, position, known.copy()))

    def call(self, view: View, requests: Sequence[Request]) -> Call:
        """What was kept, by request."""
        request = np.concatenate([one for one, _, _ in self._kept]) if self._kept else np.zeros(0, dtype=np.int32)
        position = np.concatenate([one for _, one, _ in self._kept]) if self._kept else request
        logits = np.concatenate([one for _, _, one in self._kept]) if self._kept else np.zeros((0, self.vocabulary))
        order = [np.flatnonzero(request == index) for index in range(len(requests))]
        order = [rows[np.argsort(position[rows], kind="stable")] for rows in order]
        return Call(
            view=view,
            requests=tuple(one.id for one in requests),
            logits=tuple(logits[rows] for rows in order),
            positions=tuple(position[rows] for rows in order),
        )


class Kept(Engine):
    """An open engine that stays open, however often it is entered: one loading and compiling for all groups."""

    def __init__(self, engine: Engine, *, spec: str, wide: Kept | None = None) -> None:
        self.spec, self.declared, self.capabilities = spec, engine.declared, engine.capabilities
        self._engine, self._wide = engine, wide
        self._calls: list[Call] | None = None

    @contextmanager
    def recording(self) -> Iterator[list[Call]]:
        """Inside the block all logits of every call are kept."""
        self._calls = []
        try:
            yield self._calls
        finally:
            self._calls = None

    def _kept(self, sketcher: Sketcher) -> Sketcher:
        return sketcher if self._calls is None else _Tee(sketcher)

    def _keep(self, view: View, requests: Sequence[Request], sketcher: Sketcher) -> None:
        if self._calls is not None and isinstance(sketcher, _Tee):
            self._calls.append(sketcher.call(view, requests))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        return None

    @property
    def settings(self) -> Mapping[str, Any]:
        return self._engine.settings

    @property
    def vocabulary(self) -> int:
        return self._engine.vocabulary

    @property
    def stop_ids(self) -> frozenset[int]:
        return self._engine.stop_ids

    def tokenize(self, suite: Suite) -> tuple[Request, ...] | None:
        return self._engine.tokenize(suite)

    def generate(
        self, requests: Sequence[Request], *, batch_size: int | None, stop_ids: frozenset[int]
    ) -> list[Generation]:
        with ExitStack() as stack:
            if self._calls is not None and isinstance(self._engine, hf.HFEngine):
                # With the highest log-probabilities, which cost nothing beside all logits.
                stack.enter_context(patched(self._engine, options=replace(self._engine.options, show="top")))
            return self._engine.generate(requests, batch_size=batch_size, stop_ids=stop_ids)

    def replay(
        self,
        requests: Sequence[Request],
        continuations: Sequence[Sequence[int]],
        *,
        batch_size: int | None,
        sketcher: Sketcher,
    ) -> None:
        through = self._kept(sketcher)
        self._engine.replay(requests, continuations, batch_size=batch_size, sketcher=through)
        self._keep("replay", requests, through)

    def prefill(
        self,
        requests: Sequence[Request],
        continuations: Sequence[Sequence[int]],
        *,
        batch_size: int | None,
        sketcher: Sketcher,
    ) -> None:
        through = self._kept(sketcher)
        self._engine.prefill(requests, continuations, batch_size=batch_size, sketcher=through)
        self._keep("prefill", requests, through)

    def upcast(self) -> Engine:
        if self._wide is None:
            raise EngineError(f"{self.spec} was opened without a float32 copy", fix="Open it in 16 bits")
        return self._wide


@contextmanager
def opened(family: Family, model: Path, precision: str, *, wide: bool = True) -> Iterator[Kept]:
    """The engine of a family, and of its float32 copy, to be entered any number of times.

    Args:
        family: what is put into it.
        model: its directory.
        precision: that it computes in.
        wide: also make the copy, where the precision is of 16 bits.

    Raises:
        LookupError: on entry, where the model or the machine lacks the part that the family changes.
    """
    text = spec_text({"dtype": precision, **family.options})
    with ExitStack() as stack:
        engine = stack.enter_context(hf.build(parse_spec(text), model=str(model)))
        copied = None
        if wide and precision != "float32":
            # Copied before the family is applied, and the family then applied to the copy: a forward that was
            # given to a module of the original would go on using the original's 16-bit weights in the copy.
            copy = stack.enter_context(engine.upcast())
            stack.enter_context(family.applied(copy.model))
            copied = Kept(copy, spec=f"{copy.spec} as {family.name}")
        stack.enter_context(family.applied(engine.model))
        yield Kept(engine, spec=f"{text} as {family.name}", wide=copied)


def part_missing(error: LookupError) -> str:
    """Why a family or a bug could not be put into a host.

    Raises:
        LookupError: the error itself, where it is a KeyError or IndexError: a fault of the bench, and no missing part.
    """
    if type(error) is not LookupError:
        raise error
    return str(error)


#: What bugs are put into where nothing else is said: transformers' model.
TRANSFORMERS = "hf"


def open_spec(port: str, precision: str, options: Mapping[str, str | int | bool], model: Path) -> hf.HFEngine:
    """The engine, closed, that a bug is put into.

    Args:
        port: the SPEC of an engine that shows a live model with the names of transformers' modules: "hf", or
            "bloom:rungs=all".
        precision: that it computes in.
        options: keys that the bug needs.
        model: its directory.

    Raises:
        LookupError: where the engine lacks one of these keys.
        UsageError: for a SPEC of another engine.
    """
    given = parse_spec(port)
    builders = {"hf": (hf.build, hf.READERS), "bloom": (bloom.build, bloom.READERS)}
    if given.engine not in builders:
        raise UsageError(f"bugs cannot be put into {port!r}", fix=f"Name one of {', '.join(builders)}")
    build, readers = builders[given.engine]
    if missing := [key for key in options if key not in readers]:
        raise LookupError(f"the engine {given.engine} has no {', '.join(missing)}")
    own = dict(given.options)
    if given.engine == "bloom":
        own["rungs"] = bloom.rungs_in(own.get("rungs", "all"), precision)
    text = spec_text({**own, **options, "dtype": precision}, given.engine)
    engine = build(parse_spec(text), model=str(model))
    if not isinstance(engine, hf.HFEngine):
        raise UsageError(
            f"bugs cannot be put into the ranks of {port!r}", fix="Leave tp out; see harness power --ranks"
        )
    return engine


def spec_text(options: Mapping[str, str | int | bool], engine: str = TRANSFORMERS) -> str:
    """The SPEC of an engine with these options."""
    words = {key: str(value).lower() if isinstance(value, bool) else value for key, value in options.items()}
    return f"{engine}:" + ",".join(f"{key}={value}" for key, value in words.items())
