"""The safetensors files of a transformers BLOOM: account for every tensor in them, and read one."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.conversion import cutting, names, shards
from harness.conversion.names import Sizes
from harness.conversion.problems import Problems
from harness.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

_MENDS = "Nothing was written; give a directory written by save_pretrained, with the config.json that belongs to it"
_WORDS = {word: dtype for dtype, word in shards.DTYPES.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """Where a tensor lies, under which name; ``dtype`` in torch's word, or the file's for one that is unknown."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> Tensor:
        """Its bytes.

        Raises:
            ModelError: where the file does not give them.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, framework="pt") as opened:
                tensor: Tensor = opened.get_tensor(self.name)
        except (SafetensorError, OSError, RuntimeError) as error:
            problem = f"the tensor {self.name} of {self.path} cannot be read ({type(error).__name__})"
            raise ModelError(problem, fix="Copy or download it again") from None
        return tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """A checkpoint that is whole: its tensors by their names in BloomForCausalLM, and their one dtype."""

    tensors: dict[str, Stored]
    dtype: str


def survey(directory: Path, sizes: Sizes) -> Contents:
    """Find the tensors of a model of these sizes.

    Raises:
        ModelError: with all that is missing, unexpected, duplicated, mis-shaped, of another dtype or unreadable, and a
            head that is not the embedding.
    """
    problems = Problems()
    found = _stored(directory, problems)
    wanted = {
        layer.name(entry): entry.shape_in(sizes) for layer in names.layers(sizes.layers) for entry in layer.entries
    }
    embedding = next(iter(wanted))
    head = found.pop(names.HEAD, None)
    counts = Counter(one.dtype for one in found.values())
    most = max(counts, key=lambda dtype: (counts[dtype], dtype), default="")
    for name in sorted(wanted.keys() - found.keys()):
        problems.add("missing", name)
    for name, one in found.items():
        if name not in wanted:
            problems.add("unexpected", f"{one.name!r} in {one.path.name}")
            continue
        if one.shape != wanted[name]:
            problems.add("mis-shaped", f"{name} is {list(one.shape)}, expected {list(wanted[name])}")
        if one.dtype != most:
            problems.add("of another dtype", f"{name} is {one.dtype}, most are {most}")
    if most and most not in shards.DTYPES:
        problems.add("of another dtype", f"most tensors are {most}; known are {', '.join(shards.DTYPES)}")
    if head and embedding in found and not cutting.same_bits(head.read(), found[embedding].read()):
        problems.add("untied", f"{names.HEAD} is not the embedding, and Megatron-DeepSpeed's BLOOM has one for both")
    problems.raise_any(directory, fix=_MENDS)
    return Contents(tensors=found, dtype=most)


def _stored(directory: Path, problems: Problems) -> dict[str, Stored]:
    """Every tensor of every file, by its name with the prefix."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, Stored] = {}
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  # safe_open is no mapping
                    part = opened.get_slice(name)
                    one = Stored(
                        path=path,
                        name=name,
                        shape=tuple(part.get_shape()),
                        dtype=_WORDS.get(part.get_dtype(), part.get_dtype()),
                    )
                    plain = name if name == names.HEAD else names.PREFIX + name.removeprefix(names.PREFIX)
                    first = found.setdefault(plain, one)
                    if first is not one:
                        problems.add("duplicated", f"{name!r} of {path.name} and {first.name!r} of {first.path.name}")
        except (SafetensorError, OSError) as error:
            problems.add("unreadable", f"{path} ({type(error).__name__})")
    return found
