import math
from dataclasses import replace

import numpy as np
import pytest

from harness.criteria import case as cases_module
from harness.criteria.case import View, entry, largest, log_softmax, pick, ratio
from tests.criteria.cases import drawn, forced, free, rows, together


def test_log_probabilities_by_hand():
    """Logits 0 and log 3 have probabilities 1/4 and 3/4, whatever is added to both."""
    for shift in (0.0, 700.0, -1e4):
        assert np.exp(log_softmax(np.array([[0, math.log(3)]]) + shift)) == pytest.approx(np.array([[0.25, 0.75]]))


def test_a_token_outside_the_vocabulary_is_impossible():
    """An id that no column stands for has log-probability -inf, and without rows all have."""
    assert pick(rows([[1, 2], [3, 4]]), np.array([1, 2])).tolist() == [2, -math.inf]
    assert pick(np.zeros((0, 4)), np.array([1])).tolist() == [-math.inf]


def test_quotients_of_nothing():
    """0 / 0 is 0 and 1 / 0 is infinite; the largest of no number is 0 and NaN is not lost."""
    assert ratio([0, 1, 3], [0, 0, 2]).tolist() == [0, math.inf, 1.5]
    assert largest([]) == 0
    assert math.isnan(largest([1, math.nan, 2]))


def test_where_each_row_stands():
    """Decode rows come first; each row names its prompt, what it read last, and what it foretells."""
    one = forced(np.zeros((2, 4)), ids=[3, 2], prompt=3)
    two = forced(np.zeros((1, 4)), ids=[1], prompt=1)
    view = View(case=together(one, two))
    assert view.decode.tolist() == [True] * 3 + [False] * 5
    assert view.prompt.tolist() == [0, 0, 1, 0, 0, 0, 0, 1]
    assert view.place.tolist() == [2, 3, 0, 0, 1, 2, 3, 0]
    assert view.given.tolist() == [3, 2, 1, 0, 0, 3, 2, 1]
    assert view.inside.tolist() == [False] * 3 + [True, True] + [False] * 3
    assert view.lengths.tolist() == [3, 1]
    assert view.part_prompt.tolist() == [0, 1, 0, 1]
    assert view.parts(np.add, np.arange(8)).tolist() == [1, 2, 18, 7]


def test_a_prompt_without_forced_tokens_has_no_decode_part():
    """Empty passes are left out of the parts, and do not take rows of the next prompt."""
    view = View(case=together(forced(np.zeros((0, 4)), prompt=3), forced(np.zeros((2, 4)))))
    assert view.part_prompt.tolist() == [1, 0, 1]
    assert view.parts(np.add, np.ones(6)).tolist() == [2, 2, 2]


def test_the_worse_of_decode_and_prefill():
    """A statistic is taken of both kinds of rows apart, and the larger counts."""
    view = View(case=forced(np.zeros((2, 4)), prompt=3))
    assert view.kinds(lambda values: float(values.mean()), np.array([5, 5, 0, 0, 0, 8])) == 5
    assert view.kinds(lambda values: float(values.mean()), np.array([0, 0, 0, 0, 0, 8])) == 2


def test_free_runs_end_at_the_first_difference():
    """Steps before the first different token are common; equal means equal in length as well."""
    found = [View(case=free(*tokens)).free[0] for tokens in (([1, 2, 3], [1, 5, 3]), ([1, 2], [1, 2, 3]), ([1], [1]))]
    assert [(one.common, one.equal) for one in found] == [(1, False), (2, False), (1, True)]


def test_sides_must_show_the_same_rows():
    """Another number of prompts or rows, no prompt at all or an unknown precision is an error that says so."""
    case = drawn()
    with pytest.raises(ValueError, match="same prompts and forced rows"):
        View(case=replace(case, exact=case.exact[1:]))
    shorter = replace(case.candidate[0], decode=case.candidate[0].decode[1:])
    with pytest.raises(ValueError, match="same prompts and forced rows"):
        View(case=replace(case, candidate=(shorter, *case.candidate[1:])))
    with pytest.raises(ValueError, match="without a prompt"):
        View(case=replace(case, candidate=(), same=(), exact=()))
    with pytest.raises(ValueError, match="float8"):
        View(case=replace(case, precision="float8"))


def test_shared_work_is_done_once():
    """A function of the view is called once, and each view keeps its own results."""
    calls = []
    view = View(case=drawn())
    assert [view.once(calls.append), view.once(calls.append)] == [None, None]
    assert len(calls) == 1
    View(case=drawn()).once(calls.append)
    assert len(calls) == 2


def test_a_rule_never_returns_nan():
    """NaN of a rule, and a candidate's logits that must be numbers and are not, score infinity."""
    fields = {"name": "x", "source": "x", "words": "x", "sees": "logits", "published": {}}
    plain = entry(lambda view: math.nan, numbers=(), **fields)
    assert plain.criterion.score(drawn()) == math.inf
    broken = drawn()
    broken.candidate[0].decode[0, 0] = math.inf
    for numbers, expected in (((), 0), (("free",), 0), (("forced",), math.inf)):
        assert entry(lambda view: 0.0, numbers=numbers, **fields).criterion.score(broken) == expected


def test_thresholds_by_precision():
    """Helpers name all precisions."""
    assert set(cases_module.everywhere(1.0)) == set(cases_module.by_precision(1.0, 2.0)) == set(cases_module.PRECISIONS)
    assert cases_module.by_precision(1.0, 2.0)["bfloat16"] == 2.0
