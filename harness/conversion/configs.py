"""The config.json of a BLOOM: read it, derive it, hold it against transformers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from harness.conversion.names import HEAD, Sizes
from harness.conversion.problems import Problems
from harness.conversion.shards import Planned
from harness.errors import ModelError, first_line

FILE = "config.json"

#: Keys of each size; where several are given, BloomConfig takes the first.
_KEYS: Mapping[str, tuple[str, ...]] = {
    "hidden": ("n_embed", "hidden_size"),
    "layers": ("n_layer", "num_hidden_layers"),
    "heads": ("n_head", "num_attention_heads"),
    "vocabulary": ("vocab_size",),
}
_DTYPES = ("dtype", "torch_dtype")
_MENDS = "Give a config.json of a BLOOM with --config"


def read(path: Path) -> dict[str, Any]:
    """The config in a file.

    Raises:
        ModelError: where it is none, or one that this checkpoint layout cannot hold.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise ModelError(f"{path} is not JSON that can be read ({type(error).__name__})", fix=_MENDS) from None
    if not isinstance(config, dict) or config.get("model_type") != "bloom":
        raise ModelError(f"{path} is not the config of a BLOOM", fix=_MENDS)
    if config.get("tie_word_embeddings", True) is not True:
        raise ModelError(
            f"{path} says tie_word_embeddings=false, and in Megatron-DeepSpeed's BLOOM the head is the embedding",
            fix="A model with a head of its own cannot be converted",
        )
    return config


def sizes_in(config: Mapping[str, Any], path: Path) -> Sizes:
    """What a config says about shapes.

    Raises:
        ModelError: where a size is missing, or heads do not divide the hidden size.
    """
    found: dict[str, int] = {}
    for size, keys in _KEYS.items():
        value = next((config[key] for key in keys if config.get(key) is not None), None)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"{path} has {keys[-1]}={value!r}, which is no size", fix=_MENDS)
        found[size] = value
    if found["hidden"] % found["heads"]:
        problem = f"{path} has {found['heads']} heads, which do not divide a hidden size of {found['hidden']}"
        raise ModelError(problem, fix=_MENDS)
    return Sizes(**found)


def derived(sizes: Sizes) -> dict[str, Any]:
    """A config from the shapes of the tensors; what these do not show is Megatron-DeepSpeed's default."""
    return {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "hidden_size": sizes.hidden,
        "n_layer": sizes.layers,
        "n_head": sizes.heads,
        "vocab_size": sizes.vocabulary,
        "layer_norm_epsilon": 1e-05,
        "apply_residual_connection_post_layernorm": False,
        "tie_word_embeddings": True,
    }


def adapted(config: Mapping[str, Any], *, vocabulary: int, dtype: str) -> dict[str, Any]:
    """The config of a checkpoint of this dtype and this many embedding rows; all else as it was."""
    keys = [key for key in _DTYPES if key in config] or [_DTYPES[-1]]
    return {**config, "vocab_size": vocabulary, **dict.fromkeys(keys, dtype)}


def dtype_in(config: Mapping[str, Any]) -> str | None:
    """The dtype that a config names, if it does."""
    return next((str(config[key]) for key in _DTYPES if config.get(key) is not None), None)


def hold_against_transformers(config: Mapping[str, Any], planned: Iterable[Planned], problems: Problems) -> None:
    """Compare names and shapes with those of the model that transformers builds from this config (on meta)."""
    import torch
    from transformers import BloomConfig, BloomForCausalLM

    from harness.environment import Quiet

    try:
        with Quiet(), torch.device("meta"):
            model = BloomForCausalLM(BloomConfig(**config))
    except Exception as error:  # noqa: BLE001  # whatever transformers makes of a strange value
        problems.add("refused by transformers", f"the config: {first_line(error)}")
        return
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name != HEAD}
    given = {one.name: one.shape for one in planned}
    for name in sorted(wanted.keys() | given.keys()):
        if wanted.get(name) != given.get(name):
            text = f"{name} has {given.get(name, 'no')} shape, and {wanted.get(name, 'none')} in transformers"
            problems.add("unlike transformers", text)
