"""check: a candidate or its trace against a golden, with what the live reference has to say."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from harness import scorer
from harness.comparison import Spreads, compare, diverged
from harness.comparison.context import declared_precision, refuse_wider
from harness.comparison.ranks import ranks_of
from harness.engines import build_engine, hf
from harness.engines.ranks.outer import Followed
from harness.environment import differences
from harness.errors import EngineError, HarnessError, StaleError, UsageError
from harness.flow.blaming import blame
from harness.flow.candidates import engine_of, name_of
from harness.flow.references import Reference, read, reference_of
from harness.flow.running import asked_runs, forced_trace, refuse_other_model, silent, templates
from harness.flow.sharding import sharding_of
from harness.numerics import quantise
from harness.templates.layers import Layered, Maker, layered
from harness.values import Golden, Request, Rows, Scoring, Status, Templates, Trace, Verdict
from harness.verdict import failed, judge

Progress = Callable[[str], None]


def check(
    golden: Golden | str | Path,
    candidate: Any,
    *,
    reference: str | Path | None = None,
    quick: bool = False,
    upcast: bool = True,
    blame_environment: bool = False,
    diagnose: bool = False,
    spreads: Spreads | None = None,
    progress: Progress = silent,
) -> Verdict:
    """Is the candidate still the same model as the golden's?

    Args:
        golden: a golden, or the directory of one.
        candidate: a SPEC, an Engine, a transformers model, an nn.Module, a callable, or a Trace.
        reference: directory of the golden's model, where it does not lie beside the golden; or
            ``stream:key=value,...`` for one that is larger than memory. What was recorded by streaming is streamed.
        quick: only the suite's quick runs.
        upcast: ask both questions, also the one about the function, for which a copy of the candidate is widened
            to float32. Without it a candidate in 16 bits is judged as shipped alone.
        blame_environment: run the recorded reference again as well, and say whether the environment or the candidate
            moved.
        diagnose: fit the templates of the bug catalogue to the error: a bug that is named is part of the verdict. They
            are made with the golden's model where they are not in the cache, once for each golden; a trace must
            have been made for it.
        spreads: scatter of each statistic between families by precision; the null bench leaves a family's own out.
        progress: called with a few words before each pass.

    Raises:
        HarnessError: for input that cannot be used. An engine that fails gives the status `error` instead.
    """
    started = time.perf_counter()
    if isinstance(candidate, str):
        # The spec is read before the golden: a typing error should not cost the time of loading anything.
        build_engine(candidate)
    refuse_wider(spreads or {})
    golden = read(golden)
    name = candidate.engine if isinstance(candidate, Trace) else name_of(candidate)
    refused = partial(failed, golden=golden.name, candidate=name)
    try:
        # Read once: the whole checkpoint is hashed for it. A trace needs it for templates, and for sums of ranks.
        given = candidate if isinstance(candidate, Trace) else None
        needed = diagnose or given is None
        found = reference_of(golden, reference) if needed else None
        directory = None if found is None else found.directory
        if diagnose and found is not None and found.stream:
            raise UsageError(
                "templates are made with the model in memory, and this one is streamed", fix="Leave out --diagnose"
            )
        # Before the engine is opened, whose settings are not for the reference.
        bank = templates(golden, directory, progress) if diagnose else None
        maker = None if bank is None or directory is None else _maker(golden, directory, bank, progress)
        if given is not None:
            verdict = _judged(golden, given, quick, found or reference, spreads, bank, maker, progress)
            beside = _model_for_sums(golden, given, reference) if found is None else found
            verdict = replace(verdict, sharding=sharding_of(golden, given, beside, progress, None, verdict))
        else:
            basis = None if bank is None else bank.basis
            with engine_of(candidate, directory, progress) as engine:
                refuse_other_model(golden, engine)
                trace = forced_trace(engine, golden, quick=quick, upcast=upcast, basis=basis, progress=progress)
                verdict = _judged(golden, trace, quick, found or reference, spreads, bank, maker, progress)
                verdict = replace(verdict, sharding=sharding_of(golden, trace, found, progress, engine, verdict))
    except StaleError as error:
        return refused(Status.STALE, error.problem, fix=error.fix, check="model")
    except EngineError as error:
        return refused(Status.ERROR, error.problem, fix=error.fix, check="engine", details=error.details)
    except (HarnessError, Followed):
        raise
    except (Exception, SystemExit) as error:  # a port can raise anything, or exit: a verdict, and not our end
        if os.environ.get("HARNESS_TRACEBACK"):
            raise
        problem = f"{type(error).__name__}: {str(error).strip() or 'no message'}"
        return refused(Status.ERROR, problem, fix="Set HARNESS_TRACEBACK=1 to see where it was raised", check="engine")
    if blame_environment:
        verdict = replace(verdict, blame=blame(golden, verdict, reference=reference, quick=quick, progress=progress))
    return replace(verdict, seconds=time.perf_counter() - started)


def _model_for_sums(golden: Golden, trace: Trace, reference: str | Path | None) -> Reference | None:
    """The golden's model where a trace of ranks may want it; another model there is no reason to refuse the trace."""
    if not ranks_of(trace.settings):
        return None
    try:
        return reference_of(golden, reference)
    except StaleError:
        return None


def _maker(golden: Golden, directory: Path, bank: Templates, progress: Progress) -> Maker:
    """Runs the reference with a bug in single blocks, once for both questions."""

    @cache
    def make(name: str, strength: float) -> Layered | None:
        return layered(golden, directory, bank, name, strength, progress)

    return make


def _judged(
    golden: Golden,
    trace: Trace,
    quick: bool,
    reference: str | Path | Reference | None,
    spreads: Spreads | None,
    bank: Templates | None,
    maker: Maker | None,
    progress: Progress,
) -> Verdict:
    """The verdict on a trace; one of the quick runs alone is judged by these, whatever is asked."""
    runs = asked_runs(golden, quick or trace.quick)
    trace = _only(trace, {one.name for one in runs}) if quick and not trace.quick else trace
    asked = scoring(golden, trace, reference, progress)
    return judge(
        compare(golden, trace, runs, scoring=asked, spreads=spreads, templates=bank, maker=maker),
        golden=golden.name,
        candidate=trace.engine,
        settings=trace.settings,
        environment=differences(golden.provenance, trace.settings),
    )


def _only(trace: Trace, names: set[str]) -> Trace:
    """The trace without the passes of other runs."""
    wide = None if trace.upcast is None else _only(trace.upcast, names)
    return replace(trace, passes=tuple(one for one in trace.passes if one.run in names), upcast=wide)


def scoring(golden: Golden, trace: Trace, reference: str | Path | Reference | None, progress: Progress) -> Scoring:
    """What only a live reference can say: tokens behind a divergence, what quantised weights should give."""
    free = tuple(diverged(golden, trace))
    scheme, unknown = trace.settings.get("weights"), trace.settings.get("quantised")
    scheme = scheme if scheme in quantise.SCHEMES else None
    if not free and scheme is None and unknown is None:
        return Scoring()
    try:
        found = reference_of(golden, reference)
    except StaleError as error:
        return Scoring(reason=error.problem)  # what was run still counts; the wrong model is not asked about it
    if found is None:
        return Scoring(reason="the golden's model is not at hand to ask")
    model, stream = found.directory, found.stream
    dtype = declared_precision(trace.settings)
    if dtype not in hf.DTYPES:
        return Scoring(reason=f"the candidate computes in {dtype}")
    if stream and (scheme is not None or unknown is not None):
        return Scoring(reason="the reference is streamed, and its weights are not quantised on the way")
    asked = {index for index, _ in free} if scheme is None and unknown is None else range(len(golden.requests))
    if strayed := scorer.strayed(str(model), golden, sorted(asked), stream=stream):
        return Scoring(reason=strayed)

    def quantised(
        name: str,
        requests: Sequence[Request] = golden.requests,
        continuations: Sequence[Sequence[int]] = golden.continuations,
        precision: str = golden.precision,
    ) -> Rows:
        progress(f"reference with {name} weights")
        return scorer.quantised_centre(
            str(model), requests, continuations, scheme=name, dtype=dtype, precision=precision
        )

    rescored = None
    if free:
        progress("reference on the candidate's own tokens")
        weights = dtype if dtype in golden.centres else None
        rescored = (
            quantised(scheme, [golden.requests[index] for index, _ in free], [tokens for _, tokens in free])
            if scheme is not None
            else scorer.rescore(
                str(model), golden.requests, free, precision=golden.precision, weights=weights, stream=stream
            )
        )
    return Scoring(
        free=rescored,
        continuations=free,
        centre=None if scheme is None else quantised(scheme),
        nearest=None if unknown is None else quantised(str(unknown), precision=dtype),
        nearest_wide=None if unknown is None or dtype == "float32" else quantised(str(unknown)),
    )
