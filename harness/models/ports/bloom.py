"""BLOOM as a bare callable: plain tensors and functions, no transformers and no tokenizer.

    harness check golden/bloom-tiny/core --candidate py:harness.models.ports.bloom:build

Shape legend: B batch rows, T new tokens, S tokens so far (padding included), V vocabulary, D hidden size, H heads,
C size of a head (D = H C), Q query, key and value of all heads (Q = 3 D).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

#: Keys and values of each layer, both [B, H, S, C].
Cache = list[tuple[Tensor, Tensor]]
Weights = Mapping[str, Tensor]


def build(path: Path, *, dtype: torch.dtype, device: str) -> Callable[..., tuple[Tensor, Cache]]:
    """The port with a KV cache, from a directory with `config.json` and `model.safetensors`."""
    config, weights = load(path, dtype, device)

    def port(input_ids: Tensor, attention_mask: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        return forward(config, weights, input_ids, attention_mask, cache)

    return port


def build_without_cache(path: Path, *, dtype: torch.dtype, device: str) -> Callable[..., Tensor]:
    """The port without a cache: one pass over whole sequences."""
    config, weights = load(path, dtype, device)

    def port(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits_BTV, _ = forward(config, weights, input_ids, attention_mask, None)
        return logits_BTV

    return port


def load(path: Path, dtype: torch.dtype, device: str) -> tuple[dict[str, Any], Weights]:
    """The config, and the weights by their short names: `h.0.mlp.dense_h_to_4h.weight`."""
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    tensors = load_file(path / "model.safetensors", device=device)
    return config, {name.removeprefix("transformer."): tensor.to(dtype) for name, tensor in tensors.items()}


def forward(
    config: Mapping[str, Any], weights: Weights, ids_BT: Tensor, mask_BS: Tensor, cache: Cache | None
) -> tuple[Tensor, Cache]:
    """Logits [B, T, V] of the new tokens, and the cache with their keys and values."""
    eps = config["layer_norm_epsilon"]
    x_BTD = functional.embedding(ids_BT, weights["word_embeddings.weight"])
    wide = torch.promote_types(x_BTD.dtype, torch.float32)
    bias_BHTS = attention_bias(mask_BS, ids_BT.shape[1], config["n_head"], wide)
    x_BTD = norm(x_BTD, weights, "word_embeddings_layernorm", eps)
    grown: Cache = []
    for layer in range(config["n_layer"]):
        name = f"h.{layer}"
        normed_BTD = norm(x_BTD, weights, f"{name}.input_layernorm", eps)
        past = None if cache is None else cache[layer]
        attended_BTD, now = attention(normed_BTD, weights, f"{name}.self_attention", bias_BHTS, past)
        grown.append(now)
        x_BTD = attended_BTD + (normed_BTD if config["apply_residual_connection_post_layernorm"] else x_BTD)
        normed_BTD = norm(x_BTD, weights, f"{name}.post_attention_layernorm", eps)
        fed_BTD = feed_forward(normed_BTD, weights, f"{name}.mlp")
        x_BTD = fed_BTD + (normed_BTD if config["apply_residual_connection_post_layernorm"] else x_BTD)
    x_BTD = norm(x_BTD, weights, "ln_f", eps)
    return functional.linear(x_BTD, weights["word_embeddings.weight"]), grown  # the head is the embedding


def attention(
    x_BTD: Tensor, weights: Weights, name: str, bias_BHTS: Tensor, past: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Self-attention of the new tokens to all so far; the softmax is computed in the dtype of the bias."""
    heads = bias_BHTS.shape[1]
    # Rows of the projection are [heads, (query, key, value), size of a head].
    qkv_BHTQ = linear(x_BTD, weights, f"{name}.query_key_value").unflatten(-1, (heads, -1)).transpose(1, 2)
    query_BHTC, key_BHSC, value_BHSC = qkv_BHTQ.chunk(3, dim=-1)
    if past is not None:
        key_BHSC, value_BHSC = torch.cat([past[0], key_BHSC], dim=2), torch.cat([past[1], value_BHSC], dim=2)
    score_BHTS = query_BHTC @ key_BHSC.transpose(2, 3) / math.sqrt(key_BHSC.shape[-1])
    weight_BHTS = torch.softmax(score_BHTS + bias_BHTS, dim=-1).to(x_BTD.dtype)
    mixed_BTD = (weight_BHTS @ value_BHSC).transpose(1, 2).flatten(2)
    return linear(mixed_BTD, weights, f"{name}.dense"), (key_BHSC, value_BHSC)


def attention_bias(mask_BS: Tensor, new: int, heads: int, dtype: torch.dtype) -> Tensor:
    """ALiBi and the causal mask, [B, H, T, S] (Press et al. 2022, https://arxiv.org/abs/2108.12409).

    A key's bias is its slope times its position. That it does not depend on the query's position, as in the paper,
    only shifts all scores of a row, to which the softmax is blind.
    """
    position_BS = (mask_BS.cumsum(dim=-1) - 1).clamp(min=0)
    slope_H = torch.tensor(slopes(heads), dtype=dtype, device=mask_BS.device)
    alibi_BHTS = slope_H[:, None, None] * position_BS[:, None, None, :]
    total = mask_BS.shape[1]
    causal_TS = torch.ones((new, total), dtype=torch.bool, device=mask_BS.device).tril(diagonal=total - new)
    seen_BHTS = causal_TS & mask_BS[:, None, None, :].bool()
    # Not minus infinity: a padded query sees no key at all, and its row would become NaN.
    return alibi_BHTS.masked_fill(~seen_BHTS, torch.finfo(dtype).min)


def slopes(heads: int) -> list[float]:
    """Slopes of ALiBi: 2^(-8/n), 2^(-16/n), ... of n heads, a power of two; further heads take every second of 2 n."""
    power = 2 ** math.floor(math.log2(heads))
    first = [2 ** (-8 * (head + 1) / power) for head in range(power)]
    return first + [2 ** (-4 * (2 * head + 1) / power) for head in range(heads - power)]


def feed_forward(x_BTD: Tensor, weights: Weights, name: str) -> Tensor:
    """Two linear maps with a GELU between them, in its tanh form."""
    hidden_BTD = functional.gelu(linear(x_BTD, weights, f"{name}.dense_h_to_4h"), approximate="tanh")
    return linear(hidden_BTD, weights, f"{name}.dense_4h_to_h")


def linear(x_BTD: Tensor, weights: Weights, name: str) -> Tensor:
    """A linear map with bias."""
    return functional.linear(x_BTD, weights[f"{name}.weight"], weights[f"{name}.bias"])


def norm(x_BTD: Tensor, weights: Weights, name: str, eps: float) -> Tensor:
    """LayerNorm over the last axis."""
    return functional.layer_norm(x_BTD, x_BTD.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)
