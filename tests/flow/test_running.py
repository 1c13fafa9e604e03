"""run: the work of a golden or a suite, done here and judged elsewhere."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import harness
from harness.engines.hf import HFEngine, Options
from harness.errors import GoldenError, SuiteError, UsageError
from harness.values import Status, work_digest
from tests.support import SUITE, write_suite

SMALL, MODEL, PROMPTS = "golden/small/small", "golden/small/model", "prompts/small.toml"


def test_a_golden_is_work(home):
    """Each run and view of the suite is in the trace, with the copy of a 16-bit candidate and the golden's digest."""
    golden = harness.load_golden(SMALL)
    trace = harness.run("hf:dtype=bfloat16", golden)
    assert {(one.run, one.view) for one in trace.passes} >= {("batched", "prefill"), ("single", "generate")}
    assert {one.view for one in trace.upcast.passes} == {"replay", "prefill"}
    assert trace.forced == work_digest(golden)
    assert harness.check(golden, trace).ok


def test_the_model_need_not_be_beside(home, tmp_path):
    """On the machine with the device lie a copy of the golden and, elsewhere, the weights."""
    shutil.copytree(SMALL, tmp_path / "copied")
    shutil.copytree(MODEL, tmp_path / "weights")
    trace = harness.run("hf:dtype=float32", tmp_path / "copied", model=tmp_path / "weights")
    verdict = harness.check(SMALL, trace)
    assert verdict.status is Status.IDENTICAL, str(verdict)


def test_other_weights_are_found_from_a_trace(home, tmp_path):
    """A trace of a wrong candidate fails as the candidate itself does."""
    with HFEngine(Options(model=MODEL, dtype="float32"), text="mine") as engine:
        engine.model.model.layers[1].mlp.down_proj.weight.data[3] *= 1.2
        trace = harness.run(engine.model, SMALL)
    assert harness.check(SMALL, trace).status is Status.DEVIATES


def test_a_trace_of_another_golden_is_stale(home):
    """A golden that was recorded with other tokens since says that the trace is old."""
    golden = harness.load_golden(SMALL)
    trace = harness.run("hf:dtype=float32", golden)
    first = golden.generations[0]
    changed = replace(first, tokens=(*first.tokens[:-1], (first.tokens[-1] + 1) % golden.vocabulary))
    verdict = harness.check(replace(golden, generations=(changed, *golden.generations[1:])), trace)
    assert verdict.status is Status.STALE
    assert "other prompt ids or tokens" in str(verdict)


def test_a_trace_of_another_suite_is_stale(home):
    """A suite that was edited since the trace was made says so."""
    trace = harness.run("hf:dtype=float32", SMALL)
    write_suite(Path(PROMPTS), SUITE.replace("In the morning", "In the evening"))
    harness.record(MODEL, PROMPTS, out=SMALL, update=True, reason="another prompt", replicas=2)
    assert harness.check(SMALL, trace).status is Status.STALE


def test_quick_traces_are_judged_by_the_quick_runs(home):
    """What was run is what is judged: no missing output is found where none was asked for."""
    trace = harness.run("hf:dtype=float32", SMALL, quick=True)
    assert {one.run for one in trace.passes} == {"batched"}
    assert harness.check(SMALL, trace).ok
    whole = harness.run("hf:dtype=float32", SMALL)
    verdict = harness.check(SMALL, whole, quick=True)
    assert {one.run for one in verdict.passes} == {"batched"}
    assert verdict.ok


def test_a_trace_cannot_leave_a_pass_out(home):
    """A trace from which an output was taken away is structural, however good the rest is."""
    trace = harness.run("hf:dtype=float32", SMALL)
    cut = replace(trace, passes=trace.passes[1:])
    verdict = harness.check(SMALL, cut)
    assert verdict.status is Status.STRUCTURAL
    assert "is missing" in str(verdict)


def test_a_cut_vocabulary_is_a_trace_that_says_so(home, tmp_path):
    """A candidate with fewer columns runs nothing, and the verdict names the columns and nothing else."""
    with HFEngine(Options(model=MODEL, dtype="float32"), text="mine") as engine:
        engine.model.resize_token_embeddings(200)
        trace = harness.run(engine.model, SMALL)
    assert trace.passes == ()
    verdict = harness.check(SMALL, trace)
    assert verdict.status is Status.STRUCTURAL
    assert [one.check for one in verdict.findings] == ["vocabulary"]


# --- a suite alone -----------------------------------------------------------------------------


@pytest.mark.parametrize(("show", "level"), [("tokens", "tokens"), ("top", "top entries"), ("logits", "tokens")])
def test_a_suite_alone_gives_what_is_free(home, show, level):
    """Without a golden nothing is forced: the candidate's own tokens, and their top entries where it shows them."""
    trace = harness.run(f"hf:dtype=bfloat16,show={show}", PROMPTS, model=MODEL)
    assert {one.view for one in trace.passes} == {"generate"}
    assert trace.forced == ""
    verdict = harness.check(SMALL, trace)
    assert verdict.power.level == level
    assert "no golden was at hand" in str(verdict)
    # The small suite has too few tokens to tell anything by them alone.
    assert verdict.ok is (show == "top"), str(verdict)
    assert show == "top" or verdict.status is Status.UNMEASURED


def test_a_suite_alone_still_finds_other_weights(home):
    """Tokens alone are enough for a gross fault: the wrong model is no pass."""
    with HFEngine(Options(model=MODEL, dtype="float32"), text="mine") as engine:
        engine.model.lm_head.weight.data = engine.model.lm_head.weight.data.flip(0)
        engine.model.save_pretrained("broken")
    for file in Path(MODEL).glob("tokenizer*"):
        shutil.copy(file, "broken")
    trace = harness.run("hf:dtype=float32", PROMPTS, model="broken")
    assert not harness.check(SMALL, trace).ok


def test_a_suite_with_eos_stops(home):
    """A suite that stops at the end of a text is run with the model's own stop ids."""
    write_suite(Path(PROMPTS), SUITE.replace("ignore-eos", "eos"))
    harness.record(MODEL, PROMPTS, out="golden/small/eos", replicas=2)
    trace = harness.run("hf:dtype=float32", PROMPTS, model=MODEL)
    assert harness.check("golden/small/eos", trace).status not in (Status.STRUCTURAL, Status.STALE)


def test_what_cannot_be_run_is_refused(home):
    """Work that is not there, and a live model without a tokenizer on a suite of text."""
    with pytest.raises(GoldenError, match="there is no golden"):
        harness.run("hf", "golden/nothing/there")
    with pytest.raises(SuiteError):
        harness.run("hf", MODEL + "/config.json")
    with pytest.raises(UsageError, match="names no model"):
        harness.run("hf", PROMPTS)
    with (
        HFEngine(Options(model=MODEL, dtype="float32"), text="mine") as engine,
        pytest.raises(UsageError, match="Run it on the golden"),
    ):
        harness.run(engine.model, PROMPTS)


# --- comparing ---------------------------------------------------------------------------------


def test_a_golden_and_a_trace_are_compared_as_checked(home, tmp_path):
    """`compare` of a golden and a trace, in either order and from files, is the check; of two traces it is refused."""
    trace = harness.run("hf:dtype=float32", SMALL)
    trace.save(tmp_path / "one.trace")
    wanted = harness.check(SMALL, trace)
    for pair in ((SMALL, tmp_path / "one.trace"), (trace, harness.load_golden(SMALL))):
        found = harness.compare(*pair)
        assert (found.status, found.findings, found.statistics) == (wanted.status, wanted.findings, wanted.statistics)
    with pytest.raises(UsageError, match="two traces"):
        harness.compare(trace, trace)
