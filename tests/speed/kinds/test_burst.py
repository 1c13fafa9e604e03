"""A burst on an engine whose time is known, and the size of one as it is written."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import EngineError, UsageError
from harness.speed.kinds import burst
from harness.speed.kinds.burst import Size, parse_size

SIZE = Size(count=10, prompt=2, new=3)


def test_a_request_waits_until_its_batch_is_done(known):
    """Ten requests in batches of four, 3 s each: done after 3, 6 and 9 s, and half of them after 6."""
    engine, said = known(), []
    found = burst.measure(engine, burst.Work(prompts=((1, 2), (3, 4)), size=SIZE, batch=4), said.append)
    assert found.seconds == 9.0
    assert found.waits == (6.0, 9.0, 9.0)
    assert [len(one) for one in engine.batches] == [4, 4, 4, 2], "one batch warms up"
    assert engine.batches[1] == [(1, 2), (3, 4), (1, 2), (3, 4)]
    assert said[-1] == "burst, 10 of 10 requests done"


def test_a_share_is_told_by_a_request_and_no_mean_of_two(known):
    """One batch a request: the 5th of ten is done after 15 s, the 9th after 27 s and the last after 30 s."""
    found = burst.measure(known(), burst.Work(prompts=((1, 2),), size=SIZE, batch=1), lambda _text: None)
    assert found.waits == (15.0, 27.0, 30.0)


def test_requests_that_end_early_are_refused(known):
    """Fewer tokens would be a throughput that was not reached."""
    with pytest.raises(EngineError, match="gave 8"):
        burst.measure(known(lost=1), burst.Work(prompts=((1, 2),), size=SIZE, batch=4), lambda _text: None)


@given(st.integers(1, 2**20), st.integers(1, 2**20), st.integers(1, 2**20))
def test_a_size_is_read_as_it_is_written(count, prompt, new):
    """The way there and back."""
    size = Size(count=count, prompt=prompt, new=new)
    assert parse_size(str(size)) == size


def test_a_size_without_new_tokens_asks_for_twenty():
    """As the load test of the first article did."""
    assert parse_size(" 1000x512 ") == Size(count=1000, prompt=512, new=20)


@pytest.mark.parametrize(
    "text", ["", "1000", "0x512", "1000x512+0", "1000x512x20", "-1x2", "9999999x1", "10x1e3", "٣x2"]
)
def test_what_is_no_size_is_refused(text):
    """In one line that shows the form."""
    with pytest.raises(UsageError, match="is no size of a burst") as refused:
        parse_size(text)
    assert "1000x512+20" in refused.value.fix
