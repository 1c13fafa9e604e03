"""Differences that change nothing, and those that seem so."""

import torch

from harness.locate import clues
from harness.locate.naming import Made
from harness.locate.weights import audit


def _module(**tensors: torch.Tensor) -> torch.nn.Module:
    module = torch.nn.Module()
    for name, tensor in tensors.items():
        module.register_parameter(name, torch.nn.Parameter(tensor))
    return module


def test_pieces_of_a_fused_tensor_count_each(checkpoint) -> None:
    """Units of up alone in another order, with gate as it is stored, are wrong; units of both are not told from it."""
    torch.manual_seed(0)
    gate, up, down = torch.randn(8, 6), torch.randn(8, 6), torch.randn(6, 8)
    directory = checkpoint({"mlp.gate_up_proj.weight": torch.cat([gate, up]), "mlp.down_proj.weight": down})
    names = {
        "gate": Made(parts=("mlp.gate_up_proj.weight",), piece=(0, 2)),
        "up": Made(parts=("mlp.gate_up_proj.weight",), piece=(1, 2)),
        "down": "mlp.down_proj.weight",
    }
    assert not audit(directory, _module(gate=gate, up=up, down=down), names)
    order = torch.randperm(8)
    found = audit(directory, _module(gate=gate, up=up[order], down=down[:, order]), names)
    assert len(clues.wrong(found)) == len(found) == 2


def test_an_attention_has_no_hidden_units(checkpoint) -> None:
    """Whatever the attention is called, lanes of all of its layers in another order mix heads."""
    torch.manual_seed(0)
    stored = {f"h.0.attention.{one}.weight": torch.randn(8, 8) for one in ("query", "key", "value", "out")}
    directory, order = checkpoint(stored), torch.randperm(8)
    live = torch.nn.Module()
    live.h = torch.nn.ModuleList([torch.nn.Module()])
    live.h[0].attention = torch.nn.ModuleDict()
    for name, tensor in stored.items():
        held = tensor[:, order] if "out" in name else tensor[order]
        live.h[0].attention[name.split(".")[3]] = _module(weight=held)
    assert len(clues.wrong(audit(directory, live))) == 4
