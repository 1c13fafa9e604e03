"""Run a suite on an open engine: every run and view that the suite promises, condensed into a Trace."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.engines.base import Engine
from harness.environment import machine, versions
from harness.numerics.sketch import Sketcher
from harness.values import Pass, Request, Run, Suite, Trace, View

Progress = Callable[[str], None]

#: The capability that each view cannot be shown without.
_NEEDS: Mapping[View, str] = {"generate": "tokens", "replay": "replay", "prefill": "logits"}


def run_suite(
    engine: Engine,
    suite: Suite,
    requests: Sequence[Request],
    continuations: Sequence[Sequence[int]],
    *,
    runs: Sequence[Run],
    stop_ids: frozenset[int],
    vocabulary: int,
    views: tuple[View, ...] | None = None,
    capabilities: frozenset[str] | None = None,
    basis: NDArray[np.float64] | None = None,
    progress: Progress = lambda _text: None,
) -> Trace:
    """Do the work of ``runs`` and condense what the engine shows.

    Args:
        engine: an open engine.
        suite: the suite; its digest goes into the trace.
        requests: the prompts as the golden resolved them.
        continuations: the golden's tokens, forced in `replay` and `prefill`.
        runs: the runs to do, all of the suite's or the quick ones.
        stop_ids: ids that end a free run; empty where the suite ignores them.
        vocabulary: columns of the golden.
        views: only these of the views that the runs ask for; None is all.
        capabilities: show no more than these would; None is all that the engine has.
        basis: what the logits of the first whole run are also multiplied with, [V, B]; None for nothing more.
        progress: called with a few words before each pass.

    Returns:
        The trace, with one pass for each run, view that the engine can show, and visit.
    """
    able = engine.capabilities if capabilities is None else capabilities
    own = engine.tokenize(suite)
    whole = first_whole(runs)
    passes: list[Pass] = []
    for run, view, repeat, visit in planned(runs, requests, able, views):
        progress(f"{run.name}/{view}")
        fine = basis if run is whole else None
        passes.append(_one_pass(engine, run, view, repeat, visit, requests, continuations, stop_ids, vocabulary, fine))
    return Trace(
        engine=engine.spec,
        declared=_plain(engine.declared),
        settings=_plain({"versions": versions(), "machine": machine(), **engine.settings}),
        capabilities=able,
        vocabulary=engine.vocabulary,
        suite_digest=suite.digest,
        prompt_ids=None if own is None else tuple(request.prompt_ids for request in own),
        passes=tuple(passes),
        limits=engine.limits,
    )


def first_whole(runs: Sequence[Run]) -> Run | None:
    """The run that templates are fitted to: the first that runs all prompts and shows logits, a quick one first.

    So that it is the same run whether all are asked for or the quick ones alone.
    """
    whole = [run for run in runs if run.order == "suite" and {"replay", "prefill"} & set(run.views)]
    return next((run for run in whole if run.quick), whole[0] if whole else None)


def _plain(value: Any) -> Any:
    """Only what JSON has, so that a trace is the same after it was written and read: an engine may show anything."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value)


def views_of(run: Run, capabilities: frozenset[str]) -> tuple[View, ...]:
    """The run's views that an engine of these capabilities can show.

    Where it can show none of them but has tokens, these are better than nothing: a free run.
    """
    able = tuple(view for view in run.views if _NEEDS[view] in capabilities)
    return able or (("generate",) if "tokens" in capabilities else ())


def planned(
    runs: Sequence[Run],
    requests: Sequence[Request],
    capabilities: frozenset[str],
    views: tuple[View, ...] | None = None,
) -> Iterator[tuple[Run, View, int, tuple[int, ...]]]:
    """Run, view, number of the visit and the requests it covers, of every pass that is asked for, in order.

    Args:
        runs: the runs to do.
        requests: the prompts as the golden resolved them.
        capabilities: what the engine can show.
        views: only these views; None is all.
    """
    for run in runs:
        for view in views_of(run, capabilities):
            if views is None or view in views:
                for repeat, visit in enumerate(visits(run, requests)):
                    yield run, view, repeat, visit


def visits(run: Run, requests: Sequence[Request]) -> Iterator[tuple[int, ...]]:
    """Which requests each visit covers. A-B-A: the first, then the longest other, then the first again."""
    if run.order == "suite":
        yield tuple(range(len(requests)))
        return
    longest = max(range(1, len(requests)), key=lambda i: len(requests[i].prompt_ids))
    yield (0,)
    yield (longest,)
    yield (0,)


def _one_pass(
    engine: Engine,
    run: Run,
    view: View,
    repeat: int,
    visit: tuple[int, ...],
    requests: Sequence[Request],
    continuations: Sequence[Sequence[int]],
    stop_ids: frozenset[int],
    vocabulary: int,
    basis: NDArray[np.float64] | None,
) -> Pass:
    asked = [requests[i] for i in visit]
    started = time.perf_counter()
    if view == "generate":
        generations = engine.generate(asked, batch_size=run.batch_size, stop_ids=stop_ids)
        return Pass(
            run=run.name, view=view, repeat=repeat, requests=visit, generations=tuple(generations),
            seconds=time.perf_counter() - started,
        )  # fmt: skip
    sketcher = Sketcher(vocabulary, fingerprints=run.order == "A-B-A", basis=basis)
    show = engine.replay if view == "replay" else engine.prefill
    show(asked, [continuations[i] for i in visit], batch_size=run.batch_size, sketcher=sketcher)
    rows = sketcher.rows(visit)
    return Pass(
        run=run.name, view=view, repeat=repeat, requests=visit, rows=rows, seconds=time.perf_counter() - started
    )
