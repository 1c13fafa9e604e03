from __future__ import annotations

from typing import Any

import pytest

from harness.comparison import ranks
from harness.values import Status, Trace


def _rank(
    rank: int, stage: int, shard: int, blocks: tuple[int, int], unlike: list[str] | None = None
) -> dict[str, Any]:
    return {"rank": rank, "stage": stage, "shard": shard, "blocks": list(blocks), "unlike_checkpoint": unlike or []}


def _trace(settings: dict[str, Any]) -> Trace:
    return Trace(
        engine="pp", declared={}, settings=settings, capabilities=frozenset(), vocabulary=1, suite_digest="", passes=(),
        prompt_ids=None,
    )  # fmt: skip


def _messages(blocks: int, shown: list[dict[str, Any]], **more: Any) -> list[str]:
    found = list(ranks.check(_trace({"blocks": blocks, "ranks": shown, **more})))
    assert all(one.status is Status.STRUCTURAL and one.fix for one in found)
    return [one.message for one in found]


def test_a_whole_model_gives_no_finding() -> None:
    """Two stages of two shards that hold all five blocks and agree."""
    shown = [_rank(0, 0, 0, (0, 3)), _rank(1, 0, 1, (0, 3)), _rank(2, 1, 0, (3, 5)), _rank(3, 1, 1, (3, 5))]
    assert _messages(5, shown, differing=[]) == []


def test_an_engine_without_ranks_gives_none() -> None:
    """Nothing is asked of one process."""
    assert list(ranks.check(_trace({}))) == []


def test_dropped_blocks_are_counted() -> None:
    """The remainder of five blocks over two stages of two."""
    (message,) = _messages(5, [_rank(0, 0, 0, (0, 2)), _rank(1, 1, 0, (2, 4))])
    assert "4 blocks of 5" in message
    assert "rank 1" in message


def test_a_wrong_offset_names_the_stage() -> None:
    """A stage that begins at block 0 again."""
    messages = _messages(4, [_rank(0, 0, 0, (0, 2)), _rank(1, 1, 0, (0, 2))])
    assert any("rank 1 (stage 1, shard 0) starts at block 0" in one for one in messages)


@pytest.mark.parametrize("number", [1, 5])
def test_wrong_weights_name_rank_and_tensor(number: int) -> None:
    """At most three tensors are named."""
    unlike = [f"h.{i}.w" for i in range(number)]
    (message,) = _messages(1, [_rank(0, 0, 0, (0, 1)), _rank(1, 0, 1, (0, 1), unlike)])
    assert f"rank 1 (stage 0, shard 1) holds {number} tensors" in message
    assert "h.0.w" in message
    assert ("..." in message) == (number > 3)
    assert "h.3.w" not in message


def test_ranks_that_disagree_are_told() -> None:
    """The first place at which they differ is in the message."""
    (message,) = _messages(1, [_rank(0, 0, 0, (0, 1))], differing=["h.0: rank 1 unlike the others"])
    assert "h.0: rank 1 unlike the others" in message
