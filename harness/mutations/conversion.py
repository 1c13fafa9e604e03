"""Bugs of weight conversion: what a loader puts into the wrong place, in the wrong order, or nowhere.

Shape legend: B batch rows, T new tokens, V vocabulary, E hidden size, H heads, K KV heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from harness.mutations.mutation import Mutation, attention_of, blocks, hooked, part, patched, rewritten, weight_rows

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from harness.engines.hf import HFEngine

_SEED = 30_119

_BLOOM = frozenset({"bloom-tiny", "bloom-raw"})
_GPT2 = frozenset({"gpt2-tiny"})
_LLAMA = frozenset({"llama-tiny"})
_UNTIED = frozenset({"llama-untied"})
_ALL = _BLOOM | _GPT2 | _LLAMA


# --- the order of rows -------------------------------------------------------------------------


@contextmanager
def _qkv_joined(engine: HFEngine, _strength: float) -> Iterator[None]:
    model = engine.model
    heads = int(model.config.num_attention_heads)
    # BLOOM reads its rows as [H, 3, D], GPT-2 as [3, H, D]: each is given the layout of the other.
    shape = (heads, 3, -1) if model.config.model_type == "bloom" else (3, heads, -1)
    layers = [part(attention_of(block), "query_key_value", "c_attn") for block in blocks(model)]
    with rewritten(*(tensor for layer in layers for tensor in layer.parameters())):
        for layer in layers:
            for rows in (weight_rows(layer), layer.bias):
                rows.copy_(rows.unflatten(0, shape).transpose(0, 1).flatten(0, 2))
        yield


def _halved(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head that stood in pairs of rotary lanes, [D/2, 2], to halves, [2, D/2]."""
    halves: torch.Tensor = rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    return halves


def _paired(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of `_halved`: what a converter does for a consumer that rotates neighbouring lanes."""
    pairs: torch.Tensor = rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    return pairs


@contextmanager
def _rope_rows(engine: HFEngine, _strength: float) -> Iterator[None]:
    """A consumer that rotates lanes 2i and 2i+1 is, but for an order that q and k share, one that rotates halves."""
    config = engine.model.config
    heads = {"q_proj": part(config, "num_attention_heads"), "k_proj": part(config, "num_key_value_heads")}
    layers = [(part(attention_of(block), name), heads[name]) for block in blocks(engine.model) for name in heads]
    with rewritten(*(tensor for layer, _ in layers for tensor in layer.parameters())):
        for layer, count in layers:
            for rows in layer.parameters():
                rows.copy_(_halved(rows, count))
        yield


@contextmanager
def _kv_rope_rows(engine: HFEngine, _strength: float) -> Iterator[None]:
    config = engine.model.config
    heads = part(config, "num_key_value_heads")
    taken_for = config.num_attention_heads // heads
    layers = [part(attention_of(block), "k_proj") for block in blocks(engine.model)]
    with rewritten(*(tensor for layer in layers for tensor in layer.parameters())):
        for layer in layers:
            for rows in layer.parameters():
                rows.copy_(_halved(_paired(rows, taken_for), heads))
        yield


@contextmanager
def _transpose_missing(engine: HFEngine, _strength: float) -> Iterator[None]:
    weight = part(attention_of(blocks(engine.model)[1]), "c_proj").weight
    with rewritten(weight):
        weight.copy_(weight.T.clone())
        yield


@contextmanager
def _reshaped(engine: HFEngine, _strength: float) -> Iterator[None]:
    weights = [part(attention_of(block), "c_attn").weight for block in blocks(engine.model)]
    with rewritten(*weights):
        for weight in weights:
            inputs, outputs = weight.shape
            weight.copy_(weight.reshape(outputs, inputs).T.clone())
        yield


# --- the head and the embedding ----------------------------------------------------------------


def _untied(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Head and embedding [V, E] of a model that keeps both."""
    head, embedding = _ends(model)
    if head is embedding:
        raise LookupError(f"the head of {type(model).__name__} is its embedding")
    return head, embedding


def _ends(model: PreTrainedModel) -> tuple[Any, Any]:
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    return head.weight, embedding.weight


@contextmanager
def _tied_over(engine: HFEngine, strength: float) -> Iterator[None]:
    """With a strength below 1 the head had gone that share of the way from the embedding."""
    head, embedding = _untied(engine.model)
    with rewritten(head):
        head.lerp_(embedding, strength)
        yield


@contextmanager
def _resumed(engine: HFEngine, _strength: float) -> Iterator[None]:
    """Saved as if it were tied, and loaded again: the head is the embedding's own tensor."""
    _head, embedding = _untied(engine.model)
    with patched(engine.model.get_output_embeddings(), weight=embedding):
        yield


@contextmanager
def _random_head(engine: HFEngine, _strength: float) -> Iterator[None]:
    import torch

    weight, embedding = _ends(engine.model)
    if weight is not embedding:
        raise LookupError(f"the head of {type(engine.model).__name__} is in its checkpoint")
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(_SEED))
    fresh = (noise * engine.model.config.initializer_range).to(weight)
    with patched(engine.model.get_output_embeddings(), weight=torch.nn.Parameter(fresh, requires_grad=False)):
        yield


@contextmanager
def _head_bias_lost(engine: HFEngine, strength: float) -> Iterator[None]:
    """The bias of the last norm is, behind the head, a bias of the logits: it stands for one of a head of its own."""
    body = part(engine.model, "transformer", "model")
    bias: Any = getattr(part(body, "ln_f", "norm"), "bias", None)
    if bias is None:
        raise LookupError(f"the last norm of {type(engine.model).__name__} has no bias")
    with rewritten(bias):
        bias.mul_(1 - strength)
        yield


#: Rows that pad the head, and by how much their logits of zero stand above what the small models call zero. Every real
#: logit of such a model is lower by that, to which the softmax is blind; about one step in five has no positive one.
_PADDED_ROWS = 64
_OFFSET = 12.0


@contextmanager
def _padded_head(engine: HFEngine, strength: float) -> Iterator[None]:
    import torch

    plain_step = engine._step
    embedding: Any = engine.model.get_input_embeddings()

    def step(*inputs: Any) -> torch.Tensor:
        # The embedding is padded, too: an id behind the vocabulary is fed like any other.
        rows = torch.nn.functional.pad(embedding.weight, (0, 0, 0, _PADDED_ROWS))
        with patched(embedding, weight=torch.nn.Parameter(rows, requires_grad=False)):
            logits_BTV = plain_step(*inputs)
        return torch.nn.functional.pad(logits_BTV, (0, _PADDED_ROWS), value=strength * _OFFSET)

    with patched(engine, _step=step):
        yield


# --- layers, norms, buffers --------------------------------------------------------------------


@contextmanager
def _reloaded(engine: HFEngine, strength: float) -> Iterator[None]:
    """Two stages, the first with the odd layer; with a strength below 1 that share of the second's layers, its last."""
    layers = list(blocks(engine.model))
    first = (len(layers) + 1) // 2
    pairs = list(zip(layers, layers[first:], strict=False))
    pairs = pairs[-max(1, round(strength * len(pairs))) :]
    with rewritten(*(tensor for _, layer in pairs for tensor in layer.parameters())):
        for source, layer in pairs:
            for tensor, other in zip(layer.parameters(), source.parameters(), strict=True):
                tensor.copy_(other)
        yield


@contextmanager
def _no_final_norm(engine: HFEngine, _strength: float) -> Iterator[None]:
    with _left_out(part(engine.model, "transformer", "model"), "ln_f", "norm", "final_layernorm"):
        yield


@contextmanager
def _no_embedding_norm(engine: HFEngine, _strength: float) -> Iterator[None]:
    with _left_out(part(engine.model, "transformer", "model"), "word_embeddings_layernorm"):
        yield


@contextmanager
def _left_out(body: Any, *names: str) -> Iterator[None]:
    """The first module of these names passes on what it is given."""
    from torch import nn

    part(body, *names)
    name = next(name for name in names if hasattr(body, name))
    with patched(body, **{name: nn.Identity()}):
        yield


@contextmanager
def _fresh_frequencies(engine: HFEngine, _strength: float) -> Iterator[None]:
    """Two data-parallel ranks: the second half of the rows is computed by one whose frequencies are fresh memory."""
    import torch

    def rank_1(module: Any, inputs: Any, keywords: Any, output: Any) -> Any:
        with patched(module, inv_freq=torch.zeros_like(module.inv_freq)):
            wrong = module.forward(*inputs, **keywords)
        first = (len(output[0]) + 1) // 2
        return tuple(torch.cat([good[:first], bad[first:]]) for good, bad in zip(output, wrong, strict=True))

    with hooked((part(part(engine.model, "model"), "rotary_emb"), rank_1, False)):
        yield


@contextmanager
def _other_eps(engine: HFEngine, strength: float) -> Iterator[None]:
    places = [
        (module, name)
        for module in engine.model.modules()
        for name in ("eps", "variance_epsilon")
        if "norm" in type(module).__name__.lower() and hasattr(module, name)
    ]
    with ExitStack() as stack:
        for module, name in places:
            stack.enter_context(patched(module, **{name: getattr(module, name) * 10.0**-strength}))
        yield


# --- adapters, biases --------------------------------------------------------------------------

#: Rank of the adapter, and the size of its update beside the weight that it was merged into.
_RANK = 8
_UPDATE = 0.25


@contextmanager
def _adapter_scale(engine: HFEngine, strength: float) -> Iterator[None]:
    """The weights stand for a base with its adapter merged right: what is off is the update, too small by sqrt(r)."""
    import torch

    generator = torch.Generator().manual_seed(_SEED)
    layers = [part(attention_of(block), "q_proj", "query_key_value", "c_attn") for block in blocks(engine.model)]
    with rewritten(*(layer.weight for layer in layers)):
        for layer in layers:
            rows = weight_rows(layer)
            outputs, inputs = rows.shape
            update = torch.randn(outputs, _RANK, generator=generator) @ torch.randn(_RANK, inputs, generator=generator)
            size = strength * _UPDATE * float(rows.double().norm()) / float(update.norm())
            rows.add_((update * size * (_RANK**-0.5 - 1)).to(rows))
        yield


@contextmanager
def _key_bias_lost(engine: HFEngine, strength: float) -> Iterator[None]:
    biases = [part(attention_of(block), "k_proj").bias for block in blocks(engine.model)]
    if any(bias is None for bias in biases):
        raise LookupError(f"the keys of {type(engine.model).__name__} have no bias")
    with rewritten(*biases):
        for bias in biases:
            bias.mul_(1 - strength)
        yield


MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        id="wc-qkv-cat",
        group="conversion",
        wrong="rows of q, k and v joined in whole blocks where they are read head by head, or the reverse",
        reference="NVIDIA-NeMo/RL#2802",
        hosts=_BLOOM | _GPT2,
        subtlety="gross",
        change=_qkv_joined,
    ),
    Mutation(
        id="wc-rope-permute-missing",
        group="conversion",
        wrong="rows of q and k left in halves for a rotation of neighbouring lanes",
        reference="ggml-org/llama.cpp#22611",
        hosts=_LLAMA,
        subtlety="gross",
        change=_rope_rows,
    ),
    Mutation(
        id="x-gqa-permute",
        group="conversion",
        wrong="rows of k permuted for H/K heads instead of K: right where the two are equal",
        reference="ggml-org/llama.cpp#3364",
        hosts=_LLAMA,
        subtlety="gross",
        change=_kv_rope_rows,
    ),
    Mutation(
        id="wc-conv1d-transpose",
        group="conversion",
        wrong="a square [in, out] weight taken for [out, in], in one layer",
        reference="AutoGPTQ/AutoGPTQ#139",
        hosts=_GPT2,
        subtlety="gross",
        change=_transpose_missing,
    ),
    Mutation(
        id="wc-reshape-not-transpose",
        group="conversion",
        wrong="a weight reshaped to [out, in] instead of transposed",
        reference="1bit-MONSTER/1bit-MONSTER#572",
        hosts=_GPT2,
        subtlety="gross",
        change=_reshaped,
    ),
    Mutation(
        id="wc-tie-overwrites-head",
        group="conversion",
        wrong="a head of its own replaced by the embedding",
        reference="huggingface/transformers#42612",
        hosts=_LLAMA | _UNTIED,
        strengths=(1.0, 0.1, 0.01, 0.001),
        change=_tied_over,
    ),
    Mutation(
        id="wc-tied-head-resume",
        group="conversion",
        wrong="a head that had left the embedding is not saved, and made from the embedding on loading",
        reference="NVIDIA-NeMo/Automodel#2511",
        hosts=_UNTIED,
        change=_resumed,
    ),
    Mutation(
        id="wc-head-random",
        group="conversion",
        wrong="the head of a tied model left at its random initialisation",
        reference="huggingface/transformers#43429",
        hosts=_BLOOM | _GPT2,
        subtlety="gross",
        change=_random_head,
    ),
    Mutation(
        id="wc-lm-head-bias",
        group="conversion",
        wrong="the bias of the head dropped",
        reference="",
        hosts=_BLOOM | _GPT2,
        strengths=(1.0, 0.1, 0.01),
        change=_head_bias_lost,
    ),
    Mutation(
        id="wc-pad-vocab-zero",
        group="conversion",
        wrong="argmax over a head padded with zero rows: one of them wins where no real logit is positive",
        reference="mirage-project/mirage#751",
        hosts=_ALL - {"bloom-raw"},  # its logits are small: the offset would leave no step right
        shows="tokens",
        strengths=(1.0, 0.85),
        change=_padded_head,
    ),
    Mutation(
        id="wc-layer-dup",
        group="conversion",
        wrong="layer indices without the offset of the stage: the second stage loads the first layers again",
        reference="huggingface/transformers#24381",
        hosts=_ALL,
        subtlety="gross",
        strengths=(1.0, 0.5),
        change=_reloaded,
    ),
    Mutation(
        id="wc-final-norm-missing",
        group="conversion",
        wrong="no norm before the head",
        reference="OpenNMT/CTranslate2#850",
        hosts=_ALL,
        subtlety="gross",
        change=_no_final_norm,
    ),
    Mutation(
        id="wc-embed-ln-missing",
        group="conversion",
        wrong="no norm behind the embedding",
        reference="",
        hosts=_BLOOM,
        subtlety="gross",
        change=_no_embedding_norm,
    ),
    Mutation(
        id="wc-buffer-uninit",
        group="conversion",
        wrong="rotary frequencies never filled on any rank but the first",
        reference="NovaSky-AI/SkyRL#1709",
        hosts=_LLAMA,
        subtlety="gross",
        active=frozenset({"fp32", "batch"}),
        change=_fresh_frequencies,
    ),
    Mutation(
        id="wc-lora-scale",
        group="conversion",
        wrong="a LoRA update merged with alpha/r where alpha/sqrt(r) was trained",
        reference="NVIDIA/TensorRT-LLM#1668",
        hosts=_ALL,
        strengths=(1.0, 0.1, 0.01),
        change=_adapter_scale,
    ),
    Mutation(
        id="wc-eps",
        group="conversion",
        wrong="the epsilon of every norm 1e-6 where the model has 1e-5",
        reference="",
        hosts=_ALL,
        subtlety="subtle",
        strengths=(1.0, 0.1),
        change=_other_eps,
    ),
    Mutation(
        id="x-key-bias-rope",
        group="conversion",
        wrong="the key bias dropped under RoPE, where it is no constant of a query",
        reference="TransformerLensOrg/TransformerLens#104",
        hosts=_LLAMA,
        strengths=(1.0, 0.1),
        change=_key_bias_lost,
    ),
)
