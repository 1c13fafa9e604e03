"""Seconds and memory of a batch, on engines whose time is known."""

import sys

import pytest
import torch

from harness.errors import EngineError
from harness.speed import clock
from harness.values import Generation


class Ticking:
    """An engine that takes ``first`` seconds of a clock of its own for the first token and ``step`` for each other."""

    spec = "ticking"

    def __init__(self, first=2.0, step=0.5, *, lost=0, holds=0):
        self.now, self.asked = 0.0, []
        self._first, self._step, self._lost, self._holds = first, step, lost, holds

    def time(self):
        return self.now

    def generate(self, requests, *, batch_size, stop_ids):
        assert not stop_ids
        assert batch_size == len(requests)
        new = requests[0].max_new_tokens
        self.asked.append(new)
        held = bytearray(b"x" * self._holds)
        self.now += self._first + self._step * (new - 1)
        del held
        return [Generation(tokens=(1,) * (new - self._lost), finish="length") for _ in requests]


@pytest.fixture
def engine(monkeypatch):
    """One whose clock is the one that is read."""
    found = Ticking()
    monkeypatch.setattr(clock.time, "perf_counter", found.time)
    return found


def test_the_first_token_is_apart_from_the_later_ones(engine):
    """Prefill is what one token takes, a step what each further token adds."""
    found = clock.sample(engine, [(1, 2)], 5, repeats=3)
    assert (found.prefill, found.step) == (2.0, 0.5)
    assert engine.asked == [1, 1, 1, 5]


def test_the_median_of_the_first_tokens_counts(engine):
    """One that was held up does not make decoding look fast."""
    waits = iter((0.0, 40.0, 0.0, 0.0))
    generate = engine.generate

    def late(requests, **named):
        engine.now += next(waits)
        return generate(requests, **named)

    engine.generate = late
    found = clock.sample(engine, [(1, 2)], 5, repeats=3)
    assert (found.prefill, found.step) == (2.0, 0.5)


@pytest.mark.parametrize("lost", [1, -1])
def test_another_number_of_tokens_is_no_speed(monkeypatch, lost):
    """An engine that stops early, or goes on, is not timed as if it had done the work."""
    engine = Ticking(lost=lost)
    with pytest.raises(EngineError, match="was asked for 1 tokens on 1 prompts"):
        clock.sample(engine, [(1, 2)], 5, repeats=1)


def test_nothing_is_timed_under_a_profiler():
    """A profiler that was left on slows what is timed, each side by another share."""
    with torch.autograd.profiler.profile(), pytest.raises(EngineError, match="a torch profiler is on"):
        clock.sample(Ticking(), [(1, 2)], 2, repeats=1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the system shows no highest memory to set back")
def test_memory_is_the_highest_of_this_run():
    """What a run takes and frees again is seen, and is not seen in the run after it."""
    large = clock.sample(Ticking(holds=200 * 2**20), [(1, 2)], 2, repeats=1).memory
    small = clock.sample(Ticking(), [(1, 2)], 2, repeats=1).memory
    assert large - small > 150 * 2**20
    assert small > 0
