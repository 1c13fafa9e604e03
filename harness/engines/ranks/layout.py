"""How many ranks, and what each is: its stage of the pipeline, and its shard of what that stage holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Sizes of tensor and pipeline parallelism; ranks of one stage are neighbours, as is usual (Megatron-LM).

    ``zero`` ranks keep a part of each parameter and gather the whole of it where it is used (ZeRO-3): each of them
    computes the whole stage.
    """

    tensor: int = 1
    stages: int = 1
    zero: int = 1

    @property
    def shards(self) -> int:
        """Number of ranks of a stage."""
        return self.tensor * self.zero

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.shards * self.stages

    @property
    def head(self) -> int:
        """The rank that shows logits: the first of the last stage."""
        return self.shards * (self.stages - 1)

    def place(self, rank: int) -> Place:
        """What a rank is."""
        stage, shard = divmod(rank, self.shards)
        return Place(rank=rank, stage=stage, shard=shard, last=stage == self.stages - 1)

    def ranks_of(self, stage: int) -> range:
        """The ranks of a stage, shard 0 first."""
        return range(stage * self.shards, (stage + 1) * self.shards)

    def __str__(self) -> str:
        parts = [f"tp {self.tensor}"] if self.tensor > 1 else []
        parts += [f"ZeRO-3 {self.zero}"] if self.zero > 1 else []
        return " x ".join([*parts, *([f"pp {self.stages}"] if self.stages > 1 else [])]) or "1 process"


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """One rank's place in a layout."""

    rank: int
    stage: int
    shard: int
    last: bool

    @property
    def first(self) -> bool:
        """Whether it is of the first stage, which embeds the tokens."""
        return self.stage == 0


def stage_layers(layers: int, stages: int) -> list[range]:
    """The blocks of each stage: consecutive, as even as can be, the first stages one more; none is dropped."""
    sizes = [layers // stages + (stage < layers % stages) for stage in range(stages)]
    starts = [sum(sizes[:stage]) for stage in range(stages)]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def refusal(layout: Layout, config: Any) -> str:
    """Why a model cannot be laid out so, in words; empty where it can.

    Args:
        layout: what is asked for.
        config: of a transformers model.
    """
    text = config.get_text_config()
    heads = int(text.num_attention_heads)
    shared = int(getattr(text, "num_key_value_heads", None) or heads)
    for count, what in ((heads, "attention heads"), (shared, "key/value heads")):
        if count % layout.tensor:
            return f"its {count} {what} cannot be divided among {layout.tensor} ranks"
    if text.num_hidden_layers < layout.stages:
        return f"its {text.num_hidden_layers} blocks are fewer than {layout.stages} stages"
    return ""
