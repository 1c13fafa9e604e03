import copy

import pytest
import torch
from torch import nn

from harness.engines import build_engine
from harness.engines.modules import recast
from harness.models.ports.ladder import kernels
from tests.engines.ports import CONTINUATIONS, REQUESTS
from tests.engines.recorder import largest_difference, recorded
from tests.support import random_model

if reason := kernels.why_not():
    pytest.skip(f"no kernels here: {reason}", allow_module_level=True)


@pytest.fixture
def engine(tmp_path):
    """A random BLOOM in float32 with the whole ladder, open."""
    random_model("bloom").save_pretrained(tmp_path)
    with build_engine("bloom:rungs=all,dtype=float32", model=str(tmp_path)) as opened:
        yield opened


@pytest.fixture
def compiled(monkeypatch):
    """How often the compiled step ran."""
    calls = []
    own = kernels.Kernels.step

    def step(self, *given):
        calls.append(given)
        return own(self, *given)

    monkeypatch.setattr(kernels.Kernels, "step", step)
    return calls


def decoded(engine):
    """Logits of forced decoding in one padded batch."""
    return recorded(engine, "replay", REQUESTS, CONTINUATIONS)


def test_decode_steps_are_compiled_and_prompts_are_not(engine, compiled):
    """Every step behind a prompt is one call, and logits are those of the modules to round-off."""
    shown = decoded(engine)
    assert len(compiled) == max(map(len, CONTINUATIONS)) - 1
    engine.model.rungs = engine.model.rungs - {"compiled"}
    modules = decoded(engine)
    assert 0 < largest_difference(shown, modules) < 1e-4


def names_of(model):
    """Every module below the model."""
    return [name for name, _ in model.named_modules() if name and not name.endswith(".h") and name != "transformer.h"]


def test_a_hook_anywhere_is_called_in_every_step(engine, compiled):
    """Whatever module is hooked, its hook runs in the prompt and in each decode step, and nothing is compiled then."""
    steps = max(map(len, CONTINUATIONS))
    for name in names_of(engine.model):
        called = []
        handle = engine.model.get_submodule(name).register_forward_hook(lambda *_: called.append(1))  # noqa: B023
        decoded(engine)
        handle.remove()
        assert len(called) == steps, name
        assert not compiled, name
    decoded(engine)
    assert compiled


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.transformer.h[1].mlp, "gelu_impl", nn.GELU()),
        lambda model: setattr(model.transformer, "h", model.transformer.h[:-1]),
        lambda model: vars(model.transformer.ln_f).__setitem__("forward", lambda x: 2 * x),
        lambda model: vars(model.transformer).__setitem__(
            "build_alibi_tensor", lambda mask, heads, dtype: torch.zeros((len(mask) * heads, 1, mask.shape[1]))
        ),
        lambda model: setattr(model.transformer.h[0].self_attention, "inv_norm_factor", 0.1),
        lambda model: setattr(model.transformer.h[0].self_attention, "beta", 0.5),
        lambda model: setattr(model.transformer.h[1].input_layernorm, "eps", 0.1),
        lambda model: model.transformer.h[1].mlp.dense_4h_to_h.weight.data.mul_(2),
        lambda model: model.transformer.h[0].self_attention.attention_dropout.train(),
    ],
    ids=["module", "blocks", "forward", "alibi", "scale", "beta", "epsilon", "weight", "dropout"],
)
def test_no_change_of_the_model_is_passed_over(engine, change):
    """What is changed in a live model changes its decode steps as it changes the modules', compiled or not."""
    with torch.no_grad():
        decoded(engine)  # the compiled step is made before the change
        change(engine.model)
    torch.manual_seed(3)
    shown = decoded(engine)
    engine.model.rungs = engine.model.rungs - {"compiled"}
    torch.manual_seed(3)
    assert largest_difference(shown, decoded(engine)) < 1e-4


def test_a_copy_runs_its_own_weights(engine, compiled):
    """The compiled step of a deep copy, made after the original's, reads the copy's weights."""
    before = decoded(engine)
    copied = copy.deepcopy(engine.model)
    with torch.no_grad():
        copied.transformer.ln_f.weight.mul_(3)
    compiled.clear()
    with engine._like(engine.options, "a copy", copied) as other:
        assert largest_difference(decoded(other), before) > 0.1
    assert compiled
    assert largest_difference(decoded(engine), before) == 0


def test_a_widened_copy_computes_in_float32(tmp_path, compiled):
    """What was loaded in bfloat16 and widened is as near to float64 as float32 is."""
    random_model("bloom", dtype="bfloat16").save_pretrained(tmp_path)
    exact = build_engine("hf:dtype=float64", model=str(tmp_path))
    with exact, build_engine("bloom:rungs=all", model=str(tmp_path)) as engine, engine.upcast() as wide:
        compiled.clear()
        wanted = decoded(exact)
        assert largest_difference(decoded(wide), wanted) < 1e-4
        assert compiled
        assert 1e-3 < largest_difference(decoded(engine), wanted) < 1


def test_a_model_of_two_dtypes_runs_module_by_module(engine, compiled):
    """The compiled function has one type for all weights; with another among them it is not called."""
    recast(engine.model.transformer.ln_f, torch.float64)
    with pytest.raises(RuntimeError):  # as the modules themselves say
        decoded(engine)
    assert not compiled


def test_more_rows_than_the_kernels_take_run_module_by_module(engine, compiled):
    """A batch of seventeen is decoded by the modules, with the same tokens."""
    many = [REQUESTS[0]] * (kernels.MOST_ROWS + 1)
    together = engine.generate(many, batch_size=len(many), stop_ids=frozenset())
    assert not compiled
    alone = engine.generate(many[:1], batch_size=1, stop_ids=frozenset())
    assert compiled
    assert {one.tokens for one in together} == {alone[0].tokens}
