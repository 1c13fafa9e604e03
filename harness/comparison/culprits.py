"""Which rank leaves the reference first, and where, from what ranks show inside their blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from harness.engines.ranks.layout import Layout
from harness.engines.ranks.plans import Cut
from harness.engines.ranks.probes import FACTOR, LEAST, Shown, Side, Whole
from harness.numerics import metrics

Place = tuple[str, Side]


def first_wrong(
    shown: Sequence[Sequence[Shown]],
    reference: Mapping[Place, Whole],
    variants: Sequence[Mapping[Place, Whole]],
    layout: Layout,
    cut: Callable[[str, int], Cut] | None = None,
) -> str:
    """The first wrong place in words; empty where there is none.

    Args:
        shown: by each rank, in the order of its forward.
        reference: the whole model's.
        variants: of benign variants of it, which say what round-off is.
        layout: of the ranks.
        cut: how the units of a module are cut along a dimension; None is as transformers cuts.
    """
    for stage in range(layout.stages):
        ranks = layout.ranks_of(stage)
        for index, one in enumerate(shown[ranks[0]]):
            wrong = [
                rank
                for shard, rank in enumerate(ranks)
                if _is_wrong(shown[rank][index], reference, variants, shard, layout.tensor, cut)
            ]
            if wrong:
                return _in_words(one, wrong, list(ranks), stage, layout, index == 0)
    return ""


def _is_wrong(
    one: Shown,
    reference: Mapping[Place, Whole],
    variants: Sequence[Mapping[Place, Whole]],
    shard: int,
    size: int,
    cut: Callable[[str, int], Cut] | None,
) -> bool:
    place = (one.module, one.side)
    right = reference[place].of(shard, size, cut)
    usual = max((metrics.rms(variant[place].of(shard, size, cut) - right) for variant in variants), default=0.0)
    limit = max(FACTOR * usual, LEAST * metrics.rms(right))
    # Not finite is wrong, and a shape of its own is.
    return one.values.shape != right.shape or not metrics.rms(one.values - right) <= limit


def _in_words(one: Shown, wrong: list[int], ranks: list[int], stage: int, layout: Layout, enters: bool) -> str:
    named = f"rank{'s' if len(wrong) > 1 else ''} {', '.join(map(str, wrong))}"
    its = "their" if len(wrong) > 1 else "its"
    of_stage = f" of stage {stage}" if layout.stages > 1 else ""
    if enters and stage > 0:
        return f"what stage {stage} is sent (the input of {one.module}), though all of stage {stage - 1} is right"
    if enters:
        return f"the input of the first block, {one.module}: the embedding"
    if one.side == "input":
        if len(wrong) < len(ranks):
            return f"{named}{of_stage}: {its} part of the input of {one.module}; the other ranks' parts are right"
        return f"the input of {one.module}, on every rank{of_stage}"
    if one.side == "partial":
        if len(wrong) < len(ranks):
            return f"{named}{of_stage}: {its} partial product of {one.module}; the other ranks' products are right"
        return f"the partial products of {one.module}, on every rank{of_stage}, though their inputs are right"
    if one.module[-1:].isdigit():
        return f"the output of {one.module}{of_stage}"
    who = "" if len(wrong) == len(ranks) else f", on {named}"
    return f"the output of {one.module}{of_stage}{who}, though every rank's part of it is right: the sum, or its bias"
