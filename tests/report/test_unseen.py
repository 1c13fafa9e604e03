"""What a verdict says of the certificate beside its golden."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from harness.report.certificate import NAME, certificate_to_dict
from harness.report.unseen import unseen_lines
from harness.values import Answer, Diagnosis, Status
from tests.report.certificates import CERTIFICATE
from tests.report.verdicts import POWER, verdict


@pytest.fixture
def place(tmp_path):
    """A directory with a certificate and the golden that it is of."""
    data = certificate_to_dict(CERTIFICATE)
    (tmp_path / NAME).write_text(json.dumps(data))
    (tmp_path / "golden.json").write_text(json.dumps({"digest": "abc"}))
    return tmp_path


def change(place, **more):
    """Rewrite the certificate with other values."""
    data = json.loads((place / NAME).read_text())
    (place / NAME).write_text(json.dumps(data | more))


def test_a_verdict_says_what_it_could_not_see(place):
    """Named bugs are seen with --diagnose alone; a candidate that shows less than logits sees less."""
    (line,) = unseen_lines(place, verdict())
    assert line == f"not seen: 9 of 12 bugs of the catalogue in bfloat16 (8 with --diagnose); see {place / NAME}"
    answer = Answer(question="precision", status=Status.DRIFT, power=POWER, diagnosis=Diagnosis(limit=6.0))
    (line,) = unseen_lines(place, verdict(answers=(answer,)))
    assert line.startswith("not seen: 8 of 12 bugs of the catalogue in bfloat16; see ")
    fewer = replace(answer, power=replace(POWER, level="tokens"))
    (line,) = unseen_lines(place, verdict(answers=(fewer,)))
    assert "at least 8 of 12" in line


def test_both_questions_are_told(place):
    """The function and the precision each have a count."""
    function = Answer(question="function", status=Status.DRIFT, power=replace(POWER, precision="float32"))
    own = Answer(question="precision", status=Status.DRIFT, power=POWER)
    (line,) = unseen_lines(place, verdict(answers=(function, own)))
    assert "7 of 12 bugs of the catalogue in float32, 9 of 12" in line


def test_nothing_is_said_without_a_certificate_or_a_comparison(place):
    """No file, no comparison, another precision: no line."""
    assert unseen_lines(place, verdict(Status.ERROR)) == []
    other = Answer(question="precision", status=Status.DRIFT, power=replace(POWER, precision="float16"))
    assert unseen_lines(place, verdict(answers=(other,))) == []
    (place / NAME).unlink()
    assert unseen_lines(place, verdict()) == []


def test_a_certificate_of_another_golden_is_out_of_date(place):
    """Its numbers are not shown, and what to do is."""
    (place / "golden.json").write_text(json.dumps({"digest": "other"}))
    (line,) = unseen_lines(place, verdict())
    assert "out of date" in line
    assert "--update --certificate" in line
    assert "of 12" not in line
    (place / "golden.json").unlink()
    assert "out of date" in unseen_lines(place, verdict())[0]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"version": 1, "digest": "abc"}',
        b'{"version": 2, "digest": "abc", "precisions": []}',
        b'{"version": 1, "digest": "abc", "precisions": [{"precision": "bfloat16", "size": "many"}]}',
        b'{"version": 1, "digest": "abc", "precisions": [{"precision": 3}]}',
        b'{"version": 1, "digest": "abc", "precisions": [7]}',
        b"1" * 5000,
        b" " * (5 * 2**20),
    ],
)
def test_a_file_that_is_no_certificate_is_told(place, content):
    """Whatever lies there, a check ends with one line about it."""
    (place / NAME).write_bytes(content)
    (line,) = unseen_lines(place, verdict())
    assert "cannot be read" in line
    assert "\n" not in line


def test_counts_below_zero_and_booleans_are_no_counts(place):
    """A count is a whole number from 0 on."""
    data = json.loads((place / NAME).read_text())
    for wrong in (-1, True, 1.5, None):
        row = {**data["precisions"][1], "not": wrong}
        change(place, precisions=[row])
        assert "cannot be read" in unseen_lines(place, verdict())[0]


def test_nothing_of_the_file_is_shown_but_numbers(place):
    """Names that another wrote into it reach no terminal."""
    row = {**json.loads((place / NAME).read_text())["precisions"][1], "precision": "\x1b[31mbfloat16"}
    change(place, precisions=[row], golden="\x1b[2J", suite="\x1b[2J")
    assert unseen_lines(place, verdict()) == []
