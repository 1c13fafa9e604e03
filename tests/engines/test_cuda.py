"""What the engine `hf` asks of torch for CUDA, on a CPU: the flags are torch's own, the device is stood in for."""

import os

import pytest
import torch

from harness.engines import cuda, hf
from harness.engines.spec import parse_spec
from harness.errors import UsageError
from tests.engines.recorder import largest_difference, recorded
from tests.engines.test_hf import CONTINUATIONS, REQUESTS
from tests.support import random_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The directory of a small llama."""
    directory = tmp_path_factory.mktemp("cuda") / "llama"
    random_model("llama").save_pretrained(directory)
    return str(directory)


@pytest.fixture
def staying(monkeypatch):
    """Models stay on the CPU, whatever the spec says."""
    monkeypatch.setattr(hf.HFEngine, "_place", lambda _engine, model: model.eval())
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)


def flags():
    """The flags as they are."""
    return (
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.are_deterministic_algorithms_enabled(),
    )


@pytest.mark.parametrize(
    ("more", "inside"),
    [
        ("", ("highest", False, True)),
        (",tf32=true", ("high", True, True)),
        (",deterministic=false", ("highest", False, False)),
    ],
)
def test_tf32_is_off_unless_declared(staying, model, more, inside):
    """So are kernels that sum in any order; settings read it back, and afterwards all is as it was."""
    torch.set_float32_matmul_precision("high")
    try:
        before = flags()
        with hf.build(parse_spec(f"hf:device=cuda{more}"), model=model) as engine:
            assert flags() == inside
            seen = {key: engine.settings[key] for key in ("tf32", "deterministic_algorithms")}
            assert seen == {key: engine.declared[key] for key in seen}
            assert seen["tf32"] is inside[1]
            assert (os.environ.get("CUBLAS_WORKSPACE_CONFIG") is not None) is inside[2]
        assert flags() == before
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_flags_are_of_cuda_alone(model):
    """A check on the CPU changes none of them, and says nothing of them."""
    before = flags()
    with hf.build(parse_spec("hf"), model=model) as engine:
        assert flags() == before
        assert "tf32" not in engine.settings


def test_a_graph_is_of_static_shapes_and_its_output_is_kept(staying, monkeypatch, model):
    """Each step is marked, compiled for CUDA graphs, and copied from where the next one writes; the logits stay."""
    calls = []

    def compiled(module, **how):
        calls.append(("compile", how))
        place = {}

        def forward(**arguments):
            output = module(**arguments)
            calls.append(("forward", tuple(arguments["input_ids"].shape), tuple(arguments["attention_mask"].shape)))
            # As a graph does: every output of one shape lies where the last one did.
            logits = place.setdefault(output.logits.shape, output.logits)
            logits.copy_(output.logits.clone())
            return type(output)(logits=logits)

        return forward

    with hf.build(parse_spec("hf:device=cpu"), model=model) as engine:
        plain = recorded(engine, "replay", REQUESTS, CONTINUATIONS)
    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: calls.append(("mark",)))
    with hf.build(parse_spec("hf:device=cuda,static_cache=true,graphs=true"), model=model) as engine:
        graphed = recorded(engine, "replay", REQUESTS, CONTINUATIONS)
        assert engine.declared["graphs"] is True
        assert engine.settings["graphs"] is False, "nothing was compiled, so it is not in force"
    assert calls[0] == ("compile", {"mode": "reduce-overhead", "dynamic": False})
    assert [call[0] for call in calls[1:]] == ["mark", "forward"] * ((len(calls) - 1) // 2)
    decoded = {call[1:] for call in calls if call[0] == "forward" and call[1][1] == 1}
    assert len(decoded) == 1, "one shape for all steps of decoding"
    assert largest_difference(graphed, plain) < 1e-4


def test_a_graph_counts_where_none_was_skipped(monkeypatch):
    """What torch compiled and did not put into a graph is no graph."""
    import torch._dynamo

    counters = torch._dynamo.utils.counters
    monkeypatch.setitem(counters, "stats", {"unique_graphs": 2})
    monkeypatch.setitem(counters, "inductor", {"cudagraph_skips": 0})
    assert cuda.graphs_ran()
    monkeypatch.setitem(counters, "inductor", {"cudagraph_skips": 1})
    assert not cuda.graphs_ran()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hf:tf32=true", "of device=cuda"),
        ("hf:device=cpu,deterministic=false", "of device=cuda"),
        ("hf:graphs=true", "device=cuda and device=hpu"),
        ("hf:device=cuda,graphs=true", "one shape"),
        ("hf:device=cuda,static_cache=true,graphs=true,compile=true", "compile by themselves"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(text, said):
    """Before anything is loaded, in one line."""
    with pytest.raises(UsageError, match=said):
        hf.build(parse_spec(text), model="nowhere")
