import importlib.util
from pathlib import Path

import pytest
import torch

import harness
from harness.engines import hf, placement
from harness.engines.spec import parse_spec
from harness.errors import UsageError
from tests.engines.recorder import largest_difference, recorded
from tests.engines.test_hf import CONTINUATIONS, REQUESTS
from tests.support import random_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The directory of a small llama in bfloat16."""
    directory = tmp_path_factory.mktemp("placed") / "llama"
    random_model("llama", dtype="bfloat16").save_pretrained(directory)
    return str(directory)


def opened(text, model):
    """The engine of a spec, closed."""
    return hf.build(parse_spec(text), model=model)


@pytest.mark.parametrize(("how", "place"), [("auto", "cpu"), ("cpu-offload", "memory"), ("disk", "disk")])
def test_wherever_the_weights_rest_the_logits_are_the_same(model, how, place):
    """Bit for bit those of the plain engine, on both views and as a float32 copy; the place is read back."""
    found = []
    for text in ("hf", f"hf:device_map={how}"):
        with opened(text, model) as engine:
            elements = sum(one.numel() for one in engine.model.parameters())
            views = [recorded(engine, view, REQUESTS, CONTINUATIONS) for view in ("replay", "prefill")]
            settings = engine.settings
            with engine.upcast() as wide:
                views.append(recorded(wide, "replay", REQUESTS, CONTINUATIONS))
                assert wide.settings["dtype"] == "float32"
                assert wide.settings["device_map"] == settings["device_map"]
            # The copy was taken from it, and it goes on as it was.
            views.append(recorded(engine, "replay", REQUESTS, CONTINUATIONS))
        found.append(views)
    assert settings["device_map"] == how
    assert settings["device"] == "cpu"
    assert settings["resting"] == {place: elements}
    assert all(largest_difference(placed, plain) == 0 for plain, placed in zip(*found, strict=True))


def test_a_golden_says_identical(goldens: Path):
    """A check of weights on the disk is that of the plain engine, and leaves nothing there."""
    verdict = harness.check(goldens / "gpt2-tiny" / "headline", "hf:device_map=disk,dtype=float32", quick=True)
    plain = harness.check(goldens / "gpt2-tiny" / "headline", "hf:dtype=float32", quick=True)
    assert verdict.status == plain.status == "identical", str(verdict)
    assert verdict.statistics == plain.statistics
    assert verdict.settings["device_map"] == "disk"
    assert set(verdict.settings["resting"]) == {"disk"}


def test_nothing_is_left_on_the_disk(model, tmp_path, monkeypatch):
    """The copy of the weights goes with the engine."""
    monkeypatch.setattr(placement.tempfile, "tempdir", str(tmp_path))
    with opened("hf:device_map=disk", model):
        assert list(tmp_path.rglob("*.dat"))
    assert not list(tmp_path.iterdir())


def test_weights_that_are_brought_from_elsewhere_are_seen_there(model):
    """What is under no hook is where it is; what a hook brings is where the hook has it."""
    live = random_model("llama")
    assert placement.device_map(live) == "auto"
    assert placement.resting(live) == {"cpu": sum(one.numel() for one in live.parameters())}
    live.lm_head.weight = torch.nn.Parameter(live.lm_head.weight.to("meta"))
    assert placement.resting(live)["nowhere"] == live.lm_head.weight.numel()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hf:device_map=balanced", "auto, cpu-offload, disk"),
        ("hf:device_map=auto,device=cuda", "chooses the devices itself"),
        ("hf:device_map=auto,dtype=float64", "never has the whole model"),
        ("hf:device_map=auto,weights=bfloat16", "never has the whole model"),
        ("hf:device_map=disk,compile=true", "is not compiled"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(text, said):
    """Before anything is loaded, in one line."""
    with pytest.raises(UsageError, match=r"device_map|balanced") as refused:
        opened(text, "nowhere")
    assert said in f"{refused.value.problem} {refused.value.fix}"


def test_without_accelerate_it_says_what_to_install(monkeypatch):
    """It is an extra."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "accelerate" else found(name))
    with pytest.raises(UsageError) as refused:
        opened("hf:device_map=disk", "nowhere")
    assert "pip install 'golden-harness[ranks]'" in refused.value.fix
