"""Does a case fail, and in the same way as the one before it? The candidate is run, the reference is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Self

import numpy as np

from harness.engines import Engine
from harness.errors import HarnessError, first_line
from harness.repro.cases import Case, Judgement, Kind
from harness.repro.roundoff import Ruler
from harness.repro.trying import Shown, run_case

#: Opens the candidate anew: as if no request had been there before.
Opener = Callable[[], Engine]


class Judge:
    """Runs cases in a candidate that stays open, or where ``fresh`` in one opened for each; a context manager.

    Args:
        opener: makes the candidate's engine, closed.
        ruler: the open reference.
        widened: run a copy of what is opened, its weights widened to float32.
    """

    def __init__(self, opener: Opener, ruler: Ruler, *, widened: bool) -> None:
        self.ruler, self.fresh = ruler, False
        self.calls = 0
        self._opener, self._widened = opener, widened
        self._stack = ExitStack()
        self._engine: Engine | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._engine = None
        self._stack.__exit__(kind, error, traceback)

    @property
    def engine(self) -> Engine:
        """The open candidate."""
        if self._engine is None:
            self._engine = self._stack.enter_context(self.opened())
        return self._engine

    def renew(self) -> None:
        """Forget the open candidate: the next case has one without earlier requests."""
        self._engine = None
        self._stack.close()
        self._stack = ExitStack()

    @contextmanager
    def opened(self) -> Iterator[Engine]:
        """The candidate, or its widened copy."""
        with self._opener() as engine:
            if not self._widened:
                yield engine
                return
            with engine.upcast() as wide:
                yield wide

    def judge(self, case: Case, kind: Kind) -> Judgement | None:
        """How the case fails in this way; None where it does not.

        Raises:
            Exception: whatever the candidate raises, unless that is how it fails.
        """
        if self.fresh:
            self.renew()
        self.calls += 1
        try:
            shown = run_case(self.engine, case, self.ruler.vocabulary)
            again = run_case(self.engine, case, self.ruler.vocabulary) if kind == "repeat" else shown
        except HarnessError:
            return None  # what an engine refuses for want of a capability is no failure of the model
        except Exception as error:  # noqa: BLE001  # a candidate can raise anything: that may be the failure that is looked for
            if kind != "raises":
                return None
            said = f"{type(error).__name__}: {first_line(error, 'no message')}"
            return Judgement(kind=kind, places=(), ratio=np.inf, limit=1.0, error=said)
        if kind == "raises":
            return None
        if kind == "repeat":
            places = tuple(place for place in shown if not np.array_equal(shown[place], again[place], equal_nan=True))
            return Judgement(kind=kind, places=places, ratio=np.inf, limit=1.0) if places else None
        broken = tuple(sorted(place for place, logits_V in shown.items() if not np.isfinite(logits_V).all()))
        if kind == "finite":
            return Judgement(kind=kind, places=broken, ratio=np.inf, limit=1.0) if broken else None
        # What is not finite is another failure than the one that is looked for.
        return None if broken else self._measured(case, shown)

    def _measured(self, case: Case, shown: Shown) -> Judgement | None:
        sequences = [row.ids for row in case.batch.rows]
        places = sorted(shown)
        lengths = np.array(
            [_distance(shown[row, seen], self.ruler.right(sequences[row])[seen - 1]) for row, seen in places]
        )
        if not lengths.max() > self.ruler.finest:
            return None  # below the round-off of every position that was measured: no replica needs to run
        allowed = self.ruler.allowed(sequences, places)
        ratios = lengths / allowed.sigma
        failing = [index for index in np.argsort(-ratios, kind="stable") if not ratios[index] <= allowed.limit]
        if not failing:
            return None
        return Judgement(
            kind="logits",
            places=tuple(places[index] for index in failing),
            ratio=float(ratios[failing[0]]),
            limit=allowed.limit,
            why=allowed.why,
        )


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    """Length of the difference, a constant shift taken out, to which the softmax is blind."""
    difference = one - other
    return float(np.linalg.norm(difference - difference.mean()))
