"""Small BLOOM checkpoints of random bits in both layouts, written without the converter."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from harness.conversion.names import Sizes

SIZES = Sizes(hidden=24, layers=2, heads=6, vocabulary=17)

#: Shapes of a block's tensors as multiples of the hidden size, and the dimension that ranks cut.
BLOCK = {
    "input_layernorm.weight": ((1,), None),
    "input_layernorm.bias": ((1,), None),
    "self_attention.query_key_value.weight": ((3, 1), 0),
    "self_attention.query_key_value.bias": ((3,), 0),
    "self_attention.dense.weight": ((1, 1), 1),
    "self_attention.dense.bias": ((1,), None),
    "post_attention_layernorm.weight": ((1,), None),
    "post_attention_layernorm.bias": ((1,), None),
    "mlp.dense_h_to_4h.weight": ((4, 1), 0),
    "mlp.dense_h_to_4h.bias": ((4,), 0),
    "mlp.dense_4h_to_h.weight": ((1, 4), 1),
    "mlp.dense_4h_to_h.bias": ((1,), None),
}
ENDS = {
    "word_embeddings.weight": "word_embeddings.weight",
    "word_embeddings.norm.weight": "word_embeddings_layernorm.weight",
    "word_embeddings.norm.bias": "word_embeddings_layernorm.bias",
}


def weights(dtype=torch.bfloat16, seed=0):
    """Tensors by their names in BloomModel: any bits, thus also NaN, infinities and both zeros."""
    generator = torch.Generator().manual_seed(seed)

    def bits(*shape):
        count = int(torch.tensor(shape).prod()) * dtype.itemsize
        return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)

    hidden = SIZES.hidden
    found = {"word_embeddings.weight": bits(SIZES.vocabulary, hidden)}
    found |= {name: bits(hidden) for name in list(ENDS.values())[1:]}
    for block in range(SIZES.layers):
        for name, (factors, _) in BLOCK.items():
            found[f"h.{block}.{name}"] = bits(*(factor * hidden for factor in factors))
    return found | {"ln_f.weight": bits(hidden), "ln_f.bias": bits(hidden)}


def config(dtype="bfloat16", **more):
    """The config of these."""
    sizes = {
        "hidden_size": SIZES.hidden,
        "n_layer": SIZES.layers,
        "n_head": SIZES.heads,
        "vocab_size": SIZES.vocabulary,
    }
    return {"architectures": ["BloomForCausalLM"], "model_type": "bloom", **sizes, "torch_dtype": dtype, **more}


def write_config(directory, **more):
    """Write it into a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config(**more)), encoding="utf-8")
    return directory


def write_pretrained(directory, tensors=None, *, prefix="transformer."):
    """A transformers directory, its tensors in two files, with something that stands for a tokenizer."""
    write_config(directory)
    tensors = {prefix + name: tensor for name, tensor in (tensors or weights()).items()}
    names = sorted(tensors)
    for number, part in ((1, names[::2]), (2, names[1::2])):
        save_file({name: tensors[name] for name in part}, directory / f"model-{number}.safetensors", {"format": "pt"})
    (directory / "tokenizer.json").write_text("{}", encoding="utf-8")
    return directory


def layer_files(tensors, ranks, padding=None):
    """What each layer file holds, by its name: slices written out, the embedding with rows of ``padding`` behind it."""
    whole = {}
    embedding = tensors["word_embeddings.weight"]
    rows = -(-len(embedding) // ranks) * ranks
    fill = torch.zeros(rows - len(embedding), SIZES.hidden, dtype=embedding.dtype) if padding is None else padding
    embedding = torch.cat([embedding, fill])
    whole["01"] = {old: (tensors[new], None) for old, new in ENDS.items()} | {"word_embeddings.weight": (embedding, 0)}
    for block in range(SIZES.layers):
        whole[f"{block + 3:02}"] = {name: (tensors[f"h.{block}.{name}"], cut) for name, (_, cut) in BLOCK.items()}
    whole[f"{SIZES.layers + 4:02}"] = {"weight": (tensors["ln_f.weight"], None), "bias": (tensors["ln_f.bias"], None)}
    return {
        f"layer_{number}-model_{rank:02}-model_states.pt": {
            key: (tensor if cut is None else tensor.chunk(ranks, dim=cut)[rank]).clone()
            for key, (tensor, cut) in layer.items()
        }
        for number, layer in whole.items()
        for rank in range(ranks)
    }


def write_megatron(directory, ranks=2, tensors=None, *, padding=None, told=True):
    """A checkpoint directory as DeepSpeed leaves it, and with ``told`` the config beside."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in layer_files(tensors or weights(), ranks, padding).items():
        torch.save(content, directory / name)
    (directory / "mp_rank_00_model_states.pt").write_bytes(b"optimizer states, which nobody reads")
    if told:
        write_config(directory)
    return directory


def edited(path: Path, change) -> None:
    """Change the tensors of a layer file in place."""
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
