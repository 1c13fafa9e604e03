"""Time by module on small models: every part is seen, once, and nothing stays behind."""

from collections import Counter

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from harness.engines import build_engine, hf
from harness.engines.port import from_object
from harness.errors import EngineError
from harness.speed.kinds import modules
from harness.speed.kinds.latency import Work
from tests.engines.ports import cached
from tests.support import random_model

WORK = Work(prompt=(4, 5, 6, 7), new=3, repeats=1)


@pytest.mark.parametrize(
    ("kind", "counts"),
    [
        ("bloom", {"embedding": 1, "attention": 2, "mlp": 2, "norm": 6, "head": 1}),
        ("gpt2", {"embedding": 2, "attention": 2, "mlp": 2, "norm": 5, "head": 1}),
        ("llama", {"embedding": 1, "attention": 3, "mlp": 2, "norm": 5, "head": 1}),
    ],
)
def test_each_module_belongs_to_one_part(kind, counts):
    """Two layers; BLOOM has a norm behind its embedding, GPT-2 a table of positions, Llama its rotary table."""
    assert {part: len(found) for part, found in modules.parts_of(random_model(kind)).items()} == counts


class InnerAttention(torch.nn.Module):
    """Attention with a norm of its queries, as Qwen3 has it."""

    def __init__(self):
        super().__init__()
        self.q_norm = torch.nn.LayerNorm(2)


class Host(torch.nn.Module):
    """A model of attention and a norm."""

    def __init__(self):
        super().__init__()
        self.attn, self.attn_norm = InnerAttention(), torch.nn.LayerNorm(2)

    def get_output_embeddings(self):
        """None."""


def test_what_stands_inside_another_part_is_not_counted_twice():
    """A norm inside attention belongs to it; one whose name only begins like it does not."""
    model = Host()
    found = modules.parts_of(model)
    assert (found["attention"], found["norm"]) == ([model.attn], [model.attn_norm])


@pytest.mark.parametrize("kind", ["bloom", "gpt2", "llama"])
def test_the_shares_of_a_phase_are_all_of_it(kind):
    """Prefill and decoding apart, every part with some of the time, and the model as it was afterwards."""
    model = random_model(kind)
    with hf.from_model(model) as engine:
        found = modules.measure(engine, WORK, lambda _text: None)
    assert (found.prompt, found.new, found.device) == (4, 3, "cpu")
    for phase in modules.PHASES:
        assert sum(found.shares[phase].values()) == pytest.approx(1)
        assert all(found.shares[phase][part] > 0 for part in (*modules.PARTS, modules.REST))
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())
    assert not torch._C._autograd._profiler_enabled()


def test_the_first_forward_is_prefill_and_the_others_decode():
    """Three forwards of two layers under the profiler: so many labels of each."""
    model = random_model("gpt2")
    with profile(activities=[ProfilerActivity.CPU]) as profiler, modules.labelled(model, modules.parts_of(model)):
        for _ in range(3):
            model(input_ids=torch.tensor([[5, 6]]))
    found = Counter({one.key: one.count for one in profiler.key_averages() if one.key.startswith("harness:")})
    assert found["harness:prefill/forward"] == 1
    assert found["harness:decode/forward"] == 2
    assert found["harness:prefill/attention"] == 2
    assert found["harness:decode/norm"] == 10


def test_a_forward_that_fails_leaves_no_label_open():
    """The next one is not inside of it."""
    model = random_model("gpt2")
    with profile(activities=[ProfilerActivity.CPU]) as profiler, modules.labelled(model, modules.parts_of(model)):
        with pytest.raises(IndexError):
            model(input_ids=torch.tensor([[10_000]]))
        model(input_ids=torch.tensor([[5, 6]]))
    inside = [one for one in profiler.events() if one.name == "harness:decode/forward"]
    assert len(inside) == 1
    assert inside[0].cpu_parent is None


def test_shares_are_of_the_forwards():
    """Ten seconds of forwards, of which six are known; labels that overlap never make more than the whole."""
    parts = {f"decode/{part}": 1.0 for part in modules.PARTS} | {"decode/mlp": 2.0, "decode/forward": 10.0}
    found = modules.shares(parts)
    assert set(found) == {"decode"}
    assert found["decode"]["mlp"] == 0.2
    assert found["decode"]["rest"] == pytest.approx(0.4)
    over = modules.shares({**parts, "decode/forward": 3.0})["decode"]
    assert sum(over.values()) == pytest.approx(1)
    assert over["rest"] == 0


def test_what_shows_no_modules_says_so(small_home):
    """A port, ranks, a compiled model, and a model whose parts have other names."""
    directory = str(small_home / "golden/small/model")
    callable_port = from_object(cached(random_model("llama")))
    assert "shows no modules" in modules.why_not(callable_port)
    assert "shows no modules" in modules.why_not(build_engine("tp:size=2", model=directory))
    assert "compiled" in modules.why_not(build_engine("hf:compile=true", model=directory))
    assert modules.why_not(build_engine("hf", model=directory)) == ""
    with pytest.raises(EngineError, match="shows no modules"):
        modules.measure(callable_port, WORK, lambda _text: None)


def test_parts_of_other_names_are_not_guessed(monkeypatch):
    """Zero for attention would be a wrong number."""
    monkeypatch.setattr(modules, "_part", lambda _module: None)
    with (
        hf.from_model(random_model("gpt2")) as engine,
        pytest.raises(EngineError, match="known as embedding or attention or mlp"),
    ):
        modules.measure(engine, WORK, lambda _text: None)
