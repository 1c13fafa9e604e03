"""The terminal report: one line when all is well; otherwise what, worst where, allowed and why, what next."""

from __future__ import annotations

from dataclasses import replace

from harness.report import terminal
from harness.values import Finding, PassSummary, Power, Status, Verdict

_POWER = Power(precision="bfloat16", positions=900, steps=100, decidable=97, smallest=1.9)
_PASS = PassSummary(run="batched", view="replay", repeat=0, ratio=0.98, limit=1.9, flips=2, steps=100, seconds=1.0)
_GOOD = Verdict(
    golden="m/core", candidate="hf:dtype=bfloat16", status=Status.IDENTICAL, findings=(), power=_POWER, passes=(_PASS,)
)
_FINDING = Finding(
    status=Status.DEVIATES,
    check="logits",
    message="the error is 40 x the reference's own round-off",
    where="batched/replay, all positions",
    measured=40.0,
    allowed=1.9,
    why="t(20) quantile",
    fix="compare module by module",
)


def test_one_line_when_all_is_well():
    """An ok verdict is one line with error, bound, tokens and coverage."""
    text = str(_GOOD)
    assert "\n" not in text
    for word in ("identical", "hf:dtype=bfloat16", "m/core", "0.98 x round-off", "1.90", "2 of 100", "97.0%"):
        assert word in text


def test_a_failure_says_everything():
    """A failed verdict names the finding, its place, measured, allowed, why and what to do."""
    text = str(replace(_GOOD, status=Status.DEVIATES, findings=(_FINDING,)))
    for word in ("deviates", "40 x", "batched/replay, all positions", "measured 40", "allowed 1.9", "t(20)", "next:"):
        assert word in text


def test_what_was_not_seen_is_said():
    """What the check could not see is part of the report."""
    text = str(replace(_GOOD, power=replace(_POWER, unmeasured=("12 tokens behind a divergence",))))
    assert "not seen: 12 tokens behind a divergence" in text


def test_rows_line_up_with_their_header():
    """Each row of the table has its cells under the titles."""
    header, row = terminal.table_header(), terminal.table_row(_GOOD)
    for title, cell in (("golden", "m/core"), ("candidate", "hf:dtype"), ("decidable", "97.0%"), ("tokens", "2 of")):
        assert header.index(title) == row.index(cell)


def test_a_verdict_without_comparison_still_prints():
    """A stale or failed check has no numbers, and says so."""
    bare = replace(_GOOD, status=Status.STALE, power=None, passes=())
    assert "not compared" in str(bare)
    assert terminal.table_row(bare).startswith("stale")


def test_of_each_kind_the_worst_is_shown_and_the_others_are_counted():
    """Six runs that fail alike are one block, not six; nothing is left out without being counted."""
    findings = tuple(replace(_FINDING, measured=float(10 + i), where=f"run-{i}/replay") for i in range(6))
    other = replace(_FINDING, check="tokens", message="3 tokens are no ties")
    text = str(replace(_GOOD, status=Status.DEVIATES, findings=(*findings, other)))
    assert text.count("worst at") == 2
    assert "run-5/replay (5 more such findings" in text
    assert "3 tokens are no ties" in text
