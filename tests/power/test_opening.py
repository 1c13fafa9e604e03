"""Open engines: families and their float32 copies, loading once, and a recorder that keeps all logits and no more."""

from __future__ import annotations

import itertools
from contextlib import suppress
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from harness import flow
from harness.engines import hf
from harness.engines.spec import parse_spec
from harness.errors import EngineError, UsageError
from harness.mutations.benign import FAMILIES
from harness.numerics.constants import TOP
from harness.numerics.sketch import Sketcher
from harness.power import drawn
from harness.power.opening import Kept, open_spec, opened, spec_text
from harness.values import Request
from tests.engines.recorder import largest_difference, recorded

#: A long, a short and a middle prompt: with batches of two the order of the rows is not that of the requests.
REQUESTS = (
    Request(id="long", prompt_ids=tuple(range(5, 45)), max_new_tokens=4),
    Request(id="short", prompt_ids=(17, 200, 4), max_new_tokens=4),
    Request(id="middle", prompt_ids=tuple(range(150, 167)), max_new_tokens=4),
)
CONTINUATIONS = ((7, 8, 9, 10), (44, 3), (1, 1, 5, 6))


@pytest.fixture
def kept(small_llama):
    """A function that opens a plain engine in a precision: (the engine, the same with its logits kept)."""
    opens = []

    def open_one(precision, **options):
        text = spec_text({"dtype": precision, **options})
        engine = hf.build(parse_spec(text), model=str(small_llama)).__enter__()
        opens.append(engine)
        return engine, Kept(engine, spec=text)

    yield open_one
    for engine in opens:
        engine.__exit__(None, None, None)


# --- families ----------------------------------------------------------------------------------


def test_a_float32_copy_is_made_of_the_plain_model_and_changed_anew(small_llama):
    """The copy of a 16-bit candidate computes in float32, as the family does, and from the candidate's weights."""
    requests = [Request(id="a", prompt_ids=tuple(range(5, 45)), max_new_tokens=2)]
    show = partial(recorded, view="prefill", requests=requests, continuations=[(7, 8)])
    with opened(FAMILIES["plain"], small_llama, "bfloat16") as plain, plain.upcast() as wide:
        assert wide.settings["dtype"] == "float32"
        expected = show(wide)
        rounded = show(plain)
    for name in ("ranks-2", "permuted", "norms-stepwise"):
        with opened(FAMILIES[name], small_llama, "bfloat16") as engine, engine.upcast() as wide:
            found = show(wide)
        assert 0 < largest_difference(found, expected) < 1e-4 < largest_difference(rounded, expected), name
    with opened(FAMILIES["plain"], small_llama, "float32") as engine, pytest.raises(EngineError):
        engine.upcast()


def test_an_engine_is_loaded_once(small_llama, monkeypatch):
    """However often it is entered, the model is loaded once and is there until the end."""
    loads = []
    load = hf.HFEngine._load
    monkeypatch.setattr(hf.HFEngine, "_load", lambda self: loads.append(self) or load(self))
    with opened(FAMILIES["batch-1"], small_llama, "bfloat16") as engine:
        for _ in range(3):
            with engine, engine.upcast() as wide:
                assert engine.settings["batch"] == wide.settings["batch"] == 1
                assert engine.vocabulary == wide.vocabulary
    assert len(loads) == 1
    assert "deterministic" in engine.capabilities


def test_without_a_copy_there_is_none(small_llama):
    """`wide=False` leaves it out, and whoever asks for it is told so."""
    with (
        opened(FAMILIES["plain"], small_llama, "bfloat16", wide=False) as engine,
        pytest.raises(EngineError, match="opened without a float32 copy"),
    ):
        engine.upcast()


def test_a_family_that_the_model_lacks_is_said_on_entry(small_llama, monkeypatch):
    """The LookupError of the family is passed on, and what was opened is closed."""
    closed = []
    close = hf.HFEngine.__exit__
    monkeypatch.setattr(hf.HFEngine, "__exit__", lambda self, *error: closed.append(self) or close(self, *error))

    def missing(_model):
        raise LookupError("it has no such part")

    for wide, engines in ((True, 2), (False, 1)):
        closed.clear()
        family = replace(FAMILIES["plain"], change=missing)
        with (
            pytest.raises(LookupError, match="no such part"),
            opened(family, small_llama, "bfloat16", wide=wide),
        ):
            pass
        assert len(closed) == engines


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dtype": "float32"}, "hf:dtype=float32"),
        ({"compile": True, "static_cache": False}, "hf:compile=true,static_cache=false"),
        ({"chunk": "16", "batch": 1}, "hf:chunk=16,batch=1"),
    ],
)  # fmt: skip
def test_options_become_a_spec(options, text):
    """Numbers, words and switches, in the order given; the engine reads it."""
    assert spec_text(options) == text
    assert hf.build(parse_spec(text), model="x") is not None


# --- all logits --------------------------------------------------------------------------------


@pytest.mark.parametrize("view", ["replay", "prefill"])
@pytest.mark.parametrize("batch_size", [1, 2, 3, None])
@pytest.mark.parametrize(
    ("precision", "kind"), [("float32", np.float32), ("float64", np.float64), ("bfloat16", np.float32)]
)
def test_all_logits_are_kept_to_the_last_bit(kept, view, batch_size, precision, kind):
    """What the plain engine shows at every position, by request and in order of positions, however it is batched."""
    engine, keeper = kept(precision)
    expected = recorded(engine, view, REQUESTS, CONTINUATIONS, batch_size=batch_size)
    with keeper.recording() as calls:
        getattr(keeper, view)(REQUESTS, CONTINUATIONS, batch_size=batch_size, sketcher=Sketcher(engine.vocabulary))
    (call,) = calls
    assert (call.view, call.requests) == (view, ("long", "short", "middle"))
    found = {}
    for index, (request, tokens) in enumerate(zip(REQUESTS, CONTINUATIONS, strict=True)):
        prompt = len(request.prompt_ids)
        first = prompt if view == "replay" else 1
        assert call.positions[index].tolist() == list(range(first, prompt + len(tokens)))
        assert call.logits[index].dtype == kind
        assert call.logits[index].shape == (len(call.positions[index]), engine.vocabulary)
        rows = torch.from_numpy(call.logits[index].astype(np.float64))
        found |= {(index, int(at)): row for at, row in zip(call.positions[index], rows, strict=True)}
    assert found.keys() == expected.keys()
    assert largest_difference(found, expected) == 0


def test_only_the_vocabulary_that_is_asked_for_is_kept(kept):
    """A sketcher of fewer columns than the engine has: of the first so many."""
    engine, keeper = kept("float32")
    with keeper.recording() as calls:
        for columns in (100, engine.vocabulary):
            keeper.replay(REQUESTS, CONTINUATIONS, batch_size=3, sketcher=Sketcher(columns))
    narrow, whole = (call.logits for call in calls)
    for one, other in zip(narrow, whole, strict=True):
        assert one.shape[1] == 100
        assert (one == other[:, :100]).all()


def test_what_is_kept_is_a_copy(kept):
    """A later call, or a weight that is changed, does not reach what was kept."""
    engine, keeper = kept("float32")
    with keeper.recording() as calls:
        keeper.prefill(REQUESTS, CONTINUATIONS, batch_size=3, sketcher=Sketcher(engine.vocabulary))
        before = [rows.copy() for rows in calls[0].logits]
        with torch.no_grad():
            engine.model.lm_head.weight.mul_(2)
        keeper.prefill(REQUESTS, CONTINUATIONS, batch_size=3, sketcher=Sketcher(engine.vocabulary))
    assert all((one == other).all() for one, other in zip(calls[0].logits, before, strict=True))
    assert not (calls[1].logits[0] == before[0]).any()


def test_calls_stand_in_their_order(kept):
    """One entry a call, each with the requests of that call alone."""
    engine, keeper = kept("float32")
    with keeper.recording() as calls:
        for index in (0, 1, 0):
            keeper.replay(
                REQUESTS[index : index + 1], CONTINUATIONS[index : index + 1], batch_size=1,
                sketcher=Sketcher(engine.vocabulary),
            )  # fmt: skip
    assert [call.requests for call in calls] == [("long",), ("short",), ("long",)]
    assert (calls[0].logits[0] == calls[2].logits[0]).all()
    assert calls[1].logits[0].shape == (2, engine.vocabulary)


def test_nothing_is_kept_outside(kept):
    """Before and after the block, and after an error in it, calls leave nothing; the next block begins empty."""
    engine, keeper = kept("float32")

    def show():
        keeper.replay(REQUESTS, CONTINUATIONS, batch_size=3, sketcher=Sketcher(engine.vocabulary))

    show()
    with keeper.recording() as calls:
        assert calls == []
        show()
    show()
    assert len(calls) == 1
    with suppress(ZeroDivisionError), keeper.recording() as broken:
        show()
        raise ZeroDivisionError
    show()
    assert len(broken) == 1
    with keeper.recording() as fresh:
        pass
    assert fresh == []


def test_a_call_that_fails_is_not_kept(kept):
    """Half a call is none, and the error is passed on."""
    engine, keeper = kept("float32")
    wrong = (Request(id="wrong", prompt_ids=(5, 10_000), max_new_tokens=1),)
    with keeper.recording() as calls, pytest.raises(IndexError):
        keeper.replay(wrong, [(7,)], batch_size=1, sketcher=Sketcher(engine.vocabulary))
    assert calls == []


# --- free runs and traces ----------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_free_runs_show_their_highest_entries_inside_the_block(kept, precision):
    """The tokens are the same; the entries are the highest log-probabilities of the same steps, and gone outside."""
    engine, keeper = kept(precision)
    plain = engine.generate(REQUESTS, batch_size=3, stop_ids=frozenset())
    with keeper.recording() as calls:
        found = keeper.generate(REQUESTS, batch_size=3, stop_ids=frozenset())
        keeper.replay(REQUESTS, [one.tokens for one in found], batch_size=3, sketcher=Sketcher(engine.vocabulary))
    assert [one.tokens for one in found] == [one.tokens for one in plain]
    (call,) = calls
    for one, logits in zip(found, call.logits, strict=True):
        assert [step[0] for step in one.top_ids] == list(one.tokens)
        logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        expected = -np.sort(-logp, axis=1)[:, :TOP]
        assert np.array(one.top_logits) == pytest.approx(expected, rel=1e-5, abs=1e-5)
    after = keeper.generate(REQUESTS, batch_size=3, stop_ids=frozenset())
    assert after == plain
    assert all(one.top_ids == one.top_logits == () for one in after)
    assert engine.options.show == "logits"


def test_an_error_of_a_free_run_leaves_the_engine_as_it_was(kept, monkeypatch):
    """The option is put back whatever happens."""
    engine, keeper = kept("float32")

    def broken(*_arguments, **_options):
        assert engine.options.show == "top"
        raise ZeroDivisionError

    monkeypatch.setattr(hf.decoding, "greedy", broken)
    with keeper.recording(), pytest.raises(ZeroDivisionError):
        keeper.generate(REQUESTS, batch_size=3, stop_ids=frozenset())
    assert engine.options.show == "logits"


@pytest.fixture(scope="module")
def golden(small_llama, tmp_path_factory):
    """A golden of three drawn prompts, with a run of single ones."""
    suite = drawn.generate_suite(8, 3, 4, longest=30, long=None, characters=1.4, alone=True)
    out = tmp_path_factory.mktemp("golden") / "golden"
    return flow.record(small_llama, suite, out=out, precisions=("float32",), replicas=2)


def bare(trace):
    """A trace without what a recorder may change: seconds, and the highest entries of free runs."""
    passes = tuple(
        replace(
            one,
            seconds=0.0,
            rows=None,
            generations=tuple(replace(given, top_ids=(), top_logits=()) for given in one.generations),
        )
        for one in trace.passes
    )
    return replace(trace, engine="", passes=passes)


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_a_recorded_run_gives_the_same_trace(kept, small_llama, golden, precision):
    """But for seconds and the highest entries of free runs; every number of every row agrees to the last bit."""
    _, keeper = kept(precision)
    fresh = hf.build(parse_spec(spec_text({"dtype": precision})), model=str(small_llama))
    plain = flow.run(fresh, golden, upcast=False)
    with keeper.recording() as calls:
        found = flow.run(keeper, golden, upcast=False)
    assert bare(found) == bare(plain)
    for one, other in zip(found.passes, plain.passes, strict=True):
        assert (one.rows is None) == (other.rows is None) == (one.view == "generate")
        if one.rows is not None:
            for name in type(one.rows).__slots__:
                np.testing.assert_array_equal(getattr(one.rows, name), getattr(other.rows, name), name)
    assert all(given.top_ids for one in found.passes for given in one.generations)
    assert [call.view for call in calls] == [one.view for one in found.passes if one.view != "generate"]
    orders = [call.requests for call in calls if len(call.requests) == 1]
    assert len(orders) == 3
    assert orders[0] == orders[2] != orders[1]


def test_what_is_kept_is_what_the_rows_say(kept, golden):
    """The log-probability of each kept row's next token is that of the trace's row at the same place."""
    _, keeper = kept("float64")
    with keeper.recording() as calls:
        trace = flow.run(keeper, golden, upcast=False)
    passes = [one for one in trace.passes if one.view != "generate"]
    for call, one in itertools.islice(zip(calls, passes, strict=True), 2):
        row = 0
        for index, logits in enumerate(call.logits):
            ids = np.array((*golden.requests[index].prompt_ids, *golden.continuations[index]))
            following = ids[call.positions[index]]
            logp = logits[np.arange(len(logits)), following] - np.log(np.exp(logits).sum(axis=1))
            assert one.rows.logp[row : row + len(logits)] == pytest.approx(logp, abs=1e-5)
            row += len(logits)
        assert row == len(one.rows.logp)


def test_an_engine_of_another_kind_is_kept_as_it_is():
    """A port has no option for the highest entries: its free runs are passed on."""

    class Silent:
        """Only what a free run needs."""

        spec, declared, capabilities, options = "silent", {}, frozenset({"tokens"}), None

        def generate(self, requests, *, batch_size, stop_ids):
            """Nothing."""
            return [batch_size, stop_ids, *requests]

    keeper = Kept(Silent(), spec="silent")
    with keeper.recording() as calls:
        assert keeper.generate([1, 2], batch_size=3, stop_ids=frozenset({4})) == [3, frozenset({4}), 1, 2]
    assert calls == []


def test_a_port_is_opened_in_place_of_transformers(goldens):
    """The SPEC keeps its rungs but for the kernels that a precision has not, and takes a bug's options."""
    model = goldens / "bloom-tiny" / "model"
    assert open_spec("hf", "float32", {}, model).spec == "hf:dtype=float32"
    narrow = open_spec("bloom:rungs=alibi+matvec", "bfloat16", {"chunk": "16"}, model)
    assert narrow.spec == "bloom:rungs=alibi+matvec,chunk=16,dtype=bfloat16"
    assert open_spec("bloom:rungs=all", "float64", {}, model).spec == (
        "bloom:rungs=alibi+layout+gelu+softmax,dtype=float64"
    )


def test_what_a_port_lacks_is_said(goldens):
    """A bug of a key that the engine has not does not fit, which is no failure of the bench."""
    with pytest.raises(LookupError, match="static_cache"):
        open_spec("bloom:rungs=all", "float32", {"static_cache": "true"}, goldens / "bloom-tiny" / "model")


def test_bugs_go_into_engines_with_a_live_model_alone(goldens):
    """Another engine is refused, with those that there are."""
    with pytest.raises(UsageError, match="tp:size=2"):
        open_spec("tp:size=2", "float32", {}, goldens / "bloom-tiny" / "model")
