"""Where else a tensor's values are stored."""

import torch

from harness.locate.weights import audit


def test_a_constant_is_held_by_nobody(checkpoint) -> None:
    """A bias that was never loaded is zero, and not the bias of another layer that happens to be."""
    biases = {"layers.0.q.bias": torch.zeros(6), "layers.1.q.bias": torch.randn(6), "layers.2.q.bias": torch.randn(6)}
    directory = checkpoint(biases)
    live = torch.nn.Module()
    live.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"q": torch.nn.Linear(2, 6)}) for _ in range(3)])
    for index, layer in enumerate(live.layers):
        del layer["q"].weight
        layer["q"].bias = torch.nn.Parameter(torch.zeros(6) if index < 2 else biases["layers.2.q.bias"])
    assert [clue.line for clue in audit(directory, live)] == ["layers.1.q.bias: all zero"]
