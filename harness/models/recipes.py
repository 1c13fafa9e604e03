"""The recipes of the small test models, as data: architecture, text, training, native dtype.

Shapes are awkward on purpose (docs/models.md): 6 heads, or 12 with 6 KV heads; head_dim apart from
hidden / heads; an MLP width divisible by 6 and not by 4 (BLOOM's is fixed at 4 x hidden); 5 layers;
a prime vocabulary; a context of 1,024, trained on sequences of 256, then 640 and 1,024 tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CONTEXT = 1024
_LAYERS = 5
_HIDDEN = 144

# Short original length, so that the suites' longer prompts are past it; see the llama3 scaling of
# Llama 3.1 (transformers `_compute_llama3_parameters`).
_LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
_ROPE_THETA = 10_000.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How one small model is made. ``dtype`` is the native dtype of the written weights.

    ``phases`` are (steps, batch, length): short sequences first, on which copying is learnt, then long ones.
    """

    name: str
    summary: str
    model_type: str
    config: Mapping[str, Any]
    vocabulary: int
    adds_bos: bool = False
    dtype: str = "bfloat16"
    seed: int
    phases: tuple[tuple[int, int, int], ...] = ((1800, 6, 256), (400, 3, 640), (150, 2, 1024))
    learning_rate: float = 3e-3
    init_spread: float = 0.06

    @property
    def steps(self) -> int:
        return sum(steps for steps, _, _ in self.phases)


_BLOOM = {
    "hidden_size": _HIDDEN,
    "n_layer": _LAYERS,
    "n_head": 6,
    "layer_norm_epsilon": 1e-5,
    "seq_length": CONTEXT,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
_LLAMA = {
    "hidden_size": _HIDDEN,
    "intermediate_size": 390,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": 12,
    "num_key_value_heads": 6,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "attention_bias": True,
    "mlp_bias": True,
    "max_position_embeddings": CONTEXT,
    "rope_theta": _ROPE_THETA,
    "rope_scaling": _LLAMA3_SCALING,
    "tie_word_embeddings": False,
}
_GPT2 = {
    "n_embd": _HIDDEN,
    "n_inner": 570,
    "n_layer": _LAYERS,
    "n_head": 6,
    "n_positions": CONTEXT,
    "layer_norm_epsilon": 1e-5,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}

RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="bloom-tiny",
            summary="trained and stable, stored in fp16 as bloom-560m is",
            model_type="bloom",
            config=_BLOOM,
            vocabulary=1021,
            dtype="float16",
            seed=11,
        ),
        Recipe(
            name="bloom-raw",
            summary="hardly trained, flat logits: drifts at every change, as bigscience-small-testing does",
            model_type="bloom",
            config=_BLOOM,
            vocabulary=1021,
            seed=12,
            phases=((6, 3, 640),),
            init_spread=0.2,
            learning_rate=5e-4,
        ),
        Recipe(
            name="llama-tiny",
            summary="grouped-query attention, llama3 RoPE scaling, biases, an untied head, a tokenizer with <s>",
            model_type="llama",
            config=_LLAMA,
            vocabulary=1019,
            adds_bos=True,
            seed=13,
        ),
        Recipe(
            name="gpt2-tiny",
            summary="Conv1D weights (a square one among them), learned positions",
            model_type="gpt2",
            config=_GPT2,
            vocabulary=1021,
            seed=14,
            # Learned positions give no head start: copying takes longer to appear.
            phases=((3000, 6, 256), (500, 3, 640), (200, 2, 1024)),
        ),
    )
}
