"""Speculative recording gives plain greedy decoding, whatever the draft says; a good draft makes it short."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import scorer
from harness.engines import build_engine
from harness.engines.streaming import speculative
from harness.errors import EngineError
from harness.values import Request
from tests.support import VOCABULARY, random_model

REQUESTS = (
    Request(id="a", prompt_ids=tuple(range(5, 25)), max_new_tokens=12),
    Request(id="b", prompt_ids=(17, 200, 4), max_new_tokens=9),
    Request(id="c", prompt_ids=(9,), max_new_tokens=1),
)


@pytest.fixture(scope="module", params=["bloom", "llama", "gpt2"])
def reference(request, tmp_path_factory):
    """A streamed model in float64, what plain greedy decoding gives, and the rows on it."""
    directory = tmp_path_factory.mktemp(request.param)
    random_model(request.param, dtype="bfloat16").save_pretrained(directory)
    with build_engine("hf:dtype=float64", model=str(directory)) as engine:
        plain = engine.generate(REQUESTS, batch_size=None, stop_ids=frozenset())
        stop = frozenset({plain[0].tokens[4]})
        stopped = engine.generate(REQUESTS, batch_size=None, stop_ids=stop)
        rows = scorer.teacher_forced(engine, REQUESTS, [one.tokens for one in plain])
    with build_engine("stream:dtype=float64", model=str(directory)) as engine:
        yield engine, plain, rows, stop, stopped


def recorded(engine, draft, stop_ids=frozenset()):
    """What speculative recording ends with, and how."""
    progress = speculative.start(REQUESTS)
    while not progress.is_done:
        progress = speculative.advance(
            progress, REQUESTS, draft, lambda asked, had: scorer.teacher_forced(engine, asked, had), stop_ids
        )
        assert progress.rounds <= max(request.max_new_tokens for request in REQUESTS)
    return progress, *speculative.result(progress, stop_ids, engine.vocabulary)


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_any_draft_gives_plain_greedy_decoding(reference, data):
    """A draft that says anything, right for a while or not, too long, too short or nothing, changes no token."""
    engine, plain, _, stop, stopped = reference
    answers = {request.prompt_ids: given.tokens for request, given in zip(REQUESTS, plain, strict=True)}

    def draft(requests, had):
        found = []
        for request, tokens in zip(requests, had, strict=True):
            right = list(answers[request.prompt_ids][len(tokens) :])
            until = data.draw(st.integers(0, len(right)))
            rest = data.draw(st.lists(st.integers(0, VOCABULARY - 1), max_size=15))
            found.append(right[:until] + rest)
        return found

    ends = data.draw(st.booleans())
    _, generations, _ = recorded(engine, draft, stop if ends else frozenset())
    assert list(generations) == list(stopped if ends else plain)


def test_a_perfect_draft_takes_one_pass(reference):
    """A draft without a mistake is accepted whole, and the rows are those of plain greedy decoding."""
    engine, plain, rows, _, _ = reference
    answers = {request.prompt_ids: given.tokens for request, given in zip(REQUESTS, plain, strict=True)}
    progress, generations, found = recorded(engine, speculative.said_before(answers))
    assert progress.rounds == 1
    assert progress.mistakes == (0, 0, 0)
    assert list(generations) == list(plain)
    np.testing.assert_array_equal(found.position, rows.position)
    np.testing.assert_allclose(found.projections, rows.projections, atol=1e-5)


def test_the_rows_do_not_depend_on_the_draft(reference):
    """With a draft that is always wrong every row is still that of its token on the tokens before it."""
    engine, plain, rows, _, _ = reference
    progress, generations, found = recorded(
        engine, lambda requests, _had: [[(7 * i) % 300] * 3 for i in range(len(requests))]
    )
    assert list(generations) == list(plain)
    assert progress.rounds > 3
    for name in ("request", "position", "generated", "argmax", "top_ids"):
        np.testing.assert_array_equal(getattr(found, name), getattr(rows, name), err_msg=name)
    for name in ("logp", "logsumexp", "entropy", "projections"):
        np.testing.assert_allclose(getattr(found, name), getattr(rows, name), rtol=1e-5, atol=1e-5, err_msg=name)


def test_look_up_finds_what_stood_before():
    """A text that repeats itself is continued as it went on before; one that does not has no proposal."""
    repeated = Request(id="r", prompt_ids=(1, 2, 3, 4, 1, 2), max_new_tokens=6)
    fresh = Request(id="f", prompt_ids=(1, 2, 3), max_new_tokens=6)
    assert speculative.looked_up([repeated, fresh], [(), ()]) == [[3, 4, 1, 2, 3, 4], []]
    assert speculative.looked_up([repeated], [(3,)]) == [[4, 1, 2, 3, 4]]


def test_what_is_not_finite_is_refused(reference, monkeypatch):
    """A reference that overflows records nothing."""
    _, plain, rows, _, _ = reference
    broken = replace(rows, nonfinite=np.ones_like(rows.nonfinite))
    with pytest.raises(EngineError, match="not finite"):
        speculative.advance(
            speculative.start(REQUESTS),
            REQUESTS,
            lambda *_a: [one.tokens for one in plain],
            lambda *_a: broken,
            frozenset(),
        )
