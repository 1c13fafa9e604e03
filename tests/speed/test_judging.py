"""What samples and limits decide."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from harness.speed.clock import Sample
from harness.speed.judging import Gate, Limits, Outcome, kept, measures, settled, unsure
from harness.speed.sampling import Rounds
from harness.speed.shapes import Shape

OK = {"ok": True, "exit_code": 0, "status": "identical", "text": "identical", "data": {}}
WRONG = {"ok": False, "exit_code": 1, "status": "deviates", "text": "deviates", "data": {}}


def rounds(ratio, *, prefill=1.0, noise=0.01, count=24, seed=0):
    """Rounds whose steps take ``ratio`` as long in the candidate, and whose first tokens ``prefill``."""
    rng = np.random.default_rng(seed)
    draw = lambda scale: float(scale * math.exp(noise * rng.standard_normal()))  # noqa: E731
    found = Rounds(shape=Shape(batch=8, prompt=10, new=4))
    for _ in range(count):
        found.base.append((Sample(prefill=draw(0.1), step=draw(0.01), memory=100),))
        found.candidate.append((Sample(prefill=draw(0.1 * prefill), step=draw(0.01 * ratio), memory=300),))
    return found


def outcomes(found, limits):
    """By part."""
    return {one.part: one.outcome for one in measures([found], limits)}


@pytest.mark.parametrize(
    ("ratio", "limits", "expected"),
    [
        (1.0, Limits(slowdown=1.05), Outcome.WITHIN),
        (1.1, Limits(slowdown=1.05), Outcome.BEYOND),
        (0.5, Limits(slowdown=1.05), Outcome.WITHIN),
        (1.05, Limits(slowdown=1.05), Outcome.UNSURE),
        (1.5, Limits(), Outcome.SHOWN),
        (0.8, Limits(speedup=1.1), Outcome.WITHIN),
        (1.0, Limits(speedup=1.1), Outcome.BEYOND),
        (1.0, Limits(speedup=1.1, slowdown=1.05), Outcome.BEYOND),
        (1 / 1.1, Limits(speedup=1.1), Outcome.UNSURE),
    ],
)
def test_an_interval_decides(ratio, limits, expected):
    """Within where all of it is, beyond where none of it is, unsure where the limit lies in it."""
    assert outcomes(rounds(ratio), limits)["decode"] is expected


def test_a_speedup_may_be_asked_of_one_part():
    """Of the others it is only asked that they are not slower."""
    asked = Limits(speedup=1.2, speedup_in=("decode",), slowdown=1.1)
    assert outcomes(rounds(0.7), asked) == {"decode": Outcome.WITHIN, "prefill": Outcome.WITHIN}
    assert outcomes(rounds(0.7, prefill=1.3), asked) == {"decode": Outcome.WITHIN, "prefill": Outcome.BEYOND}


def test_noise_is_never_a_pass():
    """Times that scatter by a factor decide nothing about five per cent."""
    assert outcomes(rounds(1.0, noise=0.7), Limits(slowdown=1.05))["decode"] is Outcome.UNSURE


def test_a_limit_that_is_just_reached_seldom_passes():
    """At a ratio of exactly the limit, each look lets through its share at most: a quarter of 5 %."""
    passed = 0
    for seed in range(200):
        found = measures([rounds(1.05, noise=0.05, count=12, seed=seed)], Limits(slowdown=1.05))
        passed += any(one.part == "decode" and one.outcome is Outcome.WITHIN for one in found)
    assert passed <= stats.binom.ppf(0.9999, 200, 0.05 / 4)


def test_one_measure_beyond_its_limit_settles_it():
    """More rounds would not make it pass; where one is unsure and none beyond, they may."""
    beyond, unsure, within = (measures([rounds(ratio)], Limits(slowdown=1.05))[1] for ratio in (1.3, 1.05, 1.0))
    assert settled([beyond, unsure])
    assert settled([within, within])
    assert not settled([within, unsure])


def test_what_was_decided_stays_and_only_the_rest_is_sampled_further():
    """A measure within its limit at one look is not asked again; the batch sizes of the unsure ones are named."""
    first = measures([rounds(1.0, prefill=1.05)], Limits(slowdown=1.05))
    later = measures([rounds(1.05, prefill=1.0)], Limits(slowdown=1.05))
    assert [one.outcome for one in first] == [Outcome.UNSURE, Outcome.WITHIN]
    assert kept(first, later) == (later[0], first[1])
    assert unsure(first) == {8}
    assert unsure(kept(first, later)) == frozenset()


def test_a_round_counts_by_the_median_of_its_turns_ratios():
    """What slows both sides of a turn slows no ratio, and one turn in three may be anything."""
    turns = [(1.0, 1.1), (5.0, 5.5), (1.0, 9.0)]
    found = Rounds(shape=Shape(batch=8, prompt=10, new=4))
    base, candidate = (tuple(Sample(prefill=one[i], step=1.0, memory=0) for one in turns) for i in (0, 1))
    found.base.append(base)
    found.candidate.append(candidate)
    assert found.ratios(lambda one: one.prefill) == [pytest.approx(math.log(1.1))]


def test_a_measure_shows_both_sides():
    """Medians in seconds and bytes, and the tokens that go in at once."""
    prefill, decode = measures([rounds(2.0, noise=0.0)], Limits())
    assert (prefill.part, prefill.base, prefill.tokens) == ("prefill", pytest.approx(0.1), 80)
    assert (decode.part, decode.candidate, decode.tokens) == ("decode", pytest.approx(0.02), 8)
    assert decode.ratio.middle == pytest.approx(2.0)
    assert (decode.base_memory, decode.candidate_memory) == (100, 300)


def test_the_worst_of_verdicts_and_speeds_is_the_exit_code():
    """A verdict comes before any speed, and what is unsure does not pass."""
    gate = Gate(golden="g", base="b", candidate="c", base_verdict=OK, verdict=OK)
    limits = Limits(slowdown=1.05)
    within, beyond, unsure = (measures([rounds(ratio)], limits) for ratio in (1.0, 1.3, 1.05))
    assert replace(gate, measures=within).exit_code == 0
    assert replace(gate, measures=beyond).exit_code == 1
    assert replace(gate, measures=(*within, *unsure)).exit_code == 3
    assert replace(gate, measures=(*beyond, *unsure)).exit_code == 1
    assert replace(gate, measures=within, verdict=WRONG).exit_code == 1
    assert replace(gate, measures=within, base_verdict={**WRONG, "exit_code": 3}).exit_code == 3
    assert replace(gate, measures=within).ok
    assert not replace(gate, measures=within, verdict=WRONG).ok
