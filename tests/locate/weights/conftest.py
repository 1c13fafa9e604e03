"""Checkpoints that the audit is tried on."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.support import random_model

KINDS = ("bloom", "gpt2", "llama")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A directory and a live model of each architecture, stored in bfloat16."""
    found = {}
    for kind in KINDS:
        directory, model = tmp_path_factory.mktemp(kind), random_model(kind, dtype="bfloat16")
        model.save_pretrained(directory)
        found[kind] = (directory, model)
    return found


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Writes tensors and a config, and gives the directory."""

    def written(tensors: dict[str, torch.Tensor], config: str = "{}") -> Path:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(config, encoding="utf-8")
        return tmp_path

    return written
