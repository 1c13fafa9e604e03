"""The terminal report: one line when all is well; otherwise which question failed, what, worst where, what next."""

from __future__ import annotations

from dataclasses import replace

import pytest

from harness.report import terminal
from harness.report.terminal import verdict_to_text
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


def _failed(function: Status, precision: Status, findings: tuple[Finding, ...] = (_FINDING,)) -> Verdict:
    """A verdict whose two answers are these."""
    answers = (replace(_FUNCTION, status=function), replace(_SHIPPED, status=precision))
    return replace(_GOOD, status=Status.DEVIATES, findings=findings, answers=answers)


def _verbose(verdict: Verdict) -> str:
    return verdict_to_text(verdict, verbose=True)


def test_one_line_when_all_is_well():
    """An ok verdict is one line with error, bound, tokens, coverage and what would have shown."""
    text = str(_GOOD)
    assert "\n" not in text
    for word in ("identical", "hf:dtype=bfloat16", "m/core", "0.98 x round-off", "1.90", "2 of 100", "97.0%", "1.9 x"):
        assert word in text
    assert "round-off in bfloat16" in text


def test_a_failure_says_each_thing_once():
    """Which question failed, what was found of it and where, how the other did, the tokens, what to do: a line each."""
    passes = (_PASS, replace(_PASS, question="function", ratio=1.13, limit=3.0, flips=0))
    text = str(replace(_failed(Status.DRIFT, Status.DEVIATES), passes=passes))
    assert text.splitlines() == [
        "deviates: hf:dtype=bfloat16 against m/core: function ok, precision wrong",
        "  function: ok, error 1.13 x round-off in float32, 0 of 100 tokens differ",
        "  precision: the error is 40 x the reference's own round-off (allowed 1.9), at batched/replay, all positions",
        "  tokens: 2 of 100 differ, 97.0% of 100 steps decidable",
        "  meaning: the weights and the function are right, the path in the declared precision is not: "
        "a kernel, a mask value, an overflow, an accumulation or a missing upcast",
        "  next: compare module by module",
        "  next: the same check with --diagnose (in Python diagnose=True) looks for the bug in a catalogue, "
        "--verbose gives limits and their derivation, --json FILE (in Python verdict.to_dict()) every finding and "
        "statistic",
    ]


def test_a_verbose_failure_says_everything():
    """With `verbose` a finding has its question and place, measured, allowed, why and what to do."""
    text = _verbose(_of(Status.DEVIATES))
    assert text.startswith("deviates: hf:dtype=bfloat16 against m/core: precision wrong\n")
    for word in ("40 x", "batched/replay, all positions", "measured 40, allowed 1.9: t(20)", "next: compare module"):
        assert word in text
    assert "deviates (precision): error:" in text
    assert "error 0.98 x round-off in bfloat16 (fails from 1.90)" in text
    assert "tokens: 2 of 100 differ, 97.0% of 100 steps decidable" in text


@pytest.mark.parametrize("status", [one for one in Status if one.ok])
def test_verbose_adds_nothing_where_all_is_well(status):
    """What is well is one line in either form."""
    assert _verbose(_of(status)) == str(_of(status))


@pytest.mark.parametrize(
    ("function", "precision", "words"),
    [
        (Status.DRIFT, Status.DEVIATES, "function ok, precision wrong"),
        (Status.DEVIATES, Status.IDENTICAL, "function wrong, precision ok"),
        (Status.UNMEASURED, Status.STRUCTURAL, "function not measured, precision not comparable"),
        (Status.NONDETERMINISTIC, Status.STALE, "function not repeatable, precision stale"),
    ],
)
def test_the_headline_says_which_question_failed(function, precision, words):
    """The first line of what is not ok has an answer for each question and no figure."""
    headline = terminal.headline(_failed(function, precision))
    assert headline == f"deviates: hf:dtype=bfloat16 against m/core: {words}"
    assert str(_failed(function, precision)).startswith(f"{headline}\n")


def test_numbers_share_a_line_and_other_kinds_have_their_own():
    """Of a question's numbers the worst error stands for all; each kind of other finding has a line with a count."""
    findings = (
        replace(_FINDING, check="weights", message="what int8 weights give", where="all passes together"),
        replace(_FINDING, measured=30.0),
        replace(_FINDING, check="error of a prompt", message="the error is 50 x round-off", measured=50.0, where="p"),
        replace(_FINDING, check="gain", measured=9000.0),
        replace(_FINDING, check="prompt ids", message="other ids", where="", measured=None, allowed=None, why=""),
        replace(_FINDING, check="lengths", message="3 for 4", where="a", measured=None, allowed=None, why=""),
        replace(_FINDING, check="lengths", message="5 for 6", where="b", measured=None, allowed=None, why=""),
    )
    lines = str(_failed(Status.DRIFT, Status.DEVIATES, findings)).splitlines()
    assert [line for line in lines if line.startswith("  precision: ")] == [
        "  precision: the error is 50 x round-off (allowed 1.9), worst at p; 2 more findings",
        "  precision: weights: what int8 weights give (measured 40, allowed 1.9), over all passes together",
        "  precision: prompt ids: other ids",
        "  precision: lengths: 3 for 4, worst at a; 1 more finding",
    ]


def test_without_an_error_the_number_furthest_beyond_its_limit_stands_for_all():
    """A signed statistic says its z and, as the shift it gives is not the distance from its mean, what was measured."""
    gain = replace(_FINDING, check="gain", message="scaled by -0.258 (z = -6.1)", measured=0.287, allowed=0.232)
    findings = (replace(_FINDING, check="constant shift", measured=2.0), gain, replace(gain, measured=5.75))
    [line] = [one for one in str(_of(Status.DEVIATES, findings=findings)).splitlines() if "precision: " in one[:14]]
    assert "scaled by -0.258 (z = -6.1, measured 5.75, allowed 0.232), worst at " in line
    assert line.endswith("; 2 more findings")


def test_why_is_said_of_what_has_no_limit():
    """The reason of a finding without numbers is in its line; the derivation of a limit is left to `verbose`."""
    repeat = replace(_FINDING, check="repeat", message="other bits", measured=None, why="every bit is asked for")
    text = str(_of(Status.DEVIATES, findings=(repeat, _FINDING)))
    assert "\n  precision: repeat: other bits (every bit is asked for), at batched/replay, all positions\n" in text
    assert "t(20)" not in text


def test_findings_of_tokens_share_a_line():
    """A token that is no tie stands for the counts; what to do is about the logits, where these are wrong too."""
    tokens = (
        replace(_FINDING, check="flips", message="90 of 100 differ", measured=90.0, allowed=0.0, fix="look at logits"),
        replace(_FINDING, check="tokens", message="1 is no tie", where="step 3", measured=7.5, fix="look at the tie"),
        replace(_FINDING, check="depth of flips", measured=1e6, fix="look at logits"),
    )
    unknown = replace(_FINDING, check="tokens", status=Status.UNMEASURED, message="not judged", where="", why="")
    unknown = replace(unknown, measured=None)
    text = str(_of(Status.DEVIATES, findings=(*tokens, unknown)))
    assert text.splitlines()[1:3] == [
        "  precision: tokens: 1 is no tie (measured 7.5, allowed 1.9), worst at step 3; 2 more findings",
        "  precision: tokens: not judged",
    ]
    assert "next: look at the tie" in text
    both = str(_of(Status.DEVIATES, findings=(*tokens, _FINDING)))
    assert both.splitlines()[1].startswith("  precision: the error is 40 x")
    assert both.splitlines()[2].startswith("  precision: tokens: 1 is no tie")
    assert "next: compare module by module" in both
    assert "next: look" not in both


def test_one_word_for_both_questions():
    """What is found of both in the same words is said once; another count or place is another line."""
    same = replace(_FINDING, check="vocabulary", message="99 columns", where="", measured=None, allowed=None, why="")
    other = replace(same, check="lengths", message="short")
    findings = (replace(same, question="function"), same, replace(other, question="function"), other, other)
    lines = str(_failed(Status.STRUCTURAL, Status.STRUCTURAL, findings)).splitlines()[1:4]
    assert lines == [
        "  function and precision: vocabulary: 99 columns",
        "  function: lengths: short",
        "  precision: lengths: short; 1 more finding",
    ]


def test_the_tokens_are_not_said_twice():
    """A question that is well shows its own tokens only where they are not those of the run as shipped."""
    wrong = replace(_FINDING, question="function")
    text = str(_failed(Status.DEVIATES, Status.DRIFT, (wrong,)))
    assert "\n  precision: ok, error 0.98 x round-off in bfloat16\n  tokens: 2 of 100 differ" in text


def test_what_is_to_be_done_is_said_once():
    """Findings that share a fix say it once, behind all; `verbose` says it under the last of them."""
    last = replace(_FINDING, check="weights", fix="look at the tie")
    findings = (_FINDING, last, replace(_FINDING, check="gain"), replace(_FINDING, question="function"))
    verdict = replace(_GOOD, status=Status.DEVIATES, findings=findings)
    lines = str(verdict).splitlines()
    assert lines[-3:-1] == ["  next: compare module by module", "  next: look at the tie"]
    assert str(verdict).count("next: compare module") == 1
    lines = _verbose(verdict).splitlines()
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
    assert "--verbose gives limits" in command()
    assert "--json FILE" in command()
    assert "--blame-environment" in command(environment=_MOVED)
    assert "harness record ... --update --reason" in command(environment=_MOVED, blame=theirs)
    assert "--json FILE" in command(environment=_MOVED, blame=replace(theirs, who="change"))
    assert "--verbose" not in _verbose(_of(Status.DEVIATES))
    assert "--json FILE" in _verbose(_of(Status.DEVIATES)).splitlines()[-1]
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
    assert all(option in help_of["check"] for option in ("--blame-environment", "--json FILE", "--verbose"))
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
    verdict = _of(Status.DEVIATES, findings=findings)
    assert "measured nan, allowed 1.9), worst at at nan; 2 more findings" in str(verdict)
    assert "worst at at nan (2 more such findings" in _verbose(verdict)


def test_findings_of_no_place_are_counted_too():
    """Without a place there is no "worst at", and the others are counted all the same."""
    findings = (replace(_FINDING, where=""), replace(_FINDING, where="", measured=1.95))
    verdict = _of(Status.DEVIATES, findings=findings)
    assert "round-off (allowed 1.9); 1 more finding\n" in str(verdict)
    assert "\n    1 more such finding; --json has all\n" in _verbose(verdict)


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
        red = replace(served, status=Status.DEVIATES, findings=(_FINDING,))
        assert f"\n  tokens: 2 of 100 differ, 97.0% of 100 steps decidable, judged by {level}\n" in str(red)


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
    """A failed verdict says what the pair of answers means; `verbose` gives both, with what would have been caught."""
    verdict = _failed(function, precision)
    text = _verbose(verdict)
    assert f"same function (float32 copy): {function.value}; an error of 4.2 x" in text
    assert f"as shipped): {precision.value}; an error of 1.9 x" in text
    for form in (text, str(verdict)):
        assert ("meaning:" in form) == (words is not None)
        assert words is None or words in form


def test_the_size_of_the_error_is_said_as_a_size():
    """A precision whose round-off is as large as the error is named as a size, once, and no cast is spoken of."""
    told = replace(_FINDING, check="effective precision", message="its error is that of float16", fix="Look for a cast")
    verdict = _failed(Status.DRIFT, Status.DEVIATES, (_FINDING, told))
    sized = replace(verdict, answers=(replace(_SHIPPED, status=Status.DEVIATES, effective="float16"),))
    [line] = [one for one in str(sized).splitlines() if "float16's" in one]
    assert line.startswith("  precision: the error is 40 x")
    assert line.endswith("; its error is of the size of float16's round-off")
    assert "cast" not in str(sized)
    assert "its error is of the size of float16's round-off" in _verbose(sized)
    alone = replace(sized, findings=(told,))
    assert "precision: effective precision: its error is that of float16" in str(alone)


def test_rounded_weights_are_named_by_their_finding():
    """Where the weights were rounded a finding says so, and the short form does not repeat it."""
    answers = (replace(_SHIPPED, status=Status.DEVIATES, effective="bfloat16 on int8 weights"),)
    rounded = replace(_failed(Status.DRIFT, Status.DEVIATES), answers=answers)
    assert "int8" not in str(rounded)
    assert "of the size of bfloat16's round-off on int8 weights" in _verbose(rounded)


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
    verdict = replace(_GOOD, status=Status.DEVIATES, findings=(*findings, other))
    text = _verbose(verdict)
    assert text.count("worst at") == 2
    assert "run-5/replay (5 more such findings" in text
    assert "3 tokens are no ties" in text
    assert "worst at run-5/replay; 5 more findings\n  precision: tokens: 3 tokens are no ties (" in str(verdict)


def test_the_questions_are_not_mixed():
    """The same check failed by both questions is two lines, or two blocks: they are different bugs."""
    both = (_FINDING, replace(_FINDING, question="function", measured=900.0, where="there"))
    verdict = replace(_GOOD, status=Status.DEVIATES, findings=both)
    text = _verbose(verdict)
    assert "deviates (precision): error:" in text
    assert "deviates (function): error:" in text
    assert "\n  precision: the error is 40 x the reference's own round-off (allowed 1.9), at batched/replay" in str(
        verdict
    )
    assert (
        "\n  function: the error is 40 x the reference's own round-off (measured 900, allowed 1.9), at there\n"
        in str(verdict)
    )
    for form in (text, str(verdict)):
        assert "more" not in form.partition("tokens:")[0]


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


def test_one_meaning():
    """Where both the passes and the answers mean something the short form has what the passes say, `verbose` both."""
    passes = (_PASS, replace(_PASS, view="prefill", ratio=9.0))
    verdict = replace(_failed(Status.DRIFT, Status.DEVIATES), passes=passes)
    assert str(verdict).count("meaning: ") == 1
    assert "meaning: decode is right and prefill is wrong" in str(verdict)
    assert _verbose(verdict).count("meaning: ") == 2
