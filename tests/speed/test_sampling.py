"""Rounds of two sides, in turns."""

from harness.speed.clock import Sample
from harness.speed.sampling import TURNS, Sampler
from harness.speed.shapes import Shape

SHAPES = (Shape(batch=1, prompt=2, new=3), Shape(batch=4, prompt=2, new=3))


class Side:
    """Writes down when it is asked, and takes the time that it is told."""

    def __init__(self, name, log, prefill):
        self._name, self._log, self._prefill = name, log, prefill

    def restart(self):
        self._log.append((self._name, "restart"))

    def open(self):
        self._log.append((self._name, "open"))

    def sample(self, prompts, new, *, repeats):
        self._log.append((self._name, len(prompts), new, repeats))
        return Sample(prefill=self._prefill, step=float(len(self._log)), memory=1)


def sampler(prefill=(0.02, 0.01)):
    """A sampler of two such sides, and what they write down."""
    log = []
    sides = [Side(name, log, seconds) for name, seconds in zip("AB", prefill, strict=True)]
    return Sampler(*sides, [(one, [(1, 2)] * one.batch) for one in SHAPES], lambda _text: None), log


def test_sides_take_turns_at_being_first():
    """A B, B A, A B of each shape, after a warm-up of each; who is first has the colder machine."""
    found, log = sampler()
    found.extend(1)
    assert [(name, batch) for name, batch, _, _ in log] == [
        ("A", 1), ("B", 1), ("A", 4), ("B", 4),
        ("A", 1), ("B", 1), ("B", 1), ("A", 1), ("A", 1), ("B", 1),
        ("A", 4), ("B", 4), ("B", 4), ("A", 4), ("A", 4), ("B", 4),
    ]  # fmt: skip


def test_each_round_is_of_new_processes():
    """Both are started before either is waited for, and warmed up again; the first round has those that are there."""
    found, log = sampler()
    found.extend(1)
    assert not [one for one in log if "restart" in one]
    before = len(log)
    found.extend(2)
    assert log[before : before + 4] == [("A", "restart"), ("B", "restart"), ("A", "open"), ("B", "open")]
    assert log[before + 4][:2] == ("A", 1)
    assert log[before + 8][:2] == ("B", 1), "the other side is first in the second round"


def test_the_median_of_the_turns_is_kept_with_its_side():
    """Whichever came first: the steps of A are the calls 5, 8 and 9, of B 6, 7 and 10."""
    found, _log = sampler()
    found.extend(1)
    assert [one.step for one in found.rounds[0].base] == [8]
    assert [one.step for one in found.rounds[0].candidate] == [7]


def test_more_rounds_go_on_from_those_that_there_are():
    """A second look costs the rounds between them alone."""
    found, log = sampler()
    found.extend(3)
    found.extend(5)
    assert [len(one.base) for one in found.rounds] == [5, 5]
    assert len(log) == 5 * 2 * len(SHAPES) * (1 + TURNS) + 4 * 4


def test_a_short_first_token_is_taken_several_times_on_both_sides():
    """As often as the faster side needs, within a bound."""
    for prefill, repeats in (((0.02, 0.01), 5), ((1.0, 2.0), 1), ((1e-9, 1e-9), 9)):
        found, log = sampler(prefill)
        found.extend(1)
        assert {one[3] for one in log[2 * len(SHAPES) :]} == {repeats}
