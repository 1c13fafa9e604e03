"""The engine `hf` on an HPU: stand-ins for habana_frameworks and optimum-habana keep to what is documented.

The stand-in for an adapted model computes with transformers' own, and refuses shapes that an HPU graph would not have.
"""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from harness.engines import gaudi, hf
from harness.engines.spec import parse_spec
from harness.errors import UsageError
from tests.engines.recorder import largest_difference, recorded
from tests.engines.test_hf import CONTINUATIONS, REQUESTS
from tests.support import random_model

_BUCKET = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The directory of a small llama."""
    directory = tmp_path_factory.mktemp("gaudi") / "llama"
    random_model("llama").save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def plain(model):
    """What the model does on the CPU: both views and the free tokens, in float64."""
    with hf.build(parse_spec("hf:dtype=float64"), model=model) as engine:
        views = [recorded(engine, view, REQUESTS, CONTINUATIONS) for view in ("replay", "prefill")]
        return views, engine.generate(REQUESTS, batch_size=2, stop_ids=frozenset())


@pytest.fixture
def calls(monkeypatch):
    """What was asked of the stand-ins, in order."""
    seen = []
    original = LlamaForCausalLM.forward

    def forward(
        self, input_ids, attention_mask, position_ids=None, past_key_values=None, use_cache=None, token_idx=None
    ):
        width, whole = input_ids.shape[1], attention_mask.shape[1]
        seen.append(("forward", width, whole))
        assert position_ids.shape == input_ids.shape
        if past_key_values is None:
            assert width == whole
            ids, places = input_ids.clone(), position_ids.clone()
        else:
            assert width == 1
            ids, places = past_key_values
            assert ids.shape[1] == whole
            ids.index_copy_(1, token_idx - 1, input_ids)
            places.index_copy_(1, token_idx - 1, position_ids)
        logits = original(
            self, input_ids=ids, attention_mask=attention_mask, position_ids=places, use_cache=False
        ).logits
        if past_key_values is not None:
            logits = logits.index_select(1, token_idx - 1)
        return CausalLMOutputWithPast(logits=logits, past_key_values=[ids, places] if use_cache else None)

    def wrap_in_hpu_graph(module):
        seen.append(("wrap",))
        return module

    def adapt_transformers_to_gaudi():
        seen.append(("adapt",))
        monkeypatch.setattr(LlamaForCausalLM, "forward", forward)

    given = {
        "habana_frameworks.torch.core": {"mark_step": lambda: seen.append(("mark",))},
        "habana_frameworks.torch.hpu": {"wrap_in_hpu_graph": wrap_in_hpu_graph},
        "optimum.habana.transformers.modeling_utils": {"adapt_transformers_to_gaudi": adapt_transformers_to_gaudi},
    }
    for name, members in given.items():
        for count in range(1, name.count(".") + 2):
            part = ".".join(name.split(".")[:count])
            if part not in sys.modules or part in given:
                module = ModuleType(part)
                module.__spec__, module.__path__ = ModuleSpec(part, None), []
                monkeypatch.setitem(sys.modules, part, module)
                if count > 1:
                    setattr(sys.modules[part.rpartition(".")[0]], part.rpartition(".")[2], module)
        for member, value in members.items():
            setattr(sys.modules[name], member, value)
    # The one device there is stands in for the other.
    monkeypatch.setattr(gaudi, "DEVICE", "cpu")
    return seen


def test_the_logits_are_those_of_the_plain_engine_in_static_shapes(model, plain, calls):
    """To 1e-9 in float64 on both views, and the free tokens; all shapes are buckets, or one token on a whole cache."""
    views, tokens = plain
    options = hf.Options(model=model, dtype="float64", device="cpu", graphs=True, bucket=_BUCKET)
    with hf.HFEngine(options, text="hf:device=hpu") as engine:
        static = [recorded(engine, view, REQUESTS, CONTINUATIONS) for view in ("replay", "prefill")]
        assert engine.generate(REQUESTS, batch_size=2, stop_ids=frozenset()) == tokens
        assert engine.settings["graphs"] is True
        assert engine.settings["bucket"] == _BUCKET
    assert all(largest_difference(one, other) < 1e-9 for one, other in zip(static, views, strict=True))
    assert [call[0] for call in calls[:2]] == ["adapt", "wrap"]
    forwards = [call[1:] for call in calls if call[0] == "forward"]
    assert len(forwards) == sum(call[0] == "mark" for call in calls)
    assert all(whole % _BUCKET == 0 and width in (1, whole) for width, whole in forwards)


def test_what_is_left_unsaid_is_the_hpus_own_way(calls):
    """Graphs and buckets are the default, and promised."""
    engine = hf.build(parse_spec("hf:device=cpu"), model="nowhere")
    assert engine.options.graphs
    assert engine.options.bucket == gaudi.BUCKET
    assert engine.declared["graphs"] is True


def test_a_float32_copy_is_widened_and_goes_the_same_way(tmp_path, calls):
    """The copy is of the model, not of what was wrapped around it."""
    random_model("llama", dtype="bfloat16").save_pretrained(tmp_path / "llama")
    with (
        hf.build(parse_spec("hf:device=cpu,bucket=32"), model=str(tmp_path / "llama")) as engine,
        engine.upcast() as wide,
    ):
        recorded(wide, "replay", REQUESTS, CONTINUATIONS)
        assert wide.settings["dtype"] == "float32"
        assert wide.settings["graphs"] is True
    assert [call[0] for call in calls if call[0] in ("adapt", "wrap")] == ["adapt", "wrap", "wrap"]


@pytest.mark.parametrize(
    ("more", "said"),
    [(",chunk=16", "shapes are static"), (",compile=true", "shapes are static"), (",dtype=float64", "no float64")],
)
def test_what_an_hpu_does_not_do_is_refused(more, said):
    """Before anything is loaded, in one line."""
    with pytest.raises(UsageError, match=said):
        hf.build(parse_spec(f"hf:device=hpu{more}"), model="nowhere")


def test_without_its_packages_it_says_what_to_install(model):
    """Both are named."""
    with (
        pytest.raises(UsageError, match=r"habana_frameworks and optimum\.habana") as refused,
        hf.build(parse_spec("hf:device=hpu"), model=model),
    ):
        pass
    assert "optimum-habana" in refused.value.fix


@pytest.mark.parametrize(("length", "whole"), [(1, 128), (128, 128), (129, 256)])
def test_buckets(length, whole):
    """A length is rounded up."""
    assert gaudi.rounded_up(length, gaudi.BUCKET) == whole
    assert torch.equal(gaudi._filled(torch.ones(1, 2), 3), torch.tensor([[1.0, 1.0, 0.0]]))
