import copy
import warnings

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from harness.engines import float64, hf
from harness.engines.float64 import Audit, Float64Lift
from harness.engines.spec import parse_spec
from harness.values import Request
from tests.engines.recorder import largest_difference, recorded
from tests.rope import inv_freq_by_hand
from tests.support import VOCABULARY, config_of, random_model

KINDS = ("bloom", "gpt2", "llama")
THETA = 10_000.0
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
REQUESTS = (
    Request(id="a", prompt_ids=tuple(range(5, 42)), max_new_tokens=3),
    Request(id="b", prompt_ids=(17, 200, 4), max_new_tokens=3),
)
CONTINUATIONS = ((7, 8, 9), (44, 3, 120))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """One model directory of each kind, float32 weights, no tokenizer."""
    root = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        random_model(kind).save_pretrained(root / kind)
    return root


def float64_engine(directory):
    """The closed float64 engine of a model directory."""
    return hf.build(parse_spec("hf:dtype=float64"), model=str(directory))


def shown(engine):
    """All logits of one pass, prompt by prompt: BLOOM's `.double()` gives NaN beside padding."""
    return recorded(engine, "prefill", REQUESTS, CONTINUATIONS, batch_size=1)


# --- the lift --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "narrow",
    [
        lambda x: x.float(),
        lambda x: x.half(),
        lambda x: x.bfloat16(),
        lambda x: x.to(torch.float32),
        lambda x: x.to("cpu", torch.bfloat16),
        lambda x: x.to(dtype=torch.float16),
        lambda x: x.type(torch.float32),
        lambda x: torch.softmax(x, dim=-1, dtype=torch.float32),
        lambda x: torch.nn.functional.softmax(x, dim=-1, dtype=torch.float32),
        lambda x: x.mean(dim=-1, dtype=torch.float32),
        lambda x: x.new_zeros(3, dtype=torch.float32),
        lambda _: torch.zeros(3, dtype=torch.float32),
        lambda _: torch.tensor([1.0], dtype=torch.bfloat16),
        lambda _: torch.arange(4, dtype=torch.float32),
        lambda x: torch.empty_like(x, dtype=torch.float16),
    ],
)
def test_a_request_for_less_gives_float64(narrow):
    """Each way of asking for a narrower float gives float64 while the lift is active, and what was asked after it."""
    value = torch.rand(5, dtype=torch.float64)
    with Float64Lift(), Audit() as audit:
        assert narrow(value).dtype == torch.float64
    assert audit.violations == []
    assert narrow(value).dtype != torch.float64


def test_the_lift_leaves_other_types_alone():
    """Integers, booleans and float64 itself are what they were."""
    value = torch.rand(3, dtype=torch.float64)
    with Float64Lift():
        assert value.to(torch.int64).dtype == torch.int64
        assert value.to(torch.bool).dtype == torch.bool
        assert torch.equal(value.double(), value)
        assert torch.equal(value.float(), value)


# --- the audit -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_lifted_models_are_clean(models, kind):
    """No operation of a padded prefill and a decode step makes a float below 64 bits."""
    with float64_engine(models / kind) as engine:
        assert hf.audit_float64(engine) == []
        assert all(p.dtype == torch.float64 for p in engine.model.parameters())
        assert all(b.dtype == torch.float64 for b in engine.model.buffers() if b.is_floating_point())
        assert engine.settings["attn"] == "eager"


@pytest.mark.parametrize("kind", ["bloom", "llama"])
def test_double_alone_fails_the_audit(kind):
    """`model.double()` casts to float32 inside, and the audit names the operations that do."""
    with hf.from_model(random_model(kind).double()) as engine:
        violations = hf.audit_float64(engine)
    assert "aten._to_copy.default makes float32" in violations
    assert violations == sorted(set(violations))


def _by_numpy(hidden):
    return torch.from_numpy(hidden.numpy().astype(np.float32)).double()


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)

    @torch.jit.script
    def _by_script(hidden):
        # type: (torch.Tensor) -> torch.Tensor
        return hidden.to(torch.float32).to(torch.float64)


@pytest.mark.parametrize(
    "hide",
    [
        _by_numpy,
        _by_script,
        lambda hidden: torch.FloatTensor(hidden.tolist()).double(),
        lambda hidden: hidden.type("torch.FloatTensor").double(),
        lambda hidden: hidden + torch.zeros(1),
    ],
    ids=["numpy", "torchscript", "constructor", "type name", "default dtype"],
)
def test_a_hidden_cast_is_seen(models, hide):
    """A cast that the lift cannot reach is found by the audit: what it says is what a run without it does."""
    with float64_engine(models / "llama") as engine:
        plain = shown(engine)
        mlp = engine.model.model.layers[1].mlp
        forward = mlp.forward
        mlp.forward = lambda hidden: forward(hide(hidden))
        violations = hf.audit_float64(engine)
        changed = largest_difference(shown(engine), plain)
    assert violations
    assert all("makes float32" in each for each in violations)
    if "zeros" not in violations[0]:
        assert changed > 0, "the cast was real, and the audit must not lift it away"


def test_an_audit_that_saw_nothing_is_no_proof(models, monkeypatch):
    """An audit without a single operation fails."""
    monkeypatch.setattr(float64, "audited_steps", lambda _engine: None)
    with float64_engine(models / "gpt2") as engine:
        assert hf.audit_float64(engine) == ["the audit saw no operation at all"]


def test_the_audit_covers_padding_and_decoding(models, monkeypatch):
    """The audited steps are a left-padded batch and steps with a cache: both have code of their own."""
    masks = []
    with float64_engine(models / "llama") as engine:
        step = engine._step

        def seen(ids, positions, mask, cache, keep):
            masks.append((tuple(ids.shape), int(mask.min())))
            return step(ids, positions, mask, cache, keep)

        monkeypatch.setattr(engine, "_step", seen)
        hf.audit_float64(engine)
    assert masks == [((2, 8), 0), ((2, 1), 0)]


def test_an_empty_tensor_is_no_violation():
    """A float32 tensor without elements rounds nothing."""
    with Audit() as audit:
        torch.zeros(0)
    assert audit.violations == []
    assert audit.operations == 1


# --- what float64 is worth -------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", [None, LLAMA3], ids=["plain", "llama3"])
def test_rope_is_derived_in_float64(tmp_path, scaling):
    """The frequencies are computed from the config in float64 (to 1e-15), not widened from float32 ones."""
    shape = {**config_of("llama"), "head_dim": 24, "rope_theta": THETA, "rope_scaling": copy.copy(scaling)}
    config = AutoConfig.for_model("llama", vocab_size=VOCABULARY, **shape)
    native = type(random_model("llama"))(config)
    expected = np.array(inv_freq_by_hand(24, THETA, scaling))
    wide = hf.to_float64(native, config).model.rotary_emb.inv_freq
    assert wide.dtype == torch.float64
    assert wide.numpy() == pytest.approx(expected, rel=1e-15, abs=0)
    narrow = native.model.rotary_emb.inv_freq.double().numpy()
    assert narrow == pytest.approx(expected, rel=1e-6)
    assert np.abs(narrow / expected - 1).max() > 1e-9, "float32 tables are told apart"
    if scaling is not None:
        assert (expected < np.array(inv_freq_by_hand(24, THETA))).sum() >= 2, "some frequencies are scaled"


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_the_checkpoints(models, kind):
    """Every parameter and stored buffer of the float64 model equals the checkpoint's, to the last bit."""
    with hf.build(parse_spec("hf"), model=str(models / kind)) as native, float64_engine(models / kind) as wide:
        narrow, exact = native.model.state_dict(), wide.model.state_dict()
        assert narrow.keys() == exact.keys()
        assert all(torch.equal(exact[name].double(), narrow[name].double()) for name in narrow)
        tied = kind != "llama"
        embedding, head = wide.model.get_input_embeddings(), wide.model.get_output_embeddings()
        assert (embedding.weight.data_ptr() == head.weight.data_ptr()) is tied


@pytest.mark.parametrize(("kind", "casts"), [("llama", True), ("bloom", True), ("gpt2", False)])
def test_double_alone_is_not_float64(models, kind, casts):
    """`.double()` is off by a share of float32's own round-off on models that cast inside, and exact on GPT-2."""
    with float64_engine(models / kind) as engine:
        truth = shown(engine)
    with hf.from_model(random_model(kind).double()) as engine:
        doubled = largest_difference(shown(engine), truth)
    with hf.from_model(random_model(kind)) as engine:
        single = largest_difference(shown(engine), truth)
    print(f"{kind}: .double() is off by {doubled:.2g}, float32 by {single:.2g}")
    assert doubled < single
    assert (doubled > single / 1000) if casts else (doubled < 1e-12)


def test_default_dtype_is_put_back(models):
    """Torch's default float and the lift are gone after the model is built, and after it failed to be."""
    with float64_engine(models / "llama"):
        assert torch.zeros(1).dtype == torch.float32
    with hf.default_dtype(torch.float64):
        assert torch.zeros(1).dtype == torch.float64
    with pytest.raises(RuntimeError), hf.default_dtype(torch.float64):
        torch.zeros(-1)
    assert torch.get_default_dtype() == torch.float32
