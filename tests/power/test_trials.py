"""Trials: what is planned, and what every rule says of right and wrong implementations on a small real model."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from harness import flow, suites
from harness.criteria import CRITERIA
from harness.engines import hf
from harness.engines.spec import parse_spec
from harness.errors import EngineError, StaleError, UsageError
from harness.mutations import hosts
from harness.mutations.benign import FAMILIES, kin_of
from harness.mutations.catalogue import CATALOGUE
from harness.mutations.mutation import hooked, patched
from harness.numerics.constants import EFFECT, SPREADS
from harness.power import drawn, trials
from harness.power.nulls import floors
from harness.power.opening import Kept, spec_text
from harness.power.trial import ENDS, QUICK
from harness.power.trials import planned, suite_for
from tests.power.synthetic import mutation

HOST = "llama-tiny"
PRECISIONS = ("float32", "bfloat16")

# --- what is planned ---------------------------------------------------------------------------


def places(asked):
    """(name, host, precision, strength, group) of each."""
    return [(one.name, one.host, one.precision, one.strength, one.group) for one in asked]


def precisions_of(bug):
    """Its own, or both."""
    own = dict(bug.options).get("dtype")
    return PRECISIONS if own is None else (own,)


def test_every_bug_is_asked_once_of_every_host():
    """In each precision and at each strength, where bugs are not swept as reported; nothing twice, nothing else."""
    asked = [one for one in planned() if one.kind != "benign"]
    expected = Counter(
        (bug.id, host, precision, strength)
        for bug in CATALOGUE.values()
        for host in bug.hosts
        for precision in precisions_of(bug)
        for strength in (bug.strengths[:1] if host in trials._NOT_SWEPT else bug.strengths)
    )
    assert Counter((one.name, one.host, one.precision, one.strength) for one in asked) == expected
    assert max(expected.values()) == 1
    assert all(len(bug.hosts - trials._NOT_SWEPT) for bug in CATALOGUE.values() if len(bug.strengths) > 1)
    assert all(one.status == "skipped" and one.version == asked[0].version for one in asked)


def test_controls_are_no_bugs():
    """What is harmless is a control, all else of the catalogue a bug."""
    kinds = {(one.name, one.kind) for one in planned() if one.kind != "benign"}
    assert kinds == {(bug.id, "control" if bug.harmless else "bug") for bug in CATALOGUE.values()}


def test_what_shows_in_tokens_is_asked_where_texts_end():
    """On prompts of its own; what shows in logits on those drawn for each group."""
    for one in planned():
        if one.kind != "benign":
            assert one.group == (0 if CATALOGUE[one.name].shows == "logits" else ENDS)


def test_a_bug_of_one_precision_is_asked_in_it_alone():
    """The catalogue's option `dtype` says so."""
    asked = planned(names=["pr-tf32", "pr-fp16-clamp"])
    assert {(one.name, one.precision) for one in asked} == {("pr-tf32", "float32"), ("pr-fp16-clamp", "float16")}


def test_families_are_asked_of_every_host():
    """But for the compiled one, which takes a minute a host; where texts end, of the trained models alone."""
    asked = [one for one in planned() if one.kind == "benign"]
    groups = {
        group: {(one.name, one.host, one.precision) for one in asked if one.group == group} for group in (0, ENDS)
    }
    whole = set(itertools.product(FAMILIES, hosts.NAMES, PRECISIONS))
    assert whole - groups[0] == {one for one in whole if one[0] == "compiled"}
    assert groups[ENDS] == {one for one in whole if one[0] != "compiled" and one[1] in hosts.SHIPPED}
    assert len(asked) == len(groups[0]) + len(groups[ENDS])


def test_without_sweeps_bugs_are_as_reported():
    """One strength, the first; nothing else is left out."""
    asked, whole = places(planned(sweeps=False)), places(planned())
    assert {strength for *_, strength, _ in asked} == {1.0}
    assert set(asked) == {one for one in whole if one[3] == 1.0}


def test_more_groups_are_more_prompts():
    """All that is drawn is asked on each group; where texts end there is one."""
    one, three = places(planned()), places(planned(3))
    assert len(set(three)) == len(three)
    expected = {(*rest, other) for *rest, group in one for other in (range(3) if group != ENDS else (ENDS,))}
    assert set(three) == expected


def test_quick_is_one_group_of_its_own():
    """Everything that shows in logits, once, on a few short prompts."""
    quick, whole = places(planned(3, quick=True)), places(planned())
    assert Counter(quick) == Counter((*rest, QUICK) for *rest, group in whole if group != ENDS)


def test_engines_are_opened_once_a_host():
    """Hosts follow each other, and so do the precisions of one bug, float32 first, which share a run in float64."""
    asked = planned(2)
    assert [host for host, _ in itertools.groupby(asked, key=lambda one: one.host)] == list(hosts.NAMES)
    bugs = [one for one in asked if one.kind != "benign"]
    keys = [key for key, _ in itertools.groupby(bugs, key=trials._implementation)]
    assert len(keys) == len(set(keys))
    for _, members in itertools.groupby(bugs, key=trials._implementation):
        assert [one.precision for one in members] in (list(PRECISIONS), ["float32"], ["float16"])


def test_names_and_hosts_choose():
    """Those that are named and no others, in the order of the whole."""
    whole = planned()
    some = planned(names=["wc-eps", "plain"], places=["llama-tiny", "gpt2-tiny"])
    assert some == [one for one in whole if one.name in ("wc-eps", "plain") and one.host in ("llama-tiny", "gpt2-tiny")]
    assert {one.host for one in some} == {"llama-tiny", "gpt2-tiny"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"names": ["wc-eps", "nope"]}, r"there is no bug, control or correct implementation 'nope'"),
        ({"places": ["nowhere"]}, r"there is no host 'nowhere'.*bloom-raw, bloom-tiny"),
        ({"names": ["ok-norm-twice"], "places": ["gpt2-sharp"]}, "none of these is put into any of these hosts"),
        ({"names": []}, "none of these is put into any"),
        ({"names": ["bs-double-bos"], "quick": True}, "none of these is put into any"),
    ],
)
def test_what_is_not_there_is_refused(arguments, words):
    """The name is told, and where to look."""
    with pytest.raises(UsageError, match=words):
        planned(**arguments)


# --- prompts -----------------------------------------------------------------------------------


def test_trained_models_read_long_prompts():
    """Eight prompts, batches of four, an A-B-A run, and the last prompt of 480 tokens."""
    suite = suite_for("llama-tiny", 1024, 3)
    assert suite == drawn.generate_suite(drawn.TRIALS.seed + 3, alone=True)
    assert [run.name for run in suite.runs] == ["batched", "order"]


def test_where_texts_end_the_model_is_asked_to_stop():
    """A suite of its own, with an end of text."""
    suite = suite_for("llama-tiny", 1024, ENDS)
    assert (suite.stop, suite_for("llama-tiny", 1024, 0).stop) == ("eos", "ignore-eos")
    assert [run.name for run in suite.runs] == ["batched", "order"]


def test_quick_prompts_are_few_and_short():
    """Four, without a long one, and eight tokens each."""
    suite = suite_for("llama-tiny", 1024, QUICK)
    assert (len(suite.prompts), suite.max_new_tokens, [run.name for run in suite.runs]) == (4, 8, ["batched"])
    assert max(len(prompt.text) for prompt in suite.prompts) <= 64 * drawn.CHARACTERS_A_TOKEN


@pytest.mark.parametrize("host", [name for name in hosts.NAMES if name not in hosts.SHIPPED])
@pytest.mark.parametrize("group", [0, 1, 2, QUICK])
def test_every_host_can_read_its_prompts(host, group, tmp_path_factory):
    """Prompt and continuation fit the context, by the tokenizer that the host is written with."""
    directory = str(hosts.write(host, tmp_path_factory.getbasetemp() / "hosts" / host))
    tokenizer, context = hf.load_tokenizer(directory), hf.context_length(hf.load_config(directory))
    suite = suite_for(host, context, group)
    requests = suites.resolve(suite, tokenizer, context=context, vocabulary=hosts.VOCABULARY, model=host)
    assert len(requests) == (4 if group == QUICK else 8)


# --- trials on a small model -------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(small_llama, tmp_path_factory):
    """A working directory, with the small model in the place of every host, and short prompts."""

    def suite(_host, _context, group):
        seed = drawn.TRIALS.seed + group
        return drawn.generate_suite(seed, 4, 4, longest=30, long=None, characters=1.4, alone=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hosts, "model_directory", lambda _name, *, goldens, scratch: small_llama)
        patch.setattr(trials, "suite_for", suite)
        yield tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def stage(bench):
    """A stage with the small model on it."""
    with trials._Stage(bench, Path("golden"), lambda _text: None) as stage:
        yield stage


def drawn_of(names, **more):
    """What is asked of the host on drawn prompts."""
    return [one for one in planned(names=names, places=[HOST], **more) if one.group == 0]


def performed(stage, blanks):
    """(name, precision, strength) -> trial, of blanks."""
    found = {}
    for _, members in itertools.groupby(blanks, key=trials._implementation):
        group = list(members)
        perform = trials._of_family if group[0].kind == "benign" else trials._of_mutation
        found |= {(one.name, one.precision, one.strength): one for one in perform(stage, group)}
    return found


NAMES = ("x-last-layer", "x-attention-scale", "pr-tf32", "ok-norm-twice", "plain", "ranks-2", "batch-1")


@pytest.fixture(scope="module")
def found(stage):
    """Trials of some bugs, a control and some families."""
    return performed(stage, drawn_of(NAMES))


@pytest.mark.parametrize("name", ["plain", "ranks-2", "batch-1", "ok-norm-twice"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_correct_passes(found, name, precision):
    """Identical or drift, with all that others ask of it: an S/N of 0, an error near 1 and finite scores."""
    one = found[name, precision, 1.0]
    assert one.status in ("identical", "drift"), one.finding
    assert one.finding == ""
    assert 0.5 < one.error < 2
    assert one.scores.keys() == CRITERIA.keys()
    if name == "ok-norm-twice":
        assert one.signal < 0.05  # of float64, whose own round-off it is
    else:
        assert one.signal == 0.0
    assert all(math.isfinite(score) for score in one.scores.values()), one.scores
    assert set(one.levels) == {"tokens", "top"}
    assert not set(one.levels.values()) & {"deviates", "structural", "nondeterministic", "error"}
    assert one.seconds > 0 < one.cost


def test_the_reference_itself_scores_nothing(found):
    """The plain family in its own precision is the reference that peers compare with: no token, no distance."""
    one = found["plain", "float32", 1.0]
    assert one.tokens == 0
    assert one.scores["exact"] == one.scores["sglang-rouge"] == one.scores["vllm-top5"] == 0


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_gross_bug_is_found(found, precision):
    """It deviates in both precisions, far above round-off, with every peer's score."""
    one = found["x-last-layer", precision, 1.0]
    assert one.status == "deviates"
    assert "(measured " in one.finding
    assert one.signal >= 3
    assert one.error >= 3
    assert one.tokens > 0
    assert one.scores["exact"] == one.tokens
    assert one.scores.keys() == CRITERIA.keys()
    assert not any(math.isnan(score) for score in one.scores.values())
    assert one.levels == {"tokens": "deviates", "top": "deviates"}


def test_less_evidence_sees_less(found):
    """An attention scale off by 1 % is seen in float32 by log-probabilities, and by tokens not."""
    one = found["x-attention-scale", "float32", 1.0]
    assert one.status == "deviates"
    assert one.tokens == 0
    assert one.levels == {"tokens": "unmeasured", "top": "deviates"}


def test_a_weaker_bug_is_smaller(found):
    """A tenth of the strength is a tenth of the S/N, in either precision; that of bf16 is far smaller."""
    for precision in PRECISIONS:
        strong, weak = (found["x-attention-scale", precision, strength].signal for strength in (1.0, 0.1))
        assert strong == pytest.approx(10 * weak, rel=0.05)
    single, half = (found["x-attention-scale", precision, 1.0].signal for precision in PRECISIONS)
    assert single > 1000 * half


def test_error_and_signal_agree(found):
    """Far above round-off the error in float32 is the S/N, but for prompts and passes that weigh otherwise."""
    for name in ("x-last-layer", "x-attention-scale", "pr-tf32"):
        one = found[name, "float32", 1.0]
        assert one.error == pytest.approx(one.signal, rel=0.25)


@pytest.mark.parametrize("name", ["x-last-layer", "x-attention-scale"])
def test_signals_of_float32_are_those_of_float64(stage, found, monkeypatch, name):
    """What a bug far above round-off changes is known from float32 to 1 %."""
    monkeypatch.setattr(trials, "_FAR", math.inf)
    again = performed(stage, drawn_of([name], sweeps=False))
    for precision in PRECISIONS:
        key = (name, precision, 1.0)
        assert again[key].signal == pytest.approx(found[key].signal, rel=0.01)
        assert again[key].signal != found[key].signal


def test_float64_is_asked_only_where_it_must(stage, monkeypatch):
    """Not of a bug that float32 shows, but of a control, whose change float32 cannot tell from round-off."""
    asked = []
    with_bug = trials._with_bug
    monkeypatch.setattr(trials, "_with_bug", lambda *given: asked.append(given[-1]) or with_bug(*given))
    performed(stage, drawn_of(["x-last-layer"]))
    assert asked == ["float32", "bfloat16"]
    asked.clear()
    performed(stage, drawn_of(["ok-norm-twice"]))
    assert asked == ["float32", "float64", "bfloat16"]


def test_a_trial_is_the_same_twice(stage, found):
    """In another order, after other trials, to the last digit but for times."""
    for name in ("ranks-2", "x-attention-scale", "x-last-layer"):
        for key, one in performed(stage, drawn_of([name])).items():
            assert timeless(one) == timeless(found[key])


def timeless(one):
    """Without how long it took."""
    return replace(one, seconds=0.0, cost=0.0)


def test_families_are_judged_by_the_others(stage, monkeypatch):
    """A family's own scatter, and that of its kin, sets no limit for it; a bug is held against all."""
    given = []
    compare = trials.compare
    monkeypatch.setattr(trials, "compare", lambda *a, **more: given.append(more["spreads"]) or compare(*a, **more))
    performed(stage, drawn_of(["ranks-2"]))
    assert given[0] == floors(SPREADS, without="ranks") != floors(SPREADS)
    given.clear()
    performed(stage, drawn_of(["ok-norm-twice"]))
    assert set(given) == {None}


# --- as others would see it --------------------------------------------------------------------


@pytest.mark.parametrize("show", ["tokens", "top"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["plain", "ranks-2", "x-last-layer", "x-attention-scale"])
def test_levels_are_verdicts_on_less(stage, found, small_llama, show, precision, name):
    """The status of a check of an engine that shows no more: tokens, or tokens and a few log-probabilities."""
    golden, text = stage.golden(HOST, 0), spec_text({"dtype": precision, "show": show})
    free = [run for run in golden.suite.runs if "generate" in run.views]
    asked = replace(golden, directory=None, suite=replace(golden.suite, runs=tuple(free)))
    spreads = floors(SPREADS, without=kin_of(name)) if name in FAMILIES else None
    with hf.build(parse_spec(text), model=str(small_llama)) as engine:
        change = FAMILIES[name].applied(engine.model) if name in FAMILIES else CATALOGUE[name].applied(engine)
        with change:
            verdict = flow.check(asked, Kept(engine, spec=text), reference=small_llama, spreads=spreads)
    question = "function" if precision == "float32" else "precision"
    (answer,) = (answer for answer in verdict.answers if answer.question == question)
    assert found[name, precision, 1.0].levels[show] == answer.status.value


@pytest.mark.parametrize("name", ["plain", "x-last-layer", "x-attention-scale"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_all_is_the_verdict_of_a_check(stage, found, small_llama, name, precision):
    """The status of a trial is that of an ordinary check, without the float32 copy."""
    golden, text = stage.golden(HOST, 0), spec_text({"dtype": precision})
    spreads = floors(SPREADS, without=kin_of(name)) if name in FAMILIES else None
    with hf.build(parse_spec(text), model=str(small_llama)) as engine:
        change = nullcontext() if name == "plain" else CATALOGUE[name].applied(engine)
        with change:
            kept = Kept(engine, spec=text)
            verdict = flow.check(golden, kept, reference=small_llama, spreads=spreads, upcast=False)
    question = "function" if precision == "float32" else "precision"
    (answer,) = (answer for answer in verdict.answers if answer.question == question)
    assert found[name, precision, 1.0].status == answer.status.value


@pytest.mark.parametrize("name", [None, "x-last-layer", "bs-double-bos"])
def test_sides_are_what_peers_would_record(stage, name):
    """Own tokens with the logits of each step, forced logits of decode and prefill, and the ids that were fed."""
    golden = stage.golden(HOST, 0)
    engine, kept = stage.engine(HOST, "float32", ())
    with nullcontext() if name is None else CATALOGUE[name].applied(engine):
        seen = trials.seen_by(kept, golden)
    columns = golden.vocabulary
    for side, request, continuation in zip(seen.sides, golden.requests, golden.continuations, strict=True):
        prompt, steps = len(request.prompt_ids), len(continuation)
        assert side.forced_ids.tolist() == [*request.prompt_ids, *continuation]
        assert side.decode.shape == (steps, columns)
        assert side.prefill.shape == (prompt + steps - 1, columns)
        assert side.free.shape == (len(side.tokens), columns)
        assert side.free.argmax(axis=1).tolist() == side.tokens.tolist()
        more = [1] if name == "bs-double-bos" else []
        assert side.prompt_ids.tolist() == [*more, *request.prompt_ids]
    same = [side.tokens.tolist() == list(tokens) for side, tokens in zip(seen.sides, golden.continuations, strict=True)]
    assert all(same) is (name is None)
    # What was run besides, to see its own logits, is no part of what is judged.
    assert [call.view for call in seen.calls] == ["replay", "prefill", "replay", "replay", "replay"]


def test_repeats_are_the_visits_of_one_prompt(stage):
    """The first and last of A-B-A, equal to the bit for a right model."""
    calls = stage.reference(HOST, "float32", 0).calls
    ((first, last),) = trials._repeats(calls)
    alone = [call for call in calls if len(call.requests) == 1]
    assert (first == alone[0].logits[0]).all()
    assert (last == alone[2].logits[0]).all()
    assert (first == last).all()


def test_tokens_that_differ_are_counted():
    """At each step, and those that one side lacks."""
    sides = [[np.array(tokens) for tokens in side] for side in (([1, 2, 3], [4, 5]), ([1, 9, 3], [4, 5, 6, 7]))]
    one, other = ([Tokens(tokens) for tokens in side] for side in sides)
    assert trials._differing(one, other) == trials._differing(other, one) == 3
    assert trials._differing(one, one) == 0


class Tokens:
    """A side of which tokens are known."""

    def __init__(self, tokens):
        self.tokens = tokens


# --- bugs made for the test --------------------------------------------------------------------


@pytest.fixture
def trial_of(stage, monkeypatch):
    """A function that puts a change of an engine into the small model: precision -> trial."""

    def run(change, **more):
        bug = replace(mutation("made"), hosts=frozenset({HOST}), change=contextmanager(change), **more)
        monkeypatch.setattr(trials, "CATALOGUE", {"made": bug})
        blanks = [trials._blank("bug", "made", HOST, precision, 1.0) for precision in PRECISIONS]
        return {one.precision: one for one in trials._of_mutation(stage, blanks)}

    return run


def test_the_signal_by_hand(stage, trial_of):
    """A constant vector added to all logits: its length, mean removed, over the rms of the rows' round-off."""
    golden = stage.golden(HOST, 0)
    vector = 1e-2 * torch.randn(golden.vocabulary, generator=torch.Generator().manual_seed(3)) + 5.0

    def change(engine, _strength):
        def add(_module, _inputs, _options, output):
            return output + vector.to(output.dtype)

        with hooked((engine.model.lm_head, add, False)):
            yield

    found = trial_of(change)
    rows, longest = golden.rows, max(range(1, 4), key=lambda i: len(golden.requests[i].prompt_ids))
    alone = [rows.generated & (rows.request == index) for index in (0, longest, 0)]
    shown = [rows.generated, np.ones(len(rows.request), dtype=bool), *alone]
    length = float(((vector - vector.mean()).double() ** 2).sum())
    for precision in PRECISIONS:
        sigma = golden.floors[precision].sigma.astype(np.float64)
        noise = sum(float((sigma[mask] ** 2).sum()) for mask in shown) / sum(int(mask.sum()) for mask in shown)
        assert found[precision].signal == pytest.approx(math.sqrt(length / noise), rel=1e-3)


def test_a_shift_of_all_logits_is_no_signal(trial_of):
    """The softmax does not see it."""

    def change(engine, _strength):
        def add(_module, _inputs, _options, output):
            return output + 0.5

        with hooked((engine.model.lm_head, add, False)):
            yield

    found = trial_of(change)
    assert found["bfloat16"].signal < 1e-9
    assert found["float32"].status in ("identical", "drift")


@pytest.mark.parametrize("error", [ZeroDivisionError, LookupError, IndexError, EngineError])
def test_a_bug_that_raises_is_an_error(trial_of, error):
    """Whatever is raised while it runs is a result, and ends nothing; nothing else is known of it."""

    def change(engine, _strength):
        def broken(*_arguments, **_options):
            raise error("here", **({"fix": "none"} if error is EngineError else {}))

        with patched(engine, replay=broken):
            yield

    found = trial_of(change)
    for precision in PRECISIONS:
        one = found[precision]
        assert (one.status, one.signal, one.error) == ("error", None, None)
        assert one.finding.startswith(f"{error.__name__}: ")
        assert "here" in one.finding
        assert one.scores == one.levels == {}


def test_another_model_is_stale(trial_of):
    """It is not the one that the golden is of: neither found nor missed."""

    def change(engine, _strength):
        def other(*_arguments, **_options):
            raise StaleError("another model", fix="none")

        with patched(engine, replay=other):
            yield

    assert {one.status for one in trial_of(change).values()} == {"stale"}


def test_a_host_without_the_part_is_skipped(trial_of):
    """A LookupError on entry says so; a KeyError is a fault of the bench."""

    def lacking(_engine, _strength):
        raise LookupError("it has no such part")
        yield

    found = trial_of(lacking)
    assert [(one.status, one.finding) for one in found.values()] == [("skipped", "it has no such part")] * 2

    def faulty(_engine, _strength):
        yield {}["missing"]

    with pytest.raises(KeyError):
        trial_of(faulty)


def test_logits_that_are_no_numbers_are_structural(trial_of):
    """NaN everywhere: an infinite S/N, and no score that any threshold lets pass."""

    def change(engine, _strength):
        def nothing(_module, _inputs, _options, output):
            return output * math.nan

        with hooked((engine.model.lm_head, nothing, False)):
            yield

    found = trial_of(change)
    for one in found.values():
        assert one.status == "structural"
        assert one.signal == math.inf
        assert not any(math.isnan(score) for score in one.scores.values())
        assert one.scores["exact"] > 0


def test_too_few_columns_are_structural(stage, trial_of):
    """A head that lost rows has nothing to compare, which every rule sees; the bench goes on."""

    def change(engine, _strength):
        head = engine.model.lm_head
        short = torch.nn.Linear(head.in_features, head.out_features - 5, bias=False, dtype=head.weight.dtype)
        short.weight.data = head.weight.data[:-5]
        with patched(engine.model, lm_head=short):
            yield

    for one in trial_of(change).values():
        assert one.status == "structural"
        assert set(one.scores.values()) <= {math.inf}


def test_what_is_global_is_gone_when_it_is_judged(stage, trial_of, monkeypatch):
    """A patch of torch itself would change the reference too: no comparison, score or scoring runs under it."""
    right, seen = torch.nn.functional.linear, []

    def watched(name):
        inner = getattr(trials, name)

        def outer(*given, **more):
            seen.append((name, torch.nn.functional.linear is right))
            return inner(*given, **more)

        monkeypatch.setattr(trials, name, outer)

    for name in ("compare", "scores", "scoring", "teacher_forced"):
        watched(name)

    def change(_engine, _strength):
        def wrong(x, weight, bias=None):
            return right(x, weight.flip(0), bias)

        with patched(torch.nn.functional, linear=wrong):
            yield

    before = stage.reference(HOST, "float32", 0)
    found = trial_of(change)
    assert torch.nn.functional.linear is right
    assert {one.status for one in found.values()} <= {"deviates", "structural"}
    assert all(one.signal > 3 for one in found.values())
    assert {name for name, _ in seen} >= {"compare", "scores", "teacher_forced"}
    assert all(gone for _, gone in seen)
    assert stage.reference(HOST, "float32", 0) is before


def test_a_reference_is_never_recorded_under_a_bug(bench, monkeypatch):
    """On a fresh stage, too, golden and references are there before the bug goes in."""
    right, seen = torch.nn.functional.linear, []
    reference = trials._Stage.reference

    def watched(self, *given):
        seen.append(torch.nn.functional.linear is right)
        return reference(self, *given)

    def change(_engine, _strength):
        with patched(torch.nn.functional, linear=lambda x, weight, bias=None: right(x, 1.01 * weight, bias)):
            yield

    monkeypatch.setattr(trials._Stage, "reference", watched)
    bug = replace(mutation("made"), hosts=frozenset({HOST}), change=contextmanager(change))
    monkeypatch.setattr(trials, "CATALOGUE", {"made": bug})
    with trials._Stage(bench, Path("golden"), lambda _text: None) as fresh:
        (one,) = trials._of_mutation(fresh, [trials._blank("bug", "made", HOST, "bfloat16", 1.0)])
        plain = trials.seen_by(fresh.engine(HOST, "bfloat16", ())[1], fresh.golden(HOST, 0))
        kept = fresh.reference(HOST, "bfloat16", 0)
    assert one.signal > 0.1
    assert seen
    assert all(seen)
    assert all((a.decode == b.decode).all() for a, b in zip(plain.sides, kept.sides, strict=True))


# --- runs --------------------------------------------------------------------------------------


def silent(_done, _total, _text):
    """A progress that nobody watches."""


def test_parts_are_the_whole(bench, found):
    """Two parts do between them what one run does, each bug in one part with all its precisions, and it is kept."""
    asked = planned(names=NAMES, places=[HOST], sweeps=False)
    for index in (0, 1):
        trials.run_trials(asked, bench, silent, (index, 2))
    both = trials.read_trials(bench)
    assert Counter(one.key for one in both) == Counter(one.key for one in asked)
    same = [one for one in both if one.group == 0]
    assert [timeless(one) for one in same] == [timeless(found[one.name, one.precision, 1.0]) for one in same]
    files = sorted(bench.glob("trials-*.jsonl"))
    assert [file.name for file in files] == ["trials-0.jsonl", "trials-1.jsonl"]
    parts = [
        {(one["name"], one["group"]) for one in map(json.loads, file.read_text(encoding="utf-8").splitlines())
         if one["kind"] != "benign"}
        for file in files
    ]  # fmt: skip
    assert all(parts)
    assert not parts[0] & parts[1]
    before = [file.read_bytes() for file in files]
    trials.run_trials(asked, bench, silent)
    assert [file.read_bytes() for file in files] == before
    assert (bench / "trials.jsonl").read_bytes() == b""


def test_another_host_closes_the_engines_of_the_last(bench):
    """One host's engines are open at a time, and none after the end."""
    with trials._Stage(bench, Path("golden"), lambda _text: None) as stage:
        first, kept = stage.engine("llama-tiny", "float32", ())
        assert stage.engine("llama-tiny", "float32", ()) == (first, kept)
        second, _ = stage.engine("gpt2-tiny", "float32", ())
        with pytest.raises(EngineError):
            _ = first.model
        assert second.model is not None
    with pytest.raises(EngineError):
        _ = second.model


def test_a_host_that_is_shipped_has_every_floor(stage):
    """float16 too, in which one bug is asked alone."""
    assert set(stage.golden(HOST, 0).floors) == set(EFFECT)


def test_penalties_are_skipped(stage):
    """No suite asks for them, and no engine is opened for it."""
    blanks = planned(names=["sg-reppen-neg"], places=[HOST])
    found = performed(stage, blanks)
    assert {(one.status, one.finding) for one in found.values()} == {
        ("skipped", "no suite asks for penalties or stop strings")
    }


def test_what_16_bits_alone_show_is_nothing_in_float32(stage, trial_of):
    """A bug of 16 bits has the S/N that it has in the precision of the run, not that of float64 in all of them."""

    def change(engine, _strength):
        scale = 1.0 if engine.options.dtype == "float32" else 1.5

        def scaled(_module, _inputs, _options, output):
            return output * scale

        with hooked((engine.model.lm_head, scaled, False)):
            yield

    found = trial_of(change, active=frozenset({"half"}))
    assert found["float32"].signal == 0.0
    assert found["float32"].status == "identical"
    assert found["bfloat16"].signal > 3
