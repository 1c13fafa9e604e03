"""The bytes and operations that a step of a transformers model needs at least, counted from its config.

An operation is one multiplication or one addition of a matrix product; norms, activations and softmax are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from harness.errors import ModelError

#: Bytes of an element, of weights and of the KV cache alike.
WIDTHS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}

#: Config entries that mean another cache or other products than those counted here, where they are set.
_OTHER = ("kv_lora_rank", "multi_query", "num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """What a model holds and moves, in elements.

    Attributes:
        products: weights of the matrix products, without the head's.
        head: weights of the product that gives the logits, tied to the embedding or not.
        others: weights that no product takes: biases and norms.
        gathered: elements that the embedding tables give a token.
        cached: elements of keys and values that a token adds to the KV cache, over all layers.
        queries: elements of a token's queries, over all layers.
    """

    products: int
    head: int
    others: int
    gathered: int
    cached: int
    queries: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Of one forward.

    Attributes:
        bytes: moved between memory and processor.
        operations: additions and multiplications.
    """

    bytes: float
    operations: float


def count(config: Any) -> Counts:
    """What a model of this config holds, found by building it without memory (torch's device "meta").

    With L layers, H query heads and G key/value heads (grouped-query attention, arXiv:2305.13245) of width D, a token
    adds 2 L G D elements to the cache and has L H D elements of queries.

    Args:
        config: of a transformers causal language model.

    Raises:
        ModelError: for a model whose steps take other forms: experts, latent or windowed attention, other layers.
    """
    import torch
    from transformers import AutoModelForCausalLM

    text = config.get_text_config()
    _refuse_others(text)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    products, head, others, gathered = _weights(model)
    layers, heads = int(text.num_hidden_layers), int(text.num_attention_heads)
    width = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    shared = int(getattr(text, "num_key_value_heads", None) or heads)
    return Counts(
        products=products,
        head=head,
        others=others,
        gathered=gathered,
        cached=2 * layers * shared * width,
        queries=layers * heads * width,
    )


def _refuse_others(config: Any) -> None:
    odd = [key for key in _OTHER if getattr(config, key, None)]
    kinds = {str(one) for one in getattr(config, "layer_types", None) or ()} - {"full_attention"}
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        odd.append("sliding_window")
    if odd or kinds:
        problem = f"what a step of {config.model_type} costs is not known: its config has {', '.join([*odd, *kinds])}"
        raise ModelError(problem, fix="Only models whose attention is full and whose layers are dense are counted")


def _weights(model: Any) -> tuple[int, int, int, int]:
    """Elements of products, head and others, and the elements that are gathered a token."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    last = model.get_output_embeddings()
    head = 0 if last is None else last.weight.numel()
    seen = set() if last is None else {id(last.weight)}
    products = others = gathered = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            # A table is not read whole; tied to the head, it is by the head's product.
            gathered += module.embedding_dim
            seen.add(id(module.weight))
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if parameter.ndim < 2:
                others += parameter.numel()
            elif isinstance(module, nn.Linear | Conv1D):
                products += parameter.numel()
            else:
                problem = f"what a step costs is not known: {name}.{key} is no weight of a linear layer or a table"
                raise ModelError(problem, fix="Only models whose layers are dense are counted")
    return products, head, others, gathered


def step(counts: Counts, *, batch: int, tokens: int, past: float, dtype: str) -> Cost:
    """What one forward of a batch costs at least.

    Operations: 2 a weight of a product and token, as in Kaplan et al. (arXiv:2001.08361, 2.1), the head's for the last
    token of a row alone; and attention's products of queries with keys and of weights with values, 4 H D a layer and
    pair of query and key. A query meets the tokens before it and itself, so the pairs of a row are
    tokens x past + tokens (tokens + 1) / 2; the 4 B s^2 h of Narayanan et al. (arXiv:2104.04473, appendix) count the
    masked half too.

    Bytes: every weight of a product, the head, biases and norms once; the rows of the embedding that are gathered; the
    KV cache of the past read and that of the new tokens written. Activations may stay in caches and are not counted.

    Args:
        counts: of the model.
        batch: rows.
        tokens: new tokens of each row.
        past: tokens of each row in the cache already; an average may be a fraction.
        dtype: of weights and cache, one of WIDTHS.
    """
    moved = (
        counts.products
        + counts.head
        + counts.others
        + batch * tokens * counts.gathered
        + batch * counts.cached * (past + tokens)
    )
    pairs = tokens * past + tokens * (tokens + 1) / 2
    operations = 2 * batch * (tokens * counts.products + counts.head) + 4 * batch * counts.queries * pairs
    return Cost(bytes=float(WIDTHS[dtype] * moved), operations=float(operations))


def prefill(counts: Counts, *, batch: int, prompt: int, dtype: str) -> Cost:
    """Of the first forward of a batch."""
    return step(counts, batch=batch, tokens=prompt, past=0, dtype=dtype)


def decode(counts: Counts, *, batch: int, prompt: int, new: int, dtype: str) -> Cost:
    """Of a later forward, the mean over those that follow a prompt until there are ``new`` tokens, two at least.

    The steps have a past of prompt, prompt + 1, ... prompt + new - 2 tokens.
    """
    return step(counts, batch=batch, tokens=1, past=prompt + (new - 2) / 2, dtype=dtype)
