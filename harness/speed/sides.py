"""Base and candidate, each in a process of its own: neither shares memory, threads or code with the other."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from harness.engines.ranks.spawned import SpawnedTeam
from harness.engines.ranks.worker import RENEW
from harness.errors import EngineError
from harness.speed.clock import Sample
from harness.speed.revisions import Checkout
from harness.speed.roofline import Roofline, roofline_of
from harness.speed.serving import LIBRARIES
from harness.speed.shapes import Shape


class Side:
    """A candidate in a process of its own; a context manager.

    Args:
        spec: SPEC of the candidate.
        model: directory of weights for a SPEC that names none.
        checkout: where its code comes from; None is what this process runs.
        timeout: seconds without progress after which it has failed.
        progress: called with a few words.
    """

    def __init__(
        self,
        spec: str,
        *,
        model: Path | None,
        checkout: Checkout | None,
        timeout: float,
        progress: Callable[[str], None],
    ) -> None:
        self.spec = spec
        self._model, self._checkout = model, checkout
        self._timeout, self._progress = timeout, progress
        self._team: SpawnedTeam | None = None
        # Whether its process looks for code where the checkout is.
        self._placed = False

    @property
    def apart(self) -> bool:
        """Whether its revision has libraries of its own, so that its process must be another one from its start."""
        return self._checkout is not None and any(self._checkout.holds(file) for file in _library_files())

    def __enter__(self) -> Self:
        apart = self._checkout if self.apart else None
        self._team = SpawnedTeam(
            1,
            device="any",
            server="harness.speed.serving:Server",
            path=None if apart is None else apart.path,
            directory=None if apart is None else apart.directory,
        )
        self._claim()
        return self

    def _claim(self) -> None:
        assert self._team is not None, "it is used inside its with block"
        self._team.spec, self._team.timeout = self.spec, self._timeout
        self._team.progress = lambda text: self._progress(f"{self.spec}: {text.partition(': ')[2] or text}")
        self._placed = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._team is not None:
            self._team.close()
            self._team = None

    def restart(self, *, whole: bool = False) -> None:
        """A new process takes the place of its own: a fork where that can be, unless ``whole``."""
        assert self._team is not None, "it is used inside its with block"
        if self._team.renews and not whole:
            self._call(RENEW, loading=True)
            self._placed = False
        else:
            self.__exit__(None, None, None)
            self.__enter__()

    def exchange(self, other: Side) -> None:
        """Take the other side's process for this one's, which neither is apart from; for `restart` to follow.

        Forks of one process have the addresses of its libraries, which make them faster or slower than those of
        another. Where sides take turns at the two, that is nobody's.
        """
        self._team, other._team = other._team, self._team
        self._claim()
        other._claim()

    def _ask(self, request: str, *arguments: Any, loading: bool = False) -> Any:
        if self._checkout is not None and not self._placed and not self.apart:
            self._call("place", self._checkout.path, str(self._checkout.directory))
            self._placed = True
        return self._call(request, *arguments, loading=loading)

    def _call(self, request: str, *arguments: Any, loading: bool = False) -> Any:
        assert self._team is not None, "it is used inside its with block"
        return self._team.call(request, *arguments, world=1, loading=loading)[0]

    def check(self, golden: Path, reference: Path | None, *, quick: bool) -> dict[str, Any]:
        """The verdict on it, as serving.Server.check tells it."""
        given = None if reference is None else str(reference.resolve())
        found: dict[str, Any] = self._ask("check", str(golden.resolve()), self.spec, given, quick, loading=True)
        return found

    def open(self, processors: Sequence[int] | None = None) -> dict[str, Any]:
        """Load it, on some processors alone where they are named; some of its settings."""
        model = None if self._model is None else str(self._model.resolve())
        # One of another version knows nothing of them, and shows none.
        named = () if processors is None else (tuple(processors),)
        found: dict[str, Any] = self._ask("open", self.spec, model, *named, loading=True)
        return found

    def sample(self, prompts: Sequence[Sequence[int]], new: int, *, repeats: int) -> Sample:
        """One run of a batch."""
        return Sample(**self._ask("sample", prompts, new, repeats))

    def roofline(self, shapes: Sequence[Shape]) -> Roofline:
        """The shortest times that each shape could take there; not known where its code does not tell, or fails."""
        try:
            return roofline_of(self._ask("roofline", [(one.batch, one.prompt, one.new) for one in shapes]))
        except EngineError as error:
            # Another version of the code may not know the request; its process is gone then.
            return Roofline(reason=error.problem)

    def measure(self, kind: str, work: Any) -> Any:
        """One measurement of speed/kinds on the engine that is open."""
        return self._ask("measure", kind, work)


@cache
def _library_files() -> tuple[Path, ...]:
    """Where the libraries lie that a worker imports before it is told whose code it is to run."""
    specs = (importlib.util.find_spec(name) for name in LIBRARIES)
    return tuple(Path(spec.origin) for spec in specs if spec is not None and spec.origin is not None)
