"""The tensors of a checkpoint, read one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.checkpoint import tensor_files
from harness.errors import ModelError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """A model directory's tensors.

    Attributes:
        files: by tensor name, the file that holds it.
        shapes: by tensor name.
        config: what ``config.json`` says, of the language model alone where it is one of several; empty without one.
    """

    files: Mapping[str, Path]
    shapes: Mapping[str, tuple[int, ...]]
    config: Mapping[str, Any]

    def read(self, name: str) -> torch.Tensor:
        """One tensor in its own dtype, on the CPU.

        Raises:
            ModelError: where it cannot be read.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.files[name], framework="pt") as opened:
                tensor: torch.Tensor = opened.get_tensor(name)
        except (SafetensorError, OSError, TypeError, RuntimeError) as error:
            problem = f"the tensor {name} of {self.files[name]} cannot be read ({str(error).splitlines()[0]})"
            raise ModelError(problem, fix="Copy or download the checkpoint again") from None
        return tensor

    def like(self, shape: tuple[int, ...]) -> Iterator[str]:
        """Names of the tensors of one shape, in their order."""
        return (name for name, one in self.shapes.items() if one == shape)


def opened(directory: Path) -> Stored:
    """The tensors of a model directory; none is read yet.

    Raises:
        ModelError: where there are none, or a file is damaged.
    """
    from safetensors import safe_open

    files = dict(tensor_files(directory))
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(set(files.values())):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # the file is no mapping
                shapes[name] = tuple(file.get_slice(name).get_shape())
    return Stored(files=files, shapes=dict(sorted(shapes.items())), config=_config(directory))


def _config(directory: Path) -> Mapping[str, Any]:
    import json

    try:
        found = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    inner = found.get("text_config") if isinstance(found, dict) else None
    merged = {**found, **inner} if isinstance(inner, dict) else found
    return merged if isinstance(merged, dict) else {}
