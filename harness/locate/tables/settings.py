"""Numbers and words that modules and configs keep: epsilon, scale, window, cap, heads, offsets, activations by name."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from harness.locate.clues import Clue
from harness.locate.tables.reference import Reference, text_config

if TYPE_CHECKING:
    from torch import nn

#: Keys of a config that say how a model is stored or driven, not what it computes.
_HOW = frozenset(
    (
        "dtype", "torch_dtype", "_name_or_path", "name_or_path", "architectures", "transformers_version", "use_cache",
        "return_dict", "auto_map", "output_attentions", "output_hidden_states", "id2label", "label2id",
        "attn_implementation", "_attn_implementation", "torchscript", "quantization_config", "gradient_checkpointing",
        "initializer_range", "problem_type", "pretraining_tp", "chunk_size_feed_forward", "is_encoder_decoder",
        "experts_implementation",
    )
)  # fmt: skip
#: Attributes of modules that change nothing of what is computed.
_STATE = frozenset(
    ("training", "gradient_checkpointing", "max_seq_len_cached", "in_features", "out_features", "nx", "nf")
)

_EPS = ("eps", "variance_epsilon", "epsilon", "norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps")
_SCALE = ("scaling", "scale", "softmax_scale", "inv_norm_factor", "attention_scale", "attn_scale", "scale_factor")
_WINDOW = ("sliding_window", "window", "window_size")
_CAP = ("attn_logit_softcapping", "softcap", "logit_softcapping", "final_logit_softcapping")
_ROLES: Mapping[str, tuple[str, ...]] = {"epsilon": _EPS, "scale": _SCALE, "window": _WINDOW, "soft cap": _CAP}

Plain = bool | int | float | str | None


def settings(reference: Reference, model: nn.Module) -> Iterator[Clue]:
    """Clues of all plain settings: of the configs, of modules of one name, and by their role where names differ."""
    yield from _configs(reference, model)
    live = dict(model.named_modules())
    common = [name for name in live if name in reference.modules]
    for name in common:
        right, held = reference.modules[name], live[name]
        if type(right) is type(held):
            yield from _attributes(name, right, held, evaluated=not model.training)
    if len(common) <= 1:
        yield from _by_role(reference, live)


# --- configs -----------------------------------------------------------------------------------


def _configs(reference: Reference, model: nn.Module) -> Iterator[Clue]:
    held, right = getattr(model, "config", None), reference.config
    if not hasattr(held, "to_dict") or not hasattr(right, "to_dict"):
        return
    mine, theirs = text_config(held).to_dict(), text_config(right).to_dict()
    for key in sorted({*mine, *theirs} - _HOW):
        if key not in mine or key not in theirs:
            if mine.get(key) != theirs.get(key):
                yield _clue("", key, theirs.get(key), mine.get(key))
        elif not _equal(mine[key], theirs[key]):
            yield _clue("", key, theirs[key], mine[key])


# --- modules of one name -------------------------------------------------------------------------


def _attributes(name: str, right: nn.Module, held: nn.Module, *, evaluated: bool) -> Iterator[Clue]:
    mine, theirs = _plain(held), _plain(right)
    for key in sorted({*mine, *theirs}):
        if key not in theirs or key not in mine:
            continue
        if not _equal(mine[key], theirs[key]):
            yield _clue(name, key, theirs[key], mine[key])
    drops = [value for key, value in mine.items() if ("dropout" in key or key == "p") and isinstance(value, float)]
    if evaluated and held.training and any(drops):
        yield _clue(name, "training", False, True)


def _plain(module: nn.Module) -> dict[str, Plain]:
    kept = {key: value for key, value in vars(module).items() if not key.startswith("_") and key not in _STATE}
    return {key: value for key, value in kept.items() if isinstance(value, (bool, int, float, str)) or value is None}


# --- other names -----------------------------------------------------------------------------------


def _by_role(reference: Reference, live: Mapping[str, nn.Module]) -> Iterator[Clue]:
    """A port's settings go by what they are called: each must be one that the reference has in that role."""
    for role, names in _ROLES.items():
        right = {value for module in reference.modules.values() for value in _numbers(module, names).values()}
        right |= set(_numbers(text_config(reference.config), names).values())
        if not right:
            continue
        accepted = right | ({1 / value for value in right if value} if role == "scale" else set())
        for path, module in live.items():
            for key, value in _numbers(module, names).items():
                if not any(_equal(value, one) for one in accepted):
                    nearest = min(right, key=lambda one: abs(one - value))
                    yield _clue(path, key, nearest, value)


def _numbers(owner: Any, names: tuple[str, ...]) -> dict[str, float]:
    found = {name: vars(owner).get(name) for name in names} if owner is not None else {}
    return {
        name: float(one) for name, one in found.items() if isinstance(one, (int, float)) and one is not True and one
    }


# --- both --------------------------------------------------------------------------------------


def _equal(a: Any, b: Any) -> bool:
    """As values; two floats that are one float32 are one setting, written in other ways."""
    import numpy as np

    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return set(a) == set(b) and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_equal(one, other) for one, other in zip(a, b, strict=True))
    if isinstance(a, (int, float)) and isinstance(b, (int, float)) and float in (type(a), type(b)):
        return a == b or (math.isfinite(a) and math.isfinite(b) and np.float32(a) == np.float32(b))
    return bool(a == b)


def _clue(module: str, key: str, right: Any, held: Any) -> Clue:
    numbers = all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in (right, held))
    size = abs(held - right) / abs(right) if numbers and right else 1.0
    evidence = {"right": float(right), "held": float(held)} if numbers else {}
    text = f"{key} is {_word(held)} where {_word(right)} is right"
    return Clue(kind="config", module=module, text=text, wrong=True, size=float(size), evidence=evidence)


def _word(value: Any) -> str:
    return f"{value:.7g}" if isinstance(value, float) else str(value)
