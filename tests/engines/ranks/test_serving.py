"""What a rank does with a request: here the only rank, in this process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from harness.engines import hf
from harness.engines.ranks.layout import Layout
from harness.engines.ranks.serving import Server, Setup, Work, _function
from harness.errors import EngineError, UsageError
from harness.numerics.sketch import Sketcher
from harness.values import Request

_ASKED = (Request(id="a", prompt_ids=(3, 4, 5, 6, 7), max_new_tokens=3),)


def setup_of(goldens: Path, **options) -> Setup:
    """One rank that holds all of a model."""
    return Setup(
        options=hf.Options(model=str(goldens / "llama-tiny" / "model"), dtype="float32", **options),
        text="one rank",
        layout=Layout(),
        micro_batches=1,
        prepare=None,
        timeout=1.0,
        meeting="",
    )


def test_what_runs_is_told_with_what_it_ran(goldens: Path) -> None:
    """Settings are taken as the model is opened; the cache and the chunks of a pass are known behind it."""
    server = Server(0, lambda _: None, lambda _: None)
    settings = server.answer("open", setup_of(goldens, chunk=2))
    try:
        assert (settings["cache"], settings["chunk"]) == (hf.NOT_USED, hf.NOT_USED)
        done = server.answer("run", Work(view="generate", requests=_ASKED))
        assert done.running == {"cache": "DynamicCache", "chunk": 2}
        assert len(done.generations[0].tokens) == 3
        work = Work(view="replay", requests=_ASKED, continuations=[(8, 9)], sketcher=Sketcher(server.engine.vocabulary))
        done = server.answer("run", work)
        assert done.running == {"cache": "DynamicCache", "chunk": 2}
        assert done.sketcher is work.sketcher
        server.rank = 1  # as a rank that is not the head
        done = server.answer("run", work)
        assert (done.running, done.sketcher, done.generations) == ({}, None, None)
    finally:
        server.answer("close")
    with pytest.raises(EngineError, match="no open engine"):
        server.answer("run", work)


def test_a_function_is_found_by_its_name() -> None:
    """Also one that is an attribute of something in a module."""
    assert _function("harness.mutations.ranks:no_reduce").__name__ == "no_reduce"
    assert _function("pathlib:Path.touch") is Path.touch


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("nomodule:f", r"nomodule:f cannot be imported \(No module named 'nomodule'\)"),
        ("harness.nomodule:f", "cannot be imported"),
        (":f", "':f' names no function"),
        ("json", "'json' names no function"),
        ("json:", "'json:' names no function"),
        ("", "'' names no function"),
        (".json:dumps", "'.json:dumps' names no function"),
        ("json:dumps:x", "'json:dumps:x' names no function"),
        ("json:nothing", "no function 'json:nothing'"),
        ("json:decoder.nothing.more", "no function"),
        ("json:__name__", "no function"),
    ],
)
def test_a_function_that_is_not_there_is_a_usage_error(target: str, said: str) -> None:
    """Whatever is wrong with prepare=..., the fix says how it is written."""
    with pytest.raises(UsageError, match=said) as raised:
        _function(target)
    assert "MODULE:FUNCTION" in raised.value.fix


def test_an_error_inside_a_module_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that is there and fails is not taken for one that is not there."""
    (tmp_path / "failing_module.py").write_text("raise ValueError('mine')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="mine"):
        _function("failing_module:f")
    assert "failing_module" not in sys.modules
