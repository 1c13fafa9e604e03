from __future__ import annotations

from harness.report.sharding import sharding_lines
from harness.values import Sharding


def test_a_candidate_of_one_process_has_no_lines() -> None:
    """Neither has one whose sums were not measured."""
    assert list(sharding_lines(None, ok=True)) == []
    assert list(sharding_lines(Sharding(ranks=2), ok=True)) == []


def test_sums_and_first_wrong_rank_are_told() -> None:
    """The place of a bug; and of a sound candidate both errors with their unit, which a bug would drown."""
    both = Sharding(ranks=2, plain=0.9, emulated=0.001, equal=0.995, first_wrong="rank 1: x")
    assert list(sharding_lines(both, ok=False)) == ["first wrong: rank 1: x"]
    _, line = sharding_lines(both, ok=True)
    assert line == (
        "sums of 2 ranks: error 0.001 x round-off about a reference that sums as they do (99.5% of positions equal to "
        "the bit), 0.90 about the plain one"
    )
