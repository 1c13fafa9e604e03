"""Judges: alarms by status, level and score, calibrated thresholds, and who competes with whom."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.power import judges
from harness.power.judges import ALL, TOKENS, TOP, Judge, alarms, calibrated, is_judged, judges_of, rivals, speaks
from tests.power.synthetic import criterion, null, rules, trial

SCORES = st.floats(min_value=0) | st.just(math.nan)


def rule(threshold=1.0, *, precision="bfloat16", sees="logits"):
    """A peer's judge of the criterion "rule"."""
    return Judge(name="rule", sees=sees, threshold="published", criterion="rule", thresholds={precision: threshold})


@pytest.mark.parametrize("status", ["deviates", "structural", "nondeterministic", "error"])
def test_ours_alarms_on_what_is_wrong(status):
    """A verdict that calls the candidate wrong, or a run that fails, is an alarm."""
    assert alarms(trial(status=status), ALL)


@pytest.mark.parametrize("status", ["identical", "drift", "unmeasured", "stale", "skipped"])
def test_ours_is_quiet_on_the_rest(status):
    """Neither a pass nor what was not measured is an alarm."""
    assert not alarms(trial(status=status), ALL)


@pytest.mark.parametrize(("status", "judged"), [("drift", True), ("error", True), ("unmeasured", False),
                                                ("stale", False), ("skipped", False)])  # fmt: skip
def test_what_was_not_measured_enters_no_rate(status, judged):
    """Unmeasured, stale and skipped trials are neither found nor missed."""
    assert is_judged(trial(status=status)) is judged


def test_levels_are_judged_by_their_own_status():
    """Tokens alone may miss what everything finds, and an unmeasured level is no alarm."""
    one = trial(status="deviates", levels={"tokens": "unmeasured", "top": "deviates"})
    assert (alarms(one, ALL), alarms(one, TOP), alarms(one, TOKENS)) == (True, True, False)
    assert speaks(one, TOKENS)
    assert not speaks(trial(status="deviates"), TOKENS)
    assert not alarms(trial(status="deviates"), TOKENS)


def test_a_rule_alarms_above_its_threshold_alone():
    """A score at the threshold passes, the next larger one does not, and no number is worse than any."""
    assert not alarms(trial(scores={"rule": 1.0}), rule())
    assert alarms(trial(scores={"rule": math.nextafter(1.0, 2)}), rule())
    assert alarms(trial(scores={"rule": math.nan}), rule())


def test_a_rule_without_score_or_threshold_says_nothing():
    """It neither alarms nor counts where it was not asked, or has no threshold in that precision."""
    for one in (trial(), trial(scores={"rule": 9.0}, precision="float32")):
        assert not speaks(one, rule())
        assert not alarms(one, rule())


def test_everyone_sees_a_run_that_fails():
    """A status of error is an alarm of every judge, with or without evidence."""
    failed = trial(status="error")
    assert all(speaks(failed, judge) and alarms(failed, judge) for judge in (ALL, TOP, TOKENS, rule(math.inf)))


def test_thresholds_are_the_largest_null_by_precision():
    """Over all hosts, groups, controls and families; bugs, and trials that were not judged, set none."""
    trials = [
        null(scores={"rule": 1.0}),
        null(scores={"rule": 3.0}, kind="control", host="other", group=1),
        null(scores={"rule": 0.5}, precision="float32"),
        null("drawn", "unmeasured", scores={"rule": 8.0}),
        trial(scores={"rule": 9.0}),
    ]
    assert calibrated(trials, "rule") == {"bfloat16": 3.0, "float32": 0.5}


def test_a_host_can_have_a_threshold_of_its_own():
    """A score between those of two hosts' correct implementations alarms on the quieter host alone."""
    trials = [null(scores={"rule": 1.0}), null(scores={"rule": 3.0}, host="loud")]
    (judge,) = (one for one in judges_of(trials, rules(criterion())) if one.threshold == "per host")
    assert judge.within("bfloat16") == {"host": 1.0, "loud": 3.0}
    assert judge.within("float32") == {}
    assert alarms(trial(scores={"rule": 2.0}), judge)
    assert not alarms(trial(scores={"rule": 2.0}, host="loud"), judge)
    assert not speaks(trial(scores={"rule": 2.0}, host="unknown"), judge)
    (pooled,) = (one for one in judges_of(trials, rules(criterion())) if one.threshold == "calibrated")
    assert pooled.within("bfloat16") == {"": 3.0}


def test_no_threshold_is_left_where_a_null_has_the_worst_score():
    """A correct implementation that scores inf makes the rule blind."""
    thresholds = calibrated([null(scores={"rule": math.inf})], "rule")
    assert thresholds == {"bfloat16": math.inf}
    assert not alarms(trial(scores={"rule": math.inf}), rule(thresholds["bfloat16"]))


@given(st.lists(st.tuples(SCORES, st.sampled_from(["benign", "control"]), st.sampled_from(["a", "b"])), min_size=1))
def test_calibrated_rules_never_alarm_on_the_nulls(scores):
    """Whatever correct implementations score, a threshold made of them has no alarm on them."""
    trials = [null(kind=kind, host=host, scores={"rule": score}) for score, kind, host in scores]
    judges = [one for one in judges_of(trials, rules(criterion())) if one.threshold in ("calibrated", "per host")]
    assert len(judges) == 2
    assert not any(alarms(one, judge) for one in trials for judge in judges)


def test_each_rule_is_there_published_and_calibrated():
    """Ours come first; a rule without published thresholds, or without nulls, is there once or not at all."""
    trials = [null(scores={"one": 1.0})]
    found = judges_of(trials, rules(criterion("one", bfloat16=2.0), criterion("two", float32=1.0), criterion("none")))
    assert [judge.name for judge in found[3:]] == ["one published", "one calibrated", "one per host", "two published"]
    assert found[:3] == judges.OURS


def test_rivals_see_no_more():
    """Tokens compete with tokens; everything competes with all rules, and never with ours."""
    peers = [rule(sees=sees) for sees in ("tokens", "top", "logits")]
    everyone = (*judges.OURS, *peers)
    assert [one.sees for one in rivals(TOKENS, everyone)] == ["tokens"]
    assert [one.sees for one in rivals(TOP, everyone)] == ["tokens", "top"]
    assert list(rivals(ALL, everyone)) == peers
