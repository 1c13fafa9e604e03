"""verify: what a candidate said, scored by a reference that is streamed from disk -> Verdict."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from harness import answers, suites
from harness.comparison.own import verify as compare_own
from harness.engines.spec import parse_spec
from harness.engines.streaming import engine as streaming
from harness.engines.streaming import hidden
from harness.environment import differences, machine, versions
from harness.errors import UsageError
from harness.flow.candidates import engine_of
from harness.flow.references import model_name
from harness.flow.running import free_trace, silent
from harness.numerics.constants import EFFECT
from harness.numerics.sketch import Sketcher
from harness.replicas import streamed_floor
from harness.traces import load_trace
from harness.values import Floor, Generation, Golden, ModelRef, Request, Suite, Trace, Verdict
from harness.verdict import judge

Progress = Callable[[str], None]

#: Variants that the noise of a step is measured on: each costs the arithmetic of a pass, and no reading.
REPLICAS = 8


def verify(
    candidate: str | Path | Trace,
    *,
    model: str | Path,
    suite: Suite | str | Path | None = None,
    reference: str = "stream",
    dtype: str | None = None,
    replicas: int = REPLICAS,
    progress: Progress = silent,
) -> Verdict:
    """Is what the candidate said what the model would have said, but for ties?

    Args:
        candidate: a SPEC, which then continues the suite; a trace or its file; or a file of JSON lines.
        model: directory of the reference's checkpoint.
        suite: what the candidate continued; a file of JSON lines brings its own prompts.
        reference: SPEC of the streamed reference, ``stream`` with its keys.
        dtype: precision that the candidate computes in, where it does not say; the checkpoint's own by default.
        replicas: variants of the reference in that precision, for the noise of each step; 0 for none: then a token
            that differs is `unmeasured`.
        progress: called with a few words before each piece.

    Raises:
        HarnessError: for input that cannot be used.
    """
    started = time.perf_counter()
    if replicas == 1:
        raise UsageError("one replica is no measure of noise", fix="Draw two at least, or 0 to judge no token")
    parsed = parse_spec(reference)
    if parsed.engine != "stream":
        raise UsageError(f"{reference} is no streamed reference", fix="Write stream:key=value,...")
    suite = suites.load_suite(suite) if isinstance(suite, str | Path) else suite
    # Opened for its config and tokenizer alone: nothing of its weights is read.
    with streaming.build(parsed, model=str(model)) as opened:
        native = str(opened.settings["native_dtype"])
        suite, requests, trace = _said(candidate, suite, opened, dtype or native, progress)
        options, vocabulary, stop_ids = opened.options, opened.vocabulary, opened.stop_ids
    precision = dtype or str(trace.settings.get("dtype", native))
    if precision not in EFFECT:
        raise UsageError(f"no round-off can be measured in {precision}", fix=f"Name one of {', '.join(EFFECT)}")
    trace = replace(trace, settings={**trace.settings, "dtype": precision})
    if trace.vocabulary == answers.UNKNOWN:
        trace = replace(trace, vocabulary=vocabulary)
    asked = _asked(suite, requests, str(model), vocabulary, stop_ids if suite.stop == "eos" else frozenset())
    options = replace(
        options,
        dtype=options.dtype or ("float64" if precision == "float32" else "float32"),
        # What a correct implementation in that precision has loaded (numerics.md 2.2).
        weights=options.weights or (precision if precision not in ("float32", native) else None),
    )
    scored, missing = _scored(asked, trace, options, precision, replicas, progress)
    runs = suite.runs if not trace.quick else [one for one in suite.runs if one.quick]
    if dtype is None and "versions" not in trace.settings:
        missing.append(f"the candidate's precision: taken to be the checkpoint's own, {native}")
    comparison = compare_own(asked, scored, trace, runs, missing=missing)
    return judge(
        comparison,
        golden=f"{asked.name} (streamed in {options.dtype})",
        candidate=trace.engine,
        settings=trace.settings,
        environment=differences({"versions": versions(), "machine": machine()}, trace.settings),
        seconds=time.perf_counter() - started,
    )


def _said(
    candidate: str | Path | Trace,
    suite: Suite | None,
    reference: streaming.StreamEngine,
    dtype: str,
    progress: Progress,
) -> tuple[Suite, tuple[Request, ...], Trace]:
    """The work, its prompts as the reference's tokenizer has them, and what the candidate made of it."""
    path = None if isinstance(candidate, Trace) else Path(candidate)
    if path is not None and path.suffix == ".jsonl":
        given = answers.read_answers(path, reference.tokenizer)
        suite = answers.suite_of(given, "answers")
        requests = reference.resolve(suite)
        return suite, requests, answers.trace_of(given, requests, suite, name=path.name, dtype=dtype)
    if suite is None:
        raise UsageError("the suite that was continued is not named", fix="Add --suite FILE")
    requests = reference.resolve(suite)
    if isinstance(candidate, Trace):
        return suite, requests, candidate
    assert path is not None
    if path.is_file():
        return suite, requests, load_trace(path)
    with engine_of(str(candidate), reference.directory, progress) as engine:
        return suite, requests, free_trace(engine, suite, progress=progress)


def _asked(
    suite: Suite, requests: tuple[Request, ...], model: str, vocabulary: int, stop_ids: frozenset[int]
) -> Golden:
    """The work as a golden of which no continuation is known."""
    name = model_name(Path(model))
    return Golden(
        name=f"{name}/{suite.name}",
        suite=suite,
        requests=requests,
        generations=tuple(Generation(tokens=(), finish="length") for _ in requests),
        model=ModelRef(name=name, path=None, digest="", signature="", dtype=""),
        tokenizer_digest=None,
        stop_ids=tuple(sorted(stop_ids)),
        vocabulary=vocabulary,
        precision="",
        rows=Sketcher(vocabulary).rows(),
        centres={},
        floors={},
        directions={},
        provenance={},
    )


def _scored(
    asked: Golden,
    trace: Trace,
    options: streaming.Options,
    precision: str,
    replicas: int,
    progress: Progress,
) -> tuple[Golden, list[str]]:
    """The candidate's own continuations, each once, with the reference's rows and its round-off in ``precision``."""
    pairs = list(
        dict.fromkeys(
            (index, given)
            for one in trace.passes
            for index, given in zip(one.requests, one.generations, strict=False)
            if given.tokens and all(token < asked.vocabulary for token in given.tokens)
        )
    )
    requests = tuple(asked.requests[index] for index, _ in pairs)
    generations = tuple(Generation(tokens=given.tokens, finish=given.finish) for _, given in pairs)
    sequences = [(*request.prompt_ids, *given.tokens) for request, given in zip(requests, generations, strict=True)]
    starts = [len(request.prompt_ids) for request in requests]
    if not sequences:
        return asked, []
    with _engine(options, "centre", progress) as engine:
        rows = engine.score(sequences, starts, keep=True)[0]
    floors: dict[str, Floor] = {}
    missing: list[str] = []
    if replicas:
        noisy = replace(options, dtype=precision, weights=None)
        with _engine(noisy, "floor", progress) as engine:
            floor = streamed_floor(engine, sequences, starts, rows, prompts=len(requests), count=replicas)
        if floor is None:
            missing.append(f"the noise of each step: the reference is not finite in {precision}")
        else:
            floors[precision] = floor
    else:
        missing.append("the noise of each step: no replica was drawn, so no tie can be told from a bug")
    _forget(options)
    scored = replace(
        asked, requests=requests, generations=generations, rows=rows, floors=floors, precision=str(options.dtype)
    )
    return scored, missing


def _engine(options: streaming.Options, part: str, progress: Progress) -> streaming.StreamEngine:
    """A streamed reference that commits to a part of the directory of its own."""
    work = None if options.work is None else str(Path(options.work) / part)
    engine = streaming.StreamEngine(replace(options, work=work), text=f"reference ({part})")
    engine.progress = lambda text: progress(f"{part}: {text}")
    return engine


def _forget(options: streaming.Options, parts: Sequence[str] = ("centre", "floor")) -> None:
    """What was kept for a run that is killed between two passes is not needed any more."""
    for part in parts if options.work is not None else ():
        hidden.forget(Path(str(options.work)) / part)
