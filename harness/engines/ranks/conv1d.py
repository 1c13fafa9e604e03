"""Tensor-parallel styles of GPT-2's Conv1D, a linear layer with weight [in, out], for transformers' registry.

Imported only where transformers has the registry. Shape legend: B batch rows, T tokens, E inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from transformers.distributed.tensor_parallel import TensorParallelLayer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class _Conv1D(TensorParallelLayer):
    """A weight and a bias with a placement each; the forward computes with this rank's parts of them."""

    def __init__(self, weight: Any, bias: Any, forward: Callable[[Any, Any, Any], Any]) -> None:
        self._placements = {"weight": weight, "bias": bias}
        self._forward = forward

    def shard_param(self, module: Any, param: str, mesh: DeviceMesh) -> None:
        meta = module._parameters[param]
        placed = distribute_tensor(meta, mesh, [self._placements[param]], src_data_rank=None)
        module._parameters[param] = nn.Parameter(placed, requires_grad=meta.requires_grad)

    def install_forward(self, module: Any, mesh: DeviceMesh) -> Any:
        module.forward = lambda x: self._forward(x, module, mesh)
        return module


def _local(tensor: Any) -> torch.Tensor:
    found: torch.Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return found


def _column(x_BTE: torch.Tensor, module: Any, _mesh: DeviceMesh) -> torch.Tensor:
    weight_EN = _local(module.weight)
    output = torch.addmm(_local(module.bias), x_BTE.reshape(-1, x_BTE.shape[-1]), weight_EN)
    return output.view(*x_BTE.shape[:-1], weight_EN.shape[1])


def _row(x_BTE: torch.Tensor, module: Any, mesh: DeviceMesh) -> torch.Tensor:
    """Partial products summed over the ranks, then the bias once."""
    total = torch.mm(x_BTE.reshape(-1, x_BTE.shape[-1]), _local(module.weight))
    dist.all_reduce(total, group=mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp"))
    return (total + _local(module.bias)).view(*x_BTE.shape[:-1], total.shape[1])


#: By the name under which plans.py asks for it.
STYLES: Mapping[str, TensorParallelLayer] = {
    "conv1d_colwise": _Conv1D(Shard(1), Shard(0), _column),
    "conv1d_colwise_qkv": _Conv1D(_StridedShard(1, split_factor=3), _StridedShard(0, split_factor=3), _column),
    "conv1d_rowwise": _Conv1D(Shard(0), Replicate(), _row),
}
