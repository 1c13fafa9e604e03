"""Bugs of norms and activations change the logits, are the formulas that they name, and are undone."""

import pytest
import torch

from harness.engines import hooks
from harness.mutations.mutation import blocks, catalogue
from harness.mutations.norms import MUTATIONS
from tests.mutations.applied import (
    Opened,
    cases,
    check_16_bits,
    check_changes,
    check_described,
    check_undone_after_an_error,
    shown,
    unharmed,
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
    """In bf16, and in the float32 copy of that, on the last of its hosts."""
    check_16_bits(opened, mutation, max(mutation.hosts), "bfloat16")


def test_they_say_what_they_are():
    """Ids, hosts and references are in form."""
    check_described(MUTATIONS)


@pytest.mark.parametrize(
    ("name", "host"),
    [
        ("na-gelu", "llama-tiny"),
        ("na-silu-for-gelu", "gpt2-tiny"),
        ("na-one-plus-w", "bloom-tiny"),
        ("na-final-softcap", "llama-tiny"),
        ("x-variance-unbiased", "llama-tiny"),
        ("x-mean-kept", "llama-tiny"),
        ("x-residual-after-norm", "gpt2-tiny"),
    ],
)
def test_a_host_without_the_part_is_refused(opened, name, host):
    """Where there is nothing to change it says so."""
    engine = opened.engine(host)
    with unharmed(engine), pytest.raises(LookupError), BY_ID[name].applied(engine):
        pass


def test_without_its_cap_no_argmax_changes(opened):
    """The logits are the cap's inverse of what they were, in the same order."""
    engine, right = opened.engine("gemma2-softcap"), opened.plain("gemma2-softcap")
    cap = engine.model.config.final_logit_softcapping
    with BY_ID["na-final-softcap"].applied(engine):
        wrong = shown(engine)
    for place, row in right.items():
        torch.testing.assert_close(wrong[place], cap * torch.atanh(row / cap), rtol=1e-9, atol=1e-9)
        assert wrong[place].argmax() == row.argmax()


INPUT = torch.randn(4, 144, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.02 + 0.01


@pytest.mark.parametrize("host", ["gpt2-tiny", "llama-tiny"])
def test_norms_are_as_named(opened, host):
    """On small inputs, where epsilon counts: what each norm gives is its formula written out."""
    engine = opened.engine(host)
    block = blocks(engine.model)[1]
    norm = block.ln_1 if host == "gpt2-tiny" else block.input_layernorm
    eps = 1e-5
    mean = INPUT.mean(-1, keepdim=True)
    square, variance = INPUT.pow(2).mean(-1, keepdim=True), INPUT.var(-1, correction=0, keepdim=True)
    if host == "llama-tiny":
        expected = {
            "x-eps-outside": INPUT / (square.sqrt() + eps) * norm.weight,
            "na-one-plus-w": INPUT / (square + eps).sqrt() * (1 + norm.weight),
        }
    else:
        expected = {
            "x-eps-outside": (INPUT - mean) / (variance.sqrt() + eps) * norm.weight + norm.bias,
            "x-variance-unbiased": (INPUT - mean) / (variance * 144 / 143 + eps).sqrt() * norm.weight + norm.bias,
            "x-mean-kept": INPUT / (square + eps).sqrt() * norm.weight + norm.bias,
        }
    right = norm(INPUT)
    for name, values in expected.items():
        with BY_ID[name].applied(engine):
            found = norm(INPUT)
        # Llama's own norm is in float32 outside the engine.
        torch.testing.assert_close(found, values, rtol=1e-6, atol=1e-6)
        assert float((found - right).abs().max()) > 1e-3, name


def test_gemma_means_one_plus_weight(opened):
    """There the mutation multiplies by the weight alone."""
    engine = opened.engine("gemma2-softcap")
    norm = engine.model.model.norm
    x = torch.randn(3, norm.weight.shape[0], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    right, weight = norm(x), norm.weight.clone()
    with BY_ID["na-one-plus-w"].applied(engine):
        found = norm(x)
    torch.testing.assert_close(found, right / (1 + weight) * weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("host", "block", "down"),
    [
        ("bloom-tiny", "transformer.h.1", "mlp.dense_4h_to_h"),
        ("gpt2-tiny", "transformer.h.1", "mlp.c_proj"),
        ("llama-tiny", "model.layers.1", "mlp.down_proj"),
    ],
)
def test_a_block_without_residual_is_its_mlp_alone(opened, host, block, down):
    """What leaves the block is, bit for bit, what leaves the last projection of its MLP."""
    engine, names = opened.engine(host), [block, f"{block}.{down}"]
    seen = {name: [] for name in names}
    watched = hooks.watched(engine.model, names, lambda name, output: seen[name].append(output.clone()))
    with BY_ID["x-residual-missing"].applied(engine), watched:
        shown(engine)
    outputs, projected = seen.values()
    assert len(outputs) == len(projected) > 2
    assert all(torch.equal(one, other) for one, other in zip(outputs, projected, strict=True))
