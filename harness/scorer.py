"""The live reference: teacher-forces token ids and returns its logits, in true float64 where it can."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harness.engines import hf, runner
from harness.engines.spec import parse_spec
from harness.engines.streaming import engine as streaming
from harness.numerics import metrics, quantise
from harness.numerics.sketch import Sketcher
from harness.values import Centre, Generation, Golden, Request, Rows, Run, Trace

Direction = NDArray[np.float16]

#: Largest model, in parameters, that is recorded in float64: eight bytes each have to fit in memory.
FLOAT64_PARAMETERS = 2 * 10**9


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """The reference's work on one suite."""

    generations: tuple[Generation, ...]
    rows: Rows

    @property
    def continuations(self) -> list[tuple[int, ...]]:
        return [generation.tokens for generation in self.generations]


def open_reference(model: str, dtype: str | None, *, weights: str | None = None) -> hf.HFEngine:
    """The reference implementation in one precision; ``weights`` are cast to a dtype first (the centre R_D)."""
    options = [f"{key}={value}" for key, value in (("dtype", dtype), ("weights", weights)) if value]
    return hf.build(parse_spec("hf:" + ",".join(options)), model=model)


def open_scorer(
    model: str, dtype: str, *, weights: str | None = None, stream: str = ""
) -> hf.HFEngine | streaming.StreamEngine:
    """What is only asked to score whole sequences: as `open_reference`, or streamed by the SPEC ``stream``."""
    if not stream:
        return open_reference(model, dtype, weights=weights)
    return streaming.build_reference(parse_spec(stream), model=model, dtype=dtype, weights=weights)


def reference_precision(model: str) -> tuple[str, str]:
    """("float64", "") for a model that fits and passes the audit, else ("float32", the reason)."""
    with open_reference(model, None) as engine:
        parameters = sum(parameter.numel() for parameter in engine.model.parameters())
    if parameters > FLOAT64_PARAMETERS:
        return "float32", f"{parameters:,} parameters are too many for float64 in memory"
    with open_reference(model, "float64") as engine:
        violations = hf.audit_float64(engine)
    if violations:
        return "float32", f"the float64 audit failed in {len(violations)} operations, e.g. {violations[0]}"
    return "float64", ""


def score(model: str, requests: Sequence[Request], *, stop_ids: frozenset[int], precision: str) -> Scored:
    """Greedy continuations of the reference, then its logits on prompt and continuation in one pass."""
    with open_reference(model, precision) as engine:
        generations = engine.generate(requests, batch_size=None, stop_ids=stop_ids)
        rows = teacher_forced(engine, requests, [generation.tokens for generation in generations])
    return Scored(generations=tuple(generations), rows=rows)


def teacher_forced(
    engine: hf.HFEngine | streaming.StreamEngine,
    requests: Sequence[Request],
    continuations: Sequence[Sequence[int]],
    chunk: int | None = None,
) -> Rows:
    """The engine's logits at every position of prompt and continuation."""
    sketcher = Sketcher(engine.vocabulary)
    engine.prefill(requests, continuations, batch_size=None, sketcher=sketcher, chunk=chunk)
    return sketcher.rows()


def cast_centre(
    model: str, requests: Sequence[Request], scored: Scored, dtype: str, *, precision: str
) -> Centre | None:
    """The reference with its weights cast to ``dtype`` (numerics.md 2.2); None where the cast changes no tensor.

    A weight cast is a deterministic quantiser, not noise: its loss is reported, never judged.
    """
    with open_reference(model, None) as engine:
        inexact = hf.inexact_tensors(engine.model, dtype)
    if not inexact:
        return None
    with open_reference(model, precision, weights=dtype) as engine:
        rows = teacher_forced(engine, requests, scored.continuations)
    return _as_centre(rows, scored.rows, len(inexact))


def _as_centre(rows: Rows, native: Rows, inexact: int) -> Centre:
    shift = metrics.error_norm(rows.projections, native.projections)
    return Centre(
        logsumexp=rows.logsumexp,
        logp=rows.logp,
        entropy=rows.entropy,
        projections=rows.projections,
        top_ids=rows.top_ids,
        top_logits=rows.top_logits,
        shift=metrics.rms(shift),
        inexact_tensors=inexact,
    )


def directions(model: str, requests: Sequence[Request], scored: Scored, *, precision: str) -> dict[str, Direction]:
    """What each reproducible weight quantiser does to the logits: projections [N, J] by its name.

    float16 is enough: a direction is only projected on, and its own size divides out. A scheme that leaves the
    weights as they are, or moves the logits beyond what float16 holds, gives none.
    """
    found = {}
    for scheme in quantise.SCHEMES:
        with open_reference(model, precision, weights=scheme) as engine:
            rows = teacher_forced(engine, requests, scored.continuations)
        with np.errstate(over="ignore"):  # what float16 does not hold is found below
            moved = (rows.projections - scored.rows.projections).astype(np.float16)
        if moved.any() and np.isfinite(moved).all():
            found[scheme] = moved
    return found


# --- at check time -----------------------------------------------------------------------------


def strayed(model: str, golden: Golden, asked: Sequence[int], *, stream: str = "") -> str:
    """Why the live reference cannot be believed, in words; empty where it still gives what the golden holds of it.

    It runs the code of the day, perhaps the very code that the candidate runs: a bug in there would be on both sides.
    The limit is the finest round-off that was measured, at every position.

    Args:
        model: the reference's directory.
        golden: what it once gave; without floors there is nothing to hold it against.
        asked: indices of the prompts to look at, in order.
        stream: SPEC that it is streamed by, "" for in memory.
    """
    if not golden.floors:
        return ""
    with open_scorer(model, golden.precision, stream=stream) as engine:
        again = teacher_forced(engine, [golden.requests[i] for i in asked], [golden.continuations[i] for i in asked])
    shown = np.isin(golden.rows.request, asked)
    finest = np.min([floor.sigma[shown] for floor in golden.floors.values()], axis=0)
    ratio = float((metrics.error_norm(again.projections, golden.rows.projections[shown]) / finest).max())
    if ratio <= 1:
        return ""
    return f"run today, the reference is {ratio:.2g} x its finest round-off away from the golden: its code has changed"


def rescore(
    model: str,
    requests: Sequence[Request],
    continuations: Sequence[tuple[int, tuple[int, ...]]],
    *,
    precision: str,
    weights: str | None,
    stream: str = "",
) -> Rows:
    """The reference on continuations other than its own, each in one teacher-forced pass.

    Args:
        model: the reference's directory.
        requests: the golden's prompts.
        continuations: (request, tokens); the rows' ``request`` counts these.
        precision: what the golden was recorded in.
        weights: the precision that the weights are cast to first, None to leave them.
        stream: SPEC that it is streamed by, "" for in memory.
    """
    asked = [requests[index] for index, _ in continuations]
    with open_scorer(model, precision, weights=weights, stream=stream) as engine:
        return teacher_forced(engine, asked, [tokens for _, tokens in continuations])


def quantised_centre(
    model: str,
    requests: Sequence[Request],
    continuations: Sequence[Sequence[int]],
    *,
    scheme: str,
    dtype: str,
    precision: str,
) -> Rows:
    """The reference with its weights rounded by ``scheme`` and then cast to ``dtype``, as a candidate loads them.

    ``scheme`` is any text that quantise.parse takes; the arithmetic is that of ``precision``: float64, float32, or
    ``dtype`` itself.
    """
    bits, group = quantise.parse(scheme)
    with open_reference(model, None) as native, open_reference(model, dtype) as engine:
        for name, layer, input_dim in hf.block_layers(native.model):
            weight = quantise.round_to_nearest(layer.get_parameter("weight"), bits, group, input_dim=input_dim)
            target = engine.model.get_parameter(f"{name}.weight")
            target.data = weight.to(target.dtype)
        live = engine.model
        if precision == "float64":
            wide = hf.to_float64(live, live.config)
        else:
            wide = live if precision == dtype else live.float()
        options = hf.Options(dtype=precision)
        with hf.HFEngine(options, text=f"reference with {scheme} weights", model=wide) as rounded:
            return teacher_forced(rounded, requests, continuations)


def sharded(golden: Golden, model: str, run: Run, *, dtype: str, attention: str, ranks: int, threads: int) -> Trace:
    """The reference on one run, in one process, with the sums of tensor parallelism of that many ranks.

    Args:
        golden: the work.
        model: the reference's directory.
        run: of the golden's suite.
        dtype: what it computes in, partial sums too.
        attention: kernel, as the candidate's.
        ranks: size of the tensor parallelism.
        threads: of torch, as each rank's: kernels split their work by it.
    """
    from harness import replicas

    draw = replicas.Draw(ordered=ranks)
    # Never by a SPEC: what a trace says of itself may be anything.
    options = hf.Options(model=model, dtype=dtype, attn=attention, threads=threads)
    with hf.HFEngine(options, text="reference") as engine, replicas.applied(engine.model, draw):
        return runner.run_suite(
            engine,
            golden.suite,
            golden.requests,
            golden.continuations,
            runs=[run],
            stop_ids=frozenset(golden.stop_ids),
            vocabulary=golden.vocabulary,
            views=("replay", "prefill"),
        )
