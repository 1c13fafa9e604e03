"""A verdict as text and back: what the reporting process gets is what the test had."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.report import plain
from harness.values import Answer, Blame, Difference, Finding, PassSummary, Power, Statistic, Status, Verdict

_FLOATS = st.floats(allow_nan=False)  # NaN is no equal of itself: it has a test of its own
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | _FLOATS | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def _few(strategy):
    return st.lists(strategy, max_size=3).map(tuple)


def _verdicts():
    """Any verdict at all, from the type hints, but for NaN."""
    st.register_type_strategy(float, _FLOATS)
    parts = {
        "findings": _few(st.builds(Finding)),
        "answers": _few(st.builds(Answer, power=st.none() | st.builds(Power, unmeasured=_few(st.text())))),
        "statistics": _few(st.builds(Statistic)),
        "passes": _few(st.builds(PassSummary)),
        "settings": st.dictionaries(st.text(), _JSON, max_size=3),
        "environment": _few(st.builds(Difference)),
        "blame": st.none() | st.builds(Blame),
    }
    return st.builds(Verdict, **parts)


@given(_verdicts())
def test_the_way_back_gives_the_verdict(verdict):
    """Any verdict comes back equal, of the same types, from one line of ASCII."""
    text = plain.pack(verdict)
    assert text.isascii()
    assert "\n" not in text
    back = plain.unpack(text)
    assert back == verdict
    assert back.to_dict() == verdict.to_dict()
    assert type(back.status) is Status
    assert all(type(one) is Finding for one in back.findings)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 5e-324, 0.1 + 0.2])
def test_numbers_keep_their_bits(value):
    """NaN, infinities and the last bit survive, so a report written elsewhere says the same."""
    finding = Finding(status=Status.DEVIATES, check="error", message="", measured=value, allowed=1.0)
    verdict = Verdict(golden="g", candidate="c", status=Status.DEVIATES, findings=(finding,), seconds=1 / 3)
    back = plain.unpack(plain.pack(verdict))
    assert repr(back.findings[0].measured) == repr(value)
    assert back.seconds == verdict.seconds


def test_settings_beyond_json_become_lists_and_text():
    """What an engine shows of its settings may be anything; it arrives as what JSON reports print of it."""
    settings = {"shape": (2, 3), "views": frozenset({"replay"}), 7: {"kernel": 1j}, "text": "\ud800"}
    verdict = Verdict(golden="g", candidate="c", status=Status.IDENTICAL, findings=(), settings=settings)
    back = plain.unpack(plain.pack(verdict)).settings
    assert back == {"shape": [2, 3], "views": ["replay"], "7": {"kernel": "1j"}, "text": "\ud800"}
