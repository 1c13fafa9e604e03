"""Structural checks: each kind of wrong shape is found before a number is compared."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from harness.comparison import compare, structure
from harness.engines import build_engine
from harness.engines.runner import run_suite
from harness.suites import load_suite
from harness.values import Generation, Pass, Run, Status
from tests.comparison import literal
from tests.support import VOCABULARY, write_model, write_suite


@pytest.fixture(scope="module")
def golden():
    """The literal golden."""
    return literal.golden()


@pytest.fixture(scope="module")
def good():
    """A trace with nothing wrong."""
    return literal.trace(literal.reference_logits() + literal.noise(99))


def _statuses(golden, trace, runs=None, **more):
    return {finding.status for finding in structure.check(golden, trace, runs, **more)}


def test_a_sound_trace_has_no_structural_finding(golden, good):
    """Nothing is found where nothing is wrong."""
    assert structure.check(golden, good) == []


def test_another_suite_is_stale(golden, good):
    """A trace of another version of the suite is stale, not compared."""
    assert _statuses(golden, replace(good, suite_digest="other")) == {Status.STALE}


def test_a_setting_that_does_not_run_is_named(golden, good):
    """A 'bf16' candidate that computes in fp32 is structural, and both words are in the message."""
    findings = structure.check(golden, replace(good, settings={"dtype": "float32"}))
    assert findings[0].status is Status.STRUCTURAL
    assert "dtype=bfloat16" in findings[0].message
    assert "dtype=float32" in findings[0].message


def test_random_tensors_are_structural(golden, good):
    """Weights left at random init never count as loaded."""
    settings = {**good.settings, "missing_tensors": ["lm_head.weight"]}
    assert _statuses(golden, replace(good, settings=settings)) == {Status.STRUCTURAL}


def test_a_cut_vocabulary_is_structural(golden, good):
    """Fewer columns than the reference cannot be the same model."""
    assert _statuses(golden, replace(good, vocabulary=literal.VOCABULARY - 1)) == {Status.STRUCTURAL}


def test_other_prompt_ids_are_structural(golden, good):
    """A doubled first token is found by ids, with the place where they part."""
    own = tuple((0, *request.prompt_ids) for request in golden.requests)
    findings = structure.check(golden, replace(good, prompt_ids=own))
    assert "4 of 4 prompts" in findings[0].message
    assert "position 1" in findings[0].message


def test_a_missing_pass_is_structural(golden, good):
    """An output that the candidate does not return is never skipped."""
    assert _statuses(golden, replace(good, passes=good.passes[:1])) == {Status.STRUCTURAL}


def test_an_unasked_pass_is_structural(golden, good):
    """An output under another name is not matched by guess."""
    renamed = replace(good.passes[0], run="other")
    assert _statuses(golden, replace(good, passes=(*good.passes, renamed))) == {Status.STRUCTURAL}


@pytest.mark.parametrize("change", ["short", "twice"])
def test_positions_must_be_exactly_the_goldens(golden, good, change):
    """A view that leaves out a position, or shows one twice, is structural: no zipping to the shorter side."""
    _, _, generated = literal.row_keys()
    keep = generated.copy()
    keep[np.flatnonzero(generated)[-1]] = False
    logits = literal.reference_logits()
    rows = literal.condense(logits, keep)
    if change == "twice":
        from harness.numerics.sketch import concatenate

        rows = concatenate([rows, rows], literal.VOCABULARY)
    broken = replace(good.passes[0], rows=rows)
    assert _statuses(golden, replace(good, passes=(broken, good.passes[1]))) == {Status.STRUCTURAL}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_nonfinite_logit_is_structural(golden, value):
    """One NaN or infinity among all logits fails, and its place is named."""
    logits = literal.reference_logits()
    logits[25, 3] = value
    findings = structure.check(golden, literal.trace(logits))
    assert {finding.status for finding in findings} == {Status.STRUCTURAL}
    assert "'p1'" in findings[0].where


def test_a_padding_column_must_never_win(golden):
    """Extra columns are left out of the comparison, and one that wins is structural."""
    padded = np.concatenate([literal.reference_logits(), np.zeros((len(literal.row_keys()[0]), 4))], axis=1)
    assert structure.check(golden, literal.trace(padded)) == []
    padded[30, literal.VOCABULARY + 1] = 1e3
    assert {finding.check for finding in structure.check(golden, literal.trace(padded))} == {"vocabulary"}


@pytest.mark.parametrize(
    ("tokens", "finish"),
    [((1,) * (literal.STEPS - 1), "length"), ((1,) * (literal.STEPS + 1), "length"), ((1,) * literal.STEPS, "eos")],
)
def test_a_free_run_must_end_where_its_tokens_end_it(golden, tokens, finish):
    """Truncated, overlong and wrongly finished continuations are structural."""
    assert _statuses(golden, literal.free_run([tokens] * 4, finish), literal.FREE) == {Status.STRUCTURAL}


def test_a_run_that_goes_on_behind_its_stop_id_is_structural(golden):
    """With stop = eos, tokens behind the stop id are an error of the engine, not of the model."""
    stopping = replace(golden, suite=replace(golden.suite, stop="eos"), stop_ids=(2,))
    tokens = [(5, 2, *([1] * (literal.STEPS - 2)))] * 4
    assert _statuses(stopping, literal.free_run(tokens), literal.FREE) == {Status.STRUCTURAL}


def _repeated(change: float, deterministic: bool, drop: int = 0):
    """An A-B-A trace whose second visit of A differs by ``change`` in one logit, or lacks ``drop`` rows."""
    logits = literal.reference_logits()
    request, _, generated = literal.row_keys()
    mine, other = (request == 0) & generated, (request == 1) & generated
    again = logits.copy()
    again[np.flatnonzero(mine)[4], 7] += change
    kept = mine.copy()
    kept[np.flatnonzero(mine)[:drop]] = False
    visits = ((0, logits, mine, 0), (1, logits, other, 1), (2, again, kept, 0))
    passes = tuple(
        Pass(run="order", view="replay", repeat=repeat, requests=(index,), rows=literal.condense(one, keep))
        for repeat, one, keep, index in visits
    )
    capabilities = frozenset({"tokens", "logits", "replay"} | ({"deterministic"} if deterministic else set()))
    return replace(literal.trace(logits), passes=passes, capabilities=capabilities)


def test_a_repeat_must_agree_to_the_bit_where_that_is_declared(golden):
    """One flipped last bit on the second visit is nondeterministic for an engine that declares itself deterministic."""
    smallest = np.spacing(abs(literal.reference_logits()).max())
    findings = structure.check(golden, _repeated(smallest, True), literal.ORDER)
    assert [finding.status for finding in findings] == [Status.NONDETERMINISTIC]
    assert "step 4" in findings[0].message
    assert structure.check(golden, _repeated(0.0, True), literal.ORDER) == []


def test_a_repeat_of_another_engine_is_drift(golden):
    """An engine that does not claim determinism is judged by round-off instead."""
    findings = structure.check(golden, _repeated(1e-9, False), literal.ORDER)
    assert [finding.status for finding in findings] == [Status.DRIFT]


def test_a_repeat_that_loses_rows_is_structural(golden):
    """A second visit with fewer positions is a finding, not a crash."""
    assert _statuses(golden, _repeated(0.0, True, drop=2), literal.ORDER) == {Status.STRUCTURAL}


def test_a_missing_visit_is_structural(golden):
    """A-B-A without its second A would skip the very comparison it is for."""
    trace = _repeated(0.0, True)
    assert _statuses(golden, replace(trace, passes=trace.passes[:2]), literal.ORDER) == {Status.STRUCTURAL}


def test_a_pass_over_fewer_prompts_is_structural(golden, good):
    """What had to be shown comes from the run, not from what the trace says of itself."""
    request, _, generated = literal.row_keys()
    rows = literal.condense(literal.reference_logits(), (request == 0) & generated)
    fewer = replace(good.passes[0], requests=(0,), rows=rows)
    assert _statuses(golden, replace(good, passes=(fewer, good.passes[1]))) == {Status.STRUCTURAL}


def test_a_setting_that_no_view_used_is_not_seen(golden, good):
    """A static cache that a prefill never made is neither in force nor wrong, and the verdict says so."""
    unused = replace(good, declared={"cache": "StaticCache"}, settings={"dtype": "bfloat16", "cache": "not used"})
    comparison = compare(golden, unused)
    assert not any(finding.status is Status.STRUCTURAL for finding in comparison.findings)
    assert any("cache" in reason for reason in comparison.answers[-1].power.unmeasured)


def test_numbers_are_not_compared_behind_a_structural_finding(golden, good):
    """A wrong structure ends the comparison: its numbers would be of another question."""
    comparison = compare(golden, replace(good, vocabulary=3))
    assert comparison.answers[-1].power is None
    assert comparison.passes == ()


def test_free_tokens_may_differ_only_at_ties(golden):
    """A free run that leaves the golden where the reference is sure deviates."""
    tokens = [list(given.tokens) for given in golden.generations]
    tokens[1][3] = (tokens[1][3] + 1) % literal.VOCABULARY
    comparison = compare(golden, literal.free_run([tuple(one) for one in tokens]), literal.FREE)
    assert Status.DEVIATES in {finding.status for finding in comparison.findings}
    assert "step 3" in next(f.where for f in comparison.findings if f.status is Status.DEVIATES)


def test_generations_are_counted(golden, good):
    """One continuation too few is structural."""
    one = Pass(
        run="single", view="generate", requests=(0, 1), generations=(Generation(tokens=(1,) * 10, finish="length"),)
    )
    assert _statuses(golden, replace(good, passes=(one,)), literal.FREE) == {Status.STRUCTURAL}


# --- engines that show less ------------------------------------------------------------------------

_VALUES = (-0.5, -1.5, -math.inf)


def _top(values=_VALUES, steps=literal.STEPS, **changes):
    """A continuation with three top entries a step."""
    tokens = tuple(range(steps))
    ids = tuple((token, token + 1, token + 2) for token in tokens)
    given = Generation(tokens=tokens, finish="length", top_ids=ids, top_logits=(values,) * steps)
    return replace(given, **changes)


def _served(*generations, capabilities=("tokens", "top_logprobs", "deterministic")):
    """A trace of an engine that shows top entries, one continuation for each prompt."""
    everyone = tuple(range(literal.PROMPTS))
    given = (generations * literal.PROMPTS)[: literal.PROMPTS]
    one = Pass(run="single", view="generate", requests=everyone, generations=given)
    return replace(literal.trace(literal.reference_logits()), passes=(one,), capabilities=frozenset(capabilities))


def test_what_was_asked_follows_from_what_can_be_shown(golden, good):
    """An engine that declares tokens alone owes a free run in the place of logits, and no other pass."""
    free = literal.free_run([given.tokens for given in golden.generations])
    (one,) = free.passes
    tokens = replace(free, capabilities=frozenset({"tokens"}), passes=(replace(one, run="batched"),))
    assert structure.check(golden, tokens) == []
    assert _statuses(golden, replace(tokens, passes=())) == {Status.STRUCTURAL}
    assert _statuses(golden, replace(tokens, capabilities=good.capabilities)) == {Status.STRUCTURAL}
    assert _statuses(golden, replace(good, capabilities=frozenset({"tokens"}))) == {Status.STRUCTURAL}


def test_views_restrict_what_was_asked(golden, good):
    """With `views` the others are owed by nobody, and are surplus where they are shown."""
    replay = replace(good, passes=good.passes[:1])
    assert structure.check(golden, replay, views=("replay",)) == []
    assert _statuses(golden, good, views=("replay",)) == {Status.STRUCTURAL}
    assert _statuses(golden, replay, views=("replay", "prefill")) == {Status.STRUCTURAL}
    assert _statuses(golden, replay, views=("generate",)) == {Status.STRUCTURAL}


def test_sound_top_entries_are_no_finding(golden):
    """A row of entries for each token is what was asked for; a masked token behind the best one may be -inf."""
    assert structure.check(golden, _served(_top()), literal.FREE) == []


@pytest.mark.parametrize("values", [(np.nan, -1.0, -2.0), (-1.0, np.nan, -2.0), (-1.0, np.inf, -2.0), (-np.inf,) * 3])
def test_nonfinite_top_entries_are_structural(golden, values):
    """NaN or infinity among the top entries is counted and placed, -inf only where the best entry has it."""
    broken = list(_top().top_logits)
    broken[4] = values
    findings = structure.check(golden, _served(_top(), _top(top_logits=tuple(broken))), literal.FREE)
    assert [(finding.status, finding.check) for finding in findings] == [(Status.STRUCTURAL, "finite")]
    # Two of the four prompts have the broken step.
    assert findings[0].message.startswith(f"2 of {4 * 3 * literal.STEPS} top entries")
    assert "'p1', step 4" in findings[0].where


@pytest.mark.parametrize(
    "changes",
    [
        {"top_ids": (), "top_logits": ()},
        {"top_ids": _top().top_ids[1:], "top_logits": _top().top_logits[1:]},
        {"top_logits": _top().top_logits[1:]},
        {"top_ids": (*_top().top_ids, (1, 2, 3)), "top_logits": (*_top().top_logits, _VALUES)},
        {"top_ids": ((1, 2), *_top().top_ids[1:])},
        {"top_ids": ((), *_top().top_ids[1:]), "top_logits": ((), *_top().top_logits[1:])},
    ],
    ids=["none", "too few", "values too few", "too many", "a row without a value", "an empty row"],
)
def test_top_entries_are_those_of_the_tokens(golden, changes):
    """Rows of entries that are not one for each token, or have no value for each id, are structural."""
    findings = structure.check(golden, _served(_top(), _top(**changes)), literal.FREE)
    assert {(finding.status, finding.check) for finding in findings} == {(Status.STRUCTURAL, "lengths")}
    assert "'p1'" in findings[0].where


def test_top_entries_that_nobody_promised_may_be_left_out(golden):
    """An engine without the capability shows entries for every token, or for none."""
    none = _top(top_ids=(), top_logits=())
    assert structure.check(golden, _served(none, _top(), capabilities=("tokens",)), literal.FREE) == []
    some = _top(top_ids=_top().top_ids[:3], top_logits=_top().top_logits[:3])
    assert _statuses(golden, _served(some, capabilities=("tokens",)), literal.FREE) == {Status.STRUCTURAL}


_FREE_ORDER = (Run(name="order", batch_size=1, order="A-B-A", views=("generate",)),)


def _visited(first, again, *, deterministic):
    """An A-B-A trace of free runs whose visits of A are these."""
    given = (first, _top(), again)
    passes = tuple(
        Pass(run="order", view="generate", repeat=repeat, requests=(index,), generations=(given[repeat],))
        for repeat, index in ((0, 0), (1, 1), (2, 0))
    )
    capabilities = {"tokens", "top_logprobs"} | ({"deterministic"} if deterministic else set())
    return replace(_served(_top()), passes=passes, capabilities=frozenset(capabilities))


def test_the_last_bit_of_a_top_entry_is_asked_of_a_deterministic_engine_alone(golden):
    """Equal tokens with another last bit in one entry: other bits where every bit is promised, else nothing."""
    values = list(_top().top_logits)
    values[6] = (float(np.nextafter(-0.5, 0)), *_VALUES[1:])
    trace = _visited(_top(), _top(top_logits=tuple(values)), deterministic=True)
    findings = structure.check(golden, trace, _FREE_ORDER)
    assert [finding.status for finding in findings] == [Status.NONDETERMINISTIC]
    assert "step 6" in findings[0].message
    relaxed = replace(trace, capabilities=trace.capabilities - {"deterministic"})
    assert structure.check(golden, relaxed, _FREE_ORDER) == []
    same = _visited(_top(), _top(), deterministic=True)
    assert structure.check(golden, same, _FREE_ORDER) == []


@pytest.mark.parametrize(("deterministic", "status"), [(True, Status.NONDETERMINISTIC), (False, Status.DRIFT)])
def test_another_token_on_the_second_visit_is_seen_by_all(golden, deterministic, status):
    """A token that changes is a difference for any engine, first where it changes."""
    tokens = (*_top().tokens[:3], 40, *_top().tokens[4:])
    findings = structure.check(golden, _visited(_top(), _top(tokens=tokens), deterministic=deterministic), _FREE_ORDER)
    assert [finding.status for finding in findings] == [status]
    assert "step 3" in findings[0].message


@pytest.mark.parametrize("show", ["tokens", "top"])
def test_a_served_model_is_sound(golden, tmp_path, show):
    """A real engine that shows tokens, or top entries, gives free runs alone, and nothing is wrong with them."""
    suite = load_suite(write_suite(tmp_path / "small.toml"))
    model = write_model(tmp_path / "model", dtype="float32")
    with build_engine(f"hf:show={show},chunk=16", model=str(model)) as engine:
        requests = engine.resolve(suite)
        trace = run_suite(
            engine, suite, requests, [()] * 3, runs=suite.runs, stop_ids=frozenset(), vocabulary=VOCABULARY
        )
    assert {(one.run, one.view) for one in trace.passes} == {(run.name, "generate") for run in suite.runs}
    asked = replace(golden, suite=suite, requests=requests, vocabulary=VOCABULARY)
    assert structure.check(asked, trace) == []
    assert bool(trace.passes[0].generations[0].top_ids) is (show == "top")
