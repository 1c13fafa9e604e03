"""Simple bugs change the logits, each in one place, and are undone."""

import pytest
import torch

from harness.mutations.mutation import attention_of, blocks, catalogue
from harness.mutations.simple import MUTATIONS
from tests.mutations.applied import (
    Opened,
    cases,
    check_16_bits,
    check_changes,
    check_described,
    check_undone_after_an_error,
)

BY_ID = catalogue(*MUTATIONS)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Engines of the hosts, opened once each."""
    with Opened(tmp_path_factory.mktemp("hosts")) as found:
        yield found


@pytest.mark.parametrize(("mutation", "host"), **cases(MUTATIONS))
def test_the_logits_are_others(opened, mutation, host):
    """In float64, with padding, cached and in one pass, at each strength; afterwards all is as it was."""
    check_changes(opened, mutation, host)
    check_undone_after_an_error(opened, mutation, host)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda one: one.id)
def test_it_works_in_16_bits(opened, mutation):
    """In bf16, and in the float32 copy of that."""
    check_16_bits(opened, mutation, "llama-tiny", "bfloat16")


def test_they_say_what_they_are():
    """Ids, hosts and references are in form."""
    check_described(MUTATIONS)


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        # Inputs of a row; two rows with their biases; three biases; one; two heads of keys and of values.
        ("x-row-scaled", 144),
        ("x-rows-swapped", 2 * 145),
        ("x-qkv-bias-lost", 3 * 144),
        ("x-bias-doubled", 144),
        ("x-kv-head-swapped", 2 * 2 * 24 * 145),
    ],
)
@pytest.mark.parametrize("host", ["bloom-tiny", "gpt2-tiny"])
def test_as_many_entries_change_as_are_meant(opened, host, name, entries):
    """One row, one pair of rows, one bias or two heads, and no entry beside them."""
    engine = opened.engine(host)
    before = {key: parameter.clone() for key, parameter in engine.model.named_parameters()}
    with BY_ID[name].applied(engine):
        changed = sum(int((parameter != before[key]).sum()) for key, parameter in engine.model.named_parameters())
    assert 0.998 * entries <= changed <= entries, "a few of 16 bits are equal by chance"


@pytest.mark.parametrize("host", ["bloom-tiny", "gpt2-tiny", "llama-tiny"])
def test_heads_are_swapped_as_the_attention_reads_them(opened, host):
    """Keys and values of heads 0 and 1 change places in what the layer puts out, and queries stay."""
    engine = opened.engine(host)
    attention = attention_of(blocks(engine.model)[1])
    x = torch.randn(1, 2, 144, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def heads():
        if host == "bloom-tiny":
            return attention._reshape(attention.query_key_value(x))
        if host == "gpt2-tiny":
            return [part.unflatten(-1, (6, 24)).transpose(1, 2) for part in attention.c_attn(x).split(144, dim=2)]
        layers = (attention.q_proj, attention.k_proj, attention.v_proj)
        return [layer(x).unflatten(-1, (-1, 16)).transpose(1, 2) for layer in layers]

    query, key, value = heads()
    with BY_ID["x-kv-head-swapped"].applied(engine):
        wrong = heads()
    order = [1, 0, 2, 3, 4, 5]
    for found, expected in zip(wrong, (query, key[:, order], value[:, order]), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("host", ["bloom-tiny", "gpt2-tiny", "llama-tiny"])
def test_the_last_layer_never_runs(opened, host):
    """Four of five blocks are left."""
    engine = opened.engine(host)
    with BY_ID["x-last-layer"].applied(engine):
        assert len(blocks(engine.model)) == 4
    assert len(blocks(engine.model)) == 5
