"""Bugs of conversion change the logits where they say so, are what they say, and are undone."""

import pytest
import torch
from transformers.models.llama import modeling_llama

from harness.mutations.conversion import MUTATIONS, _halved, _paired
from harness.mutations.mutation import blocks, catalogue
from tests.engines.recorder import recorded
from tests.mutations.applied import (
    CONTINUATIONS,
    REQUESTS,
    Opened,
    bits,
    cases,
    check_16_bits,
    check_changes,
    check_described,
    check_undone_after_an_error,
    relative,
    same_bits,
    shown,
    unharmed,
)

BY_ID = catalogue(*MUTATIONS)
FORCED = [one for one in MUTATIONS if one.shows == "logits"]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Engines of the hosts, opened once each."""
    with Opened(tmp_path_factory.mktemp("hosts")) as found:
        yield found


@pytest.mark.parametrize(("mutation", "host"), **cases(FORCED))
def test_the_logits_are_others(opened, mutation, host):
    """In float64, with padding, cached and in one pass, at each strength; afterwards all is as it was."""
    check_changes(opened, mutation, host)


@pytest.mark.parametrize(("mutation", "host"), **cases(MUTATIONS))
def test_an_error_leaves_nothing_behind(opened, mutation, host):
    """The state after an error inside the block is the one before."""
    check_undone_after_an_error(opened, mutation, host)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda one: one.id)
def test_it_works_in_16_bits(opened, mutation):
    """In bf16, and in the float32 copy of that, on the last of its hosts."""
    host = max(mutation.hosts)
    if mutation.shows == "logits":
        check_16_bits(opened, mutation, host, "bfloat16")


def test_they_say_what_they_are():
    """Ids, hosts and references are in form."""
    check_described(MUTATIONS)


@pytest.mark.parametrize(
    ("name", "host"),
    [
        ("wc-qkv-cat", "llama-tiny"),
        ("wc-rope-permute-missing", "gpt2-tiny"),
        ("x-gqa-permute", "bloom-tiny"),
        ("wc-conv1d-transpose", "bloom-tiny"),
        ("wc-reshape-not-transpose", "llama-tiny"),
        ("wc-tie-overwrites-head", "bloom-tiny"),
        ("wc-tied-head-resume", "gpt2-tiny"),
        ("wc-head-random", "llama-tiny"),
        ("wc-lm-head-bias", "llama-tiny"),
        ("wc-embed-ln-missing", "gpt2-tiny"),
        ("wc-buffer-uninit", "bloom-tiny"),
        ("x-key-bias-rope", "bloom-tiny"),
    ],
)
def test_a_host_without_the_part_is_refused(opened, name, host):
    """Where there is nothing to change it says so."""
    engine = opened.engine(host)
    with unharmed(engine), pytest.raises(LookupError), BY_ID[name].applied(engine):
        pass


# --- rows --------------------------------------------------------------------------------------


def test_joined_rows_are_what_the_other_layout_reads(opened):
    """Whoever reads BLOOM's rows as three blocks, or GPT-2's head by head, finds query, key and value in place."""
    for host, read in (("bloom-tiny", (6, 3, 24)), ("gpt2-tiny", (3, 6, 24))):
        engine = opened.engine(host)
        layer = blocks(engine.model)[3]
        bias = (layer.self_attention.query_key_value if host == "bloom-tiny" else layer.attn.c_attn).bias
        right = bias.view(read).clone()
        with BY_ID["wc-qkv-cat"].applied(engine):
            joined = bias.view(read[1], read[0], 24).clone()
        assert torch.equal(joined, right.transpose(0, 1))


def _neighbours(q, k, cos, sin, unsqueeze_dim=1):
    """A rotation of lanes 2i and 2i + 1, from tables that hold each angle once for each half."""
    half = cos.shape[-1] // 2
    cos, sin = (table[..., :half].unsqueeze(unsqueeze_dim) for table in (cos, sin))

    def turned(x):
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)

    return turned(q), turned(k)


def test_rows_in_halves_are_those_of_a_rotation_of_neighbours(opened, monkeypatch):
    """The mutation is the model as it is, run by code that rotates neighbouring lanes."""
    engine = opened.engine("llama-tiny")
    with BY_ID["wc-rope-permute-missing"].applied(engine):
        wrong = shown(engine)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", _neighbours)
    assert relative(shown(engine), wrong) < 1e-12


def test_a_wrong_head_count_permutes_the_keys_alone(opened, monkeypatch):
    """As a converter for neighbouring lanes that takes the 12 / 6 = 2 queries of a KV head for the number of those."""
    engine = opened.engine("llama-tiny")
    with BY_ID["x-gqa-permute"].applied(engine):
        wrong = shown(engine)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", _neighbours)
    attentions = [block.self_attn for block in blocks(engine.model)]
    kept = [parameter.clone() for one in attentions for parameter in one.parameters()]
    with unharmed(engine):
        for one in attentions:
            for layer, heads in ((one.q_proj, 12), (one.k_proj, 2)):
                for rows in layer.parameters():
                    rows.copy_(_paired(rows, heads))
        found = shown(engine)
        for parameter, before in zip((p for one in attentions for p in one.parameters()), kept, strict=True):
            parameter.copy_(before)
    assert relative(found, wrong) < 1e-12


@pytest.mark.parametrize("heads", [1, 2, 6])
def test_the_two_orders_are_inverse(heads):
    """Halves to pairs and back is nothing: with H/K equal to K the wrong head count goes unseen."""
    rows = torch.arange(96)
    assert torch.equal(_halved(_paired(rows, heads), heads), rows)
    assert not torch.equal(_paired(rows, heads), rows)


def test_one_token_alone_does_not_show_a_wrong_rotation(opened):
    """At distance 0 rotations cancel: the first step of a prompt of one token is right."""
    engine = opened.engine("llama-tiny")
    one = [type(REQUESTS[0])(id="one", prompt_ids=(17,), max_new_tokens=2)]
    right = recorded(engine, "replay", one, [(5, 9)])
    with BY_ID["wc-rope-permute-missing"].applied(engine):
        wrong = recorded(engine, "replay", one, [(5, 9)])
    difference = {place: float((wrong[place] - right[place]).abs().max()) for place in right}
    assert difference[0, 1] < 1e-9 < 1e-3 < difference[0, 2]


# --- the head ----------------------------------------------------------------------------------


def test_a_tied_head_is_the_embedding(opened):
    """Both ways to lose a head of its own leave the embedding in its place."""
    engine = opened.engine("llama-untied")
    head, embedding = engine.model.lm_head, engine.model.model.embed_tokens
    for name in ("wc-tie-overwrites-head", "wc-tied-head-resume"):
        assert not torch.equal(head.weight, embedding.weight)
        with BY_ID[name].applied(engine):
            assert torch.equal(head.weight, embedding.weight)


def test_a_random_head_leaves_the_embedding(opened):
    """The hidden states are right: the two are no longer one tensor."""
    engine = opened.engine("gpt2-tiny")
    before = bits(engine.model.transformer.wte.weight)
    with BY_ID["wc-head-random"].applied(engine):
        assert bits(engine.model.transformer.wte.weight) == before
        assert float(engine.model.lm_head.weight.std()) == pytest.approx(0.02, rel=0.02)


def test_a_lost_head_bias_is_the_same_at_every_position(opened):
    """The logits are off by one vector."""
    engine, right = opened.engine("bloom-raw"), opened.plain("bloom-raw")
    with BY_ID["wc-lm-head-bias"].applied(engine):
        wrong = shown(engine)
    off = torch.stack([right[place] - wrong[place] for place in right])
    assert float((off - off[0]).abs().max()) < 1e-12 < 0.01 < float(off[0].abs().max())


@pytest.mark.parametrize("host", sorted(BY_ID["wc-pad-vocab-zero"].hosts))
@pytest.mark.parametrize("strength", BY_ID["wc-pad-vocab-zero"].strengths)
def test_a_padded_row_wins_where_no_logit_is_positive(opened, host, strength):
    """Real logits keep every bit; the largest is a padded one exactly where all real ones are below the offset."""
    engine, right = opened.engine(host), opened.plain(host)
    with unharmed(engine), BY_ID["wc-pad-vocab-zero"].applied(engine, strength):
        wrong = shown(engine)
    assert same_bits({place: row[: engine.vocabulary] for place, row in wrong.items()}, right)
    beyond = {place for place, row in wrong.items() if int(row.argmax()) >= engine.vocabulary}
    assert beyond == {place for place, row in right.items() if float(row.max()) < 12.0 * strength}


def test_padded_ids_are_generated_and_fed(opened):
    """Free continuations hold ids behind the vocabulary, and go on behind them; in 16 bits too."""
    mutation = BY_ID["wc-pad-vocab-zero"]
    for dtype in ("float64", "bfloat16"):
        engine = opened.engine("gpt2-tiny", dtype)
        right = engine.generate(REQUESTS, batch_size=3, stop_ids=frozenset())
        with unharmed(engine), mutation.applied(engine):
            wrong = engine.generate(REQUESTS, batch_size=3, stop_ids=frozenset())
        assert any(token >= engine.vocabulary for one in wrong for token in one.tokens[:-1])
        assert not any(token >= engine.vocabulary for one in right for token in one.tokens)
        assert [len(one.tokens) for one in wrong] == [len(one.tokens) for one in right]


# --- layers, buffers, adapters -----------------------------------------------------------------


def test_the_second_stage_holds_the_first_layers(opened):
    """Five layers on two stages, 3 and 2; the weaker one repeats the last pair alone."""
    engine = opened.engine("gpt2-tiny")
    layers = blocks(engine.model)
    for strength, expected in ((1.0, {3: 0, 4: 1}), (0.5, {4: 1})):
        before = [bits(layer.mlp.c_fc.weight) for layer in layers]
        with BY_ID["wc-layer-dup"].applied(engine, strength):
            after = [bits(layer.mlp.c_fc.weight) for layer in layers]
        assert after == [before[expected.get(index, index)] for index in range(5)]


def test_the_first_rank_is_right(opened):
    """A row alone, and the first rows of a batch, keep every bit; the last row is wrong in both views."""
    engine, right = opened.engine("llama-tiny"), opened.plain("llama-tiny")
    alone = shown(engine, batch_size=1)
    with BY_ID["wc-buffer-uninit"].applied(engine):
        assert same_bits(shown(engine, batch_size=1), alone)
        wrong = shown(engine)
    for view, request, position in right:
        same = torch.equal(wrong[view, request, position], right[view, request, position])
        # Where a token sees itself alone its rotation cancels.
        assert same == (request < 2) or position == 1


def test_an_adapter_is_too_small_by_the_root_of_its_rank(opened):
    """What is taken off a weight has rank 8, and is 1 - 1/sqrt(8) of an update of a quarter of the weight."""
    for host, name in (("llama-tiny", "model.layers.0.self_attn.q_proj"), ("gpt2-tiny", "transformer.h.0.attn.c_attn")):
        engine = opened.engine(host)
        weight = engine.model.get_submodule(name).weight
        right = weight.clone()
        with BY_ID["wc-lora-scale"].applied(engine):
            off = weight - right
        assert int(torch.linalg.matrix_rank(off, rtol=1e-5)) == 8
        assert float(off.norm() / right.norm()) == pytest.approx(0.25 * (1 - 8**-0.5), rel=1e-5)


def test_the_key_bias_matters_under_rope_by_distance(opened):
    """It is no bug where a token sees itself alone."""
    engine, right = opened.engine("llama-tiny"), opened.plain("llama-tiny")
    with BY_ID["x-key-bias-rope"].applied(engine):
        wrong = recorded(engine, "prefill", REQUESTS, CONTINUATIONS, batch_size=3)
    off = {position: float((wrong[0, position] - right["prefill", 0, position]).abs().max()) for position in (1, 9)}
    assert off[1] < 1e-9 < 1e-3 < off[9]
