"""The reference's whole work on one suite: continuations, logits, and centre and floor of each precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from harness import scorer
from harness.engines.base import Engine
from harness.errors import ModelError
from harness.numerics import metrics
from harness.numerics.constants import CENTRE_SHARE, FP32_REFERENCE_RATIO
from harness.numerics.sketch import Sketcher
from harness.replicas import measure_floor
from harness.scorer import Direction
from harness.values import Centre, Floor, Generation, Request, Rows, recentred

Progress = Callable[[str], None]

#: Finest first: what fp32 resolves decides which shifts of a centre matter.
PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True, slots=True)
class Observed:
    """What a golden is made of. ``precision_reason`` says why the reference is not in float64, ``left_out`` why
    a precision has no floor; both are empty where all is well."""

    generations: tuple[Generation, ...]
    rows: Rows
    precision: str
    precision_reason: str
    centres: Mapping[str, Centre]
    floors: Mapping[str, Floor]
    directions: Mapping[str, Direction]
    left_out: Mapping[str, str]


def observe(
    model: str,
    requests: Sequence[Request],
    *,
    stop_ids: frozenset[int],
    precisions: Sequence[str],
    replicas: int,
    parallel: Sequence[int] = (),
    progress: Progress,
) -> Observed:
    """Score the requests in float64 where the model allows it, then measure each precision's round-off.

    ``parallel`` are the sizes of tensor parallelism that get a floor of their own, named ``bfloat16/tp2``.

    Raises:
        ModelError: where the reference's own logits are not finite.
    """
    progress("auditing float64")
    precision, reason = scorer.reference_precision(model)
    progress(f"reference in {precision}")
    scored = scorer.score(model, requests, stop_ids=stop_ids, precision=precision)
    _refuse_nonfinite(scored.rows)
    progress("directions of weight quantisers")
    directions = scorer.directions(model, requests, scored, precision=precision)
    along = list(directions.values())
    centres: dict[str, Centre] = {}
    floors: dict[str, Floor] = {}
    left_out: dict[str, str] = {}
    finest: float | None = None
    for dtype in sorted(precisions, key=PRECISIONS.index):
        progress(f"{dtype}: centre")
        centre = scorer.cast_centre(model, requests, scored, dtype, precision=precision)
        if centre is not None and finest is not None and centre.shift < CENTRE_SHARE * finest:
            centre = None

        rows = recentred(scored.rows, centre)

        def floor_of(size: int | None = None, rows: Rows = rows, name: str = dtype, dtype: str = dtype) -> Floor | None:
            def report(done: int, total: int) -> None:
                progress(f"{name}: replica {done} of {total}")

            return measure_floor(
                model,
                requests,
                scored.continuations,
                rows,
                dtype,
                directions=along,
                count=replicas,
                parallel=size,
                progress=report,
            )

        floor = floor_of()
        if floor is None:
            left_out[dtype] = "the reference, or most of its variants, is not finite in it"
            continue
        typical = metrics.rms(floor.sigma.astype(np.float64))
        if dtype == "float32":
            finest = typical
        if precision == "float32" and (finest is None or typical < FP32_REFERENCE_RATIO * finest):
            left_out[dtype] = "a float32 reference is too coarse for it"
            continue
        floors[dtype] = floor
        for size in parallel:
            name = f"{dtype}/tp{size}"
            sharded = floor_of(size, name=name)
            if sharded is not None:
                floors[name] = sharded
        if centre is not None:
            centres[dtype] = centre
    return Observed(
        generations=scored.generations,
        rows=scored.rows,
        precision=precision,
        precision_reason=reason,
        centres=centres,
        floors=floors,
        directions=directions,
        left_out=left_out,
    )


def observe_foreign(
    engine: Engine, requests: Sequence[Request], *, stop_ids: frozenset[int], progress: Progress
) -> Observed:
    """What a port shows, as a reference: continuations and logits in the precision it runs in, and no floors.

    Raises:
        ModelError: where its logits are not finite.
        EngineError: where it cannot generate.
    """
    progress("continuations")
    run = getattr(engine, "continue_greedily", engine.generate)
    generations: Sequence[Generation] = run(requests, batch_size=None, stop_ids=stop_ids)
    progress("logits")
    sketcher = Sketcher(engine.vocabulary)
    engine.prefill(requests, [one.tokens for one in generations], batch_size=None, sketcher=sketcher)
    rows = sketcher.rows()
    _refuse_nonfinite(rows)
    precision = str(engine.settings.get("dtype", "unknown"))
    return Observed(
        generations=tuple(generations),
        rows=rows,
        precision=precision,
        precision_reason=f"a port is believed in the precision that it runs in, {precision}",
        centres={},
        floors={},
        directions={},
        left_out=dict.fromkeys(PRECISIONS, "a foreign reference draws no replicas"),
    )


def _refuse_nonfinite(rows: Rows) -> None:
    broken = int((rows.nonfinite > 0).sum())
    if broken:
        raise ModelError(
            f"the reference's own logits are not finite at {broken} positions",
            fix="A golden of NaN would bless NaN: mend the model first",
        )
