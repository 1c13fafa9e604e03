from __future__ import annotations

from harness.report.sharding import sharding_lines
from harness.values import Sharding


def test_a_candidate_of_one_process_has_no_lines() -> None:
    """Neither has one whose sums were not measured."""
    assert list(sharding_lines(None)) == []
    assert list(sharding_lines(Sharding(ranks=2))) == []


def test_sums_and_first_wrong_rank_are_told() -> None:
    """Both errors with their unit, and the place."""
    lines = list(sharding_lines(Sharding(ranks=2, plain=0.9, emulated=0.001, equal=0.995, first_wrong="rank 1: x")))
    assert lines[0] == "first wrong: rank 1: x"
    assert "sums of 2 ranks: error 0.001 x round-off" in lines[1]
    assert "99.5% of positions" in lines[1]
    assert lines[1].endswith("0.90 about the plain one")
