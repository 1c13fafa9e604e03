"""The exit code of a bench."""

import pytest

from harness.speed.benching import Bench, Plan, Subject, Unmeasured
from harness.speed.kinds.latency import Latency
from harness.speed.kinds.scaling import Point, Scaling
from harness.speed.kinds.spread import spread

ONE = spread([0.1])
LATENCY = Latency(prompt=7, new=100, repeats=1, first=ONE, later=ONE, token=ONE, memory=0)
OK = {"ok": True, "exit_code": 0, "status": "drift"}
STALE = {"ok": False, "exit_code": 3, "status": "stale"}
WRONG = {"ok": False, "exit_code": 1, "status": "deviates"}
CANNOT = Subject(spec="hf", verdict=OK, results={"latency": LATENCY, "scaling": Unmeasured(reason="no ranks")})
FAILED = Subject(spec="hf", results={"burst": Unmeasured(reason="it died", failed=True)})


def scaled(**named):
    """A candidate whose two ranks are as named."""
    points = (Point(ranks=1, spec="tp", latency=LATENCY), Point(ranks=2, spec="tp", **named))
    return Subject(spec="tp", results={"scaling": Scaling(points=points)})


@pytest.mark.parametrize(
    ("subjects", "asked", "code"),
    [
        ([Subject(spec="hf", verdict=OK, results={"latency": LATENCY})], True, 0),
        ([CANNOT], False, 0),
        ([CANNOT], True, 3),
        ([FAILED, CANNOT], True, 4),
        ([Subject(spec="hf", verdict=STALE), FAILED], False, 3),
        ([FAILED, Subject(spec="hf", verdict=WRONG)], False, 1),
        ([scaled(latency=LATENCY)], True, 0),
        ([scaled(reason="6 heads")], True, 3),
        ([scaled(reason="6 heads")], False, 0),
        ([scaled(reason="it is deviates", exit_code=1)], False, 1),
    ],
)
def test_a_wrong_model_comes_before_a_failure_and_that_before_what_is_missing(subjects, asked, code):
    """What was not named by the user may be missing."""
    found = Bench(golden="g", model="m", plan=Plan(asked=asked), subjects=tuple(subjects))
    assert found.exit_code == code
