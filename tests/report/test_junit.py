"""JUnit: what CI servers count is what was found, and no text can break the XML."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.report.characters import REPLACEMENT, legal
from harness.report.junit import to_junit
from harness.report.terminal import headline, verdict_to_text
from harness.values import Status
from tests.report.verdicts import verdict


def _suite(verdicts):
    root = ElementTree.fromstring(to_junit(verdicts))
    assert root.tag == "testsuites"
    [suite] = root
    return suite


def test_the_counters_are_right():
    """Of one verdict of each status: failures, errors, the time of all, and nothing skipped."""
    suite = _suite([verdict(status) for status in Status])
    assert suite.get("name") == "golden-harness"
    assert [suite.get(name) for name in ("tests", "failures", "errors", "skipped")] == ["8", "3", "3", "0"]
    assert float(suite.get("time")) == 1.25 * 8
    assert len(suite.findall("testcase/failure")) == 3
    assert len(suite.findall("testcase/error")) == 3


def test_no_verdict_is_an_empty_suite():
    """Nothing checked is said with zeros."""
    suite = _suite([])
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors"), len(suite)) == ("0", "0", "0", 0)


@pytest.mark.parametrize("status", list(Status))
def test_each_status_has_its_element(status):
    """Failed is a failure, ok is neither, everything else is an error; type, first line and report are in it."""
    one = verdict(status)
    [case] = _suite([one])
    assert (case.get("classname"), case.get("name"), case.get("time")) == ("m/core", "hf:dtype=bfloat16", "1.250")
    [element] = case
    expected = "system-out" if status.ok else "failure" if status.exit_code == 1 else "error"
    assert element.tag == expected
    if status.ok:
        assert element.text == headline(one)
    else:
        assert element.get("type") == status.value
        assert element.get("message") == headline(one)
        assert element.text == verdict_to_text(one)


def _parsed(text):
    return REPLACEMENT if not _is_xml(text) else text


def _is_xml(character):
    """By the grammar of XML 1.0, production 2, written another way than in the source."""
    code = ord(character)
    return code in (9, 10, 13) or 0x20 <= code < 0xD800 or 0xE000 <= code < 0xFFFE or code >= 0x10000


@given(text=st.text(st.characters() | st.sampled_from("\r\n\t\0\x1b<&>]")), name=st.text(st.characters(), max_size=20))
def test_any_text_comes_back(text, name):
    """Whatever a port says, the XML can be written and read again, and has every legal character of it."""
    one = verdict(Status.ERROR, message=f"<{text}>", candidate=f"hf{name}")
    written = to_junit([one])
    written.encode("utf-8")
    [case] = ElementTree.fromstring(written)[0]
    kept = "".join(map(_parsed, text)).replace("\r\n", "\n").replace("\r", "\n")
    assert f"<{kept}>".replace("\n", "\n      ") in case[0].text
    assert case.get("name") == legal(f"hf{name}")
    assert [element.tag for element in case] == ["error"]


def test_names_cannot_add_elements():
    """A candidate and a golden made of XML are text."""
    evil = '"/><testcase name="x"/><!-- ]]>&amp;'
    suite = _suite([verdict(candidate=evil, golden=evil), verdict(Status.DEVIATES, message=evil)])
    assert [case.tag for case in suite] == ["testcase", "testcase"]
    assert suite[0].get("name") == suite[0].get("classname") == evil
    assert evil in suite[1][0].text


def test_real_verdicts(real_verdicts):
    """Verdicts of real checks are counted as what they are, with the words of their findings."""
    suite = _suite(list(real_verdicts.values()))
    assert [suite.get(name) for name in ("tests", "failures", "errors")] == ["5", "1", "3"]
    found = {kind: case[0] for kind, case in zip(real_verdicts, suite, strict=True)}
    assert (found["failed"].tag, found["failed"].get("type")) == ("failure", "deviates")
    assert {kind: found[kind].get("type") for kind in ("stale", "unmeasured", "error")} == {
        "stale": "stale", "unmeasured": "unmeasured", "error": "error",
    }  # fmt: skip
    assert f"<second line> ]]> ``` | {REPLACEMENT}[31m" in found["error"].text
