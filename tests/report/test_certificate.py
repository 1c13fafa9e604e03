"""The sensitivity certificate as text and JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from harness.report import certificate as report
from harness.values import Status
from tests.report.certificates import CERTIFICATE


def test_the_table_counts_by_group():
    """Groups are rows and precisions columns: size, tried, name, not, of."""
    rows = {line[:20].strip(): line[20:].split() for line in report.certificate_to_text(CERTIFICATE).splitlines()}
    assert rows["norms"] == ["4", "0", "0", "1", "5", "1", "0", "1", "3", "5"]
    assert rows["cache"] == ["1", "0", "0", "2", "3", "1", "0", "0", "2", "3"]
    assert rows["all"] == ["5", "0", "0", "7", "12", "2", "1", "1", "8", "12"]


def test_the_text_says_what_is_not_seen_and_why():
    """Each bug that is not seen has its reason; aside stand conditions, what is out of reach, and the cost."""
    text = " ".join(report.certificate_to_text(CERTIFICATE).split())
    assert "not seen in float32 (7): hopeless (10,000,000 x the tokens), padded (needs padding)" in text
    assert "faint (2.5 x the tokens)" in text
    assert "sharp (the check says identical)" in text
    assert "the weakest strength still seen in float32, of 1 as reported: clear 0.1, hidden 0.1" in text
    assert "as hf:chunk=16 does: pieces" in text
    assert "out of reach (greedy goldens ask for no penalties and no stop strings): penalty" in text
    assert "no such part: gone" in text
    assert "templates 12 s and 4.5 MB" in text
    assert max(map(len, report.certificate_to_text(CERTIFICATE).splitlines())) <= 120


def test_a_gate_that_alarms_on_the_right_model_says_so():
    """Where the reference itself is red, what bugs do says nothing."""
    red = replace(CERTIFICATE, columns=(replace(CERTIFICATE.columns[0], status=Status.DEVIATES),))
    assert "the gate is of no use in float32" in report.certificate_to_text(red)
    assert "the gate is of no use in float32" in report.certificate_summary(red)
    assert "of no use" not in report.certificate_to_text(CERTIFICATE)


def test_the_summary_is_a_line_for_each_precision():
    """What turns a check red by itself, what --diagnose adds, what is left."""
    first, second = report.certificate_summary(CERTIFICATE).splitlines()
    assert first == (
        "  float32: 5 of 12 bugs of the catalogue turn a check red, 0 more with --diagnose, 7 are not seen"
    )
    assert second.startswith("  bfloat16: 3 of 12 bugs")


def test_json_is_plain():
    """Nothing that JSON cannot hold; counts stand beside each precision."""
    data = report.certificate_to_dict(CERTIFICATE)
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["precisions"][1] == {
        "precision": "bfloat16", "status": "drift", "smallest": 1.9, "limit": 7.0,
        "size": 2, "tried": 1, "name": 1, "not": 8, "of": 12,
    }  # fmt: skip
    hopeless = next(one for one in data["bugs"] if one["id"] == "hopeless")
    assert hopeless["sights"]["float32"]["tokens"] == 1e7
    assert hopeless["sights"]["bfloat16"]["signal"] is None


@pytest.mark.parametrize(
    ("value", "words"), [(1.857, "1.9"), (9.96, "10"), (50.4, "50"), (273.0, "270"), (1_438_000.0, "1,400,000")]
)
def test_numbers_have_two_digits_and_no_exponent(value, words):
    """People read 270, not 2.7e+02."""
    assert report.count_words(value) == words
