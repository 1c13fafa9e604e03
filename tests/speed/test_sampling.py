"""Rounds of two sides, in turns."""

import pytest

from harness.speed import processors, sampling
from harness.speed.clock import Sample
from harness.speed.sampling import Sampler
from harness.speed.shapes import Shape

SHAPES = (Shape(batch=1, prompt=2, new=3), Shape(batch=4, prompt=2, new=3))


class Side:
    """Writes down when it is asked, and takes the time that it is told."""

    def __init__(self, name, log, prefill):
        self._name, self._log, self._prefill = name, log, prefill

    apart = False

    def exchange(self, other):
        self._log.append((self._name, "exchange"))

    def restart(self, *, whole=False):
        self._log.append((self._name, "anew" if whole else "restart"))

    def open(self, processors=None):
        self._log.append((self._name, "open", processors))

    def sample(self, prompts, new, *, repeats):
        self._log.append((self._name, len(prompts), new, repeats))
        return Sample(prefill=self._prefill, step=float(len(self._log)), memory=1)


@pytest.fixture(autouse=True)
def _three_turns(monkeypatch):
    """So few can be written down."""
    monkeypatch.setattr(sampling, "TURNS", 3)


def sampler(prefill=(0.02, 0.01), processors=(None, None)):
    """A sampler of two such sides, and what they write down."""
    log = []
    sides = [Side(name, log, seconds) for name, seconds in zip("AB", prefill, strict=True)]
    settings = tuple({"processors": one} for one in processors)
    return Sampler(*sides, settings, [(one, [(1, 2)] * one.batch) for one in SHAPES], lambda _text: None), log


def samples(log):
    """Who was sampled, with which batch, in order."""
    return [(one[0], one[1]) for one in log if isinstance(one[1], int)]


def test_sides_take_turns_at_being_first():
    """A B, B A, A B of each shape, after a warm-up of each; who is first has the colder machine."""
    found, log = sampler()
    found.extend(1, SHAPES)
    assert samples(log) == [
        ("A", 1), ("B", 1), ("A", 4), ("B", 4),
        ("A", 1), ("B", 1), ("B", 1), ("A", 1), ("A", 1), ("B", 1),
        ("A", 4), ("B", 4), ("B", 4), ("A", 4), ("A", 4), ("B", 4),
    ]  # fmt: skip


def test_each_round_is_of_new_processes():
    """Both are started anew and opened before either is sampled; the other side is first in the second round."""
    found, log = sampler()
    found.extend(1, SHAPES)
    start = [("A", "exchange"), ("A", "restart"), ("B", "restart"), ("A", "open", None), ("B", "open", None)]
    assert log[:5] == start
    before = len(log)
    found.extend(2, SHAPES)
    assert log[before : before + 5] == start
    assert log[before + 5][:2] == ("A", 1)
    assert log[before + 9][:2] == ("B", 1)


def test_where_one_side_needs_a_process_of_its_own_both_have_new_ones():
    """A fork beside a whole new process would have the same addresses in all rounds, and the other never."""
    found, log = sampler()
    found._sides[0].apart = True
    found.extend(1, SHAPES)
    assert [one[:2] for one in log[:4]] == [("A", "anew"), ("B", "anew"), ("A", "open"), ("B", "open")]


def test_both_sides_of_a_round_run_on_the_same_processors(monkeypatch):
    """As many as the side with more can use, drawn anew each round; all where one's need is not known."""
    monkeypatch.setattr(processors.os, "sched_getaffinity", lambda _pid: {2, 3, 5, 7}, raising=False)
    found, log = sampler(processors=(1, 2))
    found.extend(8, SHAPES)
    opened = [one[2] for one in log if one[1] == "open"]
    assert opened[::2] == opened[1::2]
    assert all(len(set(one)) == 2 and set(one) <= {2, 3, 5, 7} for one in opened)
    assert len(set(opened)) > 1
    for counts in ((1, None), (4, 1), (9, 9)):
        assert processors.drawn(counts, 0) is None


def test_the_turns_are_kept_with_their_side():
    """Whichever came first: A was sampled 10th, 13th and 14th, B 11th, 12th and 15th."""
    found, _log = sampler()
    found.extend(1, SHAPES)
    assert [one.step for one in found.rounds[0].base[0]] == [10, 13, 14]
    assert [one.step for one in found.rounds[0].candidate[0]] == [11, 12, 15]


def test_more_rounds_go_on_from_those_that_there_are():
    """A second look costs the rounds between them alone, of the shapes that are asked for alone."""
    found, log = sampler()
    found.extend(3, SHAPES)
    found.extend(5, SHAPES[1:])
    assert [len(one.base) for one in found.rounds] == [3, 5]
    assert found.count == 5
    assert len(samples(log)) == (3 * 2 + 2) * 2 * (1 + sampling.TURNS)


def test_a_short_first_token_is_taken_several_times_on_both_sides():
    """As often as the faster side needs, within a bound."""
    for prefill, repeats in (((0.02, 0.01), 5), ((1.0, 2.0), 1), ((1e-9, 1e-9), 9)):
        found, log = sampler(prefill)
        found.extend(1, SHAPES)
        assert {one[3] for one in log if isinstance(one[1], int)} - {1} == {repeats} - {1}
