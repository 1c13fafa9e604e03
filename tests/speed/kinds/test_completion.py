"""Completion on an engine whose time is known."""

import pytest

from harness.errors import EngineError
from harness.speed.kinds import completion
from harness.values import Request

ROWS = tuple(Request(id=f"row-{number}", prompt_ids=(number, 9), max_new_tokens=3) for number in range(5))


def work(**named):
    """Five rows in batches of two."""
    return completion.Work(**{"requests": ROWS, "batch": 2, "repeats": 2, "name": "five", **named})


def test_all_rows_count_and_the_first_time_does_not(known):
    """Three batches of 3 s, each time; the last batch holds what is left."""
    engine, said = known(), []
    found = completion.measure(engine, work(), said.append)
    assert (found.seconds.low, found.seconds.middle, found.seconds.high) == (9.0, 9.0, 9.0)
    assert (found.rows, found.tokens, found.batch, found.name) == (5, 15, 2, "five")
    assert [len(one) for one in engine.batches] == [2, 2, 1] * 3
    assert said[-1] == "completion, batch 3 of 3"


def test_rows_that_end_early_are_refused(known):
    """Fewer tokens would be a speed that was not reached."""
    with pytest.raises(EngineError, match="asked for 6 tokens on 2 prompts, and gave 4"):
        completion.measure(known(lost=1), work(), lambda _text: None)
