from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest

import harness
from harness.engines import build_engine
from harness.engines.ranks import spawned
from harness.errors import GoldenError, UsageError
from harness.flow.candidates import candidates
from harness.values import Status


@pytest.fixture(scope="module")
def golden(goldens: Path) -> harness.Golden:
    """Of the model that is cheapest to run."""
    return harness.load_golden(goldens / "gpt2-tiny" / "translate")


@pytest.fixture(scope="module")
def trace(golden: harness.Golden, idle_ranks: Callable[[], AbstractContextManager[None]]) -> harness.Trace:
    """What two shards do."""
    with idle_ranks():
        return harness.run("tp:size=2,dtype=float32", golden, quick=True)


def _with(trace: harness.Trace, **settings: object) -> harness.Trace:
    return replace(trace, settings={**trace.settings, **settings})


def test_a_trace_names_no_code_to_run(golden: harness.Golden, trace: harness.Trace, tmp_path: Path) -> None:
    """What a trace says of its kernel, threads or ranks is run where one of ours could have it, and else left alone."""
    assert harness.check(golden, trace, quick=True).sharding.plain is not None
    evil = f"eager,trust_remote_code=true,model={tmp_path}"
    for changed in ({"attn": evil}, {"attn": None}, {"threads": 2**20}, {"threads": "many"}, {"device": "cuda"}):
        verdict = harness.check(golden, _with(trace, **changed), quick=True)
        assert verdict.sharding is not None
        assert verdict.sharding.plain is None, changed
        assert verdict.status is not Status.ERROR
    for size in (10**9, 5):
        verdict = harness.check(golden, replace(_with(trace, tensor_parallel=size), declared={}), quick=True)
        assert verdict.sharding.plain is None


@pytest.mark.parametrize("ranks", [[0, 1], "2", [{}], [{"rank": "a"}], {"rank": 1}, None, 7])
def test_ranks_of_another_engine_are_no_ranks(golden: harness.Golden, trace: harness.Trace, ranks: object) -> None:
    """A port may show anything under that name."""
    verdict = harness.check(golden, _with(trace, ranks=ranks), quick=True)
    assert verdict.ok, str(verdict)
    assert verdict.sharding is None


def test_a_trace_of_another_suite_is_stale_with_ranks_too(golden: harness.Golden, trace: harness.Trace) -> None:
    """Sums are not looked at where nothing was compared."""
    assert harness.check(golden, replace(trace, suite_digest="other"), quick=True).status is Status.STALE


def test_what_a_candidate_file_prepares_is_code(golden: harness.Golden, tmp_path: Path) -> None:
    """A list of candidates from another place runs no function of its choice without --allow-code."""
    (tmp_path / "candidates.toml").write_text('quick = ["tp:size=2,prepare=os:abort"]\n', encoding="utf-8")
    with pytest.raises(GoldenError, match="executes code"):
        candidates(tmp_path, quick=True)
    assert candidates(tmp_path, quick=True, allow_code=True)


def die_when_widened(rank) -> None:
    """Rank 1 is gone once its weights are to be widened."""
    import os

    if rank.place.shard == 1:
        rank.widened = lambda: os._exit(3)


def test_a_rank_that_dies_while_it_is_widened_is_an_error(golden: harness.Golden) -> None:
    """The run as shipped was right; a rank that is gone is no reason to judge it alone."""
    spec = f"tp:size=2,dtype=bfloat16,prepare={__name__}:die_when_widened,timeout=20"
    verdict = harness.check(golden, spec, quick=True)
    assert verdict.status is Status.ERROR, str(verdict)
    assert "rank 1 of" in str(verdict)
    assert "exit code 3" in str(verdict)


def test_an_open_engine_is_checked_as_it_is(golden: harness.Golden, goldens: Path) -> None:
    """Opened again inside its own block it stays the same ranks, and is usable afterwards."""
    engine = build_engine("tp:size=2,dtype=float32", model=str(goldens / "gpt2-tiny" / "model"))
    with engine:
        team = engine.team
        assert isinstance(team, spawned.SpawnedTeam)
        assert harness.check(golden, engine, quick=True).ok
        assert engine.team is team
        assert engine.settings["tensor_parallel"] == 2
    assert not team.alive


def test_sums_that_cannot_be_measured_leave_the_verdict(
    golden: harness.Golden, trace: harness.Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong beside the comparison is told beside the verdict."""

    def failing(*_args: object, **_keywords: object) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr("harness.scorer.sharded", failing)
    verdict = harness.check(golden, trace, quick=True)
    assert verdict.ok
    assert verdict.sharding.reason == "MemoryError: no more"
    assert "not seen: inside the ranks: MemoryError" in str(verdict)


def test_a_launchers_number_must_divide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two launched ranks are no four stages."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="cannot be divided"):
        build_engine("tp:stages=4")
