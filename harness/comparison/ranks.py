"""Structural checks of a sharded candidate: that its ranks together hold the model, each its part, and agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from harness.values import Finding, Status, Trace

_SHOWN = 3


#: What a rank must say of itself to be one of ours: an engine may show anything under this name.
_KEYS = {"rank": int, "stage": int, "shard": int, "blocks": list, "unlike_checkpoint": list}


def ranks_of(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What the ranks of a `tp` or `pp` engine say of themselves; empty for any other engine."""
    ranks = settings.get("ranks")
    if not isinstance(ranks, list | tuple) or not all(isinstance(one, Mapping) for one in ranks):
        return []
    proper = all(isinstance(one.get(key), kind) for one in ranks for key, kind in _KEYS.items())
    proper = proper and all([type(edge) for edge in one["blocks"]] == [int, int] for one in ranks)
    return list(ranks) if proper else []


def check(trace: Trace) -> Iterator[Finding]:
    """What the settings' ``ranks`` prove wrong; nothing for an engine that has none."""
    ranks = ranks_of(trace.settings)
    if not ranks:
        return
    yield from _blocks(trace.settings, ranks)
    for rank in ranks:
        yield from _weights(rank)
    differing = trace.settings.get("differing")
    if isinstance(differing, list) and differing:
        yield _structural(
            "ranks agree",
            f"ranks that should hold the same differ, first at {differing[0]}",
            "Look for a missing all-reduce, and for what is computed from a rank's own state",
        )


def _blocks(settings: Mapping[str, Any], ranks: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """Every shard's stages hold every block once, in order."""
    blocks = settings.get("blocks")
    total = blocks if isinstance(blocks, int) else 0
    for shard in sorted({rank["shard"] for rank in ranks}):
        own = sorted((rank for rank in ranks if rank["shard"] == shard), key=lambda rank: rank["stage"])
        next_ = 0
        for rank in own:
            start, stop = rank["blocks"]
            if start != next_:
                what = f"starts at block {start}, and the stage before ends at {next_}"
                yield _structural("stages", f"{_name(rank)} {what}", "Check the offsets of the stages' blocks")
            next_ = stop
        if next_ != total:
            problem = f"the stages hold {next_} blocks of {total}; the last is {_name(own[-1])}"
            yield _structural("stages", problem, "Give the remainder of an uneven division to a stage")


def _weights(rank: Mapping[str, Any]) -> Iterator[Finding]:
    unlike = [str(name) for name in rank["unlike_checkpoint"]]
    if unlike:
        named = ", ".join(unlike[:_SHOWN]) + (", ..." if len(unlike) > _SHOWN else "")
        yield _structural(
            "ranks' weights",
            f"{_name(rank)} holds {len(unlike)} tensors that are not its part of the checkpoint: {named}",
            "Check how the tensor is cut, the rank's offset in it, and that it was loaded at all",
        )


def _name(rank: Mapping[str, Any]) -> str:
    return f"rank {rank['rank']} (stage {rank['stage']}, shard {rank['shard']})"


def _structural(check: str, message: str, fix: str) -> Finding:
    return Finding(status=Status.STRUCTURAL, check=check, message=message, fix=fix)
