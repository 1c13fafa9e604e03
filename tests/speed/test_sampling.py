"""Rounds of two sides, in turns."""

from harness.speed.clock import Sample
from harness.speed.sampling import WARM_UP, Sampler
from harness.speed.shapes import Shape

SHAPES = (Shape(batch=1, prompt=2, new=3), Shape(batch=4, prompt=2, new=3))


class Side:
    """Writes down when it is asked, and takes the time that it is told."""

    def __init__(self, name, log, prefill):
        self._name, self._log, self._prefill = name, log, prefill

    def sample(self, prompts, new, *, repeats):
        self._log.append((self._name, len(prompts), new, repeats))
        return Sample(prefill=self._prefill, step=float(len(self._log)), memory=1)


def sampler(prefill=(0.02, 0.01)):
    """A sampler of two such sides, and what they write down."""
    log = []
    sides = [Side(name, log, seconds) for name, seconds in zip("AB", prefill, strict=True)]
    return Sampler(*sides, [(one, [(1, 2)] * one.batch) for one in SHAPES], lambda _text: None), log


def test_sides_take_turns_at_being_first():
    """A B, then B A: who is first has the colder machine."""
    found, log = sampler()
    found.warm_up()
    log.clear()
    found.extend(2)
    assert [(name, batch) for name, batch, _, _ in log] == [
        ("A", 1), ("B", 1), ("A", 4), ("B", 4),
        ("B", 1), ("A", 1), ("B", 4), ("A", 4),
    ]  # fmt: skip


def test_each_sample_is_kept_with_its_side_and_round():
    """Whichever came first, entry i of both lists is of round i."""
    found, log = sampler()
    found.warm_up()
    before = len(log)
    found.extend(2)
    assert [one.step - before for one in found.rounds[0].base] == [1, 6]
    assert [one.step - before for one in found.rounds[0].candidate] == [2, 5]


def test_more_rounds_go_on_from_those_that_there_are():
    """A second look costs the rounds between them alone, and the warm-up is counted nowhere."""
    found, log = sampler()
    found.warm_up()
    assert len(log) == WARM_UP * 2 * len(SHAPES)
    found.extend(3)
    found.extend(5)
    assert [len(one.base) for one in found.rounds] == [5, 5]
    assert len(log) == (WARM_UP + 5) * 2 * len(SHAPES)


def test_a_short_first_token_is_taken_several_times_on_both_sides():
    """As often as the faster side needs, within a bound."""
    for prefill, repeats in (((0.02, 0.01), 5), ((1.0, 2.0), 1), ((1e-9, 1e-9), 9)):
        found, log = sampler(prefill)
        found.warm_up()
        log.clear()
        found.extend(1)
        assert {count for _, _, _, count in log} == {repeats}
