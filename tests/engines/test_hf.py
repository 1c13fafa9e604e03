import json
import os
import pickle
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.engines import build_engine, hf, hooks
from harness.engines.spec import parse_spec
from harness.environment import thread_count
from harness.errors import EngineError, ModelError, SuiteError, UsageError
from harness.numerics import metrics, quantise
from harness.numerics.constants import EFFECT, TOP
from harness.numerics.sketch import Sketcher
from harness.suites import load_suite
from harness.values import NOT_USED, Request
from tests.engines.recorder import largest_difference, recorded
from tests.support import SUITE, VOCABULARY, random_model, write_model, write_suite

KINDS = ("bloom", "gpt2", "llama")
REQUESTS = (
    Request(id="long", prompt_ids=tuple(range(5, 42)), max_new_tokens=9),
    Request(id="one", prompt_ids=(17,), max_new_tokens=12),
    Request(id="short", prompt_ids=(200, 3, 44, 44, 9), max_new_tokens=4),
)
CONTINUATIONS = ((7, 8, 9, 10), (44, 3, 120, 9, 9, 61), (250, 2))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """One model directory of each kind, float32 weights, no tokenizer."""
    root = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        random_model(kind).save_pretrained(root / kind)
    return root


@pytest.fixture
def model(models):
    """The llama's directory as text."""
    return str(models / "llama")


@pytest.fixture
def copied(models, tmp_path):
    """A copy of the llama's directory to break."""
    return Path(shutil.copytree(models / "llama", tmp_path / "model"))


def opened(text, model):
    """The engine of a spec, closed."""
    return hf.build(parse_spec(text), model=str(model))


def shown(engine, view, *, batch_size=None, **more):
    """The rows of one view of REQUESTS."""
    sketcher = Sketcher(engine.vocabulary)
    getattr(engine, view)(REQUESTS, CONTINUATIONS, batch_size=batch_size, sketcher=sketcher, **more)
    return sketcher.rows()


def error_of(rows, truth):
    """Length of the error of each row against another."""
    return metrics.error_norm(rows.projections, truth.projections)


# --- free runs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_free_tokens_are_those_of_generate(models, kind):
    """Our decode loop gives token for token what transformers' own `generate` gives, one prompt at a time."""
    with opened("hf", models / kind) as engine:
        ours = engine.generate(REQUESTS, batch_size=1, stop_ids=engine.stop_ids)
        assert engine.stop_ids == {2}
        theirs = [
            engine.model.generate(
                torch.tensor([request.prompt_ids]),
                attention_mask=torch.ones((1, len(request.prompt_ids)), dtype=torch.int64),
                max_new_tokens=request.max_new_tokens,
                do_sample=False,
            )[0, len(request.prompt_ids) :].tolist()
            for request in REQUESTS
        ]
    assert [list(each.tokens) for each in ours] == theirs
    assert len({token for tokens in theirs for token in tokens}) > 5, "a constant text would show nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_a_left_padded_batch_is_batch_one(models, kind):
    """In float64 a batch of unequal prompts gives each prompt's own logits to 1e-9, on both views, and its tokens."""
    with opened("hf:dtype=float64", models / kind) as engine:
        for view in ("replay", "prefill"):
            alone, batch = (recorded(engine, view, REQUESTS, CONTINUATIONS, batch_size=size) for size in (1, 3))
            assert alone.keys() == batch.keys()
            assert largest_difference(batch, alone) < 1e-9
        one, three = (engine.generate(REQUESTS, batch_size=size, stop_ids=frozenset()) for size in (1, 3))
    assert one == three


@pytest.mark.parametrize("kind", KINDS)
def test_a_left_padded_batch_is_batch_one_within_fp32(models, kind):
    """In fp32 a batch is no further from float64 than batch 1 is, within the effect size of a correct variant."""
    with opened("hf:dtype=float64", models / kind) as engine:
        truth = shown(engine, "replay")
    with opened("hf:dtype=float32", models / kind) as engine:
        alone, batch = (error_of(shown(engine, "replay", batch_size=size), truth) for size in (1, 3))
    assert np.sqrt(np.mean(batch**2)) <= EFFECT["float32"] * np.sqrt(np.mean(alone**2))
    assert alone.max() > 0, "fp32 rounds: an error of zero means that nothing was compared"


@pytest.mark.parametrize("kind", KINDS)
def test_replay_is_prefill(models, kind):
    """In float64 the decode loop and the single pass agree to 1e-9 at every generated position."""
    with opened("hf:dtype=float64", models / kind) as engine:
        replay, prefill = (recorded(engine, view, REQUESTS, CONTINUATIONS) for view in ("replay", "prefill"))
    assert len(replay) == sum(map(len, CONTINUATIONS))
    assert replay.keys() < prefill.keys()
    assert largest_difference(replay, prefill) < 1e-9
    assert torch.stack(list(prefill.values())).std() > 0.1, "flat logits would agree with anything"


@pytest.mark.parametrize("kind", KINDS)
def test_chunked_prefill_is_prefill(models, kind):
    """Feeding the sequence in pieces through the cache gives the logits of the single pass, to 1e-9 in float64."""
    with opened("hf:dtype=float64", models / kind) as engine:
        whole, chunked = (recorded(engine, "prefill", REQUESTS, CONTINUATIONS, chunk=chunk) for chunk in (None, 16))
    assert whole.keys() == chunked.keys()
    assert largest_difference(chunked, whole) < 1e-9


def test_replay_is_forced(model):
    """Replay shows the given tokens' prefixes, not the model's own: each row has its own token's log p."""
    with opened("hf:dtype=float64", model) as engine:
        rows = shown(engine, "replay")
        ids = torch.tensor([[*REQUESTS[1].prompt_ids, *CONTINUATIONS[1]]])
        logprobs = engine.model(input_ids=ids).logits[0].double().log_softmax(dim=-1)
    expected = [float(logprobs[step, token]) for step, token in enumerate(CONTINUATIONS[1])]
    assert rows.logp[rows.request == 1] == pytest.approx(expected, rel=1e-4)
    assert (rows.argmax[rows.request == 1] != CONTINUATIONS[1]).any()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_static_cache(models, kind):
    """A static cache really is one, gives the dynamic one's tokens, and agrees with it to 1e-9 in float64."""
    with opened("hf:dtype=float64", models / kind) as engine:
        dynamic = recorded(engine, "replay", REQUESTS, CONTINUATIONS)
        tokens = engine.generate(REQUESTS, batch_size=None, stop_ids=frozenset())
        assert engine.settings["cache"] == "DynamicCache"
    with opened("hf:dtype=float64,static_cache=true", models / kind) as engine:
        static = recorded(engine, "replay", REQUESTS, CONTINUATIONS)
        assert engine.settings["cache"] == engine.declared["cache"] == "StaticCache"
        assert engine.generate(REQUESTS, batch_size=None, stop_ids=frozenset()) == tokens
    assert largest_difference(static, dynamic) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_module_outputs(models, kind):
    """The blocks' outputs come one tensor a request, over all its tokens; the last one leads to the logits."""
    with opened("hf:dtype=float64", models / kind) as engine:
        outputs = engine.module_outputs(REQUESTS, CONTINUATIONS)
        assert list(outputs) == hooks.block_names(engine.model)
        lengths = [len(r.prompt_ids) + len(c) - 1 for r, c in zip(REQUESTS, CONTINUATIONS, strict=True)]
        assert all([len(each) for each in found] == lengths for found in outputs.values())
        norm = engine.model.model.norm if kind == "llama" else engine.model.transformer.ln_f
        with engine._lift():
            logits = engine.model.lm_head(norm(outputs[list(outputs)[-1]][1]))
        rows = shown(engine, "prefill")
        assert rows.argmax[rows.request == 1].tolist() == logits.argmax(dim=-1).tolist()
        assert not any(module._forward_hooks for module in engine.model.modules())


# --- chunks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "cache"),
    [*((kind, "") for kind in KINDS), ("gpt2", ",static_cache=true"), ("llama", ",static_cache=true")],
)
def test_chunked_is_whole(models, kind, cache):
    """In float64 prompts fed in chunks give the same tokens, and on both views the same logits to 1e-9."""
    with opened(f"hf:dtype=float64{cache}", models / kind) as engine:
        plain = {view: recorded(engine, view, REQUESTS, CONTINUATIONS, batch_size=3) for view in ("replay", "prefill")}
        tokens = engine.generate(REQUESTS, batch_size=3, stop_ids=frozenset())
    for chunk in (8, 11, 36):
        with opened(f"hf:dtype=float64,chunk={chunk}{cache}", models / kind) as engine:
            assert engine.generate(REQUESTS, batch_size=3, stop_ids=frozenset()) == tokens
            for view, whole in plain.items():
                chunked = recorded(engine, view, REQUESTS, CONTINUATIONS, batch_size=3)
                assert chunked.keys() == whole.keys()
                assert largest_difference(chunked, whole) < 1e-9


def test_the_chunks_are_those_asked_for(model):
    """Every view feeds pieces of the size asked for; a size that a caller gives wins over the option."""
    widths = []
    with opened("hf:chunk=16", model) as engine:
        step, engine._step = engine._step, lambda ids, *rest: widths.append(ids.shape[1]) or step(ids, *rest)
        engine.generate(REQUESTS[:1], batch_size=1, stop_ids=frozenset())
        shown(engine, "replay", batch_size=3)
        shown(engine, "prefill", batch_size=3)
        shown(engine, "prefill", batch_size=3, chunk=30)
    generate, replay = [16, 16, 5, *[1] * 8], [16, 16, 5, *[1] * 5]
    assert widths == [*generate, *replay, 16, 16, 8, 30, 10]


def test_a_chunk_that_no_prompt_filled_is_not_in_force(model):
    """The setting counts only once a sequence was longer than a chunk, so a chunk that never was is not vouched for."""
    with opened("hf:chunk=37", model) as engine:
        assert engine.declared["chunk"] == 37
        engine.generate(REQUESTS, batch_size=None, stop_ids=frozenset())
        shown(engine, "replay")
        assert engine.settings["chunk"] == NOT_USED
        shown(engine, "prefill")
        assert engine.settings["chunk"] == 37
    with opened("hf:chunk=36", model) as engine:
        shown(engine, "replay")
        assert engine.settings["chunk"] == 36
    with opened("hf", model) as engine:
        assert engine.settings["chunk"] is None
        assert "chunk" not in engine.declared


# --- what is shown ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_top_entries_are_those_of_the_logits(models, kind):
    """With show=top each step has the highest log-probabilities of the logits that show=logits has at that step."""
    with opened("hf:show=top", models / kind) as engine:
        found = engine.generate(REQUESTS, batch_size=1, stop_ids=engine.stop_ids)
    with opened("hf", models / kind) as engine:
        plain = engine.generate(REQUESTS, batch_size=1, stop_ids=engine.stop_ids)
        whole = recorded(engine, "replay", REQUESTS, [each.tokens for each in found], batch_size=1)
    assert [replace(each, top_ids=(), top_logits=()) for each in found] == plain
    for index, (request, each) in enumerate(zip(REQUESTS, found, strict=True)):
        assert len(each.top_ids) == len(each.top_logits) == len(each.tokens)
        for step, (ids, values) in enumerate(zip(each.top_ids, each.top_logits, strict=True)):
            logprobs = whole[index, len(request.prompt_ids) + step].float().log_softmax(dim=-1)
            assert list(values) == logprobs.topk(TOP).values.tolist()
            assert list(values) == logprobs[list(ids)].tolist()
            assert ids[0] == each.tokens[step]


@pytest.mark.parametrize(("show", "more"), [("tokens", set()), ("top", {"top_logprobs"})])
def test_a_served_model_shows_no_logits(model, show, more):
    """Tokens, or tokens and their best neighbours, and an error for whoever asks for more."""
    with opened(f"hf:show={show}", model) as engine:
        assert engine.capabilities == {"tokens", "batch", "deterministic"} | more
        assert bool(engine.generate(REQUESTS, batch_size=None, stop_ids=frozenset())[0].top_ids) is (show == "top")
        for call in (
            lambda: shown(engine, "replay"),
            lambda: shown(engine, "prefill"),
            lambda: engine.module_outputs(REQUESTS, CONTINUATIONS),
            lambda: engine.upcast(),
        ):
            with pytest.raises(EngineError, match=f"show={show}"):
                call()


def test_a_live_model_shows_its_logits(model):
    """Logits are what is shown where nothing else is asked for, by a live model always."""
    for engine in (hf.from_model(random_model("llama")), opened("hf", model), opened("hf:show=logits", model)):
        with engine:
            assert {"logits", "replay", "upcast", "deterministic"} < engine.capabilities
            assert "top_logprobs" not in engine.capabilities
            assert not engine.generate(REQUESTS, batch_size=None, stop_ids=frozenset())[0].top_ids


# --- quantised weights -----------------------------------------------------------------------------


def parameters_of(text, directory):
    """The parameters of an opened engine by name."""
    with opened(text, directory) as engine:
        return {name: parameter.detach().clone() for name, parameter in engine.model.named_parameters()}


LAYERS = {
    "bloom": ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "gpt2": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    "llama": (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [None, "float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_blocks_are_quantised_and_nothing_else(models, kind, scheme, dtype):
    """Each Linear and Conv1D of the blocks is what the quantiser makes of the checkpoint's; all else is as loaded."""
    option = "" if dtype is None else f",dtype={dtype}"
    native, plain = parameters_of("hf", models / kind), parameters_of(f"hf:{option}", models / kind)
    found = parameters_of(f"hf:weights={scheme}{option}", models / kind)
    prefix = "model.layers" if kind == "llama" else "transformer.h"
    names = {f"{prefix}.{block}.{layer}.weight" for block in (0, 1) for layer in LAYERS[kind]}
    assert found.keys() == plain.keys() == native.keys()
    assert names < found.keys()
    for name, weight in found.items():
        assert weight.dtype == plain[name].dtype
        if name in names:
            rounded = quantise.dequantised(native[name], scheme, input_dim=0 if kind == "gpt2" else 1)
            assert torch.equal(weight, rounded.to(weight.dtype))
            assert not torch.equal(weight, plain[name])
        else:
            assert torch.equal(weight, plain[name])


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_weights_move_the_logits(models, kind):
    """In float64 int8 moves every logit row, int4 moves it more; the tied and the untied head stay bit for bit."""
    errors = []
    with opened("hf:dtype=float64", models / kind) as engine:
        truth, head = shown(engine, "prefill"), engine.model.get_output_embeddings().weight.clone()
        embedding = engine.model.get_input_embeddings().weight.clone()
    for scheme in ("int8", "int4"):
        with opened(f"hf:dtype=float64,weights={scheme}", models / kind) as engine:
            errors.append(error_of(shown(engine, "prefill"), truth))
            assert torch.equal(engine.model.get_output_embeddings().weight, head)
            assert torch.equal(engine.model.get_input_embeddings().weight, embedding)
            assert hf.audit_float64(engine) == []
    assert (errors[0] > 0).all()
    assert 2 * np.sqrt(np.mean(errors[0] ** 2)) < np.sqrt(np.mean(errors[1] ** 2))


def test_a_16_bit_checkpoint_is_not_rounded_again(tmp_path):
    """Dequantised values of a bf16 checkpoint reach float64 from float32 and keep the bits that bf16 has not."""
    random_model("llama", dtype="bfloat16").save_pretrained(tmp_path)
    name = "model.layers.0.mlp.down_proj.weight"
    native = parameters_of("hf", tmp_path)[name]
    for dtype in ("float64", "float32"):
        found = parameters_of(f"hf:dtype={dtype},weights=int8", tmp_path)[name]
        assert torch.equal(found.float(), quantise.dequantised(native, "int8", input_dim=1))
        assert not torch.equal(found.bfloat16().to(found.dtype), found)
    with opened("hf:weights=int8", tmp_path) as engine:
        assert engine.settings["dtype"] == "bfloat16"


@pytest.mark.parametrize("weights", ["int4", "float16"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_tables_beside_rounded_weights_are_not_rounded(models, dtype, weights):
    """Buffers are what loading in that dtype gives: RoPE is not rounded to 16 bits because the weights were."""
    for kind in KINDS:
        buffers = []
        for text in (f"hf:dtype={dtype}", f"hf:dtype={dtype},weights={weights}"):
            with opened(text, models / kind) as engine:
                buffers.append(dict(engine.model.named_buffers()))
        assert buffers[0].keys() == buffers[1].keys()
        for name, buffer in buffers[0].items():
            assert buffer.dtype == buffers[1][name].dtype
            assert torch.equal(buffer, buffers[1][name])


def test_a_weight_that_two_layers_share_is_quantised_once():
    """A shared weight is rounded from the checkpoint's own value and not from one that is rounded already."""
    live = random_model("llama")
    live.model.layers[1].mlp.up_proj.weight = live.model.layers[0].mlp.up_proj.weight
    names = [name for name, _, _ in hf.block_layers(live)]
    assert "model.layers.0.mlp.up_proj" in names
    assert "model.layers.1.mlp.up_proj" not in names
    live.model.layers[1].mlp.up_proj.weight = live.lm_head.weight
    assert not any("lm_head" in name or name == "model.layers.1.mlp.up_proj" for name, _, _ in hf.block_layers(live))


@pytest.mark.parametrize("weights", [None, "bfloat16", "int8", "int4"])
def test_what_the_weights_went_through_is_in_the_settings(model, weights):
    """The settings say what was applied, and the name promises it where it is a quantiser."""
    with opened("hf" if weights is None else f"hf:weights={weights}", model) as engine:
        assert engine.settings["weights"] == weights
        assert engine.declared.get("weights") == (weights if weights in quantise.SCHEMES else None)


def test_a_quantiser_that_found_nothing_is_not_in_force(model, monkeypatch):
    """A model without a single layer that could be quantised does not run what its name promises."""
    monkeypatch.setattr(hf, "block_layers", lambda _model: iter(()))
    with opened("hf:weights=int8", model) as engine:
        assert engine.settings["weights"] is None
        assert engine.declared["weights"] == "int8"


def test_a_declared_quantiser_changes_nothing(model):
    """`quantised` says how the checkpoint was made: it stands in the settings and moves no bit."""
    plain, declared = (parameters_of(text, model) for text in ("hf", "hf:quantised=int4-g32"))
    assert all(torch.equal(declared[name], plain[name]) for name in plain)
    with opened("hf:quantised=int4-g32", model) as engine:
        assert engine.settings["quantised"] == "int4-g32"
        assert engine.settings["weights"] is None
    with opened("hf", model) as engine:
        assert engine.settings["quantised"] is None


# --- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_dtype_is_read_back(model, dtype):
    """The dtype in force is that of the live parameters and of the logits, not the one asked for."""
    with opened(f"hf:dtype={dtype}", model) as engine:
        assert engine.settings["dtype"] == engine.declared["dtype"] == dtype
        with torch.no_grad():
            logits = engine.model(input_ids=torch.tensor([[3, 4]])).logits
        assert str(logits.dtype) == f"torch.{dtype}"
        engine.model.lm_head.weight.data = engine.model.lm_head.weight.data.to(torch.float16)
        assert "float16" in engine.settings["dtype"]


def test_the_checkpoints_own_dtype_is_the_default(model, tmp_path):
    """Without `dtype` the model computes in the dtype that its weights are stored in."""
    random_model("llama", dtype="bfloat16").save_pretrained(tmp_path / "narrow")
    for directory, dtype in ((model, "float32"), (tmp_path / "narrow", "bfloat16")):
        with opened("hf", directory) as engine:
            assert engine.settings["dtype"] == dtype
            assert "dtype" not in engine.declared


def test_weights_are_rounded_before_the_model_is_widened(model):
    """`weights=bfloat16` computes in the declared dtype with weights that went through bf16: the centre R_D."""
    with opened("hf:dtype=float32", model) as engine:
        plain = engine.model.lm_head.weight.detach().clone()
    for dtype in ("float32", "float64", "float16"):
        with opened(f"hf:dtype={dtype},weights=bfloat16", model) as engine:
            assert engine.settings["dtype"] == dtype
            weight = engine.model.lm_head.weight
            assert torch.equal(weight, plain.bfloat16().to(weight.dtype))
            assert not torch.equal(weight.double(), plain.double())


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_attention_is_read_back(model, kernel):
    """The attention kernel asked for is the one that runs."""
    with opened(f"hf:attn={kernel}", model) as engine:
        assert engine.settings["attn"] == engine.declared["attn"] == kernel


def test_attention_that_the_model_lacks_is_refused(models):
    """BLOOM has no SDPA in transformers: asking for it is one clear line, not a silent fallback."""
    with pytest.raises(ModelError, match="bloom"), opened("hf:attn=sdpa", models / "bloom"):
        pass


def test_threads_are_pinned_and_restored(model):
    """The thread count is in force inside the block alone."""
    with thread_count(1):
        with opened("hf:threads=2", model) as engine:
            assert engine.settings["threads"] == torch.get_num_threads() == 2
        assert torch.get_num_threads() == 1


def test_an_open_engine_that_is_entered_again_stays_as_it_is(model):
    """What was changed in its model is not lost when a function enters it again; the first block closes it."""
    with thread_count(1):
        with opened("hf:threads=2", model) as engine:
            live = engine.model
            with engine as again:
                assert again is engine
                assert engine.model is live
            assert engine.model is live
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 1
        with pytest.raises(EngineError, match="closed"):
            _ = engine.model
        with engine:
            assert engine.model is not live


def test_batch_overrides_every_run(model):
    """`batch` replaces the size that a run asks for, and is read back."""
    sizes = []
    with opened("hf:batch=2", model) as engine:
        assert engine.settings["batch"] == engine.declared["batch"] == 2
        step, engine._step = engine._step, lambda ids, *rest: sizes.append(len(ids)) or step(ids, *rest)
        engine.generate(REQUESTS, batch_size=1, stop_ids=frozenset())
    assert set(sizes) == {2, 1}


def test_compile_that_compiled_nothing_is_not_in_force(model):
    """`compile` is true in the settings only once a graph was compiled, so a silent fallback shows."""
    with opened("hf:compile=true", model) as engine:
        assert engine.declared["compile"] is True
        assert engine.settings["compile"] is False


def test_settings_name_the_checkpoint(model):
    """Digest, signature and number of parameters of what was loaded are in the settings; a live model has no digest."""
    with opened("hf", model) as engine:
        settings = engine.settings
        parameters = sum(p.numel() for p in engine.model.parameters())
    assert settings["parameters"] == parameters
    assert len(settings["checkpoint"]) == len(settings["signature"]) == 64
    assert settings["missing_tensors"] == []
    assert settings["device"] == "cpu"
    with hf.from_model(random_model("llama")) as engine:
        assert engine.settings["checkpoint"] is None


def test_missing_tensors_are_listed(copied):
    """A tensor that the checkpoint lacks (transformers makes it up) is named in the settings."""
    path = copied / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with opened("hf", copied) as engine:
        assert engine.settings["missing_tensors"] == ["model.layers.1.mlp.down_proj.weight"]


def test_an_unknown_device_is_refused(model):
    """A device that is not there is one line that names it."""
    with pytest.raises(UsageError, match="device 'cuda:77'"), opened("hf:device=cuda:77", model):
        pass


# --- live models -----------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_a_live_model_is_put_back(training):
    """Mode, threads and gradients are after the block what they were before, also when it fails."""
    live = random_model("llama").train(training)
    live.model.norm.eval()
    threads = torch.get_num_threads()
    for fails in (False, True):
        try:
            with hf.from_model(live) as engine:
                assert engine.model is live
                assert not any(module.training for module in live.modules())
                assert not torch.is_grad_enabled()
                if fails:
                    raise KeyError
        except KeyError:
            pass
        assert live.training is training
        assert live.model.layers[0].training is training
        assert not live.model.norm.training, "a part that was frozen stays frozen"
        assert torch.is_grad_enabled()
        assert torch.get_num_threads() == threads


def test_a_live_model_is_used_as_it_is():
    """A change to the live model shows in its logits: nothing is copied or reloaded."""
    live = random_model("llama")
    with hf.from_model(live) as engine:
        before = shown(engine, "prefill")
        with torch.no_grad():
            live.model.norm.weight[3] += 1
        assert error_of(shown(engine, "prefill"), before).max() > 1e-3


def test_upcast_is_a_copy():
    """The upcast engine is wide, computes the same function, and leaves the original narrow."""
    live = random_model("llama", dtype="bfloat16")
    with hf.from_model(live) as engine, engine.upcast() as wide:
        assert (engine.settings["dtype"], wide.settings["dtype"]) == ("bfloat16", "float32")
        assert wide.settings["buffers"] == "float32"
        assert wide.spec == f"{engine.spec} (upcast to float32)"
        assert torch.equal(wide.model.lm_head.weight, live.lm_head.weight.float())
        narrow, plain = shown(engine, "prefill"), shown(wide, "prefill")
        assert 0 < error_of(narrow, plain).max() < 10 * plain.top_logits.std()


def test_upcast_promises_what_it_is(model):
    """The upcast copy of a bf16 spec says float32: its own name must not make it structural."""
    with opened("hf:dtype=bfloat16", model) as engine, engine.upcast() as wide:
        assert engine.declared["dtype"] == "bfloat16"
        assert wide.declared["dtype"] == wide.settings["dtype"] == "float32"


def test_upcast_keeps_a_rounded_buffer_rounded():
    """A RoPE table that the candidate rounded to bf16 is still rounded in the upcast copy, where it shows."""
    live = random_model("llama")
    exact = live.model.rotary_emb.inv_freq.clone()
    live.to(torch.bfloat16)
    assert live.model.rotary_emb.inv_freq.dtype == torch.bfloat16, "transformers rounds the buffer in .to()"
    with hf.from_model(live) as engine, engine.upcast() as wide:
        table = wide.model.model.rotary_emb.inv_freq
        assert table.dtype == torch.float32
        assert torch.equal(table, exact.bfloat16().float())
        assert not torch.equal(table, exact)


SAME_SETTINGS = ("attn", "batch", "cache", "chunk", "weights", "quantised", "threads", "checkpoint", "missing_tensors")


@pytest.mark.parametrize(
    "options",
    [
        "weights=int8",
        "weights=int4,chunk=8,batch=2",
        "weights=float16,attn=eager",
        "static_cache=true,chunk=8,threads=2",
        "quantised=int4-g32,device=cpu",
    ],
)
def test_upcast_changes_nothing_but_the_dtype(model, options):
    """Every other option stays as loaded, and none is applied again: the weights are widened as they are."""
    with opened(f"hf:dtype=bfloat16,{options}", model) as engine:
        shown(engine, "replay")
        with engine.upcast() as wide:
            shown(wide, "replay")
            narrow, upcast = engine.settings, wide.settings
            assert {key for key in narrow if narrow[key] != upcast[key]} == {"dtype"}
            assert set(SAME_SETTINGS) < narrow.keys()
            assert (narrow["dtype"], upcast["dtype"]) == ("bfloat16", "float32")
            assert {**engine.declared, "dtype": "float32"} == wide.declared
            assert all(upcast[key] == promised for key, promised in wide.declared.items())
            for mine, other in zip(wide.model.parameters(), engine.model.parameters(), strict=True):
                assert torch.equal(mine, other.float())


def test_upcast_keeps_the_tokenizer(tmp_path):
    """The copy encodes prompts as the engine itself does."""
    suite = load_suite(write_suite(tmp_path / "small.toml", SUITE))
    with opened("hf", write_model(tmp_path / "model")) as engine, engine.upcast() as wide:
        assert wide.tokenize(suite) == engine.tokenize(suite)


def test_upcast_says_what_was_missing(copied):
    """Tensors that were made up are made up in the copy too, and its settings say so."""
    path = copied / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with opened("hf", copied) as engine, engine.upcast() as wide:
        assert wide.settings["missing_tensors"] == ["model.norm.weight"]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_upcast_of_a_wide_engine_is_a_copy(model, dtype):
    """Where nothing is to be widened the copy has the same weights, and float64 is not narrowed."""
    with opened(f"hf:dtype={dtype}", model) as engine, engine.upcast() as wide:
        assert wide.settings["dtype"] == wide.declared["dtype"] == dtype
        assert wide.model is not engine.model
        assert (error_of(shown(wide, "prefill"), shown(engine, "prefill")) == 0).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_upcast_compiles_what_was_compiled(model, monkeypatch, dtype):
    """A compiled engine's copy is compiled too, by itself: it is the same path in another dtype."""
    # The eager backend needs no compiler, and counts its graphs like any other.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    with opened(f"hf:compile=true,dtype={dtype}", model) as engine:
        shown(engine, "prefill")
        assert engine.settings["compile"] is True
        with engine.upcast() as wide:
            assert (wide.declared["compile"], wide.settings["compile"]) == (True, False)
            shown(wide, "prefill")
            assert wide.settings["compile"] is True


def test_a_closed_engine_says_so(model):
    """Whatever is asked of an engine outside its block is an EngineError, before and after."""
    engine = opened("hf", model)
    for _ in range(2):
        for call in (
            lambda: engine.model,
            lambda: engine.vocabulary,
            lambda: engine.settings,
            lambda: engine.generate(REQUESTS, batch_size=1, stop_ids=frozenset()),
            lambda: shown(engine, "replay"),
            lambda: engine.upcast(),
        ):
            with pytest.raises(EngineError, match="closed"):
                call()
        with engine:
            assert engine.vocabulary == VOCABULARY


def test_an_engine_opens_again(model):
    """An engine can be opened twice, and gives the same bits."""
    engine, found = opened("hf", model), []
    for _ in range(2):
        with engine:
            found.append(shown(engine, "replay"))
    assert (found[0].projections == found[1].projections).all()


# --- tokenizer -------------------------------------------------------------------------------------


def test_tokenizes_a_suite(tmp_path):
    """An engine resolves the suite with the tokenizer beside its weights, loaded when it is asked for."""
    suite = load_suite(write_suite(tmp_path / "small.toml", SUITE))
    with opened("hf", write_model(tmp_path / "model")) as engine:
        requests = engine.tokenize(suite)
        assert len(engine.tokenizer_digest) == 64
    assert [request.id for request in requests] == ["short", "long", "ids"]
    assert [len(request.prompt_ids) for request in requests][1:] == [40, 5]
    assert requests[0].prompt_ids[0] == 1, "llama's tokenizer adds <s>"


def test_without_a_tokenizer_nothing_is_guessed(model, tmp_path):
    """Without a tokenizer there is nothing to compare ids with; ids still resolve, and text is refused."""
    suite = load_suite(write_suite(tmp_path / "small.toml", SUITE))
    ids = replace(suite, prompts=suite.prompts[2:])
    with opened("hf", model) as engine:
        assert engine.tokenize(suite) is None
        assert [request.prompt_ids for request in engine.resolve(ids)] == [(7, 8, 9, 10, 11)]
        with pytest.raises(SuiteError, match="tokenizer"):
            engine.resolve(suite)
    with hf.from_model(random_model("llama")) as engine:
        assert engine.tokenize(ids) is None


def test_context_and_stop_ids(models):
    """The context is found under each architecture's own name; several end ids are all kept."""
    for kind in KINDS:
        with opened("hf", models / kind) as engine:
            assert engine.context == 128
    live = random_model("gpt2")
    live.config.eos_token_id = [2, 7]
    with hf.from_model(live) as engine:
        assert engine.stop_ids == {2, 7}
    live.generation_config.eos_token_id = [2, 9]  # chat models list more ends here, and `generate` stops at each
    with hf.from_model(live) as engine:
        assert engine.stop_ids == {2, 7, 9}
    live.config.eos_token_id = live.generation_config.eos_token_id = None
    with hf.from_model(live) as engine:
        assert engine.stop_ids == frozenset()


# --- what cannot be loaded -------------------------------------------------------------------------


def refused(directory, **more):
    """The ModelError of a directory that cannot be used: one line that names it."""
    with pytest.raises(ModelError) as caught, build_engine("hf", model=str(directory), **more):
        pass
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert str(directory) in message
    return message


@pytest.mark.parametrize("name", ["nowhere", "nowhere/at/all", "golden/typo", "/tmp/no such directory"])
def test_a_missing_directory(tmp_path, monkeypatch, name):
    """A path that is not there is refused as such, without a look at the hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "golden").mkdir()
    assert "there is no model directory" in refused(name)


def test_a_hub_id_is_never_looked_up(tmp_path, monkeypatch):
    """ORG/NAME that is no directory is refused with the command that makes it one: a check needs no network."""
    monkeypatch.chdir(tmp_path)
    assert "hf download" in refused("some-org/some-model")


def test_a_directory_without_a_config(tmp_path):
    """A directory that holds no config.json is refused."""
    assert "holds no config.json" in refused(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": "nonsense"}', '{"vocab_size": 3}'])
def test_a_bad_config(copied, text):
    """A damaged config, or one of an unknown architecture, is one line."""
    (copied / "config.json").write_text(text, encoding="utf-8")
    refused(copied)


def test_an_encoder_decoder_is_refused(copied):
    """An encoder-decoder model is refused by name of what it is, before any weight is read."""
    (copied / "config.json").write_text(
        json.dumps({"model_type": "t5", "is_encoder_decoder": True, "d_model": 8}), encoding="utf-8"
    )
    assert "encoder-decoder" in refused(copied)


def test_no_model_named():
    """A spec without a model, and no --model, says how to name one."""
    with pytest.raises(UsageError, match="names no model"), build_engine("hf"):
        pass


def test_no_safetensors(copied):
    """A directory without .safetensors weights is refused."""
    (copied / "model.safetensors").unlink()
    assert ".safetensors" in refused(copied)


class Bomb:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_pickled_weights_are_never_loaded(copied, tmp_path, name):
    """Pickled weights, under their own name or a false one, are refused and nothing in them runs."""
    (copied / "model.safetensors").unlink()
    marker = tmp_path / "executed"
    (copied / name).write_bytes(pickle.dumps(Bomb(marker)))
    refused(copied)
    assert not marker.exists()


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5])
def test_truncated_weights(copied, keep):
    """A weights file that ends early is refused, wherever it ends."""
    path = copied / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[: int(keep * len(raw)) if keep == 0.5 else keep])
    refused(copied)


def test_weights_of_another_shape(copied):
    """Weights that do not fit the config are refused and not cut or filled."""
    config = json.loads((copied / "config.json").read_text(encoding="utf-8"))
    config["intermediate_size"] += 2
    (copied / "config.json").write_text(json.dumps(config), encoding="utf-8")
    refused(copied)


def test_a_row_that_ends_at_the_context_may_share_a_batch(models):
    """A prompt that fills the context ends after one token; its batch goes on without a position behind the table."""
    requests = [
        Request(id="full", prompt_ids=tuple(range(3, 130)), max_new_tokens=1),
        Request(id="short", prompt_ids=tuple(range(3, 90)), max_new_tokens=9),
    ]
    with opened("hf:dtype=float64", models / "gpt2") as engine:
        together = engine.generate(requests, batch_size=2, stop_ids=frozenset())
        alone = engine.generate(requests, batch_size=1, stop_ids=frozenset())
        rows = Sketcher(engine.vocabulary)
        engine.replay(requests, [given.tokens for given in alone], batch_size=2, sketcher=rows)
    assert together == alone
    assert [len(given.tokens) for given in alone] == [1, 9]
    assert len(rows.rows()) == 10


def test_a_static_cache_of_a_sliding_window_is_exact(tmp_path):
    """Beyond its window a static cache is shorter than what was written, and decodes as the growing one does."""
    from harness.mutations import hosts

    hosts.write("mistral-window", tmp_path / "model")
    requests = [
        Request(id="long", prompt_ids=tuple(range(3, 40)), max_new_tokens=6),
        Request(id="short", prompt_ids=tuple(range(50, 60)), max_new_tokens=6),
    ]
    shown = []
    for static in (False, True):
        options = hf.Options(model=str(tmp_path / "model"), dtype="float64", static_cache=static)
        with hf.HFEngine(options, text="mistral") as engine:
            sketcher = Sketcher(engine.vocabulary)
            engine.replay(requests, [tuple(range(100, 106))] * 2, batch_size=2, sketcher=sketcher)
            assert engine.settings["cache"] == ("StaticCache" if static else "DynamicCache")
            shown.append(sketcher.rows().projections)
    assert np.array_equal(*shown)


def test_a_static_cache_is_given_what_any_version_asks_for(models, monkeypatch):
    """One that hands everything on (transformers 4.55) gets all of it, one that names what it takes only that."""
    import transformers

    seen = []

    class Naming:
        def __init__(self, *, config, max_cache_len, dtype):
            seen.append({"dtype"})

    class Handing:
        def __init__(self, config, max_cache_len, **more):
            seen.append(set(more))

    with opened("hf", str(models / "llama")) as engine:
        for kind in (Naming, Handing):
            monkeypatch.setattr(transformers, "StaticCache", kind)
            hf._static_cache(engine.model, "cpu", 2, 10)
    assert seen == [{"dtype"}, {"dtype", "device", "max_batch_size"}]
