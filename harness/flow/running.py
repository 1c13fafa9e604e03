"""Run a candidate on the work of a golden or of a suite: as shipped, and its copy widened to float32 -> Trace."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness import store, suites
from harness.comparison import FUNCTION_VIEWS
from harness.comparison.context import declared_precision
from harness.engines import Engine, runner
from harness.errors import ModelError, StaleError, UsageError, first_line
from harness.flow.candidates import engine_of
from harness.flow.references import reference_directory
from harness.values import Golden, Run, Suite, Templates, Trace, View, work_digest

Progress = Callable[[str], None]

#: What can be judged of a run that no golden's tokens were forced through.
_FREE = frozenset({"tokens", "top_logprobs", "batch", "deterministic"})


def silent(_text: str) -> None:
    """Progress for nobody."""


def run(
    candidate: Any,
    work: Golden | Suite | str | Path,
    *,
    model: str | Path | None = None,
    quick: bool = False,
    upcast: bool = True,
    diagnose: bool = False,
    progress: Progress = silent,
) -> Trace:
    """What a candidate does on the work of a golden or of a suite, to be judged here or elsewhere.

    Args:
        candidate: a SPEC, an Engine, a transformers model, an nn.Module or a callable.
        work: a golden (its tokens are forced, and all is judged as if in place), a suite (the candidate continues the
            prompts on its own, and its tokens alone can be judged), or the directory or file of one.
        model: directory of weights for a SPEC that names none; for a golden the model beside it.
        quick: only the quick runs.
        upcast: also run a copy widened to float32, where the candidate is in 16 bits.
        diagnose: also show what templates of the bug catalogue are fitted to; of a golden whose model is at hand.
        progress: called with a few words before each pass.

    Raises:
        HarnessError: for input that cannot be used. Whatever the candidate itself raises is passed on.
    """
    work = _work(work)
    if isinstance(work, Suite):
        with engine_of(candidate, None if model is None else Path(model), progress) as engine:
            return free_trace(engine, work, quick=quick, progress=progress)
    directory = reference_directory(work, model)
    bank = templates(work, directory, progress) if diagnose else None
    with engine_of(candidate, directory, progress) as engine:
        refuse_other_model(work, engine)
        basis = None if bank is None else bank.basis
        return forced_trace(engine, work, quick=quick, upcast=upcast, basis=basis, progress=progress)


def templates(golden: Golden, model: Path | None, progress: Progress) -> Templates:
    """The golden's templates of the bug catalogue, made now where they are not in the cache.

    Raises:
        ModelError: where the golden's model is not at hand.
        UsageError: for a golden whose suite or floors allow none.
    """
    if model is None:
        raise ModelError(
            f"templates are made with the model of {golden.name}, which is not beside it",
            fix="Name its directory with --reference, or leave out --diagnose",
        )
    from harness.templates import caching

    return caching.templates_of(golden, model, progress)


def _work(work: Golden | Suite | str | Path) -> Golden | Suite:
    if isinstance(work, Golden | Suite):
        return work
    return suites.load_suite(work) if Path(work).is_file() else store.read_golden(work)


def forced_trace(
    engine: Engine,
    golden: Golden,
    *,
    quick: bool = False,
    upcast: bool = True,
    basis: NDArray[np.float64] | None = None,
    progress: Progress = silent,
) -> Trace:
    """What an open engine does on a golden's work, its tokens forced."""
    runs = asked_runs(golden, quick)
    if engine.vocabulary < golden.vocabulary:
        # Nothing could be compared with columns that are not there; the trace itself says so.
        runs, upcast = [], False
    trace = _on_golden(golden, engine, runs, progress, basis=basis)
    if upcast:
        trace = _with_upcast(golden, engine, trace, runs, progress, basis)
    if basis is not None:
        trace = replace(trace, basis=golden.model.digest)
    return replace(trace, quick=quick, forced=work_digest(golden))


def free_trace(engine: Engine, suite: Suite, *, quick: bool = False, progress: Progress = silent) -> Trace:
    """What an open engine does on a suite when nothing is forced: its own greedy continuations.

    Raises:
        UsageError: for an engine that cannot tell token ids or where to stop.
    """
    requests = engine.tokenize(suite)
    if requests is None:
        raise UsageError(
            f"{engine.spec} brings no tokenizer, and the suite {suite.name!r} is text",
            fix="Run it on the golden, which holds the token ids",
        )
    stop_ids = engine.stop_ids if suite.stop == "eos" else frozenset()
    if suite.stop == "eos" and not stop_ids:
        raise UsageError(f"{engine.spec} does not say which token ends a text", fix="Run it on the golden, which does")
    if "tokens" not in engine.capabilities:
        raise UsageError(f"{engine.spec} generates no tokens on its own", fix="Run it on the golden, which forces them")
    trace = runner.run_suite(
        engine,
        suite,
        requests,
        [()] * len(requests),
        runs=[one for one in suite.runs if one.quick or not quick],
        stop_ids=stop_ids,
        vocabulary=engine.vocabulary,
        capabilities=engine.capabilities & _FREE,
        progress=progress,
    )
    return replace(trace, quick=quick, upcast_reason="no golden was at hand whose tokens could be forced")


def _with_upcast(
    golden: Golden,
    engine: Engine,
    trace: Trace,
    runs: Sequence[Run],
    progress: Progress,
    basis: NDArray[np.float64] | None,
) -> Trace:
    """The trace with that of a copy of the live candidate, widened to float32 as it is (numerics.md 2.1)."""
    if declared_precision(trace.settings) in ("float32", "float64"):
        return trace
    if "upcast" not in engine.capabilities:
        return replace(trace, upcast_reason=f"{engine.spec} cannot be widened to float32")
    try:
        with engine.upcast() as wide:
            found = _on_golden(
                golden, wide, runs, lambda text: progress(f"float32 copy: {text}"), FUNCTION_VIEWS, basis
            )
            # Afterwards: a candidate that keeps state between requests must not be brought into one by the audit.
            narrow = wide.narrow_operation()
            if narrow:
                reason = f"its float32 copy still computes in 16 bits ({narrow})"
                return replace(trace, upcast_reason=reason)
    except (Exception, SystemExit) as error:  # whatever it does when it is widened, its run as shipped still counts
        if os.environ.get("HARNESS_TRACEBACK") or engine.lost:
            raise
        first = first_line(error, "no message")
        return replace(trace, upcast_reason=f"its float32 copy fails ({type(error).__name__}: {first})")
    return replace(trace, upcast=found)


def _on_golden(
    golden: Golden,
    engine: Engine,
    runs: Sequence[Run],
    progress: Progress = silent,
    views: tuple[View, ...] | None = None,
    basis: NDArray[np.float64] | None = None,
) -> Trace:
    return runner.run_suite(
        engine,
        golden.suite,
        golden.requests,
        golden.continuations,
        runs=runs,
        stop_ids=frozenset(golden.stop_ids),
        vocabulary=golden.vocabulary,
        views=views,
        basis=basis,
        progress=progress,
    )


def asked_runs(golden: Golden, quick: bool) -> list[Run]:
    """The runs that a check asks for."""
    return [run for run in current_runs(golden) if run.quick or not quick]


def current_runs(golden: Golden) -> Sequence[Run]:
    """The runs of the suite's file where it is at hand (a new run needs no new golden), else the golden's own.

    Raises:
        StaleError: when the suite's file now asks other questions than the golden answers.
    """
    path = golden.provenance.get("suite_path")
    if golden.directory is None or not isinstance(path, str) or Path(path).is_absolute():
        return golden.suite.runs
    file = Path(os.path.normpath(Path(golden.directory) / path))
    if not file.is_file():
        return golden.suite.runs
    suite = suites.load_suite(file)
    if suite.digest != golden.suite.digest:
        raise StaleError(f"{file} was changed after {golden.name} was recorded", fix="Record the golden again")
    return suite.runs


def refuse_other_model(golden: Golden, engine: Engine) -> None:
    """Other weights of the same shapes are a candidate to test; other shapes are another model."""
    signature = engine.settings.get("signature")
    if signature is not None and golden.model.signature not in ("", signature):
        raise StaleError(
            f"{engine.spec} is another model than the one of {golden.name}: its tensors have other names or shapes",
            fix=f"Check it against a golden of its own, or give weights shaped like {golden.model.name}",
        )
