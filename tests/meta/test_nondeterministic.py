"""A correct engine may never repeat a bit and passes; one that keeps something of an earlier request does not."""

from __future__ import annotations

from dataclasses import replace

import pytest

import harness
from harness.engines.hf import Options
from harness.values import Run, Status
from tests.meta.engines import Leaking, Scattered

#: Every view, and two visits of one prompt with a longer one between them.
ORDER = Run(name="order", batch_size=1, order="A-B-A")
REPLAYED = replace(ORDER, views=("replay",))


def asked(directory, *runs, quick=False):
    """The golden in a directory with these runs, after its own quick ones where they are wanted."""
    golden = harness.load_golden(directory)
    own = tuple(run for run in golden.suite.runs if run.quick) if quick else ()
    # Without a directory the runs are the golden's own, and not those of the suite's file.
    return replace(golden, suite=replace(golden.suite, runs=(*own, *runs)), directory=None)


def answered(verdict):
    """Status of each question."""
    return {answer.question: answer.status for answer in verdict.answers}


def drifts(golden, engine, model):
    """Check an engine that is correct and never repeats itself: drift, for it does not repeat, and nothing worse."""
    verdict = harness.check(golden, engine, reference=model)
    assert verdict.status is Status.DRIFT, str(verdict)
    assert not verdict.failures
    assert set(answered(verdict).values()) == {Status.DRIFT}
    repeats = [finding for finding in verdict.findings if finding.check == "repeat"]
    assert {finding.question for finding in repeats} == set(answered(verdict))
    assert all("judged against round-off like any other pass" in finding.why for finding in repeats)
    return verdict


# --- on the small recorded model ---------------------------------------------------------------


@pytest.fixture
def small(small_home):
    """Directory of the small golden, and of its model."""
    return small_home / "golden/small/small", small_home / "golden/small/model"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_correct_engine_that_never_repeats_itself_drifts(small, dtype, seed):
    """Sums in another order at each forward call are round-off, in every precision and every view."""
    directory, model = small
    engine = Scattered(Options(model=str(model), dtype=dtype), seed=seed)
    verdict = drifts(asked(directory, ORDER, quick=True), engine, model)
    assert {one.run for one in verdict.passes} == {"batched", "order"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_that_calls_itself_deterministic_is_held_to_it(small, dtype):
    """The same engine, declared deterministic, is told that it does not repeat itself."""
    directory, model = small
    engine = Scattered(Options(model=str(model), dtype=dtype), claims=True)
    verdict = harness.check(asked(directory, REPLAYED), engine, reference=model)
    assert verdict.status is Status.NONDETERMINISTIC
    assert verdict.status.exit_code == 1
    assert all(finding.check == "repeat" for finding in verdict.failures)
    assert "the engine declares itself deterministic" in str(verdict)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scatter", [False, True], ids=["repeats", "never repeats"])
@pytest.mark.parametrize("leak", ["cache", "position"])
def test_state_of_an_earlier_request_is_found(small, leak, scatter, dtype):
    """What an earlier request left behind is no round-off: it deviates, also where no bit was promised."""
    directory, model = small
    engine = Leaking(Options(model=str(model), dtype=dtype), leak=leak, scatter=scatter)
    verdict = harness.check(asked(directory, REPLAYED), engine, reference=model)
    found_behind_the_first_visit(verdict)


def found_behind_the_first_visit(verdict):
    """The verdict is `deviates` in every answer; the first visit, before which there was none, is without fault."""
    assert verdict.status is Status.DEVIATES, str(verdict)
    places = {finding.where for finding in verdict.failures}
    for visit in ("order/replay visit 2", "order/replay visit 3"):
        assert any(place.startswith(visit) for place in places), places
    assert not any(place == "order/replay" or place.startswith("order/replay,") for place in places), places


def test_the_repeat_alone_would_not_tell(small):
    """A leak and sums in another order look alike when a request is repeated: the numbers tell them apart."""
    directory, model = small
    golden, options = asked(directory, REPLAYED), Options(model=str(model), dtype="float32")
    correct = harness.check(golden, Scattered(options), reference=model)
    leaking = harness.check(golden, Leaking(options, leak="cache", scatter=True), reference=model)
    first, second = (
        [(one.status, one.message) for one in verdict.findings if one.check == "repeat"]
        for verdict in (correct, leaking)
    )
    assert first == second
    assert first[0][0] is Status.DRIFT
    assert (correct.ok, leaking.ok) == (True, False)


# --- on shipped goldens ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_shipped_model_drifts(goldens, dtype):
    """On a trained model too an engine that never repeats itself is correct, whichever way it is run."""
    model = goldens / "llama-tiny/model"
    verdict = drifts(
        asked(goldens / "llama-tiny/translate", ORDER, quick=True),
        Scattered(Options(model=str(model), dtype=dtype)),
        model,
    )
    assert {one.run for one in verdict.passes} == {"batched", "order"}


@pytest.mark.slow
@pytest.mark.parametrize("host", ["llama-tiny", "bloom-raw"])
def test_the_core_suite_drifts(goldens, host):
    """Prompts of every kind and up to 760 tokens, in batches and in turn."""
    model = goldens / host / "model"
    engine = Scattered(Options(model=str(model), dtype="float32"))
    drifts(asked(goldens / host / "core", REPLAYED, quick=True), engine, model)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("leak", ["cache", "position"])
def test_a_leak_is_found_on_a_shipped_model(goldens, leak, dtype):
    """Half of one token's keys and values, or one place, of an earlier request are found among hundreds of tokens."""
    model = goldens / "llama-tiny/model"
    engine = Leaking(Options(model=str(model), dtype=dtype), leak=leak, scatter=True)
    verdict = harness.check(asked(goldens / "llama-tiny/core", REPLAYED), engine, reference=model)
    found_behind_the_first_visit(verdict)
    assert answered(verdict)["function"] is Status.DEVIATES
