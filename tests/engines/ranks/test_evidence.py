"""What a rank shows of itself: what of it is cut, what is the checkpoint's, and its checksums."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from harness.engines import build_engine, hf
from harness.engines.ranks import evidence, plans, probes
from harness.values import Request

_SMALL = {
    "hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 6,
    "intermediate_size": 54, "max_position_embeddings": 128,
}  # fmt: skip
_KINDS = {"qwen3": {**_SMALL, "head_dim": 8, "tie_word_embeddings": True}, "phi3": _SMALL}


@pytest.fixture(scope="module", autouse=True)
def _kept(idle_ranks):
    """One team of ranks for the whole file."""
    with idle_ranks():
        yield


def written(directory: Path, kind: str) -> str:
    """A random model of one architecture."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, vocab_size=101, bos_token_id=1, eos_token_id=2, pad_token_id=0, **_KINDS[kind])
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory / kind)
    return str(directory / kind)


@pytest.mark.parametrize(("kind", "size"), [("qwen3", 2), ("qwen3", 3), ("phi3", 2)])
def test_what_a_plan_replicates_is_no_part_left_uncut(tmp_path: Path, kind: str, size: int) -> None:
    """The norms of heads are whole on each rank, sums may be of inputs that are whole; all is cut that is to be."""
    model = written(tmp_path, kind)
    asked = [Request(id=str(n), prompt_ids=tuple(range(n, n + 9)), max_new_tokens=1) for n in (3, 40)]
    with build_engine(f"tp:size={size},dtype=float32", model=model) as engine:
        settings, shown = engine.settings, engine.probe(asked, [(0,), (0,)])
    assert settings["tensor_parallel"] == size
    for one in settings["ranks"]:
        assert (one["cut"], one["unlike_checkpoint"], one["unaudited"]) == (True, [], [])
    with build_engine("hf:dtype=float32", model=model) as whole:
        assert isinstance(whole, hf.HFEngine)
        right = probes.of_whole(whole, asked, [(0,), (0,)])
        summed = plans.summed_layers(whole.model)
    assert len(summed) == 4
    for shard, places in enumerate(shown):
        assert {(one.module, one.side) for one in places} >= {(name, "partial") for name in summed}
        for one in places:
            expected = right[one.module, one.side].of(shard, size)
            assert np.allclose(one.values, expected, atol=1e-4 * np.abs(expected).max()), (one.module, one.side)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("piece", [1, 7, 60, 2**20])
def test_a_checksum_shows_every_element(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, piece: int) -> None:
    """In whichever piece one element changes, or two change places, the checksum is another."""
    monkeypatch.setattr(evidence, "_PIECE", piece)
    evidence._odd.cache_clear()
    try:
        tensor = (torch.arange(60).reshape(5, 12) % 2).to(dtype)
        before = evidence.checksum(tensor)
        assert evidence.checksum(tensor.clone()) == before
        found = {before}
        for index in range(60):
            other = tensor.clone()
            other.view(-1)[index] = 1 - int(other.view(-1)[index])
            found.add(evidence.checksum(other))
        assert len(found) == 61
        other = tensor.flip(1)
        assert evidence.checksum(other) != before
    finally:
        evidence._odd.cache_clear()


def test_a_checksum_takes_little_beside_its_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy of a large tensor is made in 8 bytes an element: what is made is of the size of a piece."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            found = function(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor) and found.dtype == torch.int64:
                largest = max(largest, found.numel())
            return found

    monkeypatch.setattr(evidence, "_PIECE", 100)
    evidence._odd.cache_clear()
    try:
        with Made():
            evidence.checksum(torch.ones(1001))
    finally:
        evidence._odd.cache_clear()
    assert 0 < largest <= 100


def test_an_empty_tensor_has_a_checksum() -> None:
    """A rank may hold nothing of a tensor."""
    assert evidence.checksum(torch.empty((0, 4))) == 0
