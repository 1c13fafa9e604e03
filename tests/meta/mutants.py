"""Simple bugs of real ports, applied to a live transformers model: the harness must see each one.

Each takes the model and changes it in place; a host without the part raises LookupError.
"""

from __future__ import annotations

from collections.abc import Callable


def changed_row(model) -> None:
    """One weight row of one MLP projection is 20 % too large."""
    import torch

    layer = _blocks(model)[2]
    with torch.no_grad():
        if hasattr(layer.mlp, "c_fc"):
            layer.mlp.c_fc.weight[:, 3] *= 1.2  # Conv1D keeps [in, out]: an output row is a column
        else:
            (layer.mlp.dense_h_to_4h if hasattr(layer.mlp, "dense_h_to_4h") else layer.mlp.up_proj).weight[3] *= 1.2


def norm_eps(model) -> None:
    """The epsilon of every norm is 1e-6 where the config says 1e-5."""
    for module in model.modules():
        for name in ("eps", "variance_epsilon"):
            if "norm" in type(module).__name__.lower() and hasattr(module, name):
                setattr(module, name, 1e-6)


def erf_gelu(model) -> None:
    """The exact (erf) GELU stands where the tanh form was trained."""
    from torch import nn

    found = False
    for layer in _blocks(model):
        for name in ("gelu_impl", "act"):
            if hasattr(layer.mlp, name) and model.config.model_type in ("bloom", "gpt2"):
                setattr(layer.mlp, name, nn.GELU())
                found = True
    if not found:
        raise LookupError("this model has no GELU")


def missing_last_layer(model) -> None:
    """The last block never runs."""
    if hasattr(model, "transformer"):
        model.transformer.h = model.transformer.h[:-1]
    else:
        model.model.layers = model.model.layers[:-1]
        model.config.num_hidden_layers -= 1  # Llama's loop goes by the config


def _blocks(model):
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


MUTANTS: dict[str, Callable[..., None]] = {
    "one weight row x 1.2": changed_row,
    "norm eps 1e-6 for 1e-5": norm_eps,
    "erf GELU for tanh": erf_gelu,
    "last layer missing": missing_last_layer,
}
