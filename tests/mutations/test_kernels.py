"""Bugs of kernels, graphs and compilers: each changes logits, only where it says, and leaves nothing behind."""

import pytest
import torch

from harness.mutations.kernels import MUTATIONS
from harness.mutations.mutation import catalogue
from tests.mutations.scenario import (
    STAGES,
    Engines,
    assert_exception_undoes,
    assert_undone,
    changed_at,
    distance,
    pairs,
    relative,
    shown,
    state_of,
    touched,
)

BY_ID = catalogue(*MUTATIONS)
#: At the end another batch of three rows, padded otherwise.
COURSE = (*STAGES, ("replay", (2, 1, 0)))
POISON = BY_ID["kg-nan-in-unused-v"]


@pytest.fixture(scope="module")
def engines(goldens, tmp_path_factory):
    """Open engines in float64, each loaded once."""
    found = Engines(goldens, tmp_path_factory.mktemp("hosts"), COURSE)
    yield found
    found.close()


@pytest.mark.parametrize(("mutation", "host"), pairs(MUTATIONS))
def test_logits_change_where_the_bug_is_active(engines, mutation, host):
    """In float64 logits change where all that `active` names holds, nowhere else, and afterwards not at all."""
    engine, plain = engines.engine(host, options=mutation.options), engines.plain(host, options=mutation.options)
    before = state_of(engine)
    with mutation.applied(engine):
        wrong = shown(engine, COURSE)
    assert relative(wrong, plain) > 1e-9
    assert {key for key in changed_at(wrong, plain) if not touched(mutation.active, key, stages=COURSE)} == set()
    assert_undone(engine, plain, before)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.id)
@pytest.mark.parametrize(("host", "dtype"), [("gpt2-tiny", "bfloat16"), ("bloom-tiny", "float16")])
def test_every_precision_and_its_widened_copy_can_have_it(engines, mutation, host, dtype):
    """In 16 bits and in a copy widened to float32 a mutation changes logits; only the poisoned cache makes NaN."""
    if host not in mutation.hosts:
        host = "llama-tiny"
    engine = engines.engine(host, dtype, mutation.options)
    stages = (*STAGES[:2], ("replay", (2, 1)), ("replay", (1, 2)))
    with engine.upcast() as wide:
        for one in (engine, wide):
            plain = shown(one, stages)
            with mutation.applied(one):
                wrong = shown(one, stages)
            assert changed_at(wrong, plain)
            assert torch.stack(list(wrong.values())).isfinite().all() == (mutation is not POISON)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.id)
def test_an_exception_undoes_it(engines, mutation):
    """A failure inside the block leaves the engine as it was."""
    assert_exception_undoes(mutation, engines.engine(min(mutation.hosts), options=mutation.options))


def test_a_smaller_bucket_shows_less_padding(engines):
    """With a bucket of 8 tokens fewer rows have padding in it than with one of 32."""
    mutation, plain = BY_ID["kg-fused-sdpa-valid-len"], engines.plain("llama-tiny")
    found = []
    for strength in reversed(mutation.strengths):
        with mutation.applied(engines.engine("llama-tiny"), strength):
            found.append(distance(shown(engines.engine("llama-tiny"), COURSE), plain))
    assert 0 < found[0] < found[1]


def test_only_the_first_row_is_stale(engines):
    """The replay of a captured graph repeats the first row's input and takes the others'."""
    engine, stages = engines.engine("gpt2-tiny"), (("replay", (0, 1, 2)),)
    with BY_ID["kg-graph-batch-row"].applied(engine):
        wrong = shown(engine, stages)
    plain = {key: engines.plain("gpt2-tiny")[key] for key in wrong}
    assert {request for _, request, _ in changed_at(wrong, plain)} == {0}


def test_a_captured_graph_is_right_for_equal_padding(engines):
    """The batch that the decode step was captured with stays right, and so does a later one of the same padding."""
    engine, stages = engines.engine("bloom-tiny"), (("replay", (1, 2)), ("replay", (2, 1)), ("replay", (1, 2)))
    plain = shown(engine, stages)
    with BY_ID["kg-graph-stale-pad"].applied(engine):
        wrong = shown(engine, stages)
    assert {(stage, request) for stage, request, _ in changed_at(wrong, plain)} == {(1, 1), (1, 2)}


def test_long_prompts_have_right_strides(engines):
    """What is wrong for up to 8 queries is right for more: one pass over a longer sequence keeps every bit."""
    mutation = BY_ID["kg-noncontig-sdpa"]
    for host in mutation.hosts:
        engine, stages = engines.engine(host), (("prefill", (0, 1, 2)), ("replay", (0, 1, 2)))
        plain = shown(engine, stages)
        with mutation.applied(engine):
            changed = changed_at(shown(engine, stages), plain)
        assert {stage for stage, _, _ in changed} == {1}


def test_poison_makes_nan_in_later_rows(engines):
    """The first row of a batch has clean memory; each other one shows NaN while slots are unwritten."""
    engine = engines.engine("llama-tiny", options=POISON.options)
    with POISON.applied(engine):
        wrong = shown(engine, STAGES[:1])
    assert {request for (_, request, _), logits in wrong.items() if logits.isnan().any()} == {1, 2}


def test_the_first_two_starts_are_right(engines):
    """A Python number is compiled in once and made dynamic at its second value: the third decode step is wrong."""
    engine, plain = engines.engine("llama-tiny"), engines.plain("llama-tiny")
    with BY_ID["kg-compile-stale-float"].applied(engine):
        wrong = shown(engine, STAGES[:1])
    changed = changed_at(wrong, {key: plain[key] for key in wrong})
    assert {(request, position) for _, request, position in changed} == {(0, 39), (1, 9), (2, 48)}
