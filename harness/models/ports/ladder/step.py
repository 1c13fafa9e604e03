"""The compiled decode step, and when it may stand for the modules.

Shape legend: B batch rows, T new tokens, S tokens so far (padding included), H heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from harness.models.ports.bloom import slopes
from harness.models.ports.ladder import kernels
from harness.models.ports.ladder.cache import Cache, PreallocatedLayer
from harness.models.ports.ladder.model import Attention, Block, Bloom, Gelu, Head, Linear, Mlp, Transformer

#: What the compiled function stands for. A model with any other part runs module by module.
_KNOWN = {Transformer, Block, Attention, Mlp, Gelu, Linear, Head, nn.LayerNorm, nn.Embedding, nn.Dropout, nn.ModuleList}


class Step:
    """One token for each row of a batch in one call of a compiled function, where nothing of the model was touched.

    Args:
        model: whose step it is.
    """

    def __init__(self, model: Bloom) -> None:
        body = model.transformer
        inside = [module for module in model.modules() if module is not model]
        #: Whether all parts are those that the function knows, each of them once.
        known = {type(one) for one in inside} <= _KNOWN
        self._whole = known and len(body.h) == model.config.n_layer and model.lm_head.shards == 1
        if not self._whole:
            return
        #: Of each module: its hooks, its own attributes (a forward that was given to it), its submodules, its weights.
        self._hooks = [table for one in inside for table in (one._forward_hooks, one._forward_pre_hooks)]
        self._attributes = [vars(one) for one in inside]
        self._modules = [model._modules, *(one._modules for one in inside if one._modules)]
        self._parts = [id(part) for table in self._modules for part in table.values()]
        ordered: list[nn.Module] = [
            body.word_embeddings,
            body.word_embeddings_layernorm,
            *(
                part
                for block in body.blocks
                for part in (
                    block.input_layernorm,
                    block.self_attention.query_key_value,
                    block.self_attention.dense,
                    block.post_attention_layernorm,
                    block.mlp.dense_h_to_4h,
                    block.mlp.dense_4h_to_h,
                )
            ),
            body.ln_f,
            model.lm_head,
        ]
        self._weights = [one._parameters for one in ordered]
        self._norms = [(block.input_layernorm, block.post_attention_layernorm) for block in body.blocks]
        self._attentions = [block.self_attention for block in body.blocks]
        self._ends = (body.word_embeddings_layernorm, body.ln_f)
        self._dropouts = [one.attention_dropout for one in self._attentions]
        self._slopes_H = torch.tensor(slopes(body.num_heads), dtype=torch.float32)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __call__(self, model: Bloom, ids_BT: Tensor, mask_BS: Tensor, cache: Cache) -> Tensor | None:
        """Logits [B, 1, V], and the cache with the new tokens; None where the modules have to run themselves."""
        rows, new = ids_BT.shape
        if not self._whole or new != 1 or rows > kernels.MOST_ROWS or not cache.preallocated or self._touched():
            return None
        weights = [one for table in self._weights for one in table.values() if one is not None]
        dtype = weights[0].dtype
        if not all(one.dtype == dtype and one.is_contiguous() for one in weights):
            return None
        if dtype not in (torch.float32, torch.bfloat16) or weights[0].device.type != "cpu":
            return None
        tokens = mask_BS.shape[1]
        layers = self._ready(cache, rows, tokens, weights[0])
        if layers is None:
            return None
        body, config = model.transformer, model.config
        inner = self._weights[6]["weight"]
        assert inner is not None
        sizes = (
            len(self._attentions),
            weights[0].shape[1],
            body.num_heads,
            inner.shape[0],
            weights[-1].shape[0],
            rows,
            tokens,
            layers[0].capacity,
            int(config.apply_residual_connection_post_layernorm),
            torch.get_num_threads(),
        )
        logits_B1V = weights[0].new_empty((rows, 1, sizes[4]))
        places = [buffer.data_ptr() for layer in layers for buffer in layer.buffers or ()]
        addresses = [one.data_ptr() for one in weights]
        arguments = (ids_BT.contiguous(), mask_BS.contiguous(), places, logits_B1V)
        kernels.load().step(sizes, addresses, list(self._numbers()), self._slopes_H, *arguments)
        for layer in layers:
            layer.length = tokens
        return logits_B1V

    def _touched(self) -> bool:
        return (
            any(self._hooks)
            or any("forward" in one or "build_alibi_tensor" in one for one in self._attributes)
            or any(one.training for one in self._dropouts)
            or [id(part) for table in self._modules for part in table.values()] != self._parts
        )

    def _numbers(self) -> Iterator[float]:
        """Epsilons, scales and factors of ALiBi as the modules have them now."""
        for (first, second), attention in zip(self._norms, self._attentions, strict=True):
            yield from (first.eps, second.eps, attention.inv_norm_factor, attention.beta)
        yield from (one.eps for one in self._ends)

    def _ready(self, cache: Cache, rows: int, tokens: int, like: Tensor) -> list[PreallocatedLayer] | None:
        """The layers of a cache that holds all tokens but the new ones, and has room for these."""
        layers: list[PreallocatedLayer] = []
        for layer in cache.layers:
            if not isinstance(layer, PreallocatedLayer) or "update" in vars(layer) or layer.length != tokens - 1:
                return None
            if layer.buffers is None or layer.length + 1 > layer.capacity or layer.buffers[0].shape[0] != rows:
                return None
            if layer.buffers[0].dtype != like.dtype:
                return None
            layers.append(layer)
        return layers if len({layer.capacity for layer in layers}) == 1 else None
