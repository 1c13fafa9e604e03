"""What a whole model keeps of its places, and what a shard should show of them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.pytorch_utils import Conv1D

from harness.engines.ranks import probes
from harness.engines.ranks.plans import Cut
from harness.engines.ranks.probes import PROMPTS, TOKENS, Unheard, Whole, projected
from harness.values import Request


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_partial_product_needs_the_projected_weight_alone(size: int) -> None:
    """Projections of a shard's product are those of its input with the projections of its rows of the weight."""
    numbers = np.random.default_rng(0)
    values, weight = numbers.standard_normal((8, 7)), numbers.standard_normal((7, 5))
    kept = Whole(
        module="o", side="partial", summed=True, values=values, projected_weight=projected(torch.from_numpy(weight))
    )
    for shard in range(size):
        columns = Cut(dim=1).of(torch.from_numpy(values), shard, size)
        rows = Cut(dim=0).of(torch.from_numpy(weight), shard, size)
        assert np.allclose(kept.of(shard, size), projected(columns @ rows))


@pytest.mark.parametrize(("layer", "outputs_first"), [(torch.nn.Linear(6, 4), True), (Conv1D(4, 6), False)])
def test_a_weight_is_kept_as_its_projections(layer: torch.nn.Module, outputs_first: bool) -> None:
    """[inputs, J] of either kind of layer, and no copy of the weight."""
    model = torch.nn.ModuleDict({"o": layer})
    weight = layer.weight.detach()
    assert np.array_equal(probes._projected_weight(model, "o"), projected(weight.T if outputs_first else weight))


def test_a_probe_is_of_the_longest_prompts_cut_to_one_length() -> None:
    """Equal lengths need no padding; what is asked for is short."""
    lengths = (3, 40, 30, 35, 29)
    requests = tuple(Request(id=str(n), prompt_ids=tuple(range(n)), max_new_tokens=9) for n in lengths)
    asked, continuations = probes.asked(SimpleNamespace(requests=requests))
    assert [one.id for one in asked] == ["40", "35", "30", "29"][:PROMPTS]
    assert {len(one.prompt_ids) for one in asked} == {TOKENS}
    assert len(continuations) == len(asked)


def test_who_is_not_asked_takes_logits_of_no_width() -> None:
    """Most ranks have none to show: nothing is kept, and nothing is looked at."""
    unheard = Unheard(101)
    unheard.add(torch.empty((4, 0)), torch.zeros(4), request=None, position=None, generated=None)
