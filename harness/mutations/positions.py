"""Bugs of positions: rotary embeddings, learned tables, ALiBi.

Shape legend: B batch rows, T new tokens, S tokens so far, H heads, D head size, F = D/2 frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from harness.mutations.mutation import Change, Mutation, attention_of, blocks, hooked, part, patched, together
from harness.mutations.passes import Pass, watched

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from harness.engines.hf import HFEngine

_DEFAULT_THETA = 10_000.0
_RANKS = 2

# --- frequencies of RoPE -----------------------------------------------------------------------


def _rotary(model: PreTrainedModel) -> Any:
    return part(part(model, "model"), "rotary_emb")


def _rope_of(model: PreTrainedModel) -> Mapping[str, Any]:
    """The RoPE part of a config: one dictionary since transformers 5, two keys before."""
    config: Any = model.config
    found = getattr(config, "rope_parameters", None)
    return found or {"rope_theta": config.rope_theta, **(config.rope_scaling or {})}


def _plain(like_F: torch.Tensor, theta: float) -> torch.Tensor:
    """theta^(-2i/D), in the dtype of the buffer."""
    import torch

    share_F = torch.arange(len(like_F), dtype=torch.float64, device=like_F.device) / len(like_F)
    return (theta**-share_F).to(like_F.dtype)


def _between(right_F: torch.Tensor, wrong_F: torch.Tensor, strength: float) -> torch.Tensor:
    """``wrong_F`` for strength 1, and as far on the way there in the logarithm."""
    return wrong_F if strength == 1 else right_F * (wrong_F / right_F) ** strength


def _frequencies(wrong: Callable[[PreTrainedModel, torch.Tensor, float], torch.Tensor]) -> Change:
    """A change of the table of frequencies, for good."""

    @contextmanager
    def change(engine: HFEngine, strength: float) -> Iterator[None]:
        rotary = _rotary(engine.model)
        with patched(rotary, inv_freq=wrong(engine.model, rotary.inv_freq, strength)):
            yield

    return change


def _in_bfloat16(_model: PreTrainedModel, right_F: torch.Tensor, strength: float) -> torch.Tensor:
    import torch

    return right_F + strength * (right_F.to(torch.bfloat16).to(right_F.dtype) - right_F)


def _default_theta(model: PreTrainedModel, right_F: torch.Tensor, strength: float) -> torch.Tensor:
    rope = _rope_of(model)
    if rope.get("rope_type", "default") != "default" or rope["rope_theta"] == _DEFAULT_THETA:
        raise LookupError(f"the theta of {type(model).__name__} is the default one, or its frequencies are scaled")
    return _between(right_F, _plain(right_F, _DEFAULT_THETA), strength)


def _unscaled(model: PreTrainedModel, right_F: torch.Tensor, strength: float) -> torch.Tensor:
    rope = _rope_of(model)
    if rope.get("rope_type") != "llama3":
        raise LookupError(f"{type(model).__name__} has no llama3 scaling")
    return _between(right_F, _plain(right_F, rope["rope_theta"]), strength)


def _grown(model: PreTrainedModel, right_F: torch.Tensor, length: int, strength: float) -> torch.Tensor:
    """The frequencies for a base that NTK scaling has enlarged for ``length`` tokens.

    theta' = theta * g^(D/(D-2)), g = factor * length / original - (factor - 1): frequency i is divided by
    g^(2i/(D-2)), the first stays and the last is divided by g. Source: transformers
    `_compute_dynamic_ntk_parameters`.
    """
    import torch

    factor = float(_rope_of(model).get("factor", 1.0))
    growth = factor * length / _original_length(model) - (factor - 1.0)
    share_F = torch.arange(len(right_F), dtype=torch.float64, device=right_F.device) / (len(right_F) - 1)
    return (right_F * growth ** (-strength * share_F)).to(right_F.dtype)


def _original_length(model: PreTrainedModel) -> int:
    config: Any = model.config
    return int(_rope_of(model).get("original_max_position_embeddings", config.max_position_embeddings))


@contextmanager
def _not_reset(engine: HFEngine, strength: float) -> Iterator[None]:
    """Dynamic scaling without its way back; where scaling is static, a port that scales dynamically and has none."""
    rotary = _rotary(engine.model)
    kept = {name: getattr(rotary, name) for name in ("inv_freq", "attention_scaling", "max_seq_len_cached")}
    if rotary.rope_type == "dynamic":
        # No sequence is shorter than 0, so none puts the frequencies back.
        with patched(rotary, original_max_seq_len=0, **kept):
            yield
        return
    right_F, longest = rotary.inv_freq, [0]

    def at_start(model: Any, _args: tuple[Any, ...], given: dict[str, Any]) -> None:
        # What an earlier request has enlarged is there from the first pass of the next one on.
        if current.past == 0 and longest[0] > _original_length(model):
            _rotary(model)._buffers["inv_freq"] = _grown(model, right_F, longest[0], strength)
        longest[0] = max(longest[0], int(given["position_ids"].max()) + 1)

    with watched(engine) as current, patched(rotary, inv_freq=right_F), hooked((engine.model, at_start, True)):
        yield


@contextmanager
def _mixed_bases(engine: HFEngine, strength: float) -> Iterator[None]:
    """Decode steps past the original length have a larger base than the keys that the prefill has cached."""
    rotary = _rotary(engine.model)
    right_F, original = rotary.inv_freq, _original_length(engine.model)

    def at_step(model: Any, _args: tuple[Any, ...], given: dict[str, Any]) -> None:
        length = int(given["position_ids"].max()) + 1
        grows = current.decoding and length > original
        _rotary(model)._buffers["inv_freq"] = _grown(model, right_F, length, strength) if grows else right_F

    with watched(engine) as current, patched(rotary, inv_freq=right_F), hooked((engine.model, at_step, True)):
        yield


# --- how RoPE turns -----------------------------------------------------------------------------


@contextmanager
def _interleaved(engine: HFEngine, _strength: float) -> Iterator[None]:
    """Neighbours are turned together, (2i, 2i+1), as in GPT-J.

    The scores of q and k that are turned so are those of reordered q and k, turned half by half; so they are
    reordered, which every attention kernel takes.
    """
    found = [attention_of(block) for block in blocks(engine.model)]
    layers = [(part(each, name), each.head_dim) for each in found for name in ("q_proj", "k_proj")]
    with hooked(*((layer, partial(_neighbours, size), False) for layer, size in layers)):
        yield


def _neighbours(size: int, _module: Any, _args: tuple[Any, ...], _given: dict[str, Any], x: torch.Tensor) -> Any:
    return x.unflatten(-1, (-1, size // 2, 2)).transpose(-1, -2).flatten(-3)


@contextmanager
def _stale_part(engine: HFEngine, _strength: float) -> Iterator[None]:
    """In decode, the dims of q that RoPE passes through are those of the step before."""
    found = [attention_of(block) for block in blocks(engine.model)]
    if not all(hasattr(each, "rotary_ndims") for each in found):
        raise LookupError(f"{type(engine.model).__name__} turns the whole of each head")
    before: dict[int, torch.Tensor] = {}

    def stale(
        index: int, turned: int, size: int, _module: Any, _args: tuple[Any, ...], _given: dict[str, Any], x: Any
    ) -> Any:
        import torch

        heads_BTHD = x.unflatten(-1, (-1, size))
        passed_BTHD = heads_BTHD[..., turned:]
        old_BTHD, before[index] = before.get(index), passed_BTHD[:, -1:]
        if not current.decoding or old_BTHD is None:
            return x
        return torch.cat([heads_BTHD[..., :turned], old_BTHD], dim=-1).flatten(-2)

    hooks = (
        (each.q_proj, partial(stale, index, each.rotary_ndims, each.head_dim), False)
        for index, each in enumerate(found)
    )
    with watched(engine) as current, hooked(*hooks):
        yield


# --- which position a token has -------------------------------------------------------------------

Places = Callable[["PreTrainedModel", Pass, "torch.Tensor", float], "torch.Tensor"]


def _positions(places: Places, *, rotary: bool = False) -> Change:
    """A change of the position ids: ``places`` gives other ones for those of a pass, [B, T]."""

    @contextmanager
    def change(engine: HFEngine, strength: float) -> Iterator[None]:
        if "position_ids" not in engine._accepts or (rotary and not _is_rotary(engine.model)):
            raise LookupError(f"{type(engine.model).__name__} takes no such positions")

        def moved(model: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
            return args, {**given, "position_ids": places(model, current, given["position_ids"], strength)}

        with watched(engine) as current, hooked((engine.model, moved, True)):
            yield

    return change


def _is_rotary(model: PreTrainedModel) -> bool:
    return hasattr(getattr(model, "model", None), "rotary_emb")


def _doubled(_model: PreTrainedModel, _current: Pass, right_BT: torch.Tensor, strength: float) -> torch.Tensor:
    return 2 * right_BT if strength == 1 else right_BT * (1 + strength)


def _shared(model: PreTrainedModel, current: Pass, right_BT: torch.Tensor, _strength: float) -> torch.Tensor:
    """Columns of the padded batch. Under RoPE a shift of all of a row is none; there decode goes by the row's own."""
    if _is_rotary(model):
        return right_BT if current.decoding else current.columns_BT()
    config: Any = model.config
    # A table has no row for the columns of a row that has long ended.
    return current.columns_BT().clamp(max=config.max_position_embeddings - 1)


def _zero_in_decode(_model: PreTrainedModel, current: Pass, right_BT: torch.Tensor, strength: float) -> torch.Tensor:
    if not current.decoding:
        return right_BT
    return 0 * right_BT if strength == 1 else (right_BT * (1 - strength)).round().to(right_BT.dtype)


@contextmanager
def _offset_missing(engine: HFEngine, strength: float) -> Iterator[None]:
    """OPT's table without its offset; where there is none, a table that is read as many rows too early."""
    body: Any = engine.model
    decoder = getattr(getattr(body, "model", None), "decoder", None)
    if decoder is not None:
        table = decoder.embed_positions
        with patched(table, offset=table.offset - 2):
            yield
        return
    if not hasattr(getattr(body, "transformer", None), "wpe"):
        raise LookupError(f"{type(body).__name__} has no table of learned positions")
    with _positions(_two_early)(engine, strength):
        yield


def _two_early(_model: PreTrainedModel, _current: Pass, right_BT: torch.Tensor, _strength: float) -> torch.Tensor:
    return (right_BT - 2).clamp(min=0)


# --- ALiBi ---------------------------------------------------------------------------------------

Bias = Callable[["torch.Tensor", "torch.Tensor", float], "torch.Tensor"]


def _alibi(bias: Bias) -> Change:
    """A change of ALiBi: ``bias`` gives [B, H, S] from the true slopes [H] and the mask [B, S], in a wide dtype."""

    @contextmanager
    def change(engine: HFEngine, strength: float) -> Iterator[None]:
        import torch

        body = part(engine.model, "transformer")
        build, heads = part(body, "build_alibi_tensor"), body.num_heads
        ones_BS = torch.ones((1, 2), dtype=torch.int64, device=engine.model.device)
        with engine._lift():
            right_H = build(ones_BS, heads, torch.float64)[:, 0, 1]
        bias(right_H, ones_BS, strength)  # a model for which it is right is refused here

        def build_wrong(mask_BS: torch.Tensor, _heads: int, dtype: torch.dtype) -> torch.Tensor:
            wide_H = right_H.to(torch.promote_types(dtype, torch.float32))
            return bias(wide_H, mask_BS, strength).flatten(0, 1)[:, None].to(dtype)

        with patched(body, build_alibi_tensor=build_wrong):
            yield

    return change


def _places_BS(mask_BS: torch.Tensor) -> torch.Tensor:
    return (mask_BS.cumsum(dim=-1) - 1) * mask_BS


def _geometric(right_H: torch.Tensor, mask_BS: torch.Tensor, strength: float) -> torch.Tensor:
    import torch

    heads = len(right_H)
    if math.log2(heads).is_integer():
        raise LookupError(f"for {heads} heads, a power of 2, the plain formula is right")
    slopes_H = torch.tensor([2 ** (-8 * (h + 1) / heads) for h in range(heads)], dtype=torch.float64).to(right_H)
    return _between(right_H, slopes_H, strength)[:, None] * _places_BS(mask_BS)[:, None]


def _of_first_rank(right_H: torch.Tensor, mask_BS: torch.Tensor, strength: float) -> torch.Tensor:
    slopes_H = right_H[: len(right_H) // _RANKS].repeat(_RANKS)
    return _between(right_H, slopes_H, strength)[:, None] * _places_BS(mask_BS)[:, None]


@contextmanager
def _behind_the_scale(engine: HFEngine, strength: float) -> Iterator[None]:
    """Scores and bias are summed, and then scaled: the bias is too small by the root of the head size."""
    found = [attention_of(block) for block in blocks(engine.model)]
    if not all(hasattr(each, "beta") for each in found):
        raise LookupError(f"{type(engine.model).__name__} has no ALiBi")
    with together(patched(each, beta=each.beta * each.head_dim ** (-strength / 2)) for each in found):
        yield


@contextmanager
def _dropped_in_decode(engine: HFEngine, strength: float) -> Iterator[None]:
    part(part(engine.model, "transformer"), "build_alibi_tensor")

    def without(_module: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        return (args, {**given, "alibi": given["alibi"] * (1 - strength)}) if current.decoding else None

    hooks = ((attention_of(block), without, True) for block in blocks(engine.model))
    with watched(engine) as current, hooked(*hooks):
        yield


# --- the list ------------------------------------------------------------------------------------

_BLOOMS = frozenset({"bloom-raw", "bloom-tiny"})
_FP32 = frozenset({"fp32"})

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        id="pos-invfreq-bf16",
        group="positions",
        wrong="the frequencies of RoPE were rounded to bf16 by a cast of the whole model",
        reference="huggingface/transformers#25681",
        hosts=frozenset({"llama-scaled", "llama-tiny", "llama-untied"}),
        subtlety="subtle",
        strengths=(1.0, 0.3, 0.1),
        change=_frequencies(_in_bfloat16),
    ),
    Mutation(
        id="pos-theta-default",
        group="positions",
        wrong="RoPE has the default theta of 10,000, where the config has another one",
        reference="lyogavin/airllm#368",
        hosts=frozenset({"llama-untied"}),
        subtlety="subtle",
        strengths=(1.0, 0.3, 0.1, 0.03),
        change=_frequencies(_default_theta),
    ),
    Mutation(
        id="pos-llama3-scaling",
        group="positions",
        wrong="the llama3 scaling of RoPE is parsed and not applied",
        reference="ggml-org/llama.cpp#8676",
        hosts=frozenset({"llama-scaled", "llama-tiny"}),
        subtlety="subtle",
        strengths=(1.0, 0.3, 0.1, 0.03),
        change=_frequencies(_unscaled),
    ),
    Mutation(
        id="pos-rope-style",
        group="positions",
        wrong="RoPE turns neighbours together, where the model was trained with halves",
        reference="vllm-project/vllm#941",
        hosts=frozenset({"llama-scaled", "llama-tiny"}),
        subtlety="gross",
        change=_interleaved,
    ),
    Mutation(
        id="pos-partial-rotary-stale",
        group="positions",
        wrong="a decode kernel writes the rotated dims of q alone, the others are those of the step before",
        reference="gittensor-ai-lab/sparkinfer#518",
        hosts=frozenset({"stablelm-partial"}),
        active=frozenset({"fp32", "decode"}),
        change=_stale_part,
    ),
    Mutation(
        id="pos-ntk-not-reset",
        group="positions",
        wrong="the base that one long request has enlarged stays for the shorter ones after it",
        reference="huggingface/transformers#27226",
        hosts=frozenset({"llama-ntk", "llama-scaled", "llama-tiny"}),
        subtlety="subtle",
        active=frozenset({"fp32", "second"}),
        change=_not_reset,
    ),
    Mutation(
        id="pos-ntk-mixed-cache",
        group="positions",
        wrong="past the original length new queries have a larger base than the cached keys",
        reference="huggingface/transformers#25104",
        hosts=frozenset({"llama-scaled", "llama-tiny"}),
        subtlety="subtle",
        active=frozenset({"fp32", "decode", "long"}),
        strengths=(1.0, 0.3, 0.1),
        change=_mixed_bases,
    ),
    Mutation(
        id="pos-double",
        group="positions",
        wrong="positions are doubled by a default scale",
        reference="ml-explore/mlx-lm#1545",
        hosts=frozenset({"llama-scaled", "llama-tiny"}),
        strengths=(1.0, 0.1, 0.01, 0.001),
        change=_positions(_doubled, rotary=True),  # a learned table would end too early
    ),
    Mutation(
        id="pos-leftpad-shared",
        group="positions",
        wrong="one vector of positions serves all rows of a left-padded batch",
        reference="unslothai/unsloth#3699",
        hosts=frozenset({"gpt2-tiny", "llama-tiny", "opt-offset"}),
        active=frozenset({"fp32", "padding", "batch"}),
        change=_positions(_shared),
    ),
    Mutation(
        id="pos-decode-zero",
        group="positions",
        wrong="decode gives position 0 to every token",
        reference="Blaizzy/mlx-vlm#1983",
        hosts=frozenset({"gpt2-tiny", "llama-tiny"}),
        active=frozenset({"fp32", "decode"}),
        change=_positions(_zero_in_decode),
    ),
    Mutation(
        id="pos-learned-offset",
        group="positions",
        wrong="the learned table is read without its offset, 2 rows too early",
        reference="EleutherAI/gpt-neox#650",
        hosts=frozenset({"gpt2-tiny", "opt-offset"}),
        change=_offset_missing,
    ),
    Mutation(
        id="pos-alibi-npo2",
        group="positions",
        wrong="ALiBi slopes are of the plain geometric formula, where the heads are no power of 2",
        reference="ml-explore/mlx#3071",
        hosts=_BLOOMS,
        strengths=(1.0, 0.1, 0.01),
        change=_alibi(_geometric),
    ),
    Mutation(
        id="pos-alibi-scale",
        group="positions",
        wrong="ALiBi is added on the wrong side of the scale of the scores",
        reference="NVIDIA/TensorRT-Model-Connect#32",
        hosts=_BLOOMS,
        strengths=(1.0, 0.1, 0.01),
        change=_behind_the_scale,
    ),
    Mutation(
        id="pos-alibi-decode-dropped",
        group="positions",
        wrong="decode has no ALiBi",
        reference="HabanaAI/vllm-fork#503",
        hosts=_BLOOMS,
        active=frozenset({"fp32", "decode"}),
        strengths=(1.0, 0.1, 0.01),
        change=_dropped_in_decode,
    ),
    Mutation(
        id="pos-alibi-rank-slopes",
        group="positions",
        wrong="every rank has the slopes of the first rank's heads",
        reference="",
        hosts=_BLOOMS,
        strengths=(1.0, 0.1, 0.01),
        change=_alibi(_of_first_rank),
    ),
)
