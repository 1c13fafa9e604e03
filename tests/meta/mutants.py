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


def swapped_rows(model) -> None:
    """Two rows of the first MLP projection of one layer are exchanged, and the second projection is not."""
    import torch

    mlp = _blocks(model)[1].mlp
    with torch.no_grad():
        for parameter in _up(mlp).parameters():
            rows = parameter.T if hasattr(mlp, "c_fc") and parameter.ndim == 2 else parameter
            rows[[3, 17]] = rows[[17, 3]].clone()


def attention_scale(model) -> None:
    """The scores of one layer are 1 % too large."""
    attention = _attention(_blocks(model)[1])
    for name in ("scaling", "inv_norm_factor"):
        if hasattr(attention, name):
            setattr(attention, name, getattr(attention, name) * 1.01)
            return
    raise LookupError("this attention has no scale")


def zeroed_qkv_bias(model) -> None:
    """The biases of query, key and value of one layer were lost in conversion."""
    import torch

    with torch.no_grad():
        for layer in _qkv(_blocks(model)[2]):
            layer.bias.zero_()


def doubled_bias(model) -> None:
    """The bias behind the attention of one layer is added twice, as by two ranks that both add it."""
    import torch

    attention = _attention(_blocks(model)[2])
    output = next(getattr(attention, name) for name in ("o_proj", "dense", "c_proj") if hasattr(attention, name))
    with torch.no_grad():
        output.bias *= 2


def wrong_kv_head(model) -> None:
    """In one layer the queries of two heads see each other's keys and values."""
    import torch

    block, config = _blocks(model)[1], model.config
    with torch.no_grad():
        if config.model_type == "llama":
            for layer in (block.self_attn.k_proj, block.self_attn.v_proj):
                for parameter in layer.parameters():
                    _swap_heads(parameter, config.head_dim, 0, 1)
        elif config.model_type == "bloom":
            # Rows are [heads, (q, k, v), head_dim].
            for parameter in block.self_attention.query_key_value.parameters():
                heads = parameter.unflatten(0, (config.n_head, 3, -1))
                heads[[0, 1], 1:] = heads[[1, 0], 1:].clone()
        else:
            # Columns are q, k, v, each of [heads, head_dim].
            width = config.n_embd
            for parameter in block.attn.c_attn.parameters():
                columns = parameter.T if parameter.ndim == 2 else parameter
                _swap_heads(columns[width:], width // config.n_head, 0, 1)
                _swap_heads(columns[2 * width :], width // config.n_head, 0, 1)


def _swap_heads(rows, size: int, one: int, other: int) -> None:
    first, second = slice(one * size, (one + 1) * size), slice(other * size, (other + 1) * size)
    kept = rows[first].clone()
    rows[first] = rows[second]
    rows[second] = kept


def missing_last_layer(model) -> None:
    """The last block never runs."""
    if hasattr(model, "transformer"):
        model.transformer.h = model.transformer.h[:-1]
    else:
        model.model.layers = model.model.layers[:-1]
        model.config.num_hidden_layers -= 1  # Llama's loop goes by the config


def _blocks(model):
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def _attention(block):
    return next(getattr(block, name) for name in ("self_attn", "self_attention", "attn") if hasattr(block, name))


def _up(mlp):
    return next(getattr(mlp, name) for name in ("up_proj", "dense_h_to_4h", "c_fc") if hasattr(mlp, name))


def _qkv(block):
    attention = _attention(block)
    names = ("q_proj", "k_proj", "v_proj", "query_key_value", "c_attn")
    return [getattr(attention, name) for name in names if hasattr(attention, name)]


MUTANTS: dict[str, Callable[..., None]] = {
    "one weight row x 1.2": changed_row,
    "norm eps 1e-6 for 1e-5": norm_eps,
    "erf GELU for tanh": erf_gelu,
    "two FFN rows swapped": swapped_rows,
    "attention scale +1 % in one layer": attention_scale,
    "one QKV bias zeroed": zeroed_qkv_bias,
    "one bias doubled": doubled_bias,
    "one wrong KV head": wrong_kv_head,
    "last layer missing": missing_last_layer,
}
