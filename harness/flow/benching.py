"""bench: the speed of candidates, each measurement in a process of its own, and none before its verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from harness import suites
from harness.engines import build_engine, hf
from harness.engines.ranks.engine import ParallelEngine, why_not
from harness.errors import EngineError, UsageError
from harness.flow.references import read, reference_directory
from harness.flow.running import Progress, silent
from harness.speed.benching import Bench, Plan, Result, Subject, Unmeasured
from harness.speed.kinds import burst, completion, latency, modules, scaling
from harness.speed.kinds.scaling import Point, Scaling
from harness.speed.roofline import Limit
from harness.speed.shapes import Shape, refuse_too_long
from harness.speed.sides import Side
from harness.values import Golden, Request

_TIMEOUT = 300.0
#: Different prompts of a burst; more would tell nothing new.
_PROMPTS = 64
_SEED = 7


def bench(
    specs: Sequence[str],
    *,
    golden: str | Path | None = None,
    model: str | Path | None = None,
    suite: str | Path | None = None,
    plan: Plan | None = None,
    quick: bool = False,
    timeout: float = _TIMEOUT,
    progress: Progress = silent,
) -> Bench:
    """How fast are some candidates, by the measurements that articles on inference report?

    Args:
        specs: candidates.
        golden: directory of a golden, whose prompts are what is run. It judges each candidate first; one that is not ok
            is not measured.
        model: directory of weights for a SPEC that names none; with a golden, its model where it is not beside it.
        suite: file whose prompts are completed; the golden's own where there is none.
        plan: what is measured.
        quick: judge by the golden's quick runs only.
        timeout: seconds without progress after which a process has failed.
        progress: called with a few words.

    Raises:
        UsageError: for a SPEC or a number that cannot be used, and for prompts that do not fit the model's context.
    """
    if not specs:
        raise UsageError("there is nothing to measure", fix="Name a SPEC, e.g. hf:dtype=float32")
    if golden is None and model is None:
        raise UsageError("there is no model to run", fix="Give --golden DIR, or --model DIR")
    plan = plan or Plan()
    if "scaling" in plan.kinds:
        plan = replace(plan, ranks=scaling.counts(plan.ranks))
    found = None if golden is None else read(golden)
    directory = Path(model) if model is not None else None
    if found is not None:
        directory = reference_directory(found, model)
    for spec in specs:
        build_engine(spec, model=None if directory is None else str(directory))
    config = None if directory is None else hf.load_config(str(directory))
    material = _material(found, directory, config, suite)
    _refuse_too_long(plan, config)
    session = _Session(
        golden=None if golden is None else Path(golden),
        model=directory,
        config=config,
        plan=plan,
        material=material,
        quick=quick,
        timeout=timeout,
        progress=progress,
    )
    name = found.model.name if found is not None else directory.name if directory is not None else ""
    return Bench(
        golden=None if found is None else found.name,
        model=name,
        plan=plan,
        subjects=tuple(session.subject(spec) for spec in dict.fromkeys(specs)),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Material:
    """What is run: tokens to cut prompts from, and the rows of a suite, none where there is no suite."""

    stream: tuple[int, ...]
    requests: tuple[Request, ...]
    name: str

    def prompts(self, count: int, length: int) -> tuple[tuple[int, ...], ...]:
        """Token ids of some prompts of one length."""
        stream = cycle(self.stream)
        return tuple(tuple(islice(stream, length)) for _ in range(count))


def _material(found: Golden | None, directory: Path | None, config: Any, suite: str | Path | None) -> _Material:
    requests: tuple[Request, ...] = ()
    name = ""
    if suite is not None:
        if directory is None:
            raise UsageError(f"{suite} is text, and no model is there to read it", fix="Give --model DIR")
        loaded = suites.load_suite(suite)
        text = config.get_text_config()
        requests = suites.resolve(
            loaded,
            hf.load_tokenizer(str(directory)),
            context=hf.context_length(text),
            vocabulary=int(text.vocab_size),
            model=str(directory),
        )
        name = loaded.name
    elif found is not None:
        requests, name = found.requests, found.suite.name
    if requests:
        return _Material(
            stream=tuple(token for one in requests for token in one.prompt_ids), requests=requests, name=name
        )
    # Synthetic prompts: how long a dense model takes does not depend on which tokens it is given.
    vocabulary = int(config.get_text_config().vocab_size)
    drawn = np.random.default_rng(_SEED).integers(vocabulary, size=8191)
    return _Material(stream=tuple(int(one) for one in drawn), requests=(), name="")


def _refuse_too_long(plan: Plan, config: Any) -> None:
    context = None if config is None else hf.context_length(config.get_text_config())
    if plan.new < 2:
        raise UsageError(f"{plan.new} new tokens leave no later one to be timed", fix="Ask for 2 or more")
    asked = []
    if set(plan.kinds) & {"latency", "scaling", "modules"}:
        asked.append((plan.prompt, plan.new, "Give fewer --prompt-tokens or --new-tokens"))
    if "burst" in plan.kinds:
        size = plan.burst
        fix = f"Give a smaller one, e.g. --burst {size.count}x{max(1, (context or 0) - size.new)}+{size.new}"
        asked.append((size.prompt, size.new, f"{fix}, or name other measurements with --kind"))
    for prompt, new, fix in asked:
        refuse_too_long(prompt, new, context, fix=fix)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Session:
    """The candidates of one bench, one after the other: nothing else of ours runs beside a measurement."""

    golden: Path | None
    model: Path | None
    config: Any
    plan: Plan
    material: _Material
    quick: bool
    timeout: float
    progress: Progress

    def subject(self, spec: str) -> Subject:
        """One candidate: its verdict, and then its numbers."""
        verdict = self._verdict(spec)
        if verdict is not None and not verdict["ok"]:
            return Subject(spec=spec, verdict=verdict)
        results: dict[str, Result] = {}
        settings: Mapping[str, Any] = {}
        limits: dict[str, Limit] = {}
        for kind in self.plan.kinds:
            if kind == "scaling":
                results[kind] = self._scaling(spec, verdict)
                continue
            results[kind], shown, reached = self._measured(kind, spec)
            settings, limits = settings or shown, limits | reached
        return Subject(spec=spec, verdict=verdict, results=results, settings=settings, limits=limits)

    def _side(self, spec: str) -> Side:
        return Side(spec, model=self.model, checkout=None, timeout=self.timeout, progress=self.progress)

    def _verdict(self, spec: str) -> Mapping[str, Any] | None:
        if self.golden is None:
            return None
        with self._side(spec) as side:
            return side.check(self.golden, self.model, quick=self.quick)

    def _work(self, kind: str) -> Any:
        """What a process is asked to do; None for what cannot be done."""
        plan, material = self.plan, self.material
        if kind == "completion":
            if not material.requests:
                return None
            return completion.Work(
                requests=material.requests, batch=plan.batch, repeats=plan.repeats, name=material.name
            )
        if kind == "burst":
            prompts = material.prompts(min(_PROMPTS, plan.burst.count), plan.burst.prompt)
            return burst.Work(prompts=prompts, size=plan.burst, batch=plan.batch)
        (prompt,) = material.prompts(1, plan.prompt)
        return latency.Work(prompt=prompt, new=plan.new, repeats=plan.repeats)

    def _measured(self, kind: str, spec: str) -> tuple[Result, Mapping[str, Any], dict[str, Limit]]:
        """The result of one kind, some of the engine's settings, and the limits of a latency."""
        work = self._work(kind)
        if work is None:
            return Unmeasured(reason="there are no rows; give --suite FILE, e.g. prompts/completion.toml"), {}, {}
        if kind == "modules":
            reason = modules.why_not(build_engine(spec, model=None if self.model is None else str(self.model)))
            if reason:
                return Unmeasured(reason=reason), {}, {}
        try:
            with self._side(spec) as side:
                settings = side.open()
                result: Result = side.measure(kind, work)
                limits = self._limits(side) if kind == "latency" else {}
        except EngineError as error:
            # The others' numbers are not lost by it.
            return Unmeasured(reason=error.problem, failed=True), {}, {}
        return result, settings, limits

    def _limits(self, side: Side) -> dict[str, Limit]:
        shape = Shape(batch=1, prompt=self.plan.prompt, new=self.plan.new)
        found = side.roofline([shape])
        limits = {part: found.limit(part, shape.batch, shape.prompt) for part in ("prefill", "decode")}
        return {part: one for part, one in limits.items() if one is not None}

    def _scaling(self, spec: str, verdict: Mapping[str, Any] | None) -> Scaling | Unmeasured:
        reason = scaling.why_not(spec)
        if reason:
            return Unmeasured(reason=reason)
        return Scaling(points=tuple(self._point(spec, ranks, verdict) for ranks in self.plan.ranks))

    def _point(self, given: str, ranks: int, verdict: Mapping[str, Any] | None) -> Point:
        """One number of ranks, judged by itself: another cut is another candidate."""
        spec = scaling.at_ranks(given, ranks)
        point = Point(ranks=ranks, spec=spec)
        engine = build_engine(spec, model=None if self.model is None else str(self.model))
        if isinstance(engine, ParallelEngine) and self.config is not None:
            reason = why_not(engine.options.layout, self.config)
            if reason:
                return replace(point, reason=reason)
        if spec != given:
            verdict = self._verdict(spec)
        if verdict is not None:
            point = replace(point, status=verdict["status"])
            if not verdict["ok"]:
                reason = f"it is {verdict['status']}, and no speed is told"
                return replace(point, reason=reason, exit_code=verdict["exit_code"])
        result, settings, _limits = self._measured("latency", spec)
        if isinstance(result, Unmeasured):
            return replace(point, reason=result.reason, exit_code=EngineError.exit_code if result.failed else 0)
        assert isinstance(result, latency.Latency)
        return replace(point, latency=result, threads=settings.get("threads"))
