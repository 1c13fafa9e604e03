"""A stage of a pipeline: the model's own class with the stage's blocks alone, loaded from their tensors alone.

Blocks are counted anew from 0, so that masks, caches and layer types are those of a shorter model. What a stage does
not hold (embedding, last norm, head) is gone from it; hidden states enter where embeddings would.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import checkpoint
from harness.engines.ranks.layout import Place
from harness.errors import ModelError, UsageError, first_line

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Anatomy:
    """Names of a model's parts, as attributes of its base model.

    Attributes:
        before: what the first stage alone holds, the token embedding first.
        blocks: the list of blocks.
        after: what the last stage alone holds, but for the head.
    """

    before: tuple[str, ...]
    blocks: str
    after: tuple[str, ...]


_ANATOMIES: Mapping[str, Anatomy] = {
    "bloom": Anatomy(before=("word_embeddings", "word_embeddings_layernorm"), blocks="h", after=("ln_f",)),
    "gpt2": Anatomy(before=("wte", "wpe"), blocks="h", after=("ln_f",)),
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3"), Anatomy(before=("embed_tokens",), blocks="layers", after=("norm",))
    ),
}

_HEAD = "lm_head"
#: Entries of a config that have one value a block.
_PER_BLOCK = ("layer_types", "mlp_layer_types")


def anatomy_of(config: Any) -> Anatomy:
    """The parts of a model of this config.

    Raises:
        UsageError: for a model type whose parts are not known here.
    """
    found = _ANATOMIES.get(config.model_type)
    if found is None:
        raise UsageError(
            f"the model type {config.model_type!r} cannot be cut into stages",
            fix=f"Known are {', '.join(sorted(_ANATOMIES))}; tp:size=N runs any model that has a plan",
        )
    return found


def embedding_of(config: Any) -> str:
    """The name of the token embedding in the base model; most types that are not known here call it the same."""
    known = _ANATOMIES.get(config.model_type)
    return "embed_tokens" if known is None else known.before[0]


def stage_config(config: Any, layers: range) -> Any:
    """The config of a model of these blocks alone."""
    found = copy.deepcopy(config)
    found.num_hidden_layers = len(layers)
    for key in _PER_BLOCK:
        values = getattr(found, key, None)
        if isinstance(values, list):
            setattr(found, key, values[layers.start : layers.stop])
    return found


def stage_tensors(directory: Path, config: Any, layers: range, place: Place) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors of a stage, mapped from its files and not read yet; blocks are counted from 0.

    Raises:
        ModelError: for a directory without .safetensors weights, or a file of its index that cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    wanted: dict[Path, list[str]] = {}
    for key, file in checkpoint_keys(directory).items():
        if _belongs(key, config, layers, place):
            wanted.setdefault(file, []).append(key)
    found = {}
    for file, keys in wanted.items():
        try:
            with safe_open(file, framework="pt") as opened:
                for key in keys:
                    found[renumbered(key, config, -layers.start)] = opened.get_tensor(key)
        except (OSError, SafetensorError) as error:
            problem = f"{file} of the checkpoint cannot be read ({first_line(error)})"
            raise ModelError(problem, fix="Check that all files of the index are there, as .safetensors") from None
    return found


def checkpoint_keys(directory: Path) -> dict[str, Path]:
    """Each tensor's name in a checkpoint, with the file that holds it.

    Raises:
        ModelError: for a directory without .safetensors weights, or an index that cannot be read.
    """
    index = directory / "model.safetensors.index.json"
    try:
        if index.is_file():
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            # A name in an index is another's word: it stays inside the directory.
            return {key: directory / Path(name).name for key, name in names.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        fix = "Write it with save_pretrained(..., safe_serialization=True)"
        raise ModelError(f"the checkpoint in {directory} cannot be read ({error})", fix=fix) from None
    return dict(checkpoint.tensor_files(directory))


def renumbered(key: str, config: Any, shift: int) -> str:
    """A tensor's name with the number of its block moved by ``shift``."""
    pattern = rf"(^|\.){anatomy_of(config).blocks}\.(\d+)\."
    return re.sub(pattern, lambda m: f"{m[1]}{anatomy_of(config).blocks}.{int(m[2]) + shift}.", key, count=1)


def _belongs(key: str, config: Any, layers: range, place: Place) -> bool:
    anatomy = anatomy_of(config)
    if block := re.search(rf"(?:^|\.){anatomy.blocks}\.(\d+)\.", key):
        return int(block[1]) in layers
    parts = set(key.split("."))
    if parts & set(anatomy.before):
        # A tied head is the embedding, and the last stage needs it too.
        tied = place.last and bool(config.tie_word_embeddings) and anatomy.before[0] in parts
        return place.first or tied
    return place.last


def cut_down(model: PreTrainedModel, config: Any, place: Place) -> frozenset[str]:
    """Take what the stage does not hold out of a model; returns the names of what is gone, as prefixes.

    What stands in for them hands hidden states through: a first stage's "logits" are hidden states.
    """
    anatomy = anatomy_of(config)
    prefix = model.base_model_prefix
    base: Any = model.base_model
    gone = []
    if not place.first:
        for name in anatomy.before:
            setattr(base, name, _nothing(name))
            gone.append(f"{prefix}.{name}.")
    if not place.last:
        for name in anatomy.after:
            setattr(base, name, _passing())
            gone.append(f"{prefix}.{name}.")
        setattr(model, _HEAD, _passing())
        gone.append(f"{_HEAD}.")
    return frozenset(gone)


def rescale(model: Any, config: Any, layers: range) -> None:
    """Give back to GPT-2's attention the factor of its block's own number, where it has one."""
    if config.model_type == "gpt2" and config.scale_attn_by_inverse_layer_idx:
        for local, block in enumerate(model.transformer.h):
            block.attn.scaling *= (local + 1) / (layers.start + local + 1)


def missing_of(names: Iterable[str], gone: frozenset[str]) -> list[str]:
    """Tensors that the checkpoint lacks, without those of parts that are gone."""
    return sorted(name for name in names if not name.startswith(tuple(gone)))


def _passing() -> nn.Module:
    from torch import nn

    return nn.Identity()


def _nothing(name: str) -> nn.Module:
    """GPT-2 adds positions to whatever embeddings it is given: zeros. Any other part passes its input on."""
    from torch import nn

    class NoPositions(nn.Module):
        def forward(self, position_ids_BT: torch.Tensor) -> torch.Tensor:
            return position_ids_BT.new_zeros((*position_ids_BT.shape, 1))

    return NoPositions() if name == "wpe" else _passing()
