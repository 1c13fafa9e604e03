"""Bugs of attention: each changes what it says, where it says so, by the maths of the report, and goes away again."""

import pytest
import torch
from transformers.models.llama import modeling_llama

from harness.engines import hf
from harness.mutations import hosts
from harness.mutations.attention import MUTATIONS, _bucketed, _softmax_from
from tests.mutations.applied import cases
from tests.mutations.trials import (
    LONG,
    REQUESTS,
    RUNS,
    Trials,
    changed,
    check_active,
    check_precisions,
    check_strengths,
    check_undone,
    shown,
)

BY_ID = {mutation.id: mutation for mutation in MUTATIONS}
WINDOW = 16
SINGLE = ("replay", 1)


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    """Engines for all tests."""
    with Trials(tmp_path_factory.mktemp("hosts")) as found:
        yield found


# --- all of them -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("mutation", "host"), **cases(MUTATIONS))
def test_it_is_active_where_it_says(trials, mutation, host):
    """The float64 logits change where the bug is active, and keep every bit elsewhere."""
    check_active(trials, mutation, host, long=WINDOW)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=BY_ID)
def test_it_is_undone(trials, mutation):
    """After an error in the block, too, model, config and engine are as before."""
    check_undone(trials, mutation, min(mutation.hosts))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=BY_ID)
def test_every_strength_shows(trials, mutation):
    """A weaker bug is a smaller change, and still one."""
    check_strengths(trials, mutation, min(mutation.hosts))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("mutation", MUTATIONS, ids=BY_ID)
def test_it_works_in_every_precision(trials, mutation, dtype):
    """Finite, active and undone in 16 bits, and on the float32 copy of a bf16 engine."""
    check_precisions(trials, mutation, max(mutation.hosts), dtype=dtype)


@pytest.mark.parametrize(
    ("name", "host"),
    [
        ("at-scale", "opt-offset"),
        ("at-swa-off1", "llama-tiny"),
        ("at-chunk-future", "gpt2-tiny"),
        ("at-finite-sentinel", "bloom-tiny"),
        ("at-gqa-tile", "gpt2-tiny"),
    ],
)
def test_a_host_without_the_part_is_refused(trials, name, host):
    """On entry, instead of changing nothing."""
    with pytest.raises(LookupError), BY_ID[name].applied(trials.engine(host)):
        pass


# --- the maths of each -----------------------------------------------------------------------------


def weights_seen(trials, name, host="llama-tiny", run=SINGLE, **more):
    """Attention weights of the last layer, [B, H, T, S], pass by pass, with a bug or (None) without one."""
    options = BY_ID[name].options if name else more.get("options", ())
    engine, seen = trials.engine(host, options), []
    attention = engine.model.model.layers[-1].self_attn
    handle = attention.register_forward_hook(lambda _m, _a, output: seen.append(output[1]))
    try:
        if name:
            with BY_ID[name].applied(engine):
                shown(engine, run)
        else:
            shown(engine, run)
    finally:
        handle.remove()
    return seen


def sees(weights):
    """Which keys the queries of the last row see, [T, S]."""
    return weights[-1].sum(dim=0) > 0


def lower(queries, keys, shift=0):
    """Query q sees the keys up to q + shift."""
    return torch.ones(queries, keys).tril(shift).bool()


def test_a_chunk_aligned_to_the_top_left_misses_its_newest_keys(trials):
    """The chunk of columns 16 to 31 sees keys 0, 0 to 1, and so on; the first chunk is right."""
    first, second = weights_seen(trials, "at-causal-topleft")[:2]
    assert torch.equal(sees(first), lower(16, 16))
    assert torch.equal(sees(second), lower(16, 32))


def test_decode_sees_the_first_key_alone(trials):
    """Each step of one token does, however many keys there are."""
    prompt, *steps = weights_seen(trials, "at-causal-on-decode")[:3]
    assert torch.equal(sees(prompt), lower(LONG, LONG))
    for step in steps:
        assert torch.equal(sees(step), lower(1, step.shape[-1]))


def test_a_chunk_reads_slots_that_are_not_written(trials):
    """The mask of a chunk ends with the cache: its first query sees all that its last one should not, by as much."""
    slots = LONG + 3
    first, second = weights_seen(trials, "at-chunk-future")[:2]
    assert torch.equal(sees(first), lower(16, slots, slots - 16))
    assert torch.equal(sees(second), lower(16, slots, slots - 16))
    plain = weights_seen(trials, None, options=BY_ID["at-chunk-future"].options)
    assert torch.equal(sees(plain[0]), lower(16, slots))


def test_without_a_mask_a_chunk_sees_everything(trials):
    """Later tokens of its own chunk, and the padding of shorter rows."""
    first, second = weights_seen(trials, "at-mask-dropped-multi", run=("replay", 3))[:2]
    assert sees(second).all()
    assert torch.equal(first[0].sum(dim=0) > 0, lower(16, 16))


def test_the_padding_of_a_bucket_is_seen(trials):
    """A prompt of 9 is padded to 16 columns, and its last query sees the 7 of padding; with a mask nothing changes."""
    engine = trials.engine("llama-tiny")
    short = weights_seen(trials, "at-mask-b1")[3]
    assert short.shape[2:] == (16, 16)
    assert sees(short)[-1].all()
    assert len(REQUESTS[1].prompt_ids) == 9
    with _bucketed(0)(engine, 1.0):
        for run in RUNS:
            found = changed(shown(engine, run), trials.right("llama-tiny", (), run))
            assert max(found.values(), default=0.0) < 1e-10
            assert bool(found) == (run[1] == 1), "only single prompts are padded"


def test_a_bucket_fits_into_a_static_cache(trials):
    """The cache of a single prompt has room for the padding."""
    engine = trials.engine("llama-tiny", (("static_cache", "true"),))
    with _bucketed(0)(engine, 1.0):
        found = changed(shown(engine, SINGLE), trials.right("llama-tiny", (), SINGLE))
    assert max(found.values()) < 1e-10


def test_a_mask_of_ten_thousand_hides_what_is_small(trials):
    """On GPT-2 with its usual scores it is as good as any; it leaks where scores are thousands."""
    engine = trials.engine("gpt2-tiny")
    with BY_ID["at-mask-1e4"].applied(engine):
        found = changed(shown(engine, SINGLE), trials.right("gpt2-tiny", (), SINGLE))
    assert max(found.values(), default=0.0) < 1e-12


def test_a_length_takes_padding_for_tokens(trials):
    """Of 140 columns a row of 9 tokens sees the first 9, which are padding."""
    weights = weights_seen(trials, "at-mask-as-length", run=("replay", 3))[0]
    assert torch.equal(weights[1, 0, -1] > 0, torch.arange(LONG) < 9)


def test_the_window_is_one_wider(trials):
    """The logits are those of the same weights with a window of 17, in prefill and through the cache."""
    engine = trials.engine("mistral-window")
    model = hosts.build("mistral-window", "float32")
    wider = hosts.build("mistral-window", "float32")
    wider.config.sliding_window = 17
    for run in (("replay", 3), ("prefill", 1)):
        with hf.from_model(model) as narrow, BY_ID["at-swa-off1"].applied(narrow):
            found = shown(narrow, run)
        with hf.from_model(wider) as other:
            assert not changed(found, shown(other, run))
    assert engine.model.config.sliding_window == 16


def test_heads_are_tiled(monkeypatch):
    """The logits are those of a Llama whose KV heads are repeated as a whole."""
    model = hosts.build("llama-scaled", "float32")
    ids = torch.tensor([list(range(5, 30))])
    model.config._attn_implementation = "eager"
    with torch.no_grad(), hf.from_model(model) as engine, BY_ID["at-gqa-tile"].applied(engine):
        found = model(input_ids=ids).logits
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(modeling_llama, "repeat_kv", lambda states, times: states.repeat(1, times, 1, 1))
        wanted = model(input_ids=ids).logits
    assert torch.allclose(found, wanted, atol=1e-5)


def test_the_first_layer_keeps_its_scale(trials):
    """Layer n has 1/n of its scale: the error grows with depth."""
    engine = trials.engine("gpt2-tiny")
    with BY_ID["at-scale"].applied(engine):
        scales = [block.attn.scaling * 24**0.5 for block in engine.model.transformer.h]
    assert scales == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5], rel=1e-15)


def test_a_row_far_below_the_start_gives_zero(trials):
    """Weights are exact where a score comes near the start, and all zero where none does."""
    engine = trials.engine("gpt2-sharp")
    module = engine.model.transformer.h[0].attn
    x = torch.randn(8, 6, 72, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    query, key, value = (y.unflatten(-1, (6, 12)).transpose(1, 2) for y in module.c_attn(x).split(72, dim=-1))
    hidden = torch.full((6, 6), -1e30, dtype=torch.float64).triu(1)[None, None]
    scores = query @ key.transpose(-1, -2) * 12**-0.5 + hidden
    highest = scores.amax(dim=-1, keepdim=True)
    lost = highest < -50 - 746  # below the least number of float64
    # Next to that the weights have few bits left, and nothing is foretold.
    clear = (lost | (highest > -50 - 700)).all(dim=1)[..., 0]
    assert lost.any()
    assert clear.sum() > 40
    weights = scores.softmax(dim=-1).masked_fill(lost, 0)
    wanted = module.c_proj((weights @ value).transpose(1, 2).flatten(2))
    found, _ = _softmax_from(-50.0, module, x, attention_mask=hidden)
    assert torch.allclose(found[clear], wanted[clear], rtol=1e-12, atol=1e-12)


def test_dropout_differs_from_run_to_run_and_draws_nothing_outside(trials):
    """Two runs in one block differ; two blocks begin alike; torch's own generator stands where it stood."""
    engine, before = trials.engine("gpt2-tiny"), torch.get_rng_state()
    with BY_ID["at-dropout-eval"].applied(engine):
        first, second = shown(engine, SINGLE), shown(engine, SINGLE)
    with BY_ID["at-dropout-eval"].applied(engine):
        again = shown(engine, SINGLE)
    assert changed(first, second)
    assert not changed(first, again)
    assert torch.equal(torch.get_rng_state(), before)


def test_references_are_those_of_the_catalogue():
    """Each has an id of the section, one line, a report, and hosts that there are."""
    assert all(mutation.id.startswith("at-") and mutation.group == "attention" for mutation in MUTATIONS)
    assert all(mutation.reference and mutation.hosts <= set(hosts.NAMES) for mutation in MUTATIONS)
    assert all("\n" not in mutation.wrong and set(dict(mutation.options)) <= set(hf.READERS) for mutation in MUTATIONS)
