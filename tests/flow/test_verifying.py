"""Tokens alone, against a model that is streamed: ties pass, bugs fail, and what cannot be said is said."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from conftest import ROOT
from harness import flow, store
from harness.errors import HarnessError, TraceError
from harness.values import Status

MODEL = ROOT / "golden/bloom-tiny/model"


@pytest.fixture(scope="module")
def golden():
    """What the trained model says to the shorter prompts of the suite."""
    whole = store.read_golden(ROOT / "golden/bloom-tiny/core")
    short = [index for index, request in enumerate(whole.requests) if len(request.prompt_ids) < 60]
    return replace(
        whole,
        requests=tuple(whole.requests[index] for index in short),
        generations=tuple(whole.generations[index] for index in short),
    )


def written(path, golden, change=lambda index, tokens: tokens):
    """A file of answers: the golden's own continuations, changed."""
    lines = [
        {"id": request.id, "prompt_ids": list(request.prompt_ids), "tokens": change(index, list(given.tokens))}
        for index, (request, given) in enumerate(zip(golden.requests, golden.generations, strict=True))
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def swapped(index, tokens):
    """One token of the first answer is another one."""
    return [*tokens[:5], (tokens[5] + 7) % 200 + 3, *tokens[6:]] if index == 0 else tokens


def test_the_models_own_tokens_pass(golden, tmp_path):
    """Its own continuations, as ids in a file, are identical: every token is its best on that prefix."""
    verdict = flow.verify(written(tmp_path / "said.jsonl", golden), model=MODEL, dtype="bfloat16", replicas=3)
    assert verdict.ok, str(verdict)
    assert verdict.power.steps == sum(len(given.tokens) for given in golden.generations)
    assert any("logits" in line for line in verdict.power.unmeasured)


def test_one_wrong_token_is_found_and_named(golden, tmp_path):
    """A token that no noise explains fails, with its prompt and step; what follows is judged on its own prefix."""
    verdict = flow.verify(written(tmp_path / "said.jsonl", golden, swapped), model=MODEL, dtype="bfloat16", replicas=2)
    assert verdict.status is Status.DEVIATES
    assert f"prompt {golden.requests[0].id!r} step 5" in str(verdict.failures[0].message)


def test_without_replicas_a_difference_is_unmeasured(golden, tmp_path):
    """No noise, no verdict on a token that differs; without one nothing is wrong, and what is missing is listed."""
    wrong = flow.verify(written(tmp_path / "said.jsonl", golden, swapped), model=MODEL, replicas=0)
    assert wrong.status is Status.UNMEASURED
    right = flow.verify(written(tmp_path / "same.jsonl", golden), model=MODEL, replicas=0)
    assert right.status is Status.IDENTICAL
    assert any("no replica" in line for line in right.power.unmeasured)


def test_an_engine_and_its_trace_get_the_same_verdict(tmp_path):
    """A candidate that runs now, and the trace of it, are judged alike; another model's tokens fail."""
    suite = ROOT / "prompts/headline.toml"
    here = f"hf:model={MODEL},dtype=bfloat16"
    verdict = flow.verify(here, model=MODEL, suite=suite, replicas=2)
    assert verdict.status.exit_code != 1, str(verdict)
    flow.run(here, suite).save(tmp_path / "free.trace")
    again = flow.verify(tmp_path / "free.trace", model=MODEL, suite=suite, replicas=2)
    assert again.status is verdict.status
    assert again.power.smallest == verdict.power.smallest
    other = ROOT / "golden/bloom-raw/model"
    assert flow.verify(f"hf:model={other},dtype=bfloat16", model=MODEL, suite=suite, replicas=2).status in (
        Status.DEVIATES,
        Status.STRUCTURAL,
    )


def test_text_is_read_by_the_references_tokenizer(golden, tmp_path):
    """Prompt and text instead of ids give the same answers where their tokens are the same."""
    from harness.engines import hf

    tokenizer = hf.load_tokenizer(str(MODEL))
    given = golden.generations[0]
    prompt, text = tokenizer.decode(golden.requests[0].prompt_ids), tokenizer.decode(given.tokens)
    (tmp_path / "said.jsonl").write_text(json.dumps({"prompt": prompt, "text": text}))
    verdict = flow.verify(tmp_path / "said.jsonl", model=MODEL, replicas=2)
    assert verdict.power.steps > 0
    assert verdict.status is not Status.DEVIATES


@pytest.mark.parametrize(
    "line",
    ["", "[]", "{", '{"id": "a", "prompt_ids": [1]}', '{"prompt_ids": [], "tokens": [1]}',
     '{"prompt_ids": [1], "tokens": [-1]}', '{"prompt_ids": [1], "tokens": [1.5]}', '{"prompt": 3, "text": "x"}'],
)  # fmt: skip
def test_a_file_that_is_no_answer_is_named(tmp_path, line):
    """Each kind of damage is an error that names the file and shows what to write."""
    (tmp_path / "said.jsonl").write_text(line)
    with pytest.raises(TraceError, match=r"said\.jsonl"):
        flow.verify(tmp_path / "said.jsonl", model=MODEL)


def test_tokens_beyond_the_vocabulary_are_structural(golden, tmp_path):
    """A token that the model does not have is no tie."""
    path = written(tmp_path / "said.jsonl", golden, lambda _index, tokens: [*tokens[:3], 10**6, *tokens[4:]])
    assert flow.verify(path, model=MODEL, replicas=0).status is Status.STRUCTURAL


def test_what_cannot_be_verified_is_refused(tmp_path):
    """No suite, another engine as the reference, one replica: each has its own line."""
    for more, words in (
        ({}, "suite"),
        ({"reference": "hf"}, "streamed"),
        ({"replicas": 1}, "two at least"),
        ({"dtype": "int8"}, "round-off"),
    ):
        given = {"suite": ROOT / "prompts/headline.toml", **more} if more else {}
        with pytest.raises(HarnessError, match=words):
            flow.verify(f"hf:model={MODEL}", model=MODEL, **given)
