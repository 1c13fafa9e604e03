"""A golden of a model that is streamed is that of the model in memory, whatever proposed its tokens."""

from __future__ import annotations

import json

import numpy as np
import pytest

from harness import flow, store
from harness.engines.streaming import engine as streaming
from harness.errors import UsageError
from harness.flow import speculating
from tests.support import write_model, write_suite


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A small llama, a suite, and the golden of the two in memory."""
    root = tmp_path_factory.mktemp("speculating")
    write_model(root / "model", "llama")
    write_suite(root / "small.toml")
    flow.record(root / "model", root / "small.toml", out=root / "plain", precisions=["bfloat16"], replicas=2)
    return root


def streamed(place, out, **more):
    """The golden of the same model, streamed."""
    given = {"stream": "stream:dtype=float64", "precisions": ["bfloat16", "float16"], "replicas": 3, **more}
    return flow.record(place / "model", place / "small.toml", out=place / out, **given)


def test_it_is_the_golden_of_the_model_in_memory(place):
    """The same tokens and rows, round-off of the same size, and what could not be measured is said."""
    plain, found = store.read_golden(place / "plain"), streamed(place, "lookup")
    again = store.read_golden(place / "lookup")
    assert again.generations == found.generations == plain.generations
    assert again.requests == plain.requests
    np.testing.assert_allclose(again.rows.projections, plain.rows.projections, atol=1e-5)
    np.testing.assert_allclose(again.rows.logp, plain.rows.logp, atol=1e-5)
    ratio = np.median(again.floors["bfloat16"].sigma) / np.median(plain.floors["bfloat16"].sigma)
    assert 0.5 < ratio < 2
    assert "not exact" in again.provenance["left_out"]["float16"]
    assert set(again.provenance["settings"]["mistakes"]) == {"short", "long", "ids"}


def test_a_candidate_is_checked_against_it(place):
    """A correct implementation passes what was recorded so."""
    if not (place / "lookup").exists():
        streamed(place, "lookup")
    verdict = flow.check(
        place / "lookup", f"hf:dtype=bfloat16,model={place}/model", reference=place / "model", upcast=False, quick=True
    )
    assert verdict.status.exit_code != 1, str(verdict)


def test_an_update_streams_again_in_one_pass(place):
    """What was streamed is not loaded to be recorded again, and its own tokens are the draft."""
    before = streamed(place, "updated", precisions=[])
    assert before.provenance["settings"]["passes"] > 1
    again = flow.rerecord(place / "updated", reference=place / "model")
    assert (again.provenance["engine"], again.provenance["settings"]["passes"]) == ("stream", 1)
    assert again.precision == "float64"
    assert again.generations == before.generations


def test_an_update_streams_where_it_is_asked(place):
    """A golden of a model in memory is recorded again by streaming, in its own precision, if the SPEC says so."""
    before = flow.record(place / "model", place / "small.toml", out=place / "asked", precisions=[])
    again = flow.rerecord(place / "asked", reference=f"stream:model={place}/model,hidden_gb=0", reason="streamed")
    assert (before.provenance["engine"], again.provenance["engine"]) == ("hf", "stream")
    assert again.generations == before.generations
    assert again.precision == before.precision == "float64"


@pytest.mark.parametrize("draft", ["engine", "answers", "trace"])
def test_every_kind_of_draft_gives_the_same_tokens(place, draft):
    """The same weights in bf16, a file of ids, or a trace that is right: few passes, and the same golden."""
    plain = store.read_golden(place / "plain")
    text = f"hf:dtype=bfloat16,model={place}/model"
    if draft == "trace":
        flow.run(text, place / "small.toml").save(place / "said.trace")
        text = str(place / "said.trace")
    if draft == "answers":
        lines = [
            {"id": one.id, "prompt_ids": list(one.prompt_ids), "tokens": list(given.tokens)}
            for one, given in zip(plain.requests, plain.generations, strict=True)
        ]
        (place / "said.jsonl").write_text("\n".join(map(json.dumps, lines)))
        text = str(place / "said.jsonl")
    found = streamed(place, draft, draft=text, precisions=[])
    assert found.generations == plain.generations
    settings = found.provenance["settings"]
    assert settings["passes"] <= 1 + max(settings["mistakes"].values())


def test_a_recording_that_is_killed_between_rounds_goes_on(place, monkeypatch):
    """What earlier rounds accepted is not asked for again, and the golden is the same."""
    calls = []
    score = streaming.StreamEngine.score

    def counted(self, sequences, starts, **more):
        calls.append(len(sequences))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(self, sequences, starts, **more)

    monkeypatch.setattr(streaming.StreamEngine, "score", counted)
    spec = f"stream:dtype=float64,work={place}/work"
    with pytest.raises(KeyboardInterrupt):
        streamed(place, "killed", stream=spec, precisions=[])
    other = write_suite(place / "other.toml", (place / "small.toml").read_text().replace("= 6", "= 5"))
    with pytest.raises(UsageError, match="other prompts"):
        flow.record(
            place / "model", other,
            out=place / "other", stream=spec, precisions=[],
        )  # fmt: skip
    found = streamed(place, "killed", stream=spec, precisions=[])
    assert found.generations == store.read_golden(place / "plain").generations
    assert found.provenance["settings"]["passes"] == len(calls) - 1
    assert [path.name for path in (place / "work").iterdir() if path.is_file()] == []


def test_a_recording_that_is_killed_behind_a_commit_goes_on(place, monkeypatch):
    """The pass whose rows are committed already is not taken for other work, and is not left over."""
    spec = f"stream:dtype=float64,work={place}/behind"
    with monkeypatch.context() as patched:
        patched.setattr(speculating, "_use_up", lambda _directory: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            streamed(place, "behind_out", stream=spec, precisions=[])
    found = streamed(place, "behind_out", stream=spec, precisions=[])
    assert found.generations == store.read_golden(place / "plain").generations
    assert list((place / "behind").iterdir()) == []


def test_what_cannot_be_streamed_is_refused(place):
    """Another engine, tensor parallelism, or a draft that is streamed itself: each before anything is read."""
    with pytest.raises(UsageError, match="cannot be streamed"):
        streamed(place, "no", stream="hf")
    with pytest.raises(UsageError, match="cannot be streamed"):
        streamed(place, "no", parallel=[2])
    with pytest.raises(UsageError, match="all weights for every token"):
        streamed(place, "no", draft="stream")
