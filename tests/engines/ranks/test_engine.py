from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import harness
from harness.engines import build_engine
from harness.engines.ranks.engine import ParallelEngine, difference
from harness.errors import UsageError
from harness.numerics.sketch import Sketcher
from harness.values import Request

HOSTS = ("bloom-tiny", "llama-tiny", "gpt2-tiny")


@pytest.fixture(scope="module", autouse=True)
def _kept(idle_ranks: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """One team of ranks for the whole file."""
    with idle_ranks():
        yield


def _golden(goldens: Path, host: str) -> harness.Golden:
    return harness.load_golden(goldens / host / "translate")


@pytest.mark.parametrize("host", HOSTS)
def test_stages_compute_what_one_process_computes(goldens: Path, host: str) -> None:
    """Two stages of two shards are within round-off; stages alone, whose sums are the same, are equal to the bit."""
    golden = _golden(goldens, host)
    both = harness.check(golden, "tp:size=2,stages=2,dtype=bfloat16,micro_batches=2", quick=True)
    assert both.ok, str(both)
    assert (both.settings["tensor_parallel"], both.settings["pipeline_parallel"]) == (2, 2)
    for dtype, spec in (("float32", "pp:stages=3"), ("float16", "pp:stages=2")):
        alone = harness.run(f"hf:dtype={dtype}", golden, quick=True, upcast=False)
        staged = harness.run(f"{spec},dtype={dtype}", golden, quick=True, upcast=False)
        for one, other in zip(alone.passes, staged.passes, strict=True):
            assert np.array_equal(one.rows.projections, other.rows.projections), (spec, one.view)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("size", [2, 3])
def test_each_rank_holds_its_share(goldens: Path, host: str, size: int) -> None:
    """Shards are seen in live shapes: every cut tensor is smaller, and all ranks hold the checkpoint's own numbers."""
    golden = _golden(goldens, host)
    verdict = harness.check(golden, f"tp:size={size},dtype=float32", quick=True)
    assert verdict.ok, str(verdict)
    ranks = verdict.settings["ranks"]
    assert [one["rank"] for one in ranks] == list(range(size))
    whole = sum(p.numel() for p in harness.reference_model(golden).parameters())
    for one in ranks:
        assert one["cut"]
        assert not one["unlike_checkpoint"]
        assert not one["unaudited"]
        assert one["parameters"] < 0.6 * whole
    assert verdict.settings["tensor_parallel"] == size
    assert verdict.settings["differing"] == []


def test_tensor_parallel_sums_are_explained_to_the_bit(goldens: Path) -> None:
    """The reference with the sums of three ranks is what three ranks compute, and the plain one is round-off away."""
    verdict = harness.check(_golden(goldens, "bloom-tiny"), "tp:size=3,dtype=bfloat16", quick=True, upcast=False)
    assert verdict.sharding is not None
    assert verdict.sharding.ranks == 3
    assert verdict.sharding.emulated < 0.1 * verdict.sharding.plain
    assert verdict.sharding.equal > 0.9
    assert "as they do" in str(verdict)


def test_ranks_continue_freely_and_repeat_to_the_bit(goldens: Path) -> None:
    """Stages that are told what the last one chose go on with the reference's tokens, and a repeat is the same."""
    golden = _golden(goldens, "gpt2-tiny")
    verdict = harness.check(golden, "pp:stages=2,dtype=float32,micro_batches=3")
    assert verdict.status == "identical", str(verdict)
    assert {one.view for one in verdict.passes} == {"replay", "prefill", "generate"}


@pytest.mark.skipif(sys.platform != "linux", reason="threads of another process are listed in /proc")
def test_models_that_were_open_leave_no_threads(goldens: Path) -> None:
    """A kept rank ends the threads of its groups with each model that ran, however unlike the models are."""
    counts = []
    for host, dtype in (("llama-tiny", "float32"), ("bloom-tiny", "float32"), ("llama-tiny", "bfloat16")):
        with build_engine(f"tp:size=2,dtype={dtype},model={goldens / host / 'model'}") as engine:
            assert isinstance(engine, ParallelEngine)
            pid = engine.team.pids[0]  # type: ignore[attr-defined]
            engine.generate(
                [Request(id="one", prompt_ids=(5, 6, 7), max_new_tokens=2)], batch_size=None, stop_ids=frozenset()
            )
            open_now = len(os.listdir(f"/proc/{pid}/task"))
        counts.append(len(os.listdir(f"/proc/{pid}/task")))
        assert counts[-1] < open_now
    assert max(counts[1:]) <= counts[0]


def test_a_widened_copy_is_undone(goldens: Path) -> None:
    """After the float32 copy is closed the ranks compute in 16 bits as before, to the bit."""
    golden = _golden(goldens, "llama-tiny")
    engine = build_engine("tp:size=2,dtype=bfloat16", model=str(goldens / "llama-tiny" / "model"))
    assert isinstance(engine, ParallelEngine)
    asked = golden.requests[:2]
    with engine:
        before = engine.probe(asked, [(0,), (0,)])
        with engine.upcast() as wide:
            assert wide.settings["dtype"] == "float32"
            assert wide.narrow_operation() == ""
            between = wide.probe(asked, [(0,), (0,)])
        after = engine.probe(asked, [(0,), (0,)])
        assert engine.settings["dtype"] == "bfloat16"
    for first, again in zip(before[1], after[1], strict=True):
        assert np.array_equal(first.values, again.values)
    assert not np.array_equal(before[1][-1].values, between[1][-1].values)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("tp:size=5,dtype=float32", "12 attention heads cannot be divided among 5 ranks"),
        ("tp:size=4,dtype=float32", "6 key/value heads cannot be divided among 4 ranks"),
        ("pp:stages=6", "5 blocks are fewer than 6 stages"),
    ],
)
def test_what_does_not_divide_is_refused(goldens: Path, spec: str, said: str) -> None:
    """A number of ranks that the model cannot be cut into is a usage error before any process is started."""
    with pytest.raises(UsageError, match=said):
        harness.check(_golden(goldens, "llama-tiny"), spec, quick=True)


@pytest.mark.parametrize(
    "spec", ["tp", "pp:size=2", "tp:size=0", "tp:size=two", "pp:stages=2,weights=int8", "tp:size=2,timeout=-1"]
)
def test_a_spec_that_cannot_be_read_is_refused(monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
    """A missing number, a wrong value and an unknown key are told before anything is loaded."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError):
        build_engine(spec)


def test_differing_ranks_are_named() -> None:
    """One of three that is alone is named; of two that differ both are."""
    same = (("a", 1), ("b", 2))
    assert difference([same, same, same], range(3)) == ""
    assert difference([same, (("a", 1), ("b", 3)), same], range(3)) == "b: rank 1 unlike the others"
    assert difference([same, (("a", 9), ("b", 2))], range(2, 4)) == "a: ranks 2, 3 unlike each other"
    assert difference([same, same, same[:1]], range(3)) == "b: rank 2 unlike the others", "a rank that ran less"
    assert difference([same[:1], same, same[:1]], range(3)) == "b: rank 1 unlike the others", "a rank that ran more"
    assert difference([same, (("c", 1), ("b", 2)), same], range(3)) == "a: rank 1 unlike the others", "another module"


def test_a_trace_of_ranks_is_judged_elsewhere(goldens: Path, tmp_path: Path) -> None:
    """Saved and loaded, the trace gives the same status, the same ranks and the same sums."""
    golden = _golden(goldens, "llama-tiny")
    trace = harness.run("tp:size=2,dtype=float32", golden, quick=True)
    trace.save(tmp_path / "x.trace")
    loaded = harness.load_trace(tmp_path / "x.trace")
    here, there = harness.check(golden, trace, quick=True), harness.check(golden, loaded, quick=True)
    assert replace(here, seconds=0.0).to_dict() == replace(there, seconds=0.0).to_dict()
    assert there.sharding is not None
    assert there.sharding.equal > 0.9


_SMALL = {
    "hidden_size": 36, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8,
    "intermediate_size": 54, "max_position_embeddings": 128,
}  # fmt: skip
_KINDS = {
    "llama": _SMALL,
    "mistral": {**_SMALL, "sliding_window": 8},
    "qwen2": _SMALL,
    "qwen3": {**_SMALL, "tie_word_embeddings": True},
    "gpt2": {
        "n_embd": 36, "n_layer": 3, "n_head": 6, "n_positions": 128, "n_inner": 54,
        "scale_attn_by_inverse_layer_idx": True,
    },
}  # fmt: skip


def _written(directory: Path, kind: str) -> str:
    """A random model of one architecture, every parameter of which matters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, vocab_size=101, bos_token_id=1, eos_token_id=2, pad_token_id=0, **_KINDS[kind])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(directory / kind)
    return str(directory / kind)


def _projections(spec: str, model: str) -> np.ndarray:
    requests = [Request(id=str(n), prompt_ids=tuple(range(3, 3 + n)), max_new_tokens=4) for n in (5, 17, 11)]
    sketcher = Sketcher(101)
    with build_engine(spec, model=model) as engine:
        engine.replay(requests, [(7, 8, 9, 10)] * 3, batch_size=3, sketcher=sketcher)
    return sketcher.rows().projections


@pytest.mark.parametrize("kind", _KINDS)
def test_architectures_in_stages_and_shards(tmp_path: Path, kind: str) -> None:
    """Stages equal one process to the bit, with padding, KV cache and three micro-batches; shards but for round-off."""
    model = _written(tmp_path, kind)
    alone = _projections("hf:dtype=float32", model)
    assert np.array_equal(
        _projections("pp:stages=3,micro_batches=3,dtype=float32,batch=1", model),
        _projections("hf:dtype=float32,batch=1", model),
    )
    assert np.array_equal(_projections("pp:stages=2,dtype=float32", model), alone)
    cut = _projections("tp:size=3,dtype=float32", model)
    assert 0 < np.abs(cut - alone).max() < 1e-4 * np.abs(alone).max()


def test_two_traces_are_held_against_each_other(goldens: Path) -> None:
    """Tensor parallel and pipeline parallel are both ok, and apart by round-off; a trace is no distance from itself."""
    golden = _golden(goldens, "gpt2-tiny")
    shards = harness.run("tp:size=2,dtype=float32", golden, quick=True)
    stages = harness.run("pp:stages=2,dtype=float32", golden, quick=True)
    pair = harness.compare(shards, stages, golden=golden)
    assert pair.first.ok
    assert pair.second.ok
    assert {(one.run, one.view) for one in pair.rows} == {(one.run, one.view) for one in shards.passes}
    assert all(0 < one.apart < 2 and one.differ == 0 and one.equal < 1 for one in pair.rows)
    same = harness.compare(shards, shards, golden=golden)
    assert all(one.apart == 0 and one.equal == 1 for one in same.rows)
    assert "apart" in str(pair)
    with pytest.raises(UsageError, match="two traces"):
        harness.compare(shards, stages)
