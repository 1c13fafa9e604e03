"""What lint found, as text."""

from __future__ import annotations

from pathlib import Path

from harness.lint import Anomaly
from harness.report.lint import lint_to_text


def anomaly(where: str, *, kind: str = "anomaly", severity: str = "error", path: str = "golden/m/s") -> Anomaly:
    """One thing."""
    return Anomaly(kind=kind, path=Path(path), where=where, message="is wrong", fix="Mend it", severity=severity)


def test_nothing_is_one_line() -> None:
    """Where nothing is wrong there is one line."""
    assert lint_to_text([]) == "nothing is wrong with these goldens"


def test_errors_come_first_and_what_to_do_is_said_once() -> None:
    """A line each, errors before warnings, and under those of one kind what to do."""
    text = lint_to_text([anomaly("a", severity="warning", kind="undecidable"), anomaly("b"), anomaly("c")])
    assert text.splitlines() == [
        "2 errors, 1 warning",
        "error: golden/m/s: anomaly: b: is wrong",
        "error: golden/m/s: anomaly: c: is wrong",
        "  next: Mend it",
        "warning: golden/m/s: undecidable: a: is wrong",
        "  next: Mend it",
    ]


def test_many_of_a_kind_are_counted() -> None:
    """Of errors of one kind three are shown, of warnings one; the others are counted."""
    errors = [anomaly(str(i)) for i in range(10)]
    warnings = [anomaly(str(i), severity="warning", path="golden/m/t") for i in range(4)]
    lines = lint_to_text([*warnings, *errors]).splitlines()
    assert lines[0] == "10 errors, 4 warnings"
    assert lines[4] == "error: golden/m/s: anomaly: 7 more of these"
    assert lines[7] == "warning: golden/m/t: anomaly: 3 more of these"


def test_words_of_others_stay_on_their_line() -> None:
    """A hostile golden cannot forge a line of the report."""
    text = lint_to_text([anomaly("a\nerror: forged\x1b[2J")])
    assert len(text.splitlines()) == 3
    assert "\x1b" not in text
