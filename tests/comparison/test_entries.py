"""Top entries: an engine that shows a few log-probabilities a step is judged by these, on each step's own prefix."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from harness.comparison import entries
from harness.numerics import statistics
from harness.numerics.constants import ALPHA, MAX_SMALLEST
from harness.values import Pass, Scoring, Status
from tests.comparison import literal
from tests.comparison.literal import Shape

_GOLDEN = literal.golden()
_TRUTH = literal.reference_logits()
_GENERATED = literal.row_keys()[2]


@pytest.fixture(scope="module")
def golden():
    """The literal golden."""
    return _GOLDEN


def _served(error, **more):
    """A free run that shows the entries of the reference's logits with an error, and their best tokens."""
    logits = (_TRUTH + error)[_GENERATED]
    best = logits.argmax(axis=1).reshape(literal.PROMPTS, literal.STEPS)
    return literal.free_run([tuple(int(token) for token in row) for row in best], top=logits, **more)


def _judged(golden, trace, **more):
    return literal.judged(golden, trace, literal.FREE, **more)


def _changed(trace, request, **changes):
    """The trace with one continuation changed."""
    (one,) = trace.passes
    generations = list(one.generations)
    generations[request] = replace(generations[request], **changes)
    return replace(trace, passes=(replace(one, generations=tuple(generations)),))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(100, 10_000), entries=st.sampled_from([5, 6, 20]))
def test_round_off_like_the_replicas_is_ok(seed, entries):
    """Log-probabilities that err as the replicas' logits do pass, and say what they could have shown."""
    comparison = _judged(_GOLDEN, _served(literal.noise(seed), entries=entries))
    answer = comparison.answers[-1]
    assert answer.status.ok
    assert answer.power.level == "top entries"
    assert 1 < answer.power.smallest < MAX_SMALLEST
    assert {one.name for one in comparison.statistics} == {statistics.TOP, statistics.TOP_WORST}
    assert any("highest few of each step" in reason for reason in answer.power.unmeasured)


@pytest.mark.parametrize("factor", [3.0, 100.0])
def test_more_error_than_round_off_deviates(golden, factor):
    """An error of a few times round-off fails by the entries though not a single token need differ."""
    comparison = _judged(golden, _served(factor * literal.noise(5)))
    assert ("precision", statistics.TOP) in literal.failing(comparison)
    (finding,) = [finding for finding in comparison.findings if finding.check == statistics.TOP]
    assert finding.measured == pytest.approx(factor, rel=0.15)
    assert finding.measured > finding.allowed


def test_one_wrong_step_is_found(golden):
    """A single step far out fails by the worst step."""
    error = literal.noise(5)
    row = np.flatnonzero(_GENERATED)[17]
    error[row] *= 30
    comparison = _judged(golden, _served(error))
    assert ("precision", statistics.TOP_WORST) in literal.failing(comparison)


@pytest.mark.parametrize(("share", "least", "most"), [(1.0, 0.96, 1.0), (0.5, 0.0, 0.3)])
def test_the_smallest_error_is_caught_as_promised(golden, share, least, most):
    """A bug of the size that the entries are said to see fails about 99 times of 100; half of it hardly ever."""
    smallest = _judged(golden, _served(literal.noise(100))).answers[-1].power.smallest
    caught = 0
    for seed in range(200):
        error = literal.noise(3000 + seed) + share * smallest * literal.noise(7000 + seed)
        judged = entries.judge(literal.context(golden, _served(error)))
        caught += any(one.is_failing for one in judged.statistics)
    print(f"entries: a bug of {share} x {smallest:.3g}: caught {caught} of 200")
    assert least <= caught / 200 <= most


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_fewer_entries_than_five_are_no_bug(golden, count):
    """A server that shows less than the five best of each step has not erred by showing less."""
    assert Status.DEVIATES not in {
        f.status for f in _judged(golden, _served(literal.noise(100), entries=count)).findings
    }


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_few_entries_of_correct_candidates_do_not_fail(count):
    """Of 400 correct candidates that show few entries no more fail than the rate allows (99.9 % quantile)."""
    draws, goldens, failed = 400, 20, 0
    for seed in range(goldens):
        truth = literal.reference_logits(seed)
        golden = literal.golden(truth=truth, seed=seed + 1)
        for candidate in range(draws // goldens):
            logits = (truth + literal.noise(10**7 + 100 * seed + candidate))[_GENERATED]
            trace = literal.free_run(golden.continuations, top=logits, entries=count)
            judged = entries.judge(literal.context(golden, trace))
            failed += any(one.is_failing for one in judged.statistics)
    print(f"{count} entries: {failed} of {draws} fail")
    assert failed <= stats.binom.ppf(0.999, draws, ALPHA)


def test_entries_behind_a_divergence_need_the_reference(golden):
    """Behind a first divergence the golden's entries are of another prefix: unmeasured, or scored by the reference."""
    free = [list(given.tokens) for given in golden.generations]
    free[0][3:] = [(7 * step + 1) % literal.VOCABULARY for step in range(3, literal.STEPS)]
    tie = _TRUTH.copy()
    row = np.flatnonzero(_GENERATED)[3]
    tie[row, free[0][3]] = tie[row].max() - 1e-6
    tied = replace(golden, rows=literal.condense(tie))
    shape = Shape(prompts=(literal.PROMPT,))
    own = literal.reference_logits(50, shape)
    mine = np.flatnonzero(literal.row_keys(shape)[2])
    for step, token in zip(mine, free[0], strict=True):
        own[step, token] = own[step].max() + 0.5
    logits = (tie + literal.noise(100))[_GENERATED]
    tokens = tuple(free[0])
    scoring = Scoring(free=literal.condense(own, truth=own, shape=shape), continuations=((0, tokens),))
    for factor, status in ((1.0, Status.DRIFT), (40.0, Status.DEVIATES)):
        error = factor * np.random.default_rng(8).normal(0, literal.NOISE, (literal.STEPS - 4, literal.VOCABULARY))
        shown = logits.copy()
        shown[4 : literal.STEPS] = own[mine[4:]] + error
        trace = literal.free_run([tokens, *golden.continuations[1:]], top=shown)
        assert _judged(tied, trace, scoring=scoring).answers[-1].status is status
        alone = _judged(tied, trace)
        assert alone.answers[-1].status is Status.UNMEASURED
        assert any("6 free tokens behind" in finding.message for finding in alone.findings)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_entries_that_are_not_finite_never_pass(golden, bad):
    """NaN or infinity at the best entry of a step is structural, and no ratio that the statistics let pass either."""
    trace = _served(literal.noise(100))
    rows = list(trace.passes[0].generations[1].top_logits)
    rows[4] = (bad, *rows[4][1:])
    broken = _changed(trace, 1, top_logits=tuple(rows))
    assert _judged(golden, broken).answers[-1].status is Status.STRUCTURAL
    with np.errstate(all="ignore"):
        context = literal.context(golden, broken)
        judged, lacking = entries.judge(context), entries.missing(context)
    found = [*judged.findings, *([lacking] if lacking else [])]
    assert any(not finding.status.ok for finding in found)


def test_a_masked_entry_among_the_best_is_not_ok(golden):
    """A probability of zero for one of the reference's five best tokens is sound structure, and never a pass."""
    trace = _served(literal.noise(100))
    rows = list(trace.passes[0].generations[1].top_logits)
    rows[4] = (*rows[4][:4], -np.inf)
    with np.errstate(all="ignore"):
        assert not _judged(golden, _changed(trace, 1, top_logits=tuple(rows))).answers[-1].status.ok


def test_steps_without_entries_are_unmeasured(golden):
    """Where one continuation shows none, those steps were not judged, and the others are all the same."""
    trace = replace(_served(literal.noise(100)), capabilities=frozenset({"tokens", "deterministic"}))
    comparison = _judged(golden, _changed(trace, 2, top_ids=(), top_logits=()))
    assert comparison.answers[-1].status is Status.UNMEASURED
    assert any("do not show their top entries" in finding.message for finding in comparison.findings)


def test_a_wrong_token_is_found_beside_its_entries(golden):
    """A token that its own entries do not prefer is judged as a token: the reference's margin decides."""
    trace = _served(literal.noise(100))
    tokens = list(trace.passes[0].generations[0].tokens)
    tokens[-1] = (tokens[-1] + 1) % literal.VOCABULARY
    comparison = _judged(golden, _changed(trace, 0, tokens=tuple(tokens)))
    assert ("precision", "tokens") in literal.failing(comparison)


def test_few_replicas_see_too_little(golden):
    """Entries have their power too: with few independent replicas a clean candidate is unmeasured."""
    floor = replace(golden.floors["bfloat16"], effective=4.0)
    few = replace(golden, floors={"bfloat16": floor})
    comparison = _judged(few, _served(literal.noise(100)), spreads=literal.scatter(0.3))
    assert [finding.check for finding in comparison.findings if not finding.status.ok] == ["power"]
    assert comparison.answers[-1].power.smallest > MAX_SMALLEST


def test_without_a_floor_entries_are_unmeasured(golden):
    """A precision without a floor has nothing to hold entries against."""
    comparison = _judged(replace(golden, floors={"float16": golden.floors["bfloat16"]}), _served(literal.noise(100)))
    assert comparison.answers[-1].status is Status.UNMEASURED


def test_an_empty_pass_says_nothing(golden):
    """No continuation has no entries, and no statistic."""
    empty = Pass(run="single", view="generate", requests=(), generations=())
    context = literal.context(golden, replace(_served(0), passes=(empty,)))
    assert entries.judge(context).statistics == ()
    assert entries.missing(context) is None
