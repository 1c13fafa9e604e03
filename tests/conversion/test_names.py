"""The table has transformers' own names and shapes, and Megatron-DeepSpeed's layer numbers."""

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from harness.conversion import names
from harness.conversion.names import Cut, Sizes
from tests.conversion.tiny import BLOCK, SIZES


def test_names_and_shapes_are_those_of_transformers():
    """Every tensor of the model that transformers builds is in the table, but for the tied head, and nothing else."""
    config = BloomConfig(
        hidden_size=SIZES.hidden, n_layer=SIZES.layers, n_head=SIZES.heads, vocab_size=SIZES.vocabulary
    )
    with torch.device("meta"):
        model = BloomForCausalLM(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert wanted.pop(names.HEAD) == (SIZES.vocabulary, SIZES.hidden)
    layers = list(names.layers(SIZES.layers))
    assert {layer.name(entry): entry.shape_in(SIZES) for layer in layers for entry in layer.entries} == wanted


@pytest.mark.parametrize(("blocks", "numbers"), [(1, [1, 3, 5]), (3, [1, 3, 4, 5, 7]), (70, [1, *range(3, 73), 74])])
def test_layer_numbers_are_places_in_the_pipeline(blocks, numbers):
    """Blocks stand between two transposes; the last number tells how many they are."""
    assert [layer.number for layer in names.layers(blocks)] == numbers
    assert names.blocks_before(numbers[-1]) == blocks


def test_cuts_are_those_of_the_layers():
    """Column-parallel layers are cut with their biases, row-parallel ones without, all else is replicated."""
    assert {entry.megatron: entry.cut.value for entry in names.BLOCK} == {name: cut for name, (_, cut) in BLOCK.items()}
    assert [entry.cut for entry in names.EMBEDDING] == [Cut.COLUMN, Cut.REPLICATED, Cut.REPLICATED]
    assert {entry.cut for entry in names.FINAL} == {Cut.REPLICATED}


def test_parts_make_up_the_whole():
    """Parts of all ranks have as many elements as the whole, or each has all of them."""
    sizes = Sizes(hidden=24, layers=1, heads=6, vocabulary=18)
    for layer in names.layers(1):
        for entry in layer.entries:
            whole, part = (torch.Size(entry.shape_in(sizes, ranks)).numel() for ranks in (1, 3))
            assert part * (1 if entry.cut is Cut.REPLICATED else 3) == whole
