"""Bugs of precision: in fewer bits they change logits, with more room they change nothing, and they leave nothing."""

import pytest
import torch

from harness.mutations import operations
from harness.mutations.mutation import blocks, catalogue
from harness.mutations.precision import MUTATIONS
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
)

BY_ID = catalogue(*MUTATIONS)
HALF = [mutation for mutation in MUTATIONS if "half" in mutation.active]
WIDE = [mutation for mutation in MUTATIONS if mutation not in HALF]
TABLES = BY_ID["pr-eval-cast-buffers"]


def half_of(mutation):
    """The 16-bit dtype in which a mutation is active."""
    return dict(mutation.options).get("dtype", "bfloat16")


@pytest.fixture(scope="module")
def engines(goldens, tmp_path_factory):
    """Open engines, each loaded once."""
    found = Engines(goldens, tmp_path_factory.mktemp("hosts"))
    yield found
    found.close()


@pytest.mark.parametrize(("mutation", "host"), pairs(WIDE))
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_wide_models_are_rounded(engines, mutation, host, dtype):
    """In float64 and float32 the logits change, by as much as the bits that are left say, and afterwards not at all."""
    engine, plain = engines.engine(host, dtype), engines.plain(host, dtype)
    before = state_of(engine)
    with mutation.applied(engine):
        wrong = shown(engine)
    assert 2**-12 < relative(wrong, plain) < 2**-5
    assert_undone(engine, plain, before)


@pytest.mark.parametrize(("mutation", "host"), pairs(HALF))
def test_half_models_are_wrong_in_half_alone(engines, mutation, host):
    """In 16 bits logits change and stay finite; a copy widened to float32 has room, and keeps every bit."""
    dtype = half_of(mutation)
    engine, plain = engines.engine(host, dtype), engines.plain(host, dtype)
    before = state_of(engine)
    with mutation.applied(engine):
        wrong = shown(engine)
    assert torch.stack(list(wrong.values())).isfinite().all()
    assert changed_at(wrong, plain)
    assert_undone(engine, plain, before)
    wide, right = engines.engine(host, "float32"), engines.plain(host, "float32")
    with mutation.applied(wide):
        unchanged = shown(wide, STAGES[:1])
    assert not changed_at(unchanged, {key: right[key] for key in unchanged})


@pytest.mark.parametrize("mutation", HALF, ids=lambda mutation: mutation.id)
def test_half_is_worse_than_rounding(engines, mutation):
    """The error against float64 is larger with the bug than without it: it is no other way to round."""
    host = "bloom-tiny" if half_of(mutation) == "float16" else min(mutation.hosts & {"llama-tiny"})
    truth = engines.plain(host)
    engine, plain = engines.engine(host, half_of(mutation)), engines.plain(host, half_of(mutation))
    with mutation.applied(engine):
        print(mutation.id, distance(shown(engine), truth) / distance(plain, truth))
        assert distance(shown(engine), truth) > 1.02 * distance(plain, truth)


@pytest.mark.parametrize("host", sorted(TABLES.hosts))
def test_cast_tables_stay_cast_in_wider_copies(engines, host):
    """What a cast has rounded is rounded in a widened copy and in float64 too; where float32 was loaded nothing was."""
    with engines.engine(host, "bfloat16").upcast() as wide:
        for engine in (wide, engines.engine(host)):
            plain, before = shown(engine), state_of(engine)
            with TABLES.applied(engine):
                assert relative(shown(engine), plain) > 1e-9
            assert_undone(engine, plain, before)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.id)
def test_an_exception_undoes_it(engines, mutation):
    """A failure inside the block leaves the engine as it was."""
    host = "bloom-tiny" if "bloom-tiny" in mutation.hosts else "llama-tiny"
    assert_exception_undoes(mutation, engines.engine(host, half_of(mutation)))


def test_a_higher_limit_clamps_less(engines):
    """With the clamp twice as far out the logits change by less, and still change."""
    mutation = BY_ID["pr-fp16-clamp"]
    engine, plain = engines.engine("bloom-tiny", "float16"), engines.plain("bloom-tiny", "float16")
    found = []
    for strength in reversed(mutation.strengths):
        with mutation.applied(engine, strength):
            found.append(distance(shown(engine), plain))
    assert 0 < found[0] < found[1]


def test_a_coarser_accumulator_is_less_exact(engines):
    """The accumulator that is rounded after each product is further off than one rounded after four of them."""
    mutation, model = BY_ID["pr-accumulate-half"], engines.engine("gpt2-tiny", "bfloat16").model
    layer = blocks(model)[2].mlp.c_proj
    x = torch.randn((50, layer.weight.shape[0]), generator=torch.Generator().manual_seed(3)).bfloat16()
    exact = x.double() @ layer.weight.double() + layer.bias.double()
    errors = [float((layer(x).double() - exact).norm())]
    for strength in reversed(mutation.strengths):
        with mutation.applied(engines.engine("gpt2-tiny", "bfloat16"), strength):
            errors.append(float((layer(x).double() - exact).norm()))
    assert errors == sorted(errors)
    assert errors[-1] > 5 * errors[0]


def test_the_other_kernel_of_attention_has_it_too(engines):
    """Softmax in 16 bits is there with eager attention and with the fused kernel, which is taken apart."""
    for kernel in ("eager", "sdpa"):
        engine = engines.engine("llama-tiny", "bfloat16", (("attn", kernel),))
        plain = shown(engine, STAGES[:1])
        with BY_ID["pr-softmax-half"].applied(engine):
            assert changed_at(shown(engine, STAGES[:1]), plain)


# --- the arithmetic ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mantissas_are_rounded_to_nearest(dtype):
    """To 10 bits: exact where they suffice, at most half a step off elsewhere, ties away from zero, signs kept."""
    exact = torch.tensor([0.0, 1.0, -1.5, 1 + 2**-10, 3 * 2.0**-20], dtype=dtype)
    assert torch.equal(operations.to_mantissa(exact, 10), exact)
    tie = torch.tensor([1 + 2**-11, -(1 + 2**-11)], dtype=dtype)
    assert operations.to_mantissa(tie, 10).tolist() == [1 + 2**-10, -(1 + 2**-10)]
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=dtype)
    error = (operations.to_mantissa(values, 10) - values).abs() / values.abs()
    assert 2**-13 < error.max() <= 2**-11


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_have_no_more_mantissa(dtype):
    """16-bit factors have 10 bits or fewer: TF32 leaves them alone."""
    values = torch.randn(100, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert operations.to_mantissa(values, 10) is values


def test_narrow_sums_stall():
    """In bfloat16 a running sum of ones stops at 256, whatever comes behind; more lanes come further."""
    ones = torch.ones(4096, dtype=torch.bfloat16)
    assert operations.narrow_sum(ones, 1).item() == 256
    assert operations.narrow_sum(ones, 8).item() == 2048
    assert operations.narrow_sum(ones, 16).item() == 4096
    assert operations.narrow_sum(torch.ones(5), 8).item() == 5


def test_attention_in_plain_steps_is_the_fused_one():
    """In float32 the replaced kernel gives what torch gives, for each kind of mask, grouped heads, padded rows."""
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn((2, heads, 5, 8), generator=generator) for heads in (6, 3, 3))
    seen = torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 1, 5, 5).clone()
    seen[0, :, :, :2] = False
    bias = torch.zeros(2, 1, 5, 5).masked_fill(~seen, torch.finfo(torch.float32).min)
    for options in (
        {"is_causal": True},
        {"attn_mask": seen},
        {"attn_mask": bias[1:].expand(2, 1, 5, 5)},
        {"scale": 0.1},
    ):
        attention = torch.nn.functional.scaled_dot_product_attention
        fused = attention(query, key, value, enable_gqa=True, **options)
        with operations.narrow_softmax(8):
            plain = attention(query, key, value, enable_gqa=True, **options)
        assert torch.allclose(plain, fused, atol=1e-5, rtol=1e-5)
