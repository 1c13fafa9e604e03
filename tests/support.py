"""What many tests need: a small random model with a tokenizer, a small suite, a golden of the two."""

from __future__ import annotations

import json
from pathlib import Path

from harness.environment import dtype_key
from harness.models import tokenizer

SUITE = """
name = "small"
description = "Three prompts of unequal length."
stop = "ignore-eos"
add_special_tokens = true
max_new_tokens = 6

[[prompts]]
id = "short"
text = "In the morning"

[[prompts]]
id = "long"
text = "def add_total_value(total, value):"
repeat_to_tokens = 40

[[prompts]]
id = "ids"
ids = [7, 8, 9, 10, 11]

[[runs]]
name = "batched"
views = ["replay", "prefill"]
quick = true

[[runs]]
name = "single"
batch_size = 1
views = ["generate", "replay"]

[[runs]]
name = "order"
batch_size = 1
order = "A-B-A"
views = ["replay"]
"""

VOCABULARY = 301
_HIDDEN = 36


def config_of(kind: str) -> dict[str, object]:
    """Keyword arguments of a small config of one architecture, 2 layers, no dropout."""
    return {
        "bloom": {"hidden_size": _HIDDEN, "n_layer": 2, "n_head": 6, "seq_length": 128},
        "gpt2": {
            "n_embd": _HIDDEN, "n_layer": 2, "n_head": 6, "n_positions": 128, "n_inner": 54,
            "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        },
        "llama": {
            "hidden_size": _HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 3,
            "intermediate_size": 54, "max_position_embeddings": 128, "head_dim": 8, "attention_bias": True,
        },
    }[kind]  # fmt: skip


def random_model(kind: str, *, seed: int = 0, dtype: str = "float32"):
    """A small transformers model with 'hot' random weights: non-zero biases, peaked attention, spread logits."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        kind, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, pad_token_id=0, **config_of(kind)
    )
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, **{dtype_key(): torch.float32})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(noise * 0.2 + (0.0 if name.endswith("bias") else 1.0))
            else:
                parameter.copy_(noise * (1.0 if "embed" in name or "wte" in name else 0.25))
    return model.to(getattr(torch, dtype)).eval()


def write_model(directory: Path, kind: str = "llama", *, seed: int = 0, dtype: str = "bfloat16") -> Path:
    """Save `random_model` with a trained tokenizer, as a model directory."""
    model = random_model(kind, seed=seed, dtype=dtype)
    model.save_pretrained(directory)
    text_tokenizer = tokenizer.train(VOCABULARY, seed=5, adds_bos=kind == "llama")
    tokenizer.save(text_tokenizer, directory, context=128)
    return directory


def write_suite(path: Path, text: str = SUITE) -> Path:
    """Write a suite file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def read_json(path: Path) -> dict:
    """A JSON file as plain values."""
    return json.loads(path.read_text(encoding="utf-8"))
