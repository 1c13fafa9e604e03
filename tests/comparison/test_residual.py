"""What is left of an error when the named bugs are taken away: how large it is, and where it lies, in words."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from harness.comparison import likeness, residual
from harness.comparison.context import compare_context
from harness.mutations.mutation import attention_of, blocks, hooked
from tests.templates import tiny


def told(trace, golden=None, bank=None):
    """The words about a trace."""
    context = compare_context(tiny.golden() if golden is None else golden, trace)
    diagnosis, _ = likeness.diagnose(context, tiny.bank() if bank is None else bank)
    assert diagnosis.reason == ""
    return diagnosis.residual


def stranger(size, where=None, precision="bfloat16"):
    """An error along no template, about so many times a row's round-off, in the rows of a mask [M] alone."""
    shape = tiny.bank().codes.shape[1:]
    error = size * tiny.sigma(precision) * np.random.default_rng(1).normal(size=shape) / np.sqrt(shape[1])
    return error if where is None else error * where[:, None]


def words(error, precision="bfloat16", seed=3, **more):
    """The words about round-off and an error [M, R]."""
    return told(tiny.candidate(tiny.round_off(seed, precision) + error, precision), **more)


def rows(name):
    """A column of the golden's rows, for each row of the templates."""
    return getattr(tiny.golden().rows, name)[tiny.bank().place]


def alone(found, *expected):
    """Exactly these words behind the size of what is left."""
    assert found[0].endswith("x round-off")
    assert found[1:] == expected


# --- its size ----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", tiny.PRECISIONS)
def test_of_round_off_nothing_is_told(precision):
    """Forty correct candidates leave nothing, in either precision."""
    assert [seed for seed in range(40) if words(0, precision, seed)] == []


@pytest.mark.parametrize("view", [0, 1])
def test_of_round_off_on_one_path_nothing_is_told(view):
    """What a candidate does not show is not left over."""
    for seed in range(5):
        trace = tiny.candidate(tiny.round_off(seed))
        assert told(replace(trace, passes=trace.passes[view : view + 1])) == ()


@pytest.mark.parametrize("size", [3.0, 30.0])
def test_its_size_is_told_in_round_off(size):
    """An error everywhere has a size and no pattern; whitened it counts by how little round-off lies along it."""
    (found,) = words(stranger(size))
    ratio = float(found.partition(" x round-off")[0])
    noise, error = tiny.bank().noises["bfloat16"], stranger(size) / tiny.sigma()
    square = ((error @ noise.whiten) ** 2).sum() + noise.row.sum()
    assert ratio == pytest.approx(np.sqrt(square / noise.row.sum()), rel=0.05)


def test_a_named_bug_is_taken_away():
    """A bug that is named leaves nothing of itself, neither far above round-off nor below it."""
    assert words(40 * tiny.template("x-bias-doubled", 0.1)) == ()
    assert words(tiny.template("x-rows-swapped")) == ()


def test_beside_a_named_bug_the_rest_is_told():
    """What is there beside a bug that is named is told beside it, with its own pattern."""
    error = 300 * tiny.template("x-bias-doubled", 0.1) + stranger(3, rows("request") == 2)
    first, *others = words(error)
    assert first.endswith("x round-off beside what is named")
    assert "in prompt 'drawn-2' alone" in others


def test_a_real_bug_in_fp32_leaves_its_own_round_off_alone():
    """A bug that is exactly its template is not said to leave the rounding of the template's 8 bits."""
    with tiny.broken("float32", "x-row-scaled") as engine:
        trace = tiny.traced(engine)
    context = compare_context(tiny.golden(), trace)
    diagnosis, _ = likeness.diagnose(context, tiny.bank())
    assert [one.name for one in diagnosis.named] == ["x-row-scaled"]
    assert diagnosis.residual == ()


# --- where it lies -----------------------------------------------------------------------------


@pytest.mark.parametrize(("view", "path"), [("replay", "decode"), ("prefill", "prefill")])
@pytest.mark.parametrize("size", [3.0, 30.0])
def test_one_path_alone(view, path, size):
    """An error of one view is told by the path that it is on."""
    here = np.array(tiny.bank().views)[tiny.bank().view] == view
    assert f"on the {path} path alone, of the positions that both paths show" in words(stranger(size, here))


def test_of_one_view_no_path_is_told():
    """Where a candidate shows one path there is no other that it could be absent from."""
    trace = tiny.candidate(tiny.round_off(3) + stranger(10))
    found = told(replace(trace, passes=trace.passes[1:]))
    assert found
    assert not any("path" in one for one in found)


@pytest.mark.parametrize("prompt", range(4))
def test_one_prompt_alone(prompt):
    """An error in one prompt is told by its name."""
    found = words(stranger(5, rows("request") == prompt))
    assert f"in prompt 'drawn-{prompt}' alone" in found
    assert len([one for one in found if one.startswith("in prompt")]) == 1


def test_two_prompts_are_not_one():
    """An error in two prompts of four is not called that of one."""
    found = words(stranger(5, np.isin(rows("request"), [0, 3])))
    assert not any(one.startswith("in prompt") for one in found)


def test_a_prompt_that_is_most_of_the_suite_is_not_told(monkeypatch):
    """Where a prompt has about as much of the error as it has of the round-off, nothing lies in it alone."""
    share = np.bincount(rows("request")).max() / len(tiny.bank().place)
    monkeypatch.setattr(residual, "MOSTLY", 0.8 * share)
    assert not any(one.startswith("in prompt") for one in words(stranger(30)))


@pytest.mark.parametrize(("padded", "text"), [(True, "with"), (False, "without")])
def test_padded_rows_alone(padded, text):
    """In batches of two the shorter prompt is padded: an error in those, or in the others, is told so."""
    lengths = [len(one.prompt_ids) for one in tiny.golden().requests]
    shorter = [0 if lengths[0] < lengths[1] else 1, 2 if lengths[2] < lengths[3] else 3]
    here = np.isin(rows("request"), shorter) == padded
    alone(words(stranger(5, here)), f"in rows {text} padding alone")


def test_without_a_batch_size_no_padding_is_told():
    """Planned batches are hardly padded: then nothing is said of it."""
    golden = tiny.golden()
    (run,) = golden.suite.runs
    planned = replace(golden, suite=replace(golden.suite, runs=(replace(run, batch_size=None),)))
    here = np.isin(rows("request"), [1, 3])
    assert "in rows with padding alone" in words(stranger(5, here))
    assert not any("padding" in one for one in words(stranger(5, here), golden=planned))


def test_from_a_position_on():
    """An error that begins at a position, in all prompts that are so long, is told from there."""
    assert "from position 16 on" in words(stranger(10, rows("position") >= 16))
    assert "from position 18 on" in words(stranger(10, rows("position") >= 18))


def test_up_to_a_position():
    """An error of the first positions is told by where it ends."""
    alone(words(stranger(10, rows("position") <= 6)), "up to position 6")


def test_generated_positions_alone():
    """An error at the generated positions of both paths is told so, and one of all positions is not."""
    assert "at generated positions alone" in words(stranger(5, rows("generated")))
    assert not any("positions alone" in one for one in words(stranger(5)))


# --- what it is --------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.05, 0.9])
def test_scaled_logits(factor):
    """Logits that are all too large or too small by a factor are told with that factor."""
    found = words((factor - 1) * tiny.bank().centres["bfloat16"])
    assert f"the logits are scaled by {factor:.4g}" in " ".join(found)
    assert not any("shift" in one for one in found)


def test_a_shift_with_its_tokens():
    """The same change at every position is told with the tokens that it moves most."""
    bank = tiny.bank()
    columns = bank.basis @ bank.turn
    # Those that the head can move by themselves best.
    tokens = np.argsort(-(columns**2).sum(axis=1))[[0, 10, 50]]
    logits = np.zeros(len(columns))
    logits[tokens] = [1.0, -1.0, 1.0]
    found = words(np.tile(logits @ columns, (len(bank.place), 1)))
    expected = ", ".join(map(str, sorted(tokens.tolist())))
    assert f"a shift that all positions share, most of tokens {expected}" in found
    assert not any("scaled" in one for one in found)


def test_what_differs_by_position_is_no_shift():
    """An error of another direction at each position is neither a shift nor a scale."""
    assert len(words(stranger(30))) == 1


# --- the part of the model ---------------------------------------------------------------------


@contextmanager
def _scaled(number, part, factor):
    def hook(_module, _args, _kwargs, output):
        return (output[0] * factor, *output[1:]) if isinstance(output, tuple) else output * factor

    with tiny.broken("float32") as engine:
        block = blocks(engine.model)[number]
        with hooked((block.mlp if part == "MLP" else attention_of(block), hook, False)):
            yield engine


@pytest.mark.parametrize(("number", "part"), [(0, "MLP"), (2, "MLP"), (2, "attention"), (4, "attention")])
def test_the_part_of_the_model_is_told(number, part):
    """A block's MLP or attention whose output is 5 % too large, which no template is of, is named as the place."""
    with _scaled(number, part, 1.05) as engine:
        found = told(tiny.traced(engine))
    assert any(one.startswith(f"most like a change in the {part} of block {number} (") for one in found)


def test_no_place_is_told_of_an_error_in_none():
    """An error that no part of the model makes alone has no place."""
    assert not any("most like" in one for one in words(stranger(30)))


def test_scaled_logits_have_no_place():
    """A factor on all logits is no change in a block, which explains next to nothing of it."""
    assert not any("most like" in one for one in words(0.05 * tiny.bank().centres["bfloat16"]))


def test_without_places_none_is_told():
    """Templates that were made without places say nothing of them."""
    bank = tiny.bank()
    count = len(bank.names)
    noises = {
        name: replace(one, along=one.along[..., :count], gram=one.gram[..., :count, :count])
        for name, one in bank.noises.items()
    }
    bare = replace(bank, places=(), codes=bank.codes[:count], scales=bank.scales[:count], noises=noises)
    with _scaled(2, "MLP", 1.05) as engine:
        found = told(tiny.traced(engine), bank=bare)
    assert found
    assert not any("most like" in one for one in found)
