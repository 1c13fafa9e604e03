"""Differences that leave the function as it is: hidden units in another order, a key's bias without RoPE."""

from __future__ import annotations

from collections.abc import Mapping

from harness.locate.weights.explaining import Difference
from harness.locate.weights.stored import Stored

#: Whose keys' bias gives all scores of a query the same: no RoPE, no norm of keys, a plain softmax.
_NO_ROPE = ("bloom", "gpt2", "opt")


def compensated(stored: Stored, differences: Mapping[str, Difference]) -> dict[str, str]:
    """By tensor name, why its difference changes nothing; names of the others are left out."""
    return {**_reordered(stored, differences), **_key_bias(stored, differences)}


def _reordered(stored: Stored, differences: Mapping[str, Difference]) -> dict[str, str]:
    """Outputs of all layers into the hidden units of an MLP, and inputs of the one out of them, in one order."""
    backwards = stored.config.get("model_type") == "gpt2"
    inputs, outputs = (0, 1) if backwards else (1, 0)
    found: dict[str, str] = {}
    for name, difference in differences.items():
        parent = name.rpartition(".")[0].rpartition(".")[0]
        if (
            difference.order is None
            or len(stored.shapes[name]) != 2
            or difference.order[0] != inputs
            or "att" in parent.lower()
        ):
            continue
        order = difference.order[1]
        into = {
            other: (outputs if len(shape) == 2 else 0)
            for other, shape in stored.shapes.items()
            if other.startswith(f"{parent}.") and other.rpartition(".")[0] != name.rpartition(".")[0]
        }
        same = {
            other: (one := differences.get(other)) is not None and one.order == (dim, order)
            for other, dim in into.items()
        }
        if into and all(same.values()):
            text = "hidden units in another order, on both sides of the activation: the same function"
            found |= dict.fromkeys((name, *into), text)
    return found


def _key_bias(stored: Stored, differences: Mapping[str, Difference]) -> dict[str, str]:
    if stored.config.get("model_type") not in _NO_ROPE:
        return {}
    found: dict[str, str] = {}
    for name, difference in differences.items():
        if name.endswith(".bias") and difference.parts == "k":
            found[name] = "the bias of the keys alone differs: without RoPE every score of a query gets the same"
    return found
