"""One rank's part: who chooses tokens, what it tells of itself, and which GPU is its own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

import harness
from harness.comparison.ranks import check
from harness.engines import build_engine, hf
from harness.engines.ranks import rank as ranks
from harness.engines.ranks.layout import Layout
from harness.engines.ranks.rank import RankEngine
from harness.errors import UsageError
from harness.mutations.ranks import no_reduce, whole_model
from harness.values import Request


def part(model: str | None, layout: Layout, rank: int, **options) -> RankEngine:
    """A rank that is not open."""
    return RankEngine(
        hf.Options(model=model, **options),
        text="a rank",
        layout=layout,
        place=layout.place(rank),
        micro_batches=2,
        store=None,
        timeout=1.0,
        prepare=None,
        pulse=lambda _text: None,
    )


def own_logits(engine: RankEngine) -> None:
    """Nothing is summed, and each rank has the whole head: ranks have logits of their own, and tokens of their own."""
    no_reduce(engine)
    if engine.place.last:
        engine.model.lm_head = whole_model(engine).lm_head


def test_ranks_that_disagree_stop_together(goldens: Path, idle_ranks) -> None:
    """Where shards would choose tokens by themselves one would meet the end first, and the others wait for it."""
    candidate = f"tp:size=2,stages=2,dtype=float32,timeout=10,prepare={__name__}:own_logits"
    asked = [Request(id=str(n), prompt_ids=tuple(range(3, 3 + n)), max_new_tokens=24) for n in (5, 17, 11)]
    with idle_ranks(), build_engine(candidate, model=str(goldens / "llama-tiny" / "model")) as engine:
        # Half of all tokens are an end.
        found = engine.generate(asked, batch_size=1, stop_ids=frozenset(range(0, engine.vocabulary, 2)))
        settings = engine.settings
    assert {one.finish for one in found} == {"eos"}
    assert "ranks agree" in {one.check for one in check(SimpleNamespace(settings=settings))}


def test_the_head_alone_reads_the_whole_checkpoint(goldens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its digest is the model's; the other ranks' would be thrown away."""
    model, layout = str(goldens / "llama-tiny" / "model"), Layout(tensor=2, stages=2)
    head = part(model, layout, layout.head).identity
    assert head is not None
    assert head.digest == hf.HFEngine(hf.Options(model=model), text="hf").identity.digest
    monkeypatch.setattr(harness.checkpoint, "identify", lambda _: pytest.fail("a second rank reads it all"))
    assert [part(model, layout, rank).identity for rank in (0, 1, 3)] == [None] * 3


def test_cache_and_chunk_are_told_once_they_run(goldens: Path) -> None:
    """Of micro-batches each has a cache: its class is told, and a chunk size where a prompt was longer."""
    with part(str(goldens / "llama-tiny" / "model"), Layout(), 0, chunk=4) as engine:
        assert engine.running == {"cache": hf.NOT_USED, "chunk": hf.NOT_USED}
        asked = [Request(id=str(n), prompt_ids=tuple(range(3, 3 + n)), max_new_tokens=2) for n in (3, 9)]
        engine.generate(asked, batch_size=2, stop_ids=frozenset())
        assert engine.running == {"cache": "DynamicCache", "chunk": 4}


def test_a_stage_without_logits_answers_on_its_device(goldens: Path) -> None:
    """What stands for logits lies where the batch's masks lie, which choose from it."""
    import torch

    layout = Layout(stages=2)
    engine = part(str(goldens / "llama-tiny" / "model"), layout, 0)
    engine.groups = type("Sink", (), {"send": lambda *_: None, "flush": lambda *_: None})()
    engine._full = hf.load_config(str(engine.source))
    engine._arguments = lambda *_: {}
    engine._forward = lambda **_: type("Output", (), {"logits": None})
    engine._model = type("Model", (), {"device": torch.device("meta")})()
    ids = torch.zeros((3, 5), dtype=torch.int64)
    for keep, tokens in ((0, 5), (1, 1)):
        found = engine._step(ids, ids, ids, None, keep)
        assert (found.shape, found.device.type) == ((3, tokens, 0), "meta")


def test_each_rank_takes_its_own_gpu_before_the_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group that is made while "cuda" still means the first GPU would put every rank's buffers there."""
    import torch

    seen = []

    class Groups:
        def __init__(self, *_, device, **__):
            seen.append(device)

        def __enter__(self):
            raise KeyboardInterrupt

        def __exit__(self, *_):
            """Nothing."""

    monkeypatch.setattr(ranks, "Groups", Groups)
    monkeypatch.setattr(torch.cuda, "set_device", seen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    for device in ("cuda", "cpu", None):
        with pytest.raises(KeyboardInterrupt):
            part("model", Layout(tensor=2), 1, device=device).__enter__()
    assert seen == [1, "cuda", "cpu", "cpu"]


def test_a_rank_without_a_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """More ranks than GPUs is a usage error of one line."""
    import torch

    def fail(_number):
        raise RuntimeError("CUDA error: invalid device ordinal\nmore")

    monkeypatch.setattr(torch.cuda, "set_device", fail)
    monkeypatch.setenv("LOCAL_RANK", "7")
    with pytest.raises(UsageError, match="rank 7 of this machine has no GPU of its own"):
        part("model", Layout(tensor=8), 7, device="cuda").__enter__()
