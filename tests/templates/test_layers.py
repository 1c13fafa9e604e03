"""Bugs in one block alone and in all: what is made of each part, and whether the right block is told."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

import harness
from harness.comparison import likeness
from harness.comparison.context import compare_context
from harness.mutations.catalogue import CATALOGUE
from harness.mutations.mutation import blocks
from harness.templates import caching, layers, making
from tests.templates import tiny
from tests.templates.one_block import told, traced

#: A wrong activation, and scores a hundredth too small: of modules, in all blocks.
BUGS = (("na-silu-for-gelu", 1.0), ("at-scale", 0.01))


@cache
def bank():
    """Templates of the tiny golden, of bugs that the catalogue has in all blocks and of one that it has in one."""
    names = ("na-silu-for-gelu", "at-scale", "x-row-scaled")
    asked = [(CATALOGUE[name], strength) for name in names for strength in CATALOGUE[name].strengths]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(making, "bugs_for", lambda _: asked)
        return making.make(tiny.golden(), tiny.MODEL, lambda _: None, places=False)


@cache
def made(name, strength=1.0):
    """The parts of a bug."""
    return layers.layered(tiny.golden(), tiny.MODEL, bank(), name, strength, lambda _: None)


def having(found):
    """Blocks whose coefficient is nearer to that of the largest than to 0."""
    top = max((one.coefficient for one in found), key=abs)
    return tuple(block for one in found if one.coefficient / top >= 0.5 for block in one.blocks)


# --- parts -------------------------------------------------------------------------------------


def shown(block, name="na-silu-for-gelu", strength=1.0):
    """Coordinates of a model in float32 with a bug in one block, in all for None, nowhere for -1."""
    _, trace = traced(tiny.golden(), tiny.MODEL, bank(), "float32", name, strength, block)
    fine = {one.view: one.rows.fine for one in trace.passes if one.rows is not None}
    return np.concatenate([fine[view] for view in bank().views]) @ bank().turn


def test_a_part_is_what_one_block_changes():
    """Each block's template is the model with the bug in that block less the right one, within its 8 bits."""
    parts = made("na-silu-for-gelu")
    assert parts.blocks == ((0,), (1,), (2,), (3,), (4,))
    right = shown(-1)
    for index in (0, 3):
        framed = parts.bank.codes[index].astype(float) * parts.bank.scales[index].astype(float)[:, None]
        found = np.linalg.solve(parts.bank.frame, framed.T).T
        exact = shown(index) - right
        assert np.linalg.norm(found - exact) < 0.02 * np.linalg.norm(exact)


def test_a_bug_of_one_block_has_one_part():
    """What the catalogue has in one block changes nothing in the others."""
    assert made("x-row-scaled").blocks == ((2,),)


@pytest.mark.parametrize("name", ["pos-invfreq-bf16", "pr-logits-bf16", "x-last-layer", "kv-fp8-scale-one"])
def test_a_bug_outside_the_blocks_has_no_parts(name):
    """Positions, the head, a block that is left out and the cache are of no single block."""
    assert made(name) is None


def test_what_lies_outside_the_blocks_is_a_part():
    """Norm weights plus one are in all blocks and in the last norm, which is behind them."""
    assert made("na-one-plus-w").blocks == ((), (0,), (1,), (2,), (3,), (4,))


def test_deep_models_are_taken_in_groups():
    """At most 24 runs are made, of neighbours; every block is in one group."""
    assert layers.grouped(5) == [(0,), (1,), (2,), (3,), (4,)]
    assert layers.grouped(0) == []
    for count in (24, 25, 48, 61, 100):
        groups = layers.grouped(count)
        assert len(groups) <= layers.MOST
        assert [block for group in groups for block in group] == list(range(count))
    assert layers.grouped(25)[-1] == (24,)


def test_the_blocks_are_put_back():
    """Whatever happens inside, the model has its own blocks afterwards, hooks and all."""
    with tiny.broken("float32") as own, tiny.broken("float32") as other:
        before = list(blocks(own.model))
        with layers._only(blocks(own.model), blocks(other.model), (1,)):
            kept = [one is mine for one, mine in zip(blocks(own.model), before, strict=True)]
        assert kept == [False, True, False, False, False]
        with pytest.raises(ValueError, match="inside"), layers._only(blocks(own.model), blocks(other.model), ()):
            raise ValueError("inside")
        assert all(one is mine for one, mine in zip(blocks(own.model), before, strict=True))


# --- the block that is told --------------------------------------------------------------------


@pytest.mark.parametrize("precision", tiny.PRECISIONS)
@pytest.mark.parametrize("block", [0, 3, None])
def test_the_right_block_is_told(precision, block):
    """A wrong activation in one block alone is told with that block at its own size, and one in all with all."""
    one, _ = told(tiny.golden(), tiny.MODEL, bank(), made, precision, *BUGS[0], block)
    assert one.name == "na-silu-for-gelu"
    assert having(one.layers) == (tuple(range(5)) if block is None else (block,))
    for layer in one.layers:
        there = block is None or layer.blocks == (block,)
        assert layer.coefficient == pytest.approx(float(there), abs=0.1)


def test_the_strength_is_found_with_the_block():
    """In one block a bug is like a weaker one in all: it is told at the strength that it has there."""
    one, named = told(tiny.golden(), tiny.MODEL, bank(), made, "float32", *BUGS[1], 3)
    assert (one.name, named) == ("at-scale at 0.01", False)
    assert having(one.layers) == (3,)
    assert max(layer.coefficient for layer in one.layers) == pytest.approx(1, abs=0.1)


def test_beside_another_bug():
    """The blocks of each of two named bugs are fitted with the other one taken off."""
    error = tiny.round_off(3)
    for name in (("na-silu-for-gelu", 1.0), ("at-scale", 0.1)):
        index = bank().names.index(name)
        framed = bank().codes[index].astype(float) * bank().scales[index].astype(float)[:, None]
        error = error + np.linalg.solve(bank().frame, framed.T).T
    diagnosis, _ = likeness.diagnose(compare_context(tiny.golden(), tiny.candidate(error)), bank(), made)
    found = {one.name: one for one in diagnosis.named}
    assert set(found) == {"na-silu-for-gelu", "at-scale at 0.1"}
    for one in found.values():
        assert having(one.layers) == tuple(block for layer in one.layers for block in layer.blocks)
        assert all(abs(layer.coefficient - 1) < 0.5 for layer in one.layers)


@pytest.mark.parametrize("precision", tiny.PRECISIONS)
def test_of_round_off_nothing_is_made(precision):
    """A correct candidate costs no run and has no blocks; one whose error explains nothing has none either."""

    def never(name, strength):
        raise AssertionError(f"{name} at {strength} was run")

    for seed in range(20):
        trace = tiny.candidate(tiny.round_off(seed, precision), precision)
        diagnosis, _ = likeness.diagnose(compare_context(tiny.golden(), trace), bank(), never)
        assert not any(one.layers for one in diagnosis.nearest)


def test_an_error_of_another_kind_is_in_no_block():
    """Gross noise has a part along every template, and none of them is told with blocks."""
    error = tiny.round_off(1) + 30 * (tiny.round_off(2) - tiny.round_off(4))
    diagnosis, _ = likeness.diagnose(compare_context(tiny.golden(), tiny.candidate(error)), bank(), made)
    assert diagnosis.residual
    assert not any(one.layers for one in (*diagnosis.named, *diagnosis.nearest))


def test_errors_are_the_scatter_of_round_off():
    """Over correct implementations with the bug, the coefficients scatter as their errors say."""
    found, errors = [], []
    index = bank().names.index(("na-silu-for-gelu", 1.0))
    framed = bank().codes[index].astype(float) * bank().scales[index].astype(float)[:, None]
    whole = np.linalg.solve(bank().frame, framed.T).T
    for seed in range(30):
        trace = tiny.candidate(tiny.round_off(seed) + whole)
        diagnosis, _ = likeness.diagnose(compare_context(tiny.golden(), trace), bank(), made)
        found.append([layer.coefficient for layer in diagnosis.named[0].layers])
        errors.append([layer.error for layer in diagnosis.named[0].layers])
    ratio = np.std(found, axis=0) / np.mean(errors, axis=0)
    print(f"scatter over standard error: {ratio.round(2)}")
    assert (ratio < 1.3).all()
    assert (ratio > 0.1).all()


# --- from a check ------------------------------------------------------------------------------


def test_a_check_tells_the_block(tmp_path, monkeypatch):
    """`check` with diagnose makes the runs itself, once for both questions, and says so as it goes."""
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
    (tmp_path / "templates").mkdir()
    caching.write(bank(), tmp_path / "templates" / f"{caching.key_of(tiny.golden())}.safetensors")
    said = []
    with tiny.broken("bfloat16") as right, tiny.broken("bfloat16", "na-silu-for-gelu") as wrong:
        blocks(right.model)._modules["3"] = blocks(wrong.model)[3]
        verdict = harness.check(tiny.golden(), right.model, reference=tiny.MODEL, diagnose=True, progress=said.append)
    for answer in verdict.answers:
        assert having(answer.diagnosis.nearest[0].layers) == (3,)
    assert [one for one in said if "alone" in one] == [
        f"na-silu-for-gelu in some blocks alone: {number} of 5" for number in range(1, 6)
    ]
    text = str(verdict)
    assert "function: looks like na-silu-for-gelu in block 3 alone (a = 1.0" in text
    assert "precision: looks like na-silu-for-gelu in block 3 alone (a = " in text
    assert verdict.to_dict()["answers"][0]["diagnosis"]["nearest"][0]["layers"][3]["blocks"] == [3]
