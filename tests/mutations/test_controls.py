"""Negative controls compute the same function with other roundings, and are undone."""

import pytest
import torch

from harness.mutations.benign import FAMILIES
from harness.mutations.controls import MUTATIONS
from harness.mutations.mutation import catalogue
from harness.numerics.sketch import Sketcher
from tests.mutations.applied import (
    CONTINUATIONS,
    REQUESTS,
    VIEWS,
    Opened,
    cases,
    check_described,
    check_undone_after_an_error,
    relative,
    same_bits,
    shown,
    unharmed,
)

BY_ID = catalogue(*MUTATIONS)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Engines of the hosts, opened once each."""
    with Opened(tmp_path_factory.mktemp("hosts")) as found:
        yield found


@pytest.mark.parametrize(("control", "host"), **cases(MUTATIONS))
def test_it_is_the_same_function(opened, control, host):
    """In float64 logits agree to 1e-10, with padding, cached and in one pass; afterwards all is as it was."""
    engine, plain = opened.engine(host), opened.plain(host)
    with unharmed(engine), control.applied(engine):
        found = shown(engine)
    assert 0 < relative(found, plain) < 1e-10
    assert same_bits(shown(engine), plain)
    check_undone_after_an_error(opened, control, host)


@pytest.mark.parametrize(("control", "host"), **cases(MUTATIONS))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_its_round_off_is_of_the_usual_size(opened, control, host, dtype):
    """In every precision the error of each view is below three times the plain model's, so nothing is NaN."""
    exact, plain = opened.plain(host), opened.plain(host, dtype)
    engine = opened.engine(host, dtype)
    with unharmed(engine), control.applied(engine):
        found = shown(engine)
    assert dtype != "float32" or not same_bits(found, plain)
    for view in VIEWS:
        assert relative(found, exact, (view,)) < 3 * relative(plain, exact, (view,))


def test_they_say_what_they_are():
    """Ids, hosts and references are in form, and all of them are harmless."""
    check_described(MUTATIONS)
    assert all(one.harmless for one in MUTATIONS)


def test_what_is_a_family_already_is_none():
    """Batch shapes and sums in another order are families of their own, as the module says."""
    assert {"batch-1", "ranks-2", "ranks-4", "permuted"} <= set(FAMILIES)
    assert not {"ok-batch-shape", "ok-reduce-order"} & set(BY_ID)


@pytest.mark.parametrize(
    ("name", "host"),
    [
        ("ok-alibi-shift", "gpt2-tiny"),
        ("ok-key-bias", "llama-tiny"),
        ("ok-qk-layer-scaling", "gpt2-tiny"),
        ("ok-gelu-factored", "llama-tiny"),
        ("ok-norm-twice", "bloom-tiny"),
    ],
)
def test_a_host_without_the_part_is_refused(opened, name, host):
    """Where there is nothing to change it says so."""
    engine = opened.engine(host)
    with unharmed(engine), pytest.raises(LookupError), BY_ID[name].applied(engine):
        pass


def test_alibi_is_zero_at_the_query(opened):
    """In a padded row of three tokens the bias of query q and key k is slope * (k - q), else 0."""
    engine = opened.engine("bloom-tiny", "float32")
    body, seen = engine.model.transformer, []
    keep = body.h[0].self_attention.register_forward_pre_hook(
        lambda _module, _inputs, keywords: seen.append(keywords["alibi"]), with_kwargs=True
    )
    try:
        with BY_ID["ok-alibi-shift"].applied(engine):
            engine.model(
                input_ids=torch.tensor([[0, 5, 6, 7], [8, 5, 6, 7]]),
                attention_mask=torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]),
            )
            engine.model(input_ids=torch.tensor([[5]]))
    finally:
        keep.remove()
    # The first of BLOOM's slopes for 6 heads is 2^-2.
    distance = torch.arange(4)[None, :] - torch.arange(4)[:, None]
    assert torch.equal(seen[0].view(2, 6, 4, 4)[1, 0], 0.25 * distance)
    assert torch.equal(seen[0].view(2, 6, 4, 4)[0, 0][1:, 1:], 0.25 * distance[1:, 1:])
    assert not seen[0].view(2, 6, 4, 4)[0, :, :, 0].any()
    assert torch.equal(seen[1], torch.zeros(6, 1, 1))  # a prompt of one token


def test_the_key_bias_is_all_that_is_dropped(opened):
    """Biases of query and value stay."""
    for host, name, shape in (
        ("bloom-tiny", "transformer.h.2.self_attention.query_key_value", (6, 3, 24)),
        ("gpt2-tiny", "transformer.h.2.attn.c_attn", (3, 6, 24)),
    ):
        engine = opened.engine(host)
        bias = engine.model.get_submodule(name).bias.view(shape)
        before, axis = bias.clone(), shape.index(3)
        with BY_ID["ok-key-bias"].applied(engine):
            dropped = [bool((bias.select(axis, i) == 0).all()) for i in range(3)]
            assert torch.equal(bias.select(axis, 2), before.select(axis, 2))
        assert dropped == [False, True, False]
        assert not (before.select(axis, 1) == 0).any()


def test_a_wide_replay_shows_what_a_replay_shows(opened):
    """To a sketcher: the same rows, all generated, with the same argmax."""
    engine, found = opened.engine("llama-tiny"), []
    for control in (None, BY_ID["ok-spec-near-tie"]):
        sketcher = Sketcher(engine.vocabulary)
        if control is None:
            engine.replay(REQUESTS, CONTINUATIONS, batch_size=3, sketcher=sketcher)
        else:
            with control.applied(engine):
                engine.replay(REQUESTS, CONTINUATIONS, batch_size=3, sketcher=sketcher)
        found.append(sketcher.rows())
    plain, wide = found
    assert sorted(zip(plain.request, plain.position, strict=True)) == sorted(
        zip(wide.request, wide.position, strict=True)
    )
    assert wide.generated.all()
    assert len(wide.request) == len(REQUESTS) * 4
