"""What a live reference has to say of a candidate of several ranks: its sums, and where a rank first goes wrong."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from harness import replicas, scorer
from harness.comparison import culprits, sharding
from harness.comparison.context import declared_precision
from harness.comparison.ranks import ranks_of
from harness.engines import Engine, hf, runner
from harness.engines.ranks import probes
from harness.engines.ranks.engine import ParallelEngine
from harness.engines.ranks.layout import Layout, refusal
from harness.errors import first_line
from harness.flow.references import Reference
from harness.flow.running import asked_runs
from harness.values import Golden, Question, Sharding, Status, Trace, Verdict


def sharding_of(
    golden: Golden,
    trace: Trace,
    reference: Reference | None,
    progress: Callable[[str], None],
    engine: Engine | None = None,
    verdict: Verdict | None = None,
) -> Sharding | None:
    """What there is to say of a candidate's ranks; None for one that has none.

    Args:
        golden: what is believed.
        trace: what the candidate did.
        reference: the golden's model; without it, or where it is streamed, nothing is measured.
        progress: called with a few words.
        engine: the candidate, still open; None for a trace.
        verdict: on the trace: where it fails, the engine's ranks are looked into.
    """
    size = trace.settings.get("tensor_parallel")
    if not ranks_of(trace.settings) or not isinstance(size, int) or trace.vocabulary < golden.vocabulary:
        return None
    found = Sharding(ranks=size)
    status = None if verdict is None else verdict.status
    if reference is not None and reference.stream:
        return replace(found, reason="the reference is streamed, and only one in memory shows the sums of ranks")
    if reference is None or status not in (Status.IDENTICAL, Status.DRIFT, Status.DEVIATES):
        return found
    model = reference.directory
    try:
        found = _sums(golden, trace, model, found, progress)
        if isinstance(engine, ParallelEngine) and verdict is not None and status is Status.DEVIATES:
            failed = [one.question for one in verdict.answers if not one.status.ok]
            return replace(found, first_wrong=first_wrong_rank(golden, engine, failed[0], model, progress))
    except Exception as error:  # noqa: BLE001  # this tells more of a verdict, and never takes its place
        return replace(found, reason=f"{type(error).__name__}: {first_line(error, 'no message')}")
    return found


def _sums(golden: Golden, trace: Trace, model: Path, found: Sharding, progress: Callable[[str], None]) -> Sharding:
    """With its distance from the reference with the sums of its ranks, where these are gloo's."""
    dtype, run = declared_precision(trace.settings), runner.first_whole(asked_runs(golden, trace.quick))
    attention, threads = trace.settings.get("attn"), trace.settings.get("threads")
    # What a trace says of itself may be anything: only what such an engine can have is run.
    known = (
        # DeepSpeed cuts elsewhere, and sums the head's products too.
        trace.settings.get("engine") in ("tp", "pp")
        and dtype in hf.DTYPES
        and dtype in golden.floors
        and trace.settings.get("device") == "cpu"
        and attention in ("eager", "sdpa")
        and isinstance(threads, int)
        and 1 <= threads <= (os.cpu_count() or 1)
    )
    if found.ranks == 1 or run is None or not known:
        return found
    if refusal(Layout(tensor=found.ranks), hf.load_config(str(model))):
        return found
    progress(f"reference with the sums of {found.ranks} ranks")
    emulated = scorer.sharded(
        golden,
        str(model),
        run,
        dtype=dtype,
        attention=str(attention),
        ranks=found.ranks,
        threads=int(str(threads)),
    )
    return sharding.measure(golden, trace, emulated.passes)


#: Benign variants that a probe's round-off is taken from.
_VARIANTS = 4
_SEED = 7


def first_wrong_rank(
    golden: Golden, engine: ParallelEngine, question: Question, model: Path, progress: Callable[[str], None]
) -> str:
    """The first place where a rank of an open engine leaves the reference, in words; "" where there is none.

    Args:
        golden: whose prompts are used.
        engine: still open.
        question: "function" probes the ranks widened to float32, "precision" as they are.
        model: the golden's model.
        progress: called with a few words.
    """
    requests, continuations = probes.asked(golden)
    declared = declared_precision(engine.settings)
    wide = question == "function" and declared != "float32"
    progress("looking for the first wrong rank")
    with engine.upcast() if wide else nullcontext(engine) as asked:
        assert isinstance(asked, ParallelEngine)
        shown = asked.probe(requests, continuations)
    dtype = "float32" if wide else declared
    with scorer.open_reference(str(model), dtype, weights=declared if wide else None) as reference:
        right = probes.of_whole(reference, requests, continuations)
        variants = []
        kernels = replicas.kernels_of(reference.model)
        for draw in replicas.draw(_VARIANTS + 1, _SEED, kernels[:1])[1:]:
            with replicas.applied(reference.model, draw):
                variants.append(probes.of_whole(reference, requests, continuations))
    return culprits.first_wrong(shown, right, variants, engine.options.layout, engine.cut)
