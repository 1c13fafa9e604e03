"""What a model on CUDA asks of its process: products without TF32, deterministic algorithms, a graph for each shape."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

#: Workspaces with which cuBLAS promises the same bits (its manual, "Results Reproducibility").
_WORKSPACE = ":4096:8"


@contextmanager
def flags(*, tf32: bool, deterministic: bool) -> Iterator[None]:
    """Set what float32 products and kernels with atomic sums may do, and put it back.

    Args:
        tf32: whether products of float32 may round their factors to 10 bits of mantissa.
        deterministic: whether only algorithms run that give the same bits each time; torch raises where it has none.
    """
    import torch

    if deterministic:
        # Read when cuBLAS starts, so it cannot be put back.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", _WORKSPACE)
    precision = torch.get_float32_matmul_precision()
    convolutions = torch.backends.cudnn.allow_tf32
    strict = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    torch.use_deterministic_algorithms(deterministic)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warn_only)
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(precision)


def in_force() -> dict[str, Any]:
    """The flags as torch has them."""
    import torch

    return {
        "tf32": torch.get_float32_matmul_precision() != "highest",
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
    }


def graphed(model: PreTrainedModel) -> Callable[..., Any]:
    """The model's forward, compiled and replayed as a CUDA graph for each shape of its input."""
    import torch

    compiled = torch.compile(model, mode="reduce-overhead", dynamic=False)

    def forward(**arguments: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(**arguments)

    return forward


def kept(logits_BTV: torch.Tensor) -> torch.Tensor:
    """Logits that outlive the next step, which a graph writes to the same place."""
    return logits_BTV.clone()


def graphs_ran() -> bool:
    """Whether something was compiled, and none of it was left out of the graphs."""
    import torch._dynamo

    counters = torch._dynamo.utils.counters
    return bool(counters["stats"]["unique_graphs"]) and not counters["inductor"]["cudagraph_skips"]
