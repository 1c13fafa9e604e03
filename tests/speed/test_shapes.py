"""What is timed: batches of prompts of one length."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import UsageError
from harness.speed.shapes import Shape, prompts_of, requests_of, shapes
from harness.store import read_golden


@pytest.fixture(scope="module")
def golden(small_home):
    """A small golden."""
    return read_golden(small_home / "golden/small/small")


@given(batch=st.integers(1, 5), prompt=st.integers(1, 300))
def test_prompts_have_the_length_that_is_asked_for(golden, batch, prompt):
    """Whatever the golden's own lengths: they are cut from its tokens, one after another."""
    found = prompts_of(golden, Shape(batch=batch, prompt=prompt, new=2))
    assert [len(ids) for ids in found] == [prompt] * batch
    own = [token for request in golden.requests for token in request.prompt_ids]
    stream = [token for ids in found for token in ids]
    assert stream == [own[i % len(own)] for i in range(len(stream))]


def test_requests_ask_for_so_many_tokens():
    """Each row is a request of its own."""
    found = requests_of([(1, 2), (3, 4)], 5)
    assert [(one.prompt_ids, one.max_new_tokens) for one in found] == [((1, 2), 5), ((3, 4), 5)]
    assert len({one.id for one in found}) == 2


def test_batches_are_told_once():
    """A size that is given twice is timed once."""
    assert [one.batch for one in shapes((1, 8, 1), prompt=3, new=2)] == [1, 8]


@pytest.mark.parametrize(
    ("batches", "prompt", "new", "message"),
    [((1,), 8, 1, "no step of decoding"), ((0,), 8, 2, "a batch needs"), ((1,), 0, 2, "a batch needs"),
     ((), 8, 2, "a batch needs")],
)  # fmt: skip
def test_what_cannot_be_timed_is_refused(batches, prompt, new, message):
    """In one line, before anything is loaded."""
    with pytest.raises(UsageError, match=message):
        shapes(batches, prompt=prompt, new=new)
