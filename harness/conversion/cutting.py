"""A tensor and the parts of it that tensor-parallel ranks hold.

Sources: megatron/mpu/layers.py (cuts) and `_vocab_size_with_padding` of megatron/tokenizer/tokenizer.py (padding),
both of bigscience-workshop/Megatron-DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from harness.conversion.names import Cut

if TYPE_CHECKING:
    from torch import Tensor


def join(parts: Sequence[Tensor], cut: Cut) -> Tensor:
    """The whole of what the ranks hold, in the order of the ranks; of a replicated tensor what rank 0 holds."""
    import torch

    if cut is Cut.REPLICATED or len(parts) == 1:
        return parts[0]
    return torch.cat(list(parts), dim=cut.value)


def part_of(whole: Tensor, cut: Cut, rank: int, ranks: int) -> Tensor:
    """What one rank holds, in memory of its own, so that a file of it holds nothing else."""
    if cut is Cut.REPLICATED:
        return whole.clone()
    size = whole.shape[cut.value] // ranks
    return whole.narrow(cut.value, rank * size, size).clone()


def padded_size(vocabulary: int, multiple: int, ranks: int) -> int:
    """The rows of an embedding that ranks can share: the next multiple of ``multiple`` times their number."""
    step = multiple * ranks
    return -(-vocabulary // step) * step


def padded(embedding_VE: Tensor, rows: int) -> Tensor:
    """The embedding with rows of zeros behind it."""
    if rows == len(embedding_VE):
        return embedding_VE
    import torch

    return torch.cat([embedding_VE, embedding_VE.new_zeros(rows - len(embedding_VE), embedding_VE.shape[1])])


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype are equal in shape and to the bit: NaN is NaN, and 0 is not -0."""
    import torch

    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def furthest(parts: Sequence[Tensor]) -> float:
    """The largest distance of an element of any part from that of the first, in float64; NaN where one is NaN."""
    import torch

    first = parts[0].double()
    return float(torch.stack([(part.double() - first).abs().max() for part in parts]).max())


def mean(parts: Sequence[Tensor]) -> Tensor:
    """The mean over ranks, summed in float32 and rounded once, in the dtype of the parts."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return (total / len(parts)).to(parts[0].dtype)
