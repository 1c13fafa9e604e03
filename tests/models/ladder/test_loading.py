import pytest
import torch
from safetensors.torch import save_file

from harness.models.ports.ladder.loading import load_tensors


def test_names_are_those_of_transformers(tmp_path):
    """With the prefix of the body or without it, over several files, in the dtype that is asked."""
    save_file({"h.0.mlp.bias": torch.ones(2)}, tmp_path / "a.safetensors")
    save_file({"transformer.ln_f.bias": torch.ones(2), "lm_head.weight": torch.ones(2, 2)}, tmp_path / "b.safetensors")
    found = load_tensors(tmp_path, torch.bfloat16)
    assert set(found) == {"transformer.h.0.mlp.bias", "transformer.ln_f.bias", "lm_head.weight"}
    assert {one.dtype for one in found.values()} == {torch.bfloat16}


def test_a_directory_without_weights_is_refused(tmp_path):
    """What is missing is said."""
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors file"):
        load_tensors(tmp_path, torch.float32)
