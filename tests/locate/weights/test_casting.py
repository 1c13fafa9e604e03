"""The declared cast, everywhere a stored tensor is compared with what is held."""

import copy

import pytest
import torch

from harness.locate import clues
from harness.locate.weights import audit, proposed
from tests.support import random_model


@pytest.fixture(scope="module")
def shortened(tmp_path_factory):
    """Directories of fp32 checkpoints, and what a candidate holds that declares bfloat16 and computes in float32."""
    found = {}
    for kind in ("bloom", "llama"):
        directory, model = tmp_path_factory.mktemp(kind), random_model(kind)
        model.save_pretrained(directory)
        found[kind] = (directory, model.bfloat16().float())
    return found


def _lines(directory, model, declared: str = "bfloat16") -> list[str]:
    return [clue.line for clue in clues.wrong(audit(directory, model, declared=declared))]


def test_an_untied_copy_of_the_head_is_the_cast_one(shortened) -> None:
    """A head that is a copy of the embedding is right after the same cast."""
    directory, model = shortened["bloom"]
    live = copy.deepcopy(model)
    live.lm_head.weight = torch.nn.Parameter(live.transformer.word_embeddings.weight.detach().clone())
    assert not _lines(directory, live)


def test_rows_behind_a_table_are_behind_the_cast_one(shortened) -> None:
    """An embedding with rows of zeros behind it is a note."""
    directory, model = shortened["llama"]
    live = copy.deepcopy(model)
    table = live.model.embed_tokens.weight.detach()
    live.model.embed_tokens.weight = torch.nn.Parameter(torch.cat([table, torch.zeros(3, table.shape[1])]))
    assert not _lines(directory, live)


def test_other_names_are_found_by_the_cast_rows(shortened) -> None:
    """What a port's tensors are made of is looked for in the declared dtype."""
    directory, model = shortened["llama"]
    port = torch.nn.Module()
    port.up = torch.nn.ParameterList([layer.mlp.up_proj.weight.detach() for layer in model.model.layers])
    port.norms = torch.nn.ParameterList([layer.input_layernorm.weight.detach() for layer in model.model.layers])
    names = proposed(directory, port, declared="bfloat16")
    assert names["up.{}"].parts == ("model.layers.{}.mlp.up_proj.weight",)
    assert names["norms.{}"].parts == ("model.layers.{}.input_layernorm.weight",)


def test_swapped_layers_are_seen_through_the_cast(shortened) -> None:
    """Where a tensor comes from is looked for in the declared dtype."""
    directory, model = shortened["llama"]
    live = copy.deepcopy(model)
    live.model.layers = torch.nn.ModuleList([live.model.layers[1], live.model.layers[0]])
    said = _lines(directory, live)
    assert said == ["model.layers.0: swapped with model.layers.1", "model.layers.1: swapped with model.layers.0"]
