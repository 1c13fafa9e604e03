"""What a tensor of the checkpoint may be held as: after the declared cast, in the dtype in which it is held."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.numerics.quantise import SCHEMES, dequantised

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Casts:
    """All values that are right.

    Attributes:
        declared: how the candidate says that it stores its weights: a dtype, or one of `quantise.SCHEMES`; None: in the
            dtype in which they are.
        config: the checkpoint's.
    """

    declared: str | None
    config: Mapping[str, Any]

    def __call__(self, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
        """A tensor of this name in a dtype; under a quantiser, which leaves out what it likes, with it and without."""
        import torch

        declared = self.declared
        if declared is not None and declared in SCHEMES:
            dim = input_dim(name, self.config)
            quantised = [dequantised(tensor, declared, input_dim=dim).to(dtype)] if tensor.ndim == 2 else []
            return [tensor.to(dtype), *quantised]
        if declared is not None and tensor.is_floating_point():
            shorter = getattr(torch, declared, None)
            tensor = tensor.to(shorter) if isinstance(shorter, torch.dtype) else tensor
        return [tensor.to(dtype)]


def input_dim(name: str, config: Mapping[str, Any]) -> int:
    """The dimension that is summed over: a Conv1D keeps [in, out]."""
    return 0 if config.get("model_type") == "gpt2" and ".h." in f".{name}" else 1
