"""record: what the reference does on a suite, and how much round-off it has in each precision; updates, accountable."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness import checkpoint, store, suites
from harness.changes import compare_goldens
from harness.engines import build_engine, hf
from harness.engines.spec import is_port, is_streamed, parse_spec
from harness.engines.streaming import engine as streaming
from harness.environment import machine, versions
from harness.errors import GoldenError, ModelError, UsageError
from harness.flow.references import beside, model_name, read
from harness.flow.running import silent
from harness.flow.speculating import LOOK_UP, observe_streamed
from harness.numerics.constants import EFFECT, REPLICAS
from harness.reference import Observed, observe, observe_foreign
from harness.values import Changes, Golden, Kind, ModelRef, Request, Suite

Progress = Callable[[str], None]
Show = Callable[[Changes], None]

#: What a golden says of itself that changes each time it is recorded, and is no reason to write it.
_PASSING = ("history",)


def _nobody(_changes: Changes) -> None:
    return None


def record(
    model: str | Path,
    suite: Suite | str | Path,
    *,
    out: str | Path,
    precisions: Sequence[str] = tuple(EFFECT),
    replicas: int = REPLICAS,
    parallel: Sequence[int] = (),
    update: bool = False,
    reason: str | None = None,
    stream: str | None = None,
    draft: str | Golden = LOOK_UP,
    show: Show = _nobody,
    progress: Progress = silent,
) -> Golden:
    """Record what the reference does, and how much round-off it has in each precision.

    Args:
        model: a transformers model directory; or the SPEC of a port, ``py:pkg.mod:build?model=DIR``, whose golden
            has no floors and can only be repeated exactly.
        suite: a suite, or its file.
        out: directory of the golden, ``golden/NAME/SUITE``.
        precisions: precisions that candidates will declare; each costs ``replicas`` passes.
        replicas: drawn replicas for a floor.
        parallel: sizes of tensor parallelism that candidates will declare; each gets floors of its own.
        update: replace a golden that is there, if the change is round-off or a reason is given.
        reason: why, kept in the golden's history.
        stream: for a model that is larger than memory, the SPEC that it is streamed by, ``stream`` with its keys.
        draft: what then proposes continuations: ``lookup``, the SPEC of an engine, a file of what one has said, or a
            golden.
        show: called with what an update changes, before anything is written or refused.
        progress: called with a few words before each step.

    Raises:
        HarnessError: for input that cannot be used, or an update beyond round-off without a reason; then nothing is
            written.
    """
    out = Path(out)
    previous = _previous(out, update)
    unknown = [precision for precision in precisions if precision not in EFFECT]
    if unknown:
        raise UsageError(f"no floor can be measured in {unknown[0]}", fix=f"Choose among {', '.join(EFFECT)}")
    if replicas < 2 or any(size < 2 for size in parallel):
        raise UsageError(
            f"{replicas} replicas and tensor parallelism of {list(parallel)} cannot be measured",
            fix="Draw two replicas at least (24 is the default), and name sizes from 2 on",
        )
    suite_path = None if isinstance(suite, Suite) else Path(suite)
    suite = suite if isinstance(suite, Suite) else suites.load_suite(suite)
    work = _Work(suite=suite, precisions=precisions, replicas=replicas, parallel=parallel, progress=progress)
    if stream is not None:
        seen = _streamed(Path(model), work, stream, draft)
    else:
        seen = _foreign(str(model), work) if is_port(str(model)) else _own(Path(model), work)
    golden = Golden(
        name=f"{out.resolve().parent.name}/{out.resolve().name}",
        suite=suite,
        requests=seen.requests,
        generations=seen.observed.generations,
        model=replace(seen.model, path=None if seen.directory is None else _relative(seen.directory, out)),
        tokenizer_digest=seen.tokenizer_digest,
        stop_ids=tuple(sorted(seen.stop_ids)),
        vocabulary=seen.vocabulary,
        precision=seen.observed.precision,
        rows=seen.observed.rows,
        centres=seen.observed.centres,
        floors=seen.observed.floors,
        directions=seen.observed.directions,
        provenance={
            "engine": seen.engine,
            "settings": seen.settings,
            "versions": versions(),
            "machine": machine(),
            "suite_path": None if suite_path is None else _relative(suite_path, out),
            "precision_reason": seen.observed.precision_reason,
            "left_out": dict(seen.observed.left_out),
            "history": [],
        },
    )
    return _written(golden, out, previous, reason, show, progress)


def rerecord(
    golden: str | Path,
    *,
    reference: str | Path | None = None,
    reason: str | None = None,
    show: Show = _nobody,
    progress: Progress = silent,
) -> Golden:
    """Record a golden again from its own model and suite, with the floors that it has.

    Args:
        golden: directory of the golden.
        reference: directory of its model, where that does not lie beside it; or ``stream:...``, to stream it so.
            What was recorded by streaming is streamed anyway.
        reason: why; needed for a change beyond round-off.
        show: called with the changes, before anything is written or refused.
        progress: called with a few words before each step.

    Raises:
        HarnessError: as `record`; where the model is not at hand; for a golden of a port, whose code is not run unless
            it is named.
    """
    old = read(golden)
    model = _model_of(old, reference)
    path = old.provenance.get("suite_path")
    suite = Path(os.path.normpath(Path(golden) / path)) if isinstance(path, str) else None
    left_out = old.provenance.get("left_out") or {}
    plain = [name for name in (*old.floors, *left_out) if name in EFFECT]
    stream = _stream_of(old, reference)
    return record(
        model,
        suite if suite is not None and suite.is_file() else old.suite,
        out=golden,
        precisions=plain,
        replicas=next((floor.replicas for floor in old.floors.values()), REPLICAS),
        parallel=sorted({int(name.partition("/tp")[2]) for name in old.floors if "/tp" in name}),
        update=True,
        reason=reason,
        stream=stream,
        draft=LOOK_UP if stream is None else old,  # its own tokens, which take one pass if they hold
        show=show,
        progress=progress,
    )


def _model_of(golden: Golden, reference: str | Path | None) -> str | Path:
    """What a golden was recorded from. That its weights are others by now is what the changes will say."""
    engine = golden.provenance.get("engine")
    if isinstance(engine, str) and is_port(engine):
        # A golden comes from others, and what it names is never executed by itself.
        raise UsageError(
            f"{golden.name} was recorded from the port {engine}",
            fix="Name it with --model (and --suite) to run it again",
        )
    if reference is not None and is_streamed(str(reference)):
        reference = streaming.build(parse_spec(str(reference)), model=None).options.model
    model = Path(reference) if reference is not None else beside(golden)
    if model is None or not model.is_dir():
        raise ModelError(f"the model of {golden.name} is not beside it", fix="Name its directory with --model")
    return model


def _stream_of(golden: Golden, reference: str | Path | None) -> str | None:
    """The SPEC by which a golden's model is streamed to record it again, in its own precision; None for in memory."""
    given = reference is not None and is_streamed(str(reference))
    if not given and golden.provenance.get("engine") != "stream":
        return None
    spec = str(reference) if given else "stream"
    named = parse_spec(spec).options
    return spec if "dtype" in named else f"{spec}{',' if named else ':'}dtype={golden.precision}"


# --- what is recorded --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Work:
    suite: Suite
    precisions: Sequence[str]
    replicas: int
    parallel: Sequence[int]
    progress: Progress


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seen:
    """The reference's work, and who it is."""

    engine: str
    settings: dict[str, Any]
    model: ModelRef
    directory: Path | None
    requests: tuple[Request, ...]
    tokenizer_digest: str | None
    stop_ids: frozenset[int]
    vocabulary: int
    observed: Observed


def _own(model: Path, work: _Work) -> _Seen:
    """A transformers model: in float64 where it allows that, with floors."""
    hf.must_exist(str(model))
    identity = checkpoint.identify(model)
    work.progress("resolving prompts")
    with hf.HFEngine(hf.Options(model=str(model)), text="reference") as engine:
        requests, tokenizer, vocabulary = engine.resolve(work.suite), engine.tokenizer_digest, engine.vocabulary
        stop_ids = engine.stop_ids if work.suite.stop == "eos" else frozenset()
        settings = {
            "model": type(engine.model).__name__,
            "attn": getattr(engine.model.config, "_attn_implementation", "unknown"),
        }
    return _Seen(
        engine="hf",
        settings=settings,
        model=ModelRef(
            name=model_name(model),
            path=None,
            digest=identity.digest,
            signature=identity.signature,
            dtype=identity.dtype,
        ),
        directory=model,
        requests=requests,
        tokenizer_digest=tokenizer,
        stop_ids=stop_ids,
        vocabulary=vocabulary,
        observed=observe(
            str(model),
            requests,
            stop_ids=stop_ids,
            precisions=work.precisions,
            replicas=work.replicas,
            parallel=work.parallel,
            progress=work.progress,
        ),
    )


def _streamed(model: Path, work: _Work, stream: str, draft: str | Golden) -> _Seen:
    """A transformers model that is streamed: its tokens by speculation, floors where they can be had so.

    Raises:
        UsageError: for another engine, or a floor of tensor parallelism.
    """
    parsed = parse_spec(stream)
    if parsed.engine != "stream" or work.parallel:
        raise UsageError(
            f"{stream} cannot be streamed, or not with tensor parallelism", fix="Write stream:key=value,... alone"
        )
    engine = streaming.build(parsed, model=str(model))
    # As fine as a block in memory allows: the weights of a large model are in 16 bits.
    engine.options = replace(engine.options, dtype=engine.options.dtype or "float32")
    with engine:
        work.progress("resolving prompts")
        requests, vocabulary = engine.resolve(work.suite), engine.vocabulary
        stop_ids = engine.stop_ids if work.suite.stop == "eos" else frozenset()
        tokenizer = suites.tokenizer_digest(engine.tokenizer)
        work.progress("digest of the checkpoint")
        identity = checkpoint.identify(model)
        found = observe_streamed(
            engine,
            requests,
            draft=draft,
            stop_ids=stop_ids,
            precisions=work.precisions,
            replicas=work.replicas,
            progress=work.progress,
        )
        mistakes = {request.id: wrong for request, wrong in zip(requests, found.mistakes, strict=True)}
        settings = {
            "model": engine.settings["model"],
            "attn": engine.settings["attn"],
            "passes": found.rounds,
            "draft": draft.name if isinstance(draft, Golden) else Path(draft).name,
            "mistakes": mistakes,
        }
    return _Seen(
        engine="stream",
        settings=settings,
        model=ModelRef(
            name=model_name(model),
            path=None,
            digest=identity.digest,
            signature=identity.signature,
            dtype=identity.dtype,
        ),
        directory=model,
        requests=requests,
        tokenizer_digest=tokenizer,
        stop_ids=stop_ids,
        vocabulary=vocabulary,
        observed=found.observed,
    )


def _foreign(spec: str, work: _Work) -> _Seen:
    """A port: what it shows in the precision it runs in, without floors, since replicas of it cannot be drawn."""
    engine = build_engine(spec)
    directory = getattr(engine, "directory", None)
    identity = None if directory is None else checkpoint.identify(directory)
    tokenizer = None if directory is None else hf.load_tokenizer(str(directory))
    with engine:
        requests = suites.resolve(work.suite, tokenizer, context=None, vocabulary=engine.vocabulary, model=spec)
        stop_ids = frozenset[int]()
        if work.suite.stop == "eos":
            stop_ids = engine.stop_ids or (frozenset() if directory is None else hf.stop_ids_in(str(directory)))
            if not stop_ids:
                raise UsageError(
                    f"{spec} does not say which token ends a text", fix="Name the model's directory: ...?model=DIR"
                )
        observed = observe_foreign(engine, requests, stop_ids=stop_ids, progress=work.progress)
        settings = {key: engine.settings.get(key) for key in ("model", "dtype", "device", "tensor_parallel")}
        vocabulary = engine.vocabulary
    return _Seen(
        engine=spec,
        settings=settings,
        model=ModelRef(
            name=str(settings["model"]) if directory is None else model_name(directory),
            path=None,
            digest="" if identity is None else identity.digest,
            signature="" if identity is None else identity.signature,
            dtype=str(settings["dtype"]) if identity is None else identity.dtype,
        ),
        directory=directory,
        requests=requests,
        tokenizer_digest=suites.tokenizer_digest(tokenizer),
        stop_ids=stop_ids,
        vocabulary=vocabulary,
        observed=observed,
    )


def _relative(path: Path, start: Path) -> str | None:
    """``path`` as seen from ``start`` where both lie under the working directory: goldens travel with their repo."""
    here = Path.cwd().resolve()
    inside = all(here in (place.resolve(), *place.resolve().parents) for place in (path, start))
    return Path(os.path.relpath(path.resolve(), start.resolve())).as_posix() if inside else None


# --- updates -----------------------------------------------------------------------------------


def _previous(out: Path, update: bool) -> Golden | None:
    if not (out / store.JSON_NAME).exists():
        return None
    if not update:
        raise GoldenError(
            f"there is a golden at {out}", fix="Pass --update to replace it, or another directory as --out"
        )
    try:
        return store.read_golden(out)
    except GoldenError:
        return None  # replacing a damaged golden is what --update is for


def _written(
    golden: Golden, out: Path, previous: Golden | None, reason: str | None, show: Show, progress: Progress
) -> Golden:
    """Write the golden, unless it is as it was, or is another by more than round-off and nobody says why."""
    changes = None
    if previous is not None:
        changes = compare_goldens(previous, golden)
        show(changes)
        if changes.worst.needs_reason and not reason:
            raise GoldenError(
                f"{out} would change beyond round-off ({_counted(changes)}), and was left as it is",
                fix="If that is meant, say why with --reason TEXT (pytest: --golden-reason TEXT)",
            )
        if changes.worst is Kind.SAME and not reason and _lasting(previous) == _lasting(golden):
            return previous
    entry = {"date": time.strftime("%Y-%m-%d", time.gmtime()), "reason": reason or "recorded"}
    if changes is not None:
        entry["changes"] = _counted(changes)
    before = previous.provenance.get("history") if previous is not None else None
    history = [*(before if isinstance(before, list) else []), entry]
    golden = replace(golden, provenance={**golden.provenance, "history": history})
    progress("writing")
    store.write_golden(golden, out)
    return replace(golden, directory=str(out))


def _lasting(golden: Golden) -> dict[str, Any]:
    return {key: value for key, value in golden.provenance.items() if key not in _PASSING}


def _counted(changes: Changes) -> str:
    """How many prompts (and other things) changed in which way: "3 same, 1 bug-sized"."""
    counts = Counter(one.kind for one in (*changes.prompts, *changes.general))
    return ", ".join(f"{counts[kind]} {kind.value}" for kind in Kind if counts[kind]) or "nothing to compare"
