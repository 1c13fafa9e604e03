"""Bugs of the KV cache: each changes logits, only where it says, and leaves nothing behind."""

import pytest
import torch

from harness.mutations.cache import MUTATIONS, assisted
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
#: Those that any host of full attention can show, with the static cache too.
FULL = [mutation for mutation in MUTATIONS if "llama-tiny" in mutation.hosts]
KNOBS = [mutation for mutation in MUTATIONS if len(mutation.strengths) > 1]


@pytest.fixture(scope="module")
def engines(goldens, tmp_path_factory):
    """Open engines in float64, each loaded once."""
    found = Engines(goldens, tmp_path_factory.mktemp("hosts"))
    yield found
    found.close()


@pytest.mark.parametrize(("mutation", "host"), pairs(MUTATIONS))
def test_logits_change_where_the_bug_is_active(engines, mutation, host):
    """In float64 logits change where all that `active` names holds, nowhere else, and afterwards not at all."""
    engine, plain = engines.engine(host, options=mutation.options), engines.plain(host, options=mutation.options)
    before = state_of(engine)
    with mutation.applied(engine):
        wrong = shown(engine)
    assert relative(wrong, plain) > 1e-9
    chunk = engine.options.chunk
    assert {key for key in changed_at(wrong, plain) if not touched(mutation.active, key, chunk=chunk)} == set()
    assert_undone(engine, plain, before)


@pytest.mark.parametrize("mutation", FULL, ids=lambda mutation: mutation.id)
def test_a_static_cache_has_the_same_bugs(engines, mutation):
    """What a mutation does to a growing cache it does to one of fixed size, at the same places."""
    found = []
    for static in ("false", "true"):
        engine = engines.engine("llama-tiny", options=(*mutation.options, ("static_cache", static)))
        plain = engines.plain("llama-tiny", options=(*mutation.options, ("static_cache", static)))
        with mutation.applied(engine):
            wrong = shown(engine, STAGES[:2])
        found.append(changed_at(wrong, {key: plain[key] for key in wrong}, beyond=1e-9))
    assert found[0] == found[1] != set()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.id)
def test_every_precision_and_its_widened_copy_can_have_it(engines, mutation):
    """In 16 bits and in a copy widened to float32 a mutation changes finite logits into finite ones."""
    host, dtype = ("mistral-window", "bfloat16") if mutation not in FULL else ("bloom-tiny", "float16")
    engine = engines.engine(host, dtype, mutation.options)
    with engine.upcast() as wide:
        for one in (engine, wide):
            plain = shown(one, STAGES[:2])
            with mutation.applied(one):
                wrong = shown(one, STAGES[:2])
            assert torch.stack(list(wrong.values())).isfinite().all()
            assert changed_at(wrong, plain)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.id)
def test_an_exception_undoes_it(engines, mutation):
    """A failure inside the block leaves the engine as it was."""
    assert_exception_undoes(mutation, engines.engine(min(mutation.hosts), options=mutation.options))


@pytest.mark.parametrize("mutation", KNOBS, ids=lambda mutation: mutation.id)
def test_less_strength_changes_less(engines, mutation):
    """The weakest strength changes the logits, and by less than the reported one does."""
    host = "mistral-window" if mutation not in FULL else "llama-tiny"
    engine, plain = engines.engine(host, options=mutation.options), engines.plain(host, options=mutation.options)
    found = []
    for strength in (mutation.strengths[-1], mutation.strengths[0]):
        with mutation.applied(engine, strength):
            found.append(distance(shown(engine), plain))
    assert 0 < found[0] < found[1]


@pytest.mark.parametrize("host", ["bloom-tiny", "gpt2-tiny", "llama-tiny"])
def test_assisted_decoding_is_exact_when_all_layers_forget(engines, host):
    """With every layer rewound the drafts change nothing: what kv-static-crop shows is the missing rewind."""
    engine = engines.engine(host)
    with assisted(engine, slice(None)):
        assert relative(shown(engine), engines.plain(host)) < 1e-10


def test_only_two_rows_are_crossed(engines):
    """A store that mixes up two requests leaves the third alone."""
    engine = engines.engine("llama-tiny")
    with BY_ID["kv-cross-request-store"].applied(engine):
        wrong = shown(engine, STAGES[:1])
    plain = {key: engines.plain("llama-tiny")[key] for key in wrong}
    assert {request for _, request, _ in changed_at(wrong, plain)} == {0, 1}


def test_an_extracted_row_is_found_once(engines):
    """The first request for a prompt that was in a padded batch is wrong, the next one right again."""
    engine = engines.engine("gpt2-tiny")
    stages = (("replay", (0, 1, 2)), ("replay", (1,)), ("replay", (1,)), ("replay", (2,)))
    plain = shown(engine, stages)
    with BY_ID["kv-batch-merge-offset"].applied(engine):
        wrong = shown(engine, stages)
    assert {stage for stage, _, _ in changed_at(wrong, plain)} == {1}


def test_a_race_is_lost_now_and_then(engines):
    """The refilled block is in some requests and not in others, though they are equal."""
    options = BY_ID["kv-prefix-toctou"].options
    engine, stages = engines.engine("llama-tiny", options=options), (("replay", (2,)),) * 8
    plain = shown(engine, stages)
    with BY_ID["kv-prefix-toctou"].applied(engine):
        wrong = shown(engine, stages)
    assert 0 < len({stage for stage, _, _ in changed_at(wrong, plain)}) < len(stages)


def test_a_window_is_asked_for(engines):
    """A model without a sliding window cannot have the bug of one."""
    with pytest.raises(LookupError), BY_ID["kv-swa-assist"].applied(engines.engine("llama-tiny")):
        pass
