"""Shrinking against predicates that need no model."""

import math
import time

from hypothesis import given
from hypothesis import strategies as st

from harness.repro.cases import Batch, Case, Judgement, Row
from harness.repro.shrinking import shrink

#: Far in the future, for a clock that is not looked at.
LATER = time.monotonic() + 1e6


def judgement(row=0, seen=1, ratio=100.0):
    """A failure of the logits at one place."""
    return Judgement(kind="logits", places=((row, seen),), ratio=ratio, limit=5.0)


def prompts(*lengths, fed=0, decode=False):
    """Rows of the tokens 0, 1, 2, ..."""
    rows = tuple(Row(prompt=tuple(range(length)), fed=tuple(range(100, 100 + fed))) for length in lengths)
    return Batch(rows=rows, decode=decode)


def shrunk(case, fails):
    """The smallest case of a predicate that gives the failing place, None where it does not fail."""

    def judged(one):
        place = fails(one)
        return None if place is None else judgement(*place)

    first = judged(case)
    assert first is not None
    return shrink(case, first, judged, until=LATER)


def test_a_failure_everywhere_is_one_token():
    """Batches, steps, earlier requests and all tokens but one go."""
    case = Case(batch=prompts(5, 9, 3, fed=6, decode=True), before=(prompts(4), prompts(6)))
    found = shrunk(case, lambda one: (0, len(one.batch.rows[0].prompt)))
    assert found.case == Case(batch=Batch(rows=(Row(prompt=found.case.batch.rows[0].prompt),), decode=False))
    assert len(found.case.batch.rows[0].prompt) == 1
    assert found.finished


@given(length=st.integers(1, 40), needed=st.sets(st.integers(0, 39), max_size=3))
def test_only_the_tokens_that_it_takes_are_left(length, needed):
    """Of a prompt those tokens remain that the failure needs, and nothing else."""
    needed = {token for token in needed if token < length} or {0}
    case = Case(batch=prompts(length))
    found = shrunk(case, lambda one: (0, len(one.batch.rows[0].ids)) if needed <= {*one.batch.rows[0].ids} else None)
    assert {*found.case.batch.rows[0].prompt} == needed


def test_a_bug_of_decode_steps_keeps_one():
    """One step behind one token."""
    case = Case(batch=prompts(8, fed=5, decode=True))
    found = shrunk(case, lambda one: (0, len(one.batch.rows[0].ids)) if one.batch.decode and one.batch.steps else None)
    assert found.case.batch.decode
    assert (len(found.case.batch.rows[0].prompt), found.case.batch.steps) == (1, 1)


def test_a_bug_of_padding_keeps_two_rows():
    """A row of one token beside one of two."""
    case = Case(batch=prompts(5, 12, 7, 3))

    def shortest(one):
        lengths = [len(row.prompt) for row in one.batch.rows]
        return (lengths.index(min(lengths)), min(lengths)) if one.batch.padded else None

    assert sorted(len(row.prompt) for row in shrunk(case, shortest).case.batch.rows) == [1, 2]


def test_a_bug_of_a_second_request_keeps_one_before():
    """One earlier request of one token."""
    case = Case(batch=prompts(5), before=(prompts(4, fed=2, decode=True), prompts(6), prompts(3)))
    found = shrunk(case, lambda one: (0, 1) if one.before else None)
    assert [batch.tokens for batch in found.case.before] == [1]
    assert found.case.batch.tokens == 1


def test_a_bug_beyond_a_length_keeps_that_length():
    """Sixteen tokens, no fewer."""
    found = shrunk(Case(batch=prompts(50)), lambda one: (0, 16) if len(one.batch.rows[0].ids) >= 16 else None)
    assert found.case.batch.tokens == 16


def test_a_case_near_the_limit_is_not_taken():
    """A margin that was clear stays clear, and one that never was does not get worse."""

    def smaller_is_weaker(one):
        return judgement(ratio=2.0 * one.batch.tokens)

    clear = Case(batch=prompts(32))
    assert shrink(clear, smaller_is_weaker(clear), smaller_is_weaker, until=LATER).judgement.margin >= 3
    weak = Case(batch=prompts(4))
    assert shrink(weak, smaller_is_weaker(weak), smaller_is_weaker, until=LATER).case == weak


def test_when_time_is_up_the_best_so_far_is_taken():
    """Nothing is judged after that, and it is said."""
    case = Case(batch=prompts(32))
    found = shrink(case, judgement(), lambda _one: judgement(), until=-math.inf)
    assert (found.case, found.tried, found.finished) == (case, 0, False)
