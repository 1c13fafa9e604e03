"""What any engine asks of a live nn.Module: its dtypes, evaluation mode for a while, and to be widened."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

    Module = TypeVar("Module", bound=torch.nn.Module)


@contextmanager
def in_evaluation(module: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode; each submodule is put back by itself, since a frozen part of a model in training was in it."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype as users write it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def dtypes(tensors: Iterable[torch.Tensor]) -> str:
    """The dtype of the floating tensors: "float32", "bfloat16+float32" where they differ, "none" without any."""
    return common(dtype_name(tensor.dtype) for tensor in tensors if tensor.is_floating_point())


def common(words: Iterable[str]) -> str:
    """The one word, all of them joined by "+" where they differ, "none" without any."""
    return "+".join(sorted(set(words))) or "none"


def recast(module: Module, dtype: torch.dtype) -> Module:
    """Convert weights and buffers to ``dtype`` in place, tensor by tensor; what was rounded stays rounded."""
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return module
