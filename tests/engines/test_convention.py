import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from harness.engines import convention, port
from harness.engines.convention import ARGUMENTS as ALL
from harness.errors import UsageError
from tests.engines.ports import Bigram, Module, cached, table_of, uncached


def _keyword_only(*, input_ids, cache): ...


def _by_place(tokens, positions): ...


def _by_place_with_defaults(ids, positions, attention_mask=None, cache=None): ...


def _unknown_default(tokens, temperature=1.0): ...


def _starred(*everything): ...


def _positional_only(input_ids, mask, /): ...


def _names(input_ids, attention_mask=None, temperature=1.0, **more): ...


@pytest.mark.parametrize(
    ("function", "names", "by_name"),
    [
        (cached(None), ALL, True),
        (uncached(None), ALL[:3], True),
        (_keyword_only, ("input_ids", "cache"), True),
        (_names, ("input_ids", "attention_mask"), True),
        (_by_place, ALL[:2], False),
        (_by_place_with_defaults, ALL, False),
        (_unknown_default, ALL[:1], False),
        (_starred, ALL, False),
        (_positional_only, ALL[:2], False),
        (Module(nn.Identity()), ALL, True),
        (torch.compile(Bigram()), ("input_ids", "attention_mask"), True),
        (table_of, ALL[:1], True),
        (iter, ALL, False),
    ],
)
def test_the_arguments_of_a_port(function, names, by_name):
    """They are found by name, else by position: as many as are asked for, and further ones by their usual names."""
    assert convention.convention_of(function) == convention.Convention(names=names, by_name=by_name)


@given(names=st.permutations(ALL), count=st.integers(1, 4), defaults=st.booleans())
@settings(deadline=None)
def test_names_in_any_order(names, count, defaults):
    """Whichever of the four are named, in any order, each gets its own value."""
    names = sorted({*names[:count], "input_ids"}, key=names.index)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    default = None if defaults else inspect.Parameter.empty

    def function(**values):
        return values

    function.__signature__ = inspect.Signature([inspect.Parameter(name, kind, default=default) for name in names])
    values = {name: object() for name in ALL}
    assert convention.convention_of(function).call(function, values) == {name: values[name] for name in names}


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (lambda: None, "takes no argument"),
        (lambda input_ids, temperature: None, "asks for 'temperature'"),
        (lambda a, b, c, d, e: None, "asks for 'e'"),
        (lambda ids, *, dtype: None, "asks for 'dtype'"),
    ],
)
def test_a_port_that_asks_for_more_is_refused(function, problem):
    """What the harness cannot give is named, with all that it can."""
    with pytest.raises(UsageError, match=problem) as caught:
        port.from_object(function)
    assert "input_ids, position_ids, attention_mask, cache" in caught.value.fix
