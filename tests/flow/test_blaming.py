"""Was it the environment or the change? Asked with real runs, the environment changed under the reference."""

from __future__ import annotations

import pytest
import torch

import harness
from harness import scorer
from harness.engines.hf import HFEngine, Options
from harness.values import Difference

SMALL, MODEL = "golden/small/small", "golden/small/model"


@pytest.fixture
def upgraded(monkeypatch):
    """An upgrade that computes another function: every SiLU of this process is another."""
    silu = torch.nn.functional.silu

    def another(x, inplace=False):
        return silu(x, inplace) * 1.01

    monkeypatch.setattr(torch.nn.functional, "silu", another)


def blamed(candidate, **keywords):
    """A quick check that asks who did it."""
    return harness.check(SMALL, candidate, quick=True, blame_environment=True, **keywords)


def test_an_unchanged_model_blames_nobody(home):
    """Where nothing moved there is nobody to blame, and the figures are there."""
    verdict = blamed("hf:dtype=bfloat16")
    assert verdict.ok
    assert verdict.blame.who == "nobody"
    assert verdict.blame.ratio < verdict.blame.limit


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_changed_candidate_is_blamed(home, dtype):
    """The reference still gives its golden today, so the change did it."""
    with HFEngine(Options(model=MODEL, dtype=dtype), text="mine") as engine:
        engine.model.model.layers[0].mlp.down_proj.weight.data *= 1.5
        verdict = blamed(engine.model)
    assert not verdict.ok
    assert verdict.blame.who == "change"
    assert "your change did this" in str(verdict)
    assert "your change did this" in verdict.to_dict()["blame"]["message"]


def test_a_reference_that_is_streamed_runs_so(home, monkeypatch):
    """One that is larger than memory is asked too, and no other one is loaded."""
    monkeypatch.setattr(scorer, "open_reference", lambda *_a, **_k: pytest.fail("a model was loaded"))
    verdict = blamed("hf:dtype=bfloat16", upcast=False, reference=f"stream:model={MODEL}")
    assert verdict.blame.who == "nobody", verdict.blame.message
    assert verdict.blame.ratio < verdict.blame.limit


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_upgrade_is_blamed(home, upgraded, dtype):
    """The reference leaves its golden in the same way: the environment did it."""
    verdict = blamed(f"hf:dtype={dtype}")
    assert not verdict.ok
    assert verdict.blame.who == "environment"
    assert not verdict.blame.status.ok
    assert verdict.blame.ratio > verdict.blame.limit
    assert "the environment did this" in str(verdict)


def test_both_are_blamed(home, upgraded):
    """An upgrade that moves the reference and a change that moves the candidate much further."""
    with HFEngine(Options(model=MODEL, dtype="float32"), text="mine") as engine:
        engine.model.model.layers[0].mlp.down_proj.weight.data *= 3
        verdict = blamed(engine.model)
    assert verdict.blame.who == "both"


def test_without_the_model_nobody_can_be_blamed(home, tmp_path):
    """A golden whose model is elsewhere says what it needs; the verdict itself stands."""
    golden = harness.load_golden(SMALL)
    trace = harness.run("hf:dtype=float32", golden)
    (home / MODEL).rename(tmp_path / "elsewhere")
    verdict = harness.check(SMALL, trace, blame_environment=True)
    assert verdict.ok
    assert verdict.blame.who == "unknown"
    assert "--reference" in verdict.blame.message
    again = harness.check(SMALL, trace, blame_environment=True, reference=tmp_path / "elsewhere")
    assert again.blame.who == "nobody"


def test_a_precision_without_a_floor_blames_nobody(home):
    """Where nothing can be measured, nothing is blamed."""
    harness.record(MODEL, "prompts/small.toml", out="golden/small/wide", precisions=("float32",))
    verdict = harness.check("golden/small/wide", "hf:dtype=float16", quick=True, blame_environment=True)
    assert verdict.blame.who == "unknown"
    assert "float16" in verdict.blame.message


def test_differences_of_the_environment_are_listed(home, monkeypatch):
    """Versions and machine that are not those of the recording stand in the verdict and in its report."""
    assert harness.check(SMALL, "hf:dtype=float32", quick=True).environment == ()
    from harness.engines import hf, runner

    monkeypatch.setattr(hf, "versions", lambda: {"torch": "9.9.9"})
    monkeypatch.setattr(runner, "machine", lambda: {"threads": 64})
    verdict = harness.check(SMALL, "hf:dtype=float32,threads=1", quick=True)
    found = {one.name: one for one in verdict.environment}
    assert found["threads"].today == "64"
    assert found["torch"] == Difference(name="torch", golden=torch.__version__, today="9.9.9")
    assert "9.9.9" in str(verdict)
