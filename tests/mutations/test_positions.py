"""Bugs of positions: each changes what it says, where it says so, by the maths of the report, and goes away again."""

import math

import pytest
import torch
from transformers.models.llama import modeling_llama

from harness.mutations import hosts
from harness.mutations.positions import MUTATIONS
from tests.mutations.applied import cases
from tests.mutations.trials import (
    LONG,
    Trials,
    changed,
    check_active,
    check_precisions,
    check_strengths,
    check_undone,
    shown,
)
from tests.rope import inv_freq_by_hand

BY_ID = {mutation.id: mutation for mutation in MUTATIONS}
LONG_FROM = {"llama-scaled": 64, "llama-tiny": 128}
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
    check_active(trials, mutation, host, long=LONG_FROM.get(host, 0))


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
        ("pos-invfreq-bf16", "gpt2-tiny"),
        ("pos-theta-default", "llama-tiny"),
        ("pos-llama3-scaling", "llama-untied"),
        ("pos-rope-style", "gpt2-tiny"),
        ("pos-partial-rotary-stale", "llama-tiny"),
        ("pos-double", "gpt2-tiny"),
        ("pos-leftpad-shared", "bloom-tiny"),
        ("pos-learned-offset", "llama-tiny"),
        ("pos-alibi-npo2", "llama-tiny"),
        ("pos-alibi-scale", "llama-tiny"),
        ("pos-alibi-decode-dropped", "llama-tiny"),
    ],
)
def test_a_host_without_the_part_is_refused(trials, name, host):
    """On entry, instead of changing nothing."""
    with pytest.raises(LookupError), BY_ID[name].applied(trials.engine(host)):
        pass


# --- the maths of each -----------------------------------------------------------------------------


def frequencies(trials, name, host, strength=1.0):
    """The table of frequencies inside the block."""
    engine = trials.engine(host)
    with BY_ID[name].applied(engine, strength):
        return engine.model.model.rotary_emb.inv_freq.tolist()


def test_frequencies_are_those_of_another_theta_or_of_no_scaling(trials):
    """They are the powers of the default theta, or of the config's own without llama3 scaling, derived by hand."""
    assert frequencies(trials, "pos-theta-default", "llama-untied") == pytest.approx(
        inv_freq_by_hand(16, 1e4), rel=1e-14
    )
    assert frequencies(trials, "pos-llama3-scaling", "llama-tiny") == pytest.approx(
        inv_freq_by_hand(16, 1e4), rel=1e-14
    )
    half_way = frequencies(trials, "pos-theta-default", "llama-untied", 0.5)
    assert half_way == pytest.approx(inv_freq_by_hand(16, math.sqrt(1e4 * 5e5)), rel=1e-14)


def test_frequencies_have_eight_bits(trials):
    """Each is the nearest number of 8 significant bits, as in bf16."""
    engine = trials.engine("llama-tiny")
    for right, wrong in zip(
        engine.model.model.rotary_emb.inv_freq.tolist(),
        frequencies(trials, "pos-invfreq-bf16", "llama-tiny"),
        strict=True,
    ):
        mantissa, exponent = math.frexp(right)
        assert wrong == math.ldexp(round(mantissa * 256), exponent - 8)


def test_neighbours_are_turned(monkeypatch):
    """The logits are those of a Llama whose rotation is GPT-J's, (2i, 2i+1) by frequency i."""

    def interleaved(query, key, cos, sin, unsqueeze_dim=1):
        half = cos.shape[-1] // 2
        cos, sin = (table[..., :half].unsqueeze(unsqueeze_dim) for table in (cos, sin))
        return tuple(
            torch.stack(
                [x[..., 0::2] * cos - x[..., 1::2] * sin, x[..., 1::2] * cos + x[..., 0::2] * sin], dim=-1
            ).flatten(-2)
            for x in (query, key)
        )

    model = hosts.build("llama-scaled", "float32")
    ids = torch.tensor([list(range(5, 30))])
    with torch.no_grad(), BY_ID["pos-rope-style"].applied(Live(model)):
        found = model(input_ids=ids).logits
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(modeling_llama, "apply_rotary_pos_emb", interleaved)
        wanted = model(input_ids=ids).logits
    assert torch.allclose(found, wanted, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(model(input_ids=ids).logits, wanted, atol=0.1)


class Live:
    """As much of an engine as a change of the model needs."""

    def __init__(self, model):
        self.model = model


def test_the_base_grows_as_in_transformers(trials):
    """The enlarged frequencies are those that dynamic scaling computes for the same length."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from harness.mutations.positions import _grown

    model = trials.engine("llama-ntk").model
    plain = torch.tensor(inv_freq_by_hand(16, 1e4), dtype=torch.float64)
    with trials.engine("llama-ntk")._lift():
        wanted, _ = ROPE_INIT_FUNCTIONS["dynamic"](model.config, model.device, seq_len=200)
    assert torch.allclose(_grown(model, plain, 200, 1.0), wanted, rtol=1e-12, atol=0)


def test_the_order_of_requests_matters_to_what_is_not_reset(trials):
    """A short request is right before a long one, and wrong after it."""
    engine, short, long = trials.engine("llama-tiny"), slice(1, 2), slice(0, 1)
    with BY_ID["pos-ntk-not-reset"].applied(engine):
        first, _, second = (prefilled(engine, which) for which in (short, long, short))
    assert torch.equal(first, prefilled(engine, short))
    assert float((first - second).abs().max()) > 0.1


def prefilled(engine, which):
    """All logits of some of the trials' requests, [N, V]."""
    from tests.engines.recorder import recorded
    from tests.mutations.trials import CONTINUATIONS, REQUESTS

    return torch.stack(list(recorded(engine, "prefill", REQUESTS[which], CONTINUATIONS[which], batch_size=1).values()))


def test_passed_dims_are_those_of_the_step_before(trials):
    """In decode q has the rotated dims of its own token and the others of the token before; k is its own."""
    engine = trials.engine("stablelm-partial")
    seen = []
    attention = engine.model.model.layers[0].self_attn
    layer = attention.q_proj
    handle = layer.register_forward_hook(lambda _m, _a, output: seen.append(output.unflatten(-1, (6, 12))[:, -1]))
    try:
        shown(engine, ("replay", 3))
        right, seen[:] = list(seen), []
        handle.remove()
        with BY_ID["pos-partial-rotary-stale"].applied(engine):
            handle = layer.register_forward_hook(
                lambda _m, _a, output: seen.append(output.unflatten(-1, (6, 12))[:, -1])
            )
            shown(engine, ("replay", 3))
    finally:
        handle.remove()
    assert len(seen) == len(right) == 3
    assert torch.equal(seen[0], right[0])
    for step in (1, 2):
        assert torch.equal(seen[step][..., :6], right[step][..., :6])
        assert torch.equal(seen[step][..., 6:], right[step - 1][..., 6:])
        assert not torch.equal(seen[step][..., 6:], right[step][..., 6:])


def positions_seen(engine, run=("replay", 3)):
    """The position ids that the model gets, pass by pass."""
    seen = []
    table = getattr(engine.model, "transformer", engine.model)
    inner = getattr(table, "wpe", None) or engine.model.model.rotary_emb
    handle = inner.register_forward_pre_hook(
        lambda _m, args, given: seen.append(given.get("position_ids", args[-1] if args else None)), with_kwargs=True
    )
    try:
        shown(engine, run)
    finally:
        handle.remove()
    return seen


def test_one_vector_of_positions_serves_all_rows(trials):
    """GPT-2's rows all count the columns of the batch, and go on from there."""
    engine = trials.engine("gpt2-tiny")
    with BY_ID["pos-leftpad-shared"].applied(engine):
        prompt, *steps = positions_seen(engine)
    assert torch.equal(prompt, torch.arange(LONG).expand(3, -1))
    assert [step.tolist() for step in steps] == [[[LONG]] * 3, [[LONG + 1]] * 3]


def test_llama_goes_on_from_the_unpadded_length(trials):
    """Under RoPE the prompt's shift is harmless; what shows is that decode goes by each row's own length."""
    engine = trials.engine("llama-tiny")
    with BY_ID["pos-leftpad-shared"].applied(engine):
        prompt, first, _ = positions_seen(engine)
    assert torch.equal(prompt, torch.arange(LONG).expand(3, -1))
    assert first.tolist() == [[140], [9], [38]]
    found = changed(
        right_with(trials, "pos-leftpad-shared", "llama-tiny"), trials.right("llama-tiny", (), ("prefill", 3))
    )
    assert max(found.values(), default=0.0) < 1e-10


def right_with(trials, name, host):
    """The prefill of a padded batch with a bug."""
    engine = trials.engine(host)
    with BY_ID[name].applied(engine):
        return shown(engine, ("prefill", 3))


@pytest.mark.parametrize(
    ("name", "host", "strength", "wanted"),
    [
        ("pos-double", "llama-tiny", 1.0, [0, 2, 4, 280]),
        ("pos-double", "llama-tiny", 0.5, [0, 1.5, 3, 210]),
        ("pos-decode-zero", "gpt2-tiny", 1.0, [0, 1, 2, 0]),
        ("pos-learned-offset", "gpt2-tiny", 1.0, [0, 0, 0, 138]),
    ],
)
def test_positions_are_the_wrong_ones(trials, name, host, strength, wanted):
    """The first three of the long prompt, and that of the first decode step."""
    engine = trials.engine(host)
    with BY_ID[name].applied(engine, strength):
        prompt, step = positions_seen(engine, SINGLE)[:2]
    assert [*prompt[0, :3].tolist(), *step[0].tolist()] == wanted


def alibi(trials, name, strength=1.0):
    """Bias [H, S] of a row of four tokens behind two of padding."""
    engine = trials.engine("bloom-tiny")
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    with BY_ID[name].applied(engine, strength):
        found = engine.model.transformer.build_alibi_tensor(mask, 6, torch.float64)
    assert found.shape == (6, 1, 6)
    return found[:, 0]


#: For six heads: four of the power of 2 below, then every other one of the power above.
SLOPES = [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]


@pytest.mark.parametrize(
    ("name", "slopes"),
    [
        ("pos-alibi-npo2", [2 ** (-8 * (h + 1) / 6) for h in range(6)]),
        ("pos-alibi-rank-slopes", SLOPES[:3] * 2),
    ],
)
def test_slopes_are_the_wrong_ones(trials, name, slopes):
    """Slope times position, 0 on padding; for strength 0 the slopes are those of Press et al. for six heads."""
    places = torch.tensor([0, 0, 0, 1, 2, 3], dtype=torch.float64)
    for strength, wanted in ((1.0, slopes), (0.0, SLOPES)):
        expected = torch.tensor(wanted, dtype=torch.float64)[:, None] * places
        assert torch.allclose(alibi(trials, name, strength), expected, rtol=1e-14, atol=0)


def test_the_bias_is_scaled_with_the_scores(trials):
    """The factor of ALiBi is 1/sqrt(24), that of the scores stays."""
    engine = trials.engine("bloom-tiny")
    with BY_ID["pos-alibi-scale"].applied(engine):
        found = {
            (block.self_attention.beta, block.self_attention.inv_norm_factor) for block in engine.model.transformer.h
        }
    assert len(found) == 1
    assert found.pop() == pytest.approx((24**-0.5, 24**-0.5), rel=1e-15)


def test_references_are_those_of_the_catalogue():
    """Sixteen bugs or fewer are listed in this section; each has an id of it, one line, and a report but one."""
    assert all(mutation.id.startswith("pos-") and mutation.group == "positions" for mutation in MUTATIONS)
    assert [mutation.id for mutation in MUTATIONS if not mutation.reference] == ["pos-alibi-rank-slopes"]
    assert all(mutation.hosts <= set(hosts.NAMES) and "\n" not in mutation.wrong for mutation in MUTATIONS)
