"""Bugs of quantised weights add what a wrong reading of codes and scales gives, change the logits, and are undone."""

import numpy as np
import pytest
import torch

from harness.engines.hf import block_layers
from harness.mutations.mutation import catalogue, weight_rows
from harness.mutations.quantisation import _FP4, _NF4, MUTATIONS
from harness.numerics import quantise
from tests.mutations.applied import (
    Opened,
    cases,
    check_16_bits,
    check_changes,
    check_described,
    check_undone_after_an_error,
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
    """In fp16, and in the float32 copy of that."""
    check_16_bits(opened, mutation, "bloom-tiny", "float16")


def test_they_say_what_they_are():
    """Ids, hosts and references are in form."""
    check_described(MUTATIONS)


def test_a_host_without_a_square_weight_is_refused(opened):
    """Scales along the other side fit nowhere in Llama."""
    engine = opened.engine("llama-tiny")
    with unharmed(engine), pytest.raises(LookupError), BY_ID["q-scale-axis"].applied(engine):
        pass


def weights(engine):
    """Name -> weight [out, in] of each layer of the blocks, a copy."""
    return {name: weight_rows(layer).clone() for name, layer, _ in block_layers(engine.model)}


def grouped(rows, size):
    """[out, in] -> [out, groups, size], the last group padded with zeros."""
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % size)).unflatten(1, (-1, size))


# --- int4 --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama-tiny", "gpt2-tiny"])
def int4(request, opened):
    """An engine whose weights are on the grid of int4, with codes and scales [out, groups, 32 or 1] by layer."""
    engine = opened.engine(request.param, "float32", weights="int4")
    found = {}
    for name, rows in weights(engine).items():
        groups = grouped(rows, quantise.SCHEMES["int4"][1])
        scale = groups.abs().amax(dim=-1, keepdim=True) / 7
        codes = (groups / torch.where(scale == 0, 1.0, scale)).round()
        torch.testing.assert_close(codes * scale, groups, rtol=1e-6, atol=0)
        found[name] = codes.to(torch.int64), scale
    return engine, found


def assert_read(engine, int4_layers, name, read):
    """A mutation leaves the weights that ``read`` makes of codes and scales, and does change them."""
    with unharmed(engine), BY_ID[name].applied(engine):
        found = weights(engine)
    wrong = 0
    for layer, (codes, scale) in int4_layers.items():
        expected = (read(codes) * scale).flatten(1)[:, : found[layer].shape[1]]
        torch.testing.assert_close(found[layer], expected, rtol=1e-5, atol=1e-7)
        wrong += int((read(codes) != codes).sum())
    assert wrong


def test_a_zero_point_of_nine(int4):
    """Every code is taken for one less."""
    assert_read(*int4, "q-zp-v1v2", lambda codes: codes - 1)


def test_bytes_of_a_word_borrow_from_each_other(int4):
    """In real arithmetic on 32-bit words: four codes plus 8, a byte each, less 8 in each byte."""

    def read(codes):
        stored = (codes + 8).numpy().astype(np.uint8)
        words = stored.reshape(-1).view("<u4") - np.uint32(0x08080808)
        return torch.from_numpy(words.view(np.int8).reshape(stored.shape).astype(np.int64))

    assert_read(*int4, "q-int4-borrow", read)


def test_a_weaker_borrow_hits_fewer_words(opened):
    """A tenth of the strength hits a tenth of the words."""
    engine = opened.engine("bloom-tiny")
    before = torch.cat([rows.flatten() for rows in weights(engine).values()])
    counts = []
    for strength in (1.0, 0.1):
        with BY_ID["q-int4-borrow"].applied(engine, strength):
            after = torch.cat([rows.flatten() for rows in weights(engine).values()])
        counts.append(int((after != before).sum()))
    assert counts[1] / counts[0] == pytest.approx(0.1, rel=0.05)


def test_zero_points_that_are_junk(opened):
    """One layer is off, by one whole number of steps for each group, between -7 and 8."""
    engine = opened.engine("llama-tiny")
    before = weights(engine)
    with BY_ID["q-sym-as-asym"].applied(engine):
        after = weights(engine)
    assert [name for name in before if not torch.equal(before[name], after[name])] == [
        "model.layers.1.self_attn.o_proj"
    ]
    right, wrong = before["model.layers.1.self_attn.o_proj"], after["model.layers.1.self_attn.o_proj"]
    steps = grouped(wrong - right, 32) / (grouped(right, 32).abs().amax(dim=-1, keepdim=True) / 7)
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-5)
    assert torch.equal(steps.round(), steps.round()[..., :1].expand_as(steps))
    assert {int(steps.min().round()), int(steps.max().round())} == {-7, 8}


# --- other formats -----------------------------------------------------------------------------


def test_codes_of_nf4_in_the_table_of_fp4(opened):
    """For each block of 1,024 the difference of the two tables at the nearest code, times the largest weight."""
    engine, name = opened.engine("bloom-tiny"), "transformer.h.0.mlp.dense_h_to_4h"
    right = weights(engine)[name]
    with BY_ID["q-blocksize"].applied(engine):
        added = (weights(engine)[name] - right).flatten().unflatten(0, (-1, 1024))
    blocks = right.flatten().unflatten(0, (-1, 1024)).numpy()
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    codes = np.abs(blocks[..., None] / largest[..., None] - np.array(_NF4)).argmin(axis=-1)
    fp4 = np.array([*_FP4, *(-value for value in _FP4)])
    np.testing.assert_allclose(added.numpy(), (fp4[codes] - np.array(_NF4)[codes]) * largest, atol=1e-6)


def test_scales_that_are_read_raw(opened):
    """Each block of 64 is as if its largest weight were between 0 and 1, whatever it is."""
    engine, name = opened.engine("bloom-tiny"), "transformer.h.0.mlp.dense_h_to_4h"
    right = weights(engine)[name]
    with BY_ID["q-nested-absmax"].applied(engine):
        added = (weights(engine)[name] - right).flatten().unflatten(0, (-1, 64))
    largest = right.flatten().unflatten(0, (-1, 64)).abs().amax(dim=1)
    # The largest weight has code 1 or -1: what is added to it is the error of the scale.
    scales = added.abs().amax(dim=1) + largest
    assert 0 < float(scales.min()) < float(scales.max()) <= 1.0 + 1e-6
    assert float(largest.max()) < 1
    torch.testing.assert_close(scales * 255, (scales * 255).round(), rtol=0, atol=1e-3)
    assert float(torch.corrcoef(torch.stack([scales, largest]))[0, 1]) > 0.99


def test_scales_along_the_other_side(opened):
    """int8 codes of a square weight, each times the scale of its column."""
    engine = opened.engine("gpt2-tiny")
    before = weights(engine)
    with BY_ID["q-scale-axis"].applied(engine):
        after = weights(engine)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == [f"transformer.h.{layer}.attn.c_proj" for layer in range(5)]
    rows = before[changed[0]].float()
    scale = rows.abs().amax(dim=1) / 127
    codes = (rows / scale[:, None]).round()
    expected = rows + codes * scale - codes * scale[:, None]
    torch.testing.assert_close(after[changed[0]].float(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("host", "names"),
    [
        ("bloom-tiny", ["transformer.h.0.self_attention.query_key_value"]),
        ("gpt2-tiny", ["transformer.h.0.attn.c_attn"]),
        ("llama-tiny", ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"]),
    ],
)
def test_a_shared_scale_loses_small_weights_alone(opened, host, names):
    """What is added is below half a step of the smallest numbers of e4m3 at the shared scale, 16 times as coarse."""
    engine = opened.engine(host)
    before = weights(engine)
    with BY_ID["q-shared-scale"].applied(engine):
        after = weights(engine)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed[0] == names[0]
    assert set(changed) <= {name for name in before if name.endswith(tuple(one.rpartition(".")[2] for one in names))}
    for name in names:
        moved = before[name] != after[name]
        step = 16 * before[name].abs().amax() / 448 * 2**-9
        assert float((after[name] - before[name]).abs().max()) <= float(step)
        # From 2^-6 on, numbers are as fine at either scale.
        assert float(before[name][moved].abs().max() if moved.any() else 0) < 16 * float(step) * 8
        assert float(moved.double().mean()) < 0.2
