"""Negative controls: changes that were taken for bugs and compute the same function. None may be flagged.

Of those in the catalogue two are families of `benign`: other batch shapes are ``batch-1``, and sums in another order
``ranks-2``, ``ranks-4`` and ``permuted``.

Shape legend: B batch rows, T new tokens, S tokens so far, H heads, D head size, E hidden size, N rows of logits,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from harness.engines import decoding
from harness.mutations.mutation import Mutation, attention_of, blocks, hooked, part, patched, rewritten
from harness.numerics.sketch import Sketcher

if TYPE_CHECKING:
    import torch
    from torch import nn

    from harness.engines.hf import HFEngine
    from harness.values import Request

_BLOOM = frozenset({"bloom-tiny", "bloom-raw"})
_GPT2 = frozenset({"gpt2-tiny"})
_LLAMA = frozenset({"llama-tiny"})


@contextmanager
def _forwards(*pairs: tuple[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Another forward for each module, which it gets before its inputs."""
    with ExitStack() as stack:
        for module, forward in pairs:
            stack.enter_context(patched(module, forward=partial(forward, module)))
        yield


# --- ALiBi: whatever is equal for all keys of a query, the softmax takes out ------------------------


@contextmanager
def _alibi_shifted(engine: HFEngine, _strength: float) -> Iterator[None]:
    """The bias of a key counts back from its query, slope * (k - q), instead of up from the first token.

    Counting from the newest token of a prompt, or the column of a key with its padding, is the same function too; but
    then biases are larger than BLOOM's own, and in 16 bits their round-off is.
    """
    import torch

    body = part(engine.model, "transformer")
    plain = part(body, "build_alibi_tensor")
    new: list[int] = []

    def count(_module: Any, inputs: Any, keywords: Any) -> None:
        ids_BT = inputs[0] if inputs else keywords["input_ids"]
        new[:] = [ids_BT.shape[1]]

    def build(mask_BS: torch.Tensor, heads: int, dtype: torch.dtype) -> torch.Tensor:
        # [B * H, 1, S]; slopes are positive, so that the newest token has the largest bias of a row.
        alibi = plain(mask_BS, heads, torch.float32)
        slope = plain(mask_BS.new_ones((len(mask_BS), 2)), heads, torch.float32)[..., 1:]
        back = torch.arange(1 - new[0], 1, device=alibi.device)[:, None]
        of_query = alibi.amax(dim=-1, keepdim=True) + slope * back
        real = mask_BS.repeat_interleave(heads, dim=0)[:, None, :]
        shifted: torch.Tensor = (alibi - of_query) * real
        return shifted.to(dtype)

    with hooked((body, count, True)), patched(body, build_alibi_tensor=build):
        yield


# --- attention ---------------------------------------------------------------------------------


@contextmanager
def _no_key_bias(engine: HFEngine, _strength: float) -> Iterator[None]:
    """Without RoPE the bias of the keys gives all scores of a query the same."""
    config = engine.model.config
    heads = int(config.num_attention_heads)
    layers = [part(attention_of(block), "query_key_value", "c_attn") for block in blocks(engine.model)]
    with rewritten(*(layer.bias for layer in layers)):
        for layer in layers:
            if config.model_type == "bloom":
                layer.bias.unflatten(0, (heads, 3, -1))[:, 1] = 0
            else:
                layer.bias.unflatten(0, (3, heads, -1))[1] = 0
        yield


@contextmanager
def _scaled_by_layer(engine: HFEngine, _strength: float) -> Iterator[None]:
    pairs = [(part(block, "self_attention"), _bloom_by_layer) for block in blocks(engine.model)]
    with _forwards(*pairs):
        yield


def _bloom_by_layer(
    module: Any,
    hidden_BTE: torch.Tensor,
    residual_BTE: torch.Tensor,
    alibi: torch.Tensor,
    attention_mask: torch.Tensor | None,
    layer_past: Any = None,
    **_others: Any,
) -> tuple[torch.Tensor, None]:
    """Scores over the number of the layer until the softmax, which is in float32 and has them times it."""
    import torch

    query_BHTD, key_BHSD, value_BHSD = module._reshape(module.query_key_value(hidden_BTE))
    if layer_past is not None:
        key_BHSD, value_BHSD = layer_past.update(key_BHSD, value_BHSD, module.layer_idx)
    number = module.layer_idx + 1
    scores = alibi.to(query_BHTD.dtype).baddbmm(
        query_BHTD.flatten(0, 1),
        key_BHSD.flatten(0, 1).transpose(-1, -2),
        beta=1 / number,
        alpha=module.inv_norm_factor / number,
    )
    scores_BHTS = scores.unflatten(0, (-1, module.num_heads)).to(torch.float32) * number
    if attention_mask is not None:
        scores_BHTS = scores_BHTS + attention_mask
    weights_BHTS = torch.softmax(scores_BHTS, dim=-1).to(query_BHTD.dtype)
    mixed_BTE = (weights_BHTS @ value_BHSD).transpose(1, 2).flatten(2)
    return residual_BTE + module.dense(mixed_BTE), None


# --- activations, norms ------------------------------------------------------------------------


@contextmanager
def _other_gelu(engine: HFEngine, _strength: float) -> Iterator[None]:
    if engine.model.config.model_type == "bloom":
        pairs = [(part(block.mlp, "gelu_impl"), _gelu_expanded) for block in blocks(engine.model)]
    elif engine.model.config.model_type == "gpt2":
        pairs = [(part(block.mlp, "act"), _gelu_factored) for block in blocks(engine.model)]
    else:
        raise LookupError(f"{type(engine.model).__name__} has no tanh GELU")
    with _forwards(*pairs):
        yield


#: sqrt(2 / pi), and as BLOOM has it.
_ROOT = 0.7978845608028654
_BLOOM_ROOT = 0.79788456


def _gelu_factored(_module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    import torch

    return x * 0.5 * (1.0 + torch.tanh(_ROOT * x * (1.0 + 0.044715 * x * x)))


def _gelu_expanded(_module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """BLOOM's own is the factored one."""
    import torch

    return 0.5 * x * (1.0 + torch.tanh(_BLOOM_ROOT * (x + 0.044715 * x.pow(3))))


@contextmanager
def _normed_twice(engine: HFEngine, _strength: float) -> Iterator[None]:
    norms = [module for module in engine.model.modules() if hasattr(module, "variance_epsilon")]
    if not norms:
        raise LookupError(f"{type(engine.model).__name__} has no RMSNorm")
    with _forwards(*((module, _rms_norm_twice) for module in norms)):
        yield


def _rms_norm_twice(module: Any, x: torch.Tensor) -> torch.Tensor:
    """The second pass divides by 1: epsilon, too, is in units of what comes in."""
    import torch

    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    eps: Any = module.variance_epsilon
    for _ in range(2):
        scale = (wide.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
        wide, eps = wide * scale, eps * scale.square()
    result: torch.Tensor = module.weight * wide.to(x.dtype)
    return result


# --- speculative decoding ----------------------------------------------------------------------

_DRAFT = 4


class _Generated(Sketcher):
    """Passes on the positions that are generated, as a replay shows them."""

    def __init__(self, sketcher: Sketcher) -> None:
        super().__init__(sketcher.vocabulary, fingerprints=sketcher.fingerprints)
        self._sketcher = sketcher

    def add(self, logits_NV: Any, next_ids_N: Any, *, request: Any, position: Any, generated: Any) -> None:
        import torch

        if generated.any():
            rows = torch.from_numpy(generated.nonzero()[0]).to(logits_NV.device)
            self._sketcher.add(
                logits_NV[rows],
                next_ids_N[rows],
                request=request[generated],
                position=position[generated],
                generated=generated[generated],
            )


@contextmanager
def _draft_width(engine: HFEngine, _strength: float) -> Iterator[None]:
    """A replay whose steps are as wide as those that verify a draft, which is always right."""

    def replay(
        requests: Sequence[Request],
        continuations: Sequence[Sequence[int]],
        *,
        batch_size: int | None,
        sketcher: Sketcher,
    ) -> None:
        size = engine._batch(batch_size)
        decoding.teacher_forced(
            engine.decoder, requests, continuations, batch_size=size, sketcher=_Generated(sketcher), chunk=_DRAFT
        )

    with patched(engine, replay=replay):
        yield


MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        id="ok-alibi-shift",
        group="positions",
        wrong="ALiBi counted back from the query instead of up from the first token",
        reference="vllm-project/vllm#945",
        hosts=_BLOOM,
        harmless=True,
        change=_alibi_shifted,
    ),
    Mutation(
        id="ok-key-bias",
        group="attention",
        wrong="the key bias dropped where there is no RoPE",
        reference="TransformerLensOrg/TransformerLens#104",
        hosts=_BLOOM | _GPT2,
        harmless=True,
        change=_no_key_bias,
    ),
    Mutation(
        id="ok-qk-layer-scaling",
        group="attention",
        wrong="scores divided by the number of the layer, and multiplied by it before the softmax",
        reference="NVIDIA/Megatron-LM#279",
        hosts=_BLOOM,
        harmless=True,
        change=_scaled_by_layer,
    ),
    Mutation(
        id="ok-gelu-factored",
        group="norms",
        wrong="the tanh GELU with x taken out of its cubic, or put into it where it was taken out",
        reference="deepspeedai/Megatron-DeepSpeed#84",
        hosts=_BLOOM | _GPT2,
        harmless=True,
        change=_other_gelu,
    ),
    Mutation(
        id="ok-norm-twice",
        group="norms",
        wrong="RMSNorm without its weight applied twice",
        reference="ggml-org/llama.cpp#1925",
        hosts=_LLAMA,
        harmless=True,
        change=_normed_twice,
    ),
    Mutation(
        id="ok-spec-near-tie",
        group="serving",
        wrong="four tokens a step, as when a draft is verified",
        reference="huggingface/transformers#39421",
        hosts=_BLOOM | _GPT2 | _LLAMA,
        harmless=True,
        change=_draft_width,
    ),
)
