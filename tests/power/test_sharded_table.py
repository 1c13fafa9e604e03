"""What checks said of bugs of sharding, as a table and in three numbers: literals."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from harness.power.sharded import CORRECT, Sharded
from harness.power.sharded_table import ranks_to_text, summarise, summary_to_dict, summary_to_text

FOUND = Sharded(
    id="tp-shard-0-layer", host="gpt2-tiny", spec="tp:size=3", where=(2,), status="structural", named=(2,), seconds=1.5,
    finding="rank 2 (stage 0, shard 2) holds 1 tensors that are not its part of the checkpoint: h.2.weight",
)  # fmt: skip
EVERYWHERE = Sharded(
    id="tp-bias-xN", host="gpt2-tiny", spec="tp:size=2", where="all", status="deviates", named=(0, 1),
    first_wrong="the partial products of h.0.dense, on every rank", finding="the error is 9 x round-off",
)  # fmt: skip
OK = Sharded(id=CORRECT, host="gpt2-tiny", spec="tp:size=3", where=(), status="identical")


def test_the_three_numbers():
    """Bugs, those of one rank, and runs without one, each counted by itself."""
    summary = summarise([FOUND, EVERYWHERE, OK])
    assert (summary.found, summary.named, summary.correct) == ((2, 2), (1, 1), (1, 1))
    assert summary.missed == summary.unnamed == summary.alarms == ()
    assert summary.ok


@pytest.mark.parametrize("status", ["identical", "drift", "unmeasured", "error", "stale", "skipped"])
def test_only_a_verdict_against_it_finds_a_bug(status):
    """An engine that failed found nothing, and nor did a check that saw nothing."""
    missed = replace(FOUND, status=status)
    summary = summarise([missed, EVERYWHERE])
    assert summary.found == (1, 2)
    assert summary.missed == (missed,)
    assert not summary.ok


@pytest.mark.parametrize("named", [(), (1,), (1, 2)])
def test_a_bug_that_is_not_named_is_found_all_the_same(named):
    """It is counted, and no reason to fail."""
    unnamed = replace(FOUND, named=named)
    summary = summarise([unnamed, EVERYWHERE])
    assert (summary.found, summary.named) == ((2, 2), (0, 1))
    assert summary.unnamed == (unnamed,)
    assert summary.ok


def test_where_several_ranks_are_wrong_none_is_asked_to_be_named():
    """One rank alone is what a report has to name."""
    several = replace(FOUND, where=(1, 2), named=())
    assert summarise([several, EVERYWHERE]).named == (0, 0)


@pytest.mark.parametrize("status", ["structural", "deviates", "unmeasured", "error"])
def test_a_correct_run_that_is_not_ok_is_an_alarm(status):
    """Also one that could not be judged."""
    alarm = replace(OK, status=status)
    summary = summarise([FOUND, alarm, OK])
    assert summary.correct == (1, 2)
    assert summary.alarms == (alarm,)
    assert not summary.ok


def test_the_text():
    """Three numbers, what is not right by name, and a row a bug: its first wrong place before its finding."""
    records = [
        FOUND,
        replace(EVERYWHERE, status="drift"),
        replace(FOUND, id="x", named=()),
        replace(OK, status="error"),
    ]
    lines = summary_to_text(summarise(records), records).splitlines()
    assert lines[:7] == [
        "found                                                    2 of 3",
        "one rank or stage alone is wrong: exactly it is named    1 of 2",
        "correct runs that are ok                                 0 of 1",
        "not found: tp-bias-xN on gpt2-tiny, tp:size=2: drift",
        "not named: x on gpt2-tiny, tp:size=3: structural",
        "alarms: correct on gpt2-tiny, tp:size=3: error",
        "",
    ]
    said = "rank 2 (stage 0, shard 2) holds 1 tensors that are not its part of th..."
    assert lines[7:] == [
        "bug               host       SPEC       status      wrong  named  the report says",
        f"tp-shard-0-layer  gpt2-tiny  tp:size=3  structural  2      2      {said}",
        f"tp-bias-xN        gpt2-tiny  tp:size=2  drift       all    0, 1   {EVERYWHERE.first_wrong}",
        f"x                 gpt2-tiny  tp:size=3  structural  2      none   {said}",
    ]


def test_correct_runs_alone_have_no_table():
    """And no bug to be found."""
    assert summary_to_text(summarise([OK]), [OK]).endswith("1 of 1\n\nno bug was run")


@pytest.mark.parametrize(("ranks", "text"), [("all", "all"), ((1,), "1"), ((1, 2), "1, 2"), ((), "none")])
def test_ranks_as_text(ranks, text):
    """Numbers, all, or none."""
    assert ranks_to_text(ranks) == text


def test_plain_types():
    """Everything survives JSON."""
    records = [FOUND, EVERYWHERE, OK]
    data = json.loads(json.dumps(summary_to_dict(summarise(records), records), allow_nan=False))
    assert (data["found"], data["named"], data["correct"]) == ([2, 2], [1, 1], [1, 1])
    first, second, third = data["records"]
    assert (first["where"], first["named"], second["where"], third["where"]) == ([2], [2], "all", [])
    assert set(first) == {"id", "host", "spec", "where", "status", "named", "first_wrong", "finding", "seconds"}
