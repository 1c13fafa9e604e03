"""record and check, end to end: benign variants on the shipped goldens, and what `check` refuses."""

from __future__ import annotations

import inspect
import shutil
from dataclasses import fields, replace
from functools import wraps
from pathlib import Path

import pytest
import torch

import harness
from harness import flow, store
from harness.engines.hf import HFEngine, Options, block_layers
from harness.errors import EngineError, GoldenError, HarnessError, ModelError, UsageError
from harness.flow import running
from harness.numerics import quantise
from harness.numerics.constants import REPLICAS
from harness.values import Centre, Moments, Status, Trace
from tests.support import random_model, write_model, write_suite

HOSTS = ("bloom-tiny", "bloom-raw", "llama-tiny", "gpt2-tiny")
#: Every variant, and every model. `make check` has float32 and bfloat16 of each golden, and a test below bloom-raw's.
BENIGN = (
    ("hf:dtype=float32", "gpt2-tiny"),
    ("hf:dtype=float16", "llama-tiny"),
    ("hf:dtype=float32,attn=eager,static_cache=true", "bloom-tiny"),
    ("hf:dtype=bfloat16,static_cache=true", "llama-tiny"),
    ("hf:dtype=float32,batch=3", "bloom-raw"),
    ("hf:dtype=bfloat16,batch=5", "gpt2-tiny"),
)


@pytest.mark.parametrize(("candidate", "host"), BENIGN)
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


@pytest.mark.parametrize(
    ("suite", "host", "runs"),
    # Bloom-raw has the code of bloom-tiny; its quick runs are those of `make check`.
    [("edge", host, {"batched", "batch-4", "single", "order"}) for host in HOSTS if host != "bloom-raw"]
    + [("translate", host, {"batched", "single", "order"}) for host in HOSTS],
)
def test_every_run_of_the_short_suites_is_ok(goldens, suite, host, runs):
    """All runs, free ones and A-B-A among them, of the suites with odd prompts."""
    verdict = harness.check(goldens / host / suite, "hf:dtype=float32")
    assert verdict.ok, str(verdict)
    assert {one.run for one in verdict.passes} == runs


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
    flow.record("golden/small/model", "prompts/small.toml", out="golden/small/again", replicas=REPLICAS)
    again = harness.load_golden("golden/small/again")
    assert again.generations == first.generations
    for precision, floor in first.floors.items():
        assert (again.floors[precision].sigma == floor.sigma).all()
        for field in fields(Moments):
            assert (getattr(again.floors[precision].moments, field.name) == getattr(floor.moments, field.name)).all()
    assert (again.rows.projections == first.rows.projections).all()
    assert list(again.directions) == list(first.directions) == ["int8", "int4"]
    assert all((again.directions[name] == direction).all() for name, direction in first.directions.items())


def test_the_small_golden_is_made_like_a_real_one(home):
    """As many replicas as `record` draws, of which each precision has more than half to itself."""
    golden = harness.load_golden("golden/small/small")
    assert list(golden.floors) == ["float32", "bfloat16", "float16"]
    assert all(floor.replicas == REPLICAS < 2 * floor.effective for floor in golden.floors.values())


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


# --- two questions ------------------------------------------------------------------------------

SMALL = "golden/small/small"


def answered(verdict):
    """Status of each question, in the order asked."""
    return {answer.question: answer.status for answer in verdict.answers}


def power_of(verdict, question):
    """What one question could have seen."""
    return next(answer.power for answer in verdict.answers if answer.question == question)


def ok(status):
    """Whether a status counts as a pass."""
    return status in (Status.IDENTICAL, Status.DRIFT)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_are_asked_both_questions(home, dtype):
    """A 16-bit candidate is judged as its float32 copy and as shipped, each against the floor of its precision."""
    verdict = harness.check(SMALL, f"hf:dtype={dtype}")
    assert verdict.ok, str(verdict)
    assert list(answered(verdict)) == ["function", "precision"]
    assert all(ok(status) for status in answered(verdict).values())
    assert power_of(verdict, "function").precision == "float32"
    assert power_of(verdict, "precision").precision == verdict.settings["dtype"] == dtype
    assert {(one.question, one.precision) for one in verdict.statistics} == {
        ("function", "float32"),
        ("precision", dtype),
    }
    wide, shipped = (
        {one.view for one in verdict.passes if one.question == question} for question in ("function", "precision")
    )
    assert (wide, shipped) == ({"replay", "prefill"}, {"generate", "replay", "prefill"})


@pytest.mark.parametrize("live", [False, True])
def test_float32_is_asked_one_question(home, live):
    """A float32 candidate is its own float32 copy: there is one answer, to whether it is the same function."""
    candidate = harness.reference_model(SMALL, dtype=torch.float32) if live else "hf:dtype=float32"
    verdict = harness.check(SMALL, candidate)
    assert verdict.ok, str(verdict)
    assert list(answered(verdict)) == ["function"]
    assert {one.question for one in verdict.statistics} == {one.question for one in verdict.passes} == {"function"}


def test_a_live_model_in_16_bits_is_asked_both(home):
    """A transformers object is widened as a copy: it keeps its own dtype and every bit."""
    model = harness.reference_model(SMALL, dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    verdict = harness.check(SMALL, model)
    assert verdict.ok, str(verdict)
    assert list(answered(verdict)) == ["function", "precision"]
    assert model.dtype == torch.bfloat16
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_without_a_copy_the_function_is_unmeasured(home):
    """With upcast=False the run as shipped decides, and the answer about the function says that nothing was run."""
    verdict = harness.check(SMALL, "hf:dtype=bfloat16", upcast=False)
    shipped = harness.check(SMALL, "hf:dtype=bfloat16")
    assert answered(verdict) == {"function": Status.UNMEASURED, "precision": answered(shipped)["precision"]}
    assert verdict.status is answered(verdict)["precision"]
    assert verdict.ok
    power = power_of(verdict, "function")
    assert (power.level, power.positions, power.smallest) == ("nothing", 0, None)
    assert power.unmeasured == ("the function: no float32 copy of the candidate was run",)
    assert f"not seen: {power.unmeasured[0]}" in str(verdict)
    assert {one.question for one in verdict.passes} == {one.question for one in verdict.statistics} == {"precision"}


def test_what_the_wide_copy_alone_shows_is_missed_without_it(home):
    """A weight wrong by less than bf16 can show: the copy sees it, and without the copy the check passes."""
    model = harness.reference_model(SMALL, dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 7] *= 1.25
    verdict = harness.check(SMALL, model)
    assert verdict.status is Status.DEVIATES
    assert answered(verdict)["function"] is Status.DEVIATES
    assert ok(answered(verdict)["precision"])
    assert "the function is wrong, by less than round-off" in str(verdict)
    assert harness.check(SMALL, model, upcast=False).ok


def test_a_precision_path_that_is_wrong_alone_fails_alone(home):
    """A norm that rounds too much on the way, in bf16 only: the function is right, and the precision deviates."""
    model = harness.reference_model(SMALL, dtype=torch.bfloat16)

    class Rounding(torch.nn.Module):
        """Keeps two bits of what a norm gives where it computes in 16 bits."""

        def __init__(self, norm):
            super().__init__()
            self.norm = norm

        def forward(self, hidden):
            normed = self.norm(hidden)
            step = 2.0 ** (normed.abs().clamp(min=1e-30).log2().floor() - 1)
            return (normed / step).round() * step if normed.dtype == torch.bfloat16 else normed

    model.model.norm = Rounding(model.model.norm)
    verdict = harness.check(SMALL, model)
    assert ok(answered(verdict)["function"]), str(verdict)
    assert answered(verdict)["precision"] is verdict.status is Status.DEVIATES
    assert "the weights and the function are right" in str(verdict)


class Unwidened(HFEngine):
    """An engine whose widening goes wrong in a given way."""

    def __init__(self, fault, **options):
        super().__init__(Options(model="golden/small/model", dtype="bfloat16", **options), text="unwidened")
        self._fault = fault

    def upcast(self):
        wide = super().upcast()
        return self._fault(wide)


def _no_copy(_wide):
    raise MemoryError("no room for a copy\nof 4 bytes a weight")


def _no_opening(wide):
    def fails():
        raise EngineError("the wide kernel is not built", fix="Build it")

    wide._open = fails
    return wide


def _no_run(wide):
    def fails(*_arguments):
        raise NotImplementedError

    wide._step = fails
    return wide


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (_no_copy, "its float32 copy fails (MemoryError: no room for a copy)"),
        (_no_opening, "its float32 copy fails (EngineError: the wide kernel is not built"),
        (_no_run, "its float32 copy fails (NotImplementedError: no message)"),
    ],
)
def test_an_upcast_that_fails_is_a_reason_and_no_error(home, monkeypatch, fault, words):
    """Whatever is raised when a candidate is widened or its copy run, the run as shipped is judged."""
    monkeypatch.delenv("HARNESS_TRACEBACK", raising=False)
    verdict = harness.check(SMALL, Unwidened(fault))
    assert verdict.ok, str(verdict)
    assert answered(verdict)["function"] is Status.UNMEASURED
    assert verdict.status is answered(verdict)["precision"]
    [reason] = power_of(verdict, "function").unmeasured
    assert reason.startswith(f"the function: {words}")
    assert len(reason.splitlines()) == 1


def test_an_upcast_that_fails_excuses_nothing(home, monkeypatch):
    """A candidate that is wrong as shipped fails, whatever its copy does."""
    monkeypatch.delenv("HARNESS_TRACEBACK", raising=False)
    write_model(home / "golden/other", seed=1)
    engine = Unwidened(_no_copy)
    engine.options = replace(engine.options, model="golden/other")
    verdict = harness.check(SMALL, engine)
    assert verdict.status is Status.DEVIATES
    assert answered(verdict) == {"function": Status.UNMEASURED, "precision": Status.DEVIATES}


def test_a_copy_that_is_another_program_is_not_judged(home):
    """A widening that also changes the attention kernel answers another question, and the answer says so."""

    def eager(wide):
        wide._given.config._attn_implementation = "eager"
        return wide

    verdict = harness.check(SMALL, Unwidened(eager))
    assert verdict.ok
    assert answered(verdict)["function"] is Status.UNMEASURED
    assert power_of(verdict, "function").unmeasured == (
        "the function: widening changed attn from sdpa to eager, so it is another program",
    )


def test_a_copy_that_still_computes_in_16_bits_is_not_judged(home):
    """A wrapped forward keeps the model it wraps: its copy is not wide, which is no fault of the function."""
    model = harness.reference_model(SMALL, dtype=torch.bfloat16)
    inner = model.forward

    @wraps(inner)
    def wrapped(*arguments, **keywords):
        return inner(*arguments, **keywords)

    model.forward = wrapped
    verdict = harness.check(SMALL, model)
    assert verdict.ok, str(verdict)
    assert answered(verdict)["function"] is not Status.DEVIATES


def test_a_trace_is_judged_as_it_is(home):
    """A trace made elsewhere is asked what it can answer: its copy where it has one, else the reason it gives."""
    golden = harness.load_golden(SMALL)
    with HFEngine(Options(model="golden/small/model", dtype="bfloat16"), text="mine") as engine:
        shipped = running.forced_trace(engine, golden, upcast=False)
        with engine.upcast() as wide:
            copied = running._on_golden(golden, wide, golden.suite.runs, views=("replay", "prefill"))
    assert isinstance(shipped, Trace)
    both = harness.check(golden, replace(shipped, upcast=copied))
    assert both.ok, str(both)
    assert list(answered(both)) == ["function", "precision"]
    alone = harness.check(golden, replace(shipped, upcast_reason="the machine is elsewhere"))
    assert alone.ok
    assert power_of(alone, "function").unmeasured == ("the function: the machine is elsewhere",)


def test_json_has_the_answers_and_the_statistics(home):
    """A verdict as plain data says of each question what was answered, what was measured, and what was not seen."""
    data = harness.check(SMALL, "hf:dtype=bfloat16").to_dict()
    assert [one["question"] for one in data["answers"]] == ["function", "precision"]
    for answer in data["answers"]:
        assert answer["status"] in ("identical", "drift")
        assert answer["power"]["level"] == "logits"
        assert answer["power"]["positions"] > 0
        assert answer["power"]["smallest"] > 0
        assert "effective" in answer
    pooled = {(one["question"], one["name"]): one for one in data["statistics"] if one["unit"] == "all"}
    names = {"error", "gain", "log p", "entropy", "margin", "constant shift", "direction int8", "direction int4"}
    assert {(question, name) for question in ("function", "precision") for name in names} == set(pooled)
    error = pooled["precision", "error"]
    assert error["precision"] == "bfloat16"
    assert error["significant"][1] <= error["failing"][1]
    # One side of a magnitude is open, and JSON has no infinity.
    assert error["significant"][0] is None
    assert error["value"] <= error["significant"][1]
    assert "quantile" in error["why"]


# --- what a served model shows ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_top_entries_are_judged_as_numbers(home, dtype):
    """With show=top the highest entries of each step are enough to pass, and the answer says what was not seen."""
    verdict = harness.check(SMALL, f"hf:dtype={dtype},show=top")
    assert verdict.ok, str(verdict)
    assert verdict.power.level == "top entries"
    assert any("prompt's own positions" in reason for reason in verdict.power.unmeasured)
    assert {one.view for one in verdict.passes} == {"generate"}
    assert {one.name for one in verdict.statistics} == {"top entries", "worst step"}
    function = answered(verdict)["function"]
    assert ok(function) if dtype == "float32" else function is Status.UNMEASURED


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_alone_pass_only_where_they_can_tell(home, dtype):
    """Eighteen tokens of a small model tell too little: the same tokens are `unmeasured`, and it is said why."""
    verdict = harness.check(SMALL, f"hf:dtype={dtype},show=tokens")
    assert verdict.status is Status.UNMEASURED
    assert verdict.power.level == "tokens"
    assert {finding.check for finding in verdict.failures} <= {"coverage", "power"}
    assert "logits: the candidate shows tokens alone" in verdict.power.unmeasured
    assert all(one.flips == 0 and one.ratio is None for one in verdict.passes)


@pytest.mark.parametrize("show", ["tokens", "top"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_weights_fail_however_little_is_shown(home, show, dtype):
    """Another model's tokens, or its top entries, deviate in any precision."""
    write_model(home / "golden/other", seed=1)
    verdict = harness.check(SMALL, f"hf:model=golden/other,dtype={dtype},show={show}")
    assert verdict.status is Status.DEVIATES, str(verdict)


@pytest.mark.parametrize(
    ("host", "suite", "show"),
    [
        ("bloom-tiny", "translate", "top"),
        ("bloom-raw", "translate", "top"),
        ("llama-tiny", "core", "tokens"),
        ("gpt2-tiny", "core", "tokens"),
        ("gpt2-tiny", "translate", "top"),
    ],
)
def test_a_served_model_is_ok(goldens, host, suite, show):
    """Top entries of any model, and tokens of one that is sure of its tokens, are enough for a pass in bf16."""
    verdict = harness.check(goldens / host / suite, f"hf:dtype=bfloat16,show={show}", quick=True)
    assert verdict.ok, str(verdict)
    assert verdict.power.level == {"tokens": "tokens", "top": "top entries"}[show]
    assert verdict.power.smallest < 8


# --- rounded weights ----------------------------------------------------------------------------


def round_weights(model, scheme):
    """Round the weights of the blocks in place, and keep the model's dtype."""
    bits, group = quantise.parse(scheme)
    for _, layer, input_dim in block_layers(model):
        rounded = quantise.round_to_nearest(layer.weight, bits, group, input_dim=input_dim)
        layer.weight.data = rounded.to(layer.weight.dtype)
    return model


def rounded_checkpoint(home, scheme):
    """A checkpoint beside the golden's own, whose weights went through a quantiser; its directory."""
    directory = Path("golden") / f"rounded-{scheme}"
    shutil.copytree("golden/small/model", directory)
    round_weights(harness.reference_model(SMALL, dtype=torch.float32), scheme).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_declared_int8_weights_are_ok(home, dtype):
    """int8 weights that are declared are held against the reference's own int8 weights, in both questions."""
    verdict = harness.check(SMALL, f"hf:dtype={dtype},weights=int8")
    assert verdict.ok, str(verdict)
    assert verdict.settings["weights"] == "int8"
    assert all(ok(status) for status in answered(verdict).values())
    assert all(answer.effective == "" for answer in verdict.answers)
    assert "direction int8" not in {one.name for one in verdict.statistics}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_declared_int4_weights_are_ok_where_tokens_are_forced(home, dtype):
    """int4 turns tokens of the golden: what the reference's own int4 weights choose is right."""
    verdict = harness.check(SMALL, f"hf:dtype={dtype},weights=int4", quick=True)
    assert verdict.ok, str(verdict)


def test_declared_int4_weights_are_ok_where_tokens_are_free(home):
    """Behind a divergence too, a declared quantiser is held against the reference with its weights rounded so."""
    verdict = harness.check(SMALL, "hf:dtype=float32,weights=int4")
    assert verdict.ok, str(verdict)


def test_a_declared_quantiser_leaves_the_other_directions_as_they_are(home):
    """The replicas' scatter along int4 is the same number whether or not the candidate declares int8."""
    own = [
        next(one.own for one in harness.check(SMALL, spec).statistics if one.name == "direction int4")
        for spec in ("hf:dtype=float32", "hf:dtype=float32,weights=int8")
    ]
    assert own[1] == pytest.approx(own[0], rel=0.05)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_undeclared_rounded_weights_are_named(home, scheme, dtype):
    """A live model whose weights were rounded and that does not say so deviates, and is told to which scheme."""
    verdict = harness.check(SMALL, round_weights(harness.reference_model(SMALL, dtype=dtype), scheme))
    assert verdict.status is Status.DEVIATES
    assert answered(verdict)["function"] is Status.DEVIATES
    assert verdict.answers[0].effective == f"float32 on {scheme} weights"
    [finding] = [one for one in verdict.failures if (one.check, one.question) == ("weights", "function")]
    assert f"what {scheme} weights give (coefficient 1.0" in finding.message
    assert f"hf:weights={scheme}" in finding.fix


def test_the_wrong_quantiser_is_no_excuse(home):
    """int4 weights declared as int8 deviate, and so do weights that were not rounded at all."""
    directory = rounded_checkpoint(home, "int4")

    class Mislabelled(HFEngine):
        """Says int8 in its name and its settings, whatever it loads."""

        @property
        def settings(self):
            return {**super().settings, "weights": "int8"}

    for model in (directory, Path("golden/small/model")):
        engine = Mislabelled(Options(model=str(model), dtype="float32"), text="mislabelled")
        verdict = harness.check(SMALL, engine, reference="golden/small/model")
        assert verdict.status is Status.DEVIATES, str(verdict)


@pytest.mark.parametrize("scheme", ["int8", "int4-g32", "int4-g16", "int6-g16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_unknown_quantiser_is_held_against_round_to_nearest(home, scheme, dtype):
    """A checkpoint that is as far from the reference as plain rounding at its bits and group is ok."""
    directory = rounded_checkpoint(home, scheme)
    verdict = harness.check(SMALL, f"hf:model={directory},quantised={scheme},dtype={dtype}", quick=True)
    assert verdict.ok, str(verdict)
    assert all(ok(status) for status in answered(verdict).values())
    assert all(any("cannot be reproduced" in one for one in answer.power.unmeasured) for answer in verdict.answers)
    assert verdict.statistics == ()


def test_an_unknown_quantiser_is_ok_in_every_run(home):
    """A pass that visits one prompt is held against what plain rounding does to that prompt."""
    directory = rounded_checkpoint(home, "int8")
    verdict = harness.check(SMALL, f"hf:model={directory},quantised=int8,dtype=float32")
    assert verdict.ok, str(verdict)


def test_an_unknown_quantiser_may_round_less_than_its_precision(goldens, tmp_path):
    """int8 weights are finer than bf16 arithmetic: round-off of the precision is no fault of the quantiser."""
    golden = goldens / "llama-tiny" / "translate"
    shutil.copytree(goldens / "llama-tiny" / "model", tmp_path / "int8")
    round_weights(harness.reference_model(golden, dtype=torch.float32), "int8").save_pretrained(tmp_path / "int8")
    verdict = harness.check(golden, f"hf:model={tmp_path / 'int8'},quantised=int8,dtype=bfloat16", quick=True)
    assert verdict.ok, str(verdict)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_are_not_quantised_as_declared_are_found(home, dtype):
    """The plain checkpoint declared as int4-g32 is closer to the reference than any quantiser of that width is."""
    verdict = harness.check(SMALL, f"hf:quantised=int4-g32,dtype={dtype}")
    assert verdict.status is Status.DEVIATES
    assert all(status is Status.DEVIATES for status in answered(verdict).values())
    assert all(finding.check == "quantiser" for finding in verdict.failures)
    assert "the weights are not quantised as declared" in str(verdict)


def test_a_quantiser_that_loses_too_much_is_found(home):
    """int4 weights declared as int8 diverge more than int8 does, and so do wrong weights declared as quantised."""
    directory = rounded_checkpoint(home, "int4")
    verdict = harness.check(SMALL, f"hf:model={directory},quantised=int8,dtype=float32", quick=True)
    assert verdict.status is Status.DEVIATES
    write_model(home / "golden/other", seed=1)
    wrong = harness.check(SMALL, "hf:model=golden/other,quantised=int4-g32", quick=True)
    assert wrong.status is Status.DEVIATES


# --- without the reference ----------------------------------------------------------------------

NOT_AT_HAND = "the golden's model is not at hand to ask"


@pytest.fixture
def moved(home):
    """The golden's model, no longer beside it."""
    return Path(shutil.move("golden/small/model", "elsewhere"))


def test_the_reference_is_needed_for_rounded_weights(moved):
    """What int8 weights should give is computed by the live reference: without it nothing is said about them."""
    verdict = harness.check(SMALL, f"hf:model={moved},weights=int8")
    assert verdict.status is Status.UNMEASURED
    for answer in verdict.answers:
        assert answer.status is Status.UNMEASURED
        assert any("int8" in reason and NOT_AT_HAND in reason for reason in answer.power.unmeasured)
    assert harness.check(SMALL, f"hf:model={moved},weights=int8", reference=moved).ok


def test_the_reference_is_needed_for_an_unknown_quantiser(moved):
    """An unknown quantiser is held against the reference's own rounding: without it nothing is said."""
    verdict = harness.check(SMALL, f"hf:model={moved},quantised=int8")
    assert verdict.status is Status.UNMEASURED
    assert all(NOT_AT_HAND in finding.message for finding in verdict.failures)
    assert {finding.question for finding in verdict.failures} == {"function", "precision"}


def test_the_reference_is_not_needed_for_anything_else(moved):
    """A candidate in a plain precision is judged by the golden alone."""
    verdict = harness.check(SMALL, f"hf:model={moved}")
    assert verdict.ok
    assert not any(NOT_AT_HAND in reason for answer in verdict.answers for reason in answer.power.unmeasured)


def test_the_reference_is_needed_behind_a_divergence(home):
    """A free run that turned at a step is judged up to there by the golden; what follows needs the reference."""
    golden = harness.load_golden(SMALL)
    with HFEngine(Options(model="golden/small/model", dtype="bfloat16", show="tokens"), text="mine") as engine:
        trace = running.forced_trace(engine, golden, upcast=False)
    turned = turned_at(golden, trace, request=0, step=1)
    far = replace(golden, directory=None)
    verdict = harness.check(far, turned)
    assert f"4 free tokens behind a first divergence: {NOT_AT_HAND}" in verdict.power.unmeasured
    assert any(finding.check == "tokens" and NOT_AT_HAND in finding.message for finding in verdict.failures)
    asked = harness.check(far, turned, reference="golden/small/model")
    assert not any("behind a first divergence" in reason for reason in asked.power.unmeasured)
    told = []
    harness.check(golden, turned, progress=told.append)
    assert told == ["reference on the candidate's own tokens"]


def test_the_wrong_model_is_not_asked(home):
    """A trace is judged as far as the golden goes: another model beside it says nothing about what follows."""
    golden = harness.load_golden(SMALL)
    with HFEngine(Options(model="golden/small/model", dtype="bfloat16", show="tokens"), text="mine") as engine:
        trace = running.forced_trace(engine, golden, upcast=False)
    write_model(home / "golden/small/model", seed=9)
    verdict = harness.check(golden, turned_at(golden, trace, request=0, step=1))
    assert not verdict.ok
    assert verdict.status is not Status.STALE
    assert any("behind a first divergence" in one and "is not the one" in one for one in verdict.power.unmeasured)


def turned_at(golden, trace, *, request, step):
    """A trace whose first free continuation takes the reference's second-best token at one step."""
    second = int(golden.rows.top_ids[sum(len(given.tokens) for given in golden.generations[:request]) + step, 1])
    passes = list(trace.passes)
    place = next(i for i, one in enumerate(passes) if one.view == "generate" and request in one.requests)
    generations = list(passes[place].generations)
    index = passes[place].requests.index(request)
    tokens = list(generations[index].tokens)
    tokens[step] = second
    generations[index] = replace(generations[index], tokens=tuple(tokens))
    passes[place] = replace(passes[place], generations=tuple(generations))
    return replace(trace, passes=tuple(passes))


# --- tensor parallelism -------------------------------------------------------------------------


class Parallel(HFEngine):
    """Says that it runs on several ranks; its copy says so too."""

    ranks = 2

    def __init__(self, dtype):
        super().__init__(Options(model="golden/small/model", dtype=dtype), text="parallel")

    @property
    def settings(self):
        return {**super().settings, "tensor_parallel": self.ranks}

    def upcast(self):
        wide = super().upcast()
        wide.__class__ = type(self)
        return wide


class MoreParallel(Parallel):
    """On more ranks than any floor was measured for."""

    ranks = 4


@pytest.fixture
def parallel_golden(home):
    """A golden with floors of a tensor parallelism of two, written and read again."""
    flow.record(
        "golden/small/model",
        "prompts/small.toml",
        out="golden/small/parallel",
        precisions=("bfloat16", "float32"),
        parallel=(2,),
    )
    return harness.load_golden("golden/small/parallel")


def test_a_declared_parallelism_is_recorded(parallel_golden):
    """Each precision has a floor of its own for each size, and the plain floors are what they were."""
    assert set(parallel_golden.floors) == {"float32", "float32/tp2", "bfloat16", "bfloat16/tp2"}
    plain = harness.load_golden(SMALL)
    for name in ("float32", "bfloat16"):
        assert (parallel_golden.floors[name].sigma == plain.floors[name].sigma).all()
        assert (parallel_golden.floors[f"{name}/tp2"].sigma != plain.floors[name].sigma).any()
    assert any("sums in 2 pieces" in family for family in parallel_golden.floors["bfloat16/tp2"].families)
    assert set(plain.floors) == {"float32", "bfloat16", "float16"}


def numbers(verdict):
    """Statistics and lines of a verdict, but for the time that they took."""
    return verdict.statistics, [replace(one, seconds=0.0) for one in verdict.passes]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_declared_parallelism_has_its_own_floor(parallel_golden, dtype):
    """Settings that say tensor_parallel=2 are held against the replicas of that size, in both questions."""
    found = harness.check(parallel_golden, Parallel(dtype))
    assert found.ok, str(found)
    assert list(answered(found)) == (["function", "precision"] if dtype == "bfloat16" else ["function"])
    plain = harness.check(parallel_golden, f"hf:dtype={dtype}")
    assert plain.ok, str(plain)
    assert numbers(found) != numbers(plain)
    exchanged = {name: parallel_golden.floors[f"{name}/tp2"] for name in ("float32", "bfloat16")}
    expected = harness.check(replace(parallel_golden, floors=exchanged), f"hf:dtype={dtype}")
    assert numbers(found) == numbers(expected)


def test_a_parallelism_without_a_floor_takes_the_plain_one(parallel_golden):
    """A size that was not recorded is judged by the plain replicas of its precision."""
    found, plain = (harness.check(parallel_golden, one) for one in (MoreParallel("bfloat16"), "hf:dtype=bfloat16"))
    assert found.ok
    assert numbers(found) == numbers(plain)


def test_a_parallel_floor_decides_about_its_own_centre(home):
    """A step is decidable under tensor parallelism by the margins of the weights as that precision holds them."""
    golden = harness.load_golden(SMALL)
    centre = without_margins(golden)
    floors = {"bfloat16": golden.floors["bfloat16"], "bfloat16/tp2": golden.floors["bfloat16"]}
    decidable = store.decidable_steps(replace(golden, floors=floors, centres={"bfloat16": centre}))
    assert not decidable["bfloat16"].any()
    assert (decidable["bfloat16/tp2"] == decidable["bfloat16"]).all()


def without_margins(golden):
    """A centre with whose logits no step has a margin."""
    rows = golden.rows
    return Centre(
        logsumexp=rows.logsumexp,
        logp=rows.logp,
        entropy=rows.entropy,
        projections=rows.projections,
        top_ids=rows.top_ids,
        top_logits=rows.top_logits * 0,
        shift=1.0,
        inexact_tensors=1,
    )


# --- what record refuses --------------------------------------------------------------------------


def test_a_precision_without_a_floor_is_refused(home):
    """A precision that cannot be recorded is bad input, and nothing is written."""
    with pytest.raises(HarnessError, match="float64"):
        flow.record("golden/small/model", "prompts/small.toml", out="golden/small/new", precisions=("float64",))
    assert not Path("golden/small/new").exists()
