"""Detection tables against counts by hand: what counts, rows, curves, comparisons, survivors, targets."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.power import detection
from harness.power.detection import COUNTS, NO_SIGNAL, SMALL, UNKNOWN_SIGNAL, Share, is_upper_bound, place
from harness.power.judges import ALL, TOKENS, Judge
from tests.power.synthetic import criterion, mutation, named, null, rules, trial

CATALOGUE = named(
    mutation("bug-a"),
    mutation("bug-b", group="norms", subtlety="gross"),
    mutation("bug-t", group="stopping", subtlety="moderate", shows="tokens"),
    mutation("bug-h", group="precision", active=frozenset({"half"})),
)
RULES = rules(criterion("rule", bfloat16=2.0, float32=2.0))


def table_of(trials, criteria=RULES, precision="bfloat16"):
    """The table of one precision."""
    return {one.precision: one for one in detection.tables(trials, criteria, CATALOGUE)}[precision]


def row_of(table, name=ALL.name):
    """The row of a judge."""
    (row,) = (row for row in table.rows if row.judge.name == name)
    return row


# --- what counts -------------------------------------------------------------------------------


@pytest.mark.parametrize(("signal", "expected"), [(0.01, COUNTS), (0.0, NO_SIGNAL), (None, UNKNOWN_SIGNAL),
                                                  (math.inf, COUNTS), (math.nan, COUNTS)])  # fmt: skip
def test_in_16_bits_what_changes_float64_counts(signal, expected):
    """Any change of the float64 logits counts, none does not, and an unknown one is a case of its own."""
    assert place(trial(signal=signal, error=9.0), mutation()) == expected


@pytest.mark.parametrize(("signal", "error", "expected"), [(3.0, 1.0, COUNTS), (2.9, 3.0, COUNTS), (2.9, 2.9, SMALL),
                                                           (None, None, SMALL), (None, 3.1, COUNTS)])  # fmt: skip
def test_in_float32_large_errors_count(signal, error, expected):
    """An S/N or an error of 3 times round-off counts."""
    assert place(trial(signal=signal, error=error, precision="float32"), mutation()) == expected


def test_what_shows_in_tokens_counts():
    """In 16 bits always, in float32 where tokens differ."""
    bug = mutation(shows="prompt")
    assert place(trial(signal=0.0), bug) == COUNTS
    assert place(trial(signal=0.0, precision="float32", tokens=1), bug) == COUNTS
    assert place(trial(signal=0.0, precision="float32"), bug) == SMALL


def test_a_run_that_fails_counts():
    """A bug that ends the run was found by everyone, whatever is known of its size."""
    assert place(trial(status="error", signal=None), mutation()) == COUNTS
    assert place(trial(status="error", signal=None, precision="float32"), mutation()) == COUNTS


# --- rows --------------------------------------------------------------------------------------

TRIALS = [
    trial("bug-a", "deviates", signal=5.0, scores={"rule": 9.0}, seconds=1.0, cost=0.5),
    trial("bug-a", "drift", signal=4.0, host="other", scores={"rule": 1.5}, seconds=3.0, cost=0.5),
    trial("bug-a", "drift", signal=0.5, group=1, scores={"rule": 1.0}),
    trial("bug-a", "deviates", signal=9.0, strength=0.5, scores={"rule": 9.0}),
    trial("bug-b", "structural", signal=2.0, scores={"rule": 3.0}),
    trial("bug-t", "deviates", signal=0.0, levels={"tokens": "deviates"}, scores={"rule": 0.0}),
    trial("bug-h", "deviates", signal=0.0, scores={"rule": 9.0}),
    trial("bug-b", "unmeasured", signal=2.0, scores={"rule": 9.0}),
    trial("bug-b", "skipped", host="third"),
    null(scores={"rule": 0.5}),
    null("ok", kind="control", scores={"rule": 2.5}),
    null("sdpa", "deviates", scores={"rule": 0.1}),
    null("late", "stale", scores={"rule": 99.0}),
]


def test_counts_by_hand():
    """Five bugs as reported count: ours finds three of them, by group, subtlety and S/N."""
    row = row_of(table_of(TRIALS))
    assert row.total == Share(found=3, total=5)
    assert row.strong == Share(found=1, total=2)
    assert row.groups == {"cache": Share(found=1, total=3), "norms": Share(found=1, total=1),
                          "stopping": Share(found=1, total=1)}  # fmt: skip
    assert row.subtleties == {"subtle": Share(found=1, total=3), "gross": Share(found=1, total=1),
                              "moderate": Share(found=1, total=1)}  # fmt: skip
    assert (row.false.alarms, row.false.count) == (1, 3)


def test_peers_by_hand():
    """At 2.0 as published it alarms on one control; calibrated at 2.5 it has no false alarm and finds the same two."""
    published, own = (row_of(table_of(TRIALS), f"rule {threshold}") for threshold in ("published", "calibrated"))
    assert (published.total, published.false.alarms) == (Share(found=2, total=5), 1)
    assert own.judge.thresholds["bfloat16"] == 2.5
    assert (own.total, own.false.alarms) == (Share(found=2, total=5), 0)


def test_the_bound_is_one_sided():
    """No alarm on 3: at most 1 - 0.05^(1/3)."""
    assert row_of(table_of(TRIALS), "rule calibrated").false.bound == pytest.approx(1 - 0.05 ** (1 / 3))


def test_what_is_aside_and_unjudged():
    """The bug of 16 bits alone is aside, and found; unmeasured, skipped and stale trials are in no rate."""
    table = table_of(TRIALS)
    assert table.aside == {NO_SIGNAL: Share(found=1, total=1)}
    assert table.unjudged == {"unmeasured": 1, "skipped": 1, "stale": 1}
    assert table.never == ("late",)


def test_small_errors_in_float32_are_listed():
    """They are no part of the total."""
    small = trial("bug-a", "drift", signal=1.0, error=1.2, precision="float32")
    table = table_of([small, trial("bug-b", "deviates", signal=9.0, precision="float32")], precision="float32")
    assert table.small == (small,)
    assert row_of(table).total == Share(found=1, total=1)


def test_judges_are_sorted_by_what_they_find():
    """Three of five before two of five with fewer false alarms, then with more, then one of one and silence."""
    names = [row.judge.name for row in table_of(TRIALS).rows]
    assert names == [ALL.name, "rule calibrated", "rule per host", "rule published", TOKENS.name]


def test_a_level_counts_only_where_it_was_judged():
    """The row of tokens has the one trial with that level, and says that it is silent of four."""
    row = row_of(table_of(TRIALS), TOKENS.name)
    assert row.total == Share(found=1, total=1)
    assert row.silent == 4


def test_means_of_seconds():
    """Over all judged trials: four seconds and one second of 11."""
    table = table_of(TRIALS)
    assert table.seconds == pytest.approx(4 / 10)
    assert table.cost == pytest.approx(1 / 10)


def test_unknown_bugs_are_left_out():
    """A ledger may hold bugs that the catalogue no longer has."""
    assert detection.tables([trial("gone", "deviates")], RULES, CATALOGUE) == ()


def test_precisions_in_the_order_of_the_rule():
    """float32 first, and none where no bug counts and no correct implementation was judged."""
    trials = [
        trial("bug-a"),
        trial("bug-a", precision="float32", error=9.0),
        trial("bug-a", precision="float16", signal=0.0),
        trial("bug-a", "skipped", precision="float16"),
    ]
    assert [one.precision for one in detection.tables(trials, RULES, CATALOGUE)] == ["float32", "bfloat16"]


# --- curves ------------------------------------------------------------------------------------


def test_curves_take_all_strengths_with_a_signal():
    """The weaker bug counts here; those without an S/N do not, and nulls never."""
    assert sum(one.total for one in table_of(TRIALS).curves[ALL.name].bins) == 5


def test_judges_that_find_the_same_share_a_curve():
    """What is found decides the curve, not who finds it; who says nothing of a bug with an S/N has none."""
    table = table_of(TRIALS)
    assert table.curves["rule published"] is table.curves["rule calibrated"]
    assert TOKENS.name not in table.curves


# --- beside the peers --------------------------------------------------------------------------


def compared(table, peer, ours=ALL.name):
    """The comparison of two judges."""
    (found,) = (one for one in table.comparisons if (one.ours.name, one.peer.name) == (ours, peer))
    return found


def test_pairs_by_hand():
    """Both find bug-a on one host and bug-b, ours alone the one that shows in tokens, nobody the other two."""
    counts = compared(table_of(TRIALS), "rule calibrated").counts
    assert (counts.both, counts.first, counts.second, counts.neither) == (2, 1, 0, 2)


def test_a_peer_with_more_false_alarms_is_not_eligible():
    """The published rule alarms once of three, as ours does; without ours' alarm it is too many."""
    assert compared(table_of(TRIALS), "rule published").eligible
    quiet = [one for one in TRIALS if one.name != "sdpa"]
    assert not compared(table_of(quiet), "rule published").eligible
    assert compared(table_of(quiet), "rule calibrated").eligible


def test_nobody_is_eligible_without_nulls():
    """Where no correct implementation was judged, nothing is known of false alarms."""
    assert not any(one.eligible for one in table_of([one for one in TRIALS if one.kind == "bug"]).comparisons)


def test_exact_match_is_the_upper_bound_at_zero_alone():
    """Calibrated to the flips of correct ports it is a rule like others."""
    exact = {"sees": "tokens", "threshold": "calibrated", "criterion": "exact"}
    assert is_upper_bound(Judge(name="x", thresholds={"float32": 0.0}, **exact), "float32")
    assert not is_upper_bound(Judge(name="x", thresholds={"float32": 0.0, "bfloat16": 4.0}, **exact), "bfloat16")
    assert not is_upper_bound(Judge(name="x", thresholds={"float32": 0.0}, **{**exact, "criterion": "o"}), "float32")


# --- survivors and targets -----------------------------------------------------------------------


def test_survivors_and_their_finders():
    """Ours misses two bugs as reported: a hole, and one below the floor; a blameless peer that finds one is named."""
    trials = [one for one in TRIALS if one.name not in ("ok", "sdpa")]
    hole, low = table_of(trials).survivors
    assert (hole.reason, hole.trial.host, hole.finders) == ("HOLE", "other", ("rule calibrated",))
    assert (low.reason, low.trial.signal) == ("below the floor", 0.5)
    assert low.finders == ("rule calibrated", "rule per host")


def targets(table):
    """What was reached, by the first word that tells them apart."""
    return {one.asked: one.reached for one in table.targets}


def many(found, missed, *, signal=1.0, precision="bfloat16", score=0.0):
    """Trials of one bug that ours finds or misses, on as many hosts."""
    return [
        trial("bug-a", "deviates" if n < found else "drift", host=f"h{n}", signal=signal, error=signal,
              precision=precision, levels={"tokens": "drift"}, scores={"rule": score})
        for n in range(found + missed)
    ]  # fmt: skip


def test_targets_in_16_bits():
    """60 of 100 is enough in all, 94 of 100 is not among the strong ones."""
    nulls = [null(scores={"rule": 0.5})]
    weak, strong = many(60, 40), many(94, 6, signal=3.0)
    assert targets(table_of([*weak, *nulls]))["60% of all bugs found"]
    assert not targets(table_of([*many(59, 41), *nulls]))["60% of all bugs found"]
    assert not targets(table_of([*strong, *nulls]))["95% of those with S/N >= 3 found"]
    assert targets(table_of([*many(95, 5, signal=3.0), *nulls]))["95% of those with S/N >= 3 found"]
    assert not targets(table_of([*weak, *nulls]))["95% of those with S/N >= 3 found"]


def test_targets_in_float32():
    """One missed is too many, and so is one false alarm or no null at all."""
    asked, quiet = "all bugs of 3 x round-off and more found", "no alarm on controls and correct implementations"
    good = table_of([*many(5, 0, signal=9.0, precision="float32"), null(precision="float32")], precision="float32")
    bad = table_of(
        [*many(4, 1, signal=9.0, precision="float32"), null(precision="float32", status="deviates")],
        precision="float32",
    )
    assert (targets(good)[asked], targets(good)[quiet]) == (True, True)
    assert (targets(bad)[asked], targets(bad)[quiet]) == (False, False)
    assert not targets(table_of(many(5, 0), precision="bfloat16"))[quiet]


def test_a_peer_far_above_ours_misses_the_target():
    """A rule that finds all 40 where ours finds 20 is named; one that finds one more is within the interval."""
    asked = "no peer with no more false alarms above ours by more than the paired interval"
    nulls = [null(scores={"rule": 0.5})]
    above = table_of([*many(20, 20, score=9.0), *nulls])
    (target,) = (one for one in above.targets if one.asked == asked)
    assert not target.reached
    assert "rule calibrated" in target.shown
    near = [*many(20, 0, score=9.0), trial("bug-b", host="x", scores={"rule": 9.0})]
    assert targets(table_of([*near, *nulls]))[asked]


def test_tokens_alone_must_be_above():
    """A rule on tokens that is level with ours misses the target."""
    asked = "tokens alone: every such rule with no more false alarms below ours"
    criteria = rules(criterion("rule", sees="tokens"))
    nulls = [null(scores={"rule": 0.5}, levels={"tokens": "drift"})]
    level = [trial("bug-a", levels={"tokens": "drift"}, scores={"rule": 0.0})]
    above = [trial("bug-a", levels={"tokens": "deviates"}, scores={"rule": 0.0})]
    assert not targets(table_of([*level, *nulls], criteria))[asked]
    assert targets(table_of([*above, *nulls], criteria))[asked]


STATUSES = ["identical", "drift", "deviates", "error", "unmeasured", "skipped"]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(
    st.sampled_from(["bug", "control", "benign"]), st.sampled_from(["bug-a", "bug-b", "bug-t", "bug-h"]),
    st.sampled_from(STATUSES), st.floats(0, 100) | st.none(), st.floats(0, 10),
    st.sampled_from(["bfloat16", "float32"]),
), max_size=25))  # fmt: skip
def test_nothing_is_lost(cases):
    """Every bug as reported is counted, aside or unjudged; calibrated rules alarm on failed nulls alone."""
    trials = [
        trial(name, status, kind=kind, signal=signal, error=None, precision=precision, host=f"h{n}",
              scores={"rule": score})
        for n, (kind, name, status, signal, score, precision) in enumerate(cases)
    ]  # fmt: skip
    for table in detection.tables(trials, RULES, CATALOGUE):
        mine = [one for one in trials if one.precision == table.precision]
        bugs = sum(one.kind == "bug" for one in mine if one.status not in ("unmeasured", "skipped"))
        for row in table.rows:
            assert row.total.total + row.silent + sum(share.total for share in table.aside.values()) == bugs
            assert sum(share.total for share in row.groups.values()) == row.total.total
            if row.judge.threshold in ("calibrated", "per host"):
                assert row.false.alarms == sum(one.kind != "bug" and one.status == "error" for one in mine)
        assert sum(table.unjudged.values()) == len(mine) - sum(
            one.status not in ("unmeasured", "skipped") for one in mine
        )
