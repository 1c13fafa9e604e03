"""Run a suite on an open engine: every run and view that the suite promises, condensed into a Trace."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from harness.engines.base import Engine
from harness.numerics.sketch import Sketcher
from harness.values import Pass, Request, Run, Suite, Trace, View

Progress = Callable[[str], None]


def run_suite(
    engine: Engine,
    suite: Suite,
    requests: Sequence[Request],
    continuations: Sequence[Sequence[int]],
    *,
    runs: Sequence[Run],
    stop_ids: frozenset[int],
    vocabulary: int,
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
        progress: called with a few words before each pass.

    Returns:
        The trace, with one pass for each run, view and visit.
    """
    own = engine.tokenize(suite)
    passes: list[Pass] = []
    for run in runs:
        for view in run.views:
            for repeat, visit in enumerate(visits(run, requests)):
                progress(f"{run.name}/{view}")
                passes.append(
                    _one_pass(engine, run, view, repeat, visit, requests, continuations, stop_ids, vocabulary)
                )
    return Trace(
        engine=engine.spec,
        declared=dict(engine.declared),
        settings=dict(engine.settings),
        capabilities=engine.capabilities,
        vocabulary=engine.vocabulary,
        suite_digest=suite.digest,
        prompt_ids=None if own is None else tuple(request.prompt_ids for request in own),
        passes=tuple(passes),
    )


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
) -> Pass:
    asked = [requests[i] for i in visit]
    started = time.perf_counter()
    if view == "generate":
        generations = engine.generate(asked, batch_size=run.batch_size, stop_ids=stop_ids)
        return Pass(
            run=run.name, view=view, repeat=repeat, requests=visit, generations=tuple(generations),
            seconds=time.perf_counter() - started,
        )  # fmt: skip
    sketcher = Sketcher(vocabulary, fingerprints=run.order == "A-B-A")
    show = engine.replay if view == "replay" else engine.prefill
    show(asked, [continuations[i] for i in visit], batch_size=run.batch_size, sketcher=sketcher)
    rows = sketcher.rows(visit)
    return Pass(
        run=run.name, view=view, repeat=repeat, requests=visit, rows=rows, seconds=time.perf_counter() - started
    )
