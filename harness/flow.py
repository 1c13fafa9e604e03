"""record, check: the only place where engines, goldens, comparison and verdict are wired together."""

from __future__ import annotations

import os
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import checkpoint, scorer, store, suites
from harness.compare import FUNCTION_VIEWS, Spreads, compare, diverged
from harness.compare.context import declared_precision
from harness.engines import Engine, build_engine, hf, runner
from harness.environment import machine, versions
from harness.errors import EngineError, GoldenError, HarnessError, ModelError, StaleError, UsageError
from harness.numerics import quantise
from harness.numerics.constants import EFFECT, REPLICAS
from harness.values import Golden, ModelRef, Request, Rows, Run, Scoring, Status, Suite, Trace, Verdict, View
from harness.verdict import failed, judge

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Progress = Callable[[str], None]
CANDIDATES = "candidates.toml"


def _silent(_text: str) -> None:
    return None


# --- check -------------------------------------------------------------------------------------


def check(
    golden: Golden | str | Path,
    candidate: Any,
    *,
    reference: str | Path | None = None,
    quick: bool = False,
    upcast: bool = True,
    spreads: Spreads | None = None,
    progress: Progress = _silent,
) -> Verdict:
    """Is the candidate still the same model as the golden's?

    Args:
        golden: a golden, or the directory of one.
        candidate: a SPEC, an Engine, a transformers model, or a Trace.
        reference: directory of the golden's model, where it does not lie beside the golden.
        quick: only the suite's quick runs.
        upcast: ask both questions, also the one about the function, for which a copy of the candidate is widened
            to float32. Without it a candidate in 16 bits is judged as shipped alone.
        spreads: scatter of each statistic between families by precision; the null bench leaves a family's own out.
        progress: called with a few words before each pass.

    Raises:
        HarnessError: for input that cannot be used. An engine that fails gives the status `error` instead.
    """
    started = time.perf_counter()
    if isinstance(candidate, str):
        # The spec is read before the golden: a typing error should not cost the time of loading anything.
        build_engine(candidate)
    golden = _read(golden)
    if isinstance(candidate, Trace):
        return _judge(golden, candidate, _asked(golden, quick), reference, spreads, progress, started)
    name = candidate if isinstance(candidate, str) else getattr(candidate, "spec", type(candidate).__name__)
    try:
        engine = _engine(golden, candidate, reference)
        with engine:
            _refuse_other_model(golden, engine)
            if engine.vocabulary < golden.vocabulary:
                problem = f"the candidate has {engine.vocabulary} logit columns, the reference {golden.vocabulary}"
                fix = "Do not cut the vocabulary; padding it is fine"
                return failed(
                    Status.STRUCTURAL, problem, golden=golden.name, candidate=name, fix=fix, check="vocabulary"
                )
            runs = _asked(golden, quick)
            trace = _run(golden, engine, runs, progress)
            if upcast:
                trace = _with_upcast(golden, engine, trace, runs, progress)
    except StaleError as error:
        return failed(Status.STALE, error.problem, golden=golden.name, candidate=name, fix=error.fix, check="model")
    except EngineError as error:
        return failed(Status.ERROR, error.problem, golden=golden.name, candidate=name, fix=error.fix, check="engine")
    except HarnessError:
        raise
    except Exception as error:  # a port under test can raise anything, and that is a verdict, not our crash
        if os.environ.get("HARNESS_TRACEBACK"):
            raise
        problem = f"{type(error).__name__}: {str(error).strip() or 'no message'}"
        fix = "Set HARNESS_TRACEBACK=1 to see where it was raised"
        return failed(Status.ERROR, problem, golden=golden.name, candidate=name, fix=fix, check="engine")
    return _judge(golden, trace, runs, reference, spreads, progress, started)


def _judge(
    golden: Golden,
    trace: Trace,
    runs: Sequence[Run],
    reference: str | Path | None,
    spreads: Spreads | None,
    progress: Progress,
    started: float,
) -> Verdict:
    scoring = _scoring(golden, trace, reference, progress)
    comparison = compare(golden, trace, runs, scoring=scoring, spreads=spreads)
    seconds = time.perf_counter() - started
    return judge(comparison, golden=golden.name, candidate=trace.engine, settings=trace.settings, seconds=seconds)


def _with_upcast(golden: Golden, engine: Engine, trace: Trace, runs: Sequence[Run], progress: Progress) -> Trace:
    """The trace with that of a copy of the live candidate, widened to float32 as it is (numerics.md 2.1)."""
    if declared_precision(trace.settings) in ("float32", "float64"):
        return trace
    if "upcast" not in engine.capabilities:
        return replace(trace, upcast_reason=f"{engine.spec} cannot be widened to float32")
    try:
        with engine.upcast() as wide:
            found = _run(golden, wide, runs, lambda text: progress(f"float32 copy: {text}"), FUNCTION_VIEWS)
            # Afterwards: a candidate that keeps state between requests must not be brought into one by the audit.
            narrow = wide.narrow_operation()
            if narrow:
                reason = f"its float32 copy still computes in 16 bits ({narrow})"
                return replace(trace, upcast_reason=reason)
    except Exception as error:  # whatever a candidate raises when it is widened, its run as shipped still counts
        if os.environ.get("HARNESS_TRACEBACK"):
            raise
        first = (str(error).strip() or "no message").splitlines()[0]
        return replace(trace, upcast_reason=f"its float32 copy fails ({type(error).__name__}: {first})")
    return replace(trace, upcast=found)


def _scoring(golden: Golden, trace: Trace, reference: str | Path | None, progress: Progress) -> Scoring:
    """What only a live reference can say: tokens behind a divergence, what quantised weights should give."""
    free = tuple(diverged(golden, trace))
    scheme, unknown = trace.settings.get("weights"), trace.settings.get("quantised")
    scheme = scheme if scheme in quantise.SCHEMES else None
    if not free and scheme is None and unknown is None:
        return Scoring()
    try:
        model = reference_directory(golden, reference)
    except StaleError as error:
        return Scoring(reason=error.problem)  # what was run still counts; the wrong model is not asked about it
    if model is None:
        return Scoring(reason="the golden's model is not at hand to ask")
    dtype = declared_precision(trace.settings)
    if dtype not in hf.DTYPES:
        return Scoring(reason=f"the candidate computes in {dtype}")

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
            else scorer.rescore(str(model), golden.requests, free, precision=golden.precision, weights=weights)
        )
    return Scoring(
        free=rescored,
        continuations=free,
        centre=None if scheme is None else quantised(scheme),
        nearest=None if unknown is None else quantised(str(unknown), precision=dtype),
        nearest_wide=None if unknown is None or dtype == "float32" else quantised(str(unknown)),
    )


def _read(golden: Golden | str | Path) -> Golden:
    return golden if isinstance(golden, Golden) else store.read_golden(Path(golden))


def _engine(golden: Golden, candidate: Any, reference: str | Path | None) -> Engine:
    if isinstance(candidate, str):
        model = reference_directory(golden, reference)
        return build_engine(candidate, model=None if model is None else str(model))
    if isinstance(candidate, Engine):
        return candidate
    if _is_transformers_model(candidate):
        return hf.from_model(candidate)
    raise UsageError(
        f"a {type(candidate).__name__} is not a candidate",
        fix="Give a SPEC, an Engine, a transformers model or a Trace",
    )


def _is_transformers_model(candidate: Any) -> bool:
    from transformers import PreTrainedModel

    return isinstance(candidate, PreTrainedModel)


def reference_directory(golden: Golden, reference: str | Path | None = None) -> Path | None:
    """Where the golden's model lies: as given, else beside the golden; None where it cannot be found.

    Raises:
        ModelError: when the given directory is not there.
        StaleError: when the model there is not the one that the golden was recorded from.
    """
    if reference is not None and not Path(reference).is_dir():
        raise ModelError(f"there is no model directory {reference}", fix="Check the path given as --reference")
    found = Path(reference) if reference is not None else _beside(golden)
    if found is None or not found.is_dir():
        return None
    if checkpoint.identify(found).digest != golden.model.digest:
        raise StaleError(
            f"the model at {found} is not the one that {golden.name} was recorded from",
            fix="Record the golden again, or restore the model; to test other weights write hf:model=DIR",
        )
    return found


def _beside(golden: Golden) -> Path | None:
    path = golden.model.path
    if golden.directory is None or path is None or Path(path).is_absolute():
        return None
    return Path(os.path.normpath(Path(golden.directory) / path))


def _refuse_other_model(golden: Golden, engine: Engine) -> None:
    """Other weights of the same shapes are a candidate to test; other shapes are another model."""
    signature = engine.settings.get("signature")
    if signature is not None and signature != golden.model.signature:
        raise StaleError(
            f"{engine.spec} is another model than the one of {golden.name}: its tensors have other names or shapes",
            fix=f"Check it against a golden of its own, or give weights shaped like {golden.model.name}",
        )


def _asked(golden: Golden, quick: bool) -> list[Run]:
    return [run for run in current_runs(golden) if run.quick or not quick]


def _run(
    golden: Golden,
    engine: Engine,
    runs: Sequence[Run],
    progress: Progress,
    views: tuple[View, ...] | None = None,
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
        progress=progress,
    )


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


def check_all(root: Path, *, quick: bool) -> Iterator[tuple[Path, str]]:
    """Every golden under ``root`` with each candidate that the data beside it names, in order.

    Raises:
        GoldenError: where there is no golden, or no list of candidates beside one.
    """
    goldens = store.list_goldens(root)
    if not goldens:
        raise GoldenError(f"there is no golden under {root}", fix="Name the directory with --root, or record one")
    for directory in goldens:
        for candidate in candidates(directory, quick=quick):
            yield directory, candidate


def candidates(directory: Path, *, quick: bool) -> list[str]:
    """The SPECs to check a golden with, from `candidates.toml` beside it or one directory up."""
    file = next((path / CANDIDATES for path in (directory, directory.parent) if (path / CANDIDATES).is_file()), None)
    if file is None:
        raise GoldenError(
            f"no {CANDIDATES} lies beside {directory} or one directory up",
            fix='Write one with quick = ["hf:dtype=float32"] and full = []',
        )
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise GoldenError(f"{file} is not TOML ({error})", fix="Mend the line that it names") from None
    lists = [data.get("quick", []), [] if quick else data.get("full", [])]
    unknown = sorted(set(data) - {"quick", "full"})
    if unknown or not all(isinstance(one, list) and all(isinstance(spec, str) for spec in one) for one in lists):
        wrong = f"the key {unknown[0]!r}" if unknown else "something that is no list of SPECs"
        raise GoldenError(f"{file} holds {wrong}", fix='Write quick = ["hf:dtype=float32"] and full = ["..."]')
    specs = [*lists[0], *lists[1]]
    if not specs:
        raise GoldenError(f"{file} names no candidate", fix='Write quick = ["hf:dtype=float32"], or remove the golden')
    for spec in specs:
        try:
            build_engine(spec)
        except UsageError as error:
            raise GoldenError(f"{file}: {error.problem}", fix=error.fix) from None
    return specs


# --- record ------------------------------------------------------------------------------------


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
    progress: Progress = _silent,
) -> Golden:
    """Record what the reference does, and how much round-off it has in each precision.

    Args:
        model: a transformers model directory.
        suite: a suite, or its file.
        out: directory of the golden, ``golden/NAME/SUITE``.
        precisions: precisions that candidates will declare; each costs ``replicas`` passes.
        replicas: drawn replicas for a floor.
        parallel: sizes of tensor parallelism that candidates will declare; each gets floors of its own.
        update: replace a golden that is there.
        reason: kept in the golden's history.
        progress: called with a few words before each step.

    Raises:
        HarnessError: for input that cannot be used; then nothing is written.
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
    hf.must_exist(str(model))
    identity = checkpoint.identify(Path(model))
    progress("resolving prompts")
    requests, tokenizer_digest, eos_ids, vocabulary = _resolve(str(model), suite)
    stop_ids = eos_ids if suite.stop == "eos" else frozenset()
    from harness.reference import observe

    seen = observe(
        str(model),
        requests,
        stop_ids=stop_ids,
        precisions=precisions,
        replicas=replicas,
        parallel=parallel,
        progress=progress,
    )
    golden = Golden(
        name=f"{out.resolve().parent.name}/{out.resolve().name}",
        suite=suite,
        requests=requests,
        generations=seen.generations,
        model=ModelRef(
            name=_model_name(Path(model)),
            path=_relative(Path(model), out),
            digest=identity.digest,
            signature=identity.signature,
            dtype=identity.dtype,
        ),
        tokenizer_digest=tokenizer_digest,
        stop_ids=tuple(sorted(stop_ids)),
        vocabulary=vocabulary,
        precision=seen.precision,
        rows=seen.rows,
        centres=seen.centres,
        floors=seen.floors,
        directions=seen.directions,
        provenance={
            "engine": "hf",
            "versions": versions(),
            "machine": machine(),
            "suite_path": None if suite_path is None else _relative(suite_path, out),
            "precision_reason": seen.precision_reason,
            "left_out": dict(seen.left_out),
            "history": _history(reason, previous),
        },
    )
    progress("writing")
    store.write_golden(golden, out)
    return replace(golden, directory=str(out))


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


def _resolve(model: str, suite: Suite) -> tuple[tuple[Request, ...], str | None, frozenset[int], int]:
    with hf.HFEngine(hf.Options(model=model), text="reference") as engine:
        return engine.resolve(suite), engine.tokenizer_digest, engine.stop_ids, engine.vocabulary


def _model_name(path: Path) -> str:
    """The directory's name; for golden/NAME/model it is NAME."""
    path = path.resolve()
    return path.parent.name if path.name == "model" else path.name


def _relative(path: Path, start: Path) -> str | None:
    """``path`` as seen from ``start`` where both lie under the working directory: goldens travel with their repo."""
    here = Path.cwd().resolve()
    inside = all(here in (place.resolve(), *place.resolve().parents) for place in (path, start))
    return Path(os.path.relpath(path.resolve(), start.resolve())).as_posix() if inside else None


def _history(reason: str | None, previous: Golden | None) -> list[dict[str, str]]:
    history = previous.provenance.get("history") if previous is not None else None
    return [
        *(history if isinstance(history, list) else []),
        {"date": time.strftime("%Y-%m-%d", time.gmtime()), "reason": reason or "recorded"},
    ]


# --- the reference -----------------------------------------------------------------------------


def reference_model(
    golden: Golden | str | Path, path: str | Path | None = None, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """A fresh transformers model, the one that the golden was recorded from.

    Args:
        golden: a golden or its directory.
        path: the model's directory, where it does not lie beside the golden.
        dtype: torch dtype to load in; the checkpoint's own by default.

    Raises:
        ModelError: where the model cannot be found.
        StaleError: where it is another one by now.
    """
    golden = _read(golden)
    directory = reference_directory(golden, path)
    if directory is None:
        raise ModelError(f"the model of {golden.name} is not beside it", fix="Pass its directory as path=")
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    with hf.HFEngine(hf.Options(model=str(directory), dtype=name), text="reference") as engine:
        return engine.model
