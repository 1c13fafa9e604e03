"""Latency on an engine whose time is known."""

import pytest

from harness.speed.kinds import latency
from harness.speed.kinds.spread import Spread, spread


def test_first_and_later_forwards_are_apart(known):
    """2 s until the first of 5 tokens and 0.5 s for each other: 0.8 s a token."""
    engine, said = known(), []
    found = latency.measure(engine, latency.Work(prompt=(4, 5, 6), new=5, repeats=3), said.append)
    exactly = {name: Spread(low=value, middle=value, high=value) for name, value in
               (("first", 2.0), ("later", 0.5), ("token", 0.8))}  # fmt: skip
    assert (found.first, found.later, found.token) == tuple(exactly.values())
    assert (found.prompt, found.new, found.repeats) == (3, 5, 3)
    assert set(map(tuple, engine.batches)) == {((4, 5, 6),)}, "one row at a time"
    assert said[-1] == "latency, run 5 of 5"


def test_what_warms_up_does_not_count(known):
    """Two slow runs before the others change nothing, in neither number nor spread."""
    engine = known()
    generate, runs = engine.generate, []

    def slow_at_first(requests, **named):
        runs.append(1)
        engine.now += 100.0 if len(runs) <= 4 else 0.0
        return generate(requests, **named)

    engine.generate = slow_at_first
    found = latency.measure(engine, latency.Work(prompt=(4,), new=3, repeats=2), lambda _text: None)
    assert found.first == Spread(low=2.0, middle=2.0, high=2.0)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((1.0,), (1.0, 1.0, 1.0)),
        ((5.0, 1.0, 2.0, 4.0, 3.0), (2.0, 3.0, 4.0)),
        ((1.0, 1.0, 1.0, 90.0), (1.0, 1.0, 23.25)),
    ],
)
def test_a_spread_is_median_and_quartiles(values, expected):
    """In any order; one that was held up moves the middle little."""
    found = spread(values)
    assert (found.low, found.middle, found.high) == expected
