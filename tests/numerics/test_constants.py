import ast
from pathlib import Path

import numpy as np
import pytest

from harness.numerics import bounds, constants, quantise, statistics

HARNESS = Path(constants.__file__).parents[1]
SOURCE = Path(constants.__file__)
NUMERICS = [HARNESS / "numerics" / f"{name}.py" for name in ("bounds", "moments", "statistics")]
JUDGES = sorted([*HARNESS.glob("comparison/*.py"), *NUMERICS, HARNESS / "verdict.py"])

#: Numbers that a formula may hold: nothing, halves, wholes and doubles are no bounds.
_PLAIN = {0.0, 0.5, 1.0, 2.0}


def assigned():
    """(name, line number) of each constant, in the order of the file."""
    found = []
    for node in ast.parse(SOURCE.read_text(encoding="utf-8")).body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        found += [(target.id, node.lineno) for target in targets]
    return found


def test_every_constant_says_where_it_comes_from():
    """Above each constant, or above the first of a block of them, stands a comment `#:` of more than a few words."""
    lines = ["", *SOURCE.read_text(encoding="utf-8").splitlines()]
    starts = {line for _, line in assigned()}
    for name, line in assigned():
        above = line - 1
        while above in starts:
            above -= 1
        comment = []
        while lines[above].startswith("#:"):
            comment.insert(0, lines[above].removeprefix("#:").strip())
            above -= 1
        assert len(" ".join(comment).split()) >= 3, f"{name} has no derivation above it"


def test_every_constant_is_public_and_upper_case():
    """The file holds constants and nothing else, so that it can be read as a table."""
    names = [name for name, _ in assigned()]
    assert len(names) == len(set(names))
    assert all(name.isupper() and not name.startswith("_") for name in names)
    body = ast.parse(SOURCE.read_text(encoding="utf-8")).body
    allowed = (ast.Assign, ast.AnnAssign, ast.ImportFrom, ast.Expr)
    assert all(isinstance(node, allowed) for node in body)


def test_the_rate_is_split_once():
    """The shares of the false-alarm rate sum to no more than the whole."""
    shares = [getattr(constants, name) for name, _ in assigned() if name.startswith("ALPHA_")]
    assert len(shares) == 5
    assert all(share > 0 for share in shares)
    assert sum(shares) <= constants.ALPHA


def test_enough_replicas_are_drawn():
    """The default number of replicas, scattering as families do, sees far less than what a check must see."""
    replicas = constants.SPREAD_DEFAULT * np.linspace(-1.7, 1.7, constants.REPLICAS)
    spread = bounds.spread_of(replicas, constants.REPLICAS - 1, constants.SPREAD_DEFAULT)
    for precision in constants.EFFECT:
        bound = bounds.magnitude_bound(replicas, spread, alpha=constants.ALPHA_POOLED, tests=6, precision=precision)
        assert bounds.smallest_caught(bound) < constants.MAX_SMALLEST / 1.5


def test_every_scatter_is_of_a_known_statistic():
    """A name that nothing looks up would leave its statistic with the default; the largest is the largest."""
    known = statistics.MAGNITUDES | statistics.SIGNED | {f"direction {scheme}" for scheme in quantise.SCHEMES}
    for precision, by_name in constants.SPREADS.items():
        assert precision in constants.EFFECT
        assert set(by_name) <= known
        assert all(largest >= others >= 0 and family for largest, family, others in by_name.values())


def test_a_direction_is_named_around_one():
    """The coefficient of a bug that is there lies within the limits, that of none outside."""
    low, high = constants.COEFFICIENT
    assert 0 < low < 1 < high


def test_the_limits_of_a_quantiser_hold_the_plain_one():
    """Round-to-nearest itself, the ratio 1, is between them."""
    assert 0 < constants.QUANTISER_BEST < 1 < constants.QUANTISER_WORST


@pytest.mark.parametrize("path", JUDGES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_bound_is_typed_elsewhere(path):
    """No module that judges holds a float of its own: every bound is a constant or measured."""
    typed = [
        f"line {node.lineno}: {node.value!r}"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, float) and abs(node.value) not in _PLAIN
    ]
    assert not typed


@pytest.mark.parametrize("path", JUDGES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_tolerance_function_is_called(path):
    """No judge asks numpy or torch whether two values are close: their tolerances have no derivation."""
    banned = {"allclose", "isclose", "assert_close", "assert_allclose", "approx"}
    called = {
        node.attr if isinstance(node, ast.Attribute) else node.id
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute | ast.Name)
    }
    assert not called & banned
