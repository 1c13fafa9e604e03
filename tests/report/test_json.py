"""Verdicts as JSON: everything in it, nothing that JSON lacks."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from enum import StrEnum

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import values
from harness.numerics import statistics
from harness.report.json import VERSION, schema, verdict_to_dict
from harness.values import (
    Answer,
    Blame,
    Diagnosis,
    Difference,
    Finding,
    Layer,
    Likeness,
    PassSummary,
    Power,
    Sharding,
    Statistic,
    Status,
    Verdict,
)
from tests.comparison import literal
from tests.report import verdicts

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
    told = [(one["question"], one["unit"], one["name"]) for one in data["statistics"]]
    assert len(told) == len(set(told))
    assert {one for one in told if one[1] == "all"} == {
        (one.question, one.unit, one.name) for one in comparison.statistics if one.unit == "all"
    }
    assert {(question, name) for question, _, name in told} == {(s.question, s.name) for s in comparison.statistics}
    assert len(data["passes"]) == 4


def test_of_each_kind_of_group_the_farthest_is_told():
    """Every pooled statistic, and of the groups the one of each question and name with the largest z, either way."""
    found = (
        dataclasses.replace(_STATISTIC, name="gain", z=0.1),
        dataclasses.replace(_STATISTIC, name="gain", unit="a", z=2.0),
        dataclasses.replace(_STATISTIC, name="gain", unit="b", z=-3.0),
        dataclasses.replace(_STATISTIC, name="error of a prompt", unit="c", z=1.0),
        dataclasses.replace(_STATISTIC, name="gain", question="function", unit="d", z=0.5),
        dataclasses.replace(_STATISTIC, name="error", z=0.2),
    )
    told = _verdict(statistics=found).to_dict()["statistics"]
    assert [(one["question"], one["name"], one["unit"]) for one in told] == [
        ("precision", "gain", "all"),
        ("precision", "error", "all"),
        ("function", "gain", "d"),
        ("precision", "error of a prompt", "c"),
        ("precision", "gain", "b"),
    ]


def test_of_a_real_comparison_the_farthest_groups_are_told():
    """One each of the errors of prompts, of ranges and of seven values of a pass, for either question."""
    golden, truth = literal.golden(precisions=("bfloat16", "float32")), literal.reference_logits()
    comparison = literal.judged(golden, literal.trace(truth + literal.noise(5), upcast=truth + literal.noise(6) / 1e4))
    told = [one for one in _verdict(statistics=comparison.statistics).to_dict()["statistics"] if one["unit"] != "all"]
    assert len(told) == len({(one["question"], one["name"]) for one in told})
    names = {
        *statistics.SIGNED,
        statistics.ERROR,
        statistics.SHIFT,
        statistics.WORST,
        statistics.PROMPT,
        statistics.RANGE,
    }
    assert {one["name"] for one in told if one["question"] == "precision"} == names
    for one in told:
        rivals = [s.z for s in comparison.statistics if (s.question, s.name) == (one["question"], one["name"])
                  and s.unit != "all"]  # fmt: skip
        assert abs(one["z"]) == max(map(abs, rivals))


def test_environment_and_blame_are_told():
    """What is another today is a list, the blame an object; null and an empty list where there is neither."""
    bare = _verdict().to_dict()
    assert (bare["environment"], bare["blame"]) == ([], None)
    data = _verdict(environment=(_MOVED,), blame=_BLAME).to_dict()
    assert data["environment"] == [{"name": "torch", "golden": "2.12", "today": None}]
    assert data["blame"] == {
        "who": "change", "message": "your change did this", "status": "identical", "ratio": 1.5, "limit": None,
    }  # fmt: skip
    assert data["version"] == VERSION == 3


def test_a_set_has_an_order():
    """A set among the settings is written sorted, so that two reports of one check are the same."""
    assert _verdict(settings={"show": frozenset("cab")}).to_dict()["settings"]["show"] == ["a", "b", "c"]


# --- the schema --------------------------------------------------------------------------------

_MOVED = Difference(name="torch", golden="2.12", today=None)
_BLAME = Blame(who="change", message="your change did this", status=Status.IDENTICAL, ratio=1.5, limit=math.inf)
#: Which dataclass each object of the schema describes, and what is computed from its fields.
_OBJECTS = {
    "verdict": (Verdict, {"version", "ok", "exit_code", "power"}),
    "finding": (Finding, set()),
    "answer": (Answer, set()),
    "power": (Power, {"coverage"}),
    "statistic": (Statistic, set()),
    "pass": (PassSummary, set()),
    "difference": (Difference, set()),
    "blame": (Blame, set()),
    "sharding": (Sharding, set()),
    "diagnosis": (Diagnosis, set()),
    "likeness": (Likeness, set()),
    "layer": (Layer, set()),
}
_NAMES = {kind: name for name, (kind, _) in _OBJECTS.items()}


def _resolved(part):
    """A part of the schema with the definition that it refers to in the place of the reference."""
    return schema()["$defs"][part["$ref"].removeprefix("#/$defs/")] if "$ref" in part else part


def _types(part):
    """JSON types that a part of the schema allows."""
    allowed = _resolved(part)["type"]
    return {allowed} if isinstance(allowed, str) else set(allowed)


def _holds(part, kind):
    """Whether a part of the schema describes what a field of this Python type becomes."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return part == {"$ref": f"#/$defs/{_NAMES[kind]}"}
    if origin in (typing.Union, types.UnionType):
        [some] = [one for one in inner if one is not type(None)]
        if dataclasses.is_dataclass(some):
            return [_holds(part["oneOf"][0], some), part["oneOf"][1]] == [True, {"type": "null"}]
        return _types(part) == {{float: "number", str: "string"}[some], "null"}
    if origin is tuple and inner[-1] is Ellipsis:
        return _types(part) == {"array"} and _holds(part["items"], inner[0])
    if origin is tuple:
        part = _resolved(part)
        sizes = (part["minItems"], part["maxItems"])
        return sizes == (len(inner),) * 2 and all(_holds(part["items"], one) for one in inner)
    if origin is typing.Literal:
        return _resolved(part)["enum"] == list(inner)
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return _resolved(part)["enum"] == [one.value for one in kind]
    plain = {str: {"string"}, int: {"integer"}, bool: {"boolean"}, float: {"number", "null"}}
    return _types(part) == plain.get(kind, {"object"})


def _fields():
    for name, (kind, _) in _OBJECTS.items():
        for field, hint in typing.get_type_hints(kind, vars(values)).items():
            yield pytest.param(name, field, hint, id=f"{name}.{field}")


@pytest.mark.parametrize(("name", "field", "hint"), list(_fields()))
def test_every_field_has_its_type_in_the_schema(name, field, hint):
    """A field of a dataclass is in the schema as what it becomes in JSON: enums by their values, numbers nullable."""
    part = schema()["$defs"][name]["properties"][field]
    if (name, field) == ("verdict", "seconds"):
        assert _types(part) == {"number"}  # our own clock gives no NaN
    else:
        assert _holds(part, hint), (part, hint)


@pytest.mark.parametrize("name", _OBJECTS)
def test_the_schema_has_every_field_and_no_other(name):
    """Fields and what is computed from them, all required, nothing else allowed, each with a description."""
    kind, computed = _OBJECTS[name]
    part = schema()["$defs"][name]
    names = {field.name for field in dataclasses.fields(kind)} | computed
    assert set(part["properties"]) == set(part["required"]) == names
    assert part["additionalProperties"] is False
    assert part["description"]
    for field in part["properties"].values():
        assert field.get("description") or _resolved(field).get("description"), field


def test_the_schema_is_a_schema():
    """It is valid under draft 2020-12, of the version that is written, named without a host, and defines no orphan."""
    whole = schema()
    jsonschema.Draft202012Validator.check_schema(whole)
    assert whole["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert "/" not in whole["$id"]
    assert whole["$defs"]["verdict"]["properties"]["version"]["const"] == VERSION
    shared = {"status", "question", "view", "number", "interval"}
    assert set(whole["$defs"]) == set(_OBJECTS) | shared
    assert all(f'"#/$defs/{name}"' in json.dumps(whole) for name in whole["$defs"])


def test_the_schema_knows_which_statuses_are_ok():
    """Status, ok and exit code go together as they do in the code."""
    found = {}
    for case in schema()["$defs"]["verdict"]["oneOf"]:
        ok, code = case["properties"]["ok"]["const"], case["properties"]["exit_code"]["const"]
        found |= dict.fromkeys(case["properties"]["status"]["enum"], (ok, code))
    assert found == {one.value: (one.ok, one.exit_code) for one in Status}
    codes = schema()["$defs"]["verdict"]["properties"]["exit_code"]["enum"]
    assert codes == sorted({one.exit_code for one in Status})


def _validate(*data):
    """Hold verdicts, as they would be read back from a file, to the schema."""
    written = json.loads(json.dumps(data, allow_nan=False))
    jsonschema.validate(written, schema(), cls=jsonschema.Draft202012Validator)


@pytest.mark.parametrize("status", list(Status))
def test_literal_verdicts_are_valid(status):
    """A verdict of each status, with and without all that is optional."""
    full = verdicts.verdict(status, environment=(_MOVED,), blame=_BLAME, statistics=(_STATISTIC,))
    _validate(verdicts.verdict(status).to_dict(), full.to_dict())
    _validate(_verdict().to_dict())


def test_real_verdicts_are_valid(real_verdicts):
    """What real checks give is what the schema says: ok, failed and blamed, stale, unmeasured, error."""
    data = {kind: verdict_to_dict(one) for kind, one in real_verdicts.items()}
    statuses = {kind: one["status"] for kind, one in data.items()}
    assert statuses.pop("ok") in ("identical", "drift")
    assert statuses == {"failed": "deviates", "stale": "stale", "unmeasured": "unmeasured", "error": "error"}
    _validate(*data.values())
    assert data["failed"]["blame"]["who"] == "change"
    assert [one["name"] for one in data["failed"]["environment"]] == ["torch"]
    assert data["ok"]["environment"] == []


@pytest.mark.parametrize(
    "broken",
    [
        {"surprise": 1},
        {"status": "fine"},
        {"version": 2},
        {"ok": True},
        {"exit_code": 0},
        {"status": "identical"},
        {"blame": {}},
        {"environment": [{"name": "torch", "golden": 2, "today": "3"}]},
        {"findings": [{"status": "deviates"}]},
        {"seconds": "1"},
    ],
)
def test_the_schema_is_strict(broken):
    """Another key, value or type, a missing key, and an ok that is none are refused."""
    whole = verdicts.verdict(Status.DEVIATES).to_dict()
    _validate(whole)
    with pytest.raises(jsonschema.ValidationError):
        _validate(whole | broken)
    for key in whole:
        with pytest.raises(jsonschema.ValidationError):
            _validate({name: value for name, value in whole.items() if name != key})
