"""Prompts spread over ranks: the rows of one process, each rank's own share, and a clear word from one that fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import replicas
from harness.engines import build_engine
from harness.engines.streaming import engine as streaming
from harness.engines.streaming import spreading
from harness.errors import EngineError, UsageError
from tests.support import write_model

SEQUENCES = [tuple((7 * i + 3 * j) % 290 + 3 for j in range(n)) for i, n in enumerate((20, 4, 9, 33, 2))]
STARTS = [10, 2, 4, 30, 1]
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small llama in bf16."""
    return write_model(tmp_path_factory.mktemp("spreading") / "model", "llama")


@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 9))
def test_each_sequence_has_one_rank_and_none_has_much_more_than_another(lengths, ranks):
    """What the fullest rank has above the emptiest one is one sequence at most."""
    sequences = [[0] * length for length in lengths]
    found = spreading.shares(sequences, ranks)
    assert sorted(index for share in found for index in share) == list(range(len(lengths)))
    tokens = [sum(lengths[index] for index in share) for share in found]
    assert max(tokens) - min(tokens) <= max(lengths, default=0)


def test_two_processes_give_the_rows_of_one_and_say_what_is_wrong(model, tmp_path):
    """Plain and varied, from a part of the directory for each rank; when a file has gone meanwhile, a rank says so."""
    spec = f"stream:model={model},dtype=float32"
    with build_engine(spec) as engine:
        config = engine.skeleton.model.config
        drawn = replicas.draw(2, 0, replicas.kernels_of(engine.skeleton.model))
        variants = [None, replicas.OfParts(variant=replace(drawn[1], chunk=None), config=config)]
        alone = engine.score(SEQUENCES, STARTS, variants=variants)
        assert engine.settings["prompt_ranks"] == 1
    with build_engine(f"{spec},ranks=2,timeout=300,work={tmp_path}/work") as engine:
        assert engine.declared["prompt_ranks"] == 2
        spread = engine.score(SEQUENCES, STARTS, variants=variants)
        assert (engine.settings["prompt_ranks"], engine.settings["dtype"]) == (2, "float32")
        assert engine.took
        (model / "model.safetensors").rename(tmp_path / "away")
        with pytest.raises(EngineError, match=r"rank [01].*\.safetensors"):
            engine.score(SEQUENCES, STARTS)
        assert engine.lost
    (tmp_path / "away").rename(model / "model.safetensors")
    assert not [path for path in (tmp_path / "work").rglob("*") if path.is_file()]
    for one, other in zip(alone, spread, strict=True):
        for name in ("request", "position", "generated", "argmax", "top_ids"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        noise = np.linalg.norm(alone[0].projections - alone[1].projections, axis=1)
        away = np.linalg.norm(one.projections - other.projections, axis=1)
        assert np.sqrt(np.mean(away**2)) <= np.sqrt(np.mean(noise**2))  # other groups of sequences: round-off


def test_a_rank_that_scored_something_else_is_refused(model):
    """Rows are never put together with those of a share that is not there."""
    with build_engine(f"stream:model={model}") as engine:
        rows = engine.score(SEQUENCES[:1], STARTS[:1])
    asked = spreading.Asked(
        options=streaming.Options(), text="stream:ranks=2", widens=False, shares=((0,), (1,)), local=0,
        sequences=SEQUENCES[:2], starts=STARTS[:2], vocabulary=None, variants=[None], basis=None,
        fingerprints=False, part="",
    )  # fmt: skip
    one = spreading.Scored(rows=rows, took=[], ran={})
    with pytest.raises(EngineError, match="did not score its share"):
        spreading.merged(asked, [one, one], 301)


def test_the_number_of_ranks_is_the_launchers(monkeypatch):
    """Left out, it is as many as there are; another one is refused where they meet."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert build_engine("stream").options.ranks == 3
    monkeypatch.setattr("harness.engines.ranks.outer.follow", lambda: None)
    ranks = spreading.Ranks(2, spec="stream:ranks=2", threads=None, device=None, timeout=60)
    with pytest.raises(UsageError, match="needs 2 ranks, and the launcher started 3"):
        ranks.join()


def test_ranks_of_a_machine_share_what_was_read(monkeypatch):
    """Through the page cache, each on its own GPU, each committing beside the others."""
    options = streaming.Options(device="cuda", work="w", ranks=2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    found = spreading._of_rank(options, 3, 2)
    assert (found.read, found.device, found.work, found.ranks) == ("cached", "cuda:1", "w/rank-3", 1)
    assert spreading._of_rank(options, 3, 1).read is None
    assert spreading._of_rank(replace(options, read="direct"), 3, 2).read == "direct"


@pytest.mark.slow
def test_torchrun_gives_the_verdict_of_one_process(model, tmp_path):
    """Two ranks of torchrun score what one process does, and one of them reports."""
    answers = tmp_path / "said.jsonl"
    lines = [{"id": str(n), "prompt_ids": list(one), "tokens": [5, 6, 7]} for n, one in enumerate(SEQUENCES)]
    answers.write_text("\n".join(map(json.dumps, lines)))
    environment = {name: value for name, value in os.environ.items() if "RANK" not in name and "WORLD" not in name}
    environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GLOO_SOCKET_IFNAME": "lo"}
    command = ["verify", "--model", str(model), "--answers", str(answers), "--replicas", "2"]
    torchrun = str(Path(sys.executable).parent / "torchrun")
    shown = []
    for number, start in enumerate(
        ([sys.executable, "-m", "harness"], [torchrun, "--standalone", "--nproc-per-node", "2", "-m", "harness"])
    ):
        report = tmp_path / f"{number}.json"
        done = subprocess.run(
            [*start, *command, "--json", str(report)],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False,
        )  # fmt: skip
        assert done.returncode == 1, done.stderr
        assert done.stdout.count("said.jsonl") >= 1
        shown.append(json.loads(report.read_text()))
    assert shown[0]["status"] == shown[1]["status"] == "deviates"
    seen = [[(one["check"], one["status"], one["where"]) for one in report["findings"]] for report in shown]
    assert seen[0] == seen[1]
