"""Bugs of norms, activations and the residual stream.

Shape legend: B batch rows, T new tokens, E hidden size, F inner size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from harness.mutations.mutation import Mutation, blocks, hooked, part, patched, rewritten

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from harness.engines.hf import HFEngine

_BLOOM = frozenset({"bloom-tiny", "bloom-raw"})
_GPT2 = frozenset({"gpt2-tiny"})
_LLAMA = frozenset({"llama-tiny"})
_SOFTCAP = frozenset({"gemma2-softcap"})


# --- activations, the final cap ----------------------------------------------------------------


@contextmanager
def _exact_gelu(engine: HFEngine, _strength: float) -> Iterator[None]:
    if engine.model.config.model_type not in ("bloom", "gpt2"):
        raise LookupError(f"{type(engine.model).__name__} has no tanh GELU")
    with _activation(engine.model, "gelu_impl", "act"):
        yield


@contextmanager
def _gelu_gate(engine: HFEngine, _strength: float) -> Iterator[None]:
    with _activation(engine.model, "act_fn"):
        yield


@contextmanager
def _activation(model: PreTrainedModel, *names: str) -> Iterator[None]:
    """The exact GELU as the activation of every MLP, which has it under one of these names."""
    from torch import nn

    with ExitStack() as stack:
        for block in blocks(model):
            part(block.mlp, *names)
            name = next(name for name in names if hasattr(block.mlp, name))
            stack.enter_context(patched(block.mlp, **{name: nn.GELU()}))
        yield


@contextmanager
def _no_final_cap(engine: HFEngine, strength: float) -> Iterator[None]:
    """With a strength below 1 the cap is there, and larger."""
    config = engine.model.config
    cap = getattr(config, "final_logit_softcapping", None)
    if cap is None:
        raise LookupError(f"the logits of {type(engine.model).__name__} have no cap")
    with patched(config, final_logit_softcapping=None if strength >= 1 else cap / (1 - strength)):
        yield


# --- norms -------------------------------------------------------------------------------------


def _norms(model: PreTrainedModel) -> list[nn.Module]:
    """Every LayerNorm and RMSNorm."""
    return [module for module in model.modules() if _eps_of(module) is not None]


def _layer_norms(model: PreTrainedModel) -> list[nn.Module]:
    from torch import nn

    found: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    if not found:
        raise LookupError(f"{type(model).__name__} has no LayerNorm")
    return found


def _eps_of(module: Any) -> float | None:
    if "norm" not in type(module).__name__.lower():
        return None
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


@contextmanager
def _one_plus_weight(engine: HFEngine, _strength: float) -> Iterator[None]:
    """A model that multiplies by its norm weight gets 1 + weight; Gemma, which means 1 + weight, the weight alone."""
    shift = -1.0 if engine.model.config.model_type.startswith("gemma") else 1.0
    weights: list[Any] = [module.weight for module in engine.model.modules() if "RMSNorm" in type(module).__name__]
    if not weights:
        raise LookupError(f"{type(engine.model).__name__} has no RMSNorm")
    with rewritten(*weights):
        for weight in weights:
            weight.add_(shift)
        yield


@contextmanager
def _forwards(modules: Sequence[nn.Module], forward: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Another forward for each of these modules, which it gets before its input."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(patched(module, forward=partial(forward, module)))
        yield


def _wide(x: torch.Tensor) -> torch.Tensor:
    """In float32, or in float64 where it is that already: what norms compute in."""
    import torch

    return x.to(torch.promote_types(x.dtype, torch.float32))


@contextmanager
def _eps_outside(engine: HFEngine, _strength: float) -> Iterator[None]:
    with _forwards(_norms(engine.model), _norm_eps_outside):
        yield


def _norm_eps_outside(module: Any, x: torch.Tensor) -> torch.Tensor:
    import torch

    wide, eps = _wide(x), _eps_of(module)
    assert eps is not None
    if not isinstance(module, torch.nn.LayerNorm):
        normed = wide / (wide.square().mean(dim=-1, keepdim=True).sqrt() + eps)
        weight: torch.Tensor = module.weight
        return weight * normed.to(x.dtype)
    centred = wide - wide.mean(dim=-1, keepdim=True)
    return _weighted(module, centred / (centred.square().mean(dim=-1, keepdim=True).sqrt() + eps)).to(x.dtype)


def _weighted(module: nn.Module, normed: torch.Tensor) -> torch.Tensor:
    return normed * _wide(module.get_parameter("weight")) + _wide(module.get_parameter("bias"))


@contextmanager
def _unbiased(engine: HFEngine, _strength: float) -> Iterator[None]:
    with _forwards(_layer_norms(engine.model), _unbiased_norm):
        yield


def _unbiased_norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    import torch

    variance, mean = torch.var_mean(_wide(x), dim=-1, correction=1, keepdim=True)
    return _weighted(module, (_wide(x) - mean) * (variance + module.eps).rsqrt()).to(x.dtype)


@contextmanager
def _mean_kept(engine: HFEngine, _strength: float) -> Iterator[None]:
    with _forwards(_layer_norms(engine.model), _norm_without_mean):
        yield


def _norm_without_mean(module: Any, x: torch.Tensor) -> torch.Tensor:
    wide = _wide(x)
    return _weighted(module, wide * (wide.square().mean(dim=-1, keepdim=True) + module.eps).rsqrt()).to(x.dtype)


# --- the residual stream -----------------------------------------------------------------------


@contextmanager
def _residual_missing(engine: HFEngine, _strength: float) -> Iterator[None]:
    """Around the MLP of the second block."""
    block = blocks(engine.model)[1]
    if engine.model.config.model_type == "bloom":
        with hooked((block.mlp, _no_residual, True)):
            yield
        return
    outputs: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, _keywords: Any, output: torch.Tensor) -> None:
        outputs[:] = [output]

    def alone(_module: Any, _inputs: Any, _keywords: Any, output: Any) -> Any:
        # GPT-2's block returned a tuple before transformers 5.
        return (outputs.pop(), *output[1:]) if isinstance(output, tuple) else outputs.pop()

    with hooked((block.mlp, keep, False), (block, alone, False)):
        yield


def _no_residual(_module: Any, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """BLOOM's MLP is given the residual, its second input, and adds it."""
    hidden, residual = inputs
    return (hidden, residual.new_zeros(residual.shape)), keywords


@contextmanager
def _residual_after_norm(engine: HFEngine, _strength: float) -> Iterator[None]:
    name = "apply_residual_connection_post_layernorm"
    with ExitStack() as stack:
        for block in blocks(engine.model):
            stack.enter_context(patched(block, **{name: not part(block, name)}))
        yield


MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        id="na-gelu",
        group="norms",
        wrong="the exact (erf) GELU for its tanh form",
        reference="vllm-project/vllm#3411",
        hosts=_BLOOM | _GPT2,
        subtlety="subtle",
        change=_exact_gelu,
    ),
    Mutation(
        id="na-silu-for-gelu",
        group="norms",
        wrong="the gate of the MLP through GELU instead of SiLU",
        reference="NVIDIA/TensorRT-Model-Connect#177",
        hosts=_LLAMA,
        subtlety="gross",
        change=_gelu_gate,
    ),
    Mutation(
        id="na-one-plus-w",
        group="norms",
        wrong="norms multiply by 1 + weight where the model means weight, or the reverse",
        reference="linkedin/Liger-Kernel#74",
        hosts=_LLAMA | _SOFTCAP,
        subtlety="gross",
        change=_one_plus_weight,
    ),
    Mutation(
        id="na-final-softcap",
        group="norms",
        wrong="the cap of the final logits left out: no argmax changes",
        reference="",
        hosts=_SOFTCAP,
        subtlety="subtle",
        strengths=(1.0, 0.5, 0.1),
        change=_no_final_cap,
    ),
    Mutation(
        id="x-eps-outside",
        group="norms",
        wrong="norms add epsilon to the standard deviation instead of the variance",
        reference="",
        hosts=_BLOOM | _GPT2 | _LLAMA,
        subtlety="subtle",
        change=_eps_outside,
    ),
    Mutation(
        id="x-variance-unbiased",
        group="norms",
        wrong="LayerNorm divides the sum of squares by E - 1",
        reference="",
        hosts=_BLOOM | _GPT2,
        subtlety="subtle",
        change=_unbiased,
    ),
    Mutation(
        id="x-mean-kept",
        group="norms",
        wrong="RMSNorm for LayerNorm: the mean is not taken out",
        reference="",
        hosts=_BLOOM | _GPT2,
        change=_mean_kept,
    ),
    Mutation(
        id="x-residual-missing",
        group="norms",
        wrong="no residual around the MLP of one block",
        reference="",
        hosts=_BLOOM | _GPT2 | _LLAMA,
        subtlety="gross",
        change=_residual_missing,
    ),
    Mutation(
        id="x-residual-after-norm",
        group="norms",
        wrong="the residual taken behind the norm instead of before it",
        reference="",
        hosts=_BLOOM,
        subtlety="gross",
        change=_residual_after_norm,
    ),
)
