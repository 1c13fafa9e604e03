"""Drawn prompts: their number, lengths, batches and seeds; and goldens that are recorded where they do not fit."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import flow
from harness.engines.hf import context_length, load_config, load_tokenizer
from harness.models import grammar
from harness.models.recipes import RECIPES
from harness.power import drawn
from harness.power.drawn import MODELS, NULLS, PILOT, TRIALS, generate_suite
from tests.support import write_model

# --- prompts -----------------------------------------------------------------------------------


def test_a_suite_is_drawn_from_its_seed():
    """The same seed gives the same suite, digest and all; another seed shares no prompt but the shortest."""
    one, other = generate_suite(2_000_000), generate_suite(2_000_001)
    assert one == generate_suite(2_000_000)
    assert one.digest != other.digest
    assert len(one.digest) == 64
    assert not {prompt.text for prompt in one.prompts if len(prompt.text) > 60} & {p.text for p in other.prompts}


def test_a_suite_is_two_padded_batches():
    """Eight prompts of very unequal length, one run in batches of four with all three views, a budget of 32 tokens."""
    suite = generate_suite(5)
    assert len(suite.prompts) == 8
    assert suite.max_new_tokens == 32
    assert suite.stop == "ignore-eos"
    assert suite.add_special_tokens
    (run,) = suite.runs
    assert (run.name, run.batch_size, run.quick) == ("batched", 4, True)
    assert run.views == ("generate", "replay", "prefill")
    assert run.order == "suite"
    short = [len(prompt.text) for seed in range(10) for prompt in generate_suite(seed).prompts[:-1]]
    assert min(short) < 60 < 400 < max(short) < 600


@pytest.mark.parametrize(("prompts", "size"), [(1, 1), (2, 1), (3, 1), (4, 2), (7, 3)])
def test_a_batch_is_half_of_them(prompts, size):
    """Rounded down, and one at least."""
    suite = generate_suite(5, prompts)
    assert len(suite.prompts) == prompts
    assert suite.runs[0].batch_size == size


@pytest.mark.parametrize("model", MODELS)
def test_the_last_prompt_is_long(goldens, model):
    """By each trained model's tokenizer 480 tokens on average, give or take an eighth; all have room for 32 more."""
    directory = str(goldens / model / "model")
    tokenizer, context = load_tokenizer(directory), context_length(load_config(directory))
    counts = [[len(tokenizer(prompt.text).input_ids) for prompt in generate_suite(seed).prompts] for seed in range(8)]
    last, others = [one[-1] for one in counts], [count for one in counts for count in one[:-1]]
    assert np.mean(last) == pytest.approx(480, rel=1 / 8)
    assert 400 < min(last) < max(last) < context - 32
    assert 4 <= min(others) <= 12
    assert 120 <= max(others) <= 240


def test_long_may_be_left_out():
    """Then the last prompt is one like the others, which stay the same."""
    with_long, without = generate_suite(6), generate_suite(6, long=None)
    assert with_long.prompts[:-1] == without.prompts[:-1]
    assert len(without.prompts[-1].text) < 600 < len(with_long.prompts[-1].text)
    assert len(generate_suite(6, long=100).prompts[-1].text) == round(100 * drawn.CHARACTERS_A_TOKEN)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), longest=st.integers(9, 200), characters=st.floats(1.0, 5.0))
def test_lengths_keep_their_limits(seed, longest, characters):
    """Between 8 tokens and the longest, in characters of the tokenizer that is asked for."""
    suite = generate_suite(seed, longest=longest, long=None, characters=characters)
    for prompt in suite.prompts:
        assert round(8 * characters) <= len(prompt.text) <= round(longest * characters)


def test_lengths_are_even_in_their_logarithm():
    """Over many suites half the prompts are shorter than 32 tokens, the mean of 8 and 128, and a quarter than 16."""
    lengths = np.array(
        [
            len(prompt.text)
            for seed in range(50)
            for prompt in generate_suite(seed, longest=128, long=None, characters=10.0).prompts
        ]
    )
    assert np.mean(lengths < 320) == pytest.approx(0.5, abs=0.1)  # 400 draws: a standard error of 0.025
    assert np.mean(lengths < 160) == pytest.approx(0.25, abs=0.1)


def test_one_prompt_may_be_run_alone_and_again():
    """`alone` adds a run A-B-A of single prompts, and changes nothing else."""
    plain, suite = generate_suite(7), generate_suite(7, alone=True)
    assert suite.prompts == plain.prompts
    assert suite.runs[:-1] == plain.runs
    order = suite.runs[-1]
    assert (order.name, order.batch_size, order.order, order.views) == ("order", 1, "A-B-A", ("replay",))
    assert not order.quick


def test_where_texts_end_the_model_may_stop():
    """Whole documents, or all but an end of at most 16 tokens' characters, and an end of text that stops."""
    suite = generate_suite(9, ends=True)
    assert suite.stop == "eos"
    documents = list(itertools.islice(grammar.documents(9), 2_000))
    whole = [prompt.text in documents for prompt in suite.prompts]
    assert whole == [True] * 5 + [False] * 3
    for prompt in suite.prompts[5:-1]:
        left = min(len(text) - len(prompt.text) for text in documents if text.startswith(prompt.text))
        assert 0 < left <= 16 * drawn.CHARACTERS_A_TOKEN
    assert len(suite.prompts[-1].text) == round(480 * drawn.CHARACTERS_A_TOKEN)
    assert [prompt.max_new_tokens for prompt in suite.prompts] == [None, None, None, 16] * 2
    assert generate_suite(9).stop == "ignore-eos"
    assert {prompt.max_new_tokens for prompt in generate_suite(9).prompts} == {None}


def test_seeds_are_nobody_elses():
    """Nulls, pilot, trials, training and the committed suites draw from different seeds, however many groups."""
    taken = {recipe.seed + offset for recipe in RECIPES.values() for offset in (0, 1_000)} | {5, 20_231}
    groups = 100_000
    used = [set(range(bench.seed, bench.seed + groups)) for bench in (NULLS, PILOT, TRIALS)]
    for one, other in itertools.combinations([*used, taken], 2):
        assert not one & other
    assert len({bench.name for bench in (NULLS, PILOT, TRIALS)}) == 3


# --- goldens -----------------------------------------------------------------------------------


@pytest.fixture
def made(monkeypatch):
    """Two replicas are enough, in float32; returns a list that grows with each recording."""
    made = []
    record = flow.record
    monkeypatch.setattr(drawn, "REPLICAS", 2)
    monkeypatch.setattr(flow, "record", lambda *given, **more: made.append(more) or record(*given, **more))
    return made


short_suite = partial(generate_suite, prompts=2, new_tokens=2, longest=12, long=None)


def test_a_golden_that_does_not_fit_is_made_anew(made, small_llama, tmp_path):
    """Damage, another suite or another model in the place of a golden: it is recorded again."""
    recorded = partial(drawn.recorded, precisions=("float32",))
    suite, other = short_suite(3), short_suite(4)
    place = tmp_path / "goldens" / "small" / "x"
    first = recorded(small_llama, suite, place)
    assert recorded(small_llama, suite, place).suite == suite
    assert len(made) == 1
    (place / "golden.json").write_text("{}", encoding="utf-8")
    recorded(small_llama, suite, place)
    assert len(made) == 2
    assert recorded(small_llama, other, place).suite == other
    assert len(made) == 3
    elsewhere = write_model(tmp_path / "other" / "model", seed=1)
    assert recorded(elsewhere, other, place).model.digest != first.model.digest
    assert len(made) == 4


def test_a_golden_has_the_floors_that_are_asked_for(made, small_llama, tmp_path):
    """One precision where one is named; progress is told, and so is the number of replicas."""
    told = []
    golden = drawn.recorded(small_llama, short_suite(3), tmp_path / "x", told.append, precisions=("float32",))
    assert list(golden.floors) == ["float32"]
    assert golden.floors["float32"].replicas == 2
    assert told
    assert made[0]["precisions"] == ("float32",)
