"""A port with other names, fused weights and a bug: the reference's name of the wrong module is given."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

import harness
from harness.flow.locating import map_of
from harness.locate.mapfile import read_map, write_map
from harness.locate.naming import Made
from tests.support import write_model, write_suite


class Layer(nn.Module):
    """A block with one weight for q, k and v, and one for gate and up."""

    def __init__(self, source, config):
        super().__init__()
        attention, mlp = source.self_attn, source.mlp
        self.activation = functional.silu
        self.heads, self.groups, self.size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.norm1, self.norm2 = (nn.RMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(2))
        self.norm1.weight.data = source.input_layernorm.weight.data.clone()
        self.norm2.weight.data = source.post_attention_layernorm.weight.data.clone()
        self.qkv = self.joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self.gate_up = self.joined(mlp.gate_proj, mlp.up_proj)
        self.out, self.down = self.joined(attention.o_proj), self.joined(mlp.down_proj)

    @staticmethod
    def joined(*layers):
        weight = torch.cat([one.weight.data for one in layers])
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=layers[0].bias is not None)
        made.weight.data = weight.clone()
        if layers[0].bias is not None:
            made.bias.data = torch.cat([one.bias.data for one in layers])
        return made

    def forward(self, x, cos, sin, seen):
        sizes = [self.heads * self.size, self.groups * self.size, self.groups * self.size]
        q, k, v = (
            part.unflatten(-1, (-1, self.size)).transpose(1, 2) for part in self.qkv(self.norm1(x)).split(sizes, dim=-1)
        )
        q, k = (part * cos + torch.cat([-part.chunk(2, -1)[1], part.chunk(2, -1)[0]], dim=-1) * sin for part in (q, k))
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(self.activation(gate) * up)


class Port(nn.Module):
    """A Llama without a cache."""

    def __init__(self, source):
        super().__init__()
        config = source.config
        self.embed = nn.Embedding.from_pretrained(source.model.embed_tokens.weight.data.clone(), freeze=True)
        self.stack = nn.ModuleList(Layer(one, config) for one in source.model.layers)
        self.last = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.last.weight.data = source.model.norm.weight.data.clone()
        self.head = Layer.joined(source.lm_head)
        self.register_buffer("inv_freq", source.model.rotary_emb.inv_freq.clone())

    def forward(self, input_ids, position_ids, attention_mask):
        angles = position_ids[:, None, :, None].float() * self.inv_freq
        angles = torch.cat([angles, angles], dim=-1)
        count = input_ids.shape[1]
        seen = torch.ones(count, count, dtype=torch.bool).tril() & attention_mask[:, None, None, :].bool()
        seen = seen | torch.eye(count, dtype=torch.bool)
        x = self.embed(input_ids)
        for layer in self.stack:
            x = layer(x, angles.cos().to(x.dtype), angles.sin().to(x.dtype), seen)
        return self.head(self.last(x))


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """A golden of a small random Llama."""
    root = tmp_path_factory.mktemp("ports")
    model = write_model(root / "tiny" / "model", "llama")
    harness.record(
        str(model), write_suite(root / "s.toml"), out=root / "tiny" / "s", precisions=("float32",), replicas=2
    )
    made = harness.load_golden(root / "tiny" / "s")
    return replace(made, model=replace(made.model, path="../model"))


@pytest.fixture
def port(golden):
    """The port of its model."""
    return Port(harness.reference_model(golden, dtype=torch.float32)).eval()


def test_a_correct_port_has_no_wrong_module(golden, port):
    """Fused and renamed, and right: nothing is named, though every linear map and norm was replayed."""
    found = harness.locate(golden, port)
    assert (found.scope, found.module) == ("nowhere", "")
    assert found.modules >= 2 * 9 + 3


def test_a_part_of_a_fused_weight_is_named(golden, port):
    """Two rows of what stands for k: k_proj is named, and not the whole of the fused weight."""
    heads, size = 6, 8
    with torch.no_grad():
        rows = port.stack[1].qkv.weight[heads * size :]
        rows[[0, 9]] = rows[[9, 0]].clone()
    found = harness.locate(golden, port)
    assert found.module == "model.layers.1.self_attn.k_proj"
    assert found.scope == "local"


def test_what_is_between_modules_of_a_port_is_named(golden, port):
    """A gate through GELU: both halves are right, what goes into the last projection is not."""
    port.stack[0].activation = functional.gelu
    found = harness.locate(golden, port)
    assert found.module == "model.layers.0.mlp"
    assert "down_proj" in found.part


def test_a_map_is_written_and_read_again(golden, port, tmp_path):
    """What is found by content is the map that a person would write, and a file of it is the same map."""
    names = map_of(harness.flow.reference_directory(golden), port)
    q, k, v = (f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv")
    assert names["stack.0.qkv.weight"] == Made(parts=(q, k, v))
    write_map(names, tmp_path / "map.json")
    assert read_map(tmp_path / "map.json") == names
