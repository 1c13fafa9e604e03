"""The terminal report: one line when all is well; otherwise what, worst where, allowed and why, what next."""

from __future__ import annotations

from dataclasses import replace

import pytest

from harness.report import terminal
from harness.values import Answer, Finding, PassSummary, Power, Status, Verdict

_POWER = Power(precision="bfloat16", level="logits", positions=900, steps=100, decidable=97, smallest=1.9)
_WIDE = replace(_POWER, precision="float32", smallest=4.2)
_PASS = PassSummary(
    question="precision", run="batched", view="replay", repeat=0, ratio=0.98, limit=1.9, flips=2, steps=100, seconds=1.0
)
_SHIPPED = Answer(question="precision", status=Status.IDENTICAL, power=_POWER)
_FUNCTION = Answer(question="function", status=Status.IDENTICAL, power=_WIDE)
_GOOD = Verdict(
    golden="m/core",
    candidate="hf:dtype=bfloat16",
    status=Status.IDENTICAL,
    findings=(),
    answers=(_SHIPPED,),
    passes=(_PASS,),
)
_FINDING = Finding(
    status=Status.DEVIATES,
    check="error",
    message="the error is 40 x the reference's own round-off",
    where="batched/replay, all positions",
    measured=40.0,
    allowed=1.9,
    why="t(20) quantile",
    fix="compare module by module",
)


def _failed(function: Status, precision: Status) -> Verdict:
    """A verdict whose two answers are these."""
    answers = (replace(_FUNCTION, status=function), replace(_SHIPPED, status=precision))
    return replace(_GOOD, status=Status.DEVIATES, findings=(_FINDING,), answers=answers)


def test_one_line_when_all_is_well():
    """An ok verdict is one line with error, bound, tokens, coverage and what would have shown."""
    text = str(_GOOD)
    assert "\n" not in text
    for word in ("identical", "hf:dtype=bfloat16", "m/core", "0.98 x round-off", "1.90", "2 of 100", "97.0%", "1.9 x"):
        assert word in text
    assert "round-off in bfloat16" in text


def test_a_failure_says_everything():
    """A failed verdict names the finding, its question and place, measured, allowed, why and what to do."""
    text = str(replace(_GOOD, status=Status.DEVIATES, findings=(_FINDING,)))
    for word in ("deviates", "40 x", "batched/replay, all positions", "measured 40", "allowed 1.9", "t(20)", "next:"):
        assert word in text
    assert "deviates (precision): error:" in text


def test_what_was_not_seen_is_said():
    """What the check could not see is part of the report, of either question, and once."""
    behind = replace(_SHIPPED, power=replace(_POWER, unmeasured=("12 tokens behind a divergence", "both")))
    function = replace(_FUNCTION, power=replace(_WIDE, unmeasured=("the function: it cannot be widened", "both")))
    text = str(replace(_GOOD, answers=(function, behind)))
    assert "not seen: 12 tokens behind a divergence" in text
    assert "not seen: the function: it cannot be widened" in text
    assert text.count("not seen: both") == 1


def test_less_than_logits_is_said():
    """What the candidate showed, where it was not logits, is in the line."""
    assert "judged by" not in str(_GOOD)
    for level in ("top entries", "tokens", "nothing"):
        served = replace(_GOOD, answers=(replace(_SHIPPED, power=replace(_POWER, level=level)),))
        assert f"judged by {level}" in str(served)


@pytest.mark.parametrize(
    ("function", "precision", "words"),
    [
        (Status.DRIFT, Status.DEVIATES, "the path in the declared precision is not"),
        (Status.DEVIATES, Status.DRIFT, "the function is wrong"),
        (Status.DEVIATES, Status.DEVIATES, None),
        (Status.UNMEASURED, Status.DEVIATES, None),
        (Status.DEVIATES, Status.UNMEASURED, None),
    ],
)
def test_it_is_said_which_question_failed(function, precision, words):
    """A failed verdict gives both answers, with what would have been caught, and what the pair of them means."""
    text = str(_failed(function, precision))
    assert f"same function (float32 copy): {function.value}; an error of 4.2 x" in text
    assert f"as shipped): {precision.value}; an error of 1.9 x" in text
    assert ("meaning:" in text) == (words is not None)
    assert words is None or words in text


def test_what_the_error_looks_like_is_said():
    """A failed answer names the precision that the error is of."""
    verdict = _failed(Status.DRIFT, Status.DEVIATES)
    looks = replace(verdict, answers=(replace(_SHIPPED, status=Status.DEVIATES, effective="float16"),))
    assert "its error looks like float16" in str(looks)


def test_the_pass_nearest_its_own_limit_is_shown():
    """Of passes of both questions the one nearest its own limit is told, with the precision that it is of."""
    wide = replace(_PASS, question="function", ratio=2.4, limit=3.0)
    shipped = replace(_PASS, ratio=0.98, limit=1.9)
    text = str(replace(_GOOD, answers=(_FUNCTION, _SHIPPED), passes=(wide, shipped)))
    assert "error 2.40 x round-off in float32 (fails from 3.00)" in text
    calm = str(replace(_GOOD, answers=(_FUNCTION, _SHIPPED), passes=(replace(wide, ratio=1.0), shipped)))
    assert "error 0.98 x round-off in bfloat16 (fails from 1.90)" in calm


def test_tokens_are_those_of_the_run_as_shipped():
    """The float32 copy's tokens are not what users get; it counts where there is nothing else."""
    wide = replace(_PASS, question="function", flips=50)
    assert terminal.token_words(replace(_GOOD, passes=(wide, _PASS))) == "2 of 100 tokens differ"
    assert terminal.token_words(replace(_GOOD, passes=(wide,))) == "50 of 100 tokens differ"
    free = replace(_PASS, view="generate", flips=70)
    assert terminal.token_words(replace(_GOOD, passes=(free, _PASS))) == "2 of 100 tokens differ"
    assert terminal.token_words(replace(_GOOD, passes=(free,))) == "70 of 100 tokens differ"


def test_rows_line_up_with_their_header():
    """Each row of the table has its cells under the titles."""
    header, row = terminal.table_header(), terminal.table_row(_GOOD)
    for title, cell in (("golden", "m/core"), ("candidate", "hf:dtype"), ("decidable", "97.0%"), ("tokens", "2 of")):
        assert header.index(title) == row.index(cell)


def test_a_verdict_without_comparison_still_prints():
    """A stale or failed check has no numbers, and says so."""
    bare = replace(_GOOD, status=Status.STALE, answers=(), passes=())
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


def test_the_questions_are_not_mixed():
    """The same check failed by both questions is two blocks: they are different bugs."""
    both = (_FINDING, replace(_FINDING, question="function", measured=900.0, where="there"))
    text = str(replace(_GOOD, status=Status.DEVIATES, findings=both))
    assert "deviates (precision): error:" in text
    assert "deviates (function): error:" in text
    assert "more such findings" not in text
