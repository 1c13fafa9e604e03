"""The tensors of a BLOOM checkpoint by the names of transformers' modules, from a directory of .safetensors files."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

_BODY = "transformer."


def load_tensors(directory: str | Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor in ``dtype``; checkpoints of the body alone name them without the prefix.

    Raises:
        FileNotFoundError: where the directory holds no .safetensors file.
    """
    files = sorted(Path(directory).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no .safetensors file in {directory}")
    found: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # it is no mapping
                known = name if name.startswith((_BODY, "lm_head.")) else _BODY + name
                found[known] = tensors.get_tensor(name).to(dtype)
    return found
