"""record and check, end to end: benign variants on the shipped goldens, and what `check` refuses."""

from __future__ import annotations

import inspect

import pytest
import torch

import harness
from harness import flow
from harness.errors import GoldenError, ModelError, UsageError
from harness.values import Status
from tests.support import random_model, write_model, write_suite

HOSTS = ("bloom-tiny", "bloom-raw", "llama-tiny", "gpt2-tiny")
BENIGN = (
    "hf:dtype=float32",
    "hf:dtype=bfloat16",
    "hf:dtype=float16",
    "hf:dtype=float32,attn=eager,static_cache=true",
    "hf:dtype=bfloat16,static_cache=true",
    "hf:dtype=float32,batch=3",
    "hf:dtype=bfloat16,batch=5",
)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("candidate", BENIGN)
def test_benign_variants_are_ok(goldens, host, candidate):
    """Another precision, cache, batch size or thread count is the same model."""
    verdict = harness.check(goldens / host / "core", candidate, quick=True)
    assert verdict.ok, str(verdict)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("candidate", ["hf:dtype=float32,threads=2", "hf:dtype=bfloat16,threads=2,batch=5"])
def test_the_number_of_threads_is_ok(goldens, host, candidate):
    """More threads sum in another order, and are the same model (on a short suite: tests share the cores)."""
    verdict = harness.check(goldens / host / "translate", candidate, quick=True)
    assert verdict.ok, str(verdict)
    assert verdict.settings["threads"] == 2


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("suite", ["edge", "translate"])
def test_every_run_of_the_short_suites_is_ok(goldens, host, suite):
    """All runs, free ones and A-B-A among them, of the suites with odd prompts."""
    verdict = harness.check(goldens / host / suite, "hf:dtype=float32")
    assert verdict.ok, str(verdict)
    assert {one.run for one in verdict.passes} == {"batched", "single", "order"}


@pytest.mark.slow
def test_a_compiled_model_is_ok(goldens):
    """torch.compile changes kernels, and not the model."""
    verdict = harness.check(goldens / "gpt2-tiny" / "headline", "hf:dtype=float32,compile=true,static_cache=true")
    assert verdict.ok, str(verdict)
    assert verdict.settings["compile"] is True


def test_tokens_flip_on_the_bad_host_and_the_verdict_is_drift(goldens):
    """On bloom-raw in bf16 greedy tokens flip at ties: that is drift, not failure."""
    verdict = harness.check(goldens / "bloom-raw" / "core", "hf:dtype=bfloat16", quick=True)
    assert verdict.status is Status.DRIFT
    assert sum(one.flips for one in verdict.passes) > 0


def test_edge_stops_everywhere(goldens):
    """The edge suite's continuations end at step 1, in the middle, at the limit, and at the context's end."""
    golden = harness.load_golden(goldens / "bloom-tiny" / "edge")
    ends = [
        (len(given.tokens), given.finish, request.max_new_tokens, len(request.prompt_ids))
        for request, given in zip(golden.requests, golden.generations, strict=True)
    ]
    assert any(length == 1 and finish == "eos" for length, finish, _, _ in ends)
    assert any(1 < length < limit and finish == "eos" for length, finish, limit, _ in ends)
    assert any(length == limit and finish == "length" for length, finish, limit, _ in ends)
    assert {prompt + limit for _, _, limit, prompt in ends if prompt > 1000} == {1024}


# --- on the small recorded model ---------------------------------------------------------------


def test_recording_twice_gives_the_same_golden(home):
    """Recording is deterministic: only the date and history may differ."""
    first = harness.load_golden("golden/small/small")
    flow.record("golden/small/model", "prompts/small.toml", out="golden/small/again", replicas=6)
    again = harness.load_golden("golden/small/again")
    assert again.generations == first.generations
    for precision in first.floors:
        assert (again.floors[precision].sigma == first.floors[precision].sigma).all()
    assert (again.rows.projections == first.rows.projections).all()


def test_paths_in_a_golden_are_relative(home):
    """A golden names its model and suite relative to itself, so that it travels with its repository."""
    golden = harness.load_golden("golden/small/small")
    assert golden.model.path == "../model"
    assert golden.provenance["suite_path"] == "../../../prompts/small.toml"
    assert str(home) not in (home / "golden/small/small/golden.json").read_text(encoding="utf-8")


def test_a_live_model_is_a_candidate(home):
    """A transformers object is checked as it is, and left as it was."""
    model = harness.reference_model("golden/small/small", dtype=torch.float32).train()
    assert harness.check("golden/small/small", model).ok
    assert model.training


def test_another_seed_is_another_model_and_fails(home):
    """Other weights of the same shapes are a candidate under test, and deviate."""
    verdict = harness.check("golden/small/small", random_model("llama", seed=1))
    assert verdict.status is Status.DEVIATES


def test_a_model_of_other_shapes_is_stale(home, tmp_path):
    """A golden of another model is said to be stale, not failed."""
    write_model(tmp_path / "other", "gpt2")
    verdict = harness.check("golden/small/small", f"hf:model={tmp_path / 'other'}")
    assert verdict.status is Status.STALE


def test_a_changed_model_beside_the_golden_is_stale(home):
    """When the weights beside a golden were exchanged, the golden is of another model."""
    write_model(home / "golden/small/model", seed=9)
    verdict = harness.check("golden/small/small", "hf:dtype=float32")
    assert verdict.status is Status.STALE
    assert "is not the one" in str(verdict)


def test_a_changed_suite_is_stale(home):
    """When the suite asks other questions by now, the golden does not answer them."""
    path = home / "prompts/small.toml"
    write_suite(path, path.read_text(encoding="utf-8").replace("max_new_tokens = 6", "max_new_tokens = 7"))
    assert harness.check("golden/small/small", "hf:dtype=float32").status is Status.STALE


def test_a_new_run_needs_no_new_golden(home):
    """Runs are read from the suite's file: adding one does not make the golden stale."""
    path = home / "prompts/small.toml"
    extra = '\n[[runs]]\nname = "pairs"\nbatch_size = 2\nviews = ["replay"]\n'
    write_suite(path, path.read_text(encoding="utf-8") + extra)
    verdict = harness.check("golden/small/small", "hf:dtype=float32")
    assert verdict.ok
    assert "pairs" in {one.run for one in verdict.passes}


def test_a_port_that_raises_is_an_engine_error(home):
    """Whatever a model under test raises becomes the status `error` with its own words."""
    model = random_model("llama")

    def broken(*_arguments, **_keywords):
        raise ZeroDivisionError("kernel launch failed")

    model.forward = broken
    verdict = harness.check("golden/small/small", model)
    assert verdict.status is Status.ERROR
    assert "kernel launch failed" in str(verdict)


def test_dtype_that_is_not_in_force_is_structural(home):
    """A spec that promises a dtype which the loaded model does not have is structural."""
    from harness.engines.hf import HFEngine, Options

    engine = HFEngine(Options(dtype="bfloat16"), text="hf:dtype=bfloat16", model=random_model("llama"))
    verdict = harness.check("golden/small/small", engine)
    assert verdict.status is Status.STRUCTURAL
    assert "dtype=bfloat16" in str(verdict)


def test_no_floor_is_unmeasured(home):
    """A precision that was not recorded is unmeasured: exit code 3, never a pass."""
    verdict = harness.check("golden/small/small", "hf:dtype=float64")
    assert verdict.status is Status.UNMEASURED
    assert verdict.status.exit_code == 3


def test_state_leaking_between_requests_is_found(home):
    """A candidate that remembers an earlier request gives other bits on the second A of A-B-A."""
    model = harness.reference_model("golden/small/small", dtype=torch.float32)
    inner = model.forward
    lengths = [0, 0]

    def leaking(input_ids=None, **keywords):
        if input_ids.shape[1] > 1:
            lengths[:] = [lengths[1], input_ids.shape[1]]
        result = inner(input_ids=input_ids, **keywords)
        if lengths[0] > 20:
            result.logits = result.logits * (1 + 2.0**-22)
        return result

    leaking.__signature__ = inspect.signature(inner)
    model.forward = leaking
    verdict = harness.check("golden/small/small", model)
    assert verdict.status is Status.NONDETERMINISTIC, str(verdict)


@pytest.mark.parametrize(
    ("candidate", "error"),
    [("nope:dtype=float32", UsageError), ("hf:dtype=float31", UsageError), (object(), UsageError)],
)
def test_unusable_candidates_are_refused(home, candidate, error):
    """An unknown engine, value or object is bad input, not a verdict."""
    with pytest.raises(error):
        harness.check("golden/small/small", candidate)


def test_record_refuses_before_it_writes(home):
    """A missing model, or a golden that is already there, leaves everything as it was."""
    with pytest.raises(ModelError):
        flow.record("golden/none/model", "prompts/small.toml", out="golden/none/small")
    assert not (home / "golden/none").exists()
    with pytest.raises(GoldenError, match="--update"):
        flow.record("golden/small/model", "prompts/small.toml", out="golden/small/small")


def test_update_keeps_history(home):
    """Replacing a golden keeps the reasons of its earlier recordings."""
    flow.record(
        "golden/small/model",
        "prompts/small.toml",
        out="golden/small/small",
        replicas=4,
        update=True,
        reason="new torch",
    )
    history = harness.load_golden("golden/small/small").provenance["history"]
    assert [entry["reason"] for entry in history] == ["recorded", "new torch"]


def test_a_reference_that_is_not_finite_is_refused(home, tmp_path):
    """A golden of NaN would bless NaN."""
    model = random_model("gpt2")
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = float("nan")
    write_model(tmp_path / "nan", "gpt2")
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(ModelError, match="not finite"):
        flow.record(tmp_path / "nan", "prompts/small.toml", out=tmp_path / "golden/nan/small", replicas=4)
    assert not (tmp_path / "golden").exists()


def test_candidates_are_data(home):
    """`check --all` reads its candidates from the file beside a golden or one directory up."""
    (home / "golden/small/candidates.toml").write_text('quick = ["hf:dtype=float32"]\nfull = ["hf:batch=2"]\n')
    work = list(flow.check_all(home / "golden", quick=False))
    assert [spec for _, spec in work] == ["hf:dtype=float32", "hf:batch=2"]
    assert [spec for _, spec in flow.check_all(home / "golden", quick=True)] == ["hf:dtype=float32"]


@pytest.mark.parametrize("text", ["quick = 3", "nope = []", "quick = [", "quick = [1]"])
def test_bad_candidate_lists_are_refused(home, text):
    """A candidates file that cannot be used is bad input, named."""
    (home / "golden/small/candidates.toml").write_text(text)
    with pytest.raises(GoldenError, match=r"candidates\.toml"):
        list(flow.check_all(home / "golden", quick=True))
