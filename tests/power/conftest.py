"""A null bench whose verdicts cost nothing, and a small model."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

from harness import flow
from harness.mutations.benign import FAMILIES
from harness.power import nulls
from harness.values import Status, Verdict
from tests.support import write_model


@pytest.fixture
def stub(monkeypatch):
    """A bench of two hosts, two families and two precisions whose verdicts cost nothing; returns what was checked."""
    checked = []

    @contextmanager
    def opened(family, model, precision):
        yield (str(model), family.name, precision)

    def check(golden, engine, *, reference, spreads):
        checked.append((*engine, golden))
        return Verdict(golden="", candidate="", status=Status.IDENTICAL, findings=())

    monkeypatch.setattr(nulls, "MODELS", {"one": "one", "two": "two"})
    monkeypatch.setattr(nulls, "FAMILIES", {name: FAMILIES[name] for name in ("plain", "ranks-2")})
    monkeypatch.setattr(nulls, "PRECISIONS", ("float32", "bfloat16"))
    monkeypatch.setattr(nulls, "opened", opened)
    monkeypatch.setattr(nulls, "recorded", lambda _model, suite, _out, _progress: suite.name)
    monkeypatch.setattr(flow, "check", check)
    return checked


@pytest.fixture(scope="session")
def small_llama(tmp_path_factory):
    """The directory of a small Llama with a tokenizer, bf16 weights."""
    return write_model(tmp_path_factory.mktemp("bench") / "small" / "model")
