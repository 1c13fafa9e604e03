"""What is said of one place."""

import math

from harness.locate.clues import Clue, wrong


def _clue(**changed: object) -> Clue:
    return Clue(**{"kind": "weights", "module": "model.norm", "text": "all zeros", "wrong": True, **changed})  # type: ignore[arg-type]


def test_the_line_names_the_place_once() -> None:
    """A tensor's full name, a buffer's place, a module alone, or nothing where it is of the whole."""
    assert _clue(tensor="model.norm.weight").line == "model.norm.weight: all zeros"
    assert _clue(module="model.rotary_emb", tensor="inv_freq").line == "model.rotary_emb.inv_freq: all zeros"
    assert _clue().line == "model.norm: all zeros"
    assert _clue(module="").line == "all zeros"


def test_deviations_are_those_that_are_wrong_the_largest_first() -> None:
    """Notes are left out, and equals stay in order."""
    clues = [_clue(size=0.1), _clue(wrong=False), _clue(size=math.inf), _clue(size=0.1, text="other")]
    assert wrong(clues) == (clues[2], clues[0], clues[3])
