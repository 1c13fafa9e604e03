"""Held-out correct implementations: the same function with its roundings in other places.

A golden's floor comes from the replicas of `harness/replicas.py`. Whoever judges a rule by those same replicas
judges it by what it was made from; so these are written apart from them, and share no code with them. Each
changes a live transformers model in place, or how the engine drives it, and is undone on exit. An alarm of
`check` on one of them is a false alarm (numerics.md 2.5 d).

Shape legend: B batch rows, T new tokens, S tokens so far, H heads, D head size, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from harness.environment import compiler

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

Change = Callable[["PreTrainedModel"], AbstractContextManager[None]]
Forward = Callable[..., Any]
Forwards = list[tuple["nn.Module", Forward]]

_PERMUTATION_SEED = 20_417


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One way to compute the same function.

    Attributes:
        name: as tables show it.
        what: one line for people.
        options: keys of the `hf` SPEC that it needs.
        change: changes a live model, see ``applied``.
        kin: families of one kin are left out together, since each foretells what the others do; "" is its name.
    """

    name: str
    what: str
    options: Mapping[str, str | int | bool] = field(default_factory=dict)
    change: Change
    kin: str = ""

    def applied(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """Let ``model`` compute so inside the ``with`` block; afterwards it is as it was, bit for bit.

        Raises:
            LookupError: on entry, where the model or the machine lacks the part.
        """
        return self.change(model)


def _forwards(find: Callable[[PreTrainedModel], Forwards]) -> Change:
    """A change that gives the modules which ``find`` names another forward."""

    @contextmanager
    def change(model: PreTrainedModel) -> Iterator[None]:
        found = find(model)
        if not found:
            raise LookupError(f"{type(model).__name__} has no such part")
        try:
            for module, forward in found:
                module.forward = forward
            yield
        finally:
            for module, _ in found:
                vars(module).pop("forward", None)

    return change


@contextmanager
def _unchanged(_model: PreTrainedModel) -> Iterator[None]:
    yield


def _named(model: PreTrainedModel, names: Sequence[str]) -> list[Any]:
    """The modules whose own name, the last part of it, is one of ``names``."""
    return [module for path, module in model.named_modules() if path.rpartition(".")[2] in names]


def _matrix(module: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight [out, in] and bias of a Linear, or of GPT-2's Conv1D, which keeps [in, out]."""
    from torch import nn

    weight: torch.Tensor = module.weight
    return (weight if isinstance(module, nn.Linear) else weight.T), module.bias


def _wide(x: torch.Tensor) -> torch.Tensor:
    """In float32, or in float64 where it is that already."""
    import torch

    return x.to(torch.promote_types(x.dtype, torch.float32))


# --- the compiler, attention -------------------------------------------------------------------


@contextmanager
def _compiled(_model: PreTrainedModel) -> Iterator[None]:
    if compiler() is None:
        raise LookupError("there is no C++ compiler on this machine")
    yield


@contextmanager
def _other_attention(model: PreTrainedModel) -> Iterator[None]:
    """The kernel of transformers that is not in force; BLOOM, which has one alone, gets torch's fused one."""
    if model.config.model_type == "bloom":
        with _forwards(_bloom_sdpa)(model):
            yield
        return
    if not getattr(type(model), "_supports_sdpa", False):
        raise LookupError(f"{type(model).__name__} has one attention kernel alone")
    before = model.config._attn_implementation
    other, forwards = ("sdpa", _unchanged) if before == "eager" else ("eager", _forwards(_eager_with_room))
    try:
        model.config._attn_implementation = other
        with forwards(model):
            yield
    finally:
        model.config._attn_implementation = before


def _eager_with_room(model: PreTrainedModel) -> Forwards:
    return [(module, partial(_half_masked, module)) for module in _named(model, ["attn", "self_attn"])]


def _half_masked(module: nn.Module, *inputs: Any, attention_mask: torch.Tensor, **others: Any) -> Any:
    """A mask of half the lowest float: beside the lowest one a score overflows in fp16, and a row of padding,
    all of it masked, becomes NaN (GPT-2 in transformers 5.23)."""
    return type(module).forward(module, *inputs, attention_mask=attention_mask / 2, **others)


def _bloom_sdpa(model: PreTrainedModel) -> Forwards:
    return [(module, partial(_bloom_attention, module)) for module in _named(model, ["self_attention"])]


def _bloom_attention(
    module: Any,
    hidden_BTE: torch.Tensor,
    residual_BTE: torch.Tensor,
    alibi: torch.Tensor,
    attention_mask: torch.Tensor,
    layer_past: Any = None,
    **_others: Any,
) -> tuple[torch.Tensor, None]:
    """BLOOM's attention through torch's fused kernel: ALiBi and the mask are the bias of its scores."""
    from torch.nn.functional import scaled_dot_product_attention

    query_BHTD, key_BHSD, value_BHSD = module._reshape(module.query_key_value(hidden_BTE))
    if layer_past is not None:
        key_BHSD, value_BHSD = layer_past.update(key_BHSD, value_BHSD, module.layer_idx)
    bias_BHTS = alibi.view(len(hidden_BTE), module.num_heads, 1, -1) + attention_mask
    mixed_BHTD = scaled_dot_product_attention(
        query_BHTD, key_BHSD, value_BHSD, attn_mask=bias_BHTS, scale=module.inv_norm_factor
    )
    return residual_BTE + module.dense(mixed_BHTD.transpose(1, 2).flatten(2)), None


# --- which matrices are multiplied at once ----------------------------------------------------


def _regrouped(model: PreTrainedModel) -> Forwards:
    """One product of concatenated weights where the model has several, several where it has one."""
    if model.config.model_type == "bloom":
        heads = int(model.config.n_head)
        return [(module, partial(_bloom_apart, module, heads)) for module in _named(model, ["query_key_value"])]
    if model.config.model_type == "gpt2":
        return [(module, partial(_gpt2_apart, module)) for module in _named(model, ["c_attn"])]
    groups = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]
    return [
        pair
        for group in groups
        for modules in zip(*(_named(model, [name]) for name in group), strict=True)
        for pair in _at_once(modules)
    ]


def _bloom_apart(module: nn.Linear, heads: int, x: torch.Tensor) -> torch.Tensor:
    """BLOOM's rows are ordered by head, then query, key and value: [heads, 3, D, E]."""
    import torch

    weights = module.weight.unflatten(0, (heads, 3, -1))
    biases = module.bias.unflatten(0, (heads, 3, -1))
    parts = [
        torch.nn.functional.linear(x, weights[:, i].flatten(0, 1), biases[:, i].flatten()).unflatten(-1, (heads, -1))
        for i in range(3)
    ]
    return torch.stack(parts, dim=-2).flatten(-3)


def _gpt2_apart(module: Any, x: torch.Tensor) -> torch.Tensor:
    import torch

    weight, bias = _matrix(module)
    assert bias is not None
    pieces = zip(weight.chunk(3), bias.chunk(3), strict=True)
    return torch.cat([torch.nn.functional.linear(x, *piece) for piece in pieces], dim=-1)


def _at_once(modules: Sequence[Any]) -> Forwards:
    """Linears of the same input, computed as one when the first of them is asked."""
    import torch

    weight = torch.cat([module.weight for module in modules])
    bias = None if modules[0].bias is None else torch.cat([module.bias for module in modules])
    widths = [module.out_features for module in modules]
    held: list[torch.Tensor] = []

    def forward(index: int, x: torch.Tensor) -> torch.Tensor:
        # The input is held on to, so that no other tensor can take its identity.
        if not held or held[0] is not x:
            held[:] = [x, *torch.nn.functional.linear(x, weight, bias).split(widths, dim=-1)]
        return held[1 + index]

    return [(module, partial(forward, index)) for index, module in enumerate(modules)]


# --- norms -------------------------------------------------------------------------------------


def _norms(once: bool, model: PreTrainedModel) -> Forwards:
    """Every LayerNorm and RMSNorm; the statistic is in float32 in any case."""
    from torch import nn

    layer = _layer_norm_once if once else _layer_norm_each_step
    rms = _rms_norm_once if once else _rms_norm_each_step
    found: Forwards = []
    for module in model.modules():
        if type(module) is nn.LayerNorm:
            found.append((module, partial(layer, module)))
        elif hasattr(module, "variance_epsilon"):
            found.append((module, partial(rms, module)))
    return found


def _layer_norm_once(module: Any, x: torch.Tensor) -> torch.Tensor:
    mean, scale = _moments(x, module.eps)
    return ((_wide(x) - mean) * scale * _wide(module.weight) + _wide(module.bias)).to(x.dtype)


def _layer_norm_each_step(module: Any, x: torch.Tensor) -> torch.Tensor:
    mean, scale = _moments(x, module.eps)
    centred = (_wide(x) - mean).to(x.dtype)
    normed = (centred * scale).to(x.dtype)
    result: torch.Tensor = normed * module.weight + module.bias
    return result


def _moments(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and reciprocal standard deviation of each row."""
    import torch

    variance, mean = torch.var_mean(_wide(x), dim=-1, correction=0, keepdim=True)
    return mean, (variance + eps).rsqrt()


def _rms_norm_once(module: Any, x: torch.Tensor) -> torch.Tensor:
    return (_wide(x) * _root(x, module.variance_epsilon) * _wide(module.weight)).to(x.dtype)


def _rms_norm_each_step(module: Any, x: torch.Tensor) -> torch.Tensor:
    """The weight first: the other order of the two steps is the model's own."""
    weighted: torch.Tensor = x * module.weight
    return (weighted * _root(x, module.variance_epsilon)).to(x.dtype)


def _root(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Reciprocal root mean square of each row."""
    return (_wide(x).square().mean(dim=-1, keepdim=True) + eps).rsqrt()


# --- sums in other orders ----------------------------------------------------------------------

#: The layers whose input is spread over the ranks of a tensor-parallel group: those that end attention and MLP.
_ROW_PARALLEL = {
    "bloom": ("dense", "dense_4h_to_h"),
    "gpt2": ("c_proj",),
    "llama": ("o_proj", "down_proj"),
}
#: Layers into the hidden units of an MLP, and the one out of them.
_MLP = {
    "bloom": (("dense_h_to_4h",), "dense_4h_to_h"),
    "gpt2": (("c_fc",), "c_proj"),
    "llama": (("gate_proj", "up_proj"), "down_proj"),
}


def _row_parallel(ranks: int, model: PreTrainedModel) -> Forwards:
    names = _ROW_PARALLEL.get(model.config.model_type, ())
    return [(module, partial(_over_ranks, module, ranks)) for module in _named(model, names)]


def _over_ranks(module: Any, ranks: int, x: torch.Tensor) -> torch.Tensor:
    """Each rank's product is rounded to the model's dtype; then they are added in order, and the bias once."""
    from torch.nn.functional import linear

    weight, bias = _matrix(module)
    parts = zip(x.tensor_split(ranks, dim=-1), weight.tensor_split(ranks, dim=1), strict=True)
    total = sum(linear(x_part, weight_part) for x_part, weight_part in parts)
    assert not isinstance(total, int)
    return total if bias is None else total + bias


def _float32_head(model: PreTrainedModel) -> Forwards:
    head = model.get_output_embeddings()
    return [] if head is None else [(head, partial(_wide_linear, head))]


def _wide_linear(module: Any, x: torch.Tensor) -> torch.Tensor:
    from torch.nn.functional import linear

    return linear(_wide(x), _wide(module.weight), None if module.bias is None else _wide(module.bias))


@contextmanager
def _permuted(model: PreTrainedModel) -> Iterator[None]:
    """The hidden units of every MLP in another order: the sum over them is the same sum, taken otherwise."""
    if model.config.model_type not in _MLP:
        raise LookupError(f"the MLP of {type(model).__name__} is not known")
    before: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        for number, mlp in enumerate(_named(model, ["mlp"])):
            before += _permute(mlp, *_MLP[model.config.model_type], seed=_PERMUTATION_SEED + number)
        yield
    finally:
        for tensor, data in before:
            tensor.data = data


def _permute(mlp: nn.Module, ups: Sequence[str], down: str, *, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Put permuted copies in the place of an MLP's weights; returns each tensor with what it held."""
    import torch

    into, out = [getattr(mlp, name) for name in ups], getattr(mlp, down)
    # GPT-2's Conv1D keeps [in, out].
    columns, rows = (1, 0) if isinstance(out, torch.nn.Linear) else (0, 1)
    places = [(out.weight, columns), *((module.weight, rows) for module in into)]
    places += [(module.bias, 0) for module in into if module.bias is not None]
    order = torch.randperm(out.weight.shape[columns], generator=torch.Generator().manual_seed(seed))
    before = [(tensor, tensor.data) for tensor, _ in places]
    for tensor, axis in places:
        tensor.data = tensor.data.index_select(axis, order.to(tensor.device))
    return before


# --- the families ------------------------------------------------------------------------------

FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family(name="plain", what="the reference's own implementation", change=_unchanged),
        Family(
            name="attention", what="the other attention kernel: eager for SDPA, SDPA for eager", change=_other_attention
        ),
        Family(name="batch-1", what="one prompt at a time", options={"batch": 1}, change=_unchanged),
        Family(name="threads-2", what="two threads", options={"threads": 2}, change=_unchanged),
        Family(name="static-cache", what="a static KV cache", options={"static_cache": True}, change=_unchanged),
        Family(name="chunked", what="prefill in chunks of 48 tokens", options={"chunk": 48}, change=_unchanged),
        Family(name="compiled", what="torch.compile", options={"compile": True}, change=_compiled),
        Family(
            name="qkv",
            what="q, k, v (gate, up) in one product, or apart where they are one",
            change=_forwards(_regrouped),
        ),
        Family(
            name="norms-once",
            what="norms in float32, weight and bias too, rounded once",
            change=_forwards(partial(_norms, True)),
        ),
        Family(
            name="norms-stepwise",
            what="norms rounded after each step, their statistic in float32",
            change=_forwards(partial(_norms, False)),
        ),
        Family(
            name="ranks-2",
            what="row-parallel sums over 2 ranks, partial sums rounded",
            change=_forwards(partial(_row_parallel, 2)),
            kin="ranks",
        ),
        Family(
            name="ranks-4",
            what="row-parallel sums over 4 ranks, partial sums rounded",
            change=_forwards(partial(_row_parallel, 4)),
            kin="ranks",
        ),
        Family(name="head-float32", what="the final logits in float32", change=_forwards(_float32_head)),
        Family(name="permuted", what="the hidden units of every MLP in another order", change=_permuted),
    )
}


def kin_of(name: str) -> str:
    """What a family is left out together with; its own name where that is nothing else, or where it is unknown."""
    family = FAMILIES.get(name)
    return name if family is None else family.kin or family.name
