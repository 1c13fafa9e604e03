"""Traces are read as they were written, to the bit, and nothing else is read as a trace."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import harness
from harness import traces
from harness.errors import TraceError
from harness.values import Generation, Pass, Rows, Trace
from tests.comparison import literal
from tests.templates import tiny

SMALL = "golden/small/small"


def same(a, b):
    """Whether two values are equal to the bit, arrays and NaN included."""
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if hasattr(a, "__dataclass_fields__"):
        return all(same(getattr(a, field.name), getattr(b, field.name)) for field in fields(a))
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and a != a:
        return b != b
    return type(a) is type(b) and a == b


def written_and_read(trace, directory):
    """A trace after a trip through a file."""
    trace.save(directory / "one.trace")
    return harness.load_trace(directory / "one.trace")


@pytest.fixture(scope="module")
def ran(small_home, tmp_path_factory):
    """A real trace of a 16-bit candidate, all runs, with its float32 copy."""
    home = tmp_path_factory.mktemp("ran") / "home"
    shutil.copytree(small_home, home)
    return harness.run("hf:dtype=bfloat16", home / SMALL)


def test_a_real_trace_comes_back_to_the_bit(ran, tmp_path):
    """Every field and array, those of the float32 copy included."""
    again = written_and_read(ran, tmp_path)
    assert ran.upcast is not None
    assert len(ran.passes) > 3
    assert same(again, ran)


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize(
    "candidate", ["hf:dtype=bfloat16", "hf:dtype=float32,show=top", "hf:dtype=float16,show=tokens"]
)
def test_the_verdict_is_the_same_as_in_place(home, tmp_path, candidate, quick):
    """A trace that was written, moved and read is judged as in place, to the last bit of every figure."""
    here = harness.check(SMALL, candidate, quick=quick)
    there = harness.check(SMALL, written_and_read(harness.run(candidate, SMALL, quick=quick), tmp_path), quick=quick)
    assert json.dumps(without_seconds(there)) == json.dumps(without_seconds(here))
    assert there.statistics == here.statistics
    assert there.findings == here.findings


def without_seconds(verdict):
    """All of a verdict but how long it took."""
    data = verdict.to_dict()
    data.pop("seconds")
    for one in data["passes"]:
        one.pop("seconds")
    return data


def test_nan_and_infinities_come_back(tmp_path):
    """A broken candidate's NaN, infinities, signed zeros and denormals are evidence, and are kept."""
    golden = literal.golden()
    trace = literal.trace(literal.reference_logits(0))
    rows = trace.passes[0].rows
    values = rows.logp.copy()
    values[:5] = [np.nan, np.inf, -np.inf, -0.0, 1e-45]
    odd = replace(trace, passes=(replace(trace.passes[0], rows=replace(rows, logp=values)), *trace.passes[1:]))
    assert same(written_and_read(odd, tmp_path), odd)
    assert not harness.check(golden, written_and_read(odd, tmp_path)).ok


# --- what templates are fitted to --------------------------------------------------------------


def _fine(trace, fine, basis):
    """The trace with products of its first pass, and the basis that they are of."""
    first, *others = trace.passes
    return replace(trace, passes=(replace(first, rows=replace(first.rows, fine=fine)), *others), basis=basis)


def test_products_with_the_basis_come_back(tmp_path):
    """They and the digest of their basis are read as they were written, NaN and denormals included."""
    trace = literal.trace(literal.reference_logits(0))
    fine = np.random.default_rng(0).normal(size=(len(trace.passes[0].rows), 5))
    fine[0] = [np.nan, np.inf, -0.0, 5e-324, 1e300]
    shown = _fine(trace, fine, "a digest")
    again = written_and_read(shown, tmp_path)
    assert same(again, shown)
    assert again.basis == "a digest"
    assert again.passes[0].rows.fine.tobytes() == fine.tobytes()
    assert again.passes[1].rows.fine is None


def test_an_older_trace_has_no_basis(tmp_path, ran):
    """A trace that was written before there were any is read, and has none."""
    ran.save(tmp_path / "one.trace")
    rewritten(tmp_path / "one.trace", lambda words, _: words.pop("basis"))
    again = harness.load_trace(tmp_path / "one.trace")
    assert again.basis == ""
    assert all(one.rows is None or one.rows.fine is None for one in again.passes)


def test_a_trace_that_was_made_without_diagnose_says_so(monkeypatch, tmp_path):
    """A check that asks for the bug's name judges such a trace as ever, and says what it lacks."""
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
    tiny.keep(tmp_path)
    with tiny.broken("float32") as engine:
        trace = harness.run(engine, tiny.golden(), model=tiny.MODEL)
    assert trace.basis == ""
    verdict = harness.check(tiny.golden(), written_and_read(trace, tmp_path), reference=tiny.MODEL, diagnose=True)
    assert verdict.ok
    diagnosis = verdict.answers[-1].diagnosis
    assert "made with --diagnose" in diagnosis.reason
    assert (diagnosis.named, diagnosis.limit) == ((), None)
    assert f"no bug can be named: {diagnosis.reason}" in str(verdict)


words = st.text(max_size=8)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
ids = st.lists(st.integers(0, 2**31 - 1), max_size=4).map(tuple)
generations = st.builds(
    Generation,
    tokens=ids,
    finish=st.sampled_from(["eos", "length"]),
    top_ids=st.lists(ids, max_size=3).map(tuple),
    top_logits=st.lists(st.lists(st.floats(), max_size=3).map(tuple), max_size=3).map(tuple),
)


@st.composite
def rows_of(draw):
    """Rows of any content, of the right shapes."""
    count = draw(st.integers(0, 5))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    generated = rng.random(count) < 0.5
    sizes = {"N": count, "G": int(generated.sum()), "J": traces.PROJECTIONS, "T": draw(st.integers(1, 3))}
    arrays = {
        name: rng.integers(0, 2**31 - 1, [sizes[axis] for axis in axes]).astype(dtype)
        for name, (dtype, axes) in traces._ARRAYS.items()
    }
    columns = draw(st.none() | st.integers(0, 3))
    fine = None if columns is None else rng.normal(size=(count, columns)) * 10.0 ** rng.integers(-300, 300)
    return Rows(**{**arrays, "generated": generated}, fine=fine)


passes = st.builds(
    Pass,
    run=words,
    view=st.sampled_from(["generate", "replay", "prefill"]),
    repeat=st.integers(0, 3),
    requests=ids,
    generations=st.lists(generations, max_size=2).map(tuple),
    rows=st.none() | rows_of(),
    seconds=st.floats(0, 9),
)


@st.composite
def any_trace(draw, depth=1):
    """A trace of any content, with a copy or without."""
    return Trace(
        engine=draw(words),
        declared=draw(st.dictionaries(words, plain, max_size=3)),
        settings=draw(st.dictionaries(words, plain, max_size=3)),
        capabilities=frozenset(draw(st.lists(words, max_size=3))),
        vocabulary=draw(st.integers(0, 10**6)),
        suite_digest=draw(words),
        prompt_ids=draw(st.none() | st.lists(ids, max_size=2).map(tuple)),
        passes=tuple(draw(st.lists(passes, max_size=2))),
        upcast=draw(any_trace(depth=0)) if depth and draw(st.booleans()) else None,
        upcast_reason=draw(words),
        forced=draw(words),
        quick=draw(st.booleans()),
        limits=tuple(draw(st.lists(words, max_size=2))),
        basis=draw(words),
    )


@given(trace=any_trace())
@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_any_trace_comes_back(tmp_path, trace):
    """Whatever a trace holds, it is read as it was written."""
    again = written_and_read(trace, tmp_path)
    for field in fields(Trace):
        if field.name not in ("declared", "settings", "upcast"):
            assert same(getattr(again, field.name), getattr(trace, field.name)), field.name
    assert json.dumps(again.settings, sort_keys=True) == json.dumps(trace.settings, sort_keys=True)
    assert (again.upcast is None) == (trace.upcast is None)


# --- what is refused ---------------------------------------------------------------------------


@pytest.fixture
def file(ran, tmp_path):
    """A real trace on disk."""
    ran.save(tmp_path / "one.trace")
    return tmp_path / "one.trace"


def rewritten(file, change):
    """The file with its words changed, and a digest that is right."""
    arrays = load_file(file)
    with traces_metadata(file) as metadata:
        document = json.loads(metadata["trace"])
    change(document["trace"], arrays)
    text = json.dumps(document, sort_keys=True)
    save_file(arrays, file, metadata={"trace": text, "sha256": traces._digest(text, arrays)})


class traces_metadata:  # noqa: N801  # a context manager read like a function
    def __init__(self, file):
        from safetensors import safe_open

        self._opened = safe_open(file, framework="numpy")

    def __enter__(self):
        return self._opened.__enter__().metadata()

    def __exit__(self, *error):
        return self._opened.__exit__(*error)


def test_a_flipped_bit_anywhere_is_seen(file):
    """No byte of the content can change without being refused."""
    content = file.read_bytes()
    refused = 0
    for place in range(0, len(content), max(1, len(content) // 97)):
        broken = bytearray(content)
        broken[place] ^= 1
        file.write_bytes(bytes(broken))
        try:
            again = harness.load_trace(file)
        except TraceError:
            refused += 1
        else:
            file.write_bytes(content)
            assert same(again, harness.load_trace(file))  # padding of the header, which says nothing
    assert refused > 90


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused(file, share):
    """A file that ends early is named, whatever is left of it."""
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(TraceError, match=r"one\.trace"):
        harness.load_trace(file)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda words, _: words.pop("engine"), "engine"),
        (lambda words, _: words.update(vocabulary="many"), "vocabulary"),
        (lambda words, _: words.update(quick=1), "quick"),
        (lambda words, _: words["passes"][0].update(view="sideways"), "sideways"),
        (lambda words, _: words["passes"][0].update(requests=[-1]), "whole numbers"),
        (lambda words, _: words["passes"][0].update(requests=[True]), "whole numbers"),
        (lambda words, _: words.update(passes=3), "TypeError"),
        (lambda words, _: words.update(upcast={"engine": "x"}), "prompt_ids"),
        (lambda _, arrays: arrays.pop("0.logp"), "0.logp"),
        (lambda _, arrays: arrays.update({"0.logp": arrays["0.logp"].astype(np.float64)}), "float64"),
        (lambda _, arrays: arrays.update({"0.logp": arrays["0.logp"][:-1]}), "0.logp"),
        (lambda _, arrays: arrays.update({"0.top_ids": arrays["0.top_ids"].reshape(-1)}), "0.top_ids"),
        (lambda _, arrays: arrays.update({"0.generated": ~arrays["0.generated"]}), "generated"),
        (lambda _, arrays: arrays.update({"0.fine": np.zeros((len(arrays["0.logp"]), 3), dtype=np.float32)}), "0.fine"),
        (lambda _, arrays: arrays.update({"0.fine": np.zeros((len(arrays["0.logp"]) - 1, 3))}), "0.fine"),
        (lambda _, arrays: arrays.update({"0.fine": np.zeros(len(arrays["0.logp"]))}), "0.fine"),
        (lambda _, arrays: arrays.update({"0.fine": np.zeros((len(arrays["0.logp"]), 3, 1))}), "0.fine"),
        (lambda words, _: words.update(basis=["d"]), "basis"),
    ],
)
def test_content_of_the_wrong_kind_is_refused(file, change, words):
    """A file with a right digest is still looked through, and what is wrong is named."""
    rewritten(file, change)
    with pytest.raises(TraceError, match=words):
        harness.load_trace(file)


def test_pickles_and_other_files_are_not_opened(tmp_path):
    """A pickle is refused and not executed; so are a directory, a golden's arrays and a file that is not there."""
    marker = tmp_path / "executed"

    class Hostile:
        def __reduce__(self):
            return (Path.touch, (marker,))

    file = tmp_path / "one.trace"
    file.write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(TraceError):
        harness.load_trace(file)
    assert not marker.exists()
    for other in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(TraceError, match="there is no trace"):
            harness.load_trace(other)
    save_file({"a": np.zeros(3)}, file)
    with pytest.raises(TraceError, match="no trace"):
        harness.load_trace(file)


def test_another_format_is_told(file, monkeypatch):
    """A trace of another version says which, and what to do."""
    monkeypatch.setattr(traces, "FORMAT", 2)
    with pytest.raises(TraceError, match=r"has format 1, this version reads 2.*install"):
        harness.load_trace(file)


def test_a_place_that_cannot_be_written_is_told(ran, tmp_path):
    """A missing directory is one clear line, and an old file stays when writing fails."""
    with pytest.raises(TraceError, match="directory that exists"):
        ran.save(tmp_path / "nowhere" / "one.trace")
    with pytest.raises(TraceError, match="directory that exists"):
        ran.save(tmp_path)
