"""Settings and derived tables of a live model against its configuration."""

import copy
from collections.abc import Callable

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from harness.locate.clues import Clue
from harness.locate.tables import tables
from harness.locate.tables.rotary import frequencies, rotary_of
from harness.mutations import hosts
from tests.support import random_model

LENGTHS = {"original_max_position_embeddings": 32}
SCALINGS = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **LENGTHS},
    "yarn": {"factor": 4.0, **LENGTHS},
}


def _llama(scaling: str):
    rope = {"rope_type": scaling, "rope_theta": 500_000.0, **SCALINGS[scaling]}
    config = AutoConfig.for_model(
        "llama", vocab_size=31, hidden_size=48, intermediate_size=16, num_hidden_layers=1, num_attention_heads=3,
        num_key_value_heads=3, head_dim=16, max_position_embeddings=128, rope_parameters=rope,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", sorted(hosts.HOSTS))
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_nothing_is_said_of_a_correct_model(name: str, dtype: str) -> None:
    """Of every host, with float32 tables as they are loaded, against a live model and against its config."""
    live = AutoModelForCausalLM.from_config(hosts.build(name).config, dtype=getattr(torch, dtype)).eval()
    assert tables(hosts.build(name).config, live) == ()


@pytest.mark.parametrize("kind", ["bloom", "gpt2", "llama"])
def test_a_live_reference_says_as_much_as_its_config(kind: str) -> None:
    """Buffers, settings and tables are those of the same model."""
    model = random_model(kind)
    assert tables(model, copy.deepcopy(model)) == ()


@pytest.mark.parametrize("scaling", SCALINGS)
def test_frequencies_are_derived_in_float64(scaling: str) -> None:
    """What transformers computes in float32 is within the bound, and what bfloat16 makes of it is not."""
    model = _llama(scaling)
    rotary = rotary_of(model.config)
    assert rotary is not None
    torch.testing.assert_close(frequencies(rotary), model.model.rotary_emb.inv_freq.double(), rtol=1e-5, atol=0)
    assert tables(model.config, model) == ()
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.bfloat16()
    assert [clue.line for clue in tables(model.config, model)] == ["model.rotary_emb.inv_freq: rounded to bfloat16"]


Change = Callable[[torch.nn.Module], object]


def _set(path: str, name: str, value: object) -> Change:
    return lambda model: setattr(model.get_submodule(path), name, value)


ROTARY, ATTENTION, MLP = "model.rotary_emb", "transformer.h.1.attn", "transformer.h.1.mlp"
SELF, DROPOUT, GATE = (
    "transformer.h.0.self_attention",
    "transformer.h.0.self_attention.attention_dropout",
    "model.layers.0.mlp",
)
CHANGES: dict[str, tuple[str, Change, str, str]] = {
    "theta": ("llama", lambda m: m.model.rotary_emb.inv_freq.pow_(1.5), ROTARY, "theta is 1e+06 where 10000 is right"),
    "never filled": ("llama", lambda m: m.model.rotary_emb.inv_freq.zero_(), ROTARY, "all zero: never filled"),
    "eps": (
        "llama",
        _set("model.norm", "variance_epsilon", 1e-5),
        "model.norm",
        "variance_epsilon is 1e-05 where 1e-06 is right",
    ),
    "scale": ("gpt2", _set(ATTENTION, "scaling", 0.5), ATTENTION, "scaling is 0.5 where 0.4082483 is right"),
    "gelu": (
        "gpt2",
        _set(MLP, "act", torch.nn.GELU()),
        f"{MLP}.act",
        "computes the exact GELU where the tanh GELU is right",
    ),
    "gate": (
        "llama",
        _set(GATE, "act_fn", torch.nn.GELU()),
        f"{GATE}.act_fn",
        "computes the exact GELU where SiLU is right",
    ),
    "beta": ("bloom", _set(SELF, "beta", 0.5), SELF, "beta is 0.5 where 1 is right"),
    "config": (
        "llama",
        lambda m: setattr(m.config, "sliding_window", 17),
        "",
        "sliding_window is 17 where None is right",
    ),
    "dropout": ("bloom", _set(DROPOUT, "p", 0.1), DROPOUT, "p is 0.1 where 0 is right"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_changed_is_said(name: str) -> None:
    """The clue names the module, what it has and what is right."""
    kind, change, module, text = CHANGES[name]
    config, model = random_model(kind).config, random_model(kind)
    change(model)
    assert (module, text) in [(clue.module, clue.text) for clue in tables(config, model)]


def _slopes_of_first_rank(mask: torch.Tensor, heads: int, dtype: torch.dtype) -> torch.Tensor:
    slope = torch.tensor([0.25, 0.0625, 0.015625]).repeat(2)
    return (slope[:, None, None] * torch.arange(mask.shape[1])).to(dtype)


def _plain_slopes(mask: torch.Tensor, heads: int, dtype: torch.dtype) -> torch.Tensor:
    slope = 2.0 ** (-8 * torch.arange(1, heads + 1) / heads)
    return (slope[:, None, None] * torch.arange(-5, mask.shape[1] - 5)).to(dtype)


@pytest.mark.parametrize(
    ("build", "text"),
    [(_slopes_of_first_rank, "heads 3-5 have the slopes of heads 0-2"), (_plain_slopes, "slopes 2^(-8 h / 6)")],
)
def test_wrong_slopes_are_named(build: Callable[..., torch.Tensor], text: str) -> None:
    """Six heads are no power of 2; where the bias begins to count says nothing."""
    model = random_model("bloom")
    model.transformer.build_alibi_tensor = build
    found = tables(model.config, model)
    assert [clue.module for clue in found] == ["transformer"]
    assert found[0].text.startswith(text)


def test_angles_in_16_bits_and_of_one_row_are_seen() -> None:
    """Where the frequencies are right, cosines and sines are asked."""
    model = _llama("default")
    rotary = model.model.rotary_emb
    right = rotary.forward

    def narrow(x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angle = position_ids[..., None].bfloat16() * rotary.inv_freq.bfloat16()
        return angle.cos().float().repeat(1, 1, 2), angle.sin().float().repeat(1, 1, 2)

    def second_row(x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.cat([one[:1], one[1:] * 0]) for one in right(x, position_ids))

    for forward, words in ((narrow, "times what rounding allows"), (second_row, "in row 1 of a batch alone")):
        rotary.forward = forward
        found = tables(model.config, model)
        assert [clue.tensor for clue in found] == ["cos"]
        assert words in found[0].text


class _Port(torch.nn.Module):
    """Modules of other names and classes."""

    def __init__(self, eps: float, scale: float) -> None:
        super().__init__()
        self.block = torch.nn.Module()
        self.block.eps, self.block.softmax_scale = eps, scale


def test_a_port_goes_by_what_settings_are_called() -> None:
    """A scale may be kept as its reciprocal."""
    config = random_model("llama").config
    assert tables(config, _Port(1e-6, 8**0.5)) == ()
    assert tables(config, _Port(1e-6, 8**-0.5)) == ()
    found: tuple[Clue, ...] = tables(config, _Port(1e-5, 0.5))
    assert [clue.text.partition(" ")[0] for clue in found] == ["eps", "softmax_scale"]
