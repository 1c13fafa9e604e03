"""Bugs of sharding put into the real ranks are found in fp32: by what the ranks show of themselves, and by numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

import harness
from harness.mutations.ranks import RANK_MUTATIONS
from harness.values import Run, Status

#: One pass, in which micro-batches have two rows, shows all of these bugs.
PASS = Run(name="batched", batch_size=4, views=("prefill",), quick=True)
#: What is wrong without a wrong number: each rank computes the whole model.
RIGHT_NUMBERS = {"tp-size-1"}
#: Bugs whose every rank is in the right place with the right weights, and agrees with the others.
BY_NUMBERS = {
    "tp-bias-xN", "tp-bf16-reduce", "tp-bf16-reduce-rank", "pos-alibi-rank-slopes", "pos-alibi-local-count",
    "pp-batch-mix",
}  # fmt: skip
#: Each with one of its models, so that all models have their turn.
CASES = [(one, sorted(one.hosts)[number % len(one.hosts)]) for number, one in enumerate(RANK_MUTATIONS)]
IDS = [f"{one.id}-{host}" for one, host in CASES]


def golden_of(goldens, host):
    """A short golden of a model, with one pass."""
    golden = harness.load_golden(goldens / host / "translate")
    # Without a directory the runs are these, and not those of the suite's file.
    return replace(golden, suite=replace(golden.suite, runs=(PASS,)), directory=None)


@pytest.fixture(scope="module", autouse=True)
def _team(idle_ranks):
    """Four processes for all of these: starting them costs more than the rest."""
    with idle_ranks():
        yield


@pytest.fixture(scope="module")
def traced(goldens):
    """Makes the trace of a SPEC on a model's golden, once each, and judges one."""
    traces = {}

    def trace_of(host, spec):
        if (host, spec) not in traces:
            traces[host, spec] = harness.run(spec, golden_of(goldens, host), model=goldens / host / "model")
        return traces[host, spec]

    def judged(host, trace):
        return harness.check(golden_of(goldens, host), trace, reference=goldens / host / "model")

    return trace_of, judged


def blinded(trace):
    """The trace without what ranks show of their weights, their blocks and each other."""
    return replace(trace, settings={key: trace.settings[key] for key in trace.settings.keys() - {"ranks", "differing"}})


def named(verdict, check):
    """The ranks that a check's findings name, one a finding."""
    return [int(one.message.split()[1]) for one in verdict.failures if one.check == check]


@pytest.mark.parametrize(("bug", "host"), CASES, ids=IDS)
def test_a_bug_of_sharding_is_found(traced, bug, host):
    """Where a rank holds something else than its part, exactly the wrong ranks are named; else the numbers deviate."""
    trace_of, judged = traced
    verdict = judged(host, trace_of(host, bug.candidate()))
    assert verdict.status is (Status.DEVIATES if bug.id in BY_NUMBERS else Status.STRUCTURAL), str(verdict)
    wrong = range(len(verdict.settings["ranks"])) if bug.where == "all" else bug.where
    if bug.weights:
        assert named(verdict, "ranks' weights") == list(wrong)
    elif bug.id not in RIGHT_NUMBERS:  # what is not cut at all may be told as weights that are not a rank's part, too
        assert named(verdict, "ranks' weights") == []


@pytest.mark.parametrize(
    ("bug", "host"),
    [(bug, host) for bug, host in CASES if bug.id not in RIGHT_NUMBERS | BY_NUMBERS],
    ids=[id for id, (bug, _) in zip(IDS, CASES, strict=True) if bug.id not in RIGHT_NUMBERS | BY_NUMBERS],
)
def test_the_numbers_alone_find_it(traced, bug, host):
    """Ranks that showed nothing of themselves would not get away with it."""
    trace_of, judged = traced
    verdict = judged(host, blinded(trace_of(host, bug.candidate())))
    assert verdict.status is Status.DEVIATES, str(verdict)


#: Where one rank or stage is wrong and no weight shows it: what the report says.
FIRST_WRONG = {
    "pos-alibi-rank-slopes": "rank 1: its part of the input of transformer.h.0.self_attention.dense; the other ranks'",
    "pp-batch-mix": "what stage 1 is sent (the input of model.layers.3), though all of stage 0 is right",
    "tp-bf16-reduce-rank": "rank 1: its partial product of transformer.h.0.self_attention.dense; the other ranks'",
}


@pytest.mark.parametrize(("bug", "host"), [(bug, host) for bug, host in CASES if bug.id in FIRST_WRONG])
def test_the_first_wrong_place_is_named(goldens, bug, host):
    """Where the weights are right, what ranks compute inside their blocks names the rank, stage or sum."""
    model = goldens / host / "model"
    verdict = harness.check(golden_of(goldens, host), bug.candidate(), reference=model)
    assert verdict.sharding.first_wrong.startswith(FIRST_WRONG[bug.id])


def test_a_size_that_never_ran_has_right_numbers(traced):
    """Ranks that each run the whole model are found by their shapes: their logits are those of the model."""
    trace_of, judged = traced
    bug, host = next((bug, host) for bug, host in CASES if bug.id == "tp-size-1")
    trace = trace_of(host, bug.candidate())
    verdict = judged(host, trace)
    assert [one.check for one in verdict.failures][:1] == ["settings"]
    assert "says tensor_parallel=3, but tensor_parallel=1 is in force" in verdict.failures[0].message
    assert judged(host, blinded(replace(trace, declared={}))).ok


@pytest.mark.parametrize("host", ["bloom-tiny", "gpt2-tiny", "llama-tiny"])
@pytest.mark.parametrize("spec", ["tp:size=3", "pp:stages=2,micro_batches=2", "tp:size=2,stages=2"])
def test_a_correct_run_in_the_same_team_is_ok(traced, host, spec):
    """The processes that ran the bugs run the model itself rightly; nothing of a bug is left in them."""
    trace_of, judged = traced
    verdict = judged(host, trace_of(host, f"{spec},dtype=float32"))
    assert verdict.ok, str(verdict)
    assert judged(host, blinded(trace_of(host, f"{spec},dtype=float32"))).ok


def test_bug_and_model_take_turns(traced, goldens):
    """The same bug is found again after a correct run, and the correct run after it is ok again."""
    _, judged = traced
    golden = golden_of(goldens, "bloom-tiny")
    bug = next(one for one in RANK_MUTATIONS if one.id == "pos-alibi-rank-slopes")
    for spec in (bug.candidate(), "tp:size=2,dtype=float32") * 2:
        trace = harness.run(spec, golden, model=goldens / "bloom-tiny" / "model")
        assert judged("bloom-tiny", trace).ok == ("prepare" not in spec)
