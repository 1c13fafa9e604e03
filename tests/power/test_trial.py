"""Trials as lines: what they are known by, and what is read of them."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import UsageError
from harness.power import ledger
from harness.power.ledger import WHOLE
from harness.power.trial import Trial, parse_trial
from tests.power.synthetic import trial

FULL = trial(
    status="deviates", finding="error: much", levels={"tokens": "unmeasured", "top": "drift"}, strength=0.25, group=-1,
    signal=math.inf, error=None, tokens=3, scores={"exact": 3.0, "kl": math.inf}, seconds=1.5, cost=0.25,
)  # fmt: skip


def stored(work, one):
    """What is read of a trial that was written."""
    with ledger.appending(work, "trials", WHOLE) as append:
        append(one)
    return ledger.read(work, "trials", parse_trial)[-1]


def test_a_full_trial_survives(tmp_path):
    """Every field, infinities in numbers and scores, and None."""
    found = stored(tmp_path, FULL)
    assert found == FULL
    assert found.signal == found.scores["kl"] == math.inf
    assert found.error is None
    assert json.loads((tmp_path / "trials.jsonl").read_text(encoding="utf-8"))["signal"] == "inf"


def test_a_blank_trial_survives(tmp_path):
    """What was not measured stays unknown: None, not 0."""
    blank = Trial(
        kind="bug", name="x", host="h", precision="float32", strength=1.0, group=0, version="v", status="skipped"
    )
    assert stored(tmp_path, blank) == blank
    assert (blank.signal, blank.error, blank.scores, blank.levels) == (None, None, {}, {})


numbers = st.floats(allow_nan=False)


@settings(max_examples=60, deadline=None)
@given(signal=st.none() | numbers, error=st.none() | numbers, scores=st.dictionaries(st.text(max_size=5), numbers))
def test_numbers_survive_to_the_last_bit(tmp_path_factory, signal, error, scores):
    """Of S/N, error and scores."""
    one = trial(signal=signal, error=error, scores=scores)
    assert stored(tmp_path_factory.mktemp("work"), one) == one


def test_nan_stays_nan(tmp_path):
    """It is not taken for a number that there is."""
    assert math.isnan(stored(tmp_path, trial(error=math.nan)).error)


@pytest.mark.parametrize(
    ("field", "value"),
    [("kind", "control"), ("name", "y"), ("host", "y"), ("precision", "float16"), ("strength", 0.5), ("group", 1),
     ("version", "w")],
)  # fmt: skip
def test_what_makes_another_trial(field, value):
    """Each of these alone is another key, the version the last of it."""
    one = trial()
    assert replace(one, **{field: value}).key != one.key
    assert one.key[-1] == one.version


def test_results_are_no_part_of_the_key():
    """A trial is known by what was asked, whatever came of it."""
    asked = {"kind", "name", "host", "precision", "strength", "group", "version"}
    one = replace(FULL, strength=1.0, group=0)
    assert one.key == trial().key
    assert len(one.key) == len(asked)
    assert {field.name for field in fields(Trial)} > asked


@pytest.mark.parametrize(
    "change",
    [{"status": None}, {"extra": 1}, {"scores": [1.0]}, {"scores": {"a": "x"}}, {"signal": "many"}, {"error": []},
     {"scores": None}],
)  # fmt: skip
def test_what_is_no_trial_is_refused(tmp_path, change):
    """A field that is missing, unknown or of another kind: the line is named."""
    stored(tmp_path, FULL)
    file = tmp_path / "trials.jsonl"
    data = json.loads(file.read_text(encoding="utf-8"))
    for name, value in change.items():
        if name == "status":
            del data[name]
        else:
            data[name] = value
    file.write_text(json.dumps(data) + "\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"line 1 of .*trials\.jsonl is no result"):
        ledger.read(tmp_path, "trials", parse_trial)
