"""The files of a Megatron-DeepSpeed checkpoint, `layer_NN-model_TT-model_states.pt`: find, read and write them.

Their names are those of `PipelineModule.ckpt_layer_path` (deepspeedai/DeepSpeed, deepspeed/runtime/pipe/module.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.conversion.problems import Problems
from harness.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

_FILE = re.compile(r"layer_(\d{1,3})-model_(\d{1,3})-model_states\.pt")
_PREFIX = "layer_"
#: How torch says what a pickle wanted to import.
_WANTED = re.compile(r"GLOBAL (\S+)")

#: Paths by layer number, then rank.
Files = Mapping[int, Mapping[int, Path]]


def file_name(number: int, rank: int) -> str:
    """The file of one layer on one rank."""
    return f"layer_{number:02}-model_{rank:02}-model_states.pt"


def looks_like_one(directory: Path) -> bool:
    """Whether any layer file lies there."""
    return any(_FILE.fullmatch(path.name) for path in directory.iterdir())


def inner_directories(directory: Path) -> list[Path]:
    """Directories in this one that hold a checkpoint: DeepSpeed makes one for each step that it saves."""
    return sorted(path for path in directory.iterdir() if path.is_dir() and looks_like_one(path))


def find(directory: Path, problems: Problems) -> Files:
    """All layer files; what is named like one and is none, or is there twice, goes to ``problems``."""
    found: dict[int, dict[int, Path]] = {}
    for path in sorted(directory.iterdir()):
        if not path.name.startswith(_PREFIX):
            continue
        match = _FILE.fullmatch(path.name)
        if match is None:
            problems.add("unexpected", f"the file {path.name}")
            continue
        number, rank = int(match[1]), int(match[2])
        first = found.setdefault(number, {}).setdefault(rank, path)
        if first != path:
            problems.add("duplicated", f"{path.name} and {first.name}")
    return found


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a layer file, mapped into memory: their bytes are read when they are used.

    Raises:
        ModelError: where the file is damaged, or holds anything but tensors, of which nothing is executed.
    """
    import torch

    fix = "Copy or download it again; only tensors written by torch.save of torch 1.6 or later are read"
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # noqa: BLE001  # a damaged zip or pickle can end in any of them
        wanted = _WANTED.search(str(error))
        reason = f"it names {wanted[1]}" if wanted else type(error).__name__
        raise ModelError(f"{path} holds something else than tensors, or is damaged ({reason})", fix=fix) from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}, no dict of tensors", fix=fix)
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            raise ModelError(f"{path} holds a {type(tensor).__name__} as {name!r}, no plain tensor", fix=fix)
    if sum(tensor.numel() * tensor.element_size() for tensor in content.values()) > path.stat().st_size:
        raise ModelError(f"the tensors of {path} are larger than the file", fix=fix)
    return {name: tensor.detach() for name, tensor in content.items()}


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one layer of one rank, on disk before this returns."""
    import torch

    with open(path, "xb") as opened:
        torch.save(dict(tensors), opened)
        opened.flush()
        os.fsync(opened.fileno())
