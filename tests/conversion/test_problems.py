"""One error names all that is wrong."""

from pathlib import Path

import pytest

from harness.conversion.problems import Problems
from harness.errors import ModelError

HERE = Path("somewhere")


def raised(problems):
    """The error that is raised."""
    with pytest.raises(ModelError) as error:
        problems.raise_any(HERE, fix="Mend it")
    return error.value


def test_nothing_wrong_is_no_error():
    """It returns."""
    problems = Problems()
    problems.raise_any(HERE, fix="Mend it")
    assert not problems


def test_few_are_told_in_the_line():
    """With the directory, and the fix."""
    problems = Problems()
    problems.add("missing", "a")
    assert str(raised(problems)) == "somewhere: missing: a. Mend it"
    problems.add("unexpected", "b")
    error = raised(problems)
    assert str(error) == "somewhere: 1 missing, 1 unexpected: missing: a; unexpected: b. Mend it"
    assert error.details == ""


def test_many_are_counted_and_listed():
    """The line stays short, the details have every one."""
    problems = Problems()
    for name in "abcdef":
        problems.add("missing", name)
    error = raised(problems)
    assert str(error) == "somewhere: 6 missing: missing: a; missing: b; missing: c; and 3 more. Mend it"
    assert error.details.splitlines() == [f"missing: {name}" for name in "abcdef"]


def test_ranks_share_a_line():
    """What is the same on several ranks is one problem."""
    problems = Problems()
    for rank in (0, 2):
        problems.add("missing", "a", rank)
    problems.add("missing", "b", 1)
    assert problems.lines == ["missing: a (ranks 0, 2)", "missing: b (rank 1)"]
