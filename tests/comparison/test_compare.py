"""The whole comparison: two questions, each with its own status and power, and what must never change a verdict."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.comparison import compare
from harness.numerics import sketch, statistics
from harness.values import NOT_USED, Floor, Golden, Pass, Rows, Status, Trace
from harness.verdict import overall
from tests.comparison import literal
from tests.comparison.literal import Shape

_FINE = literal.NOISES["float32"]
_TRUTH = literal.reference_logits()
_GOLDEN = literal.golden(precisions=("bfloat16", "float32"))
_SHAPE = Shape(prompts=(1, 9, 4, 12), steps=6)


@pytest.fixture(scope="module")
def golden():
    """A golden with a floor of both precisions."""
    return _GOLDEN


def _trace(error, wide_error=None, **more) -> Trace:
    """A candidate with these errors as shipped and widened, each beside round-off."""
    wide = 0 if wide_error is None else wide_error
    return literal.trace(_TRUTH + literal.noise(500) + error, upcast=_TRUTH + literal.noise(501, _FINE) + wide, **more)


def _answers(comparison):
    return {answer.question: answer for answer in comparison.answers}


def _status(comparison):
    return overall([finding.status for finding in comparison.findings])


# --- two questions ---------------------------------------------------------------------------------


def test_a_correct_candidate_answers_both_questions(golden):
    """Function and precision are asked, in that order, each against its own floor, and both are ok."""
    comparison = literal.judged(golden, _trace(0))
    assert [answer.question for answer in comparison.answers] == ["function", "precision"]
    assert all(answer.status.ok for answer in comparison.answers)
    answers = _answers(comparison)
    assert (answers["function"].power.precision, answers["precision"].power.precision) == ("float32", "bfloat16")
    assert {one.precision for one in comparison.statistics if one.question == "function"} == {"float32"}
    assert {one.question for one in comparison.passes} == {"function", "precision"}
    assert _status(comparison).ok


def test_a_bug_below_the_noise_is_found_by_the_function(golden):
    """A bug of 20 times fp32's round-off is a fifth of bf16's: the widened copy shows it, the shipped run does not."""
    bug = literal.noise(77, 20 * _FINE)
    comparison = literal.judged(golden, _trace(bug, bug))
    answers = _answers(comparison)
    assert answers["precision"].status.ok
    assert answers["function"].status is Status.DEVIATES
    assert _status(comparison) is Status.DEVIATES
    assert {question for question, _ in literal.failing(comparison)} == {"function"}


def test_a_wrong_path_is_found_by_the_precision(golden):
    """An error of the run as shipped alone fails the precision; the function is right, and says so."""
    comparison = literal.judged(golden, _trace(5 * literal.noise(77)))
    answers = _answers(comparison)
    assert answers["function"].status.ok
    assert answers["precision"].status is Status.DEVIATES
    assert _status(comparison) is Status.DEVIATES
    assert {question for question, _ in literal.failing(comparison)} == {"precision"}


@pytest.mark.parametrize("reason", ["", "py:port cannot be widened to float32"])
def test_a_candidate_that_cannot_be_widened_is_judged_as_shipped(golden, reason):
    """Without a float32 copy the function is unmeasured, for the reason given, and the shipped run decides."""
    for factor in (0, 5):
        logits = _TRUTH + literal.noise(500) + factor * literal.noise(77)
        comparison = literal.judged(golden, literal.trace(logits, reason=reason))
        function = _answers(comparison)["function"]
        assert function.status is Status.UNMEASURED
        assert function.power.level == "nothing"
        assert function.power.unmeasured == (f"the function: {reason or 'no float32 copy of the candidate was run'}",)
        assert _answers(comparison)["precision"].status is _status(comparison)
        assert _status(comparison).ok == (factor == 0)


@pytest.mark.parametrize(
    ("key", "before", "after"),
    [
        ("attn", "sdpa", "eager"), ("model", "a", "b"), ("device", "cuda", "cpu"), ("threads", 1, 2),
        ("parameters", 10, 11), ("tensor_parallel", 2, 1), ("compile", True, False), ("chunk", 64, None),
        ("batch", 4, 1),
    ],
)  # fmt: skip
def test_a_widened_copy_under_other_settings_is_another_program(golden, key, before, after):
    """Where widening changes more than the precision, its numbers answer nothing: the function is unmeasured."""
    trace = _trace(0, 5 * literal.noise(77))
    trace = replace(
        trace,
        settings={**trace.settings, key: before},
        upcast=replace(trace.upcast, settings={**trace.upcast.settings, key: after}),
    )
    comparison = literal.judged(golden, trace)
    function = _answers(comparison)["function"]
    assert function.status is Status.UNMEASURED
    assert key in function.power.unmeasured[0]
    assert _status(comparison).ok
    assert not [one for one in comparison.statistics if one.question == "function"]


def test_a_setting_that_no_view_used_is_no_change(golden):
    """A setting that one of the two runs made no use of does not make another program of it."""
    trace = _trace(0, 5 * literal.noise(77))
    for one, other in ((NOT_USED, 64), (64, NOT_USED)):
        changed = replace(
            trace,
            settings={**trace.settings, "chunk": one},
            upcast=replace(trace.upcast, settings={**trace.upcast.settings, "chunk": other}),
        )
        assert _answers(literal.judged(golden, changed))["function"].status is Status.DEVIATES


@pytest.mark.parametrize("error", [1.0, 30.0])
def test_a_candidate_in_float32_is_asked_once(golden, error):
    """A candidate that declares float32 is its own widened copy: one answer, about the function."""
    trace = literal.trace(_TRUTH + error * literal.noise(500, _FINE), dtype="float32")
    comparison = literal.judged(golden, trace)
    assert [answer.question for answer in comparison.answers] == ["function"]
    assert _status(comparison).ok == (error == 1)


def test_the_function_is_that_of_the_weights_as_loaded():
    """The widened copy keeps the weights that the candidate loaded: its centre is that of the declared precision.

    A copy that loads the checkpoint again is another model by what the cast did, and fails.
    """
    cast = _TRUTH + np.random.default_rng(5).normal(0, 3e-3, _TRUTH.shape)
    golden = replace(_GOLDEN, centres={"bfloat16": literal.centre(cast)})
    shipped = cast + literal.noise(500)
    kept = literal.judged(golden, literal.trace(shipped, upcast=cast + literal.noise(501, _FINE)))
    assert all(answer.status.ok for answer in kept.answers)
    reloaded = _answers(literal.judged(golden, literal.trace(shipped, upcast=_TRUTH + literal.noise(501, _FINE))))
    assert reloaded["precision"].status.ok
    assert reloaded["function"].status is Status.DEVIATES
    # Declared float32 loads them as they are, and then that is the centre.
    native = literal.trace(_TRUTH + literal.noise(501, _FINE), dtype="float32")
    assert _status(literal.judged(golden, native)).ok


def test_a_structural_fault_of_one_question_leaves_the_other(golden):
    """NaN in the widened copy is structural, without a number; the run as shipped is judged all the same."""
    trace = _trace(0)
    (replay, prefill) = trace.upcast.passes
    nonfinite = np.ones_like(prefill.rows.nonfinite)
    broken = replace(trace.upcast, passes=(replay, replace(prefill, rows=replace(prefill.rows, nonfinite=nonfinite))))
    comparison = literal.judged(golden, replace(trace, upcast=broken))
    answers = _answers(comparison)
    assert (answers["function"].status, answers["function"].power) == (Status.STRUCTURAL, None)
    assert answers["precision"].status.ok
    assert _status(comparison) is Status.STRUCTURAL
    assert {finding.question for finding in comparison.findings} == {"function"}


def test_a_pass_that_the_copy_does_not_show_is_structural(golden):
    """Of the widened copy the replay and the prefill are asked: leaving one out is not a smaller comparison."""
    trace = _trace(0)
    short = replace(trace, upcast=replace(trace.upcast, passes=trace.upcast.passes[:1]))
    assert _answers(literal.judged(golden, short))["function"].status is Status.STRUCTURAL


def test_a_golden_without_a_float32_floor_leaves_the_function_unmeasured():
    """Each question needs its own floor: what is missing for one is no verdict on the other."""
    comparison = literal.judged(literal.golden(), _trace(0))
    answers = _answers(comparison)
    assert answers["function"].status is Status.UNMEASURED
    assert "no floor for float32" in answers["function"].power.unmeasured[0]
    assert answers["precision"].status.ok
    assert _status(comparison) is Status.UNMEASURED


def test_a_copy_that_shows_nothing_answers_nothing(golden):
    """Where only free runs are asked the widened copy has no pass to show: the function is unmeasured."""
    free = literal.free_run(golden.continuations)
    wide = replace(literal.trace(_TRUTH, dtype="float32"), passes=())
    comparison = literal.judged(golden, replace(free, upcast=wide), literal.FREE)
    assert _answers(comparison)["function"].status is Status.UNMEASURED


def test_nothing_compared_is_unmeasured(golden):
    """Without a single run there is no evidence of anything."""
    assert not _status(literal.judged(golden, replace(_trace(0), passes=(), upcast=None), [])).ok


def test_a_copy_that_is_not_float32_answers_nothing(golden):
    """A widened copy that computes in 16 bits still leaves the function unmeasured, or is structural."""
    trace = _trace(0)
    narrow = replace(trace, upcast=replace(literal.trace(_TRUTH + literal.noise(500)), declared={}))
    answers = _answers(literal.judged(golden, narrow))
    assert "function" in answers
    assert not answers["function"].status.ok


# --- weights that are declared to be rounded -------------------------------------------------------


def _declaring(trace: Trace, **settings) -> Trace:
    return replace(trace, declared={**trace.declared, **settings}, settings={**trace.settings, **settings})


def test_rounded_weights_without_a_reference_are_unmeasured(golden):
    """What int4 weights give is not in the golden: equal numbers, or others, without a reference say nothing."""
    comparison = literal.judged(golden, _declaring(literal.trace(_TRUTH + literal.noise(500)), weights="int4"))
    assert _status(comparison) is Status.UNMEASURED
    assert any("int4 weights" in finding.message for finding in comparison.findings)
    assert comparison.statistics == ()


@pytest.mark.parametrize("shown", ["logits", "tokens", "top entries"])
def test_rounded_weights_without_a_reference_are_no_bug(golden, shown):
    """A correct int4 candidate has other tokens than the golden's: without its centre that is no deviation."""
    rounded = _TRUTH + np.random.default_rng(4).normal(0, 0.3, _TRUTH.shape) + literal.noise(500)
    generated = literal.row_keys()[2]
    best = rounded[generated].argmax(axis=1).reshape(literal.PROMPTS, literal.STEPS)
    own = [tuple(int(token) for token in row) for row in best]
    trace, runs = {
        "logits": (literal.trace(rounded), None),
        "tokens": (literal.free_run(own), literal.FREE),
        "top entries": (literal.free_run(own, top=rounded[generated]), literal.FREE),
    }[shown]
    comparison = literal.judged(golden, _declaring(trace, weights="int4"), runs)
    assert _status(comparison) is Status.UNMEASURED


# --- what must not matter --------------------------------------------------------------------------


def _values(comparison):
    """Every kept statistic, pooled and of groups, magnitudes as multiples of round-off."""
    return {
        (one.question, one.name, one.unit == "all"): np.exp(one.value)
        if one.name in statistics.MAGNITUDES
        else one.value
        for one in comparison.statistics
    }


@pytest.mark.parametrize("factor", [1.0, 4.0])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), size=st.floats(0, 30))
def test_a_constant_shift_of_each_row_changes_nothing(factor, seed, size):
    """Rows shifted by numbers of their own have the same statistics and the same verdict, for better and for worse."""
    error = factor * literal.noise(500)
    shift = np.random.default_rng(seed).uniform(-size, size, (len(error), 1))
    before, after = (literal.judged(_GOLDEN, literal.trace(_TRUTH + error + add)) for add in (0, shift))
    assert _values(after) == pytest.approx(_values(before), rel=0.01, abs=0.02)
    assert after.answers[-1].status.ok == before.answers[-1].status.ok == (factor == 1)


def _relabelled_rows(rows: Rows, number: np.ndarray) -> Rows:
    return sketch.sort_rows(replace(rows, request=number[rows.request]))


def _relabelled(golden: Golden, number: np.ndarray) -> Golden:
    """The golden with prompt i as prompt ``number[i]``, its floors with it."""
    old = np.argsort(number)
    rows = golden.rows
    order = np.lexsort((rows.position, number[rows.request]))
    steps = (np.cumsum(rows.generated) - 1)[order][rows.generated[order]]

    def floor(one: Floor) -> Floor:
        pooled = {"bias", "bucket"}
        moments = {
            field.name: getattr(one.moments, field.name)
            if field.name in pooled
            else getattr(one.moments, field.name)[:, old]
            for field in fields(one.moments)
        }
        moments = replace(one.moments, **moments)
        return replace(one, sigma=one.sigma[order], pair=one.pair[steps], moments=moments)

    return replace(
        golden,
        requests=tuple(golden.requests[i] for i in old),
        generations=tuple(golden.generations[i] for i in old),
        rows=_relabelled_rows(rows, number),
        floors={name: floor(one) for name, one in golden.floors.items()},
    )


_UNEVEN = literal.golden(shape=_SHAPE)


@pytest.mark.parametrize("factor", [1.0, 4.0])
@settings(max_examples=15, deadline=None)
@given(number=st.permutations(range(4)), seed=st.integers(0, 99))
def test_the_order_of_the_prompts_changes_nothing(factor, number, seed):
    """Prompts in another order have the same statistics, limits and verdict, and findings keep the prompts' names."""
    number = np.array(number, dtype=np.int32)
    truth = literal.reference_logits(shape=_SHAPE)
    trace = literal.trace(truth + factor * literal.noise(500 + seed, shape=_SHAPE), shape=_SHAPE)
    moved = replace(trace, passes=tuple(replace(one, rows=_relabelled_rows(one.rows, number)) for one in trace.passes))
    before, after = literal.judged(_UNEVEN, trace), literal.judged(_relabelled(_UNEVEN, number), moved)
    # Groups follow the order of the prompts.
    first, second = ({(one.name, one.unit): one for one in each.statistics} for each in (before, after))
    assert first.keys() == second.keys()
    assert len(first) == len(before.statistics) == len(after.statistics)
    for key, one in first.items():
        other = second[key]
        assert other.value == pytest.approx(one.value, rel=1e-3, abs=1e-4)
        assert other.failing == pytest.approx(one.failing, rel=1e-3, abs=1e-4)
    assert [answer.status for answer in after.answers] == [answer.status for answer in before.answers]
    places = [{(finding.check, finding.where) for finding in one.findings} for one in (before, after)]
    assert {where for _, where in places[0]} == {where for _, where in places[1]}


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 9999))
def test_a_correct_candidate_is_ok_on_both_questions(seed):
    """Round-off like the replicas' in both precisions is ok, whatever the draw."""
    trace = literal.trace(_TRUTH + literal.noise(2000 + seed), upcast=_TRUTH + literal.noise(20_000 + seed, _FINE))
    assert all(answer.status.ok for answer in literal.judged(_GOLDEN, trace).answers)


@settings(max_examples=30, deadline=None)
@given(
    data=st.data(),
    bad=st.sampled_from([np.nan, np.inf, -np.inf]),
    name=st.sampled_from(["projections", "logp", "entropy", "logsumexp"]),
    question=st.sampled_from(["function", "precision"]),
)
def test_what_is_not_finite_never_passes(data, bad, name, question):
    """NaN or infinity in any row of any pass of either question is not ok, whatever else is right."""
    trace = _trace(0)
    part = trace if question == "precision" else trace.upcast
    number = data.draw(st.integers(0, len(part.passes) - 1))
    one = part.passes[number]
    values = getattr(one.rows, name).copy()
    values[data.draw(st.integers(0, len(values) - 1))] = bad
    passes = list(part.passes)
    passes[number] = replace(one, rows=replace(one.rows, **{name: values}))
    part = replace(part, passes=tuple(passes))
    broken = part if question == "precision" else replace(trace, upcast=part)
    with np.errstate(all="ignore"):
        comparison = literal.judged(_GOLDEN, broken)
    assert not _status(comparison).ok
    assert {finding.question for finding in comparison.findings if not finding.status.ok} == {question}


def test_an_exact_candidate_is_identical(golden):
    """The reference's own numbers, in both precisions, are identical, whichever floor comes first."""
    for floors in (("bfloat16", "float32"), ("float32", "bfloat16")):
        one = replace(golden, floors={name: golden.floors[name] for name in floors})
        comparison = literal.judged(one, literal.trace(_TRUTH, upcast=_TRUTH))
        assert [answer.status for answer in comparison.answers] == [Status.IDENTICAL] * 2
        assert all(one.value == -np.inf for one in comparison.statistics if one.name == statistics.ERROR)


def test_the_run_decides_what_was_asked(golden):
    """What the candidate was asked is the runs given, the suite's own by default."""
    trace = _trace(0)
    assert compare(golden, trace).answers == compare(golden, trace, golden.suite.runs).answers
    renamed = replace(trace, passes=tuple(replace(one, run="other") for one in trace.passes), upcast=None)
    assert _status(literal.judged(golden, renamed)) is Status.STRUCTURAL


def test_power_says_what_only_free_runs_do_not_show(golden):
    """A free run alone has no rows: its power counts steps, and names what it lacks."""
    comparison = literal.judged(golden, literal.free_run(golden.continuations), literal.FREE)
    power = _answers(comparison)["precision"].power
    assert (power.positions, power.steps, power.level) == (0, literal.PROMPTS * literal.STEPS, "tokens")
    assert any("tokens alone" in reason for reason in power.unmeasured)
    partial = Pass(run="single", view="generate", requests=(0,), generations=golden.generations[:1])
    trace = replace(literal.free_run(golden.continuations), passes=(partial,))
    assert literal.context(golden, trace).tie < literal.context(golden, literal.trace(_TRUTH)).tie
