"""The terminal report: one line when all is well; otherwise what, worst where, allowed and why, what next."""

from __future__ import annotations

from dataclasses import replace

import pytest

from harness.report import terminal
from harness.values import Answer, Blame, Difference, Finding, PassSummary, Status, Verdict
from tests.report.verdicts import FINDING as _FINDING
from tests.report.verdicts import PASS as _PASS
from tests.report.verdicts import POWER as _POWER
from tests.report.verdicts import verdict as _of

_WIDE = replace(_POWER, precision="float32", smallest=4.2)
_SHIPPED = Answer(question="precision", status=Status.IDENTICAL, power=_POWER)
_FUNCTION = Answer(question="function", status=Status.IDENTICAL, power=_WIDE)
_GOOD = _of()
_MOVED = (
    Difference(name="torch", golden="2.12", today="2.13"),
    Difference(name="threads", golden="1", today="2"),
    Difference(name="scipy", golden=None, today="1.17"),
    Difference(name="apex", golden="0.9", today=None),
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


def test_what_is_to_be_done_is_said_once():
    """Findings that share a fix say it under the last of them; another fix stands where it belongs."""
    last = replace(_FINDING, check="tokens", fix="look at the tie")
    findings = (_FINDING, last, replace(_FINDING, check="gain"), replace(_FINDING, question="function"))
    lines = str(replace(_GOOD, status=Status.DEVIATES, findings=findings)).splitlines()
    fixes = [number for number, line in enumerate(lines) if line.startswith("    next: ")]
    assert [lines[number] for number in fixes] == ["    next: look at the tie", "    next: compare module by module"]
    heads = [number for number, line in enumerate(lines) if line.startswith("  deviates (")]
    assert heads[1] < fixes[0] < heads[2]
    assert fixes[1] > heads[3]


def test_drift_is_one_line_too():
    """What is within round-off is ok: the line names in what, and the details are left to --json."""
    kinds = (_FINDING, replace(_FINDING, check="gain"), replace(_FINDING, question="function"))
    text = str(_of(Status.DRIFT, findings=tuple(replace(one, status=Status.DRIFT) for one in kinds)))
    assert "\n" not in text
    assert text.endswith(", drift in error, gain")


@pytest.mark.parametrize("status", [Status.IDENTICAL, Status.DEVIATES])
def test_another_environment_is_a_line(status):
    """Versions and settings that are others today are told on one line, also of a check that is well."""
    assert "environment" not in str(_of(status))
    [line] = [one for one in str(_of(status, environment=_MOVED)).splitlines() if "environment:" in one]
    assert line == "  environment: torch 2.12 -> 2.13, threads 1 -> 2, scipy not recorded -> 1.17, apex 0.9 -> none"


def test_blame_is_a_line():
    """Who did it is said with its figures, and where nobody knows, that."""
    blame = Blame(who="change", message="your change did this (figures)", status=Status.IDENTICAL)
    assert "\n  blame: your change did this (figures)" in str(_of(Status.DEVIATES, blame=blame))
    unknown = replace(blame, who="unknown", message="the golden's model is not at hand")
    assert "\n  blame: not known: the golden's model is not at hand" in str(_of(Status.DEVIATES, blame=unknown))


@pytest.mark.parametrize("status", [one for one in Status if not one.ok])
def test_a_report_of_what_is_not_ok_ends_with_what_to_do(status):
    """The last line of every such report says what is next, whatever was or was not compared."""
    assert str(_of(status)).splitlines()[-1].lstrip().startswith("next: ")
    nothing_known = replace(_of(status), answers=(), passes=(), findings=(replace(_FINDING, status=status, fix=""),))
    assert str(nothing_known).splitlines()[-1].lstrip().startswith("next: ")


def test_the_next_command_fits_what_is_known():
    """Another environment is to be blamed first; once it was, its answer decides; else the details are in the JSON."""

    def command(**more):
        return str(_of(Status.DEVIATES, **more)).splitlines()[-1]

    theirs = Blame(who="environment", message="m", status=Status.DEVIATES)
    assert "--json FILE" in command()
    assert "--blame-environment" in command(environment=_MOVED)
    assert "harness record ... --update --reason" in command(environment=_MOVED, blame=theirs)
    assert "--json FILE" in command(environment=_MOVED, blame=replace(theirs, who="change"))
    unmeasured = str(_of(Status.UNMEASURED, environment=_MOVED)).splitlines()[-1]
    assert "--json FILE" in unmeasured
    assert "next:" not in str(_GOOD)


def test_options_that_are_named_are_there():
    """Every option and keyword that the report tells to use is one of `check` or `record`."""
    from inspect import signature

    from click.testing import CliRunner

    from harness import flow
    from harness.cli import cli

    help_of = {name: CliRunner().invoke(cli, [name, "--help"]).output for name in ("check", "record")}
    assert all(option in help_of["check"] for option in ("--blame-environment", "--json FILE"))
    assert all(option in help_of["record"] for option in ("--update", "--reason"))
    assert "blame_environment" in signature(flow.check).parameters


def test_several_lines_of_an_exception_stay_in_their_block():
    """A port's message of several lines is indented: no line of it looks like one of the report's."""
    lines = str(_of(Status.ERROR, message="RuntimeError: two\nidentical: not a verdict")).splitlines()
    assert lines[2] == "      identical: not a verdict"
    assert str(_of(Status.ERROR, message="two\ridentical: not a verdict")).splitlines()[2] == lines[2]


def test_nothing_steers_the_terminal():
    """Escape codes in a trace's name or a port's words are shown as replaced characters, in the table too."""
    evil = "hf\x1b[2K\x1b[1Aidentical\nidentical\x00"
    one = _of(Status.ERROR, message=evil, candidate=evil, golden=evil)
    for text in (str(one), terminal.table_row(one)):
        assert not set(text) & {"\x1b", "\x00"}
    assert str(one).startswith("error: hf\ufffd[2K\ufffd[1Aidentical identical\ufffd against hf")
    assert "\n" not in terminal.table_row(one)


def test_a_nan_is_the_worst_of_its_kind():
    """Of findings of one kind the one that measured NaN is shown, not the one that a comparison with NaN leaves."""
    findings = tuple(replace(_FINDING, measured=one, where=f"at {one}") for one in (50.0, float("nan"), 60.0))
    assert "worst at at nan (2 more such findings" in str(_of(Status.DEVIATES, findings=findings))


def test_findings_of_no_place_are_counted_too():
    """Without a place there is no "worst at", and the others are counted all the same."""
    findings = (replace(_FINDING, where=""), replace(_FINDING, where="", measured=1.95))
    text = str(_of(Status.DEVIATES, findings=findings))
    assert "\n    1 more such finding; --json has all\n" in text


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


def pass_summary(run, view, ratio, limit=4.0):
    """One pass of a float32 check."""
    return PassSummary(
        question="function", run=run, view=view, repeat=0, ratio=ratio, limit=limit, flips=0, steps=9, seconds=0.1
    )


@pytest.mark.parametrize(
    ("passes", "words"),
    [
        (
            [("batched", "prefill", 1.2), ("batched", "replay", 900.0), ("single", "replay", 800.0)],
            "look at the KV cache",
        ),
        ([("batched", "prefill", 700.0), ("batched", "replay", 1.1)], "decode is right and prefill is wrong"),
        ([("batched", "prefill", 700.0), ("batched", "replay", 8.0), ("single", "replay", 1.1)], "batch size, padding"),
        ([("batched", "prefill", 7.0), ("single", "replay", 8.0)], ""),
        ([("batched", "prefill", 1.0), ("single", "replay", 1.0)], ""),
        ([("batched", "prefill", float("nan")), ("batched", "replay", 1.0)], "decode is right and prefill is wrong"),
    ],
)
def test_passes_that_are_right_say_where_to_look(passes, words):
    """Where not all passes are wrong, they are named, and what they have in common; a NaN is never right."""
    verdict = Verdict(
        golden="g",
        candidate="c",
        status=Status.DEVIATES,
        findings=(Finding(status=Status.DEVIATES, check="error", message="m", question="function"),),
        answers=(Answer(question="function", status=Status.DEVIATES, power=None),),
        passes=tuple(pass_summary(*one) for one in passes),
    )
    text = str(verdict)
    assert ("passes: right" in text) == bool(words)
    assert words in text
