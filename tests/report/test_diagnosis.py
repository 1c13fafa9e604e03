"""What the templates say, as lines of the report and as JSON that the schema allows."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.comparison import likeness
from harness.comparison.context import compare_context
from harness.report.diagnosis import diagnosis_lines, layer_words, likeness_words, untestable_words
from harness.report.json import schema
from harness.values import Answer, Diagnosis, Layer, Likeness, Status
from tests.report import verdicts
from tests.templates import tiny

_GELU = Likeness(name="na-gelu", wrong="erf GELU where the model has tanh GELU", coefficient=1.02, raw=0.9, z=12.04)
_ROW = Likeness(name="x-row-scaled at 0.1", wrong="one row too large", coefficient=-0.5, raw=-0.4, z=-2.25)
_NAMED = Diagnosis(limit=6.04, named=(_GELU,), nearest=(_GELU, _ROW), templates=74)
_NONE = Diagnosis(limit=6.04, nearest=(_ROW,), templates=74)
_FULL = replace(_NAMED, untestable={"wc-eps": 31.2}, residual=("3.1 x round-off", "in prompt 'a' alone"))


def _answer(diagnosis, question="precision"):
    return Answer(question=question, status=Status.DEVIATES, power=verdicts.POWER, diagnosis=diagnosis)


# --- lines -------------------------------------------------------------------------------------


def test_without_templates_there_is_no_line():
    """A check that did not ask says nothing."""
    assert diagnosis_lines(_answer(None)) == []


def test_a_named_bug():
    """The bug with its coefficient and z, what is wrong, the limit, and the next best that is not named."""
    assert diagnosis_lines(_answer(_NAMED)) == [
        "precision: looks like na-gelu (a = 1.02, z = 12.0): erf GELU where the model has tanh GELU",
        "precision: the largest |z| of 74 templates stays below 6.0 by chance; "
        "next best x-row-scaled at 0.1 (a = -0.50, z = -2.2)",
    ]


def test_two_named_bugs_have_no_next():
    """Each is a line, and where both of the nearest are named there is no next best."""
    lines = diagnosis_lines(_answer(replace(_NAMED, named=(_GELU, _ROW)), "function"))
    assert [line.partition(" (a")[0] for line in lines[:2]] == [
        "function: looks like na-gelu",
        "function: looks like x-row-scaled at 0.1",
    ]
    assert lines[2] == "function: the largest |z| of 74 templates stays below 6.0 by chance"
    assert len(lines) == 3


def test_no_bug():
    """Nothing named: the limit, and what came nearest."""
    (line,) = diagnosis_lines(_answer(_NONE))
    assert line == (
        "precision: like no bug of the catalogue: the largest |z| of 74 templates stays below 6.0 by chance; "
        "nearest x-row-scaled at 0.1 (a = -0.50, z = -2.2)"
    )
    assert diagnosis_lines(_answer(replace(_NONE, nearest=())))[0].endswith("; nearest none")


def test_what_is_left_and_what_cannot_be_seen():
    """What is left over, in the order that it is told, and what the suite is too small for, a line each."""
    *_, left, small = diagnosis_lines(_answer(_FULL))
    assert left == "precision: left over: 3.1 x round-off; in prompt 'a' alone"
    assert small == "precision: too small to be seen in this suite: wc-eps (31 x the tokens would do)"


def test_a_reason_stands_alone():
    """Where nothing was fitted the reason is the only line."""
    assert diagnosis_lines(_answer(Diagnosis(reason="its logits are not finite"))) == [
        "precision: no bug can be named: its logits are not finite"
    ]


# --- blocks ------------------------------------------------------------------------------------


def _layer(coefficient, *blocks, error=0.01):
    return Layer(blocks=blocks, coefficient=coefficient, error=error)


def _each(*coefficients, error=0.01):
    """Of blocks 0, 1, ..."""
    return tuple(_layer(one, block, error=error) for block, one in enumerate(coefficients))


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ((), ""),
        (_each(0.93, 1.05, 1.0), "in every block (a = 0.93 to 1.05)"),
        (_each(0.2, 0.2, 0.2), "in every block (a = 0.20)"),
        (_each(0.01, 0.0, -0.06, 0.98), "in block 3 alone (a = 0.98; the others within 0.06)"),
        (_each(0.01, 0.0, -0.98), "in block 2 alone (a = -0.98; the others within 0.01)"),
        (_each(0.9, 0.0, 0.06, 0.0, 1.0), "in blocks 0 and 4 (a = 0.90 to 1.00; the others within 0.06)"),
        (_each(1.0, -1.0), "in block 0 alone (a = 1.00; the others within 1)"),
        (_each(1.0, 1.0, 0.0, 1.0), "in blocks 0, 1 and 3 (a = 1.00; the others within 0)"),
        (
            (_layer(1.0, 0), _layer(0.6, 1, error=0.3), _layer(0.0, 2)),
            "in block 0 (a = 1.00; the others within 0; block 1 cannot be told)",
        ),
        ((_layer(1.0, 0), _layer(0.6, 1, error=0.3)), "in block 0 (a = 1.00; block 1 cannot be told)"),
        (_each(1.0, 0.5, error=0.6), "in blocks that cannot be told"),
        ((_layer(1.0, 1),), "in block 1, where alone it changes anything (a = 1.00)"),
        ((_layer(0.99), *_each(1.0, 1.0)), "in every block (a = 0.99 to 1.00)"),
        ((_layer(0.0), *_each(1.0, 1.0)), "in blocks 0 and 1 (a = 1.00; the others within 0)"),
        ((_layer(1.0), *_each(0.0, 0.0)), "in what is outside the blocks alone (a = 1.00; the others within 0)"),
        ((_layer(1.0), *_each(0.0, 1.0)), "in block 1 and what is outside the blocks (a = 1.00; the others within 0)"),
        (
            (_layer(0.0, 0, 1, 2), _layer(1.0, 3, 4, 5), _layer(0.0, 6)),
            "in blocks 3 to 5 alone (a = 1.00; the others within 0)",
        ),
    ],
)
def test_blocks(layers, text):
    """All, one, some; those that are too near to half of the largest are said not to be known."""
    assert layer_words(layers) == text


def test_a_named_bug_is_told_with_its_blocks():
    """The blocks stand in the line of the bug."""
    one = replace(_NAMED, named=(replace(_GELU, layers=_each(0.0, 1.0)),))
    assert diagnosis_lines(_answer(one))[0] == (
        "precision: looks like na-gelu (a = 1.02, z = 12.0) in block 1 alone (a = 1.00; the others within 0): "
        "erf GELU where the model has tanh GELU"
    )


def test_a_bug_in_some_blocks_is_a_hint():
    """Where the bug as a whole explains too little, its blocks are told before what was not found."""
    first, second = diagnosis_lines(_answer(replace(_NONE, nearest=(replace(_GELU, layers=_each(0.0, 1.0)), _ROW))))
    assert first == (
        "precision: looks like na-gelu in block 1 alone (a = 1.00; the others within 0), a hint: "
        "erf GELU where the model has tanh GELU"
    )
    assert second == (
        "precision: like no bug of the catalogue as a whole: the largest |z| of 74 templates stays below 6.0 by "
        "chance; nearest na-gelu (a = 1.02, z = 12.0), x-row-scaled at 0.1 (a = -0.50, z = -2.2)"
    )


@pytest.mark.parametrize(
    ("aliases", "text"),
    [
        ((), "na-gelu (a ="),
        (("b",), "na-gelu or b (a ="),
        (("b", "c", "d"), "na-gelu or b or c or d (a ="),
        (("b", "c", "d", "e", "f"), "na-gelu or b or c or d or 2 more (a ="),
    ],
)
def test_aliases(aliases, text):
    """Bugs that are the same on this suite are told, three by name and the others by number."""
    assert likeness_words(replace(_GELU, aliases=aliases)).startswith(text)


def test_what_needs_least_is_told_first():
    """Three by name, those that need the fewest tokens first, and the number of the others."""
    needed = {"a": 300.0, "b": 1.24, "c": 20.0, "d": 5.0, "e": 6.0}
    assert untestable_words(needed) == (
        "b (1.2 x the tokens would do), d (5 x the tokens would do), e (6 x the tokens would do) and 2 more"
    )
    assert untestable_words({"a": 2.0}) == "a (2 x the tokens would do)"


def test_a_bug_that_no_tokens_would_show():
    """A bug of a path that the candidate does not show needs no number of tokens, and none is told."""
    assert "inf" not in untestable_words({"a": math.inf, "b": 2.0})
    assert "b (2 x the tokens would do)" in untestable_words({"a": math.inf, "b": 2.0})


def test_the_report_has_the_lines_of_both_questions():
    """The terminal report says them under the verdict, the function's first; without diagnosis it has none of them."""
    answers = (_answer(_NAMED, "function"), _answer(_NONE))
    text = str(verdicts.verdict(Status.DEVIATES, answers=answers))
    first, second = text.index("function: looks like na-gelu"), text.index("precision: like no bug of the catalogue")
    assert text.index("deviates") < first < second
    plain = str(verdicts.verdict(Status.DEVIATES))
    assert "of the catalogue" not in plain
    assert "looks like" not in plain


# --- JSON --------------------------------------------------------------------------------------


def _written(diagnosis):
    """A verdict with a diagnosis as it is read back from a file, held to the schema."""
    data = verdicts.verdict(Status.DEVIATES, answers=(_answer(diagnosis),)).to_dict()
    data = json.loads(json.dumps(data, allow_nan=False))
    jsonschema.validate([data], schema(), cls=jsonschema.Draft202012Validator)
    return data["answers"][0]["diagnosis"]


@pytest.mark.parametrize("diagnosis", [None, _NAMED, _NONE, _FULL, Diagnosis(reason="no floor"), Diagnosis()])
def test_json_is_valid_with_and_without(diagnosis):
    """Each kind of diagnosis, and none, is what the schema says."""
    assert (_written(diagnosis) is None) is (diagnosis is None)


def test_json_holds_all_of_it():
    """Every field is there under its name, with every digit."""
    layers = (_layer(0.01, error=0.02), _layer(1.0, 4, 5, error=0.02))
    data = _written(replace(_FULL, named=(replace(_GELU, layers=layers),)))
    assert data == {
        "limit": 6.04,
        "named": [
            {
                "name": "na-gelu",
                "wrong": _GELU.wrong,
                "coefficient": 1.02,
                "raw": 0.9,
                "z": 12.04,
                "aliases": [],
                "layers": [
                    {"blocks": [], "coefficient": 0.01, "error": 0.02},
                    {"blocks": [4, 5], "coefficient": 1.0, "error": 0.02},
                ],
            }
        ],
        "nearest": [
            {**data["named"][0], "layers": []},
            {**data["nearest"][1], "name": "x-row-scaled at 0.1", "z": -2.25},
        ],
        "templates": 74,
        "untestable": {"wc-eps": 31.2},
        "residual": ["3.1 x round-off", "in prompt 'a' alone"],
        "reason": "",
    }


@given(z=st.floats(), limit=st.floats(), needed=st.floats())
@settings(deadline=None, max_examples=25)
def test_no_number_is_beyond_json(z, limit, needed):
    """Whatever was fitted can be written: NaN and infinities are null, all else is kept to the last bit."""
    data = _written(replace(_FULL, limit=limit, named=(replace(_GELU, z=z),), untestable={"a": needed}))
    for found, value in ((data["named"][0]["z"], z), (data["limit"], limit), (data["untestable"]["a"], needed)):
        assert found == (value if math.isfinite(value) else None)


@pytest.mark.parametrize(
    "broken",
    [
        {"surprise": 1},
        {"templates": -1},
        {"templates": None},
        {"named": [{"name": "x"}]},
        {"named": [{"name": "x", "wrong": "", "coefficient": 1, "raw": 1, "z": 1, "aliases": [], "layers": [{}]}]},
        {"named": {}},
        {"residual": "none"},
        {"untestable": {"a": "many"}},
        {"reason": None},
        {"limit": "6"},
    ],
)
def test_the_schema_is_strict(broken):
    """Another key, value or type in a diagnosis is refused, and so is a missing key."""
    data = verdicts.verdict(Status.DEVIATES, answers=(_answer(_FULL),)).to_dict()
    whole = data["answers"][0]["diagnosis"]
    for diagnosis in (whole | broken, *({k: v for k, v in whole.items() if k != key} for key in whole)):
        data["answers"][0]["diagnosis"] = diagnosis
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate([data], schema(), cls=jsonschema.Draft202012Validator)


@pytest.mark.parametrize("share", [0.0, 1.0, 200.0])
def test_a_real_diagnosis_can_be_told_and_written(share):
    """What is really fitted, of a correct candidate, a hidden bug and a gross one, has lines and is valid JSON."""
    trace = tiny.candidate(tiny.round_off(0) + share * tiny.template(*tiny.HIDDEN))
    diagnosis, _ = likeness.diagnose(compare_context(tiny.golden(), trace), tiny.bank())
    lines = diagnosis_lines(_answer(diagnosis))
    assert all("\n" not in line and line.startswith("precision: ") for line in lines)
    assert ("looks like" in lines[0]) is bool(share)
    assert _written(diagnosis)["templates"] == len(tiny.bank().names)
