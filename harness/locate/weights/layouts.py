"""Which head, and which of query, key and value, a row of an attention weight belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: Last names of modules whose outputs are those of heads, with what they are in order; of one whose inputs are, "".
_OUTPUTS: Mapping[str, str] = {
    "q_proj": "q", "query": "q", "wq": "q",
    "k_proj": "k", "key": "k", "wk": "k",
    "v_proj": "v", "value": "v", "wv": "v",
    "query_key_value": "qkv", "c_attn": "qkv", "qkv": "qkv", "qkv_proj": "qkv", "Wqkv": "qkv", "wqkv": "qkv",
}  # fmt: skip
_INPUTS = ("o_proj", "out_proj", "dense", "c_proj", "wo")
#: Model types whose fused rows go head by head, [H, 3, D]; the others' go part by part, [3, H, D].
_BY_HEAD = ("bloom", "gpt_neox", "gpt_neox_japanese")


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """What the indices along one dimension of a tensor stand for.

    Attributes:
        dim: the dimension, of the tensor as it is stored.
        head_size: D.
        heads: number of heads of each part.
        parts: one letter each, "qkv".
        by_head: the order is [H, parts, D], not [parts, H, D].
    """

    dim: int
    head_size: int
    heads: tuple[int, ...]
    parts: str
    by_head: bool = False

    def labels(self) -> list[tuple[str, int, int]]:
        """(part, head, lane) of each index."""
        if self.by_head:
            return [
                (part, head, lane)
                for head in range(self.heads[0])
                for part in self.parts
                for lane in range(self.head_size)
            ]
        return [
            (part, head, lane)
            for part, count in zip(self.parts, self.heads, strict=True)
            for head in range(count)
            for lane in range(self.head_size)
        ]


def layout_of(name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> Layout | None:
    """The heads of a tensor by its name, its shape and the config; None where there are none, or they do not fit."""
    module, _, kind = name.rpartition(".")
    parent, _, last = module.rpartition(".")
    heads = _number(config, "num_attention_heads", "n_head", "num_heads")
    hidden = _number(config, "hidden_size", "n_embd", "d_model")
    if kind not in ("weight", "bias") or not heads or not shape or not hidden:
        return None
    groups = _number(config, "num_key_value_heads") or heads
    size = _number(config, "head_dim") or hidden // heads
    backwards = config.get("model_type") == "gpt2"  # a Conv1D keeps [in, out]
    if last in _OUTPUTS:
        parts = _OUTPUTS[last]
        counts = tuple(heads if part == "q" else groups for part in parts)
        dim = 1 if backwards and len(shape) == 2 else 0
        by_head = len(parts) > 1 and config.get("model_type") in _BY_HEAD and groups == heads
        found = Layout(dim=dim, head_size=size, heads=counts, parts=parts, by_head=by_head)
    elif last in _INPUTS and "att" in parent.rpartition(".")[2] and len(shape) == 2:
        found = Layout(dim=0 if backwards else 1, head_size=size, heads=(heads,), parts="o")
    else:
        return None
    return found if sum(found.heads) * size == shape[found.dim] else None


def _number(config: Mapping[str, Any], *names: str) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and value > 0:
            return value
    return 0
