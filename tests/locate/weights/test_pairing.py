"""Which tensor of a candidate is which of a checkpoint."""

import torch

from harness.locate import clues
from harness.locate.weights import audit


def test_a_tied_tensor_is_there_under_either_name(checkpoint) -> None:
    """Where only the second of two tied names is stored, the first is no extra."""
    table = torch.randn(9, 6)
    directory = checkpoint({"lm_head.weight": table})
    live = torch.nn.Module()
    live.embed, live.lm_head = torch.nn.Embedding(9, 6), torch.nn.Linear(6, 9, bias=False)
    live.embed.weight = live.lm_head.weight = torch.nn.Parameter(table)
    assert not clues.wrong(audit(directory, live))
