"""Tensors of a live model against its checkpoint."""

import copy
from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForCausalLM

from harness.environment import Quiet
from harness.locate import clues
from harness.locate.naming import Made
from harness.locate.weights import audit, proposed
from harness.mutations.benign import FAMILIES
from tests.support import random_model

KINDS = ("bloom", "gpt2", "llama")


def _said(checkpoints, kind: str, change: Callable[[torch.nn.Module], object], dtype=torch.float32) -> list[str]:
    directory, model = checkpoints[kind]
    live = copy.deepcopy(model).to(dtype)
    with torch.no_grad():
        change(live)
    return [clue.line for clue in clues.wrong(audit(directory, live))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_wrong_of_a_model_as_it_was_loaded(checkpoints, kind: str, dtype: torch.dtype) -> None:
    """A cast is declared by the dtype that is held, and a tied head is a note."""
    directory, model = checkpoints[kind]
    found = audit(directory, copy.deepcopy(model).to(dtype))
    assert not clues.wrong(found)
    assert [clue.tensor for clue in found if "tied to" in clue.text] == (["lm_head.weight"] if kind != "llama" else [])


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_units_in_another_order_are_a_note(checkpoints, kind: str) -> None:
    """Where both sides of an activation have the order; where one has not, it is a deviation."""
    directory, model = checkpoints[kind]
    live = copy.deepcopy(model)
    with FAMILIES["permuted"].applied(live):
        found = audit(directory, live)
        assert found
        assert not clues.wrong(found)
        bias = next(
            one
            for name, one in live.named_parameters()
            if name.endswith((".c_fc.bias", "h_to_4h.bias", "up_proj.weight"))
        )
        bias.data = bias.data.flip(0)
        assert clues.wrong(audit(directory, live))


def _q(model, layer: int = 1):
    return model.model.layers[layer].self_attn.q_proj


def _swap_heads(model) -> None:
    for tensor in _q(model).parameters():
        heads = tensor.unflatten(0, (6, 8))
        heads[[0, 1]] = heads[[1, 0]]


def _even_lanes_first(model) -> None:
    weight = _q(model).weight
    weight.copy_(weight.unflatten(0, (6, 4, 2)).transpose(1, 2).flatten(0, 2).clone())


def _k_for_v(model) -> None:
    attention = model.model.layers[0].self_attn
    attention.k_proj.weight.copy_(attention.v_proj.weight)


def _swap_layers(model) -> None:
    layers = model.model.layers
    for one, other in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
        kept = one.clone()
        one.copy_(other)
        other.copy_(kept)


def _lora(model) -> None:
    generator = torch.Generator().manual_seed(1)
    down = model.model.layers[0].mlp.down_proj.weight
    down += torch.randn(36, 2, generator=generator) @ torch.randn(2, 54, generator=generator) * 0.05


def _transpose(model) -> None:
    _q(model).weight = torch.nn.Parameter(_q(model).weight.T.clone())


def _tie(model) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


LLAMA: dict[str, tuple[Callable[[torch.nn.Module], object], str]] = {
    "heads swapped": (_swap_heads, "model.layers.1.self_attn.q_proj.weight: rows of heads 0 and 1 swapped"),
    "lanes": (_even_lanes_first, "q_proj.weight: rows of each head: the even lanes, then the odd ones"),
    "k holds v": (_k_for_v, "model.layers.0.self_attn.k_proj.weight: holds model.layers.0.self_attn.v_proj.weight"),
    "layers swapped": (_swap_layers, "model.layers.0: swapped with model.layers.1"),
    "transposed": (_transpose, "transposed, [36, 48] for [48, 36]"),
    "sign": (lambda m: _q(m).weight.neg_(), "q_proj.weight: of the other sign"),
    "scaled": (lambda m: _q(m).weight.mul_(0.7), "q_proj.weight: scaled by 0.7"),
    "row": (lambda m: _q(m).weight[3].mul_(1.2), "q_proj.weight: row 3 scaled by 1.2"),
    "head": (lambda m: _q(m).weight[8:16].zero_(), "q_proj.weight: rows of head 1 all zero"),
    "columns": (
        lambda m: _q(m).weight.mul_(torch.linspace(0.5, 2, 36)),
        "each column scaled by a factor of its own, 0.5 to 2",
    ),
    "one more": (lambda m: m.model.norm.weight.add_(1), "model.norm.weight: 1 added to each element"),
    "ones": (lambda m: m.model.norm.weight.fill_(1), "model.norm.weight: all 1, as a fresh module has it"),
    "element": (lambda m: _q(m).weight[3, 4].add_(1), "1 of 1728 elements differ, in row 3 alone"),
    "not finite": (lambda m: _q(m).weight[3, 4].fill_(torch.nan), "1 elements are not finite"),
    "fresh": (lambda m: m.lm_head.weight.normal_(0, 0.02), "left at its random initialisation (normal, 0.02)"),
    "tied": (_tie, "lm_head.weight: tied to model.embed_tokens.weight, but the checkpoint has its own"),
    "fp8": (lambda m: _q(m).weight.copy_(_q(m).weight.to(torch.float8_e4m3fn).float()), "rounded to float8_e4m3fn"),
    "update": (_lora, "down_proj.weight: differs by an update of rank 2"),
    "missing": (lambda m: setattr(m.model, "layers", m.model.layers[:1]), "model.layers.1: not in the candidate"),
    "left out": (lambda m: setattr(m.model, "norm", torch.nn.Identity()), "model.norm: not in the candidate"),
}  # fmt: skip


@pytest.mark.parametrize("name", LLAMA)
def test_what_was_done_to_a_tensor_is_said(checkpoints, name: str) -> None:
    """The line names the tensor and what makes it another one."""
    change, line = LLAMA[name]
    said = _said(checkpoints, "llama", change)
    assert any(line in one for one in said), said


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_factor_is_seen_through_rounding(checkpoints, dtype: torch.dtype) -> None:
    """What 16 bits leave of a product allows the factor, and no other change does."""
    said = _said(checkpoints, "llama", lambda model: _q(model).weight.mul_(1.2), dtype)
    assert said[0].endswith("q_proj.weight: scaled by 1.2"), said


def test_a_quantiser_that_is_not_declared_is_named(checkpoints) -> None:
    """The line says its bits, and what shares a scale."""
    from harness.numerics.quantise import dequantised

    def quantised(model) -> None:
        _q(model).weight.copy_(dequantised(_q(model).weight, "int8", input_dim=1))

    assert _said(checkpoints, "llama", quantised) == [
        "model.layers.1.self_attn.q_proj.weight: rounded to int8, one scale an output"
    ]


def test_a_declared_quantiser_may_leave_tensors_out(checkpoints) -> None:
    """A tensor is right on its grid or as it is stored, and a wrong one is held against the nearer."""
    from harness.numerics.quantise import dequantised

    directory, model = checkpoints["llama"]
    live = copy.deepcopy(model).float()
    with torch.no_grad():
        _q(live).weight.copy_(dequantised(_q(live).weight, "int4", input_dim=1))
        assert not clues.wrong(audit(directory, live, declared="int4"))
        _q(live).weight[3] *= 1.5
        said = [clue.line for clue in clues.wrong(audit(directory, live, declared="int4"))]
    assert said == ["model.layers.1.self_attn.q_proj.weight: row 3 scaled by 1.5"]


def test_the_key_bias_without_rope_is_a_note(checkpoints) -> None:
    """BLOOM's softmax takes it out; with the bias of the values it is a deviation."""

    def lost(parts: slice) -> Callable[[torch.nn.Module], object]:
        return lambda m: (
            m.transformer.h[1].self_attention.query_key_value.bias.unflatten(0, (6, 3, -1))[:, parts].zero_()
        )

    assert not _said(checkpoints, "bloom", lost(slice(1, 2)))
    said = _said(checkpoints, "bloom", lost(slice(1, 3)))
    assert said == ["transformer.h.1.self_attention.query_key_value.bias: all elements of k and v all zero"]


class _Port(torch.nn.Module):
    """Llama's tensors under other names: q, k and v head by head in one, gate and up in one, a Conv1D's orientation."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.embed = torch.nn.Parameter(model.model.embed_tokens.weight.clone())
        self.head = torch.nn.Parameter(model.lm_head.weight.clone())
        self.blocks = torch.nn.ModuleList()
        for layer in model.model.layers:
            block, attention, mlp = torch.nn.Module(), layer.self_attn, layer.mlp
            for kind in ("weight", "bias"):
                parts = [getattr(attention, f"{one}_proj").get_parameter(kind).unflatten(0, (3, -1)) for one in "qkv"]
                setattr(block, f"qkv_{kind}", torch.nn.Parameter(torch.cat(parts, dim=1).flatten(0, 1)))
            block.out = torch.nn.Parameter(attention.o_proj.weight.T.contiguous())
            block.out_bias = torch.nn.Parameter(attention.o_proj.bias.clone())
            block.gate_up = torch.nn.Parameter(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
            block.down = torch.nn.Parameter(mlp.down_proj.weight.clone())
            block.norms = torch.nn.ParameterList([layer.input_layernorm.weight, layer.post_attention_layernorm.weight])
            self.blocks.append(block)
        self.norm = torch.nn.Parameter(model.model.norm.weight.clone())


def test_a_port_with_fused_tensors_is_mapped_by_content_and_audited(checkpoints) -> None:
    """The proposed map is that of the port, and through it a wrong head is named in the reference's words."""
    directory, model = checkpoints["llama"]
    with torch.no_grad():
        port = _Port(copy.deepcopy(model).float())
        names = proposed(directory, port)
        layer = "model.layers.{}."
        parts = tuple(f"{layer}self_attn.{one}_proj.weight" for one in "qkv")
        assert names["blocks.{}.qkv_weight"] == Made(parts=parts, heads=3)
        assert names["blocks.{}.out"] == Made(
            parts=(f"{layer}self_attn.o_proj.weight",), transposed=True, dim=names["blocks.{}.out"].dim
        )
        assert names["blocks.{}.gate_up"].parts == (f"{layer}mlp.gate_proj.weight", f"{layer}mlp.up_proj.weight")
        assert not clues.wrong(audit(directory, port, names))
        port.blocks[1].qkv_weight.unflatten(0, (3, 4, 8))[0, 2] *= 2  # K of head 0, behind two heads of Q
        for found in (audit(directory, port, names), audit(directory, port)):
            assert [clue.line for clue in clues.wrong(found)] == [
                "model.layers.1.self_attn.k_proj.weight: rows of head 0 scaled by 2"
            ]


def test_clues_of_whole_blocks_stand_where_their_first_tensor_does(checkpoints) -> None:
    """The order is the checkpoint's, whether one tensor is named or all of a module."""

    def change(model) -> None:
        _swap_layers(model)
        model.model.norm.weight.add_(1)
        model.model.embed_tokens.weight.mul_(2)
        model.lm_head.weight.neg_()

    directory, model = checkpoints["llama"]
    live = copy.deepcopy(model).float()
    with torch.no_grad():
        change(live)
    places = [clue.tensor or clue.module for clue in audit(directory, live)]
    order = ["lm_head.weight", "model.embed_tokens.weight", "model.layers.0", "model.layers.1", "model.norm.weight"]
    assert places == order


def test_a_head_of_its_own_is_right_though_the_config_ties(tmp_path) -> None:
    """As transformers has it: what finds both stored, and different, ties nothing, and a tied candidate is wrong."""
    model = random_model("llama", dtype="bfloat16")
    model.config.tie_word_embeddings = True
    model.save_pretrained(tmp_path)
    with Quiet():
        live = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not clues.wrong(audit(tmp_path, live))
    live.lm_head.weight = live.model.embed_tokens.weight
    said = [clue.line for clue in clues.wrong(audit(tmp_path, live))]
    assert said == [
        "lm_head.weight: tied to model.embed_tokens.weight, but the checkpoint has its own"
        " (transformers, which finds both, does not tie them, whatever config.json says)"
    ]
