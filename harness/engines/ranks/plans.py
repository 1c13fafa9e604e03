"""How the layers of a model are cut for tensor parallelism: transformers' own plan, and ours where it has none.

A plan maps the names of modules to styles of transformers' registry. transformers 5.23 has a plan for Llama and its
kin, and none for BLOOM and GPT-2; these are below, with what their attention needs to know of its own heads. GPT-2's
Conv1D keeps its weight as [in, out] and gets styles of its own.

Shape legend: B batch rows, T new tokens, S tokens so far, E inputs, N outputs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from harness.engines.ranks.layout import Place
from harness.errors import UsageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """A tensor's cut: along which dimension, and in how many groups that are cut each by itself (q, k, v in one)."""

    dim: int
    groups: int = 1

    def of(self, tensor: torch.Tensor, shard: int, size: int) -> torch.Tensor:
        """The part of a shard: pieces of ``ceil(length / size)``, the last ones shorter, as torch.chunk and DTensor."""
        import torch

        parts = []
        for group in tensor.chunk(self.groups, dim=self.dim):
            pieces = group.chunk(size, dim=self.dim)
            parts.append(pieces[shard] if shard < len(pieces) else group.narrow(self.dim, 0, 0))
        return torch.cat(parts, dim=self.dim) if len(parts) > 1 else parts[0]

    def divides(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of this shape has more than one piece."""
        return shape[self.dim] > 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Grained(Cut):
    """A cut between grains, the first pieces one grain more, what is less than a grain to the last: as AutoTP cuts.

    Attributes:
        grain: elements.
        heads: where it is not 0 and divides the length, a grain is as many elements as one head has.
    """

    grain: int = 1
    heads: int = 0

    def of(self, tensor: torch.Tensor, shard: int, size: int) -> torch.Tensor:
        length = tensor.shape[self.dim]
        grain = length // self.heads if self.heads and length % self.heads == 0 else self.grain
        grain = grain if length >= grain else 1
        more, rest = divmod(length // grain, size)
        sizes = [(more + (one < rest)) * grain for one in range(size - 1)]
        sizes.append(length - sum(sizes))
        piece: torch.Tensor = tensor.split(sizes, dim=self.dim)[shard]
        return piece


class Flat(Cut):
    """A cut of all elements in a row, as ZeRO-3 keeps parameters."""

    __slots__ = ()

    def of(self, tensor: torch.Tensor, shard: int, size: int) -> torch.Tensor:
        length = -(-tensor.numel() // size)
        return tensor.flatten()[shard * length : (shard + 1) * length]

    def divides(self, shape: Sequence[int]) -> bool:
        return math.prod(shape) > 1


#: Elements that AutoTP of DeepSpeed leaves together, where it does not cut by head.
_GRAIN = 64
#: Parts of the names of modules that it does not cut by head.
_NO_HEADS = ("mlp", "lm_head", "embed_out", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def autotp_cut(module: str, dim: int, config: Any) -> Grained:
    """How AutoTP of DeepSpeed cuts a layer along a dimension.

    Args:
        module: the layer's name.
        dim: of its weight, its bias or its input.
        config: of the model.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return Grained(dim=dim, grain=_GRAIN, heads=0 if any(part in module for part in _NO_HEADS) else int(heads))


_WHOLE = None
_OUT, _IN = Cut(dim=0), Cut(dim=1)
_REPLICATED = (_WHOLE, _WHOLE)

#: Style -> the cut of a weight of two dimensions and of a bias; None is whole on every rank. A style that is not here
#: is unknown, and what it cuts is not held to the checkpoint.
STYLES: Mapping[str, tuple[Cut | None, Cut | None]] = {
    "colwise": (_OUT, _OUT),
    "colwise_rep": (_OUT, _OUT),
    "colwise_gather_output": (_OUT, _OUT),
    "rowwise": (_IN, _WHOLE),
    "rowwise_rep": (_IN, _WHOLE),
    "rowwise_split_input": (_IN, _WHOLE),
    # Gate and up in one weight, cut each by itself; a bias is cut as if it were one.
    "packed_colwise": (Cut(dim=0, groups=2), _OUT),
    "packed_rowwise": (Cut(dim=1, groups=2), _WHOLE),
    "embedding_rowwise": (_OUT, _WHOLE),
    "embedding_colwise": (_IN, _WHOLE),
    "conv1d_colwise": (_IN, _OUT),
    "conv1d_colwise_qkv": (Cut(dim=1, groups=3), Cut(dim=0, groups=3)),
    "conv1d_rowwise": (_OUT, _WHOLE),
    # These change what goes in or comes out, or a gradient. Experts are cut by the styles of their own parameters.
    "all_reduce": _REPLICATED,
    "local_params": _REPLICATED,
    "mla_kv_a_proj": _REPLICATED,
    "moe_identity_expert": _REPLICATED,
    "moe_tp_experts": _REPLICATED,
    "replicate": _REPLICATED,
    "replicated_with_grad_allreduce": _REPLICATED,
    "sequence_parallel": _REPLICATED,
}

#: Styles of layers that are given their own columns of the input, and whose outputs are summed over the shards.
SPLIT = frozenset({"rowwise", "conv1d_rowwise"})
#: All styles of layers whose outputs are summed; those that are not in SPLIT are given the whole input, and cut it.
SUMMED = SPLIT | {"rowwise_rep", "rowwise_split_input"}

_OURS: Mapping[str, Mapping[str, str]] = {
    "bloom": {
        "transformer.word_embeddings": "embedding_rowwise",
        # Rows go by head, each with its q, k and v: whole heads are consecutive rows.
        "transformer.h.*.self_attention.query_key_value": "colwise",
        "transformer.h.*.self_attention.dense": "rowwise",
        "transformer.h.*.mlp.dense_h_to_4h": "colwise",
        "transformer.h.*.mlp.dense_4h_to_h": "rowwise",
        "lm_head": "colwise_gather_output",
    },
    "gpt2": {
        "transformer.wte": "embedding_rowwise",
        "transformer.h.*.attn.c_attn": "conv1d_colwise_qkv",
        "transformer.h.*.attn.c_proj": "conv1d_rowwise",
        "transformer.h.*.mlp.c_fc": "conv1d_colwise",
        "transformer.h.*.mlp.c_proj": "conv1d_rowwise",
        "lm_head": "colwise_gather_output",
    },
}


def why_not() -> str:
    """Why layers cannot be cut here, in words; empty where they can."""
    try:
        from transformers.distributed.configuration_utils import DistributedConfig
    except ImportError:
        return "transformers is older than 5.20, whose tensor parallelism is another"
    return "" if "tp_size" in DistributedConfig.__dataclass_fields__ else "transformers knows no tp_size"


def distributed(config: Any, size: int) -> Any:
    """What `from_pretrained` takes as ``distributed_config``, with the plan of this model.

    Raises:
        UsageError: for a model that neither transformers nor this file has a plan for.
    """
    if reason := why_not():
        raise UsageError(f"tensor parallelism cannot run here: {reason}", fix="pip install -U transformers")
    from transformers.distributed.configuration_utils import DistributedConfig

    kind = config.model_type
    if kind in _OURS:
        _register()
        return DistributedConfig(tp_size=size, tp_plan=dict(_OURS[kind]))
    if not getattr(config, "base_model_tp_plan", None):
        raise UsageError(
            f"there is no tensor-parallel plan for the model type {kind!r}",
            fix=f"transformers brings plans with its models; this project those of {', '.join(_OURS)}",
        )
    return DistributedConfig(tp_size=size)


def summed_layers(model: PreTrainedModel, styles: frozenset[str] = SUMMED) -> frozenset[str]:
    """Names of the layers whose products tensor parallelism sums over its ranks, of a model that is cut or whole.

    Empty for a model without a plan.

    Args:
        model: of transformers.
        styles: which of SUMMED.
    """
    plan: Mapping[str, str] = getattr(model, "tp_plan", None) or _OURS.get(model.config.model_type) or {}
    kinds = {kind for kind, style in plan.items() if style in styles}
    return frozenset(name for name, _ in model.named_modules() if _pattern(name) in kinds)


def style_of(model: PreTrainedModel, parameter: str) -> str | None:
    """The style of the plan that a live model was cut by, for one of its parameters; None where it is whole."""
    from transformers.distributed.parallel_utils import _get_parameter_plan

    style: str | None = _get_parameter_plan(parameter, model.tp_plan, is_weight=True)
    return style


def planned_style(kind: str, parameter: str) -> str | None:
    """The style that this project's plan for a model type has for a parameter; None where it is whole.

    Raises:
        KeyError: for a model type without one.
    """
    return _OURS[kind].get(_pattern(parameter.rpartition(".")[0]))


def _pattern(module: str) -> str:
    """A module's name as plans have it: any block for its number."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", module)


def cut_of(style: str, parameter: str, ndim: int = 2) -> Cut | None:
    """The cut of a parameter of a style, None where it is whole.

    Args:
        style: of the plan.
        parameter: its name.
        ndim: its number of dimensions; those of a weight before the last two (experts) are not cut.

    Raises:
        KeyError: for a style that is not in STYLES.
    """
    weight, bias = STYLES[style]
    if parameter.rpartition(".")[2] == "bias":
        return bias
    if weight is None or ndim == 2:
        return weight
    return _OUT if ndim < 2 else replace(weight, dim=weight.dim + ndim - 2)


def localise(model: PreTrainedModel, place: Place, size: int) -> None:
    """Tell attention modules of their own heads, where they count all of the model's."""
    change = _LOCAL.get(model.config.model_type)
    if change is not None and size > 1:
        change(model, place.shard, size)


def _localise_bloom(model: Any, shard: int, size: int) -> None:
    for block in model.transformer.h:
        attention = block.self_attention
        attention.num_heads //= size
        attention.register_forward_pre_hook(own_slopes(attention.num_heads, shard), with_kwargs=True)


def own_slopes(heads: int, shard: int) -> Callable[..., Any]:
    """A hook that leaves of all heads' biases, [B * heads of the model, 1, S], those of the rank's own heads.

    The biases are made once for the model, from a mask or without one; both ways end in this argument. Biases that are
    the rank's own already are left: DeepSpeed makes them so on one of the two ways.
    """

    def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        alibi, hidden_BTE = kwargs["alibi"], args[0]
        batch, length = hidden_BTE.shape[0], alibi.shape[-1]
        if alibi.shape[0] == batch * heads:
            return args, kwargs
        own = alibi.view(batch, -1, 1, length)[:, shard * heads : (shard + 1) * heads]
        return args, {**kwargs, "alibi": own.reshape(batch * heads, 1, length)}

    return hook


def _localise_gpt2(model: Any, _shard: int, size: int) -> None:
    for block in model.transformer.h:
        block.attn.num_heads //= size
        block.attn.split_size //= size


_LOCAL: Mapping[str, Callable[[Any, int, int], None]] = {"bloom": _localise_bloom, "gpt2": _localise_gpt2}


def _register() -> None:
    """Add the styles of Conv1D to transformers' registry."""
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES

    if "conv1d_colwise" in ALL_PARALLEL_STYLES:
        return
    from harness.engines.ranks import conv1d

    for name, style in conv1d.STYLES.items():
        ALL_PARALLEL_STYLES.register(name, style)  # type: ignore[arg-type]  # it is typed for functions
