"""Bugs of quantised weights: codes, zero points and scales that are read otherwise than they were written.

The model under test stands for one that is quantised, its weights for what its codes and scales rightly give. So a
mutation adds to each weight what the wrong reading gives more than the right one, and no loss by quantising beside it,
which would be found for itself. With weights on the grid of int4 already (``weights=int4``) that is the whole story.

Shape legend: O outputs, I inputs, G groups of inputs that share a scale, C codes of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from harness.engines.hf import block_layers
from harness.mutations.mutation import Mutation, attention_of, blocks, part, rewritten, weight_rows

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from harness.engines.hf import HFEngine

_SEED = 77_003

_BLOOM = frozenset({"bloom-tiny", "bloom-raw"})
_GPT2 = frozenset({"gpt2-tiny"})
_LLAMA = frozenset({"llama-tiny"})
_ALL = _BLOOM | _GPT2 | _LLAMA

#: From the weight [O, I] of a layer, float32, with the strength and the layer's number, to what the bug adds to it.
Error = Callable[["torch.Tensor", float, int], "torch.Tensor"]


def _every_layer(model: PreTrainedModel) -> list[nn.Module]:
    return [layer for _, layer, _ in block_layers(model)]


def _added(error: Error, find: Callable[[PreTrainedModel], Sequence[nn.Module]] = _every_layer) -> Any:
    """A change that adds the error of a bug to the weights of the layers that are found."""

    @contextmanager
    def change(engine: HFEngine, strength: float) -> Iterator[None]:
        layers = find(engine.model)
        with rewritten(*(layer.get_parameter("weight") for layer in layers)):
            for number, layer in enumerate(layers):
                _add(weight_rows(layer), error(weight_rows(layer).float(), strength, number))
            yield

    return change


def _add(rows: torch.Tensor, error: torch.Tensor) -> None:
    """In float64, then rounded to the model's own dtype once."""
    rows.copy_(rows.double() + error.double())


# --- int4: groups of 32 inputs, codes -7 to 7, stored with 8 added -----------------------

_GROUP = 32
#: Codes in a 32-bit word, once each has a byte of its own.
_LANES = 4


def _int4(rows_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [O, G, C], padded with zeros, and scales [O, G, 1]."""
    import torch

    groups_OGC = torch.nn.functional.pad(rows_OI, (0, -rows_OI.shape[1] % _GROUP)).unflatten(1, (-1, _GROUP))
    scale_OG1 = groups_OGC.abs().amax(dim=-1, keepdim=True) / 7
    codes_OGC = (groups_OGC / torch.where(scale_OG1 == 0, 1.0, scale_OG1)).round()
    return codes_OGC, scale_OG1


def _steps(codes_OGC: torch.Tensor, scale_OG1: torch.Tensor, inputs: int) -> torch.Tensor:
    """Codes times scales as a weight [O, I]."""
    return (codes_OGC * scale_OG1).flatten(1)[:, :inputs]


def _zero_plus_one(rows_OI: torch.Tensor, _strength: float, _number: int) -> torch.Tensor:
    import torch

    codes_OGC, scale_OG1 = _int4(rows_OI)
    return _steps(torch.full_like(codes_OGC, -1.0), scale_OG1, rows_OI.shape[1])


def _junk_zero(rows_OI: torch.Tensor, _strength: float, number: int) -> torch.Tensor:
    """What lies where a symmetric layer has no zero points: any four bits, for each output and group."""
    import torch

    codes_OGC, scale_OG1 = _int4(rows_OI)
    generator = torch.Generator().manual_seed(_SEED + number)
    junk_OG1 = torch.randint(0, 16, scale_OG1.shape, generator=generator).to(scale_OG1) - 8
    return _steps(-junk_OG1.expand_as(codes_OGC), scale_OG1, rows_OI.shape[1])


def _borrowed(rows_OI: torch.Tensor, strength: float, number: int) -> torch.Tensor:
    """8 is taken from the bytes of a word by one subtraction: one that ends below zero borrows from the next.

    The strength is the share of words to which that happens.
    """
    import torch

    codes_OGC, scale_OG1 = _int4(rows_OI)
    lanes = codes_OGC.unflatten(-1, (-1, _LANES))
    borrow = torch.zeros_like(lanes)
    for lane in range(1, _LANES):
        borrow[..., lane] = ((lanes[..., lane - 1] - borrow[..., lane - 1]) < 0).to(borrow)
    generator = torch.Generator().manual_seed(_SEED + number)
    hit = torch.rand((*lanes.shape[:-1], 1), generator=generator).to(lanes.device) < strength
    return _steps(-(borrow * hit).flatten(-2), scale_OG1, rows_OI.shape[1])


def _one_output(model: PreTrainedModel) -> list[nn.Module]:
    """The layer behind the attention of the second block."""
    return [part(attention_of(blocks(model)[1]), "o_proj", "dense", "c_proj")]


# --- fp8: one scale for a tensor -------------------------------------------------------------------

_LARGEST_E4M3 = 448.0
_NARROWER = 16.0


def _fp8(rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    import torch

    codes = (rows / scale).clamp(-_LARGEST_E4M3, _LARGEST_E4M3).to(torch.float8_e4m3fn)
    return codes.to(torch.float32) * scale


@contextmanager
def _shared_scale(engine: HFEngine, strength: float) -> Iterator[None]:
    """The first part's range is as if 16 times smaller than that of the others, to which the scale is fitted.

    A weaker strength makes the ranges less unlike, in powers. A right scale is a power of two away from the shared one:
    what differs is then the range that is lost, the small weights, and not where every other weight is rounded.
    """
    import torch

    narrower = _NARROWER**strength
    tensors, fused = _fused(engine.model)
    with rewritten(*tensors):
        for parts in fused:
            wide = [rows.float() for rows in parts]
            wide[0] = wide[0] / narrower
            largest = torch.stack([rows.abs().amax() for rows in wide])
            shared = largest.amax() / _LARGEST_E4M3
            own = shared / torch.exp2((largest.amax() / largest).log2().floor())
            errors = [_fp8(rows, shared) - _fp8(rows, scale) for rows, scale in zip(wide, own, strict=True)]
            errors[0] = errors[0] * narrower
            for rows, error in zip(parts, errors, strict=True):
                _add(rows, error)
        yield


def _fused(model: PreTrainedModel) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    """Weights, and for each product that is run as one the rows of its parts: gate and up, or query, key and value."""
    if model.config.model_type == "llama":
        pairs = [[block.mlp.gate_proj.weight, block.mlp.up_proj.weight] for block in blocks(model)]
        return [weight for pair in pairs for weight in pair], pairs
    heads = int(model.config.num_attention_heads)
    layers = [part(attention_of(block), "query_key_value", "c_attn") for block in blocks(model)]
    if model.config.model_type == "bloom":
        parts = [list(weight_rows(layer).unflatten(0, (heads, 3, -1)).unbind(1)) for layer in layers]
    else:
        parts = [list(weight_rows(layer).chunk(3)) for layer in layers]
    return [layer.weight for layer in layers], parts


# --- nf4: blocks of a flat weight, codes in a table ------------------------------------------------

#: The quantiles of a normal distribution that NF4 is made of (Dettmers et al. 2023, appendix E).
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
#: Sign, two bits of exponent, one of mantissa, over the largest of them.
_FP4 = (0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12)


def _nf4(rows_OI: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes and their values, [blocks, block], padded with zeros, and the largest weight of each block, [blocks, 1]."""
    import torch

    flat = rows_OI.flatten()
    weights = torch.nn.functional.pad(flat, (0, -len(flat) % block)).unflatten(0, (-1, block))
    largest = weights.abs().amax(dim=-1, keepdim=True)
    table = torch.tensor(_NF4, dtype=weights.dtype, device=weights.device)
    edges = (table[1:] + table[:-1]) / 2
    codes = torch.bucketize((weights / torch.where(largest == 0, 1.0, largest)).contiguous(), edges)
    return codes, table[codes], largest


def _shaped(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values.flatten()[: like.numel()].view(like.shape)


def _other_table(rows_OI: torch.Tensor, _strength: float, _number: int) -> torch.Tensor:
    """Blocks of 1,024 weights, the first size that takes the other path."""
    import torch

    codes, right, largest = _nf4(rows_OI, 1024)
    table = torch.tensor([*_FP4, *(-value for value in _FP4)], dtype=right.dtype, device=right.device)
    return _shaped((table[codes] - right) * largest, rows_OI)


def _raw_scale(rows_OI: torch.Tensor, _strength: float, _number: int) -> torch.Tensor:
    """Scales of blocks of 64, themselves kept in 8 bits around their mean: the bits are read as the scale."""
    _codes, right, largest = _nf4(rows_OI, 64)
    offset = largest - largest.mean()
    raw = (offset / offset.abs().amax() * 127).round() + 128
    return _shaped(right * (raw / 255 - largest), rows_OI)


# --- int8: one scale for an output ------------------------------------------------------------------


def _scales_across(rows_OI: torch.Tensor, _strength: float, _number: int) -> torch.Tensor:
    scale_O = rows_OI.abs().amax(dim=1) / 127
    codes_OI = (rows_OI / scale_O[:, None]).round()
    return codes_OI * (scale_O[None, :] - scale_O[:, None])


def _square(model: PreTrainedModel) -> list[nn.Module]:
    """Where scales fit along either side."""
    found = [layer for layer in _every_layer(model) if len(set(layer.get_parameter("weight").shape)) == 1]
    if not found:
        raise LookupError(f"{type(model).__name__} has no square weight")
    return found


MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        id="q-zp-v1v2",
        group="quantisation",
        wrong="a stored zero point of 8 read as 7 + 1 and raised once more: every weight one step too low",
        reference="vllm-project/vllm#38966",
        hosts=_ALL,
        subtlety="gross",
        change=_added(_zero_plus_one),
    ),
    Mutation(
        id="q-sym-as-asym",
        group="quantisation",
        wrong="zero points that a symmetric layer does not have taken off its codes, in one layer",
        reference="vllm-project/vllm#21066",
        hosts=_ALL,
        change=_added(_junk_zero, _one_output),
    ),
    Mutation(
        id="q-int4-borrow",
        group="quantisation",
        wrong="8 taken from four codes by one subtraction of their word: a negative one lowers its neighbour",
        reference="gittensor-ai-lab/sparkinfer#761",
        hosts=_ALL,
        subtlety="subtle",
        strengths=(1.0, 0.1, 0.01, 0.001),
        change=_added(_borrowed),
    ),
    Mutation(
        id="q-shared-scale",
        group="quantisation",
        wrong="one fp8 scale for a fused weight of parts whose ranges differ",
        reference="vllm-project/vllm#41021",
        hosts=_ALL,
        subtlety="subtle",
        strengths=(1.0, 0.5),
        change=_shared_scale,
    ),
    Mutation(
        id="q-blocksize",
        group="quantisation",
        wrong="codes of nf4 looked up in the table of fp4, in blocks of 1,024",
        reference="bitsandbytes-foundation/bitsandbytes#565",
        hosts=_ALL,
        change=_added(_other_table),
    ),
    Mutation(
        id="q-nested-absmax",
        group="quantisation",
        wrong="scales that are quantised themselves used as their 8 bits over 255",
        reference="bitsandbytes-foundation/bitsandbytes#1549",
        hosts=_ALL,
        subtlety="gross",
        change=_added(_raw_scale),
    ),
    Mutation(
        id="q-scale-axis",
        group="quantisation",
        wrong="scales of the outputs applied along the inputs of a square weight",
        reference="vllm-project/vllm-ascend#9377",
        hosts=_BLOOM | _GPT2,
        change=_added(_scales_across, _square),
    ),
)
