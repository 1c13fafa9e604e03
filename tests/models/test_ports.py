import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

import harness
from harness.engines import build_engine, hf
from harness.engines.convention import convention_of
from harness.models.ports import bloom
from harness.values import Status
from tests.engines.ports import CONTINUATIONS, REQUESTS
from tests.engines.recorder import largest_difference, recorded
from tests.support import random_model

BUILDS = ("build", "build_without_cache")


def written(directory, *, post_layernorm=False):
    """A random BLOOM with 6 heads as a model directory, and the live model."""
    model = random_model("bloom")
    model.config.apply_residual_connection_post_layernorm = post_layernorm
    model.save_pretrained(directory)
    return directory, hf.build(hf.spec.parse_spec("hf:dtype=float64"), model=str(directory))


@pytest.mark.parametrize("post_layernorm", [False, True])
@pytest.mark.parametrize("batch_size", [1, None])
@pytest.mark.parametrize("view", ["replay", "prefill"])
def test_bloom_is_transformers_bloom(tmp_path, view, batch_size, post_layernorm):
    """In float64 the port's logits are those of transformers to 1e-9: with a cache, padded, and one by one."""
    directory, reference = written(tmp_path, post_layernorm=post_layernorm)
    candidate = build_engine("py:harness.models.ports.bloom:build?dtype=float64", model=str(directory))
    with reference, candidate:
        for block in reference.model.transformer.h:
            # Transformers writes sqrt(2 / pi) with eight digits, which is 5e-9 of a logit here.
            block.mlp.gelu_impl = torch.nn.GELU(approximate="tanh")
        wanted = recorded(reference, view, REQUESTS, CONTINUATIONS, batch_size=batch_size)
        shown = recorded(candidate, view, REQUESTS, CONTINUATIONS, batch_size=batch_size)
    assert shown.keys() == wanted.keys()
    assert largest_difference(shown, wanted) < 1e-9


def test_without_a_cache_it_is_the_same_bloom(tmp_path):
    """The port without a cache gives the same logits to the last bit in its one view, and the same greedy text."""
    directory, _ = written(tmp_path)
    first, second = (
        build_engine(f"py:harness.models.ports.bloom:{name}?dtype=float64", model=str(directory)) for name in BUILDS
    )
    with first, second:
        one, other = (recorded(engine, "prefill", REQUESTS, CONTINUATIONS) for engine in (first, second))
        texts = [engine.continue_greedily(REQUESTS, batch_size=3, stop_ids=frozenset()) for engine in (first, second)]
    assert largest_difference(one, other) == 0
    assert texts[0] == texts[1]
    assert len({token for given in texts[0] for token in given.tokens}) > 3, "a constant text would show nothing"


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 20, 32, 112])
def test_slopes_of_any_number_of_heads(heads):
    """The slopes are those of transformers, also where the heads are not a power of two."""
    # At position 1 the bias is the slope itself.
    wanted = build_alibi_tensor(torch.ones((1, 2), dtype=torch.int64), heads, torch.float32)[:, 0, 1]
    assert bloom.slopes(heads) == pytest.approx(wanted.tolist(), rel=1e-6)


def test_it_needs_no_transformers():
    """Importing the port imports torch and safetensors, and no transformers."""
    code = "import sys, harness.models.ports.bloom; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("build", BUILDS)
def test_it_is_the_same_model(goldens, build, dtype):
    """Every run and view that the port can show is ok in each precision, and the verdict says what it cannot show."""
    spec = f"py:harness.models.ports.bloom:{build}?dtype={dtype}"
    verdict = harness.check(goldens / "bloom-tiny" / "translate", spec)
    assert verdict.status in (Status.IDENTICAL, Status.DRIFT), str(verdict)
    assert verdict.settings["dtype"] == dtype
    views = {"generate", "replay", "prefill"} if build == "build" else {"prefill"}
    assert {one.view for one in verdict.passes} == views
    unmeasured = " ".join(verdict.power.unmeasured)
    assert ("the decode path" in unmeasured) == (build == "build_without_cache")
    assert "a bare callable shows none of its own" in unmeasured


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("build", BUILDS)
def test_it_is_the_same_model_on_the_core_suite(goldens, build, dtype):
    """The quick runs of the suite that a port is checked with first."""
    spec = f"py:harness.models.ports.bloom:{build}?dtype={dtype}"
    verdict = harness.check(goldens / "bloom-tiny" / "core", spec, quick=True)
    assert verdict.status in (Status.IDENTICAL, Status.DRIFT), str(verdict)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("build", BUILDS)
def test_one_wrong_head_is_found(goldens, monkeypatch, build, dtype):
    """The slopes of the heads beyond a power of two in the wrong order, with a cache and without."""
    right = bloom.slopes
    monkeypatch.setattr(bloom, "slopes", lambda heads: [*right(heads)[:4], *reversed(right(heads)[4:])])
    spec = f"py:harness.models.ports.bloom:{build}?dtype={dtype}"
    verdict = harness.check(goldens / "bloom-tiny" / "translate", spec, quick=True)
    assert verdict.status is Status.DEVIATES, str(verdict)


def test_one_wrong_weight_is_found(goldens, tmp_path):
    """A directory in which query and key of one head were exchanged, named in the spec, deviates."""
    model = goldens / "bloom-tiny" / "model"
    config, weights = bloom.load(model, torch.float16, "cpu")
    name = "h.1.self_attention.query_key_value.weight"
    heads = weights[name].unflatten(0, (config["n_head"], 3, -1)).clone()
    heads[2, [0, 1]] = heads[2, [1, 0]]
    save_file({**weights, name: heads.flatten(0, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    spec = f"py:harness.models.ports.bloom:build?model={tmp_path}"
    verdict = harness.check(goldens / "bloom-tiny" / "translate", spec, quick=True)
    assert verdict.status is Status.DEVIATES, str(verdict)


def test_the_port_is_a_callable_of_three_arguments(goldens):
    """ALiBi needs no positions, and the port takes what it needs, by name."""
    built = bloom.build(goldens / "bloom-tiny" / "model", dtype=torch.float32, device="cpu")
    assert convention_of(built).names == ("input_ids", "attention_mask", "cache")
    assert harness.check(goldens / "bloom-tiny" / "translate", built, quick=True).ok
