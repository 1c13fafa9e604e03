import pytest

import harness
from harness.engines import build_engine
from harness.engines.bloom import rungs_in
from harness.errors import HarnessError, ModelError, UsageError
from harness.models.ports.ladder import kernels
from harness.models.ports.ladder.rungs import OWN, join, ladder
from tests.support import write_model

NO_KERNELS = kernels.why_not()
needs_kernels = pytest.mark.skipif(bool(NO_KERNELS), reason=NO_KERNELS)


def rung(rungs):
    """A parameter of the ladder, left out where it needs kernels that are not here."""
    return pytest.param(join(rungs), marks=needs_kernels if rungs & OWN else ())


@pytest.mark.parametrize("rungs", [rung(one) for one in ladder()])
def test_each_rung_is_the_same_model(goldens, rungs):
    """On real prompts each rung passes in bfloat16, its function included."""
    verdict = harness.check(goldens / "bloom-tiny" / "headline", f"bloom:rungs={rungs},dtype=bfloat16", quick=True)
    assert verdict.ok, verdict


@needs_kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_whole_ladder_is_the_same_model_on_the_core_suite(goldens, dtype):
    """Padded batches, long prompts, many languages: all rungs together pass."""
    verdict = harness.check(goldens / "bloom-tiny" / "core", f"bloom:dtype={dtype}", quick=True)
    assert verdict.ok, verdict


@pytest.mark.parametrize("name", ["bloom-raw", "bloom-tiny"])
def test_prompts_in_pieces(goldens, name):
    """With chunk a prompt goes through the preallocated cache in pieces, and the model is the same."""
    spec = "bloom:rungs=alibi+layout+gelu+softmax,dtype=float32,chunk=7"
    verdict = harness.check(goldens / name / "translate", spec, quick=True)
    assert verdict.ok, verdict


def test_settings_say_what_is_in_force(goldens):
    """Rungs, cache and attention are read back from what was built."""
    model = str(goldens / "bloom-tiny" / "model")
    with build_engine("bloom:rungs=layout+alibi,dtype=float32", model=model) as engine:
        engine.generate(engine.resolve(harness.load_golden(goldens / "bloom-tiny" / "headline").suite),
                        batch_size=None, stop_ids=frozenset())  # fmt: skip
        settings = engine.settings
    assert engine.declared["rungs"] == settings["rungs"] == "alibi+layout"
    assert settings["engine"] == "bloom"
    assert settings["cache"] == "preallocated"
    assert settings["attn"] == "eager"
    assert settings["dtype"] == "float32"


def test_it_stops_where_the_model_says(goldens):
    """Special tokens are those of the model's own configuration."""
    model = str(goldens / "bloom-tiny" / "model")
    with build_engine("bloom:rungs=none", model=model) as engine, build_engine("hf:", model=model) as reference:
        assert engine.stop_ids == reference.stop_ids
        assert engine.vocabulary == reference.vocabulary


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("bloom:rungs=fast", "there is no fast"),
        ("bloom:rungs=", "alibi"),
        ("bloom:static_cache=true", "static_cache"),
        ("bloom:batch=0", "batch"),
    ],
)
def test_a_wrong_spec_is_refused_before_anything_is_loaded(spec, said):
    """With the keys and rungs that there are."""
    with pytest.raises(UsageError) as refused:
        build_engine(spec)
    assert said in f"{refused.value}"


def test_kernels_are_refused_where_they_cannot_be_had(goldens):
    """The dtype of the checkpoint is float16, for which there are none: the message names rungs that there are."""
    with pytest.raises(UsageError, match="float32 and bfloat16") as refused:
        build_engine("bloom:", model=str(goldens / "bloom-tiny" / "model")).__enter__()
    assert "alibi+layout+gelu+softmax" in str(refused.value)


def test_another_model_is_refused(goldens):
    """It runs BLOOM alone, and says which type it was given."""
    with pytest.raises(ModelError, match="llama"):
        build_engine("bloom:", model=str(goldens / "llama-tiny" / "model")).__enter__()


def test_a_directory_with_a_wrong_tensor_is_refused(tmp_path):
    """One clear line, whatever the loader raises."""
    directory = write_model(tmp_path / "model", "bloom")
    (directory / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(HarnessError, match="cannot be loaded"):
        build_engine("bloom:rungs=none", model=str(directory)).__enter__()


def test_rungs_that_a_precision_has():
    """Kernels are left out of those of float64, as a bench of bugs asks."""
    assert rungs_in("all", "float32").endswith("compiled")
    assert rungs_in("all", "float64") == "alibi+layout+gelu+softmax"
    assert rungs_in("none", "float64") == "none"
