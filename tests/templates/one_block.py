"""A bug of the catalogue in one block of a model alone, and what a check tells of it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

from harness import flow
from harness.comparison import likeness
from harness.comparison.context import compare_context
from harness.engines import hf
from harness.mutations.catalogue import CATALOGUE
from harness.mutations.mutation import blocks


def traced(golden, model, bank, precision, bug, strength, block):
    """What a model shows that has a bug in one block alone, in all for None, and nowhere for -1."""
    run = next(one for one in golden.suite.runs if one.name == bank.run)
    golden = replace(golden, suite=replace(golden.suite, runs=(run,)))
    with ExitStack() as stack:
        right, wrong = (
            stack.enter_context(hf.HFEngine(hf.Options(model=str(model), dtype=precision), text="one block"))
            for _ in range(2)
        )
        if block != -1:
            stack.enter_context(CATALOGUE[bug].applied(wrong, strength))
        if block not in (None, -1):
            # The block of the mutated model stands in the right one; what its change hangs on goes with it.
            blocks(right.model)._modules[str(block)] = blocks(wrong.model)[block]
        engine = wrong if block is None else right
        trace = flow.running.forced_trace(engine, golden, upcast=False, basis=bank.basis)
    return golden, trace


def told(golden, model, bank, maker, precision, bug, strength, block):
    """The likeness whose blocks are told, named or a hint, None where there is none; and whether it is named."""
    work, trace = traced(golden, model, bank, precision, bug, strength, block)
    diagnosis, _ = likeness.diagnose(compare_context(work, trace), bank, maker)
    for one in (*diagnosis.named, *diagnosis.nearest):
        if one.layers:
            return one, one in diagnosis.named
    return None, bool(diagnosis.named)
