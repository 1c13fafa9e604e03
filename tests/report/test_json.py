"""Verdicts as JSON: everything in it, nothing that JSON lacks."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.values import Answer, Finding, PassSummary, Power, Statistic, Status, Verdict
from tests.compare import literal

_POWER = Power(precision="float32", level="logits", positions=3, steps=2, decidable=1, smallest=3.0, unmeasured=("x",))
_STATISTIC = Statistic(
    question="precision", precision="bfloat16", name="error", unit="all", value=-math.inf, centre=0.0, own=0.1,
    spread=0.2, z=-math.inf, significant=(-math.inf, 0.5), failing=(-math.inf, 0.7), why="t(23)",
)  # fmt: skip


def _verdict(**more) -> Verdict:
    given = {
        "golden": "g",
        "candidate": "c",
        "status": Status.DEVIATES,
        "findings": (Finding(status=Status.DEVIATES, check="error", message="m", measured=math.nan, allowed=math.inf),),
        "answers": (
            Answer(question="function", status=Status.UNMEASURED, power=None),
            Answer(question="precision", status=Status.DEVIATES, power=_POWER, effective="float16"),
        ),
        "statistics": (_STATISTIC,),
        "settings": {"dtype": "float32", "versions": {"torch": "2"}},
        "seconds": 1.25,
    }
    return Verdict(**(given | more))


def test_a_verdict_becomes_plain_json():
    """Statuses become words, NaN and infinities null, and the whole survives a strict JSON round trip."""
    data = json.loads(json.dumps(_verdict().to_dict(), allow_nan=False))
    assert data["status"] == "deviates"
    assert data["exit_code"] == 1
    assert data["findings"][0]["measured"] is None
    assert data["findings"][0]["allowed"] is None
    assert data["power"]["coverage"] == 0.5
    assert data["settings"]["versions"]["torch"] == "2"


def test_both_answers_are_told():
    """Each question has its status, its power and what its error looks like; one without power says null."""
    function, precision = _verdict().to_dict()["answers"]
    assert (function["question"], function["status"], function["power"]) == ("function", "unmeasured", None)
    assert (precision["status"], precision["effective"]) == ("deviates", "float16")
    assert precision["power"] == _verdict().to_dict()["power"]
    assert precision["power"]["level"] == "logits"


def test_statistics_keep_their_limits():
    """A statistic comes with mean, spread and both limits; a side that does not speak is null, and so is -inf."""
    (one,) = json.loads(json.dumps(_verdict().to_dict(), allow_nan=False))["statistics"]
    assert one["significant"] == [None, 0.5]
    assert one["failing"] == [None, 0.7]
    assert one["value"] is one["z"] is None
    assert (one["centre"], one["spread"], one["why"]) == (0.0, 0.2, "t(23)")


def test_passes_say_whose_they_are():
    """A line of a run names the question that it belongs to."""
    line = PassSummary(
        question="function", run="r", view="replay", repeat=1, ratio=0.9, limit=3.0, flips=0, steps=2, seconds=0.5
    )
    (one,) = _verdict(passes=(line,)).to_dict()["passes"]
    assert (one["question"], one["run"], one["repeat"], one["ratio"]) == ("function", "r", 1, 0.9)


def test_a_verdict_without_comparison_has_no_power():
    """A stale or failed check has no numbers, and says null."""
    data = _verdict(answers=(), statistics=()).to_dict()
    assert data["power"] is None
    assert data["answers"] == data["statistics"] == []


@given(value=st.floats(), name=st.sampled_from(["measured", "allowed"]))
def test_no_number_is_beyond_json(value, name):
    """Whatever was measured, the report can be written, and finite numbers are kept to the last bit."""
    finding = Finding(status=Status.DRIFT, check="c", message="m", **{name: value})
    data = json.loads(json.dumps(_verdict(findings=(finding,)).to_dict(), allow_nan=False))
    assert data["findings"][0][name] == (value if math.isfinite(value) else None)


@pytest.mark.parametrize("size", [0.0, 1.0, 30.0])
def test_a_real_comparison_can_be_written(size):
    """What `compare` finds of both questions survives a strict JSON round trip, an exact candidate's -inf too."""
    golden, truth = literal.golden(precisions=("bfloat16", "float32")), literal.reference_logits()
    comparison = literal.judged(golden, literal.trace(truth + size * literal.noise(5), upcast=truth))
    verdict = _verdict(
        findings=comparison.findings,
        answers=comparison.answers,
        statistics=comparison.statistics,
        passes=comparison.passes,
    )
    data = json.loads(json.dumps(verdict.to_dict(), allow_nan=False))
    assert {one["question"] for one in data["statistics"]} == {"function", "precision"}
    assert len(data["statistics"]) == len(comparison.statistics)
    assert len(data["passes"]) == 4
