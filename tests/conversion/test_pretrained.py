"""Every tensor of a transformers directory is accounted for."""

import os

import pytest
import torch
from safetensors.torch import save_file

from harness.conversion.pretrained import survey
from harness.errors import ModelError
from tests.conversion.tiny import SIZES, weights, write_pretrained

EMBEDDING = "word_embeddings.weight"


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_names_with_and_without_prefix(tmp_path, prefix):
    """As BloomForCausalLM saves them, and as BLOOM was published."""
    tensors = weights()
    found = survey(write_pretrained(tmp_path, tensors, prefix=prefix), SIZES)
    assert found.dtype == "bfloat16"
    assert set(found.tensors) == {"transformer." + name for name in tensors}
    for name, tensor in tensors.items():
        read = found.tensors["transformer." + name].read()
        assert torch.equal(read.view(torch.uint8), tensor.view(torch.uint8))


def test_all_that_is_wrong_is_listed(tmp_path):
    """Missing, unexpected, mis-shaped, of another dtype, twice under two names, in one error."""
    tensors = weights()
    del tensors["ln_f.bias"]
    tensors["h.2.input_layernorm.bias"] = torch.ones(SIZES.hidden).bfloat16()
    tensors["ln_f.weight"] = torch.ones(3).bfloat16()
    tensors["h.0.input_layernorm.bias"] = tensors["h.0.input_layernorm.bias"].half()
    write_pretrained(tmp_path, tensors)
    save_file({EMBEDDING: tensors[EMBEDDING]}, tmp_path / "stale.safetensors")
    with pytest.raises(ModelError) as error:
        survey(tmp_path, SIZES)
    assert len(error.value.details.splitlines()) == 5
    for words in (
        "duplicated: 'word_embeddings.weight' of stale.safetensors and 'transformer.word_embeddings.weight' of model-",
        "missing: transformer.ln_f.bias",
        "unexpected: 'transformer.h.2.input_layernorm.bias' in model-",
        "mis-shaped: transformer.ln_f.weight is [3], expected [24]",
        "of another dtype: transformer.h.0.input_layernorm.bias is float16, most are bfloat16",
    ):
        assert words in error.value.details


def test_a_damaged_file_is_told(tmp_path):
    """Beside what is missing for it."""
    write_pretrained(tmp_path)
    os.truncate(tmp_path / "model-2.safetensors", 100)
    with pytest.raises(ModelError, match=r"1 unreadable, \d+ missing.*model-2.safetensors"):
        survey(tmp_path, SIZES)


def test_a_head_must_be_the_embedding(tmp_path):
    """To the bit: where it is, it is left out; where it is not, nothing could hold it."""
    tensors = weights()
    write_pretrained(tmp_path, tensors)
    save_file({"lm_head.weight": tensors[EMBEDDING]}, tmp_path / "head.safetensors")
    assert "lm_head.weight" not in survey(tmp_path, SIZES).tensors
    other = tensors[EMBEDDING].clone()
    other.view(torch.uint8)[3, 5] ^= 1
    save_file({"lm_head.weight": other}, tmp_path / "head.safetensors")
    with pytest.raises(ModelError, match=r"untied: lm_head\.weight is not the embedding"):
        survey(tmp_path, SIZES)


def test_whole_numbers_are_no_weights(tmp_path):
    """A quantised checkpoint is not taken for a plain one."""
    tensors = {name: torch.ones(tensor.shape, dtype=torch.int8) for name, tensor in weights().items()}
    with pytest.raises(ModelError, match="most tensors are I8"):
        survey(write_pretrained(tmp_path, tensors), SIZES)
