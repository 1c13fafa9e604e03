"""What a step costs, beside parameters counted by hand and operations that torch counts while it runs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, DynamicCache

from harness.errors import ModelError
from harness.speed import costs
from harness.speed.costs import Counts
from tests.support import VOCABULARY, random_model

KINDS = ("bloom", "gpt2", "llama")
SMALL = Counts(products=1000, head=300, others=50, gathered=10, cached=24, queries=16)


@pytest.fixture(scope="module")
def models():
    """One model of each kind, with eager attention, whose products are plain ones."""
    found = {kind: random_model(kind) for kind in KINDS}
    for model in found.values():
        model.config._attn_implementation = "eager"
    return found


def test_a_llama_is_counted_as_by_hand():
    """Grouped heads, biases, an untied head: each weight stands where it belongs."""
    found = costs.count(random_model("llama").config)
    hidden, queries, shared, inner = 36, 6 * 8, 3 * 8, 54
    layer = 2 * hidden * queries + 2 * hidden * shared + 3 * hidden * inner
    biases, norms = queries + 2 * shared + hidden, 2 * hidden
    assert found == Counts(
        products=2 * layer,
        head=VOCABULARY * hidden,
        others=2 * (biases + norms) + hidden,
        gathered=hidden,
        cached=2 * 2 * shared,
        queries=2 * queries,
    )


def test_a_bloom_has_the_24_b_s_h_h_operations_of_its_article(models):
    """Its products have 12 h^2 weights a layer, so a token costs 24 h^2 L operations beside attention and the head."""
    found = costs.count(models["bloom"].config)
    assert found.products == 12 * 36**2 * 2
    assert found.head == VOCABULARY * 36, "tied to the embedding, and read whole all the same"


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_counted_once(models, kind):
    """Products, head and others are all parameters but for tables that are only gathered from."""
    model, found = models[kind], costs.count(models[kind].config)
    head = model.get_output_embeddings().weight
    tables = {id(one.weight): one.weight for one in model.modules() if isinstance(one, torch.nn.Embedding)}
    tables.pop(id(head), None)
    expected = sum(one.numel() for one in model.parameters()) - sum(one.numel() for one in tables.values())
    assert found.products + found.head + found.others == expected


@pytest.mark.parametrize("kind", KINDS)
def test_operations_are_those_that_torch_counts(models, kind):
    """A prefill and a decode step of two rows, where torch counts the masked half of the square too."""
    batch, prompt = 2, 9
    model, counts = models[kind], costs.count(models[kind].config)
    cache = DynamicCache(config=model.config)
    for tokens, past in ((prompt, 0), (1, prompt)):
        ids = torch.full((batch, tokens), 7)
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        masked = tokens * (tokens - 1) / 2
        cost = costs.step(counts, batch=batch, tokens=tokens, past=past, dtype="float32")
        assert counted.get_total_flops() == cost.operations + 4 * batch * counts.queries * masked


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_is_as_large_as_the_one_that_a_model_fills(models, kind):
    """Keys and values of all layers, heads that are shared once."""
    model = models[kind]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.full((3, 5), 7), past_key_values=cache, use_cache=True)
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert held == 3 * 5 * costs.count(model.config).cached


def test_bytes_are_weights_once_rows_gathered_and_the_cache():
    """A decode step of 2 rows with 10 tokens behind them, by hand; half of it in 16 bits."""
    wide = costs.step(SMALL, batch=2, tokens=1, past=10, dtype="float32")
    assert wide.bytes == 4 * (1000 + 300 + 50 + 2 * 10 + 2 * 24 * (10 + 1))
    assert costs.step(SMALL, batch=2, tokens=1, past=10, dtype="bfloat16").bytes == wide.bytes / 2
    assert wide.operations == 2 * 2 * 1300 + 4 * 2 * 16 * 11


@given(st.integers(1, 9), st.integers(1, 50), st.integers(2, 30))
def test_decoding_is_the_mean_of_its_steps(batch, prompt, new):
    """The k-th later forward has prompt + k - 1 tokens behind it."""
    pasts = range(prompt, prompt + new - 1)
    steps = [costs.step(SMALL, batch=batch, tokens=1, past=past, dtype="float16") for past in pasts]
    mean = costs.decode(SMALL, batch=batch, prompt=prompt, new=new, dtype="float16")
    assert mean.bytes == pytest.approx(sum(one.bytes for one in steps) / len(steps))
    assert mean.operations == pytest.approx(sum(one.operations for one in steps) / len(steps))


@given(st.integers(1, 9), st.integers(1, 20), st.integers(1, 20))
def test_a_prompt_in_two_pieces_has_the_same_attention(batch, first, second):
    """Every pair of query and key is met once, however a prompt is cut; only the head comes once more."""
    whole = costs.prefill(SMALL, batch=batch, prompt=first + second, dtype="float32").operations
    pieces = costs.prefill(SMALL, batch=batch, prompt=first, dtype="float32").operations
    pieces += costs.step(SMALL, batch=batch, tokens=second, past=first, dtype="float32").operations
    assert pieces == pytest.approx(whole + 2 * batch * SMALL.head)


@pytest.mark.parametrize(
    ("kind", "more", "word"),
    [
        ("mixtral", {}, "num_local_experts"),
        ("mistral", {"sliding_window": 64}, "sliding_window"),
        ("gpt_bigcode", {"multi_query": True}, "multi_query"),
        ("gemma2", {}, "sliding_attention"),
    ],
)
def test_what_takes_another_form_is_not_guessed(kind, more, word):
    """Experts, windows and shared keys of another name cost something else."""
    with pytest.raises(ModelError, match=word):
        costs.count(AutoConfig.for_model(kind, **more))
