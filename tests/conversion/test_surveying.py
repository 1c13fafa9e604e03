"""Every tensor of a Megatron-DeepSpeed checkpoint is accounted for, and one error lists all that are not."""

import os
from dataclasses import replace

import pytest
import torch

from harness.conversion.megatron import file_name
from harness.conversion.names import Sizes
from harness.conversion.surveying import survey
from harness.errors import ModelError, UsageError
from tests.conversion.tiny import SIZES, edited, weights, write_megatron

UNKNOWN = Sizes(hidden=0, layers=0, heads=SIZES.heads, vocabulary=0)
QKV = "self_attention.query_key_value.weight"
NORM = "input_layernorm.weight"


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("told", [SIZES, UNKNOWN], ids=["told", "derived"])
def test_a_whole_checkpoint_is_surveyed(tmp_path, ranks, told):
    """Ranks, sizes, dtype and padding are found, with a config and without."""
    found = survey(write_megatron(tmp_path, ranks), told)
    rows = {1: 17, 2: 18, 3: 18}[ranks]
    assert (found.ranks, found.rows, found.dtype, found.zeros) == (ranks, rows, "bfloat16", True)
    assert found.sizes == replace(SIZES, vocabulary=told.vocabulary or rows)
    assert found.differing == {}


def test_padding_that_holds_something_is_told(tmp_path):
    """On whichever rank its rows are."""
    padding = torch.zeros(13, SIZES.hidden).bfloat16()
    padding[0, 3] = 1.0  # the first row behind the vocabulary: of rank 1 of 3, whose part ends with row 19
    found = survey(write_megatron(tmp_path, 3, padding=padding), SIZES)
    assert (found.rows, found.zeros) == (30, False)
    assert survey(tmp_path, replace(SIZES, vocabulary=18)).zeros


def _without(key):
    return lambda content: content.pop(key)


def _with(key, tensor):
    return lambda content: content.update({key: tensor})


#: What is done to layer 3 of rank 1 of 2, and the line that tells it.
DAMAGE = {
    "missing": (_without(QKV), f"missing: {QKV} in layer 3 (rank 1)"),
    "missing replicated": (_without(NORM), f"missing: {NORM} in layer 3 (rank 1)"),
    "unexpected": (_with("lora", torch.ones(1)), "unexpected: 'lora' in layer 3 (rank 1)"),
    "mis-shaped": (
        _with(QKV, torch.ones(35, 24).bfloat16()),
        f"mis-shaped: {QKV} in layer 3 is [35, 24], expected [36, 24] (rank 1)",
    ),
    "transposed": (
        _with("mlp.dense_4h_to_h.weight", torch.ones(48, 24).bfloat16()),
        "mis-shaped: mlp.dense_4h_to_h.weight in layer 3 is [48, 24], expected [24, 48] (rank 1)",
    ),
    "of another dtype": (
        lambda content: content.update({QKV: content[QKV].float()}),
        f"of another dtype: {QKV} in layer 3 is float32, most are bfloat16 (rank 1)",
    ),
}


@pytest.mark.parametrize("told", [SIZES, UNKNOWN], ids=["told", "derived"])
@pytest.mark.parametrize(("change", "line"), DAMAGE.values(), ids=DAMAGE)
def test_what_is_wrong_with_a_tensor_is_told(tmp_path, change, line, told):
    """Its layer, its rank, what was expected; with a config and without."""
    write_megatron(tmp_path)
    edited(tmp_path / file_name(3, 1), change)
    with pytest.raises(ModelError) as error:
        survey(tmp_path, told)
    assert error.value.problem == f"{tmp_path}: {line}"


def test_what_is_wrong_with_a_file_is_told(tmp_path):
    """Missing, damaged, of a layer that the model has not, misnamed: all in one error, with tensors of others."""
    write_megatron(tmp_path)
    (tmp_path / file_name(3, 0)).unlink()
    os.truncate(tmp_path / file_name(4, 1), 2000)
    (tmp_path / file_name(6, 0)).rename(tmp_path / file_name(7, 0))
    (tmp_path / file_name(1, 1)).rename(tmp_path / "layer_01-model_01.pt")
    edited(tmp_path / file_name(3, 1), _without(QKV))
    with pytest.raises(ModelError) as error:
        survey(tmp_path, SIZES)
    counts = "2 unexpected, 4 missing, 1 unreadable"
    assert error.value.problem.startswith(f"{tmp_path}: {counts}: ")
    assert "and 4 more" in error.value.problem
    told = error.value.details
    for words in (
        "unexpected: the file layer_01-model_01.pt",
        "unexpected: the file layer_07-model_00-model_states.pt, in a model of 2 blocks",
        "missing: the file layer_01-model_01-model_states.pt",
        "missing: the file layer_03-model_00-model_states.pt",
        "missing: the file layer_06-model_00-model_states.pt",
        f"missing: {QKV} in layer 3 (rank 1)",
        "layer_04-model_01-model_states.pt holds something else than tensors, or is damaged",
    ):
        assert words in told
    assert len(told.splitlines()) == 7


@pytest.mark.parametrize("told", [SIZES, UNKNOWN], ids=["told", "derived"])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_that_is_missing_is_noticed(tmp_path, told, rank):
    """Also the last one, which leaves files that look like those of fewer ranks."""
    write_megatron(tmp_path, 3)
    for path in tmp_path.glob(f"*-model_{rank:02}-*"):
        path.unlink()
    with pytest.raises(ModelError, match=r"missing|mis-shaped"):
        survey(tmp_path, told)


def test_a_config_of_another_model_is_noticed(tmp_path):
    """More blocks, fewer blocks, another hidden size, more rows, heads that ranks cannot share."""
    write_megatron(tmp_path)
    for change, words in (
        ({"layers": 3}, "missing: the file layer_05"),
        ({"layers": 1}, "unexpected: the file layer_04"),
        ({"hidden": 48}, "mis-shaped"),
        ({"vocabulary": 19}, "18 rows on all ranks for a vocabulary of 19"),
        ({"heads": 3}, "3 heads for a hidden size of 24 on 2 ranks"),
    ):
        with pytest.raises(ModelError, match=words):
            survey(tmp_path, replace(SIZES, **change))


def test_heads_must_be_told(tmp_path):
    """No tensor shows their number."""
    with pytest.raises(UsageError, match=r"how many heads.*--heads N"):
        survey(write_megatron(tmp_path), replace(UNKNOWN, heads=0))


def test_no_checkpoint_is_derived_from_nothing(tmp_path):
    """Without the embedding, or with nothing behind it."""
    write_megatron(tmp_path)
    for path in tmp_path.glob("layer_0[346]*"):
        path.unlink()
    with pytest.raises(ModelError, match="holds no blocks: its last layer is 1"):
        survey(tmp_path, UNKNOWN)
    write_megatron(tmp_path)
    (tmp_path / file_name(1, 0)).unlink()
    with pytest.raises(ModelError, match=r"rank 0's part of word_embeddings\.weight"):
        survey(tmp_path, UNKNOWN)
    with pytest.raises(ModelError, match="missing: the file layer_01-model_00"):
        survey(tmp_path, SIZES)
    write_megatron(tmp_path)
    edited(tmp_path / file_name(1, 0), _with("word_embeddings.weight", torch.ones(0, SIZES.hidden)))
    with pytest.raises(ModelError, match=r"rank 0's part of word_embeddings\.weight"):
        survey(tmp_path, UNKNOWN)


def test_replicated_tensors_must_be_alike(tmp_path):
    """To the bit: which ranks differ is told, and how far apart they are, unless they are to be averaged."""
    tensors = weights()
    tensors["h.0.input_layernorm.weight"] = torch.linspace(-1, 1, SIZES.hidden).bfloat16()
    write_megatron(tmp_path, 3, tensors)
    for rank, by in ((1, 0.5), (2, -0.25)):
        edited(tmp_path / file_name(3, rank), lambda content, by=by: content[NORM][0].add_(by))
    with pytest.raises(ModelError) as error:
        survey(tmp_path, SIZES)
    told = f"{NORM} in layer 3: ranks 1, 2 and rank 0 are up to 0.5 apart"
    assert error.value.problem == f"{tmp_path}: not alike on all ranks: {told}"
    assert "--average-replicated" in error.value.fix
    assert survey(tmp_path, SIZES, average=True).differing == {(3, NORM): 0.5}


def test_zero_and_minus_zero_are_not_alike(tmp_path):
    """Equal as numbers, not as bits."""
    tensors = weights()
    tensors["ln_f.bias"] = torch.zeros(SIZES.hidden).bfloat16()
    write_megatron(tmp_path, 2, tensors)
    edited(tmp_path / file_name(6, 1), lambda content: content["bias"].neg_())
    with pytest.raises(ModelError, match="bias in layer 6: rank 1 and rank 0 are up to 0 apart"):
        survey(tmp_path, SIZES)


def test_averaging_forgives_nothing_else(tmp_path):
    """A missing tensor is still missing."""
    write_megatron(tmp_path)
    edited(tmp_path / file_name(3, 1), _without(NORM))
    with pytest.raises(ModelError, match="missing"):
        survey(tmp_path, SIZES, average=True)


def test_whole_numbers_are_no_weights(tmp_path):
    """A quantised checkpoint is not taken for a plain one."""
    tensors = {name: torch.ones(tensor.shape, dtype=torch.int8) for name, tensor in weights().items()}
    with pytest.raises(ModelError, match="most tensors are int8; known are float16"):
        survey(write_megatron(tmp_path, 2, tensors), SIZES)
