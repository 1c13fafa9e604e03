"""BLOOM in plain PyTorch as an nn.Module whose rungs are switched one by one.

Modules bear the names of transformers' and are called as they are, so that whatever looks into a model finds its way
here too: weights by name, hooks, what is asked of a cache. What does the work of several modules at once looks first
whether one of them was touched (a hook, another forward) and then lets each run by itself; so nothing that is put into
a part is passed over.

Shape legend: B batch rows, T new tokens, S tokens so far (padding included), D hidden size, H heads, C size of a head,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.models.ports.bloom import slopes
from harness.models.ports.ladder import kernels
from harness.models.ports.ladder.cache import Cache
from harness.models.ports.ladder.memory import into_one_block
from harness.models.ports.ladder.rungs import OWN, RUNGS
from harness.models.ports.ladder.sharded import Shard, SplitEmbedding, add_up, side_by_side

if TYPE_CHECKING:
    from harness.models.ports.ladder.step import Step

_WHOLE = Shard()
#: BLOOM's root of 2 / pi.
_ROOT = 0.79788456


@dataclass(frozen=True, slots=True)
class Output:
    """Logits [B, T, V]."""

    logits: Tensor


def touched(*modules: nn.Module) -> bool:
    """Whether some module was given a hook or another forward: then it has to be called as it is."""
    return any(one._forward_hooks or one._forward_pre_hooks or "forward" in vars(one) for one in modules)


class Bloom(nn.Module):
    """The language model.

    Args:
        config: of transformers, or anything with its entries.
        rungs: which optimizations are switched on.
        weights: tensors by transformers' names; the head is the embedding where it has none of its own.
        shard: whose weights these are, where the model is shared out.
    """

    base_model_prefix = "transformer"

    def __init__(
        self, config: Any, rungs: frozenset[str], weights: Mapping[str, Tensor], shard: Shard = _WHOLE
    ) -> None:
        super().__init__()
        self.config, self.rungs = config, rungs
        self.generation_config: Any = None
        shape = weights["transformer.word_embeddings.weight"].shape
        with torch.device("meta"):
            self.transformer = Transformer(config, rungs, shape[0], shard)
            self.lm_head = Head(shape[1], shape[0], config.vocab_size, shard, own="matvec" in rungs)
        tied = config.tie_word_embeddings or "lm_head.weight" not in weights
        given = {**weights, **({"lm_head.weight": weights["transformer.word_embeddings.weight"]} if tied else {})}
        self.load_state_dict(given, strict=True, assign=True)
        if tied:
            self.lm_head.weight = self.transformer.word_embeddings.weight
        if "layout" in rungs:
            into_one_block(self)
        self.requires_grad_(False)
        self.eval()
        self._step: Step | None = None

    @property
    def base_model(self) -> Transformer:
        """All but the head, as transformers calls it."""
        return self.transformer

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.lm_head.weight.dtype

    def get_input_embeddings(self) -> nn.Module:
        """The table of the tokens."""
        return self.transformer.word_embeddings

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def new_cache(self, length: int) -> Cache:
        """An empty KV cache for ``length`` tokens."""
        return Cache(len(self.transformer.h), length if "layout" in self.rungs else None)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        past_key_values: Cache | None = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
    ) -> Output:
        """Logits of the last ``logits_to_keep`` positions, 0 for all, [B, T, V].

        Args:
            input_ids: of the new tokens, int64 [B, T].
            attention_mask: 1 on tokens and 0 on padding, of all tokens so far, int64 [B, S].
            past_key_values: what the tokens before left, and takes these; None for a pass that keeps nothing.
            use_cache: as transformers has it; what is kept depends on ``past_key_values`` alone.
            logits_to_keep: how many positions.
        """
        if "compiled" in self.rungs and past_key_values is not None:
            logits_B1V = self._compiled_step()(self, input_ids, attention_mask, past_key_values)
            if logits_B1V is not None:
                return Output(logits_B1V)
        hidden_BTD = self.transformer(input_ids, past_key_values=past_key_values, attention_mask=attention_mask)
        if logits_to_keep:
            # A copy: of a view with a batch's strides torch makes a product for each row, and copies the head for it.
            hidden_BTD = hidden_BTD[:, -logits_to_keep:].clone(memory_format=torch.contiguous_format)
        return Output(self.lm_head(hidden_BTD))

    def _compiled_step(self) -> Step:
        """Made when it is needed: a copy of a model needs its own."""
        if self._step is None:
            from harness.models.ports.ladder.step import Step

            self._step = Step(self)
        return self._step


class Transformer(nn.Module):
    """All but the head."""

    def __init__(self, config: Any, rungs: frozenset[str], vocabulary: int, shard: Shard) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.layer_norm_epsilon
        self.num_heads: int = config.n_head
        heads = config.n_head // shard.size
        self.own_heads = slice(shard.number * heads, (shard.number + 1) * heads)
        self.once = "alibi" in rungs
        if shard.size == 1:
            self.word_embeddings = nn.Embedding(vocabulary, hidden)
        else:
            start = shard.number * -(-config.vocab_size // shard.size)
            self.word_embeddings = SplitEmbedding(vocabulary, hidden, start)
        self.word_embeddings_layernorm = nn.LayerNorm(hidden, eps=eps)
        bias = Bias(shared=self.once)
        self.h = nn.ModuleList(Block(config, rungs, layer, bias, shard) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(hidden, eps=eps)

    @property
    def blocks(self) -> list[Block]:
        """First to last."""
        return [block for block in self.h if isinstance(block, Block)]

    def build_alibi_tensor(self, mask_BS: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
        """ALiBi of the heads that are here, as transformers shapes it, [B * H, 1, S]: slope times a key's position."""
        position_BS = (mask_BS.cumsum(dim=-1) - 1) * mask_BS
        slope_H = torch.tensor(slopes(heads)[self.own_heads], dtype=dtype, device=mask_BS.device)
        return (slope_H[:, None] * position_BS[:, None]).flatten(0, 1)[:, None]

    def causal_mask(self, mask_BS: Tensor, new: int, dtype: torch.dtype) -> Tensor:
        """What is added to scores, [B, 1, T, S]: 0 on the tokens that a query sees, the least float on others."""
        total = mask_BS.shape[1]
        seen_BTS = mask_BS[:, None].bool()
        if new > 1:
            ones = torch.ones((new, total), dtype=torch.bool, device=mask_BS.device)
            seen_BTS = ones.tril(diagonal=total - new) & seen_BTS
        zeros = torch.zeros((), dtype=dtype, device=mask_BS.device)
        # Not minus infinity: a padded query sees no key at all, and its row would become NaN.
        return zeros.where(seen_BTS, torch.finfo(dtype).min)[:, None]

    def forward(self, input_ids: Tensor, *, past_key_values: Cache | None, attention_mask: Tensor) -> Tensor:
        """The last norm's output, [B, T, D]."""
        hidden_BTD = self.word_embeddings_layernorm(self.word_embeddings(input_ids))
        # Positions beyond 256 are no bfloat16 numbers, nor are their biases.
        wide = torch.promote_types(hidden_BTD.dtype, torch.float32)
        new, alibi, mask = input_ids.shape[1], None, None
        for block in self.h:
            if alibi is None or mask is None or not self.once:
                alibi = self.build_alibi_tensor(attention_mask, self.num_heads, wide)
                mask = self.causal_mask(attention_mask, new, wide)
            hidden_BTD = block(hidden_BTD, alibi=alibi, attention_mask=mask, layer_past=past_key_values)
        normed_BTD: Tensor = self.ln_f(hidden_BTD)
        return normed_BTD


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: Any, rungs: frozenset[str], layer: int, bias: Bias, shard: Shard) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.layer_norm_epsilon
        self.input_layernorm = nn.LayerNorm(hidden, eps=eps)
        self.self_attention = Attention(config, rungs, layer, bias, shard)
        self.post_attention_layernorm = nn.LayerNorm(hidden, eps=eps)
        self.mlp = Mlp(config, rungs, shard)
        self.apply_residual_connection_post_layernorm: bool = config.apply_residual_connection_post_layernorm

    def forward(self, hidden_BTD: Tensor, *, alibi: Tensor, attention_mask: Tensor, layer_past: Cache | None) -> Tensor:
        """[B, T, D]."""
        normed_BTD = self.input_layernorm(hidden_BTD)
        attended_BTD, _ = self.self_attention(
            normed_BTD,
            normed_BTD if self.apply_residual_connection_post_layernorm else hidden_BTD,
            alibi=alibi,
            attention_mask=attention_mask,
            layer_past=layer_past,
        )
        normed_BTD = self.post_attention_layernorm(attended_BTD)
        output_BTD: Tensor = self.mlp(
            normed_BTD, normed_BTD if self.apply_residual_connection_post_layernorm else attended_BTD
        )
        return output_BTD


class Bias:
    """ALiBi and mask summed: in each layer, or ``shared`` by those that are given the same ones."""

    def __init__(self, *, shared: bool) -> None:
        self.shared = shared
        #: ALiBi, mask and factor of the last sum, and the sum.
        self._parts: tuple[Tensor, Tensor, float, Tensor] | None = None

    def __call__(self, alibi: Tensor, mask_B1TS: Tensor, beta: float) -> Tensor:
        """[B, H, T, S], or one that broadcasts to it."""
        known = self._parts
        if known is not None and known[0] is alibi and known[1] is mask_B1TS and known[2] == beta:
            return known[3]
        alibi_BH1S: Tensor = alibi.unflatten(0, (mask_B1TS.shape[0], -1))
        found: Tensor = (alibi_BH1S if beta == 1 else alibi_BH1S * beta) + mask_B1TS
        if self.shared:
            self._parts = (alibi, mask_B1TS, beta, found)
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> Bias:
        return Bias(shared=self.shared)


class Attention(nn.Module):
    """Self-attention of the new tokens to all so far, added to the residual."""

    def __init__(self, config: Any, rungs: frozenset[str], layer: int, bias: Bias, shard: Shard) -> None:
        super().__init__()
        hidden, own, parts = config.hidden_size, "matvec" in rungs, shard.size
        self.num_heads: int = config.n_head // parts
        self.head_dim = hidden // config.n_head
        self.inv_norm_factor = self.head_dim**-0.5
        self.beta = 1.0
        self.layer_idx = layer
        self.bias = bias
        self.views, self.fused = "layout" in rungs, "softmax" in rungs
        self.query_key_value = Linear(hidden, 3 * hidden // parts, own=own)
        self.dense = Linear(hidden // parts, hidden, own=own, summed=parts > 1)
        self.attention_dropout = nn.Dropout(float(getattr(config, "attention_dropout", 0.0)))

    def forward(
        self,
        hidden_BTD: Tensor,
        residual_BTD: Tensor,
        *,
        alibi: Tensor,
        attention_mask: Tensor,
        layer_past: Cache | None,
    ) -> tuple[Tensor, None]:
        """[B, T, D], and in the place of the weights, which are not kept, nothing."""
        query_BHTC, key_BHTC, value_BHTC = self._reshape(self.query_key_value(hidden_BTD))
        if layer_past is not None:
            key_BHTC, value_BHTC = layer_past.update(key_BHTC, value_BHTC, self.layer_idx)
        bias_BHTS = self.bias(alibi, attention_mask, self.beta)
        mixed_BHTC = self._attended(query_BHTC, key_BHTC, value_BHTC, bias_BHTS)
        output_BTD: Tensor = self.dense(mixed_BHTC.transpose(1, 2).flatten(2)) + residual_BTD
        return output_BTD, None

    def _reshape(self, fused_BTQ: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value of the new tokens, each [B, H, T, C]; with ``views`` nothing is copied.

        Rows of the projection are [heads, (query, key, value), size of a head].
        """
        fused_BTHQ = fused_BTQ.unflatten(-1, (self.num_heads, 3 * self.head_dim))
        parts = fused_BTHQ.transpose(1, 2).split(self.head_dim, dim=-1)
        return parts if self.views else tuple(part.contiguous() for part in parts)

    def _attended(self, query_BHTC: Tensor, key_BHSC: Tensor, value_BHSC: Tensor, bias_BHTS: Tensor) -> Tensor:
        """The values mixed by the softmax of the scores, in float, [B, H, T, C]."""
        if self.fused and not self.attention_dropout.training and not touched(self.attention_dropout):
            # Its mask may be wider than its queries on the CPU alone.
            wide = query_BHTC.device.type == "cpu" and query_BHTC.dtype == torch.bfloat16
            bias_BHTS = bias_BHTS if wide else bias_BHTS.to(query_BHTC.dtype)
            return functional.scaled_dot_product_attention(
                query_BHTC, key_BHSC, value_BHSC, attn_mask=bias_BHTS, scale=self.inv_norm_factor
            )
        score_BHTS = (query_BHTC @ key_BHSC.transpose(2, 3)).to(bias_BHTS.dtype) * self.inv_norm_factor + bias_BHTS
        weight_BHTS = torch.softmax(score_BHTS, dim=-1).to(query_BHTC.dtype)
        mixed_BHTC: Tensor = self.attention_dropout(weight_BHTS) @ value_BHSC
        return mixed_BHTC


class Mlp(nn.Module):
    """Two linear maps with a GELU between them, added to the residual."""

    def __init__(self, config: Any, rungs: frozenset[str], shard: Shard) -> None:
        super().__init__()
        hidden, own, parts = config.hidden_size, "matvec" in rungs, shard.size
        self.fused = {"gelu", "matvec"} <= rungs
        self.dense_h_to_4h = Linear(hidden, 4 * hidden // parts, own=own)
        self.gelu_impl = Gelu(fused="gelu" in rungs)
        self.dense_4h_to_h = Linear(4 * hidden // parts, hidden, own=own, summed=parts > 1)

    def forward(self, hidden_BTD: Tensor, residual_BTD: Tensor) -> Tensor:
        """[B, T, D]."""
        inner_BTF = self._inner(hidden_BTD)
        output_BTD: Tensor = self.dense_4h_to_h(inner_BTF) + residual_BTD
        return output_BTD

    def _inner(self, hidden_BTD: Tensor) -> Tensor:
        up, gelu = self.dense_h_to_4h, self.gelu_impl
        plain = type(gelu) is Gelu and not touched(up, gelu)
        if self.fused and plain and up.is_own(hidden_BTD):
            return kernels.load().linear(hidden_BTD, up.weight, up.bias, gelu=True)
        inner_BTF: Tensor = gelu(up(hidden_BTD))
        return inner_BTF


class Gelu(nn.Module):
    """The GELU in its tanh form: operation by operation as BLOOM writes it, or in one."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        """Of each entry."""
        if self.fused:
            return functional.gelu(x, approximate="tanh")
        return x * 0.5 * (1.0 + torch.tanh(_ROOT * x * (1 + 0.044715 * x * x)))


class Linear(nn.Linear):
    """A linear map; with ``own`` through an own kernel where there are few rows, in bfloat16.

    In float32 torch's product of one row brings weights as fast as memory gives them.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = True, *, own: bool, summed: bool = False) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.own, self.summed = own, summed

    def is_own(self, x: Tensor) -> bool:
        """Whether the kernel takes this input."""
        return self.own and x.dtype == torch.bfloat16 and kernels.takes(x, self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The product, x W^T + b; where shards have a part of the inputs each, summed over them."""
        if self.summed:
            return add_up(self._product(x, None)) + self.bias
        return self._product(x, self.bias)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.is_own(x):
            return kernels.load().linear(x, self.weight, bias)
        return functional.linear(x, self.weight, bias)


class Head(Linear):
    """The logits of all of the vocabulary, on every shard."""

    def __init__(self, hidden: int, rows: int, vocabulary: int, shard: Shard, *, own: bool) -> None:
        super().__init__(hidden, rows, bias=False, own=own)
        self.vocabulary, self.shards = vocabulary, shard.size

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, V]."""
        logits_BTP = super().forward(x)
        return logits_BTP if self.shards == 1 else side_by_side(logits_BTP, self.vocabulary, self.shards)


def unavailable(rungs: frozenset[str], dtype: torch.dtype, device: str) -> str:
    """Why some of the rungs cannot be had, in words; empty where all can.

    Raises:
        KeyError: for a rung that there is not.
    """
    own = [name for name in RUNGS if name in rungs & OWN]
    if not own:
        return ""
    names = " and ".join(own)
    if torch.device(device).type != "cpu":
        return f"{names} are kernels for a CPU"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"{names} are kernels for float32 and bfloat16"
    if reason := kernels.why_not():
        return f"{names}: {reason}"
    return "compiled works on the cache of the rung layout" if "compiled" in rungs and "layout" not in rungs else ""
