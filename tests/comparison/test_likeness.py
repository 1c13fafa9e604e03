"""Bugs of the catalogue in an error: what is fitted and why not, and what a verdict makes of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import harness
from harness.comparison import compare, likeness
from harness.comparison.context import compare_context
from harness.errors import ModelError
from harness.numerics.constants import ALPHA_TEMPLATES, COEFFICIENT
from harness.report.diagnosis import diagnosis_lines
from harness.templates import making
from harness.values import Scoring, Status
from tests.templates import tiny

SWAPPED, HIDDEN = ("x-rows-swapped", 1.0), tiny.HIDDEN

#: What is said where the run that templates are of is not there.
NOT_SHOWN = "no logits of the run 'batched' were shown for it (a trace is made with --diagnose as well)"


@pytest.fixture(scope="module")
def bank():
    """The tiny golden's templates."""
    return tiny.bank()


def diagnosed(trace, bank=None, **more):
    """Diagnosis and findings of a trace."""
    context = compare_context(tiny.golden(), trace, **more)
    return likeness.diagnose(context, tiny.bank() if bank is None else bank)


def shows(*parts, precision="bfloat16", seed=0):
    """A candidate with round-off and so much of some bugs: ((id, strength), share)."""
    error = tiny.round_off(seed, precision)
    for name, share in parts:
        error = error + share * tiny.template(*name)
    return tiny.candidate(error, precision)


def without_fine(trace):
    """The trace as it would be had it been made without --diagnose."""
    passes = tuple(replace(one, rows=replace(one.rows, fine=None)) for one in trace.passes)
    return replace(trace, passes=passes, basis="")


# --- why nothing is fitted ---------------------------------------------------------------------


def _reason(trace, bank=None, **more):
    diagnosis, findings = diagnosed(trace, bank, **more)
    assert findings == []
    assert (diagnosis.limit, diagnosis.named, diagnosis.nearest, diagnosis.templates) == (None, (), (), 0)
    assert diagnosis.reason
    return diagnosis.reason


def test_a_precision_without_floor_is_told():
    """Of a precision that the golden has no round-off of nothing is fitted."""
    assert "no floor for float16" in _reason(tiny.candidate(settings={"dtype": "float16"}))


def test_templates_without_the_precision_are_told(bank):
    """Templates that were made with fewer precisions say which is missing."""
    less = replace(bank, noises={"float32": bank.noises["float32"]})
    assert _reason(tiny.candidate(), less) == "the templates have no round-off of bfloat16"


def test_rounded_weights_are_told():
    """Weights that are declared rounded have an error of their own, of which no template is made."""
    trace = tiny.candidate(settings={"dtype": "bfloat16", "weights": "int8"})
    assert "int8 weights" in _reason(trace)
    assert "rounded as it declares" in _reason(trace, scoring=Scoring(centre=tiny.golden().rows))


def test_a_trace_that_shows_no_logits_is_told():
    """Tokens alone, and logits of other passes, are nothing to fit to."""
    trace = tiny.candidate()
    assert _reason(replace(trace, passes=())) == NOT_SHOWN
    other = tuple(replace(one, run="another") for one in trace.passes)
    assert _reason(replace(trace, passes=other)) == NOT_SHOWN
    assert _reason(replace(trace, passes=tuple(replace(one, rows=None) for one in trace.passes))) == NOT_SHOWN


def test_a_trace_that_was_made_without_it_is_told():
    """A trace without the products says that it was made without --diagnose."""
    reason = _reason(without_fine(tiny.candidate()))
    assert reason == NOT_SHOWN
    assert "--diagnose" in reason


def test_rows_of_some_prompts_are_not_enough():
    """A pass that shows fewer rows, or more columns, than the templates have is not fitted."""
    trace = tiny.candidate()
    for change in (lambda fine: fine[:, :-1], lambda fine: np.hstack([fine, fine[:, :1]])):
        passes = tuple(replace(one, rows=replace(one.rows, fine=change(one.rows.fine))) for one in trace.passes)
        assert _reason(replace(trace, passes=passes)) == NOT_SHOWN


def test_the_head_of_another_model_is_told():
    """Products with another basis are no coordinates of these templates."""
    assert "head of another model" in _reason(tiny.candidate(basis="another"))


def test_logits_that_are_no_numbers_are_told():
    """NaN in one row keeps all from being fitted, and is no crash."""
    error = np.zeros(tiny.bank().codes.shape[1:])
    error[3, 5] = np.nan
    assert _reason(tiny.candidate(error)) == "its logits are not finite"


def test_a_catalogue_without_effect_is_told(bank):
    """Where no bug has a template there is nothing to name."""
    assert "no bug" in _reason(tiny.candidate(), replace(bank, names=(), wrong=()))


# --- what is named -----------------------------------------------------------------------------


def test_a_bug_is_a_finding():
    """What is named as the catalogue has it deviates: |z| is held against the limit, and the bug is said in words."""
    diagnosis, (finding,) = diagnosed(shows((SWAPPED, 1.0)))
    (one,) = diagnosis.named
    assert (one.name, one.aliases) == ("x-rows-swapped", ())
    assert one.coefficient == pytest.approx(1, abs=0.2)
    assert finding.status is Status.DEVIATES
    assert (finding.check, finding.question) == ("looks like", "precision")
    assert (finding.measured, finding.allowed) == (one.z, diagnosis.limit)
    assert abs(finding.measured) > finding.allowed > 4
    assert finding.message.startswith("x-rows-swapped (a = ")
    for text in (finding.message, finding.fix):
        assert "exchanged" in text
    assert f"{len(tiny.bank().names)} templates over 24 replicas" in finding.why
    assert f"rate {ALPHA_TEMPLATES:.2g}" in finding.why
    assert finding.where == "all passes of the run 'batched'"


def test_a_weaker_strength_is_named_with_it():
    """A bug at a tenth of its strength is named as that."""
    diagnosis, (finding,) = diagnosed(shows((HIDDEN, 1.0)))
    assert diagnosis.named[0].name == "x-bias-doubled at 0.1"
    assert finding.message.startswith("x-bias-doubled at 0.1 (a = ")
    # Its own other strength is no alias.
    assert diagnosis.named[0].aliases == ()


def test_two_bugs_are_two_findings():
    """Bugs that are there together are each a finding, in the order of their size."""
    diagnosis, findings = diagnosed(shows((SWAPPED, 1.0), (HIDDEN, 1.0)))
    assert [one.name for one in diagnosis.named] == ["x-rows-swapped", "x-bias-doubled at 0.1"]
    assert [one.measured for one in findings] == [one.z for one in diagnosis.named]


@pytest.mark.parametrize("share", [-1.0, 0.3, 3.0])
def test_another_strength_is_a_hint_alone(share):
    """Outside COEFFICIENT a bug is named, and is no finding: the size of the error decides."""
    assert not COEFFICIENT[0] <= share <= COEFFICIENT[1]
    diagnosis, findings = diagnosed(shows((SWAPPED, share)))
    assert [one.name for one in diagnosis.named] == ["x-rows-swapped"]
    assert diagnosis.named[0].coefficient == pytest.approx(share, abs=0.15)
    assert abs(diagnosis.named[0].z) > diagnosis.limit
    assert findings == []


@pytest.mark.parametrize("precision", tiny.PRECISIONS)
def test_of_round_off_nothing_is_named(precision):
    """A correct candidate has its two nearest, below the limit, and what the suite is too small for."""
    for seed in range(20):
        diagnosis, findings = diagnosed(shows(precision=precision, seed=seed))
        assert findings == []
        assert diagnosis.named == diagnosis.residual == ()
        assert len(diagnosis.nearest) == 2
        assert max(abs(one.z) for one in diagnosis.nearest) < diagnosis.limit
    assert diagnosis.reason == ""
    assert diagnosis.templates == len(tiny.bank().names)


def test_what_the_suite_is_too_small_for():
    """In bfloat16 bugs of a few hundredths of round-off need more rows, the weaker the more; in float32 none does."""
    coarse, fine = (diagnosed(shows(precision=precision))[0].untestable for precision in ("bfloat16", "float32"))
    assert fine == {}
    assert set(coarse) < {likeness._name(tiny.bank(), index) for index in range(len(tiny.bank().names))}
    assert {"x-rows-swapped", "x-bias-doubled", "x-bias-doubled at 0.1"}.isdisjoint(coarse)
    assert min(coarse.values()) > 1
    # A tenth of the size, a hundred times the rows.
    assert coarse["x-attention-scale at 0.1"] == pytest.approx(100 * coarse["x-attention-scale"], rel=0.1)


def test_aliases_are_told(bank):
    """A bug with the same template under another name is told beside the one that is named."""
    names = tuple(("x-twin", 1.0) if one == ("x-bias-doubled", 1.0) else one for one in bank.names)
    diagnosis, (finding,) = diagnosed(shows((HIDDEN, 1.0)), replace(bank, names=names))
    assert (diagnosis.named[0].name, diagnosis.named[0].aliases) == ("x-bias-doubled at 0.1", ("x-twin",))
    assert "x-bias-doubled at 0.1 or x-twin (a = " in finding.message


@pytest.mark.parametrize("view", ["replay", "prefill"])
def test_one_view_is_enough(view):
    """A candidate that shows one path alone is fitted on that."""
    trace = shows((SWAPPED, 1.0))
    alone = replace(trace, passes=tuple(one for one in trace.passes if one.view == view))
    diagnosis, findings = diagnosed(alone)
    assert [one.name for one in diagnosis.named] == ["x-rows-swapped"]
    assert len(findings) == 1


def test_weights_that_were_cast_have_their_own_centre(bank):
    """The float32 copy of a candidate is held against what its declared weights give, not against the checkpoint's."""
    cast = 50 * tiny.sigma("float32")
    moved = replace(bank, centres={**bank.centres, "bfloat16": bank.centres["bfloat16"] + cast})
    trace = tiny.candidate(tiny.round_off(0, "float32") + cast, "float32")
    as_declared, _ = diagnosed(trace, moved, declared="bfloat16")
    assert as_declared.residual == ()
    assert diagnosed(trace, moved)[0].residual != ()


def test_the_raw_coefficient_is_told():
    """With the replicas' mean left in, the coefficient is another one, of the same bug."""
    (one,) = diagnosed(shows((SWAPPED, 1.0)))[0].named
    assert one.raw != one.coefficient
    assert one.raw == pytest.approx(1, abs=0.3)


# --- through compare and check -----------------------------------------------------------------


@pytest.fixture
def cached(monkeypatch, tmp_path):
    """The tiny templates in the cache, and nothing that would make others."""
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
    tiny.keep(tmp_path)

    def refuse(*_arguments, **_options):
        raise AssertionError("templates are there already")

    monkeypatch.setattr(making, "make", refuse)


def checked(name, precision="bfloat16", *, strength=1.0, **more):
    """The verdict on the live model with a bug, or without."""
    names = () if name is None else (name,)
    with tiny.broken(precision, *names, strength=strength) as engine:
        return harness.check(tiny.golden(), engine, reference=tiny.MODEL, **{"upcast": False, **more})


def test_without_templates_there_is_no_diagnosis():
    """What was not asked for is not there."""
    trace = shows((SWAPPED, 1.0))
    runs = [replace(tiny.golden().suite.runs[0], views=tiny.bank().views)]
    assert compare(tiny.golden(), trace, runs).answers[-1].diagnosis is None
    answer = compare(tiny.golden(), trace, runs, templates=tiny.bank()).answers[-1]
    assert [one.name for one in answer.diagnosis.named] == ["x-rows-swapped"]
    assert answer.status is Status.DEVIATES


def test_a_hidden_bug_deviates_with_diagnosis_alone(cached):
    """A bug of a seventh of round-off passes the check as shipped, and fails the one that knows its template."""
    name, strength = HIDDEN
    plain = checked(name, strength=strength)
    named = checked(name, strength=strength, diagnose=True)
    assert plain.ok
    assert plain.answers[-1].diagnosis is None
    assert named.status is Status.DEVIATES
    (finding,) = named.failures
    assert finding.check == "looks like"
    assert finding.message.startswith("x-bias-doubled at 0.1")
    signal = np.sqrt((tiny.template(*HIDDEN) ** 2).sum() / (tiny.sigma() ** 2).sum())
    print(f"S/N {signal:.2f}, z {finding.measured:.1f} of {finding.allowed:.1f}")
    assert signal < 0.2
    assert finding.measured > 2 * finding.allowed


@pytest.mark.parametrize("precision", tiny.PRECISIONS)
def test_the_right_model_passes_with_diagnosis(cached, precision):
    """The model as it is stays ok, and its report says that it is like no bug."""
    verdict = checked(None, precision, diagnose=True)
    assert verdict.ok
    (line, *_) = diagnosis_lines(verdict.answers[-1])
    assert "like no bug of the catalogue" in line


def test_both_questions_are_diagnosed(cached):
    """The float32 copy names the bug beyond doubt, and the 16-bit run itself names it too."""
    verdict = checked("x-rows-swapped", upcast=True, diagnose=True)
    function, precision = verdict.answers
    assert (function.question, precision.question) == ("function", "precision")
    for answer in (function, precision):
        assert [one.name for one in answer.diagnosis.named] == ["x-rows-swapped"]
    assert function.diagnosis.named[0].coefficient == pytest.approx(1, abs=0.01)
    # By more than an order of magnitude on any processor: the scatter over four prompts, which bounds z in float32, is
    # that of its kernels (80 and more than 100 were seen).
    assert function.diagnosis.named[0].z > 10 * precision.diagnosis.named[0].z


def test_a_trace_is_diagnosed_elsewhere(cached, tmp_path):
    """A trace that was made for it and written is judged as in place; one that was not says so."""
    name, strength = HIDDEN
    with tiny.broken("bfloat16", name, strength=strength) as engine:
        trace = harness.run(engine, tiny.golden(), model=tiny.MODEL, upcast=False, diagnose=True)
        plain = harness.run(engine, tiny.golden(), model=tiny.MODEL, upcast=False)
        here = harness.check(tiny.golden(), engine, reference=tiny.MODEL, upcast=False, diagnose=True)
    trace.save(tmp_path / "one.trace")
    again = harness.load_trace(tmp_path / "one.trace")
    there = harness.check(tiny.golden(), again, reference=tiny.MODEL, diagnose=True)
    assert there.answers[-1].diagnosis == here.answers[-1].diagnosis
    assert there.status is here.status is Status.DEVIATES
    without = harness.check(tiny.golden(), plain, reference=tiny.MODEL, diagnose=True)
    assert without.ok
    assert without.answers[-1].diagnosis.reason == NOT_SHOWN


def test_a_golden_without_its_model_is_told(tmp_path):
    """Templates are made with the model: where that is not at hand the error says what to do."""
    with pytest.raises(ModelError, match="templates are made with the model") as error:
        harness.check(replace(tiny.golden(), directory=None), tiny.candidate(), diagnose=True)
    assert "--diagnose" in error.value.fix
